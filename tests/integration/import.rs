//! `plumb bundle import` and `export`: another simulator's tables to a trained bundle and back.

use std::{
    fs,
    path::{Path, PathBuf},
};

use plumbline_bundles::{Bundle, OutOfDomain, Predictors, import::tables::Table};
use plumbline_schema::{Heads, Operator, OperatorShape, StepBatch};
use serde_json::Value;

use crate::support::{arg, ended, plumb, stdout_of, write};

/// Llama-2-7B, of which the tables are.
const LLAMA2_7B: &str = r#"{"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
"intermediate_size": 11008, "vocab_size": 32768, "max_position_embeddings": 4096}"#;

const A800: &str = "frontier/profiling/compute/a800/meta-llama/Llama-2-7b-hf";

fn tables(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/vidur").join(path)
}

/// Predicts the operators of an `mlp.csv` row.
struct Model<'a> {
    predictors: &'a Predictors,
    num_tokens: u32,
}

impl Model<'_> {
    const HEADS: Heads = Heads { num_q_heads: 32, num_kv_heads: 32, head_dim: 128 };

    fn ns(&self, operator: Operator, shape: &OperatorShape) -> f64 {
        self.predictors.predict(operator, shape, OutOfDomain::Refuse).expect("a prediction").time_ns
    }

    fn gemm(&self, operator: Operator, n: u32, k: u32) -> f64 {
        self.ns(operator, &OperatorShape::Gemm { m: self.num_tokens, n, k })
    }

    /// Vidur's column and the time that must stand there, ns.
    fn columns(&self) -> [(&'static str, f64); 7] {
        let num_tokens = self.num_tokens;
        let silu = OperatorShape::SiluMul { num_tokens, intermediate_size: 11_008 };
        let embedding = OperatorShape::Embedding { num_tokens, hidden_size: 4096 };
        [
            ("emb", self.ns(Operator::Embedding, &embedding)),
            ("attn_pre_proj", self.gemm(Operator::QkvProj, 12_288, 4096)),
            ("attn_rope", self.ns(Operator::Rope, &OperatorShape::Rope { num_tokens, heads: Self::HEADS })),
            ("attn_post_proj", self.gemm(Operator::OProj, 4096, 4096)),
            ("mlp_up_proj", self.gemm(Operator::GateUpProj, 22_016, 4096)),
            ("mlp_act", self.ns(Operator::SiluMul, &silu)),
            ("mlp_down_proj", self.gemm(Operator::DownProj, 4096, 11_008)),
        ]
    }
}

fn median_ms(row: &plumbline_bundles::import::tables::Row, source: &str) -> f64 {
    row.text(&format!("time_stats.{source}.median")).expect("a column").parse().expect("a time")
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * b.abs()
}

/// A measured shape is answered exactly, so that times come back as they went in; others as the predictor says.
#[test]
fn tables_come_back_through_a_trained_bundle() {
    let folder = tempfile::tempdir().expect("folder");
    let (bundle, out) = (folder.path().join("bundle"), folder.path().join("out"));
    let model = write(&folder.path().join("llama-2-7b.json"), LLAMA2_7B);
    let source = tables(A800);
    let text = stdout_of(["bundle", "import", "frontier", arg(&source), "--out", arg(&bundle)]);
    assert!(text.starts_with("a100-sxm4-80gb: 2 tables with 45 rows\n"), "{text}");
    stdout_of(["train", arg(&bundle)]);
    let verified = stdout_of(["bundle", "verify", arg(&bundle)]);
    assert!(verified.ends_with("sound\n"), "{verified}");
    let args =
        ["bundle", "export", "vidur", arg(&bundle), "--model", arg(&model), "--out", arg(&out), "--json"];
    let report: Value = serde_json::from_str(&stdout_of(args)).expect("one JSON document");
    assert_eq!(report["num_rows"]["mlp.csv"], 259);
    let exported = out.join("compute/a100/llama-2-7b");
    assert_eq!(report["files"][1], arg(&exported.join("attention.csv")));

    let predictors = Bundle::open(&bundle).and_then(|b| b.predictors()).expect("predictors");
    let (then, now) = (
        Table::read(&source.join("mlp.csv")).expect("the fixture"),
        Table::read(&exported.join("mlp.csv")).expect("the export"),
    );
    assert_eq!(then.columns(), now.columns());
    let mut num_compared = 0;
    for row in now.rows() {
        let num_tokens = row.whole("num_tokens", 1).expect("tokens");
        for (source, ns) in (Model { predictors: &predictors, num_tokens: num_tokens as u32 }).columns() {
            assert!(near(median_ms(&row, source) * 1e6, ns), "{num_tokens} tokens: {source}");
        }
        let Some(was) = then.rows().find(|was| was.whole("num_tokens", 1).is_ok_and(|n| n == num_tokens))
        else {
            continue;
        };
        num_compared += 1;
        for source in ["emb", "attn_pre_proj", "attn_rope", "mlp_up_proj", "mlp_act", "mlp_down_proj"] {
            assert!(near(median_ms(&row, source), median_ms(&was, source)), "{num_tokens} tokens: {source}");
        }
        // Two of our norms add the residual twice, where Vidur counts one add.
        let of = |row, sources: &[&str]| sources.iter().map(|source| median_ms(row, source)).sum::<f64>();
        let (norms, add) = (["input_layernorm", "post_attention_layernorm"], median_ms(&was, "add"));
        let expected = of(&was, &norms) + 2.0 * add;
        assert!(near(of(&row, &norms) + median_ms(&row, "add"), expected), "{num_tokens} tokens");
    }
    assert_eq!(num_compared, 13);
    check_attention(&source.join("attention.csv"), &exported.join("attention.csv"));
    // Both tables can be read again, and no second export overwrites them.
    let again = folder.path().join("again");
    stdout_of(["bundle", "import", "vidur", arg(&out), "--out", arg(&again)]);
    let (code, _, stderr) = ended(&plumb(args).output().expect("plumb starts"));
    assert_eq!(code, 2);
    assert!(stderr.contains("mlp.csv: expected a path where nothing exists yet"), "{stderr}");
}

fn check_attention(then: &Path, now: &Path) {
    let (then, now) = (Table::read(then).expect("the fixture"), Table::read(now).expect("the export"));
    assert_eq!(then.columns(), now.columns());
    let keys = ["batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill"];
    let mut num_compared = 0;
    for was in then.rows() {
        let is_same = |row: &plumbline_bundles::import::tables::Row| {
            keys.iter().all(|key| row.text(key) == was.text(key))
        };
        // Vidur's grid has each chunk after whole chunks only.
        let Some(row) = now.rows().find(is_same) else { continue };
        num_compared += 1;
        let is_prefill = was.flag("is_prefill").expect("a flag");
        let (ran, idle) =
            if is_prefill { ("attn_prefill", "attn_decode") } else { ("attn_decode", "attn_prefill") };
        assert!(near(median_ms(&row, ran), median_ms(&was, ran)), "line {}", was.line);
        assert_eq!(row.text(&format!("time_stats.{idle}.median")), Some("0"));
    }
    assert_eq!(num_compared, 32);
}

#[test]
fn what_a_bundle_cannot_tell_is_refused_or_left_out() {
    let folder = tempfile::tempdir().expect("folder");
    let bundle = folder.path().join("bundle");
    let model = write(&folder.path().join("llama-2-7b.json"), LLAMA2_7B);
    let source = tables("profiling/compute/a100");
    stdout_of(["bundle", "import", "vidur", arg(&source), "--out", arg(&bundle)]);
    let export = |out: &str, more: &[&str]| {
        let out = folder.path().join(out);
        let args = ["bundle", "export", "vidur", arg(&bundle), "--model", arg(&model), "--out", arg(&out)];
        ended(&plumb(args.iter().chain(more)).output().expect("plumb starts"))
    };
    let (code, _, stderr) = export("a", &[]);
    assert!(code == 2 && stderr.contains("no predictors: `plumb train` fits them"), "{stderr}");
    stdout_of(["train", arg(&bundle)]);
    let (code, stdout, stderr) = export("a", &["--tensor-parallel", "1,2"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("mlp.csv with 518 rows"), "{stdout}");
    assert!(
        stdout.contains("not made, attention.csv: no predictor of kv_cache_write, attention"),
        "{stdout}"
    );
    let (code, _, stderr) = export("b", &["--max-tokens", "8192"]);
    assert!(code == 2 && stderr.contains("m = 4160 is outside the measured 1..=4096"), "{stderr}");
    assert!(stderr.contains("hint: --max-tokens"), "{stderr}");
    assert!(!folder.path().join("b").exists());
    let (code, stdout, _) = export("b", &["--max-tokens", "8192", "--extrapolate"]);
    assert!(code == 0 && stdout.contains(" extrapolated"), "{stdout}");
    let (code, _, stderr) = export("c", &["--tensor-parallel", "3"]);
    assert!(code == 2 && stderr.contains("expected a tensor_parallel_size that divides"), "{stderr}");
}

#[test]
fn imports_say_what_they_did_and_refuse_what_cannot_be_true() {
    let folder = tempfile::tempdir().expect("folder");
    let source = tables("profiling");
    let out = folder.path().join("bundle");
    let import = |dir: &Path, out: &Path, more: &[&str]| {
        let args = ["bundle", "import", "vidur", arg(dir), "--out", arg(out)];
        ended(&plumb(args.iter().chain(more)).output().expect("plumb starts"))
    };
    let (code, stdout, stderr) = import(&source, &out, &["--gpu", "a100", "--network", "a100_dgx", "--json"]);
    assert_eq!(code, 0, "{stderr}");
    let report: Value = serde_json::from_str(&stdout).expect("one JSON document");
    assert_eq!((&report["gpu"], &report["dialect"]), (&"a100-sxm4-80gb".into(), &"vidur".into()));
    assert_eq!(report["digest"], Bundle::open(&out).expect("a bundle").digest());
    let (code, stdout, _) =
        import(&source, &folder.path().join("text"), &["--gpu", "a100", "--network", "a100_dgx"]);
    assert_eq!(code, 0);
    insta::assert_snapshot!("bundle_import_text", stdout);
    let (code, _, stderr) = import(&source, &out, &["--gpu", "a100", "--network", "a100_dgx"]);
    assert!(code == 2 && stderr.contains("expected a path where nothing exists yet"), "{stderr}");
    let (code, _, stderr) = import(&source, &folder.path().join("c"), &[]);
    assert!(code == 2 && stderr.contains("--gpu says which"), "{stderr}");

    // The first time of the first operator is lost.
    let text =
        fs::read_to_string(source.join("compute/a100/meta-llama/Llama-2-7b-hf/mlp.csv")).expect("a table");
    let (header, rows) = text.split_once('\n').expect("a header");
    let (_, rest) = rows.split_once(',').expect("cells");
    write(&folder.path().join("bad/a100/mlp.csv"), format!("{header}\n,{rest}"));
    let bad = folder.path().join("bad");
    let (code, _, stderr) = import(&bad, &folder.path().join("d"), &[]);
    assert_eq!(code, 2);
    let says = "mlp.csv, line 2, column `time_stats.emb.min`: expected a time in ms, found nothing; nothing is cleaned unless \
                asked for: --clean drop-missing (1)\n";
    assert!(stderr.ends_with(says), "{stderr}");
    assert!(!folder.path().join("d").exists());
    let (code, stdout, _) =
        import(&bad, &folder.path().join("d"), &["--clean", "drop-missing", "--clean", "drop-invalid"]);
    assert_eq!(code, 0);
    assert!(stdout.contains("drop-missing      1  time_stats.emb.min\n"), "{stdout}");
    let inspected = stdout_of(["bundle", "inspect", arg(&folder.path().join("d"))]);
    assert!(
        inspected.contains("not measured: drop-missing: 1 bad cells of time_stats.emb.min"),
        "{inspected}"
    );
}

/// The batch that an exported row stands for is the one that was predicted.
#[test]
fn exported_attention_is_of_the_batch_its_keys_say() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("out");
    let args =
        ["bundle", "export", "vidur", "h100-sxm5-80gb", "--model", "qwen3-0.6b", "--max-tokens", "256"];
    let text = stdout_of(args.iter().chain(&["--max-batch-size", "4", "--out", arg(&out)]));
    assert!(text.contains("qk_norm is part of attn_rope"), "{text}");
    assert!(text.contains("head_dim is 128, where Vidur takes n_embd / n_head = 64"), "{text}");
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles/data/h100-sxm5-80gb");
    let predictors = Bundle::open(&data).and_then(|b| b.predictors()).expect("predictors");
    let table = Table::read(&out.join("compute/h100/qwen3-0.6b/attention.csv")).expect("the export");
    let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
    for row in table.rows() {
        let key = |column| row.whole(column, 0).expect("a key");
        let (chunk, context) = (key("prefill_chunk_size"), key("kv_cache_size"));
        let (chunks, decodes, source) = if chunk > 0 {
            (format!("{chunk}:{context}"), String::new(), "attn_prefill")
        } else {
            let contexts = vec![context.to_string(); key("batch_size") as usize];
            (String::new(), contexts.join(";"), "attn_decode")
        };
        let load = StepBatch::parse(&chunks, &decodes).expect("a batch").shape().attention;
        let shape = OperatorShape::Attention { heads, load };
        let predicted =
            predictors.predict(Operator::Attention, &shape, OutOfDomain::Refuse).expect("a prediction");
        assert!(near(median_ms(&row, source) * 1e6, predicted.time_ns), "line {}", row.line);
    }
}

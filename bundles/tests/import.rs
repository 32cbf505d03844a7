//! Tables of Vidur and Frontier: what becomes of each column, and what is refused.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use plumbline_bundles::{
    Bundle, Sample,
    import::{Clean, Dialect, ImportError, ImportOptions, ImportReport, Imported, frontier, import, vidur},
    samples,
};
use plumbline_schema::{GpuSpec, Heads, Operator, OperatorShape, StepBatch, roofline::floor_ns};
use proptest::{prelude::*, sample::Index};

const LLAMA_A100: &str = "profiling/compute/a100/meta-llama/Llama-2-7b-hf";
const LLAMA_A800: &str = "frontier/profiling/compute/a800/meta-llama/Llama-2-7b-hf";

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/vidur").join(path)
}

fn text_of(path: &str) -> String {
    fs::read_to_string(fixture(path)).unwrap()
}

/// The table `name` of an A100 with this text.
fn folder_of(name: &str, text: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("a100")).unwrap();
    fs::write(folder.path().join("a100").join(name), text).unwrap();
    folder
}

/// The text with one cell changed; lines are counted from 1, the header is line 1.
fn with_cell(text: &str, line: usize, column: &str, value: &str) -> String {
    let at = text.lines().next().unwrap().split(',').position(|name| name == column).unwrap();
    let edit = |(i, row): (usize, &str)| {
        let mut cells: Vec<_> = row.split(',').collect();
        if i + 1 == line {
            cells[at] = value;
        }
        cells.join(",") + "\n"
    };
    text.lines().enumerate().map(edit).collect()
}

/// The text with every time of a column's operator multiplied.
fn scaled(text: &str, source: &str, factor: f64) -> String {
    let prefix = format!("time_stats.{source}.");
    let header: Vec<_> = text.lines().next().unwrap().split(',').collect();
    let row = |row: &str| {
        let cell = |(i, cell): (usize, &str)| match cell.parse::<f64>() {
            Ok(time) if header[i].starts_with(&prefix) => (time * factor).to_string(),
            _ => cell.to_owned(),
        };
        row.split(',').enumerate().map(cell).collect::<Vec<_>>().join(",") + "\n"
    };
    header.join(",") + "\n" + &text.lines().skip(1).map(row).collect::<String>()
}

fn cell(text: &str, line: usize, column: &str) -> f64 {
    let at = text.lines().next().unwrap().split(',').position(|name| name == column).unwrap();
    text.lines().nth(line - 1).unwrap().split(',').nth(at).unwrap().parse().unwrap()
}

fn key(text: &str, line: usize, column: &str) -> u64 {
    cell(text, line, column) as u64
}

fn cleaning(policies: &[Clean]) -> ImportOptions {
    ImportOptions { clean: policies.iter().copied().collect(), ..ImportOptions::default() }
}

fn error_of(result: Result<Imported, ImportError>) -> String {
    result.expect_err("must be refused").to_string()
}

fn of<'a>(samples: &'a [Sample], operator: Operator, shape: &OperatorShape) -> Vec<&'a Sample> {
    samples.iter().filter(|sample| sample.operator == operator && sample.shape == *shape).collect()
}

/// Llama-2-7B on two GPUs, 128 tokens, worked by hand: 16 heads of 128 and 5504 of the MLP on each.
#[test]
fn columns_become_operators_of_one_gpus_shard() {
    let text = text_of(&format!("{LLAMA_A100}/mlp.csv"));
    let rows: Vec<_> = (2..=text.lines().count())
        .filter(|&line| {
            key(&text, line, "num_tokens") == 128 && key(&text, line, "num_tensor_parallel_workers") == 2
        })
        .collect();
    let [line] = rows[..] else { panic!("{rows:?}") };
    let imported = vidur(&fixture(LLAMA_A100), &ImportOptions::default()).unwrap();
    assert_eq!(imported.gpu.name, "a100-sxm4-80gb");
    assert_eq!(imported.models, ["meta-llama/Llama-2-7b-hf"]);
    let heads = Heads { num_q_heads: 16, num_kv_heads: 16, head_dim: 128 };
    let gemm = |n, k| OperatorShape::Gemm { m: 128, n, k };
    let num_tokens = 128;
    for (operator, shape, source) in [
        (Operator::Embedding, OperatorShape::Embedding { num_tokens, hidden_size: 4096 }, "emb"),
        (Operator::QkvProj, gemm(6144, 4096), "attn_pre_proj"),
        (Operator::Rope, OperatorShape::Rope { num_tokens, heads }, "attn_rope"),
        (Operator::OProj, gemm(4096, 2048), "attn_post_proj"),
        (Operator::GateUpProj, gemm(11_008, 4096), "mlp_up_proj"),
        (Operator::SiluMul, OperatorShape::SiluMul { num_tokens, intermediate_size: 5504 }, "mlp_act"),
        (Operator::DownProj, gemm(4096, 5504), "mlp_down_proj"),
    ] {
        let median_ns = cell(&text, line, &format!("time_stats.{source}.median")) * 1e6;
        let found = of(&imported.samples, operator, &shape);
        let is_it = |sample: &&&Sample| {
            sample.stats.p50_ns.to_bits() == median_ns.to_bits() && sample.kernel == format!("vidur {source}")
        };
        assert!(found.iter().any(|sample| is_it(&sample)), "{operator}: {found:?}");
    }
    // Both norms of a row, each with the add of the residual; every tensor-parallel size has the same shape.
    let norm = OperatorShape::RmsNorm { num_tokens, hidden_size: 4096 };
    let norms = of(&imported.samples, Operator::RmsNorm, &norm);
    assert_eq!(norms.len(), 4);
    for source in ["input_layernorm", "post_attention_layernorm"] {
        let median = |source: &str| cell(&text, line, &format!("time_stats.{source}.median")) * 1e6;
        let sum = median(source) + median("add");
        let is_it = |sample: &&&Sample| {
            (sample.stats.p50_ns - sum).abs() < 1e-6 && sample.kernel == format!("vidur {source} + add")
        };
        assert!(norms.iter().any(|sample| is_it(&sample)), "{source}: {norms:?}");
    }
}

#[test]
fn attention_rows_become_chunks_and_decodes() {
    let imported = frontier(&fixture(LLAMA_A800), &ImportOptions::default()).unwrap();
    let text = text_of(&format!("{LLAMA_A800}/attention.csv"));
    let heads = Heads { num_q_heads: 32, num_kv_heads: 32, head_dim: 128 };
    let decodes = ["2048"; 8].join(";");
    for (chunks, decodes, source) in [("512:512", "", "attn_prefill"), ("", decodes.as_str(), "attn_decode")]
    {
        let batch = StepBatch::parse(chunks, decodes).unwrap();
        let shape = OperatorShape::Attention { heads, load: batch.shape().attention };
        let found = of(&imported.samples, Operator::Attention, &shape);
        let [sample] = found[..] else { panic!("{source}: {found:?}") };
        assert_eq!(sample.batch.as_ref(), Some(&batch));
        assert_eq!(sample.kernel, format!("frontier {source}"));
        let is_row = |line: &usize| {
            let key = |column: &str| key(&text, *line, column);
            let is_decode = key("batch_size") == 8 && key("kv_cache_size") == 2048;
            let is_prefill = key("prefill_chunk_size") == 512 && key("kv_cache_size") == 512;
            if chunks.is_empty() { is_decode } else { is_prefill }
        };
        let line = (2..=text.lines().count()).find(is_row).unwrap();
        let median_ns = cell(&text, line, &format!("time_stats.{source}.median")) * 1e6;
        assert_eq!(sample.stats.p50_ns.to_bits(), median_ns.to_bits());
    }
    // 64 and 128 tokens were written by decodes and by chunks, which take longer: the decodes' median stands.
    let writes: Vec<_> = imported.samples.iter().filter(|s| s.operator == Operator::KvCacheWrite).collect();
    let tokens: Vec<_> = writes.iter().map(|s| s.shape.values()[0]).collect();
    let distinct: BTreeSet<_> = tokens.iter().copied().collect();
    assert_eq!(distinct, BTreeSet::from([1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096]));
    assert_eq!(tokens.len(), distinct.len());
    let of_64 = writes.iter().find(|s| s.shape.values()[0] == 64).unwrap();
    assert!(of_64.stats.p50_ns < 10_000.0, "{of_64:?}");
    let notes = imported.report.notes.join("\n");
    assert!(notes.contains("an A800 is an A100 with a slower NVLink"), "{notes}");
    assert!(notes.contains("kv_cache_write: 32 rows became 10 samples"), "{notes}");
}

/// The oldest table leaves what did not run empty and has no writes of the KV cache.
#[test]
fn cells_of_what_did_not_run_are_not_missing() {
    let imported = vidur(&fixture("history/profiling/a100"), &ImportOptions::default()).unwrap();
    assert_eq!(imported.samples.len(), 7);
    // Llama-2-70B on two GPUs: 32 of 64 query heads and 4 of 8 others.
    assert!(imported.samples.iter().all(|s| s.shape.values()[..3] == [32, 4, 128]), "{:?}", imported.samples);
    let what: Vec<_> = imported.report.left_out.iter().map(|left| left.what.as_str()).collect();
    assert_eq!(what, ["attn_input_reshape", "attn_kv_cache_save", "attn_output_reshape"]);
    assert!(imported.report.left_out[2].reason.contains("median over its table"), "{:?}", imported.report);
}

#[test]
fn models_without_a_gated_mlp_lose_norm_and_activation() {
    let phi = fixture("profiling/compute/a100/microsoft/phi-2");
    let imported = vidur(&phi, &ImportOptions::default()).unwrap();
    let operators: Vec<_> = imported.report.operators.iter().map(|o| (o.operator, o.num_samples)).collect();
    assert_eq!(
        operators,
        [
            (Operator::Embedding, 4),
            (Operator::QkvProj, 4),
            (Operator::Rope, 4),
            (Operator::OProj, 4),
            (Operator::GateUpProj, 4),
            (Operator::DownProj, 4)
        ]
    );
    let left_out: Vec<_> =
        imported.report.left_out.iter().map(|left| (left.what.as_str(), left.num_rows)).collect();
    assert_eq!(left_out, [("input_layernorm", 4), ("mlp_act", 4)]);
    // One matrix, not two: n is the width of the MLP.
    let up = OperatorShape::Gemm { m: 64, n: 10_240, k: 2560 };
    assert_eq!(of(&imported.samples, Operator::GateUpProj, &up).len(), 1);
}

#[test]
fn mixed_gpus_and_nodes_are_told_apart() {
    let root = fixture("profiling");
    let error = error_of(vidur(&root, &ImportOptions::default()));
    let says = "expected tables of one known GPU (a100-sxm4-80gb, h100-sxm5-80gb, h200-sxm-141gb), found a100 (2), \
                a100_dgx (2), a100_pairwise_nvlink (1), h100 (1); --gpu says which";
    assert!(error.ends_with(says), "{error}");
    let gpu = |gpu: &str, network: Option<&str>| ImportOptions {
        gpu: Some(gpu.into()),
        network: network.map(Into::into),
        ..ImportOptions::default()
    };
    let error = error_of(vidur(&root, &gpu("a100", None)));
    assert!(error.contains("found a100_dgx, a100_pairwise_nvlink; name one with --network"), "{error}");
    let error = error_of(vidur(&root, &gpu("a100", Some("a100_pcie"))));
    assert!(error.contains("a100_pairwise_nvlink, and --network a100_pcie"), "{error}");
    let error = error_of(vidur(&root, &gpu("v100", None)));
    assert!(error.contains("found --gpu v100"), "{error}");
    let error = error_of(vidur(&fixture(LLAMA_A100), &gpu("h100", None)));
    assert!(error.contains("found a100 (1), and --gpu h100"), "{error}");

    let h100 = vidur(&root, &gpu("h100-sxm5-80gb", None)).unwrap();
    assert_eq!((h100.report.tables.len(), h100.gpu.name.as_str()), (1, "h100-sxm5-80gb"));
    let a100 = vidur(&root, &gpu("a100", Some("a100_dgx"))).unwrap();
    assert_eq!(a100.models, ["meta-llama/Llama-2-7b-hf", "microsoft/phi-2"]);
    let one = OperatorShape::Collective { message_bytes: 67_108_864, num_ranks: 4 };
    assert_eq!(of(&a100.samples, Operator::AllReduce, &one).len(), 1);
    let left = |what: &str| a100.report.left_out.iter().find(|left| left.what == what).unwrap().num_rows;
    assert_eq!(left("all_reduce rows over several nodes"), 10);
    assert_eq!(left("send_recv rows over several nodes"), 5);
    let num = a100.samples.iter().filter(|s| s.operator.is_collective()).count();
    assert_eq!(num, 15);
}

#[test]
fn a_folder_of_no_known_gpu_is_what_the_caller_says() {
    let text = text_of(&format!("{LLAMA_A100}/mlp.csv"));
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("profiling/compute/mine/org/model");
    fs::create_dir_all(&own).unwrap();
    fs::write(own.join("mlp.csv"), text).unwrap();
    let error = error_of(vidur(folder.path(), &ImportOptions::default()));
    assert!(error.contains("found mine (1, unknown); --gpu says which"), "{error}");
    let options = ImportOptions { gpu: Some("a100".into()), ..ImportOptions::default() };
    let imported = vidur(folder.path(), &options).unwrap();
    assert_eq!(imported.models, ["org/model"]);
    assert_eq!(imported.report.notes, ["mine: taken for a100-sxm4-80gb, as asked"]);

    fs::remove_file(own.join("mlp.csv")).unwrap();
    fs::write(own.join("cpu_overheads.csv"), "a\n1\n").unwrap();
    let error = error_of(vidur(folder.path(), &options));
    assert!(error.contains("expected tables named mlp, attention, all_reduce or send_recv"), "{error}");
    assert!(error.contains("cpu_overheads.csv"), "{error}");
}

/// A real Vidur profile had empty cells, which were later staged as 0, and an output projection of 2 us at 4096 tokens.
#[test]
fn impossible_cells_are_refused_and_only_their_policy_cleans_them() {
    use Clean::{DropBelowFloor, DropInvalid, DropMissing};
    let text = text_of(&format!("{LLAMA_A100}/mlp.csv"));
    let line = (2..=text.lines().count()).find(|&l| key(&text, l, "num_tokens") == 4096).unwrap();
    let cases = [
        ("attn_pre_proj.median", "", DropMissing, "expected a time in ms, found nothing"),
        ("attn_pre_proj.std", "nan", DropMissing, "expected a time in ms, found `nan`"),
        ("attn_pre_proj.median", "0.0", DropInvalid, "expected a finite time in ms above 0, found `0.0`"),
        ("emb.max", "inf", DropInvalid, "expected a finite time in ms above 0, found `inf`"),
        ("mlp_act.mean", "fast", DropInvalid, "expected a time in ms, found `fast`"),
        ("mlp_down_proj.median", "99", DropInvalid, "expected a time from min = "),
        ("add.median", "-0.055", DropInvalid, "expected a finite time in ms above 0, found `-0.055`"),
    ];
    let whole = vidur(folder_of("mlp.csv", &text).path(), &ImportOptions::default()).unwrap();
    for (column, value, policy, says) in cases {
        let column = format!("time_stats.{column}");
        let folder = folder_of("mlp.csv", &with_cell(&text, line, &column, value));
        let error = error_of(vidur(folder.path(), &ImportOptions::default()));
        let place = format!("mlp.csv, line {line}, column `{column}`: {says}");
        assert!(error.contains(&place), "{error}");
        assert!(error.contains(&format!("nothing is cleaned unless asked for: --clean {policy}")), "{error}");
        // Another policy does not cover it.
        let others: Vec<_> =
            [DropMissing, DropInvalid, DropBelowFloor].into_iter().filter(|p| *p != policy).collect();
        assert_eq!(error_of(vidur(folder.path(), &cleaning(&others))), error);
        let cleaned = vidur(folder.path(), &cleaning(&[policy])).unwrap();
        // The row's other samples stay; of a norm both need the add.
        let num_cells = if column.contains("add") { 2 } else { 1 };
        assert_eq!(cleaned.samples.len() + num_cells, whole.samples.len(), "{column}");
        let took: Vec<_> =
            cleaned.report.cleaned.iter().map(|c| (c.policy, c.column.as_str(), c.num_cells)).collect();
        assert_eq!(took, [(policy, column.as_str(), num_cells)]);
        assert_eq!(cleaned.report.incomplete(), [format!("{policy}: {num_cells} bad cells of {column}")]);
    }
}

#[test]
fn times_below_the_physical_floor_are_refused() {
    let text = text_of(&format!("{LLAMA_A100}/mlp.csv"));
    let line = (2..=text.lines().count()).find(|&l| key(&text, l, "num_tokens") == 4096).unwrap();
    let mut bad = text.clone();
    for statistic in ["min", "max", "mean", "median"] {
        bad = with_cell(&bad, line, &format!("time_stats.attn_post_proj.{statistic}"), "0.0021915");
    }
    let folder = folder_of("mlp.csv", &bad);
    let error = error_of(vidur(folder.path(), &ImportOptions::default()));
    // 2 x 4096^3 FLOP at 312 TFLOP/s, or half of it on two GPUs.
    assert!(
        error.contains("column `time_stats.attn_post_proj.median`: expected at least the physical floor 0.")
    );
    assert!(error.contains("found 0.0021915; nothing is cleaned"), "{error}");
    assert!(error.contains("--clean drop-below-floor (1)"), "{error}");
    vidur(folder.path(), &cleaning(&[Clean::DropBelowFloor])).unwrap();
    // 0.0004 ms is shorter than any kernel, however small its work.
    let mut bad = text.clone();
    for statistic in ["min", "max", "mean", "median"] {
        bad = with_cell(&bad, 20, &format!("time_stats.attn_rope.{statistic}"), "0.0004");
    }
    let error = error_of(vidur(folder_of("mlp.csv", &bad).path(), &ImportOptions::default()));
    assert!(error.contains("expected at least the physical floor 0.0005 ms, found 0.0004"), "{error}");
}

#[test]
fn every_policy_that_is_needed_is_named_at_once() {
    let text = text_of(&format!("{LLAMA_A100}/mlp.csv"));
    let bad = with_cell(&text, 3, "time_stats.emb.median", "");
    let bad = with_cell(&bad, 4, "time_stats.emb.median", "");
    let bad = with_cell(&bad, 5, "time_stats.mlp_act.min", "0");
    let folder = folder_of("mlp.csv", &bad);
    let error = error_of(vidur(folder.path(), &ImportOptions::default()));
    assert!(error.contains("(and 2 more like it)"), "{error}");
    assert!(error.ends_with("--clean drop-missing (2), --clean drop-invalid (1)"), "{error}");
    let imported = vidur(folder.path(), &cleaning(&[Clean::DropMissing, Clean::DropInvalid])).unwrap();
    let incomplete = imported.report.incomplete();
    assert_eq!(
        incomplete,
        [
            "drop-missing: 2 bad cells of time_stats.emb.median",
            "drop-invalid: 1 bad cells of time_stats.mlp_act.min"
        ]
    );
    // The bundle says it too, in the manifest and in full.
    let out = tempfile::tempdir().unwrap();
    let bundle = imported.write(&out.path().join("b"), "2026-01-01T00:00:00Z".into()).unwrap();
    assert_eq!(bundle.manifest.incomplete, incomplete);
    let stored: ImportReport = bundle.read_payload_json("import.json", "an import").unwrap();
    assert_eq!(stored, imported.report);
    assert_eq!(Bundle::open(&bundle.root).unwrap().samples().unwrap(), imported.samples);
    let verified = bundle.verify().unwrap();
    assert!(verified.is_sound(), "{:?}", verified.problems);
}

#[test]
fn another_unit_is_refused_whatever_the_policy() {
    let all: Vec<_> =
        [Clean::DropMissing, Clean::DropInvalid, Clean::DropBelowFloor, Clean::MedianOfDuplicates].into();
    for (path, dialect, sources) in [
        (format!("{LLAMA_A100}/mlp.csv"), Dialect::Vidur, &["emb", "attn_rope", "mlp_down_proj"][..]),
        (format!("{LLAMA_A800}/attention.csv"), Dialect::Frontier, &["attn_prefill", "attn_decode"]),
        ("profiling/network/a100_dgx/all_reduce.csv".to_owned(), Dialect::Vidur, &["all_reduce"]),
    ] {
        let text = text_of(&path);
        let name = Path::new(&path).file_name().unwrap().to_str().unwrap();
        import(folder_of(name, &text).path(), dialect, &ImportOptions::default()).unwrap();
        // Microseconds, nanoseconds and seconds read as milliseconds.
        for factor in [1e3, 1e6, 1e-3] {
            for source in sources {
                let folder = folder_of(name, &scaled(&text, source, factor));
                let error = error_of(import(folder.path(), dialect, &cleaning(&all)));
                let says = format!("column `time_stats.{source}.median`: expected times in milliseconds");
                assert!(error.contains(&says), "{factor}: {error}");
            }
        }
    }
}

#[test]
fn repeated_shapes_stay_where_they_agree() {
    let text = text_of(&format!("{LLAMA_A100}/mlp.csv"));
    let twice: Vec<_> = (2..=text.lines().count())
        .filter(|&l| key(&text, l, "num_tokens") == 2048 && key(&text, l, "num_tensor_parallel_workers") == 1)
        .collect();
    let [_, second] = twice[..] else { panic!("{twice:?}") };
    let shape = OperatorShape::Gemm { m: 2048, n: 4096, k: 11_008 };
    let whole = vidur(folder_of("mlp.csv", &text).path(), &ImportOptions::default()).unwrap();
    assert_eq!(of(&whole.samples, Operator::DownProj, &shape).len(), 2);
    let mut bad = text.clone();
    for statistic in ["min", "max", "mean", "median"] {
        let column = format!("time_stats.mlp_down_proj.{statistic}");
        let tripled = (3.0 * cell(&text, second, &column)).to_string();
        bad = with_cell(&bad, second, &column, &tripled);
    }
    let folder = folder_of("mlp.csv", &bad);
    let error = error_of(vidur(folder.path(), &ImportOptions::default()));
    let says = format!(
        "line {second}, column `time_stats.mlp_down_proj.median`: expected a time within a factor of 2 of"
    );
    assert!(error.contains(&says), "{error}");
    assert!(error.contains("--clean median-of-duplicates (1)"), "{error}");
    let merged = vidur(folder.path(), &cleaning(&[Clean::MedianOfDuplicates])).unwrap();
    let found = of(&merged.samples, Operator::DownProj, &shape);
    let [sample] = found[..] else { panic!("{found:?}") };
    let median = |line| cell(&bad, line, "time_stats.mlp_down_proj.median") * 1e6;
    assert!((sample.stats.p50_ns - f64::midpoint(median(twice[0]), median(second))).abs() < 1e-6);
    assert_eq!(
        merged.report.incomplete(),
        ["median-of-duplicates: 2 samples of vidur mlp_down_proj that disagreed became their medians"]
    );
}

/// 1 us and 3 us may both be 1.5 and 2.5 us: within a factor of two.
#[test]
fn rounding_is_no_disagreement() {
    let text = text_of("profiling/network/a100_dgx/send_recv.csv");
    let line = text
        .lines()
        .position(|l| l.contains(",0,2,2048,send_recv,2,"))
        .expect("a small message inside a node")
        + 1;
    let with_time = |text: &str, line: usize, ms: &str| {
        let mut text = text.to_owned();
        for statistic in ["min", "max", "mean", "median"] {
            text = with_cell(&text, line, &format!("time_stats.send_recv.{statistic}"), ms);
        }
        text
    };
    let again = text.lines().nth(line - 1).unwrap();
    let twice = format!("{text}{again}\n");
    let last = twice.lines().count();
    let agreeing = with_time(&with_time(&twice, line, "0.001"), last, "0.003");
    let imported = vidur(folder_of("send_recv.csv", &agreeing).path(), &ImportOptions::default()).unwrap();
    let shape = OperatorShape::Collective { message_bytes: 2048, num_ranks: 2 };
    let found = of(&imported.samples, Operator::SendRecv, &shape);
    let [sample] = found[..] else { panic!("{found:?}") };
    assert_eq!(sample.stats.p50_ns.to_bits(), 2_000f64.to_bits());
    assert!(imported.report.notes[0].contains("not beyond rounding"), "{:?}", imported.report.notes);
    let apart = with_time(&with_time(&twice, line, "0.001"), last, "0.004");
    let error = error_of(vidur(folder_of("send_recv.csv", &apart).path(), &ImportOptions::default()));
    assert!(error.contains("within a factor of 2 of 0.001 ms"), "{error}");
}

#[test]
fn bad_keys_are_never_cleaned() {
    let text = text_of(&format!("{LLAMA_A100}/mlp.csv"));
    for (column, value, says) in [
        ("num_tokens", "", "expected a whole number from 1 to 1099511627776, found nothing"),
        ("num_tokens", "1e12", "expected at most 4194304, found 1000000000000"),
        ("n_head", "33", "expected a divisor of n_embd = 4096, found 33"),
        ("num_tensor_parallel_workers", "3", "expected a divisor of n_head = 32, found 3"),
        ("use_gated_mlp", "2", "expected True or False, found `2`"),
        ("n_expanded_embd", "4194304", "expected at most 4194304, found 8388608"),
    ] {
        let all = cleaning(&[Clean::DropMissing, Clean::DropInvalid]);
        let mut bad = with_cell(&text, 3, column, value);
        if column == "n_expanded_embd" {
            bad = with_cell(&bad, 3, "num_tensor_parallel_workers", "1");
        }
        let error = error_of(vidur(folder_of("mlp.csv", &bad).path(), &all));
        assert!(error.contains("mlp.csv, line 3, column `"), "{error}");
        assert!(error.contains(says), "{column} = {value}: {error}");
    }
    // A decode row that has a prefill's time is not what it says.
    let text = text_of("history/profiling/a100/attention.csv");
    let line = text.lines().position(|row| row.contains(",True,")).unwrap() + 1;
    let bad = with_cell(&text, line, "time_stats.attn_decode.median", "0.5");
    let error = error_of(vidur(folder_of("attention.csv", &bad).path(), &ImportOptions::default()));
    assert!(error.contains("expected nothing or 0 in a row with is_prefill = True, found `0.5`"), "{error}");
}

/// Newer Frontier tables: repeats are counted, what is not split over GPUs stands once, and there is no `add`.
#[test]
fn newer_frontier_tables_say_how_often_they_timed() {
    let text = text_of(&format!("{LLAMA_A800}/mlp.csv"));
    let header: Vec<_> = text.lines().next().unwrap().split(',').collect();
    let columns: Vec<_> =
        header.iter().filter(|name| !name.starts_with("time_stats.add.")).copied().collect();
    let mut lines = vec![format!("{},time_stats.emb.count,profiling_precision", columns.join(","))];
    for (i, row) in text.lines().skip(1).enumerate() {
        let is_two = i % 2 == 1;
        let cells = header.iter().zip(row.split(',')).filter(|(name, _)| columns.contains(name));
        let cell = |(name, cell): (&&str, &str)| match *name {
            "num_tensor_parallel_workers" if is_two => "2".to_owned(),
            name if is_two && (name.contains("emb.") || name.contains("layernorm")) => String::new(),
            _ => cell.to_owned(),
        };
        let precision = if i == 0 { "FP8" } else { "FP16" };
        let count = if is_two { "" } else { "40.0" };
        lines.push(format!("{},{count},{precision}", cells.map(cell).collect::<Vec<_>>().join(",")));
    }
    let folder = folder_of("linear_op.csv", &(lines.join("\n") + "\n"));
    let imported = frontier(folder.path(), &ImportOptions::default()).unwrap();
    // 13 rows: one of FP8, six of two GPUs.
    let num = |operator| imported.samples.iter().filter(|s| s.operator == operator).count();
    assert_eq!((num(Operator::Embedding), num(Operator::QkvProj), num(Operator::RmsNorm)), (6, 12, 0));
    let embeddings = imported.samples.iter().filter(|s| s.operator == Operator::Embedding);
    assert!(embeddings.into_iter().all(|sample| sample.stats.n == 40));
    let left: Vec<_> = imported.report.left_out.iter().map(|l| (l.what.as_str(), l.num_rows)).collect();
    let norms = [("input_layernorm", 13), ("post_attention_layernorm", 13)];
    assert_eq!(left, [("emb", 6), norms[0], norms[1], ("rows of another precision", 1)]);
    // Vidur has no such table.
    assert!(error_of(vidur(folder.path(), &ImportOptions::default())).contains("linear_op.csv"));
}

/// Every sample must hold what training and reading back ask of it.
fn check(imported: &Imported) {
    for sample in &imported.samples {
        sample.stats.check().unwrap_or_else(|e| panic!("{e:?}: {sample:?}"));
        assert!(sample.shape.is_of(sample.operator));
        assert!(sample.stats.min_ns >= floor_ns(&sample.shape, &imported.gpu), "{sample:?}");
    }
    for operator in Operator::ALL {
        let own: Vec<_> = imported.samples.iter().filter(|s| s.operator == operator).cloned().collect();
        if !own.is_empty() {
            let csv = samples::to_csv(operator, &own);
            assert_eq!(samples::from_csv(operator, &csv, Path::new("samples.csv")).unwrap(), own);
        }
    }
}

#[test]
fn whole_fixtures_are_sound() {
    let options = ImportOptions {
        gpu: Some("a100".into()),
        network: Some("a100_dgx".into()),
        ..ImportOptions::default()
    };
    let imported = vidur(&fixture("profiling"), &options).unwrap();
    assert_eq!(imported.gpu, GpuSpec::by_name("a100-sxm4-80gb").unwrap());
    check(&imported);
    check(&frontier(&fixture("frontier"), &ImportOptions::default()).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    /// Whatever the bytes, a table is refused in words or its samples are sound.
    #[test]
    fn edited_tables_never_panic(
        table in 0..4usize,
        edits in prop::collection::vec((any::<Index>(), edit()), 1..6),
        cleans in any::<bool>(),
    ) {
        let (path, dialect) = [
            ("profiling/compute/a100/microsoft/phi-2/mlp.csv", Dialect::Vidur),
            ("frontier/profiling/compute/a800/meta-llama/Llama-2-7b-hf/attention.csv", Dialect::Frontier),
            ("history/profiling/a100/attention.csv", Dialect::Vidur),
            ("profiling/network/a100_dgx/all_reduce.csv", Dialect::Vidur),
        ][table];
        let mut bytes = fs::read(fixture(path)).unwrap();
        for (at, edit) in edits {
            let at = at.index(bytes.len());
            match edit {
                Edit::Replace(byte) => bytes[at] = byte,
                Edit::Insert(text) => drop(bytes.splice(at..at, text.bytes())),
                Edit::Cut(len) => drop(bytes.drain(at..(at + len).min(bytes.len()))),
            }
            if bytes.is_empty() {
                bytes.push(b',');
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let name = Path::new(path).file_name().unwrap();
        fs::create_dir(folder.path().join("a100")).unwrap();
        fs::write(folder.path().join("a100").join(name), bytes).unwrap();
        let policies = [Clean::DropMissing, Clean::DropInvalid, Clean::DropBelowFloor, Clean::MedianOfDuplicates];
        let options = cleaning(if cleans { &policies } else { &[] });
        match import(folder.path(), dialect, &options) {
            Ok(imported) => check(&imported),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}

#[derive(Clone, Debug)]
enum Edit {
    Replace(u8),
    Insert(&'static str),
    Cut(usize),
}

fn edit() -> impl Strategy<Value = Edit> {
    let poison = [
        "-",
        "0",
        "9",
        "e9",
        "E-9",
        ".",
        ",",
        "\n",
        "\"",
        "nan",
        "inf",
        "1e308",
        "4294967295",
        "True",
        "\u{feff}",
        "99999999999999999999",
    ];
    prop_oneof![
        any::<u8>().prop_map(Edit::Replace),
        prop::sample::select(poison.to_vec()).prop_map(Edit::Insert),
        (1..80usize).prop_map(Edit::Cut),
    ]
}

//! Readers under mutated files: an error that names the file, in one line, and never a panic.

use std::{
    fmt::Display,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use plumbline_bundles::{Bundle, EngineProfile, OutOfDomain, samples};
use plumbline_schema::{ModelSpec, Operator, OperatorShape, Run, Workload, files::read_json};
use plumbline_validator::Suite;
use rand::{Rng, RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::{
    fixture::fixture,
    support::{DEPLOYMENT, WORKLOAD, write},
};

/// What tends to break readers.
const POISON: [&str; 22] = [
    "-1",
    "0",
    "1e999",
    "NaN",
    "inf",
    "-0.0",
    "18446744073709551615",
    "18446744073709551616",
    "4294967296",
    "null",
    "true",
    "\"\"",
    "{}",
    "[]",
    "[[[[[[[[[[[[[[[[",
    "\u{0}",
    "\u{feff}",
    "\r\n",
    ",",
    "\"",
    "../../../etc/passwd",
    "\u{1b}[31m",
];

/// One mutation of `bytes`; some leave the text valid, most do not.
pub fn mutate(bytes: &[u8], rng: &mut impl Rng) -> Vec<u8> {
    let mut out = bytes.to_vec();
    let at = rng.random_range(0..out.len());
    match rng.random_range(0..8) {
        0 => out.truncate(at),
        1 => out[at] ^= 1 << rng.random_range(0..8),
        2 => {
            let poison = POISON[rng.random_range(0..POISON.len())];
            out.splice(at..at, poison.bytes());
        }
        3 | 4 => replace_number(&mut out, at, POISON[rng.random_range(0..POISON.len())]),
        5 => {
            let end = (at + rng.random_range(1..64)).min(out.len());
            out.drain(at..end);
        }
        6 => {
            let end = (at + rng.random_range(1..256)).min(out.len());
            let piece = out[at..end].to_vec();
            out.splice(at..at, piece);
        }
        _ => replace_line(&mut out, at, rng.random_range(0..3)),
    }
    out
}

/// Replaces the first number at or behind `at`.
fn replace_number(out: &mut Vec<u8>, at: usize, with: &str) {
    let Some(start) = (at..out.len()).find(|i| out[*i].is_ascii_digit()) else { return };
    let end = (start..out.len()).find(|i| !out[*i].is_ascii_digit()).unwrap_or(out.len());
    out.splice(start..end, with.bytes());
}

/// Drops, doubles or empties the line around `at`.
fn replace_line(out: &mut Vec<u8>, at: usize, how: u32) {
    let start = out[..at].iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
    let end = out[at..].iter().position(|b| *b == b'\n').map_or(out.len(), |i| at + i + 1);
    let line = out[start..end].to_vec();
    match how {
        0 => drop(out.drain(start..end)),
        1 => drop(out.splice(start..start, line)),
        _ => drop(out.splice(start..end, *b"\n")),
    }
}

/// Feeds `rounds` mutations of `good` to `read`, which returns the error's text.
///
/// Good bytes must pass, and a fair share of the mutations must fail: a reader that takes anything is no reader.
fn storm<E: Display>(
    what: &str,
    good: &[u8],
    rounds: u64,
    path: &Path,
    read: impl Fn(&[u8]) -> Result<(), E>,
) {
    if let Err(error) = read(good) {
        panic!("{what}: the unchanged file is refused: {error}");
    }
    let mut refused = 0;
    for seed in 0..rounds {
        let mut rng = Pcg64::seed_from_u64(seed);
        let mut bytes = mutate(good, &mut rng);
        if rng.random_bool(0.3) && !bytes.is_empty() {
            bytes = mutate(&bytes, &mut rng);
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| read(&bytes).map_err(|error| error.to_string())));
        let Ok(read) = outcome else {
            panic!("{what}, seed {seed}: the reader panicked on {:?}", String::from_utf8_lossy(&bytes));
        };
        if let Err(text) = read {
            refused += 1;
            let name = path.file_name().expect("a file").to_string_lossy();
            assert!(text.contains(&*name), "{what}, seed {seed}: `{text}` does not name {name}");
        }
    }
    assert!(refused > rounds / 10, "{what}: only {refused} of {rounds} mutations were refused");
}

#[test]
fn model_configs() {
    let path = Path::new("config.json");
    for name in ["qwen3-0.6b", "llama3-8b"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema/models");
        let good = fs::read(folder.join(format!("{name}.json"))).expect("shipped config");
        storm(name, &good, 2_000, path, |bytes| match str::from_utf8(bytes) {
            Ok(text) => {
                let spec = ModelSpec::from_hf_config("m", text, path).map_err(|e| e.to_string())?;
                // What was accepted can be counted without overflow.
                let _ = (spec.num_parameters(), spec.weight_bytes(), spec.kv_bytes_per_token());
                Ok(())
            }
            Err(_) => Err("config.json: not UTF-8".to_owned()),
        });
    }
}

#[test]
fn workloads() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("workload.csv");
    storm("workload", WORKLOAD.as_bytes(), 1_000, &path, |bytes| {
        write(&path, bytes);
        Workload::read(&path).map(|workload| {
            let _ = workload.summary();
        })
    });
}

#[test]
fn deployments() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("engine.json");
    storm("deployment", DEPLOYMENT.as_bytes(), 1_000, &path, |bytes| {
        write(&path, bytes);
        read_json::<plumbline_schema::Deployment>(&path, "an engine.json").map(|d| drop(d.check()))
    });
}

/// A small real-looking run.
fn run_files() -> [(&'static str, String); 4] {
    let requests = "request_id,arrival_time_ns,admitted_time_ns,first_token_time_ns,ttft_ns,completion_time_ns,\
        num_prefill_tokens,num_decode_tokens,num_decode_tokens_actual,status,backend\n\
        0,0,10,1000,1000,3000,20,3,3,ok,engine\n1,500,600,2000,1500,3000,9,2,2,ok,engine\n";
    let tokens = "request_id,token_index,token_time_ns,token_latency_ns\n\
        0,0,1000,0\n0,1,2000,1000\n1,0,2000,0\n0,2,3000,1000\n1,1,3000,1000\n";
    let steps = "step_start_ns,step_duration_ns,schedule_ns,num_prefill_seqs,num_prefill_tokens,num_decode_seqs,\
        prefill_chunks_tokens_context,decode_contexts\n\
        20,980,5,1,20,0,20:0,\n1000,1000,5,1,9,1,9:0,20\n2000,1000,5,0,0,2,,21;9\n";
    [
        ("request_metrics.csv", requests.to_owned()),
        ("token_metrics.csv", tokens.to_owned()),
        ("step_metrics.csv", steps.to_owned()),
        ("run.json", format!(r#"{{"kind": "real", "engine": "engine", "deployment": {DEPLOYMENT}}}"#)),
    ]
}

#[test]
fn runs() {
    for (mutated, good) in run_files() {
        let folder = tempfile::tempdir().expect("folder");
        for (name, text) in run_files() {
            write(&folder.path().join(name), text);
        }
        let path = folder.path().join(mutated);
        // Any file of the folder may be the one at odds with the mutated one.
        let named = if mutated == "request_metrics.csv" { folder.path().to_path_buf() } else { path.clone() };
        storm(mutated, good.as_bytes(), 700, &named, |bytes| {
            write(&path, bytes);
            Run::read(folder.path()).map(|run| {
                // Replaying what was accepted must not panic either.
                let _ = plumbline_simulator::replay::replay(&run);
                let _ = run.workload().summary();
            })
        });
    }
}

#[test]
fn suites() {
    let path = Path::new("suite.toml");
    let good = r#"# Cases.
[[case]]
name = "one/conv"
real = ["runs/a", "runs/b"]
bundle = "h100-sxm5-80gb"
model = "qwen3-0.6b"
engine = "vllm-0.24-graph"
role = "held_out"
gpu = "a100-sxm4-80gb"
deployment = { max_num_seqs = 12, mode = "eager" }
requests = [4, 5]

[[case]]
name = "two"
real = ["runs/c"]
bundle = "./mine"
model = "qwen3-0.6b"
engine = "fitted.json"
"#;
    storm("suite", good.as_bytes(), 3_000, path, |bytes| match str::from_utf8(bytes) {
        Ok(text) => Suite::parse(text, path, Path::new("data")).map(drop).map_err(|e| e.to_string()),
        Err(_) => Err("suite.toml: not UTF-8".to_owned()),
    });
}

#[test]
fn engine_profiles() {
    let path = Path::new("engine.json");
    let good = fs::read_to_string(fixture().file("engine.json")).expect("engine profile");
    storm("engine profile", good.as_bytes(), 3_000, path, |bytes| match str::from_utf8(bytes) {
        Ok(text) => EngineProfile::parse(text, path).map(drop).map_err(|e| e.to_string()),
        Err(_) => Err("engine.json: not UTF-8".to_owned()),
    });
}

#[test]
fn bundles() {
    let folder = tempfile::tempdir().expect("folder");
    let root = folder.path().join("bundle");
    fixture().copy_bundle(&root);
    let manifest = root.join("manifest.json");
    let good = fs::read(&manifest).expect("manifest");
    storm("manifest", &good, 1_500, &root, |bytes| {
        write(&manifest, bytes);
        let bundle = Bundle::open(&root)?;
        bundle.host().map(drop)?;
        bundle.operator_samples(Operator::Rope).map(drop)
    });
    write(&manifest, &good);
    // Past the digests: what a hostile maker of bundles would do.
    for (name, rounds) in
        [("host.json", 1_500), ("samples/attention.csv", 200), ("predictors/sample.json", 150)]
    {
        let good = fs::read(root.join(name)).expect("payload");
        storm(name, &good, rounds, &root.join(name), |bytes| {
            let mut bundle = Bundle::open(&root)?;
            bundle.update(vec![(name.to_owned(), bytes.to_vec())])?;
            match name {
                "host.json" => bundle.host().map(drop),
                "samples/attention.csv" => bundle.operator_samples(Operator::Attention).map(drop),
                _ => {
                    let predictors = bundle.predictors()?;
                    // What was accepted answers without a panic, and never with zero.
                    let shape = OperatorShape::Sample { num_seqs: 7, vocab_size: 151_936 };
                    if let Ok(time) = predictors.predict(Operator::Sample, &shape, OutOfDomain::Extrapolate) {
                        assert!(time.time_ns > 0.0 && time.time_ns.is_finite(), "{time:?}");
                    }
                    Ok(())
                }
            }
        });
        let mut bundle = Bundle::open(&root).expect("bundle");
        bundle.update(vec![(name.to_owned(), good)]).expect("restored");
    }
}

#[test]
fn nothing_is_read_as_samples_by_accident() {
    for operator in Operator::ALL {
        for text in ["", "\n", "a,b\n1,2\n", "{}"] {
            let path = Path::new("samples.csv");
            if let Ok(rows) = samples::from_csv(operator, text.as_bytes(), path) {
                assert!(rows.is_empty(), "{operator}: {text:?}");
            }
        }
    }
}

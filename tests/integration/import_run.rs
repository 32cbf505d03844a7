//! `plumb import-run`: other tools' files to runs, and what those say.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use plumbline_schema::{ArrivalBasis, RequestStatus, Run};
use plumbline_validator::{ImportOptions, ResultFormat, import_run};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use serde_json::Value;

use crate::{
    mutation::mutate,
    support::{arg, ended, plumb, stdout_of, write},
};

/// Every fixture, with its format.
const FIXTURES: [(ResultFormat, &str); 8] = [
    (ResultFormat::VllmBench, "vllm_bench.json"),
    (ResultFormat::SglangBench, "sglang_bench.jsonl"),
    (ResultFormat::Aiperf, "aiperf/profile_export.jsonl"),
    (ResultFormat::InferencePerf, "inference-perf/per_request_lifecycle_metrics.json"),
    (ResultFormat::Guidellm, "guidellm_benchmarks.json"),
    (ResultFormat::Vidur, "vidur_request_metrics.csv"),
    (ResultFormat::Sarathi, "sarathi_sequence_metrics.csv"),
    (ResultFormat::Seed, "seed_request_metrics.csv"),
];

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/import").join(name)
}

fn seed_document(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles/data/runs/a100-sarathi/seed-document");
    folder.join(format!("qwen3-0.6b_a100_{name}.csv"))
}

fn import(format: &str, path: &Path, out: &Path, more: &[&str]) -> (i32, String, String) {
    let args = ["import-run", format, arg(path), "--out", arg(out)];
    ended(&plumb(args.iter().chain(more)).output().expect("plumb starts"))
}

/// As [`import`], to success, with `--json`.
fn imported(format: &str, path: &Path, out: &Path, more: &[&str]) -> (Value, Run) {
    let (code, stdout, stderr) = import(format, path, out, &[&["--json"], more].concat());
    assert_eq!(code, 0, "{stderr}");
    let report = serde_json::from_str(&stdout).expect("one JSON document");
    (report, Run::read(out).expect("what was imported is a run"))
}

/// All figures of the file that can be checked agree with its details.
fn all_agree(report: &Value, at_least: usize) {
    let figures = report["figures"].as_array().expect("figures");
    let checked: Vec<_> = figures.iter().filter(|figure| !figure["agrees"].is_null()).collect();
    assert!(checked.len() >= at_least, "{} checked of {figures:?}", checked.len());
    assert!(checked.iter().all(|figure| figure["agrees"] == true), "{checked:#?}");
}

#[test]
fn every_fixture_becomes_a_run_whose_figures_are_the_files() {
    let folder = tempfile::tempdir().expect("folder");
    let rows = (0..24).map(|i| format!("{i},{}\n", i * 16_666_667_u64));
    let schedule = format!("request_id,arrival_time_ns\n{}", rows.collect::<String>());
    let schedule = write(&folder.path().join("schedule.csv"), schedule);
    for (format, name) in FIXTURES {
        let out = folder.path().join("runs").join(name);
        // SGLang's details lack times of sending: 24 requests, evenly.
        let more = ["--workload", arg(&schedule)];
        let more = if format == ResultFormat::SglangBench { more.as_slice() } else { &[] };
        let (report, run) = imported(format.name(), &data(name), &out, more);
        let source = run.info.source.as_ref().expect("a source");
        assert_eq!(source.tool, format.name());
        assert!(name.ends_with(&source.file), "{}", source.file);
        assert_eq!(
            report["requests"]["ok"],
            run.requests.iter().filter(|r| r.status == RequestStatus::Ok).count()
        );
        assert_eq!(run.requests.iter().map(|r| r.arrival_time_ns.0).min(), Some(0), "{name}");
        all_agree(&report, if source.published.is_empty() { 0 } else { 4 });
        let (code, _, stderr) = import(format.name(), &data(name), &out, &[]);
        assert!(code == 2 && stderr.contains("expected a path where nothing exists yet"), "{stderr}");
    }
}

/// The published percentiles, the corrected ones beside them, and how far Vidur was off.
#[test]
fn the_seed_case_by_two_imports_and_a_comparison() {
    let folder = tempfile::tempdir().expect("folder");
    let [real, sim, report] = ["real", "sim", "report"].map(|name| folder.path().join(name));
    let (_, run) = imported("seed", &seed_document("real_request_metrics"), &real, &[]);
    assert_eq!(run.info.engine, "sarathi");
    let notes = &run.info.source.expect("a source").notes;
    let excerpt = "no token times: qwen3-0.6b_a100_real_token_metrics_req0_first8.csv has 8 of 512 tokens";
    assert_eq!(*notes, [excerpt]);
    let vidur = ["--simulated", "--backend", "vidur"];
    let (checks, _) = imported("seed", &seed_document("vidur_request_metrics"), &sim, &vidur);
    // Times to the first token, and those to each token spread evenly: all as published.
    all_agree(&checks, 6);

    let args = ["compare", arg(&real), "--sim", arg(&sim), "--out", arg(&report), "--json"];
    let result: Value = serde_json::from_str(&stdout_of(args)).expect("one JSON document");
    let rows = result["cases"][0]["variants"].as_array().expect("variants");
    let row = |name: &str, stat: &str| {
        rows.iter()
            .find(|row| row["name"] == name && row["stat"] == stat)
            .unwrap_or_else(|| panic!("{name} {stat}"))
    };
    let ms = |value: &Value| value.as_f64().expect("a number");
    for (name, stat, real_ns, sim_ns) in [
        ("ttft", "p50", "17283962.500", "1967610.000"),
        ("ttft", "p90", "20037415.300", "1967610.000"),
        ("ttft", "p99", "22755979.330", "1967610.000"),
        ("token_latency", "p50", "13611908.000", "1824346.000"),
        ("token_latency", "p90", "14125543.000", "1828523.000"),
        ("token_latency", "p99", "17128720.200", "1828524.000"),
    ] {
        let row = row(name, stat);
        assert_eq!(format!("{:.3}", ms(&row["published_ms"]) * 1e6), real_ns, "{row}");
        assert_eq!(format!("{:.3}", ms(&row["sim_ms"]) * 1e6), sim_ns, "{row}");
        if name == "ttft" {
            assert_eq!(format!("{:.3}", ms(&row["real_ms"]) * 1e6), real_ns, "{row}");
        }
    }
    assert_eq!(format!("{:.1}", ms(&row("ttft", "p50")["error_pct"])), "-88.6");
    assert_eq!(format!("{:.1}", ms(&row("token_latency", "p50")["error_pct"])), "-86.6");
    // Corrected: a request's mean gap, without the zeros.
    let metrics = result["cases"][0]["metrics"].as_array().expect("metrics");
    let tpot = metrics.iter().find(|row| row["metric"] == "tpot" && row["stat"] == "p50").expect("TPOT");
    assert_eq!(format!("{:.2} {:.2}", ms(&tpot["real_ms"]), ms(&tpot["sim_ms"])), "13.82 1.82");
    let summary = fs::read_to_string(report.join("summary.md")).expect("a summary");
    assert!(
        summary
            .contains("| token_latency | all gaps and a 0 a request | p50 | 13.61 | n/a | 1.82 | -86.6 % |"),
        "{summary}"
    );
}

/// The whole token series is published elsewhere and not shipped: `PLUMB_SEED_DATA` names a folder that has it.
#[test]
fn the_whole_token_series_gives_the_published_percentiles() {
    let Some(source) = std::env::var_os("PLUMB_SEED_DATA").map(PathBuf::from) else {
        eprintln!("skipped: PLUMB_SEED_DATA names no folder with qwen3-0.6b_a100_real_token_metrics_all.csv");
        return;
    };
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("real");
    let (report, run) = imported("seed", &source.join("qwen3-0.6b_a100_real_request_metrics.csv"), &out, &[]);
    all_agree(&report, 6);
    assert_eq!(run.tokens.len(), 512);
    let itl = report["metrics"].as_array().expect("metrics").iter().find(|row| row["metric"] == "itl");
    assert_eq!(itl.expect("ITL")["n"], 504);
}

#[test]
fn vidurs_own_table_takes_its_arrivals_from_a_schedule() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("run");
    let excerpt = data("vidur_excerpt.csv");
    let (code, _, stderr) = import("vidur", &excerpt, &out, &[]);
    assert!(
        code == 2 && stderr.contains("expected arrivals, which this result does not hold; --workload FILE"),
        "{stderr}"
    );
    let trace = seed_document("trace_intervals");
    let (_, run) = imported("vidur", &excerpt, &out, &["--workload", arg(&trace)]);
    let seed = folder.path().join("seed");
    let (_, of_seed) = imported("seed", &seed_document("vidur_request_metrics"), &seed, &["--simulated"]);
    for (ours, theirs) in run.requests.iter().zip(&of_seed.requests) {
        assert_eq!((ours.arrival_time_ns, ours.ttft_ns), (theirs.arrival_time_ns, theirs.ttft_ns));
        assert_eq!(ours.completion_time_ns, theirs.completion_time_ns);
    }
    // Another workload's lengths.
    let other = write(
        &folder.path().join("w.csv"),
        "request_id,arrival_time_ns,num_prefill_tokens\n0,0,9\n1,1,10\n2,2,14\n3,3,13\n4,4,13\n5,5,11\n6,6,7\n7,7,10\n",
    );
    let (code, _, stderr) = import("vidur", &excerpt, &folder.path().join("x"), &["--workload", arg(&other)]);
    assert_eq!(code, 2);
    assert!(
        stderr.contains(
            "w.csv, line 3, column `num_prefill_tokens`: expected 9, as in the result, line 3: is this"
        ),
        "{stderr}"
    );
    assert!(!folder.path().join("x").exists());
}

#[test]
fn times_count_from_the_schedule_where_one_is_given() {
    let folder = tempfile::tempdir().expect("folder");
    // Due at 0 and 1 s; sent at 7.0 and 8.5 s of the client's clock: half a second late.
    let result = r#"{"model_id": "m", "input_lens": [10, 20, 5], "output_lens": [3, 2, 0], "ttfts": [0.5, 0.25, 0.0],
        "itls": [[0.1, 0.2], [0.1], []], "start_times": [7.0, 8.5, 9.0], "errors": ["", "", "refused"],
        "median_ttft_ms": 375.0, "p99_itl_ms": 300.0}"#;
    let path = write(&folder.path().join("r.json"), result);
    let (report, run) = imported("vllm-bench", &path, &folder.path().join("sent"), &[]);
    let ttfts = |run: &Run| run.requests.iter().map(|r| r.ttft_ns.map(|t| t.0)).collect::<Vec<_>>();
    assert_eq!(ttfts(&run), [Some(500_000_000), Some(250_000_000), None]);
    let source = run.info.source.as_ref().expect("a source");
    assert_eq!(source.arrivals, ArrivalBasis::Sent);
    let differs = "the file says p99_itl_ms = 300 ms, its details say 198 ms";
    let unfinished = "1 of 3 requests did not finish; of 1 the result does not hold both lengths (0 where it does not; \
                      --workload tells)";
    assert_eq!(source.notes, [differs, unfinished]);
    assert_eq!(report["figures"][0]["agrees"], true);
    assert_eq!((run.tokens.len(), run.info.workload_digest.is_none()), (5, true));

    let workload = "request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens\n10,0,10,3\n11,1000000000,20,4\n12,2000000000,5,8\n";
    let workload = write(&folder.path().join("w.csv"), workload);
    let out = folder.path().join("scheduled");
    let (_, run) = imported("vllm-bench", &path, &out, &["--workload", arg(&workload)]);
    assert_eq!(ttfts(&run), [Some(500_000_000), Some(750_000_000), None]);
    let lengths: Vec<_> = run.requests.iter().map(|r| (r.request_id, r.num_decode_tokens)).collect();
    assert_eq!(lengths, [(10, 3), (11, 4), (12, 8)]);
    let source = run.info.source.as_ref().expect("a source");
    assert_eq!(source.arrivals, ArrivalBasis::Scheduled);
    assert!(
        source.notes[0].ends_with("was sent on time and the latest 500.000 ms after it"),
        "{:?}",
        source.notes
    );
    assert!(run.info.workload_digest.is_some());
}

#[test]
fn chunks_of_several_tokens_are_no_token_times() {
    let folder = tempfile::tempdir().expect("folder");
    let result = |gaps: &str| {
        format!(
            r#"{{"input_lens": [10], "output_lens": [5], "ttfts": [0.5], "itls": [{gaps}], "request_rate": Infinity}}"#
        )
    };
    for (name, gaps, expected) in [
        (
            "few",
            "[0.1, 0.2]",
            "no token times: 1 of 1 requests came in another number of pieces than tokens (3 pieces, 5 tokens)",
        ),
        (
            "split",
            "[0.1, 0.1, 0.2, 0.2]",
            "no token times: 2 of 3 gaps are the same as the gap before, to the nanosecond",
        ),
    ] {
        let path = write(&folder.path().join(format!("{name}.jsonl")), result(gaps));
        let (report, run) = imported("sglang-bench", &path, &folder.path().join(name), &[]);
        assert!(run.tokens.is_empty() && report["has_token_times"] == false);
        let source = run.info.source.expect("a source");
        assert_eq!(source.arrivals, ArrivalBasis::AtOnce);
        assert!(source.notes[0].starts_with(expected), "{:?}", source.notes);
    }
}

#[test]
fn ten_thousand_mutated_files_are_runs_or_errors_that_name_them() {
    let folder = tempfile::tempdir().expect("folder");
    let options = ImportOptions::default();
    let mut refused = 0;
    for (format, name) in FIXTURES {
        let good = fs::read(data(name)).expect("a fixture");
        let good = shortened(format, &good);
        let file = Path::new(name).file_name().expect("a file");
        let (path, name) = (folder.path().join(file), file.to_string_lossy());
        for seed in 0..1_250 {
            let mut rng = Pcg64::seed_from_u64(seed);
            let mut bytes = mutate(&good, &mut rng);
            if rng.random_bool(0.3) && !bytes.is_empty() {
                bytes = mutate(&bytes, &mut rng);
            }
            write(&path, &bytes);
            let outcome = catch_unwind(AssertUnwindSafe(|| import_run(&path, format, &options)));
            let Ok(outcome) = outcome else {
                panic!("{name}, seed {seed}: panicked on {:?}", String::from_utf8_lossy(&bytes));
            };
            match outcome {
                Err(error) => {
                    refused += 1;
                    assert!(error.to_string().contains(&*name), "{name}, seed {seed}: {error}");
                }
                // What is accepted is a run, for every reader.
                Ok(imported) if seed % 50 == 0 => {
                    let out = folder.path().join("run");
                    imported.run.write(&out).expect("a temporary folder");
                    if let Err(error) = Run::read(&out) {
                        panic!("{name}, seed {seed}: written but not read: {error}");
                    }
                    fs::remove_dir_all(&out).expect("a temporary folder");
                }
                Ok(_) => {}
            }
        }
    }
    assert!(refused > 1_000, "only {refused} of 10000 mutations were refused");
}

/// A few requests alone, so that a mutation hits something and reading is quick.
fn shortened(format: ResultFormat, good: &[u8]) -> Vec<u8> {
    let text = str::from_utf8(good).expect("fixtures are text");
    let Ok(mut json) = serde_json::from_str::<Value>(text) else {
        return text.lines().take(4).flat_map(|line| [line, "\n"]).collect::<String>().into_bytes();
    };
    if format == ResultFormat::SglangBench {
        // Of other rates it has no arrivals.
        json["request_rate"] = "inf".into();
    }
    let lists: Vec<&mut Value> = match format {
        ResultFormat::Guidellm => {
            let requests = &mut json["benchmarks"][0]["requests"];
            requests.as_object_mut().expect("requests").values_mut().collect()
        }
        ResultFormat::InferencePerf => vec![&mut json],
        _ => json.as_object_mut().expect("a document").values_mut().collect(),
    };
    for list in lists.into_iter().filter_map(Value::as_array_mut) {
        list.truncate(3);
    }
    json.to_string().into_bytes()
}

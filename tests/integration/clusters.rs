//! Simulating clusters, levels of detail, intervals and workloads by rules, as a user asks for them.

use std::{fs, path::Path};

use plumbline_schema::Run;
use plumbline_validator::{Metric, RunMetrics, Stat};
use serde_json::Value;

use crate::support::{arg, ended, plumb, stdout_of, write};

/// 150 requests, 4 a second.
fn workload(folder: &Path) -> String {
    let path = folder.join("workload.csv");
    let lengths = ["--prefill", "uniform:64:1024", "--decode", "uniform:2:40"];
    let args =
        ["workload", "generate", "--requests", "150", "--poisson", "4", "--seed", "3", "--out", arg(&path)];
    stdout_of(args.iter().chain(&lengths));
    arg(&path).to_owned()
}

/// A simulation of the shipped H100 bundle, with more options.
fn args<'a>(out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["simulate", "--bundle", "h100-sxm5-80gb", "--engine", "vllm-0.24-graph"];
    args.extend(["--model", "qwen3-0.6b", "--json", "--quiet", "--out", arg(out)]);
    args.extend(more);
    args
}

fn simulated(out: &Path, more: &[&str]) -> Value {
    serde_json::from_str(&stdout_of(args(out, more))).expect("JSON")
}

fn refused(out: &Path, more: &[&str]) -> String {
    let (code, _, stderr) = ended(&plumb(args(out, more)).output().expect("plumb starts"));
    assert_eq!(code, 2, "{stderr}");
    assert!(!out.exists(), "{} was written", out.display());
    stderr
}

/// What is printed comes from distributions kept while simulating; the files tell the same.
#[test]
fn what_is_printed_is_what_the_files_tell() {
    let folder = tempfile::tempdir().expect("folder");
    let (workload, out) = (workload(folder.path()), folder.path().join("run"));
    let printed = simulated(&out, &["--workload", &workload]);
    let run = Run::read(&out).expect("a run");
    let told = RunMetrics::of(&run);
    for line in printed["metrics"].as_array().expect("metrics") {
        let name = |key: &str| line[key].as_str().expect("a name");
        let metric = Metric::ALL.into_iter().find(|m| m.name() == name("metric")).expect("a metric");
        let stat = Stat::ALL.into_iter().find(|s| s.name() == name("stat")).expect("a statistic");
        let expected_ms = told.stat_ns(metric, stat).expect("samples enough") / 1e6;
        let found_ms = line["sim_ms"].as_f64().expect("a time");
        // TPOT is kept to the picosecond.
        assert!(
            (found_ms - expected_ms).abs() < 1e-8 * expected_ms,
            "{metric} {stat}: {found_ms}, {expected_ms}"
        );
    }
    assert_eq!(printed["counts"]["finished"], 150);
    let steps = run.steps.len() as u64;
    assert_eq!(printed["replicas"][0]["steps"], steps);
    assert_eq!(printed["distributions"]["step_duration_ns"]["n"], steps);
    // Each step names its requests, and as many as it has parts.
    let requests = run.steps[0].requests.as_ref().expect("ids");
    assert_eq!(requests.prefill_request_ids, [0]);
}

#[test]
fn less_detail_changes_no_number_and_removes_what_an_earlier_run_left() {
    let folder = tempfile::tempdir().expect("folder");
    let (workload, out) = (workload(folder.path()), folder.path().join("run"));
    let files = |out: &Path| {
        let entries = fs::read_dir(out).expect("a folder");
        let mut names: Vec<_> = entries.map(|entry| entry.expect("an entry").file_name()).collect();
        names.sort();
        names.into_iter().map(|name| name.into_string().expect("UTF-8")).collect::<Vec<_>>()
    };
    let (mut last, mut sizes) = (None, Vec::new());
    for detail in ["steps", "tokens", "requests", "summary", "summary"] {
        let mut printed = simulated(&out, &["--workload", &workload, "--detail", detail]);
        // The one sum that a stretch of decodes takes at its middle.
        let use_mean = printed["replicas"][0]["kv_use_mean"].take().as_f64().expect("a share");
        assert!((0.0..1.0).contains(&use_mean));
        assert!(last.is_none_or(|last| last == printed), "{detail}");
        last = Some(printed);
        sizes.push(files(&out).len());
    }
    assert_eq!(sizes, [5, 4, 3, 2, 2]);
    assert_eq!(files(&out), ["run.json", "summary.json"]);
}

#[test]
fn intervals_hold_the_prediction() {
    let folder = tempfile::tempdir().expect("folder");
    let workload = workload(folder.path());
    let more = ["--workload", &workload, "--residuals", "none", "--detail", "summary", "--intervals"];
    let printed = simulated(&folder.path().join("run"), &more);
    let lines = printed["metrics"].as_array().expect("metrics");
    let of = |metric: &str| {
        lines.iter().find(|line| line["metric"] == metric && line["stat"] == "mean").expect("a line")
    };
    // A request's first token may come sooner with slower operators, when that lets it join an earlier step.
    for metric in ["itl", "tpot", "e2e"] {
        let ms = |key: &str| of(metric)[key].as_f64().expect("a time");
        let (low, mid, high) = (ms("low_ms"), ms("sim_ms"), ms("high_ms"));
        assert!(low < mid && mid < high, "{}", of(metric));
    }
}

#[test]
fn prompts_go_through_prefill_replicas_and_are_counted_once() {
    let folder = tempfile::tempdir().expect("folder");
    let (workload, out) = (workload(folder.path()), folder.path().join("run"));
    let groups = "[[group]]\nreplicas = 1\nrole = \"prefill\"\n[[group]]\nreplicas = 2\nrole = \"decode\"\n";
    let cluster = |name: &str, text: &str| write(&folder.path().join(name), text);
    let transfer = "[kv_transfer]\nlatency_us = 50\ngigabytes_per_s = 40\n";
    let file = cluster("good.toml", &format!("router = \"round-robin\"\n{transfer}{groups}"));
    let more = ["--workload", &workload, "--cluster", arg(&file), "--detail", "tokens"];
    let printed = simulated(&out, &more);
    assert_eq!(printed["counts"]["finished"], 150);
    let run = Run::read(&out).expect("a run");
    for (i, request) in run.requests.iter().enumerate() {
        assert!(request.backend.ends_with(if i % 2 == 0 { "/1" } else { "/2" }), "{}", request.backend);
    }
    let tokens: u64 = run.requests.iter().map(|request| u64::from(request.num_decode_tokens_actual)).sum();
    assert_eq!(run.tokens.len() as u64, tokens);
    let seconds = printed["end_ns"].as_f64().expect("ns") / 1e9;
    let rate = printed["output_tokens_per_s"].as_f64().expect("a rate");
    assert!((rate * seconds - tokens as f64).abs() < 1e-6 * tokens as f64, "{rate} over {seconds} s");

    let none = folder.path().join("none");
    let refuse = |file: &Path| refused(&none, &["--workload", &workload, "--cluster", arg(file)]);
    let error = refuse(&cluster("no_transfer.toml", groups));
    assert!(error.contains("latency and the bandwidth"), "{error}");
    let error = refuse(&cluster("alone.toml", "[[group]]\nreplicas = 1\nrole = \"decode\"\n"));
    assert!(error.contains("found decode"), "{error}");
    let error = refuse(&cluster("router.toml", &format!("router = \"best\"\n{transfer}{groups}")));
    assert!(error.contains("found `best`"), "{error}");
    let error = refuse(&cluster("key.toml", "[[group]]\nreplica = 1\n"));
    assert!(error.contains("replica"), "{error}");
}

#[test]
fn a_closed_loop_has_no_more_requests_than_users() {
    let folder = tempfile::tempdir().expect("folder");
    let spec = "num_requests = 60\n[arrival]\nprocess = \"closed_loop\"\nusers = 4\n[lengths]\nfrom = \"distributions\"\n\
                prefill = { distribution = \"uniform\", min = 90, max = 110 }\n\
                decode = { distribution = \"uniform\", min = 15, max = 25 }\n";
    let spec = write(&folder.path().join("spec.toml"), spec);
    let out = folder.path().join("run");
    simulated(
        &out,
        &["--spec", arg(&spec), "--replicas", "2", "--router", "least-outstanding", "--detail", "requests"],
    );
    let run = Run::read(&out).expect("a run");
    assert_eq!(run.requests.len(), 60);
    for request in &run.requests {
        let at = request.arrival_time_ns;
        let is_there = |r: &&plumbline_schema::RequestMetrics| {
            r.arrival_time_ns <= at && r.completion_time_ns.is_some_and(|end| end > at)
        };
        assert!(run.requests.iter().filter(is_there).count() <= 4);
    }
    let replicas = |name: &str| run.requests.iter().filter(|r| r.backend.ends_with(name)).count();
    assert!(replicas("/0") > 20 && replicas("/1") > 20, "both replicas serve");
}

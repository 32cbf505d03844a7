//! The shipped suite: what it must show, and how fast.

use std::{path::Path, time::Duration};

use plumbline_bundles::{Bundle, OperatorPredictor};
use serde_json::Value;

use crate::support::{arg, ended, plumb};

/// Wall time of the whole command, and of one case's simulation, in a release build.
const SUITE_LIMIT: Duration = Duration::from_secs(2);
const CASE_LIMIT_MS: f64 = 50.0;

fn validate(more: &[&str]) -> (Value, String) {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("report");
    let args = ["validate", "--json", "--out", arg(&out)];
    let (code, stdout, stderr) = ended(&plumb(args.iter().chain(more)).output().expect("plumb starts"));
    assert_eq!(code, 0, "{stderr}");
    for file in ["report.html", "summary.md", "results.json"] {
        assert!(out.join(file).is_file(), "{file}");
    }
    let result = serde_json::from_str(&stdout).expect("one JSON document");
    (result, stdout)
}

fn cases(result: &Value) -> &Vec<Value> {
    result["cases"].as_array().expect("cases")
}

/// The suite's own tolerances say what is allowed, misses that are known included.
#[test]
fn cases_not_fitted_on_are_predicted_within_the_suites_tolerances() {
    let (code, stdout, stderr) = ended(&plumb(["check", "--json", "-q"]).output().expect("plumb starts"));
    let report: Value = serde_json::from_str(&stdout).expect("one JSON document");
    assert_eq!(code, 0, "{stderr}");
    assert!(report["num_judged"].as_u64() > Some(140), "{}", report["num_judged"]);
    for case in cases(&report) {
        let is_fit = case["rows"].as_array().expect("rows").iter().all(|row| row["tolerance"].is_null());
        assert_eq!(case["verdict"] == "not_judged", is_fit, "{case}");
    }
}

#[test]
fn every_case_says_where_its_times_come_from() {
    let (result, _) = validate(&[]);
    for case in cases(&result) {
        let coverage = case["coverage"].as_object().expect("coverage");
        let sum: f64 = coverage.values().filter_map(Value::as_f64).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{}: {coverage:?}", case["name"]);
        let is_transferred = case["name"].as_str().expect("a name").starts_with("sarathi-a100");
        let transferred = coverage.get("transferred").and_then(Value::as_f64).unwrap_or(0.0);
        assert_eq!(transferred > 0.99, is_transferred, "{}: {coverage:?}", case["name"]);
    }
}

#[test]
fn the_same_seed_gives_the_same_numbers_and_it_is_fast() {
    let (first, _) = validate(&["--seed", "3"]);
    let (again, _) = validate(&["--seed", "3"]);
    let numbers =
        |result: &Value| cases(result).iter().map(|case| case["metrics"].clone()).collect::<Vec<_>>();
    assert_eq!(numbers(&first), numbers(&again));
    let (certain, _) = validate(&["--residuals", "none"]);
    assert_ne!(numbers(&first), numbers(&certain));
    // Unoptimised builds say nothing of speed.
    if cfg!(debug_assertions) {
        return;
    }
    let fastest = [&first, &again, &certain].map(|r| r["summary"]["wall_ms"].as_f64().expect("a time"));
    let wall_ms = fastest.into_iter().fold(f64::INFINITY, f64::min);
    assert!(wall_ms < SUITE_LIMIT.as_secs_f64() * 1e3, "validating took {wall_ms} ms");
    for case in cases(&first) {
        let name = &case["name"];
        let fastest = [&first, &again, &certain]
            .iter()
            .flat_map(|result| cases(result).iter().filter(|other| &other["name"] == name))
            .filter_map(|case| case["simulate_ms"].as_f64())
            .fold(f64::INFINITY, f64::min);
        assert!(fastest < CASE_LIMIT_MS, "{name}: simulating took {fastest} ms");
    }
}

#[test]
fn real_steps_are_formed_by_the_scheduler() {
    let runs = Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles/data/runs/h100-vllm-0.24");
    let mut args = vec!["compare".to_owned(), "--replay-steps".to_owned(), "--json".to_owned()];
    for run in ["qwen3-0.6b-eager/conv-q8", "qwen3-0.6b-graph/conv-q8", "llama3-8b-graph/conv-q4"] {
        args.push(arg(&runs.join(run)).to_owned());
    }
    let (code, stdout, stderr) = ended(&plumb(&args).output().expect("plumb starts"));
    assert_eq!(code, 0, "{stderr}");
    let replayed: Value = serde_json::from_str(&stdout).expect("JSON");
    for run in replayed["runs"].as_array().expect("runs") {
        assert!(run["steps"].as_u64().expect("steps") > 1_000, "{run}");
        assert_eq!(run["steps"], run["identical"], "{run}");
    }
}

/// A change of features, baseline or forest shows here: train the shipped bundles anew then, and calibrate on them.
#[test]
fn the_shipped_predictors_are_what_their_samples_give() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles/data/h200-sxm-141gb");
    let folder = tempfile::tempdir().expect("folder");
    let copy = folder.path().join("bundle");
    for part in ["engines", "samples", "predictors"] {
        std::fs::create_dir_all(copy.join(part)).expect("folder");
    }
    let bundle = Bundle::open(&shipped).expect("a shipped bundle");
    for name in bundle.payload_names("").chain(["manifest.json"]) {
        std::fs::copy(shipped.join(name), copy.join(name)).expect("copy");
    }
    let (code, _, stderr) = ended(&plumb(["train", arg(&copy)]).output().expect("plumb starts"));
    assert_eq!(code, 0, "{stderr}");
    let trained = Bundle::open(&copy).expect("the trained bundle");
    for operator in bundle.predicted_operators() {
        let [shipped, now] =
            [&bundle, &trained].map(|bundle| bundle.predictor(operator).expect("a predictor"));
        assert_eq!(
            (&shipped.features, &shipped.samples_digest),
            (&now.features, &now.samples_digest),
            "{operator}"
        );
        assert_eq!(shipped.hyper_parameters, now.hyper_parameters, "{operator}");
        // Logarithms differ in the last bit between systems, and with them what a tie between splits comes to.
        let numbers = |p: &OperatorPredictor| {
            let errors = [Some(p.error.shuffled), Some(p.error.blocked), p.error.layouts];
            let means: Vec<f64> = errors.into_iter().flatten().map(|error| 1.0 + error.mean).collect();
            let coefficients = p.parts.iter().map(|part| 1.0 + part.coefficient);
            coefficients.chain(means).chain([p.overhead_ns]).collect::<Vec<f64>>()
        };
        for (before, after) in numbers(&shipped).into_iter().zip(numbers(&now)) {
            assert!((after / before - 1.0).abs() < 2e-3, "{operator}: {before} shipped, {after} now");
        }
    }
}

#[test]
fn shipped_data_is_found_from_elsewhere_and_by_its_variable() {
    let folder = tempfile::tempdir().expect("folder");
    // Above the executable, wherever the command is run and wherever cargo builds.
    let checkout = folder.path().join("checkout");
    std::fs::create_dir_all(checkout.join("bundles")).expect("folder");
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles/data");
    std::os::unix::fs::symlink(data, checkout.join("bundles/data")).expect("link");
    let inside = checkout.join("target/debug/plumb");
    std::fs::create_dir_all(inside.parent().expect("a folder")).expect("folder");
    std::fs::copy(env!("CARGO_BIN_EXE_plumb"), &inside).expect("copy");
    let list = std::process::Command::new(&inside)
        .args(["validate", "--list"])
        .current_dir(folder.path())
        .env_remove("PLUMB_DATA")
        .output()
        .expect("plumb starts");
    let (code, stdout, stderr) = ended(&list);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.lines().count() > 10 && stdout.contains("qwen3-0.6b-graph/conv-q8"), "{stdout}");
    let wrong = plumb(["validate"]).env("PLUMB_DATA", folder.path().join("none")).output().expect("starts");
    let (code, _, stderr) = ended(&wrong);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("PLUMB_DATA: expected a folder"), "{stderr}");
    // A copy far from the data and a folder without it: says what to do.
    let copy = folder.path().join("plumb");
    std::fs::copy(env!("CARGO_BIN_EXE_plumb"), &copy).expect("copy");
    let lost = std::process::Command::new(&copy)
        .arg("validate")
        .current_dir(folder.path())
        .env_remove("PLUMB_DATA")
        .output()
        .expect("plumb starts");
    let (code, _, stderr) = ended(&lost);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("hint: ") && stderr.contains("PLUMB_DATA"), "{stderr}");
}

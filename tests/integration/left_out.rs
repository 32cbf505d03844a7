//! A model that no profile planned: its launches, measured once, judge the shipped predictors.

use serde_json::Value;

use crate::support::{arg, ended, plumb};

/// Largest median error of an operator: in the median over the operators, and at their 90th percentile.
const LIMITS: [(&str, f64); 2] = [("median_of_medians", 0.05), ("p90_of_medians", 0.12)];

#[test]
fn the_shape_of_qwen3_8b_is_predicted_by_an_h100_profile_without_it() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/repeatability/h100-qwen3-8b.csv.zst");
    let args = ["bundle", "judge", "h100-sxm5-80gb", file, "--json"];
    let (code, stdout, stderr) = ended(&plumb(args).output().expect("plumb starts"));
    assert_eq!(code, 0, "{stderr}");
    let judgement: Value = serde_json::from_str(&stdout).expect("one JSON document");
    for (key, limit) in LIMITS {
        let error = judgement[key].as_f64().expect(key);
        assert!(error > 0.0 && error <= limit, "{key} = {error}, at most {limit}");
    }
    let operators = judgement["operators"].as_array().expect("operators");
    let count = |key: &str| operators.iter().map(|o| o[key].as_u64().expect(key)).sum::<u64>();
    assert_eq!(count("num_refused"), 0, "every launch lies within what was measured");
    let judged: Vec<_> = operators.iter().filter(|o| !o["error"].is_null()).collect();
    assert!(judged.len() >= 5, "{} operators have shapes of their own", judged.len());
    // Shapes that it shares with the shipped models were measured, and are not predicted.
    assert!(count("num_measured") > 0);
}

#[test]
fn a_profile_is_planned_for_a_workloads_longest_request() {
    let folder = tempfile::tempdir().expect("folder");
    let workload = folder.path().join("long.csv");
    let text = "request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens\n0,0,36000,100\n";
    std::fs::write(&workload, text).expect("a workload");
    let longest = |out: &str, more: &[&str]| -> u64 {
        let out = folder.path().join(out);
        let args = [
            "profile",
            "--device",
            "fake",
            "--model",
            "qwen3-0.6b",
            "--no-grid",
            "--json",
            "--out",
            arg(&out),
        ];
        let (code, stdout, stderr) = ended(&plumb(args.iter().chain(more)).output().expect("plumb starts"));
        assert_eq!(code, 0, "{stderr}");
        let report: Value = serde_json::from_str(&stdout).expect("one JSON document");
        assert_eq!(report["uncovered"], serde_json::json!([]), "what is asked for is planned");
        let plan = std::fs::read_to_string(out.join("plan.json")).expect("a plan");
        let plan: Value = serde_json::from_str(&plan).expect("JSON");
        plan["envelope"]["max_model_len"].as_u64().expect("a length")
    };
    assert_eq!(longest("usual", &[]), 32_768);
    assert_eq!(longest("long", &["--workload", arg(&workload)]), 36_100);
}

#[test]
fn predictors_are_not_judged_by_another_gpus_samples() {
    let args = ["bundle", "judge", "h100-sxm5-80gb", "h200-sxm-141gb"];
    let (code, _, stderr) = ended(&plumb(args).output().expect("plumb starts"));
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("expected samples of `h100-sxm5-80gb`"), "{stderr}");
}

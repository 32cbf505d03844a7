//! `plumb bundle lint`: on the fake device's bundle, sound and spoilt.

use std::path::{Path, PathBuf};

use plumbline_bundles::{Bundle, Sample, bundle::samples_name, samples};
use plumbline_schema::Operator;
use serde_json::Value;

use crate::{
    fixture::fixture,
    support::{WORKLOAD, arg, ended, plumb, write},
};

/// Runs a lint; returns the exit code and the JSON.
fn lint(bundle: &Path, more: &[&str]) -> (i32, Value) {
    let args = ["bundle", "lint", arg(bundle), "--json"];
    let (code, stdout, stderr) = ended(&plumb(args.iter().chain(more)).output().expect("plumb starts"));
    assert_eq!(stderr, "");
    (code, serde_json::from_str(&stdout).expect("JSON"))
}

/// A copy of the fixture's bundle with the samples of one operator changed.
fn spoilt(folder: &Path, operator: Operator, change: impl FnOnce(&mut Vec<Sample>)) -> PathBuf {
    let path = folder.join("bundle");
    fixture().copy_bundle(&path);
    let mut bundle = Bundle::open(&path).expect("bundle");
    let mut rows = bundle.operator_samples(operator).expect("samples");
    change(&mut rows);
    bundle.update(vec![(samples_name(operator), samples::to_csv(operator, &rows))]).expect("update");
    path
}

fn rules(report: &Value, severity: &str) -> Vec<String> {
    let findings = report["findings"].as_array().expect("findings").iter();
    let mut rules: Vec<_> = findings
        .filter(|finding| finding["severity"] == severity)
        .map(|finding| finding["rule"].as_str().expect("rule").to_owned())
        .collect();
    rules.dedup();
    rules
}

#[test]
fn the_fake_devices_times_raise_no_doubt() {
    let (code, report) = lint(&fixture().bundle(), &[]);
    assert_eq!(code, 0);
    assert!(rules(&report, "error").is_empty(), "{report:#}");
    // What follows from the law and what was read from the machine is sound.
    let warnings = rules(&report, "warning");
    for rule in ["spike", "non_monotone", "above_ceiling", "device_mismatch", "other_samples"] {
        assert!(!warnings.iter().any(|found| found == rule), "{rule}: {report:#}");
    }
    assert_eq!(report["counts"]["num_doubtful_points"], 0);
}

#[test]
fn a_workload_within_what_was_measured_is_covered() {
    let folder = tempfile::tempdir().expect("folder");
    let workload = write(&folder.path().join("workload.csv"), WORKLOAD);
    let (_, any) = lint(&fixture().bundle(), &[]);
    let options = ["--workload", arg(&workload), "--max-num-tokens", "512", "--max-num-seqs", "16"];
    let (code, short) = lint(&fixture().bundle(), &options);
    assert_eq!(code, 0);
    let refused = |report: &Value| report["coverage"][0]["num_refused"].as_u64().expect("number");
    assert_eq!((refused(&short), &short["coverage"][0]["model"]), (0, &Value::from("qwen3-0.6b")));
    assert!(refused(&any) >= refused(&short));
}

#[test]
fn an_impossible_time_fails_the_bundle_and_says_where() {
    let folder = tempfile::tempdir().expect("folder");
    let bundle = spoilt(folder.path(), Operator::DownProj, |rows| {
        let row = rows.iter_mut().max_by_key(|row| row.shape.flops().0).expect("rows");
        row.stats.min_ns = 1.0;
    });
    let (code, report) = lint(&bundle, &[]);
    assert_eq!((code, &report["grade"]), (3, &Value::from("F")));
    assert_eq!(rules(&report, "error"), ["below_floor"]);
    let (code, _) = lint(&bundle, &["--min-grade", "F"]);
    assert_eq!(code, 0);

    let (code, text, stderr) =
        ended(&plumb(["bundle", "lint", arg(&bundle)]).output().expect("plumb starts"));
    assert_eq!((code, stderr.as_str()), (3, ""));
    for part in ["error: below_floor", "samples/down_proj.csv, line ", "grade F", "to raise it: ", "hint: "] {
        assert!(text.contains(part), "`{part}` is not in {text}");
    }
}

#[test]
fn replaced_samples_are_not_the_ones_trained_on() {
    let folder = tempfile::tempdir().expect("folder");
    let bundle = spoilt(folder.path(), Operator::RmsNorm, |rows| {
        for row in rows {
            let stats = &mut row.stats;
            for time in [
                &mut stats.min_ns,
                &mut stats.p50_ns,
                &mut stats.mean_ns,
                &mut stats.p95_ns,
                &mut stats.max_ns,
            ] {
                *time *= 1.02;
            }
        }
    });
    let (code, report) = lint(&bundle, &[]);
    assert_eq!(code, 3);
    assert_eq!(rules(&report, "error"), ["other_samples"]);
}

#[test]
fn what_cannot_be_read_is_bad_input() {
    let refuse = |args: &[&str], says: &str| {
        let (code, stdout, stderr) =
            ended(&plumb(["bundle", "lint"].iter().chain(args)).output().expect("plumb starts"));
        assert_eq!((code, stdout.as_str()), (2, ""), "{args:?}: {stderr}");
        assert!(stderr.contains(says), "{args:?}: `{says}` is not in {stderr}");
    };
    let folder = tempfile::tempdir().expect("folder");
    let bundle = fixture().bundle();
    let bundle = arg(&bundle);
    refuse(&[arg(folder.path())], "no manifest.json");
    refuse(&[bundle, "--model", "no-such-model"], "a shipped model");
    refuse(&[bundle, "--workload", "no-such-file.csv"], "no-such-file.csv");
    refuse(&[bundle, "--min-grade", "E"], "expected A, B, C, D or F, found `E`");
    refuse(&[bundle, "--max-num-tokens", "0"], "--max-num-tokens");
}

#[test]
fn nothing_in_the_shipped_bundle_is_impossible() {
    let output = plumb(["bundle", "lint", "h100-sxm5-80gb", "--json"]).output().expect("plumb starts");
    let (code, stdout, stderr) = ended(&output);
    assert_eq!(code, 0, "{stderr}");
    let report: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(report["counts"]["num_errors"], 0, "{report:#}");
    // One in a hundred is what an A allows.
    let number = |key: &str| report["counts"][key].as_f64().expect("number");
    assert!(number("num_doubtful_points") <= 0.01 * number("num_points"), "{report:#}");
}

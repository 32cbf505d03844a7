//! `plumb check`: what passes, what does not, and what a CI system is told of it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use plumbline_bundles::{Bundle, bundle::predictor_name};
use plumbline_schema::Operator;
use quick_junit::{NonSuccessKind, Report, TestCaseStatus};
use serde_json::Value;

use crate::{
    fixture::fixture,
    support::{arg, ended, plumb, write},
};

/// Where the shipped data lies.
pub fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles/data")
}

/// A case of the shipped bundle, model and engine with these real runs; `more` are further lines of it.
pub fn case(name: &str, real: &[&Path], more: &str) -> String {
    format!(
        "[[case]]\nname = \"{name}\"\nreal = {real:?}\nbundle = \"{}\"\nmodel = \"qwen3-0.6b\"\n\
         engine = \"vllm-0.24-graph\"\n{more}\n",
        data().join("h100-sxm5-80gb").display()
    )
}

/// Two repeats of the same hundred requests.
fn repeats() -> [PathBuf; 2] {
    ["qwen3-0.6b-graph/conv-q8", "qwen3-0.6b-graph-rerun/conv-q8_r0"]
        .map(|run| data().join("runs/h100-vllm-0.24").join(run))
}

fn repeats_case(name: &str, more: &str) -> String {
    let [a, b] = repeats();
    case(name, &[a.as_path(), b.as_path()], more)
}

/// Exit code, JSON and the errors of a check of a suite.
fn check(folder: &Path, suite: &str, more: &[&str]) -> (i32, Value, String) {
    let suite = write(&folder.join("suite.toml"), suite);
    let args = ["check", "--json", "-q", "--suite", arg(&suite)];
    let (code, stdout, stderr) = ended(&plumb(args.iter().chain(more)).output().expect("plumb starts"));
    (code, serde_json::from_str(&stdout).unwrap_or_default(), stderr)
}

fn rows(report: &Value) -> impl Iterator<Item = &Value> {
    report["cases"].as_array().expect("cases").iter().flat_map(|case| case["rows"].as_array().expect("rows"))
}

#[test]
fn a_suite_within_its_tolerances_passes_and_is_its_own_baseline() {
    let folder = tempfile::tempdir().expect("folder");
    let at = |name: &str| folder.path().join(name);
    let (report, junit, markdown) = (at("report"), at("junit.xml"), at("summary.md"));
    let suite = repeats_case("q8", "tolerance = { ttft.p50 = 12, itl.p50 = \"band\" }");
    let files = ["--out", arg(&report), "--junit", arg(&junit), "--markdown", arg(&markdown)];
    let (code, json, stderr) = check(folder.path(), &suite, &files);
    assert_eq!(
        (code, &json["passed"], &json["num_judged"]),
        (0, &Value::from(true), &Value::from(2)),
        "{stderr}"
    );
    let read = Report::deserialize_from_str(&fs::read_to_string(&junit).expect("JUnit")).expect("JUnit XML");
    let tests = &read.test_suites[0];
    let is_skipped = |status: &TestCaseStatus| matches!(status, TestCaseStatus::Skipped { .. });
    let num_skipped = tests.test_cases.iter().filter(|test| is_skipped(&test.status)).count();
    assert_eq!((tests.tests, tests.failures, tests.errors, num_skipped), (16, 0, 0, 14));
    let text = fs::read_to_string(&markdown).expect("markdown");
    assert_eq!(text, "### ✅ plumb check passed: 2 numbers of 1 cases\n");

    let against = ["--baseline", arg(&report)];
    let (code, json, _) = check(folder.path(), &suite, &against);
    assert_eq!((code, &json["num_judged"], &json["num_worse"]), (0, &Value::from(16), &Value::from(0)));
    let is_unchanged =
        |row: &Value| row["baseline"]["change"] == "same" && row["baseline"]["cause"] == "none";
    assert!(rows(&json).all(is_unchanged));
}

#[test]
fn another_model_of_the_host_is_worse_and_is_named_a_model_change() {
    let folder = tempfile::tempdir().expect("folder");
    let (report, junit) = (folder.path().join("report"), folder.path().join("junit.xml"));
    let suite = repeats_case("q8", "");
    // Nothing to judge by, and still a result to compare with.
    let (code, json, _) = check(folder.path(), &suite, &["--out", arg(&report)]);
    assert_eq!((code, &json["num_judged"]), (3, &Value::from(0)));
    let more = ["--baseline", arg(&report), "--residuals", "none", "--junit", arg(&junit)];
    let (code, json, _) = check(folder.path(), &suite, &more);
    assert_eq!(code, 3);
    let worse: Vec<_> = rows(&json).filter(|row| row["baseline"]["change"] == "worse").collect();
    assert!(!worse.is_empty() && worse.iter().all(|row| row["baseline"]["cause"] == "model"), "{worse:?}");
    let read = Report::deserialize_from_str(&fs::read_to_string(&junit).expect("JUnit")).expect("JUnit XML");
    assert_eq!(read.test_suites[0].failures, worse.len());
}

#[test]
fn what_is_outside_or_cannot_be_judged_exits_with_3_and_says_so() {
    let folder = tempfile::tempdir().expect("folder");
    let (junit, markdown) = (folder.path().join("junit.xml"), folder.path().join("summary.md"));
    let none = folder.path().join("none");
    let suite = repeats_case("strict", "tolerance.tpot.p99 = 0.1") + &case("gone", &[none.as_path()], "");
    let files = ["--junit", arg(&junit), "--markdown", arg(&markdown)];
    let (code, json, _) = check(folder.path(), &suite, &files);
    assert_eq!((code, &json["num_failed"], &json["num_failed_cases"]), (3, &Value::from(1), &Value::from(2)));
    let read = Report::deserialize_from_str(&fs::read_to_string(&junit).expect("JUnit")).expect("JUnit XML");
    let of_class = |class: &str, name: &str| {
        let cases = read.test_suites[0].test_cases.iter();
        let mut found = cases.filter(|c| c.classname.as_deref() == Some(class) && c.name.as_str() == name);
        found.next().expect("a test").status.clone()
    };
    let TestCaseStatus::NonSuccess { kind, message, .. } = of_class("strict", "tpot p99") else {
        panic!("expected a failure");
    };
    assert_eq!(kind, NonSuccessKind::Failure);
    assert!(message.expect("a message").contains("expected an error within 0.1 %, found -"));
    let TestCaseStatus::NonSuccess { kind, .. } = of_class("gone", "run") else {
        panic!("expected an error");
    };
    assert_eq!(kind, NonSuccessKind::Error);
    let text = fs::read_to_string(&markdown).expect("markdown");
    assert!(text.starts_with("### ❌ plumb check failed: 1 of 1 numbers, in 2 of 2 cases"), "{text}");
    assert!(text.contains("- gone: ") && text.contains("failed: outside tolerance |"), "{text}");
}

#[test]
fn files_that_cannot_be_used_exit_with_2_and_leave_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("out");
    let bad = write(&folder.path().join("results.json"), "{\"cases\": [{}]}");
    for (lines, more, says) in [
        ("tolerance.ttft.p98 = 3", vec![], "suite.toml, line 7: "),
        ("", vec!["--baseline", arg(&bad)], "results.json, line 1: expected the results.json of a"),
        ("", vec!["--baseline", "nowhere"], "nowhere: No such file"),
        ("", vec!["--min-change-pct", "nan"], "--min-change-pct"),
        ("", vec!["--bundle", "a", "b"], "cannot be used with"),
    ] {
        let more: Vec<_> = more.into_iter().chain(["--out", arg(&out)]).collect();
        let (code, _, stderr) = check(folder.path(), &repeats_case("q8", lines), &more);
        assert_eq!(code, 2, "{more:?}: {stderr}");
        assert!(stderr.contains(says), "{more:?}: {stderr}");
        assert!(!out.exists());
    }
}

fn check_bundle(old: &Path, new: &Path, more: &[&str]) -> (i32, Value) {
    let args = ["check", "--json", "--bundle", arg(old), arg(new)];
    let (code, stdout, stderr) = ended(&plumb(args.iter().chain(more)).output().expect("plumb starts"));
    assert_eq!(stderr, "");
    (code, serde_json::from_str(&stdout).expect("JSON"))
}

/// The fixture's bundle with the measured times of one operator's predictor changed.
fn changed(folder: &Path, operator: Operator, factor: f64) -> PathBuf {
    let target = folder.join("changed");
    fixture().copy_bundle(&target);
    let mut bundle = Bundle::open(&target).expect("bundle");
    let mut predictor = bundle.predictor(operator).expect("predictor");
    let domain = &mut predictor.domain;
    let times = [&mut domain.time_ns, &mut domain.low_ns, &mut domain.high_ns];
    times.into_iter().flatten().for_each(|time| *time *= factor);
    let json = predictor.to_json().expect("JSON");
    bundle.update(vec![(predictor_name(operator), json)]).expect("update");
    target
}

#[test]
fn a_bundle_passes_against_itself() {
    let bundle = fixture().bundle();
    let (code, diff) = check_bundle(&bundle, &bundle, &["--strict"]);
    assert_eq!((code, &diff["passed"]), (0, &Value::from(true)));
    assert_eq!((&diff["lost"], &diff["moved"]), (&Value::Array(vec![]), &Value::Array(vec![])));
    assert!(diff["operators"]["attention"]["num_old_ok"].as_u64() > Some(100), "{}", diff["operators"]);
}

#[test]
fn one_operator_20_percent_slower_is_named_and_fails_when_strict() {
    let folder = tempfile::tempdir().expect("folder");
    let slow = changed(folder.path(), Operator::Rope, 1.2);
    let (code, diff) = check_bundle(&fixture().bundle(), &slow, &[]);
    assert_eq!(code, 0);
    let moved = diff["moved"].as_array().expect("moved");
    assert!(!moved.is_empty() && moved.iter().all(|point| point["operator"] == "rope"), "{moved:?}");
    assert!((moved[0]["change_pct"].as_f64().expect("a change") - 20.0).abs() < 0.1);
    assert_eq!(check_bundle(&fixture().bundle(), &slow, &["--strict"]).0, 3);
    assert_eq!(check_bundle(&fixture().bundle(), &slow, &["--strict", "--tolerance-pct", "25"]).0, 0);
}

#[test]
fn times_that_cannot_be_true_and_shapes_that_are_gone_block() {
    let folder = tempfile::tempdir().expect("folder");
    let impossible = changed(folder.path(), Operator::LmHead, 0.05);
    let (code, diff) = check_bundle(&fixture().bundle(), &impossible, &[]);
    let lost = diff["lost"].as_array().expect("lost");
    assert_eq!(code, 3);
    let is_named = |point: &Value| point["operator"] == "lm_head" && point["new"] == "INVALID";
    assert!(!lost.is_empty() && lost.iter().all(is_named), "{lost:?}");
    assert!(lost[0]["reason"].as_str().expect("a reason").starts_with("expected "), "{lost:?}");
    // The H200's bundle was measured at fewer shapes.
    let (code, diff) = check_bundle(&data().join("h100-sxm5-80gb"), &data().join("h200-sxm-141gb"), &[]);
    assert_eq!(code, 3);
    let lost = diff["lost"].as_array().expect("lost");
    assert!(!lost.is_empty() && lost.iter().all(|point| point["new"] == "DATA_MISS"), "{lost:?}");
}

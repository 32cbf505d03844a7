//! `plumb bundle diff` on profiles of the fake device.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use plumbline_bundles::{Bundle, Sample, bundle::samples_name, samples};
use plumbline_schema::Operator;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    fixture::fixture,
    support::{arg, ended, plumb, stdout_of, write},
};

/// A second profile of the fake device, whose noise is drawn from another seed.
static SECOND: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("folder");
    let bundle = folder.path().join("second");
    let args = ["profile", "--model", "qwen3-0.6b", "--device", "fake", "--seed", "1", "--out", arg(&bundle)];
    stdout_of(args);
    folder
});

fn second() -> PathBuf {
    SECOND.path().join("second")
}

/// Runs the comparison; returns the exit code and the JSON.
fn diff(a: &Path, b: &Path) -> (i32, Value) {
    let output = plumb(["bundle", "diff", arg(a), arg(b), "--json"]).output().expect("plumb starts");
    let (code, stdout, stderr) = ended(&output);
    assert_eq!(stderr, "");
    (code, serde_json::from_str(&stdout).expect("JSON"))
}

/// Operator and verdict, with a blank between, of each operator that is not the same.
fn not_same(diff: &Value) -> Vec<String> {
    let operators = diff["operators"].as_array().expect("operators");
    assert_eq!(operators.len(), 13, "every operator within one GPU");
    let text = |operator: &Value, key: &str| operator[key].as_str().expect("text").to_owned();
    let changed = operators.iter().filter(|operator| operator["verdict"] != "same");
    changed.map(|operator| format!("{} {}", text(operator, "operator"), text(operator, "verdict"))).collect()
}

/// Changes the samples of some operators of a bundle.
fn change(bundle: &Path, operators: &[Operator], mut change: impl FnMut(&mut Sample)) {
    let mut bundle = Bundle::open(bundle).expect("bundle");
    for &operator in operators {
        let mut rows = bundle.operator_samples(operator).expect("samples");
        rows.iter_mut().for_each(&mut change);
        let csv = samples::to_csv(operator, &rows);
        bundle.update(vec![(samples_name(operator), csv)]).expect("update");
    }
}

fn scale(sample: &mut Sample, factor: f64) {
    sample.stats = sample.stats.scaled(factor);
}

#[test]
fn two_profiles_of_one_device_are_the_same() {
    let (code, diff) = diff(&fixture().bundle(), &second());
    assert_eq!(not_same(&diff), Vec::<String>::new());
    assert_eq!((code, &diff["verdict"]), (0, &Value::from("same")));
    assert_eq!(diff["differences"], Value::Array(vec![]), "one made-up machine");
    assert_eq!(diff["moved"].as_array().map(Vec::len), Some(10));
}

#[test]
fn a_slowed_operator_and_no_other_is_slower() {
    let folder = tempfile::tempdir().expect("folder");
    let slowed = folder.path().join("slowed");
    fixture().copy_bundle(&slowed);
    change(&slowed, &[Operator::Rope], |sample| scale(sample, 1.05));
    let (code, there) = diff(&second(), &slowed);
    assert_eq!(not_same(&there), ["rope slower"]);
    assert_eq!((code, &there["verdict"]), (3, &Value::from("drift")));
    assert_eq!(there["notes"][0], "times changed, and nothing that is recorded of the machines explains it");
    let (code, back) = diff(&slowed, &second());
    assert_eq!(not_same(&back), ["rope faster"]);
    assert_eq!(code, 3);

    let output = plumb(["bundle", "diff", arg(&second()), arg(&slowed)]).output().expect("plumb starts");
    let (code, text, _) = ended(&output);
    assert_eq!(code, 3);
    let rope = text.lines().find(|line| line.starts_with("rope")).expect("a row of rope");
    assert!(rope.split_whitespace().nth(1) == Some("slower") && rope.contains("1.05"), "{text}");
    assert!(text.ends_with("\ndrift\n"), "{text}");
}

#[test]
fn loud_noise_is_noisy() {
    let folder = tempfile::tempdir().expect("folder");
    let loud = folder.path().join("loud");
    fixture().copy_bundle(&loud);
    let mut rng = Pcg64::seed_from_u64(1);
    change(&loud, &[Operator::QkNorm], |sample| scale(sample, (0.4 * (rng.random::<f64>() - 0.5)).exp()));
    let (code, diff) = diff(&fixture().bundle(), &loud);
    assert_eq!(not_same(&diff), ["qk_norm noisy"]);
    assert_eq!((code, &diff["verdict"]), (5, &Value::from("unclear")));
}

#[test]
fn a_changed_machine_is_shown_beside_its_times() {
    let folder = tempfile::tempdir().expect("folder");
    let changed = folder.path().join("changed");
    fixture().copy_bundle(&changed);
    change(&changed, &Operator::ALL[..1], |sample| {
        scale(sample, 1.1);
        sample.sm_clock_mhz = Some(1350);
    });
    let manifest = changed.join("manifest.json");
    let text = fs::read_to_string(&manifest).expect("manifest");
    let hash = Bundle::open(&changed).expect("bundle").manifest.device.expect("device").kernel_hash;
    write(&manifest, text.replace(&hash, &"0".repeat(64)));
    let (code, diff) = diff(&fixture().bundle(), &changed);
    assert_eq!(not_same(&diff), ["embedding slower"]);
    assert_eq!(code, 3);
    let embedding = &diff["operators"][0]["comparison"];
    assert!((embedding["sm_clock_ratio"].as_f64().expect("a ratio") - 0.9).abs() < 1e-9);
    let facts: Vec<_> =
        diff["differences"].as_array().expect("differences").iter().map(|d| &d["fact"]).collect();
    assert_eq!(facts, ["kernel_hash"]);
    let notes = diff["notes"].to_string();
    assert!(notes.contains("kernel sources") && notes.contains("SM clocks of"), "{notes}");
}

#[test]
fn a_statistics_file_stands_for_its_bundle() {
    let folder = tempfile::tempdir().expect("folder");
    let stats = folder.path().join("a.csv.zst");
    let bundle = fixture().bundle();
    let written = stdout_of(["bundle", "stats", arg(&bundle), "--out", arg(&stats), "--json"]);
    let written: Value = serde_json::from_str(&written).expect("JSON");
    let num_samples = Bundle::open(&bundle).expect("bundle").samples().expect("samples").len();
    assert_eq!(written["num_points"], num_samples);

    let (code, itself) = diff(&stats, &bundle);
    assert_eq!((code, not_same(&itself)), (0, Vec::new()));
    assert_eq!(itself["moved"], Value::Array(vec![]));
    for operator in itself["operators"].as_array().expect("operators") {
        assert_eq!(operator["comparison"]["ratio"], 1.0, "{operator}");
    }
    let (_, by_file) = diff(&stats, &second());
    let (_, by_bundle) = diff(&bundle, &second());
    assert_eq!(by_file["operators"], by_bundle["operators"]);
}

#[test]
fn what_cannot_be_compared_is_bad_input() {
    let folder = tempfile::tempdir().expect("folder");
    let bundle = fixture().bundle();
    let empty = write(&folder.path().join("empty.csv"), "");
    let absent = folder.path().join("absent.csv.zst");
    for other in [folder.path(), &empty, &absent] {
        let output = plumb(["bundle", "diff", arg(&bundle), arg(other)]).output().expect("plumb starts");
        let (code, stdout, stderr) = ended(&output);
        assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
        assert!(stderr.starts_with(&format!("error: {}", other.display())), "{stderr}");
    }
    let output =
        plumb(["bundle", "stats", arg(&bundle), "--out", "stats.json"]).output().expect("plumb starts");
    let (code, _, stderr) = ended(&output);
    assert!(code == 2 && stderr.contains(".csv or .csv.zst"), "{stderr}");
}

//! What the operators reach: on a device whose law is known, and on a shipped bundle.

use std::fs;

use serde_json::Value;

use crate::{
    fixture::fixture,
    support::{arg, ended, plumb, stdout_of, write},
};

/// The fake device adds this to every launch, ns; its ceilings are what its law reaches without it.
const OVERHEAD_NS: f64 = 1800.0;
/// It scatters by 1 %.
const NOISE: f64 = 0.05;

fn efficiency(bundle: &str) -> Value {
    serde_json::from_str(&stdout_of(["bundle", "efficiency", bundle, "--json"])).expect("JSON")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("expected a number, found {value}"))
}

#[test]
fn shares_are_those_of_the_fake_devices_law() {
    let found = efficiency(arg(&fixture().bundle()));
    assert_eq!(found["peers"], Value::Array(Vec::new()), "no engine's kernels are known for a made-up GPU");
    let rows = found["operators"].as_array().expect("operators");
    let mut classes = Vec::new();
    for row in rows {
        let class = row["class"].as_str().expect("a class");
        classes.push(class);
        for rate in ["best", "median", "worst"].map(|name| &row[name]) {
            let (time_ns, share) = (number(&rate["time_ns"]), number(&rate["share"]));
            let law_ns = share * time_ns + OVERHEAD_NS;
            // The law slows down products with a part of a wave, and decodes with one long sequence.
            let is_slowed = matches!(class, "gemm" | "decode");
            assert!(time_ns > law_ns * (1.0 - NOISE), "{row}");
            assert!(is_slowed || time_ns < law_ns * (1.0 + NOISE), "{row}");
        }
        assert!(number(&row["worst"]["share"]) <= number(&row["best"]["share"]), "{row}");
        let is_met = row["target"].as_f64().map(|target| number(&row["median"]["share"]) >= target);
        assert_eq!(row["is_met"].as_bool(), is_met, "{row}");
    }
    for class in ["prefill", "decode", "elementwise", "gemm"] {
        assert!(classes.contains(&class), "no large {class}: {classes:?}");
    }
    assert_eq!(
        fixture().profiled["efficiency"]["operators"],
        found["operators"],
        "as `plumb profile` closes"
    );
    let text = stdout_of(["bundle", "efficiency", arg(&fixture().bundle())]);
    assert!(text.contains("1.700 TB/s") && text.contains("375 TFLOP/s"), "{text}");
    assert!(!text.contains("Against"), "{text}");
}

#[test]
fn a_shipped_bundle_is_compared_with_an_engines_kernels() {
    let found = efficiency("h100-sxm5-80gb");
    let rows = found["peers"].as_array().expect("peers");
    assert_eq!(rows.len(), 25);
    for row in rows {
        let ours = &row["ours"];
        let (ours_ns, theirs_ns) = (number(&ours["time_ns"]), number(&row["peer"]["median_ns"]));
        let margin = f64::max(300.0, 0.03 * theirs_ns);
        let verdict = match ours_ns - theirs_ns {
            over if over < -margin => "faster",
            over if over > margin => "slower",
            _ => "level",
        };
        assert_eq!(row["verdict"]["kind"], verdict, "{row}");
    }
    let chunks = |row: &&Value| row["peer"]["prefill_chunks_tokens_context"] == "512:0;512:0;512:0;512:0";
    let attention = rows.iter().find(chunks).expect("four prompts");
    assert_eq!(attention["ours"]["provenance"], "measured");
    let text = stdout_of(["bundle", "efficiency", "h100-sxm5-80gb"]);
    assert!(text.contains("vLLM 0.24.0") && text.contains("decode_8"), "{text}");
}

#[test]
fn a_bundle_without_measured_ceilings_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let bundle = folder.path().join("bundle");
    fixture().copy_bundle(&bundle);
    let path = bundle.join("manifest.json");
    let text = fs::read_to_string(&path).expect("manifest");
    let mut manifest: Value = serde_json::from_str(&text).expect("JSON");
    manifest["evidence"]["copy_bandwidth_bytes_per_s"] = Value::Null;
    write(&path, manifest.to_string());
    let (code, _, stderr) =
        ended(&plumb(["bundle", "efficiency", arg(&bundle)]).output().expect("plumb starts"));
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("copy bandwidth") && stderr.contains("plumb profile"), "{stderr}");
}

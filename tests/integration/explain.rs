//! `plumb explain` end to end.

use serde_json::Value;

use crate::{
    check::data,
    support::{arg, ended, plumb, stdout_of},
};

/// The parts of each waterfall add up; returns the one of E2E.
fn e2e(explanation: &Value) -> Value {
    let waterfalls = explanation["waterfalls"].as_array().expect("waterfalls");
    assert_eq!(waterfalls.len(), 3);
    for waterfall in waterfalls {
        let number = |value: &Value| value.as_f64().expect("a number");
        let parts: f64 =
            waterfall["parts"].as_array().expect("parts").iter().map(|part| number(&part["ms"])).sum();
        let difference = number(&waterfall["sim_ms"]) - number(&waterfall["real_ms"]);
        assert!((parts - difference).abs() < 1e-6, "{waterfall}");
    }
    waterfalls[2].clone()
}

fn share_of(waterfall: &Value, cause: &str) -> f64 {
    let parts = waterfall["parts"].as_array().expect("parts");
    let part = parts.iter().find(|part| part["cause"] == cause).expect("every cause has a part");
    part["share_pct"].as_f64().expect("a share")
}

/// The published prediction left out the host: two imports, and the host is what is blamed.
#[test]
fn the_seed_cases_error_is_the_hosts() {
    let folder = tempfile::tempdir().expect("folder");
    let (real, sim) = (folder.path().join("real"), folder.path().join("sim"));
    let source = data().join("runs/a100-sarathi");
    let tables = |of: &str| source.join(format!("seed-document/qwen3-0.6b_a100_{of}_request_metrics.csv"));
    let engine = source.join("engine.json");
    let import = |of: &str, out, more: &[&str]| {
        let path = tables(of);
        let args = ["import-run", "-q", "seed", arg(&path), "--out", arg(out)];
        stdout_of(args.iter().chain(more).copied());
    };
    import("real", &real, &["--engine-json", arg(&engine), "--gpu", "a100-sxm4-80gb"]);
    import("vidur", &sim, &["--simulated"]);
    let text = stdout_of([
        "explain",
        "--json",
        "--real",
        arg(&real),
        "--sim",
        arg(&sim),
        "--bundle",
        "h100-sxm5-80gb",
        "--gpu",
        "a100-sxm4-80gb",
        "--engine",
        "sarathi-a100",
    ]);
    let explanation: Value = serde_json::from_str(&text).expect("JSON");
    let whole = e2e(&explanation);
    assert!(share_of(&whole, "host") > 90.0, "{whole}");
    assert!(explanation["real_host_share"].as_f64() > Some(0.8), "{explanation}");
    assert!(explanation["sim_host_share"].as_f64() < Some(0.2), "{explanation}");
}

/// A simulation with half of the KV blocks, explained against the real run with all of them.
#[test]
fn half_of_the_cache_is_named() {
    let folder = tempfile::tempdir().expect("folder");
    let run = data().join("runs/h100-vllm-0.24-scheduler/preempt-1500/conv-q8");
    let workload = folder.path().join("workload.csv");
    plumbline_schema::Run::read(&run).expect("a shipped run").workload().write(&workload).expect("written");
    let engine = run.parent().expect("a folder above").join("engine.json");
    let simulate = |out: &std::path::Path, blocks: &str| {
        let set = format!("num_gpu_blocks={blocks}");
        stdout_of([
            "simulate",
            "-q",
            "--bundle",
            "h100-sxm5-80gb",
            "--engine",
            "vllm-0.24-eager",
            "--model",
            "qwen3-0.6b",
            "--deployment",
            arg(&engine),
            "--set",
            &set,
            "--workload",
            arg(&workload),
            "--out",
            arg(out),
        ]);
    };
    let (whole, half) = (folder.path().join("whole"), folder.path().join("half"));
    simulate(&whole, "1500");
    simulate(&half, "750");
    let text = stdout_of(["explain", "--json", "--real", arg(&whole), "--sim", arg(&half)]);
    let explanation = e2e(&serde_json::from_str(&text).expect("JSON"));
    assert!(share_of(&explanation, "kv_capacity") > 80.0, "{explanation}");
    let text = stdout_of(["explain", "--real", arg(&whole), "--sim", arg(&half)]);
    assert!(text.contains("\nKV capacity ") && text.contains("steps that cost most"), "{text}");
}

#[test]
fn what_is_missing_is_named() {
    let run = data().join("runs/h100-vllm-0.24/qwen3-0.6b-graph/conv-q8");
    let explain = |more: &[&str]| {
        let args = ["explain", "--real", arg(&run), "--sim", arg(&run)];
        ended(&plumb(args.iter().chain(more)).output().expect("plumb starts"))
    };
    let (code, _, stderr) = explain(&["--bundle", "h100-sxm5-80gb", "--engine", "none-such"]);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("none-such"), "{stderr}");
    let (code, _, stderr) = explain(&["--bundle", "none-such"]);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("none-such"), "{stderr}");
}

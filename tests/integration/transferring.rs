//! `plumb train --transfer-from`: one bundle's predictors on another's samples.

use serde_json::Value;

use crate::{
    fixture::fixture,
    support::{arg, ended, plumb, stdout_of},
};

#[test]
fn a_bundle_takes_over_anothers_predictors_and_says_so_in_every_time() {
    let folder = tempfile::tempdir().expect("folder");
    let (target, run) = (folder.path().join("target"), folder.path().join("run"));
    fixture().copy_bundle(&target);
    let source = fixture().bundle();
    let transfer =
        |to, from, few_shot| ["train", to, "--transfer-from", from, "--few-shot", few_shot, "--json"];
    let text = stdout_of(transfer(arg(&target), arg(&source), "5"));
    let value: Value = serde_json::from_str(&text).expect("JSON");
    let operators = value["report"]["operators"].as_array().expect("operators");
    assert_eq!(operators.len(), fixture().training["report"]["operators"].as_array().expect("some").len());
    for operator in operators {
        let name = &operator["operator"];
        assert_eq!(operator["num_used"], 5, "{name}");
        // It is the same fake device, so there is nothing to adapt but its scatter of 1 %.
        let p50 = |by: &str| operator[by]["p50"].as_f64().expect("an error");
        assert!(p50("few_shot") < 0.05 && p50("few_shot") < p50("data_sheets") + 0.02, "{operator}");
    }

    let (engine, workload) = (fixture().file("engine.json"), fixture().file("workload.csv"));
    let deployment = fixture().file("deployment.json");
    let text = stdout_of([
        "simulate",
        "--bundle",
        arg(&target),
        "--engine",
        arg(&engine),
        "--model",
        "qwen3-0.6b",
        "--workload",
        arg(&workload),
        "--deployment",
        arg(&deployment),
        "--out",
        arg(&run),
        "--json",
    ]);
    let value: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(value["coverage"]["transferred"], 1.0, "{}", value["coverage"]);

    let again = transfer(arg(&source), arg(&target), "5");
    let (code, _, stderr) = ended(&plumb(again).output().expect("plumb starts"));
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("itself carried over, from `fake-gpu`"), "{stderr}");
}

#[test]
fn a_few_shots_need_a_bundle_to_carry_over() {
    let bundle = fixture().bundle();
    let (code, _, stderr) =
        ended(&plumb(["train", arg(&bundle), "--few-shot", "5"]).output().expect("plumb starts"));
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("--transfer-from"), "{stderr}");
}

//! From a device to a judged prediction, without a GPU.

use std::{fmt::Write, fs, path::Path};

use serde_json::Value;

use crate::{
    fixture::fixture,
    support::{arg, ended, plumb, stdout_of, write},
};

fn simulate_args<'a>(files: &'a [String; 4], out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let [bundle, engine, workload, deployment] = files;
    let mut args = vec!["simulate", "--bundle", bundle, "--engine", engine, "--model", "qwen3-0.6b"];
    args.extend(["--workload", workload, "--deployment", deployment, "--out", out]);
    args.extend(more);
    args
}

/// Bundle, engine, workload and deployment of the fixture.
fn files() -> [String; 4] {
    let fixture = fixture();
    let bundle = arg(&fixture.bundle()).to_owned();
    let file = |name| arg(&fixture.file(name)).to_owned();
    [bundle, file("engine.json"), file("workload.csv"), file("deployment.json")]
}

#[test]
fn training_recovers_the_fake_devices_law() {
    let operators = fixture().training["report"]["operators"].as_array().expect("operators").clone();
    assert_eq!(operators.len(), 13, "every operator within one GPU");
    for operator in &operators {
        let name = &operator["operator"];
        let error = &operator["error"]["shuffled"];
        // The device scatters by 1 %; what training does not see of the law is held out.
        assert!(error["p50"].as_f64().expect("p50") < 0.02, "{name}: {error}");
        // A decode that is not split along its keys is not what attention's features are made for: the forest learns it.
        let most = if *name == "attention" { 0.05 } else { 0.03 };
        assert!(error["mean"].as_f64().expect("mean") < most, "{name}: {error}");
        let roofline = operator["roofline_error"]["p50"].as_f64().expect("roofline");
        assert!(error["p50"].as_f64().expect("p50") < roofline, "{name}: no better than the data sheet");
    }
}

#[test]
fn the_bundle_is_sound_and_says_what_it_holds() {
    let bundle = fixture().bundle();
    let verified: Value =
        serde_json::from_str(&stdout_of(["bundle", "verify", arg(&bundle), "--json"])).expect("JSON");
    assert_eq!(verified["problems"], Value::Array(vec![]));
    assert_eq!(verified["num_predictors"], 13);
    let text = stdout_of(["bundle", "inspect", arg(&bundle)]);
    for part in ["fake-gpu", "qwen3-0.6b", "attention", "kernel launch"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let folder = tempfile::tempdir().expect("folder");
    let files = files();
    let run = |name: &str, seed: &str| {
        let out = folder.path().join(name);
        let json = stdout_of(simulate_args(&files, arg(&out), &["--seed", seed, "--json"]));
        let bytes = ["request_metrics.csv", "token_metrics.csv", "step_metrics.csv", "run.json"]
            .map(|file| fs::read(out.join(file)).expect("a file of the run"));
        (bytes, json.replace(arg(&out), "OUT"))
    };
    let (first, text) = run("a", "7");
    let (again, same_text) = run("b", "7");
    assert_eq!((&first, &text), (&again, &same_text));
    // Written over an earlier simulation.
    assert_eq!(run("a", "7").0, first);
    let (other, _) = run("c", "8");
    assert_ne!(first[2], other[2], "another seed draws other residuals");
    assert_eq!(String::from_utf8_lossy(&first[0]).lines().count(), 5);

    let value: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(value["counts"]["finished"], 4);
    let coverage = value["coverage"].as_object().expect("coverage");
    let sum: f64 = coverage.values().filter_map(Value::as_f64).sum();
    assert!((sum - 1.0).abs() < 1e-9, "{coverage:?}");
    assert_eq!(coverage["roofline"], 0.0);
}

#[test]
fn training_twice_gives_the_same_bytes() {
    let folder = tempfile::tempdir().expect("folder");
    let bundle = folder.path().join("bundle");
    fixture().copy_bundle(&bundle);
    let digest = fixture().training["digest"].clone();
    let again: Value = serde_json::from_str(&stdout_of(["train", arg(&bundle), "--json"])).expect("JSON");
    assert_eq!(again["digest"], digest);
}

/// Makes a run look measured.
fn relabel_as_real(run: &Path) {
    let path = run.join("run.json");
    let text = fs::read_to_string(&path).expect("run.json");
    write(&path, text.replace("\"simulated\"", "\"real\""));
}

#[test]
fn a_simulation_is_compared_with_runs_of_the_same_workload() {
    let folder = tempfile::tempdir().expect("folder");
    let files = files();
    let outs = ["real-1", "real-2", "sim"].map(|name| folder.path().join(name));
    for (out, seed) in outs.iter().zip(["1", "2", "3"]) {
        stdout_of(simulate_args(&files, arg(out), &["--seed", seed]));
    }
    let [real_1, real_2, sim] = &outs;
    relabel_as_real(real_1);
    relabel_as_real(real_2);

    let report = folder.path().join("report");
    let args = ["compare", arg(real_1), arg(real_2), "--sim", arg(sim), "--out", arg(&report), "--json"];
    let result: Value = serde_json::from_str(&stdout_of(args)).expect("JSON");
    let metrics = result["cases"][0]["metrics"].as_array().expect("metrics");
    assert_eq!(metrics.len(), 16);
    let ttft = metrics.iter().find(|m| m["metric"] == "ttft" && m["stat"] == "mean").expect("mean TTFT");
    assert_eq!(ttft["n"], 4);
    // Only the draws differ.
    assert!(ttft["error_pct"].as_f64().expect("error").abs() < 20.0, "{ttft}");
    for file in ["results.json", "summary.md", "report.html"] {
        assert!(report.join(file).is_file(), "{file}");
    }

    // The scheduler's own steps replay as they were formed.
    let replay = ["compare", arg(real_1), arg(real_2), "--replay-steps", "--json"];
    let replayed: Value = serde_json::from_str(&stdout_of(replay)).expect("JSON");
    for run in replayed["runs"].as_array().expect("runs") {
        assert_eq!((&run["steps"], &run["first_difference"]), (&run["identical"], &Value::Null), "{run}");
        assert!(run["steps"].as_u64().expect("steps") > 10);
    }

    // A real run is never written over.
    let (code, _, stderr) =
        ended(&plumb(simulate_args(&files, arg(real_1), &[])).output().expect("plumb starts"));
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("found a real run"), "{stderr}");
}

/// A workload of `num_requests` requests, each some milliseconds behind the one before.
fn steady_workload(num_requests: u64, seed: u64) -> String {
    let mut text = String::from("request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens\n");
    for id in 0..num_requests {
        let mixed = (id + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let (prefill, decode) = (20 + mixed % 700, 10 + (mixed >> 32) % 60);
        writeln!(text, "{id},{},{prefill},{decode}", id * 30_000_000).expect("writing to a string");
    }
    text
}

#[test]
fn calibration_finds_the_engine_behind_a_run() {
    let folder = tempfile::tempdir().expect("folder");
    let outs = ["fit", "held-out"].map(|name| folder.path().join("runs").join(name));
    for (seed, out) in (1..).zip(&outs) {
        let mut files = files();
        let workload = write(&folder.path().join("workload.csv"), steady_workload(60, seed));
        files[2] = arg(&workload).to_owned();
        stdout_of(simulate_args(&files, arg(out), &["--residuals", "none"]));
        relabel_as_real(out);
    }
    let profile = folder.path().join("fitted.json");
    let [fit, held_out] = &outs;
    let bundle = fixture().bundle();
    let calibrate = ["calibrate", "--real", arg(fit), "--hold-out", arg(held_out), "--bundle", arg(&bundle)];
    let more = ["--engine", "found", "--out", arg(&profile), "--json"];
    let text = stdout_of(calibrate.iter().chain(&more));
    let value: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(value["profile"]["fitted_on"]["runs"][0], "runs/fit");
    let rows = value["held_out"].as_array().expect("rows");
    let itl = rows.iter().find(|r| r["metric"] == "itl" && r["stat"] == "p50").expect("ITL");
    let error = |key: &str| itl[key].as_f64().expect("an error").abs();
    assert!(error("after_error_pct") < 3.0, "{itl}");
    assert!(error("before_error_pct") > 30.0, "launch costs alone do not explain this engine: {itl}");

    // What was written serves a simulation, and can be put into the bundle instead.
    let mut files = files();
    files[1] = arg(&profile).to_owned();
    stdout_of(simulate_args(&files, arg(&folder.path().join("sim")), &[]));
    let own = folder.path().join("bundle");
    fixture().copy_bundle(&own);
    stdout_of(["calibrate", "--real", arg(fit), "--bundle", arg(&own), "--engine", "found"]);
    stdout_of(["bundle", "verify", arg(&own)]);
    assert!(stdout_of(["bundle", "inspect", arg(&own)]).contains("found"));
}

#[test]
fn a_suite_with_one_bad_case_judges_the_others_and_exits_with_5() {
    let folder = tempfile::tempdir().expect("folder");
    let files = files();
    let real = folder.path().join("real");
    stdout_of(simulate_args(&files, arg(&real), &["--seed", "1"]));
    relabel_as_real(&real);
    let [bundle, engine, ..] = &files;
    let case = |name: &str, real: &str| {
        format!(
            "[[case]]\nname = \"{name}\"\nreal = [\"{real}\"]\nbundle = \"{bundle}\"\nmodel = \"qwen3-0.6b\"\n\
             engine = \"{engine}\"\n\n"
        )
    };
    let text = case("good/one", "real") + &case("bad/one", "nowhere") + &case("good/two", "real");
    let suite = write(&folder.path().join("suite.toml"), text);
    let out = folder.path().join("report");
    let args = ["validate", "--suite", arg(&suite), "--out", arg(&out), "--json"];
    let (code, stdout, stderr) = ended(&plumb(args).output().expect("plumb starts"));
    assert_eq!(code, 5, "{stderr}");
    let errors: Vec<_> = stderr.lines().filter(|line| line.starts_with("error:")).collect();
    assert_eq!(errors.len(), 1, "{stderr}");
    assert!(errors[0].contains("case `bad/one`: ") && errors[0].contains("nowhere"), "{stderr}");
    let result: Value = serde_json::from_str(&stdout).expect("one JSON document");
    let statuses: Vec<_> = result["cases"].as_array().expect("cases").iter().map(|c| &c["status"]).collect();
    assert_eq!(statuses, ["ok", "failed", "ok"]);
    assert!(result["cases"][1]["error"].as_str().expect("an error").contains("nowhere"));
    assert!(out.join("report.html").is_file());

    // Only what is asked for, and the same numbers whoever runs beside it.
    let only = ["validate", "--suite", arg(&suite), "--out", arg(&out), "--json", "--case", "good/two"];
    let alone: Value = serde_json::from_str(&stdout_of(only)).expect("one JSON document");
    assert_eq!(alone["cases"].as_array().expect("cases").len(), 1);
    assert_eq!(alone["cases"][0]["metrics"], result["cases"][2]["metrics"]);

    // A folder that is no report is left alone.
    let mine = write(&folder.path().join("mine/notes.txt"), "keep");
    let place = mine.parent().expect("a folder");
    let (code, _, stderr) = ended(
        &plumb(["validate", "--suite", arg(&suite), "--out", arg(place)]).output().expect("plumb starts"),
    );
    assert_eq!(code, 2, "{stderr}");
    assert_eq!(fs::read_to_string(&mine).expect("kept"), "keep");
}

#[test]
fn a_spent_budget_is_told_and_exits_with_5() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("bundle");
    let args = ["profile", "--model", "qwen3-0.6b", "--device", "fake", "--budget", "0s", "--out", arg(&out)];
    let (code, stdout, stderr) = ended(&plumb(args).output().expect("plumb starts"));
    assert_eq!(code, 5, "{stderr}");
    assert!(
        stdout.contains("not measured: ") && stdout.contains("the time budget was spent before the first"),
        "{stdout}"
    );
    let (code, _, stderr) = ended(&plumb(["train", arg(&out)]).output().expect("plumb starts"));
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("no samples"), "{stderr}");
}

#[test]
fn a_step_that_the_scheduler_would_not_form_exits_with_3() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("run");
    stdout_of(simulate_args(&files(), arg(&out), &["--residuals", "none"]));
    let path = out.join("step_metrics.csv");
    let text = fs::read_to_string(&path).expect("steps");
    // The first prompt of 100 tokens, said to be computed in two steps' worth of context.
    assert!(text.contains("100:0"), "{text}");
    write(&path, text.replacen("100:0", "100:1", 1));
    let (code, stdout, stderr) =
        ended(&plumb(["compare", arg(&out), "--replay-steps"]).output().expect("plumb starts"));
    assert_eq!(code, 3, "{stderr}");
    assert!(stdout.contains("first differs in step 0") && stdout.contains("100:1"), "{stdout}");
}

#[test]
fn an_operator_outside_its_domain_is_refused_or_tagged() {
    let folder = tempfile::tempdir().expect("folder");
    let mut files = files();
    files[2] = arg(&write(
        &folder.path().join("long.csv"),
        "request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens\n0,0,39000,4\n",
    ))
    .to_owned();
    let out = folder.path().join("run");
    let more = ["--set", "max_model_len=40000", "--set", "num_gpu_blocks=4000", "--json"];
    let refused = [&more[..], &["--out-of-domain", "refuse"]].concat();
    let (code, _, stderr) =
        ended(&plumb(simulate_args(&files, arg(&out), &refused)).output().expect("starts"));
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("operator `attention`") && stderr.contains("outside the measured"), "{stderr}");
    assert!(!out.exists());
    let text = stdout_of(simulate_args(&files, arg(&out), &more));
    let value: Value = serde_json::from_str(&text).expect("JSON");
    assert!(value["coverage"]["extrapolated"].as_f64().expect("a share") > 0.0, "{text}");
}

#[test]
fn times_carried_over_to_another_gpu_are_tagged() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("run");
    let text = stdout_of(simulate_args(&files(), arg(&out), &["--gpu", "a100-sxm4-80gb", "--json"]));
    let value: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(value["coverage"]["transferred"], 1.0);
    let run: Value = serde_json::from_slice(&fs::read(out.join("run.json")).expect("file")).expect("JSON");
    assert_eq!(run["gpu"], "a100-sxm4-80gb");
}

#[test]
fn a_model_that_was_not_stated_is_told_by_the_grid_and_never_by_another_models_table() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("run");
    let [grid, engine, workload, deployment] = &files();
    let more = ["--deployment", deployment, "--out", arg(&out), "--json"];
    let refuse = ["--out-of-domain", "refuse"];
    let args =
        ["simulate", "--bundle", grid, "--engine", engine, "--model", "llama3-8b", "--workload", workload];
    let value: Value =
        serde_json::from_str(&stdout_of(args.iter().chain(&more).chain(&refuse))).expect("JSON");
    let coverage = &value["coverage"];
    let share = |tag: &str| coverage[tag].as_f64().expect("a share");
    assert!(share("interpolated") > 0.9 && share("measured") + share("interpolated") > 0.999, "{coverage}");
    fs::remove_dir_all(&out).expect("removed");

    // Without the grid there is the other model's table alone.
    let own = folder.path().join("own");
    stdout_of(["profile", "--model", "qwen3-0.6b", "--device", "fake", "--no-grid", "--out", arg(&own)]);
    stdout_of(["train", arg(&own)]);
    let args = args.map(|text| if text == grid { arg(&own) } else { text });
    let (code, _, stderr) =
        ended(&plumb(args.iter().chain(&more).chain(&refuse)).output().expect("plumb starts"));
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("num_q_heads = 32 is outside the measured 16..=16"), "{stderr}");
    assert!(!out.exists());
    let value: Value = serde_json::from_str(&stdout_of(args.iter().chain(&more))).expect("JSON");
    // Only operators that see neither hidden size nor number of query heads may know this model's shapes.
    assert!(value["coverage"]["extrapolated"].as_f64().expect("a share") > 0.9, "{value}");
}

#[test]
fn without_a_gpu_profile_says_what_to_do() {
    if Path::new("/dev/nvidiactl").exists() {
        eprintln!("SKIPPED: this machine has a GPU");
        return;
    }
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("bundle");
    let output =
        plumb(["profile", "--model", "qwen3-0.6b", "--out", arg(&out)]).output().expect("plumb starts");
    let (code, stdout, stderr) = ended(&output);
    assert_eq!((code, stdout.as_str()), (4, ""), "{stderr}");
    assert!(stderr.starts_with("error: no usable device: "), "{stderr}");
    assert!(stderr.contains("hint:") && stderr.contains("--device fake"), "{stderr}");
    assert!(!out.exists());
}

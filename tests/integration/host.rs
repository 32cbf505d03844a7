//! The host's score, from measuring it to what it does to a simulation.

use std::{fs, path::Path};

use plumbline_bundles::EngineProfile;
use plumbline_schema::HostInfo;
use serde_json::Value;

use crate::{
    fixture::{engine_profile, fixture},
    support::{arg, ended, plumb, stdout_of, write},
};

/// The arguments of a simulation of the fixture by a profile.
fn simulate_args<'a>(bundle: &'a str, engine: &'a str, files: &'a [String; 2], out: &'a str) -> Vec<&'a str> {
    let [workload, deployment] = files;
    let mut args = vec!["simulate", "--bundle", bundle, "--engine", engine, "--model", "qwen3-0.6b"];
    args.extend(["--workload", workload, "--deployment", deployment, "--out", out, "--residuals", "none"]);
    args
}

fn run_json(run: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(run.join("run.json")).expect("run.json")).expect("JSON")
}

/// A folder with a profile of a host that scores 100, and how to simulate with it.
struct Case {
    folder: tempfile::TempDir,
    bundle: String,
    files: [String; 2],
}

impl Case {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let file = |name| arg(&fixture().file(name)).to_owned();
        let bundle = arg(&fixture().bundle()).to_owned();
        let case = Self { folder, bundle, files: [file("workload.csv"), file("deployment.json")] };
        let mut known = engine_profile();
        known.fitted_on.host = Some(HostInfo::of_score(100.0));
        known.write(&case.path("known.json")).expect("engine profile");
        case
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// Exit code, stdout and stderr of a simulation into `out`.
    fn simulate(&self, engine: &Path, out: &str, more: &[&str]) -> (i32, String, String) {
        let out = self.path(out);
        let mut args = simulate_args(&self.bundle, arg(engine), &self.files, arg(&out));
        args.extend(more);
        ended(&plumb(args).output().expect("plumb starts"))
    }

    fn files_of(&self, out: &str) -> [Vec<u8>; 3] {
        ["request_metrics.csv", "token_metrics.csv", "step_metrics.csv"]
            .map(|file| fs::read(self.path(out).join(file)).expect("a file of the run"))
    }
}

#[test]
fn this_host_is_told_without_a_gpu_and_read_back_as_a_host() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("host.json");
    let printed: Value =
        serde_json::from_str(&stdout_of(["host", "--json", "--out", arg(&path)])).expect("JSON");
    let written: Value = serde_json::from_str(&fs::read_to_string(&path).expect("file")).expect("JSON");
    assert_eq!(printed, written);
    let score = &printed["score"];
    assert_eq!(printed["single_thread_score"], score["median"]);
    assert!(score["min"].as_f64() <= score["median"].as_f64(), "{score}");
    assert!(score["median"].as_f64() <= score["max"].as_f64() && score["n"].as_u64() >= Some(3), "{score}");
    let host = HostInfo::read(&path).expect("a host");
    assert_eq!(Some(host.single_thread_score), score["median"].as_f64());

    let text = stdout_of(["host"]);
    assert!(text.contains("cores") && text.contains("million iterations/s (median of"), "{text}");
}

#[test]
fn a_host_of_another_score_changes_host_times_and_the_run_says_why() {
    let case = Case::new();
    let known = case.path("known.json");
    assert_eq!(case.simulate(&known, "plain", &[]).0, 0);
    assert_eq!(run_json(&case.path("plain")).get("host_factor"), None, "nothing was asked for");

    // The same score is the same host.
    assert_eq!(case.simulate(&known, "same", &["--host", "100"]).0, 0);
    assert_eq!(case.files_of("same"), case.files_of("plain"));

    // Half the score is what the profile says at a host factor of 2.
    let (code, stdout, stderr) = case.simulate(&known, "slow", &["--host", "50"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stdout.contains("host factor 2.000: the host fitted on scores 100.0, the one asked for 50.0"),
        "{stdout}"
    );
    let mut doubled = EngineProfile::read(&known).expect("profile");
    doubled.host_factor = 2.0;
    doubled.write(&case.path("doubled.json")).expect("profile");
    assert_eq!(case.simulate(&case.path("doubled.json"), "doubled", &[]).0, 0);
    assert_eq!(case.files_of("slow"), case.files_of("doubled"));
    assert_ne!(case.files_of("slow"), case.files_of("plain"));
    let recorded = run_json(&case.path("slow"));
    assert_eq!(recorded["host"]["single_thread_score"], 50.0);
    let used = &recorded["host_factor"];
    assert_eq!(
        (used["factor"].as_f64(), used["basis"].as_str(), used["fitted_score"].as_f64()),
        (Some(2.0), Some("scores"), Some(100.0))
    );

    // The bundle's host, which scores 100; a file; another bundle.
    let file = write(&case.path("target.json"), r#"{"cpu_model": "slow", "single_thread_score": 50.0}"#);
    for (host, like) in [("bundle", "plain"), (arg(&file), "slow"), (case.bundle.as_str(), "plain")] {
        let (code, _, stderr) = case.simulate(&known, "other", &["--host", host]);
        assert_eq!(code, 0, "{host}: {stderr}");
        assert_eq!(case.files_of("other"), case.files_of(like), "{host}");
    }
    assert_eq!(run_json(&case.path("other"))["host"]["cpu_model"], "fake");
}

#[test]
fn a_profile_that_does_not_know_its_host_is_left_alone_and_says_so() {
    let case = Case::new();
    let unknown = fixture().file("engine.json");
    assert_eq!(case.simulate(&unknown, "plain", &[]).0, 0);
    let (code, _, stderr) = case.simulate(&unknown, "asked", &["--host", "50"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stderr.contains("note: engine profile `fake-engine` does not say which host it was fitted on"),
        "{stderr}"
    );
    assert_eq!(case.files_of("asked"), case.files_of("plain"));
    let used = &run_json(&case.path("asked"))["host_factor"];
    assert_eq!((used["factor"].as_f64(), used["basis"].as_str()), (Some(1.0), Some("fitted_host_unknown")));
}

#[test]
fn hosts_that_cannot_be_used_are_refused_in_words() {
    let case = Case::new();
    let known = case.path("known.json");
    let without = write(&case.path("without.json"), r#"{"cpu_model": "x"}"#);
    for (host, expected) in [
        ("0", "--host: expected a finite score above 0, found 0"),
        ("nan", "--host: expected a finite score above 0, found NaN"),
        ("no-such-bundle", "no-such-bundle: expected a bundle folder or the name of a shipped bundle"),
        (arg(&without), "missing field `single_thread_score`"),
    ] {
        let (code, _, stderr) = case.simulate(&known, "refused", &["--host", host]);
        assert_eq!(code, 2, "{host}: {stderr}");
        assert!(stderr.contains(expected), "{host}: {stderr}");
    }
    let (code, _, stderr) = case.simulate(&known, "refused", &["--host", "50", "--host-run", "run"]);
    assert!(code == 2 && stderr.contains("cannot be used with"), "{stderr}");
}

#[test]
fn calibrating_records_the_host_that_runs_or_options_name() {
    let case = Case::new();
    assert_eq!(case.simulate(&fixture().file("engine.json"), "real", &[]).0, 0);
    let run = case.path("real");
    let relabelled =
        fs::read_to_string(run.join("run.json")).expect("run.json").replace("\"simulated\"", "\"real\"");
    write(&run.join("run.json"), &relabelled);
    let fit = |more: &[&str]| {
        let (bundle, out) = (case.bundle.as_str(), case.path("fitted.json"));
        let mut args = vec!["calibrate", "--bundle", bundle, "--engine", "fresh", "--out", arg(&out)];
        args.extend(["--real", arg(&run)]);
        args.extend(more);
        let (code, stdout, stderr) = ended(&plumb(args).output().expect("plumb starts"));
        assert_eq!(code, 0, "{stderr}");
        (EngineProfile::read(&out).expect("profile").fitted_on.host, stdout, stderr)
    };
    let (host, _, stderr) = fit(&[]);
    assert_eq!(host, None);
    assert!(stderr.contains("note: the runs do not record their host's score"), "{stderr}");

    let (host, stdout, _) = fit(&["--host-score", "87.5"]);
    assert_eq!(host, Some(HostInfo::of_score(87.5)));
    assert!(stdout.contains("host of the costs: CPU not named, 87.5 million iterations/s"), "{stdout}");
    assert_eq!(fit(&["--host", "bundle"]).0.and_then(|host| host.cpu_model), Some("fake".to_owned()));

    write(
        &run.join("run.json"),
        relabelled.replacen('{', r#"{"host": {"cpu_model": "its own", "single_thread_score": 60.0},"#, 1),
    );
    let (host, _, stderr) = fit(&[]);
    let recorded = HostInfo { cpu_model: Some("its own".into()), single_thread_score: 60.0 };
    assert_eq!(host, Some(recorded));
    assert!(!stderr.contains("note:"), "{stderr}");
}

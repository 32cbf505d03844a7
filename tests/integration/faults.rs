//! Faults injected into real runs: each is refused or named, with its file and place, by whoever reads it first.

use std::path::{Path, PathBuf};

use plumbline_schema::{Nanos, Run, TokenMetrics};
use serde_json::Value;

use crate::{
    check::{case, data},
    support::{arg, ended, plumb, write},
};

fn good() -> PathBuf {
    data().join("runs/h100-vllm-0.24/qwen3-0.6b-graph/conv-q8")
}

/// What the gate says of a case whose second repeat has a fault; the gate must be closed, and no number given.
fn named_by_check(second: &Path) -> String {
    let folder = tempfile::tempdir().expect("folder");
    let suite = case("faulty", &[good().as_path(), second], "tolerance.ttft.p50 = 1000");
    let suite = write(&folder.path().join("suite.toml"), suite);
    let args = ["check", "--json", "-q", "--suite", arg(&suite)];
    let (code, stdout, stderr) = ended(&plumb(args).output().expect("plumb starts"));
    assert_eq!(code, 3, "{stderr}");
    let report: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!((&report["passed"], &report["num_judged"]), (&Value::from(false), &Value::from(0)));
    report["cases"][0]["error"].as_str().expect("an error").to_owned()
}

/// A copy of the good run with something done to it.
fn faulty(folder: &Path, fault: impl FnOnce(&mut Run)) -> PathBuf {
    let mut run = Run::read(&good()).expect("a shipped run");
    run.steps.clear();
    fault(&mut run);
    let target = folder.join("faulty");
    run.write(&target).expect("written");
    target
}

fn check_names(fault: impl FnOnce(&mut Run), says: &[&str]) {
    let folder = tempfile::tempdir().expect("folder");
    let text = named_by_check(&faulty(folder.path(), fault));
    for part in says {
        assert!(text.contains(part), "`{part}` is not in {text}");
    }
}

#[test]
fn the_good_run_twice_is_no_fault() {
    let folder = tempfile::tempdir().expect("folder");
    let copy = faulty(folder.path(), |_| {});
    let suite = case("fine", &[good().as_path(), copy.as_path()], "tolerance.ttft.p50 = 1000");
    let suite = write(&folder.path().join("suite.toml"), suite);
    let output = plumb(["check", "-q", "--suite", arg(&suite)]).output().expect("plumb starts");
    assert_eq!(ended(&output).0, 0, "{}", ended(&output).2);
}

#[test]
fn arrivals_of_another_workload() {
    // The same requests, at another rate.
    let spread = |run: &mut Run| {
        for request in &mut run.requests {
            let later = request.arrival_time_ns.0 / 2;
            request.arrival_time_ns.0 += later;
            for time in [&mut request.first_token_time_ns, &mut request.completion_time_ns] {
                time.as_mut().expect("all ended").0 += later;
            }
            for token in run.tokens.iter_mut().filter(|token| token.request_id == request.request_id) {
                token.token_time_ns.0 += later;
            }
        }
    };
    check_names(spread, &["real run 2, request ", "expected arrival_time_ns ", "requests differ)"]);
    // Other requests.
    let text = named_by_check(&data().join("runs/h100-vllm-0.24/qwen3-0.6b-graph/conv-q4"));
    assert!(text.starts_with("real run 2"), "{text}");
}

#[test]
fn one_percent_of_the_requests_missing() {
    let lose = |run: &mut Run| {
        run.requests.retain(|request| request.request_id != 17);
        run.tokens.retain(|token| token.request_id != 17);
    };
    check_names(lose, &["real run 2 is not of the same requests as real run 1: it lacks 17"]);
    // Lost from one of its files alone.
    let lose = |run: &mut Run| run.requests.retain(|request| request.request_id != 17);
    check_names(
        lose,
        &["token_metrics.csv, line ", "`request_id`: expected a request of request_metrics, found 17"],
    );
}

#[test]
fn a_request_id_twice() {
    let repeat = |run: &mut Run| run.requests.push(run.requests[3].clone());
    check_names(
        repeat,
        &["request_metrics.csv, line 102, column `request_id`: expected an id of its own, found"],
    );
}

#[test]
fn token_times_that_run_backwards() {
    let swap = |run: &mut Run| {
        let times: Vec<_> = run.tokens[5..7].iter().map(|token: &TokenMetrics| token.token_time_ns).collect();
        (run.tokens[5].token_time_ns, run.tokens[6].token_time_ns) = (times[1], times[0]);
    };
    check_names(swap, &["token_metrics.csv, line 8, column `token_time_ns`: expected no time before"]);
    let early = |run: &mut Run| {
        let request = &mut run.requests[9];
        request.completion_time_ns = Some(request.arrival_time_ns);
    };
    check_names(
        early,
        &["request_metrics.csv, line 11, column `completion_time_ns`: expected no time before the first"],
    );
}

#[test]
fn a_shifted_clock() {
    const SHIFT_NS: u64 = 2_500_000_000;
    let shift_tokens = |run: &mut Run| run.tokens.iter_mut().for_each(|t| t.token_time_ns.0 += SHIFT_NS);
    // The tokens' file alone.
    check_names(shift_tokens, &["token_metrics.csv, line 2, column `token_time_ns`: ", "another clock"]);
    let shift_outputs = |run: &mut Run| {
        shift_tokens(run);
        for request in &mut run.requests {
            for time in [&mut request.first_token_time_ns, &mut request.completion_time_ns] {
                time.as_mut().expect("all ended").0 += SHIFT_NS;
            }
        }
    };
    // The whole run.
    let shift_all = |run: &mut Run| {
        shift_outputs(run);
        run.requests.iter_mut().for_each(|request| request.arrival_time_ns.0 += SHIFT_NS);
    };
    check_names(
        shift_all,
        &["real run 2: every arrival_time_ns is 2500 ms later than in real run 1", "shifted"],
    );
    // Arrivals against tokens: outputs before their requests.
    let late_arrivals = |run: &mut Run| {
        run.requests.iter_mut().for_each(|request| request.arrival_time_ns += Nanos(SHIFT_NS));
    };
    let says =
        ["request_metrics.csv, line 2, column `first_token_time_ns`: expected no time before the arrival"];
    check_names(late_arrivals, &says);
}

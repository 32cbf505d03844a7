//! Bad input, by the command: one `error:` line that says where, what was expected and what was found; exit 2.

use std::path::Path;

use crate::support::{WORKLOAD, arg, ended, plumb, write};

/// Runs a command that must fail with exit code 2 and one `error:` line holding every part of `says`.
fn refuse(args: &[&str], says: &[&str]) -> String {
    let (code, stdout, stderr) = ended(&plumb(args).output().expect("plumb starts"));
    assert_eq!(code, 2, "{args:?}: {stderr}");
    assert_eq!(stdout, "", "{args:?}");
    let errors = stderr.lines().filter(|line| line.starts_with("error:")).count();
    assert_eq!(errors, 1, "{args:?}: {stderr}");
    let others = stderr.lines().filter(|line| !line.starts_with("error:") && !line.starts_with("hint:"));
    assert_eq!(others.count(), 0, "{args:?}: {stderr}");
    for part in says {
        assert!(stderr.contains(part), "{args:?}: `{part}` is not in {stderr}");
    }
    stderr
}

#[test]
fn workloads_name_line_and_column() {
    let folder = tempfile::tempdir().expect("folder");
    let cases: [(&str, &[u8], &[&str]); 9] = [
        ("empty.csv", b"", &["expected at least one request, found none"]),
        (
            "header.csv",
            b"request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens\n",
            &["expected at least one request, found none"],
        ),
        ("columns.csv", b"a,b\n1,2\n", &["line 1: expected a column `request_id`, found `a,b`"]),
        (
            "text.csv",
            &replaced("2000000,700", "soon,700"),
            &["line 3, column `arrival_time_ns`", "found `soon`"],
        ),
        (
            "negative.csv",
            &replaced("2000000,700", "-5,700"),
            &["line 3, column `arrival_time_ns`", "found `-5`"],
        ),
        ("zero.csv", &replaced("0,100,8", "0,0,8"), &["line 2, column `num_prefill_tokens`", "at least 1"]),
        (
            "twice.csv",
            &replaced("3,50000000", "1,50000000"),
            &["line 5, column `request_id`", "found 1 again"],
        ),
        ("order.csv", &replaced("3,50000000", "3,5"), &["line 5, column `arrival_time_ns`", "found 5"]),
        ("binary.csv", b"\xff\xfe\x00\x01\n\xff,\xff\n", &["binary.csv", "expected"]),
    ];
    for (name, bytes, says) in cases {
        let path = write(&folder.path().join(name), bytes);
        let stderr = refuse(&["workload", "inspect", arg(&path)], says);
        assert!(stderr.contains(name), "{stderr}");
    }
    let missing = folder.path().join("missing.csv");
    refuse(&["workload", "inspect", arg(&missing)], &["missing.csv: No such file"]);
    let truncated = write(&folder.path().join("w.csv.zst"), zstd_prefix());
    refuse(&["workload", "inspect", arg(&truncated)], &["w.csv.zst"]);
    refuse(&["workload", "inspect", arg(folder.path())], &["Is a directory"]);
}

/// The good workload with one piece replaced.
fn replaced(from: &str, to: &str) -> Vec<u8> {
    assert!(WORKLOAD.contains(from));
    WORKLOAD.replacen(from, to, 1).into_bytes()
}

/// The beginning of a zstd frame.
fn zstd_prefix() -> Vec<u8> {
    vec![0x28, 0xb5, 0x2f, 0xfd, 0x04, 0x00, 0x41]
}

#[test]
fn runs_name_file_and_line() {
    let folder = tempfile::tempdir().expect("folder");
    let run = folder.path().join("run");
    let replay = |says: &[&str]| refuse(&["compare", arg(&run), "--replay-steps"], says);
    replay(&["request_metrics.csv: No such file"]);
    let header = "request_id,arrival_time_ns,first_token_time_ns,ttft_ns,completion_time_ns,num_prefill_tokens,\
        num_decode_tokens,num_decode_tokens_actual,status,backend\n";
    write(&run.join("request_metrics.csv"), format!("{header}0,0,10,10,20,5,2,2,fine,e\n"));
    replay(&["request_metrics.csv, line 2: expected", "fine"]);
    write(&run.join("request_metrics.csv"), format!("{header}0,30,10,10,20,5,2,2,ok,e\n"));
    replay(&["line 2, column `first_token_time_ns`: expected no time before the arrival, found 10"]);
    write(&run.join("request_metrics.csv"), format!("{header}0,0,10,10,20,5,2,2,ok,e\n"));
    replay(&["records no deployment"]);
    write(&run.join("engine.json"), "{\"mode\": \"graph\",\n\"model\": 7}");
    replay(&["engine.json, line 2: expected an engine.json, found invalid type: integer `7`"]);
    write(&run.join("engine.json"), crate::support::DEPLOYMENT);
    replay(&["records no steps"]);
    write(&run.join("step_metrics.csv"), "step_start_ns,step_duration_ns\n1,2\n");
    replay(&[
        "step_metrics.csv, line 1: expected a column `schedule_ns`, found `step_start_ns,step_duration_ns`",
    ]);
}

#[test]
fn wrong_command_lines_exit_with_2() {
    for args in [
        &["simulat"][..],
        &["workload"],
        &["workload", "inspect"],
        &["compare", "--replay-steps"],
        &["--jsn"],
    ] {
        let (code, _, stderr) = ended(&plumb(args).output().expect("plumb starts"));
        assert_eq!(code, 2, "{args:?}: {stderr}");
        assert!(!stderr.is_empty());
    }
}

#[test]
fn a_closed_pipe_is_not_an_error() {
    use std::process::{Command, Stdio};
    let folder = tempfile::tempdir().expect("folder");
    let path = write(&folder.path().join("w.csv"), WORKLOAD);
    let mut child = Command::new(env!("CARGO_BIN_EXE_plumb"))
        .args(["workload", "inspect", arg(&path)])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("plumb starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("plumb ends");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn json_is_one_document_on_stdout() {
    let folder = tempfile::tempdir().expect("folder");
    let path = write(&folder.path().join("w.csv"), WORKLOAD);
    let text = crate::support::stdout_of(["workload", "inspect", arg(&path), "--json"]);
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(value["summary"]["num_requests"], 4);
    assert_eq!(value["summary"]["num_decode_tokens"]["total"], 24);
    assert!(Path::new(value["workload"].as_str().expect("a path")).is_absolute());
}

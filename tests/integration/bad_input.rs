//! Bad input, by the command: one `error:` line that says where, what was expected and what was found; exit 2.

use std::{
    fs,
    path::{Path, PathBuf},
};

use plumbline_bundles::Bundle;

use crate::{
    fixture::fixture,
    support::{DEPLOYMENT, WORKLOAD, arg, ended, plumb, write},
};

/// Runs a command that must fail with exit code 2 and one `error:` line holding every part of `says`.
fn refuse(args: &[&str], says: &[&str]) -> String {
    let (code, stdout, stderr) = ended(&plumb(args).output().expect("plumb starts"));
    assert_eq!(code, 2, "{args:?}: {stderr}");
    assert_eq!(stdout, "", "{args:?}");
    let errors = stderr.lines().filter(|line| line.starts_with("error:")).count();
    assert_eq!(errors, 1, "{args:?}: {stderr}");
    let is_known = |line: &&str| ["error:", "hint:", "note:"].iter().any(|kind| line.starts_with(kind));
    assert!(stderr.lines().all(|line| is_known(&line)), "{args:?}: {stderr}");
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

/// Paths of a simulation; a test replaces the one that it spoils.
struct Inputs {
    bundle: PathBuf,
    engine: PathBuf,
    model: PathBuf,
    workload: PathBuf,
    deployment: PathBuf,
}

impl Inputs {
    fn good(folder: &Path) -> Self {
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema/models/qwen3-0.6b.json");
        let model = write(&folder.join("qwen3/config.json"), fs::read(config).expect("shipped config"));
        let file = |name| fixture().file(name);
        Self {
            bundle: fixture().bundle(),
            engine: file("engine.json"),
            model,
            workload: file("workload.csv"),
            deployment: file("deployment.json"),
        }
    }

    /// Simulates, which must be refused and leave nothing behind.
    fn refuse(&self, out: &Path, says: &[&str]) {
        let args = [
            "simulate",
            "--bundle",
            arg(&self.bundle),
            "--engine",
            arg(&self.engine),
            "--model",
            arg(&self.model),
            "--workload",
            arg(&self.workload),
            "--deployment",
            arg(&self.deployment),
            "--out",
            arg(out),
        ];
        refuse(&args, says);
        assert!(!out.exists(), "{} was written", out.display());
    }
}

#[test]
fn configs_deployments_engines_and_workloads_leave_no_run_behind() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("out");
    let spoil = |name: &str, text: &str| write(&folder.path().join("bad").join(name), text);
    let good = || Inputs::good(folder.path());
    let engine = fs::read_to_string(fixture().file("engine.json")).expect("engine");

    for (text, says) in [
        ("", "config.json, line 1: expected a Hugging Face config.json, found EOF"),
        ("{\"model_type\": \"qwen3\",\n\"hidden_size\": 10", "config.json, line 2: expected"),
        ("[1, 2]", "config.json"),
        (
            "{\"model_type\": \"mixtral\"}",
            "key `model_type`: expected `llama` or `qwen3` (dense), found `mixtral`",
        ),
        (
            "{\"model_type\": \"llama\", \"hidden_size\": 99999999999}",
            "key `hidden_size`: expected 1 to 4194304",
        ),
        ("{\"model_type\": \"llama\", \"hidden_size\": -1}", "found invalid value: integer `-1`"),
    ] {
        Inputs { model: spoil("config.json", text), ..good() }.refuse(&out, &["config.json", says]);
    }
    for (from, to, says) in [
        ("\"block_size\": 16", "\"block_size\": 0", "key `block_size`: expected at least 1, found 0"),
        ("\"graph\"", "\"graphs\"", "expected an engine.json, found unknown variant `graphs`"),
        ("[1, 2, 4", "[9, 2, 4", "key `cudagraph_sizes`: expected ascending sizes from 1, found [9, 2"),
        (
            "\"max_num_seqs\": 16",
            "\"scheduling_policy\": \"lottery\", \"max_num_seqs\": 16",
            "`scheduling_policy = lottery`",
        ),
        (
            "\"max_num_seqs\": 16",
            "\"tensor_parallel_size\": 2, \"max_num_seqs\": 16",
            "tensor_parallel_size = 2",
        ),
        ("}", "", "found EOF"),
    ] {
        assert!(DEPLOYMENT.contains(from));
        let deployment = spoil("deployment.json", &DEPLOYMENT.replacen(from, to, 1));
        Inputs { deployment, ..good() }.refuse(&out, &[says]);
    }
    for (from, to, says) in [
        ("vllm-v1", "vllm-v9", "), found `vllm-v9`"),
        (
            "\"host_factor\": 1.0",
            "\"host_factor\": 0.0",
            "key `host_factor`: expected a finite number above 0, found 0",
        ),
        (
            "\"launch_ns\": 5000.0",
            "\"launch_ns\": -1.0",
            "launch_ns`: expected a finite number from 0, found -1",
        ),
        ("\"launch_ns\": 5000.0", "\"launch_ns\": 1e999", "expected an engine profile"),
        ("\"client\"", "\"clients\"", "found unknown field `clients`"),
    ] {
        assert!(engine.contains(from), "{from}");
        let engine = spoil("engine.json", &engine.replacen(from, to, 1));
        Inputs { engine, ..good() }.refuse(&out, &[says]);
    }
    let workload = spoil("workload.csv", &WORKLOAD.replacen("700", "7e9", 1));
    Inputs { workload, ..good() }
        .refuse(&out, &["workload.csv, line 3, column `num_prefill_tokens`", "found `7e9`"]);
}

#[test]
fn bundles_name_the_file_and_what_is_wrong_with_it() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("out");
    let bundle = folder.path().join("bundle");
    let inputs = Inputs { bundle: bundle.clone(), ..Inputs::good(folder.path()) };
    let check = |spoil: &dyn Fn(&Path), says: &[&str]| {
        let _ = fs::remove_dir_all(&bundle);
        fixture().copy_bundle(&bundle);
        spoil(&bundle);
        inputs.refuse(&out, says);
        let (code, _, stderr) =
            ended(&plumb(["bundle", "verify", arg(&bundle)]).output().expect("plumb starts"));
        assert_eq!(code, 2, "{stderr}");
        assert_eq!(stderr.lines().filter(|line| line.starts_with("error:")).count(), 1, "{stderr}");
    };
    let edit = |bundle: &Path, name: &str, from: &str, to: &str| {
        let path = bundle.join(name);
        let text = fs::read_to_string(&path).expect("a file of the bundle");
        assert!(text.contains(from), "{from} is not in {name}");
        write(&path, text.replacen(from, to, 1));
    };
    let manifest = |from: &'static str, to: &'static str| move |b: &Path| edit(b, "manifest.json", from, to);

    check(&|b| drop(fs::remove_file(b.join("manifest.json"))), &["no manifest.json", "plumb profile"]);
    check(
        &|b| drop(write(&b.join("manifest.json"), "{\"format_version\":")),
        &["manifest.json, line 1", "EOF"],
    );
    check(
        &manifest("\"major\": 1", "\"major\": 2"),
        &["expected bundle format 1.2, found 2.2: upgrade plumb"],
    );
    check(
        &manifest("\"minor\": 2", "\"minor\": 7"),
        &["expected bundle format 1.2, found 1.7: upgrade plumb"],
    );
    check(&manifest("\"models\"", "\"modules\""), &["manifest.json, line", "unknown field `modules`"]);
    check(&manifest("predictors/attention.json", "../../attention.json"), &["key `files`", "without `..`"]);
    check(
        &|b| drop(fs::remove_file(b.join("predictors/attention.json"))),
        &["no predictors/attention.json", "plumb train"],
    );
    check(
        &|b| edit(b, "predictors/attention.json", "attention", "attentive"),
        &["predictors/attention.json: expected", "as manifest.json says", "plumb train"],
    );
    check(
        &|b| {
            let mut opened = Bundle::open(b).expect("still good");
            let forged = ("predictors/rope.json".to_owned(), b"{\"operator\": \"rope\"}".to_vec());
            opened.update(vec![forged]).expect("written");
        },
        &["predictors/rope.json, line 1: expected", "missing field"],
    );
}

#[test]
fn samples_are_checked_before_training() {
    let folder = tempfile::tempdir().expect("folder");
    let bundle = folder.path().join("bundle");
    fixture().copy_bundle(&bundle);
    let mut opened = Bundle::open(&bundle).expect("good");
    let name = "samples/rope.csv";
    let text = String::from_utf8(opened.read_file(name).expect("samples")).expect("UTF-8");
    let mut rows = text.lines();
    let (header, first) = (rows.next().expect("header"), rows.next().expect("a row"));
    let mut cells: Vec<_> = first.split(',').collect();
    let p50 = header.split(',').position(|column| column == "p50_ns").expect("a column");
    cells[p50] = "fast";
    let forged = format!("{header}\n{}\n", cells.join(","));
    opened.update(vec![(name.to_owned(), forged.into_bytes())]).expect("written");
    refuse(&["train", arg(&bundle)], &["samples/rope.csv, line 2, column `p50_ns`", "found `fast`"]);
}

#[test]
fn suites_leave_no_report_behind() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("report");
    let path = folder.path().join("suite.toml");
    let good = "[[case]]\nname = \"one\"\nreal = [\"run\"]\nbundle = \"./none\"\nmodel = \"qwen3-0.6b\"\nengine = \"e\"\n";
    for (text, says) in [
        (String::new(), "suite.toml, line 1: expected a suite of [[case]] tables"),
        (good.replace("name =", "name"), "suite.toml, line 2: expected a suite"),
        (good.replace("\"one\"", "1"), "suite.toml, line 2: expected a suite"),
        (
            format!("{good}colour = 1\n"),
            "suite.toml, line 7: expected a suite of [[case]] tables, found unknown field `colour`",
        ),
        (
            good.replace("[\"run\"]", "[]"),
            "key `case \"one\".real`: expected at least one run folder, found none",
        ),
        // A suite may be fine and its only case not.
        (good.to_owned(), "case `one`: "),
    ] {
        write(&path, text);
        refuse(&["validate", "--suite", arg(&path), "--out", arg(&out)], &[says]);
        assert!(!out.exists());
    }
    write(&path, good);
    let none = ["validate", "--suite", arg(&path), "--case", "two", "--out", arg(&out)];
    refuse(&none, &["--case: expected part of a case's name", "hint: ", "has one"]);
    let missing = folder.path().join("missing.toml");
    refuse(&["validate", "--suite", arg(&missing)], &["missing.toml: No such file"]);
}

#[test]
fn profile_refuses_a_place_that_is_taken_and_a_model_it_does_not_know() {
    let folder = tempfile::tempdir().expect("folder");
    let taken = write(&folder.path().join("taken/file"), "mine");
    let place = taken.parent().expect("a folder");
    let fake = ["profile", "--device", "fake", "--out"];
    let with = |out: &Path, model: &str, says: &[&str]| {
        let args: Vec<&str> = fake.iter().copied().chain([arg(out), "--model", model]).collect();
        refuse(&args, says);
    };
    with(place, "qwen3-0.6b", &["expected a path where nothing exists yet, found a file or folder"]);
    assert_eq!(fs::read_to_string(&taken).expect("kept"), "mine");
    let out = folder.path().join("out");
    with(&out, "qwen9", &["expected a shipped model (qwen3-0.6b, llama3-8b) or a Hugging Face config.json"]);
    assert!(!out.exists());
    assert_eq!(fs::read_dir(folder.path()).expect("folder").count(), 1, "nothing else was left");
}

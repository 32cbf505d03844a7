//! Making and converting workloads, by the command.

use std::{fs, path::Path};

use crate::support::{arg, ended, plumb, stdout_of, write};

const VIDUR: &str =
    "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n4.314579,4090,109\n4.541877,879,55\n";

/// Runs a command that must fail with exit code 2, say every part of `says`, and write nothing.
fn refuse(args: &[&str], out: &Path, says: &[&str]) {
    let with_out: Vec<&str> = args.iter().copied().chain(["--out", arg(out)]).collect();
    let (code, stdout, stderr) = ended(&plumb(&with_out).output().expect("plumb starts"));
    assert_eq!((code, stdout.as_str()), (2, ""), "{args:?}: {stderr}");
    for part in says {
        assert!(stderr.contains(part), "{args:?}: `{part}` is not in {stderr}");
    }
    assert!(!out.exists());
}

#[test]
fn generated_workloads_can_be_inspected_and_made_again() {
    let folder = tempfile::tempdir().expect("folder");
    let make = |name: &str, seed: &str| {
        let out = folder.path().join(name);
        let json = stdout_of([
            "workload",
            "generate",
            "--requests",
            "2000",
            "--poisson",
            "4",
            "--prefill",
            "uniform:16:64",
            "--decode",
            "zipf:2:50:1.1",
            "--seed",
            seed,
            "--out",
            arg(&out),
            "--json",
        ]);
        let report: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        (fs::read_to_string(out).expect("written"), report)
    };
    let (text, report) = make("a.csv", "1");
    assert_eq!(text, make("b.csv", "1").0);
    assert_ne!(text, make("c.csv", "2").0);
    assert_eq!(report["seed"], 1);
    assert_eq!(report["too_long"]["num_dropped"], 0);
    let inspected = stdout_of(["workload", "inspect", arg(&folder.path().join("a.csv")), "--json"]);
    let inspected: serde_json::Value = serde_json::from_str(&inspected).expect("JSON");
    assert_eq!(inspected["summary"], report["summary"]);
    assert_eq!(inspected["summary"]["num_requests"], 2000);
    assert_eq!(inspected["summary"]["num_prefill_tokens"]["max"], 64);
}

#[test]
fn every_kind_of_arrival_and_length_has_its_options() {
    let folder = tempfile::tempdir().expect("folder");
    let trace = write(&folder.path().join("trace.csv"), VIDUR);
    let trace = format!("vidur:{}", arg(&trace));
    let out = folder.path().join("w.csv");
    let lines = |args: &[&str]| {
        let all = ["workload", "generate", "--out", arg(&out)].into_iter().chain(args.iter().copied());
        stdout_of(all.collect::<Vec<_>>());
        let text = fs::read_to_string(&out).expect("written");
        text.lines().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(
        lines(&["--requests", "3", "--static", "--prefill", "7", "--decode", "fixed:2"]),
        ["0,0,7,2", "1,0,7,2", "2,0,7,2"]
    );
    assert_eq!(
        lines(&["--requests", "2", "--interval-s", "0.25", "--lengths", &trace]),
        ["0,0,374,44", "1,250000000,4090,109"]
    );
    assert_eq!(
        lines(&[
            "--requests",
            "3",
            "--arrivals",
            &trace,
            "--rate-factor",
            "2",
            "--prefill",
            "5",
            "--decode",
            "6"
        ]),
        ["0,0,5,6", "1,2157289500,5,6", "2,2270938500,5,6"]
    );
    assert_eq!(
        lines(&[
            "--requests",
            "2",
            "--static",
            "--lengths",
            &trace,
            "--max-total-tokens",
            "4096",
            "--too-long",
            "resample"
        ]),
        ["0,0,374,44", "1,0,879,55"]
    );
    let drawn = lines(&[
        "--requests",
        "50",
        "--gamma",
        "10:2",
        "--prefill",
        "lognormal:100:0.5:400",
        "--decode",
        "uniform:1:9",
    ]);
    assert_eq!(drawn.len(), 50);
    let spec = write(
        &folder.path().join("spec.toml"),
        "num_requests = 9\n[arrival]\nprocess = \"fixed\"\ninterval_s = 1\n[lengths]\nfrom = \"trace\"\n\
         path = \"trace.csv\"\nformat = \"vidur\"\norder = \"sampled\"\n",
    );
    assert_eq!(lines(&["--spec", arg(&spec)]).len(), 9);
    assert_eq!(lines(&["--spec", arg(&spec), "--requests", "4"]).len(), 4);
}

#[test]
fn traces_become_workloads() {
    let folder = tempfile::tempdir().expect("folder");
    let trace = write(&folder.path().join("trace.csv"), VIDUR);
    let out = folder.path().join("w.csv");
    let args = ["workload", "import", "vidur", arg(&trace), "--max-total-tokens", "4096"];
    refuse(
        &args,
        &out,
        &["trace.csv, line 3: expected prompt and output of at most 4096", "hint: --too-long drop"],
    );
    let more =
        ["--too-long", "drop", "--limit", "2", "--rate", "4", "--seed", "3", "--out", arg(&out), "--json"];
    let json = stdout_of(args.into_iter().chain(more));
    let report: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(report["counts"]["num_dropped"], 1);
    assert_eq!(report["counts"]["num_rows"], 3);
    assert_eq!(report["summary"]["num_requests"], 2);
    let imported = fs::read_to_string(&out).expect("written");
    assert!(imported.starts_with("request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens\n0,"));

    let hashed = "{\"timestamp\": 5, \"input_length\": 700, \"output_length\": 2, \"hash_ids\": [3, 4]}\n";
    let hashed = write(&folder.path().join("m.jsonl"), hashed);
    stdout_of(["workload", "import", "mooncake", arg(&hashed), "--out", arg(&out)]);
    let expected = "request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens,prefix_hashes,prefix_hash_tokens\n\
        0,0,700,2,3;4,512\n";
    assert_eq!(fs::read_to_string(&out).expect("written"), expected);
    stdout_of(["workload", "inspect", arg(&out)]);

    let burst = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n\
        5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,Conversation log\n";
    let burst = write(&folder.path().join("b.csv"), burst);
    let text = stdout_of(["workload", "import", "burstgpt", arg(&burst), "--out", arg(&out)]);
    assert!(
        text.starts_with("2 rows of ") && text.contains("\n1 without an output, left out\n1 requests"),
        "{text}"
    );
}

#[test]
fn what_cannot_be_made_is_refused_and_leaves_no_file() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("w.csv");
    let file = |name: &str, text: &str| write(&folder.path().join(name), text);
    let lengths = file("lengths.csv", "num_prefill_tokens,num_decode_tokens\n5,6\n");
    let import = |format, path| ["workload", "import", format, path];
    refuse(&import("vidur", arg(&lengths)), &out, &["line 2: expected an arrival time", "hint: --rate R"]);
    refuse(&import("azure", arg(&lengths)), &out, &["line 1: expected a column `TIMESTAMP`"]);
    refuse(&import("vidur", "missing.csv"), &out, &["missing.csv: No such file"]);
    refuse(&import("vidurs", arg(&lengths)), &out, &["invalid value 'vidurs'"]);
    let bad = file("bad.csv", "arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,six\n");
    refuse(&import("vidur", arg(&bad)), &out, &["line 2, column `num_decode_tokens`", "found `six`"]);

    let generate = |args: &[&str], says: &[&str]| {
        let all: Vec<&str> = ["workload", "generate"].iter().chain(args).copied().collect();
        refuse(&all, &out, says);
    };
    let shape = ["--prefill", "5", "--decode", "6"];
    let with = |args: &[&'static str]| args.iter().chain(&shape).copied().collect::<Vec<_>>();
    generate(&with(&["--requests", "5"]), &["required"]);
    generate(&with(&["--requests", "5", "--static", "--poisson", "3"]), &["cannot be used with"]);
    generate(&with(&["--requests", "5", "--poisson", "-3"]), &["-3"]);
    generate(&with(&["--requests", "5", "--poisson", "0"]), &["key `arrival.rate_per_s`", "found 0"]);
    generate(&with(&["--requests", "0", "--static"]), &["key `num_requests`: expected at least 1"]);
    generate(
        &["--requests", "5", "--static", "--prefill", "few", "--decode", "6"],
        &["expected N, uniform:MIN:MAX"],
    );
    generate(
        &["--requests", "5", "--static", "--prefill", "1.5", "--decode", "6"],
        &["expected whole numbers"],
    );
    generate(&["--requests", "5", "--static", "--lengths", "x.csv"], &["expected FORMAT:PATH"]);
    generate(&["--requests", "5", "--static", "--lengths", "x:y.csv"], &["expected one of plumbline, azure"]);
    let few = format!("vidur:{}", arg(&lengths));
    generate(
        &["--requests", "5", "--static", "--lengths", &few],
        &["expected at most 1, after which the trace ends"],
    );
    let spec = file("spec.toml", "num_requests = 5\n[arrival]\nprocess = \"poison\"\n");
    generate(&["--spec", arg(&spec)], &["spec.toml, line 3: expected a workload specification", "`poison`"]);
    let closed = "num_requests = 5\n[arrival]\nprocess = \"closed_loop\"\nusers = 2\n[lengths]\n\
        from = \"distributions\"\nprefill = { distribution = \"fixed\", value = 1 }\n\
        decode = { distribution = \"fixed\", value = 1 }\n";
    let spec = file("closed.toml", closed);
    generate(
        &["--spec", arg(&spec)],
        &["expected arrivals that are known beforehand", "hint: only a simulation"],
    );
}

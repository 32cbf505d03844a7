//! Searching the highest rate and the best deployment, by the command.

use std::{fs, path::Path};

use serde_json::Value;

use crate::support::{arg, ended, plumb, stdout_of, write};

const SPEC: &str = "num_requests = 150\n[arrival]\nprocess = \"poisson\"\nrate_per_s = 20\n\
    [lengths]\nfrom = \"distributions\"\nprefill = { distribution = \"uniform\", min = 20, max = 300 }\n\
    decode = { distribution = \"uniform\", min = 2, max = 30 }\n";

const GRID: &str = "scheduler = [\"vllm-v1\", \"orca\"]\nmax_num_seqs = [8, 64]\ntensor_parallel_size = [1, 2]\n\
    [[gpu]]\nbundle = \"h100-sxm5-80gb\"\nengine = \"vllm-0.24-graph\"\nprice_per_hour = 2.5\n\
    [[gpu]]\nbundle = \"h100-sxm5-80gb\"\nengine = \"vllm-0.24-graph\"\ngpu = \"h200-sxm-141gb\"\nprice_per_hour = 3.5\n";

const ENGINE: [&str; 6] =
    ["--bundle", "h100-sxm5-80gb", "--engine", "vllm-0.24-graph", "--model", "qwen3-0.6b"];

fn search<'a>(more: &[&'a str]) -> Vec<&'a str> {
    ["search"].into_iter().chain(ENGINE).chain(more.iter().copied()).collect()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

#[test]
fn the_highest_rate_is_what_a_simulation_at_it_says() {
    let folder = tempfile::tempdir().expect("folder");
    let spec = write(&folder.path().join("spec.toml"), SPEC);
    let limits = ["--ttft-p99-ms", "60", "--tpot-p99-ms", "12", "--json"];
    let args = search(&[&["--spec", arg(&spec)][..], &limits].concat());
    let text = stdout_of(&args);
    assert_eq!(text, stdout_of(&args), "the same bytes each time");
    let found = json(&text);
    assert_eq!(found["status"], "bracketed");
    let (low, high) = (
        found["rate_per_s"].as_f64().expect("a rate"),
        found["failing_rate_per_s"].as_f64().expect("a rate"),
    );
    assert!(low < high && high <= 1.02 * low, "{low} {high}");
    for (rate, meets) in [(low, true), (high, false)] {
        let probes = found["probes"].as_array().expect("probes");
        let probe = probes.iter().find(|probe| probe["rate_per_s"].as_f64() == Some(rate)).expect("tried");
        assert_eq!(probe["meets"], meets);
        let at = write(&folder.path().join("at.toml"), SPEC.replace("= 20\n[", &format!("= {rate:?}\n[")));
        let out = folder.path().join("run");
        let simulated = stdout_of(["simulate"].into_iter().chain(ENGINE).chain([
            "--spec",
            arg(&at),
            "--out",
            arg(&out),
            "--json",
        ]));
        let requests = fs::read_to_string(out.join("request_metrics.csv")).expect("written");
        assert_eq!(requests.lines().count(), 151, "{simulated}");
        let mut ttfts: Vec<f64> = column(&requests, "ttft_ns");
        ttfts.sort_by(f64::total_cmp);
        // Linear interpolation at (n - 1) x 0.99 of 150.
        let p99 = (ttfts[147] + 0.51 * (ttfts[148] - ttfts[147])) / 1e6;
        let told = probe["latencies"]["ttft"]["p99_ms"].as_f64().expect("a p99");
        assert!((told / p99 - 1.0).abs() < 1e-9, "{told} {p99}");
    }
}

fn column(csv: &str, name: &str) -> Vec<f64> {
    let place = csv.lines().next().expect("a header").split(',').position(|column| column == name);
    let place = place.expect("the column");
    csv.lines()
        .skip(1)
        .map(|line| line.split(',').nth(place).expect("a cell").parse().expect("a number"))
        .collect()
}

#[test]
fn what_is_not_bracketed_ends_with_5_and_what_was_tried() {
    let folder = tempfile::tempdir().expect("folder");
    let spec = write(&folder.path().join("spec.toml"), SPEC);
    let fails = |more: &[&str], says: &[&str]| {
        let args = search(&[&["--spec", arg(&spec)][..], more].concat());
        let (code, stdout, stderr) = ended(&plumb(&args).output().expect("plumb starts"));
        assert_eq!(code, 5, "{stderr}");
        for part in says {
            assert!(stdout.contains(part), "`{part}` is not in {stdout}");
        }
        stderr
    };
    let text = "not bracketed: not even the lowest rate tried meets the limits";
    fails(&["--ttft-p99-ms", "0.5"], &[text, "20.000000  no"]);
    let highest = ["--ttft-p99-ms", "9000", "--max-rate", "30"];
    let text = "not bracketed: even the highest rate tried meets the limits: 30.000000 requests/s (2 tried)";
    let notes = fails(&highest, &[text, "20.000000  yes"]);
    assert!(notes.contains("30.0000 requests/s: meets the limits"), "{notes}");
    let found = fails(
        &["--set", "max_model_len=100", "--e2e-p99-ms", "900"],
        &["requests are rejected", "(1 tried)"],
    );
    assert!(!found.is_empty());
}

#[test]
fn what_cannot_be_searched_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let file = |name: &str, text: &str| write(&folder.path().join(name), text);
    let spec = file("spec.toml", SPEC);
    let at_once = file("static.toml", &SPEC.replace("poisson\"\nrate_per_s = 20", "static\""));
    let refuse = |args: &[&str], says: &str| {
        let (code, stdout, stderr) = ended(&plumb(args).output().expect("plumb starts"));
        assert_eq!((code, stdout.as_str()), (2, ""), "{args:?}: {stderr}");
        assert!(stderr.contains(says), "{args:?}: `{says}` is not in {stderr}");
    };
    refuse(&search(&["--spec", arg(&spec)]), "expected at least one limit");
    let limit = ["--ttft-p99-ms", "50"];
    let with = |more: &[&'static str]| search(&[&["--spec", arg(&spec)][..], more].concat()).join("\n");
    for (more, says) in [
        (&["--ttft-p99-ms", "nan"][..], "--ttft-p99-ms: expected milliseconds above 0"),
        (&["--limit", "ttft_p98_ms=5"], "expected a limit like"),
        (&["--ttft-p99-ms", "5", "--tolerance", "0"], "tolerance: expected 0.0001 to 1, found 0"),
        (&["--ttft-p99-ms", "5", "--min-rate", "9", "--max-rate", "3"], "highest rate: expected"),
        (&["--ttft-p99-ms", "5", "--router", "best"], "expected a router"),
    ] {
        refuse(&with(more).split('\n').collect::<Vec<_>>(), says);
    }
    refuse(&search(&[&["--spec", arg(&at_once)][..], &limit].concat()), "all arrive at one time");
    let grid = file("grid.toml", GRID);
    let out = folder.path().join("out");
    let shared = ["--spec", arg(&spec), "--ttft-p99-ms", "50", "--out", arg(&out)];
    refuse(&search(&[&["--grid", arg(&grid)][..], &shared].concat()), "cannot be used with");
    let bad = file("bad.toml", &GRID.replace("orca", "orcas"));
    let model = ["search", "--model", "qwen3-0.6b", "--grid", arg(&bad)];
    refuse(&[&model[..], &shared].concat(), "key `scheduler`");
    refuse(&[&["search", "--model", "qwen3-0.6b"][..], &shared].concat(), "required");
    assert!(!out.exists());
}

#[test]
fn a_grid_is_swept_resumed_and_told_by_its_costs() {
    let folder = tempfile::tempdir().expect("folder");
    let at = |name: &str| folder.path().join(name);
    let (spec, grid) = (write(&at("spec.toml"), SPEC), write(&at("grid.toml"), GRID));
    let sweep = |out: &Path, threads: &str| {
        let mut command =
            plumb(["search", "--grid", arg(&grid), "--model", "qwen3-0.6b", "--spec", arg(&spec)]);
        command.args(["--ttft-p99-ms", "60", "--tolerance", "0.1", "--out", arg(out)]);
        let (code, stdout, stderr) =
            ended(&command.env("RAYON_NUM_THREADS", threads).output().expect("plumb starts"));
        assert_eq!(code, 0, "{stderr}");
        (stdout, stderr)
    };
    let (text, notes) = sweep(&at("a"), "1");
    assert!(text.contains("16 deployments, 8 with a highest rate"), "{text}");
    assert!(text.contains("without a highest rate: tensor_parallel_size = 2"), "{text}");
    assert!(notes.contains("16/16 ") && !notes.contains("from the journal"), "{notes}");
    let bytes = |out: &str| {
        ["search.json", "pareto.csv", "pareto.svg"].map(|name| fs::read(at(out).join(name)).expect(name))
    };
    let first = bytes("a");
    assert_eq!(sweep(&at("b"), "4").0, text);
    assert_eq!(bytes("b"), first, "threads change nothing");

    let journal = at("b").join("journal.jsonl");
    let lines = fs::read_to_string(&journal).expect("a journal");
    assert_eq!(lines.lines().count(), 8);
    fs::write(&journal, &lines[..lines.len() / 2]).expect("cut");
    let (again, notes) = sweep(&at("b"), "2");
    assert_eq!(again, text);
    assert_eq!(bytes("b"), first, "interrupted or not");
    let num_reused = notes.matches("from the journal").count();
    assert!((1..8).contains(&num_reused), "{notes}");

    let report = json(&String::from_utf8(first[0].clone()).expect("UTF-8"));
    let deployments = report["deployments"].as_array().expect("deployments");
    let costs: Vec<f64> =
        deployments.iter().filter_map(|row| row["cost_per_million_output_tokens"].as_f64()).collect();
    assert!(costs.len() == 8 && costs.is_sorted(), "{costs:?}");
    for row in &deployments[..8] {
        let cost = row["cost_per_hour"].as_f64().expect("a cost")
            / (row["output_tokens_per_s"].as_f64().expect("a rate") * 3.6e-3);
        assert!((cost / row["cost_per_million_output_tokens"].as_f64().expect("a cost") - 1.0).abs() < 1e-12);
    }
    let front = report["pareto_front"].as_array().expect("a front").len();
    assert_eq!(String::from_utf8_lossy(&first[1]).lines().count(), front + 1);
    // Prices are no input of a simulation: other ones need none.
    write(&at("grid.toml"), GRID.replace("2.5", "9.5"));
    let (_, notes) = sweep(&at("b"), "2");
    assert_eq!(notes.matches("from the journal").count(), 8, "{notes}");
}

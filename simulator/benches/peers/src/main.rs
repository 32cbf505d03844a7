//! Plumbline's simulator beside `inference-lab`'s library: one load, one run, interleaved rounds, ratios.
//!
//! From this folder: `cargo run --release -- WORKLOAD.csv [ROUNDS [SLOWER]]`. SLOWER multiplies Plumbline's operator
//! times, so that batches are those of a slower GPU. The peer's step times, and the times of Plumbline's bundle, are
//! multiplied by what gives them as many steps as Plumbline's roofline makes. Each simulation is a process of its
//! own: of this program for the peer (`peer WORKLOAD.csv ALPHA KV_BLOCKS`), of Plumbline's bench `load` for the
//! other side.

mod peer;

use std::{
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

const SIDES: [&str; 3] = ["inference-lab", "plumbline roofline", "plumbline bundle"];
/// Gives mean batches of 14 to 20 on the benchmark load.
const SLOWER: &str = "2.7";
const SCHEDULER: &str = "sarathi";

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["peer", workload, alpha, kv_blocks] => {
            println!("{}", peer::simulate(workload, number(alpha), number(kv_blocks)));
        }
        [workload] => compare(workload, "5", SLOWER),
        [workload, rounds] => compare(workload, rounds, SLOWER),
        [workload, rounds, slower] => compare(workload, rounds, slower),
        _ => panic!("expected WORKLOAD.csv [ROUNDS [SLOWER]], found {args:?}"),
    }
}

fn number<N: std::str::FromStr>(text: &str) -> N {
    text.parse().unwrap_or_else(|_| panic!("expected a number, found `{text}`"))
}

fn compare(workload: &str, rounds: &str, slower: &str) {
    let workload = std::fs::canonicalize(workload).expect("a workload");
    let workload = workload.to_str().expect("a path in UTF-8");
    let load = build_load();
    let ours = |times: &str, slower: f64| {
        let slower = &slower.to_string();
        run(Command::new(&load).args([workload, SCHEDULER, "one", times, slower, "1", "all", "files"]))
    };
    let this = std::env::current_exe().expect("this program");
    let slower: f64 = number(slower);
    let first = ours("roofline", slower);
    let steps = float(&first, "steps");
    let kv_blocks = first["kv_blocks"].to_string();
    let theirs =
        |alpha: f64| run(Command::new(&this).args(["peer", workload, &alpha.to_string(), &kv_blocks]));
    let alpha = match_steps(slower, steps, theirs);
    let bundle_slower = match_steps(slower, steps, |slower| ours("bundle", slower));
    println!(
        "peer's step times x {alpha:.3}; operator times x {slower} (roofline), x {bundle_slower:.3} (bundle); \
         {kv_blocks} KV blocks"
    );
    let rounds: usize = number(rounds);
    let mut results: [Vec<Value>; 3] = Default::default();
    for round in 0..rounds {
        for turn in 0..SIDES.len() {
            let side = (round + turn) % SIDES.len();
            results[side].push(match side {
                0 => theirs(alpha),
                1 => ours("roofline", slower),
                _ => ours("bundle", bundle_slower),
            });
        }
    }
    report(&results);
}

/// Builds Plumbline's side as its own workspace does, and tells where it lies.
fn build_load() -> String {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../Cargo.toml");
    let output = Command::new("cargo")
        .args(["bench", "--locked", "-p", "plumbline-simulator", "--bench", "load", "--no-run"])
        .args(["--message-format", "json", "--manifest-path"])
        .arg(manifest)
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo");
    assert!(output.status.success(), "plumbline's bench `load` cannot be built");
    let messages = String::from_utf8_lossy(&output.stdout);
    let mut artifacts = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let load = artifacts.find_map(|artifact| {
        (artifact["target"]["name"] == "load").then(|| artifact["executable"].as_str().map(str::to_owned))?
    });
    load.expect("the bench's executable among cargo's messages")
}

fn run(command: &mut Command) -> Value {
    let output = command.output().expect("a process");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed: {errors}");
    serde_json::from_slice(&output.stdout).expect("a line of JSON")
}

/// The factor of its times that gives a side `steps` steps to 1 %: steps are about as 1 / factor.
fn match_steps(start: f64, steps: f64, side: impl Fn(f64) -> Value) -> f64 {
    let mut factor = start;
    for _ in 0..8 {
        let ratio = float(&side(factor), "steps") / steps;
        if (ratio - 1.0).abs() < 0.01 {
            break;
        }
        factor *= ratio;
    }
    factor
}

/// A figure of one simulation.
type Figure = fn(&Value) -> f64;

fn report(results: &[Vec<Value>; 3]) {
    println!(
        "\n| | steps | mean batch | tokens computed | preemptions | TTFT p50 | E2E p50 |\n|---|---|---|---|---|---|---|"
    );
    for (side, results) in SIDES.iter().zip(results) {
        let first = &results[0];
        println!(
            "| {side} | {} | {:.1} | {} | {} | {:.0} ms | {:.0} ms |",
            first["steps"],
            float(first, "mean_batch"),
            first["tokens"],
            first["preemptions"],
            float(first, "ttft_p50_ms"),
            float(first, "e2e_p50_ms"),
        );
    }
    let figures: [(&str, Figure); 6] = [
        ("wall time, ms", |result| float(result, "wall_ms")),
        ("CPU time, ms", |result| float(result, "cpu_ms")),
        ("wall time of a step, ns", |result| float(result, "wall_ms") / float(result, "steps") * 1e6),
        ("CPU time of a step, ns", |result| float(result, "cpu_ms") / float(result, "steps") * 1e6),
        ("peak memory, MiB", |result| float(result, "peak_mib")),
        ("start to first event, ms", |result| float(result, "start_ms")),
    ];
    println!(
        "\n| | {} | {} | {} | peer / roofline | peer / bundle |\n|---|---|---|---|---|---|",
        SIDES[0], SIDES[1], SIDES[2]
    );
    for (name, figure) in figures {
        let sides = results.each_ref().map(|results| results.iter().map(figure).collect::<Vec<_>>());
        let ratios =
            |side: usize| sides[0].iter().zip(&sides[side]).map(|(peer, ours)| peer / ours).collect();
        let [peer, roofline, bundle] = sides.clone().map(spread);
        println!(
            "| {name} | {peer} | {roofline} | {bundle} | {} | {} |",
            spread(ratios(1)),
            spread(ratios(2))
        );
    }
}

fn float(result: &Value, key: &str) -> f64 {
    result[key].as_f64().unwrap_or(f64::NAN)
}

/// Median, and least to greatest.
fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let (first, last) = (values[0], values[values.len() - 1]);
    let middle = f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2]);
    format!("{middle:.2} ({first:.2} to {last:.2})")
}

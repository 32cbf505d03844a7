//! Searches on the data sheet's times: what is returned was simulated, whatever the number of threads, and whatever
//! came between.

mod common;

use std::{fs, path::Path, sync::Mutex};

use plumbline_schema::{Deployment, EngineMode, GpuSpec, ModelSpec, Nanos, Workload, WorkloadRequest};
use plumbline_simulator::{
    Residuals, RooflineTimes, SimulateOptions,
    cluster::{Engines, Role, RouterKind, Routing, simulate_cluster},
    output::Reporter,
    search::{
        Bracket, BracketOptions, Found, Grid, Journal, Kind, Latency, Limit, Load, NotBracketed, Probe, Row,
        Scenario, highest_rate, sweep,
    },
};

fn gpu() -> GpuSpec {
    GpuSpec::by_name("h100-sxm5-80gb").unwrap()
}

fn engines() -> Engines<RooflineTimes> {
    let model = ModelSpec::load("qwen3-0.6b").unwrap();
    let deployment = Deployment {
        max_num_seqs: 8,
        max_model_len: 4096,
        num_gpu_blocks: 4000,
        ..Deployment::unplanned(&model, EngineMode::Eager)
    };
    let times = RooflineTimes { gpu: gpu(), overhead_ns: 2_000.0 };
    let profile = common::profile(1.0, &[]);
    Engines { model, deployment, profile, times, num_replicas: 1, role: Role::Whole }
}

/// 300 requests, one a second.
fn load() -> Load {
    let request = |i: u64| {
        let (prompt, output) = (20 + (i * 37 % 200) as u32, 4 + (i * 13 % 9) as u32);
        WorkloadRequest::new(i, Nanos(i * 1_000_000_000), prompt, output)
    };
    Load::of_workload(Workload { requests: (0..300).map(request).collect() }).unwrap()
}

fn scenario<'a>(load: &'a Load, limits: &'a [Limit], bracket: &'a BracketOptions) -> Scenario<'a> {
    Scenario { load, limits, bracket, router: RouterKind::RoundRobin, seed: 1, residuals: Residuals::None }
}

fn search(limits: &[Limit]) -> Bracket<Probe> {
    let load = load();
    let options = BracketOptions::from_start(load.rate_per_s());
    highest_rate(engines(), &scenario(&load, limits, &options), |_| {}).unwrap()
}

#[test]
fn both_ends_of_a_highest_rate_were_simulated() {
    let limits = [Limit::p99(Latency::Ttft, 200.0), Limit::p99(Latency::Tpot, 30.0)];
    let found = search(&limits);
    let (low, high) = found.ends().unwrap();
    assert!(low.meets && low.reasons.is_empty() && !high.meets && !high.reasons.is_empty());
    assert!(low.rate_per_s < high.rate_per_s && high.rate_per_s <= 1.02 * low.rate_per_s);
    // Each as a simulation of its own, by the entry that everybody uses and without what was predicted before.
    let (load, options) =
        (load(), SimulateOptions { seed: 1, residuals: Residuals::None, ..SimulateOptions::default() });
    for probe in [low, high] {
        let mut source = load.at(probe.rate_per_s, 1).unwrap();
        let mut reporter = Reporter::without_files();
        let run = simulate_cluster(vec![engines()], Routing::default(), &options, &mut source, &mut reporter)
            .unwrap();
        let (summaries, _) = reporter.finish().unwrap();
        for latency in Latency::ALL {
            assert_eq!(probe.latencies[latency.name()], latency.of(&summaries).into());
        }
        assert_eq!(probe.num_finished, run.counts.finished as u64);
        assert_eq!(probe.coverage, run.coverage);
        let p99 = |latency: Latency| latency.of(&summaries).p99.unwrap() / 1e6;
        let is_within = limits.iter().all(|limit| p99(limit.metric) <= limit.max_ms);
        assert_eq!(probe.meets, is_within && !probe.backlog.is_growing());
    }
}

#[test]
fn looser_limits_bear_no_less_and_more_replicas_more() {
    let rate = |ms| search(&[Limit::p99(Latency::Ttft, ms)]).ends().unwrap().0.rate_per_s;
    assert!(rate(40.0) <= rate(80.0) && rate(80.0) <= rate(800.0));
    let load = load();
    let options = BracketOptions::from_start(load.rate_per_s());
    let limits = [Limit::p99(Latency::Ttft, 200.0)];
    let of = |num_replicas| {
        let engines = Engines { num_replicas, ..engines() };
        let found = highest_rate(engines, &scenario(&load, &limits, &options), |_| {}).unwrap();
        found.ends().unwrap().0.rate_per_s
    };
    let ratio = of(3) / of(1);
    assert!((2.0..4.5).contains(&ratio), "{ratio}");
}

#[test]
fn a_backlog_that_grows_is_no_rate_even_where_no_limit_sees_it() {
    // With 8 sequences at once, time per token stays the same however many wait.
    let found = search(&[Limit::p99(Latency::Tpot, 1000.0)]);
    let (low, high) = found.ends().unwrap();
    assert!(!low.backlog.is_growing() && high.backlog.is_growing());
    assert!(
        high.reasons.iter().all(|reason| reason.starts_with("the backlog grows: ")),
        "{:?}",
        high.reasons
    );
}

#[test]
fn what_is_not_bracketed_says_what_was_tried() {
    let none = search(&[Limit::p99(Latency::Ttft, 0.001)]);
    assert_eq!(none.ends().unwrap_err(), NotBracketed::NoneMeets);
    let words = none.in_words(NotBracketed::NoneMeets);
    assert!(
        words.starts_with("not even the lowest rate tried meets the limits: ")
            && words.contains("ttft p99 is")
    );
    assert!(
        none.probes.len() < 20,
        "once requests are alone, lower rates do no better: {}",
        none.probes.len()
    );
    let load = load();
    let options = BracketOptions { max_rate_per_s: 3.0, ..BracketOptions::from_start(1.0) };
    let limits = [Limit::p99(Latency::Ttft, 1e6)];
    let all = highest_rate(engines(), &scenario(&load, &limits, &options), |_| {}).unwrap();
    assert_eq!(all.ends().unwrap_err(), NotBracketed::AllMeet);
    assert!(all.in_words(NotBracketed::AllMeet).ends_with("3.000000 requests/s (3 tried)"));
}

#[test]
fn rejected_requests_and_too_few_of_them_fail_at_once() {
    let load = load();
    let options = BracketOptions::from_start(1.0);
    let limits = [Limit::p99(Latency::Ttft, 1e6)];
    let mut short = engines();
    short.deployment.max_model_len = 100;
    let found = highest_rate(short, &scenario(&load, &limits, &options), |_| {}).unwrap();
    assert_eq!(found.probes.len(), 1);
    assert!(found.probes[0].num_rejected > 0);
    assert!(found.probes[0].reasons[0].contains("requests are rejected, the first of them"));
    let few = Workload { requests: (0..9).map(|i| WorkloadRequest::new(i, Nanos(i), 5, 5)).collect() };
    let few = Load::of_workload(few).unwrap();
    let found = highest_rate(engines(), &scenario(&few, &limits, &options), |_| {}).unwrap();
    let reasons = &found.probes[0].reasons;
    assert!(reasons.contains(&"ttft p99 wants 100 samples, there are 9".to_owned()), "{reasons:?}");
}

const GRID: &str = "scheduler = [\"vllm-v1\", \"orca\"]\nmax_num_seqs = [4, 16]\ntensor_parallel_size = [1, 2]\n\
    replicas = [1, 2]\n[[gpu]]\nbundle = \"b\"\nengine = \"e\"\nprice_per_hour = 2.0\n";

/// The sweep of [`GRID`] with so many threads, and how many points were taken from the journal.
fn swept(threads: usize, journal: Option<&Path>, seed: u64) -> (Vec<Row>, usize) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("grid.toml");
    fs::write(&file, GRID).unwrap();
    let grid = Grid::read(&file).unwrap();
    let kind = Kind {
        base: engines(),
        gpu: gpu(),
        bundle_digest: "digest".into(),
        out_of_domain: "extrapolate".into(),
        plans_memory: true,
    };
    let load = load();
    let limits = [Limit::p99(Latency::Ttft, 200.0)];
    let options = BracketOptions { tolerance: 0.1, ..BracketOptions::from_start(load.rate_per_s()) };
    let scenario = Scenario { seed, ..scenario(&load, &limits, &options) };
    let reused = Mutex::new(0);
    let journal = journal.map(|path| Journal::open(path).unwrap());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let rows = pool.install(|| {
        sweep(grid.candidates(&[kind]), &scenario, journal.as_ref(), &|progress| {
            *reused.lock().unwrap() += usize::from(progress.is_reused);
        })
    });
    (rows.unwrap(), reused.into_inner().unwrap())
}

#[test]
fn threads_change_nothing_and_single_deployments_may_fail() {
    let (serial, _) = swept(1, None, 1);
    let (parallel, _) = swept(4, None, 1);
    assert_eq!(serde_json::to_string(&serial).unwrap(), serde_json::to_string(&parallel).unwrap());
    assert_eq!(serial.len(), 16);
    for row in &serial {
        if row.point.tensor_parallel_size == 2 {
            assert_eq!(row.status, Found::Failed);
            let reason = row.reason.as_deref().unwrap();
            assert!(
                reason.contains("tensor_parallel_size = 2") && reason.contains("collectives"),
                "{reason}"
            );
        } else {
            assert_eq!(row.status, Found::Bracketed, "{:?}", row.reason);
            assert!(row.economics.unwrap().cost_per_million_output_tokens > 0.0);
        }
    }
}

#[test]
fn an_interrupted_sweep_goes_on_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.jsonl");
    let (whole, reused) = swept(2, Some(&path), 1);
    assert_eq!(reused, 0);
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), 8, "what failed is no result");
    // Killed in the middle of the fourth line.
    let third = text.match_indices('\n').nth(2).unwrap().0 + 1;
    fs::write(&path, &text[..third + 40]).unwrap();
    let (resumed, reused) = swept(1, Some(&path), 1);
    assert_eq!(reused, 3);
    assert_eq!(serde_json::to_string(&whole).unwrap(), serde_json::to_string(&resumed).unwrap());
    let lines = |text: &str| {
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort_unstable();
        lines
    };
    assert_eq!(lines(&text), lines(&fs::read_to_string(&path).unwrap()));
    let (again, reused) = swept(3, Some(&path), 1);
    assert_eq!((again.len(), reused), (16, 8));
    assert_eq!(serde_json::to_string(&whole).unwrap(), serde_json::to_string(&again).unwrap());
    // Other inputs have other keys.
    assert_eq!(swept(2, Some(&path), 2).1, 0);
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 16);
}

#[test]
fn a_file_that_is_no_journal_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notes.txt");
    for text in ["my notes", "my notes\n", "{\"key\":\"a\",\"result\":1}\n", "{\"other\": 1}"] {
        fs::write(&path, text).unwrap();
        let error = Journal::open(&path).unwrap_err().to_string();
        assert!(error.contains("line 1: expected a result of `plumb search`"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    for torn in ["{\"ke", "{\"key\":\"abc\",\"resu"] {
        fs::write(&path, torn).unwrap();
        Journal::open(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }
}

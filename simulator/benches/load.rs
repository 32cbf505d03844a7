//! The benchmark load of docs/workloads.md, simulated as a user would: every token's time counted,
//! `request_metrics.csv` written.
//!
//! `cargo bench -p plumbline-simulator --bench load -- WORKLOAD.csv [SCHEDULER] [MODE]`, where MODE is
//! - `rounds` (default): five rounds of both sources of step times;
//! - `slope`: time against requests, and against replicas at a constant load each;
//! - `million`: 1,000,000 requests over 1,000 replicas;
//! - `start`: from the start of the process to the first request of a simulation;
//! - `memory`: peak memory with summaries alone, at several numbers of requests;
//! - `one TIMES SLOWER REPLICAS REQUESTS FILES`: one simulation, told as a line of JSON (the other modes and
//!   `benches/peers` run it, each time as a process of its own). TIMES is `roofline` or `bundle`, SLOWER
//!   multiplies every operator's time, REQUESTS may be `all`, FILES is `files` or `summaries`.

use std::{
    cell::RefCell,
    path::Path,
    process::Command,
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use plumbline_bundles::{Bundle, OutOfDomain, PredictError, Prediction};
use plumbline_schema::{
    Deployment, EngineMode, GpuSpec, ModelSpec, Nanos, Operator, OperatorShape, Workload, WorkloadRequest,
};
use plumbline_simulator::{
    BundleTimes, OperatorTimes, RequestSource, RooflineTimes, SchedulerKind, SimulateOptions, StepTimeModel,
    cluster::{Cluster, Group, Role, Routing},
    output::{OutputOptions, Reporter},
};
use serde_json::{Value, json};

const GPU: &str = "h100-sxm5-80gb";
const SOURCES: [&str; 2] = ["roofline", "bundle"];
const ROUNDS: usize = 5;

fn main() {
    let started = Instant::now();
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let Some(workload) = args.first() else {
        println!("skipped: expected a workload (see docs/performance.md)");
        return;
    };
    let scheduler = args.get(1).map_or("vllm-v1", String::as_str);
    let load = Load { path: workload, scheduler };
    match args.get(2).map_or("rounds", String::as_str) {
        "rounds" => load.rounds(),
        "slope" => load.slopes(),
        "million" => load.million(),
        "start" => load.starts(),
        "memory" => load.memory(),
        "one" => println!("{}", one(started, workload, scheduler, &Case::read(&args[3..]))),
        mode => panic!("expected rounds, slope, million, start, memory or one, found `{mode}`"),
    }
}

/// One simulation.
#[derive(Clone, Copy)]
struct Case<'a> {
    times: &'a str,
    slower: f64,
    replicas: u32,
    requests: Option<u64>,
    files: bool,
}

const CASE: Case<'static> = Case { times: "roofline", slower: 1.0, replicas: 1, requests: None, files: true };

impl<'a> Case<'a> {
    fn read(args: &'a [String]) -> Self {
        let [times, slower, replicas, requests, files] = args else {
            panic!("expected TIMES SLOWER REPLICAS REQUESTS FILES, found {args:?}");
        };
        Self {
            times,
            slower: number(slower),
            replicas: number(replicas),
            requests: (requests != "all").then(|| number(requests)),
            files: files == "files",
        }
    }
}

fn number<N: FromStr>(text: &str) -> N {
    text.parse().unwrap_or_else(|_| panic!("expected a number, found `{text}`"))
}

/// A workload over and over, `replicas` times as fast: each replica gets the same load, and nothing is kept.
struct Cycled {
    workload: Arc<Workload>,
    span: u64,
    replicas: u64,
    num_requests: u64,
    taken: u64,
    first: Option<Instant>,
}

impl Cycled {
    fn new(workload: Arc<Workload>, replicas: u32, num_requests: u64) -> Self {
        let span = workload.requests.last().map_or(0, |request| request.arrival_time_ns.0);
        Self { workload, span, replicas: replicas.into(), num_requests, taken: 0, first: None }
    }

    fn peek(&self) -> Option<(Nanos, &WorkloadRequest)> {
        let length = self.workload.requests.len() as u64;
        let request = &self.workload.requests[(self.taken % length) as usize];
        let time = self.taken / length * self.span + request.arrival_time_ns.0;
        (self.taken < self.num_requests).then(|| (Nanos(time / self.replicas), request))
    }
}

impl RequestSource for Cycled {
    fn next_arrival(&mut self) -> Option<Nanos> {
        self.peek().map(|(time, _)| time)
    }

    fn take(&mut self) -> Option<WorkloadRequest> {
        let (arrival_time_ns, request) = self.peek()?;
        let request = WorkloadRequest { request_id: self.taken, arrival_time_ns, ..request.clone() };
        self.first.get_or_insert_with(Instant::now);
        self.taken += 1;
        Some(request)
    }

    fn remaining(&self) -> Option<u64> {
        Some(self.num_requests - self.taken)
    }
}

/// Operators that take `factor` times as long: another GPU, of either source of times.
struct Slower<T> {
    times: T,
    factor: f64,
}

impl<T: OperatorTimes> OperatorTimes for Slower<T> {
    #[inline]
    fn predict(&self, operator: Operator, shape: &OperatorShape) -> Result<Prediction, PredictError> {
        let mut prediction = self.times.predict(operator, shape)?;
        for time in [&mut prediction.time_ns, &mut prediction.low_ns, &mut prediction.high_ns] {
            *time *= self.factor;
        }
        Ok(prediction)
    }
}

/// Simulates, and tells what it took.
fn one(started: Instant, workload: &str, scheduler: &str, case: &Case<'_>) -> Value {
    let workload = Arc::new(Workload::read(Path::new(workload)).expect("a workload"));
    let gpu = GpuSpec::by_name(GPU).expect("a GPU");
    let bundle = bundle();
    let factor = case.slower;
    match case.times {
        "roofline" => {
            let times = Slower { times: RooflineTimes { gpu, overhead_ns: 2_000.0 }, factor };
            simulate(started, times, &bundle, scheduler, workload, case)
        }
        "bundle" => {
            let predictors = Arc::new(bundle.predictors().expect("predictors"));
            let times = BundleTimes::new(predictors, OutOfDomain::Extrapolate);
            simulate(started, Slower { times, factor }, &bundle, scheduler, workload, case)
        }
        times => panic!("expected roofline or bundle, found `{times}`"),
    }
}

fn bundle() -> Bundle {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bundles/data");
    Bundle::open(&root.join(GPU)).expect("a bundle")
}

fn simulate<T: OperatorTimes>(
    started: Instant,
    times: T,
    bundle: &Bundle,
    scheduler: &str,
    workload: Arc<Workload>,
    case: &Case<'_>,
) -> Value {
    let (model, gpu) =
        (ModelSpec::load("llama3-8b").expect("a model"), GpuSpec::by_name(GPU).expect("a GPU"));
    let profile = bundle.engine("vllm-0.24-graph").expect("an engine profile");
    let deployment = Deployment {
        max_num_batched_tokens: 512,
        max_num_seqs: 128,
        max_model_len: 4096,
        ..Deployment::defaults(&model, &gpu, EngineMode::Graph).expect("a deployment")
    };
    let scheduler: SchedulerKind = scheduler.parse().expect("a scheduler");
    let (before, cpu_before) = (Instant::now(), cpu_ms());
    let step_time =
        RefCell::new(StepTimeModel::new(&model, times, &profile, &deployment).expect("step times"));
    let group = Group { step_time: &step_time, scheduler, num_replicas: case.replicas, role: Role::Whole };
    let mut cluster =
        Cluster::new(&[group], Routing::default(), &SimulateOptions::default()).expect("a cluster");
    let folder = tempfile::tempdir().expect("a folder");
    let output = OutputOptions {
        requests: case.files,
        backend: profile.name.clone(),
        is_cluster: case.replicas > 1,
        ..OutputOptions::default()
    };
    let mut reporter = Reporter::new(folder.path(), output).expect("files");
    let num_requests = case.requests.unwrap_or(workload.requests.len() as u64);
    let mut source = Cycled::new(workload, case.replicas, num_requests);
    let reports = cluster.run(&mut source, &mut reporter).expect("a simulation");
    let simulated = before.elapsed();
    let (summaries, _) = reporter.finish().expect("files");
    let (wall, cpu_after) = (before.elapsed(), cpu_ms());
    let sum = |count: fn(&_) -> u64| reports.iter().map(|report| count(&report.counts)).sum::<u64>();
    let (steps, step_seqs) = (sum(|counts| counts.steps), sum(|counts| counts.step_seqs));
    let median_ms = |name: &str| summaries[name].p50.map(|ns| ns / 1e6);
    json!({
        "requests": sum(|counts| counts.finished),
        "steps": steps,
        "mean_batch": step_seqs as f64 / steps as f64,
        "tokens": sum(|counts| counts.step_tokens),
        "preemptions": sum(|counts| counts.preemptions),
        "wall_ms": millis(wall),
        "cpu_ms": cpu_after.zip(cpu_before).map(|(after, before)| after - before),
        "loop_ms": millis(simulated),
        "start_ms": source.first.map(|first| millis(first.duration_since(started))),
        "peak_mib": peak_mib(),
        "ttft_p50_ms": median_ms("ttft_ns"),
        "e2e_p50_ms": median_ms("e2e_ns"),
        "kv_blocks": reports[0].num_kv_blocks,
    })
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What this thread, the only one, has run for, to a few ms, where the system tells: other load is not in it.
fn cpu_ms() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/schedstat").ok()?;
    text.split_whitespace().next()?.parse::<f64>().ok().map(|ns| ns / 1e6)
}

/// Most memory this process ever held, where the system tells.
fn peak_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse::<f64>().ok().map(|kib| kib / 1024.0)
}

/// What the modes run.
struct Load<'a> {
    path: &'a str,
    scheduler: &'a str,
}

impl Load<'_> {
    /// One simulation as a process of its own.
    fn run(&self, case: Case<'_>) -> Value {
        let requests = case.requests.map_or_else(|| "all".to_owned(), |requests| requests.to_string());
        let output = Command::new(std::env::current_exe().expect("this program"))
            .args([self.path, self.scheduler, "one", case.times])
            .args([case.slower.to_string(), case.replicas.to_string(), requests])
            .arg(if case.files { "files" } else { "summaries" })
            .output()
            .expect("a process");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "the simulation failed: {errors}");
        serde_json::from_slice(&output.stdout).expect("a line of JSON")
    }

    fn rounds(&self) {
        for _ in 0..ROUNDS {
            for times in SOURCES {
                tell(times, &self.run(Case { times, ..CASE }));
            }
        }
    }

    fn million(&self) {
        for times in SOURCES {
            tell(times, &self.run(Case { times, replicas: 1_000, requests: Some(1_000_000), ..CASE }));
        }
    }

    fn slopes(&self) {
        let requests = [2_000_u64, 4_000, 8_000, 16_000].map(|requests| (1, requests));
        let replicas = [1_u32, 4, 16, 64].map(|replicas| (replicas, 2_000 * u64::from(replicas)));
        for times in SOURCES {
            for (axis, cases) in [("requests", requests), ("replicas", replicas)] {
                let points = cases.map(|(replicas, requests)| {
                    let case = Case { times, replicas, requests: Some(requests), ..CASE };
                    let rounds = (0..ROUNDS).map(|_| float(&self.run(case), "wall_ms"));
                    // The least: what else the machine does only adds.
                    let time = rounds.fold(f64::INFINITY, f64::min);
                    let x = if axis == "requests" { requests as f64 } else { f64::from(replicas) };
                    println!("{times}: {x} {axis}, least of {ROUNDS}: {time:.1} ms");
                    (x.ln(), time.ln())
                });
                println!("{times}: slope of log time against log {axis}: {:.3}", slope(&points));
            }
        }
    }

    fn starts(&self) {
        for times in SOURCES {
            let case = Case { times, requests: Some(1), ..CASE };
            let mut starts: Vec<_> = (0..3 * ROUNDS).map(|_| float(&self.run(case), "start_ms")).collect();
            starts.sort_by(f64::total_cmp);
            let (first, last) = (starts[0], starts[starts.len() - 1]);
            let middle = median(starts);
            println!("{times}: {middle:.1} ms to the first request ({first:.1} to {last:.1})");
        }
    }

    fn memory(&self) {
        for times in SOURCES {
            for requests in [16_000, 64_000, 256_000, 1_024_000] {
                let case = Case { times, requests: Some(requests), files: false, ..CASE };
                tell(times, &self.run(case));
            }
        }
    }
}

fn tell(name: &str, result: &Value) {
    let (steps, wall, cpu) = (float(result, "steps"), float(result, "wall_ms"), float(result, "cpu_ms"));
    println!(
        "{name}: {} requests, {steps} steps, mean batch {:.1}, {wall:.1} ms ({cpu:.1} ms of CPU time; {:.1} ms \
         without the files' end), {:.2} M steps/s ({:.2} of CPU time), peak {:.1} MiB",
        result["requests"],
        float(result, "mean_batch"),
        float(result, "loop_ms"),
        steps / wall / 1e3,
        steps / cpu / 1e3,
        float(result, "peak_mib"),
    );
}

fn float(result: &Value, key: &str) -> f64 {
    result[key].as_f64().unwrap_or(f64::NAN)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}

/// Of the line of least squares.
fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let (sum_x, sum_y) = points.iter().fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
    let (mean_x, mean_y) = (sum_x / n, sum_y / n);
    let covariance: f64 = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let variance: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    covariance / variance
}

//! The peer, driven as its library goes fastest: its engine alone, without its collector of metrics, progress,
//! summary or prefix hashes, one request submitted ahead, and of each request three times kept.

use std::time::Instant;

use inference_lab::{
    catalog,
    config::{ClusterSpec, MemoryConfig, ParallelConfig, SchedulerConfig, StepCostModel},
    request::Request,
    scheduler::SchedulingPolicy,
    simulation::{Engine, RequestTiming, StepKind, Topology},
};
use serde_json::{Value, json};

const BLOCK_SIZE: u32 = 16;

/// Simulates, and tells what it took; `alpha` multiplies step times.
pub fn simulate(workload: &str, alpha: f64, kv_blocks: u64) -> Value {
    let started = Instant::now();
    let requests = read(workload);
    let (before, cpu_before) = (Instant::now(), cpu_ms());
    let mut engine = Engine::new(topology(kv_blocks));
    engine.set_time_correction(alpha, 0.0);
    let mut arrivals = requests.iter().enumerate();
    let mut submit = |engine: &mut Engine| {
        if let Some((id, &(arrival, prompt, output))) = arrivals.next() {
            engine.submit(Request::new(id.to_string(), 0, arrival, prompt, output));
        }
    };
    submit(&mut engine);
    let (mut steps, mut step_seqs, mut tokens) = (0_u64, 0_u64, 0_u64);
    let mut first = None;
    let mut done: Vec<Done> = Vec::with_capacity(requests.len());
    while engine.next_event_time().is_some() {
        let outcome = engine.step().expect("a step");
        first.get_or_insert_with(Instant::now);
        if outcome.kind == StepKind::Arrival {
            submit(&mut engine);
        }
        if let Some(iteration) = &outcome.iteration {
            steps += 1;
            step_seqs += iteration.batch_size as u64;
            tokens += iteration.progress.iter().map(|progress| u64::from(progress.num_tokens)).sum::<u64>();
        }
        done.extend(outcome.completions.iter().map(Done::of));
    }
    let (wall, cpu_after) = (before.elapsed(), cpu_ms());
    assert_eq!(done.len(), requests.len(), "requests that got all their tokens");
    assert!(done.iter().all(|done| !done.rejected), "requests were rejected");
    json!({
        "requests": done.len(),
        "steps": steps,
        "mean_batch": step_seqs as f64 / steps as f64,
        "tokens": tokens,
        "preemptions": engine.aggregate_preemptions(),
        "wall_ms": wall.as_secs_f64() * 1e3,
        "cpu_ms": cpu_after.zip(cpu_before).map(|(after, before)| after - before),
        "start_ms": first.map(|first| (first - started).as_secs_f64() * 1e3),
        "peak_mib": peak_mib(),
        "ttft_p50_ms": median_ms(done.iter().map(|done| done.first_token - done.arrival).collect()),
        "e2e_p50_ms": median_ms(done.iter().map(|done| done.last_token - done.arrival).collect()),
    })
}

/// What is kept of a request, in seconds.
struct Done {
    arrival: f64,
    first_token: f64,
    last_token: f64,
    rejected: bool,
}

impl Done {
    fn of(timing: &RequestTiming) -> Self {
        Self {
            arrival: timing.arrival_time,
            first_token: timing.first_token_time,
            last_token: timing.completion_time,
            rejected: timing.rejected,
        }
    }
}

fn topology(kv_blocks: u64) -> Topology {
    // Llama-3.1-8B has the shape of Llama-3-8B.
    let model = catalog::model("llama-3.1-8b-instruct").expect("a model");
    let cluster = ClusterSpec {
        hardware: catalog::hardware("h100").expect("a GPU"),
        parallel: ParallelConfig { tp: 1, ep: 1, dp_attention: false },
        num_workers: 1,
        memory: MemoryConfig::default(),
        step_cost: StepCostModel::default(),
    };
    let scheduler = SchedulerConfig {
        max_num_batched_tokens: 512,
        max_num_seqs: 128,
        max_model_len: Some(4096),
        policy: SchedulingPolicy::FCFS,
        enable_chunked_prefill: true,
        mix_prefill_with_decode: true,
        block_size: BLOCK_SIZE,
        kv_cache_capacity: kv_blocks * model.kv_storage_bytes(BLOCK_SIZE),
        gpu_memory_utilization: 0.9,
        max_waiting: 0,
        overlap_schedule: false,
        prefill_delayer_max_passes: 0,
        idle_pass_s: 0.0,
        long_prefill_decode_interval: 0,
        long_prefill_min_tokens: 262_144,
        long_prefill_token_threshold: 0,
        max_num_partial_prefills: 1,
        enable_preemption_free: false,
        enable_cascade_attention: false,
        balance_set: None,
    };
    Topology::aggregated(cluster, model, scheduler).expect("a topology")
}

/// Arrival in seconds, prompt and output tokens of each request.
fn read(workload: &str) -> Vec<(f64, u32, u32)> {
    let text = std::fs::read_to_string(workload).expect("a workload");
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let columns = "request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens";
    assert!(header.starts_with(columns), "expected the columns {columns}, found {header}");
    let row = |line: &str| {
        let mut cells = line.split(',').skip(1);
        let mut cell = || cells.next().and_then(|cell| cell.parse::<u64>().ok()).expect("a whole number");
        let (arrival, prompt, output) = (cell(), cell(), cell());
        let length = |tokens| u32::try_from(tokens).expect("a length");
        (arrival as f64 / 1e9, length(prompt), length(output))
    };
    lines.map(row).collect()
}

fn median_ms(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    f64::midpoint(seconds[(seconds.len() - 1) / 2], seconds[seconds.len() / 2]) * 1e3
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

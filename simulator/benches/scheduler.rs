//! What forming and completing a step costs, by policy, in batches of 15 sequences.

use std::collections::VecDeque;

use divan::{Bencher, counter::ItemsCount};
use plumbline_schema::{Deployment, EngineMode, Nanos, WorkloadRequest};
use plumbline_simulator::{
    Scheduler, SchedulerKind,
    scheduler::{ScheduledStep, SchedulerError},
    sequence::SequenceId,
};

const NUM_STEPS: usize = 10_000;
const POLICIES: [SchedulerKind; 4] =
    [SchedulerKind::VllmV1, SchedulerKind::VllmV0, SchedulerKind::Sarathi, SchedulerKind::Orca];

fn main() {
    divan::main();
}

/// An engine with 15 seats, chunks of 512 tokens where prompts are chunked, and blocks for all.
fn scheduler(kind: SchedulerKind) -> Result<Box<dyn Scheduler>, SchedulerError> {
    let max_num_batched_tokens = if kind == SchedulerKind::VllmV0 { 4096 } else { 512 };
    kind.build(&Deployment {
        mode: EngineMode::Eager,
        model: "qwen3-0.6b".into(),
        max_num_batched_tokens,
        max_num_seqs: 15,
        max_model_len: 8192,
        num_gpu_blocks: 20_000,
        block_size: 16,
        tensor_parallel_size: 1,
        pipeline_parallel_size: 1,
        enable_prefix_caching: false,
        scheduling_policy: "fcfs".into(),
        long_prefill_token_threshold: 0,
        async_scheduling: false,
        cudagraph_sizes: vec![],
        cudagraph_mode: plumbline_schema::CudagraphMode::default(),
    })
}

/// Runs steps of which most have 14 decodes and a chunk, where the policy mixes them: prefills take six steps of a
/// request's 90. Returns how many sequences the steps had, each once for every step that it was in.
fn run(scheduler: &mut dyn Scheduler) -> usize {
    let mut lengths: VecDeque<u32> = (0..15).map(|i| 6 * i + 1).collect();
    let (mut step, mut finished) = (ScheduledStep::default(), Vec::<SequenceId>::new());
    let mut num_parts = 0;
    for number in 0..NUM_STEPS as u64 {
        while scheduler.state().num_unfinished() < 15 {
            let num_decode_tokens = lengths.pop_front().unwrap_or(84);
            let request = WorkloadRequest::new(number, Nanos(number), 2900, num_decode_tokens);
            scheduler.add(&request).expect("short enough");
        }
        scheduler.schedule(&mut step);
        num_parts += step.sequences.len();
        scheduler.complete(&step, &mut finished);
    }
    num_parts
}

/// In sequences a second; divide by about 15 for steps.
#[divan::bench(args = POLICIES)]
fn schedule_and_complete(bencher: Bencher, kind: SchedulerKind) {
    let num_parts = run(&mut *scheduler(kind).expect("a deployment for every policy"));
    println!("{kind}: {:.1} sequences a step", num_parts as f64 / NUM_STEPS as f64);
    bencher
        .counter(ItemsCount::new(num_parts))
        .with_inputs(|| scheduler(kind).expect("a deployment for every policy"))
        .bench_local_values(|mut scheduler| run(&mut *scheduler));
}

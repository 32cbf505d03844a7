//! What it costs this host to drive the device, in under four seconds.
//!
//! `launches` holds the calls that hand over work, `waits` those that follow it and what idling costs, `copies` the
//! transfers. The host without its GPU is in `crate::host`.

mod copies;
mod launches;
mod waits;

use std::time::Instant;

use plumbline_bundles::{HostCosts, TimeStats, host::CpuState};

use super::{
    driver::{CudaError, CudaResult},
    launch::{self, Launch},
    operands::Gpu,
};
use crate::host;

/// Repeats of a call that takes microseconds.
const REPEATS: usize = 100;

/// Repeats dropped from the front: the first ones pay for pages and caches that later ones find ready.
const WARM_UP: usize = 5;

/// Statistics of measured times, ns.
pub(super) fn stats(times_ns: &[f64]) -> CudaResult<TimeStats> {
    TimeStats::from_times(times_ns)
        .ok_or_else(|| CudaError::Unsupported("no finite times were measured".to_owned()))
}

/// Host time of a call, ns; at least 1, the clock's own step, as no call takes no time.
fn host_ns(work: impl FnOnce() -> CudaResult<()>) -> CudaResult<f64> {
    let began = Instant::now();
    work()?;
    Ok((began.elapsed().as_nanos() as f64).max(1.0))
}

/// Host times of a call that is repeated, the warm-up left out, ns; `before` runs before each and is not timed.
fn repeat(
    count: usize,
    mut before: impl FnMut() -> CudaResult<()>,
    mut call: impl FnMut() -> CudaResult<()>,
) -> CudaResult<TimeStats> {
    let mut times = Vec::with_capacity(count);
    for i in 0..count + WARM_UP {
        before()?;
        let ns = host_ns(&mut call)?;
        if i >= WARM_UP {
            times.push(ns);
        }
    }
    stats(&times)
}

/// Runs a part of the measurement and logs how long it took.
fn part<T>(name: &str, work: impl FnOnce() -> CudaResult<T>) -> CudaResult<T> {
    let began = Instant::now();
    let result = work();
    tracing::debug!(part = name, took_ms = began.elapsed().as_millis() as u64, "host costs");
    result
}

/// A kernel that writes 16 bytes, so that launching is all there is to it.
fn tiny_kernel(gpu: &mut Gpu) -> CudaResult<Launch> {
    let address = gpu.pool.scratch(16)?;
    let tiny = launch::fill(&mut gpu.kernels, address, 16, 1, 1.0)?;
    tiny.enqueue(&gpu.stream)?;
    gpu.stream.synchronize()?;
    Ok(tiny)
}

/// Measures every cost.
pub fn host_costs(gpu: &mut Gpu) -> CudaResult<HostCosts> {
    let before = host::cpu_state();
    let score = part("single-thread score", || Ok(host::single_thread_score()))?;
    // First, as choosing the product's algorithm takes the pool for itself.
    let after_idle = part("after idle", || waits::after_idle(gpu))?;
    gpu.pool.reset();
    let tiny = tiny_kernel(gpu)?;
    let launch_arguments = part("launches by arguments", || launches::by_arguments(gpu))?;
    let (copies, input_copies) = part("copies", || copies::copies(gpu))?;
    let gpu = &*gpu;
    Ok(HostCosts {
        cpu_model: host::cpu_model(),
        num_cores: host::num_cores(),
        single_thread_score: score.median,
        score: Some(score),
        kernel_launch_ns: part("launch", || launches::single(gpu, &tiny))?,
        launch_rows: part("launches in a row", || launches::in_rows(gpu, &tiny))?,
        launch_arguments,
        kernel_gap_ns: part("kernel gap", || launches::gap(gpu, &tiny))?,
        graph_launch: part("graph launches", || launches::of_graphs(gpu, &tiny))?,
        synchronize_ns: part("synchronise", || waits::idle_stream(gpu))?,
        synchronize_after_work_ns: Some(part("synchronise after work", || waits::after_work(gpu, &tiny))?),
        events: Some(part("events", || waits::events(gpu))?),
        copies,
        input_copies,
        after_idle,
        cpu: CpuState { load_after: host::load_average(), ..before },
    })
}

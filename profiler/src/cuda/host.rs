//! What it costs this host to drive the device, and the rates the device reaches.

use std::{ffi::c_void, hint::black_box, time::Instant};

use cudarc::driver::result;
use plumbline_bundles::{
    CacheState, HostCosts, TimeStats,
    host::{CopyCost, GraphLaunchCost},
};
use plumbline_schema::{Operator, OperatorShape};

use super::{
    driver::{CudaError, CudaResult, Event, Named},
    launch::{self, Launch},
    operands::Gpu,
    timing,
};
use crate::device::{Ceilings, Point, StoppingRule};

const GRAPH_SIZES: [u32; 4] = [1, 8, 64, 512];
const COPY_SIZES: [u64; 3] = [64, 4 << 10, 64 << 10];
/// Launches in a row whose calls are timed; few enough that the queue, of about a thousand, never fills.
const LAUNCHES_IN_A_ROW: usize = 64;
const REPEATS: usize = 100;
const COPY_BYTES: u64 = 4 << 30;
const MATMUL_SIZE: u32 = 8192;

fn stats(times_ns: &[f64]) -> CudaResult<TimeStats> {
    TimeStats::from_times(times_ns)
        .ok_or_else(|| CudaError::Unsupported("no finite times were measured".to_owned()))
}

fn host_ns(work: impl FnOnce() -> CudaResult<()>) -> CudaResult<f64> {
    let began = Instant::now();
    work()?;
    Ok(began.elapsed().as_nanos() as f64)
}

/// Measures every cost.
pub fn host_costs(gpu: &mut Gpu) -> CudaResult<HostCosts> {
    gpu.pool.reset();
    let tiny = gpu.pool.scratch(16)?;
    let tiny = launch::fill(&mut gpu.kernels, tiny, 16, 1)?;
    tiny.enqueue(&gpu.stream)?;
    gpu.stream.synchronize()?;

    Ok(HostCosts {
        cpu_model: cpu_model().unwrap_or_else(|| "unknown".to_owned()),
        num_cores: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
        single_thread_score: single_thread_score(),
        kernel_launch_ns: kernel_launch(gpu, &tiny)?,
        kernel_gap_ns: kernel_gap(gpu, &tiny)?,
        graph_launch: GRAPH_SIZES
            .iter()
            .map(|&size| graph_launch(gpu, &tiny, size))
            .collect::<CudaResult<_>>()?,
        synchronize_ns: synchronize(gpu)?,
        copies: copies(gpu)?,
    })
}

fn kernel_launch(gpu: &Gpu, tiny: &Launch) -> CudaResult<TimeStats> {
    let mut times = Vec::new();
    for _ in 0..REPEATS / 4 {
        for _ in 0..LAUNCHES_IN_A_ROW {
            times.push(host_ns(|| tiny.enqueue(&gpu.stream))?);
        }
        gpu.stream.synchronize()?;
    }
    // The first rounds pay for pages and caches that later ones find ready.
    stats(&times[4 * LAUNCHES_IN_A_ROW..])
}

/// From a graph, as single launches of so small a kernel wait for the host.
fn kernel_gap(gpu: &Gpu, tiny: &Launch) -> CudaResult<TimeStats> {
    let rule = StoppingRule {
        min_samples: 50,
        max_samples: 50,
        max_relative_error: 0.0,
        time_limit_ns: 1_000_000_000,
        warm_up_ns: 0,
    };
    stats(&timing::time(gpu, &[vec![tiny.clone()]], &rule)?.times_ns)
}

fn graph_launch(gpu: &Gpu, tiny: &Launch, num_nodes: u32) -> CudaResult<GraphLaunchCost> {
    let graph = gpu.stream.capture(|| (0..num_nodes).try_for_each(|_| tiny.enqueue(&gpu.stream)))?;
    graph.upload(&gpu.stream)?;
    let mut times = Vec::new();
    for _ in 0..REPEATS {
        gpu.stream.synchronize()?;
        times.push(host_ns(|| graph.launch(&gpu.stream))?);
    }
    gpu.stream.synchronize()?;
    Ok(GraphLaunchCost { num_nodes, launch_ns: stats(&times[5..])? })
}

fn synchronize(gpu: &Gpu) -> CudaResult<TimeStats> {
    let times =
        (0..2 * REPEATS).map(|_| host_ns(|| gpu.stream.synchronize())).collect::<CudaResult<Vec<_>>>()?;
    stats(&times[5..])
}

/// Page-locked memory of the host.
struct Pinned(*mut c_void);

impl Pinned {
    fn new(num_bytes: usize) -> CudaResult<Self> {
        // SAFETY: the memory is freed once, on drop.
        Ok(Self(unsafe { result::malloc_host(num_bytes, 0) }.named("cuMemHostAlloc")?))
    }

    /// # Safety
    /// The length is at most what was allocated, and no other slice of it is in use.
    #[expect(clippy::mut_from_ref, reason = "the memory is reached through a raw pointer; callers see to it")]
    unsafe fn bytes(&self, len: usize) -> &mut [u8] {
        // SAFETY: as this function's own.
        unsafe { std::slice::from_raw_parts_mut(self.0.cast(), len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, and no copy is in flight.
        let _ = unsafe { result::free_host(self.0) };
    }
}

fn copies(gpu: &mut Gpu) -> CudaResult<Vec<CopyCost>> {
    let most = COPY_SIZES[COPY_SIZES.len() - 1];
    let device = gpu.pool.scratch(most)?;
    let host = Pinned::new(most as usize)?;
    let stream = &gpu.stream;
    let mut costs = Vec::new();
    for num_bytes in COPY_SIZES {
        let (mut to_device, mut to_host) = (Vec::new(), Vec::new());
        for _ in 0..REPEATS {
            // SAFETY: the slice is within the allocation, and the copy has ended when it is dropped.
            let bytes = unsafe { host.bytes(num_bytes as usize) };
            to_device.push(host_ns(|| {
                // SAFETY: both sides hold the bytes, and the stream is waited for.
                unsafe { result::memcpy_htod_async(device, bytes, stream.raw()) }
                    .named("cuMemcpyHtoDAsync")?;
                stream.synchronize()
            })?);
            to_host.push(host_ns(|| {
                // SAFETY: as above.
                unsafe { result::memcpy_dtoh_async(bytes, device, stream.raw()) }
                    .named("cuMemcpyDtoHAsync")?;
                stream.synchronize()
            })?);
        }
        costs.push(CopyCost {
            num_bytes,
            to_device_ns: stats(&to_device[5..])?,
            to_host_ns: stats(&to_host[5..])?,
        });
    }
    Ok(costs)
}

/// Million iterations a second of a fixed loop: a multiply-add and a step along a random cycle through 1 MiB.
///
/// The median of five runs. The cycle is the same on every machine (Sattolo 1986), larger than a first-level cache
/// and smaller than a second-level one, as an engine's bookkeeping is.
fn single_thread_score() -> f64 {
    const ENTRIES: usize = (1 << 20) / 4;
    const ITERATIONS: u32 = 2_000_000;
    let mut next: Vec<u32> = (0..ENTRIES as u32).collect();
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    for i in (1..ENTRIES).rev() {
        next.swap(i, random() % i);
    }
    let mut scores: Vec<f64> = (0..5)
        .map(|_| {
            let began = Instant::now();
            let (mut at, mut sum) = (0u32, 0u64);
            for _ in 0..ITERATIONS {
                at = next[at as usize];
                sum = sum.wrapping_mul(31).wrapping_add(u64::from(at));
            }
            black_box(sum);
            f64::from(ITERATIONS) / began.elapsed().as_secs_f64() / 1e6
        })
        .collect();
    scores.sort_by(f64::total_cmp);
    scores[scores.len() / 2]
}

/// The CPU's model as Linux names it.
fn cpu_model() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Medians of a large device copy and of an 8192^3 matrix product on random data.
pub fn ceilings(gpu: &mut Gpu) -> CudaResult<Ceilings> {
    gpu.pool.reset();
    let num_bytes = COPY_BYTES.min(gpu.pool.scratch_left()).min(gpu.pool.inputs_left()) / 256 * 256;
    let (from, to) = (gpu.pool.input(num_bytes)?, gpu.pool.scratch(num_bytes)?);
    let mut copies = Vec::new();
    for _ in 0..12 {
        let (start, end) = (Event::new(&gpu.context)?, Event::new(&gpu.context)?);
        start.record(&gpu.stream)?;
        gpu.stream.copy_on_device(to, from, num_bytes as usize)?;
        end.record(&gpu.stream)?;
        gpu.stream.synchronize()?;
        copies.push(start.elapsed_ns(&end)?);
    }
    let copy_ns = stats(&copies[2..])?.p50_ns;

    let shape = OperatorShape::Gemm { m: MATMUL_SIZE, n: MATMUL_SIZE, k: MATMUL_SIZE };
    let point = Point { operator: Operator::QkvProj, shape, batch: None };
    let prepared = gpu.prepare(&point, CacheState::Hot)?;
    let rule = StoppingRule {
        min_samples: 20,
        max_samples: 20,
        max_relative_error: 0.0,
        time_limit_ns: 1_000_000_000,
        warm_up_ns: 0,
    };
    let product_ns = stats(&timing::time(gpu, &prepared.sets, &rule)?.times_ns)?.p50_ns;
    Ok(Ceilings {
        copy_bandwidth_bytes_per_s: 2.0 * num_bytes as f64 / copy_ns * 1e9,
        matmul_flops_per_s: shape.flops().0 as f64 / product_ns * 1e9,
    })
}

//! The calls that hand work to the device.

use plumbline_bundles::{
    TimeStats,
    host::{GraphLaunchCost, LaunchArgumentsCost, LaunchRowCost},
};

use super::{
    super::{
        driver::{Args, CudaResult, KernelLaunch},
        launch::Launch,
        operands::Gpu,
        timing,
    },
    REPEATS, host_ns, repeat, stats,
};
use crate::device::StoppingRule;

/// Sizes of graphs and repeats of each: one token's forward pass has a few hundred kernels.
const GRAPHS: [(u32, usize); 6] =
    [(1, REPEATS), (8, REPEATS), (64, REPEATS), (256, 50), (512, 50), (2048, 20)];

/// Launches in a row whose calls are timed one by one; few enough that the queue, of about a thousand, never fills.
const LAUNCHES_IN_A_ROW: usize = 64;

/// Lengths of rows that are timed as a whole, and repeats of each.
const ROWS: [(u32, usize); 6] = [(1, REPEATS), (4, REPEATS), (16, REPEATS), (64, 50), (256, 20), (1000, 10)];

/// Numbers of arguments, each with the kernel's definition.
const ARGUMENTS: [(u32, &str); 4] =
    [(1, "NUM_ARGS=1"), (4, "NUM_ARGS=4"), (8, "NUM_ARGS=8"), (16, "NUM_ARGS=16")];

/// Host times of single launch calls that follow each other.
pub fn single(gpu: &Gpu, launch: &Launch) -> CudaResult<TimeStats> {
    let mut times = Vec::new();
    for _ in 0..REPEATS / 4 {
        for _ in 0..LAUNCHES_IN_A_ROW {
            times.push(host_ns(|| launch.enqueue(&gpu.stream))?);
        }
        gpu.stream.synchronize()?;
    }
    // The first rounds pay for pages and caches that later ones find ready.
    stats(&times[4 * LAUNCHES_IN_A_ROW..])
}

/// Host time a launch of rows of several lengths, each begun on an idle stream.
pub fn in_rows(gpu: &Gpu, launch: &Launch) -> CudaResult<Vec<LaunchRowCost>> {
    let row = |(num_launches, repeats)| {
        let mut times = Vec::with_capacity(repeats);
        for i in 0..repeats + 2 {
            gpu.stream.synchronize()?;
            let row_ns = host_ns(|| (0..num_launches).try_for_each(|_| launch.enqueue(&gpu.stream)))?;
            if i >= 2 {
                times.push(row_ns / f64::from(num_launches));
            }
        }
        gpu.stream.synchronize()?;
        Ok(LaunchRowCost { num_launches, launch_ns: stats(&times)? })
    };
    ROWS.into_iter().map(row).collect()
}

/// Host time of launches that differ in their number of arguments alone.
pub fn by_arguments(gpu: &mut Gpu) -> CudaResult<Vec<LaunchArgumentsCost>> {
    let out = gpu.pool.scratch(8)?;
    ARGUMENTS
        .into_iter()
        .map(|(num_arguments, definition)| {
            let function = gpu.kernels.get("arguments", &[definition], 0)?;
            let args = (1..num_arguments).fold(Args::default().u64(out), |args, i| args.u64(u64::from(i)));
            let kernel = KernelLaunch { function, grid: (1, 1), num_threads: 32, shared_bytes: 0, args };
            Ok(LaunchArgumentsCost { num_arguments, launch_ns: single(gpu, &Launch::Kernel(kernel))? })
        })
        .collect()
}

/// From a graph, as single launches of so small a kernel wait for the host.
pub fn gap(gpu: &Gpu, launch: &Launch) -> CudaResult<TimeStats> {
    let rule = StoppingRule {
        min_samples: 50,
        max_samples: 50,
        max_relative_error: 0.0,
        time_limit_ns: 1_000_000_000,
        warm_up_ns: 0,
        pause_ns: 0,
    };
    stats(&timing::time(gpu, &[vec![launch.clone()]], &rule)?.times_ns)
}

/// Host time of launching graphs of several sizes on an idle stream.
pub fn of_graphs(gpu: &Gpu, launch: &Launch) -> CudaResult<Vec<GraphLaunchCost>> {
    let graph = |(num_nodes, repeats)| {
        let graph = gpu.stream.capture(|| (0..num_nodes).try_for_each(|_| launch.enqueue(&gpu.stream)))?;
        graph.upload(&gpu.stream)?;
        let launch_ns = repeat(repeats, || gpu.stream.synchronize(), || graph.launch(&gpu.stream))?;
        gpu.stream.synchronize()?;
        Ok(GraphLaunchCost { num_nodes, launch_ns })
    };
    GRAPHS.into_iter().map(graph).collect()
}

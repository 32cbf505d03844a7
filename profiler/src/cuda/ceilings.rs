//! The rates that the device itself reaches: a large copy and a large matrix product.

use plumbline_bundles::CacheState;
use plumbline_schema::{Operator, OperatorShape};

use super::{
    driver::{CudaResult, Event},
    host::stats,
    operands::Gpu,
    timing,
};
use crate::device::{Ceilings, PAUSE_NS, Point, StoppingRule};

const COPY_BYTES: u64 = 4 << 30;
const MATMUL_SIZE: u32 = 8192;

/// Medians of a large device copy and of an 8192^3 matrix product on random data, after rests as samples like it are.
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
        min_samples: 10,
        max_samples: 10,
        max_relative_error: 0.0,
        time_limit_ns: 1_000_000_000,
        warm_up_ns: 0,
        pause_ns: PAUSE_NS,
    };
    let product_ns = stats(&timing::time(gpu, &prepared.sets, &rule)?.times_ns)?.p50_ns;
    Ok(Ceilings {
        copy_bandwidth_bytes_per_s: 2.0 * num_bytes as f64 / copy_ns * 1e9,
        matmul_flops_per_s: shape.flops().0 as f64 / product_ns * 1e9,
    })
}

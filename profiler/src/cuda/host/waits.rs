//! The calls that follow what the device does, and what it costs to wake up after idling.

use std::{thread, time::Duration};

use plumbline_bundles::{
    CacheState, TimeStats,
    host::{AfterIdleCost, EventCosts},
};
use plumbline_schema::{Operator, OperatorShape};

use super::{
    super::{
        driver::{CudaError, CudaResult, Event},
        launch::Launch,
        operands::Gpu,
    },
    REPEATS, host_ns, repeat, stats, tiny_kernel,
};
use crate::device::Point;

/// Idle gaps and repeats of each, so that all of them take some three seconds.
const IDLE_GAPS: [(Duration, usize); 5] = [
    (Duration::ZERO, 10),
    (Duration::from_millis(1), 10),
    (Duration::from_millis(10), 8),
    (Duration::from_millis(100), 4),
    (Duration::from_secs(1), 2),
];

/// Rows, columns and depth of the product: some 200 us on an H100.
const PRODUCT_SIZE: u32 = 4096;

/// Products that keep the device busy before each gap.
const BUSY_PRODUCTS: usize = 10;

/// Synchronising with a stream that has long been idle.
pub fn idle_stream(gpu: &Gpu) -> CudaResult<TimeStats> {
    repeat(2 * REPEATS, || Ok(()), || gpu.stream.synchronize())
}

/// Synchronising with a stream whose only kernel has just ended, which an event was watched for.
pub fn after_work(gpu: &Gpu, tiny: &Launch) -> CudaResult<TimeStats> {
    let event = Event::new(&gpu.context)?;
    let work = || {
        tiny.enqueue(&gpu.stream)?;
        event.record(&gpu.stream)?;
        while !event.has_happened()? {
            std::hint::spin_loop();
        }
        Ok(())
    };
    repeat(REPEATS, work, || gpu.stream.synchronize())
}

/// Recording on an idle stream; asking and waiting for an event that has happened.
pub fn events(gpu: &Gpu) -> CudaResult<EventCosts> {
    let event = Event::new(&gpu.context)?;
    let settle = || gpu.stream.synchronize();
    let record_ns = repeat(REPEATS, settle, || event.record(&gpu.stream))?;
    gpu.stream.synchronize()?;
    let query_ns = repeat(REPEATS, || Ok(()), || event.has_happened().map(drop))?;
    let synchronize_ns = repeat(REPEATS, || Ok(()), || event.synchronize())?;
    Ok(EventCosts { record_ns, query_ns, synchronize_ns })
}

/// What the first work after idle gaps takes, on the host and on the device; resets the pool.
pub fn after_idle(gpu: &mut Gpu) -> CudaResult<Vec<AfterIdleCost>> {
    let shape = OperatorShape::Gemm { m: PRODUCT_SIZE, n: PRODUCT_SIZE, k: PRODUCT_SIZE };
    let point = Point { operator: Operator::QkvProj, shape, batch: None };
    let prepared = gpu.prepare(&point, CacheState::Hot)?;
    let product = prepared.sets.into_iter().next().ok_or_else(|| {
        CudaError::Unsupported("expected a launch of the matrix product, found none".to_owned())
    })?;
    let tiny = tiny_kernel(gpu)?;
    IDLE_GAPS.into_iter().map(|(idle, repeats)| after_one_gap(gpu, &product, &tiny, idle, repeats)).collect()
}

fn after_one_gap(
    gpu: &Gpu,
    product: &[Launch],
    tiny: &Launch,
    idle: Duration,
    repeats: usize,
) -> CudaResult<AfterIdleCost> {
    let stream = &gpu.stream;
    let (start, end) = (Event::new(&gpu.context)?, Event::new(&gpu.context)?);
    let multiply = || product.iter().try_for_each(|launch| launch.enqueue(stream));
    let (mut waits, mut computes) = (Vec::new(), Vec::new());
    for _ in 0..repeats {
        (0..BUSY_PRODUCTS).try_for_each(|_| multiply())?;
        stream.synchronize()?;
        if !idle.is_zero() {
            thread::sleep(idle);
        }
        waits.push(host_ns(|| {
            tiny.enqueue(stream)?;
            stream.synchronize()
        })?);
        // The second of two is timed: while the first runs, the host has queued the rest, so that no launching counts.
        multiply()?;
        start.record(stream)?;
        multiply()?;
        end.record(stream)?;
        stream.synchronize()?;
        computes.push(start.elapsed_ns(&end)?);
    }
    Ok(AfterIdleCost {
        idle_ns: idle.as_nanos() as u64,
        launch_and_wait_ns: stats(&waits)?,
        compute_ns: stats(&computes)?,
    })
}

//! Matrix products.

use plumbline_schema::{GpuSpec, OperatorShape, roofline::roofline_ns};

use super::{Row, compute_ns, ln, memory_ns, wave_fill};

/// Parts of the baseline: the roofline, its two sides, and the compute time of whole waves of output tiles.
pub(super) const PARTS: [&str; 6] =
    ["roofline", "compute", "memory", "waves_64x128", "waves_128x128", "waves_128x256"];

pub(super) fn parts_ns(m: u32, n: u32, k: u32, shape: &OperatorShape, gpu: &GpuSpec) -> Row<f64> {
    let num_sms = f64::from(gpu.num_sms);
    let waves = |tile_m: f64, tile_n: f64| {
        let tiles = (f64::from(m) / tile_m).ceil() * (f64::from(n) / tile_n).ceil();
        let tile_flops = 2.0 * tile_m * tile_n * f64::from(k);
        compute_ns(tile_flops, gpu) * num_sms * (tiles / num_sms).ceil()
    };
    Row::from_slice(&[
        roofline_ns(shape, gpu),
        compute_ns(shape.flops().0 as f64, gpu),
        memory_ns(shape, gpu),
        waves(64.0, 128.0),
        waves(128.0, 128.0),
        waves(128.0, 256.0),
    ])
}

/// Features of matrix products.
pub(super) const FEATURES: [&str; 12] = [
    "ln_m",
    "ln_n",
    "ln_k",
    "ln_compute_over_memory", // above 0: bound by the tensor cores; arithmetic intensity over the ridge point
    "ln_roofline_over_overhead",
    "ln_bytes_over_l2",
    "m_fill_64", // 0..=1, m over m rounded up to tiles of 64 rows: the share that is not padding
    "m_fill_128",
    "ln_tiles_per_sm", // ln of 128 x 128 output tiles over SMs; below 0 some SMs idle
    "wave_fill_64x64", // 0..=1, output tiles over the tiles of full waves of one tile an SM
    "wave_fill_128x128",
    "wave_fill_128x256",
];

pub(super) fn features(
    m: u32,
    n: u32,
    k: u32,
    shape: &OperatorShape,
    gpu: &GpuSpec,
    over_overhead: f32,
) -> Row<f32> {
    let (rows, columns) = (f64::from(m), f64::from(n));
    let num_sms = f64::from(gpu.num_sms);
    let fill = |tile: f64| (rows / tile / (rows / tile).ceil()) as f32;
    let tiles_per_sm =
        |tile_m: f64, tile_n: f64| (rows / tile_m).ceil() * (columns / tile_n).ceil() / num_sms;
    Row::from_slice(&[
        ln(rows),
        ln(columns),
        ln(f64::from(k)),
        ln(compute_ns(shape.flops().0 as f64, gpu) / memory_ns(shape, gpu)),
        over_overhead,
        ln(shape.bytes().0 as f64 / gpu.l2_bytes.0 as f64),
        fill(64.0),
        fill(128.0),
        ln(tiles_per_sm(128.0, 128.0)),
        wave_fill(tiles_per_sm(64.0, 64.0)),
        wave_fill(tiles_per_sm(128.0, 128.0)),
        wave_fill(tiles_per_sm(128.0, 256.0)),
    ])
}

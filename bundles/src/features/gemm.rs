//! Matrix products.

use plumbline_schema::{GpuSpec, OperatorShape};

use super::{NOMINAL_NS, Row, compute_ns, ln, memory_ns, wave_fill};

/// Parts of the baseline.
///
/// The longest decides, so the baseline joins them by [`super::part_norm`] rather than by their sum.
/// - `compute`, `memory`: the two sides of the roofline.
/// - `waves`: compute time of whole waves of output tiles with the tile that suits the shape best, see [`Tiling`].
/// - `k_steps`: [`NOMINAL_NS`] for each 1024 of `k`: a thread block walks along `k` step by step, and with few output
///   tiles that walk is longer than reading the weights.
pub(super) const PARTS: [&str; 4] = ["compute", "memory", "waves", "k_steps"];

pub(super) fn parts_ns(m: u32, n: u32, k: u32, shape: &OperatorShape, gpu: &GpuSpec) -> Row<f64> {
    Row::from_slice(&[
        compute_ns(shape.flops().0 as f64, gpu),
        memory_ns(shape, gpu),
        Tiling::best(m, n, k, gpu).time_ns,
        f64::from(k) / 1024.0 * NOMINAL_NS,
    ])
}

/// Logarithms to base 2 of an output tile's rows and columns, and the share of an SM's peak that it can reach: the
/// smaller a tile, the more it reads for each product. Nominal, as the library's kernels are not known.
const TILES: [(u32, u32, f64); 8] = [
    (6, 5, 0.4),
    (6, 6, 0.55),
    (6, 7, 0.7),
    (7, 6, 0.7),
    (6, 8, 0.8),
    (7, 7, 0.85),
    (7, 8, 1.0),
    (8, 7, 1.0),
];
/// What a wave of thread blocks costs beside its products, ns: filling and draining its pipeline.
const WAVE_NS: f64 = 500.0;
/// What joining the parts costs when `k` is split among thread blocks, ns.
const JOIN_NS: f64 = 1000.0;
/// Least `k` of a part; shorter ones are not worth joining.
const MIN_SPLIT_K: u32 = 512;

/// How a matrix product is likely cut into thread blocks: the way of least time among a library's usual ones.
struct Tiling {
    /// Compute time of whole waves, ns.
    time_ns: f64,
    /// Thread blocks.
    blocks: f64,
    /// 0..=1, thread blocks over those of full waves of one an SM.
    fill: f64,
    /// `k` that an SM walks along, over all waves.
    walk: f64,
}

impl Tiling {
    fn best(m: u32, n: u32, k: u32, gpu: &GpuSpec) -> Self {
        let sm_ns_per_flop = compute_ns(f64::from(gpu.num_sms), gpu);
        let mut best = Self { time_ns: f64::INFINITY, blocks: 1.0, fill: 1.0, walk: f64::from(k) };
        for (rows_log2, columns_log2, share) in TILES {
            let tiles = u64::from(rounded_up(m, rows_log2)) * u64::from(rounded_up(n, columns_log2));
            let step_ns = 2.0 * f64::from(1u32 << (rows_log2 + columns_log2)) * sm_ns_per_flop / share;
            for split in [1, 2, 4] {
                let blocks = tiles * u64::from(split);
                if split > 1 && (blocks > u64::from(gpu.num_sms) || k / split < MIN_SPLIT_K) {
                    break;
                }
                let waves = blocks.div_ceil(u64::from(gpu.num_sms)) as f64;
                let walk = waves * f64::from(k) / f64::from(split);
                let time_ns = walk * step_ns + waves * WAVE_NS + if split > 1 { JOIN_NS } else { 0.0 };
                if time_ns < best.time_ns {
                    let blocks = blocks as f64;
                    best = Self { time_ns, blocks, fill: blocks / (waves * f64::from(gpu.num_sms)), walk };
                }
            }
        }
        best
    }
}

/// Tiles of `2^log2` that cover `size`.
fn rounded_up(size: u32, log2: u32) -> u32 {
    (size >> log2) + u32::from(size & ((1 << log2) - 1) != 0)
}

/// Features of matrix products.
pub(super) const FEATURES: [&str; 15] = [
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
    "best_fill",      // 0..=1, thread blocks of the likely tiling over those of full waves
    "ln_best_blocks", // ln of those thread blocks
    "ln_best_walk",   // ln of the k that an SM walks along with it, over all waves
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
    let tiling = Tiling::best(m, n, k, gpu);
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
        wave_fill(tiles_per_sm(64.0, 64.0)) as f32,
        wave_fill(tiles_per_sm(128.0, 128.0)) as f32,
        wave_fill(tiles_per_sm(128.0, 256.0)) as f32,
        tiling.fill as f32,
        ln(tiling.blocks),
        ln(tiling.walk),
    ])
}

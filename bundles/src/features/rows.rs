//! Operators that work row by row, and collectives with their ranks as rows.

use plumbline_schema::{GpuSpec, OperatorShape, roofline::roofline_ns};

use super::{Row, ln, memory_ns, wave_fill};

/// Parts of the baseline.
///
/// - `beyond_l2_8`, `beyond_l2_4`, `beyond_l2_2`: memory time of the bytes beyond an eighth, a quarter and a half
///   of the L2 cache. Below, results stay in the cache and are written to memory while others run; beyond, the
///   launch waits for memory. Where that begins depends on how much of the traffic is written.
/// - `row_waves`: one row's time at one SM's share of bandwidth, times the waves of rows over the SMs: what is
///   left of the roofline when too few rows are there to fill the GPU.
/// - `busiest_sm`: the same with each row split so that every SM has two blocks, for kernels that split long
///   rows: the rows' shares that the busiest SM gets.
pub(super) const PARTS: [&str; 6] =
    ["roofline", "beyond_l2_8", "beyond_l2_4", "beyond_l2_2", "row_waves", "busiest_sm"];

pub(super) fn parts_ns(shape: &OperatorShape, gpu: &GpuSpec) -> Row<f64> {
    let (rows, num_sms) = (num_rows(shape), f64::from(gpu.num_sms));
    let memory_ns = memory_ns(shape, gpu);
    let l2_ns = gpu.l2_bytes.0 as f64 / gpu.hbm_bandwidth_bytes_per_s * 1e9;
    let beyond = |share: f64| (memory_ns - share * l2_ns).max(0.0);
    let row_ns = memory_ns / rows * num_sms;
    Row::from_slice(&[
        roofline_ns(shape, gpu),
        beyond(0.125),
        beyond(0.25),
        beyond(0.5),
        row_ns * (rows / num_sms).ceil(),
        row_ns * busiest_share(rows, num_sms),
    ])
}

/// Rows that the busiest SM works on when rows are split into blocks, two an SM.
fn busiest_share(rows: f64, num_sms: f64) -> f64 {
    let splits = (2.0 * num_sms / rows).ceil().min(MAX_SPLITS);
    (rows * splits / num_sms).ceil() / splits
}

/// Most blocks that one row is split into: shorter pieces cost more to join than they save.
const MAX_SPLITS: f64 = 64.0;

/// Features of the ratio.
pub(super) const FEATURES: [&str; 7] = [
    "ln_rows",          // ln of the tokens or sequences
    "ln_row_bytes",     // ln of the bytes that a row moves
    "ln_bytes_over_l2", // ln of all bytes over the L2 cache: beyond it nothing is found there
    "ln_roofline_over_overhead",
    "ln_rows_per_sm", // ln of the rows each SM gets
    "wave_fill",      // 0..=1, rows over the rows of full waves of one row an SM
    "split_balance",  // 0..=1, mean over busiest SM's rows when rows are split
];

pub(super) fn features(shape: &OperatorShape, gpu: &GpuSpec, over_overhead: f32) -> Row<f32> {
    let (rows, bytes) = (num_rows(shape), shape.bytes().0 as f64);
    let num_sms = f64::from(gpu.num_sms);
    let per_sm = rows / num_sms;
    Row::from_slice(&[
        ln(rows),
        ln(bytes / rows),
        ln(bytes / gpu.l2_bytes.0 as f64),
        over_overhead,
        ln(per_sm),
        wave_fill(per_sm) as f32,
        (per_sm / busiest_share(rows, num_sms)) as f32,
    ])
}

/// Rows, at least 1.
fn num_rows(shape: &OperatorShape) -> f64 {
    f64::from(match *shape {
        OperatorShape::Embedding { num_tokens, .. }
        | OperatorShape::RmsNorm { num_tokens, .. }
        | OperatorShape::QkNorm { num_tokens, .. }
        | OperatorShape::Rope { num_tokens, .. }
        | OperatorShape::KvCacheWrite { num_tokens, .. }
        | OperatorShape::SiluMul { num_tokens, .. } => num_tokens,
        OperatorShape::Gemm { m, .. } => m,
        OperatorShape::Sample { num_seqs, .. } => num_seqs,
        OperatorShape::Collective { num_ranks, .. } => num_ranks,
        OperatorShape::Attention { load, .. } => load.num_tokens(),
    })
    .max(1.0)
}

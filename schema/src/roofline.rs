//! The least time an operator can take on a GPU by its data sheet.

use crate::{gpu::GpuSpec, operator::OperatorShape};

/// Roofline time in ns: the larger of compute and memory time (Williams et al. 2009).
///
/// Matrix products and attention run on the tensor cores, all else on the fp32 units; both peaks are
/// taken at the highest clock. Every byte is counted at memory bandwidth, so for data that stays in
/// the L2 cache a measured time may beat it: it normalises, [`floor_ns`] judges.
#[must_use]
pub fn roofline_ns(shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
    compute_ns(shape, gpu).max(shape.bytes().0 as f64 / gpu.hbm_bandwidth_bytes_per_s * 1e9)
}

/// Time in ns that no measurement can beat: compute at peak, and memory traffic beyond the L2 cache.
///
/// Up to one L2 cache of the operands may already be resident, so only what exceeds it counts.
#[must_use]
pub fn floor_ns(shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
    let beyond_l2 = shape.bytes().0.saturating_sub(gpu.l2_bytes.0) as f64;
    compute_ns(shape, gpu).max(beyond_l2 / gpu.hbm_bandwidth_bytes_per_s * 1e9)
}

fn compute_ns(shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
    let peak = match shape {
        OperatorShape::Gemm { .. } | OperatorShape::Attention { .. } => gpu.bf16_flops_per_s,
        _ => gpu.fp32_flops_per_s,
    };
    let clock_headroom = f64::from(gpu.max_clock_mhz) / f64::from(gpu.boost_clock_mhz);
    shape.flops().0 as f64 / (peak * clock_headroom) * 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rooflines_match_hand_worked_figures() {
        let h100 = GpuSpec::by_name("h100-sxm5-80gb").unwrap();
        // Memory-bound: 8,470,528 bytes at 3.35 TB/s = 2,528.5 ns.
        let decode = OperatorShape::Gemm { m: 8, n: 4096, k: 1024 };
        assert!((roofline_ns(&decode, &h100) - 2528.5).abs() < 0.1);
        assert!(floor_ns(&decode, &h100) < 100.0, "fits in L2");
        // Compute-bound: 2 * 8192^3 FLOP at 989.4 * 1980 / 1830 TFLOP/s = 1,027,108 ns.
        let square = OperatorShape::Gemm { m: 8192, n: 8192, k: 8192 };
        assert!((roofline_ns(&square, &h100) / 1_027_108.0 - 1.0).abs() < 1e-4);
        assert!((floor_ns(&square, &h100) - roofline_ns(&square, &h100)).abs() < 1e-9);
    }
}

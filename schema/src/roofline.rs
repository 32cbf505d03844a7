//! The least time an operator can take on a GPU by its data sheet.

use crate::{
    gpu::GpuSpec,
    operator::OperatorShape,
    units::{Bytes, Flops},
};

/// The sides of an operator's least time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sides {
    /// Arithmetic at the peak at the highest clock, ns.
    pub compute_ns: f64,
    /// All bytes at memory bandwidth, ns.
    pub memory_ns: f64,
    /// The bytes beyond one L2 cache, ns.
    pub beyond_l2_ns: f64,
}

impl Sides {
    /// Of a shape on a GPU.
    #[must_use]
    pub fn of(shape: &OperatorShape, gpu: &GpuSpec) -> Self {
        let peak = match shape {
            OperatorShape::Gemm { .. } | OperatorShape::Attention { .. } => tensor_flops_per_s(gpu),
            _ => at_highest_clock(gpu.fp32_flops_per_s, gpu),
        };
        Self::new(shape.flops(), shape.bytes(), peak, gpu)
    }

    /// Of so much work, `flops_per_s` being the peak at the highest clock.
    #[must_use]
    #[inline]
    pub fn new(flops: Flops, bytes: Bytes, flops_per_s: f64, gpu: &GpuSpec) -> Self {
        let beyond_l2 = bytes.0.saturating_sub(gpu.l2_bytes.0);
        let memory_ns = |bytes: u64| bytes as f64 / gpu.hbm_bandwidth_bytes_per_s * 1e9;
        Self {
            compute_ns: flops.0 as f64 / flops_per_s * 1e9,
            memory_ns: memory_ns(bytes.0),
            beyond_l2_ns: memory_ns(beyond_l2),
        }
    }

    /// See [`roofline_ns`].
    #[must_use]
    #[inline]
    pub fn roofline_ns(self) -> f64 {
        self.compute_ns.max(self.memory_ns)
    }

    /// See [`floor_ns`].
    #[must_use]
    #[inline]
    pub fn floor_ns(self) -> f64 {
        self.compute_ns.max(self.beyond_l2_ns)
    }
}

/// Roofline time in ns: the larger of compute and memory time (Williams et al. 2009).
///
/// Matrix products and attention run on the tensor cores, all else on the fp32 units; both peaks are
/// taken at the highest clock. Every byte is counted at memory bandwidth, so for data that stays in
/// the L2 cache a measured time may beat it: it normalises, [`floor_ns`] judges.
#[must_use]
pub fn roofline_ns(shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
    Sides::of(shape, gpu).roofline_ns()
}

/// Time in ns that no measurement can beat: compute at peak, and memory traffic beyond the L2 cache.
///
/// Up to one L2 cache of the operands may already be resident, so only what exceeds it counts.
#[must_use]
pub fn floor_ns(shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
    Sides::of(shape, gpu).floor_ns()
}

/// Peak of the tensor cores at the highest clock, FLOP/s.
#[must_use]
pub fn tensor_flops_per_s(gpu: &GpuSpec) -> f64 {
    at_highest_clock(gpu.bf16_flops_per_s, gpu)
}

/// A peak that is stated at the rated clock, at the highest.
fn at_highest_clock(flops_per_s: f64, gpu: &GpuSpec) -> f64 {
    flops_per_s * (f64::from(gpu.max_clock_mhz) / f64::from(gpu.boost_clock_mhz))
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

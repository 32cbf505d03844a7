//! Carrying a predictor over to another GPU by the two data sheets.

use plumbline_schema::GpuSpec;
use serde::{Deserialize, Serialize};

use super::{HeldOutError, OperatorPredictor, RatioRange};

/// Another GPU's predictor that was carried over to this bundle's GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransferredFrom {
    /// The GPU that was measured: features and domain are of it.
    pub gpu: GpuSpec,
    /// Samples of this bundle's GPU that overhead and coefficients were adapted to; 0 when carried over by data sheets
    /// alone.
    pub num_samples: u32,
    /// Fixed cost of a launch on the GPU that was measured, ns, above 0: the forest's features are relative to it.
    pub overhead_ns: f64,
    /// Share of the measured GPU's `ln(time / baseline)` that is taken to hold, 0..=1; at 0 the baseline alone counts.
    pub ratio_share: f64,
    /// Digest of the samples of the measured GPU; the predictor's own is then of those of this bundle's GPU, if any.
    pub samples_digest: String,
}

impl TransferredFrom {
    /// Checks what a prediction relies on.
    pub(super) fn check(&self) -> Result<(), String> {
        let Self { overhead_ns, ratio_share, .. } = *self;
        if !(overhead_ns.is_finite() && overhead_ns > 0.0) {
            return Err(format!("transferred_from.overhead_ns = {overhead_ns}, expected above 0"));
        }
        if !(0.0..=1.0).contains(&ratio_share) {
            return Err(format!("transferred_from.ratio_share = {ratio_share}, expected 0 to 1"));
        }
        Ok(())
    }
}

/// What a roofline part of a baseline is bound by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartKind {
    /// The tensor cores.
    Tensor,
    /// The SMs' other units.
    Scalar,
    /// Memory, or the larger of memory and arithmetic of operators that have little of the latter.
    Memory,
    /// Nothing of a data sheet: steps that take some clock cycles each.
    Fixed,
}

impl PartKind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Tensor, Self::Scalar, Self::Memory, Self::Fixed];

    /// The kind of a part, by its name among [`part_names`](crate::features::part_names).
    #[must_use]
    pub fn of(name: &str) -> Self {
        match name {
            "compute" | "waves" | "prefill_products" | "path_products" | "room_products"
            | "busiest_products" => Self::Tensor,
            "prefill_exps" | "path_exps" => Self::Scalar,
            "k_steps" | "prefill_waves" | "prefill_joins" | "decode_waves" | "decode_steps" | "is_split"
            | "decode_joins" | "both_kinds" | "room_split" | "room_tiles" | "small_tile_fill" => Self::Fixed,
            _ => Self::Memory,
        }
    }
}

/// Share of the ratio that is taken to hold on a GPU of another architecture, about which nothing is known: libraries
/// choose other kernels there, so that it may hold or not.
const OTHER_ARCHITECTURE_SHARE: f64 = 0.5;

/// Times of another architecture lie within this factor of what data sheets say, as often as intervals promise: the shares
/// of clocks and peaks that kernels reach differ by a fifth or so.
const OTHER_ARCHITECTURE_FACTOR: f64 = 1.4;

impl OperatorPredictor {
    /// The predictor of a GPU of which only the data sheet is known, made of that of a GPU that was measured.
    ///
    /// Parts of the baseline become those of the target by its peaks. What takes a number of clock cycles, the overhead
    /// and [`PartKind::Fixed`] parts, takes the same number, as latencies of caches and memory do (about as many
    /// cycles on an H100 as on an A100: Luo et al. 2024, arXiv 2402.13499), at the highest clock, as a short launch finds
    /// it. Tensor cores draw the clock down from there, so a GPU reaches its share of the peak at the rated clock and not
    /// at the highest, which the roofline is taken at. Of another architecture half of the ratio is taken to hold, and
    /// the interval is wider.
    ///
    /// A predictor that was carried over before is carried on from the GPU that it is for.
    #[must_use]
    pub fn carried_to(&self, source: &GpuSpec, target: &GpuSpec) -> Self {
        let cycle = f64::from(source.max_clock_mhz) / f64::from(target.max_clock_mhz);
        let headroom = |gpu: &GpuSpec| f64::from(gpu.max_clock_mhz) / f64::from(gpu.boost_clock_mhz);
        let rated_peak = headroom(target) / headroom(source);
        let is_same = source.compute_capability == target.compute_capability;
        let share = if is_same { 1.0 } else { OTHER_ARCHITECTURE_SHARE };
        let factor = if is_same { 1.0 } else { OTHER_ARCHITECTURE_FACTOR };
        let from = self.transferred_from.as_ref();
        let mut carried = self.clone();
        carried.overhead_ns *= cycle;
        for part in &mut carried.parts {
            part.coefficient *= match PartKind::of(&part.name) {
                PartKind::Tensor => rated_peak,
                PartKind::Fixed => cycle,
                PartKind::Scalar | PartKind::Memory => 1.0,
            };
        }
        carried.transferred_from = Some(TransferredFrom {
            gpu: from.map_or(source, |from| &from.gpu).clone(),
            num_samples: 0,
            overhead_ns: from.map_or(self.overhead_ns, |from| from.overhead_ns),
            ratio_share: share * from.map_or(1.0, |from| from.ratio_share),
            samples_digest: from.map_or(&self.samples_digest, |from| &from.samples_digest).clone(),
        });
        let range = &mut carried.interval.extrapolated;
        *range = RatioRange { low: range.low.min(1.0 / factor), high: range.high.max(factor) };
        // Those are of the GPU that was measured.
        carried.error = HeldOutError::default();
        carried
    }
}

#[cfg(test)]
mod tests {
    use plumbline_schema::{Heads, Operator, OperatorShape, StepBatch};

    use super::*;
    use crate::features::{part_names, parts_ns};

    /// By which factor each part grows when the data sheet is changed; `None` for parts that are not in the shape.
    fn growth(operator: Operator, change: impl Fn(&mut GpuSpec)) -> Vec<Option<f64>> {
        let shape = match operator {
            Operator::Attention => {
                let load = StepBatch::parse("300:1000;64:9000", "4000;900").unwrap().shape().attention;
                let heads = Heads { num_q_heads: 8, num_kv_heads: 2, head_dim: 128 };
                OperatorShape::Attention { heads, load }
            }
            operator if operator.is_gemm() => OperatorShape::Gemm { m: 3000, n: 4096, k: 4096 },
            _ => OperatorShape::RmsNorm { num_tokens: 3000, hidden_size: 8192 },
        };
        let gpu = GpuSpec::by_name("h100-sxm5-80gb").unwrap();
        let mut changed = gpu.clone();
        change(&mut changed);
        let (before, after) = (parts_ns(&shape, &gpu), parts_ns(&shape, &changed));
        let grown = before.as_slice().iter().zip(after.as_slice());
        grown.map(|(before, after)| (*before > 0.0).then(|| after / before)).collect()
    }

    #[test]
    fn parts_follow_what_their_kind_says() {
        for operator in [Operator::OProj, Operator::Attention, Operator::RmsNorm] {
            let tensor = growth(operator, |gpu| gpu.bf16_flops_per_s /= 2.0);
            let scalar = growth(operator, |gpu| gpu.fp32_flops_per_s /= 2.0);
            let memory = growth(operator, |gpu| gpu.hbm_bandwidth_bytes_per_s /= 2.0);
            for (i, &name) in part_names(operator).iter().enumerate() {
                let (Some(tensor), Some(scalar), Some(memory)) = (tensor[i], scalar[i], memory[i]) else {
                    continue;
                };
                let grows = [tensor, scalar, memory].map(|factor| factor > 1.5);
                let expected = match PartKind::of(name) {
                    PartKind::Tensor => [true, false, false],
                    PartKind::Scalar => [false, true, false],
                    PartKind::Memory => [false, false, true],
                    PartKind::Fixed => [false, false, false],
                };
                // Attention's is that of arithmetic in this batch.
                let is_either = operator == Operator::Attention && name == "roofline";
                assert!(grows == expected || is_either, "{operator} {name}: {grows:?}");
            }
        }
    }
}

//! How near the measured operators come to what this very card can do, and to the kernels of an engine.
//!
//! The ceilings are the bundle's own: the rate of a large device copy and of a large matrix product, stored with its
//! evidence. Start with [`Efficiency::of`]; [`peers`] compares with an engine's kernels at the same shapes.

pub mod peers;

use std::fmt;

use plumbline_schema::{Operator, OperatorShape, StepBatch, model::BF16_BYTES};
use serde::Serialize;

use crate::{
    bundle::Bundle,
    error::BundleError,
    samples::{CacheState, Sample},
};
use peers::{Comparison, Peer};

/// Elementwise operators are judged where their traffic exceeds the L2 cache this many times.
const LARGE_L2_MULTIPLE: u64 = 2;
/// Decodes are judged from this many bytes of keys and values.
const LARGE_KV_BYTES: u64 = 1_000_000_000;
/// Prefills are judged where each of their prompts attends over so many tokens, context and chunk together,
const LARGE_PREFILL_TOKENS: std::ops::RangeInclusive<u32> = 8_192..=16_384;
/// and takes at least so long at the matmul ceiling, ns: fewer heads do not fill a large GPU.
const LARGE_PREFILL_NS: f64 = 100_000.0;
/// A matrix product, and each chunk of a prefill, has at least this many tokens.
const LARGE_STEP_TOKENS: u64 = 2_048;
/// Prefills are judged at this width of a head.
const PREFILL_HEAD_DIM: u32 = 128;

/// Share of the ceiling that a prefill is to reach.
const PREFILL_TARGET: f64 = 0.70;
/// Share of the ceiling that decodes and elementwise operators are to reach.
const MEMORY_TARGET: f64 = 0.88;

/// What the card was seen to reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ceilings {
    /// A large device copy, read plus written, bytes/s.
    pub copy_bandwidth_bytes_per_s: f64,
    /// A large bf16 matrix product, FLOP/s.
    pub matmul_flops_per_s: f64,
    /// L2 cache, bytes.
    pub l2_bytes: u64,
}

/// Which ceiling a launch runs into first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// The device copy's bandwidth.
    Copy,
    /// The matrix product's rate.
    Matmul,
}

impl Bound {
    /// The name in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Matmul => "matmul",
        }
    }
}

/// The rates of one sample.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rate {
    /// The launch's numbers, in the order of the operator's shape columns.
    pub shape: Vec<u64>,
    /// An attention launch's prefill chunks, `tokens:context;...`; empty for other operators.
    pub prefill_chunks_tokens_context: String,
    /// An attention launch's decode contexts; empty for other operators.
    pub decode_contexts: String,
    /// Cold or hot.
    pub cache: CacheState,
    /// Median time, ns.
    pub time_ns: f64,
    /// Least traffic of the launch over its time, bytes/s.
    pub bytes_per_s: f64,
    /// Work of the launch over its time, FLOP/s.
    pub flops_per_s: f64,
    /// The ceiling that takes longer for this launch.
    pub bound: Bound,
    /// Time at that ceiling over the time measured, 0..1 but for a ceiling that was measured low; `None` where
    /// the launch lives in the L2 cache.
    pub share: Option<f64>,
    /// Marks of the sample.
    pub flags: String,
}

/// Large inputs of one kind that are judged together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Causal prefill of 128-wide heads that takes at least 100 us at the ceiling, every chunk with at least 2,048 tokens
    /// and, with its context, 8,192 to 16,384.
    Prefill,
    /// Decodes over at least 1 GB of keys and values.
    Decode,
    /// Elementwise operators with traffic above twice the L2 cache.
    Elementwise,
    /// Matrix products of at least 2,048 tokens; no target, since the library's kernel runs.
    Gemm,
}

impl Class {
    /// The share of its ceiling that the class is to reach; `None` without a target.
    #[must_use]
    pub const fn target(self) -> Option<f64> {
        match self {
            Self::Prefill => Some(PREFILL_TARGET),
            Self::Decode | Self::Elementwise => Some(MEMORY_TARGET),
            Self::Gemm => None,
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Elementwise => "elementwise",
            Self::Gemm => "gemm",
        })
    }
}

/// The shares of one operator's large inputs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OperatorEfficiency {
    /// The operator.
    pub operator: Operator,
    /// What is judged.
    pub class: Class,
    /// The ceiling that the median one runs into.
    pub bound: Bound,
    /// Large samples with a share.
    pub num_large: usize,
    /// Those of them measured while clocks were held down.
    pub num_throttled: usize,
    /// The highest share.
    pub best: Rate,
    /// The middle share; the lower one of an even count.
    pub median: Rate,
    /// The lowest share.
    pub worst: Rate,
    /// The share to reach; `None` without a target.
    pub target: Option<f64>,
    /// Large samples that reach it.
    pub num_met: usize,
    /// Whether the median reaches it; `None` without a target.
    pub is_met: Option<bool>,
}

/// What the operators of a bundle reach, and how they stand against an engine's kernels.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Efficiency {
    /// Plumbline's name of the GPU.
    pub gpu: String,
    /// What the card was seen to reach.
    pub ceilings: Ceilings,
    /// Operators with large inputs, in the order of the forward pass; attention once a phase.
    pub operators: Vec<OperatorEfficiency>,
    /// Operators that were measured, yet at no large input.
    pub without_large: Vec<Operator>,
    /// A row for each operator and phase of an engine's kernels; empty for a GPU without any.
    pub peers: Vec<Comparison>,
}

impl Efficiency {
    /// Judges the samples of a bundle.
    ///
    /// # Errors
    /// `Missing` when the bundle has no samples or its evidence lacks a ceiling; those of reading its parts.
    pub fn of(bundle: &Bundle) -> Result<Self, BundleError> {
        let ceilings = Ceilings::of(bundle)?;
        let samples = bundle.samples()?;
        let predictors =
            if bundle.predicted_operators().next().is_some() { Some(bundle.predictors()?) } else { None };
        let gpu = &bundle.manifest.gpu.name;
        let peers = Peer::shipped(gpu)?;
        Ok(Self {
            gpu: gpu.clone(),
            ceilings,
            operators: judge(&samples, &ceilings),
            without_large: without_large(&samples, &ceilings),
            peers: peers::compare(peers, &samples, predictors.as_ref()),
        })
    }
}

impl Ceilings {
    /// The ceilings that a bundle's evidence holds.
    ///
    /// # Errors
    /// `Missing` when one was not measured.
    pub fn of(bundle: &Bundle) -> Result<Self, BundleError> {
        let manifest = &bundle.manifest;
        let evidence = manifest.evidence.as_ref();
        let rates = evidence.and_then(|e| e.copy_bandwidth_bytes_per_s.zip(e.matmul_flops_per_s));
        let is_rate = |rate: f64| rate.is_finite() && rate > 0.0;
        match rates {
            Some((copy, matmul)) if is_rate(copy) && is_rate(matmul) => Ok(Self {
                copy_bandwidth_bytes_per_s: copy,
                matmul_flops_per_s: matmul,
                l2_bytes: manifest.device.as_ref().map_or(manifest.gpu.l2_bytes.0, |device| device.l2_bytes),
            }),
            _ => Err(BundleError::Missing {
                path: bundle.root.clone(),
                what: "measured copy bandwidth and matrix-product rate in its evidence".into(),
                hint: "`plumb profile` measures them on the GPU itself".into(),
            }),
        }
    }

    /// The rates of a sample.
    ///
    /// Only matrix products and attention run on the tensor cores that the matrix product's rate stands for;
    /// everything else is bound by memory.
    #[must_use]
    pub fn rate(&self, sample: &Sample) -> Rate {
        let (bytes, flops) = (sample.shape.bytes().0 as f64, sample.shape.flops().0 as f64);
        let time_ns = sample.stats.p50_ns;
        let copy_ns = bytes / self.copy_bandwidth_bytes_per_s * 1e9;
        let matmul_ns = match sample.shape {
            OperatorShape::Gemm { .. } | OperatorShape::Attention { .. } => {
                flops / self.matmul_flops_per_s * 1e9
            }
            _ => 0.0,
        };
        let bound = if matmul_ns > copy_ns { Bound::Matmul } else { Bound::Copy };
        let is_in_l2 = sample.cache == CacheState::Hot && sample.shape.bytes().0 <= self.l2_bytes;
        let has_share = bound == Bound::Matmul || !is_in_l2;
        let batch = sample.batch.as_ref();
        Rate {
            shape: sample.shape.values(),
            prefill_chunks_tokens_context: batch.map(StepBatch::format_prefill_chunks).unwrap_or_default(),
            decode_contexts: batch.map(StepBatch::format_decode_contexts).unwrap_or_default(),
            cache: sample.cache,
            time_ns,
            bytes_per_s: bytes / time_ns * 1e9,
            flops_per_s: flops / time_ns * 1e9,
            bound,
            share: has_share.then(|| copy_ns.max(matmul_ns) / time_ns),
            flags: sample.flags.clone(),
        }
    }

    /// The class of large inputs that a sample belongs to; `None` for a small one, and for one under the floor,
    /// which cannot be true.
    #[must_use]
    pub fn class(&self, sample: &Sample) -> Option<Class> {
        if sample.has_flag("below_floor") {
            return None;
        }
        match sample.shape {
            OperatorShape::Attention { heads, load } => {
                let kv_bytes = 2 * BF16_BYTES * heads.kv_width() * load.decode_kv_tokens;
                if load.num_prefill_seqs == 0 {
                    return (kv_bytes >= LARGE_KV_BYTES).then_some(Class::Decode);
                }
                let is_judged = heads.head_dim == PREFILL_HEAD_DIM && load.num_decode_seqs == 0;
                let at_ceiling_ns = sample.shape.flops().0 as f64 / self.matmul_flops_per_s * 1e9;
                let is_large = is_judged
                    && self.rate(sample).bound == Bound::Matmul
                    && at_ceiling_ns >= LARGE_PREFILL_NS
                    && is_long(sample);
                is_large.then_some(Class::Prefill)
            }
            OperatorShape::Gemm { m, .. } => (u64::from(m) >= LARGE_STEP_TOKENS).then_some(Class::Gemm),
            OperatorShape::Collective { .. } => None,
            _ => (sample.shape.bytes().0 > LARGE_L2_MULTIPLE * self.l2_bytes).then_some(Class::Elementwise),
        }
    }
}

/// Whether every chunk of a prefill has thousands of tokens and attends over still more.
fn is_long(sample: &Sample) -> bool {
    let Some(batch) = &sample.batch else { return false };
    batch.prefill_chunks.iter().all(|chunk| {
        u64::from(chunk.num_tokens) >= LARGE_STEP_TOKENS
            && LARGE_PREFILL_TOKENS.contains(&chunk.num_tokens.saturating_add(chunk.context_len))
    })
}

/// The shares of every operator's large inputs.
#[must_use]
pub fn judge(samples: &[Sample], ceilings: &Ceilings) -> Vec<OperatorEfficiency> {
    let mut judged = Vec::new();
    for operator in Operator::ALL {
        for class in [Class::Prefill, Class::Decode, Class::Elementwise, Class::Gemm] {
            let own = samples.iter().filter(|s| s.operator == operator && ceilings.class(s) == Some(class));
            judged.extend(summarise(operator, class, own.map(|sample| ceilings.rate(sample)).collect()));
        }
    }
    judged
}

fn summarise(operator: Operator, class: Class, rates: Vec<Rate>) -> Option<OperatorEfficiency> {
    let mut rates: Vec<(f64, Rate)> =
        rates.into_iter().filter_map(|rate| rate.share.map(|share| (share, rate))).collect();
    rates.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let (_, worst) = rates.first()?;
    let (_, best) = rates.last()?;
    let (median_share, median) = &rates[(rates.len() - 1) / 2];
    let target = class.target();
    Some(OperatorEfficiency {
        operator,
        class,
        bound: median.bound,
        num_large: rates.len(),
        num_throttled: rates.iter().filter(|(_, r)| r.flags.split('|').any(|f| f == "throttled")).count(),
        best: best.clone(),
        median: median.clone(),
        worst: worst.clone(),
        target,
        num_met: target.map_or(0, |target| rates.iter().filter(|(share, _)| *share >= target).count()),
        is_met: target.map(|target| *median_share >= target),
    })
}

fn without_large(samples: &[Sample], ceilings: &Ceilings) -> Vec<Operator> {
    let has = |operator: Operator, test: &dyn Fn(&Sample) -> bool| {
        samples.iter().any(|sample| sample.operator == operator && test(sample))
    };
    let is_large = |sample: &Sample| ceilings.class(sample).is_some();
    Operator::ALL.into_iter().filter(|&o| has(o, &|_| true) && !has(o, &is_large)).collect()
}

#[cfg(test)]
mod tests;

//! What a simulation's steps asked of the GPUs: time, launches, work and traffic of each operator.

use std::{collections::BTreeMap, ops::AddAssign};

use plumbline_schema::{AttentionLoad, BatchShape, GpuSpec, Nanos, Operator, OperatorShape, forward_pass};
use serde::{Deserialize, Serialize};

use super::{DependsOn, StepTimeModel, depends_on, scale_of};
use crate::times::OperatorTimes;

/// What all launches of one operator came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OperatorUsage {
    /// GPU time with the profile's factors, ns.
    pub gpu_time_ns: f64,
    /// Launches by kernel, whether the host launched each or a graph held them.
    pub num_launches: u64,
    /// Floating-point operations ([`OperatorShape::flops`](plumbline_schema::OperatorShape::flops)), padding included.
    pub flops: f64,
    /// Least memory traffic ([`OperatorShape::bytes`](plumbline_schema::OperatorShape::bytes)), padding included.
    pub bytes: f64,
}

impl AddAssign for OperatorUsage {
    fn add_assign(&mut self, other: Self) {
        self.gpu_time_ns += other.gpu_time_ns;
        self.num_launches += other.num_launches;
        self.flops += other.flops;
        self.bytes += other.bytes;
    }
}

/// What a simulation's steps asked of the GPUs, summed.
///
/// Of tensor-parallel GPUs, which do the same at the same time, one is counted; of pipeline stages each. Several
/// replicas' usages add up with `+=`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Each operator that was launched, in the order of the forward pass.
    pub operators: BTreeMap<Operator, OperatorUsage>,
    /// Steps.
    pub num_steps: u64,
    /// GPUs that the sums are over: one a pipeline stage and replica.
    pub num_gpus: u32,
    /// Operations that the model needs: of matrix products and attention, over real tokens and sequences, no padding.
    pub model_flops: f64,
}

impl Usage {
    /// GPU time of all operators, ns.
    #[must_use]
    pub fn gpu_time_ns(&self) -> f64 {
        self.operators.values().map(|usage| usage.gpu_time_ns).sum()
    }

    /// An operator's share of all operators' GPU time, 0..1; 0 where nothing was launched.
    #[must_use]
    pub fn time_share(&self, operator: Operator) -> f64 {
        let total = self.gpu_time_ns();
        let own = self.operators.get(&operator).map_or(0.0, |usage| usage.gpu_time_ns);
        if total > 0.0 { own / total } else { 0.0 }
    }

    /// Model FLOPs utilisation of a GPU over a span of time: [`Self::model_flops`] a GPU over what it computes in the
    /// span at its bf16 peak. `None` for no time or no GPU.
    ///
    /// As Vidur counts it (`vidur/utils/mfu_calculator.py` and `param_counter.py`: two operations a token and parameter of
    /// the layers, and attention), but for three things: attention counts the causal pairs only, the LM head counts with
    /// one row a sequence, and the peak is the data sheet's, in units of 10^12 and not of 2^40. Vidur divides by the
    /// time of a batch; give that of the GPU ([`Self::gpu_time_ns`] a GPU) for the same, or a run's length for what the
    /// run made of its GPUs.
    #[must_use]
    pub fn mfu(&self, gpu: &GpuSpec, span: Nanos) -> Option<f64> {
        self.share_of_peak(self.model_flops, gpu.bf16_flops_per_s, span)
    }

    /// Memory bandwidth utilisation of a GPU over a span of time: the bytes that its operators move at least over what
    /// it moves in the span at its data sheet's bandwidth. `None` for no time or no GPU.
    ///
    /// The ratio of achieved to peak bandwidth of Agarwal et al. 2023 ("LLM Inference Performance Engineering: Best
    /// Practices", Databricks), who count weights and KV cache; activations are counted here too, and messages between
    /// GPUs are not. What stays in the L2 cache is counted like the rest. Vidur has no such number.
    #[must_use]
    pub fn mbu(&self, gpu: &GpuSpec, span: Nanos) -> Option<f64> {
        let within_gpu = self.operators.iter().filter(|(operator, _)| !operator.is_collective());
        let bytes = within_gpu.map(|(_, usage)| usage.bytes).sum();
        self.share_of_peak(bytes, gpu.hbm_bandwidth_bytes_per_s, span)
    }

    fn share_of_peak(&self, amount: f64, peak_per_s: f64, span: Nanos) -> Option<f64> {
        let possible = peak_per_s * (span.0 as f64 / 1e9) * f64::from(self.num_gpus);
        (possible > 0.0).then(|| amount / possible)
    }
}

impl AddAssign<&Usage> for Usage {
    fn add_assign(&mut self, other: &Self) {
        for (&operator, &usage) in &other.operators {
            *self.operators.entry(operator).or_default() += usage;
        }
        self.num_steps += other.num_steps;
        self.num_gpus += other.num_gpus;
        self.model_flops += other.model_flops;
    }
}

/// What the tables' counters do not tell of the steps since [`StepTimeModel::reset_usage`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Used {
    num_tokens: u64,
    num_seqs: u64,
    /// Attention of one layer, by whether the batch was of decodes alone.
    attention: [AttentionUsed; 2],
}

/// Attention of one layer over steps: its time and the sums that its work grows with.
#[derive(Clone, Copy, Debug, Default)]
struct AttentionUsed {
    num_steps: u64,
    /// Before the profile's factor.
    time_ns: f64,
    num_queries: u64,
    kv_tokens: u128,
    pairs: u128,
}

impl<T: OperatorTimes> StepTimeModel<T> {
    /// What the steps timed since [`Self::reset_usage`] (or since the model was made) asked of the GPUs.
    ///
    /// The sums are over one replica's GPUs; when several replicas share the model, give
    /// [`Usage::num_gpus`] their number of stages together.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let mut usage = Usage { num_gpus: self.stages.len() as u32, ..Usage::default() };
        let scales = &self.profile.operator_scales;
        for (times, calls) in self.by_tokens.uses().chain(self.by_seqs.uses()) {
            for call in calls {
                let num_uses: u64 = times.num_uses.iter().sum();
                if num_uses == 0 {
                    continue;
                }
                let [mixed, decode_only] = times.num_uses.map(|uses| uses as f64);
                let scaled = mixed * scale_of(scales, call.operator, false)
                    + decode_only * scale_of(scales, call.operator, true);
                let num_launches = num_uses * u64::from(call.repeats);
                *usage.operators.entry(call.operator).or_default() += OperatorUsage {
                    gpu_time_ns: call.time_ns * scaled,
                    num_launches,
                    flops: call.shape.flops().0 as f64 * num_launches as f64,
                    bytes: call.shape.bytes().0 as f64 * num_launches as f64,
                };
            }
        }
        self.add_attention(&mut usage);
        usage.model_flops += self.gemm_flops();
        usage
    }

    /// Begins a new count for [`Self::usage`], so that a model used for several simulations reports each alone.
    pub fn reset_usage(&mut self) {
        self.used = Used::default();
        self.by_tokens.reset_uses();
        self.by_seqs.reset_uses();
    }

    fn add_attention(&self, usage: &mut Usage) {
        let layers = f64::from(self.model.num_layers);
        // Attention's work is a sum over queries, keys and pairs: one of each says how much each adds.
        let one = |load| OperatorShape::Attention { heads: self.heads, load };
        let query = one(AttentionLoad { num_prefill_tokens: 1, ..AttentionLoad::default() });
        let key = one(AttentionLoad { prefill_kv_tokens: 1, ..AttentionLoad::default() });
        let pair = one(AttentionLoad { prefill_pairs: 1, ..AttentionLoad::default() });
        for (used, is_decode_only) in self.used.attention.iter().zip([false, true]) {
            if used.num_steps == 0 {
                continue;
            }
            let scale = scale_of(&self.profile.operator_scales, Operator::Attention, is_decode_only);
            let amounts =
                [(query, used.num_queries as f64), (key, used.kv_tokens as f64), (pair, used.pairs as f64)];
            let flops: f64 = amounts.iter().map(|(one, amount)| one.flops().0 as f64 * amount).sum();
            let bytes: f64 = amounts.iter().map(|(one, amount)| one.bytes().0 as f64 * amount).sum();
            *usage.operators.entry(Operator::Attention).or_default() += OperatorUsage {
                gpu_time_ns: layers * used.time_ns * scale,
                num_launches: used.num_steps * u64::from(self.model.num_layers),
                flops: layers * flops,
                bytes: layers * bytes,
            };
            usage.num_steps += used.num_steps;
            usage.model_flops += layers * flops;
        }
    }

    /// Operations of the matrix products of all steps, without padding: they grow with tokens and sequences.
    fn gemm_flops(&self) -> f64 {
        let one = BatchShape { num_tokens: 1, num_seqs: 1, ..BatchShape::default() };
        let tp = self.deployment.tensor_parallel_size;
        let calls = forward_pass(&self.model, &one, tp).expect("a split that was checked");
        let flops = |on| -> f64 {
            let gemms = calls.iter().filter(|c| c.operator.is_gemm() && depends_on(c.operator) == on);
            gemms.map(|c| c.shape.flops().0 as f64 * f64::from(c.repeats)).sum()
        };
        flops(DependsOn::Tokens) * self.used.num_tokens as f64
            + flops(DependsOn::Seqs) * self.used.num_seqs as f64
    }
}

impl Used {
    /// Counts a step whose attention takes so long a layer.
    #[inline]
    pub fn count(&mut self, batch: &BatchShape, attention_ns: f64) {
        let load = &batch.attention;
        self.num_tokens += u64::from(batch.num_tokens);
        self.num_seqs += u64::from(batch.num_seqs);
        let used = &mut self.attention[usize::from(load.num_prefill_seqs == 0)];
        used.num_steps += 1;
        used.time_ns += attention_ns;
        used.num_queries += u64::from(load.num_prefill_tokens) + u64::from(load.num_decode_seqs);
        used.kv_tokens += u128::from(load.prefill_kv_tokens) + u128::from(load.decode_kv_tokens);
        used.pairs += u128::from(load.prefill_pairs) + u128::from(load.decode_kv_tokens);
    }
}

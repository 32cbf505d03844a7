//! `engines/<name>.json`: how one engine spends what a machine can do.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How a step's kernels reach the GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dispatch {
    /// A call per kernel.
    Eager,
    /// Captured pieces between the attention launches.
    PiecewiseGraph,
    /// One captured graph.
    FullGraph,
}

impl Dispatch {
    /// Every dispatch.
    pub const ALL: [Self; 3] = [Self::Eager, Self::PiecewiseGraph, Self::FullGraph];

    /// The name in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Eager => "eager",
            Self::PiecewiseGraph => "piecewise_graph",
            Self::FullGraph => "full_graph",
        }
    }
}

/// A host cost that grows with the batch: `constant + per_seq * num_seqs + per_token * num_tokens`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostCost {
    /// Per step, ns.
    pub constant_ns: f64,
    /// Per sequence of the batch, ns.
    pub per_seq_ns: f64,
    /// Per token of the batch (unpadded), ns.
    pub per_token_ns: f64,
}

impl HostCost {
    /// The cost of a batch, ns.
    #[must_use]
    pub fn at(&self, num_seqs: u32, num_tokens: u32) -> f64 {
        self.constant_ns + self.per_seq_ns * f64::from(num_seqs) + self.per_token_ns * f64::from(num_tokens)
    }
}

/// Costs of a step under one dispatch, at host factor 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DispatchCosts {
    /// Host work before the first kernel: scheduling, preparing inputs.
    pub host_pre: HostCost,
    /// Host work after the last kernel: reading tokens, updating requests.
    pub host_post: HostCost,
    /// Host time per launch, ns; the launches are the forward pass's kernels (eager), two per layer
    /// (piecewise: a captured piece and attention) or one (full graph).
    pub launch_ns: f64,
    /// Added to the first step after an idle gap, ns.
    pub after_idle_ns: f64,
    /// Quantiles, evenly spaced from 0 to 1, of real over predicted step time; empty for none.
    pub residual_quantiles: Vec<f64>,
}

/// What the client and the engine's front do outside of steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientCosts {
    /// Taking in one request, ns.
    pub admit_ns: f64,
    /// Taking in one prompt token, ns.
    pub admit_per_token_ns: f64,
    /// Between the end of a step and the start of the next.
    pub between_steps: HostCost,
}

/// Factors on predicted operator times: an engine's kernels are not the profiler's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatorScales {
    /// Matrix products.
    pub gemm: f64,
    /// Attention of prefill chunks (and of mixed batches).
    pub prefill_attention: f64,
    /// Attention of decode-only batches.
    pub decode_attention: f64,
    /// Everything else.
    pub other: f64,
}

impl Default for OperatorScales {
    fn default() -> Self {
        Self { gemm: 1.0, prefill_attention: 1.0, decode_attention: 1.0, other: 1.0 }
    }
}

/// What a profile was fitted on, so that it can tell when it does not apply.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FittedOn {
    /// GPU of the real runs.
    pub gpu: String,
    /// GPU of the bundle whose operator times were used; differs from `gpu` when transferred.
    pub bundle_gpu: String,
    /// SHA-256 of the bundle's manifest, hex.
    pub bundle_digest: String,
    /// Names of the runs fitted on.
    pub runs: Vec<String>,
    /// Number of steps fitted on, by dispatch name.
    pub num_steps: BTreeMap<String, u64>,
    /// Median absolute error of the steps fitted on, 0..1, by dispatch name.
    pub step_error: BTreeMap<String, f64>,
    /// Parameters the runs could not pin, left at their prior.
    pub not_identified: Vec<String>,
}

/// How one engine spends a machine: scheduler, dispatch and host costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineProfile {
    /// The profile's name: `vllm-0.24-graph`.
    pub name: String,
    /// The engine and its version: `vllm 0.24.0`.
    pub engine: String,
    /// The scheduler's name: `vllm-v1`.
    pub scheduler: String,
    /// Costs by dispatch; a step of a dispatch that is missing is an error.
    pub dispatch: BTreeMap<Dispatch, DispatchCosts>,
    /// Outside of steps.
    pub client: ClientCosts,
    /// Factors on operator times.
    pub operator_scales: OperatorScales,
    /// An idle gap at least this long makes the next step an after-idle one, ns.
    pub idle_threshold_ns: f64,
    /// This host's speed against the one fitted on: host costs are multiplied by it.
    pub host_factor: f64,
    /// What it was fitted on.
    pub fitted_on: FittedOn,
}

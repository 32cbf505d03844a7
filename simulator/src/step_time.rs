//! How long a step takes: the operators' GPU time and the engine's host time, joined by the dispatch.

use std::collections::HashMap;

use plumbline_bundles::{
    Dispatch, DispatchCosts, EngineProfile, PredictError, engine_profile::OperatorScales,
};
use plumbline_schema::{
    BatchShape, Deployment, EngineMode, Heads, ModelSpec, Operator, OperatorShape,
    forward::{self, ParallelismError, forward_pass},
};
use thiserror::Error;

use crate::times::{OperatorTimes, ProvenanceTimes};

pub mod pipeline;

/// Why a step's time cannot be told.
#[derive(Debug, Error)]
pub enum StepTimeError {
    /// The model cannot be split so.
    #[error(transparent)]
    Parallelism(#[from] ParallelismError),
    /// Several GPUs are asked for, and nothing says what their exchange costs.
    #[error("tensor_parallel_size = {tensor_parallel_size} needs times of collectives: {source}")]
    NoCollectives {
        /// GPUs that share a layer.
        tensor_parallel_size: u32,
        /// Why there is no time.
        #[source]
        source: PredictError,
    },
    /// An operator has no time.
    #[error(transparent)]
    Predict(#[from] PredictError),
    /// The profile was not fitted on any step of this kind.
    #[error("engine profile `{profile}` has no costs of {dispatch} steps, which this deployment forms", dispatch = dispatch.name())]
    MissingDispatch {
        /// The profile's name.
        profile: String,
        /// The step's dispatch.
        dispatch: Dispatch,
    },
    /// The profile holds a number that no engine has.
    #[error("engine profile `{profile}`, key `{key}`: expected {expected}, found {found}")]
    InvalidProfile {
        /// The profile's name.
        profile: String,
        /// Dotted path of the key.
        key: String,
        /// What must stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
}

/// The GPU's side of a step before the profile's factors: sums of predicted operator times.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GpuParts {
    /// How the step's kernels reach the GPU.
    pub dispatch: Dispatch,
    /// Tokens through the linear layers, padded to the captured size.
    pub num_tokens: u32,
    /// Whether the batch has no prefill chunk.
    pub is_decode_only: bool,
    /// Matrix products, ns.
    pub gemm_ns: f64,
    /// Attention, when the batch has a prefill chunk, ns; else 0.
    pub prefill_attention_ns: f64,
    /// Attention of a batch of decodes alone, ns; else 0.
    pub decode_attention_ns: f64,
    /// All else, ns.
    pub other_ns: f64,
    /// Launches by the host: kernels (eager), two a layer (piecewise), one (full graph).
    pub num_launches: u32,
    /// The same times by provenance.
    pub provenance: ProvenanceTimes,
}

impl GpuParts {
    /// The step's GPU time under factors, ns.
    #[must_use]
    pub fn scaled_ns(&self, scales: &OperatorScales) -> f64 {
        let gemm = if self.is_decode_only { scales.decode_gemm } else { scales.prefill_gemm };
        self.gemm_ns * gemm
            + self.prefill_attention_ns * scales.prefill_attention
            + self.decode_attention_ns * scales.decode_attention
            + self.other_ns * scales.other
    }
}

/// A step's predicted time and what it is made of, ns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTime {
    /// Unscaled operator times, dispatch and launches.
    pub parts: GpuParts,
    /// Host work before the first kernel.
    pub host_pre_ns: f64,
    /// The operators' time with the profile's factors.
    pub gpu_ns: f64,
    /// The host's time to launch them, waking up included; it overlaps with `gpu_ns`, and the longer counts.
    pub launch_ns: f64,
    /// Host work after the last kernel.
    pub host_post_ns: f64,
    /// What an idle gap before the step adds to `launch_ns`; 0 without one.
    pub after_idle_ns: f64,
    /// Drawn ratio of real to predicted host time; 1 where none was drawn.
    pub residual: f64,
}

impl StepTime {
    /// The sum before the residual, ns.
    #[must_use]
    pub fn predicted_ns(&self) -> f64 {
        self.host_pre_ns + self.gpu_ns.max(self.launch_ns) + self.host_post_ns
    }

    /// Host time that the step waits for, ns: launching counts only where it outlasts the GPU.
    #[must_use]
    pub fn host_critical_ns(&self) -> f64 {
        let launching = if self.launch_ns > self.gpu_ns { self.launch_ns } else { 0.0 };
        self.host_pre_ns + launching + self.host_post_ns
    }

    /// The step's time, ns: the residual stretches the host's part, since it is the host that varies.
    ///
    /// Never below the GPU's time, however fast the host.
    #[must_use]
    pub fn total_ns(&self) -> f64 {
        let scattered = self.predicted_ns() + (self.residual - 1.0) * self.host_critical_ns();
        scattered.max(self.gpu_ns)
    }
}

/// How the engine dispatches a batch, and the tokens it is padded to.
///
/// A graph engine runs a batch of decodes alone as one full graph, any other as piecewise graphs, both
/// padded to the next captured size, and what exceeds the largest size kernel by kernel.
#[must_use]
pub fn dispatch(deployment: &Deployment, batch: &BatchShape) -> (Dispatch, u32) {
    let sizes = &deployment.cudagraph_sizes;
    let captured = sizes.get(sizes.partition_point(|&size| size < batch.num_tokens));
    match (deployment.mode, captured) {
        (EngineMode::Eager, _) | (EngineMode::Graph, None) => (Dispatch::Eager, batch.num_tokens),
        (EngineMode::Graph, Some(&size)) if batch.attention.num_prefill_seqs == 0 => {
            (Dispatch::FullGraph, size)
        }
        (EngineMode::Graph, Some(&size)) => (Dispatch::PiecewiseGraph, size),
    }
}

/// Predicts step times of one model in one deployment under one engine profile.
///
/// All operators but attention depend on the number of tokens or of sequences alone; their times are
/// predicted once for each number and remembered.
#[derive(Clone, Debug)]
pub struct StepTimeModel<T> {
    model: ModelSpec,
    times: T,
    profile: EngineProfile,
    deployment: Deployment,
    heads: Heads,
    num_kernels: u32,
    by_tokens: HashMap<u32, LinearTimes>,
    by_seqs: HashMap<u32, LinearTimes>,
}

/// Times of the operators that see tokens (or sequences) and no context, repeats included.
#[derive(Clone, Copy, Debug, Default)]
struct LinearTimes {
    gemm_ns: f64,
    other_ns: f64,
    provenance: ProvenanceTimes,
}

/// What an operator's time depends on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum DependsOn {
    Tokens,
    Seqs,
    Contexts,
}

fn depends_on(operator: Operator) -> DependsOn {
    match operator {
        Operator::Attention => DependsOn::Contexts,
        Operator::LmHead | Operator::Sample => DependsOn::Seqs,
        _ => DependsOn::Tokens,
    }
}

impl<T: OperatorTimes> StepTimeModel<T> {
    /// Binds a model, its operator times, a profile and a deployment together.
    ///
    /// # Errors
    /// When the model cannot be split as deployed, several GPUs are asked for without times of
    /// collectives, or the profile holds impossible numbers.
    pub fn new(
        model: &ModelSpec,
        times: T,
        profile: &EngineProfile,
        deployment: &Deployment,
    ) -> Result<Self, StepTimeError> {
        profile.check().map_err(|e| StepTimeError::InvalidProfile {
            profile: profile.name.clone(),
            key: e.key,
            expected: e.expected,
            found: e.found,
        })?;
        let tp = deployment.tensor_parallel_size;
        let heads = forward::heads_per_gpu(model, tp)?;
        let one_token = BatchShape { num_tokens: 1, num_seqs: 1, ..BatchShape::default() };
        let calls = forward_pass(model, &one_token, tp)?;
        for call in calls.iter().filter(|call| call.operator.is_collective()) {
            times
                .predict(call.operator, &call.shape)
                .map_err(|source| StepTimeError::NoCollectives { tensor_parallel_size: tp, source })?;
        }
        Ok(Self {
            model: model.clone(),
            times,
            profile: profile.clone(),
            deployment: deployment.clone(),
            heads,
            num_kernels: forward::num_launches(&calls),
            by_tokens: HashMap::new(),
            by_seqs: HashMap::new(),
        })
    }

    /// The engine profile.
    #[must_use]
    pub fn profile(&self) -> &EngineProfile {
        &self.profile
    }

    /// The deployment.
    #[must_use]
    pub fn deployment(&self) -> &Deployment {
        &self.deployment
    }

    /// The operators' times of a batch (unpadded), before the profile's factors.
    ///
    /// # Errors
    /// When an operator has no time.
    pub fn gpu_parts(&mut self, batch: &BatchShape) -> Result<GpuParts, StepTimeError> {
        let (dispatch, num_tokens) = dispatch(&self.deployment, batch);
        let tokens = self.linear(DependsOn::Tokens, num_tokens)?;
        let seqs = self.linear(DependsOn::Seqs, batch.num_seqs)?;
        let shape = OperatorShape::Attention { heads: self.heads, load: batch.attention };
        let launch = self.times.predict(Operator::Attention, &shape)?;
        let attention_ns = launch.time_ns * f64::from(self.model.num_layers);

        let mut provenance = tokens.provenance;
        provenance += seqs.provenance;
        provenance.add(launch.provenance, attention_ns);
        let is_decode_only = batch.attention.num_prefill_seqs == 0;
        Ok(GpuParts {
            dispatch,
            num_tokens,
            is_decode_only,
            gemm_ns: tokens.gemm_ns + seqs.gemm_ns,
            prefill_attention_ns: if is_decode_only { 0.0 } else { attention_ns },
            decode_attention_ns: if is_decode_only { attention_ns } else { 0.0 },
            other_ns: tokens.other_ns + seqs.other_ns,
            num_launches: match dispatch {
                Dispatch::Eager => self.num_kernels,
                Dispatch::PiecewiseGraph => 2 * self.model.num_layers,
                Dispatch::FullGraph => 1,
            },
            provenance,
        })
    }

    /// The time of a step over `batch` (unpadded), residual 1; `after_idle` when the engine idled before.
    ///
    /// # Errors
    /// When an operator has no time, or the profile no costs of the step's dispatch.
    pub fn step_time(&mut self, batch: &BatchShape, after_idle: bool) -> Result<StepTime, StepTimeError> {
        let parts = self.gpu_parts(batch)?;
        let costs = self.costs(parts.dispatch)?;
        let factor = self.profile.host_factor;
        let (num_seqs, num_tokens) = (batch.num_seqs, batch.num_tokens);
        let after_idle_ns = if after_idle { factor * costs.after_idle_ns } else { 0.0 };
        Ok(StepTime {
            parts,
            host_pre_ns: factor * costs.host_pre.at(num_seqs, num_tokens),
            gpu_ns: parts.scaled_ns(&self.profile.operator_scales),
            launch_ns: factor
                * (f64::from(parts.num_launches) * costs.launch_ns
                    + f64::from(num_seqs) * costs.launch_per_seq_ns)
                + after_idle_ns,
            host_post_ns: factor * costs.host_post.at(num_seqs, num_tokens),
            after_idle_ns,
            residual: 1.0,
        })
    }

    /// The profile's costs of a dispatch.
    ///
    /// # Errors
    /// When it has none.
    pub fn costs(&self, dispatch: Dispatch) -> Result<&DispatchCosts, StepTimeError> {
        self.profile
            .dispatch
            .get(&dispatch)
            .ok_or_else(|| StepTimeError::MissingDispatch { profile: self.profile.name.clone(), dispatch })
    }

    /// Times of the operators that depend on `number` tokens or sequences, from memory or predicted.
    fn linear(&mut self, on: DependsOn, number: u32) -> Result<LinearTimes, StepTimeError> {
        let memory = if on == DependsOn::Tokens { &self.by_tokens } else { &self.by_seqs };
        if let Some(times) = memory.get(&number) {
            return Ok(*times);
        }
        let shape = BatchShape { num_tokens: number, num_seqs: number, ..BatchShape::default() };
        let calls = forward_pass(&self.model, &shape, self.deployment.tensor_parallel_size)?;
        let mut sums = LinearTimes::default();
        for call in calls.iter().filter(|call| depends_on(call.operator) == on) {
            let launch = self.times.predict(call.operator, &call.shape)?;
            let time_ns = launch.time_ns * f64::from(call.repeats);
            let sum = if call.operator.is_gemm() { &mut sums.gemm_ns } else { &mut sums.other_ns };
            *sum += time_ns;
            sums.provenance.add(launch.provenance, time_ns);
        }
        let memory = if on == DependsOn::Tokens { &mut self.by_tokens } else { &mut self.by_seqs };
        memory.insert(number, sums);
        Ok(sums)
    }
}

#[cfg(test)]
mod tests;

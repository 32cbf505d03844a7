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

use crate::{
    profile_check,
    times::{OperatorTimes, ProvenanceTimes},
};

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
        expected: &'static str,
        /// What stands there.
        found: f64,
    },
}

/// The GPU's side of a step before the profile's factors: sums of predicted operator times.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GpuParts {
    /// How the step's kernels reach the GPU.
    pub dispatch: Dispatch,
    /// Tokens through the linear layers, padded to the captured size.
    pub num_tokens: u32,
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
        self.gemm_ns * scales.gemm
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
    /// The host's time to launch them, which overlaps with `gpu_ns`: the longer counts.
    pub launch_ns: f64,
    /// Host work after the last kernel.
    pub host_post_ns: f64,
    /// What an idle gap before the step adds; 0 without one.
    pub after_idle_ns: f64,
    /// Drawn ratio of real to predicted host time; 1 where none was drawn.
    pub residual: f64,
}

impl StepTime {
    /// The sum before the residual, ns.
    #[must_use]
    pub fn predicted_ns(&self) -> f64 {
        self.host_pre_ns + self.gpu_ns.max(self.launch_ns) + self.host_post_ns + self.after_idle_ns
    }

    /// Host time that the step waits for, ns: launching counts only where it outlasts the GPU.
    #[must_use]
    pub fn host_critical_ns(&self) -> f64 {
        let launching = if self.launch_ns > self.gpu_ns { self.launch_ns } else { 0.0 };
        self.host_pre_ns + launching + self.host_post_ns + self.after_idle_ns
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
        profile_check::check(profile)?;
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
        Ok(StepTime {
            parts,
            host_pre_ns: factor * costs.host_pre.at(num_seqs, num_tokens),
            gpu_ns: parts.scaled_ns(&self.profile.operator_scales),
            launch_ns: factor * f64::from(parts.num_launches) * costs.launch_ns,
            host_post_ns: factor * costs.host_post.at(num_seqs, num_tokens),
            after_idle_ns: if after_idle { factor * costs.after_idle_ns } else { 0.0 },
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
mod tests {
    use std::{cell::Cell, collections::BTreeMap};

    use plumbline_bundles::{HostCost, Prediction, Provenance, engine_profile::FittedOn};
    use plumbline_schema::StepBatch;

    use super::*;

    /// Every launch takes 100 ns, attention 1,000 ns; counts how often it is asked.
    #[derive(Default)]
    struct FixedTimes {
        num_predictions: Cell<u32>,
    }

    impl OperatorTimes for FixedTimes {
        fn predict(&self, operator: Operator, _shape: &OperatorShape) -> Result<Prediction, PredictError> {
            self.num_predictions.set(self.num_predictions.get() + 1);
            let (time_ns, provenance) = match operator {
                Operator::Attention => (1000.0, Provenance::Interpolated),
                Operator::AllReduce => {
                    let (available, hint) = (String::new(), String::new());
                    return Err(PredictError::MissingOperator { operator, available, hint });
                }
                _ => (100.0, Provenance::Measured),
            };
            Ok(Prediction { time_ns, low_ns: time_ns, high_ns: time_ns, provenance })
        }
    }

    fn costs(constant_ns: f64) -> DispatchCosts {
        DispatchCosts {
            host_pre: HostCost { constant_ns, per_seq_ns: 10.0, per_token_ns: 1.0 },
            host_post: HostCost { constant_ns: 500.0, per_seq_ns: 0.0, per_token_ns: 0.0 },
            launch_ns: 50.0,
            after_idle_ns: 7_000.0,
            residual_quantiles: vec![],
        }
    }

    fn profile() -> EngineProfile {
        EngineProfile {
            name: "test".into(),
            engine: "test 1".into(),
            scheduler: "vllm-v1".into(),
            dispatch: BTreeMap::from([
                (Dispatch::Eager, costs(10_000.0)),
                (Dispatch::FullGraph, costs(1_000.0)),
            ]),
            client: plumbline_bundles::engine_profile::ClientCosts::default(),
            operator_scales: OperatorScales { decode_attention: 2.0, ..OperatorScales::default() },
            idle_threshold_ns: 1e8,
            host_factor: 1.5,
            fitted_on: FittedOn::default(),
        }
    }

    fn deployment(mode: EngineMode) -> Deployment {
        Deployment {
            mode,
            model: "qwen3-0.6b".into(),
            max_num_batched_tokens: 2048,
            max_num_seqs: 256,
            max_model_len: 4096,
            num_gpu_blocks: 1000,
            block_size: 16,
            tensor_parallel_size: 1,
            enable_prefix_caching: false,
            scheduling_policy: "fcfs".into(),
            long_prefill_token_threshold: 0,
            async_scheduling: false,
            cudagraph_sizes: vec![1, 2, 4, 8],
        }
    }

    fn model_of(mode: EngineMode) -> StepTimeModel<FixedTimes> {
        let qwen = ModelSpec::load("qwen3-0.6b").unwrap();
        StepTimeModel::new(&qwen, FixedTimes::default(), &profile(), &deployment(mode)).unwrap()
    }

    fn shape(chunks: &str, decodes: &str) -> BatchShape {
        StepBatch::parse(chunks, decodes).unwrap().shape()
    }

    fn assert_ns(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-6, "{found} ns, expected {expected} ns");
    }

    #[test]
    fn batches_are_dispatched_and_padded_as_a_graph_engine_does() {
        let graph = deployment(EngineMode::Graph);
        assert_eq!(dispatch(&graph, &shape("", "5;5;5")), (Dispatch::FullGraph, 4));
        assert_eq!(dispatch(&graph, &shape("", "5;5;5;5")), (Dispatch::FullGraph, 4));
        assert_eq!(dispatch(&graph, &shape("3:0", "5;5")), (Dispatch::PiecewiseGraph, 8));
        assert_eq!(dispatch(&graph, &shape("9:0", "")), (Dispatch::Eager, 9));
        assert_eq!(dispatch(&deployment(EngineMode::Eager), &shape("", "5")), (Dispatch::Eager, 1));
    }

    /// Worked by hand: 28 layers of 4 GEMMs and 6 others, LM head, embedding, final norm, sampling.
    #[test]
    fn an_eager_step_adds_up() {
        let time = model_of(EngineMode::Eager).step_time(&shape("", "5;9"), false).unwrap();
        assert_ns(time.parts.gemm_ns, 100.0 * f64::from(28 * 4 + 1));
        assert_ns(time.parts.other_ns, 100.0 * f64::from(28 * 6 + 3));
        assert_ns(time.parts.decode_attention_ns, 28_000.0);
        assert_ns(time.parts.prefill_attention_ns, 0.0);
        assert_eq!(time.parts.num_launches, 28 * 11 + 4);
        assert_ns(time.gpu_ns, 28_400.0 + 2.0 * 28_000.0);
        assert_ns(time.launch_ns, 1.5 * 312.0 * 50.0);
        assert_ns(time.host_pre_ns, 1.5 * (10_000.0 + 20.0 + 2.0));
        assert_ns(time.total_ns(), 15_033.0 + 84_400.0 + 750.0);
        assert_ns(time.parts.provenance.measured_ns, 28_400.0);
        assert_ns(time.parts.provenance.interpolated_ns, 28_000.0);
    }

    #[test]
    fn a_prefill_chunk_makes_all_attention_prefill_attention() {
        let parts = model_of(EngineMode::Eager).gpu_parts(&shape("4:0", "5;9")).unwrap();
        assert_ns(parts.prefill_attention_ns, 28_000.0);
        assert_ns(parts.decode_attention_ns, 0.0);
    }

    #[test]
    fn launching_and_idling_count_when_they_dominate() {
        let mut model = model_of(EngineMode::Graph);
        let steady = model.step_time(&shape("", "5;9;9"), false).unwrap();
        assert_eq!((steady.parts.dispatch, steady.parts.num_tokens), (Dispatch::FullGraph, 4));
        assert_eq!(steady.parts.num_launches, 1);
        // Host costs count real tokens, not padded ones.
        assert_ns(steady.host_pre_ns, 1.5 * (1_000.0 + 30.0 + 3.0));
        let woken = model.step_time(&shape("", "5;9;9"), true).unwrap();
        assert_ns(woken.total_ns() - steady.total_ns(), 1.5 * 7_000.0);
        model.profile.host_factor = 1000.0;
        let slow = model.step_time(&shape("300:0", ""), false).unwrap();
        assert_ns(slow.total_ns(), slow.host_pre_ns + slow.launch_ns + slow.host_post_ns);
    }

    #[test]
    fn residuals_stretch_the_host_and_not_the_gpu() {
        let mut model = model_of(EngineMode::Eager);
        let mut gpu_bound = model.step_time(&shape("", "5;9"), false).unwrap();
        gpu_bound.residual = 2.0;
        assert_ns(gpu_bound.total_ns(), 84_400.0 + 2.0 * (15_033.0 + 750.0));
        model.profile.host_factor = 15.0;
        let mut host_bound = model.step_time(&shape("", "5;9"), false).unwrap();
        let predicted = host_bound.total_ns();
        assert_ns(predicted, 150_330.0 + 234_000.0 + 7_500.0);
        host_bound.residual = 1.5;
        assert_ns(host_bound.total_ns(), 1.5 * predicted);
        host_bound.residual = 0.0;
        assert_ns(host_bound.total_ns(), 84_400.0);
    }

    #[test]
    fn only_attention_is_predicted_twice() {
        let mut model = model_of(EngineMode::Graph);
        let before = model.times.num_predictions.get();
        let first = model.gpu_parts(&shape("", "5;9;9")).unwrap();
        let asked = model.times.num_predictions.get();
        assert!(asked - before > 10);
        assert_eq!(model.gpu_parts(&shape("", "6;10;10")).unwrap(), first);
        assert_eq!(model.times.num_predictions.get(), asked + 1);
    }

    #[test]
    fn what_is_missing_is_an_error_by_name() {
        let mut model = model_of(EngineMode::Graph);
        assert_eq!(
            model.step_time(&shape("3:0", ""), false).unwrap_err().to_string(),
            "engine profile `test` has no costs of piecewise_graph steps, which this deployment forms"
        );
        let qwen = ModelSpec::load("qwen3-0.6b").unwrap();
        let two = Deployment { tensor_parallel_size: 2, ..deployment(EngineMode::Eager) };
        let error = StepTimeModel::new(&qwen, FixedTimes::default(), &profile(), &two).err().unwrap();
        assert!(matches!(error, StepTimeError::NoCollectives { tensor_parallel_size: 2, .. }), "{error}");
    }

    #[test]
    fn impossible_profiles_are_refused_by_key() {
        let refused = |change: fn(&mut EngineProfile)| {
            let mut profile = profile();
            change(&mut profile);
            profile_check::check(&profile).unwrap_err().to_string()
        };
        assert_eq!(
            refused(|p| p.host_factor = 0.0),
            "engine profile `test`, key `host_factor`: expected a finite factor above 0, found 0"
        );
        assert_eq!(
            refused(|p| p.dispatch.get_mut(&Dispatch::Eager).unwrap().host_pre.per_seq_ns = f64::NAN),
            "engine profile `test`, key `dispatch.eager.host_pre.per_seq_ns`: expected a finite cost of at least 0 ns, found NaN"
        );
        assert_eq!(
            refused(|p| {
                p.dispatch.get_mut(&Dispatch::Eager).unwrap().residual_quantiles = vec![0.9, 0.8];
            }),
            "engine profile `test`, key `dispatch.eager.residual_quantiles[1]`: expected finite ratios from 0, ascending, found 0.8"
        );
    }
}

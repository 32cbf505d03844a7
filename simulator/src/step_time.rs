//! How long a step takes: the operators' GPU time and the engine's host time, joined by the dispatch.

use plumbline_bundles::{
    Dispatch, DispatchCosts, EngineProfile, PredictError, Prediction, engine_profile::OperatorScales,
};
use plumbline_schema::{
    BatchShape, CudagraphMode, Deployment, EngineMode, Heads, ModelSpec, Operator, OperatorShape,
    forward::{self, ParallelismError, Stage, StagesError, stage_pass},
};
use thiserror::Error;

use crate::times::{OperatorTimes, ProvenanceTimes};

mod linear;
pub mod pipeline;
pub mod timeline;
pub mod timer;
pub mod usage;

use linear::{LinearTable, LinearTimes, PricedCall, StageLinear};
use pipeline::StageTime;
use usage::Used;

/// Why a step's time cannot be told.
#[derive(Debug, Error)]
pub enum StepTimeError {
    /// The model's heads cannot be split so.
    #[error(transparent)]
    Parallelism(#[from] ParallelismError),
    /// The model's layers cannot be split so.
    #[error(transparent)]
    Stages(#[from] StagesError),
    /// Several GPUs are asked for, and nothing says what their exchange costs.
    #[error(
        "tensor_parallel_size = {tensor_parallel_size} and pipeline_parallel_size = {pipeline_parallel_size} need times of collectives: {source}"
    )]
    NoCollectives {
        /// GPUs that share a layer.
        tensor_parallel_size: u32,
        /// Stages of layers.
        pipeline_parallel_size: u32,
        /// Why there is no time.
        #[source]
        source: PredictError,
    },
    /// An operator has no time.
    #[error(transparent)]
    Predict(#[from] PredictError),
    /// An engine runs no step with nothing in it.
    #[error("expected a batch with a prefill chunk or a decode, found an empty one")]
    EmptyBatch,
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
    /// Sequences.
    pub num_seqs: u32,
    /// Whether the batch has no prefill chunk.
    pub is_decode_only: bool,
    /// Matrix products, ns.
    pub gemm_ns: f64,
    /// Attention, when the batch has a prefill chunk, ns; else 0.
    pub prefill_attention_ns: f64,
    /// Attention of a batch of decodes alone, ns; else 0.
    pub decode_attention_ns: f64,
    /// All else, exchange between GPUs included, ns.
    pub other_ns: f64,
    /// Launches by the hosts of all stages: kernels (eager), two a layer (piecewise), one a stage (full graph).
    pub num_launches: u32,
    /// The same times by provenance.
    pub provenance: ProvenanceTimes,
}

impl GpuParts {
    /// Adds attention that takes `attention` a layer.
    #[inline]
    fn add_attention(&mut self, attention: &Prediction, num_layers: u32) {
        let attention_ns = attention.time_ns * f64::from(num_layers);
        self.provenance.add(attention.provenance, attention_ns);
        if self.is_decode_only {
            self.decode_attention_ns = attention_ns;
        } else {
            self.prefill_attention_ns = attention_ns;
        }
    }

    /// The step's GPU time under factors, ns.
    #[must_use]
    #[inline]
    pub fn scaled_ns(&self, scales: &OperatorScales) -> f64 {
        let gemm = if self.is_decode_only { scales.decode_gemm } else { scales.prefill_gemm };
        self.gemm_ns * gemm
            + self.prefill_attention_ns * scales.prefill_attention
            + self.decode_attention_ns * scales.decode_attention
            + self.other_ns * scales.other
    }
}

/// A step's predicted time and what it is made of, ns.
///
/// `docs/step-time.md` has each formula. With pipeline stages the times are those of all stages together, and
/// [`StepTimeModel::stage_times`] has them one by one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTime {
    /// Unscaled operator times with their provenance, dispatch and launches.
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
    #[inline]
    pub fn predicted_ns(&self) -> f64 {
        self.host_pre_ns + self.gpu_ns.max(self.launch_ns) + self.host_post_ns
    }

    /// Host time that the step waits for, ns: launching counts only where it outlasts the GPU.
    #[must_use]
    #[inline]
    pub fn host_critical_ns(&self) -> f64 {
        let launching = if self.launch_ns > self.gpu_ns { self.launch_ns } else { 0.0 };
        self.host_pre_ns + launching + self.host_post_ns
    }

    /// The step's time, ns: the residual stretches the host's part, since it is the host that varies.
    ///
    /// Never below the GPU's time, however fast the host.
    #[must_use]
    #[inline]
    pub fn total_ns(&self) -> f64 {
        let scattered = self.predicted_ns() + (self.residual - 1.0) * self.host_critical_ns();
        scattered.max(self.gpu_ns)
    }
}

/// The next captured size of a number of tokens; `None` in eager mode and above the largest.
fn captured_size(deployment: &Deployment, num_tokens: u32) -> Option<u32> {
    let sizes = &deployment.cudagraph_sizes;
    match deployment.mode {
        EngineMode::Eager => None,
        EngineMode::Graph => sizes.get(sizes.partition_point(|&size| size < num_tokens)).copied(),
    }
}

/// How a graph engine runs a batch that a captured size fits.
fn dispatch_of(mode: CudagraphMode, is_decode_only: bool) -> Dispatch {
    match (mode, is_decode_only) {
        (CudagraphMode::None, _) | (CudagraphMode::FullDecodeOnly, false) => Dispatch::Eager,
        (CudagraphMode::Full, _)
        | (CudagraphMode::FullDecodeOnly | CudagraphMode::FullAndPiecewise, true) => Dispatch::FullGraph,
        (CudagraphMode::Piecewise, _) | (CudagraphMode::FullAndPiecewise, false) => Dispatch::PiecewiseGraph,
    }
}

/// How the engine dispatches a batch, and the tokens it is padded to.
///
/// A graph engine pads what its [`CudagraphMode`] makes a graph of to the next captured size, and runs all else, and
/// what exceeds the largest size, kernel by kernel.
#[must_use]
pub fn dispatch(deployment: &Deployment, batch: &BatchShape) -> (Dispatch, u32) {
    let is_decode_only = batch.attention.num_prefill_seqs == 0;
    let by_mode = dispatch_of(deployment.cudagraph_mode, is_decode_only);
    match captured_size(deployment, batch.num_tokens).filter(|_| by_mode != Dispatch::Eager) {
        Some(captured) => (by_mode, captured),
        None => (Dispatch::Eager, batch.num_tokens),
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
    stages: Vec<Stage>,
    /// Kernels of each stage in eager mode.
    stage_kernels: Vec<u32>,
    /// By [`Dispatch`] as a number, host launches of a step but for eager ones.
    num_launches: [u32; 3],
    /// The profile's costs, by [`Dispatch`] as a number.
    costs: [Option<DispatchCosts>; 3],
    by_tokens: LinearTable,
    by_seqs: LinearTable,
    used: Used,
    /// Of the last steps timed, by [`GpuParts::is_decode_only`]: most often the next is like one but for its contexts.
    bases: [Option<Base>; 2],
    /// What [`Self::stage_times`] lends.
    stage_times: Vec<StageTime>,
}

/// Where a step's times stand.
#[derive(Clone, Copy, Debug)]
struct Places {
    tokens: usize,
    seqs: usize,
}

/// What steps have in common that differ in their contexts alone.
#[derive(Clone, Copy, Debug)]
struct Base {
    /// Unpadded.
    num_tokens: u32,
    num_seqs: u32,
    after_idle: bool,
    places: Places,
    /// All provenance but attention's.
    provenance: ProvenanceTimes,
    /// Of the last such step.
    time: StepTime,
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

/// The profile's factor on an operator; attention's is told apart as its kind of batch is.
fn scale_of(scales: &OperatorScales, operator: Operator, is_decode_only: bool) -> f64 {
    match (operator, is_decode_only) {
        (Operator::Attention, false) => scales.prefill_attention,
        (Operator::Attention, true) => scales.decode_attention,
        (operator, false) if operator.is_gemm() => scales.prefill_gemm,
        (operator, true) if operator.is_gemm() => scales.decode_gemm,
        _ => scales.other,
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
        let stages = forward::stages(model, deployment.pipeline_parallel_size)?;
        let stage_kernels = stages
            .iter()
            .map(|&stage| checked_kernels(model, &times, deployment, stage))
            .collect::<Result<Vec<u32>, _>>()?;
        let num_stages = stages.len();
        Ok(Self {
            model: model.clone(),
            times,
            profile: profile.clone(),
            deployment: deployment.clone(),
            heads,
            num_launches: Dispatch::ALL.map(|dispatch| match dispatch {
                Dispatch::Eager => stage_kernels.iter().sum(),
                Dispatch::PiecewiseGraph => 2 * model.num_layers,
                Dispatch::FullGraph => deployment.pipeline_parallel_size,
            }),
            costs: Dispatch::ALL.map(|dispatch| profile.dispatch.get(&dispatch).cloned()),
            by_tokens: LinearTable::new(deployment.max_num_batched_tokens, num_stages),
            by_seqs: LinearTable::new(deployment.max_num_seqs, num_stages),
            used: Used::default(),
            bases: [None, None],
            stage_times: vec![StageTime::default(); num_stages],
            stages,
            stage_kernels,
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
        let (_, mut parts) = self.parts_of(batch)?;
        parts.add_attention(&self.attention(batch)?, self.model.num_layers);
        Ok(parts)
    }

    /// The time of one layer's attention.
    #[inline]
    fn attention(&self, batch: &BatchShape) -> Result<Prediction, PredictError> {
        let shape = OperatorShape::Attention { heads: self.heads, load: batch.attention };
        self.times.predict(Operator::Attention, &shape)
    }

    /// The time of a step over `batch` (unpadded), residual 1; `after_idle` when the engine idled before.
    ///
    /// The step counts in [`Self::usage`].
    ///
    /// # Errors
    /// When an operator has no time, or the profile no costs of the step's dispatch.
    #[inline]
    pub fn step_time(&mut self, batch: &BatchShape, after_idle: bool) -> Result<StepTime, StepTimeError> {
        self.step_time_in_place(batch, after_idle).copied()
    }

    /// As [`Self::step_time`], where it stands until the next: it is large.
    #[inline]
    pub(crate) fn step_time_in_place(
        &mut self,
        batch: &BatchShape,
        after_idle: bool,
    ) -> Result<&mut StepTime, StepTimeError> {
        let attention = self.attention(batch)?;
        let kind = usize::from(batch.attention.num_prefill_seqs == 0);
        let is_like = |base: &Base| {
            base.num_tokens == batch.num_tokens
                && base.num_seqs == batch.num_seqs
                && base.after_idle == after_idle
        };
        if !self.bases[kind].as_ref().is_some_and(is_like) {
            self.bases[kind] = Some(self.base_of(batch, after_idle)?);
        }
        let Self { bases, by_tokens, by_seqs, used, .. } = self;
        let Some(Base { places, provenance, time, .. }) = &mut bases[kind] else { unreachable!("just made") };
        by_tokens.count(places.tokens, time.parts.is_decode_only);
        by_seqs.count(places.seqs, time.parts.is_decode_only);
        used.count(batch, attention.time_ns);
        time.parts.provenance = *provenance;
        time.parts.add_attention(&attention, self.model.num_layers);
        time.gpu_ns = time.parts.scaled_ns(&self.profile.operator_scales);
        time.residual = 1.0;
        Ok(time)
    }

    /// All of a step's time but attention's, and with it the GPU's.
    fn base_of(&mut self, batch: &BatchShape, after_idle: bool) -> Result<Base, StepTimeError> {
        let (places, parts) = self.parts_of(batch)?;
        let costs = self.costs(parts.dispatch)?;
        let factor = self.profile.host_factor;
        let (num_seqs, num_tokens) = (batch.num_seqs, batch.num_tokens);
        let after_idle_ns = if after_idle { factor * costs.after_idle_ns } else { 0.0 };
        let time = StepTime {
            parts,
            host_pre_ns: factor * costs.host_pre.at(num_seqs, num_tokens),
            gpu_ns: 0.0,
            launch_ns: factor
                * (f64::from(parts.num_launches) * costs.launch_ns
                    + f64::from(num_seqs) * costs.launch_per_seq_ns)
                + after_idle_ns,
            host_post_ns: factor * costs.host_post.at(num_seqs, num_tokens),
            after_idle_ns,
            residual: 1.0,
        };
        Ok(Base { num_tokens, num_seqs, after_idle, places, provenance: parts.provenance, time })
    }

    /// Each stage's part of a step whose time this model told, the residual's stretch of the host included.
    ///
    /// A stage has its layers' operators, and its sends to the next; the launches' time is split by their number, and an
    /// idle gap's part is the first stage's. One stage has `gpu_ns` and `launch_ns` of the step. The parts stand in a
    /// buffer of the model's: nothing is allocated.
    ///
    /// # Errors
    /// When an operator has no time, which a step timed by this model has.
    pub fn stage_times(&mut self, time: &StepTime) -> Result<&[StageTime], StepTimeError> {
        let parts = &time.parts;
        let places = self.places(parts.num_tokens, parts.num_seqs)?;
        let (tokens, seqs) = (self.by_tokens.stages(places.tokens), self.by_seqs.stages(places.seqs));
        let scales = &self.profile.operator_scales;
        let gemm_scale = scale_of(scales, Operator::QkvProj, parts.is_decode_only);
        let attention_ns = parts.prefill_attention_ns * scales.prefill_attention
            + parts.decode_attention_ns * scales.decode_attention;
        let per_layer_ns = attention_ns / f64::from(self.model.num_layers);
        let per_launch_ns = (time.launch_ns - time.after_idle_ns) / f64::from(parts.num_launches);
        for (i, stage) in self.stages.iter().enumerate() {
            let num_launches = match parts.dispatch {
                Dispatch::Eager => self.stage_kernels[i],
                Dispatch::PiecewiseGraph => 2 * stage.num_layers,
                Dispatch::FullGraph => 1,
            };
            let after_idle_ns = if stage.is_first { time.after_idle_ns } else { 0.0 };
            self.stage_times[i] = StageTime {
                gpu_ns: (tokens[i].gemm_ns + seqs[i].gemm_ns) * gemm_scale
                    + per_layer_ns * f64::from(stage.num_layers)
                    + (tokens[i].other_ns + seqs[i].other_ns) * scales.other,
                launch_ns: time.residual * (f64::from(num_launches) * per_launch_ns + after_idle_ns),
            };
        }
        if let [only] = &mut self.stage_times[..] {
            *only = StageTime { gpu_ns: time.gpu_ns, launch_ns: time.residual * time.launch_ns };
        }
        Ok(&self.stage_times)
    }

    /// The profile's costs of a dispatch.
    ///
    /// # Errors
    /// When it has none.
    #[inline]
    pub fn costs(&self, dispatch: Dispatch) -> Result<&DispatchCosts, StepTimeError> {
        match &self.costs[dispatch as usize] {
            Some(costs) => Ok(costs),
            None => Err(StepTimeError::MissingDispatch { profile: self.profile.name.clone(), dispatch }),
        }
    }

    /// The parts of a step but its attention, and where they stand.
    fn parts_of(&mut self, batch: &BatchShape) -> Result<(Places, GpuParts), StepTimeError> {
        let (dispatch, num_tokens) = dispatch(&self.deployment, batch);
        let places = self.places(num_tokens, batch.num_seqs)?;
        let (tokens, seqs) = (self.by_tokens.at(places.tokens), self.by_seqs.at(places.seqs));
        let mut provenance = tokens.provenance;
        provenance += seqs.provenance;
        let parts = GpuParts {
            dispatch,
            num_tokens,
            num_seqs: batch.num_seqs,
            is_decode_only: batch.attention.num_prefill_seqs == 0,
            gemm_ns: tokens.gemm_ns + seqs.gemm_ns,
            prefill_attention_ns: 0.0,
            decode_attention_ns: 0.0,
            other_ns: tokens.other_ns + seqs.other_ns,
            num_launches: self.num_launches[dispatch as usize],
            provenance,
        };
        Ok((places, parts))
    }

    /// Where the times of a number of tokens (padded) and of sequences stand, predicted where they are new.
    #[inline]
    fn places(&mut self, num_tokens: u32, num_seqs: u32) -> Result<Places, StepTimeError> {
        let tokens = match self.by_tokens.place(num_tokens) {
            Some(place) => place,
            None => self.place_tokens(num_tokens)?,
        };
        let seqs = match self.by_seqs.place(num_seqs) {
            Some(place) => place,
            None => self.place_seqs(num_seqs)?,
        };
        Ok(Places { tokens, seqs })
    }

    #[cold]
    fn place_tokens(&mut self, num_tokens: u32) -> Result<usize, StepTimeError> {
        let (times, calls, stages) = self.priced(DependsOn::Tokens, num_tokens)?;
        Ok(self.by_tokens.put(num_tokens, times, calls, &stages))
    }

    #[cold]
    fn place_seqs(&mut self, num_seqs: u32) -> Result<usize, StepTimeError> {
        let (times, calls, stages) = self.priced(DependsOn::Seqs, num_seqs)?;
        Ok(self.by_seqs.put(num_seqs, times, calls, &stages))
    }

    /// Predicts the times of the operators that depend on `number` tokens or sequences.
    fn priced(
        &self,
        on: DependsOn,
        number: u32,
    ) -> Result<(LinearTimes, Vec<PricedCall>, Vec<StageLinear>), StepTimeError> {
        let batch = BatchShape { num_tokens: number, num_seqs: number, ..BatchShape::default() };
        let (mut sums, mut priced, mut stages) = (LinearTimes::default(), Vec::new(), Vec::new());
        for &stage in &self.stages {
            let mut own = StageLinear::default();
            let calls = stage_pass(&self.model, &batch, self.deployment.tensor_parallel_size, stage)?;
            for call in calls.iter().filter(|call| depends_on(call.operator) == on) {
                let launch = self.times.predict(call.operator, &call.shape)?;
                let time_ns = launch.time_ns * f64::from(call.repeats);
                let (sum, own) = if call.operator.is_gemm() {
                    (&mut sums.gemm_ns, &mut own.gemm_ns)
                } else {
                    (&mut sums.other_ns, &mut own.other_ns)
                };
                *sum += time_ns;
                *own += time_ns;
                sums.provenance.add(launch.provenance, time_ns);
                let (operator, shape, repeats) = (call.operator, call.shape, call.repeats);
                priced.push(PricedCall { operator, shape, repeats, time_ns });
            }
            stages.push(own);
        }
        Ok((sums, priced, stages))
    }
}

/// Kernels of a stage, once its exchanges with other GPUs are known to have times.
fn checked_kernels(
    model: &ModelSpec,
    times: &impl OperatorTimes,
    deployment: &Deployment,
    stage: Stage,
) -> Result<u32, StepTimeError> {
    let one_token = BatchShape { num_tokens: 1, num_seqs: 1, ..BatchShape::default() };
    let calls = stage_pass(model, &one_token, deployment.tensor_parallel_size, stage)?;
    for call in calls.iter().filter(|call| call.operator.is_collective()) {
        times.predict(call.operator, &call.shape).map_err(|source| StepTimeError::NoCollectives {
            tensor_parallel_size: deployment.tensor_parallel_size,
            pipeline_parallel_size: deployment.pipeline_parallel_size,
            source,
        })?;
    }
    Ok(forward::num_launches(&calls))
}

#[cfg(test)]
mod tests;

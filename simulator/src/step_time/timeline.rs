//! When the parts of a launched step take place: on the hosts, on the GPUs, and operator by operator.

use plumbline_bundles::Dispatch;
use plumbline_schema::{BatchShape, Nanos, Operator, OperatorShape, forward::stage_pass};

use super::{StepTime, StepTimeError, StepTimeModel, captured_size, pipeline::StageSpans, scale_of};
use crate::times::OperatorTimes;

/// How much is asked of a step's timeline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum TimelineDetail {
    /// Nothing.
    #[default]
    None,
    /// Hosts and GPUs.
    Parts,
    /// And the operators on the GPUs.
    Operators,
}

/// From when to when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Its first ns.
    pub start: Nanos,
    /// The first ns after it, not before `start`.
    pub end: Nanos,
}

impl Span {
    /// How long it is.
    #[must_use]
    pub fn duration(&self) -> Nanos {
        self.end.saturating_since(self.start)
    }
}

/// All launches of one operator in a step, on one GPU of a pipeline stage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OperatorTime {
    /// The operator.
    pub operator: Operator,
    /// Launches.
    pub repeats: u32,
    /// GPU time of all launches with the profile's factor, ns.
    pub time_ns: f64,
}

/// A pipeline stage's part of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StageTimeline {
    /// Its host launches the kernels.
    pub launch: Span,
    /// Its GPU runs them.
    pub gpu: Span,
    /// What fills `gpu`, one after the other in the order of the forward pass, where operators were asked for.
    pub operators: Vec<OperatorTime>,
}

/// A step from its forming to its tokens: what is known when it has been launched.
///
/// The host's work after the last kernel ends with the step; all else has its place.
#[derive(Clone, Debug, PartialEq)]
pub struct StepTimeline {
    /// How the kernels reach the GPU.
    pub dispatch: Dispatch,
    /// Tokens through the linear layers, padded to the captured size.
    pub num_padded_tokens: u32,
    /// Ratio of the step's host time to the predicted one.
    pub residual: f64,
    /// The host before the first kernel.
    pub host_pre: Span,
    /// Each stage.
    pub stages: Vec<StageTimeline>,
    /// The host after the last kernel.
    pub host_post: Nanos,
}

impl StepTimeline {
    /// Of a step with no other in flight, from its `start` on.
    ///
    /// [`StepTime::total_ns`] says how long it takes; within it the host's work after the last kernel comes last, and
    /// the GPU starts after the work before the first one, or as early as it must where a draw makes the host faster
    /// than the GPU. Launches that the step does not wait for end with the GPU's time.
    pub(crate) fn synchronous(time: &StepTime, start: Nanos, duration: Nanos) -> Self {
        let end = start + duration;
        let host_post = Nanos::from_f64(time.host_post_ns * time.residual).min(duration);
        let before_post = Nanos(end.0 - host_post.0);
        let pre_end = (start + Nanos::from_f64(time.host_pre_ns * time.residual)).min(before_post);
        let launch_end = (pre_end + Nanos::from_f64(time.launch_ns * time.residual)).min(before_post);
        let gpu = Nanos::from_f64(time.gpu_ns).min(duration);
        let gpu_start = pre_end.min(Nanos(end.0 - gpu.0));
        Self {
            host_pre: Span { start, end: pre_end },
            stages: vec![StageTimeline {
                launch: Span { start: pre_end, end: launch_end },
                gpu: Span { start: gpu_start, end: gpu_start + gpu },
                operators: Vec::new(),
            }],
            host_post,
            ..Self::empty(time)
        }
    }

    /// Of a step that a pipeline placed.
    pub(crate) fn pipelined(time: &StepTime, spans: &[StageSpans]) -> Self {
        let stage = |spans: &StageSpans| StageTimeline {
            launch: spans.launch,
            gpu: spans.gpu,
            operators: Vec::new(),
        };
        let launch = spans.first().map_or(Nanos::ZERO, |first| first.launch.start);
        let pre = Nanos::from_f64(time.host_pre_ns * time.residual);
        Self {
            host_pre: Span { start: launch.saturating_since(pre), end: launch },
            stages: spans.iter().map(stage).collect(),
            host_post: Nanos::from_f64(time.host_post_ns * time.residual),
            ..Self::empty(time)
        }
    }

    fn empty(time: &StepTime) -> Self {
        Self {
            dispatch: time.parts.dispatch,
            num_padded_tokens: time.parts.num_tokens,
            residual: time.residual,
            host_pre: Span::default(),
            stages: Vec::new(),
            host_post: Nanos::ZERO,
        }
    }

    /// GPU time of all stages.
    #[must_use]
    pub fn gpu_time(&self) -> Nanos {
        self.stages.iter().map(|stage| stage.gpu.duration()).sum()
    }
}

impl<T: OperatorTimes> StepTimeModel<T> {
    /// The operators of a step over `batch` (unpadded), each stage's in the order of its forward pass.
    ///
    /// A stage's times add up to its [`StageTime::gpu_ns`](super::pipeline::StageTime::gpu_ns), but for the rounding of sums. Nothing is remembered and
    /// nothing counts in [`Self::usage`].
    ///
    /// # Errors
    /// When an operator has no time.
    pub fn operator_times(&self, batch: &BatchShape) -> Result<Vec<Vec<OperatorTime>>, StepTimeError> {
        let num_tokens = captured_size(&self.deployment, batch.num_tokens).unwrap_or(batch.num_tokens);
        let padded = BatchShape { num_tokens, ..*batch };
        let is_decode_only = batch.attention.num_prefill_seqs == 0;
        let tp = self.deployment.tensor_parallel_size;
        let time = |operator, shape: &OperatorShape, repeats: u32| {
            let launch = self.times.predict(operator, shape)?;
            let scale = scale_of(&self.profile.operator_scales, operator, is_decode_only);
            Ok(OperatorTime { operator, repeats, time_ns: launch.time_ns * f64::from(repeats) * scale })
        };
        let of_stage = |&stage| {
            let calls = stage_pass(&self.model, &padded, tp, stage)?;
            calls.iter().map(|call| time(call.operator, &call.shape, call.repeats)).collect()
        };
        self.stages.iter().map(of_stage).collect()
    }
}

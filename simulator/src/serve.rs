//! What runs steps and owns the clock, and the loop that serves a whole workload by it.
//!
//! The loop does not know whether time is simulated: an executor moves the clock or reads it, and either models a
//! step or runs it.

use plumbline_schema::{BatchShape, Nanos, Workload, WorkloadRequest};
use thiserror::Error;

use crate::{
    recorder::{Outcome, ReplicaLog, RunRecorder},
    replica::{Arrival, Replica},
    scheduler::{ScheduledStep, Scheduler, SchedulerState, Steady},
    sequence::SequenceId,
    step_time::timeline::StepTimeline,
};

/// Runs steps and owns the clock.
///
/// The clock starts at the run's start and never steps back.
pub trait Executor {
    /// Why a step could not be run.
    type Error: std::error::Error;

    /// The time since the run's start.
    fn now(&self) -> Nanos;

    /// Lets time pass until `time`, with nothing to do; afterwards `now` is not before it.
    ///
    /// # Errors
    /// When the engine is to stop.
    fn wait_until(&mut self, time: Nanos) -> Result<(), Self::Error>;

    /// Takes in a request that the scheduler has accepted as sequence `id`.
    ///
    /// # Errors
    /// When the engine cannot take it in.
    fn admit(&mut self, id: SequenceId, request: &WorkloadRequest) -> Result<(), Self::Error>;

    /// Steps that may be in flight at once, at least 1.
    fn depth(&self) -> usize {
        1
    }

    /// Launches a step, never an empty one, of shape `batch`, whose forming began at `start`; `state` has the block
    /// tables. Returns the scheduler's part of its time.
    ///
    /// # Errors
    /// When the step cannot be run.
    fn launch(
        &mut self,
        step: &ScheduledStep,
        batch: &BatchShape,
        start: Nanos,
        state: &SchedulerState<'_>,
    ) -> Result<Nanos, Self::Error>;

    /// When the parts of the step that was launched last take place, with its operators where they are asked for;
    /// `None` by an executor that does not know.
    ///
    /// # Errors
    /// When an operator has no time.
    fn timeline(
        &mut self,
        step: &ScheduledStep,
        operators: bool,
    ) -> Result<Option<StepTimeline>, Self::Error> {
        let _ = (step, operators);
        Ok(None)
    }

    /// Waits for the oldest step in flight; returns when its tokens were out, at least 1 ns after its start.
    ///
    /// # Errors
    /// When the step failed.
    fn finish(&mut self) -> Result<Nanos, Self::Error>;

    /// Launches and finishes steps of decodes alone, one after the other and with no other in flight, as
    /// [`Self::launch`] and [`Self::finish`] would: those of `steady` that begin before `bound`, into `steps`. None, and
    /// nothing done, by an executor that has to see whose decodes they are.
    ///
    /// # Errors
    /// When a step cannot be run.
    fn decode(
        &mut self,
        steady: &Steady,
        bound: Nanos,
        steps: &mut Vec<StepSpan>,
    ) -> Result<(), Self::Error> {
        let _ = (steady, bound, steps);
        Ok(())
    }
}

impl<E: Executor + ?Sized> Executor for &mut E {
    type Error = E::Error;

    fn now(&self) -> Nanos {
        (**self).now()
    }

    fn wait_until(&mut self, time: Nanos) -> Result<(), E::Error> {
        (**self).wait_until(time)
    }

    fn admit(&mut self, id: SequenceId, request: &WorkloadRequest) -> Result<(), E::Error> {
        (**self).admit(id, request)
    }

    fn depth(&self) -> usize {
        (**self).depth()
    }

    fn launch(
        &mut self,
        step: &ScheduledStep,
        batch: &BatchShape,
        start: Nanos,
        state: &SchedulerState<'_>,
    ) -> Result<Nanos, E::Error> {
        (**self).launch(step, batch, start, state)
    }

    fn timeline(&mut self, step: &ScheduledStep, operators: bool) -> Result<Option<StepTimeline>, E::Error> {
        (**self).timeline(step, operators)
    }

    fn finish(&mut self) -> Result<Nanos, E::Error> {
        (**self).finish()
    }

    fn decode(&mut self, steady: &Steady, bound: Nanos, steps: &mut Vec<StepSpan>) -> Result<(), E::Error> {
        (**self).decode(steady, bound, steps)
    }
}

/// When a step was, and how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSpan {
    /// When its forming began.
    pub start: Nanos,
    /// From the step's start to its tokens being out, at least 1 ns.
    pub duration: Nanos,
    /// The scheduler's part of it.
    pub schedule: Nanos,
}

impl StepSpan {
    /// When its tokens were out.
    #[must_use]
    #[inline]
    pub fn end(&self) -> Nanos {
        self.start + self.duration
    }
}

/// Why a loop ended early.
#[derive(Debug, Error)]
pub enum ServeError<E: std::error::Error> {
    /// A step or an admission failed.
    #[error(transparent)]
    Executor(E),
    /// The scheduler formed an empty step with work left, which would stall the clock.
    #[error(
        "at {now} the scheduler formed an empty step, with {num_waiting} sequences waiting, {num_running} running and {num_free} KV blocks free"
    )]
    Stalled {
        /// The time.
        now: Nanos,
        /// Sequences waiting.
        num_waiting: usize,
        /// Sequences running.
        num_running: usize,
        /// Free KV blocks.
        num_free: u32,
    },
}

impl<E: std::error::Error> ServeError<E> {
    pub(crate) fn stalled(now: Nanos, state: &SchedulerState<'_>) -> Self {
        Self::Stalled {
            now,
            num_waiting: state.num_waiting,
            num_running: state.num_running,
            num_free: state.kv_cache.num_free(),
        }
    }
}

/// The records of a finished loop.
#[derive(Clone, Debug, Default)]
pub struct Served {
    /// What became of each request, in the workload's order.
    pub requests: Vec<Outcome>,
    /// What each replica did.
    pub replicas: Vec<ReplicaLog>,
}

impl Served {
    /// How often a sequence lost its blocks.
    #[must_use]
    pub fn num_preemptions(&self) -> u64 {
        self.requests.iter().map(|outcome| u64::from(outcome.num_preemptions)).sum()
    }
}

/// Serves a workload, in its order of arrival, until every request is done or rejected; see [`Replica`].
///
/// # Errors
/// When the executor fails, or the scheduler has work and forms no step.
pub fn serve<E: Executor>(
    workload: &Workload,
    scheduler: Box<dyn Scheduler>,
    executor: E,
) -> Result<Served, ServeError<E::Error>> {
    let mut recorder = RunRecorder::with_steps();
    let mut replica = Replica::new(0, scheduler, executor);
    for (request, index) in workload.requests.iter().zip(0..) {
        replica.push(Arrival::new(request.clone(), index));
    }
    replica.run_until(Nanos(u64::MAX), &mut recorder)?;
    Ok(recorder.into_served())
}

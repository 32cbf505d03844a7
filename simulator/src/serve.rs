//! The serving loop: admits requests, forms steps, hands them to an executor and keeps the records.
//!
//! The loop does not know whether time is simulated: the executor owns the clock, moves it or reads it,
//! and either models a step or runs it.

use plumbline_schema::{Nanos, StepMetrics, Workload, WorkloadRequest};
use thiserror::Error;

use crate::{
    scheduler::{Rejection, ScheduledStep, Scheduler, SchedulerState},
    sequence::SequenceId,
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
    fn wait_until(&mut self, time: Nanos);

    /// Takes in a request that the scheduler has accepted as sequence `id`.
    ///
    /// # Errors
    /// When the engine cannot take it in.
    fn admit(&mut self, id: SequenceId, request: &WorkloadRequest) -> Result<(), Self::Error>;

    /// Runs a step, never an empty one, that began at `start`; `state` has the block tables.
    ///
    /// # Errors
    /// When the step cannot be run.
    fn execute(
        &mut self,
        step: &ScheduledStep,
        start: Nanos,
        state: &SchedulerState<'_>,
    ) -> Result<StepSpan, Self::Error>;
}

/// How long a step took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSpan {
    /// From the step's start to its tokens being out, at least 1 ns.
    pub duration: Nanos,
    /// The scheduler's part of it.
    pub schedule: Nanos,
}

/// What became of one request of the workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServedRequest {
    /// When it had been taken in; `None` when it was rejected.
    pub admitted: Option<Nanos>,
    /// When each of its tokens was out.
    pub token_times: Vec<Nanos>,
    /// Why it was rejected.
    pub rejection: Option<Rejection>,
}

/// The records of a finished loop.
#[derive(Clone, Debug, Default)]
pub struct Served {
    /// In the workload's order.
    pub requests: Vec<ServedRequest>,
    /// In order of time.
    pub steps: Vec<StepMetrics>,
    /// How often a sequence lost its blocks.
    pub num_preemptions: u64,
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

/// Serves a workload, in its order of arrival, until every request is done or rejected.
///
/// Each iteration reads the clock once and takes in every request that has arrived by then; a request
/// that arrives while others are taken in, or during a step, waits for the next iteration. With nothing
/// to do the loop waits for the next arrival.
///
/// # Errors
/// When the executor fails, or the scheduler has work and forms no step.
pub fn serve<E: Executor>(
    workload: &Workload,
    scheduler: &mut dyn Scheduler,
    executor: &mut E,
) -> Result<Served, ServeError<E::Error>> {
    let mut served = Served::default();
    served.requests.resize_with(workload.requests.len(), ServedRequest::default);
    let mut arrivals = workload.requests.iter().enumerate().peekable();
    // The workload's index of each sequence.
    let mut request_of: Vec<usize> = Vec::with_capacity(workload.requests.len());
    let (mut step, mut finished) = (ScheduledStep::default(), Vec::new());
    loop {
        let now = executor.now();
        while let Some((index, request)) = arrivals.next_if(|(_, r)| r.arrival_time_ns <= now) {
            match scheduler.add(request) {
                Ok(id) => {
                    executor.admit(id, request).map_err(ServeError::Executor)?;
                    request_of.resize(request_of.len().max(id.index() + 1), 0);
                    request_of[id.index()] = index;
                    served.requests[index].admitted = Some(executor.now());
                    served.requests[index].token_times.reserve(request.num_decode_tokens as usize);
                }
                Err(rejection) => served.requests[index].rejection = Some(rejection),
            }
        }
        if scheduler.state().num_unfinished() == 0 {
            let Some((_, next)) = arrivals.peek() else { break };
            executor.wait_until(next.arrival_time_ns);
            continue;
        }

        let start = executor.now();
        scheduler.schedule(&mut step);
        if step.is_empty() {
            return Err(stalled(start, &scheduler.state()));
        }
        let span = executor.execute(&step, start, &scheduler.state()).map_err(ServeError::Executor)?;
        let end = start + span.duration;
        for scheduled in step.sequences.iter().filter(|s| s.samples) {
            served.requests[request_of[scheduled.id.index()]].token_times.push(end);
        }
        scheduler.complete(&step, &mut finished);
        served.num_preemptions += step.preempted.len() as u64;
        served.steps.push(StepMetrics {
            requests: None,
            step_start_ns: start,
            step_duration_ns: span.duration,
            schedule_ns: span.schedule,
            batch: step.batch(),
        });
    }
    Ok(served)
}

fn stalled<E: std::error::Error>(now: Nanos, state: &SchedulerState<'_>) -> ServeError<E> {
    ServeError::Stalled {
        now,
        num_waiting: state.num_waiting,
        num_running: state.num_running,
        num_free: state.kv_cache.num_free(),
    }
}

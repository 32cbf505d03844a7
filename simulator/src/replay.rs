//! Does the scheduler, fed a real run's clock, form the batches that the real engine formed?

use plumbline_schema::{Nanos, RequestStatus, Run, StepBatch, WorkloadRequest};
use thiserror::Error;

use crate::scheduler::{ScheduledStep, SchedulerError, SchedulerKind};

/// A step of a real run for which the scheduler formed another batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepDifference {
    /// The step's number, from 0.
    pub step: usize,
    /// When the real step began.
    pub step_start_ns: Nanos,
    /// What the engine computed.
    pub real: StepBatch,
    /// What the scheduler would have computed.
    pub replayed: StepBatch,
}

/// How far a scheduler agrees with a real one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplayReport {
    /// Steps of the real run.
    pub steps: usize,
    /// Steps with the same batch: the same chunks and decodes, with the same contexts, in the same order.
    pub identical: usize,
    /// The first step that differs; what follows it may differ because of it.
    pub first_difference: Option<StepDifference>,
    /// Preemptions in the replay.
    pub preemptions: usize,
    /// Requests that the replay has not finished when the real run's steps end.
    pub unfinished: usize,
}

impl ReplayReport {
    /// Whether every batch was the same and all requests are done.
    #[must_use]
    pub fn is_identical(&self) -> bool {
        self.identical == self.steps && self.unfinished == 0
    }
}

/// A run that cannot be replayed.
#[derive(Debug, Error)]
pub enum ReplayError {
    /// The run does not say how its engine was set up.
    #[error("the run records no deployment (expected run.json or engine.json beside it)")]
    NoDeployment,
    /// The run has no steps.
    #[error("the run records no steps (expected step_metrics.csv)")]
    NoSteps,
    /// The run does not say when the engine had taken a request in.
    #[error("request {request_id} has no admitted_time_ns, which a replay needs")]
    NoAdmittedTime {
        /// The first such request.
        request_id: u64,
    },
    /// The scheduler cannot serve the run's deployment.
    #[error(transparent)]
    Scheduler(#[from] SchedulerError),
}

/// Replays `run` through vLLM's V1 scheduler; see [`replay_with`].
///
/// # Errors
/// As [`replay_with`].
pub fn replay(run: &Run) -> Result<ReplayReport, ReplayError> {
    replay_with(run, SchedulerKind::VllmV1)
}

/// Feeds a scheduler the admitted times and step starts of `run` and compares every batch.
///
/// A request is known to a step when it was admitted before the step began; the replay then assumes that
/// the step ran as formed. Requests that the real run rejected are left out.
///
/// # Errors
/// When the run lacks what a replay needs, or its deployment asks for what the scheduler does not model.
pub fn replay_with(run: &Run, scheduler: SchedulerKind) -> Result<ReplayReport, ReplayError> {
    let deployment = run.info.deployment.as_ref().ok_or(ReplayError::NoDeployment)?;
    if run.steps.is_empty() {
        return Err(ReplayError::NoSteps);
    }
    let mut scheduler = scheduler.build(deployment)?;
    let admissions = admissions(run)?;
    let mut admissions = admissions.iter().peekable();
    let (mut step, mut finished) = (ScheduledStep::default(), Vec::new());
    let mut report = ReplayReport {
        steps: run.steps.len(),
        identical: 0,
        first_difference: None,
        preemptions: 0,
        unfinished: 0,
    };
    for (number, real) in run.steps.iter().enumerate() {
        while let Some((_, request)) = admissions.next_if(|(time, _)| *time <= real.step_start_ns) {
            // What the scheduler rejects shows as a difference, since the real engine served it.
            let _ = scheduler.add(request);
        }
        scheduler.schedule(&mut step);
        let replayed = step.batch();
        if replayed == real.batch {
            report.identical += 1;
        } else if report.first_difference.is_none() {
            report.first_difference = Some(StepDifference {
                step: number,
                step_start_ns: real.step_start_ns,
                real: real.batch.clone(),
                replayed,
            });
        }
        report.preemptions += step.preempted.len();
        scheduler.complete(&step, &mut finished);
    }
    report.unfinished = scheduler.state().num_unfinished() + admissions.len();
    Ok(report)
}

/// Served requests in order of admission.
fn admissions(run: &Run) -> Result<Vec<(Nanos, WorkloadRequest)>, ReplayError> {
    let mut admissions = Vec::with_capacity(run.requests.len());
    for r in run.requests.iter().filter(|r| r.status != RequestStatus::Rejected) {
        let time = r.admitted_time_ns.ok_or(ReplayError::NoAdmittedTime { request_id: r.request_id })?;
        let request =
            WorkloadRequest::new(r.request_id, r.arrival_time_ns, r.num_prefill_tokens, r.num_decode_tokens);
        admissions.push((time, request));
    }
    // Stable: requests admitted in the same nanosecond keep the file's order.
    admissions.sort_by_key(|(time, _)| *time);
    Ok(admissions)
}

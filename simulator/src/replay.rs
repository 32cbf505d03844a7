//! Does the scheduler, fed a real run's clock, form the batches that the real engine formed?

use std::{
    collections::HashMap,
    mem,
    path::{self, Path, PathBuf},
};

use plumbline_schema::{
    InputError, Nanos, RequestMetrics, RequestStatus, Run, StepBatch, StepMetrics, StepRequests, Workload,
    WorkloadRequest, files::plain_or_zst,
};
use thiserror::Error;

use crate::{
    scheduler::{ScheduledStep, Scheduler, SchedulerError, SchedulerKind},
    sequence::SequenceId,
};

/// What of a step can differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StepPart {
    /// Its chunks, decodes or contexts.
    Batch,
    /// Whose chunks and decodes they are.
    Requests,
    /// Who lost their blocks while it was formed.
    Preempted,
    /// How many blocks were free after it was formed.
    FreeBlocks,
}

impl StepPart {
    /// The name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Batch => "batch",
            Self::Requests => "requests",
            Self::Preempted => "preempted",
            Self::FreeBlocks => "free_blocks",
        }
    }
}

/// A step of a real run for which the scheduler formed another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepDifference {
    /// The step's number, from 0.
    pub step: usize,
    /// When the real step began.
    pub step_start_ns: Nanos,
    /// The first part that differs.
    pub part: StepPart,
    /// What the engine computed.
    pub real: StepBatch,
    /// What the scheduler would have computed.
    pub replayed: StepBatch,
    /// For whom the engine did, and what it left; `None` when not recorded.
    pub real_requests: Option<StepRequests>,
    /// For whom the scheduler would have, and what it would have left.
    pub replayed_requests: StepRequests,
}

/// How far a scheduler agrees with a real one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplayReport {
    /// Steps of the real run.
    pub steps: usize,
    /// Steps that are the same: the same chunks and decodes, with the same contexts, in the same order; and the same
    /// requests, preemptions and free blocks, where recorded.
    pub identical: usize,
    /// The first step that differs; what follows it may differ because of it.
    pub first_difference: Option<StepDifference>,
    /// Preemptions in the replay.
    pub preemptions: usize,
    /// Requests that the replay has not finished when the real run's steps end.
    pub unfinished: usize,
}

impl ReplayReport {
    /// Whether every step was the same and all requests are done.
    #[must_use]
    pub fn is_identical(&self) -> bool {
        self.identical == self.steps && self.unfinished == 0
    }
}

/// A run that cannot be replayed.
#[derive(Debug, Error)]
pub enum ReplayError {
    /// A file of the run cannot be read.
    #[error(transparent)]
    Input(#[from] InputError),
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
    /// The run's steps were formed while others ran.
    #[error(
        "expected an engine that ends a step before it forms the next, found `{key} = {value}`: a run does not record \
         which steps were in flight"
    )]
    StepsInFlight {
        /// The deployment's key.
        key: &'static str,
        /// What it says.
        value: String,
    },
    /// The workload is not the run's.
    #[error("the workload is not the run's: for request {request_id} expected {expected}, found {found}")]
    OtherWorkload {
        /// The first request that is not the same.
        request_id: u64,
        /// What the run has.
        expected: String,
        /// What the workload has.
        found: String,
    },
    /// The workload in a file is not the run's.
    #[error("{}", path.display())]
    OtherWorkloadFile {
        /// The file.
        path: PathBuf,
        /// How it differs.
        source: Box<ReplayError>,
    },
    /// The scheduler cannot serve the run's deployment.
    #[error(transparent)]
    Scheduler(#[from] SchedulerError),
}

/// Replays the run in a folder through vLLM's V1 scheduler; see [`replay_with`].
///
/// Priorities and shared prompts are those of its workload, as [`workload_file`] finds it; without one, none.
///
/// # Errors
/// As [`replay_with`], or when a file cannot be read.
pub fn replay_folder(folder: &Path) -> Result<ReplayReport, ReplayError> {
    let run = Run::read(folder)?;
    replay_with(&run, &workload_of(&run, folder)?, SchedulerKind::VllmV1)
}

/// The workload of a run in a folder: its requests at their scheduled arrivals, with the priorities and shared prompts
/// of the file that [`workload_file`] finds; without one, none.
///
/// # Errors
/// When that file cannot be read, or is not of the run's requests.
pub fn workload_of(run: &Run, folder: &Path) -> Result<Workload, ReplayError> {
    let Some(path) = workload_file(folder) else { return Ok(run.workload()) };
    let workload = Workload::read(&path)?;
    match check_same(run, &workload) {
        Ok(()) => Ok(workload),
        Err(source) => Err(ReplayError::OtherWorkloadFile { path, source: Box::new(source) }),
    }
}

/// [`workload_of`] as the engine served it.
///
/// # Errors
/// As [`workload_of`].
pub fn served_workload(run: &Run, folder: &Path) -> Result<Workload, ReplayError> {
    Ok(as_served(run, workload_of(run, folder)?))
}

/// A run's workload as the engine served it: an output that ended early is as long as it got.
#[must_use]
pub fn as_served(run: &Run, mut workload: Workload) -> Workload {
    let is_done = |r: &&RequestMetrics| r.status == RequestStatus::Ok;
    let produced: HashMap<u64, u32> =
        run.requests.iter().filter(is_done).map(|r| (r.request_id, r.num_decode_tokens_actual)).collect();
    for request in &mut workload.requests {
        if let Some(&tokens) = produced.get(&request.request_id) {
            request.num_decode_tokens = tokens;
        }
    }
    workload
}

/// The workload of the run in a folder: `workload.csv` in it, or else `workloads/NAME.csv` in one of the three folders
/// above, NAME being the run folder's; either may be `.csv.zst`.
#[must_use]
pub fn workload_file(folder: &Path) -> Option<PathBuf> {
    let folder = path::absolute(folder).ok()?;
    let beside = folder.join("workload.csv");
    let name = folder.file_name().map(|name| Path::new(name).with_extension("csv"));
    let above = folder.ancestors().skip(1).take(3);
    let named = above.filter_map(|above| Some(above.join("workloads").join(name.as_ref()?)));
    std::iter::once(beside).chain(named).map(|path| plain_or_zst(&path)).find(|path| path.exists())
}

/// Replays `run`, whose requests share nothing and have one priority, through vLLM's V1 scheduler; see [`replay_with`].
///
/// # Errors
/// As [`replay_with`].
pub fn replay(run: &Run) -> Result<ReplayReport, ReplayError> {
    replay_with(run, &run.workload(), SchedulerKind::VllmV1)
}

/// Feeds a scheduler the admitted times and step starts of `run` and compares every step.
///
/// A request is known to a step when it was admitted before the step began; the replay then assumes that
/// the step ran as formed. Requests that the real run rejected are left out. Priorities and shared prompts are the
/// workload's. Steps of the real run that only preempted are compared as part of the step after them, as the scheduler
/// forms them.
///
/// # Errors
/// When the run lacks what a replay needs, its deployment asks for what the scheduler does not model, or the
/// workload's requests are not the run's.
pub fn replay_with(
    run: &Run,
    workload: &Workload,
    scheduler: SchedulerKind,
) -> Result<ReplayReport, ReplayError> {
    let deployment = run.info.deployment.as_ref().ok_or(ReplayError::NoDeployment)?;
    if run.steps.is_empty() {
        return Err(ReplayError::NoSteps);
    }
    if deployment.async_scheduling {
        return Err(ReplayError::StepsInFlight { key: "async_scheduling", value: "true".into() });
    }
    if deployment.pipeline_parallel_size > 1 {
        let value = deployment.pipeline_parallel_size.to_string();
        return Err(ReplayError::StepsInFlight { key: "pipeline_parallel_size", value });
    }
    let mut scheduler = scheduler.build(deployment)?;
    let admissions = admissions(run, workload)?;
    let mut admissions = admissions.iter().peekable();
    let mut replayed = Replayed::default();
    let mut finished = Vec::new();
    let mut report = ReplayReport {
        steps: run.steps.len(),
        identical: 0,
        first_difference: None,
        preemptions: 0,
        unfinished: 0,
    };
    let mut num_empty = 0;
    for (number, real) in run.steps.iter().enumerate() {
        if real.batch.is_empty() {
            num_empty += 1;
            continue;
        }
        while let Some((_, request)) = admissions.next_if(|(time, _)| *time <= real.step_start_ns) {
            // What the scheduler rejects shows as a difference, since the real engine served it.
            if let Ok(id) = scheduler.add(request) {
                replayed.name(id, request.request_id);
            }
        }
        scheduler.schedule(&mut replayed.step);
        let batch = replayed.step.batch();
        let joined = (num_empty > 0).then(|| joined(&run.steps[number - num_empty..number], real));
        let real = joined.as_ref().unwrap_or(real);
        let num_steps = 1 + mem::take(&mut num_empty);
        match replayed.first_difference(real, &batch, scheduler.as_ref()) {
            None => report.identical += num_steps,
            Some(part) if report.first_difference.is_none() => {
                report.first_difference = Some(StepDifference {
                    step: number,
                    step_start_ns: real.step_start_ns,
                    part,
                    real: real.batch.clone(),
                    replayed: batch,
                    real_requests: real.requests.clone(),
                    replayed_requests: replayed.requests(scheduler.as_ref()),
                });
            }
            Some(_) => {}
        }
        report.preemptions += replayed.step.preempted.len();
        scheduler.complete(&replayed.step, &mut finished);
    }
    report.unfinished = scheduler.state().num_unfinished() + admissions.len();
    if report.unfinished == 0 {
        report.identical += num_empty;
    }
    Ok(report)
}

/// A step with the preemptions of those before it, which computed nothing.
fn joined(empty: &[StepMetrics], step: &StepMetrics) -> StepMetrics {
    let mut step = step.clone();
    for before in empty.iter().filter_map(|step| step.requests.as_ref()) {
        let preempted = &mut step.requests.get_or_insert_default().preempted_request_ids;
        preempted.extend(&before.preempted_request_ids);
        preempted.sort_unstable();
    }
    step
}

/// The newest step of a replay.
#[derive(Default)]
struct Replayed {
    step: ScheduledStep,
    /// Request of each sequence, by id.
    request_ids: Vec<u64>,
}

impl Replayed {
    fn name(&mut self, id: SequenceId, request_id: u64) {
        if self.request_ids.len() <= id.index() {
            self.request_ids.resize(id.index() + 1, 0);
        }
        self.request_ids[id.index()] = request_id;
    }

    fn ids(&self, is_decode: bool) -> impl Iterator<Item = u64> {
        let parts = self.step.sequences.iter().filter(move |part| part.is_decode == is_decode);
        parts.map(|part| self.request_ids[part.id.index()])
    }

    fn preempted(&self) -> Vec<u64> {
        let mut ids: Vec<_> = self.step.preempted.iter().map(|id| self.request_ids[id.index()]).collect();
        ids.sort_unstable();
        ids
    }

    fn requests(&self, scheduler: &dyn Scheduler) -> StepRequests {
        StepRequests {
            prefill_request_ids: self.ids(false).collect(),
            decode_request_ids: self.ids(true).collect(),
            preempted_request_ids: self.preempted(),
            free_blocks: Some(scheduler.state().kv_cache.num_free()),
        }
    }

    /// The first recorded part of the real step that differs from this one, whose batch is `batch`.
    fn first_difference(
        &self,
        real: &StepMetrics,
        batch: &StepBatch,
        scheduler: &dyn Scheduler,
    ) -> Option<StepPart> {
        if real.batch != *batch {
            return Some(StepPart::Batch);
        }
        let real = real.requests.as_ref()?;
        let are = |real: &[u64], is_decode| real.iter().copied().eq(self.ids(is_decode));
        if !are(&real.prefill_request_ids, false) || !are(&real.decode_request_ids, true) {
            return Some(StepPart::Requests);
        }
        if real.preempted_request_ids != self.preempted() {
            return Some(StepPart::Preempted);
        }
        let num_free = scheduler.state().kv_cache.num_free();
        real.free_blocks.is_some_and(|real| real != num_free).then_some(StepPart::FreeBlocks)
    }
}

/// Served requests in order of admission, as the workload describes them.
fn admissions<'a>(
    run: &Run,
    workload: &'a Workload,
) -> Result<Vec<(Nanos, &'a WorkloadRequest)>, ReplayError> {
    check_same(run, workload)?;
    let requests: HashMap<_, _> = workload.requests.iter().map(|r| (r.request_id, r)).collect();
    let mut admissions = Vec::with_capacity(run.requests.len());
    for real in run.requests.iter().filter(|real| real.status != RequestStatus::Rejected) {
        let request_id = real.request_id;
        let time = real.admitted_time_ns.ok_or(ReplayError::NoAdmittedTime { request_id })?;
        admissions.push((time, requests[&request_id]));
    }
    // Stable: requests admitted in the same nanosecond keep the file's order.
    admissions.sort_by_key(|(time, _)| *time);
    Ok(admissions)
}

/// Checks that a workload has the run's requests, each with its arrival and lengths, and no other.
fn check_same(run: &Run, workload: &Workload) -> Result<(), ReplayError> {
    let mut requests: HashMap<_, _> = workload.requests.iter().map(|r| (r.request_id, r)).collect();
    for real in &run.requests {
        let request = requests.remove(&real.request_id);
        if request.is_none_or(|request| !is_same(real, request)) {
            let expected = described(real.arrival_time_ns, real.num_prefill_tokens, real.num_decode_tokens);
            let found = request.map_or_else(
                || "no such request".to_owned(),
                |r| described(r.arrival_time_ns, r.num_prefill_tokens, r.num_decode_tokens),
            );
            return Err(ReplayError::OtherWorkload { request_id: real.request_id, expected, found });
        }
    }
    match requests.keys().min() {
        Some(&request_id) => {
            let (expected, found) = ("no such request".to_owned(), "one".to_owned());
            Err(ReplayError::OtherWorkload { request_id, expected, found })
        }
        None => Ok(()),
    }
}

fn is_same(real: &RequestMetrics, request: &WorkloadRequest) -> bool {
    real.arrival_time_ns == request.arrival_time_ns
        && real.num_prefill_tokens == request.num_prefill_tokens
        && real.num_decode_tokens == request.num_decode_tokens
}

fn described(arrival: Nanos, num_prefill_tokens: u32, num_decode_tokens: u32) -> String {
    format!("{num_prefill_tokens} prompt and {num_decode_tokens} output tokens arriving at {} ns", arrival.0)
}

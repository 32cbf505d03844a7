//! One simulated run: a workload served by a modelled engine.

use plumbline_bundles::{Dispatch, EngineProfile};
use plumbline_schema::{Deployment, ModelSpec, Nanos, Run, RunInfo, RunKind, Workload};
use serde::Serialize;
use thiserror::Error;

use crate::{
    cluster::ClusterError,
    executor::SimulatedExecutor,
    output::{request_row, token_rows},
    residual::Residuals,
    scheduler::{Rejection, SchedulerError, SchedulerKind, UnknownScheduler},
    serve::{ServeError, Served, serve},
    step_time::{StepTime, StepTimeError, StepTimeModel},
    times::{Coverage, OperatorTimes, ProvenanceTimes},
};

/// How to simulate, and what the run is to say of its inputs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SimulateOptions {
    /// Seed of everything drawn.
    pub seed: u64,
    /// Whether steps scatter.
    pub residuals: Residuals,
    /// Plumbline's name of the GPU, for the run's `run.json`.
    pub gpu: Option<String>,
    /// SHA-256 of the workload, hex, for the run's `run.json`.
    pub workload_digest: Option<String>,
    /// SHA-256 of the bundle's manifest, hex, for the run's `run.json`.
    pub bundle_digest: Option<String>,
}

/// What a simulation counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SimulationCounts {
    /// Requests of the workload.
    pub requests: usize,
    /// Requests that got all their tokens.
    pub finished: usize,
    /// Requests that could never be served.
    pub rejected: usize,
    /// How often a sequence lost its blocks and was recomputed.
    pub preemptions: u64,
    /// Steps launched kernel by kernel.
    pub eager_steps: usize,
    /// Steps of piecewise graphs.
    pub piecewise_graph_steps: usize,
    /// Steps of one full graph.
    pub full_graph_steps: usize,
}

/// A simulated run and where its numbers come from.
#[derive(Clone, Debug)]
pub struct Simulation {
    /// The run; its steps hold their batches.
    pub run: Run,
    /// What each step's time is made of, in the order of the run's steps.
    pub step_times: Vec<StepTime>,
    /// Shares of the predicted GPU time of all steps, by provenance.
    pub coverage: Coverage,
    /// Counts.
    pub counts: SimulationCounts,
    /// Ids of the rejected requests and why.
    pub rejections: Vec<(u64, Rejection)>,
}

/// Why a simulation cannot be made.
#[derive(Debug, Error)]
pub enum SimulateError {
    /// The engine profile names a scheduler that there is not.
    #[error("engine profile `{profile}`: {source}")]
    UnknownScheduler {
        /// The profile's name.
        profile: String,
        /// The name and the ones there are.
        #[source]
        source: UnknownScheduler,
    },
    /// The scheduler cannot serve the deployment.
    #[error(transparent)]
    Scheduler(#[from] SchedulerError),
    /// The replicas make no cluster.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// A step's time cannot be told.
    #[error(transparent)]
    StepTime(#[from] StepTimeError),
    /// The workload breaks its own rules.
    #[error("request {request_id} of the workload: expected {expected}, found {found}")]
    InvalidWorkload {
        /// The request.
        request_id: u64,
        /// What it must have.
        expected: &'static str,
        /// What it has.
        found: u64,
    },
    /// The scheduler broke its promise to form a step while there is work.
    #[error("stalled: {0}")]
    Stalled(String),
}

/// Simulates a workload on an engine.
///
/// # Errors
/// When the deployment asks for what is not modelled, the profile or the workload is invalid, or an
/// operator has no time.
pub fn simulate<T: OperatorTimes>(
    model: &ModelSpec,
    workload: &Workload,
    deployment: &Deployment,
    profile: &EngineProfile,
    times: T,
    options: &SimulateOptions,
) -> Result<Simulation, SimulateError> {
    let mut step_time = StepTimeModel::new(model, times, profile, deployment)?;
    simulate_with(&mut step_time, workload, options)
}

/// Simulates a workload with the model, profile and deployment of `step_time`.
///
/// The times it has predicted are kept for the next workload; they change no result.
///
/// # Errors
/// As [`simulate`].
pub fn simulate_with<T: OperatorTimes>(
    step_time: &mut StepTimeModel<T>,
    workload: &Workload,
    options: &SimulateOptions,
) -> Result<Simulation, SimulateError> {
    check_workload(workload)?;
    let scheduler = scheduler_of(step_time.profile())?.build(step_time.deployment())?;
    let mut step_times = Vec::new();
    let executor = SimulatedExecutor::new(&mut *step_time, options).keeping(&mut step_times);
    let served = serve(workload, scheduler, executor)?;
    Ok(report(step_time, workload, options, served, step_times))
}

/// The scheduler that an engine profile names.
///
/// # Errors
/// When there is none of that name.
pub fn scheduler_of(profile: &EngineProfile) -> Result<SchedulerKind, SimulateError> {
    profile
        .scheduler
        .parse()
        .map_err(|source| SimulateError::UnknownScheduler { profile: profile.name.clone(), source })
}

impl From<ServeError<StepTimeError>> for SimulateError {
    fn from(error: ServeError<StepTimeError>) -> Self {
        match error {
            ServeError::Executor(error) => Self::StepTime(error),
            stalled @ ServeError::Stalled { .. } => Self::Stalled(stalled.to_string()),
        }
    }
}

/// Checks what a simulation relies on.
///
/// # Errors
/// When a length is 0 or arrivals step back.
pub fn check_workload(workload: &Workload) -> Result<(), SimulateError> {
    let mut last = Nanos::ZERO;
    for r in &workload.requests {
        let invalid = |expected, found| {
            Err(SimulateError::InvalidWorkload { request_id: r.request_id, expected, found })
        };
        if r.num_prefill_tokens == 0 {
            return invalid("num_prefill_tokens of at least 1", 0);
        }
        if r.num_decode_tokens == 0 {
            return invalid("num_decode_tokens of at least 1", 0);
        }
        if r.arrival_time_ns < last {
            return invalid("arrival_time_ns not before the request above", r.arrival_time_ns.0);
        }
        last = r.arrival_time_ns;
    }
    Ok(())
}

fn report<T: OperatorTimes>(
    step_time: &StepTimeModel<T>,
    workload: &Workload,
    options: &SimulateOptions,
    served: Served,
    step_times: Vec<StepTime>,
) -> Simulation {
    let profile = step_time.profile();
    let steps_of = |dispatch| step_times.iter().filter(|time| time.parts.dispatch == dispatch).count();
    let mut provenance = ProvenanceTimes::default();
    for time in &step_times {
        provenance += time.parts.provenance;
    }
    let rejections: Vec<_> = served
        .requests
        .iter()
        .filter_map(|outcome| Some((outcome.request.request_id, outcome.rejection?)))
        .collect();
    let counts = SimulationCounts {
        requests: workload.requests.len(),
        finished: workload.requests.len() - rejections.len(),
        rejected: rejections.len(),
        preemptions: served.num_preemptions(),
        eager_steps: steps_of(Dispatch::Eager),
        piecewise_graph_steps: steps_of(Dispatch::PiecewiseGraph),
        full_graph_steps: steps_of(Dispatch::FullGraph),
    };
    let Served { requests, mut replicas } = served;
    let log = replicas.pop().unwrap_or_default();
    let run = Run {
        info: RunInfo {
            gpu: options.gpu.clone(),
            deployment: Some(step_time.deployment().clone()),
            workload_digest: options.workload_digest.clone(),
            bundle_digest: options.bundle_digest.clone(),
            seed: Some(options.seed),
            ..RunInfo::new(RunKind::Simulated, profile.name.as_str())
        },
        requests: requests.iter().map(|outcome| request_row(outcome, &profile.name)).collect(),
        tokens: requests.iter().flat_map(|outcome| token_rows(outcome, &log.step_ends)).collect(),
        steps: log.steps,
    };
    Simulation { run, step_times, coverage: provenance.shares(), counts, rejections }
}

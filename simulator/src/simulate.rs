//! One simulated run: a workload served by a modelled engine.

use plumbline_bundles::{Dispatch, EngineProfile, HostCost, engine_profile::ClientCosts};
use plumbline_schema::{
    Deployment, HostFactorUsed, HostInfo, ModelSpec, Nanos, RequestMetrics, RequestStatus, Run, RunInfo,
    RunKind, TokenMetrics, Workload, WorkloadRequest,
};
use serde::Serialize;
use thiserror::Error;

use crate::{
    residual::{ResidualSampler, Residuals},
    scheduler::{Rejection, ScheduledStep, SchedulerError, SchedulerKind, SchedulerState, UnknownScheduler},
    sequence::SequenceId,
    serve::{Executor, ServeError, Served, ServedRequest, StepSpan, serve},
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
    /// The host that was asked for, for the run's `run.json`; it changes no time, the profile's factor does.
    pub host: Option<HostInfo>,
    /// Which host factor the profile was given and why, for the run's `run.json`.
    pub host_factor: Option<HostFactorUsed>,
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
    let kind: SchedulerKind = step_time.profile().scheduler.parse().map_err(|source| {
        SimulateError::UnknownScheduler { profile: step_time.profile().name.clone(), source }
    })?;
    let mut scheduler = kind.build(step_time.deployment())?;
    let mut executor = SimulatedExecutor::new(step_time, options);
    let served = serve(workload, scheduler.as_mut(), &mut executor).map_err(|error| match error {
        ServeError::Executor(error) => SimulateError::StepTime(error),
        stalled @ ServeError::Stalled { .. } => SimulateError::Stalled(stalled.to_string()),
    })?;
    let step_times = executor.step_times;
    Ok(report(step_time, workload, options, served, step_times))
}

fn check_workload(workload: &Workload) -> Result<(), SimulateError> {
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

/// Runs steps by asking how long they take.
#[derive(Debug)]
pub struct SimulatedExecutor<'a, T> {
    step_time: &'a mut StepTimeModel<T>,
    schedule: HostCost,
    client: ClientCosts,
    host_factor: f64,
    idle_threshold: Nanos,
    residuals: Option<ResidualSampler>,
    clock: Nanos,
    last_end: Nanos,
    /// Whether the next step comes after an idle gap; the first of a run does.
    is_after_idle: bool,
    step_times: Vec<StepTime>,
}

impl<'a, T: OperatorTimes> SimulatedExecutor<'a, T> {
    /// An engine that has not run a step yet, at time 0.
    pub fn new(step_time: &'a mut StepTimeModel<T>, options: &SimulateOptions) -> Self {
        let profile = step_time.profile();
        Self {
            schedule: profile.schedule,
            client: profile.client,
            host_factor: profile.host_factor,
            idle_threshold: Nanos::from_f64(profile.idle_threshold_ns),
            residuals: match options.residuals {
                Residuals::Drawn => Some(ResidualSampler::new(options.seed)),
                Residuals::None => None,
            },
            clock: Nanos::ZERO,
            last_end: Nanos::ZERO,
            is_after_idle: true,
            step_times: Vec::new(),
            step_time,
        }
    }

    /// What each step's time so far is made of.
    #[must_use]
    pub fn step_times(&self) -> &[StepTime] {
        &self.step_times
    }
}

impl<T: OperatorTimes> Executor for SimulatedExecutor<'_, T> {
    type Error = StepTimeError;

    fn now(&self) -> Nanos {
        self.clock
    }

    fn wait_until(&mut self, time: Nanos) {
        self.clock = self.clock.max(time);
        self.is_after_idle |= self.clock.saturating_since(self.last_end) >= self.idle_threshold;
    }

    fn admit(&mut self, _id: SequenceId, request: &WorkloadRequest) -> Result<(), StepTimeError> {
        let tokens = f64::from(request.num_prefill_tokens);
        let cost = self.client.admit_ns + self.client.admit_per_token_ns * tokens;
        self.clock += Nanos::from_f64(self.host_factor * cost);
        Ok(())
    }

    fn execute(
        &mut self,
        step: &ScheduledStep,
        start: Nanos,
        _state: &SchedulerState<'_>,
    ) -> Result<StepSpan, StepTimeError> {
        let batch = step.shape();
        let mut time = self.step_time.step_time(&batch, self.is_after_idle)?;
        if let Some(sampler) = &mut self.residuals {
            let dispatch = time.parts.dispatch;
            time.residual = sampler.draw(dispatch, &self.step_time.costs(dispatch)?.residual_quantiles);
        }
        self.is_after_idle = false;
        // At least 1 ns: whatever the residual, the clock moves.
        let duration = Nanos::from_f64(time.total_ns()).max(Nanos(1));
        self.last_end = start + duration;
        let between = self.client.between_steps.at(batch.num_seqs, batch.num_tokens);
        self.clock = self.last_end + Nanos::from_f64(self.host_factor * between);
        self.step_times.push(time);
        let schedule = self.host_factor * self.schedule.at(batch.num_seqs, batch.num_tokens);
        Ok(StepSpan { duration, schedule: Nanos::from_f64(schedule).min(duration) })
    }
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
    let rejections: Vec<_> = workload
        .requests
        .iter()
        .zip(&served.requests)
        .filter_map(|(request, served)| Some((request.request_id, served.rejection?)))
        .collect();
    let counts = SimulationCounts {
        requests: workload.requests.len(),
        finished: workload.requests.len() - rejections.len(),
        rejected: rejections.len(),
        preemptions: served.num_preemptions,
        eager_steps: steps_of(Dispatch::Eager),
        piecewise_graph_steps: steps_of(Dispatch::PiecewiseGraph),
        full_graph_steps: steps_of(Dispatch::FullGraph),
    };
    let pairs = || workload.requests.iter().zip(&served.requests);
    let run = Run {
        info: RunInfo {
            kind: RunKind::Simulated,
            engine: profile.name.clone(),
            gpu: options.gpu.clone(),
            deployment: Some(step_time.deployment().clone()),
            workload_digest: options.workload_digest.clone(),
            bundle_digest: options.bundle_digest.clone(),
            seed: Some(options.seed),
            host: options.host.clone(),
            host_factor: options.host_factor.clone(),
        },
        requests: pairs().map(|(request, served)| request_metrics(request, served, &profile.name)).collect(),
        tokens: pairs().flat_map(|(request, served)| token_metrics(request.request_id, served)).collect(),
        steps: served.steps,
    };
    Simulation { run, step_times, coverage: provenance.shares(), counts, rejections }
}

fn request_metrics(request: &WorkloadRequest, served: &ServedRequest, backend: &str) -> RequestMetrics {
    let first = served.token_times.first().copied();
    RequestMetrics {
        request_id: request.request_id,
        arrival_time_ns: request.arrival_time_ns,
        admitted_time_ns: served.admitted,
        first_token_time_ns: first,
        ttft_ns: first.map(|time| time.saturating_since(request.arrival_time_ns)),
        completion_time_ns: served.token_times.last().copied(),
        num_prefill_tokens: request.num_prefill_tokens,
        num_decode_tokens: request.num_decode_tokens,
        num_decode_tokens_actual: served.token_times.len() as u32,
        status: if served.rejection.is_some() { RequestStatus::Rejected } else { RequestStatus::Ok },
        backend: backend.to_owned(),
    }
}

fn token_metrics(request_id: u64, served: &ServedRequest) -> impl Iterator<Item = TokenMetrics> {
    let times = &served.token_times;
    times.iter().enumerate().map(move |(index, &time)| TokenMetrics {
        request_id,
        token_index: index as u32,
        token_time_ns: time,
        token_latency_ns: if index == 0 { Nanos::ZERO } else { time.saturating_since(times[index - 1]) },
    })
}

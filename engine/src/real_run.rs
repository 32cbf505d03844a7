//! A workload served by the engine, as a run.

use std::{path::Path, sync::atomic::AtomicBool};

use plumbline_profiler::host::{HostReport, cpu_model};
use plumbline_schema::{
    BF16_NAME, Environment, HostInfo, HostScore, InputError, Nanos, Run, RunConduct, RunInfo, RunKind,
    StepPhases, WarmUp, Workload, files::write_csv,
};
use plumbline_simulator::{
    SchedulerKind,
    output::{request_row, token_rows},
    recorder::RunRecorder,
    replica::{Arrival, Replica},
    serve::ServeError,
};
use serde::Serialize;

use crate::{
    engine::{Dispatch, Engine},
    error::EngineError,
    executor::{EngineExecutor, IdleGap, Sampling},
};

/// What runs of this engine call it.
pub const BACKEND: &str = "native";

/// How a workload is served, and what the run is to say of it.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The policy that forms steps.
    pub scheduler: SchedulerKind,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Whether the outputs are kept.
    pub keeps_outputs: bool,
    /// SHA-256 of the workload, hex.
    pub workload_digest: Option<String>,
    /// Plumbline's name of the GPU.
    pub gpu: Option<String>,
    /// Where the weights came from, in words.
    pub weights: String,
    /// The engine's warm-up.
    pub warm_up: Option<WarmUp>,
}

/// A workload that was served, or as much of it as could be.
#[derive(Debug)]
pub struct RealRun {
    /// The run.
    pub run: Run,
    /// Times with nothing to do.
    pub idle_gaps: Vec<IdleGap>,
    /// Requests that were refused, and why.
    pub rejections: Vec<(u64, String)>,
    /// Each request's id and output, where they were kept.
    pub outputs: Vec<(u64, Vec<u32>)>,
    /// Why it ended early.
    pub error: Option<EngineError>,
}

/// Serves a workload from now on; every request arrives at its time, whatever became of those before.
///
/// # Errors
/// When the scheduler does not serve the deployment. What fails later ends the run early and is told in it.
pub fn serve_workload(
    engine: &mut Engine,
    workload: &Workload,
    options: &RunOptions,
    stop: &AtomicBool,
) -> Result<RealRun, EngineError> {
    let deployment = engine.deployment().clone();
    let scheduler = options.scheduler.build(&deployment).map_err(|error| EngineError::Unsupported {
        expected: "a deployment that the scheduler serves".to_owned(),
        found: error.to_string(),
    })?;
    let device_name = engine.gpu_name().to_owned();
    let environment = Environment {
        model: Some(engine.model().clone()),
        dtype: Some(BF16_NAME.to_owned()),
        ..Environment::default()
    };
    let before = HostReport::measure().single_thread_score;
    let executor = EngineExecutor::new(engine, options.sampling, stop);
    let executor = if options.keeps_outputs { executor.keeping_outputs() } else { executor };
    let mut recorder = RunRecorder::with_step_requests();
    let mut replica = Replica::new(0, scheduler, executor);
    for (request, index) in workload.requests.iter().zip(0..) {
        replica.push(Arrival::new(request.clone(), index));
    }
    let ended = replica.run_until(Nanos(u64::MAX), &mut recorder);
    let error = match ended {
        Ok(()) => None,
        Err(ServeError::Executor(error)) => Some(error),
        Err(stalled) => Some(EngineError::Unsupported {
            expected: "a scheduler that forms steps".to_owned(),
            found: stalled.to_string(),
        }),
    };
    if error.is_some() {
        replica.abandon(&mut recorder);
    }
    let (log, outputs) = replica.into_executor().into_log();
    let served = recorder.into_served();
    let step_log = served.replicas.into_iter().next().unwrap_or_default();
    let mut steps = step_log.steps;
    // A step that did not end is none.
    steps.truncate(log.phases.len());
    for (step, phases) in steps.iter_mut().zip(&log.phases) {
        step.phases = Some(*phases);
    }
    let after = HostReport::measure().single_thread_score;
    let end_ns = step_log.step_ends.last().map_or(0, |end| end.0.cast_signed());
    let score = |time_ns, single_thread_score| HostScore { time_ns, single_thread_score };
    let mut host_scores = vec![score(-1, before)];
    host_scores.extend(log.scores.iter().map(|at| score(at.time.0.cast_signed(), at.score)));
    host_scores.push(score(end_ns, after));
    let count = |dispatch| log.dispatches.iter().filter(|&&other| other == dispatch).count() as u64;
    let conduct = RunConduct {
        incomplete: error.as_ref().map(ToString::to_string),
        host_scores,
        warm_up: options.warm_up,
        graph_steps: count(Dispatch::Graph),
        eager_steps: count(Dispatch::Eager),
        idle_ns: log.idle_gaps.iter().map(|gap| gap.duration.0).sum(),
        device_name,
        weights: options.weights.clone(),
    };
    let rejections = served
        .requests
        .iter()
        .filter_map(|outcome| Some((outcome.request.request_id, outcome.rejection?.to_string())))
        .collect();
    let run = Run {
        info: RunInfo {
            gpu: options.gpu.clone(),
            deployment: Some(deployment),
            workload_digest: options.workload_digest.clone(),
            seed: Some(options.sampling.seed),
            host: Some(HostInfo { cpu_model: Some(cpu_model()), single_thread_score: before }),
            conduct: Some(conduct),
            environment: Some(environment),
            ..RunInfo::new(RunKind::Real, BACKEND)
        },
        tokens: served.requests.iter().flat_map(|outcome| token_rows(outcome, &step_log.step_ends)).collect(),
        requests: served.requests.iter().map(|outcome| request_row(outcome, BACKEND)).collect(),
        steps,
    };
    Ok(RealRun { run, idle_gaps: log.idle_gaps, rejections, outputs, error })
}

/// A row of `idle_gaps.csv`.
#[derive(Serialize)]
struct IdleRow {
    start_ns: u64,
    duration_ns: u64,
}

impl RealRun {
    /// Writes the run's files into a folder, and `idle_gaps.csv` where there were gaps.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn write(&self, folder: &Path) -> Result<(), InputError> {
        if !self.idle_gaps.is_empty() {
            let rows = self.idle_gaps.iter();
            let rows = rows.map(|gap| IdleRow { start_ns: gap.start.0, duration_ns: gap.duration.0 });
            write_csv(&folder.join("idle_gaps.csv"), rows)?;
        }
        self.run.write(folder)
    }

    /// Mean host time of a step by phase, of the steps that have any; the scheduler's part first.
    #[must_use]
    pub fn mean_phases(&self) -> Option<(Nanos, StepPhases)> {
        let steps: Vec<_> =
            self.run.steps.iter().filter_map(|step| Some((step.schedule_ns, step.phases?))).collect();
        let count = steps.len() as u64;
        let mean = |of: fn(&(Nanos, StepPhases)) -> Nanos| {
            (count > 0).then(|| Nanos(steps.iter().map(|step| of(step).0).sum::<u64>() / count))
        };
        Some((
            mean(|step| step.0)?,
            StepPhases {
                prepare_ns: mean(|step| step.1.prepare_ns)?,
                launch_ns: mean(|step| step.1.launch_ns)?,
                wait_ns: mean(|step| step.1.wait_ns)?,
                sample_ns: mean(|step| step.1.sample_ns)?,
                finish_ns: mean(|step| step.1.finish_ns)?,
            },
        ))
    }
}

//! Calibration: real runs to the host part of an engine profile.
//!
//! [`observe`] reads step times and gaps off the runs, [`fit`] turns them into costs by dispatch, operator scales,
//! client costs and residuals, with [`solve`] underneath; [`mod@judge`] shows before and after on runs held out. What
//! the runs cannot pin stays at its prior and is named. Runs that record no steps and whose requests overlap are fitted by
//! simulating them (`requests`).

mod bootstrap;
pub mod fit;
pub mod host;
pub mod judge;
mod layout;
pub mod observe;
mod requests;
mod scheduling;
pub mod solve;

use std::{collections::BTreeMap, path::Path};

use plumbline_bundles::{
    Dispatch, DispatchCosts, EngineProfile, HostCost, HostCosts,
    engine_profile::{ClientCosts, FittedOn, OperatorScales},
};
use plumbline_schema::{Environment, HostInfo, InputError, ModelSpec, Run, Workload};
use plumbline_simulator::{
    replay::{ReplayError, served_workload},
    step_time::{StepTimeError, StepTimeModel},
    times::OperatorTimes,
};
use thiserror::Error;

use self::{
    fit::{ClassTimes, Observation},
    observe::{Source, has_steps, observed_gaps, observed_steps},
};
pub use self::{
    host::{HostFactor, host_factor},
    judge::{HeldOutRow, judge},
};

/// A real run to fit on, with the model it served.
#[derive(Clone, Debug)]
pub struct FitRun {
    /// Its name in reports.
    pub name: String,
    /// The run; it must carry its deployment.
    pub run: Run,
    /// What it served.
    pub workload: Workload,
    /// The model.
    pub model: ModelSpec,
    /// What names its host: runs with the same name share a host factor. The first run's is the reference.
    pub host: String,
}

impl FitRun {
    /// Reads a run folder; the model is `model`, or the shipped one that the run's deployment names.
    ///
    /// It is named by the last two parts of its path. Its host is named by the CPU that the run records, or else by the folder
    /// above: an engine's runs share one.
    ///
    /// # Errors
    /// When the folder holds no sound run, or no model is known.
    pub fn read(folder: &Path, model: Option<&ModelSpec>) -> Result<Self, CalibrateError> {
        let run = Run::read(folder)?;
        let workload = served_workload(&run, folder)?;
        let parts: Vec<_> = folder.components().map(|part| part.as_os_str().to_string_lossy()).collect();
        let last = |n: usize| parts[parts.len().saturating_sub(n)..].join("/");
        let (name, own) = (last(2), last(1));
        let recorded = run.info.host.as_ref().and_then(|host| host.cpu_model.clone());
        let above = || name.strip_suffix(&own).unwrap_or_default().trim_end_matches('/').to_owned();
        let host = recorded.unwrap_or_else(above);
        let model = match (model, &run.info.deployment) {
            (Some(model), _) => model.clone(),
            (None, Some(d)) if ModelSpec::shipped_names().contains(&d.model.as_str()) => {
                ModelSpec::load(&d.model)?
            }
            (None, Some(d)) => {
                return Err(CalibrateError::UnknownModel { run: name, found: format!("`{}`", d.model) });
            }
            (None, None) => return Err(CalibrateError::NoDeployment { run: name }),
        };
        Ok(Self { name, run, workload, model, host })
    }
}

/// What a calibration starts from and how its result is labelled.
#[derive(Clone, Debug)]
pub struct CalibrateOptions {
    /// Starting values and everything that is not fitted (scheduler, idle threshold).
    pub prior: EngineProfile,
    /// Plumbline's name of the GPU of the real runs.
    pub gpu: String,
    /// Plumbline's name of the GPU whose operator times are used; differs from `gpu` when transferred.
    pub bundle_gpu: String,
    /// Digest of the bundle's predictors, as `Bundle::predictors_digest` gives it.
    pub predictors_digest: String,
}

/// A calibration that cannot be made.
#[derive(Debug, Error)]
pub enum CalibrateError {
    /// There is nothing to fit on.
    #[error("expected at least one real run to fit on, found none")]
    NoRuns,
    /// A run cannot be read.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A run's workload is not its own.
    #[error(transparent)]
    Workload(#[from] ReplayError),
    /// A run's model is not known.
    #[error("{run}: expected a deployment that names a shipped model, found {found}")]
    UnknownModel {
        /// The run.
        run: String,
        /// What it names.
        found: String,
    },
    /// A run does not say how the engine was set.
    #[error(
        "{run}: expected a deployment (run.json, or an engine.json in the run's folder or its parent), found none"
    )]
    NoDeployment {
        /// The run.
        run: String,
    },
    /// A run's steps cannot be known.
    #[error("{run}: {reason}")]
    NoSteps {
        /// The run.
        run: String,
        /// Why.
        reason: String,
    },
    /// A held-out run cannot be predicted.
    #[error("{run}: {reason}")]
    HoldOut {
        /// The run.
        run: String,
        /// Why.
        reason: String,
    },
    /// The bundle cannot say how long a step's operators take.
    #[error("{run}: {source}")]
    StepTime {
        /// The run.
        run: String,
        /// What is missing.
        #[source]
        source: StepTimeError,
    },
}

/// Kernels of a forward pass, roughly: where a graph's launch cost is taken from before it is fitted.
const TYPICAL_GRAPH_NODES: u32 = 512;

/// A profile to start from when there is none: this host's own launch costs, and nothing else known.
///
/// A prediction from it is what a simulator that knows only kernels and launches would say.
#[must_use]
pub fn uncalibrated(name: &str, engine: &str, scheduler: &str, host: &HostCosts) -> EngineProfile {
    let launch = host.kernel_launch_ns.p50_ns;
    let costs = |launch_ns: f64| DispatchCosts { launch_ns, ..DispatchCosts::default() };
    let graph = host.graph_launch_at(TYPICAL_GRAPH_NODES).unwrap_or(launch);
    EngineProfile {
        name: name.to_owned(),
        engine: engine.to_owned(),
        scheduler: scheduler.to_owned(),
        dispatch: BTreeMap::from([
            (Dispatch::Eager, costs(launch)),
            (Dispatch::PiecewiseGraph, costs(launch)),
            (Dispatch::FullGraph, costs(graph)),
        ]),
        schedule: HostCost::default(),
        client: ClientCosts::default(),
        operator_scales: OperatorScales::default(),
        idle_threshold_ns: 2e7,
        host_factor: 1.0,
        fitted_on: FittedOn::default(),
    }
}

/// Fits the host part of an engine profile on real runs.
///
/// # Errors
/// When a run lacks its deployment or its steps, or the bundle an operator.
pub fn calibrate<T: OperatorTimes + Clone + Send>(
    runs: &[FitRun],
    times: &T,
    options: &CalibrateOptions,
) -> Result<EngineProfile, CalibrateError> {
    if runs.is_empty() {
        return Err(CalibrateError::NoRuns);
    }
    let prior = &options.prior;
    let mut hosts: Vec<&str> = Vec::new();
    let mut observations = Vec::new();
    let mut gaps = Vec::new();
    let mut by_requests = Vec::new();
    for (index, fit_run) in runs.iter().enumerate() {
        if !has_steps(&fit_run.run) {
            by_requests.push(fit_run);
            continue;
        }
        let host = hosts.iter().position(|known| *known == fit_run.host).unwrap_or_else(|| {
            hosts.push(&fit_run.host);
            hosts.len() - 1
        });
        let (source, steps) = observe_run(fit_run, index, host, times, prior)?;
        observations.extend(steps);
        if source == Source::Steps {
            gaps.push((host, observed_gaps(&fit_run.run)));
        }
    }
    let fit = fit::fit(&observations, &prior.dispatch, &prior.operator_scales);
    let factor_of = |host: usize| fit.host_factors.get(host).copied().unwrap_or(1.0);
    let gaps: Vec<_> = gaps.into_iter().map(|(host, gaps)| (factor_of(host), gaps)).collect();
    let mut num_steps: BTreeMap<String, u64> = BTreeMap::new();
    for o in &observations {
        *num_steps.entry(o.dispatch.name().to_owned()).or_default() += 1;
    }
    let fitted_on = FittedOn {
        gpu: options.gpu.clone(),
        bundle_gpu: options.bundle_gpu.clone(),
        predictors_digest: options.predictors_digest.clone(),
        runs: runs.iter().map(|r| r.name.clone()).collect(),
        num_steps,
        step_error: fit.step_error.iter().map(|(d, e)| (d.name().to_owned(), *e)).collect(),
        intervals: bootstrap::intervals(&observations, &prior.dispatch, &prior.operator_scales),
        // Without a step nothing of it was fitted.
        not_identified: if observations.is_empty() { Vec::new() } else { fit.not_identified },
        disturbed_share: fit.disturbed_share,
        host_factors: hosts.iter().enumerate().map(|(i, name)| ((*name).to_owned(), factor_of(i))).collect(),
        host_factor_runs: Vec::new(),
        engine_version: recorded(runs, |environment| environment.engine_version.as_ref()),
        driver_version: recorded(runs, |environment| environment.driver_version.as_ref()),
        host: reference_host(runs),
    };
    let is_known = |d: Dispatch| was_seen(d, &observations, prior) || !by_requests.is_empty();
    let profile = EngineProfile {
        dispatch: fit.dispatch.into_iter().filter(|(d, _)| is_known(*d)).collect(),
        schedule: fit.schedule,
        client: fit::fit_client(&gaps, &prior.client),
        operator_scales: fit.scales,
        host_factor: 1.0,
        fitted_on,
        ..prior.clone()
    };
    if by_requests.is_empty() {
        return Ok(profile);
    }
    let refined = requests::refine(&by_requests, times, &profile)?;
    let mut profile = refined.profile;
    profile.fitted_on.not_identified.extend(refined.not_identified);
    Ok(profile)
}

/// Fits one number of a profile to runs on another machine: how fast its host is.
///
/// What else the profile says stays; half a minute of one run is enough.
///
/// # Errors
/// As [`host_factor`].
pub fn calibrate_host<T: OperatorTimes>(
    runs: &[FitRun],
    times: &T,
    prior: &EngineProfile,
) -> Result<EngineProfile, CalibrateError> {
    let host = host_factor(runs, times, prior)?;
    let mut profile = EngineProfile { host_factor: host.factor, ..prior.clone() };
    let names = runs.iter().map(|run| run.name.clone());
    profile.fitted_on.host_factor_runs = names.collect();
    Ok(profile)
}

/// What the first run that records it says of its environment.
fn recorded(runs: &[FitRun], part: impl Fn(&Environment) -> Option<&String>) -> Option<String> {
    runs.iter().find_map(|run| part(run.run.info.environment.as_ref()?).cloned())
}

/// The host that costs are stated for, as the first of its runs that records it says.
fn reference_host(runs: &[FitRun]) -> Option<HostInfo> {
    let reference = &runs.first()?.host;
    runs.iter().filter(|run| run.host == *reference).find_map(|run| run.run.info.host.clone())
}

/// Whether a dispatch was fitted now, or before: an uncalibrated one must not pass for a fitted one.
fn was_seen(dispatch: Dispatch, observations: &[Observation], prior: &EngineProfile) -> bool {
    observations.iter().any(|o| o.dispatch == dispatch)
        || prior.fitted_on.num_steps.contains_key(dispatch.name())
}

fn observe_run<T: OperatorTimes>(
    fit_run: &FitRun,
    index: usize,
    host: usize,
    times: &T,
    prior: &EngineProfile,
) -> Result<(Source, Vec<Observation>), CalibrateError> {
    let run = fit_run.name.clone();
    let Some(deployment) = &fit_run.run.info.deployment else {
        return Err(CalibrateError::NoDeployment { run });
    };
    let (source, steps) = observed_steps(&fit_run.run, prior)
        .map_err(|reason| CalibrateError::NoSteps { run: run.clone(), reason })?;
    let wrap = |source| CalibrateError::StepTime { run: run.clone(), source };
    let mut model = StepTimeModel::new(&fit_run.model, times, prior, deployment).map_err(wrap)?;
    let mut observations = Vec::with_capacity(steps.len());
    for step in steps.iter().filter(|s| s.time_ns > 0.0 && !s.batch.is_empty()) {
        let batch = step.batch.shape();
        let parts = model.gpu_parts(&batch).map_err(wrap)?;
        observations.push(Observation {
            run: index,
            host,
            dispatch: parts.dispatch,
            batch,
            gpu: ClassTimes {
                prefill_gemm: if parts.is_decode_only { 0.0 } else { parts.gemm_ns },
                decode_gemm: if parts.is_decode_only { parts.gemm_ns } else { 0.0 },
                prefill_attention: parts.prefill_attention_ns,
                decode_attention: parts.decode_attention_ns,
                other: parts.other_ns,
            },
            num_launches: parts.num_launches,
            after_idle: step.after_idle,
            time_ns: step.time_ns,
            schedule_ns: step.schedule_ns,
        });
    }
    Ok((source, observations))
}

#[cfg(test)]
mod tests;

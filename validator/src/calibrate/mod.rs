//! Calibration: real runs to the host part of an engine profile.
//!
//! [`observe`] reads step times and gaps off the runs, [`fit`] turns them into costs by dispatch, operator scales,
//! client costs and residuals, with [`solve`] underneath; [`mod@judge`] shows before and after on runs held out. What
//! the runs cannot pin stays at its prior and is named.

pub mod fit;
pub mod judge;
pub mod observe;
pub mod solve;

use std::collections::BTreeMap;

use plumbline_bundles::{
    Dispatch, DispatchCosts, EngineProfile, HostCosts,
    engine_profile::{ClientCosts, FittedOn, OperatorScales},
};
use plumbline_schema::{ModelSpec, Run};
use plumbline_simulator::{
    step_time::{StepTimeError, StepTimeModel},
    times::OperatorTimes,
};
use thiserror::Error;

pub use self::judge::{HeldOutRow, judge};
use self::{
    fit::{ClassTimes, Observation},
    observe::{Source, observed_gaps, observed_steps},
};

/// A real run to fit on, with the model it served.
#[derive(Clone, Debug)]
pub struct FitRun {
    /// Its name in reports.
    pub name: String,
    /// The run; it must carry its deployment.
    pub run: Run,
    /// The model.
    pub model: ModelSpec,
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
    /// SHA-256 of the bundle's manifest, hex.
    pub bundle_digest: String,
}

/// A calibration that cannot be made.
#[derive(Debug, Error)]
pub enum CalibrateError {
    /// There is nothing to fit on.
    #[error("expected at least one real run to fit on, found none")]
    NoRuns,
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

/// A profile to start from when there is none: this host's own launch costs, and nothing else known.
///
/// A prediction from it is what a simulator that knows only kernels and launches would say.
#[must_use]
pub fn uncalibrated(name: &str, engine: &str, scheduler: &str, host: &HostCosts) -> EngineProfile {
    let launch = host.kernel_launch_ns.p50_ns;
    let costs = |launch_ns: f64| DispatchCosts { launch_ns, ..DispatchCosts::default() };
    let graph = host.graph_launch.last().map_or(launch, |g| g.launch_ns.p50_ns);
    EngineProfile {
        name: name.to_owned(),
        engine: engine.to_owned(),
        scheduler: scheduler.to_owned(),
        dispatch: BTreeMap::from([
            (Dispatch::Eager, costs(launch)),
            (Dispatch::PiecewiseGraph, costs(launch)),
            (Dispatch::FullGraph, costs(graph)),
        ]),
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
pub fn calibrate<T: OperatorTimes>(
    runs: &[FitRun],
    times: &T,
    options: &CalibrateOptions,
) -> Result<EngineProfile, CalibrateError> {
    if runs.is_empty() {
        return Err(CalibrateError::NoRuns);
    }
    let prior = &options.prior;
    let mut observations = Vec::new();
    let mut gaps = Vec::new();
    for (index, fit_run) in runs.iter().enumerate() {
        let (source, steps) = observe_run(fit_run, index, times, prior)?;
        observations.extend(steps);
        if source == Source::Steps {
            gaps.push(observed_gaps(&fit_run.run));
        }
    }
    let fit = fit::fit(&observations, &prior.dispatch, &prior.operator_scales);
    let mut num_steps: BTreeMap<String, u64> = BTreeMap::new();
    for o in &observations {
        *num_steps.entry(o.dispatch.name().to_owned()).or_default() += 1;
    }
    let fitted_on = FittedOn {
        gpu: options.gpu.clone(),
        bundle_gpu: options.bundle_gpu.clone(),
        bundle_digest: options.bundle_digest.clone(),
        runs: runs.iter().map(|r| r.name.clone()).collect(),
        num_steps,
        step_error: fit.step_error.iter().map(|(d, e)| (d.name().to_owned(), *e)).collect(),
        not_identified: fit.not_identified,
        disturbed_share: fit.disturbed_share,
    };
    Ok(EngineProfile {
        dispatch: fit.dispatch.into_iter().filter(|(d, _)| was_seen(*d, &observations, prior)).collect(),
        client: fit::fit_client(&gaps, &prior.client),
        operator_scales: fit.scales,
        host_factor: 1.0,
        fitted_on,
        ..prior.clone()
    })
}

/// Whether a dispatch was fitted now, or before: an uncalibrated one must not pass for a fitted one.
fn was_seen(dispatch: Dispatch, observations: &[Observation], prior: &EngineProfile) -> bool {
    observations.iter().any(|o| o.dispatch == dispatch)
        || prior.fitted_on.num_steps.contains_key(dispatch.name())
}

fn observe_run<T: OperatorTimes>(
    fit_run: &FitRun,
    index: usize,
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
            dispatch: parts.dispatch,
            batch,
            gpu: ClassTimes {
                gemm: parts.gemm_ns,
                prefill_attention: parts.prefill_attention_ns,
                decode_attention: parts.decode_attention_ns,
                other: parts.other_ns,
            },
            num_launches: parts.num_launches,
            after_idle: step.after_idle,
            time_ns: step.time_ns,
        });
    }
    Ok((source, observations))
}

#[cfg(test)]
mod tests;

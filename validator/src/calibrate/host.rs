//! How fast one host is against the one a profile was fitted on.

use plumbline_bundles::EngineProfile;
use plumbline_simulator::{step_time::StepTimeModel, times::OperatorTimes};

use super::{
    CalibrateError, FitRun,
    fit::{MAX_HOST_FACTOR, MIN_HOST_FACTOR, weighted_quantile},
    observe::observed_steps,
};

/// A host factor and what it rests on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HostFactor {
    /// The host's costs over those of the host that the profile is stated for.
    pub factor: f64,
    /// Steps it was read off.
    pub num_steps: usize,
}

/// Reads the host factor off real runs on that host, runs counting alike; half a minute of one is enough.
///
/// Where the profile knows what scheduling costs and the runs record it, it is the median of the ratio of the two:
/// the same code, timed in every step, whatever the GPU does. Else it is the median over steps of the host's time on
/// the critical path over what the profile says, which rests on the predicted GPU time too.
///
/// # Errors
/// When a run lacks its deployment or its steps, or the bundle an operator.
pub fn host_factor<T: OperatorTimes>(
    runs: &[FitRun],
    times: &T,
    profile: &EngineProfile,
) -> Result<HostFactor, CalibrateError> {
    let reference = EngineProfile { host_factor: 1.0, ..profile.clone() };
    let mut ratios: Vec<(f64, f64)> = Vec::new();
    for fit_run in runs {
        let of_run = run_ratios(fit_run, times, &reference)?;
        let weight = 1.0 / of_run.len() as f64;
        ratios.extend(of_run.into_iter().map(|ratio| (ratio, weight)));
    }
    ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
    let median = weighted_quantile(&ratios, 0.5).ok_or(CalibrateError::NoRuns)?;
    Ok(HostFactor { factor: median.clamp(MIN_HOST_FACTOR, MAX_HOST_FACTOR), num_steps: ratios.len() })
}

/// Real over expected host time of each step of a run.
fn run_ratios<T: OperatorTimes>(
    fit_run: &FitRun,
    times: &T,
    reference: &EngineProfile,
) -> Result<Vec<f64>, CalibrateError> {
    let run = || fit_run.name.clone();
    let Some(deployment) = &fit_run.run.info.deployment else {
        return Err(CalibrateError::NoDeployment { run: run() });
    };
    let (_, steps) = observed_steps(&fit_run.run, reference)
        .map_err(|reason| CalibrateError::NoSteps { run: run(), reason })?;
    let wrap = |source| CalibrateError::StepTime { run: run(), source };
    let mut model = StepTimeModel::new(&fit_run.model, times, reference, deployment).map_err(wrap)?;
    let mut ratios = Vec::with_capacity(steps.len());
    for step in steps.iter().filter(|s| s.time_ns > 0.0 && !s.batch.is_empty()) {
        let batch = step.batch.shape();
        let scheduling = reference.schedule.at(batch.num_seqs, batch.num_tokens);
        if let Some(measured) = step.schedule_ns.filter(|ns| *ns > 0.0 && scheduling > 0.0) {
            ratios.push(measured / scheduling);
            continue;
        }
        let time = model.step_time(&batch, step.after_idle).map_err(wrap)?;
        let host = time.host_critical_ns();
        if host > 0.0 {
            ratios.push(((step.time_ns - time.predicted_ns()) / host + 1.0).max(0.0));
        }
    }
    Ok(ratios)
}

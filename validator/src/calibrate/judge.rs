//! Before and after, on runs that were not fitted on.

use plumbline_bundles::EngineProfile;
use plumbline_simulator::{OperatorTimes, SimulateOptions, simulate};
use serde::Serialize;

use super::{CalibrateError, FitRun};
use crate::{
    compare::compare,
    metrics::{Metric, Stat},
};

/// One metric of a held-out run, predicted by two profiles.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeldOutRow {
    /// The run.
    pub run: String,
    /// The metric.
    pub metric: Metric,
    /// The statistic.
    pub stat: Stat,
    /// Measured; `None` where the samples do not support it.
    pub real_ms: Option<f64>,
    /// Predicted before calibration; `None` also where that profile cannot form the run's steps.
    pub before_ms: Option<f64>,
    /// Its signed error, %.
    pub before_error_pct: Option<f64>,
    /// Predicted after calibration.
    pub after_ms: Option<f64>,
    /// Its signed error, %.
    pub after_error_pct: Option<f64>,
}

/// Predicts each run with both profiles and compares.
///
/// # Errors
/// When a run lacks its deployment, or the calibrated profile cannot predict it.
pub fn judge<T: OperatorTimes>(
    runs: &[FitRun],
    times: &T,
    before: &EngineProfile,
    after: &EngineProfile,
    seed: u64,
) -> Result<Vec<HeldOutRow>, CalibrateError> {
    let mut rows = Vec::new();
    for held_out in runs {
        let name = &held_out.name;
        let deployment = held_out
            .run
            .info
            .deployment
            .as_ref()
            .ok_or_else(|| CalibrateError::NoDeployment { run: name.clone() })?;
        let failed = |reason: String| CalibrateError::HoldOut { run: name.clone(), reason };
        let predict = |profile: &EngineProfile| {
            let options = SimulateOptions { seed, ..SimulateOptions::default() };
            let simulated =
                simulate(&held_out.model, &held_out.workload, deployment, profile, times, &options)
                    .map_err(|e| failed(e.to_string()))?;
            compare(std::slice::from_ref(&held_out.run), &simulated.run).map_err(|e| failed(e.to_string()))
        };
        let after = predict(after)?;
        // A starting profile may lack what calibration added; that is no reason to withhold the result.
        let before = predict(before).ok();
        for metric in Metric::ALL {
            for stat in [Stat::P50, Stat::P99] {
                let Some(row) = after.row(metric, stat) else { continue };
                let old = before.as_ref().and_then(|b| b.row(metric, stat));
                rows.push(HeldOutRow {
                    run: name.clone(),
                    metric,
                    stat,
                    real_ms: row.real_ms,
                    before_ms: old.and_then(|r| r.sim_ms),
                    before_error_pct: old.and_then(|r| r.error_pct),
                    after_ms: row.sim_ms,
                    after_error_pct: row.error_pct,
                });
            }
        }
    }
    Ok(rows)
}

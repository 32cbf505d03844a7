//! Fitting on runs that record nothing but their requests' times, where requests overlap.
//!
//! What such a run's steps were is not known, but a simulation says what they would be: a few numbers of the profile are moved
//! until simulated TTFT and TPOT are distributed as the real ones. Few, since a run's quantiles pin no more: a host cost a step,
//! one a sequence, one more a step of each dispatch that is no single graph, what taking a request in costs, and a factor on the GPU, which a
//! prior holds near 1. That launching runs beside the GPU cannot be seen from outside: it counts as if it did not.

use plumbline_bundles::{Dispatch, EngineProfile, stats::percentile_of_sorted};
use plumbline_simulator::{Residuals, SimulateOptions, simulate, times::OperatorTimes};
use rayon::prelude::*;

use super::{CalibrateError, FitRun};
use crate::metrics::{Metric, RunMetrics};

/// What is moved. Costs that may be zero to begin with are added to, the others multiplied.
const NAMES: [&str; NUM] = [
    "requests.host_constant_ns",
    "requests.host_per_seq_ns",
    "requests.eager_host_ns",
    "requests.piecewise_graph_host_ns",
    "requests.gpu_factor",
    "requests.admit_ns",
];
const NUM: usize = 6;
/// Quantiles of each metric that are compared.
const QUANTILES: [f64; 5] = [0.1, 0.3, 0.5, 0.7, 0.9];
/// Relative error of one quantile that counts as one: an engine repeats its own within about 5 %.
const SIGMA: f64 = 0.05;
/// Width of the prior on the logarithm of the GPU's factor: kernels hardly move.
const GPU_WIDTH: f64 = 0.05;
/// First steps of the search: 1 ms a step, 10 us a sequence, 2 ms more a step that is no single graph, a factor of `e^0.05`,
/// and 0.1 ms a request.
const FIRST_STEPS: [f64; NUM] = [1e6, 1e4, 2e6, 2e6, 0.05, 1e5];
/// The search begins anew where it ended, as simplices get flat; each time it may ask so often.
const ROUNDS: usize = 3;
const MAX_EVALUATIONS: usize = 140;
/// The search ends where its corners differ by less than this.
const TOLERANCE: f64 = 1e-3;
/// A number that moved by a fifth of its first step changes the objective by less than this is not pinned.
const NOT_PINNED: f64 = 0.05;

/// A refined profile and what the runs could not pin.
pub(super) struct Refined {
    pub profile: EngineProfile,
    pub not_identified: Vec<String>,
}

/// Moves the profile until simulations of the runs are as the runs were.
pub(super) fn refine<T: OperatorTimes + Clone + Send>(
    runs: &[&FitRun],
    times: &T,
    start: &EngineProfile,
) -> Result<Refined, CalibrateError> {
    let mut targets = runs.iter().map(|run| Target::new(run, times)).collect::<Result<Vec<_>, _>>()?;
    let mut objective = |at: &[f64; NUM]| -> Result<f64, CalibrateError> {
        let profile = moved(start, at);
        let errors: Vec<f64> =
            targets.par_iter_mut().map(|target| target.error(&profile)).collect::<Result<_, _>>()?;
        // Costs below zero are none; where all of them are alike a search would not find back.
        let below = |i: usize| (at[i].min(0.0) / FIRST_STEPS[i]).powi(2);
        let priors = (at[4] / GPU_WIDTH).powi(2) / 2.0 + [0, 1, 2, 3, 5].map(below).iter().sum::<f64>();
        Ok(errors.iter().sum::<f64>() + priors)
    };
    let (mut best, mut least) = ([0.0; NUM], f64::INFINITY);
    for _ in 0..ROUNDS {
        (best, least) = nelder_mead(&best, &mut objective)?;
    }
    let mut not_identified = Vec::new();
    for (i, name) in NAMES.iter().enumerate() {
        let mut beside = best;
        beside[i] += 0.2 * FIRST_STEPS[i];
        if objective(&beside)? - least < NOT_PINNED {
            not_identified.push((*name).to_owned());
        }
    }
    Ok(Refined { profile: moved(start, &best), not_identified })
}

/// The profile with the numbers moved; no cost below zero.
fn moved(start: &EngineProfile, at: &[f64; NUM]) -> EngineProfile {
    let mut profile = start.clone();
    let gpu = at[4].exp();
    for (dispatch, costs) in &mut profile.dispatch {
        let launching = match dispatch {
            Dispatch::Eager => at[2].max(0.0),
            Dispatch::PiecewiseGraph => at[3].max(0.0),
            Dispatch::FullGraph => 0.0,
        };
        costs.host_pre.constant_ns = (costs.host_pre.constant_ns + at[0]).max(0.0) + launching;
        costs.host_pre.per_seq_ns = (costs.host_pre.per_seq_ns + at[1]).max(0.0);
    }
    profile.client.admit_ns = (profile.client.admit_ns + at[5]).max(0.0);
    let scales = &mut profile.operator_scales;
    for scale in [
        &mut scales.prefill_gemm,
        &mut scales.decode_gemm,
        &mut scales.prefill_attention,
        &mut scales.decode_attention,
        &mut scales.other,
    ] {
        *scale = (*scale * gpu).clamp(0.5, 2.0);
    }
    profile
}

/// A run and the quantiles that its simulation should have.
struct Target<'a, T> {
    run: &'a FitRun,
    /// Its own, as what was asked before is remembered.
    times: T,
    quantiles_ns: Vec<(Metric, Vec<f64>)>,
}

impl<'a, T: OperatorTimes + Clone> Target<'a, T> {
    fn new(run: &'a FitRun, times: &T) -> Result<Self, CalibrateError> {
        let metrics = RunMetrics::of(&run.run);
        let of = |metric| {
            let sorted = metrics.sorted_ns(metric);
            (!sorted.is_empty()).then(|| (metric, quantiles(&sorted)))
        };
        let quantiles_ns: Vec<_> = [Metric::Ttft, Metric::Tpot].into_iter().filter_map(of).collect();
        if quantiles_ns.is_empty() {
            let reason = "expected requests that are ok, found none".to_owned();
            return Err(CalibrateError::NoSteps { run: run.name.clone(), reason });
        }
        Ok(Self { run, times: times.clone(), quantiles_ns })
    }

    /// Mean over the quantiles of Huber's loss of their relative errors.
    fn error(&mut self, profile: &EngineProfile) -> Result<f64, CalibrateError> {
        let run = || self.run.name.clone();
        let deployment = self.run.run.info.deployment.as_ref();
        let deployment = deployment.ok_or_else(|| CalibrateError::NoDeployment { run: run() })?;
        let options = SimulateOptions { residuals: Residuals::None, ..SimulateOptions::default() };
        let simulated =
            simulate(&self.run.model, &self.run.workload, deployment, profile, &self.times, &options)
                .map_err(|error| CalibrateError::NoSteps { run: run(), reason: error.to_string() })?;
        let metrics = RunMetrics::of(&simulated.run);
        let (mut sum, mut count) = (0.0, 0.0);
        for (metric, real) in &self.quantiles_ns {
            let sorted = metrics.sorted_ns(*metric);
            if sorted.is_empty() {
                let reason = "the simulation finished no request".to_owned();
                return Err(CalibrateError::NoSteps { run: run(), reason });
            }
            for (real, simulated) in real.iter().zip(quantiles(&sorted)) {
                let off = ((simulated / real).ln() / SIGMA).abs();
                sum += if off < 1.0 { off * off / 2.0 } else { off - 0.5 };
                count += 1.0;
            }
        }
        Ok(sum / count)
    }
}

fn quantiles(sorted: &[f64]) -> Vec<f64> {
    QUANTILES.iter().map(|&q| percentile_of_sorted(sorted, q).max(1.0)).collect()
}

type Corner = ([f64; NUM], f64);

/// The simplex search of Nelder and Mead (1965) with their coefficients: reflect 1, expand 2, contract and shrink 1/2.
fn nelder_mead<E>(
    start: &[f64; NUM],
    objective: &mut impl FnMut(&[f64; NUM]) -> Result<f64, E>,
) -> Result<Corner, E> {
    let mut corners: Vec<Corner> = Vec::with_capacity(NUM + 1);
    for i in 0..=NUM {
        let mut at = *start;
        if i > 0 {
            at[i - 1] += FIRST_STEPS[i - 1];
        }
        corners.push((at, objective(&at)?));
    }
    let mut evaluations = corners.len();
    loop {
        corners.sort_by(|a, b| a.1.total_cmp(&b.1));
        let (best, worst) = (corners[0], corners[NUM]);
        if evaluations >= MAX_EVALUATIONS || worst.1 - best.1 < TOLERANCE {
            return Ok(best);
        }
        let mut centre = [0.0; NUM];
        for (corner, _) in &corners[..NUM] {
            for (c, x) in centre.iter_mut().zip(corner) {
                *c += x / NUM as f64;
            }
        }
        let mut along = |factor: f64| -> Result<Corner, E> {
            let at = std::array::from_fn(|i| centre[i] + factor * (worst.0[i] - centre[i]));
            evaluations += 1;
            Ok((at, objective(&at)?))
        };
        let reflected = along(-1.0)?;
        let replacement = if reflected.1 < best.1 {
            let expanded = along(-2.0)?;
            Some(if expanded.1 < reflected.1 { expanded } else { reflected })
        } else if reflected.1 < corners[NUM - 1].1 {
            Some(reflected)
        } else {
            let contracted = along(if reflected.1 < worst.1 { -0.5 } else { 0.5 })?;
            (contracted.1 < worst.1.min(reflected.1)).then_some(contracted)
        };
        if let Some(corner) = replacement {
            corners[NUM] = corner;
            continue;
        }
        for corner in &mut corners[1..] {
            for (x, best) in corner.0.iter_mut().zip(&best.0) {
                *x = best + (*x - best) / 2.0;
            }
            corner.1 = objective(&corner.0)?;
            evaluations += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_search_finds_the_least_of_a_valley() {
        let least = [5e6, 3e4, 7e6, 4e6, 0.1, 2e5];
        let mut objective = |at: &[f64; NUM]| -> Result<f64, ()> {
            let off: Vec<f64> = (0..NUM).map(|i| (at[i] - least[i]) / FIRST_STEPS[i]).collect();
            Ok(off.iter().map(|x| x * x).sum::<f64>() + 0.5 * off[0] * off[2])
        };
        let (mut found, mut value) = ([0.0; NUM], f64::INFINITY);
        for _ in 0..ROUNDS {
            (found, value) = nelder_mead(&found, &mut objective).unwrap();
        }
        assert!(value < 1e-2, "{found:?}: {value}");
    }
}

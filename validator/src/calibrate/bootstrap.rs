//! How sure a fit's numbers are: fitted again on what the runs might as well have been.

use std::collections::BTreeMap;

use plumbline_bundles::{
    Dispatch, DispatchCosts, engine_profile::OperatorScales, stats::percentile_of_sorted,
};
use rand::RngExt;
use rand_pcg::Pcg64;
use rayon::prelude::*;

use super::fit::{Observation, fit};

const NUM_RESAMPLES: u64 = 40;
/// Steps drawn together: what disturbs a step lasts for many.
const BLOCK: usize = 25;
/// Steps of a run and dispatch beyond these add little to a fit, whose weights stop growing long before.
const MAX_BLOCKS: usize = 8;
/// Ends of the interval.
const QUANTILES: [f64; 2] = [0.05, 0.95];

/// A run's steps by dispatch.
type Run<'a> = BTreeMap<Dispatch, Vec<&'a Observation>>;

/// 90 % intervals of the fitted parameters, by name: percentiles over fits on resampled runs and stretches of their steps.
///
/// Runs are drawn with replacement among those of one host, so that every host keeps its factor; blocks of consecutive
/// steps (the moving blocks of Künsch 1989) among those of a run and dispatch, so that each dispatch counts as in the fit
/// itself. The same observations give the same intervals.
pub(super) fn intervals(
    observations: &[Observation],
    prior: &BTreeMap<Dispatch, DispatchCosts>,
    prior_scales: &OperatorScales,
) -> BTreeMap<String, [f64; 2]> {
    if observations.is_empty() {
        return BTreeMap::new();
    }
    let mut runs: BTreeMap<usize, Run<'_>> = BTreeMap::new();
    for observation in observations {
        runs.entry(observation.run).or_default().entry(observation.dispatch).or_default().push(observation);
    }
    let mut hosts: BTreeMap<usize, Vec<&Run<'_>>> = BTreeMap::new();
    for run in runs.values() {
        let first = run.values().next().and_then(|steps| steps.first());
        hosts.entry(first.map_or(0, |step| step.host)).or_default().push(run);
    }
    let fits: Vec<_> = (0..NUM_RESAMPLES)
        .into_par_iter()
        .map(|number| {
            let resampled = resample(&hosts, &mut Pcg64::new(u128::from(number), 0));
            fit(&resampled, prior, prior_scales).parameters
        })
        .collect();
    let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (name, value) in fits.into_iter().flatten() {
        values.entry(name).or_default().push(value);
    }
    values
        .into_iter()
        .map(|(name, mut values)| {
            values.sort_by(f64::total_cmp);
            (name, QUANTILES.map(|q| percentile_of_sorted(&values, q)))
        })
        .collect()
}

fn resample(hosts: &BTreeMap<usize, Vec<&Run<'_>>>, rng: &mut Pcg64) -> Vec<Observation> {
    let mut drawn = Vec::new();
    let mut number = 0;
    for runs in hosts.values() {
        for _ in runs {
            for steps in runs[rng.random_range(0..runs.len())].values() {
                let last_start = steps.len().saturating_sub(BLOCK);
                for _ in 0..steps.len().div_ceil(BLOCK).min(MAX_BLOCKS) {
                    let start = rng.random_range(0..=last_start);
                    let block = steps.iter().skip(start).take(BLOCK);
                    drawn.extend(block.map(|step| Observation { run: number, ..(*step).clone() }));
                }
            }
            number += 1;
        }
    }
    drawn
}

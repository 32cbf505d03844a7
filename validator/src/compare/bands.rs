//! How far an error can be trusted: its 95 % interval by the bootstrap.
//!
//! What would other requests of the same kind, another repeat of the real run and other seeds of the simulation have shown?
//! Requests are drawn whole, with all their gaps, and the same ones in the real and in the simulated run: gaps of one
//! request are not independent of each other, and what both runs share cancels in the error (Davison and Hinkley 1997,
//! sections 2.4 and 3.8, percentile intervals over clusters). Repeats and simulations are drawn beside them.
//!
//! What a draw of requests does to a statistic follows from each request's influence on it (the same, section 2.7.4): a
//! number a request, whatever number of gaps it has, so that a resample is one sum. Percentiles of resamples read off the
//! sorted samples would cost more and be far too wide: neighbouring order statistics of two runs are different requests.

use std::collections::HashMap;

use plumbline_bundles::stats::percentile_of_sorted;
use rand::RngExt;
use rand_pcg::Pcg64;

use super::error_pct;
use crate::metrics::{Metric, RunMetrics, Stat};

/// Fewest requests that an interval is made from: with fewer it would be far too narrow.
pub const MIN_INTERVAL_REQUESTS: usize = 8;

/// Share of resamples that an interval spans.
const COVERAGE: f64 = 0.95;

/// Resamples of an interval: either tail holds ten of them.
const NUM_RESAMPLES: usize = 400;

/// Runs of a kind whose requests are looked at: more of them would cost more and say little more.
const NUM_LENDERS: usize = 3;

/// Most units that are drawn; of more requests, neighbours are drawn together.
const MAX_UNITS: usize = 512;

/// How far either side of a percentile the slope of the samples is taken, in standard errors: as far as the interval reaches.
const REACH: f64 = 2.0;

/// The draws of one comparison, the same for every metric and statistic.
pub(super) struct Resamples {
    unit_of: HashMap<u64, u32>,
    num_units: usize,
    /// How often each unit was drawn: resample by resample, `num_units` each.
    weights: Vec<u32>,
    /// Repeats drawn, as many a resample as there are.
    real: Draws,
    /// Simulations drawn.
    sim: Draws,
}

impl Resamples {
    /// Draws from requests in the order of their run; `None` when they are fewer than [`MIN_INTERVAL_REQUESTS`].
    pub(super) fn draw(ids: &[u64], num_real: usize, num_sim: usize) -> Option<Self> {
        if ids.len() < MIN_INTERVAL_REQUESTS {
            return None;
        }
        let unit_len = ids.len().div_ceil(MAX_UNITS);
        let num_units = ids.len().div_ceil(unit_len);
        let unit_of = ids.iter().enumerate().map(|(i, &id)| (id, (i / unit_len) as u32)).collect();
        // A seed of its own: the same runs always get the same interval.
        let mut rng = Pcg64::new(0, 0);
        let mut weights = vec![0; NUM_RESAMPLES * num_units];
        for resample in weights.chunks_mut(num_units) {
            for _ in 0..num_units {
                resample[rng.random_range(0..num_units)] += 1;
            }
        }
        let (real, sim) = (Draws::new(num_real, &mut rng), Draws::new(num_sim, &mut rng));
        Some(Self { unit_of, num_units, weights, real, sim })
    }

    /// The samples of a metric of the first [`NUM_LENDERS`] repeats and simulations.
    pub(super) fn of_runs(&self, metric: Metric, real: &[RunMetrics], sims: &[RunMetrics]) -> RunSamples {
        let of = |runs: &[RunMetrics]| {
            runs.iter().take(NUM_LENDERS).map(|run| self.samples(run, metric)).collect::<Vec<_>>()
        };
        RunSamples { real: of(real), sim: of(sims) }
    }

    /// A run's samples of a metric, ready for the tables.
    fn samples(&self, run: &RunMetrics, metric: Metric) -> UnitSamples {
        let mut sorted: Vec<(f64, u32)> = Vec::new();
        for request in &run.requests {
            let Some(&unit) = self.unit_of.get(&request.request_id) else { continue };
            match metric {
                Metric::Itl => sorted.extend(request.gaps_ns.iter().map(|gap| (gap / 1e6, unit))),
                _ => sorted.extend(request.value(metric).map(|value| (value / 1e6, unit))),
            }
        }
        sorted.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut counts = vec![0; self.num_units];
        for &(_, unit) in &sorted {
            counts[unit as usize] += 1;
        }
        UnitSamples { sorted, counts }
    }

    /// The interval of the signed error in percent; `values` are the statistic of every run in ms, in the
    /// order of the runs.
    ///
    /// What a draw of requests does to the statistic is the mean over the runs of `samples`; what a draw of repeats and
    /// simulations does follows from `values`.
    pub(super) fn interval(
        &self,
        stat: Stat,
        samples: &RunSamples,
        real_values: &[f64],
        sim_values: &[f64],
    ) -> Option<(f64, f64)> {
        let error = error_pct(median(real_values), median(sim_values))?;
        let (real, sim) = (mean_influence(stat, &samples.real)?, mean_influence(stat, &samples.sim)?);
        let influence: Vec<f64> = sim.iter().zip(&real).map(|(sim, real)| sim - real).collect();
        let centre: f64 = influence.iter().sum();
        let mut errors = Vec::with_capacity(NUM_RESAMPLES);
        for (i, weights) in self.weights.chunks(self.num_units).enumerate() {
            let drawn: f64 =
                weights.iter().zip(&influence).map(|(&w, influence)| f64::from(w) * influence).sum();
            let (real, sim) = (self.real.median(i, real_values), self.sim.median(i, sim_values));
            if real > 0.0 {
                errors.extend(error_pct(real, sim * (drawn - centre).exp()));
            }
        }
        if errors.len() < NUM_RESAMPLES / 2 {
            return None;
        }
        errors.sort_by(f64::total_cmp);
        let tail = (1.0 - COVERAGE) / 2.0;
        let (low, high) = (percentile_of_sorted(&errors, tail), percentile_of_sorted(&errors, 1.0 - tail));
        // Of a skewed statistic the resamples may lie to one side; the number found is one of those possible.
        Some((low.min(error), high.max(error)))
    }
}

/// The mean over runs of each unit's influence; `None` when a run has no sample or a statistic of 0.
fn mean_influence(stat: Stat, runs: &[UnitSamples]) -> Option<Vec<f64>> {
    let mut mean = vec![0.0; runs.first()?.counts.len()];
    for run in runs {
        for (mean, own) in mean.iter_mut().zip(run.influence(stat)?) {
            *mean += own / runs.len() as f64;
        }
    }
    Some(mean)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    percentile_of_sorted(&sorted, 0.5)
}

/// Which of a few runs each resample holds.
struct Draws {
    num_runs: usize,
    picks: Vec<u32>,
}

impl Draws {
    fn new(num_runs: usize, rng: &mut Pcg64) -> Self {
        let picks = (0..NUM_RESAMPLES * num_runs).map(|_| rng.random_range(0..num_runs as u32)).collect();
        Self { num_runs, picks }
    }

    /// The median over the runs of a resample.
    ///
    /// A draw of n from n has `(n - 1) / n` of the variance that a new set of runs would have; the deviation is widened
    /// by the root of its inverse, which is a third for two repeats and nothing much for nine.
    fn median(&self, resample: usize, values: &[f64]) -> f64 {
        let n = self.num_runs;
        let middle = median(values);
        if n < 2 {
            return middle;
        }
        let drawn: Vec<f64> =
            self.picks[resample * n..(resample + 1) * n].iter().map(|&pick| values[pick as usize]).collect();
        middle + (median(&drawn) - middle) * (n as f64 / (n as f64 - 1.0)).sqrt()
    }
}

/// Samples of the runs whose requests lend an interval its width.
pub(super) struct RunSamples {
    /// The first few repeats.
    pub(super) real: Vec<UnitSamples>,
    /// The first few simulations.
    pub(super) sim: Vec<UnitSamples>,
}

/// A run's samples of a metric in ms, ascending, each with the unit that it is drawn with.
pub(super) struct UnitSamples {
    sorted: Vec<(f64, u32)>,
    /// Samples of each unit.
    counts: Vec<u32>,
}

impl UnitSamples {
    /// By how much the logarithm of a statistic changes, to first order, when a unit is drawn once more; `None` without a
    /// sample, or where the statistic is 0.
    fn influence(&self, stat: Stat) -> Option<Vec<f64>> {
        let len = self.sorted.len();
        if len == 0 {
            return None;
        }
        match stat.quantile() {
            None => {
                let mean = self.sorted.iter().map(|(value, _)| value).sum::<f64>() / len as f64;
                let mut influence = vec![0.0; self.counts.len()];
                for &(value, unit) in &self.sorted {
                    influence[unit as usize] += (value - mean) / (mean * len as f64);
                }
                (mean > 0.0).then_some(influence)
            }
            Some(q) => self.influence_on_percentile(q),
        }
    }

    /// More samples below a percentile than their share move it down by the slope of the samples there.
    fn influence_on_percentile(&self, q: f64) -> Option<Vec<f64>> {
        let len = self.sorted.len() as f64;
        let value = self.percentile(q);
        if value <= 0.0 {
            return None;
        }
        let mut below = vec![0.0; self.counts.len()];
        for &(_, unit) in &self.sorted[..=(q * (len - 1.0)) as usize] {
            below[unit as usize] += 1.0;
        }
        let missing: Vec<f64> =
            self.counts.iter().zip(below).map(|(&count, below)| q * f64::from(count) - below).collect();
        let standard_error = missing.iter().map(|m| m * m).sum::<f64>().sqrt() / len;
        let reach = (REACH * standard_error).max(1.0 / len);
        let (low, high) = ((q - reach).max(0.0), (q + reach).min(1.0));
        let slope = (self.percentile(high) - self.percentile(low)) / (high - low);
        Some(missing.into_iter().map(|missing| missing * slope / (len * value)).collect())
    }

    /// As [`percentile_of_sorted`].
    fn percentile(&self, q: f64) -> f64 {
        let at = q * (self.sorted.len() - 1) as f64;
        let (below, above) = (self.sorted[at.floor() as usize].0, self.sorted[at.ceil() as usize].0);
        below + (above - below) * at.fract()
    }
}

#[cfg(test)]
mod tests;

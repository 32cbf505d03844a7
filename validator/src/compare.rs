//! Repeats of a real run against one simulated run: the same requests, metric by metric.

mod bands;
mod paired;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use plumbline_bundles::stats::percentile_of_sorted;
use plumbline_schema::{RequestMetrics, RequestStatus, Run};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::{
    bands::MIN_INTERVAL_REQUESTS,
    paired::{E2eParts, PairedRow},
};
use self::{
    bands::{Resamples, RunSamples},
    paired::paired,
};
use crate::metrics::{Metric, Outcomes, RunMetrics, Stat, Unavailable};

/// How far beyond the range of the real repeats a simulated value still counts as inside: 5 %.
pub const BAND_MARGIN: f64 = 0.05;

/// Scheduled arrivals this close are the same arrival; clients that log when they sent are never exact.
pub const ARRIVAL_TOLERANCE_NS: u64 = 1_000_000;

/// One metric and statistic: what was real, what was simulated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MetricRow {
    /// The metric.
    pub metric: Metric,
    /// The statistic.
    pub stat: Stat,
    /// Samples in each run; the fewest where they differ.
    pub n: u64,
    /// Median over the real repeats; none when n/a.
    pub real_ms: Option<f64>,
    /// Smallest of the real repeats; none when n/a.
    pub real_min_ms: Option<f64>,
    /// Largest of the real repeats; none when n/a.
    pub real_max_ms: Option<f64>,
    /// Simulated; none when n/a.
    pub sim_ms: Option<f64>,
    /// Smallest over the simulations, ms.
    #[serde(default)]
    pub sim_min_ms: Option<f64>,
    /// Largest over the simulations, ms.
    #[serde(default)]
    pub sim_max_ms: Option<f64>,
    /// `100 (sim - real) / real`; none when n/a.
    pub error_pct: Option<f64>,
    /// Lower end of the 95 % interval of the error: other requests of the kind, other repeats, other seeds.
    #[serde(default)]
    pub error_low_pct: Option<f64>,
    /// Upper end of it.
    #[serde(default)]
    pub error_high_pct: Option<f64>,
    /// The noise floor: half of the range of the real repeats in percent of their median. An error below it says nothing.
    #[serde(default)]
    pub noise_pct: Option<f64>,
    /// Whether `sim_ms` lies inside the range of the repeats widened by 5 %; none when n/a.
    pub inside_band: Option<bool>,
    /// Why there is an error and no noise floor or no interval; absent when there are both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bands_na_reason: Option<String>,
    /// Why numbers are n/a; absent when none is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub na_reason: Option<String>,
}

/// How requests ended, before only those that ended well in every run were compared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestCounts {
    /// Requests compared: `ok` in every run.
    pub compared: u64,
    /// Each real repeat.
    pub real: Vec<Outcomes>,
    /// The simulated run.
    pub sim: Outcomes,
}

/// A comparison and the samples it was made from.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Every metric and statistic, in the order of [`Metric::ALL`] and [`Stat::ALL`].
    pub metrics: Vec<MetricRow>,
    /// Request by request: TTFT, TPOT and E2E.
    pub paired: Vec<PairedRow>,
    /// The end-to-end time in its parts; none where nothing took any time.
    pub e2e_parts: Option<E2eParts>,
    /// How requests ended.
    pub requests: RequestCounts,
    /// Samples of each real repeat.
    pub real: Vec<RunMetrics>,
    /// Samples of the simulated run.
    pub sim: RunMetrics,
}

impl Comparison {
    /// The row of a metric and statistic.
    #[must_use]
    pub fn row(&self, metric: Metric, stat: Stat) -> Option<&MetricRow> {
        self.metrics.iter().find(|row| row.metric == metric && row.stat == stat)
    }
}

/// A run among those compared, as errors name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunLabel {
    /// A real repeat, counted from 1.
    Real(usize),
    /// The simulated run.
    Simulated,
}

impl fmt::Display for RunLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Real(number) => write!(f, "real run {number}"),
            Self::Simulated => f.write_str("the simulated run"),
        }
    }
}

/// Why runs cannot be compared.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CompareError {
    /// There is nothing to compare with.
    #[error("expected at least one real run, found none")]
    NoRealRun,
    /// There is nothing to compare with it.
    #[error("expected at least one simulated run, found none")]
    NoSimulatedRun,
    /// The runs are of different requests.
    #[error("{run} is not of the same requests as real run 1: {}", describe_ids(missing, extra))]
    RequestsDiffer {
        /// The run that differs.
        run: RunLabel,
        /// Ids only real run 1 has.
        missing: Vec<u64>,
        /// Ids only `run` has.
        extra: Vec<u64>,
    },
    /// A request differs in what it asked for or got.
    #[error(
        "{run}, request {request_id}: expected {column} {expected}, as in real run 1, found {found}{}",
        others(*num_differing)
    )]
    RequestDiffers {
        /// The run that differs.
        run: RunLabel,
        /// The first request that differs.
        request_id: u64,
        /// The column of `request_metrics`.
        column: &'static str,
        /// Real run 1's value.
        expected: u64,
        /// `run`'s value.
        found: u64,
        /// Requests that differ in this column.
        num_differing: usize,
    },
    /// All arrivals are as far from those of real run 1.
    #[error(
        "{run}: every arrival_time_ns is {} ms {} than in real run 1: its clock is shifted; expected times from the same \
         start of the workload",
        *shift_ns as f64 / 1e6,
        if *is_later { "later" } else { "earlier" }
    )]
    ClockShifted {
        /// The run that differs.
        run: RunLabel,
        /// By how much.
        shift_ns: u64,
        /// Whether its times are later than those of real run 1.
        is_later: bool,
    },
    /// Requests asked for are in no run.
    #[error("expected requests of the run, found {}", list_ids(ids))]
    UnknownRequests {
        /// The ids.
        ids: Vec<u64>,
    },
    /// No request finished in all runs.
    #[error("no request is ok in every run: {counts}")]
    NothingFinished {
        /// What became of them, by run.
        counts: String,
    },
}

fn others(num_differing: usize) -> String {
    match num_differing {
        0 | 1 => String::new(),
        n => format!(" ({n} requests differ)"),
    }
}

/// The first few ids, and how many more there are.
fn list_ids(ids: &[u64]) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<_> = ids.iter().take(SHOWN).map(u64::to_string).collect();
    match ids.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

fn describe_ids(missing: &[u64], extra: &[u64]) -> String {
    let mut parts = Vec::new();
    if !missing.is_empty() {
        parts.push(format!("it lacks {}", list_ids(missing)));
    }
    if !extra.is_empty() {
        parts.push(format!("it adds {}", list_ids(extra)));
    }
    parts.join("; ")
}

/// Compares `sim` with `real`, the repeats of one workload, over all requests.
///
/// # Errors
/// The runs are not of the same requests, lengths and arrivals, or no request is ok in all.
pub fn compare(real: &[Run], sim: &Run) -> Result<Comparison, CompareError> {
    compare_requests(real, std::slice::from_ref(sim), None)
}

/// As [`compare`], with several simulations of the workload (seeds), over the requests in `only`: what was fitted on
/// can be simulated and still not be judged.
///
/// A simulated statistic is the median over the simulations, as a real one is over the repeats; the first
/// simulation stands for all where requests are paired or drawn.
///
/// # Errors
/// As [`compare`]; also ids in `only` that are not in the runs.
pub fn compare_requests(
    real: &[Run],
    sims: &[Run],
    only: Option<&BTreeSet<u64>>,
) -> Result<Comparison, CompareError> {
    let Some((first, repeats)) = real.split_first() else { return Err(CompareError::NoRealRun) };
    let Some(sim) = sims.first() else { return Err(CompareError::NoSimulatedRun) };
    for (i, run) in repeats.iter().enumerate() {
        check_same_requests(first, run, RunLabel::Real(i + 2))?;
    }
    for sim in sims {
        check_same_requests(first, sim, RunLabel::Simulated)?;
    }
    let compared = finished_everywhere(real, sim, only)?;

    let is_wanted = |id: u64| only.is_none_or(|ids| ids.contains(&id));
    let counts = RequestCounts {
        compared: compared.len() as u64,
        real: real.iter().map(|run| RunMetrics::of_requests(run, is_wanted).outcomes).collect(),
        sim: RunMetrics::of_requests(sim, is_wanted).outcomes,
    };
    if compared.is_empty() {
        return Err(CompareError::NothingFinished { counts: describe_counts(&counts) });
    }
    let measure = |run: &Run| RunMetrics::of_requests(run, |id| compared.contains(&id));
    let real: Vec<_> = real.iter().map(measure).collect();
    let sims: Vec<_> = sims.iter().map(measure).collect();
    let ids: Vec<_> = real.iter().take(1).flat_map(|run| &run.requests).map(|r| r.request_id).collect();
    let resamples = Resamples::draw(&ids, real.len(), sims.len());
    let metrics =
        Metric::ALL.into_iter().flat_map(|metric| rows(metric, &real, &sims, resamples.as_ref())).collect();
    let e2e_parts = E2eParts::of(&real, &sims);
    // The first, checked above to be there.
    let sim = sims.into_iter().next().ok_or(CompareError::NoSimulatedRun)?;
    let paired = [Metric::Ttft, Metric::Tpot, Metric::E2e].map(|m| paired(m, &real, &sim)).to_vec();
    Ok(Comparison { metrics, paired, e2e_parts, requests: counts, real, sim })
}

fn describe_counts(counts: &RequestCounts) -> String {
    let labels = (1..).map(RunLabel::Real);
    let runs = labels.zip(&counts.real).chain([(RunLabel::Simulated, &counts.sim)]);
    let text = runs.map(|(label, o)| {
        format!("{label} has {} ok, {} rejected, {} incomplete", o.ok, o.rejected, o.incomplete)
    });
    text.collect::<Vec<_>>().join("; ")
}

fn by_id(run: &Run) -> BTreeMap<u64, &RequestMetrics> {
    run.requests.iter().map(|r| (r.request_id, r)).collect()
}

fn check_same_requests(first: &Run, other: &Run, run: RunLabel) -> Result<(), CompareError> {
    let (left, right) = (by_id(first), by_id(other));
    let missing: Vec<_> = left.keys().filter(|id| !right.contains_key(id)).copied().collect();
    let extra: Vec<_> = right.keys().filter(|id| !left.contains_key(id)).copied().collect();
    if !missing.is_empty() || !extra.is_empty() {
        return Err(CompareError::RequestsDiffer { run, missing, extra });
    }
    check_column(&left, &right, run, "num_prefill_tokens", |r, _| u64::from(r.num_prefill_tokens), 0)?;
    let produced = |r: &RequestMetrics, both_ok: bool| {
        // Only a finished request has its final number of tokens.
        if both_ok { u64::from(r.num_decode_tokens_actual) } else { 0 }
    };
    check_column(&left, &right, run, "num_decode_tokens_actual", produced, 0)?;
    if let Some((shift_ns, is_later)) = clock_shift(&left, &right) {
        return Err(CompareError::ClockShifted { run, shift_ns, is_later });
    }
    let arrival = |r: &RequestMetrics, _| r.arrival_time_ns.0;
    check_column(&left, &right, run, "arrival_time_ns", arrival, ARRIVAL_TOLERANCE_NS)
}

/// How far apart the arrivals of several requests are, when all are as far apart, and whether the right ones are later.
fn clock_shift(
    left: &BTreeMap<u64, &RequestMetrics>,
    right: &BTreeMap<u64, &RequestMetrics>,
) -> Option<(u64, bool)> {
    let mut shifts = left
        .values()
        .zip(right.values())
        .map(|(a, b)| i128::from(b.arrival_time_ns.0) - i128::from(a.arrival_time_ns.0));
    let first = shifts.next()?;
    let tolerance = i128::from(ARRIVAL_TOLERANCE_NS);
    let is_shift =
        left.len() > 1 && first.abs() > tolerance && shifts.all(|shift| (shift - first).abs() <= tolerance);
    is_shift.then(|| (first.unsigned_abs() as u64, first > 0))
}

fn check_column(
    left: &BTreeMap<u64, &RequestMetrics>,
    right: &BTreeMap<u64, &RequestMetrics>,
    run: RunLabel,
    column: &'static str,
    value: impl Fn(&RequestMetrics, bool) -> u64,
    tolerance: u64,
) -> Result<(), CompareError> {
    let mut differing = left.iter().zip(right.values()).filter_map(|((id, a), b)| {
        let both_ok = a.status == RequestStatus::Ok && b.status == RequestStatus::Ok;
        let (expected, found) = (value(a, both_ok), value(b, both_ok));
        (expected.abs_diff(found) > tolerance).then_some((*id, expected, found))
    });
    let Some((request_id, expected, found)) = differing.next() else { return Ok(()) };
    let num_differing = 1 + differing.count();
    Err(CompareError::RequestDiffers { run, request_id, column, expected, found, num_differing })
}

/// The wanted requests that are ok in every run: a request that one run lost has no counterpart.
fn finished_everywhere(
    real: &[Run],
    sim: &Run,
    only: Option<&BTreeSet<u64>>,
) -> Result<BTreeSet<u64>, CompareError> {
    let known: BTreeSet<u64> = sim.requests.iter().map(|r| r.request_id).collect();
    let mut wanted = match only {
        Some(ids) => {
            let unknown: Vec<_> = ids.difference(&known).copied().collect();
            if !unknown.is_empty() {
                return Err(CompareError::UnknownRequests { ids: unknown });
            }
            ids.clone()
        }
        None => known,
    };
    for run in real.iter().chain([sim]) {
        for sample in run.requests.iter().filter(|r| {
            let has_times = r.first_token_time_ns.is_some() && r.completion_time_ns.is_some();
            r.status != RequestStatus::Ok || !has_times
        }) {
            wanted.remove(&sample.request_id);
        }
    }
    Ok(wanted)
}

fn rows(
    metric: Metric,
    real: &[RunMetrics],
    sims: &[RunMetrics],
    resamples: Option<&Resamples>,
) -> Vec<MetricRow> {
    let sorted = |runs: &[RunMetrics]| runs.iter().map(|run| run.sorted_ns(metric)).collect::<Vec<_>>();
    let (real_ns, sim_ns) = (sorted(real), sorted(sims));
    let n = real_ns.iter().chain(&sim_ns).map(Vec::len).min().unwrap_or(0) as u64;
    let blocked = if metric == Metric::Itl {
        sims.iter().zip(&sim_ns).find_map(|(sim, sim_ns)| itl_unavailable(real, sim, &real_ns, sim_ns))
    } else {
        None
    };
    let samples = match (resamples, &blocked) {
        (Some(resamples), None) => Some(resamples.of_runs(metric, real, sims)),
        _ => None,
    };
    let row = |stat: Stat| {
        let numbers = match &blocked {
            Some(reason) => Err(reason.clone()),
            None => row_numbers(stat, &real_ns, &sim_ns),
        };
        let mut row = row(metric, stat, n, &numbers);
        if let (Ok(numbers), true) = (&numbers, row.error_pct.is_some()) {
            let drawn = resamples.zip(samples.as_ref());
            add_bands(&mut row, numbers, drawn, real[0].requests.len());
        }
        row
    };
    Stat::ALL.map(row).to_vec()
}

/// Noise floor and interval of a row that has an error.
fn add_bands(
    row: &mut MetricRow,
    numbers: &RowNumbers,
    drawn: Option<(&Resamples, &RunSamples)>,
    num_requests: usize,
) {
    let (real, sim) = (&numbers.real, &numbers.sim);
    let mut reasons = Vec::new();
    if real.values.len() > 1 {
        row.noise_pct = Some(100.0 * (real.max - real.min) / 2.0 / real.median);
    } else {
        reasons.push("no noise floor: it wants 2 real repeats, there is 1".to_owned());
    }
    let interval = drawn
        .and_then(|(resamples, samples)| resamples.interval(row.stat, samples, &real.values, &sim.values));
    match interval {
        Some((low, high)) => (row.error_low_pct, row.error_high_pct) = (Some(low), Some(high)),
        None if drawn.is_none() => reasons.push(format!(
            "no interval: it wants {MIN_INTERVAL_REQUESTS} requests, there are {num_requests}"
        )),
        None => reasons.push("no interval: too few requests have such a value".to_owned()),
    }
    row.bands_na_reason = (!reasons.is_empty()).then(|| reasons.join("; "));
}

fn itl_unavailable(
    real: &[RunMetrics],
    sim: &RunMetrics,
    real_ns: &[Vec<f64>],
    sim_ns: &[f64],
) -> Option<Unavailable> {
    let labels: Vec<_> = (1..=real.len()).map(RunLabel::Real).chain([RunLabel::Simulated]).collect();
    let runs = real.iter().chain([sim]);
    if let Some((label, _)) = labels.iter().zip(runs).find(|(_, run)| !run.has_token_times) {
        return Some(Unavailable::NoTokenTimes { run: label.to_string() });
    }
    if real_ns.iter().all(|gaps| gaps.len() == sim_ns.len()) {
        return None;
    }
    let lengths = real_ns.iter().map(Vec::len).chain([sim_ns.len()]);
    let counts = labels.iter().zip(lengths).map(|(label, len)| format!("{label} {len}"));
    Some(Unavailable::TokensDiffer { counts: counts.collect::<Vec<_>>().join(", ") })
}

/// In ms.
struct RowNumbers {
    real: Spread,
    sim: Spread,
}

/// A statistic over runs of one workload, ms.
struct Spread {
    /// In the order of the runs.
    values: Vec<f64>,
    median: f64,
    min: f64,
    max: f64,
}

fn spread(stat: Stat, runs_ns: &[Vec<f64>]) -> Result<Spread, Unavailable> {
    let mut values = Vec::with_capacity(runs_ns.len());
    for sorted in runs_ns {
        values.push(stat.of_sorted(sorted)? / 1e6);
    }
    let mut sorted = values.clone();
    sorted.sort_by(f64::total_cmp);
    let (median, min, max) = (percentile_of_sorted(&sorted, 0.5), sorted[0], sorted[sorted.len() - 1]);
    Ok(Spread { values, median, min, max })
}

fn row_numbers(stat: Stat, real_ns: &[Vec<f64>], sim_ns: &[Vec<f64>]) -> Result<RowNumbers, Unavailable> {
    Ok(RowNumbers { real: spread(stat, real_ns)?, sim: spread(stat, sim_ns)? })
}

fn row(metric: Metric, stat: Stat, n: u64, numbers: &Result<RowNumbers, Unavailable>) -> MetricRow {
    let mut row = MetricRow {
        metric,
        stat,
        n,
        real_ms: None,
        real_min_ms: None,
        real_max_ms: None,
        sim_ms: None,
        sim_min_ms: None,
        sim_max_ms: None,
        error_pct: None,
        error_low_pct: None,
        error_high_pct: None,
        noise_pct: None,
        inside_band: None,
        bands_na_reason: None,
        na_reason: None,
    };
    match numbers {
        Ok(found) => {
            let (real, sim) = (&found.real, &found.sim);
            row.real_ms = Some(real.median);
            row.real_min_ms = Some(real.min);
            row.real_max_ms = Some(real.max);
            row.sim_ms = Some(sim.median);
            row.sim_min_ms = Some(sim.min);
            row.sim_max_ms = Some(sim.max);
            row.inside_band = Some(is_inside_band(sim.median, real.min, real.max));
            row.error_pct = error_pct(real.median, sim.median);
            if row.error_pct.is_none() {
                row.na_reason = Some(Unavailable::RealIsZero.to_string());
            }
        }
        Err(reason) => row.na_reason = Some(reason.to_string()),
    }
    row
}

/// `100 (sim - real) / real`; none where `real` is 0.
#[must_use]
pub fn error_pct(real: f64, sim: f64) -> Option<f64> {
    (real != 0.0).then(|| 100.0 * (sim - real) / real)
}

/// Whether `sim` lies in `[min, max]` widened by [`BAND_MARGIN`] on both sides.
#[must_use]
pub fn is_inside_band(sim: f64, min: f64, max: f64) -> bool {
    (min * (1.0 - BAND_MARGIN)..=max * (1.0 + BAND_MARGIN)).contains(&sim)
}

#[cfg(test)]
mod tests;

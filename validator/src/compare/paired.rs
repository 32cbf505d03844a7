//! Requests paired by id, and the end-to-end time in its parts: what equal percentiles and totals hide.

use std::collections::HashMap;

use plumbline_bundles::stats::percentile_of_sorted;
use serde::{Deserialize, Serialize};

use super::error_pct;
use crate::metrics::{Metric, RunMetrics};

/// Parts of opposite sign are said to cancel from this share of the real end-to-end time on, in percent.
const MIN_CANCELLING_PCT: f64 = 1.0;

/// Request by request: how far a request's own simulated value is from its real one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairedRow {
    /// The metric; never ITL.
    pub metric: Metric,
    /// Requests paired.
    pub n: u64,
    /// Median over requests of `100 |sim - real| / real`; none when there is no pair.
    pub median_abs_error_pct: Option<f64>,
    /// 90th percentile of the same.
    #[serde(default)]
    pub p90_abs_error_pct: Option<f64>,
    /// Median over requests of `100 (sim - real) / real`, signed; none when there is no pair.
    #[serde(default)]
    pub median_error_pct: Option<f64>,
    /// Share of requests (0..=1) simulated too short; of a model without bias it is a half.
    #[serde(default)]
    pub share_too_short: Option<f64>,
}

/// The mean end-to-end time as prefill (TTFT, with its queueing) and decode (first token to completion).
///
/// Means, over requests and repeats, because they add up: the percentage points of the parts sum to that of the whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct E2eParts {
    /// Real mean TTFT, ms.
    pub real_prefill_ms: f64,
    /// Simulated mean TTFT, ms.
    pub sim_prefill_ms: f64,
    /// Real mean time from the first token to the last, ms.
    pub real_decode_ms: f64,
    /// Simulated mean time from the first token to the last, ms.
    pub sim_decode_ms: f64,
    /// Error of the prefill part in percent of the real end-to-end time, signed.
    pub prefill_pct: f64,
    /// Error of the decode part in percent of the real end-to-end time, signed.
    pub decode_pct: f64,
    /// Their sum: the error of the mean end-to-end time.
    pub total_pct: f64,
    /// Whether the parts are of opposite sign and the whole is at most half of the larger one.
    pub cancels: bool,
}

impl E2eParts {
    /// The parts over all repeats and simulations; none where nothing took any time.
    pub(super) fn of(real: &[RunMetrics], sims: &[RunMetrics]) -> Option<Self> {
        let (real_prefill_ms, real_decode_ms) = mean_parts_ms(real)?;
        let (sim_prefill_ms, sim_decode_ms) = mean_parts_ms(sims)?;
        let whole = real_prefill_ms + real_decode_ms;
        if whole <= 0.0 {
            return None;
        }
        let prefill_pct = 100.0 * (sim_prefill_ms - real_prefill_ms) / whole;
        let decode_pct = 100.0 * (sim_decode_ms - real_decode_ms) / whole;
        let total_pct = prefill_pct + decode_pct;
        let (prefill, decode) = (prefill_pct.abs(), decode_pct.abs());
        let cancels = prefill_pct * decode_pct < 0.0
            && prefill.min(decode) >= MIN_CANCELLING_PCT
            && total_pct.abs() <= prefill.max(decode) / 2.0;
        Some(Self {
            real_prefill_ms,
            sim_prefill_ms,
            real_decode_ms,
            sim_decode_ms,
            prefill_pct,
            decode_pct,
            total_pct,
            cancels,
        })
    }

    /// What the whole hides, in words; none when it hides nothing.
    #[must_use]
    pub fn cancellation(&self) -> Option<String> {
        self.cancels.then(|| {
            format!(
                "prefill {:+.1} % and decode {:+.1} % of the real E2E cancel: its mean is off by {:+.1} % only",
                self.prefill_pct, self.decode_pct, self.total_pct
            )
        })
    }
}

/// Mean TTFT and mean decode time over the requests of all runs, ms.
fn mean_parts_ms(runs: &[RunMetrics]) -> Option<(f64, f64)> {
    let requests = || runs.iter().flat_map(|run| &run.requests);
    let n = requests().count();
    let mean = |ns: f64| ns / n as f64 / 1e6;
    (n > 0).then(|| {
        let prefill = requests().map(|r| r.ttft_ns).sum();
        let decode = requests().map(|r| r.e2e_ns - r.ttft_ns).sum();
        (mean(prefill), mean(decode))
    })
}

/// Pairs the requests of the repeats, each by its median, with the simulated ones.
pub(super) fn paired(metric: Metric, real: &[RunMetrics], sim: &RunMetrics) -> PairedRow {
    let mut repeats: HashMap<u64, Vec<f64>> = HashMap::new();
    for sample in real.iter().flat_map(|run| &run.requests) {
        if let Some(value) = sample.value(metric) {
            repeats.entry(sample.request_id).or_default().push(value);
        }
    }
    let mut errors: Vec<f64> = sim
        .requests
        .iter()
        .filter_map(|sample| {
            let mut values = repeats.remove(&sample.request_id)?;
            values.sort_by(f64::total_cmp);
            error_pct(percentile_of_sorted(&values, 0.5), sample.value(metric)?)
        })
        .collect();
    errors.sort_by(f64::total_cmp);
    let mut sizes: Vec<f64> = errors.iter().map(|error| error.abs()).collect();
    sizes.sort_by(f64::total_cmp);
    let of = |sorted: &[f64], q: f64| (!sorted.is_empty()).then(|| percentile_of_sorted(sorted, q));
    let num_short = errors.iter().filter(|error| **error < 0.0).count();
    PairedRow {
        metric,
        n: errors.len() as u64,
        median_abs_error_pct: of(&sizes, 0.5),
        p90_abs_error_pct: of(&sizes, 0.9),
        median_error_pct: of(&errors, 0.5),
        share_too_short: (!errors.is_empty()).then(|| num_short as f64 / errors.len() as f64),
    }
}

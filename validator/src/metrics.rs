//! From a run to TTFT, ITL, TPOT and E2E, and from those to mean and percentiles.
//!
//! | metric | formula | samples |
//! | --- | --- | --- |
//! | `ttft` | first token - scheduled arrival | one a request |
//! | `itl`  | every gap between consecutive output tokens, pooled | n - 1 for n tokens |
//! | `tpot` | (completion - first token) / (n - 1) | one a request, none where n = 1 |
//! | `e2e`  | completion - scheduled arrival | one a request |

use std::{collections::HashMap, fmt};

use plumbline_bundles::stats::percentile_of_sorted;
use plumbline_schema::{Nanos, RequestMetrics, RequestStatus, Run, TokenMetrics};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Time to first token.
    Ttft,
    /// Inter-token latency: every single gap.
    Itl,
    /// Time per output token: a request's mean gap.
    Tpot,
    /// End to end.
    E2e,
}

impl Metric {
    /// Every metric, in the order of tables.
    pub const ALL: [Self; 4] = [Self::Ttft, Self::Itl, Self::Tpot, Self::E2e];

    /// The name in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Itl => "itl",
            Self::Tpot => "tpot",
            Self::E2e => "e2e",
        }
    }

    /// The name in tables and figures.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Ttft => "TTFT",
            Self::Itl => "ITL",
            Self::Tpot => "TPOT",
            Self::E2e => "E2E",
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How samples are summarised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stat {
    /// Arithmetic mean.
    Mean,
    /// Median.
    P50,
    /// 90th percentile.
    P90,
    /// 99th percentile.
    P99,
}

impl Stat {
    /// Every statistic, in the order of tables.
    pub const ALL: [Self; 4] = [Self::Mean, Self::P50, Self::P90, Self::P99];

    /// The name in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::P50 => "p50",
            Self::P90 => "p90",
            Self::P99 => "p99",
        }
    }

    /// Fewest samples that support it: with fewer than 100, "p99" would be read off the largest one alone.
    #[must_use]
    pub const fn min_samples(self) -> usize {
        match self {
            Self::Mean | Self::P50 => 1,
            Self::P90 => 10,
            Self::P99 => 100,
        }
    }

    /// The share of samples below a percentile; none for the mean.
    #[must_use]
    pub const fn quantile(self) -> Option<f64> {
        match self {
            Self::Mean => None,
            Self::P50 => Some(0.50),
            Self::P90 => Some(0.90),
            Self::P99 => Some(0.99),
        }
    }

    /// The statistic of ascending `sorted`; percentiles by linear interpolation.
    ///
    /// # Errors
    /// `TooFew` below [`Self::min_samples`].
    pub fn of_sorted(self, sorted: &[f64]) -> Result<f64, Unavailable> {
        if sorted.len() < self.min_samples() {
            return Err(Unavailable::TooFew { stat: self, has: sorted.len() });
        }
        Ok(match self.quantile() {
            None => sorted.iter().sum::<f64>() / sorted.len() as f64,
            Some(q) => percentile_of_sorted(sorted, q),
        })
    }
}

impl fmt::Display for Stat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a number is shown as n/a.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Unavailable {
    /// Fewer samples than the statistic needs.
    #[error("{stat} wants {} samples, there are {has}", stat.min_samples())]
    TooFew {
        /// The statistic asked for.
        stat: Stat,
        /// Samples there are.
        has: usize,
    },
    /// Gaps between tokens need token times.
    #[error("{run} records no token times")]
    NoTokenTimes {
        /// The run, as a reader knows it.
        run: String,
    },
    /// The runs do not record the same tokens, so that their gaps are not of the same things.
    #[error("the runs record different numbers of gaps: {counts}")]
    TokensDiffer {
        /// Gaps of each run.
        counts: String,
    },
    /// A relative error needs something to be relative to.
    #[error("the real value is 0")]
    RealIsZero,
}

/// How the requests of a run ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcomes {
    /// Requests with all their tokens.
    pub ok: u64,
    /// Requests refused.
    pub rejected: u64,
    /// Requests that the run's end cut off.
    pub incomplete: u64,
}

/// What one finished request took, in ns.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestSample {
    /// The request.
    pub request_id: u64,
    /// First token - scheduled arrival.
    pub ttft_ns: f64,
    /// (completion - first token) / (n - 1); none for a single output token.
    pub tpot_ns: Option<f64>,
    /// Completion - scheduled arrival.
    pub e2e_ns: f64,
    /// Gaps between consecutive output tokens; empty when token times are not recorded.
    pub gaps_ns: Vec<f64>,
}

impl RequestSample {
    /// The request's own value of a metric; none for ITL, which has many a request.
    #[must_use]
    pub fn value(&self, metric: Metric) -> Option<f64> {
        match metric {
            Metric::Ttft => Some(self.ttft_ns),
            Metric::Tpot => self.tpot_ns,
            Metric::E2e => Some(self.e2e_ns),
            Metric::Itl => None,
        }
    }
}

/// The samples of a run's finished requests, and how many did not finish.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunMetrics {
    /// Finished requests, in the order of the run.
    pub requests: Vec<RequestSample>,
    /// How all requests ended.
    pub outcomes: Outcomes,
    /// Whether the run records token times, without which there is no ITL.
    pub has_token_times: bool,
}

impl RunMetrics {
    /// Measures every request of a run.
    #[must_use]
    pub fn of(run: &Run) -> Self {
        Self::of_requests(run, |_| true)
    }

    /// Measures the requests that `wanted` picks by id.
    #[must_use]
    pub fn of_requests(run: &Run, wanted: impl Fn(u64) -> bool) -> Self {
        let mut gaps = gaps_by_request(&run.tokens);
        let mut outcomes = Outcomes::default();
        let mut requests = Vec::with_capacity(run.requests.len());
        for request in run.requests.iter().filter(|r| wanted(r.request_id)) {
            match request.status {
                RequestStatus::Rejected => outcomes.rejected += 1,
                RequestStatus::Incomplete => outcomes.incomplete += 1,
                RequestStatus::Ok => {
                    let gaps_ns = gaps.remove(&request.request_id).unwrap_or_default();
                    match sample(request, gaps_ns) {
                        Some(sample) => {
                            outcomes.ok += 1;
                            requests.push(sample);
                        }
                        // `ok` without times is no finished request, whatever its status says.
                        None => outcomes.incomplete += 1,
                    }
                }
            }
        }
        Self { requests, outcomes, has_token_times: !run.tokens.is_empty() }
    }

    /// The samples of a metric in ns, ascending.
    #[must_use]
    pub fn sorted_ns(&self, metric: Metric) -> Vec<f64> {
        let mut values: Vec<f64> = match metric {
            Metric::Itl => self.requests.iter().flat_map(|r| r.gaps_ns.iter().copied()).collect(),
            _ => self.requests.iter().filter_map(|r| r.value(metric)).collect(),
        };
        values.sort_unstable_by(f64::total_cmp);
        values
    }

    /// A statistic of a metric in ns.
    ///
    /// # Errors
    /// Why there is no such number: too few samples, no token times.
    pub fn stat_ns(&self, metric: Metric, stat: Stat) -> Result<f64, Unavailable> {
        if metric == Metric::Itl && !self.has_token_times {
            return Err(Unavailable::NoTokenTimes { run: "the run".into() });
        }
        stat.of_sorted(&self.sorted_ns(metric))
    }
}

fn sample(request: &RequestMetrics, gaps_ns: Vec<f64>) -> Option<RequestSample> {
    let first = request.first_token_time_ns?;
    let last = request.completion_time_ns?;
    let since = |later: Nanos, earlier: Nanos| later.saturating_since(earlier).0 as f64;
    let num_tokens = request.num_decode_tokens_actual;
    Some(RequestSample {
        request_id: request.request_id,
        ttft_ns: since(first, request.arrival_time_ns),
        tpot_ns: (num_tokens > 1).then(|| since(last, first) / f64::from(num_tokens - 1)),
        e2e_ns: since(last, request.arrival_time_ns),
        gaps_ns,
    })
}

/// Gaps from the token times themselves: the latency column holds a 0 at index 0, which is no gap.
fn gaps_by_request(tokens: &[TokenMetrics]) -> HashMap<u64, Vec<f64>> {
    let mut last: HashMap<u64, Nanos> = HashMap::new();
    let mut gaps: HashMap<u64, Vec<f64>> = HashMap::new();
    for token in tokens {
        if let Some(before) = last.insert(token.request_id, token.token_time_ns) {
            let gap = token.token_time_ns.saturating_since(before).0 as f64;
            gaps.entry(token.request_id).or_default().push(gap);
        }
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{request, run, token_times};

    #[test]
    fn three_tokens_give_two_gaps_and_their_mean() {
        // Arrives at 10, tokens at 40, 50 and 80.
        let run = run(vec![request(7, 10, &[40, 50, 80])]).with_tokens();
        let metrics = RunMetrics::of(&run);
        let [sample] = metrics.requests.as_slice() else { panic!("one request, {metrics:?}") };
        let expected = RequestSample {
            request_id: 7,
            ttft_ns: 30.0,
            tpot_ns: Some(20.0),
            e2e_ns: 70.0,
            gaps_ns: vec![10.0, 30.0],
        };
        assert_eq!(*sample, expected);
        assert_eq!(metrics.stat_ns(Metric::Itl, Stat::Mean), Ok(20.0));
    }

    #[test]
    fn a_single_token_has_no_tpot_and_no_gap() {
        let run = run(vec![request(0, 0, &[25]), request(1, 5, &[30, 40])]).with_tokens();
        let metrics = RunMetrics::of(&run);
        assert_eq!(metrics.sorted_ns(Metric::Ttft), [25.0, 25.0]);
        assert_eq!(metrics.sorted_ns(Metric::Tpot), [10.0]);
        assert_eq!(metrics.sorted_ns(Metric::Itl), [10.0]);
        assert_eq!(metrics.sorted_ns(Metric::E2e), [25.0, 35.0]);
    }

    #[test]
    fn the_zero_row_of_index_0_is_never_a_gap() {
        // Four requests of four tokens, 12 gaps of 13 to 24 ns; with the zero rows the median would drop.
        let times = |start: u64| [start + 50, start + 63, start + 79, start + 103];
        let run = run((0..4).map(|i| request(i, i * 1000, &times(i * 1000))).collect()).with_tokens();
        let zeros = run.tokens.iter().filter(|t| t.token_latency_ns == Nanos::ZERO).count();
        assert_eq!(zeros, 4);
        let itl = RunMetrics::of(&run).sorted_ns(Metric::Itl);
        assert_eq!(itl, [13.0, 13.0, 13.0, 13.0, 16.0, 16.0, 16.0, 16.0, 24.0, 24.0, 24.0, 24.0]);
        assert_eq!(Stat::P50.of_sorted(&itl), Ok(16.0));
        let mut with_zeros = itl;
        with_zeros.extend([0.0; 4]);
        with_zeros.sort_by(f64::total_cmp);
        assert_eq!(Stat::P50.of_sorted(&with_zeros), Ok(14.5));
    }

    #[test]
    fn interleaved_tokens_belong_to_their_requests() {
        let mut run = run(vec![request(0, 0, &[10, 30]), request(1, 0, &[20, 25])]).with_tokens();
        run.tokens.sort_by_key(|t| t.token_time_ns);
        assert_eq!(RunMetrics::of(&run).sorted_ns(Metric::Itl), [5.0, 20.0]);
    }

    #[test]
    fn without_token_times_all_but_itl_work() {
        let run = run(vec![request(0, 0, &[10, 20, 40])]);
        let metrics = RunMetrics::of(&run);
        assert_eq!(metrics.stat_ns(Metric::Tpot, Stat::P50), Ok(15.0));
        let error = metrics.stat_ns(Metric::Itl, Stat::P50).unwrap_err();
        assert_eq!(error.to_string(), "the run records no token times");
    }

    #[test]
    fn only_finished_requests_are_measured_and_the_rest_counted() {
        let mut run = run((0..4).map(|i| request(i, 0, &[10, 20])).collect());
        run.requests[1].status = RequestStatus::Rejected;
        run.requests[2].status = RequestStatus::Incomplete;
        run.requests[3].completion_time_ns = None;
        let metrics = RunMetrics::of(&run);
        assert_eq!(metrics.outcomes, Outcomes { ok: 1, rejected: 1, incomplete: 2 });
        assert_eq!(metrics.sorted_ns(Metric::E2e), [20.0]);
    }

    #[test]
    fn a_percentile_needs_the_samples_that_support_it() {
        let values: Vec<f64> = (0..100).map(f64::from).collect();
        assert_eq!(Stat::P99.of_sorted(&values), Ok(99.0 * 0.99));
        let error = Stat::P99.of_sorted(&values[..99]).unwrap_err();
        assert_eq!(error.to_string(), "p99 wants 100 samples, there are 99");
        assert_eq!(Stat::P90.of_sorted(&values[..10]), Ok(9.0 * 0.9));
        assert!(Stat::P90.of_sorted(&values[..9]).is_err());
        assert_eq!(Stat::P50.of_sorted(&values[..2]), Ok(0.5));
        assert!(Stat::P50.of_sorted(&[]).is_err());
        assert!(Stat::Mean.of_sorted(&[]).is_err());
    }

    #[test]
    fn token_times_helper_matches_the_run_schema() {
        let rows = token_times(3, &[40, 50]);
        assert_eq!(rows[0].token_latency_ns, Nanos::ZERO);
        assert_eq!((rows[1].token_index, rows[1].token_latency_ns), (1, Nanos(10)));
    }
}

//! Requests one by one: the rows of `tables/*-requests.csv` and the dots of the scatter plots.

use std::collections::HashMap;

use plumbline_bundles::stats::percentile_of_sorted;
use serde::Serialize;

use crate::{metrics::Metric, results::Samples};

/// A request of both sides, in ms; real values are medians over the repeats, and a request of one token has no TPOT.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct RequestRow {
    pub request_id: u64,
    pub ttft_real_ms: Option<f64>,
    pub ttft_sim_ms: Option<f64>,
    pub tpot_real_ms: Option<f64>,
    pub tpot_sim_ms: Option<f64>,
    pub e2e_real_ms: Option<f64>,
    pub e2e_sim_ms: Option<f64>,
}

impl RequestRow {
    /// Real and simulated value; none for ITL, which has many a request.
    pub(super) fn pair(&self, metric: Metric) -> Option<(f64, f64)> {
        let (real, sim) = match metric {
            Metric::Ttft => (self.ttft_real_ms, self.ttft_sim_ms),
            Metric::Tpot => (self.tpot_real_ms, self.tpot_sim_ms),
            Metric::E2e => (self.e2e_real_ms, self.e2e_sim_ms),
            Metric::Itl => (None, None),
        };
        Some((real?, sim?))
    }
}

/// The compared requests, in the order of the simulated run.
pub(super) fn rows(samples: &Samples) -> Vec<RequestRow> {
    let by_id: Vec<HashMap<u64, _>> =
        samples.real.iter().map(|run| run.requests.iter().map(|r| (r.request_id, r)).collect()).collect();
    let row = |sim: &crate::metrics::RequestSample| {
        let repeats: Vec<_> = by_id.iter().filter_map(|run| run.get(&sim.request_id)).collect();
        let real = |metric| {
            let mut values: Vec<f64> = repeats.iter().filter_map(|request| request.value(metric)).collect();
            values.sort_by(f64::total_cmp);
            (!values.is_empty()).then(|| percentile_of_sorted(&values, 0.5) / 1e6)
        };
        let simulated = |metric| sim.value(metric).map(|ns| ns / 1e6);
        RequestRow {
            request_id: sim.request_id,
            ttft_real_ms: real(Metric::Ttft),
            ttft_sim_ms: simulated(Metric::Ttft),
            tpot_real_ms: real(Metric::Tpot),
            tpot_sim_ms: simulated(Metric::Tpot),
            e2e_real_ms: real(Metric::E2e),
            e2e_sim_ms: simulated(Metric::E2e),
        }
    };
    samples.sim.requests.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::suite_result;

    #[test]
    fn a_request_stands_beside_the_median_of_its_repeats() {
        let result = suite_result();
        let rows = rows(result.cases[2].samples.as_ref().unwrap());
        assert_eq!(rows.len(), 101);
        // Repeats of 16.0, 18.8 and 17.0 ms against 16.5 ms, each halved in request 0.
        let (real, sim) = rows[0].pair(Metric::Ttft).unwrap();
        assert!((real - 8.5).abs() < 1e-6 && (sim - 8.25).abs() < 1e-6, "{real} {sim}");
        assert_eq!(rows[0].pair(Metric::Itl), None);
    }
}

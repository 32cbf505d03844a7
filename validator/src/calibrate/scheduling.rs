//! The scheduler as a yardstick: the same code on every host, timed in every step.

use std::collections::BTreeMap;

use plumbline_bundles::HostCost;

use super::{
    fit::{MAX_HOST_FACTOR, MIN_HOST_FACTOR, Observation, weighted_quantile},
    solve::{Parameter, Row, solve},
};

/// What scheduling costs on host 0, and how the other hosts compare.
#[derive(Clone, Debug, Default)]
pub(super) struct Scheduling {
    cost: HostCost,
    host_factors: BTreeMap<usize, f64>,
}

impl Scheduling {
    pub(super) fn new(observations: &[&Observation], weights: &[f64]) -> Self {
        let recorded = |host: Option<usize>| {
            let all = observations.iter().zip(weights);
            all.filter_map(move |(o, &w)| {
                (host.is_none_or(|h| o.host == h)).then_some(())?;
                Some((*o, o.schedule_ns.filter(|ns| *ns > 0.0)?, w))
            })
        };
        let parameter = |prior, width| Parameter { name: String::new(), prior, width, min: 0.0, max: 1e9 };
        let parameters = [parameter(5e4, 1e6), parameter(5e3, 1e5)];
        let rows: Vec<Row> = recorded(Some(0))
            .map(|(o, y, weight)| Row { x: vec![1.0, f64::from(o.batch.num_seqs)], y, scale: y, weight })
            .collect();
        if rows.is_empty() {
            return Self::default();
        }
        let theta = solve(&parameters, &rows, &[5e4, 5e3]).theta;
        let cost = HostCost { constant_ns: theta[0], per_seq_ns: theta[1], per_token_ns: 0.0 };
        let mut by_host: BTreeMap<usize, Vec<(f64, f64)>> = BTreeMap::new();
        for (o, ns, weight) in recorded(None) {
            let ratio = ns / cost.at(o.batch.num_seqs, o.batch.num_tokens).max(1.0);
            by_host.entry(o.host).or_default().push((ratio, weight));
        }
        let median = |mut ratios: Vec<(f64, f64)>| {
            ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
            weighted_quantile(&ratios, 0.5)
        };
        let medians: BTreeMap<usize, f64> =
            by_host.into_iter().filter_map(|(host, ratios)| Some((host, median(ratios)?))).collect();
        // By host 0's own median, so that its factor is 1 whatever the fit left over; other hosts are held against the
        // same cost later, by `host_factor`.
        let base = medians.get(&0).copied().unwrap_or(1.0);
        let cost = HostCost {
            constant_ns: base * cost.constant_ns,
            per_seq_ns: base * cost.per_seq_ns,
            per_token_ns: base * cost.per_token_ns,
        };
        let host_factors = medians
            .into_iter()
            .map(|(host, m)| (host, (m / base).clamp(MIN_HOST_FACTOR, MAX_HOST_FACTOR)))
            .collect();
        Self { cost, host_factors }
    }

    /// Scheduling's cost on host 0; zero when no run records it.
    pub(super) fn cost(&self) -> HostCost {
        self.cost
    }

    /// A host's factor; `None` when its runs, or host 0's, do not record scheduling.
    pub(super) fn host_factor(&self, host: usize) -> Option<f64> {
        self.host_factors.get(&host).copied()
    }

    /// Factors to start from, 1 where not known.
    pub(super) fn host_factors(&self, num_hosts: usize) -> Vec<f64> {
        (0..num_hosts).map(|host| self.host_factor(host).unwrap_or(1.0)).collect()
    }
}

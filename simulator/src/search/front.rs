//! What a deployment costs, and which deployments no other beats.

use serde::Serialize;

/// What a deployment yields at its highest rate, and what that costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Economics {
    /// Its highest rate within the limits, requests per second.
    pub rate_per_s: f64,
    /// Output tokens per second at that rate.
    pub output_tokens_per_s: f64,
    /// All its GPUs for an hour, in the unit of the prices.
    pub cost_per_hour: f64,
    /// A million output tokens, in the unit of the prices.
    pub cost_per_million_output_tokens: f64,
}

impl Economics {
    /// Of a deployment that costs so much an hour and is used at its highest rate all the time.
    #[must_use]
    pub fn new(rate_per_s: f64, output_tokens_per_s: f64, cost_per_hour: f64) -> Self {
        let million_tokens_per_hour = output_tokens_per_s * 3600.0 / 1e6;
        Self {
            rate_per_s,
            output_tokens_per_s,
            cost_per_hour,
            cost_per_million_output_tokens: cost_per_hour / million_tokens_per_hour,
        }
    }

    /// Whether it bears no less for no more, and is better in one of them.
    #[must_use]
    pub fn beats(&self, other: &Self) -> bool {
        self.rate_per_s >= other.rate_per_s
            && self.cost_per_hour <= other.cost_per_hour
            && (self.rate_per_s > other.rate_per_s || self.cost_per_hour < other.cost_per_hour)
    }
}

/// The places of those that no other beats, in order of cost; equals are all among them.
#[must_use]
pub fn pareto_front(all: &[Economics]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by(|&a, &b| {
        let by_cost = all[a].cost_per_hour.total_cmp(&all[b].cost_per_hour);
        by_cost.then(all[b].rate_per_s.total_cmp(&all[a].rate_per_s)).then(a.cmp(&b))
    });
    let mut last: Option<&Economics> = None;
    order.retain(|&place| {
        let economics = &all[place];
        let is_beaten = last.is_some_and(|last| {
            economics.rate_per_s < last.rate_per_s
                || economics.rate_per_s <= last.rate_per_s && economics.cost_per_hour > last.cost_per_hour
        });
        if !is_beaten {
            last = Some(economics);
        }
        !is_beaten
    });
    order
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_million_tokens_cost_what_their_hours_do() {
        // 500 tokens/s are 1.8 million an hour.
        let found = Economics::new(2.0, 500.0, 3.6);
        assert!((found.cost_per_million_output_tokens - 2.0).abs() < 1e-12);
    }

    proptest! {
        /// In front is whom no one beats.
        #[test]
        fn the_front_is_what_no_other_beats(points in prop::collection::vec((1..8_u8, 1..8_u8), 0..30)) {
            let all: Vec<_> = points.iter().map(|&(r, c)| Economics::new(r.into(), 1.0, c.into())).collect();
            let front = pareto_front(&all);
            for (place, economics) in all.iter().enumerate() {
                let is_beaten = all.iter().any(|other| other.beats(economics));
                prop_assert_eq!(front.contains(&place), !is_beaten);
            }
            prop_assert!(front.is_sorted_by_key(|&place| all[place].rate_per_s));
        }
    }
}

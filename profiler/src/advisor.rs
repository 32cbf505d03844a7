//! Which points to measure next: the seam to whoever can fit predictors, and the choice that follows from it.
//!
//! The profiler knows nothing of predictors. It asks an [`Advisor`] where they are least sure, and [`choose`] picks
//! the points that are worth their time.

use plumbline_bundles::{CurveError, Sample, features::ln_distance};

use crate::device::Point;

/// Where the predictor is least sure; plugged in by whoever can train.
pub trait Advisor {
    /// For each candidate the expected relative error (at least 0) of predicting it from `samples`; larger means
    /// measure first, and infinite that there is too little to predict it from.
    ///
    /// Candidates are taken to be in [`CacheState::in_model`](plumbline_bundles::CacheState::in_model), the state
    /// that predictors are trained on; samples of the other state are not looked at.
    fn unsureness(&mut self, samples: &[Sample], candidates: &[Point]) -> Vec<f64>;

    /// Errors of predicting the held-out samples from `samples`, which do not hold them; `None` when none of them
    /// can be predicted.
    fn held_out_error(&mut self, samples: &[Sample], held_out: &[Sample]) -> Option<CurveError>;
}

/// Expected relative error of a point of which nothing is known.
const UNKNOWN: f64 = 1.0;

/// How far a measured point tells of others, as [`ln_distance`]: 0.4 is a factor of 1.5 in one number of a shape.
const REACH: f64 = 0.4;

/// Picks the points to measure next: indices of `candidates`, in the order of measuring.
///
/// Greedy by unsureness per cost. What is measured tells of its neighbourhood too, so after each pick the unsureness of the same
/// operator's candidates shrinks to the share `1 - exp(-(distance / reach)^2)`, and picks spread. An infinite unsureness
/// counts as 100 %, or as the largest finite one where that is more.
///
/// `cost_ns` is what measuring each candidate takes; together the picks cost at most `budget_ns`. Candidates whose
/// unsureness is 0 or not a number are not picked. The three slices have one length; beyond the shortest nothing is
/// looked at.
#[must_use]
pub fn choose(unsureness: &[f64], candidates: &[Point], cost_ns: &[f64], budget_ns: f64) -> Vec<usize> {
    let n = unsureness.len().min(candidates.len()).min(cost_ns.len());
    let largest = unsureness.iter().copied().filter(|u| u.is_finite()).fold(UNKNOWN, f64::max);
    // NaN compares as less than 0 here.
    let mut gains: Vec<f64> =
        unsureness[..n].iter().map(|&u| if u > 0.0 { u.min(largest) } else { 0.0 }).collect();
    let cost = |i: usize| cost_ns[i].max(1.0);
    let mut chosen = Vec::new();
    let mut budget_left_ns = budget_ns;
    loop {
        let rate = |i: usize| gains[i] / cost(i);
        let affordable = (0..n).filter(|&i| gains[i] > 0.0 && cost(i) <= budget_left_ns);
        // The first of equals.
        let Some(best) = affordable.max_by(|&a, &b| rate(a).total_cmp(&rate(b)).then(b.cmp(&a))) else {
            return chosen;
        };
        chosen.push(best);
        budget_left_ns -= cost(best);
        for (i, gain) in gains.iter_mut().enumerate() {
            if candidates[i].operator == candidates[best].operator {
                let distance = ln_distance(&candidates[i].shape, &candidates[best].shape) / REACH;
                *gain *= 1.0 - (-distance * distance).exp();
            }
        }
        gains[best] = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use plumbline_schema::{Operator, OperatorShape};

    use super::*;

    fn norms(tokens: &[u32]) -> Vec<Point> {
        let point = |&num_tokens: &u32| Point {
            operator: Operator::RmsNorm,
            shape: OperatorShape::RmsNorm { num_tokens, hidden_size: 1024 },
            batch: None,
        };
        tokens.iter().map(point).collect()
    }

    #[test]
    fn the_least_sure_come_first_and_the_sure_never() {
        let points = norms(&[1, 100, 10_000, 1_000_000]);
        assert_eq!(choose(&[0.1, 0.3, 0.0, f64::NAN], &points, &[1.0; 4], 10.0), [1, 0]);
    }

    #[test]
    fn what_costs_little_comes_before_what_costs_much() {
        let points = norms(&[1, 100, 10_000]);
        assert_eq!(choose(&[0.1, 0.3, 0.2], &points, &[1e6, 9e6, 3e6], 1e9), [0, 2, 1]);
    }

    #[test]
    fn picks_cost_no_more_than_the_budget() {
        let points = norms(&[1, 100, 10_000]);
        // After the first there is room for the last only.
        assert_eq!(choose(&[0.9, 0.5, 0.1], &points, &[5e6, 5e6, 1e6], 6e6), [2, 0]);
        assert!(choose(&[0.9; 3], &points, &[5e6; 3], 4e6).is_empty());
    }

    #[test]
    fn neighbours_do_not_pile_up() {
        // Two close together and a third far away that is only half as unsure.
        let points = norms(&[1000, 1010, 10]);
        assert_eq!(choose(&[0.2, 0.19, 0.1], &points, &[1.0; 3], 2.0), [0, 2]);
        // Another operator's point is no neighbour.
        let mut points = points;
        points[1].operator = Operator::Embedding;
        points[1].shape = OperatorShape::Embedding { num_tokens: 1010, hidden_size: 1024 };
        assert_eq!(choose(&[0.2, 0.19, 0.1], &points, &[1.0; 3], 2.0), [0, 1]);
    }

    #[test]
    fn an_unknown_operator_is_begun_with_points_all_over_its_range() {
        let tokens: Vec<u32> = (0..14).map(|i| 1 << i).collect();
        let mut first = choose(&[f64::INFINITY; 14], &norms(&tokens), &[1.0; 14], 4.0);
        first.sort_unstable();
        assert_eq!(first.len(), 4);
        assert!(first.windows(2).all(|pair| pair[1] - pair[0] >= 2), "{first:?}");
    }
}

//! Which points to measure next: the seam to whoever can fit predictors, and the choice that follows from it.
//!
//! The profiler knows nothing of predictors. It asks an [`Advisor`] where they are least sure, and [`choose`] picks
//! the points that are worth their time.

use std::collections::{BTreeMap, BTreeSet};

use plumbline_bundles::{CurveError, Sample, features::LnShape};
use plumbline_schema::Operator;

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

/// How far a measured point tells of others, as [`LnShape::distance`]: 1.0 is a factor of 2.7 in one number of a shape.
const REACH: f64 = 1.0;

/// Picks the points to measure next: indices of `candidates`, in the order of measuring.
///
/// Measuring a point takes the share `exp(-(distance / reach)^2)` from the unsureness of each candidate with the same
/// kernels, so its gain is what it takes in all: large for a point among many that are unsure, small beside a point
/// already picked. Errors count by operator, so a candidate weighs the more the fewer its operator has. The pick is
/// greedy by gain per cost, which suits gains that only shrink (Leskovec et al. 2007, "Cost-effective outbreak
/// detection in networks"); that gains should count the neighbourhood is Settles and Craven's (2008) information
/// density. An infinite unsureness counts as 100 %, or as the largest finite one where that is more.
///
/// `cost_ns` is what measuring each candidate takes; together the picks cost at most `budget_ns`. Candidates whose
/// unsureness is 0 or not a number are not picked, nor is one shape twice. The three slices have one length; beyond
/// the shortest nothing is looked at.
#[must_use]
pub fn choose(unsureness: &[f64], candidates: &[Point], cost_ns: &[f64], budget_ns: f64) -> Vec<usize> {
    let n = unsureness.len().min(candidates.len()).min(cost_ns.len());
    let mut field = Field::new(&unsureness[..n], &candidates[..n]);
    let cost = |i: usize| cost_ns[i].max(1.0);
    let mut chosen = Vec::new();
    let mut budget_left_ns = budget_ns;
    // Gains per cost as they last were: not below what they are now.
    let mut rates: Vec<f64> = (0..n).map(|i| field.gain(i) / cost(i)).collect();
    loop {
        let affordable = |rates: &[f64], i: usize| rates[i] > 0.0 && cost(i) <= budget_left_ns;
        let open = (0..n).filter(|&i| affordable(&rates, i));
        // The first of equals.
        let Some(best) = open.max_by(|&a, &b| rates[a].total_cmp(&rates[b]).then(b.cmp(&a))) else {
            return chosen;
        };
        let now = field.gain(best) / cost(best);
        let is_best = (0..n).all(|i| i == best || !affordable(&rates, i) || rates[i] <= now);
        rates[best] = now;
        if is_best && now > 0.0 {
            chosen.push(best);
            budget_left_ns -= cost(best);
            field.measure(best);
            rates[best] = 0.0;
        }
    }
}

/// The unsureness of candidates that is left to take.
struct Field {
    /// Weighted by the candidate's share of its operator.
    left: Vec<f64>,
    shapes: Vec<LnShape>,
    /// For each candidate those with its kernels, itself among them.
    neighbours: BTreeMap<Operator, Vec<usize>>,
    kernels: Vec<Operator>,
}

impl Field {
    fn new(unsureness: &[f64], candidates: &[Point]) -> Self {
        let largest = unsureness.iter().copied().filter(|u| u.is_finite()).fold(UNKNOWN, f64::max);
        // Not a number is not above 0.
        let known = unsureness.iter().map(|&u| if u > 0.0 { u.min(largest) } else { 0.0 });
        let kernels: Vec<Operator> = candidates.iter().map(|point| kernels(point.operator)).collect();
        let mut neighbours: BTreeMap<Operator, Vec<usize>> = BTreeMap::new();
        for (i, &kernels) in kernels.iter().enumerate() {
            neighbours.entry(kernels).or_default().push(i);
        }
        Self {
            left: known.zip(weights(candidates)).map(|(unsureness, weight)| unsureness * weight).collect(),
            shapes: candidates.iter().map(|point| LnShape::new(&point.shape)).collect(),
            neighbours,
            kernels,
        }
    }

    /// Share of the unsureness of one candidate that measuring the other takes.
    fn share(&self, i: usize, j: usize) -> f64 {
        let distance = self.shapes[i].distance(&self.shapes[j]) / REACH;
        (-distance * distance).exp()
    }

    /// What measuring a candidate would take; 0 when nothing is left of its own.
    fn gain(&self, i: usize) -> f64 {
        if self.left[i] <= 0.0 {
            return 0.0;
        }
        self.neighbours[&self.kernels[i]].iter().map(|&j| self.left[j] * self.share(i, j)).sum()
    }

    fn measure(&mut self, i: usize) {
        for &j in &self.neighbours[&self.kernels[i]] {
            self.left[j] *= 1.0 - self.share(i, j);
        }
    }
}

/// One operator in place of all that run the same kernels: the matrix products are one library call.
fn kernels(operator: Operator) -> Operator {
    if operator.is_gemm() { Operator::QkvProj } else { operator }
}

/// For each candidate the share of an operator that it stands for: operators with its kernels over candidates of these.
fn weights(candidates: &[Point]) -> Vec<f64> {
    let mut counts: BTreeMap<Operator, (BTreeSet<Operator>, usize)> = BTreeMap::new();
    for point in candidates {
        let (operators, count) = counts.entry(kernels(point.operator)).or_default();
        operators.insert(point.operator);
        *count += 1;
    }
    let weight = |point: &Point| {
        let (operators, count) = &counts[&kernels(point.operator)];
        operators.len() as f64 / *count as f64
    };
    candidates.iter().map(weight).collect()
}

#[cfg(test)]
mod tests {
    use plumbline_schema::OperatorShape;

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
        assert_eq!(choose(&[0.9, 0.5, 0.1], &points, &[5e6, 5e6, 1e6], 6e6), [0, 2]);
        assert!(choose(&[0.9; 3], &points, &[5e6; 3], 4e6).is_empty());
    }

    #[test]
    fn neighbours_do_not_pile_up() {
        // Two close together and a third far away that is only half as unsure.
        let points = norms(&[1000, 1010, 10]);
        assert_eq!(choose(&[0.2, 0.19, 0.1], &points, &[1.0; 3], 2.0), [0, 2]);
    }

    #[test]
    fn a_point_among_unsure_ones_comes_before_a_lone_one() {
        let points = norms(&[1000, 1200, 1400, 10]);
        assert_eq!(choose(&[0.1, 0.1, 0.1, 0.15], &points, &[1.0; 4], 2.0), [1, 3]);
    }

    #[test]
    fn neighbours_are_points_with_the_same_kernels() {
        let gemm = |operator| Point {
            operator,
            shape: OperatorShape::Gemm { m: 1000, n: 1024, k: 1024 },
            batch: None,
        };
        let shape = OperatorShape::Embedding { num_tokens: 1000, hidden_size: 1024 };
        let embedding = Point { operator: Operator::Embedding, shape, batch: None };
        let points =
            [norms(&[1000]), vec![embedding, gemm(Operator::QkvProj), gemm(Operator::OProj)]].concat();
        assert_eq!(choose(&[0.4, 0.35, 0.2, 0.1], &points, &[1.0; 4], 9.0), [0, 1, 2]);
    }

    #[test]
    fn a_point_of_few_comes_before_one_of_many() {
        let mut points = norms(&[1, 100, 10_000, 1_000_000]);
        points[0].operator = Operator::Embedding;
        points[0].shape = OperatorShape::Embedding { num_tokens: 1, hidden_size: 1024 };
        assert_eq!(choose(&[0.2, 0.4, 0.1, 0.1], &points, &[1.0; 4], 2.0), [0, 1]);
        assert_eq!(choose(&[0.1, 0.4, 0.1, 0.1], &points, &[1.0; 4], 2.0), [1, 0]);
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

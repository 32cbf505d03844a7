//! A carried-over baseline adapted to a few samples of the target GPU.
//!
//! Unknown are logarithms of factors on the overhead and on each kind of roofline part, and the share of the measured
//! GPU's ratio that holds. Minimised is the sum over samples of Huber's function of `ln(predicted / measured)` over
//! [`SHAPE_SCATTER`], plus the squares of the unknowns' distances from the data sheets' answer over what is expected of
//! each: the most likely unknowns under normal priors. Gauss-Newton steps with samples weighed by their last error find it.

use plumbline_bundles::{
    OperatorPredictor,
    features::{part_norm, parts_ns},
    predictor::PartKind,
};
use plumbline_schema::GpuSpec;

use crate::dataset::Row;

/// How far one shape's ratio on two GPUs scatters around what their other shapes say, as a logarithm: libraries take
/// other kernels and other waves.
const SHAPE_SCATTER: f64 = 0.1;
/// Errors beyond so many times the scatter count by their size only (Huber 1964).
const HUBER: f64 = 1.5;
/// How far the shares reached of clocks and peaks differ between two GPUs, as a logarithm.
const FACTOR_SPREAD: f64 = 0.2;
/// How far the share of the ratio that holds may lie from what is expected.
const SHARE_SPREAD: f64 = 0.25;
/// Most Gauss-Newton steps; a handful is usual.
const MAX_STEPS: usize = 60;
/// Most halvings of a step that does not improve.
const MAX_HALVINGS: usize = 20;
/// Steps that move no unknown further than this are the last.
const SETTLED: f64 = 1e-9;

/// Places of the unknowns: the overhead, each of [`PartKind::ALL`], the ratio's share.
const OVERHEAD: usize = 0;
const SHARE: usize = 1 + PartKind::ALL.len();
const NUM_UNKNOWNS: usize = SHARE + 1;
type Unknowns = [f64; NUM_UNKNOWNS];

const fn place(kind: PartKind) -> usize {
    1 + kind as usize
}

/// A sample of the target GPU as the law sees it.
pub(super) struct Point {
    overhead_ns: f64,
    /// Weighted parts, by the place of the unknown.
    parts_ns: Vec<(usize, f64)>,
    norm: i32,
    /// `ln(time / baseline)` on the GPU that was measured.
    ln_ratio: f64,
    ln_time: f64,
}

impl Point {
    /// Of a row of the target GPU; `carried` is a predictor that was carried over to it by data sheets.
    pub(super) fn new(carried: &OperatorPredictor, row: &Row, gpu: &GpuSpec) -> Self {
        let parts = parts_ns(&row.shape, gpu);
        let weighted = carried.parts.iter().zip(parts.as_slice());
        let measured = carried.transferred_from.as_ref().map_or(gpu, |from| &from.gpu);
        Self {
            overhead_ns: carried.overhead_ns,
            parts_ns: weighted
                .map(|(part, ns)| (place(PartKind::of(&part.name)), part.coefficient * ns))
                .collect(),
            norm: part_norm(carried.operator),
            ln_ratio: carried.ln_ratio(&row.shape, measured),
            ln_time: row.time_ns.ln(),
        }
    }

    /// `ln(predicted / measured)` and its derivative by each unknown.
    fn error(&self, x: &Unknowns) -> (f64, Unknowns) {
        let mut slopes = [0.0; NUM_UNKNOWNS];
        let overhead_ns = self.overhead_ns * x[OVERHEAD].exp();
        let powers = || self.parts_ns.iter().map(|&(k, ns)| (k, (ns * x[k].exp()).powi(self.norm)));
        let sum: f64 = powers().map(|(_, power)| power).sum();
        let joined = sum.powf(1.0 / f64::from(self.norm));
        let baseline_ns = overhead_ns + joined;
        slopes[OVERHEAD] = overhead_ns / baseline_ns;
        for (k, power) in powers().filter(|(_, power)| *power > 0.0) {
            slopes[k] += power / sum * joined / baseline_ns;
        }
        slopes[SHARE] = self.ln_ratio;
        (baseline_ns.ln() + x[SHARE] * self.ln_ratio - self.ln_time, slopes)
    }
}

/// Mean and standard deviation of each unknown.
type Prior = [(f64, f64); NUM_UNKNOWNS];

/// What the samples say of the target GPU beside its data sheet.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Adaptation {
    unknowns: Unknowns,
}

impl Adaptation {
    /// Fits the law to samples, of whose ratio `share` is expected to hold.
    pub(super) fn fit(points: &[&Point], share: f64) -> Self {
        let mut prior = [(0.0, FACTOR_SPREAD); NUM_UNKNOWNS];
        prior[SHARE] = (share, SHARE_SPREAD);
        let mut x = prior.map(|(mean, _)| mean);
        let mut cost = cost_of(points, &prior, &x);
        for _ in 0..MAX_STEPS {
            let step = step(points, &prior, &x);
            let Some((next, next_cost)) = improved(points, &prior, &x, &step, cost) else { break };
            let moved = next.iter().zip(&x).map(|(next, x)| (next - x).abs()).fold(0.0, f64::max);
            (x, cost) = (next, next_cost);
            if moved < SETTLED {
                break;
            }
        }
        Self { unknowns: x }
    }

    /// The adapted predictor's time for a sample, ns, whatever the physical floor.
    pub(super) fn time_ns(&self, point: &Point) -> f64 {
        (point.error(&self.unknowns).0 + point.ln_time).exp()
    }

    /// The adapted predictor, of which `carried` is what the data sheets say.
    pub(super) fn apply(&self, carried: &OperatorPredictor) -> OperatorPredictor {
        let x = &self.unknowns;
        let mut adapted = carried.clone();
        adapted.overhead_ns *= x[OVERHEAD].exp();
        for part in &mut adapted.parts {
            part.coefficient *= x[place(PartKind::of(&part.name))].exp();
        }
        if let Some(from) = &mut adapted.transferred_from {
            from.ratio_share = x[SHARE];
        }
        adapted
    }
}

/// Half of the sum that is minimised.
fn cost_of(points: &[&Point], prior: &Prior, x: &Unknowns) -> f64 {
    let huber = |z: f64| if z <= HUBER { 0.5 * z * z } else { HUBER * (z - 0.5 * HUBER) };
    let of_points: f64 = points.iter().map(|point| huber(point.error(x).0.abs() / SHAPE_SCATTER)).sum();
    let of_prior: f64 = prior.iter().zip(x).map(|((mean, spread), x)| ((x - mean) / spread).powi(2)).sum();
    of_points + 0.5 * of_prior
}

/// The Gauss-Newton step from `x`.
fn step(points: &[&Point], prior: &Prior, x: &Unknowns) -> Unknowns {
    let mut gram = [[0.0; NUM_UNKNOWNS]; NUM_UNKNOWNS];
    let mut down = [0.0; NUM_UNKNOWNS];
    for (i, (mean, spread)) in prior.iter().enumerate() {
        gram[i][i] = spread.powi(-2);
        down[i] = (mean - x[i]) * spread.powi(-2);
    }
    for point in points {
        let (error, slopes) = point.error(x);
        let weight = (HUBER * SHAPE_SCATTER / error.abs()).min(1.0) * SHAPE_SCATTER.powi(-2);
        for (i, a) in slopes.iter().enumerate() {
            down[i] -= weight * a * error;
            gram[i].iter_mut().zip(&slopes).for_each(|(cell, b)| *cell += weight * a * b);
        }
    }
    solve(gram, down)
}

/// The first of the step, its half, its quarter and so on that costs less, with its cost.
fn improved(
    points: &[&Point],
    prior: &Prior,
    x: &Unknowns,
    step: &Unknowns,
    cost: f64,
) -> Option<(Unknowns, f64)> {
    let mut share = 1.0;
    for _ in 0..MAX_HALVINGS {
        let mut next = *x;
        next.iter_mut().zip(step).for_each(|(x, step)| *x += share * step);
        next[SHARE] = next[SHARE].clamp(0.0, 1.0);
        let next_cost = cost_of(points, prior, &next);
        if next_cost < cost {
            return Some((next, next_cost));
        }
        share *= 0.5;
    }
    None
}

/// Solves `matrix x = right` by elimination; the matrix is symmetric and positive definite, so no pivot is 0.
fn solve(mut matrix: [Unknowns; NUM_UNKNOWNS], mut right: Unknowns) -> Unknowns {
    let n = NUM_UNKNOWNS;
    for i in 0..n {
        let (pivot_row, pivot_right) = (matrix[i], right[i]);
        for j in i + 1..n {
            let factor = matrix[j][i] / pivot_row[i];
            matrix[j].iter_mut().zip(&pivot_row).for_each(|(cell, pivot)| *cell -= factor * pivot);
            right[j] -= factor * pivot_right;
        }
    }
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|j| matrix[i][j] * right[j]).sum();
        right[i] = (right[i] - known) / matrix[i][i];
    }
    right
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A point of an overhead of 1 us and 2 us of memory time, measured `factor` times as long.
    fn point(factor: f64) -> Point {
        let parts_ns = vec![(place(PartKind::Memory), 2000.0)];
        let ln_time = (3000.0 * factor).ln();
        Point { overhead_ns: 1000.0, parts_ns, norm: 1, ln_ratio: 0.0, ln_time }
    }

    /// By which factor the law's answer for such a point moves.
    fn moved(points: &[Point]) -> f64 {
        let points: Vec<&Point> = points.iter().collect();
        let adaptation = Adaptation::fit(&points, 1.0);
        point(1.0).error(&adaptation.unknowns).0.exp()
    }

    #[test]
    fn one_sample_moves_some_and_twenty_nearly_all() {
        let all = |n: usize| (0..n).map(|_| point(1.3)).collect::<Vec<_>>();
        assert!((moved(&[]) - 1.0).abs() < 1e-12);
        let (one, twenty) = (moved(&all(1)), moved(&all(20)));
        assert!(one > 1.05 && one < 1.25, "{one}");
        assert!(twenty > 1.28 && twenty < 1.3, "{twenty}");
    }

    #[test]
    fn an_odd_sample_counts_little() {
        let mut points: Vec<Point> = (0..19).map(|_| point(1.1)).collect();
        points.push(point(10.0));
        let moved = moved(&points);
        assert!((moved / 1.1 - 1.0).abs() < 0.03, "{moved}");
    }

    #[test]
    fn overhead_and_parts_are_told_apart_where_sizes_differ() {
        let sizes = [100.0, 300.0, 1000.0, 3000.0, 10_000.0, 100_000.0];
        let of_size = |ns: f64| Point {
            overhead_ns: 1000.0,
            parts_ns: vec![(place(PartKind::Tensor), ns), (place(PartKind::Memory), 0.5 * ns)],
            norm: 3,
            ln_ratio: 0.2,
            ln_time: (1300.0 + 0.8 * (ns.powi(3) + (0.5 * ns).powi(3)).cbrt()).ln() + 0.2 * 0.6,
        };
        let points: Vec<Point> =
            sizes.iter().flat_map(|&ns| [of_size(ns), of_size(ns), of_size(ns)]).collect();
        let points: Vec<&Point> = points.iter().collect();
        let found = Adaptation::fit(&points, 0.5);
        let factor = |place: usize| found.unknowns[place].exp();
        assert!((factor(OVERHEAD) / 1.3 - 1.0).abs() < 0.05, "{found:?}");
        assert!((factor(place(PartKind::Tensor)) / 0.8 - 1.0).abs() < 0.05, "{found:?}");
        assert!(found.unknowns[place(PartKind::Scalar)].abs() < 1e-9, "nothing told of it: {found:?}");
    }

    #[test]
    fn slopes_are_those_of_the_error() {
        let parts_ns = vec![(place(PartKind::Tensor), 900.0), (place(PartKind::Memory), 700.0)];
        let point = Point { overhead_ns: 500.0, parts_ns, norm: 3, ln_ratio: -0.3, ln_time: 7.0 };
        let x = [0.1, -0.2, 0.0, 0.3, 0.0, 0.7];
        let (at, slopes) = point.error(&x);
        for i in 0..x.len() {
            let mut moved = x;
            moved[i] += 1e-6;
            let found = (point.error(&moved).0 - at) / 1e-6;
            assert!((found - slopes[i]).abs() < 1e-5, "{i}: {found}, not {}", slopes[i]);
        }
    }
}

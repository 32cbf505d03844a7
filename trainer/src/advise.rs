//! Where predictors are least sure, and their error so far: what a profile under a time budget asks between rounds.
//!
//! [`Advice::unsureness`] estimates the error of predicting a shape that was not measured, by a committee (Seung, Opper
//! and Sompolinsky 1992, "Query by committee") whose members are each trained on all rows but those of one fold.
//! `docs/training.md` says what the estimate is made of and how well it does.

use std::collections::HashSet;

use plumbline_bundles::{
    CurveError, OperatorPredictor, Sample, features::LnShape, stats::percentile_of_sorted,
};
use plumbline_schema::{GpuSpec, Operator, OperatorShape};
use rayon::prelude::*;

use crate::{
    dataset::{self, OperatorRows, Row},
    evaluate::{Folds, folds},
    fit::{Residuals, fit},
    train::{MIN_SHAPES, TrainOptions},
};

/// Nearest measured shapes whose own errors tell of a candidate's.
const NEIGHBOURS: usize = 6;

/// Added to distances to measured shapes before they weigh as their inverse, so that the nearest does not count alone:
/// a factor of 1.1 in one number of a shape.
const SOFTENING: f64 = 0.1;

/// Most that a candidate's error is thought larger than its neighbours' for lying farther from what was measured.
const MAX_FARTHER: f64 = 10.0;

/// Least expected error of a shape that was not measured: what repeating a measurement changes.
const LEAST: f64 = 0.002;

/// How thoroughly to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdviceOptions {
    /// Seed of the committee's folds and forests.
    pub seed: u64,
    /// Members of a committee, at least 2; fewer where there are fewer shapes.
    pub num_members: usize,
    /// Trees of a member's forest, at least 1.
    pub num_trees: usize,
}

impl Default for AdviceOptions {
    fn default() -> Self {
        Self { seed: 0, num_members: 8, num_trees: 16 }
    }
}

impl AdviceOptions {
    fn training(&self, member: usize) -> TrainOptions {
        let seed = self.seed.wrapping_add(member as u64);
        TrainOptions { seed, num_trees: self.num_trees.max(1), ..TrainOptions::default() }
    }
}

/// Committees trained on samples, which answer where predictors of these are unsure and how well they do.
#[derive(Debug)]
pub struct Advice {
    gpu: GpuSpec,
    options: AdviceOptions,
    /// Those that have rows enough.
    groups: Vec<(Group, Committee)>,
}

impl Advice {
    /// Trains the committees. Samples that training would refuse leave their operator without one.
    ///
    /// Matrix products share theirs, as in training. The answers depend on samples, GPU and options alone.
    #[must_use]
    pub fn new(samples: &[Sample], gpu: &GpuSpec, options: &AdviceOptions) -> Self {
        let trained = groups(samples).into_par_iter().filter_map(|group| {
            let committee = Committee::new(&group, gpu, options)?;
            Some((group, committee))
        });
        Self { groups: trained.collect(), gpu: gpu.clone(), options: *options }
    }

    /// Expected relative errors (at least 0) of predicting candidates, in their order.
    ///
    /// 0 for a shape that was measured; infinite for operators without a committee: fewer than [`MIN_SHAPES`] shapes
    /// outside each fold, or samples that training would refuse.
    #[must_use]
    pub fn unsureness(&self, candidates: &[(Operator, OperatorShape)]) -> Vec<f64> {
        let of = |(operator, shape): &(Operator, OperatorShape)| {
            let group = self.groups.iter().find(|(group, _)| group.serves(*operator));
            group.map_or(f64::INFINITY, |(_, committee)| committee.unsureness(shape, &self.gpu))
        };
        candidates.par_iter().map(of).collect()
    }

    /// Errors of predicting held-out samples, which are not to be among those trained on; `None` when no operator has
    /// enough of both.
    #[must_use]
    pub fn held_out_error(&self, held_out: &[Sample]) -> Option<CurveError> {
        pooled(&self.held_out_errors(held_out))
    }

    /// Absolute relative errors of the held-out shapes of each operator that can be predicted, as 0..1 ratios,
    /// ascending.
    ///
    /// The predictor is trained on all rows, and interpolates residuals where this did better on rows left out. A shape
    /// that was measured as another matrix product is left out: it would be looked up, not predicted.
    #[must_use]
    pub fn held_out_errors(&self, held_out: &[Sample]) -> Vec<(Operator, Vec<f64>)> {
        let training = TrainOptions { seed: self.options.seed, ..TrainOptions::default() };
        let of_group = |(group, committee): &(Group, Committee)| {
            let predictor = group.member(&[], committee.interpolates, &self.gpu, &training)?;
            let own = Operator::ALL.into_iter().filter(|&operator| group.serves(operator));
            let sets = own.filter_map(|operator| rows_of(held_out, operator));
            Some(sets.map(|set| (set.operator, self.errors(group, &predictor, &set))).collect::<Vec<_>>())
        };
        let of_groups: Vec<_> = self.groups.par_iter().filter_map(of_group).collect();
        of_groups.into_iter().flatten().filter(|(_, errors)| !errors.is_empty()).collect()
    }

    fn errors(&self, group: &Group, predictor: &OperatorPredictor, set: &OperatorRows) -> Vec<f64> {
        let error = |row: &Row| (predictor.predict(&row.shape, &self.gpu) / row.time_ns - 1.0).abs();
        let mut errors: Vec<f64> = set.rows.iter().filter(|row| !group.holds(row)).map(error).collect();
        errors.sort_by(f64::total_cmp);
        errors
    }
}

/// Percentiles over all operators, each with the same total weight, from ascending errors; `None` without any.
fn pooled(per_operator: &[(Operator, Vec<f64>)]) -> Option<CurveError> {
    let weighted = |errors: &Vec<f64>| {
        let weight = 1.0 / errors.len() as f64;
        errors.iter().map(move |&error| (error, weight)).collect::<Vec<_>>()
    };
    let mut all: Vec<(f64, f64)> = per_operator.iter().flat_map(|(_, errors)| weighted(errors)).collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let total: f64 = all.iter().map(|(_, weight)| weight).sum();
    let last = all.last()?.0;
    // The smallest error that the share of the weight does not exceed; rounding must not skip one.
    let quantile = |share: f64| {
        let mut sum = 0.0;
        let reaches = |(_, weight): &&(f64, f64)| {
            sum += weight;
            sum >= share * total * (1.0 - 1e-9)
        };
        all.iter().find(reaches).map_or(last, |(error, _)| *error)
    };
    let medians = per_operator.iter().map(|(_, errors)| percentile_of_sorted(errors, 0.5));
    Some(CurveError {
        p50: quantile(0.5),
        p90: quantile(0.9),
        worst_operator_p50: medians.fold(0.0, f64::max),
        num_points: all.len(),
    })
}

/// Rows that operators with the same kernels are trained on together.
#[derive(Debug)]
struct Group {
    operator: Operator,
    rows: Vec<Row>,
}

/// The rows of an operator's samples; `None` when there are none or training would refuse them.
fn rows_of(samples: &[Sample], operator: Operator) -> Option<OperatorRows> {
    let own: Vec<Sample> = samples.iter().filter(|sample| sample.operator == operator).cloned().collect();
    dataset::collect(&own).ok()?.into_iter().next()
}

/// One group of all matrix products, and one of each other operator, where there are rows.
fn groups(samples: &[Sample]) -> Vec<Group> {
    let sets: Vec<OperatorRows> =
        Operator::ALL.into_iter().filter_map(|operator| rows_of(samples, operator)).collect();
    let gemms: Vec<&OperatorRows> = sets.iter().filter(|set| set.operator.is_gemm()).collect();
    let shared = gemms.first().and_then(|first| {
        let rows = dataset::pool(&gemms).ok()?;
        Some(Group { operator: first.operator, rows })
    });
    let others = sets.iter().filter(|set| !set.operator.is_gemm());
    let alone = others.map(|set| Group { operator: set.operator, rows: set.rows.clone() });
    shared.into_iter().chain(alone).collect()
}

impl Group {
    fn serves(&self, operator: Operator) -> bool {
        self.operator == operator || (self.operator.is_gemm() && operator.is_gemm())
    }

    /// Whether a row's shape was measured, if as another matrix product. Rows are sorted by shape.
    fn holds(&self, row: &Row) -> bool {
        self.rows.binary_search_by(|own| own.values.cmp(&row.values)).is_ok()
    }

    /// Residuals are interpolated along one number only.
    fn can_interpolate(&self) -> bool {
        self.operator != Operator::Attention
    }

    /// The members' folds; `None` when what lies outside of one would be too little to train on.
    fn folds(&self, options: &AdviceOptions) -> Option<Vec<Vec<usize>>> {
        let n = self.rows.len();
        let folds = folds(n, options.num_members.max(2), Folds::Shuffled { seed: options.seed });
        let largest = folds.iter().map(Vec::len).max()?;
        (folds.len() > 1 && n - largest >= MIN_SHAPES).then_some(folds)
    }

    /// A predictor of the rows outside of `fold`.
    fn member(
        &self,
        fold: &[usize],
        interpolates: bool,
        gpu: &GpuSpec,
        options: &TrainOptions,
    ) -> Option<OperatorPredictor> {
        let left_out: HashSet<usize> = fold.iter().copied().collect();
        let rows = self.rows.iter().enumerate().filter(|(i, _)| !left_out.contains(i)).map(|(_, row)| row);
        let rows: Vec<&Row> = rows.collect();
        let residuals =
            if interpolates { Residuals::Beside { forest_share: 1.0 } } else { Residuals::Unused };
        Some(fit(self.operator, &rows, true, gpu, options).ok()?.with_residuals(residuals))
    }
}

/// Predictors that each leave a fold of the rows out, and how they do on what they left out.
#[derive(Debug)]
struct Committee {
    /// The measured shapes.
    measured: Vec<LnShape>,
    /// Whether residuals are interpolated: what did better on the rows left out.
    interpolates: bool,
    members: Vec<OperatorPredictor>,
    /// `|ln(predicted / measured)|` of each row by the member that did not see it.
    errors: Vec<f64>,
    /// Distance of each row to the nearest that its member saw.
    distances: Vec<f64>,
}

impl Committee {
    fn new(group: &Group, gpu: &GpuSpec, options: &AdviceOptions) -> Option<Self> {
        let folds = group.folds(options)?;
        let ways: &[bool] = if group.can_interpolate() { &[true, false] } else { &[false] };
        let mut members: Vec<OperatorPredictor> = folds
            .par_iter()
            .enumerate()
            .map(|(i, fold)| group.member(fold, ways[0], gpu, &options.training(i)))
            .collect::<Option<_>>()?;
        let mut best: Option<(bool, Vec<f64>)> = None;
        let mut residuals: Vec<Vec<f32>> = Vec::new();
        for &interpolates in ways {
            if !interpolates {
                // Put aside, not thrown away: they may turn out to be better.
                residuals = members.iter_mut().map(|m| std::mem::take(&mut m.domain.residual)).collect();
            }
            let errors = left_out_errors(&group.rows, &folds, &members, gpu);
            let sum = |errors: &[f64]| errors.iter().sum::<f64>();
            if best.as_ref().is_none_or(|(_, other)| sum(&errors) < sum(other)) {
                best = Some((interpolates, errors));
            }
        }
        let (interpolates, errors) = best?;
        if interpolates {
            members.iter_mut().zip(residuals).for_each(|(m, residual)| m.domain.residual = residual);
        }
        let measured: Vec<LnShape> = group.rows.iter().map(|row| LnShape::new(&row.shape)).collect();
        Some(Self { distances: distances(&measured, &folds), measured, interpolates, members, errors })
    }

    /// Expected relative error of a shape.
    fn unsureness(&self, shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
        let place = LnShape::new(shape);
        let mut near: Vec<(f64, usize)> =
            self.measured.iter().enumerate().map(|(i, other)| (place.distance(other), i)).collect();
        let by_distance = |a: &(f64, usize), b: &(f64, usize)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
        if near.len() > NEIGHBOURS {
            near.select_nth_unstable_by(NEIGHBOURS - 1, by_distance);
            near.truncate(NEIGHBOURS);
        }
        near.sort_by(by_distance);
        let Some(&(nearest, _)) = near.first() else { return f64::INFINITY };
        if nearest <= 0.0 {
            return 0.0;
        }
        let mean = |of: &[f64]| {
            let weight = |distance: f64| 1.0 / (distance + SOFTENING);
            let total: f64 = near.iter().map(|&(distance, _)| weight(distance)).sum();
            near.iter().map(|&(distance, i)| weight(distance) * of[i]).sum::<f64>() / total
        };
        // A shape among others is hardly surer for being nearer; one beyond them is less sure with every step.
        let ratio = nearest / mean(&self.distances).max(f64::MIN_POSITIVE);
        let farther = if ratio < 1.0 { ratio.sqrt() } else { ratio.min(MAX_FARTHER) };
        (self.spread(shape, gpu).hypot(mean(&self.errors)) * farther).max(LEAST)
    }

    /// Standard error of the committee's answer, by the jackknife with whole folds left out: members see nearly the same
    /// rows, and differ that much less than predictors of fresh rows would.
    fn spread(&self, shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
        let answers: Vec<f64> = self.members.iter().map(|member| member.predict(shape, gpu).ln()).collect();
        let count = answers.len() as f64;
        let mean = answers.iter().sum::<f64>() / count;
        let squares = answers.iter().map(|answer| (answer - mean).powi(2)).sum::<f64>();
        ((count - 1.0) / count * squares).sqrt()
    }
}

/// `|ln(predicted / measured)|` of each row by the member that left it out.
fn left_out_errors(
    rows: &[Row],
    folds: &[Vec<usize>],
    members: &[OperatorPredictor],
    gpu: &GpuSpec,
) -> Vec<f64> {
    let mut errors = vec![0.0; rows.len()];
    for (fold, member) in folds.iter().zip(members) {
        for &i in fold {
            errors[i] = (member.predict(&rows[i].shape, gpu) / rows[i].time_ns).ln().abs();
        }
    }
    errors
}

/// Distance of each row to the nearest of another fold.
fn distances(shapes: &[LnShape], folds: &[Vec<usize>]) -> Vec<f64> {
    let mut fold_of = vec![0; shapes.len()];
    for (fold, members) in folds.iter().enumerate() {
        for &row in members {
            fold_of[row] = fold;
        }
    }
    let nearest = |i: usize| {
        let others = (0..shapes.len()).filter(|&j| fold_of[j] != fold_of[i]);
        others.map(|j| shapes[i].distance(&shapes[j])).fold(f64::INFINITY, f64::min)
    };
    (0..shapes.len()).into_par_iter().map(nearest).collect()
}

//! Predictors carried over to another GPU: by its data sheet, then adapted to a few samples of it.
//!
//! Start with [`transfer`]. What the data sheets say is [`OperatorPredictor::carried_to`]; `law` says what samples change
//! of it; [`choose`] which samples are used.

mod law;

use std::collections::BTreeMap;

use plumbline_bundles::{
    OperatorPredictor, Sample,
    features::LnShape,
    predictor::{ErrorSummary, HeldOutError, Interval, RatioRange},
};
use plumbline_schema::{GpuSpec, Operator, roofline::floor_ns};
use rand::Rng;
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};

use self::law::{Adaptation, Point};
use crate::{
    dataset::{self, OperatorRows, Row},
    error::TrainError,
    evaluate::{Folds, folds, ratio_range, summarise},
};

/// Folds that the errors of adapted predictors are measured on; fewer where there are fewer samples.
const FOLDS: usize = 5;
/// Shapes that each choice looks at.
const CANDIDATES: usize = 10;

/// How to transfer.
#[derive(Clone, Debug, PartialEq)]
pub struct TransferOptions {
    /// Seed of the choice of samples and of the folds.
    pub seed: u64,
    /// Shapes of each operator that the predictors are adapted to; 0 for data sheets alone.
    pub few_shot: usize,
    /// Share of held-out shapes inside the interval, 0.0 to 1.0.
    pub coverage: f64,
}

impl Default for TransferOptions {
    fn default() -> Self {
        Self { seed: 0, few_shot: 0, coverage: 0.9 }
    }
}

/// What a transfer yields.
#[derive(Clone, Debug, PartialEq)]
pub struct TransferOutcome {
    /// One predictor for each that was given, in the order of the forward pass.
    pub predictors: Vec<OperatorPredictor>,
    /// How well they do on samples that were not used.
    pub report: TransferReport,
}

/// How well carried-over predictors do on samples of the target GPU that were not used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TransferReport {
    /// Name of the GPU that was measured.
    pub from: String,
    /// Name of the GPU that is predicted.
    pub gpu: String,
    /// Seed of all randomness.
    pub seed: u64,
    /// Shapes of each operator that were asked for.
    pub few_shot: usize,
    /// One entry per predictor, in their order.
    pub operators: Vec<OperatorTransfer>,
    /// Operators with samples of the target GPU that the measured one has no predictor of.
    pub not_covered: Vec<Operator>,
}

/// How well one operator's carried-over predictor does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperatorTransfer {
    /// The operator.
    pub operator: Operator,
    /// Shapes of the target GPU that the predictor was adapted to.
    pub num_used: usize,
    /// Shapes that it was adapted to with those of the operators that share its law.
    pub num_pooled: usize,
    /// Other shapes of the target GPU, outside what was measured on the first one; not judged.
    pub num_refused: usize,
    /// Fixed cost of a launch on the target GPU, ns.
    pub overhead_ns: f64,
    /// Share of the measured GPU's ratio that is taken to hold, 0..=1.
    pub ratio_share: f64,
    /// Errors by data sheets alone at all shapes left; `None` when there are none.
    pub data_sheets: Option<ErrorSummary>,
    /// Errors of the adapted predictor at the same shapes; `None` when no samples were used or none are left.
    pub few_shot: Option<ErrorSummary>,
    /// Share of those shapes inside the predicted interval, 0..1; `None` when there are none.
    pub coverage: Option<f64>,
    /// Spread around the predictions.
    pub interval: Interval,
}

/// Carries the predictors of `source` over to `gpu` and adapts them to some of its samples; all others judge them.
///
/// Without samples nothing is judged. The same arguments give the same bytes.
///
/// # Errors
/// When there are no predictors, or they were carried over themselves; when samples are asked for and there are none; when
/// a sample cannot be true.
pub fn transfer(
    predictors: &[OperatorPredictor],
    source: &GpuSpec,
    samples: &[Sample],
    gpu: &GpuSpec,
    options: &TransferOptions,
) -> Result<TransferOutcome, TrainError> {
    check_source(predictors)?;
    let sets =
        if samples.is_empty() && options.few_shot == 0 { Vec::new() } else { dataset::collect(samples)? };
    sets.iter().try_for_each(|set| dataset::check_floor(set, gpu))?;
    let mut members: Vec<Member> =
        predictors.iter().map(|predictor| Member::new(predictor, source, &sets, gpu, options)).collect();
    members.sort_by_key(|member| member.carried.operator as usize);
    let mut adapted: BTreeMap<usize, (OperatorPredictor, usize)> = BTreeMap::new();
    for pool in pools(&members) {
        adapt(&members, &pool, gpu, options, &mut adapted);
    }
    let mut outcome = TransferOutcome {
        predictors: Vec::with_capacity(members.len()),
        report: TransferReport {
            from: source.name.clone(),
            gpu: gpu.name.clone(),
            seed: options.seed,
            few_shot: options.few_shot,
            operators: Vec::with_capacity(members.len()),
            not_covered: not_covered(predictors, &sets),
        },
    };
    for (i, member) in members.iter().enumerate() {
        let (predictor, num_pooled) = adapted.remove(&i).unwrap_or_else(|| (member.carried.clone(), 0));
        outcome.report.operators.push(member.report(&predictor, num_pooled, gpu));
        outcome.predictors.push(predictor);
    }
    Ok(outcome)
}

fn check_source(predictors: &[OperatorPredictor]) -> Result<(), TrainError> {
    if predictors.is_empty() {
        return Err(TrainError::NoPredictors);
    }
    match predictors.iter().find_map(|p| p.transferred_from.as_ref().map(|from| (p.operator, from))) {
        Some((operator, from)) => {
            Err(TrainError::AlreadyTransferred { operator, measured: from.gpu.name.clone() })
        }
        None => Ok(()),
    }
}

fn not_covered(predictors: &[OperatorPredictor], sets: &[OperatorRows]) -> Vec<Operator> {
    let is_covered = |set: &&OperatorRows| predictors.iter().any(|p| p.operator == set.operator);
    sets.iter().filter(|set| !is_covered(set)).map(|set| set.operator).collect()
}

/// An operator's carried-over predictor with the samples of the target GPU.
struct Member {
    carried: OperatorPredictor,
    /// The samples that it is adapted to, as a set of their own; `None` when there are none.
    used: Option<OperatorRows>,
    /// The samples that judge it.
    judges: Vec<Row>,
    num_refused: usize,
}

impl Member {
    fn new(
        predictor: &OperatorPredictor,
        source: &GpuSpec,
        sets: &[OperatorRows],
        gpu: &GpuSpec,
        options: &TransferOptions,
    ) -> Self {
        let operator = predictor.operator;
        let carried = predictor.carried_to(source, gpu);
        let Some(set) = sets.iter().find(|set| set.operator == operator) else {
            return Self { carried, used: None, judges: Vec::new(), num_refused: 0 };
        };
        let is_answered = |row: &&Row| carried.domain.answers(operator, &row.values);
        let answered: Vec<Row> = set.rows.iter().filter(is_answered).cloned().collect();
        let num_refused = set.rows.len() - answered.len();
        let mut is_chosen = vec![false; answered.len()];
        let shapes: Vec<LnShape> = answered.iter().map(|row| LnShape::new(&row.shape)).collect();
        for i in choose(&shapes, options.few_shot, options.seed) {
            is_chosen[i] = true;
        }
        let of = |chosen: bool| {
            let rows = answered.iter().zip(&is_chosen);
            rows.filter(|(_, is)| **is == chosen).map(|(row, _)| row.clone()).collect::<Vec<_>>()
        };
        let (rows, judges) = (of(true), of(false));
        let num_samples = rows.len();
        let used = OperatorRows { operator, cache: set.cache, rows, num_samples, num_flagged: 0 };
        Self { carried, used: (num_samples > 0).then_some(used), judges, num_refused }
    }

    fn shots(&self, gpu: &GpuSpec) -> Vec<Shot<'_>> {
        let rows = self.used.iter().flat_map(|used| &used.rows);
        rows.map(|row| Shot { carried: &self.carried, row, point: Point::new(&self.carried, row, gpu) })
            .collect()
    }

    fn report(&self, predictor: &OperatorPredictor, num_pooled: usize, gpu: &GpuSpec) -> OperatorTransfer {
        let measured: Vec<f64> = self.judges.iter().map(|row| row.time_ns).collect();
        let predicted = |predictor: &OperatorPredictor| -> Vec<f64> {
            self.judges.iter().map(|row| predictor.predict(&row.shape, gpu)).collect()
        };
        let adapted = predicted(predictor);
        let RatioRange { low, high } = predictor.interval.extrapolated;
        let is_inside = |(p, m): &(&f64, &f64)| (low * **p..=high * **p).contains(*m);
        let num_inside = adapted.iter().zip(&measured).filter(is_inside).count();
        let num_used = self.used.as_ref().map_or(0, |used| used.rows.len());
        OperatorTransfer {
            operator: predictor.operator,
            num_used,
            num_pooled,
            num_refused: self.num_refused,
            overhead_ns: predictor.overhead_ns,
            ratio_share: predictor.transferred_from.as_ref().map_or(1.0, |from| from.ratio_share),
            data_sheets: summarise(&predicted(&self.carried), &measured),
            few_shot: if num_pooled > 0 { summarise(&adapted, &measured) } else { None },
            coverage: (!measured.is_empty()).then(|| num_inside as f64 / measured.len() as f64),
            interval: predictor.interval,
        }
    }
}

/// A sample of the target GPU that a law is adapted to.
struct Shot<'a> {
    carried: &'a OperatorPredictor,
    row: &'a Row,
    point: Point,
}

/// Chooses `n` shapes that are well spread: the first by the seed, then each time the one of a few at random that lies
/// farthest from all chosen (best candidate: Mitchell 1991).
///
/// The farthest of all would be corners of what was measured, one after the other, and those are unlike most shapes.
#[must_use]
pub fn choose(shapes: &[LnShape], n: usize, seed: u64) -> Vec<usize> {
    let mut rng = Pcg64::new(u128::from(seed), 0x7a45_fe40);
    let mut left: Vec<usize> = (0..shapes.len()).collect();
    let mut chosen: Vec<usize> = Vec::with_capacity(n.min(shapes.len()));
    while chosen.len() < n && !left.is_empty() {
        let mut best = (f64::NEG_INFINITY, 0);
        for _ in 0..CANDIDATES {
            let place = (rng.next_u64() % left.len() as u64) as usize;
            let distance = |&other: &usize| shapes[left[place]].distance(&shapes[other]);
            let nearest = chosen.iter().map(distance).fold(f64::INFINITY, f64::min);
            if nearest > best.0 {
                best = (nearest, place);
            }
        }
        chosen.push(left.swap_remove(best.1));
    }
    chosen
}

/// Members whose samples are one law's: all matrix products together, every other operator by itself.
fn pools(members: &[Member]) -> Vec<Vec<usize>> {
    let is_gemm = |&i: &usize| members[i].carried.operator.is_gemm();
    let (gemms, others): (Vec<usize>, Vec<usize>) = (0..members.len()).partition(is_gemm);
    others.into_iter().map(|i| vec![i]).chain((!gemms.is_empty()).then_some(gemms)).collect()
}

/// Adapts the members of a pool to their samples, if there are any.
fn adapt(
    members: &[Member],
    pool: &[usize],
    gpu: &GpuSpec,
    options: &TransferOptions,
    adapted: &mut BTreeMap<usize, (OperatorPredictor, usize)>,
) {
    let of_pool: Vec<&Member> = pool.iter().map(|&i| &members[i]).collect();
    let shots: Vec<Shot> = of_pool.iter().flat_map(|member| member.shots(gpu)).collect();
    let Some(first) = shots.first() else { return };
    let share = first.carried.transferred_from.as_ref().map_or(1.0, |from| from.ratio_share);
    let fit = |shots: &[&Shot]| {
        let points: Vec<&Point> = shots.iter().map(|shot| &shot.point).collect();
        Adaptation::fit(&points, share)
    };
    let predicted = held_out(&shots, fit, gpu, options.seed);
    let measured: Vec<f64> = shots.iter().map(|shot| shot.row.time_ns).collect();
    let used: Vec<&OperatorRows> = of_pool.iter().filter_map(|member| member.used.as_ref()).collect();
    let digest = dataset::digest(&used);
    let adaptation = fit(&shots.iter().collect::<Vec<_>>());
    for (&i, member) in pool.iter().zip(&of_pool) {
        let mut predictor = adaptation.apply(&member.carried);
        let operator = predictor.operator;
        let own = shots.iter().zip(&predicted).filter(|(shot, _)| shot.carried.operator == operator);
        let (own_predicted, own_measured): (Vec<f64>, Vec<f64>) =
            own.map(|(shot, predicted)| (*predicted, shot.row.time_ns)).unzip();
        let shuffled = summarise(&own_predicted, &own_measured).unwrap_or_default();
        predictor.error = HeldOutError { shuffled, ..HeldOutError::default() };
        predictor.interval = interval(&member.carried.interval, &predicted, &measured, options.coverage);
        if let Some(from) = &mut predictor.transferred_from {
            from.num_samples = shots.len() as u32;
        }
        predictor.samples_digest.clone_from(&digest);
        adapted.insert(i, (predictor, shots.len()));
    }
}

/// Predicts each sample by a law that was adapted to the others, ns.
fn held_out(shots: &[Shot], fit: impl Fn(&[&Shot]) -> Adaptation, gpu: &GpuSpec, seed: u64) -> Vec<f64> {
    let mut predicted = vec![0.0; shots.len()];
    for fold in folds(shots.len(), FOLDS, Folds::Shuffled { seed }) {
        let others = shots.iter().enumerate().filter(|(i, _)| !fold.contains(i));
        let adaptation = fit(&others.map(|(_, shot)| shot).collect::<Vec<_>>());
        for i in fold {
            let Shot { row, point, .. } = &shots[i];
            predicted[i] = adaptation.time_ns(point).max(floor_ns(&row.shape, gpu));
        }
    }
    predicted
}

/// The interval of an adapted predictor, of its held-out samples: one is never surer than of the GPU that was measured.
///
/// Of few samples the ends are taken further out, so that the next one lies inside as often as `coverage` says: the
/// `k`-th smallest of `n` has `k / (n + 1)` below it (conformal prediction: Vovk, Gammerman and Shafer 2005). With
/// fewer than tell of such an end, what data sheets alone promise is kept in, too.
fn interval(carried: &Interval, predicted: &[f64], measured: &[f64], coverage: f64) -> Interval {
    let (n, tail) = (predicted.len() as f64, (1.0 - coverage) / 2.0);
    let rank = tail * (n + 1.0);
    let share_below = if rank > 1.0 { (rank - 1.0) / (n - 1.0) } else { 0.0 };
    let widened = |range: RatioRange, by: RatioRange| RatioRange {
        low: range.low.min(by.low),
        high: range.high.max(by.high),
    };
    let mut range = ratio_range(predicted, measured, 1.0 - 2.0 * share_below);
    range = widened(range, carried.interpolated);
    if rank < 1.0 {
        range = widened(range, carried.extrapolated);
    }
    Interval { coverage, interpolated: range, extrapolated: range, unseen_layout: None }
}

#[cfg(test)]
mod tests {
    use plumbline_schema::OperatorShape;

    use super::*;

    #[test]
    fn chosen_shapes_are_spread_and_follow_the_seed() {
        let shape = |num_tokens| LnShape::new(&OperatorShape::RmsNorm { num_tokens, hidden_size: 4096 });
        let shapes: Vec<LnShape> = (1..=1000).map(shape).collect();
        let chosen = choose(&shapes, 20, 3);
        assert_eq!(chosen, choose(&shapes, 20, 3));
        assert_ne!(chosen, choose(&shapes, 20, 4));
        let mut distinct = chosen.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 20);
        // At random a twentieth would be under 50 tokens, over half of all logarithms.
        let num_small = chosen.iter().filter(|&&i| i < 50).count();
        assert!((3..=14).contains(&num_small), "{chosen:?}");
        assert_eq!(choose(&shapes[..3], 20, 3).len(), 3);
        assert!(choose(&[], 20, 3).is_empty());
    }
}

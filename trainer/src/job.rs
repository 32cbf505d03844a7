//! Training of the operators that share one set of rows, and the errors of what they learned.

use plumbline_bundles::{
    OperatorPredictor,
    features::batch_columns,
    predictor::{Domain, ErrorSummary, HeldOutError, Interval, RatioRange},
};
use plumbline_schema::{
    GpuSpec, Operator, OperatorShape,
    roofline::{floor_ns, roofline_ns},
};
use rayon::prelude::*;

use crate::{
    baseline::has_optional_steps,
    dataset::{self, OperatorRows, Row},
    error::TrainError,
    evaluate::{Folds, folds, layout_folds, ratio_range, summarise},
    fit::{Residuals, fit},
    train::{HeldOutPoint, HeldOutWay, OperatorReport, TrainOptions, Trial},
};

/// Most folds of whole layouts: with many, most of a layout's neighbours remain when it is held out.
const LAYOUT_FOLDS: usize = 10;

/// What an error across gaps and beyond edges counts beside one between close neighbours when ways are compared: most
/// shapes that are asked for lie close to measured ones, yet a way that fails at edges must lose.
const BLOCKED_WEIGHT: f64 = 0.25;

/// Rows that one or more operators are trained on together.
pub(crate) struct Job<'a> {
    /// Operators whose kernels are the same; one unless matrix products.
    sets: Vec<&'a OperatorRows>,
    /// Their rows, sorted by shape; no shape twice.
    rows: Vec<Row>,
    gpu: &'a GpuSpec,
    options: &'a TrainOptions,
}

/// What a job found, from which each operator's predictor is made.
pub(crate) struct Trained {
    /// Trained on all rows.
    predictor: OperatorPredictor,
    shuffled: HeldOut,
    layouts: HeldOut,
    blocked: HeldOut,
    tried: Vec<Trial>,
}

/// A way of training that is tried.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Way {
    has_steps: bool,
    residuals: Residuals,
}

/// Predictions of rows by a model that never saw them, ns; `None` for rows that were not judged.
struct HeldOut {
    predicted: Vec<Option<f64>>,
    /// Fold of each row.
    fold: Vec<usize>,
}

impl HeldOut {
    /// Pairs of predicted and measured times of the judged rows that `is_wanted`.
    fn pairs(&self, rows: &[Row], is_wanted: impl Fn(&Row) -> bool) -> (Vec<f64>, Vec<f64>) {
        let judged = self.predicted.iter().zip(rows).filter(|(_, row)| is_wanted(row));
        judged.filter_map(|(predicted, row)| predicted.map(|ns| (ns, row.time_ns))).unzip()
    }

    fn summary(&self, rows: &[Row], is_wanted: impl Fn(&Row) -> bool) -> Option<ErrorSummary> {
        let (predicted, measured) = self.pairs(rows, is_wanted);
        summarise(&predicted, &measured)
    }

    /// The range of `measured / predicted` of all judged rows but those of a fold: what that fold's rows are told, who
    /// must not have a say in it. 1 alone when there are none.
    fn range_without(&self, rows: &[Row], fold: usize, coverage: f64) -> RatioRange {
        let others = self.predicted.iter().zip(&self.fold).zip(rows).filter(|((_, own), _)| **own != fold);
        let pairs = others.filter_map(|((predicted, _), row)| predicted.map(|ns| (ns, row.time_ns)));
        let (predicted, measured): (Vec<f64>, Vec<f64>) = pairs.unzip();
        ratio_range(&predicted, &measured, coverage)
    }
}

impl<'a> Job<'a> {
    /// Joins the rows of `sets`, at least one.
    pub(crate) fn new(
        sets: Vec<&'a OperatorRows>,
        gpu: &'a GpuSpec,
        options: &'a TrainOptions,
    ) -> Result<Self, TrainError> {
        let rows = dataset::pool(&sets)?;
        Ok(Self { sets, rows, gpu, options })
    }

    fn operator(&self) -> Operator {
        self.sets[0].operator
    }

    /// Measures the errors and trains on everything.
    pub(crate) fn run(&self) -> Result<Trained, TrainError> {
        let (operator, options) = (self.operator(), self.options);
        let seed = options.seed;
        let shuffled_folds = folds(self.rows.len(), options.num_folds, Folds::Shuffled { seed });
        let blocked_folds = self.blocked_folds();
        let mut tried = Vec::new();
        let mut best: Option<(f64, Way, HeldOut, HeldOut)> = None;
        let step_ways: &[bool] = if has_optional_steps(operator) { &[true, false] } else { &[true] };
        for &has_steps in step_ways {
            let ways: Vec<Way> =
                residual_ways(operator).iter().map(|&residuals| Way { has_steps, residuals }).collect();
            let shuffled = self.hold_out(&ways, &shuffled_folds)?;
            let blocked = self.hold_out(&ways, &blocked_folds)?;
            for ((way, shuffled), blocked) in ways.into_iter().zip(shuffled).zip(blocked) {
                let trial = self.trial(way, &shuffled, &blocked);
                let score = trial.shuffled_error + BLOCKED_WEIGHT * trial.blocked_error;
                tried.push(trial);
                if best.as_ref().is_none_or(|(other, ..)| score < *other) {
                    best = Some((score, way, shuffled, blocked));
                }
            }
        }
        let Some((_, way, shuffled, blocked)) = best else { return Err(TrainError::NoSamples) };
        let layout_folds = layout_folds(operator, &self.rows, LAYOUT_FOLDS, seed);
        let layouts = if layout_folds.len() > 1 { self.hold_out(&[way], &layout_folds)?.pop() } else { None };
        let none = || HeldOut { predicted: vec![None; self.rows.len()], fold: vec![0; self.rows.len()] };
        let layouts = layouts.unwrap_or_else(none);
        let rows: Vec<&Row> = self.rows.iter().collect();
        let mut predictor =
            fit(operator, &rows, way.has_steps, self.gpu, options)?.with_residuals(way.residuals);
        let surrounded = self.surrounded(&layouts, &layout_folds);
        predictor.interval = self.interval(&shuffled, &blocked, &layouts, &surrounded);
        predictor.samples_digest = dataset::digest(&self.sets);
        let layouts = surrounded;
        Ok(Trained { predictor, shuffled, layouts, blocked, tried })
    }

    fn trial(&self, way: Way, shuffled: &HeldOut, blocked: &HeldOut) -> Trial {
        let mean = |held_out: &HeldOut| held_out.summary(&self.rows, |_| true).unwrap_or_default().mean;
        let (interpolates_residuals, forest_share) = match way.residuals {
            Residuals::Unused => (false, 1.0),
            Residuals::Beside { forest_share } => (true, forest_share),
        };
        Trial {
            pooled: self.operator().is_gemm(),
            has_steps: way.has_steps,
            interpolates_residuals,
            forest_share,
            shuffled_error: mean(shuffled),
            blocked_error: mean(blocked),
        }
    }

    /// Neighbours by the tokens of the step (a collective's bytes): a fold is a range of batches that the others do not
    /// cover in any layout, so it is a gap or an edge.
    fn blocked_folds(&self) -> Vec<Vec<usize>> {
        let size = |&i: &usize| match self.rows[i].shape {
            OperatorShape::Attention { load, .. } => {
                (u64::from(load.num_tokens()), load.prefill_kv_tokens + load.decode_kv_tokens)
            }
            _ => (self.rows[i].values[batch_columns(self.operator()).start], 0),
        };
        let mut by_size: Vec<usize> = (0..self.rows.len()).collect();
        by_size.sort_by_key(size);
        let folds = folds(by_size.len(), self.options.num_folds, Folds::Blocked);
        folds.iter().map(|fold| fold.iter().map(|&place| by_size[place]).collect()).collect()
    }

    /// Predicts each fold's rows by models of all others, one for each way; the ways differ in residuals only.
    fn hold_out(&self, ways: &[Way], folds: &[Vec<usize>]) -> Result<Vec<HeldOut>, TrainError> {
        let answers: Vec<Vec<Vec<f64>>> = folds
            .par_iter()
            .map(|fold| {
                let others = self.others(fold);
                let has_steps = ways.iter().all(|way| way.has_steps);
                let fitted = fit(self.operator(), &others, has_steps, self.gpu, self.options)?;
                let answers = ways.iter().map(|way| {
                    let predictor = fitted.with_residuals(way.residuals);
                    fold.iter().map(|&i| predictor.predict(&self.rows[i].shape, self.gpu)).collect()
                });
                Ok(answers.collect())
            })
            .collect::<Result<_, TrainError>>()?;
        let mut fold_of = vec![0; self.rows.len()];
        for (number, fold) in folds.iter().enumerate() {
            for &i in fold {
                fold_of[i] = number;
            }
        }
        let of_way = |way: usize| {
            let mut predicted = vec![None; self.rows.len()];
            for (fold, answers) in folds.iter().zip(&answers) {
                for (&i, &ns) in fold.iter().zip(&answers[way]) {
                    predicted[i] = Some(ns);
                }
            }
            HeldOut { predicted, fold: fold_of.clone() }
        };
        Ok((0..ways.len()).map(of_way).collect())
    }

    /// The rows that are not in a fold.
    fn others(&self, fold: &[usize]) -> Vec<&Row> {
        let mut is_held_out = vec![false; self.rows.len()];
        for &i in fold {
            is_held_out[i] = true;
        }
        self.rows.iter().zip(is_held_out).filter(|(_, held_out)| !held_out).map(|(row, _)| row).collect()
    }

    /// Of layouts held out, the shapes that the remaining layouts surround, as only those are answered as interpolated.
    fn surrounded(&self, layouts: &HeldOut, folds: &[Vec<usize>]) -> HeldOut {
        let mut predicted = vec![None; self.rows.len()];
        for fold in folds {
            let others = self.others(fold);
            let measured =
                others.iter().map(|row| (row.values.clone(), row.time_ns, row.low_ns, row.high_ns));
            let domain = Domain::from_rows(self.operator(), measured.collect());
            for &i in fold {
                let is_surrounded = domain.answers(self.operator(), &self.rows[i].values);
                predicted[i] = layouts.predicted[i].filter(|_| is_surrounded);
            }
        }
        HeldOut { predicted, fold: layouts.fold.clone() }
    }

    fn interval(
        &self,
        shuffled: &HeldOut,
        blocked: &HeldOut,
        layouts: &HeldOut,
        surrounded: &HeldOut,
    ) -> Interval {
        let coverage = self.options.coverage;
        let range = |held_out: &HeldOut| {
            let (predicted, measured) = held_out.pairs(&self.rows, |_| true);
            (!predicted.is_empty()).then(|| ratio_range(&predicted, &measured, coverage))
        };
        let interpolated = range(shuffled).unwrap_or(RatioRange { low: 1.0, high: 1.0 });
        // Farther from what was measured, one is never surer than near it.
        let widened = |range: RatioRange, by: RatioRange| RatioRange {
            low: range.low.min(by.low),
            high: range.high.max(by.high),
        };
        let farther = [range(blocked), range(layouts)];
        Interval {
            coverage,
            interpolated,
            extrapolated: farther.into_iter().flatten().fold(interpolated, widened),
            unseen_layout: range(surrounded).map(|range| widened(range, interpolated)),
        }
    }

    /// The predictor of one of the job's operators and how well it does on that operator's own shapes.
    pub(crate) fn of_operator(
        &self,
        set: &OperatorRows,
        trained: &Trained,
    ) -> (OperatorPredictor, OperatorReport) {
        let is_own = |row: &Row| set.rows.binary_search_by(|own| own.values.cmp(&row.values)).is_ok();
        let summary = |held_out: &HeldOut| held_out.summary(&self.rows, is_own);
        let mut predictor = trained.predictor.clone();
        predictor.operator = set.operator;
        predictor.error = HeldOutError {
            // Folds cover all rows, so there is at least one.
            shuffled: summary(&trained.shuffled).unwrap_or_default(),
            blocked: summary(&trained.blocked).unwrap_or_default(),
            layouts: summary(&trained.layouts),
        };
        let roofline = |row: &Row| predictor.overhead_ns + roofline_ns(&row.shape, self.gpu);
        let predicted: Vec<f64> = set.rows.iter().map(roofline).collect();
        let measured: Vec<f64> = set.rows.iter().map(|row| row.time_ns).collect();
        let report = OperatorReport {
            operator: set.operator,
            cache: set.cache,
            num_samples: set.num_samples,
            num_flagged: set.num_flagged,
            num_shapes: set.rows.len(),
            num_trained: self.rows.len(),
            overhead_ns: predictor.overhead_ns,
            error: predictor.error,
            roofline_error: summarise(&predicted, &measured).unwrap_or_default(),
            interval: predictor.interval,
            hyper_parameters: predictor.hyper_parameters,
            tried: trained.tried.clone(),
        };
        (predictor, report)
    }

    /// One operator's held-out shapes with what was said of them.
    pub(crate) fn held_out_of(&self, set: &OperatorRows, trained: &Trained) -> Vec<HeldOutPoint> {
        let is_own = |row: &Row| set.rows.binary_search_by(|own| own.values.cmp(&row.values)).is_ok();
        let all = [
            (HeldOutWay::Shuffled, &trained.shuffled),
            (HeldOutWay::Blocked, &trained.blocked),
            (HeldOutWay::Layouts, &trained.layouts),
        ];
        let mut points = Vec::new();
        for (way, held_out) in all {
            let num_folds = held_out.fold.iter().max().map_or(0, |most| most + 1);
            let coverage = self.options.coverage;
            let ranges: Vec<RatioRange> =
                (0..num_folds).map(|fold| held_out.range_without(&self.rows, fold, coverage)).collect();
            for (i, row) in self.rows.iter().enumerate().filter(|(_, row)| is_own(row)) {
                let Some(predicted_ns) = held_out.predicted[i] else { continue };
                let RatioRange { low, high } = ranges[held_out.fold[i]];
                points.push(HeldOutPoint {
                    operator: set.operator,
                    way,
                    fold: held_out.fold[i] as u32,
                    shape: row.shape,
                    measured_ns: row.time_ns,
                    predicted_ns,
                    low_ns: (predicted_ns * low).max(floor_ns(&row.shape, self.gpu)),
                    high_ns: predicted_ns * high,
                });
            }
        }
        points
    }
}

/// Ways to use neighbours: residuals are interpolated along one number only, so not for attention.
fn residual_ways(operator: Operator) -> &'static [Residuals] {
    match operator {
        Operator::Attention => &[Residuals::Unused],
        _ => &[
            Residuals::Unused,
            Residuals::Beside { forest_share: 1.0 },
            Residuals::Beside { forest_share: 0.5 },
            Residuals::Beside { forest_share: 0.0 },
        ],
    }
}

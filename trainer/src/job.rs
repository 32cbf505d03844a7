//! Training of the operators that share one set of rows, and the errors of what they learned.

use plumbline_bundles::{
    OperatorPredictor,
    predictor::{Domain, ErrorSummary, HeldOutError, Interval, RatioRange},
};
use plumbline_schema::{GpuSpec, Operator, roofline::roofline_ns};
use rayon::prelude::*;

use crate::{
    dataset::{self, OperatorRows, Row},
    error::TrainError,
    evaluate::{Folds, folds, layout_folds, ratio_range, summarise},
    fit::fit,
    train::{OperatorReport, TrainOptions, Trial},
};

/// Most folds of whole layouts: with many, most of a layout's neighbours remain when it is held out.
const LAYOUT_FOLDS: usize = 10;

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

/// Predictions of rows by a model that never saw them, ns; `None` for rows that were not judged.
struct HeldOut {
    predicted: Vec<Option<f64>>,
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
        // Residuals are interpolated along one number only.
        let ways: &[bool] = if operator == Operator::Attention { &[false] } else { &[false, true] };
        let mut tried = Vec::new();
        let mut best: Option<(f64, bool, HeldOut)> = None;
        for &interpolates_residuals in ways {
            let held_out = self.hold_out(interpolates_residuals, &shuffled_folds)?;
            let mean_error = held_out.summary(&self.rows, |_| true).unwrap_or_default().mean;
            tried.push(Trial { pooled: operator.is_gemm(), interpolates_residuals, mean_error });
            if best.as_ref().is_none_or(|(other, ..)| mean_error < *other) {
                best = Some((mean_error, interpolates_residuals, held_out));
            }
        }
        let Some((_, residuals, shuffled)) = best else { return Err(TrainError::NoSamples) };
        let blocked = self.hold_out(residuals, &self.blocked_folds())?;
        let layout_folds = layout_folds(operator, &self.rows, LAYOUT_FOLDS, seed);
        let layouts = if layout_folds.len() > 1 {
            self.hold_out(residuals, &layout_folds)?
        } else {
            HeldOut { predicted: vec![None; self.rows.len()] }
        };
        let rows: Vec<&Row> = self.rows.iter().collect();
        let mut predictor = fit(operator, &rows, residuals, self.gpu, options)?;
        let surrounded = self.surrounded(&layouts, &layout_folds);
        predictor.interval = self.interval(&shuffled, &blocked, &layouts, &surrounded);
        predictor.samples_digest = dataset::digest(&self.sets);
        let layouts = surrounded;
        Ok(Trained { predictor, shuffled, layouts, blocked, tried })
    }

    /// Neighbours by size: a fold is a range of sizes that the others do not cover.
    fn blocked_folds(&self) -> Vec<Vec<usize>> {
        let size = |&i: &usize| roofline_ns(&self.rows[i].shape, self.gpu);
        let mut by_size: Vec<usize> = (0..self.rows.len()).collect();
        by_size.sort_by(|a, b| size(a).total_cmp(&size(b)));
        let folds = folds(by_size.len(), self.options.num_folds, Folds::Blocked);
        folds.iter().map(|fold| fold.iter().map(|&place| by_size[place]).collect()).collect()
    }

    /// Predicts each fold's rows by a model of all others.
    fn hold_out(&self, residuals: bool, folds: &[Vec<usize>]) -> Result<HeldOut, TrainError> {
        let answers: Vec<Vec<f64>> = folds
            .par_iter()
            .map(|fold| {
                let predictor = fit(self.operator(), &self.others(fold), residuals, self.gpu, self.options)?;
                Ok(fold.iter().map(|&i| predictor.predict(&self.rows[i].shape, self.gpu)).collect())
            })
            .collect::<Result<_, TrainError>>()?;
        let mut predicted = vec![None; self.rows.len()];
        for (&i, answer) in folds.iter().flatten().zip(answers.into_iter().flatten()) {
            predicted[i] = Some(answer);
        }
        Ok(HeldOut { predicted })
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
        HeldOut { predicted }
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
}

//! Training the predictors of a GPU and measuring their errors.

use plumbline_bundles::{
    OperatorPredictor, Sample,
    predictor::{ErrorSummary, HeldOutError, HyperParameters, Interval, RatioRange},
};
use plumbline_schema::{
    GpuSpec, Operator,
    roofline::{floor_ns, roofline_ns},
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    dataset::{self, OperatorRows, Row},
    error::TrainError,
    evaluate::{Folds, folds, ratio_range, summarise},
    fit::{Recipe, fit},
};

/// Fewest shapes of an operator: two folds of two.
pub const MIN_SHAPES: usize = 4;

/// How to train.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainOptions {
    /// Seed of the forests and of the shuffled folds.
    pub seed: u64,
    /// Trees of each forest, at least 1.
    pub num_trees: usize,
    /// Most splits between a tree's root and a leaf, 0 to 64.
    pub max_depth: usize,
    /// Fewest samples of a leaf, at least 1.
    pub min_samples_leaf: usize,
    /// Folds that errors are measured on, at least 2; fewer where there are fewer shapes.
    pub num_folds: usize,
    /// Share of held-out shapes inside the interval, 0.0 to 1.0.
    pub coverage: f64,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self { seed: 0, num_trees: 64, max_depth: 12, min_samples_leaf: 2, num_folds: 5, coverage: 0.9 }
    }
}

impl TrainOptions {
    fn check(&self) -> Result<(), TrainError> {
        let least = [("num_trees", self.num_trees, 1), ("min_samples_leaf", self.min_samples_leaf, 1)];
        if let Some(&(name, value, _)) = least.iter().find(|(_, value, least)| value < least) {
            return Err(TrainError::InvalidOption { name, value, expected: "at least 1" });
        }
        if self.num_folds < 2 {
            let (name, value) = ("num_folds", self.num_folds);
            return Err(TrainError::InvalidOption { name, value, expected: "at least 2" });
        }
        if self.max_depth > 64 {
            let (name, value) = ("max_depth", self.max_depth);
            return Err(TrainError::InvalidOption { name, value, expected: "0 to 64" });
        }
        Ok(())
    }
}

/// An operator whose training starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The operator.
    pub operator: Operator,
    /// Operators done before it.
    pub done: usize,
    /// Operators in all.
    pub total: usize,
}

/// What training yields.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainOutcome {
    /// One predictor per operator sampled, in the order of the forward pass.
    pub predictors: Vec<OperatorPredictor>,
    /// How well they do.
    pub report: TrainReport,
}

/// How well the predictors do on shapes that they have not seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainReport {
    /// Name of the GPU sampled.
    pub gpu: String,
    /// Seed of all randomness.
    pub seed: u64,
    /// One entry per predictor, in their order.
    pub operators: Vec<OperatorReport>,
}

/// How well one operator's predictor does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperatorReport {
    /// The operator.
    pub operator: Operator,
    /// Cold samples.
    pub num_samples: usize,
    /// Samples among them with flags; they are used.
    pub num_flagged: usize,
    /// Distinct shapes.
    pub num_shapes: usize,
    /// Fixed cost of a launch, ns.
    pub overhead_ns: f64,
    /// Errors on held-out shapes.
    pub error: HeldOutError,
    /// Errors of the data sheet's roofline plus the overhead, to compare with.
    pub roofline_error: ErrorSummary,
    /// Spread of held-out shapes around their predictions.
    pub interval: Interval,
    /// How the forest was grown.
    pub hyper_parameters: HyperParameters,
    /// All ways tried, with their mean error on the shuffled folds; the lowest was taken.
    pub tried: Vec<Trial>,
}

/// One way of training that was tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Whether samples of all matrix products were used.
    pub pooled: bool,
    /// Whether what the forest leaves is interpolated between neighbours.
    pub interpolates_residuals: bool,
    /// Mean absolute percentage error on the shuffled folds, as a 0..1 ratio.
    pub mean_error: f64,
}

/// Trains a predictor for each operator that has samples.
///
/// The same samples, options and version give the same bytes, on any number of threads.
///
/// # Errors
/// When a sample cannot be true or an operator has too few; see [`TrainError`].
pub fn train(
    samples: &[Sample],
    gpu: &GpuSpec,
    options: &TrainOptions,
    mut progress: impl FnMut(Progress),
) -> Result<TrainOutcome, TrainError> {
    options.check()?;
    let sets = dataset::collect(samples)?;
    sets.iter().try_for_each(|set| check_set(set, gpu))?;
    let mut outcome = TrainOutcome {
        predictors: Vec::new(),
        report: TrainReport { gpu: gpu.name.clone(), seed: options.seed, operators: Vec::new() },
    };
    for (done, set) in sets.iter().enumerate() {
        progress(Progress { operator: set.operator, done, total: sets.len() });
        let job = Job { set, pool: pool_of(set, &sets), gpu, options };
        let (predictor, report) = job.run()?;
        outcome.predictors.push(predictor);
        outcome.report.operators.push(report);
    }
    Ok(outcome)
}

fn check_set(set: &OperatorRows, gpu: &GpuSpec) -> Result<(), TrainError> {
    let operator = set.operator;
    if set.rows.len() < MIN_SHAPES {
        return Err(TrainError::TooFewShapes { operator, expected: MIN_SHAPES, found: set.rows.len() });
    }
    for row in &set.rows {
        let floor = floor_ns(&row.shape, gpu);
        if row.time_ns < floor {
            return Err(TrainError::UnderFloor {
                operator,
                shape: row.describe(operator),
                time_ns: row.time_ns,
                floor_ns: floor,
            });
        }
    }
    Ok(())
}

/// The other operators' sets that may be trained on too.
fn pool_of<'a>(set: &OperatorRows, sets: &'a [OperatorRows]) -> Vec<&'a OperatorRows> {
    let is_partner = |other: &&OperatorRows| {
        set.operator.is_gemm() && other.operator.is_gemm() && other.operator != set.operator
    };
    sets.iter().filter(is_partner).collect()
}

/// Predictions of held-out rows beside their measured times, ns.
#[derive(Default)]
struct HeldOut {
    predicted: Vec<f64>,
    measured: Vec<f64>,
}

impl HeldOut {
    /// Errors; there is at least one pair, as folds cover all of at least [`MIN_SHAPES`] rows.
    fn summary(&self) -> ErrorSummary {
        summarise(&self.predicted, &self.measured).unwrap_or_default()
    }
}

struct Job<'a> {
    set: &'a OperatorRows,
    pool: Vec<&'a OperatorRows>,
    gpu: &'a GpuSpec,
    options: &'a TrainOptions,
}

impl Job<'_> {
    fn run(&self) -> Result<(OperatorPredictor, OperatorReport), TrainError> {
        let shuffled = Folds::Shuffled { seed: self.options.seed };
        let mut tried = Vec::new();
        let mut best: Option<(Recipe, HeldOut)> = None;
        for recipe in self.recipes() {
            let held_out = self.hold_out(recipe, shuffled)?;
            let mean_error = held_out.summary().mean;
            let Recipe { pooled, interpolates_residuals } = recipe;
            tried.push(Trial { pooled, interpolates_residuals, mean_error });
            if best.as_ref().is_none_or(|(_, other)| mean_error < other.summary().mean) {
                best = Some((recipe, held_out));
            }
        }
        let (recipe, shuffled) = best.unwrap_or_default();
        let blocked = self.hold_out(recipe, Folds::Blocked)?;
        let predictor = self.finish(recipe, &shuffled, &blocked)?;
        let report = self.report(&predictor, tried);
        Ok((predictor, report))
    }

    /// The ways of training worth trying for this operator.
    fn recipes(&self) -> Vec<Recipe> {
        let pooled = if self.pool.is_empty() { vec![false] } else { vec![false, true] };
        // Residuals are interpolated along one number only.
        let residuals =
            if self.set.operator == Operator::Attention { vec![false] } else { vec![false, true] };
        let pairs = pooled.iter().flat_map(|&pooled| residuals.iter().map(move |&r| (pooled, r)));
        pairs.map(|(pooled, interpolates_residuals)| Recipe { pooled, interpolates_residuals }).collect()
    }

    fn hold_out(&self, recipe: Recipe, how: Folds) -> Result<HeldOut, TrainError> {
        let mut own: Vec<&Row> = self.set.rows.iter().collect();
        if how == Folds::Blocked {
            // Neighbours by size: a fold is a range of sizes that the others do not cover.
            own.sort_by(|a, b| roofline_ns(&a.shape, self.gpu).total_cmp(&roofline_ns(&b.shape, self.gpu)));
        }
        let folds = folds(own.len(), self.options.num_folds, how);
        let answers: Vec<Vec<f64>> = folds
            .par_iter()
            .map(|fold| {
                let is_held_out: std::collections::HashSet<usize> = fold.iter().copied().collect();
                let training: Vec<&Row> =
                    (0..own.len()).filter(|i| !is_held_out.contains(i)).map(|i| own[i]).collect();
                let held_out: Vec<&Row> = fold.iter().map(|&i| own[i]).collect();
                let others = self.others(recipe, &held_out);
                let predictor = fit(self.set.operator, &training, &others, recipe, self.gpu, self.options)?;
                Ok(held_out.iter().map(|row| predictor.predict(&row.shape, self.gpu)).collect())
            })
            .collect::<Result<_, TrainError>>()?;
        let mut held_out = HeldOut::default();
        for (fold, answers) in folds.iter().zip(answers) {
            held_out.predicted.extend(answers);
            held_out.measured.extend(fold.iter().map(|&i| own[i].time_ns));
        }
        Ok(held_out)
    }

    /// The other operators' rows, without the shapes that are held out.
    fn others(&self, recipe: Recipe, held_out: &[&Row]) -> Vec<&Row> {
        if !recipe.pooled {
            return Vec::new();
        }
        let rows = self.pool.iter().flat_map(|set| &set.rows);
        rows.filter(|row| held_out.iter().all(|held_out| held_out.values != row.values)).collect()
    }

    /// Trains on everything and writes down what was found by holding out.
    fn finish(
        &self,
        recipe: Recipe,
        shuffled: &HeldOut,
        blocked: &HeldOut,
    ) -> Result<OperatorPredictor, TrainError> {
        let own: Vec<&Row> = self.set.rows.iter().collect();
        let others = self.others(recipe, &[]);
        let mut predictor = fit(self.set.operator, &own, &others, recipe, self.gpu, self.options)?;
        predictor.error = HeldOutError { shuffled: shuffled.summary(), blocked: blocked.summary() };
        let coverage = self.options.coverage;
        let interpolated = ratio_range(&shuffled.predicted, &shuffled.measured, coverage);
        let across_gaps = ratio_range(&blocked.predicted, &blocked.measured, coverage);
        // Beyond what was measured, one is never surer than within it.
        let extrapolated = RatioRange {
            low: interpolated.low.min(across_gaps.low),
            high: interpolated.high.max(across_gaps.high),
        };
        predictor.interval = Interval { coverage, interpolated, extrapolated };
        let mut sets = vec![self.set];
        if recipe.pooled {
            sets.extend(&self.pool);
        }
        predictor.samples_digest = dataset::digest(&sets);
        Ok(predictor)
    }

    fn report(&self, predictor: &OperatorPredictor, tried: Vec<Trial>) -> OperatorReport {
        let rows = &self.set.rows;
        let roofline = |row: &Row| predictor.overhead_ns + roofline_ns(&row.shape, self.gpu);
        let predicted: Vec<f64> = rows.iter().map(roofline).collect();
        let measured: Vec<f64> = rows.iter().map(|row| row.time_ns).collect();
        OperatorReport {
            operator: self.set.operator,
            num_samples: self.set.num_samples,
            num_flagged: self.set.num_flagged,
            num_shapes: rows.len(),
            overhead_ns: predictor.overhead_ns,
            error: predictor.error,
            roofline_error: summarise(&predicted, &measured).unwrap_or_default(),
            interval: predictor.interval,
            hyper_parameters: predictor.hyper_parameters,
            tried,
        }
    }
}

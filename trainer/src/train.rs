//! Training the predictors of a GPU and measuring their errors.

use plumbline_bundles::{
    CacheState, OperatorPredictor, Sample,
    predictor::{ErrorSummary, HeldOutError, HyperParameters, Interval},
};
use plumbline_schema::{GpuSpec, Operator, OperatorShape};
use serde::{Deserialize, Serialize};

use crate::{
    dataset::{self, OperatorRows},
    error::TrainError,
    job::{Job, Trained},
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
    /// Share of the features that each split tries, above 0.0 and at most 1.0.
    pub features_share: f64,
    /// Folds that errors are measured on, at least 2; fewer where there are fewer shapes.
    pub num_folds: usize,
    /// Share of held-out shapes inside the interval, 0.0 to 1.0.
    pub coverage: f64,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            num_trees: 32,
            max_depth: 12,
            min_samples_leaf: 2,
            // Rows are few: half of the features keep trees different without starving them.
            features_share: 0.5,
            num_folds: 5,
            coverage: 0.9,
        }
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
        if !(self.features_share > 0.0 && self.features_share <= 1.0) {
            return Err(TrainError::InvalidShare { name: "features_share", value: self.features_share });
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
    /// Every held-out shape that the errors are of, by operator, way and shape.
    pub held_out: Vec<HeldOutPoint>,
}

/// How a shape was held out; see [`HeldOutError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldOutWay {
    /// With others at random.
    Shuffled,
    /// With its neighbours.
    Blocked,
    /// With all shapes of its layout, where others surround it.
    Layouts,
}

/// What a model that never saw a measured shape said of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeldOutPoint {
    /// The operator.
    pub operator: Operator,
    /// How it was held out.
    pub way: HeldOutWay,
    /// Number of the fold it was held out with.
    pub fold: u32,
    /// The shape.
    pub shape: OperatorShape,
    /// Measured median, ns.
    pub measured_ns: f64,
    /// Predicted time, ns.
    pub predicted_ns: f64,
    /// Lower end of the interval, ns, from the errors of the other folds.
    pub low_ns: f64,
    /// Upper end of the interval, ns, from the errors of the other folds.
    pub high_ns: f64,
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
    /// State of the cache in the samples used.
    pub cache: CacheState,
    /// Samples in that state.
    pub num_samples: usize,
    /// Samples among them with flags; they are used.
    pub num_flagged: usize,
    /// Distinct shapes, which the errors are of.
    pub num_shapes: usize,
    /// Distinct shapes trained on: for matrix products those of all five operators.
    pub num_trained: usize,
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
    /// All ways tried, with their mean errors over all shapes trained on; the one of the lowest sum of
    /// the shuffled and a quarter of the blocked error was taken.
    pub tried: Vec<Trial>,
}

/// One way of training that was tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Whether samples of all matrix products were used.
    pub pooled: bool,
    /// Whether the baseline steps from wave to wave.
    pub has_steps: bool,
    /// Whether what the forest leaves is interpolated between neighbours.
    pub interpolates_residuals: bool,
    /// Share of the forest's answer beside measured neighbours, 0..=1.
    pub forest_share: f64,
    /// Mean absolute percentage error on the shuffled folds, as a 0..1 ratio.
    pub shuffled_error: f64,
    /// The same on the blocked folds.
    pub blocked_error: f64,
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
        held_out: Vec::new(),
    };
    let gemms: Vec<&OperatorRows> = sets.iter().filter(|set| set.operator.is_gemm()).collect();
    // Matrix products are one library call, so one training serves all five operators.
    let mut of_gemms: Option<(Job, Trained)> = None;
    for (done, set) in sets.iter().enumerate() {
        progress(Progress { operator: set.operator, done, total: sets.len() });
        let is_gemm = set.operator.is_gemm();
        if is_gemm && of_gemms.is_none() {
            of_gemms = Some(run(gemms.clone(), gpu, options)?);
        }
        let of_one;
        let (job, trained) = match &of_gemms {
            Some(of_gemms) if is_gemm => of_gemms,
            _ => {
                of_one = run(vec![set], gpu, options)?;
                &of_one
            }
        };
        let (predictor, report) = job.of_operator(set, trained);
        outcome.held_out.extend(job.held_out_of(set, trained));
        outcome.predictors.push(predictor);
        outcome.report.operators.push(report);
    }
    Ok(outcome)
}

fn run<'a>(
    sets: Vec<&'a OperatorRows>,
    gpu: &'a GpuSpec,
    options: &'a TrainOptions,
) -> Result<(Job<'a>, Trained), TrainError> {
    let job = Job::new(sets, gpu, options)?;
    let trained = job.run()?;
    Ok((job, trained))
}

fn check_set(set: &OperatorRows, gpu: &GpuSpec) -> Result<(), TrainError> {
    let operator = set.operator;
    if set.rows.len() < MIN_SHAPES {
        return Err(TrainError::TooFewShapes { operator, expected: MIN_SHAPES, found: set.rows.len() });
    }
    dataset::check_floor(set, gpu)
}

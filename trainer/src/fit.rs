//! Fitting one operator's predictor to rows, without judging it.

use std::collections::BTreeMap;

use linfa::{Dataset, traits::Fit};
use ndarray::{Array1, Array2};
use plumbline_bundles::{
    Forest, OperatorPredictor,
    features::{feature_names, features, part_names},
    predictor::{BaselinePart, Domain, HeldOutError, HyperParameters, Interval, RatioRange},
};
use plumbline_schema::{GpuSpec, Operator};

use crate::{
    baseline,
    dataset::Row,
    error::TrainError,
    forest::{RandomForestRegressor, RandomForestRegressorParams},
    train::TrainOptions,
};

/// How neighbours of a layout count beside the forest; see [`HyperParameters`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Residuals {
    /// The forest alone.
    Unused,
    /// What this share of the forest's answer leaves is interpolated between neighbours.
    Beside { forest_share: f64 },
}

/// A predictor with its forest, and what it was grown on, so that residuals can be set without growing it again.
pub(crate) struct Fitted {
    predictor: OperatorPredictor,
    /// By shape: `ln(time / baseline)`, and what the forest answers.
    targets: BTreeMap<Vec<u64>, (f64, f64)>,
}

/// Fits baseline and forest to rows.
///
/// The error, interval and digest are the caller's to fill in.
pub(crate) fn fit(
    operator: Operator,
    rows: &[&Row],
    has_steps: bool,
    gpu: &GpuSpec,
    options: &TrainOptions,
) -> Result<Fitted, TrainError> {
    let mut predictor = unfitted(operator, rows, has_steps, gpu, options);
    let data = to_dataset(&predictor, rows, gpu);
    let hyper = predictor.hyper_parameters;
    let params = RandomForestRegressorParams::new()
        .num_trees(options.num_trees)
        .max_depth(options.max_depth)
        .min_samples_leaf(options.min_samples_leaf)
        .max_features(hyper.max_features as usize)
        .out_of_bag(false)
        .seed(options.seed);
    let model: RandomForestRegressor =
        params.fit(&data).map_err(|source| TrainError::Forest { operator, source })?;
    predictor.forest = model.into();
    round_leaves(&mut predictor.forest);
    let answers =
        rows.iter().zip(data.records().rows()).zip(data.targets()).map(|((row, record), &target)| {
            let record: Vec<f32> = record.iter().map(|&value| value as f32).collect();
            (row.values.clone(), (target, predictor.forest.predict(&record)))
        });
    // Attention has no residuals, and by far the most rows.
    let targets = if operator == Operator::Attention { BTreeMap::new() } else { answers.collect() };
    Ok(Fitted { predictor, targets })
}

impl Fitted {
    /// The predictor with residuals: what the forest's share leaves of each row, in the order of the domain's shapes.
    pub(crate) fn with_residuals(&self, residuals: Residuals) -> OperatorPredictor {
        let mut predictor = self.predictor.clone();
        if let Residuals::Beside { forest_share } = residuals {
            predictor.hyper_parameters.interpolates_residuals = true;
            predictor.hyper_parameters.forest_share = forest_share;
            let domain = &mut predictor.domain;
            let left =
                |shape| self.targets.get(shape).map(|(target, of_forest)| target - forest_share * of_forest);
            let shapes = domain.shapes.chunks_exact(domain.columns.len());
            domain.residual = shapes.filter_map(left).map(|left| left as f32).collect();
        }
        predictor
    }
}

/// Rounds leaves to a thousandth of a percent of the time: what is beyond is noise that only makes files longer.
fn round_leaves(forest: &mut Forest) {
    for node in forest.trees.iter_mut().flat_map(|tree| &mut tree.nodes) {
        if node.left == 0 {
            node.threshold = ((f64::from(node.threshold) * 1e5).round() / 1e5) as f32;
        }
    }
}

/// The predictor with its baseline and domain, but no forest.
fn unfitted(
    operator: Operator,
    rows: &[&Row],
    has_steps: bool,
    gpu: &GpuSpec,
    options: &TrainOptions,
) -> OperatorPredictor {
    let baseline = baseline::fit(operator, rows, has_steps, gpu);
    let parts = part_names(operator).iter().zip(&baseline.coefficients);
    let names = feature_names(operator);
    let unknown = RatioRange { low: 1.0, high: 1.0 };
    let measured = rows.iter().map(|row| (row.values.clone(), row.time_ns, row.low_ns, row.high_ns));
    OperatorPredictor {
        operator,
        features: names.iter().map(|&name| name.to_owned()).collect(),
        overhead_ns: baseline.overhead_ns,
        parts: parts
            .map(|(&name, &coefficient)| BaselinePart { name: name.to_owned(), coefficient })
            .collect(),
        forest: Forest::default(),
        domain: Domain::from_rows(operator, measured.collect()),
        error: HeldOutError::default(),
        interval: Interval {
            coverage: options.coverage,
            interpolated: unknown,
            extrapolated: unknown,
            unseen_layout: None,
        },
        samples_digest: String::new(),
        seed: options.seed,
        hyper_parameters: HyperParameters {
            num_trees: options.num_trees as u32,
            max_depth: options.max_depth as u32,
            min_samples_leaf: options.min_samples_leaf as u32,
            max_features: (options.features_share * names.len() as f64).ceil().max(1.0) as u32,
            pooled: operator.is_gemm(),
            interpolates_residuals: false,
            forest_share: 1.0,
            has_steps,
        },
        transferred_from: None,
    }
}

/// Features and `ln(time / baseline)` of rows.
fn to_dataset(
    predictor: &OperatorPredictor,
    rows: &[&Row],
    gpu: &GpuSpec,
) -> Dataset<f64, f64, ndarray::Ix1> {
    let width = predictor.features.len();
    let mut records = Array2::zeros((rows.len(), width));
    for (row, mut record) in rows.iter().zip(records.rows_mut()) {
        let values = features(&row.shape, gpu, predictor.overhead_ns);
        record.iter_mut().zip(values.as_slice()).for_each(|(cell, &value)| *cell = f64::from(value));
    }
    let target = |row: &&Row| (row.time_ns / predictor.baseline_ns(&row.shape, gpu)).ln();
    Dataset::new(records, rows.iter().map(target).collect::<Array1<f64>>())
}

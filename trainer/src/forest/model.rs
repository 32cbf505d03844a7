//! A fitted forest.

use std::sync::{Mutex, PoisonError};

use linfa::{
    Float,
    dataset::{AsSingleTargets, DatasetBase},
    traits::{Fit, PredictInplace},
};
use ndarray::{Array1, ArrayBase, Data, Ix2};
use plumbline_bundles::Forest;
use rayon::prelude::*;
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};

use super::{
    error::ForestError,
    grow::{Grower, Grown},
    lists::Entry,
    out_of_bag::OutOfBag,
    params::{RandomForestRegressorParams, RandomForestRegressorValidParams},
    split::{Content, Counted, Weighted},
    table::Table,
};

/// A fitted random-forest regressor.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize), serde(deny_unknown_fields))]
pub struct RandomForestRegressor {
    #[cfg_attr(feature = "serde", serde(deserialize_with = "checked_forest"))]
    forest: Forest,
    feature_importances: Vec<f64>,
    out_of_bag: Vec<Option<f64>>,
    targets: Vec<f64>,
}

#[cfg(feature = "serde")]
fn checked_forest<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Forest, D::Error> {
    let forest = Forest::deserialize(deserializer)?;
    forest.check().map_err(serde::de::Error::custom)?;
    Ok(forest)
}

impl RandomForestRegressor {
    /// Parameters to fit one with, [`RandomForestRegressorParams::new`].
    #[must_use]
    pub fn params() -> RandomForestRegressorParams {
        RandomForestRegressorParams::new()
    }

    /// The forest as bundles hold it.
    #[must_use]
    pub fn forest(&self) -> &Forest {
        &self.forest
    }

    /// How much of the squared error's decrease is the work of each feature: numbers of at least 0 that add up
    /// to 1.
    ///
    /// It is the mean over the trees, as scikit-learn has it; all 0 when no tree has a split. Features of many
    /// values are favoured, and features that tell the same share what they are worth.
    #[must_use]
    pub fn feature_importances(&self) -> &[f64] {
        &self.feature_importances
    }

    /// What the trees that did not draw a training row say about it, by row.
    ///
    /// `None` for a row that every tree drew or that has weight 0; `None` throughout when grown without
    /// bootstrap or without [`RandomForestRegressorParams::out_of_bag`].
    #[must_use]
    pub fn out_of_bag_predictions(&self) -> &[Option<f64>] {
        &self.out_of_bag
    }

    /// Mean absolute error of [`Self::out_of_bag_predictions`], each row counting the same; `None` when there are
    /// none.
    #[must_use]
    pub fn out_of_bag_error(&self) -> Option<f64> {
        let errors = self.out_of_bag_pairs().map(|(predicted, target)| (predicted - target).abs());
        let (sum, count) = errors.fold((0.0, 0u32), |(sum, count), error| (sum + error, count + 1));
        (count > 0).then(|| sum / f64::from(count))
    }

    /// Coefficient of determination of [`Self::out_of_bag_predictions`]: 1 less the ratio of the squared error to
    /// that of the mean target, each row counting the same.
    ///
    /// `None` when there are none or their targets are all alike.
    #[must_use]
    pub fn out_of_bag_r2(&self) -> Option<f64> {
        let (sum, count) =
            self.out_of_bag_pairs().fold((0.0, 0u32), |(sum, count), (_, target)| (sum + target, count + 1));
        let mean = sum / f64::from(count);
        let squares =
            self.out_of_bag_pairs().fold((0.0, 0.0), |(of_error, of_target), (predicted, target)| {
                (of_error + (predicted - target).powi(2), of_target + (target - mean).powi(2))
            });
        (squares.1 > 0.0).then(|| 1.0 - squares.0 / squares.1)
    }

    fn out_of_bag_pairs(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        let pairs = self.out_of_bag.iter().zip(&self.targets);
        pairs.filter_map(|(predicted, &target)| predicted.map(|predicted| (predicted, target)))
    }
}

impl From<RandomForestRegressor> for Forest {
    fn from(model: RandomForestRegressor) -> Self {
        model.forest
    }
}

impl<F: Float, D: Data<Elem = F>, T: AsSingleTargets<Elem = F>> Fit<ArrayBase<D, Ix2>, T, ForestError>
    for RandomForestRegressorValidParams
{
    type Object = RandomForestRegressor;

    /// Grows the forest, on all threads of rayon's present pool.
    ///
    /// # Errors
    /// When rows, targets and weights differ in number, there are none, or one of them is not a finite number in
    /// the range of f32.
    fn fit(&self, dataset: &DatasetBase<ArrayBase<D, Ix2>, T>) -> Result<Self::Object, ForestError> {
        let targets = dataset.as_single_targets();
        let weights = dataset.weights();
        let table = Table::new(dataset.records(), targets, weights, |rows| self.num_draws(rows))?;
        let (grown, out_of_bag) = match (self.needs_counts(&table), table.num_cells <= 1 << 16) {
            (false, true) => grow_all::<Weighted, u32>(self, &table),
            (false, false) => grow_all::<Weighted, u64>(self, &table),
            (true, true) => grow_all::<Counted, u32>(self, &table),
            (true, false) => grow_all::<Counted, u64>(self, &table),
        };
        let mut feature_importances = vec![0.0; table.features.len()];
        for tree in &grown {
            feature_importances.iter_mut().zip(&tree.importances).for_each(|(sum, part)| *sum += part);
        }
        let sum: f64 = feature_importances.iter().sum();
        if sum > 0.0 {
            for importance in &mut feature_importances {
                *importance /= sum;
            }
        }
        let targets: Vec<f64> = targets.iter().map(|target| target.to_f64().unwrap_or(f64::NAN)).collect();
        let forest = Forest {
            num_features: table.features.len(),
            trees: grown.into_iter().map(|grown| grown.tree).collect(),
        };
        let out_of_bag = out_of_bag.means(&table, targets.len());
        Ok(RandomForestRegressor { forest, feature_importances, out_of_bag, targets })
    }
}

/// Grows all trees; threads take turns with a few growers, each with its buffers and its share of the answers.
fn grow_all<C: Content, E: Entry>(
    params: &RandomForestRegressorValidParams,
    table: &Table,
) -> (Vec<Grown>, OutOfBag) {
    let idle = Mutex::new(Vec::new());
    let take = || idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let grow = |tree: usize| {
        let (mut grower, mut out_of_bag) =
            take().unwrap_or_else(|| (Grower::<C, E>::new(table, params), OutOfBag::new(table.rows.len())));
        let grown = grower.grow(tree);
        if params.out_of_bag() {
            out_of_bag.add_tree(table, &grown.tree, grower.drawn());
        }
        idle.lock().unwrap_or_else(PoisonError::into_inner).push((grower, out_of_bag));
        grown
    };
    let grown = (0..params.num_trees()).into_par_iter().map(grow).collect();
    let mut sum = OutOfBag::new(table.rows.len());
    while let Some((_, part)) = take() {
        sum.add(&part);
    }
    (grown, sum)
}

/// Fewest rows that a thread is woken for.
const ROWS_AT_ONCE: usize = 64;

impl<F: Float, D: Data<Elem = F>> PredictInplace<ArrayBase<D, Ix2>, Array1<F>> for RandomForestRegressor {
    /// Predicts every row; many of them on all threads of rayon's present pool.
    ///
    /// # Panics
    /// When `x` and `y` differ in length or `x` has another number of features than was trained on.
    fn predict_inplace<'a>(&'a self, x: &'a ArrayBase<D, Ix2>, y: &mut Array1<F>) {
        assert_eq!(x.nrows(), y.len(), "rows of features and places for predictions");
        assert_eq!(x.ncols(), self.forest.num_features, "features given and trained on");
        let records: Vec<f32> = x.iter().map(|value| value.to_f32().unwrap_or(f32::NAN)).collect();
        let answers: Vec<f64> = if x.nrows() < ROWS_AT_ONCE {
            records.chunks_exact(x.ncols()).map(|row| self.forest.predict(row)).collect()
        } else {
            let rows = records.par_chunks_exact(x.ncols()).with_min_len(ROWS_AT_ONCE);
            rows.map(|row| self.forest.predict(row)).collect()
        };
        y.iter_mut().zip(answers).for_each(|(y, answer)| *y = F::cast(answer));
    }

    fn default_target(&self, x: &ArrayBase<D, Ix2>) -> Array1<F> {
        Array1::zeros(x.nrows())
    }
}

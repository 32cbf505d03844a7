//! A fitted forest.

use linfa::{
    dataset::{AsSingleTargets, DatasetBase},
    prelude::SingleTargetRegression,
    traits::{Fit, PredictInplace},
};
use ndarray::{Array1, ArrayBase, Data, Ix2};
use plumbline_bundles::Forest;
use rayon::prelude::*;

use super::{
    grow::{Columns, Grown, grow},
    params::{ForestError, RandomForestRegressorValidParams},
};

/// A fitted random-forest regressor.
#[derive(Clone, Debug, PartialEq)]
pub struct RandomForestRegressor {
    forest: Forest,
    out_of_bag: Vec<Option<f64>>,
    targets: Vec<f64>,
}

impl RandomForestRegressor {
    /// The forest as bundles hold it.
    #[must_use]
    pub fn forest(&self) -> &Forest {
        &self.forest
    }

    /// What the trees that did not draw a training row say about it, by row.
    ///
    /// `None` for a row that every tree drew; `None` throughout when grown without bootstrap.
    #[must_use]
    pub fn out_of_bag_predictions(&self) -> &[Option<f64>] {
        &self.out_of_bag
    }

    /// Mean absolute error of [`Self::out_of_bag_predictions`]; `None` when there are none.
    #[must_use]
    pub fn out_of_bag_error(&self) -> Option<f64> {
        let pairs = self.out_of_bag.iter().zip(&self.targets);
        let (predicted, targets): (Vec<f64>, Vec<f64>) =
            pairs.filter_map(|(predicted, &target)| predicted.map(|p| (p, target))).unzip();
        if predicted.is_empty() {
            return None;
        }
        Array1::from(predicted).mean_absolute_error(&Array1::from(targets)).ok()
    }
}

impl From<RandomForestRegressor> for Forest {
    fn from(model: RandomForestRegressor) -> Self {
        model.forest
    }
}

impl<D: Data<Elem = f64>, T: AsSingleTargets<Elem = f64>> Fit<ArrayBase<D, Ix2>, T, ForestError>
    for RandomForestRegressorValidParams
{
    type Object = RandomForestRegressor;

    fn fit(&self, dataset: &DatasetBase<ArrayBase<D, Ix2>, T>) -> Result<Self::Object, ForestError> {
        let targets = dataset.as_single_targets().to_vec();
        let columns = checked_columns(dataset.records(), targets)?;
        let grown: Vec<Grown> =
            (0..self.num_trees).into_par_iter().map(|tree| grow(&columns, self, tree)).collect();
        let out_of_bag = out_of_bag(&columns, &grown);
        let targets = dataset.as_single_targets().to_vec();
        let trees = grown.into_iter().map(|grown| grown.tree).collect();
        let forest = Forest { num_features: columns.num_features(), trees };
        Ok(RandomForestRegressor { forest, out_of_bag, targets })
    }
}

fn checked_columns<D: Data<Elem = f64>>(
    records: &ArrayBase<D, Ix2>,
    targets: Vec<f64>,
) -> Result<Columns, ForestError> {
    let rows = records.nrows();
    if rows != targets.len() {
        return Err(ForestError::MismatchedTargets { rows, targets: targets.len() });
    }
    if rows == 0 || records.ncols() == 0 {
        return Err(ForestError::Empty);
    }
    // Rows are counted in u32 and features in u16.
    for (name, value, most) in
        [("rows", rows, u32::MAX as usize), ("features", records.ncols(), usize::from(u16::MAX))]
    {
        if value > most {
            let expected = "at most 2^32 - 1 rows and 2^16 - 1 features";
            return Err(ForestError::InvalidParameter { name, value, expected });
        }
    }
    for (row, (features, target)) in records.rows().into_iter().zip(&targets).enumerate() {
        let is_finite = |x: &f64| (*x as f32).is_finite();
        if !features.iter().all(is_finite) || !is_finite(target) {
            return Err(ForestError::NotFinite { row });
        }
    }
    // Adding 0 turns -0 into 0: a tree compares them as equal, the sort would not.
    let column = |column: ndarray::ArrayView1<f64>| column.iter().map(|&x| x as f32 + 0.0).collect();
    Ok(Columns::new(records.columns().into_iter().map(column).collect(), targets))
}

fn out_of_bag(columns: &Columns, grown: &[Grown]) -> Vec<Option<f64>> {
    let of_row = |row: usize| {
        let features = columns.row(row);
        let others = grown.iter().filter(|grown| grown.draws[row] == 0);
        let (sum, count) = others.fold((0.0, 0u32), |(sum, count), grown| {
            (sum + f64::from(grown.tree.predict(&features)), count + 1)
        });
        (count > 0).then(|| sum / f64::from(count))
    };
    (0..columns.num_rows()).map(of_row).collect()
}

impl<D: Data<Elem = f64>> PredictInplace<ArrayBase<D, Ix2>, Array1<f64>> for RandomForestRegressor {
    /// Predicts every row.
    ///
    /// # Panics
    /// When `x` and `y` differ in length or `x` has another number of features than was trained on.
    fn predict_inplace<'a>(&'a self, x: &'a ArrayBase<D, Ix2>, y: &mut Array1<f64>) {
        assert_eq!(x.nrows(), y.len(), "rows of features and places for predictions");
        assert_eq!(x.ncols(), self.forest.num_features, "features given and trained on");
        let mut features = vec![0.0; x.ncols()];
        for (row, predicted) in x.rows().into_iter().zip(y.iter_mut()) {
            features.iter_mut().zip(row).for_each(|(feature, &value)| *feature = value as f32);
            *predicted = self.forest.predict(&features);
        }
    }

    fn default_target(&self, x: &ArrayBase<D, Ix2>) -> Array1<f64> {
        Array1::zeros(x.nrows())
    }
}

//! What a forest is grown with, unchecked and checked.

use linfa::ParamGuard;

/// Why a forest cannot be grown.
#[derive(Debug, thiserror::Error)]
pub enum ForestError {
    /// A parameter outside its range.
    #[error("forest parameter {name} = {value}, expected {expected}")]
    InvalidParameter {
        /// Name of the parameter.
        name: &'static str,
        /// Its value.
        value: usize,
        /// Its range.
        expected: &'static str,
    },
    /// Nothing to learn from.
    #[error("a data set without rows or features")]
    Empty,
    /// More targets than rows, or the other way round.
    #[error("{rows} rows with {targets} targets")]
    MismatchedTargets {
        /// Rows of features.
        rows: usize,
        /// Targets.
        targets: usize,
    },
    /// A number that cannot be compared or stored as f32.
    #[error("row {row}: expected finite numbers in the range of f32")]
    NotFinite {
        /// Index of the row.
        row: usize,
    },
    /// An error of linfa's own.
    #[error(transparent)]
    Linfa(#[from] linfa::Error),
}

/// Checked parameters of a random-forest regressor; see [`RandomForestRegressorParams`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RandomForestRegressorValidParams {
    pub(super) num_trees: usize,
    pub(super) max_depth: usize,
    pub(super) min_samples_leaf: usize,
    pub(super) max_features: Option<usize>,
    pub(super) bootstrap: bool,
    pub(super) seed: u64,
}

/// Parameters of a random-forest regressor, not yet checked.
///
/// The fitted forest is the same, byte for byte, for the same parameters and data on any number of threads.
///
/// ```
/// use linfa::{Dataset, traits::{Fit, Predict}};
/// use ndarray::{Array1, Array2};
/// use plumbline_trainer::forest::RandomForestRegressorParams;
///
/// let x = Array2::from_shape_fn((40, 1), |(row, _)| row as f64);
/// let y = Array1::from_shape_fn(40, |row| if row < 20 { 1.0 } else { 3.0 });
/// let params = RandomForestRegressorParams::new().num_trees(20).seed(7);
/// let model = params.fit(&Dataset::new(x.clone(), y))?;
/// let predicted: Array1<f64> = model.predict(&x);
/// assert!((predicted[5] - 1.0).abs() < 1e-6 && (predicted[35] - 3.0).abs() < 1e-6);
/// # Ok::<(), plumbline_trainer::forest::ForestError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RandomForestRegressorParams(RandomForestRegressorValidParams);

impl RandomForestRegressorParams {
    /// 100 trees of any depth, leaves of at least one sample, a third of the features tried at each split, bootstrap.
    #[must_use]
    pub fn new() -> Self {
        Self(RandomForestRegressorValidParams {
            num_trees: 100,
            max_depth: 64,
            min_samples_leaf: 1,
            max_features: None,
            bootstrap: true,
            seed: 0,
        })
    }

    /// Number of trees, at least 1.
    #[must_use]
    pub fn num_trees(mut self, num_trees: usize) -> Self {
        self.0.num_trees = num_trees;
        self
    }

    /// Most splits between the root and a leaf, 0 to 64; at 0 every tree is one leaf.
    #[must_use]
    pub fn max_depth(mut self, max_depth: usize) -> Self {
        self.0.max_depth = max_depth;
        self
    }

    /// Fewest samples in a leaf, at least 1; repeated draws of the bootstrap count.
    #[must_use]
    pub fn min_samples_leaf(mut self, min_samples_leaf: usize) -> Self {
        self.0.min_samples_leaf = min_samples_leaf;
        self
    }

    /// Features tried at each split, at least 1; all of them when more than there are.
    ///
    /// Features without two values at a node do not count. Unset: a third, rounded up.
    #[must_use]
    pub fn max_features(mut self, max_features: usize) -> Self {
        self.0.max_features = Some(max_features);
        self
    }

    /// Whether each tree draws its own rows, with replacement; otherwise all trees see all rows.
    #[must_use]
    pub fn bootstrap(mut self, bootstrap: bool) -> Self {
        self.0.bootstrap = bootstrap;
        self
    }

    /// Seed of all randomness; each tree draws from its own stream of it.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.0.seed = seed;
        self
    }
}

impl Default for RandomForestRegressorParams {
    fn default() -> Self {
        Self::new()
    }
}

impl ParamGuard for RandomForestRegressorParams {
    type Checked = RandomForestRegressorValidParams;
    type Error = ForestError;

    fn check_ref(&self) -> Result<&Self::Checked, ForestError> {
        let params = &self.0;
        let at_least_one = [
            ("num_trees", params.num_trees),
            ("min_samples_leaf", params.min_samples_leaf),
            ("max_features", params.max_features.unwrap_or(1)),
        ];
        if let Some(&(name, value)) = at_least_one.iter().find(|(_, value)| *value == 0) {
            return Err(ForestError::InvalidParameter { name, value, expected: "at least 1" });
        }
        if params.max_depth > 64 {
            let (name, value) = ("max_depth", params.max_depth);
            return Err(ForestError::InvalidParameter { name, value, expected: "0 to 64" });
        }
        Ok(params)
    }

    fn check(self) -> Result<Self::Checked, ForestError> {
        self.check_ref()?;
        Ok(self.0)
    }
}

//! What a forest is grown with, unchecked and checked.

use linfa::ParamGuard;
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};

use super::{error::ForestError, grow::Limits, table::Table};

/// How many features are tried at each split; a number turns into [`Self::Count`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize), serde(rename_all = "snake_case"))]
pub enum MaxFeatures {
    /// All of them: trees differ by their rows alone.
    All,
    /// The square root of their number, rounded up.
    Sqrt,
    /// A third of them, rounded up, Breiman's advice for regression.
    Third,
    /// So many, at least 1; all of them when more than there are.
    Count(usize),
    /// So much of all of them, more than 0 and at most 1, rounded up.
    Fraction(f64),
}

impl MaxFeatures {
    /// The number of features tried of so many.
    #[must_use]
    pub fn of(self, num_features: usize) -> usize {
        let number = match self {
            Self::All => num_features,
            Self::Sqrt => (num_features as f64).sqrt().ceil() as usize,
            Self::Third => num_features.div_ceil(3),
            Self::Count(count) => count,
            Self::Fraction(fraction) => (fraction * num_features as f64).ceil() as usize,
        };
        number.min(num_features)
    }
}

impl From<usize> for MaxFeatures {
    fn from(count: usize) -> Self {
        Self::Count(count)
    }
}

/// The parameters themselves.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize), serde(deny_unknown_fields))]
struct Fields {
    num_trees: usize,
    max_depth: usize,
    min_samples_split: usize,
    min_samples_leaf: usize,
    max_features: MaxFeatures,
    bootstrap: bool,
    bootstrap_fraction: f64,
    out_of_bag: bool,
    seed: u64,
}

/// Checked parameters of a random-forest regressor; see [`RandomForestRegressorParams`].
///
/// Read from a file they are checked again.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize), serde(try_from = "Fields", into = "Fields"))]
pub struct RandomForestRegressorValidParams(Fields);

impl RandomForestRegressorValidParams {
    /// Number of trees.
    #[must_use]
    pub fn num_trees(&self) -> usize {
        self.0.num_trees
    }

    /// Most splits between the root and a leaf.
    #[must_use]
    pub fn max_depth(&self) -> usize {
        self.0.max_depth
    }

    /// Fewest samples of a node that is split.
    #[must_use]
    pub fn min_samples_split(&self) -> usize {
        self.0.min_samples_split
    }

    /// Fewest samples in a leaf.
    #[must_use]
    pub fn min_samples_leaf(&self) -> usize {
        self.0.min_samples_leaf
    }

    /// Features tried at each split.
    #[must_use]
    pub fn max_features(&self) -> MaxFeatures {
        self.0.max_features
    }

    /// Whether each tree draws its own rows.
    #[must_use]
    pub fn bootstrap(&self) -> bool {
        self.0.bootstrap
    }

    /// Rows that a tree draws, as a share of those there are.
    #[must_use]
    pub fn bootstrap_fraction(&self) -> f64 {
        self.0.bootstrap_fraction
    }

    /// Whether each row is answered by the trees that did not draw it.
    #[must_use]
    pub fn out_of_bag(&self) -> bool {
        self.0.out_of_bag
    }

    /// Seed of all randomness.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.0.seed
    }

    /// Whether samples must be counted for a table whose weights say nothing about that.
    pub(super) fn needs_counts(&self, table: &Table) -> bool {
        // A node that can be split has two samples, and a leaf has one.
        table.is_weighted && (self.0.min_samples_leaf > 1 || self.0.min_samples_split > 2)
    }

    pub(super) fn limits(&self, table: &Table) -> Limits {
        let counts = !table.is_weighted || self.needs_counts(table);
        Limits {
            max_depth: self.0.max_depth as u32,
            min_split: if counts { self.0.min_samples_split as f64 } else { 0.0 },
            min_leaf: if counts { self.0.min_samples_leaf as f64 } else { 0.0 },
            max_features: self.0.max_features.of(table.features.len()),
        }
    }

    /// Rows that a tree draws of so many; `None` when it takes each of them once.
    pub(super) fn num_draws(&self, num_rows: usize) -> Option<usize> {
        let draws = (self.0.bootstrap_fraction * num_rows as f64).round() as usize;
        self.0.bootstrap.then_some(draws.max(1))
    }
}

/// Parameters of a random-forest regressor, not yet checked.
///
/// The fitted forest is the same, byte for byte, for the same parameters and data on any number of threads.
/// Rows may have weights, [`DatasetBase::with_weights`](linfa::DatasetBase::with_weights): a row counts as if it
/// were there so many times, which may be a fraction, in sums of targets and errors; where *samples* are counted it
/// is one. Rows of weight 0 are not used.
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
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize), serde(from = "Fields", into = "Fields"))]
pub struct RandomForestRegressorParams(RandomForestRegressorValidParams);

impl RandomForestRegressorParams {
    /// 100 trees of any depth, leaves of at least one sample, a third of the features tried at each split, bootstrap.
    #[must_use]
    pub fn new() -> Self {
        Self::from(Fields {
            num_trees: 100,
            max_depth: 64,
            min_samples_split: 2,
            min_samples_leaf: 1,
            max_features: MaxFeatures::Third,
            bootstrap: true,
            bootstrap_fraction: 1.0,
            out_of_bag: true,
            seed: 0,
        })
    }

    fn with(mut self, set: impl FnOnce(&mut Fields)) -> Self {
        set(&mut self.0.0);
        self
    }

    /// Number of trees, at least 1.
    #[must_use]
    pub fn num_trees(self, num_trees: usize) -> Self {
        self.with(|fields| fields.num_trees = num_trees)
    }

    /// Most splits between the root and a leaf, 0 to 64; at 0 every tree is one leaf.
    #[must_use]
    pub fn max_depth(self, max_depth: usize) -> Self {
        self.with(|fields| fields.max_depth = max_depth)
    }

    /// Fewest samples of a node that is split, at least 2; repeated draws of the bootstrap count.
    #[must_use]
    pub fn min_samples_split(self, min_samples_split: usize) -> Self {
        self.with(|fields| fields.min_samples_split = min_samples_split)
    }

    /// Fewest samples in a leaf, at least 1; repeated draws of the bootstrap count.
    #[must_use]
    pub fn min_samples_leaf(self, min_samples_leaf: usize) -> Self {
        self.with(|fields| fields.min_samples_leaf = min_samples_leaf)
    }

    /// Features tried at each split; features without two values at a node do not count.
    #[must_use]
    pub fn max_features(self, max_features: impl Into<MaxFeatures>) -> Self {
        self.with(|fields| fields.max_features = max_features.into())
    }

    /// Whether each tree draws its own rows, with replacement; otherwise all trees see all rows.
    #[must_use]
    pub fn bootstrap(self, bootstrap: bool) -> Self {
        self.with(|fields| fields.bootstrap = bootstrap)
    }

    /// Rows that a tree draws as a share of the rows with weight, more than 0 and at most 1; only with bootstrap.
    ///
    /// It is rounded to a whole number of rows, at least one.
    #[must_use]
    pub fn bootstrap_fraction(self, bootstrap_fraction: f64) -> Self {
        self.with(|fields| fields.bootstrap_fraction = bootstrap_fraction)
    }

    /// Whether each row is answered by the trees that did not draw it, for an error without held-out rows; it takes
    /// about a tenth of the time.
    #[must_use]
    pub fn out_of_bag(self, out_of_bag: bool) -> Self {
        self.with(|fields| fields.out_of_bag = out_of_bag)
    }

    /// Seed of all randomness; each tree draws from its own stream of it.
    #[must_use]
    pub fn seed(self, seed: u64) -> Self {
        self.with(|fields| fields.seed = seed)
    }
}

impl Default for RandomForestRegressorParams {
    fn default() -> Self {
        Self::new()
    }
}

impl From<Fields> for RandomForestRegressorParams {
    fn from(fields: Fields) -> Self {
        Self(RandomForestRegressorValidParams(fields))
    }
}

impl From<RandomForestRegressorParams> for Fields {
    fn from(params: RandomForestRegressorParams) -> Self {
        params.0.0
    }
}

impl TryFrom<Fields> for RandomForestRegressorValidParams {
    type Error = ForestError;

    fn try_from(fields: Fields) -> Result<Self, ForestError> {
        RandomForestRegressorParams::from(fields).check()
    }
}

impl From<RandomForestRegressorValidParams> for Fields {
    fn from(params: RandomForestRegressorValidParams) -> Self {
        params.0
    }
}

impl ParamGuard for RandomForestRegressorParams {
    type Checked = RandomForestRegressorValidParams;
    type Error = ForestError;

    fn check_ref(&self) -> Result<&Self::Checked, ForestError> {
        let fields = &self.0.0;
        let count = match fields.max_features {
            MaxFeatures::Count(count) => count,
            _ => 1,
        };
        let fraction = match fields.max_features {
            MaxFeatures::Fraction(fraction) => fraction,
            _ => 1.0,
        };
        let is_fraction = |x: f64| x > 0.0 && x <= 1.0;
        let is_whole = fields.bootstrap || fields.bootstrap_fraction.to_bits() == 1.0f64.to_bits();
        let (positive, part) = ("at least 1", "more than 0 and at most 1");
        let demands = [
            ("num_trees", fields.num_trees as f64, fields.num_trees > 0, positive),
            ("max_depth", fields.max_depth as f64, fields.max_depth <= 64, "0 to 64"),
            (
                "min_samples_split",
                fields.min_samples_split as f64,
                fields.min_samples_split > 1,
                "at least 2",
            ),
            ("min_samples_leaf", fields.min_samples_leaf as f64, fields.min_samples_leaf > 0, positive),
            ("max_features", count as f64, count > 0, positive),
            ("max_features", fraction, is_fraction(fraction), part),
            ("bootstrap_fraction", fields.bootstrap_fraction, is_fraction(fields.bootstrap_fraction), part),
            ("bootstrap_fraction", fields.bootstrap_fraction, is_whole, "1 without bootstrap"),
        ];
        match demands.into_iter().find(|&(_, _, is_met, _)| !is_met) {
            Some((name, value, _, expected)) => Err(ForestError::InvalidParameter { name, value, expected }),
            None => Ok(&self.0),
        }
    }

    fn check(self) -> Result<Self::Checked, ForestError> {
        self.check_ref()?;
        Ok(self.0)
    }
}

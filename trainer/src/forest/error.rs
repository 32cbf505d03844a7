//! Why a forest cannot be grown.

/// Why a forest cannot be grown.
#[derive(Debug, thiserror::Error)]
pub enum ForestError {
    /// A parameter outside its range.
    #[error("forest parameter {name} = {value}, expected {expected}")]
    InvalidParameter {
        /// Name of the parameter.
        name: &'static str,
        /// Its value.
        value: f64,
        /// Its range.
        expected: &'static str,
    },
    /// Nothing to learn from.
    #[error("a data set without rows or features")]
    Empty,
    /// Every row has weight 0.
    #[error("a data set whose rows all have weight 0, expected at least one with more")]
    NoWeight,
    /// More rows or features than can be counted.
    #[error(
        "a data set of {rows} rows and {features} features, expected at most 2^32 - 2 rows and 2^16 - 1 features"
    )]
    TooLarge {
        /// Rows of features.
        rows: usize,
        /// Features of a row.
        features: usize,
    },
    /// More targets than rows, or the other way round.
    #[error("{rows} rows with {targets} targets")]
    MismatchedTargets {
        /// Rows of features.
        rows: usize,
        /// Targets.
        targets: usize,
    },
    /// More weights than rows, or fewer.
    #[error("{rows} rows with {weights} weights, expected one for each row or none at all")]
    MismatchedWeights {
        /// Rows of features.
        rows: usize,
        /// Weights.
        weights: usize,
    },
    /// A number that cannot be compared or stored as f32.
    #[error("row {row}: expected finite numbers in the range of f32")]
    NotFinite {
        /// Index of the row.
        row: usize,
    },
    /// A weight that is negative or not finite.
    #[error("row {row}: weight {weight}, expected a finite number of at least 0")]
    InvalidWeight {
        /// Index of the row.
        row: usize,
        /// Its weight.
        weight: f32,
    },
    /// An error of linfa's own.
    #[error(transparent)]
    Linfa(#[from] linfa::Error),
}

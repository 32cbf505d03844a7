//! Why training fails.

use plumbline_schema::Operator;

use crate::forest::ForestError;

/// Why predictors cannot be trained.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// No samples at all.
    #[error("no samples to train on")]
    NoSamples,
    /// No predictors to carry over.
    #[error("no predictors to carry over to another GPU: train the bundle that they come from")]
    NoPredictors,
    /// A predictor that was carried over from yet another GPU.
    #[error(
        "operator `{operator}`: its predictor was itself carried over, from `{measured}`; expected one of samples, so \
         carry over that GPU's bundle"
    )]
    AlreadyTransferred {
        /// The operator.
        operator: Operator,
        /// Name of the GPU that was measured.
        measured: String,
    },
    /// An operator was measured, but never with its operands out of the L2 cache.
    #[error("operator `{operator}`: no cold samples among {found}; its predictor is trained on cold samples")]
    NoColdSamples {
        /// The operator.
        operator: Operator,
        /// Samples there are.
        found: usize,
    },
    /// Too few shapes to learn from and to hold some out.
    #[error("operator `{operator}`: expected at least {expected} measured shapes, found {found}")]
    TooFewShapes {
        /// The operator.
        operator: Operator,
        /// Fewest shapes.
        expected: usize,
        /// Shapes there are.
        found: usize,
    },
    /// A sample that cannot be true.
    #[error("operator `{operator}`, row {row}: {found}, expected {expected}")]
    BadSample {
        /// The operator.
        operator: Operator,
        /// Which of the operator's samples, from 1, in the order given.
        row: usize,
        /// What is wrong with it.
        found: String,
        /// What a sample must be.
        expected: &'static str,
    },
    /// A time that the GPU's data sheet rules out.
    #[error(
        "operator `{operator}`, {shape}: {time_ns} ns, expected at least the physical floor of {floor_ns} ns"
    )]
    UnderFloor {
        /// The operator.
        operator: Operator,
        /// The shape, as `column = value` joined by commas.
        shape: String,
        /// The measured time.
        time_ns: f64,
        /// Least time by the data sheet.
        floor_ns: f64,
    },
    /// One shape measured twice with times too far apart to be of one GPU.
    #[error(
        "operator `{operator}`, rows {first} and {second}: {first_ns} ns and {second_ns} ns for one shape, \
         expected times within a factor of {factor}"
    )]
    Disagreement {
        /// The operator.
        operator: Operator,
        /// The earlier row, from 1.
        first: usize,
        /// The later row.
        second: usize,
        /// The earlier row's time.
        first_ns: f64,
        /// The later row's time.
        second_ns: f64,
        /// Largest ratio that is let pass.
        factor: f64,
    },
    /// One shape measured for two operators that run the same kernels, with times too far apart to be of one GPU.
    #[error(
        "operators `{first}` and `{second}`, {shape}: {first_ns} ns and {second_ns} ns, \
         expected times within a factor of {factor}"
    )]
    PoolDisagreement {
        /// The first operator.
        first: Operator,
        /// The other operator.
        second: Operator,
        /// The shape, as `column = value` joined by commas.
        shape: String,
        /// The first operator's time.
        first_ns: f64,
        /// The other's time.
        second_ns: f64,
        /// Largest ratio that is let pass.
        factor: f64,
    },
    /// An option outside its range.
    #[error("{name} = {value}, expected {expected}")]
    InvalidOption {
        /// The option.
        name: &'static str,
        /// Its value.
        value: usize,
        /// Its range.
        expected: &'static str,
    },
    /// A share outside its range.
    #[error("{name} = {value}, expected above 0 and at most 1")]
    InvalidShare {
        /// The option.
        name: &'static str,
        /// Its value.
        value: f64,
    },
    /// The forest could not be grown.
    #[error("operator `{operator}`")]
    Forest {
        /// The operator.
        operator: Operator,
        /// Why.
        #[source]
        source: ForestError,
    },
}

//! From an operator's shape to its time, with the interval and the provenance of that number.
//!
//! A predictor never holds raw times alone: its forest says by which factor a launch differs from a
//! baseline, `overhead + sum of coefficient x roofline part`, whose parts follow from the GPU's data sheet.
//! Start with [`Predictors::predict`]; [`OperatorPredictor`] is what a file holds.

mod answer;
mod boxed;
mod by_heads;
mod chunks;
mod compiled;
mod decodes;
mod domain;
mod file;
mod flat;
mod layout;
mod operator;
mod predictors;
#[cfg(test)]
mod tests;
mod transfer;

pub use answer::{OutOfDomain, PredictError, Prediction, Provenance};
pub use compiled::CompiledPredictors;
pub use domain::Domain;
pub use file::{PredictorFile, SharedPredictor, payloads};
pub use layout::{MIN_LAYOUTS, NEAR_FACTOR, layout_columns, layouts_surround};
pub use operator::{
    BaselinePart, ErrorSummary, HeldOutError, HyperParameters, Interval, OperatorPredictor, RatioRange,
};
pub use predictors::{Predictors, PredictorsError};
pub use transfer::{PartKind, TransferredFrom};

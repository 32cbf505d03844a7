//! What a prediction is, and why there may be none.

use plumbline_schema::Operator;
use serde::{Deserialize, Serialize};

use super::RatioRange;

/// Where a predicted time comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Provenance {
    /// This very shape was measured on this GPU.
    Measured,
    /// Lies within what was measured on this GPU.
    Interpolated,
    /// Lies outside what was measured on this GPU.
    Extrapolated,
    /// Measured or predicted on another GPU and carried over by the two data sheets.
    Transferred,
    /// The data sheet alone.
    Roofline,
}

/// A predicted time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Expected GPU time of one launch, ns; above 0 and never under the physical floor.
    pub time_ns: f64,
    /// Lower end of the interval, ns; at most `time_ns`, never under the physical floor.
    pub low_ns: f64,
    /// Upper end of the interval, ns; at least `time_ns`.
    pub high_ns: f64,
    /// Where the time comes from.
    pub provenance: Provenance,
}

impl Prediction {
    /// A time with its interval, neither of which is under the physical floor.
    pub(super) fn within(time_ns: f64, interval: (Provenance, RatioRange), floor_ns: f64) -> Self {
        let (provenance, range) = interval;
        let low_ns = (time_ns * range.low).max(floor_ns);
        Self { time_ns, low_ns, high_ns: time_ns * range.high, provenance }
    }

    /// The same launch where all takes longer by a factor.
    pub(super) fn slowed(self, factor: f64) -> Self {
        let Self { time_ns, low_ns, high_ns, provenance } = self;
        Self { time_ns: time_ns * factor, low_ns: low_ns * factor, high_ns: high_ns * factor, provenance }
    }
}

/// What to do about a shape outside the measured domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OutOfDomain {
    /// Return [`PredictError::OutOfDomain`] or [`PredictError::UnmeasuredLayout`].
    #[default]
    Refuse,
    /// Predict with the ratio at the domain's edge and tag the result [`Provenance::Extrapolated`].
    Extrapolate,
}

/// Why a time cannot be predicted.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PredictError {
    /// The bundle has no predictor of the operator.
    #[error("no predictor for operator `{operator}`; available: {available}; {hint}")]
    MissingOperator {
        /// The operator asked for.
        operator: Operator,
        /// Names of the operators there are, joined by commas; `none` when there are none.
        available: String,
        /// What to do about it.
        hint: String,
    },
    /// A number of the shape lies outside what was measured.
    #[error("operator `{operator}`: {column} = {value} is outside the measured {min}..={max}")]
    OutOfDomain {
        /// The operator asked for.
        operator: Operator,
        /// Which number of the shape.
        column: &'static str,
        /// Its value.
        value: u64,
        /// Smallest measured.
        min: u64,
        /// Largest measured.
        max: u64,
    },
    /// The numbers that the model decides were not measured together.
    #[error("operator `{operator}`: {layout} was not measured; measured: {measured}")]
    UnmeasuredLayout {
        /// The operator asked for.
        operator: Operator,
        /// The model's numbers asked for: `n = 4096, k = 1024`.
        layout: String,
        /// The ones measured, in the same form, joined by semicolons.
        measured: String,
    },
    /// The shape is another operator's, empty, or too large to count its work.
    #[error("operator `{operator}`: expected {expected}, found {found}")]
    WrongShape {
        /// The operator asked for.
        operator: Operator,
        /// What a shape of the operator looks like.
        expected: String,
        /// The shape asked for.
        found: String,
    },
}

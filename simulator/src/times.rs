//! Where operator times come from, and how much of a simulation rests on which kind.

use std::{ops::AddAssign, sync::Arc};

use plumbline_bundles::{CompiledPredictors, OutOfDomain, PredictError, Prediction, Predictors, Provenance};
use plumbline_schema::{GpuSpec, Operator, OperatorShape, roofline::roofline_ns};
use serde::{Deserialize, Serialize};

/// Predicts the GPU time of one launch of an operator.
pub trait OperatorTimes {
    /// The time of one launch: finite, above 0 and tagged with where it comes from.
    ///
    /// # Errors
    /// When there is no time for the operator or the shape; never a quiet zero.
    fn predict(&self, operator: Operator, shape: &OperatorShape) -> Result<Prediction, PredictError>;
}

impl<T: OperatorTimes + ?Sized> OperatorTimes for &T {
    fn predict(&self, operator: Operator, shape: &OperatorShape) -> Result<Prediction, PredictError> {
        (**self).predict(operator, shape)
    }
}

/// Extrapolates outside the measured domain; such times are tagged and show in [`Coverage`].
impl OperatorTimes for Predictors {
    fn predict(&self, operator: Operator, shape: &OperatorShape) -> Result<Prediction, PredictError> {
        self.predict_in_step(operator, shape, OutOfDomain::Extrapolate)
    }
}

/// A bundle's predictors with a rule for shapes outside the measured domain.
///
/// What was asked before is answered from memory, so each thread has its own; a clone starts without any.
#[derive(Clone, Debug)]
pub struct BundleTimes {
    predictors: CompiledPredictors,
    out_of_domain: OutOfDomain,
}

impl BundleTimes {
    /// Times by `predictors`, which are shared and not copied.
    #[must_use]
    pub fn new(predictors: Arc<Predictors>, out_of_domain: OutOfDomain) -> Self {
        Self { predictors: CompiledPredictors::new(predictors), out_of_domain }
    }
}

impl OperatorTimes for BundleTimes {
    fn predict(&self, operator: Operator, shape: &OperatorShape) -> Result<Prediction, PredictError> {
        self.predictors.predict_in_step(operator, shape, self.out_of_domain)
    }
}

/// Times by a GPU's data sheet alone: a fixed launch cost and the roofline.
///
/// For a GPU that was never measured; every time is tagged [`Provenance::Roofline`]. Collectives have
/// none, since the data sheet says nothing of the links between GPUs.
#[derive(Clone, Debug, PartialEq)]
pub struct RooflineTimes {
    /// The GPU.
    pub gpu: GpuSpec,
    /// Fixed cost of a launch, ns, above 0.
    pub overhead_ns: f64,
}

impl OperatorTimes for RooflineTimes {
    fn predict(&self, operator: Operator, shape: &OperatorShape) -> Result<Prediction, PredictError> {
        if operator.is_collective() {
            return Err(PredictError::MissingOperator {
                operator,
                available: "every operator within one GPU".into(),
                hint: "use one GPU per replica".into(),
            });
        }
        let low_ns = roofline_ns(shape, &self.gpu);
        let time_ns = self.overhead_ns + low_ns;
        Ok(Prediction { time_ns, low_ns, high_ns: time_ns, provenance: Provenance::Roofline })
    }
}

/// An end of a prediction's interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// The least.
    Low,
    /// The greatest.
    High,
}

/// Every time at one end of its interval: what a simulation makes of operators that all err together.
#[derive(Clone, Copy, Debug)]
pub struct EdgeTimes<T> {
    times: T,
    edge: Edge,
}

impl<T> EdgeTimes<T> {
    /// The ends of the intervals of `times`.
    #[must_use]
    pub const fn new(times: T, edge: Edge) -> Self {
        Self { times, edge }
    }
}

impl<T: OperatorTimes> OperatorTimes for EdgeTimes<T> {
    fn predict(&self, operator: Operator, shape: &OperatorShape) -> Result<Prediction, PredictError> {
        let prediction = self.times.predict(operator, shape)?;
        let time_ns = match self.edge {
            Edge::Low => prediction.low_ns,
            Edge::High => prediction.high_ns,
        };
        Ok(Prediction { time_ns, ..prediction })
    }
}

/// Times in ns, summed by provenance.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProvenanceTimes {
    /// Of shapes that were measured.
    pub measured_ns: f64,
    /// Between measured shapes.
    pub interpolated_ns: f64,
    /// Beyond the measured shapes.
    pub extrapolated_ns: f64,
    /// Carried over from another GPU.
    pub transferred_ns: f64,
    /// From the data sheet alone.
    pub roofline_ns: f64,
}

impl ProvenanceTimes {
    /// Adds a time.
    #[inline]
    pub fn add(&mut self, provenance: Provenance, time_ns: f64) {
        let sum = match provenance {
            Provenance::Measured => &mut self.measured_ns,
            Provenance::Interpolated => &mut self.interpolated_ns,
            Provenance::Extrapolated => &mut self.extrapolated_ns,
            Provenance::Transferred => &mut self.transferred_ns,
            Provenance::Roofline => &mut self.roofline_ns,
        };
        *sum += time_ns;
    }

    /// The sum over all provenances, ns.
    #[must_use]
    pub fn total_ns(&self) -> f64 {
        self.measured_ns
            + self.interpolated_ns
            + self.extrapolated_ns
            + self.transferred_ns
            + self.roofline_ns
    }

    /// Each provenance's share of the total; all zero when there is no time at all.
    #[must_use]
    pub fn shares(&self) -> Coverage {
        let total = self.total_ns();
        let share = |ns: f64| if total > 0.0 { ns / total } else { 0.0 };
        Coverage {
            measured: share(self.measured_ns),
            interpolated: share(self.interpolated_ns),
            extrapolated: share(self.extrapolated_ns),
            transferred: share(self.transferred_ns),
            roofline: share(self.roofline_ns),
        }
    }
}

impl AddAssign for ProvenanceTimes {
    #[inline]
    fn add_assign(&mut self, other: Self) {
        self.measured_ns += other.measured_ns;
        self.interpolated_ns += other.interpolated_ns;
        self.extrapolated_ns += other.extrapolated_ns;
        self.transferred_ns += other.transferred_ns;
        self.roofline_ns += other.roofline_ns;
    }
}

/// Shares of predicted GPU time by provenance, 0..1; they sum to 1 where there is any time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Coverage {
    /// Of shapes that were measured.
    pub measured: f64,
    /// Between measured shapes.
    pub interpolated: f64,
    /// Beyond the measured shapes.
    pub extrapolated: f64,
    /// Carried over from another GPU.
    pub transferred: f64,
    /// From the data sheet alone.
    pub roofline: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_weighted_by_time() {
        let mut times = ProvenanceTimes::default();
        assert_eq!(times.shares(), Coverage::default());
        times.add(Provenance::Measured, 30.0);
        times.add(Provenance::Roofline, 10.0);
        let mut sum = times;
        sum += times;
        let expected = Coverage { measured: 0.75, roofline: 0.25, ..Coverage::default() };
        assert_eq!(sum.shares(), expected);
        assert!((sum.total_ns() - 80.0).abs() < 1e-12);
    }
}

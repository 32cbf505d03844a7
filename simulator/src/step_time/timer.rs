//! Step times for other programs: a mock engine, another simulator, a planner.

use plumbline_schema::{Nanos, StepBatch};

use super::{StepTime, StepTimeError, StepTimeModel};
use crate::times::OperatorTimes;

/// Tells how long a step takes.
///
/// The least that a program needs which forms batches of its own: a mock engine sleeps for
/// [`total_ns`](StepTime::total_ns), another simulator adds it to its clock. A timer keeps no state between steps that
/// changes an answer: what came before is in `idle`.
pub trait StepTimer {
    /// The time of a step over `batch`, without scatter (residual 1).
    ///
    /// `idle` is how long the engine had nothing to do before the step: zero when it follows another at once, `None`
    /// for an engine's first step. Whether that counts as an idle gap is up to the engine profile's threshold.
    ///
    /// # Errors
    /// When the batch is empty, an operator has no time, or the profile no costs of such a step; the error says which.
    fn time(&mut self, batch: &StepBatch, idle: Option<Nanos>) -> Result<StepTime, StepTimeError>;
}

impl<S: StepTimer + ?Sized> StepTimer for &mut S {
    fn time(&mut self, batch: &StepBatch, idle: Option<Nanos>) -> Result<StepTime, StepTimeError> {
        (**self).time(batch, idle)
    }
}

impl<T: OperatorTimes> StepTimer for StepTimeModel<T> {
    fn time(&mut self, batch: &StepBatch, idle: Option<Nanos>) -> Result<StepTime, StepTimeError> {
        if batch.is_empty() {
            return Err(StepTimeError::EmptyBatch);
        }
        let threshold = Nanos::from_f64(self.profile().idle_threshold_ns);
        self.step_time(&batch.shape(), idle.is_none_or(|idle| idle >= threshold))
    }
}

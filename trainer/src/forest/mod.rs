//! A random-forest regressor on linfa's traits.
//!
//! Breiman (2001), "Random Forests": each tree is grown on a bootstrap sample of the rows, every split is the
//! one of the tried features that reduces the sum of squared errors most, and the forest answers with the mean
//! of its trees. Start with [`RandomForestRegressorParams`]; a fitted [`RandomForestRegressor`] predicts
//! through linfa's `Predict` and turns into the [`Forest`](plumbline_bundles::Forest) that bundles hold.

mod grow;
mod model;
mod params;
#[cfg(test)]
mod tests;

pub use model::RandomForestRegressor;
pub use params::{ForestError, RandomForestRegressorParams, RandomForestRegressorValidParams};

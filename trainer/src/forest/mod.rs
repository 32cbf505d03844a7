//! A random-forest regressor on linfa's traits.
//!
//! Breiman (2001), "Random Forests": each tree is grown on a bootstrap sample of the rows, every split is the
//! one of the tried features that reduces the sum of squared errors most, and the forest answers with the mean
//! of its trees. Start with [`RandomForestRegressorParams`]; a fitted [`RandomForestRegressor`] predicts
//! through linfa's `Predict` and turns into the [`Forest`](plumbline_bundles::Forest) that bundles hold.
//!
//! Parameters and model are read and written with serde when the crate's feature `serde` is on, as it is by
//! default.

mod bins;
mod draw;
mod error;
mod grow;
mod lists;
mod model;
mod out_of_bag;
mod params;
mod split;
mod table;
#[cfg(test)]
mod tests;
mod threshold;

pub use error::ForestError;
pub use model::RandomForestRegressor;
pub use params::{MaxFeatures, RandomForestRegressorParams, RandomForestRegressorValidParams};

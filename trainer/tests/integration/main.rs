//! Training on a known law, and what its predictors promise.

mod law;
mod predicting;
mod training;

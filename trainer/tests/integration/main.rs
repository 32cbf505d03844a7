//! Training on a known law, and what its predictors promise.

mod advising;
mod compiled;
mod law;
mod predicting;
mod replay;
mod selecting;
mod training;
mod transferring;

//! Samples to predictors: the data set, the regression forest and the honest error of what it learned.

pub mod forest;

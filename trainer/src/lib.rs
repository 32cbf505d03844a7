//! Samples to predictors: the data set, the regression forest and the honest error of what it learned.
//!
//! Start with [`train()`], which takes samples to predictors and a report; [`dataset`] says which samples are
//! refused, [`evaluate`] how errors are measured, [`forest`] how the forest is grown,
//! [`advise`] where to measure next, [`mod@transfer`] how another GPU is predicted,
//! [`select`] how hyper-parameters are searched; [`report`] draws what was found.

pub mod advise;
mod baseline;
pub mod dataset;
mod error;
pub mod evaluate;
mod fit;
pub mod forest;
mod job;
pub mod judge;
pub mod report;
pub mod select;
pub mod train;
pub mod transfer;

pub use error::TrainError;
pub use train::{
    HeldOutPoint, HeldOutWay, OperatorReport, Progress, TrainOptions, TrainOutcome, TrainReport, train,
};

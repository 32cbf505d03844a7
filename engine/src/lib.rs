//! The engine: real models on one GPU, served by the simulator's scheduler, computed by the profiler's operators.
//!
//! Start with [`engine`] (a model that computes steps), then `forward` (its operators), [`inputs`] (what a step tells the
//! GPU), [`executor`] (steps behind the loop that serves workloads) and [`real_run`] (a workload as a run).
//! [`checkpoint`] reads weights, [`numerics`] a model's constants, [`generate`] completes a text.

pub mod checkpoint;
pub mod engine;
pub mod error;
pub mod executor;
mod forward;
pub mod generate;
mod gpu;
pub mod inputs;
pub mod numerics;
pub mod prompts;
pub mod real_run;
mod warm_up;
mod weights;

pub use engine::{Engine, EngineOptions, WeightSource};
pub use error::EngineError;
pub use executor::Sampling;
pub use real_run::{RealRun, RunOptions, serve_workload};

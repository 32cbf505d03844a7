//! Discrete-event LLM serving on predicted operator times.
//!
//! Start with [`scheduler`] (which tokens the next step computes), then [`replay`].

pub mod kv_cache;
pub mod replay;
pub mod scheduler;
pub mod sequence;

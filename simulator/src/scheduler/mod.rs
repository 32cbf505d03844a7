//! Schedulers: which tokens of which sequences the next step computes.
//!
//! A scheduler is one file here, one variant of [`SchedulerKind`] and its two arms. It is the same code
//! whether a step is timed by a model or by a clock.

mod step;
mod vllm_v1;

use std::{fmt, str::FromStr};

use plumbline_schema::{Deployment, WorkloadRequest};
use thiserror::Error;

pub use self::{
    step::{ScheduledSequence, ScheduledStep},
    vllm_v1::VllmV1,
};
use crate::{kv_cache::KvCache, sequence::SequenceId};

/// Decides the batches of one engine.
///
/// `schedule` and `complete` take turns: a step is completed before the next one is formed.
pub trait Scheduler {
    /// Takes in a request, to be scheduled after those already there.
    ///
    /// # Errors
    /// When it can never be served; the scheduler then knows nothing of it.
    fn add(&mut self, request: &WorkloadRequest) -> Result<SequenceId, Rejection>;

    /// Forms the next step into `step`, replacing what it holds.
    ///
    /// Not empty as long as any sequence is unfinished, else the clock would stall.
    fn schedule(&mut self, step: &mut ScheduledStep);

    /// Accounts for the step having run: sequences computed to their end get a token, and those that
    /// have all their tokens leave, in the step's order, into `finished` (replacing what it holds).
    fn complete(&mut self, step: &ScheduledStep, finished: &mut Vec<SequenceId>);

    /// Where its sequences stand, and the cache.
    fn state(&self) -> SchedulerState<'_>;
}

/// Where a scheduler's unfinished sequences stand.
#[derive(Clone, Copy, Debug)]
pub struct SchedulerState<'a> {
    /// Sequences waiting for their first step, or to come back after a preemption.
    pub num_waiting: usize,
    /// Sequences that hold KV blocks.
    pub num_running: usize,
    /// The KV cache, for block tables and counts.
    pub kv_cache: &'a KvCache,
}

impl SchedulerState<'_> {
    /// Sequences not finished.
    #[must_use]
    pub fn num_unfinished(&self) -> usize {
        self.num_waiting + self.num_running
    }
}

/// Why a request can never be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Rejection {
    /// Prompt and output exceed the longest sequence allowed.
    #[error("{num_tokens} tokens of prompt and output exceed max_model_len = {max_model_len}")]
    LongerThanModelLen {
        /// Prompt and output tokens.
        num_tokens: u64,
        /// The deployment's limit.
        max_model_len: u32,
    },
    /// The whole KV cache cannot hold it.
    #[error("{num_tokens} cached tokens need more than the {num_blocks} usable KV blocks of {block_size}")]
    LargerThanKvCache {
        /// Tokens to be cached: prompt and output without the last token, which is never read back.
        num_tokens: u64,
        /// Usable blocks.
        num_blocks: u32,
        /// Tokens per block.
        block_size: u32,
    },
}

/// A deployment that a scheduler cannot serve.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SchedulerError {
    /// A value out of range.
    #[error("deployment key `{key}`: expected {expected}, found {found}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// What must stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A feature that the scheduler does not model.
    #[error("scheduler {scheduler} does not model `{key} = {value}`, only {supported}")]
    Unsupported {
        /// The scheduler.
        scheduler: SchedulerKind,
        /// The deployment's key.
        key: &'static str,
        /// What it asks for.
        value: String,
        /// What is modelled.
        supported: &'static str,
    },
}

/// The schedulers there are, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SchedulerKind {
    /// vLLM's V1 scheduler: one token budget, running first, chunked prefill, preemption by recompute.
    VllmV1,
}

impl SchedulerKind {
    /// Every scheduler.
    pub const ALL: [Self; 1] = [Self::VllmV1];

    /// The name in engine profiles and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::VllmV1 => "vllm-v1",
        }
    }

    /// Builds the scheduler for a deployment.
    ///
    /// # Errors
    /// When a key is out of range or asks for what the scheduler does not model.
    pub fn build(self, deployment: &Deployment) -> Result<Box<dyn Scheduler>, SchedulerError> {
        match self {
            Self::VllmV1 => Ok(Box::new(VllmV1::new(deployment)?)),
        }
    }
}

impl fmt::Display for SchedulerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A scheduler's name that is not known.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("expected a scheduler ({known}), found `{found}`")]
pub struct UnknownScheduler {
    /// The names there are.
    pub known: String,
    /// The name asked for.
    pub found: String,
}

impl FromStr for SchedulerKind {
    type Err = UnknownScheduler;

    fn from_str(text: &str) -> Result<Self, UnknownScheduler> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| UnknownScheduler {
            known: Self::ALL.map(Self::name).join(", "),
            found: text.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for kind in SchedulerKind::ALL {
            assert_eq!(kind.to_string().parse::<SchedulerKind>().unwrap(), kind);
        }
        let error = "orca".parse::<SchedulerKind>().unwrap_err();
        assert_eq!(error.to_string(), "expected a scheduler (vllm-v1), found `orca`");
    }
}

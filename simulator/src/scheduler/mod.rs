//! Schedulers: which tokens of which sequences the next step computes.
//!
//! A scheduler is one file here, one variant of [`SchedulerKind`] and its two arms. It is the same code
//! whether a step is timed by a model or by a clock.

mod common;
mod faster_transformer;
#[cfg(test)]
mod laws;
mod lightllm;
mod orca;
mod pool;
mod sarathi;
mod sglang;
mod step;
mod vllm_v0;
mod vllm_v1;

use std::{fmt, str::FromStr};

use plumbline_schema::{AttentionLoad, Deployment, WorkloadRequest};
use thiserror::Error;

pub use self::{
    faster_transformer::FasterTransformer,
    lightllm::Lightllm,
    orca::Orca,
    sarathi::Sarathi,
    sglang::Sglang,
    step::{ScheduledSequence, ScheduledStep},
    vllm_v0::VllmV0,
    vllm_v1::VllmV1,
};
use crate::{
    kv_blocks::KvBlocks,
    sequence::{Sequence, SequenceId},
};

/// Decides the batches of one engine.
///
/// Steps are formed by `schedule` and accounted for by `complete`, in the order in which they were formed. A
/// pipelined or asynchronous engine forms several before the first is complete; they are in flight meanwhile.
pub trait Scheduler: Send {
    /// Takes in a request, to be scheduled after those already there unless the policy says otherwise.
    ///
    /// # Errors
    /// When it can never be served; the scheduler then knows nothing of it.
    fn add(&mut self, request: &WorkloadRequest) -> Result<SequenceId, Rejection>;

    /// Takes in a request whose first `num_tokens` prompt tokens another engine has computed: they need blocks and no
    /// computing, as long as the request is not preempted.
    ///
    /// # Errors
    /// As [`Self::add`], or when the policy cannot do so.
    fn add_transferred(
        &mut self,
        request: &WorkloadRequest,
        num_tokens: u32,
    ) -> Result<SequenceId, Rejection> {
        let _ = (request, num_tokens);
        Err(Rejection::NoTransfer)
    }

    /// Forms the next step into `step`, replacing what it holds.
    ///
    /// Not empty as long as any sequence is unfinished and no step is in flight, else the clock would stall.
    fn schedule(&mut self, step: &mut ScheduledStep);

    /// Accounts for the oldest step in flight having run: sequences computed to their end get a token, and those
    /// that have all their tokens leave, in the step's order, into `finished` (replacing what it holds). Their
    /// numbers may be given out again from the next `add` on.
    fn complete(&mut self, step: &ScheduledStep, finished: &mut Vec<SequenceId>);

    /// What the next steps are, where they are all alike; asked only with no step in flight.
    ///
    /// An optimisation: a scheduler that never answers is simulated a step at a time, to the same result.
    fn steady(&self) -> Option<Steady> {
        None
    }

    /// Forms and completes `num_steps` of the steps that [`Self::steady`] has just promised.
    fn advance(&mut self, num_steps: u32) {
        unreachable!("{num_steps} steady steps of a scheduler that promises none");
    }

    /// The sequences that hold KV blocks, in the policy's order.
    fn running(&self) -> &[SequenceId];

    /// The counts of an unfinished sequence.
    fn sequence(&self, id: SequenceId) -> &Sequence;

    /// Where its sequences stand, and the cache.
    fn state(&self) -> SchedulerState<'_>;
}

/// Consecutive steps that compute one token of every running sequence and nothing else: no arrival, end, preemption
/// or prefill chunk is among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steady {
    /// How many, at least 1.
    pub num_steps: u32,
    /// The load of the first; each later one reads one token more for every sequence.
    pub load: AttentionLoad,
}

/// Where a scheduler's unfinished sequences stand.
#[derive(Clone, Copy, Debug)]
pub struct SchedulerState<'a> {
    /// Sequences waiting for their first step, or to come back after a preemption.
    pub num_waiting: usize,
    /// Sequences that hold KV blocks.
    pub num_running: usize,
    /// The KV cache, for block tables and counts.
    pub kv_cache: &'a dyn KvBlocks,
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
    /// The whole KV cache cannot hold it, less what the policy keeps free.
    #[error("{num_tokens} cached tokens need more than the {num_blocks} usable KV blocks of {block_size}")]
    LargerThanKvCache {
        /// Tokens to be cached: prompt and output, without the last token, which is never read back, unless memory is
        /// reserved for it.
        num_tokens: u64,
        /// Usable blocks.
        num_blocks: u32,
        /// Tokens per block.
        block_size: u32,
    },
    /// Longer than the policy's own plan allows any request to be.
    #[error(
        "{num_tokens} tokens of prompt and output exceed the {max_tokens} that {scheduler} plans for at most"
    )]
    LongerThanPlanned {
        /// The policy.
        scheduler: SchedulerKind,
        /// Prompt and output tokens.
        num_tokens: u64,
        /// What the policy lets in when it has nothing else to do.
        max_tokens: u64,
    },
    /// It could not be computed in one step, and the policy does not split what it computes.
    #[error(
        "{num_tokens} tokens, to be computed whole after a preemption, exceed max_num_batched_tokens = {max_num_batched_tokens}"
    )]
    LongerThanBudget {
        /// Prompt and output tokens, without the last.
        num_tokens: u32,
        /// The deployment's limit.
        max_num_batched_tokens: u32,
    },
    /// Its prompt was computed elsewhere.
    #[error("the scheduler cannot take in prompts that another engine has computed")]
    NoTransfer,
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
    /// `LightLLM`'s: whole prefills, let in by the forecast peak of token use.
    Lightllm,
    /// `SGLang`'s: prefill first, prefixes shared through a radix tree, retraction.
    Sglang,
    /// Sarathi-Serve's: chunked prefills that hold no decode back.
    Sarathi,
    /// vLLM's V0 scheduler: whole prefills first, else decodes.
    VllmV0,
    /// Orca's: iteration-level batches, memory reserved for prompt and output.
    Orca,
    /// `FasterTransformer`'s: a batch runs until all of its requests are done.
    FasterTransformer,
}

impl SchedulerKind {
    /// Every scheduler.
    pub const ALL: [Self; 7] = [
        Self::VllmV1,
        Self::VllmV0,
        Self::Sarathi,
        Self::Orca,
        Self::FasterTransformer,
        Self::Lightllm,
        Self::Sglang,
    ];

    /// The name in engine profiles and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::VllmV1 => "vllm-v1",
            Self::Lightllm => "lightllm",
            Self::Sglang => "sglang",
            Self::Sarathi => "sarathi",
            Self::VllmV0 => "vllm-v0",
            Self::Orca => "orca",
            Self::FasterTransformer => "faster-transformer",
        }
    }

    /// Builds the scheduler for a deployment.
    ///
    /// # Errors
    /// When a key is out of range or asks for what the scheduler does not model.
    pub fn build(self, deployment: &Deployment) -> Result<Box<dyn Scheduler>, SchedulerError> {
        match self {
            Self::VllmV1 => Ok(Box::new(VllmV1::new(deployment)?)),
            Self::Lightllm => Ok(Box::new(Lightllm::new(deployment)?)),
            Self::Sglang => Ok(Box::new(Sglang::new(deployment)?)),
            Self::Sarathi => Ok(Box::new(Sarathi::new(deployment)?)),
            Self::VllmV0 => Ok(Box::new(VllmV0::new(deployment)?)),
            Self::Orca => Ok(Box::new(Orca::new(deployment)?)),
            Self::FasterTransformer => Ok(Box::new(FasterTransformer::new(deployment)?)),
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
        let error = "vllm-v9".parse::<SchedulerKind>().unwrap_err().to_string();
        let known = SchedulerKind::ALL.map(SchedulerKind::name).join(", ");
        assert_eq!(error, format!("expected a scheduler ({known}), found `vllm-v9`"));
    }
}

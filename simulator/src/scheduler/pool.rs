//! The sequences and blocks of a policy that serves in order and lets a sequence into one step at a time.
//!
//! A sequence waits, is at rest, or is in flight: a step in flight has a part of it, and until that is complete it is
//! passed over. Blocks are given out in one of two ways:
//!
//! - *paged*: those of the tokens known, when the sequence is let in, and then one by one (Sarathi-Serve, vLLM V0);
//! - *reserved*: those of prompt and output, when the sequence is let in (Orca, `FasterTransformer`).

use std::collections::VecDeque;

use plumbline_schema::{Deployment, WorkloadRequest};

use super::{
    Rejection, ScheduledSequence, ScheduledStep, Scheduler, SchedulerError, SchedulerKind, SchedulerState,
    Steady,
    common::{
        advance_decodes, check_cache, check_deployment, check_model_len, complete_step, steady_decodes,
        steady_decodes_at_most,
    },
};
use crate::{
    kv_cache::KvCache,
    sequence::{Sequence, SequenceId, Sequences},
};

/// A policy over a [`Pool`]: what it decides itself, the pool doing the rest of a [`Scheduler`].
pub trait PoolPolicy: Send {
    /// Its sequences and blocks.
    fn pool(&self) -> &Pool;

    /// The same, to change.
    fn pool_mut(&mut self) -> &mut Pool;

    /// Refuses a request that it could never serve.
    fn check(&self, request: &WorkloadRequest) -> Result<(), Rejection>;

    /// Forms the next step into `step`, which is empty.
    fn form(&mut self, step: &mut ScheduledStep);

    /// See [`Scheduler::complete`].
    fn account(&mut self, step: &ScheduledStep, finished: &mut Vec<SequenceId>) {
        self.pool_mut().complete(step, finished);
    }

    /// See [`Scheduler::steady`].
    fn promise(&self) -> Option<Steady>;
}

impl<P: PoolPolicy> Scheduler for P {
    fn add(&mut self, request: &WorkloadRequest) -> Result<SequenceId, Rejection> {
        self.check(request)?;
        Ok(self.pool_mut().enqueue(request))
    }

    fn schedule(&mut self, step: &mut ScheduledStep) {
        step.clear();
        self.form(step);
        self.pool_mut().close(step);
    }

    fn complete(&mut self, step: &ScheduledStep, finished: &mut Vec<SequenceId>) {
        self.account(step, finished);
    }

    fn steady(&self) -> Option<Steady> {
        self.promise()
    }

    fn advance(&mut self, num_steps: u32) {
        self.pool_mut().advance(num_steps);
    }

    fn running(&self) -> &[SequenceId] {
        &self.pool().running
    }

    fn sequence(&self, id: SequenceId) -> &Sequence {
        &self.pool().sequences[id]
    }

    fn state(&self) -> SchedulerState<'_> {
        self.pool().state()
    }
}

/// Of all blocks, those that a sequence let in leaves free, in hundredths.
///
/// Sarathi-Serve, `sarathi/core/block_space_manager/base_block_space_manager.py`, and vLLM 0.6.6,
/// `vllm/core/block_manager.py`: `watermark = 0.01`.
const WATERMARK_PERCENT: u64 = 1;

/// Sequences and blocks, and the deployment's limits.
#[derive(Clone, Debug)]
pub struct Pool {
    pub max_num_batched_tokens: u32,
    pub max_num_seqs: usize,
    pub max_model_len: u32,
    /// Blocks that stay free when a sequence is let in by pages.
    pub watermark_blocks: u32,
    /// Whether there is one step in flight at most.
    pub is_serial: bool,
    pub kv_cache: KvCache,
    pub sequences: Sequences,
    /// Those that hold blocks, at rest or in flight, in the policy's order.
    pub running: Vec<SequenceId>,
    pub waiting: VecDeque<SequenceId>,
    /// Preempted when no step could be formed after all.
    unreported: Vec<SequenceId>,
}

impl Pool {
    /// An empty pool for a deployment.
    ///
    /// # Errors
    /// When a key is out of range, or asks for what no policy of this kind has: prefix caching, priorities,
    /// asynchronous scheduling, a limit on one sequence's chunk.
    pub fn new(scheduler: SchedulerKind, deployment: &Deployment) -> Result<Self, SchedulerError> {
        let modelled = [
            ("enable_prefix_caching", deployment.enable_prefix_caching.to_string(), "false"),
            ("scheduling_policy", deployment.scheduling_policy.clone(), "fcfs"),
            ("async_scheduling", deployment.async_scheduling.to_string(), "false"),
            ("long_prefill_token_threshold", deployment.long_prefill_token_threshold.to_string(), "0"),
        ];
        check_deployment(deployment, scheduler, modelled)?;
        let num_gpu_blocks = u64::from(deployment.num_gpu_blocks);
        Ok(Self {
            max_num_batched_tokens: deployment.max_num_batched_tokens,
            max_num_seqs: deployment.max_num_seqs as usize,
            max_model_len: deployment.max_model_len,
            watermark_blocks: (num_gpu_blocks * WATERMARK_PERCENT / 100) as u32,
            is_serial: deployment.pipeline_parallel_size == 1,
            kv_cache: KvCache::new(deployment.num_gpu_blocks, deployment.block_size),
            sequences: Sequences::default(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            unreported: Vec::new(),
        })
    }

    /// Lets a request wait behind those already there.
    pub fn enqueue(&mut self, request: &WorkloadRequest) -> SequenceId {
        let id = self.sequences.insert(request);
        self.waiting.push_back(id);
        id
    }

    /// Refuses a request that, by pages, could not be let in again after a preemption, however late: it would wait
    /// forever. Returns the most tokens of it that are ever computed anew.
    pub fn check_paged(&self, request: &WorkloadRequest) -> Result<u32, Rejection> {
        // The last output token is never fed back, so it is never cached.
        let num_tokens = check_model_len(request, self.max_model_len)?.saturating_sub(1);
        let num_blocks = self.kv_cache.num_blocks().saturating_sub(self.watermark_blocks);
        check_cache(num_tokens, num_blocks, self.kv_cache.block_size())?;
        Ok(num_tokens)
    }

    /// Refuses a request whose prompt and output no empty cache could reserve.
    pub fn check_reserved(&self, request: &WorkloadRequest) -> Result<(), Rejection> {
        let num_tokens = check_model_len(request, self.max_model_len)?;
        check_cache(num_tokens, self.kv_cache.num_blocks(), self.kv_cache.block_size())
    }

    /// Whether a waiting sequence can be let in by pages: the tokens known of it fit and leave the watermark free.
    pub fn fits_paged(&self, id: SequenceId) -> bool {
        let num_blocks = self.kv_cache.blocks_for(self.sequences[id].num_tokens());
        u64::from(num_blocks) + u64::from(self.watermark_blocks) <= u64::from(self.kv_cache.num_free())
    }

    /// Lets the first that waits in, with blocks for the tokens known of it; [`Self::fits_paged`] has said that it
    /// can. Its place in `running` is the policy's to find.
    pub fn let_in_paged(&mut self, id: SequenceId) {
        self.let_in(id, self.sequences[id].num_tokens());
    }

    /// Lets the first that waits in, with blocks for its prompt and output; `None` when it does not fit.
    pub fn let_in_reserved(&mut self) -> Option<SequenceId> {
        let &id = self.waiting.front()?;
        if !self.fits_reserved(id) {
            return None;
        }
        self.let_in(id, self.num_reserved_tokens(id));
        self.running.push(id);
        Some(id)
    }

    fn let_in(&mut self, id: SequenceId, num_tokens: u32) {
        debug_assert_eq!(self.waiting.front(), Some(&id));
        self.waiting.pop_front();
        self.sequences[id].is_prefilling = true;
        let has_room = self.kv_cache.grow(id, num_tokens);
        debug_assert!(has_room, "only what fits is let in");
    }

    fn num_reserved_tokens(&self, id: SequenceId) -> u32 {
        let sequence = &self.sequences[id];
        sequence.num_prompt_tokens + sequence.max_output_tokens
    }

    fn fits_reserved(&self, id: SequenceId) -> bool {
        self.kv_cache.blocks_for(self.num_reserved_tokens(id)) <= self.kv_cache.num_free()
    }

    /// Whether all at rest can decode within `budget`, each with a block more, so that nothing is preempted.
    #[inline]
    pub fn is_roomy(&self, budget: u32) -> bool {
        self.running.len() <= self.kv_cache.num_free().min(budget) as usize
    }

    /// Lets a step decode all at rest whose prefills are done, where [`Self::is_roomy`] says that it can; the prefills
    /// go to `aside`. What [`Self::append_slot`] and [`Self::compute`] do, sooner.
    pub fn decode_all(&mut self, step: &mut ScheduledStep, mut aside: impl FnMut(SequenceId)) {
        step.sequences.reserve(self.running.len());
        for &id in &self.running {
            let sequence = &mut self.sequences[id];
            if sequence.is_in_flight {
                continue;
            }
            if sequence.is_prefilling {
                aside(id);
                continue;
            }
            let context_len = sequence.num_computed_tokens;
            sequence.num_computed_tokens += 1;
            sequence.is_in_flight = true;
            let has_room = self.kv_cache.grow(id, context_len + 1);
            debug_assert!(has_room, "there is a block for each");
            let decode = ScheduledSequence { id, num_tokens: 1, context_len, is_decode: true, samples: true };
            step.sequences.push(decode);
        }
    }

    /// Gets a block, by pages, for the newest token of the sequence at `position` of `running`, which is at rest.
    ///
    /// A free block is asked for even where the last one held has room. As long as there is none, the last sequence
    /// at rest loses its own and waits in front. False when that was the sequence itself, or when it stays and has to
    /// wait for younger ones in flight.
    pub fn append_slot(&mut self, position: usize, step: &mut ScheduledStep) -> bool {
        let id = self.running[position];
        while self.kv_cache.num_free() == 0 {
            let at_rest = |id: &SequenceId| !self.sequences[*id].is_in_flight;
            let last = self.running.iter().rposition(at_rest).unwrap_or(position);
            if last == position && position + 1 < self.running.len() {
                return false;
            }
            self.preempt(last, step);
            if last == position {
                return false;
            }
        }
        let has_room = self.kv_cache.grow(id, self.sequences[id].num_computed_tokens + 1);
        debug_assert!(has_room, "a token needs a block at most");
        true
    }

    fn preempt(&mut self, position: usize, step: &mut ScheduledStep) {
        let id = self.running.remove(position);
        self.kv_cache.free(id);
        self.sequences[id].num_computed_tokens = 0;
        self.waiting.push_front(id);
        step.preempted.push(id);
    }

    /// Ends the forming of a step: of one that is none, the next has to tell who was preempted.
    pub fn close(&mut self, step: &mut ScheduledStep) {
        if step.is_empty() {
            self.unreported.append(&mut step.preempted);
        } else if !self.unreported.is_empty() {
            step.preempted.splice(0..0, self.unreported.drain(..));
        }
    }

    /// Lets a step compute `num_tokens` of a sequence at rest, which holds the blocks for them.
    #[inline]
    pub fn compute(&mut self, id: SequenceId, num_tokens: u32, step: &mut ScheduledStep) {
        let sequence = &mut self.sequences[id];
        let context_len = sequence.num_computed_tokens;
        let is_decode = sequence.is_decoding();
        sequence.num_computed_tokens += num_tokens;
        sequence.is_in_flight = true;
        let samples = sequence.num_uncomputed_tokens() == 0;
        sequence.is_prefilling &= !samples;
        step.sequences.push(ScheduledSequence { id, num_tokens, context_len, is_decode, samples });
    }

    /// See [`Scheduler::complete`].
    pub fn complete(&mut self, step: &ScheduledStep, finished: &mut Vec<SequenceId>) {
        complete_step(step, &mut self.running, &mut self.sequences, &mut self.kv_cache, finished);
    }

    /// See [`Scheduler::steady`], of a policy by pages whose step has a token of each at
    /// rest, and whose seats are those of all that run.
    pub fn steady_paged(&self) -> Option<Steady> {
        let has_seat = self.running.len() < self.max_num_seqs;
        // What does not fit now fits less after every step.
        let is_open = has_seat && self.waiting.front().is_some_and(|&id| self.fits_paged(id));
        if is_open
            || !self.unreported.is_empty()
            || self.running.len() as u64 > u64::from(self.max_num_batched_tokens)
        {
            return None;
        }
        steady_decodes(&self.running, &self.sequences, &self.kv_cache)
    }

    /// See [`Scheduler::steady`], of a policy that reserves, has one batch of all that run,
    /// and lets none into it where `is_full`.
    pub fn steady_reserved(&self, is_full: bool) -> Option<Steady> {
        // Beside a full batch in flight there may be another.
        let is_full = is_full && self.is_serial;
        if !is_full && self.waiting.front().is_some_and(|&id| self.fits_reserved(id)) {
            return None;
        }
        steady_decodes_at_most(u32::MAX, &self.running, &self.sequences)
    }

    /// See [`Scheduler::advance`].
    pub fn advance(&mut self, num_steps: u32) {
        advance_decodes(&self.running, &mut self.sequences, &mut self.kv_cache, num_steps);
    }

    /// See [`Scheduler::state`].
    pub fn state(&self) -> SchedulerState<'_> {
        SchedulerState {
            num_waiting: self.waiting.len(),
            num_running: self.running.len(),
            kv_cache: &self.kv_cache,
        }
    }
}

//! vLLM's V1 scheduler.
//!
//! The rules are those of vLLM 0.24.0, `vllm/v1/core/sched/scheduler.py` (`schedule`, `_preempt_request`,
//! `_update_after_schedule`, `update_from_output`), `vllm/v1/core/sched/async_scheduler.py` and
//! `vllm/v1/core/kv_cache_manager.py` (`get_computed_blocks`, `allocate_slots`):
//!
//! - There is no prefill phase or decode phase: each sequence has computed and known tokens, and a step
//!   lets the computed catch up, within one budget of `max_num_batched_tokens` tokens for all.
//! - Running sequences come first, in the order in which they began to run.
//!   `long_prefill_token_threshold`, when set, caps one sequence's tokens in a step.
//! - When a running sequence finds no free block, the last running one (with priorities: the one of the highest value,
//!   of those the latest) loses all its blocks and returns to the queue (to its front, or to its rank), to be
//!   recomputed from its first token; this repeats until there is room or the sequence itself was the one. A victim
//!   that is part of the step already leaves it, and its tokens return to the budget.
//! - After a preemption nothing is taken from the queue in the same step. Otherwise sequences are taken
//!   in order while the budget, `max_num_seqs` and the blocks allow. The first that does not fit ends it.
//! - A queued sequence is taken only when all tokens known of it fit into the free blocks
//!   (`scheduler_reserve_full_isl`, on by default), even where its first chunk is smaller. The default
//!   watermark is 0, so no further blocks are kept free.
//! - With prefix caching, a sequence taken from the queue begins with the cached blocks of its first tokens, all but
//!   the last of them at most. Full blocks are known by their content as soon as they are scheduled.
//! - While steps are in flight, a sequence whose known tokens are all computed is left out; with asynchronous
//!   scheduling it goes on with the token that a step in flight will give it, unless that is its last. In an
//!   asynchronous pipeline, that many steps as there are stages lie between two decodes of a sequence.
//!
//! `max_num_partial_prefills` is not among them: vLLM 0.24's V1 scheduler does not read it.

mod waiting;

#[cfg(test)]
mod laws;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use plumbline_schema::{Deployment, WorkloadRequest};

use self::waiting::Waiting;
use super::{
    Rejection, ScheduledSequence, ScheduledStep, Scheduler, SchedulerError, SchedulerKind, SchedulerState,
    Steady,
    common::{advance_decodes, check_servable, complete_step, steady_decodes},
};
use crate::{
    kv_cache::KvCache,
    sequence::{Sequence, SequenceId, Sequences},
};

/// vLLM's V1 scheduler.
#[derive(Clone, Debug)]
pub struct VllmV1 {
    max_num_batched_tokens: u32,
    max_num_seqs: usize,
    max_model_len: u32,
    /// Most tokens of one sequence in a step; `u32::MAX` for no such limit.
    max_chunk_tokens: u32,
    /// Whether a sequence goes on while its newest token is in flight.
    is_async: bool,
    kv_cache: KvCache,
    sequences: Sequences,
    running: Vec<SequenceId>,
    waiting: Waiting,
    /// Prompt tokens of waiting sequences that another engine has computed.
    transferred: BTreeMap<SequenceId, u32>,
    num_steps_in_flight: u32,
    cadence: Option<Cadence>,
}

/// When a sequence may decode again in an asynchronous pipeline.
#[derive(Clone, Debug)]
struct Cadence {
    num_stages: u64,
    /// Number of the step that is formed.
    step: u64,
    /// The step from which on each sequence may be scheduled, by id.
    from_step: Vec<u64>,
}

impl VllmV1 {
    /// An idle scheduler for a deployment.
    ///
    /// # Errors
    /// When a key is out of range, or asks for an unknown policy.
    pub fn new(deployment: &Deployment) -> Result<Self, SchedulerError> {
        deployment.check().map_err(|(key, expected, found)| SchedulerError::Invalid {
            key,
            expected,
            found,
        })?;
        let waiting = match deployment.scheduling_policy.as_str() {
            "fcfs" => Waiting::fcfs(),
            "priority" => Waiting::priority(),
            other => {
                return Err(SchedulerError::Unsupported {
                    scheduler: SchedulerKind::VllmV1,
                    key: "scheduling_policy",
                    value: other.to_owned(),
                    supported: "fcfs and priority",
                });
            }
        };
        let (num_blocks, block_size) = (deployment.num_gpu_blocks, deployment.block_size);
        let num_stages = u64::from(deployment.pipeline_parallel_size);
        let has_cadence = deployment.async_scheduling && num_stages > 1;
        Ok(Self {
            max_num_batched_tokens: deployment.max_num_batched_tokens,
            max_num_seqs: deployment.max_num_seqs as usize,
            max_model_len: deployment.max_model_len,
            max_chunk_tokens: match deployment.long_prefill_token_threshold {
                0 => u32::MAX,
                threshold => threshold,
            },
            is_async: deployment.async_scheduling,
            kv_cache: if deployment.enable_prefix_caching {
                KvCache::with_prefix_caching(num_blocks, block_size)
            } else {
                KvCache::new(num_blocks, block_size)
            },
            sequences: Sequences::default(),
            running: Vec::new(),
            waiting,
            transferred: BTreeMap::new(),
            num_steps_in_flight: 0,
            cadence: has_cadence.then_some(Cadence { num_stages, step: 0, from_step: Vec::new() }),
        })
    }

    /// Gives running sequences their tokens, preempting when blocks run out.
    fn schedule_running(&mut self, step: &mut ScheduledStep, budget: &mut u32) {
        let mut next = 0;
        while next < self.running.len() && *budget > 0 {
            let id = self.running[next];
            let num_tokens = self.num_running_tokens(id).min(self.max_chunk_tokens).min(*budget);
            if num_tokens > 0 {
                let num_cached = self.sequences[id].num_computed_tokens + num_tokens;
                if !self.kv_cache.grow(id, num_cached)
                    && !self.make_room(id, num_cached, &mut next, step, budget)
                {
                    break;
                }
                self.push(id, num_tokens, step, budget);
            }
            next += 1;
        }
    }

    /// Tokens that a running sequence could compute now.
    #[inline]
    fn num_running_tokens(&self, id: SequenceId) -> u32 {
        let sequence = &self.sequences[id];
        if !self.is_async {
            return sequence.num_uncomputed_tokens();
        }
        self.num_async_tokens(id, sequence)
    }

    /// As [`Self::num_running_tokens`], where the newest token may be in flight.
    fn num_async_tokens(&self, id: SequenceId, sequence: &Sequence) -> u32 {
        let in_flight = sequence.num_in_flight_tokens;
        let is_last_in_flight = in_flight > 0 && sequence.num_remaining_tokens() <= in_flight;
        // With nothing in flight there is nothing to keep apart from.
        let is_early = self.num_steps_in_flight > 0
            && self.cadence.as_ref().is_some_and(|cadence| cadence.step < cadence.from_step[id.index()]);
        if is_last_in_flight || is_early {
            return 0;
        }
        (sequence.num_tokens() + in_flight).saturating_sub(sequence.num_computed_tokens)
    }

    /// Lets waiting sequences run while budget, seats and blocks last.
    fn schedule_waiting(&mut self, step: &mut ScheduledStep, budget: &mut u32) {
        while *budget > 0 && self.running.len() < self.max_num_seqs {
            let Some(id) = self.waiting.first() else { break };
            let num_known = self.sequences[id].num_tokens();
            let hit = self.kv_cache.find_prefix(id, self.sequences.request(id), num_known);
            if !self.kv_cache.can_hold_after(hit, num_known) {
                break;
            }
            self.waiting.remove_first();
            self.running.push(id);
            self.kv_cache.take_prefix(id, hit);
            let num_transferred = self.transferred.remove(&id).unwrap_or(0);
            let num_computed = num_transferred.max(hit.num_blocks * self.kv_cache.block_size());
            self.sequences[id].num_computed_tokens = num_computed;
            let num_tokens = (num_known - num_computed).min(self.max_chunk_tokens).min(*budget);
            let has_room = self.kv_cache.grow(id, num_computed + num_tokens);
            debug_assert!(has_room, "all its tokens fit");
            self.push(id, num_tokens, step, budget);
        }
    }

    /// Preempts until the sequence has blocks for `num_cached` tokens; false when it had to go itself.
    ///
    /// `next` is where it stands among the running.
    #[cold]
    fn make_room(
        &mut self,
        id: SequenceId,
        num_cached: u32,
        next: &mut usize,
        step: &mut ScheduledStep,
        budget: &mut u32,
    ) -> bool {
        loop {
            let Some(index) = self.waiting.victim(&self.running) else { return false };
            let victim = self.running.remove(index);
            if let Some(index) = step.sequences.iter().position(|s| s.id == victim) {
                let scheduled = step.sequences.remove(index);
                self.sequences[victim].num_in_flight_tokens -= u32::from(scheduled.samples);
                *budget += scheduled.num_tokens;
                // Only here: of a victim before it that the step leaves out, vLLM takes no account, and so passes over
                // the sequence after this one.
                *next -= 1;
            }
            self.kv_cache.free(victim);
            self.sequences[victim].num_computed_tokens = 0;
            self.waiting.put_back(victim);
            step.preempted.push(victim);
            if victim == id {
                return false;
            }
            if self.kv_cache.grow(id, num_cached) {
                return true;
            }
        }
    }

    fn push(&mut self, id: SequenceId, num_tokens: u32, step: &mut ScheduledStep, budget: &mut u32) {
        let sequence = &mut self.sequences[id];
        let context_len = sequence.num_computed_tokens;
        let (num_computed, num_known) = (context_len + num_tokens, sequence.num_tokens());
        // A sequence that came back before a token of it was out does not make that token again.
        let samples = num_computed == num_known + sequence.num_in_flight_tokens;
        sequence.num_computed_tokens = num_computed;
        sequence.num_in_flight_tokens += u32::from(samples);
        let is_decode = num_tokens == 1 && samples && context_len >= sequence.num_prompt_tokens;
        step.sequences.push(ScheduledSequence { id, num_tokens, context_len, is_decode, samples });
        *budget -= num_tokens;
        if self.kv_cache.has_prefix_caching() {
            // Tokens in flight are not known yet.
            self.kv_cache.publish(id, self.sequences.request(id), num_computed.min(num_known));
        }
        if samples && let Some(cadence) = &mut self.cadence {
            cadence.from_step[id.index()] = cadence.step + cadence.num_stages;
        }
    }

    fn insert(&mut self, request: &WorkloadRequest) -> Result<SequenceId, Rejection> {
        check_servable(request, self.max_model_len, &self.kv_cache)?;
        let id = self.sequences.insert(request);
        self.waiting.add(id, request);
        if let Some(cadence) = &mut self.cadence {
            cadence.from_step.resize(cadence.from_step.len().max(id.index() + 1), 0);
            cadence.from_step[id.index()] = 0;
        }
        Ok(id)
    }

    /// Whether one of the next steps, in which all running sequences decode, could take one from the queue.
    fn is_open(&self) -> bool {
        let num_running = self.running.len();
        let has_seat =
            num_running < self.max_num_seqs && (num_running as u64) < u64::from(self.max_num_batched_tokens);
        let Some(first) = self.waiting.first().filter(|_| has_seat) else { return false };
        // What is cached may come to hold its first tokens; without it, free blocks only become fewer.
        self.kv_cache.has_prefix_caching()
            || self.kv_cache.can_hold(first, self.sequences[first].num_tokens())
    }
}

impl Scheduler for VllmV1 {
    fn add(&mut self, request: &WorkloadRequest) -> Result<SequenceId, Rejection> {
        self.insert(request)
    }

    /// As a KV connector that loads while the step is formed (`num_external_computed_tokens`); the last prompt token is
    /// computed here, since the first output token comes out of it.
    fn add_transferred(
        &mut self,
        request: &WorkloadRequest,
        num_tokens: u32,
    ) -> Result<SequenceId, Rejection> {
        let id = self.insert(request)?;
        self.transferred.insert(id, num_tokens.min(request.num_prefill_tokens.saturating_sub(1)));
        Ok(id)
    }

    fn schedule(&mut self, step: &mut ScheduledStep) {
        step.clear();
        if let Some(cadence) = &mut self.cadence {
            cadence.step += 1;
        }
        loop {
            let num_preempted = step.preempted.len();
            let mut budget = self.max_num_batched_tokens;
            self.schedule_running(step, &mut budget);
            if step.preempted.len() == num_preempted {
                self.schedule_waiting(step, &mut budget);
                break;
            }
            // With priorities the first of the running may have to go itself, and vLLM then forms a step of nothing; it
            // takes no time, so the step after it stands for both.
            if !step.is_empty() {
                break;
            }
        }
        self.num_steps_in_flight += u32::from(!step.is_empty());
    }

    fn complete(&mut self, step: &ScheduledStep, finished: &mut Vec<SequenceId>) {
        self.num_steps_in_flight -= u32::from(!step.is_empty());
        let Self { running, sequences, kv_cache, .. } = self;
        if self.is_async && kv_cache.has_prefix_caching() {
            // What was computed from tokens in flight is full of known tokens now.
            for scheduled in step.sequences.iter().filter(|s| s.samples) {
                let sequence = &sequences[scheduled.id];
                let num_known =
                    sequence.num_computed_tokens.saturating_sub(sequence.num_in_flight_tokens - 1);
                kv_cache.publish(scheduled.id, sequences.request(scheduled.id), num_known);
            }
        }
        let num_running = running.len();
        complete_step(step, running, sequences, kv_cache, finished);
        if running.len() + finished.len() > num_running {
            // Preempted with the last token in flight.
            self.waiting.remove_all(finished);
        }
    }

    fn steady(&self) -> Option<Steady> {
        if self.is_open() || self.running.len() as u64 > u64::from(self.max_num_batched_tokens) {
            return None;
        }
        steady_decodes(&self.running, &self.sequences, &self.kv_cache)
    }

    fn advance(&mut self, num_steps: u32) {
        let Self { running, sequences, kv_cache, cadence, .. } = self;
        advance_decodes(running, sequences, kv_cache, num_steps);
        if kv_cache.has_prefix_caching() {
            publish_decodes(running, sequences, kv_cache, num_steps);
        }
        if let Some(cadence) = cadence {
            cadence.step += u64::from(num_steps);
            for id in running {
                cadence.from_step[id.index()] = cadence.step + cadence.num_stages;
            }
        }
    }

    fn running(&self) -> &[SequenceId] {
        &self.running
    }

    fn sequence(&self, id: SequenceId) -> &Sequence {
        &self.sequences[id]
    }

    fn state(&self) -> SchedulerState<'_> {
        SchedulerState {
            num_waiting: self.waiting.len(),
            num_running: self.running.len(),
            kv_cache: &self.kv_cache,
        }
    }
}

/// Makes the blocks known that filled in the last `num_steps` decodes of all of `running`, in the order in which single
/// steps would: of equal blocks the oldest is found.
fn publish_decodes(running: &[SequenceId], sequences: &Sequences, kv_cache: &mut KvCache, num_steps: u32) {
    let block_size = kv_cache.block_size() as usize;
    let mut filled = Vec::new();
    for (index, &id) in running.iter().enumerate() {
        let end = sequences[id].num_computed_tokens;
        let start = end - num_steps;
        let first = (start / block_size as u32 + 1).saturating_mul(block_size as u32);
        filled.extend(
            (first..=end).step_by(block_size).map(|num_tokens| (num_tokens - start, index, num_tokens)),
        );
    }
    filled.sort_unstable();
    for (_, index, num_tokens) in filled {
        kv_cache.publish(running[index], sequences.request(running[index]), num_tokens);
    }
}

//! `SGLang`'s scheduler: prefill first, prefixes shared through a radix tree, admission by what outputs may still need.
//!
//! The rules are those of `SGLang` 0.5.9, `python/sglang/srt/managers/scheduler.py` (`get_next_batch_to_run`,
//! `_get_new_batch_prefill_raw`, `update_running_batch`), `schedule_policy.py` (`SchedulePolicy`, `PrefillAdder`),
//! `schedule_batch.py` (`retract_decode`, `check_decode_mem`), `scheduler_output_processor_mixin.py`
//! (`process_batch_result_prefill`), and `mem_cache/` (see [`radix_cache`](crate::radix_cache)), with the server's
//! defaults:
//!
//! - A step is a prefill or a decode of all running sequences, never both (`enable_mixed_chunk` off). Whenever a
//!   prefill can be formed it goes first.
//! - Waiting requests are ordered by the length of their cached prefix, longest first (policy `lpm`); above 128, and
//!   without a prefix cache, they keep their order. A request whose prefix an earlier one is about to compute is put
//!   back.
//! - One is admitted while its uncomputed tokens and its output fit into what is free or evictable, less what others
//!   may still need: of a running sequence, `new_token_ratio` of the output to come. Where outputs have a known
//!   length and there is no prefix cache, the requests are played through to their ends instead.
//! - A prefill has a budget of `max_num_batched_tokens` tokens (`chunked_prefill_size`), in whole blocks, and of
//!   16,384 where it is of several requests (`max_prefill_tokens`). A prompt that exceeds it is chunked, one at a time;
//!   its next chunk is the first of the next prefill.
//! - When nothing more could be admitted, the queue is not looked at again before a sequence has ended or was retracted
//!   (`batch_is_full`). One that ends in a decode is missed only by the next decode, so the queue waits for that.
//! - When a decode finds no block even by eviction, sequences are retracted, those with the fewest outputs first (of
//!   these, the longest prompt), until the others can go on. They lose all, and go to the end of the queue.
//! - `new_token_ratio` begins at 0.7, falls with each decode to 0.098 in 600 of them, is set after a retraction to the
//!   share of all outputs that there will be 20 tokens later, and begins anew when there is nothing left to do.
//! - The prompt goes into the tree when its prefill ends (a chunk's tokens, when the next is formed), all of a
//!   sequence when it ends.
//! - With `pipeline_parallel_size` above 1, as many batches take turns, each with its own running sequences, at most
//!   their share of `max_num_seqs`; a batch in flight is passed over.
//!
//! Output lengths are known and end sequences, so `max_new_tokens` is `num_decode_tokens` and `ignore_eos` is set. The
//! deployment's `num_gpu_blocks` times `block_size` are `max_total_num_tokens`, `block_size` is `page_size`.
//! `scheduling_policy = fcfs` stands for `SGLang`'s default.
//!
//! What differs: `SGLang` cuts an output short that the cache could not hold together with its prompt; here such a
//! request is rejected. Where `SGLang` ends with an error for want of memory, the last sequence is retracted, too.

mod adder;
mod order;
#[cfg(test)]
mod tests;

use std::{cmp::Reverse, collections::VecDeque, mem};

use plumbline_schema::{Deployment, WorkloadRequest};

use self::adder::{Admission, PrefillAdder};
use super::{
    Rejection, ScheduledSequence, ScheduledStep, Scheduler, SchedulerError, SchedulerKind, SchedulerState,
    Steady,
    common::{check_cache, check_deployment, check_model_len, steady_decodes_at_most},
};
use crate::{
    kv_blocks::KvBlocks,
    radix_cache::RadixCache,
    sequence::{Sequence, SequenceId, Sequences},
};

/// `SGLANG_INIT_NEW_TOKEN_RATIO`, at `schedule_conservativeness` 1.
const INIT_NEW_TOKEN_RATIO: f64 = 0.7;
/// The ratio's floor: `SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR` of where it begins.
const MIN_NEW_TOKEN_RATIO: f64 = INIT_NEW_TOKEN_RATIO * 0.14;
/// What it falls by in a decode, to be at its floor in `SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS` of them.
const NEW_TOKEN_RATIO_DECAY: f64 = (INIT_NEW_TOKEN_RATIO - MIN_NEW_TOKEN_RATIO) / 600.0;
/// Decodes that a retraction makes room for (`SGLANG_RETRACT_DECODE_STEPS`).
const RETRACT_DECODE_STEPS: u32 = 20;

/// Batches that take turns; one without pipeline stages.
#[derive(Clone, Debug, Default)]
struct Lane {
    /// Nothing more can be admitted before a sequence ends (`batch_is_full`).
    is_full: bool,
    /// Sequences that ended in the latest decodes and still take seats.
    num_departed: usize,
    is_in_flight: bool,
}

/// A step in flight.
#[derive(Clone, Copy, Debug)]
struct Flight {
    lane: usize,
    is_prefill: bool,
    /// Whether one of its prefills goes on.
    has_chunk: bool,
    /// Whether nothing decoded beside it.
    was_empty: bool,
}

/// `SGLang`'s scheduler.
#[derive(Clone, Debug)]
pub struct Sglang {
    max_num_seqs: usize,
    max_model_len: u32,
    chunk_tokens: u32,
    cache: RadixCache,
    sequences: Sequences,
    /// Of all lanes.
    running: Vec<SequenceId>,
    waiting: VecDeque<SequenceId>,
    lanes: Vec<Lane>,
    next_lane: usize,
    /// By [`SequenceId`], of those that run.
    lane_of: Vec<usize>,
    /// The sequence whose prefill goes on; it runs, and is in no lane's decodes.
    chunked: Option<SequenceId>,
    new_token_ratio: f64,
    flights: VecDeque<Flight>,
    /// Retracted while no step could be formed.
    unreported: Vec<SequenceId>,
    /// Memory for the sequences of one lane.
    members: Vec<SequenceId>,
}

impl Sglang {
    /// An idle scheduler for a deployment.
    ///
    /// # Errors
    /// When a key is out of range, or asks for priorities, asynchronous scheduling or a prefill threshold.
    pub fn new(deployment: &Deployment) -> Result<Self, SchedulerError> {
        check_deployment(
            deployment,
            SchedulerKind::Sglang,
            [
                ("scheduling_policy", deployment.scheduling_policy.clone(), "fcfs"),
                ("async_scheduling", deployment.async_scheduling.to_string(), "false"),
                ("long_prefill_token_threshold", deployment.long_prefill_token_threshold.to_string(), "0"),
            ],
        )?;
        let (budget, block_size) = (deployment.max_num_batched_tokens, deployment.block_size);
        if !budget.is_multiple_of(block_size) {
            return Err(SchedulerError::Invalid {
                key: "max_num_batched_tokens",
                expected: format!("a multiple of block_size = {block_size}, as SGLang demands of its chunks"),
                found: budget.to_string(),
            });
        }
        let max_num_seqs = deployment.max_num_seqs as usize;
        let num_lanes = (deployment.pipeline_parallel_size as usize).min(max_num_seqs);
        Ok(Self {
            max_num_seqs,
            max_model_len: deployment.max_model_len,
            chunk_tokens: budget,
            cache: RadixCache::new(deployment.num_gpu_blocks, block_size, deployment.enable_prefix_caching),
            sequences: Sequences::default(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            lanes: vec![Lane::default(); num_lanes],
            next_lane: 0,
            lane_of: Vec::new(),
            chunked: None,
            new_token_ratio: INIT_NEW_TOKEN_RATIO,
            flights: VecDeque::new(),
            unreported: Vec::new(),
            members: Vec::new(),
        })
    }

    /// Forms a step of one lane, if it can.
    fn form(&mut self, lane: usize, step: &mut ScheduledStep) -> bool {
        if let Some(id) = self.chunked {
            // `stash_chunked_request`: from here on others find its tokens.
            self.cache.share(id, self.sequences.request(id), self.sequences[id].num_computed_tokens);
        }
        if self.prefill(lane, step) {
            return true;
        }
        if self.decodes_of(lane).next().is_some() {
            return self.decode(lane, step);
        }
        // An idle turn, in which the engine notices that all have left.
        let Lane { is_full, num_departed, .. } = mem::take(&mut self.lanes[lane]);
        if self.running.is_empty() {
            self.new_token_ratio = INIT_NEW_TOKEN_RATIO;
        }
        (is_full || num_departed > 0) && self.prefill(lane, step)
    }

    /// The sequences of a lane that decode, in their order.
    fn decodes_of(&self, lane: usize) -> impl Iterator<Item = SequenceId> {
        let is_member = move |id: &SequenceId| self.lane_of[id.index()] == lane && self.chunked != Some(*id);
        self.running.iter().copied().filter(is_member)
    }

    fn take_members(&mut self, lane: usize) -> Vec<SequenceId> {
        let mut members = mem::take(&mut self.members);
        members.clear();
        members.extend(self.decodes_of(lane));
        members
    }

    /// Requests that a prefill of a lane may take in, its chunk among them.
    fn num_seats(&self, num_listed: usize) -> usize {
        let num_lanes = self.lanes.len();
        let seats = (self.max_num_seqs / num_lanes).saturating_sub(num_listed);
        if num_lanes == 1 {
            return seats;
        }
        let num_others = self.running.len() - usize::from(self.chunked.is_some());
        seats.min(self.max_num_seqs.saturating_sub(num_others))
    }

    fn prefill(&mut self, lane: usize, step: &mut ScheduledStep) -> bool {
        let has_chunk = self.chunked.is_some();
        if (self.lanes[lane].is_full || self.waiting.is_empty()) && !has_chunk {
            return false;
        }
        let members = self.take_members(lane);
        let num_listed = members.len() + self.lanes[lane].num_departed;
        let num_seats = self.num_seats(num_listed);
        let planned = if num_seats == 0 && !has_chunk {
            self.lanes[lane].is_full = true;
            Vec::new()
        } else {
            self.plan_prefill(lane, &members, num_seats)
        };
        self.members = members;
        if planned.is_empty() {
            return false;
        }
        self.run_prefill(lane, &planned, step);
        self.lanes[lane].is_in_flight = true;
        let (has_chunk, was_empty) = (self.chunked.is_some(), num_listed == 0);
        self.flights.push_back(Flight { lane, is_prefill: true, has_chunk, was_empty });
        true
    }

    /// What the next prefill computes; those that it takes in leave the queue.
    fn plan_prefill(
        &mut self,
        lane: usize,
        members: &[SequenceId],
        num_seats: usize,
    ) -> Vec<(SequenceId, u32)> {
        order::by_longest_prefix(&mut self.waiting, &self.sequences, &mut self.cache);
        let is_full = &mut self.lanes[lane].is_full;
        let (ratio, chunk_tokens) = (self.new_token_ratio, self.chunk_tokens);
        let mut adder = PrefillAdder::new(&mut self.cache, &mut self.sequences, members, ratio, chunk_tokens);
        if let Some(id) = self.chunked {
            adder.add_chunk(id);
        }
        while let Some(&id) = self.waiting.front() {
            *is_full |= adder.planned.len() >= num_seats;
            if *is_full {
                break;
            }
            let num_before = adder.planned.len();
            let admission = adder.add(id);
            if adder.planned.len() > num_before {
                self.waiting.pop_front();
            }
            *is_full |= admission == Admission::NoMemory;
            if admission != Admission::Continue {
                break;
            }
        }
        self.chunked = adder.chunked;
        adder.planned
    }

    /// Gives a prefill its blocks and puts it into `step`.
    fn run_prefill(&mut self, lane: usize, planned: &[(SequenceId, u32)], step: &mut ScheduledStep) {
        let block_size = self.cache.block_size();
        let num_tokens: u32 = planned.iter().map(|&(_, num_tokens)| num_tokens).sum();
        // With pages the engine makes room for one more of each request.
        let num_more = if block_size > 1 { planned.len() as u32 } else { 0 };
        self.cache.reserve(num_tokens.div_ceil(block_size) + num_more);
        for &(id, num_tokens) in planned {
            let sequence = &mut self.sequences[id];
            let context_len = sequence.num_computed_tokens;
            sequence.num_computed_tokens += num_tokens;
            let has_room = self.cache.grow(id, sequence.num_computed_tokens);
            assert!(
                has_room,
                "{num_tokens} tokens were planned for, {} blocks are free",
                self.cache.num_free()
            );
            let samples = sequence.num_uncomputed_tokens() == 0;
            sequence.num_in_flight_tokens += u32::from(samples);
            step.sequences.push(ScheduledSequence { id, num_tokens, context_len, is_decode: false, samples });
            // A chunk's sequence comes last each time, among those that it ends with.
            if context_len > 0 && self.running.contains(&id) {
                self.running.retain(|&other| other != id);
            }
            self.running.push(id);
            self.lane_of.resize(self.lane_of.len().max(id.index() + 1), 0);
            self.lane_of[id.index()] = lane;
        }
    }

    fn decode(&mut self, lane: usize, step: &mut ScheduledStep) -> bool {
        let mut members = self.take_members(lane);
        let mut is_smaller = mem::take(&mut self.lanes[lane].num_departed) > 0;
        let mut has_room = self.reserve_decodes(&members);
        if has_room {
            self.decay_new_token_ratio();
        } else {
            let num_before = members.len();
            has_room = self.retract(lane, &mut members, step);
            is_smaller |= members.len() < num_before;
        }
        if is_smaller {
            self.lanes[lane].is_full = false;
        }
        if has_room {
            // With pages the engine makes room for one of each.
            self.cache.reserve(members.len() as u32);
            for &id in &members {
                let sequence = &mut self.sequences[id];
                let context_len = sequence.num_computed_tokens;
                sequence.num_computed_tokens += 1;
                sequence.num_in_flight_tokens += 1;
                let has_room = self.cache.grow(id, context_len + 1);
                assert!(has_room, "a decode was planned for, {} blocks are free", self.cache.num_free());
                step.sequences.push(ScheduledSequence {
                    id,
                    num_tokens: 1,
                    context_len,
                    is_decode: true,
                    samples: true,
                });
            }
            self.lanes[lane].is_in_flight = true;
            self.flights.push_back(Flight { lane, is_prefill: false, has_chunk: false, was_empty: false });
        }
        self.members = members;
        has_room
    }

    fn decay_new_token_ratio(&mut self) {
        self.new_token_ratio = (self.new_token_ratio - NEW_TOKEN_RATIO_DECAY).max(MIN_NEW_TOKEN_RATIO);
    }

    /// Makes room for a token of each; false when there is none (`check_decode_mem`).
    fn reserve_decodes(&mut self, ids: &[SequenceId]) -> bool {
        let block_size = self.cache.block_size();
        let is_at_end =
            |id: &&SequenceId| self.sequences[**id].num_computed_tokens.is_multiple_of(block_size);
        let num_blocks = ids.iter().filter(is_at_end).count();
        self.cache.reserve(num_blocks as u32)
    }

    /// Takes sequences of a lane out until the others can decode, but for one; false when even that cannot
    /// (`retract_decode`).
    fn retract(&mut self, lane: usize, members: &mut Vec<SequenceId>, step: &mut ScheduledStep) -> bool {
        // Stable, so that of equals the latest goes.
        members.sort_by_key(|&id| {
            let sequence = &self.sequences[id];
            (Reverse(sequence.num_output_tokens), sequence.num_prompt_tokens)
        });
        let mut is_first = true;
        while members.len() > 1 && (is_first || !self.reserve_decodes(members)) {
            is_first = false;
            if let Some(id) = members.pop() {
                self.take_out(id, step);
            }
            let num_tokens = members.len() as u32 * RETRACT_DECODE_STEPS;
            self.cache.reserve(num_tokens.div_ceil(self.cache.block_size()));
        }
        let (lane_of, chunked) = (&self.lane_of, self.chunked);
        self.running.retain(|&id| lane_of[id.index()] != lane || chunked == Some(id));
        self.running.extend_from_slice(members);

        let sum = |of: fn(&Sequence) -> u32| {
            members.iter().map(|&id| f64::from(of(&self.sequences[id]))).sum::<f64>()
        };
        let expected = sum(|s| s.num_output_tokens) + f64::from(RETRACT_DECODE_STEPS) * members.len() as f64;
        self.new_token_ratio = (expected / (sum(|s| s.max_output_tokens) + 1.0)).min(1.0);
        self.reserve_decodes(members)
    }

    /// Takes all blocks of a running sequence and sends it to the end of the queue.
    fn take_out(&mut self, id: SequenceId, step: &mut ScheduledStep) {
        self.cache.release(id, self.sequences.request(id), 0);
        self.sequences[id].num_computed_tokens = 0;
        self.running.retain(|&other| other != id);
        self.waiting.push_back(id);
        step.preempted.push(id);
    }

    /// Takes the latest decoding sequence out, where nothing is in flight and no lane can go on; false when there is
    /// none.
    fn take_out_latest(&mut self, step: &mut ScheduledStep) -> bool {
        let latest = self.running.iter().rev().find(|&&id| self.chunked != Some(id)).copied();
        if let Some(id) = latest {
            self.lanes[self.lane_of[id.index()]].is_full = false;
            self.take_out(id, step);
        }
        latest.is_some()
    }
}

impl Scheduler for Sglang {
    fn add(&mut self, request: &WorkloadRequest) -> Result<SequenceId, Rejection> {
        let num_tokens = check_model_len(request, self.max_model_len)?;
        check_cache(num_tokens - 1, self.cache.num_blocks(), self.cache.block_size())?;
        let num_tokens = u64::from(num_tokens);
        let capacity = u64::from(self.cache.num_blocks()) * u64::from(self.cache.block_size());
        // `max_req_len` less one; admission counts whole blocks, so with pages a little less can be promised.
        let max_tokens = capacity.saturating_sub(1 + u64::from(self.cache.block_size()));
        if num_tokens > max_tokens {
            return Err(Rejection::LongerThanPlanned {
                scheduler: SchedulerKind::Sglang,
                num_tokens,
                max_tokens,
            });
        }
        let id = self.sequences.insert(request);
        self.waiting.push_back(id);
        Ok(id)
    }

    fn schedule(&mut self, step: &mut ScheduledStep) {
        step.clear();
        step.preempted.append(&mut self.unreported);
        loop {
            for _ in 0..self.lanes.len() {
                let lane = self.next_lane;
                self.next_lane = (lane + 1) % self.lanes.len();
                if !self.lanes[lane].is_in_flight && self.form(lane, step) {
                    return;
                }
            }
            if !self.flights.is_empty() || !self.take_out_latest(step) {
                break;
            }
        }
        self.unreported.append(&mut step.preempted);
    }

    fn complete(&mut self, step: &ScheduledStep, finished: &mut Vec<SequenceId>) {
        finished.clear();
        if step.is_empty() {
            return;
        }
        let Some(flight) = self.flights.pop_front() else { return };
        for s in step.sequences.iter().filter(|s| s.samples) {
            let sequence = &mut self.sequences[s.id];
            sequence.num_output_tokens += 1;
            sequence.num_in_flight_tokens -= 1;
            let (num_computed, is_done) =
                (sequence.num_computed_tokens, sequence.num_output_tokens >= sequence.max_output_tokens);
            let request = self.sequences.request(s.id);
            if is_done {
                self.cache.release(s.id, request, num_computed);
                self.sequences.remove(s.id);
                finished.push(s.id);
            } else if flight.is_prefill {
                self.cache.share(s.id, request, num_computed);
            }
        }
        if !finished.is_empty() {
            // Few finish in one step, so a scan beats a set.
            self.running.retain(|id| !finished.contains(id));
        }
        let lane = &mut self.lanes[flight.lane];
        lane.is_in_flight = false;
        if flight.is_prefill {
            let num_left = step.sequences.len() - finished.len() - usize::from(flight.has_chunk);
            let is_smaller = !finished.is_empty() || flight.has_chunk;
            lane.is_full &= !(is_smaller || (flight.was_empty && num_left > 0));
        } else {
            lane.num_departed += finished.len();
        }
        if self.sequences.is_empty() {
            self.lanes.fill(Lane::default());
            self.new_token_ratio = INIT_NEW_TOKEN_RATIO;
        }
    }

    fn steady(&self) -> Option<Steady> {
        let [lane] = &self.lanes[..] else { return None };
        let is_closed = self.waiting.is_empty() || (lane.is_full && lane.num_departed == 0);
        if !is_closed || self.chunked.is_some() || !self.unreported.is_empty() {
            return None;
        }
        // Without eviction: each decode finds a block for every sequence, which makes up for odd ends.
        let blocks_each = self.cache.num_empty() / (self.running.len() as u32).max(1);
        let max_steps = blocks_each.saturating_sub(1).saturating_mul(self.cache.block_size());
        steady_decodes_at_most(max_steps, &self.running, &self.sequences)
    }

    fn advance(&mut self, num_steps: u32) {
        if num_steps == 0 {
            return;
        }
        let lane = &mut self.lanes[0];
        lane.is_full &= mem::take(&mut lane.num_departed) == 0;
        for _ in 0..num_steps {
            if self.new_token_ratio <= MIN_NEW_TOKEN_RATIO {
                break;
            }
            self.decay_new_token_ratio();
        }
        for &id in &self.running {
            let sequence = &mut self.sequences[id];
            sequence.num_computed_tokens += num_steps;
            sequence.num_output_tokens += num_steps;
            let has_room = self.cache.grow(id, sequence.num_computed_tokens);
            debug_assert!(has_room, "promised steps have blocks");
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
            kv_cache: &self.cache,
        }
    }
}

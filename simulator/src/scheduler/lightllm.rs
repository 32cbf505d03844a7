//! `LightLLM`'s scheduler: a request is let in when the peak of token use to come fits the cache.
//!
//! The rules are those of `LightLLM` at commit 0a9118e6d22d (January 2025, the last in which a decision is made for the
//! step at hand and not one ahead), `lightllm/server/router/manager.py` (`_step`, `_can_decode`),
//! `req_queue/continues_batch/impl.py` (`generate_new_batch`, `_can_add_new_req`), `pause_strategy.py` (`Fcfs`,
//! `select_paused_reqs`) and `lightllm/server/io_struct.py` (`NormalReq.get_tuple_tokens`); Vidur's
//! `vidur/scheduler/replica_scheduler/lightllm_replica_scheduler.py` has the same forecast.
//!
//! - A step is a prefill of new requests, whole, or a decode of all running ones. New ones are looked for when none
//!   run, after each prefill, and else after every 10 decodes (`router_max_wait_tokens`).
//! - Requests are taken in order while three things hold: they and those that run or are paused are at most
//!   `max_num_seqs` (`running_max_req_size`); the prompts of the step, with outputs to be recomputed, are at most
//!   `max_num_batched_tokens` tokens (`batch_max_tokens`); and the forecast peak is below the tokens of the cache
//!   (`max_total_token_num`). The first that does not fit ends it.
//! - The forecast: all sequences grow by a token a step and give theirs back when they end. Sorted by remaining output,
//!   longest first, the tokens in use when the i-th of them ends are what the first i occupy now plus i times its
//!   remaining output. The peak is the largest of these sums.
//! - Prefixes are not shared, and memory is counted in tokens, not in blocks: the cache has
//!   `num_gpu_blocks x block_size` blocks of one token.
//! - When the cache lacks a token for each running sequence, the newest are paused: they lose all, wait at the front,
//!   and come back with their outputs recomputed.
//!
//! The forecast needs the output length. `LightLLM` takes `max_new_tokens` when the server is busy, and by its defaults
//! (`router_token_ratio` 0) it always is; or else 1.1 times the output so far, at least 1024. Here outputs have a
//! known length, so `max_new_tokens` is `num_decode_tokens`, and with one step in flight the forecast is exact: nothing
//! is paused. With several in flight sequences get out of step, and pauses happen; a sequence in flight is passed over
//! and not paused.
//!
//! `LightLLM` does not chunk prompts in this mode and demands a `batch_max_tokens` for the longest request; a request
//! longer than that, or too long for the forecast of an empty engine, is rejected.

use std::collections::VecDeque;

use plumbline_schema::{Deployment, WorkloadRequest};

use super::{
    Rejection, ScheduledSequence, ScheduledStep, Scheduler, SchedulerError, SchedulerKind, SchedulerState,
    Steady,
    common::{advance_decodes, check_deployment, check_servable, complete_step, steady_decodes},
};
use crate::{
    kv_cache::KvCache,
    sequence::{Sequence, SequenceId, Sequences},
};

/// Decodes between two looks at the queue (`router_max_wait_tokens`).
const MAX_WAIT_STEPS: u32 = 10;

/// `LightLLM`'s scheduler.
#[derive(Clone, Debug)]
pub struct Lightllm {
    max_num_batched_tokens: u32,
    max_num_seqs: usize,
    max_model_len: u32,
    /// Of blocks of one token.
    kv_cache: KvCache,
    sequences: Sequences,
    running: Vec<SequenceId>,
    waiting: VecDeque<SequenceId>,
    /// Paused sequences; they wait, and keep their seats.
    paused: Vec<SequenceId>,
    /// When each sequence came, by [`SequenceId`].
    came: Vec<u64>,
    num_received: u64,
    /// Decodes since the queue was last looked at (`has_wait_tokens`).
    num_wait_steps: u32,
}

/// What a sequence occupies at its next step and how much it may grow after that, in tokens.
type Need = (u64, u64);

impl Lightllm {
    /// An idle scheduler for a deployment.
    ///
    /// # Errors
    /// When a key is out of range, or asks for prefix caching, priorities, asynchronous scheduling, a prefill threshold
    /// or pipeline stages.
    pub fn new(deployment: &Deployment) -> Result<Self, SchedulerError> {
        check_deployment(
            deployment,
            SchedulerKind::Lightllm,
            [
                ("enable_prefix_caching", deployment.enable_prefix_caching.to_string(), "false"),
                ("scheduling_policy", deployment.scheduling_policy.clone(), "fcfs"),
                ("async_scheduling", deployment.async_scheduling.to_string(), "false"),
                ("long_prefill_token_threshold", deployment.long_prefill_token_threshold.to_string(), "0"),
                ("pipeline_parallel_size", deployment.pipeline_parallel_size.to_string(), "1"),
            ],
        )?;
        let num_tokens = deployment.num_gpu_blocks.saturating_mul(deployment.block_size);
        Ok(Self {
            max_num_batched_tokens: deployment.max_num_batched_tokens,
            max_num_seqs: deployment.max_num_seqs as usize,
            max_model_len: deployment.max_model_len,
            // One more, since the cache keeps a null block.
            kv_cache: KvCache::new(num_tokens.saturating_add(1), 1),
            sequences: Sequences::default(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            paused: Vec::new(),
            came: Vec::new(),
            num_received: 0,
            num_wait_steps: 0,
        })
    }

    /// Whether no further request has a seat.
    fn is_full(&self) -> bool {
        self.running.len() + self.paused.len() >= self.max_num_seqs
    }

    /// What a running sequence needs (`get_tuple_tokens`, `RUNNING`).
    fn running_need(&self, id: SequenceId) -> Need {
        let sequence = &self.sequences[id];
        // One in flight has its next token already.
        let num_to_come = u32::from(sequence.is_in_flight);
        let growth = sequence.num_remaining_tokens().saturating_sub(1 + num_to_come);
        (u64::from(sequence.num_tokens() + num_to_come), u64::from(growth))
    }

    /// What a waiting one needs (`WAIT_IN_QUEUE`, `PAUSED_AND_OFFLOAD`).
    fn waiting_need(&self, id: SequenceId) -> Need {
        let sequence = &self.sequences[id];
        let remaining = sequence.num_remaining_tokens();
        (u64::from(sequence.num_tokens()) + 1, u64::from(remaining.saturating_sub(2)))
    }

    /// Forms a prefill of waiting requests, if any can be let in.
    fn prefill(&mut self, step: &mut ScheduledStep) -> bool {
        if self.waiting.is_empty() || self.is_full() {
            return false;
        }
        let mut needs: Vec<Need> = self.running.iter().map(|&id| self.running_need(id)).collect();
        needs.sort_by_key(|&(_, growth)| std::cmp::Reverse(growth));
        let mut num_batched = 0;
        while let Some(&id) = self.waiting.front() {
            let is_paused = self.paused.contains(&id);
            insert(&mut needs, self.waiting_need(id));
            let num_seqs = needs.len() + self.paused.len() - usize::from(is_paused);
            num_batched += self.sequences[id].num_tokens();
            if peak(&needs) >= u64::from(self.kv_cache.num_blocks())
                || num_seqs > self.max_num_seqs
                || num_batched > self.max_num_batched_tokens
                // Only where sequences are out of step is there less than the forecast says.
                || !self.kv_cache.grow(id, self.sequences[id].num_tokens())
            {
                break;
            }
            self.waiting.pop_front();
            self.paused.retain(|&other| other != id);
            self.running.push(id);
            let num_tokens = self.sequences[id].num_tokens();
            self.push(id, num_tokens, false, step);
        }
        !step.is_empty()
    }

    /// Forms a decode of all sequences not in flight, pausing the newest where the cache lacks tokens.
    fn decode(&mut self, step: &mut ScheduledStep) {
        let mut idle: Vec<SequenceId> =
            self.running.iter().copied().filter(|&id| !self.sequences[id].is_in_flight).collect();
        self.num_wait_steps += 1;
        if idle.len() > self.kv_cache.num_free() as usize {
            let victims = self.victims(&idle);
            if victims.len() == idle.len() {
                // Those in flight have all there is. They end, or are paused when their turn comes.
                return;
            }
            for &id in &victims {
                self.pause(id, step);
            }
            idle.retain(|id| !victims.contains(id));
            // The pause takes a turn of the loop, the decode the next.
            self.num_wait_steps = 1;
        }
        for id in idle {
            let has_room = self.kv_cache.grow(id, self.sequences[id].num_computed_tokens + 1);
            assert!(has_room, "a token of each was free, {} are left", self.kv_cache.num_free());
            self.push(id, 1, true, step);
        }
    }

    /// The newest of `idle`, newest first, without which the others find a token each.
    fn victims(&self, idle: &[SequenceId]) -> Vec<SequenceId> {
        let mut victims = idle.to_vec();
        victims.sort_by_key(|id| std::cmp::Reverse(self.came[id.index()]));
        let (mut num_paused, mut num_free) = (0, self.kv_cache.num_free() as usize);
        while num_paused < idle.len() && idle.len() - num_paused > num_free {
            num_free += self.kv_cache.block_table(victims[num_paused]).len();
            num_paused += 1;
        }
        victims.truncate(num_paused);
        victims
    }

    fn pause(&mut self, id: SequenceId, step: &mut ScheduledStep) {
        self.kv_cache.free(id);
        self.sequences[id].num_computed_tokens = 0;
        self.running.retain(|&other| other != id);
        self.waiting.push_front(id);
        self.paused.push(id);
        step.preempted.push(id);
    }

    fn push(&mut self, id: SequenceId, num_tokens: u32, is_decode: bool, step: &mut ScheduledStep) {
        let sequence = &mut self.sequences[id];
        let context_len = sequence.num_computed_tokens;
        sequence.num_computed_tokens += num_tokens;
        sequence.is_in_flight = true;
        step.sequences.push(ScheduledSequence { id, num_tokens, context_len, is_decode, samples: true });
    }
}

/// Puts a need in, where the one that grows longest stands first.
fn insert(needs: &mut Vec<Need>, need: Need) {
    let at = needs.partition_point(|other| other.1 >= need.1);
    needs.insert(at, need);
}

/// The most tokens in use at once, of sequences sorted by growth, the longest first.
fn peak(needs: &[Need]) -> u64 {
    let mut occupied = 0;
    (1..)
        .zip(needs)
        .map(|(num_left, &(now, growth))| {
            occupied += now;
            occupied + num_left * growth
        })
        .max()
        .unwrap_or(0)
}

impl Scheduler for Lightllm {
    fn add(&mut self, request: &WorkloadRequest) -> Result<SequenceId, Rejection> {
        check_servable(request, self.max_model_len, &self.kv_cache)?;
        let num_tokens = u64::from(request.num_prefill_tokens) + u64::from(request.num_decode_tokens);
        let max_planned = u64::from(self.kv_cache.num_blocks()).saturating_sub(1);
        let max_tokens = max_planned.min(u64::from(self.max_num_batched_tokens));
        if num_tokens > max_tokens {
            return Err(Rejection::LongerThanPlanned {
                scheduler: SchedulerKind::Lightllm,
                num_tokens,
                max_tokens,
            });
        }
        let id = self.sequences.insert(request);
        self.came.resize(self.came.len().max(id.index() + 1), 0);
        self.came[id.index()] = self.num_received;
        self.num_received += 1;
        self.waiting.push_back(id);
        Ok(id)
    }

    fn schedule(&mut self, step: &mut ScheduledStep) {
        step.clear();
        let is_any_idle = self.running.iter().any(|&id| !self.sequences[id].is_in_flight);
        if !is_any_idle || self.num_wait_steps >= MAX_WAIT_STEPS {
            let is_formed = self.prefill(step);
            self.num_wait_steps = if is_formed { MAX_WAIT_STEPS } else { 0 };
        }
        if step.is_empty() {
            self.decode(step);
        }
    }

    fn complete(&mut self, step: &ScheduledStep, finished: &mut Vec<SequenceId>) {
        let Self { running, sequences, kv_cache, .. } = self;
        complete_step(step, running, sequences, kv_cache, finished);
    }

    fn steady(&self) -> Option<Steady> {
        let steady = steady_decodes(&self.running, &self.sequences, &self.kv_cache)?;
        if self.waiting.is_empty() || self.is_full() {
            return Some(steady);
        }
        // The queue is looked at before the decode that follows.
        let num_steps = steady.num_steps.min(MAX_WAIT_STEPS.saturating_sub(self.num_wait_steps));
        (num_steps > 0).then_some(Steady { num_steps, ..steady })
    }

    fn advance(&mut self, num_steps: u32) {
        let Self { running, sequences, kv_cache, .. } = self;
        advance_decodes(running, sequences, kv_cache, num_steps);
        if let Some(more) = num_steps.checked_sub(1) {
            // As if counted one by one, from 1 again after each look at the queue, which finds nothing.
            self.num_wait_steps = (self.num_wait_steps % MAX_WAIT_STEPS + more) % MAX_WAIT_STEPS + 1;
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

#[cfg(test)]
mod tests {
    use super::{
        super::laws::{deployment, line, rejection, request, steps},
        *,
    };

    fn step(scheduler: &mut Lightllm) -> String {
        let mut step = ScheduledStep::default();
        scheduler.schedule(&mut step);
        scheduler.complete(&step, &mut Vec::new());
        line(&step)
    }

    /// After a prefill the queue is looked at once more, then after every tenth decode.
    #[test]
    fn a_request_that_comes_during_decodes_waits_for_the_tenth() {
        let mut scheduler = Lightllm::new(&deployment()).unwrap();
        scheduler.add(&request(4, 28)).unwrap();
        assert_eq!(step(&mut scheduler), "4:0||");
        scheduler.add(&request(5, 2)).unwrap();
        assert_eq!(step(&mut scheduler), "5:0||");
        assert_eq!(step(&mut scheduler), "|4;5|");
        scheduler.add(&request(6, 2)).unwrap();
        let decodes: Vec<_> = (0..9).map(|_| step(&mut scheduler)).collect();
        assert_eq!(decodes[..2], ["|5|", "|6|"]);
        assert_eq!(decodes[8], "|13|");
        assert_eq!(step(&mut scheduler), "6:0||");
    }

    /// Two of prompt 10 and output 20 are 2 x (11 + 18) = 58 tokens when they end together.
    #[test]
    fn a_request_is_let_in_when_the_peak_fits() {
        let with_tokens = |num_gpu_blocks| Deployment { num_gpu_blocks, block_size: 1, ..deployment() };
        let requests = [(10, 20), (10, 20)];
        assert_eq!(steps(SchedulerKind::Lightllm, &with_tokens(59), &requests)[0], "10:0;10:0||");
        assert_eq!(steps(SchedulerKind::Lightllm, &with_tokens(58), &requests)[0], "10:0||");
    }

    /// A short one ends long before the long one's peak: max(11 + 18, 22 + 2 x 3).
    #[test]
    fn a_short_request_uses_what_a_long_one_will_need_later() {
        let deployment = Deployment { num_gpu_blocks: 31, block_size: 1, ..deployment() };
        let lines = steps(SchedulerKind::Lightllm, &deployment, &[(10, 20), (10, 5)]);
        assert_eq!(lines[..2], ["10:0;10:0||", "|10;10|"]);
        assert!(lines.iter().all(|line| line.ends_with('|')), "nothing is paused: {lines:?}");
        assert_eq!(lines.len(), 1 + 19);
    }

    #[test]
    fn a_prefill_is_whole_and_within_the_budget() {
        let lines = steps(SchedulerKind::Lightllm, &deployment(), &[(20, 2), (20, 2), (8, 1)]);
        assert_eq!(lines, ["20:0||", "20:0;8:0||", "|20;20|"]);
    }

    #[test]
    fn needs_are_summed_from_the_longest_to_come() {
        let mut needs = Vec::new();
        for need in [(7, 1), (3, 9), (5, 4)] {
            insert(&mut needs, need);
        }
        assert_eq!(needs, [(3, 9), (5, 4), (7, 1)]);
        assert_eq!(peak(&needs), 18, "of 3 + 9, 8 + 2 x 4 and 15 + 3 x 1");
        assert_eq!(peak(&[]), 0);
    }

    #[test]
    fn what_can_never_be_served_is_rejected_by_name() {
        let refused = |deployment: &Deployment, prefill, decode| {
            rejection(SchedulerKind::Lightllm, deployment, prefill, decode)
        };
        assert_eq!(
            refused(&deployment(), 100, 29),
            "129 tokens of prompt and output exceed max_model_len = 128"
        );
        assert_eq!(
            refused(&deployment(), 30, 3),
            "33 tokens of prompt and output exceed the 32 that lightllm plans for at most"
        );
        let small = Deployment { num_gpu_blocks: 5, ..deployment() };
        assert_eq!(refused(&small, 20, 2), "21 cached tokens need more than the 20 usable KV blocks of 1");
        assert_eq!(
            refused(&small, 18, 2),
            "20 tokens of prompt and output exceed the 19 that lightllm plans for at most"
        );
        assert_eq!(steps(SchedulerKind::Lightllm, &small, &[(17, 2)]), ["17:0||", "|17|"]);
    }

    #[test]
    fn what_is_not_modelled_is_refused_by_name() {
        let refused = |deployment: Deployment| Lightllm::new(&deployment).unwrap_err().to_string();
        for (deployment, key) in [
            (
                Deployment { enable_prefix_caching: true, ..deployment() },
                "`enable_prefix_caching = true`, only false",
            ),
            (
                Deployment { scheduling_policy: "priority".into(), ..deployment() },
                "`scheduling_policy = priority`, only fcfs",
            ),
            (Deployment { async_scheduling: true, ..deployment() }, "`async_scheduling = true`, only false"),
            (
                Deployment { long_prefill_token_threshold: 8, ..deployment() },
                "`long_prefill_token_threshold = 8`, only 0",
            ),
            (
                Deployment { pipeline_parallel_size: 2, ..deployment() },
                "`pipeline_parallel_size = 2`, only 1",
            ),
        ] {
            assert_eq!(refused(deployment), format!("scheduler lightllm does not model {key}"));
        }
    }
}

//! vLLM's V1 scheduler, without prefix caching and priorities.
//!
//! The rules are those of vLLM 0.24.0, `vllm/v1/core/sched/scheduler.py` (`schedule`, `_preempt_request`,
//! `update_from_output`) and `vllm/v1/core/kv_cache_manager.py` (`allocate_slots`):
//!
//! - There is no prefill phase or decode phase: each sequence has computed and known tokens, and a step
//!   lets the computed catch up, within one budget of `max_num_batched_tokens` tokens for all.
//! - Running sequences come first, in the order in which they began to run.
//!   `long_prefill_token_threshold`, when set, caps one sequence's tokens in a step.
//! - When a running sequence finds no free block, the last running one loses all its blocks and returns
//!   to the front of the queue, to be recomputed from its first token; this repeats until there is room
//!   or the sequence itself was the last.
//! - After a preemption nothing is taken from the queue in the same step. Otherwise sequences are taken
//!   in order while the budget, `max_num_seqs` and the blocks allow. The first that does not fit ends it.
//! - A queued sequence is taken only when all tokens known of it fit into the free blocks
//!   (`scheduler_reserve_full_isl`, on by default), even where its first chunk is smaller. The default
//!   watermark is 0, so no further blocks are kept free.

use std::collections::VecDeque;

use plumbline_schema::{Deployment, WorkloadRequest};

use super::{
    Rejection, ScheduledSequence, ScheduledStep, Scheduler, SchedulerError, SchedulerKind, SchedulerState,
    Steady,
    common::{advance_decodes, check_servable, complete_step, steady_decodes},
};
use crate::{
    kv_cache::KvCache,
    sequence::{Sequence, SequenceId, Sequences},
};

/// vLLM's V1 scheduler, first come first served.
#[derive(Clone, Debug)]
pub struct VllmV1 {
    max_num_batched_tokens: u32,
    max_num_seqs: usize,
    max_model_len: u32,
    /// Most tokens of one sequence in a step; `u32::MAX` for no such limit.
    max_chunk_tokens: u32,
    kv_cache: KvCache,
    sequences: Sequences,
    running: Vec<SequenceId>,
    waiting: VecDeque<SequenceId>,
}

impl VllmV1 {
    /// An idle scheduler for a deployment.
    ///
    /// # Errors
    /// When a key is out of range, or asks for prefix caching, priorities or asynchronous scheduling.
    pub fn new(deployment: &Deployment) -> Result<Self, SchedulerError> {
        deployment.check().map_err(|(key, expected, found)| SchedulerError::Invalid {
            key,
            expected,
            found,
        })?;
        let unsupported = |key, value: String, supported| SchedulerError::Unsupported {
            scheduler: SchedulerKind::VllmV1,
            key,
            value,
            supported,
        };
        if deployment.enable_prefix_caching {
            return Err(unsupported("enable_prefix_caching", "true".into(), "false"));
        }
        if deployment.scheduling_policy != "fcfs" {
            return Err(unsupported("scheduling_policy", deployment.scheduling_policy.clone(), "fcfs"));
        }
        if deployment.async_scheduling {
            return Err(unsupported("async_scheduling", "true".into(), "false"));
        }
        Ok(Self {
            max_num_batched_tokens: deployment.max_num_batched_tokens,
            max_num_seqs: deployment.max_num_seqs as usize,
            max_model_len: deployment.max_model_len,
            max_chunk_tokens: match deployment.long_prefill_token_threshold {
                0 => u32::MAX,
                threshold => threshold,
            },
            kv_cache: KvCache::new(deployment.num_gpu_blocks, deployment.block_size),
            sequences: Sequences::default(),
            running: Vec::new(),
            waiting: VecDeque::new(),
        })
    }

    /// Gives running sequences their tokens, preempting from the end when blocks run out.
    fn schedule_running(&mut self, step: &mut ScheduledStep, budget: &mut u32) {
        let mut next = 0;
        while next < self.running.len() && *budget > 0 {
            let id = self.running[next];
            let num_tokens = self.num_new_tokens(id, *budget);
            if !self.make_room(id, num_tokens, step) {
                break;
            }
            self.push(id, num_tokens, step, budget);
            next += 1;
        }
    }

    /// Lets waiting sequences run while budget, seats and blocks last.
    fn schedule_waiting(&mut self, step: &mut ScheduledStep, budget: &mut u32) {
        while *budget > 0 && self.running.len() < self.max_num_seqs {
            let Some(&id) = self.waiting.front() else { break };
            let num_tokens = self.num_new_tokens(id, *budget);
            let fits_whole = self.kv_cache.can_hold(id, self.sequences[id].num_tokens());
            if !fits_whole || !self.kv_cache.grow(id, num_tokens) {
                break;
            }
            self.waiting.pop_front();
            self.running.push(id);
            self.push(id, num_tokens, step, budget);
        }
    }

    fn num_new_tokens(&self, id: SequenceId, budget: u32) -> u32 {
        self.sequences[id].num_uncomputed_tokens().min(self.max_chunk_tokens).min(budget)
    }

    /// Gets blocks for `num_tokens` more tokens; false when the sequence itself had to go.
    fn make_room(&mut self, id: SequenceId, num_tokens: u32, step: &mut ScheduledStep) -> bool {
        let num_cached = self.sequences[id].num_computed_tokens + num_tokens;
        while !self.kv_cache.grow(id, num_cached) {
            let Some(last) = self.running.pop() else { return false };
            self.kv_cache.free(last);
            self.sequences[last].num_computed_tokens = 0;
            self.waiting.push_front(last);
            step.preempted.push(last);
            if last == id {
                return false;
            }
        }
        true
    }

    fn push(&mut self, id: SequenceId, num_tokens: u32, step: &mut ScheduledStep, budget: &mut u32) {
        let sequence = &mut self.sequences[id];
        let context_len = sequence.num_computed_tokens;
        sequence.num_computed_tokens += num_tokens;
        let samples = sequence.num_uncomputed_tokens() == 0;
        let is_decode = num_tokens == 1 && samples && context_len >= sequence.num_prompt_tokens;
        step.sequences.push(ScheduledSequence { id, num_tokens, context_len, is_decode, samples });
        *budget -= num_tokens;
    }
}

impl Scheduler for VllmV1 {
    fn add(&mut self, request: &WorkloadRequest) -> Result<SequenceId, Rejection> {
        check_servable(request, self.max_model_len, &self.kv_cache)?;
        let id = self.sequences.insert(request);
        self.waiting.push_back(id);
        Ok(id)
    }

    fn schedule(&mut self, step: &mut ScheduledStep) {
        step.clear();
        let mut budget = self.max_num_batched_tokens;
        self.schedule_running(step, &mut budget);
        if step.preempted.is_empty() {
            self.schedule_waiting(step, &mut budget);
        }
    }

    fn complete(&mut self, step: &ScheduledStep, finished: &mut Vec<SequenceId>) {
        let Self { running, sequences, kv_cache, .. } = self;
        complete_step(step, running, sequences, kv_cache, finished);
    }

    fn steady(&self) -> Option<Steady> {
        let num_running = self.running.len();
        let is_open = !self.waiting.is_empty() && num_running < self.max_num_seqs;
        if is_open || num_running as u64 > u64::from(self.max_num_batched_tokens) {
            return None;
        }
        steady_decodes(&self.running, &self.sequences, &self.kv_cache)
    }

    fn advance(&mut self, num_steps: u32) {
        advance_decodes(&self.running, &mut self.sequences, &mut self.kv_cache, num_steps);
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
    use plumbline_schema::{EngineMode, Nanos};

    use super::*;

    fn deployment() -> Deployment {
        Deployment {
            mode: EngineMode::Eager,
            model: "qwen3-0.6b".into(),
            max_num_batched_tokens: 32,
            max_num_seqs: 4,
            max_model_len: 128,
            num_gpu_blocks: 101,
            block_size: 4,
            tensor_parallel_size: 1,
            pipeline_parallel_size: 1,
            enable_prefix_caching: false,
            scheduling_policy: "fcfs".into(),
            long_prefill_token_threshold: 0,
            async_scheduling: false,
            cudagraph_sizes: vec![],
        }
    }

    fn request(num_prefill_tokens: u32, num_decode_tokens: u32) -> WorkloadRequest {
        WorkloadRequest::new(0, Nanos(0), num_prefill_tokens, num_decode_tokens)
    }

    /// Runs until all is done; each step as `chunks|decodes|preempted`.
    fn steps(deployment: &Deployment, requests: &[(u32, u32)]) -> Vec<String> {
        let mut scheduler = VllmV1::new(deployment).unwrap();
        for &(prefill, decode) in requests {
            scheduler.add(&request(prefill, decode)).unwrap();
        }
        let (mut step, mut finished, mut lines) = (ScheduledStep::default(), vec![], vec![]);
        while scheduler.state().num_unfinished() > 0 {
            scheduler.schedule(&mut step);
            assert!(!step.is_empty(), "stalled after {lines:?}");
            let batch = step.batch();
            let preempted: Vec<_> = step.preempted.iter().map(|id| id.0.to_string()).collect();
            let (chunks, decodes) = (batch.format_prefill_chunks(), batch.format_decode_contexts());
            lines.push(format!("{chunks}|{decodes}|{}", preempted.join(";")));
            scheduler.complete(&step, &mut finished);
        }
        assert_eq!(scheduler.kv_cache.num_used(), 0);
        lines
    }

    #[test]
    fn prefills_are_chunked_to_the_budget_behind_decodes() {
        let lines = steps(&deployment(), &[(20, 2), (40, 1)]);
        assert_eq!(lines, ["20:0;12:0||", "28:12|20|"]);
    }

    #[test]
    fn long_prefills_are_capped_when_a_threshold_is_set() {
        let deployment = Deployment { long_prefill_token_threshold: 8, ..deployment() };
        assert_eq!(steps(&deployment, &[(18, 1), (4, 1)]), ["8:0;4:0||", "8:8||", "2:16||"]);
    }

    #[test]
    fn no_more_than_max_num_seqs_run() {
        let deployment = Deployment { max_num_seqs: 1, ..deployment() };
        assert_eq!(steps(&deployment, &[(4, 2), (5, 1)]), ["4:0||", "|4|", "5:0||"]);
    }

    /// Five usable blocks of 4: both prompts fill two; the first decodes take one and none is left.
    #[test]
    fn the_last_running_sequence_is_preempted_and_recomputed() {
        let deployment = Deployment { num_gpu_blocks: 6, ..deployment() };
        let lines = steps(&deployment, &[(8, 3), (8, 3)]);
        assert_eq!(lines, ["8:0;8:0||", "|8|1", "|9|", "9:0||", "|9|"]);
    }

    /// A preempted sequence waits at the front, and its outputs are recomputed with the prompt.
    #[test]
    fn a_preempted_sequence_comes_back_before_newer_ones() {
        let deployment = Deployment { num_gpu_blocks: 7, max_num_seqs: 2, ..deployment() };
        let lines = steps(&deployment, &[(8, 6), (8, 6), (4, 1)]);
        assert_eq!(lines, ["8:0;8:0||", "|8;8|", "|9;9|", "|10;10|", "|11;11|", "|12|1", "13:0;4:0||",]);
    }

    /// Four usable blocks hold one sequence whole; the second waits though its first chunk would fit.
    #[test]
    fn a_waiting_sequence_must_fit_whole() {
        let deployment = Deployment { num_gpu_blocks: 5, max_num_batched_tokens: 10, ..deployment() };
        assert_eq!(steps(&deployment, &[(7, 2), (9, 1)]), ["7:0||", "|7|", "9:0||"]);
    }

    #[test]
    fn what_can_never_be_served_is_rejected_by_name() {
        let mut scheduler = VllmV1::new(&Deployment { num_gpu_blocks: 6, ..deployment() }).unwrap();
        assert_eq!(
            scheduler.add(&request(100, 29)).unwrap_err().to_string(),
            "129 tokens of prompt and output exceed max_model_len = 128"
        );
        assert_eq!(
            scheduler.add(&request(20, 2)).unwrap_err().to_string(),
            "21 cached tokens need more than the 5 usable KV blocks of 4"
        );
        assert!(scheduler.add(&request(u32::MAX, u32::MAX)).is_err());
        assert!(scheduler.add(&request(20, 1)).is_ok());
        assert_eq!(scheduler.state().num_unfinished(), 1);
    }

    #[test]
    fn what_is_not_modelled_is_refused_by_name() {
        let refused = |deployment: Deployment| VllmV1::new(&deployment).unwrap_err().to_string();
        assert_eq!(
            refused(Deployment { enable_prefix_caching: true, ..deployment() }),
            "scheduler vllm-v1 does not model `enable_prefix_caching = true`, only false"
        );
        assert_eq!(
            refused(Deployment { scheduling_policy: "priority".into(), ..deployment() }),
            "scheduler vllm-v1 does not model `scheduling_policy = priority`, only fcfs"
        );
        assert_eq!(
            refused(Deployment { async_scheduling: true, ..deployment() }),
            "scheduler vllm-v1 does not model `async_scheduling = true`, only false"
        );
        assert_eq!(
            refused(Deployment { block_size: 0, ..deployment() }),
            "deployment key `block_size`: expected at least 1, found 0"
        );
    }
}

//! vLLM's V0 scheduler, without chunked prefills, prefix caching and priorities.
//!
//! The rules are those of vLLM 0.6.6, `vllm/core/scheduler.py` (`_schedule_default`, `_schedule_prefills`,
//! `_schedule_running`, `_preempt`) and `vllm/core/block_manager.py` (`can_allocate`, `can_append_slots`), for requests
//! of one sequence each:
//!
//! - A step is of one kind: prefills, or decodes when no prefill can be formed.
//! - Prefills are whole, outputs to be recomputed included, and taken from the queue in order while their tokens
//!   together are at most `max_num_batched_tokens`, at most `max_num_seqs` run, and their blocks fit and leave 1 % of
//!   the cache (the watermark) free. The first that does not fit ends it.
//! - Decodes are of all running sequences, in the order in which they were let in. Each asks for a free block, even
//!   where its last one has room. When there is none, the last running sequence loses all its blocks and waits in
//!   front, to be recomputed; this repeats until there is a block or the sequence itself was the last.
//!
//! With pipeline stages vLLM 0.6.6 runs a scheduler a stage, each with its share of the blocks. Here there is one for
//! all, as in Sarathi-Serve's copy of these rules (microsoft/sarathi-serve at 96f9911,
//! `sarathi/core/scheduler/vllm_scheduler.py`): sequences in flight are passed over, and count among those that run.
//! They are not preempted (there they are, and what their step computes is thrown away): a decode that only they could
//! make room for is passed over.
//!
//! What differs: vLLM 0.6.6 demands a `max_num_batched_tokens` of at least `max_model_len`, since it would give a
//! longer sequence up when it has to be recomputed, and of at least `max_num_seqs`. Here a request that could grow
//! beyond the budget is rejected, so is one that would need the watermark to be let in again, and where more sequences
//! run than the budget holds, the first go on.

use plumbline_schema::{Deployment, WorkloadRequest};

use super::{
    Rejection, ScheduledStep, SchedulerError, SchedulerKind, Steady,
    pool::{Pool, PoolPolicy},
};

/// vLLM's V0 scheduler, first come first served.
#[derive(Clone, Debug)]
pub struct VllmV0 {
    pool: Pool,
}

impl VllmV0 {
    /// An idle scheduler for a deployment.
    ///
    /// # Errors
    /// When a key is out of range, or asks for prefix caching, priorities, asynchronous scheduling or a prefill
    /// threshold.
    pub fn new(deployment: &Deployment) -> Result<Self, SchedulerError> {
        Ok(Self { pool: Pool::new(SchedulerKind::VllmV0, deployment)? })
    }

    fn schedule_prefills(&mut self, step: &mut ScheduledStep) {
        let pool = &mut self.pool;
        let mut budget = pool.max_num_batched_tokens;
        while pool.running.len() < pool.max_num_seqs {
            let Some(&id) = pool.waiting.front() else { break };
            let num_tokens = pool.sequences[id].num_tokens();
            if num_tokens > budget || !pool.fits_paged(id) {
                break;
            }
            pool.let_in_paged(id);
            pool.running.push(id);
            pool.compute(id, num_tokens, step);
            budget -= num_tokens;
        }
    }

    fn schedule_decodes(&mut self, step: &mut ScheduledStep) {
        let pool = &mut self.pool;
        if pool.is_roomy(pool.max_num_batched_tokens) {
            pool.decode_all(step, |_| unreachable!("prefills are whole"));
            return;
        }
        let max_decodes = pool.max_num_batched_tokens as usize;
        let mut next = 0;
        while let Some(&id) = pool.running.get(next) {
            if step.sequences.len() == max_decodes {
                break;
            }
            if !pool.sequences[id].is_in_flight && pool.append_slot(next, step) {
                pool.compute(id, 1, step);
            }
            // Computed, passed over, or preempted and so the last.
            next += 1;
        }
    }
}

impl PoolPolicy for VllmV0 {
    fn pool(&self) -> &Pool {
        &self.pool
    }

    fn pool_mut(&mut self) -> &mut Pool {
        &mut self.pool
    }

    fn check(&self, request: &WorkloadRequest) -> Result<(), Rejection> {
        let num_tokens = self.pool.check_paged(request)?;
        let max_num_batched_tokens = self.pool.max_num_batched_tokens;
        if num_tokens > max_num_batched_tokens {
            return Err(Rejection::LongerThanBudget { num_tokens, max_num_batched_tokens });
        }
        Ok(())
    }

    fn form(&mut self, step: &mut ScheduledStep) {
        self.schedule_prefills(step);
        if step.is_empty() {
            self.schedule_decodes(step);
        }
        // A step that only preempts would be none: the queue's turn is then at once.
        if step.is_empty() && !step.preempted.is_empty() {
            self.schedule_prefills(step);
        }
    }

    fn promise(&self) -> Option<Steady> {
        self.pool.steady_paged()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::laws::{deployment, rejection, steps};

    fn vllm_v0(deployment: &Deployment, requests: &[(u32, u32)]) -> Vec<String> {
        steps(SchedulerKind::VllmV0, deployment, requests)
    }

    #[test]
    fn whole_prefills_come_first() {
        let lines = vllm_v0(&deployment(), &[(20, 3), (20, 1), (12, 2)]);
        assert_eq!(lines, ["20:0||", "20:0;12:0||", "|20;12|", "|21|"]);
    }

    #[test]
    fn no_more_than_max_num_seqs_run() {
        let deployment = Deployment { max_num_seqs: 1, ..deployment() };
        assert_eq!(vllm_v0(&deployment, &[(4, 2), (5, 1)]), ["4:0||", "|4|", "5:0||"]);
    }

    /// Of 99 usable blocks one stays free.
    #[test]
    fn a_sequence_let_in_leaves_the_watermark() {
        let deployment =
            Deployment { num_gpu_blocks: 100, block_size: 1, max_num_batched_tokens: 128, ..deployment() };
        assert_eq!(vllm_v0(&deployment, &[(50, 1), (48, 1)]), ["50:0;48:0||"]);
        assert_eq!(vllm_v0(&deployment, &[(50, 1), (49, 1)]), ["50:0||", "49:0||"]);
    }

    /// Four usable blocks: both hold two, with room, but none is free. The second comes back as soon as it fits.
    #[test]
    fn a_decode_without_a_free_block_preempts_the_last() {
        let deployment = Deployment { num_gpu_blocks: 5, ..deployment() };
        let lines = vllm_v0(&deployment, &[(5, 3), (5, 3)]);
        assert_eq!(lines, ["5:0;5:0||", "|5|1", "6:0||", "|6|1", "7:0||"]);
    }

    #[test]
    fn a_sequence_that_fills_the_cache_is_recomputed_for_every_token() {
        let deployment = Deployment { num_gpu_blocks: 3, ..deployment() };
        assert_eq!(vllm_v0(&deployment, &[(5, 4)]), ["5:0||", "6:0||0", "7:0||0", "8:0||0"]);
    }

    #[test]
    fn sequences_in_flight_are_passed_over() {
        let deployment = Deployment { pipeline_parallel_size: 2, max_num_batched_tokens: 8, ..deployment() };
        let lines = vllm_v0(&deployment, &[(6, 2), (5, 2)]);
        assert_eq!(lines, ["6:0||", "5:0||", "|6|", "|5|"]);
    }

    #[test]
    fn what_could_not_be_recomputed_whole_is_rejected() {
        assert_eq!(
            rejection(SchedulerKind::VllmV0, &deployment(), 30, 10),
            "39 tokens, to be computed whole after a preemption, exceed max_num_batched_tokens = 32"
        );
        assert_eq!(vllm_v0(&deployment(), &[(30, 3)]), ["30:0||", "|30|", "|31|"]);
    }
}

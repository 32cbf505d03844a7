//! `FasterTransformer`'s batching: a batch of requests runs until all of them are done.
//!
//! The rules are those of microsoft/vidur at 7d47513,
//! `vidur/scheduler/replica_scheduler/faster_transformer_replica_scheduler.py`, for the request-level batching that
//! the papers on Orca (section 2) and Sarathi-Serve compare with:
//!
//! - A batch is formed of requests that wait, in order, up to `max_num_seqs` of them, while the blocks of prompt and
//!   output of each fit. The first that does not fit ends it.
//! - Its first step computes all prompts whole, each later one a token of every sequence that is not done. None joins.
//! - Its blocks become free together, when its last sequence is done; a done one computes nothing more (the real
//!   engine pads the batch to its longest).
//! - With several steps in flight there are as many batches: a batch at rest goes on before a new one is formed, the
//!   one that has rested longest first.
//! - Nothing is preempted. There is no token budget: `max_num_batched_tokens` is not looked at.
//!
//! Vidur reserves the workload's `max_tokens` for every request, and frees only the blocks of those that a batch's last
//! step still computed; here a request reserves its own prompt and output, and all blocks are freed. A request's tokens
//! are out when they are computed, as in Vidur.

use std::collections::VecDeque;

use plumbline_schema::{Deployment, WorkloadRequest};

use super::{
    Rejection, ScheduledStep, SchedulerError, SchedulerKind, Steady,
    pool::{Pool, PoolPolicy},
};
use crate::sequence::SequenceId;

/// Requests that run together until all are done.
#[derive(Clone, Debug, Default)]
struct Batch {
    unfinished: Vec<SequenceId>,
    /// Done, with blocks still held.
    done: Vec<SequenceId>,
}

/// `FasterTransformer`'s batching.
#[derive(Clone, Debug)]
pub struct FasterTransformer {
    /// Runs the unfinished sequences of all batches.
    pool: Pool,
    /// The one that has rested longest first.
    at_rest: VecDeque<Batch>,
    /// Of the oldest step first.
    in_flight: VecDeque<Batch>,
    /// Memory of past batches.
    spare: Vec<Batch>,
}

impl FasterTransformer {
    /// An idle scheduler for a deployment.
    ///
    /// # Errors
    /// When a key is out of range, or asks for prefix caching, priorities, asynchronous scheduling or a prefill
    /// threshold.
    pub fn new(deployment: &Deployment) -> Result<Self, SchedulerError> {
        Ok(Self {
            pool: Pool::new(SchedulerKind::FasterTransformer, deployment)?,
            at_rest: VecDeque::new(),
            in_flight: VecDeque::new(),
            spare: Vec::new(),
        })
    }

    fn form_batch(&mut self) -> Option<Batch> {
        let mut batch = self.spare.pop().unwrap_or_default();
        while batch.unfinished.len() < self.pool.max_num_seqs {
            let Some(id) = self.pool.let_in_reserved() else { break };
            batch.unfinished.push(id);
        }
        if batch.unfinished.is_empty() {
            self.spare.push(batch);
            return None;
        }
        Some(batch)
    }

    fn disband(&mut self, mut batch: Batch) {
        for id in batch.done.drain(..) {
            self.pool.kv_cache.free(id);
            self.pool.sequences.remove(id);
        }
        self.spare.push(batch);
    }
}

impl PoolPolicy for FasterTransformer {
    fn pool(&self) -> &Pool {
        &self.pool
    }

    fn pool_mut(&mut self) -> &mut Pool {
        &mut self.pool
    }

    fn check(&self, request: &WorkloadRequest) -> Result<(), Rejection> {
        self.pool.check_reserved(request)
    }

    fn form(&mut self, step: &mut ScheduledStep) {
        let Some(batch) = self.at_rest.pop_front().or_else(|| self.form_batch()) else { return };
        for &id in &batch.unfinished {
            let num_tokens = self.pool.sequences[id].num_uncomputed_tokens();
            self.pool.compute(id, num_tokens, step);
        }
        self.in_flight.push_back(batch);
    }

    fn account(&mut self, step: &ScheduledStep, finished: &mut Vec<SequenceId>) {
        finished.clear();
        let Some(mut batch) = self.in_flight.pop_front() else { return };
        for scheduled in &step.sequences {
            let sequence = &mut self.pool.sequences[scheduled.id];
            sequence.is_in_flight = false;
            sequence.num_output_tokens += 1;
            if sequence.num_remaining_tokens() == 0 {
                finished.push(scheduled.id);
            }
        }
        if !finished.is_empty() {
            // Their numbers stay theirs as long as their blocks do.
            let Pool { running, sequences, .. } = &mut self.pool;
            batch.unfinished.retain(|&id| sequences[id].num_remaining_tokens() > 0);
            running.retain(|&id| sequences[id].num_remaining_tokens() > 0);
            batch.done.extend_from_slice(finished);
        }
        if batch.unfinished.is_empty() {
            self.disband(batch);
        } else {
            self.at_rest.push_back(batch);
        }
    }

    fn promise(&self) -> Option<Steady> {
        if self.at_rest.len() != 1 || !self.in_flight.is_empty() {
            return None;
        }
        self.pool.steady_reserved(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::laws::{deployment, rejection, steps};

    fn faster_transformer(deployment: &Deployment, requests: &[(u32, u32)]) -> Vec<String> {
        steps(SchedulerKind::FasterTransformer, deployment, requests)
    }

    #[test]
    fn none_joins_before_all_are_done() {
        let deployment = Deployment { max_num_seqs: 2, ..deployment() };
        let lines = faster_transformer(&deployment, &[(40, 1), (4, 3), (5, 2)]);
        assert_eq!(lines, ["40:0;4:0||", "|4|", "|5|", "5:0||", "|5|"]);
    }

    #[test]
    fn batches_in_flight_take_turns() {
        let deployment = Deployment { max_num_seqs: 2, pipeline_parallel_size: 2, ..deployment() };
        let lines = faster_transformer(&deployment, &[(4, 1), (4, 3), (5, 2)]);
        assert_eq!(lines, ["4:0;4:0||", "5:0||", "|4|", "|5|", "|5|"]);
    }

    /// Four usable blocks, two for each of the first batch.
    #[test]
    fn blocks_are_free_when_the_last_of_a_batch_is_done() {
        let deployment = Deployment { num_gpu_blocks: 5, pipeline_parallel_size: 2, ..deployment() };
        let lines = faster_transformer(&deployment, &[(4, 1), (4, 4), (4, 1)]);
        assert_eq!(lines, ["4:0;4:0||", "|4|", "|5|", "|6|", "4:0||"]);
        assert_eq!(
            rejection(SchedulerKind::FasterTransformer, &deployment, 16, 1),
            "17 cached tokens need more than the 4 usable KV blocks of 4"
        );
    }
}

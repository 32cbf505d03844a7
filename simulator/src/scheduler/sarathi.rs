//! Sarathi-Serve's scheduler: chunked prefills that never hold a decode back.
//!
//! The policy is that of Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve"
//! (OSDI '24), section 4. The rules are those of microsoft/sarathi-serve at 96f9911,
//! `sarathi/core/scheduler/sarathi_scheduler.py` (`_schedule`), `base_scheduler.py` (`_preempt`),
//! `sarathi/core/block_space_manager/{base,vllm}_block_space_manager.py` and `sarathi/core/datatypes/sequence.py`
//! (`reset_for_recompute`), with a fixed chunk size:
//!
//! - A step computes up to `max_num_batched_tokens` tokens (`chunk_size`), decodes among them.
//! - First come the decodes of all sequences at rest, then the next chunks of prefills begun, each in order of
//!   arrival, then sequences that wait. A chunk is what the budget leaves, if the prefill has as much left.
//! - A waiting sequence is let in while fewer than `max_num_seqs` run, those in flight included, and the blocks of
//!   all tokens known of it fit and leave 1 % of the cache (the watermark) free. It gets all of these blocks at once.
//!   The first that does not fit ends it.
//! - A decode asks for a free block, even where its last one has room. When there is none, the youngest sequence loses
//!   all its blocks, waits in front, and is recomputed from its first token, outputs included; this repeats until
//!   there is a block or the sequence itself was the youngest.
//!
//! Vidur's copy (microsoft/vidur at 7d47513, `vidur/scheduler/replica_scheduler/sarathi_replica_scheduler.py`) differs:
//! a step has at most `batch_size_cap / num_stages` sequences, where Sarathi-Serve caps only those that run; sequences
//! are taken in the order in which their last steps ended, and the last of that order is preempted, where Sarathi-Serve
//! goes by arrival; and new ones are let in beside a preemption. Here it is as in Sarathi-Serve.
//!
//! What differs from Sarathi-Serve: with several steps in flight it also preempts sequences in flight and throws away
//! what their step computes; here only those at rest are preempted, and a decode that only sequences in flight could
//! make room for is passed over. Where more sequences decode than `max_num_batched_tokens` (Sarathi-Serve then asks
//! for a negative chunk), the oldest go on. After a preemption nothing is let in in the same step (there, the one
//! preempted, not yet reset, blocks the queue in nearly every case). Requests that would need the watermark to be let
//! in again are rejected, since they could wait forever.

use plumbline_schema::{Deployment, WorkloadRequest};

use super::{
    Rejection, ScheduledStep, SchedulerError, SchedulerKind, Steady,
    pool::{Pool, PoolPolicy},
};
use crate::sequence::SequenceId;

/// Sarathi-Serve's scheduler.
#[derive(Clone, Debug)]
pub struct Sarathi {
    /// Runs in order of arrival.
    pool: Pool,
    /// Memory for the prefills at rest, while a step is formed.
    prefills: Vec<SequenceId>,
}

impl Sarathi {
    /// An idle scheduler for a deployment.
    ///
    /// # Errors
    /// When a key is out of range, or asks for prefix caching, priorities, asynchronous scheduling or a prefill
    /// threshold.
    pub fn new(deployment: &Deployment) -> Result<Self, SchedulerError> {
        Ok(Self { pool: Pool::new(SchedulerKind::Sarathi, deployment)?, prefills: Vec::new() })
    }

    /// Lets all at rest decode that can, and puts the prefills at rest aside.
    fn schedule_decodes(&mut self, step: &mut ScheduledStep, budget: &mut u32) {
        self.prefills.clear();
        if self.pool.is_roomy(*budget) {
            self.pool.decode_all(step, |id| self.prefills.push(id));
            *budget -= step.sequences.len() as u32;
            return;
        }
        let mut next = 0;
        while let Some(&id) = self.pool.running.get(next) {
            let sequence = &self.pool.sequences[id];
            if sequence.is_in_flight {
                next += 1;
            } else if sequence.is_prefilling {
                self.prefills.push(id);
                next += 1;
            } else if *budget == 0 {
                break;
            } else if self.pool.append_slot(next, step) {
                self.pool.compute(id, 1, step);
                *budget -= 1;
                next += 1;
            } else {
                // Passed over, or preempted and so the last.
                next += 1;
            }
        }
    }

    fn schedule_prefills(&mut self, step: &mut ScheduledStep, budget: &mut u32) {
        for &id in &self.prefills {
            if *budget == 0 {
                break;
            }
            let num_tokens = self.pool.sequences[id].num_uncomputed_tokens().min(*budget);
            self.pool.compute(id, num_tokens, step);
            *budget -= num_tokens;
        }
    }

    fn schedule_waiting(&mut self, step: &mut ScheduledStep, budget: &mut u32) {
        while *budget > 0 && self.pool.running.len() < self.pool.max_num_seqs {
            let Some(&id) = self.pool.waiting.front() else { break };
            if !self.pool.fits_paged(id) {
                break;
            }
            self.pool.let_in_paged(id);
            self.insert_by_arrival(id);
            let num_tokens = self.pool.sequences[id].num_uncomputed_tokens().min(*budget);
            self.pool.compute(id, num_tokens, step);
            *budget -= num_tokens;
        }
    }

    /// Adds a sequence to those that run, behind all that arrived no later.
    fn insert_by_arrival(&mut self, id: SequenceId) {
        let Pool { running, sequences, .. } = &mut self.pool;
        let arrival = |id: SequenceId| sequences.request(id).arrival_time_ns;
        let behind = running.iter().rposition(|&other| arrival(other) <= arrival(id));
        running.insert(behind.map_or(0, |position| position + 1), id);
    }
}

impl PoolPolicy for Sarathi {
    fn pool(&self) -> &Pool {
        &self.pool
    }

    fn pool_mut(&mut self) -> &mut Pool {
        &mut self.pool
    }

    fn check(&self, request: &WorkloadRequest) -> Result<(), Rejection> {
        self.pool.check_paged(request).map(|_| ())
    }

    fn form(&mut self, step: &mut ScheduledStep) {
        let mut budget = self.pool.max_num_batched_tokens;
        self.schedule_decodes(step, &mut budget);
        self.schedule_prefills(step, &mut budget);
        // A step that only preempts would be none: the queue's turn is then at once.
        if step.preempted.is_empty() || step.is_empty() {
            self.schedule_waiting(step, &mut budget);
        }
    }

    fn promise(&self) -> Option<Steady> {
        self.pool.steady_paged()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::{
        Scheduler,
        laws::{deployment, rejection, request, steps},
    };

    fn sarathi(deployment: &Deployment, requests: &[(u32, u32)]) -> Vec<String> {
        steps(SchedulerKind::Sarathi, deployment, requests)
    }

    #[test]
    fn prefills_are_chunked_to_what_decodes_leave() {
        assert_eq!(sarathi(&deployment(), &[(20, 2), (40, 1)]), ["20:0;12:0||", "28:12|20|"]);
        let lines = sarathi(&deployment(), &[(4, 5), (40, 1)]);
        assert_eq!(lines, ["4:0;28:0||", "12:28|4|", "|5|", "|6|", "|7|"]);
    }

    #[test]
    fn prefills_begun_come_before_new_ones() {
        let deployment = Deployment { max_num_batched_tokens: 8, ..deployment() };
        assert_eq!(sarathi(&deployment, &[(12, 1), (6, 1)]), ["8:0||", "4:8;4:0||", "2:4||"]);
    }

    #[test]
    fn no_more_than_max_num_seqs_run() {
        let deployment = Deployment { max_num_seqs: 1, ..deployment() };
        assert_eq!(sarathi(&deployment, &[(4, 2), (5, 1)]), ["4:0||", "|4|", "5:0||"]);
    }

    /// Of 99 usable blocks one stays free.
    #[test]
    fn a_sequence_let_in_leaves_the_watermark() {
        let deployment =
            Deployment { num_gpu_blocks: 100, block_size: 1, max_num_batched_tokens: 128, ..deployment() };
        assert_eq!(sarathi(&deployment, &[(50, 1), (48, 1)]), ["50:0;48:0||"]);
        assert_eq!(sarathi(&deployment, &[(50, 1), (49, 1)]), ["50:0||", "49:0||"]);
        assert_eq!(
            rejection(SchedulerKind::Sarathi, &deployment, 99, 1),
            "99 cached tokens need more than the 98 usable KV blocks of 1"
        );
    }

    /// Four usable blocks: both hold two, with room, but none is free.
    #[test]
    fn a_decode_without_a_free_block_preempts_the_youngest() {
        let deployment = Deployment { num_gpu_blocks: 5, ..deployment() };
        let lines = sarathi(&deployment, &[(5, 3), (5, 3)]);
        assert_eq!(lines, ["5:0;5:0||", "|5|1", "6:0|6|", "|6|"]);
    }

    #[test]
    fn the_youngest_itself_is_preempted_and_recomputed() {
        let deployment = Deployment { num_gpu_blocks: 6, ..deployment() };
        let lines = sarathi(&deployment, &[(8, 3), (8, 3)]);
        assert_eq!(lines, ["8:0;8:0||", "|8|1", "|9|", "9:0||", "|9|"]);
    }

    #[test]
    fn a_sequence_that_fills_the_cache_is_recomputed_for_every_token() {
        let deployment = Deployment { num_gpu_blocks: 3, ..deployment() };
        assert_eq!(sarathi(&deployment, &[(5, 4)]), ["5:0||", "6:0||0", "7:0||0", "8:0||0"]);
    }

    #[test]
    fn sequences_in_flight_are_passed_over() {
        let deployment = Deployment { pipeline_parallel_size: 2, max_num_batched_tokens: 4, ..deployment() };
        let lines = sarathi(&deployment, &[(4, 3), (4, 3)]);
        assert_eq!(lines, ["4:0||", "4:0||", "|4|", "|4|", "|5|", "|5|"]);
    }

    /// Five usable blocks. The second is in flight when the first finds no block; nothing that is in flight is lost.
    #[test]
    fn a_decode_waits_for_blocks_of_younger_ones_in_flight() {
        let deployment = Deployment { num_gpu_blocks: 6, pipeline_parallel_size: 2, ..deployment() };
        let mut scheduler = Sarathi::new(&deployment).unwrap();
        let (mut first, mut second, mut finished) =
            (ScheduledStep::default(), ScheduledStep::default(), vec![]);
        scheduler.add(&request(12, 3)).unwrap();
        scheduler.schedule(&mut first);
        scheduler.add(&request(8, 3)).unwrap();
        scheduler.schedule(&mut second);
        scheduler.complete(&first, &mut finished);
        scheduler.schedule(&mut first);
        assert!(first.is_empty() && first.preempted.is_empty());
        scheduler.complete(&second, &mut finished);
        scheduler.schedule(&mut first);
        assert_eq!(crate::scheduler::laws::line(&first), "|12|1");
    }
}

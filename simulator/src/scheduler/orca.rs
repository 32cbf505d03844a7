//! Orca's scheduler: batches anew at every iteration, with memory reserved for the longest that a request can get.
//!
//! The rules are those of Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models"
//! (OSDI '22), Algorithm 1 (`Select`), with selective batching (section 3.2), so that prefills and decodes share a step:
//!
//! - Each step is selected anew from all requests that are not in flight, in order of arrival, up to `max_num_seqs`
//!   (`max_bs`) of them.
//! - A request begins when the slots for all its tokens, prompt and output (`max_tokens`), are free. They are reserved
//!   until it ends, so nothing is ever preempted. The first that does not fit ends the selection.
//! - Prompts are computed whole. There is no token budget: `max_num_batched_tokens` is not looked at.
//! - Up to `n_workers` batches (pipeline stages) are in flight, each with `max_num_seqs` sequences.
//!
//! Slots are handed out in KV blocks here, a request's last one rounded up, and `max_tokens` is a request's own prompt
//! and output. vLLM's paper (Kwon et al., SOSP '23, section 6.1) calls this Orca (Oracle). Vidur
//! (microsoft/vidur at 7d47513, `vidur/scheduler/replica_scheduler/orca_replica_scheduler.py`) reserves the workload's
//! `max_tokens` for every request, and takes sequences in the order in which their last steps ended; Sarathi-Serve
//! (microsoft/sarathi-serve at 96f9911, `sarathi/core/scheduler/orca_scheduler.py`) reserves `max_model_len`, and caps
//! all that run, not each batch, by `max_num_seqs`.

use plumbline_schema::{Deployment, WorkloadRequest};

use super::{
    Rejection, ScheduledStep, SchedulerError, SchedulerKind, Steady,
    pool::{Pool, PoolPolicy},
};

/// Orca's scheduler.
#[derive(Clone, Debug)]
pub struct Orca {
    /// Runs in order of arrival.
    pool: Pool,
}

impl Orca {
    /// An idle scheduler for a deployment.
    ///
    /// # Errors
    /// When a key is out of range, or asks for prefix caching, priorities, asynchronous scheduling or a prefill
    /// threshold.
    pub fn new(deployment: &Deployment) -> Result<Self, SchedulerError> {
        Ok(Self { pool: Pool::new(SchedulerKind::Orca, deployment)? })
    }
}

impl PoolPolicy for Orca {
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
        let pool = &mut self.pool;
        for position in 0..pool.running.len() {
            if step.sequences.len() == pool.max_num_seqs {
                return;
            }
            let id = pool.running[position];
            if !pool.sequences[id].is_in_flight {
                pool.compute(id, 1, step);
            }
        }
        while step.sequences.len() < pool.max_num_seqs {
            let Some(id) = pool.let_in_reserved() else { break };
            pool.compute(id, pool.sequences[id].num_prompt_tokens, step);
        }
    }

    fn promise(&self) -> Option<Steady> {
        let (num_running, max_num_seqs) = (self.pool.running.len(), self.pool.max_num_seqs);
        if num_running > max_num_seqs {
            return None;
        }
        self.pool.steady_reserved(num_running == max_num_seqs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::laws::{deployment, rejection, steps};

    fn orca(deployment: &Deployment, requests: &[(u32, u32)]) -> Vec<String> {
        steps(SchedulerKind::Orca, deployment, requests)
    }

    #[test]
    fn prompts_are_whole_and_share_steps_with_decodes() {
        let deployment = Deployment { max_num_seqs: 2, ..deployment() };
        let lines = orca(&deployment, &[(40, 1), (4, 3), (5, 2)]);
        assert_eq!(lines, ["40:0;4:0||", "5:0|4|", "|5;5|"]);
    }

    /// Ten usable blocks: the second needs eight for prompt and output, and the third does not overtake it.
    #[test]
    fn a_request_begins_when_prompt_and_output_fit() {
        let deployment = Deployment { num_gpu_blocks: 11, ..deployment() };
        let lines = orca(&deployment, &[(8, 2), (28, 3), (4, 1)]);
        assert_eq!(lines, ["8:0||", "|8|", "28:0;4:0||", "|28|", "|29|"]);
        assert_eq!(
            rejection(SchedulerKind::Orca, &deployment, 40, 1),
            "41 cached tokens need more than the 10 usable KV blocks of 4"
        );
    }

    #[test]
    fn each_batch_in_flight_has_seats_of_its_own() {
        let deployment = Deployment { max_num_seqs: 1, pipeline_parallel_size: 2, ..deployment() };
        assert_eq!(orca(&deployment, &[(4, 2), (5, 2)]), ["4:0||", "5:0||", "|4|", "|5|"]);
    }
}

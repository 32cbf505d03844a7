//! A complete policy: whoever has the least output to come goes first. `docs/adding-a-scheduler.md` explains it.

use std::convert::Infallible;

use plumbline_schema::{BatchShape, Nanos, Workload, WorkloadRequest};
use plumbline_simulator::kv_cache::KvCache;
use plumbline_simulator::scheduler::{ScheduledSequence, ScheduledStep, SchedulerState};
use plumbline_simulator::sequence::{Sequence, SequenceId, Sequences};
use plumbline_simulator::{Executor, Rejection, Scheduler, serve};

struct ShortestFirst {
    kv_cache: KvCache,
    sequences: Sequences,
    order: Vec<SequenceId>, // those that run, then those that wait
    num_running: usize,
}

impl Scheduler for ShortestFirst {
    fn add(&mut self, request: &WorkloadRequest) -> Result<SequenceId, Rejection> {
        let num_tokens = request.num_prefill_tokens.saturating_add(request.num_decode_tokens);
        let (num_blocks, block_size) = (self.kv_cache.num_blocks(), self.kv_cache.block_size());
        if num_tokens.div_ceil(block_size) > num_blocks {
            return Err(Rejection::LargerThanKvCache {
                num_tokens: num_tokens.into(),
                num_blocks,
                block_size,
            });
        }
        let id = self.sequences.insert(request);
        self.order.push(id);
        Ok(id)
    }

    fn schedule(&mut self, step: &mut ScheduledStep) {
        step.clear();
        self.order[self.num_running..].sort_by_key(|&id| self.sequences[id].num_remaining_tokens());
        for &id in &self.order[self.num_running..] {
            // Memory for all of it is reserved, so nobody is ever preempted.
            let num_tokens = self.sequences[id].num_prompt_tokens + self.sequences[id].max_output_tokens;
            if self.num_running == 2 || !self.kv_cache.grow(id, num_tokens) {
                break;
            }
            self.num_running += 1;
        }
        for &id in &self.order[..self.num_running] {
            let sequence = &mut self.sequences[id];
            let (num_tokens, context_len) = (sequence.num_uncomputed_tokens(), sequence.num_computed_tokens);
            // With none it is in flight: its newest token is not known yet.
            if num_tokens > 0 {
                sequence.num_computed_tokens += num_tokens;
                let (is_decode, samples) = (context_len > 0, true);
                step.sequences.push(ScheduledSequence { id, num_tokens, context_len, is_decode, samples });
            }
        }
    }

    fn complete(&mut self, step: &ScheduledStep, finished: &mut Vec<SequenceId>) {
        finished.clear();
        for &ScheduledSequence { id, .. } in &step.sequences {
            self.sequences[id].num_output_tokens += 1;
            if self.sequences[id].num_remaining_tokens() == 0 {
                self.kv_cache.free(id);
                self.sequences.remove(id);
                finished.push(id);
            }
        }
        self.order.retain(|id| !finished.contains(id));
        self.num_running -= finished.len();
    }

    fn running(&self) -> &[SequenceId] {
        &self.order[..self.num_running]
    }

    fn sequence(&self, id: SequenceId) -> &Sequence {
        &self.sequences[id]
    }

    fn state(&self) -> SchedulerState<'_> {
        let (num_waiting, num_running) = (self.order.len() - self.num_running, self.num_running);
        SchedulerState { num_waiting, num_running, kv_cache: &self.kv_cache }
    }
}

/// A clock on which every step takes 10 ms and 1 ms more for each token.
struct Clock(Nanos);

impl Executor for Clock {
    type Error = Infallible;
    fn now(&self) -> Nanos {
        self.0
    }
    fn wait_until(&mut self, time: Nanos) -> Result<(), Infallible> {
        self.0 = self.0.max(time);
        Ok(())
    }
    fn admit(&mut self, _: SequenceId, _: &WorkloadRequest) -> Result<(), Infallible> {
        Ok(())
    }
    fn launch(
        &mut self,
        _: &ScheduledStep,
        batch: &BatchShape,
        _: Nanos,
        _: &SchedulerState<'_>,
    ) -> Result<Nanos, Infallible> {
        self.0 += Nanos(1_000_000 * u64::from(10 + batch.num_tokens));
        Ok(Nanos::ZERO)
    }
    fn finish(&mut self) -> Result<Nanos, Infallible> {
        Ok(self.0)
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (kv_cache, sequences) = (KvCache::new(64, 16), Sequences::default());
    let scheduler = ShortestFirst { kv_cache, sequences, order: vec![], num_running: 0 };
    let request = |id, prefill, decode| WorkloadRequest::new(id, Nanos::ZERO, prefill, decode);
    let requests = vec![request(0, 40, 6), request(1, 20, 2), request(2, 30, 4)];
    let served = serve(&Workload { requests }, Box::new(scheduler), Clock(Nanos::ZERO))?;
    for step in &served.replicas[0].steps {
        println!("{:>3} ms: {:?}", step.step_start_ns.0 / 1_000_000, step.batch);
    }
    Ok(())
}

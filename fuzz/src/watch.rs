//! Looks at each event of a simulation as it comes, and at what requests come and go.

use std::{cell::Cell, collections::BTreeSet};

use plumbline_schema::{Deployment, Nanos, WorkloadRequest};
use plumbline_simulator::{
    Outcome, Recorder, RequestSource, RunRecorder,
    recorder::StepRecord,
    replica::RequestIds,
    scheduler::ScheduledStep,
    serve::{Served, StepSpan},
};

/// Steps after which a simulation is said never to end: a request here takes some hundreds.
const MAX_STEPS: u64 = 1_000_000;

/// Keeps a run, and holds each event against the ones before.
pub struct Watch {
    kept: RunRecorder,
    replicas: Vec<Replica>,
    num_steps: u64,
    /// Requests that left, by index.
    left: BTreeSet<u64>,
    num_gaps: u64,
    gaps_ns: u128,
}

struct Replica {
    max_num_seqs: usize,
    is_synchronous: bool,
    last_start: Nanos,
    last_end: Nanos,
    /// Steps launched, and steps that ended.
    num_launched: u32,
    num_ended: u32,
}

impl Watch {
    /// Of replicas of these deployments, in order.
    pub fn new<'a>(keeps_steps: bool, deployments: impl Iterator<Item = &'a Deployment>) -> Self {
        let replica = |deployment: &Deployment| Replica {
            max_num_seqs: deployment.max_num_seqs as usize,
            is_synchronous: !deployment.async_scheduling && deployment.pipeline_parallel_size == 1,
            last_start: Nanos::ZERO,
            last_end: Nanos::ZERO,
            num_launched: 0,
            num_ended: 0,
        };
        Self {
            kept: if keeps_steps { RunRecorder::with_steps() } else { RunRecorder::new() },
            replicas: deployments.map(replica).collect(),
            num_steps: 0,
            left: BTreeSet::new(),
            num_gaps: 0,
            gaps_ns: 0,
        }
    }

    /// What was kept, once all is done.
    ///
    /// # Panics
    /// When a step did not end, or gaps between tokens are missing.
    #[must_use]
    pub fn into_served(self) -> Served {
        assert!(self.replicas.iter().all(|r| r.num_launched == r.num_ended), "a step did not end");
        let served = self.kept.into_served();
        let done = || served.requests.iter().filter(|outcome| outcome.num_tokens > 0);
        let num_gaps: u64 = done().map(|outcome| u64::from(outcome.num_tokens) - 1).sum();
        let span = |outcome: &Outcome| Some(outcome.last_token? - outcome.first_token?);
        let gaps_ns: u128 = done().filter_map(span).map(|span| u128::from(span.0)).sum();
        assert_eq!(
            (self.num_gaps, self.gaps_ns),
            (num_gaps, gaps_ns),
            "a gap follows each token but the last"
        );
        served
    }

    fn launch(&mut self, replica: u32, number: u32, start: Nanos) {
        self.num_steps += 1;
        assert!(self.num_steps < MAX_STEPS, "never done");
        let replica = &mut self.replicas[replica as usize];
        assert_eq!(number, replica.num_launched, "steps are numbered in order");
        assert!(start >= replica.last_start, "the clock stepped back");
        if replica.is_synchronous {
            assert!(start >= replica.last_end, "two steps at once");
        }
        replica.num_launched += 1;
        replica.last_start = start;
    }

    fn end(&mut self, replica: u32, number: u32, start: Nanos, end: Nanos) {
        let replica = &mut self.replicas[replica as usize];
        assert_eq!(number, replica.num_ended, "steps end in order");
        assert!(end > start, "a step of no time");
        assert!(end >= replica.last_end, "the clock stepped back");
        replica.num_ended += 1;
        replica.last_end = end;
    }
}

impl Recorder for Watch {
    fn wants_batches(&self) -> bool {
        self.kept.wants_batches()
    }

    fn step(&mut self, record: &StepRecord<'_>, step: &ScheduledStep, requests: &RequestIds<'_>) {
        self.launch(record.replica, record.number, record.start);
        let (state, max_num_seqs) = (record.state, self.replicas[record.replica as usize].max_num_seqs);
        assert_eq!(state.kv_cache.num_free() + state.kv_cache.num_used(), state.kv_cache.num_blocks());
        assert!(!step.sequences.is_empty() && step.sequences.len() <= state.num_running);
        assert!(step.sequences.len() <= max_num_seqs, "more sequences than seats");
        for s in &step.sequences {
            let held = state.kv_cache.block_table(s.id).len() as u32 * state.kv_cache.block_size();
            assert!(s.num_tokens > 0 && held >= s.context_len + s.num_tokens, "tokens without a block");
        }
        self.kept.step(record, step, requests);
    }

    fn step_end(&mut self, replica: u32, number: u32, start: Nanos, end: Nanos) {
        self.end(replica, number, start, end);
        self.kept.step_end(replica, number, start, end);
    }

    fn decode_steps(&mut self, replica: u32, first_number: u32, steps: &[StepSpan], num_seqs: u32) {
        assert!(num_seqs > 0 && !steps.is_empty());
        for (step, number) in steps.iter().zip(first_number..) {
            self.launch(replica, number, step.start);
            self.end(replica, number, step.start, step.end());
            assert!(step.schedule <= step.duration);
        }
        self.kept.decode_steps(replica, first_number, steps, num_seqs);
    }

    fn gaps(&mut self, gap: Nanos, count: u32) {
        self.num_gaps += u64::from(count);
        self.gaps_ns += u128::from(gap.0) * u128::from(count);
        self.kept.gaps(gap, count);
    }

    fn request(&mut self, outcome: Outcome) {
        assert!(self.left.insert(outcome.index), "a request left twice");
        let request = &outcome.request;
        let times = [
            Some(request.arrival_time_ns),
            outcome.admitted,
            outcome.first_scheduled,
            outcome.first_token,
            outcome.last_token,
        ];
        if let Some(rejection) = outcome.rejection {
            assert!(times[1..].iter().all(Option::is_none) && outcome.num_tokens == 0);
            assert!(!rejection.to_string().is_empty());
        } else {
            assert!(times.iter().all(Option::is_some), "{outcome:?}");
            assert!(times.is_sorted() && outcome.first_scheduled < outcome.first_token, "{outcome:?}");
            assert_eq!(outcome.num_tokens, request.num_decode_tokens, "exactly its tokens");
            assert_eq!(outcome.token_steps.iter().count() as u32, outcome.num_tokens);
            let span = outcome.last_token.zip(outcome.first_scheduled).map(|(last, first)| last - first);
            if self.replicas[outcome.replica as usize].is_synchronous {
                assert!(Some(outcome.executed) <= span, "computed for longer than it was there");
            }
        }
        self.kept.request(outcome);
    }
}

/// Hands on requests, and looks at when they come and go.
pub struct WatchedSource<S> {
    inner: S,
    last_arrival: Nanos,
    most_under_way: u64,
    num_taken: u64,
    num_completed: u64,
    /// When the next was said to arrive, where it may not still become earlier.
    promised: Cell<Option<Nanos>>,
}

impl<S: RequestSource> WatchedSource<S> {
    pub fn new(inner: S, most_under_way: u64) -> Self {
        Self {
            inner,
            last_arrival: Nanos::ZERO,
            most_under_way,
            num_taken: 0,
            num_completed: 0,
            promised: Cell::new(None),
        }
    }

    /// Requests handed on.
    pub fn num_taken(&self) -> u64 {
        self.num_taken
    }
}

impl<S: RequestSource> RequestSource for WatchedSource<S> {
    fn next_arrival(&mut self) -> Option<Nanos> {
        let next = self.inner.next_arrival();
        assert!(next.is_none_or(|next| next >= self.last_arrival), "an arrival in the past");
        self.promised.set(next);
        next
    }

    fn take(&mut self) -> Option<WorkloadRequest> {
        let request = self.inner.take()?;
        assert!(request.arrival_time_ns >= self.last_arrival, "arrivals step back");
        if let Some(promised) = self.promised.take() {
            assert_eq!(promised, request.arrival_time_ns);
        }
        self.last_arrival = request.arrival_time_ns;
        self.num_taken += 1;
        if self.heeds_completions() {
            assert!(self.num_taken - self.num_completed <= self.most_under_way, "more than its users ask");
        }
        Some(request)
    }

    fn completed(&mut self, request_id: u64, time: Nanos) {
        assert!(time >= self.last_arrival, "an answer that came before requests already taken");
        self.num_completed += 1;
        assert!(self.num_completed <= self.num_taken);
        self.promised.set(None);
        self.inner.completed(request_id, time);
    }

    fn heeds_completions(&self) -> bool {
        self.inner.heeds_completions()
    }

    fn remaining(&self) -> Option<u64> {
        self.inner.remaining()
    }
}

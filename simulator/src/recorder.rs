//! What is kept of a simulation while it runs: everything, the rows of files, or sums alone.

use plumbline_schema::{BatchShape, Nanos, StepMetrics, StepRequests, WorkloadRequest};

use crate::{
    replica::RequestIds,
    scheduler::{Rejection, ScheduledStep, SchedulerState},
    serve::{Served, StepSpan},
    step_time::timeline::{StepTimeline, TimelineDetail},
};

/// What became of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Its number in order of arrival in the whole simulation.
    pub index: u64,
    /// The replica that served or rejected it.
    pub replica: u32,
    /// The request.
    pub request: WorkloadRequest,
    /// When it had been taken in; `None` when it was rejected.
    pub admitted: Option<Nanos>,
    /// When the first step with a part of it began.
    pub first_scheduled: Option<Nanos>,
    /// When its first token was out.
    pub first_token: Option<Nanos>,
    /// When its last token was out.
    pub last_token: Option<Nanos>,
    /// Sum of the durations of the steps that it had a part in.
    pub executed: Nanos,
    /// Output tokens.
    pub num_tokens: u32,
    /// How often it lost its blocks.
    pub num_preemptions: u32,
    /// The steps that made its tokens.
    pub token_steps: TokenSteps,
    /// Why it was rejected.
    pub rejection: Option<Rejection>,
}

impl Outcome {
    /// A request that could never be served.
    #[must_use]
    pub fn rejected(index: u64, replica: u32, request: WorkloadRequest, rejection: Rejection) -> Self {
        Self { index, replica, request, rejection: Some(rejection), ..Self::default() }
    }

    /// From arrival to the first token.
    #[must_use]
    pub fn ttft(&self) -> Option<Nanos> {
        Some(self.first_token?.saturating_since(self.request.arrival_time_ns))
    }

    /// From arrival to the last token.
    #[must_use]
    pub fn e2e(&self) -> Option<Nanos> {
        Some(self.last_token?.saturating_since(self.request.arrival_time_ns))
    }

    /// Mean time of a token after the first, ns; `None` for a single token.
    #[must_use]
    pub fn tpot_ns(&self) -> Option<f64> {
        let span = self.last_token?.saturating_since(self.first_token?);
        (self.num_tokens > 1).then(|| span.0 as f64 / f64::from(self.num_tokens - 1))
    }
}

/// The steps, by number, that each made one token of a request: runs of consecutive ones.
///
/// A token's time is the end of its step, so that one number a step and two a run keep the times of all tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenSteps {
    // Most requests have one run, which then needs no memory of its own.
    last: (u32, u32),
    earlier: Vec<(u32, u32)>,
}

impl TokenSteps {
    /// Adds a token of each of `count` consecutive steps.
    pub fn push(&mut self, first_step: u32, count: u32) {
        if !self.go_on(first_step, count) {
            if self.last.1 > 0 {
                self.earlier.push(self.last);
            }
            self.last = (first_step, count);
        }
    }

    /// How many tokens they made.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.earlier.iter().map(|&(_, count)| count).sum::<u32>() + self.last.1
    }

    /// Whether there is none yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.last.1 == 0
    }

    /// As [`Self::push`], where the last token so far is of the step before; false, and nothing is added, where not.
    #[must_use]
    #[inline]
    pub fn go_on(&mut self, first_step: u32, count: u32) -> bool {
        let (first, length) = self.last;
        let does_go_on = length > 0 && first + length == first_step;
        self.last.1 = if does_go_on { length + count } else { length };
        does_go_on
    }

    /// The step of each token, in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.earlier
            .iter()
            .chain(std::iter::once(&self.last))
            .flat_map(|&(first, count)| (first..).take(count as usize))
    }
}

/// A step that was launched.
#[derive(Clone, Copy, Debug)]
pub struct StepRecord<'a> {
    /// The replica.
    pub replica: u32,
    /// The step's number in its replica, from 0.
    pub number: u32,
    /// When its forming began.
    pub start: Nanos,
    /// Its shape, unpadded.
    pub shape: BatchShape,
    /// The scheduler's part of its time.
    pub schedule: Nanos,
    /// Where the scheduler's sequences stand, this step included.
    pub state: SchedulerState<'a>,
    /// When its parts take place, where that is wanted and known.
    pub timeline: Option<&'a StepTimeline>,
}

/// Keeps what it wants of what a replica does.
///
/// Of one replica, steps come in order of their numbers, and their ends too.
pub trait Recorder {
    /// Whether every step is wanted with its batch; without, stretches of decodes are run and told by
    /// [`Self::decode_steps`] alone.
    fn wants_batches(&self) -> bool;

    /// What every step is wanted with, where its batch is.
    fn wants_timelines(&self) -> TimelineDetail {
        TimelineDetail::None
    }

    /// A request came to a replica at `time`; told when the replica takes it in, never later than the next step.
    fn arrival(&mut self, replica: u32, time: Nanos) {
        let _ = (replica, time);
    }

    /// Where a replica's sequences stand from `time` on: some were taken in, or a step is complete. Told where every
    /// step is; times of one replica, its steps' starts among them, do not step back.
    fn state(&mut self, replica: u32, time: Nanos, state: &SchedulerState<'_>) {
        let _ = (replica, time, state);
    }

    /// A step was launched.
    fn step(&mut self, record: &StepRecord<'_>, step: &ScheduledStep, requests: &RequestIds<'_>);

    /// The tokens of a step launched at `start` were out at `end`.
    fn step_end(&mut self, replica: u32, number: u32, start: Nanos, end: Nanos);

    /// Steps of the same `num_seqs` decodes and nothing else were run, one after the other; at least one.
    fn decode_steps(&mut self, replica: u32, first_number: u32, steps: &[StepSpan], num_seqs: u32);

    /// `count` tokens came `gap` after the token before of their request.
    fn gaps(&mut self, gap: Nanos, count: u32);

    /// A request left: done or rejected.
    fn request(&mut self, outcome: Outcome);
}

/// Keeps a run in memory: requests, when each step ended, and on demand the steps.
#[derive(Clone, Debug, Default)]
pub struct RunRecorder {
    keeps_steps: bool,
    keeps_step_requests: bool,
    outcomes: Vec<Outcome>,
    replicas: Vec<ReplicaLog>,
}

/// The steps of one replica, in order of their numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplicaLog {
    /// The steps, where they were kept.
    pub steps: Vec<StepMetrics>,
    /// When each step's tokens were out.
    pub step_ends: Vec<Nanos>,
}

impl RunRecorder {
    /// Keeps every request and the time of every token.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps every step with its batch, too.
    #[must_use]
    pub fn with_steps() -> Self {
        Self { keeps_steps: true, ..Self::default() }
    }

    /// Keeps every step with its batch and its requests, too.
    #[must_use]
    pub fn with_step_requests() -> Self {
        Self { keeps_steps: true, keeps_step_requests: true, ..Self::default() }
    }

    /// What was kept, requests in order of arrival.
    #[must_use]
    pub fn into_served(mut self) -> Served {
        self.outcomes.sort_unstable_by_key(|outcome| outcome.index);
        Served { requests: self.outcomes, replicas: self.replicas }
    }

    fn log(&mut self, replica: u32) -> &mut ReplicaLog {
        let replica = replica as usize;
        if self.replicas.len() <= replica {
            self.replicas.resize_with(replica + 1, ReplicaLog::default);
        }
        &mut self.replicas[replica]
    }
}

impl Recorder for RunRecorder {
    fn wants_batches(&self) -> bool {
        self.keeps_steps
    }

    fn step(&mut self, record: &StepRecord<'_>, step: &ScheduledStep, requests: &RequestIds<'_>) {
        if self.keeps_steps {
            let requests = self.keeps_step_requests.then(|| step_requests(step, &record.state, requests));
            self.log(record.replica).steps.push(StepMetrics {
                step_start_ns: record.start,
                step_duration_ns: Nanos::ZERO,
                schedule_ns: record.schedule,
                batch: step.batch(),
                requests,
                phases: None,
            });
        }
    }

    fn step_end(&mut self, replica: u32, number: u32, start: Nanos, end: Nanos) {
        let log = self.log(replica);
        log.step_ends.push(end);
        if let Some(step) = log.steps.get_mut(number as usize) {
            step.step_duration_ns = end.saturating_since(start);
        }
    }

    fn decode_steps(&mut self, replica: u32, _first_number: u32, steps: &[StepSpan], _num_seqs: u32) {
        self.log(replica).step_ends.extend(steps.iter().map(StepSpan::end));
    }

    fn gaps(&mut self, _gap: Nanos, _count: u32) {}

    fn request(&mut self, outcome: Outcome) {
        self.outcomes.push(outcome);
    }
}

/// Tells two recorders the same.
#[derive(Clone, Copy, Debug)]
pub struct Tee<A, B>(pub A, pub B);

impl<A: Recorder, B: Recorder> Recorder for Tee<A, B> {
    fn wants_batches(&self) -> bool {
        self.0.wants_batches() || self.1.wants_batches()
    }

    fn wants_timelines(&self) -> TimelineDetail {
        self.0.wants_timelines().max(self.1.wants_timelines())
    }

    fn arrival(&mut self, replica: u32, time: Nanos) {
        self.0.arrival(replica, time);
        self.1.arrival(replica, time);
    }

    fn state(&mut self, replica: u32, time: Nanos, state: &SchedulerState<'_>) {
        self.0.state(replica, time, state);
        self.1.state(replica, time, state);
    }

    fn step(&mut self, record: &StepRecord<'_>, step: &ScheduledStep, requests: &RequestIds<'_>) {
        self.0.step(record, step, requests);
        self.1.step(record, step, requests);
    }

    fn step_end(&mut self, replica: u32, number: u32, start: Nanos, end: Nanos) {
        self.0.step_end(replica, number, start, end);
        self.1.step_end(replica, number, start, end);
    }

    fn decode_steps(&mut self, replica: u32, first_number: u32, steps: &[StepSpan], num_seqs: u32) {
        self.0.decode_steps(replica, first_number, steps, num_seqs);
        self.1.decode_steps(replica, first_number, steps, num_seqs);
    }

    fn gaps(&mut self, gap: Nanos, count: u32) {
        self.0.gaps(gap, count);
        self.1.gaps(gap, count);
    }

    fn request(&mut self, outcome: Outcome) {
        self.0.request(outcome.clone());
        self.1.request(outcome);
    }
}

/// Nobody is told nothing.
impl<R: Recorder> Recorder for Option<R> {
    fn wants_batches(&self) -> bool {
        self.as_ref().is_some_and(Recorder::wants_batches)
    }

    fn wants_timelines(&self) -> TimelineDetail {
        self.as_ref().map_or(TimelineDetail::None, Recorder::wants_timelines)
    }

    fn arrival(&mut self, replica: u32, time: Nanos) {
        if let Some(recorder) = self {
            recorder.arrival(replica, time);
        }
    }

    fn state(&mut self, replica: u32, time: Nanos, state: &SchedulerState<'_>) {
        if let Some(recorder) = self {
            recorder.state(replica, time, state);
        }
    }

    fn step(&mut self, record: &StepRecord<'_>, step: &ScheduledStep, requests: &RequestIds<'_>) {
        if let Some(recorder) = self {
            recorder.step(record, step, requests);
        }
    }

    fn step_end(&mut self, replica: u32, number: u32, start: Nanos, end: Nanos) {
        if let Some(recorder) = self {
            recorder.step_end(replica, number, start, end);
        }
    }

    fn decode_steps(&mut self, replica: u32, first_number: u32, steps: &[StepSpan], num_seqs: u32) {
        if let Some(recorder) = self {
            recorder.decode_steps(replica, first_number, steps, num_seqs);
        }
    }

    fn gaps(&mut self, gap: Nanos, count: u32) {
        if let Some(recorder) = self {
            recorder.gaps(gap, count);
        }
    }

    fn request(&mut self, outcome: Outcome) {
        if let Some(recorder) = self {
            recorder.request(outcome);
        }
    }
}

/// The requests of a step, for the columns that name them.
#[must_use]
pub fn step_requests(
    step: &ScheduledStep,
    state: &SchedulerState<'_>,
    requests: &RequestIds<'_>,
) -> StepRequests {
    let mut record = StepRequests { free_blocks: Some(state.kv_cache.num_free()), ..StepRequests::default() };
    for s in &step.sequences {
        let ids = if s.is_decode { &mut record.decode_request_ids } else { &mut record.prefill_request_ids };
        ids.push(requests.of(s.id));
    }
    record.preempted_request_ids = step.preempted.iter().map(|&id| requests.of(id)).collect();
    record.preempted_request_ids.sort_unstable();
    record
}

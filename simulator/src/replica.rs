//! One replica: a scheduler and what runs its steps, moved forward in time as far as is asked.

use std::{collections::VecDeque, mem};

use plumbline_schema::{Nanos, WorkloadRequest};

use crate::{
    recorder::{Outcome, Recorder, StepRecord, TokenSteps},
    scheduler::{ScheduledStep, Scheduler, SchedulerState},
    sequence::SequenceId,
    serve::{Executor, ServeError, StepSpan},
    step_time::timeline::TimelineDetail,
};

/// A request on its way into a replica.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// The request.
    pub request: WorkloadRequest,
    /// Its number in order of arrival in the whole simulation.
    pub index: u64,
    /// When the replica can first know of it; its arrival, or later where something else has to happen first.
    pub ready: Nanos,
    /// Prompt tokens whose keys and values come with it.
    pub num_transferred_tokens: u32,
}

impl Arrival {
    /// A request that a replica learns of when it arrives.
    #[must_use]
    pub fn new(request: WorkloadRequest, index: u64) -> Self {
        Self { ready: request.arrival_time_ns, request, index, num_transferred_tokens: 0 }
    }
}

/// A request that left a replica, as others (a router, a client) learn of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Departure {
    /// Its number in order of arrival in the whole simulation.
    pub index: u64,
    /// The request.
    pub request_id: u64,
    /// When its last token was out, or it was rejected.
    pub time: Nanos,
    /// Whether it was rejected.
    pub is_rejected: bool,
}

/// What a replica did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplicaCounts {
    /// Steps formed.
    pub steps: u64,
    /// Sequences of all steps.
    pub step_seqs: u64,
    /// Tokens computed, padding aside.
    pub step_tokens: u64,
    /// Output tokens.
    pub output_tokens: u64,
    /// Requests that got all their tokens.
    pub finished: u64,
    /// Requests that could never be served.
    pub rejected: u64,
    /// How often a sequence lost its blocks.
    pub preemptions: u64,
    /// KV blocks in use, summed over time: block ns.
    pub kv_block_ns: u128,
    /// Most KV blocks in use at once.
    pub kv_blocks_max: u32,
    /// Most sequences running at once.
    pub running_max: u64,
    /// Most sequences waiting at once.
    pub waiting_max: u64,
}

impl ReplicaCounts {
    fn observe(&mut self, state: &SchedulerState<'_>) {
        self.kv_blocks_max = self.kv_blocks_max.max(state.kv_cache.num_used());
        self.running_max = self.running_max.max(state.num_running as u64);
        self.waiting_max = self.waiting_max.max(state.num_waiting as u64);
    }
}

/// A scheduler and what runs its steps.
///
/// Each iteration reads the clock once and takes in every request that it can know of by then; one that comes while
/// others are taken in, or during a step, waits for the next iteration. With nothing to do it waits.
///
/// Stretches of steps that change nothing but context lengths are run without asking the scheduler for each, where
/// the executor and the recorder can do without; the result is the same.
pub struct Replica<E> {
    number: u32,
    scheduler: Box<dyn Scheduler>,
    executor: E,
    inbox: VecDeque<Arrival>,
    in_flight: VecDeque<InFlight>,
    /// The oldest step, being waited for: its tokens are out at the time.
    finishing: Option<(InFlight, Nanos)>,
    /// No step can be formed before one in flight is complete.
    is_blocked: bool,
    spare_steps: Vec<ScheduledStep>,
    /// By [`SequenceId`].
    progress: Vec<Progress>,
    finished: Vec<SequenceId>,
    departures: Vec<Departure>,
    pauses_at_departures: bool,
    /// Memory for steps that only decode.
    stretch: Vec<StepSpan>,
    /// When the latest complete step ended.
    last_end: Nanos,
    counts: ReplicaCounts,
}

struct InFlight {
    number: u32,
    start: Nanos,
    step: ScheduledStep,
}

/// How far an unfinished request is.
struct Progress {
    index: u64,
    request: WorkloadRequest,
    admitted: Nanos,
    first_scheduled: Option<Nanos>,
    first_token: Nanos,
    num_preemptions: u32,
    pace: Pace,
}

/// What changes with every step that a request has a part in; apart from the rest, to lie close together.
#[derive(Default)]
struct Pace {
    /// Sum of the durations of those steps.
    executed: Nanos,
    last_token: Nanos,
    token_steps: TokenSteps,
}

impl<E: Executor> Replica<E> {
    /// An idle replica.
    #[must_use]
    pub fn new(number: u32, scheduler: Box<dyn Scheduler>, executor: E) -> Self {
        Self {
            number,
            scheduler,
            executor,
            inbox: VecDeque::new(),
            in_flight: VecDeque::new(),
            finishing: None,
            is_blocked: false,
            spare_steps: Vec::new(),
            progress: Vec::new(),
            finished: Vec::new(),
            departures: Vec::new(),
            pauses_at_departures: false,
            stretch: Vec::new(),
            last_end: Nanos::ZERO,
            counts: ReplicaCounts::default(),
        }
    }

    /// Sends a request; those sent before are ready no later.
    pub fn push(&mut self, arrival: Arrival) {
        debug_assert!(self.inbox.back().is_none_or(|last| last.ready <= arrival.ready));
        self.inbox.push_back(arrival);
    }

    /// Requests sent and not yet done or rejected.
    #[must_use]
    pub fn num_outstanding(&self) -> usize {
        self.inbox.len() + self.scheduler.state().num_unfinished()
    }

    /// Its scheduler.
    #[must_use]
    pub fn scheduler(&self) -> &dyn Scheduler {
        &*self.scheduler
    }

    /// What runs its steps.
    #[must_use]
    pub fn executor(&self) -> &E {
        &self.executor
    }

    /// What ran its steps.
    #[must_use]
    pub fn into_executor(self) -> E {
        self.executor
    }

    /// What it did so far.
    #[must_use]
    pub fn counts(&self) -> ReplicaCounts {
        self.counts
    }

    /// From now on [`Self::run_until`] returns when a request leaves, so that what this makes happen elsewhere can
    /// reach it in time.
    pub fn pause_at_departures(&mut self) {
        self.pauses_at_departures = true;
    }

    /// Requests that left since this was last asked, in order of time.
    pub fn departures(&mut self) -> std::vec::Drain<'_, Departure> {
        self.departures.drain(..)
    }

    /// When it does something next, if nothing more is sent; `None` when it has nothing to do.
    #[must_use]
    pub fn next_time(&self) -> Option<Nanos> {
        if let Some((_, end)) = &self.finishing {
            return Some(*end);
        }
        let now = self.executor.now();
        if self.scheduler.state().num_unfinished() > 0 {
            return Some(now);
        }
        self.inbox.front().map(|arrival| arrival.ready.max(now))
    }

    /// Does everything that happens before `horizon`.
    ///
    /// # Errors
    /// When the executor fails, or the scheduler has work and forms no step.
    pub fn run_until<R: Recorder>(
        &mut self,
        horizon: Nanos,
        recorder: &mut R,
    ) -> Result<(), ServeError<E::Error>> {
        loop {
            if let Some((_, end)) = &self.finishing {
                if *end >= horizon {
                    return Ok(());
                }
                self.complete(recorder);
            }
            if self.pauses_at_departures && !self.departures.is_empty() {
                return Ok(());
            }
            let now = self.executor.now();
            if now >= horizon {
                return Ok(());
            }
            self.take_in(now, recorder)?;
            if self.pauses_at_departures && !self.departures.is_empty() {
                return Ok(());
            }
            if self.scheduler.state().num_unfinished() == 0 {
                let Some(next) = self.inbox.front() else { return Ok(()) };
                if next.ready >= horizon {
                    return Ok(());
                }
                self.executor.wait_until(next.ready).map_err(ServeError::Executor)?;
                continue;
            }
            if !recorder.wants_batches() && self.in_flight.is_empty() && self.decode_on(horizon, recorder)? {
                continue;
            }
            if self.is_blocked || !self.launch(recorder)? || self.in_flight.len() >= self.executor.depth() {
                let Some(oldest) = self.in_flight.pop_front() else {
                    return Err(ServeError::stalled(now, &self.scheduler.state()));
                };
                let end = self.executor.finish().map_err(ServeError::Executor)?;
                self.finishing = Some((oldest, end));
            }
        }
    }

    /// Ends a run early, after an error: tells of every request that was taken in and is not done, and of those still
    /// on their way, with the tokens that each has.
    pub fn abandon<R: Recorder>(&mut self, recorder: &mut R) {
        let unfinished = mem::take(&mut self.progress).into_iter();
        let unfinished = unfinished.filter(|progress| progress.request.num_prefill_tokens > 0);
        for progress in unfinished {
            recorder.request(progress.outcome(self.number));
        }
        for Arrival { request, index, .. } in self.inbox.drain(..) {
            recorder.request(Outcome { index, replica: self.number, request, ..Outcome::default() });
        }
    }

    /// Gives the scheduler what has come by `now`.
    fn take_in<R: Recorder>(&mut self, now: Nanos, recorder: &mut R) -> Result<(), ServeError<E::Error>> {
        let mut has_taken = false;
        while self.inbox.front().is_some_and(|arrival| arrival.ready <= now) {
            let Some(arrival) = self.inbox.pop_front() else { break };
            let Arrival { request, index, ready, num_transferred_tokens } = arrival;
            has_taken = true;
            recorder.arrival(self.number, ready);
            let added = match num_transferred_tokens {
                0 => self.scheduler.add(&request),
                num_tokens => self.scheduler.add_transferred(&request, num_tokens),
            };
            match added {
                Ok(id) => {
                    self.executor.admit(id, &request).map_err(ServeError::Executor)?;
                    let progress = Progress::new(index, request, self.executor.now());
                    match self.progress.get_mut(id.index()) {
                        Some(slot) => *slot = progress,
                        None => self.progress.push(progress),
                    }
                }
                Err(rejection) => {
                    self.counts.rejected += 1;
                    let request_id = request.request_id;
                    self.departures.push(Departure { index, request_id, time: now, is_rejected: true });
                    recorder.request(Outcome::rejected(index, self.number, request, rejection));
                }
            }
        }
        if has_taken && recorder.wants_batches() {
            recorder.state(self.number, now, &self.scheduler.state());
        }
        Ok(())
    }

    /// Forms and launches a step; false when there is none to form.
    fn launch<R: Recorder>(&mut self, recorder: &mut R) -> Result<bool, ServeError<E::Error>> {
        let mut step = self.spare_steps.pop().unwrap_or_default();
        let start = self.executor.now();
        self.scheduler.schedule(&mut step);
        if step.is_empty() {
            self.spare_steps.push(step);
            self.is_blocked = true;
            return Ok(false);
        }
        let (state, shape) = (self.scheduler.state(), step.shape());
        let schedule = self.executor.launch(&step, &shape, start, &state).map_err(ServeError::Executor)?;
        let timeline = match recorder.wants_timelines() {
            TimelineDetail::None => None,
            detail => {
                let operators = detail == TimelineDetail::Operators;
                self.executor.timeline(&step, operators).map_err(ServeError::Executor)?
            }
        };
        let number = self.counts.steps as u32;
        self.counts.steps += 1;
        self.counts.step_seqs += step.sequences.len() as u64;
        self.counts.observe(&state);
        self.counts.preemptions += step.preempted.len() as u64;
        self.counts.step_tokens += u64::from(shape.num_tokens);
        for id in &step.preempted {
            self.progress[id.index()].num_preemptions += 1;
        }
        let requests = RequestIds(&self.progress);
        let timeline = timeline.as_ref();
        let record = StepRecord { replica: self.number, number, start, shape, schedule, state, timeline };
        recorder.step(&record, &step, &requests);
        self.in_flight.push_back(InFlight { number, start, step });
        Ok(true)
    }

    /// Hands out the tokens of the step being waited for.
    fn complete<R: Recorder>(&mut self, recorder: &mut R) {
        let Some((InFlight { number, start, step }, end)) = self.finishing.take() else { return };
        let duration = end.saturating_since(start);
        let used = self.scheduler.state().kv_cache.num_used();
        self.counts.kv_block_ns += u128::from(used) * u128::from(duration.0);
        recorder.step_end(self.number, number, start, end);
        let (mut num_tokens, mut num_in_a_row) = (0_u64, 0);
        for s in &step.sequences {
            let progress = &mut self.progress[s.id.index()];
            progress.pace.executed += duration;
            if !s.samples {
                progress.first_scheduled.get_or_insert(start);
                continue;
            }
            num_tokens += 1;
            let last_token = mem::replace(&mut progress.pace.last_token, end);
            if progress.pace.token_steps.go_on(number, 1) {
                num_in_a_row += 1;
                continue;
            }
            progress.first_scheduled.get_or_insert(start);
            if progress.pace.token_steps.is_empty() {
                progress.first_token = end;
            } else {
                recorder.gaps(end.saturating_since(last_token), 1);
            }
            progress.pace.token_steps.push(number, 1);
        }
        // One for all whose token before was of the step before.
        recorder.gaps(end.saturating_since(self.last_end), num_in_a_row);
        self.counts.output_tokens += num_tokens;
        self.last_end = end;
        self.scheduler.complete(&step, &mut self.finished);
        for id in &self.finished {
            let progress = mem::take(&mut self.progress[id.index()]);
            self.counts.finished += 1;
            let (index, request_id) = (progress.index, progress.request.request_id);
            self.departures.push(Departure { index, request_id, time: end, is_rejected: false });
            recorder.request(progress.outcome(self.number));
        }
        if recorder.wants_batches() {
            recorder.state(self.number, end, &self.scheduler.state());
        }
        self.is_blocked = false;
        self.spare_steps.push(step);
    }

    /// Runs the steps that the scheduler promises to be decodes of the same sequences, up to what comes in or
    /// `horizon`; false when there are none.
    fn decode_on<R: Recorder>(
        &mut self,
        horizon: Nanos,
        recorder: &mut R,
    ) -> Result<bool, ServeError<E::Error>> {
        let Some(steady) = self.scheduler.steady() else { return Ok(false) };
        let bound = self.inbox.front().map_or(horizon, |arrival| arrival.ready.min(horizon));
        let mut steps = mem::take(&mut self.stretch);
        steps.clear();
        let run = self.executor.decode(&steady, bound, &mut steps).map_err(ServeError::Executor);
        if run.is_ok() && !steps.is_empty() {
            self.account(&steps, steady.load.num_decode_seqs, recorder);
        }
        let has_run = !steps.is_empty();
        self.stretch = steps;
        run.map(|()| has_run)
    }

    /// Accounts for steps, at least one, that the scheduler promised and that have run: decodes of all `num_seqs` that
    /// run.
    fn account<R: Recorder>(&mut self, steps: &[StepSpan], num_seqs: u32, recorder: &mut R) {
        let (first_number, done) = (self.counts.steps as u32, steps.len() as u32);
        recorder.decode_steps(self.number, first_number, steps, num_seqs);
        let (first_end, mut end) = (steps[0].end(), self.last_end);
        for (i, step) in steps.iter().enumerate() {
            let last_end = mem::replace(&mut end, step.end());
            if i > 0 {
                recorder.gaps(end.saturating_since(last_end), num_seqs);
            }
        }
        let executed = steps.iter().map(|step| step.duration).sum::<Nanos>();
        // A stretch takes blocks evenly, so that their mean lies half way.
        let before = self.scheduler.state().kv_cache.num_used();
        self.scheduler.advance(done);
        let state = self.scheduler.state();
        self.counts.observe(&state);
        let twice_mean = u128::from(before + state.kv_cache.num_used());
        self.counts.kv_block_ns += twice_mean * u128::from(executed.0) / 2;
        let mut num_in_a_row = 0;
        for id in self.scheduler.running() {
            let pace = &mut self.progress[id.index()].pace;
            pace.executed += executed;
            let last_token = mem::replace(&mut pace.last_token, end);
            if pace.token_steps.go_on(first_number, done) {
                num_in_a_row += 1;
            } else {
                recorder.gaps(first_end.saturating_since(last_token), 1);
                pace.token_steps.push(first_number, done);
            }
        }
        recorder.gaps(first_end.saturating_since(self.last_end), num_in_a_row);
        self.last_end = end;
        let tokens = u64::from(done) * u64::from(num_seqs);
        self.counts.steps += u64::from(done);
        self.counts.step_seqs += tokens;
        self.counts.step_tokens += tokens;
        self.counts.output_tokens += tokens;
    }
}

impl Progress {
    fn new(index: u64, request: WorkloadRequest, admitted: Nanos) -> Self {
        Self { index, request, admitted, ..Self::default() }
    }

    fn outcome(self, replica: u32) -> Outcome {
        let Pace { executed, last_token, token_steps } = self.pace;
        let has_token = !token_steps.is_empty();
        Outcome {
            index: self.index,
            replica,
            request: self.request,
            admitted: Some(self.admitted),
            first_scheduled: self.first_scheduled,
            first_token: has_token.then_some(self.first_token),
            last_token: has_token.then_some(last_token),
            executed,
            num_tokens: token_steps.len(),
            num_preemptions: self.num_preemptions,
            token_steps,
            rejection: None,
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            index: 0,
            request: WorkloadRequest::default(),
            admitted: Nanos::ZERO,
            first_scheduled: None,
            first_token: Nanos::ZERO,
            num_preemptions: 0,
            pace: Pace::default(),
        }
    }
}

/// The requests behind a replica's sequences.
pub struct RequestIds<'a>(&'a [Progress]);

impl RequestIds<'_> {
    /// The request of an unfinished sequence.
    #[must_use]
    pub fn of(&self, id: SequenceId) -> u64 {
        self.0[id.index()].request.request_id
    }
}

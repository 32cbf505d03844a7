//! The engine behind the loop that serves a workload: a wall clock, and steps that run.

use std::{
    cell::Cell,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use plumbline_profiler::host::short_score;
use plumbline_schema::{BatchShape, Nanos, StepPhases, WorkloadRequest};
use plumbline_simulator::{
    scheduler::{ScheduledStep, SchedulerState},
    sequence::SequenceId,
    serve::Executor,
};

use crate::{
    engine::{Dispatch, Engine, LaunchedStep},
    error::EngineError,
    inputs::{Draw, Part},
    prompts::{made_up_prompt, mix, uniform_at},
};

/// How close to its end a wait stops to sleep: a sleeping thread may be woken late by this much.
const SPIN: Duration = Duration::from_micros(300);
/// How long a sleep lasts at most before the request to stop is looked at again.
const MAX_SLEEP: Duration = Duration::from_millis(20);
/// Idle time that the host's score is measured in, and how much of it has to be left afterwards.
const SCORED_GAP: Duration = Duration::from_millis(400);
/// No score sooner than this after the one before.
const SCORE_INTERVAL: Nanos = Nanos(2_000_000_000);

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 for the largest logit.
    pub temperature: f32,
    /// Share of the probability that the candidates have, in (0, 1].
    pub top_p: f32,
    /// Of prompts and draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// The draw of a request's token at a place of its output; the same in every batch.
    #[must_use]
    pub fn draw(&self, request_id: u64, place: usize) -> Draw {
        if self.temperature <= 0.0 {
            return Draw::GREEDY;
        }
        let key = mix(self.seed ^ mix(request_id).wrapping_add(5));
        Draw {
            inverse_temperature: 1.0 / self.temperature,
            top_p: self.top_p,
            uniform: uniform_at(key, place as u64),
        }
    }
}

/// A time without anything to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdleGap {
    /// When it began.
    pub start: Nanos,
    /// How long it was.
    pub duration: Nanos,
}

/// The host's score at some time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoreAt {
    /// When it was measured, in an idle moment.
    pub time: Nanos,
    /// Million iterations a second.
    pub score: f64,
}

/// What an executor saw.
#[derive(Clone, Debug, Default)]
pub struct ExecutorLog {
    /// Of each finished step.
    pub phases: Vec<StepPhases>,
    /// How each was launched.
    pub dispatches: Vec<Dispatch>,
    /// In order.
    pub idle_gaps: Vec<IdleGap>,
    /// In order.
    pub scores: Vec<ScoreAt>,
}

/// A request as the engine holds it.
#[derive(Clone, Debug, Default)]
struct Tokens {
    request_id: u64,
    prompt_len: usize,
    /// Prompt and output.
    ids: Vec<u32>,
}

/// Runs steps on an engine.
pub struct EngineExecutor<'a> {
    engine: &'a mut Engine,
    sampling: Sampling,
    stop: &'a AtomicBool,
    began: Instant,
    /// By sequence.
    sequences: Vec<Tokens>,
    in_flight: Option<InFlight>,
    /// The last step's end, until the clock is read again.
    unaccounted: Cell<Option<Nanos>>,
    finish_ns: Cell<Nanos>,
    last_score: Nanos,
    log: ExecutorLog,
    /// Tokens of finished requests, where they are kept.
    outputs: Option<Vec<(u64, Vec<u32>)>>,
}

struct InFlight {
    step: LaunchedStep,
    launched_at: Nanos,
    /// Whose tokens are drawn, in the kernels' order.
    drawn: Vec<SequenceId>,
}

impl<'a> EngineExecutor<'a> {
    /// An executor whose clock starts now; it ends with [`EngineError::Interrupted`] when `stop` is set.
    #[must_use]
    pub fn new(engine: &'a mut Engine, sampling: Sampling, stop: &'a AtomicBool) -> Self {
        Self {
            engine,
            sampling,
            stop,
            began: Instant::now(),
            sequences: Vec::new(),
            in_flight: None,
            unaccounted: Cell::new(None),
            finish_ns: Cell::new(Nanos::ZERO),
            last_score: Nanos::ZERO,
            log: ExecutorLog::default(),
            outputs: None,
        }
    }

    /// Keeps the output of every request.
    #[must_use]
    pub fn keeping_outputs(mut self) -> Self {
        self.outputs = Some(Vec::new());
        self
    }

    /// What it saw, and the outputs kept: each request's id and tokens.
    #[must_use]
    pub fn into_log(mut self) -> (ExecutorLog, Vec<(u64, Vec<u32>)>) {
        self.account();
        for tokens in std::mem::take(&mut self.sequences) {
            self.keep_output(&tokens);
        }
        (self.log, self.outputs.unwrap_or_default())
    }

    fn elapsed(&self) -> Nanos {
        Nanos(self.began.elapsed().as_nanos() as u64)
    }

    /// Notes how long the last step was accounted for.
    fn account(&mut self) {
        if let Some(phases) = self.log.phases.last_mut()
            && self.unaccounted.take().is_none()
        {
            phases.finish_ns = self.finish_ns.take();
        }
    }

    fn check_stop(&self) -> Result<(), EngineError> {
        if self.stop.load(Ordering::Relaxed) { Err(EngineError::Interrupted) } else { Ok(()) }
    }

    /// Sleeps, and waits actively for the end.
    fn sleep_until(&self, time: Nanos) -> Result<(), EngineError> {
        loop {
            self.check_stop()?;
            let left = Duration::from_nanos(time.saturating_since(self.elapsed()).0);
            if left.is_zero() {
                return Ok(());
            }
            match left.checked_sub(SPIN) {
                Some(sleep) => thread::sleep(sleep.min(MAX_SLEEP)),
                None => std::hint::spin_loop(),
            }
        }
    }
}

impl Executor for EngineExecutor<'_> {
    type Error = EngineError;

    fn now(&self) -> Nanos {
        let now = self.elapsed();
        // The first look at the clock after a step: the loop has accounted for it.
        if let Some(end) = self.unaccounted.take() {
            self.finish_ns.set(now.saturating_since(end));
        }
        now
    }

    fn wait_until(&mut self, time: Nanos) -> Result<(), EngineError> {
        let start = self.now();
        let gap = Duration::from_nanos(time.saturating_since(start).0);
        if gap > SCORED_GAP && start.saturating_since(self.last_score) >= SCORE_INTERVAL {
            // Half of the gap is over before: caches are as cold as ever, and the half after is left to calm down.
            self.sleep_until(start + Nanos(gap.as_nanos() as u64 / 2))?;
            let score = short_score();
            self.last_score = self.elapsed();
            self.log.scores.push(ScoreAt { time: self.last_score, score });
        }
        self.sleep_until(time)?;
        let duration = self.elapsed().saturating_since(start);
        self.log.idle_gaps.push(IdleGap { start, duration });
        Ok(())
    }

    fn admit(&mut self, id: SequenceId, request: &WorkloadRequest) -> Result<(), EngineError> {
        let ids = made_up_prompt(request, self.engine.model().vocab_size, self.sampling.seed);
        let tokens = Tokens { request_id: request.request_id, prompt_len: ids.len(), ids };
        if self.sequences.len() <= id.index() {
            self.sequences.resize_with(id.index() + 1, Tokens::default);
        }
        let before = std::mem::replace(&mut self.sequences[id.index()], tokens);
        self.keep_output(&before);
        Ok(())
    }

    fn launch(
        &mut self,
        step: &ScheduledStep,
        _batch: &BatchShape,
        start: Nanos,
        state: &SchedulerState<'_>,
    ) -> Result<Nanos, EngineError> {
        self.account();
        self.check_stop()?;
        let schedule = self.elapsed().saturating_since(start);
        let mut parts = Vec::with_capacity(step.sequences.len());
        for s in &step.sequences {
            let sequence = &self.sequences[s.id.index()];
            let first = s.context_len as usize;
            let place = sequence.ids.len() - sequence.prompt_len;
            parts.push(Part {
                tokens: &sequence.ids[first..first + s.num_tokens as usize],
                context_len: s.context_len,
                blocks: state.kv_cache.block_table(s.id),
                is_decode: s.is_decode,
                draw: s.samples.then(|| self.sampling.draw(sequence.request_id, place)),
            });
        }
        let launched = self.engine.launch(&parts)?;
        let drawn = |is_decode| {
            step.sequences.iter().filter(move |s| s.samples && s.is_decode == is_decode).map(|s| s.id)
        };
        let drawn = drawn(false).chain(drawn(true)).collect();
        self.in_flight = Some(InFlight { step: launched, launched_at: self.elapsed(), drawn });
        Ok(schedule)
    }

    fn finish(&mut self) -> Result<Nanos, EngineError> {
        let Some(InFlight { step, launched_at, drawn }) = self.in_flight.take() else {
            return Ok(self.elapsed());
        };
        let began = self.began;
        let elapsed = || Nanos(began.elapsed().as_nanos() as u64);
        let ids = self.engine.wait(&step)?;
        let waited = elapsed();
        for (id, token) in drawn.iter().zip(ids) {
            self.sequences[id.index()].ids.push(token);
        }
        let end = elapsed();
        let nanos = |duration: Duration| Nanos(duration.as_nanos() as u64);
        self.log.phases.push(StepPhases {
            prepare_ns: nanos(step.prepare),
            launch_ns: nanos(step.launch),
            wait_ns: waited.saturating_since(launched_at),
            sample_ns: end.saturating_since(waited),
            finish_ns: Nanos::ZERO,
        });
        self.log.dispatches.push(step.dispatch);
        self.unaccounted.set(Some(end));
        Ok(end)
    }
}

impl EngineExecutor<'_> {
    fn keep_output(&mut self, tokens: &Tokens) {
        let output = &tokens.ids[tokens.prompt_len..];
        if let Some(outputs) = &mut self.outputs
            && !output.is_empty()
        {
            outputs.push((tokens.request_id, output.to_vec()));
        }
    }
}

//! A modelled engine: it asks how long each step takes, and moves the clock.

use std::{cell::RefCell, collections::VecDeque, sync::Arc};

use plumbline_bundles::{Dispatch, EngineProfile, HostCost, engine_profile::ClientCosts};
use plumbline_schema::{BatchShape, Nanos, WorkloadRequest};

use crate::{
    residual::{ResidualSampler, Residuals},
    scheduler::{ScheduledStep, SchedulerState, Steady},
    sequence::SequenceId,
    serve::{Executor, StepSpan},
    simulate::SimulateOptions,
    step_time::{
        StepTime, StepTimeError, StepTimeModel,
        pipeline::{Launched, Pipeline, StepParts},
        timeline::StepTimeline,
    },
    times::{OperatorTimes, ProvenanceTimes},
};

/// Lends a step-time model: one executor's alone, or one that replicas of a kind share.
pub trait LendModel {
    /// Where the model's operator times come from.
    type Times: OperatorTimes;

    /// Does something with the model.
    fn lend<R>(&mut self, ask: impl FnOnce(&mut StepTimeModel<Self::Times>) -> R) -> R;
}

impl<T: OperatorTimes> LendModel for &mut StepTimeModel<T> {
    type Times = T;

    fn lend<R>(&mut self, ask: impl FnOnce(&mut StepTimeModel<T>) -> R) -> R {
        ask(self)
    }
}

impl<T: OperatorTimes> LendModel for &RefCell<StepTimeModel<T>> {
    type Times = T;

    fn lend<R>(&mut self, ask: impl FnOnce(&mut StepTimeModel<T>) -> R) -> R {
        ask(&mut self.borrow_mut())
    }
}

/// Runs steps by asking how long they take.
///
/// A synchronous engine has one step in flight. With `async_scheduling`, or pipeline stages, the next is formed while
/// earlier ones run; see [`Pipeline`].
#[derive(Debug)]
pub struct SimulatedExecutor<'a, M> {
    model: M,
    costs: EngineCosts,
    residuals: Option<Scatter>,
    depth: usize,
    /// Used with more than one step in flight.
    pipeline: Pipeline,
    clock: Nanos,
    last_end: Nanos,
    /// Whether the next step comes after an idle gap; the first of a run does.
    is_after_idle: bool,
    in_flight: VecDeque<InFlight>,
    busy: Busy,
    /// What the step launched last is made of.
    last_time: Option<StepTime>,
    kept: Option<&'a mut Vec<StepTime>>,
}

/// What an engine's host does outside of a step's own costs.
#[derive(Clone, Copy, Debug)]
struct EngineCosts {
    schedule: HostCost,
    client: ClientCosts,
    host_factor: f64,
    idle_threshold: Nanos,
}

#[derive(Debug)]
struct Scatter {
    sampler: ResidualSampler,
    quantiles: Arc<[Vec<f64>; 3]>,
}

#[derive(Debug)]
struct InFlight {
    start: Nanos,
    launched: Option<Launched>,
    /// When its tokens are out, where that is known at the launch.
    end: Nanos,
    /// What the host does after it, ns.
    between_ns: f64,
}

/// What an engine's time went into.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Busy {
    /// GPU time of all steps, ns.
    pub gpu_ns: f64,
    /// Predicted operator times of all steps, before the profile's factors, by where they come from.
    pub provenance: ProvenanceTimes,
    /// Steps launched kernel by kernel, in piecewise graphs, and in one full graph.
    pub steps: [u64; 3],
}

impl<'a, M: LendModel> SimulatedExecutor<'a, M> {
    /// An engine that has not run a step yet, at time 0; the first replica of a simulation.
    #[must_use]
    pub fn new(model: M, options: &SimulateOptions) -> Self {
        Self::of_replica(model, options, 0)
    }

    /// As [`Self::new`]; each replica draws from streams of its own.
    #[must_use]
    pub fn of_replica(mut model: M, options: &SimulateOptions, replica: u32) -> Self {
        let (costs, depth, stages, quantiles) = model.lend(|model| {
            let (profile, deployment) = (model.profile(), model.deployment());
            let costs = EngineCosts {
                schedule: profile.schedule,
                client: profile.client,
                host_factor: profile.host_factor,
                idle_threshold: Nanos::from_f64(profile.idle_threshold_ns),
            };
            let stages = deployment.pipeline_parallel_size as usize;
            let depth = stages.max(if deployment.async_scheduling { 2 } else { 1 });
            (costs, depth, stages, quantiles(profile))
        });
        let sampler = || ResidualSampler::of_replica(options.seed, replica);
        Self {
            model,
            costs,
            residuals: (options.residuals == Residuals::Drawn)
                .then(|| Scatter { sampler: sampler(), quantiles }),
            depth,
            pipeline: Pipeline::new(stages),
            clock: Nanos::ZERO,
            last_end: Nanos::ZERO,
            is_after_idle: true,
            in_flight: VecDeque::new(),
            busy: Busy::default(),
            last_time: None,
            kept: None,
        }
    }

    /// Keeps what each step's time is made of, in `kept`.
    #[must_use]
    pub fn keeping(mut self, kept: &'a mut Vec<StepTime>) -> Self {
        self.kept = Some(kept);
        self
    }

    /// What its time went into so far.
    #[must_use]
    pub fn busy(&self) -> Busy {
        self.busy
    }

    /// When its last step ended.
    #[must_use]
    pub fn last_end(&self) -> Nanos {
        self.last_end
    }

    /// What `tell` makes of the time of a step that begins now, its scatter drawn.
    #[inline]
    fn timed<R>(
        &mut self,
        batch: &BatchShape,
        tell: impl FnOnce(&StepTime) -> R,
    ) -> Result<R, StepTimeError> {
        let Self { model, residuals, busy, kept, .. } = self;
        let is_after_idle = std::mem::take(&mut self.is_after_idle);
        model.lend(|model| {
            let time = model.step_time_in_place(batch, is_after_idle)?;
            let dispatch = time.parts.dispatch;
            if let Some(Scatter { sampler, quantiles }) = residuals {
                time.residual = sampler.draw(dispatch, &quantiles[dispatch as usize]);
            }
            busy.gpu_ns += time.gpu_ns;
            busy.provenance += time.parts.provenance;
            busy.steps[dispatch as usize] += 1;
            if let Some(kept) = kept {
                kept.push(*time);
            }
            Ok(tell(time))
        })
    }

    /// The scheduler's part of a step of a duration.
    #[inline]
    fn schedule(&self, batch: &BatchShape) -> Nanos {
        Nanos::from_f64(self.costs.host_factor * self.costs.schedule.at(batch.num_seqs, batch.num_tokens))
    }

    /// What the host does between a step and the next, ns.
    #[inline]
    fn between_ns(&self, batch: &BatchShape) -> f64 {
        self.costs.host_factor * self.costs.client.between_steps.at(batch.num_seqs, batch.num_tokens)
    }

    /// Launches a step behind others: the host goes on when it has launched it.
    fn launch_behind(&mut self, batch: &BatchShape, start: Nanos) -> Result<Launched, StepTimeError> {
        let time = self.timed(batch, |time| *time)?;
        let Self { model, pipeline, .. } = self;
        let launched = model.lend(|model| {
            let parts = StepParts {
                host_pre_ns: time.host_pre_ns * time.residual,
                stages: model.stage_times(&time)?,
                host_post_ns: time.host_post_ns * time.residual,
            };
            Ok::<_, StepTimeError>(pipeline.launch(start, &parts))
        })?;
        self.last_time = Some(time);
        self.clock = self.clock.max(launched.host_free);
        Ok(launched)
    }
}

impl<M: LendModel> Executor for SimulatedExecutor<'_, M> {
    type Error = StepTimeError;

    fn now(&self) -> Nanos {
        self.clock
    }

    fn wait_until(&mut self, time: Nanos) -> Result<(), StepTimeError> {
        self.clock = self.clock.max(time);
        self.is_after_idle |= self.in_flight.is_empty()
            && self.clock.saturating_since(self.last_end) >= self.costs.idle_threshold;
        Ok(())
    }

    fn admit(&mut self, _id: SequenceId, request: &WorkloadRequest) -> Result<(), StepTimeError> {
        let tokens = f64::from(request.num_prefill_tokens);
        let client = &self.costs.client;
        let cost_ns = self.costs.host_factor * (client.admit_ns + client.admit_per_token_ns * tokens);
        self.clock += Nanos::from_f64(cost_ns);
        Ok(())
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn launch(
        &mut self,
        _step: &ScheduledStep,
        batch: &BatchShape,
        start: Nanos,
        _state: &SchedulerState<'_>,
    ) -> Result<Nanos, StepTimeError> {
        let between_ns = self.between_ns(batch);
        let schedule = self.schedule(batch);
        if self.depth > 1 {
            let launched = self.launch_behind(batch, start)?;
            self.in_flight.push_back(InFlight { start, launched: Some(launched), end: start, between_ns });
            return Ok(schedule);
        }
        let (duration, time) = self.timed(batch, |time| (duration(time), *time))?;
        self.last_time = Some(time);
        let end = start + duration;
        self.in_flight.push_back(InFlight { start, launched: None, end, between_ns });
        Ok(schedule.min(duration))
    }

    fn timeline(
        &mut self,
        step: &ScheduledStep,
        operators: bool,
    ) -> Result<Option<StepTimeline>, StepTimeError> {
        let (Some(time), Some(in_flight)) = (&self.last_time, self.in_flight.back()) else { return Ok(None) };
        let mut timeline = if in_flight.launched.is_some() {
            StepTimeline::pipelined(time, self.pipeline.spans())
        } else {
            let duration = in_flight.end.saturating_since(in_flight.start);
            StepTimeline::synchronous(time, in_flight.start, duration)
        };
        if operators {
            let times = self.model.lend(|model| model.operator_times(&step.shape()))?;
            for (stage, times) in timeline.stages.iter_mut().zip(times) {
                stage.operators = times;
            }
        }
        Ok(Some(timeline))
    }

    fn finish(&mut self) -> Result<Nanos, StepTimeError> {
        let Some(oldest) = self.in_flight.pop_front() else { return Ok(self.clock) };
        let after = Nanos::from_f64(oldest.between_ns);
        if let Some(launched) = &oldest.launched {
            self.pipeline.occupy_host(self.clock, 0.0);
            let end = self.pipeline.finish(launched).max(oldest.start + Nanos(1));
            self.last_end = end;
            self.clock = self.clock.max(end) + after;
            self.pipeline.occupy_host(self.clock, 0.0);
            return Ok(end);
        }
        self.last_end = oldest.end;
        self.clock = oldest.end + after;
        Ok(oldest.end)
    }

    fn decode(
        &mut self,
        steady: &Steady,
        bound: Nanos,
        steps: &mut Vec<StepSpan>,
    ) -> Result<(), StepTimeError> {
        if self.depth > 1 {
            return Ok(());
        }
        let mut batch = BatchShape::from_load(steady.load);
        let (schedule, between) = (self.schedule(&batch), Nanos::from_f64(self.between_ns(&batch)));
        for _ in 0..steady.num_steps {
            let start = self.clock;
            if start >= bound {
                break;
            }
            let duration = self.timed(&batch, duration)?;
            steps.push(StepSpan { start, duration, schedule: schedule.min(duration) });
            self.last_end = start + duration;
            self.clock = self.last_end + between;
            batch.attention.decode_kv_tokens += u64::from(batch.num_seqs);
            batch.attention.max_decode_kv_tokens += 1;
        }
        Ok(())
    }
}

/// Residual quantiles by [`Dispatch`] as a number.
fn quantiles(profile: &EngineProfile) -> Arc<[Vec<f64>; 3]> {
    let of = |dispatch| {
        profile.dispatch.get(&dispatch).map_or_else(Vec::new, |costs| costs.residual_quantiles.clone())
    };
    Arc::new(Dispatch::ALL.map(of))
}

/// At least 1 ns: whatever the residual, the clock moves.
#[inline]
fn duration(time: &StepTime) -> Nanos {
    Nanos::from_f64(time.total_ns()).max(Nanos(1))
}

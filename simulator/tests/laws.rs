//! The laws of a simulation, over random workloads and deployments.

mod common;

use common::{deployment, deployments, engines, profile, times, workloads};
use plumbline_bundles::EngineProfile;
use plumbline_schema::{
    BatchShape, Deployment, ModelSpec, Nanos, RequestStatus, Run, Workload, WorkloadRequest,
};
use plumbline_simulator::{
    Executor, OperatorTimes, Residuals, SchedulerKind, SimulateOptions, SimulatedExecutor, Simulation,
    StepTimeModel,
    scheduler::{ScheduledStep, SchedulerState},
    sequence::SequenceId,
    serve::serve,
    simulate,
};
use proptest::prelude::*;

const SCATTER: [f64; 4] = [0.7, 0.95, 1.05, 2.5];

fn run(workload: &Workload, deployment: &Deployment, seed: u64, quantiles: &[f64]) -> Simulation {
    run_by(SchedulerKind::VllmV1, workload, deployment, seed, quantiles)
}

fn run_by(
    kind: SchedulerKind,
    workload: &Workload,
    deployment: &Deployment,
    seed: u64,
    quantiles: &[f64],
) -> Simulation {
    let model = ModelSpec::load("qwen3-0.6b").unwrap();
    let options = SimulateOptions { seed, ..SimulateOptions::default() };
    let profile = EngineProfile { scheduler: kind.name().into(), ..profile(1.0, quantiles) };
    simulate(&model, workload, deployment, &profile, times(1.0), &options).unwrap()
}

/// The run's files as text.
fn bytes(run: &Run) -> String {
    format!("{:?}\n{:?}\n{:?}\n{:?}", run.info, run.requests, run.tokens, run.steps)
}

/// Watches the laws that hold at every step, around the simulated executor.
struct Watched<'a, T> {
    inner: SimulatedExecutor<'a, &'a mut StepTimeModel<T>>,
    start: Nanos,
    last_now: Nanos,
    num_tokens: u64,
    num_admitted: usize,
}

impl<T: OperatorTimes> Watched<'_, T> {
    fn check(&mut self, state: &SchedulerState<'_>) {
        let cache = state.kv_cache;
        assert_eq!(cache.num_free() + cache.num_used(), cache.num_blocks());
        let held: usize = (0..self.num_admitted).map(|i| cache.block_table(SequenceId(i as u32)).len()).sum();
        assert_eq!(held, cache.num_used() as usize);
        assert!(self.inner.now() >= self.last_now, "the clock stepped back");
        self.last_now = self.inner.now();
    }
}

impl<T: OperatorTimes> Executor for Watched<'_, T> {
    type Error = plumbline_simulator::StepTimeError;

    fn now(&self) -> Nanos {
        self.inner.now()
    }

    fn wait_until(&mut self, time: Nanos) -> Result<(), Self::Error> {
        self.inner.wait_until(time)?;
        assert!(self.inner.now() >= time);
        Ok(())
    }

    fn admit(&mut self, id: SequenceId, request: &WorkloadRequest) -> Result<(), Self::Error> {
        assert!(id.index() <= self.num_admitted, "numbers are dense");
        self.num_admitted += 1;
        assert!(request.arrival_time_ns <= self.now(), "taken in before it arrived");
        self.inner.admit(id, request)
    }

    fn launch(
        &mut self,
        step: &ScheduledStep,
        batch: &BatchShape,
        start: Nanos,
        state: &SchedulerState<'_>,
    ) -> Result<Nanos, Self::Error> {
        assert_eq!(*batch, step.shape());
        self.check(state);
        assert!(step.sequences.len() <= state.num_running && state.num_running > 0);
        assert!(state.num_unfinished() <= self.num_admitted);
        for s in &step.sequences {
            let held = state.kv_cache.block_table(s.id).len() as u32 * state.kv_cache.block_size();
            assert!(held >= s.context_len + s.num_tokens, "tokens without a block");
        }
        self.num_tokens += u64::from(batch.num_tokens);
        self.start = start;
        self.inner.launch(step, batch, start, state)
    }

    fn finish(&mut self) -> Result<Nanos, Self::Error> {
        let end = self.inner.finish()?;
        assert!(end > self.start && self.now() >= end);
        Ok(end)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// free + used = total, every computed token has a block, and the clock never steps back.
    #[test]
    fn blocks_add_up_and_the_clock_moves_forward(workload in workloads(), (kind, deployment) in engines()) {
        let model = ModelSpec::load("qwen3-0.6b").unwrap();
        let mut step_time =
            StepTimeModel::new(&model, times(1.0), &profile(1.0, &SCATTER), &deployment).unwrap();
        let inner = SimulatedExecutor::new(&mut step_time, &SimulateOptions::default());
        let mut watched =
            Watched { inner, start: Nanos(0), last_now: Nanos(0), num_tokens: 0, num_admitted: 0 };
        let scheduler = kind.build(&deployment).unwrap();
        let served = serve(&workload, scheduler, &mut watched).unwrap();

        // What was computed is at least what was asked for.
        let asked: u64 = workload.requests.iter().zip(&served.requests)
            .filter(|(_, served)| served.rejection.is_none())
            .map(|(r, _)| u64::from(r.num_prefill_tokens) + u64::from(r.num_decode_tokens) - 1)
            .sum();
        prop_assert!(watched.num_tokens >= asked);
        if served.num_preemptions() == 0 {
            prop_assert_eq!(watched.num_tokens, asked);
        }
        let steps = served.replicas.first().map_or(&[][..], |log| &log.steps);
        for (before, after) in steps.iter().zip(steps.iter().skip(1)) {
            prop_assert!(after.step_start_ns >= before.end_ns());
        }
    }

    /// requests in = done + running + waiting + rejected, after every step.
    #[test]
    fn every_request_is_somewhere(workload in workloads(), deployment in deployments()) {
        let mut scheduler = SchedulerKind::VllmV1.build(&deployment).unwrap();
        let (mut step, mut finished) = (ScheduledStep::default(), vec![]);
        let (mut received, mut rejected, mut done, mut steps) = (0, 0, 0, 0);
        let mut requests = workload.requests.iter();
        loop {
            // A request a step, so that old and new mix.
            if let Some(request) = requests.next() {
                received += 1;
                rejected += usize::from(scheduler.add(request).is_err());
            } else if scheduler.state().num_unfinished() == 0 {
                break;
            }
            scheduler.schedule(&mut step);
            prop_assert!(!step.is_empty() || scheduler.state().num_unfinished() == 0, "stalled");
            let state = scheduler.state();
            prop_assert_eq!(received, done + state.num_running + state.num_waiting + rejected);
            prop_assert!(state.num_running <= deployment.max_num_seqs as usize);
            prop_assert!(step.shape().num_tokens <= deployment.max_num_batched_tokens);
            scheduler.complete(&step, &mut finished);
            done += finished.len();
            let state = scheduler.state();
            prop_assert_eq!(received, done + state.num_running + state.num_waiting + rejected);
            steps += 1;
            prop_assert!(steps < 1_000_000, "never done");
        }
        prop_assert_eq!(received, done + rejected);
    }

    /// arrival <= admitted <= first token <= last; each accepted request gets exactly its tokens.
    #[test]
    fn requests_live_in_order_and_all_finish(workload in workloads(), (kind, deployment) in engines()) {
        let simulation = run_by(kind, &workload, &deployment, 1, &SCATTER);
        let counts = simulation.counts;
        prop_assert_eq!(counts.requests, counts.finished + counts.rejected);
        prop_assert_eq!(counts.rejected, simulation.rejections.len());
        let mut num_tokens = 0;
        for r in &simulation.run.requests {
            if r.status == RequestStatus::Rejected {
                prop_assert!(simulation.rejections.iter().any(|(id, _)| *id == r.request_id));
                prop_assert_eq!(r.num_decode_tokens_actual, 0);
                continue;
            }
            let admitted = r.admitted_time_ns.unwrap();
            let (first, last) = (r.first_token_time_ns.unwrap(), r.completion_time_ns.unwrap());
            prop_assert!(r.arrival_time_ns <= admitted && admitted < first && first <= last);
            prop_assert_eq!(r.ttft_ns.unwrap(), first - r.arrival_time_ns);
            prop_assert_eq!(r.num_decode_tokens_actual, r.num_decode_tokens);
            num_tokens += r.num_decode_tokens as usize;
        }
        prop_assert_eq!(simulation.run.tokens.len(), num_tokens);
        prop_assert_eq!(simulation.step_times.len(), simulation.run.steps.len());
        if !simulation.run.steps.is_empty() {
            prop_assert!((simulation.coverage.roofline - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn same_seed_same_bytes(workload in workloads(), deployment in deployments(), seed in any::<u64>()) {
        let first = run(&workload, &deployment, seed, &SCATTER);
        prop_assert_eq!(bytes(&first.run), bytes(&run(&workload, &deployment, seed, &SCATTER).run));
    }

    /// All times in x 2, all times out x 2, to the nanosecond.
    #[test]
    fn time_has_no_unit_of_its_own(workload in workloads(), deployment in deployments()) {
        let model = ModelSpec::load("qwen3-0.6b").unwrap();
        let options = SimulateOptions { residuals: Residuals::None, ..SimulateOptions::default() };
        let once = run(&workload, &deployment, 0, &[]).run;
        let mut slow = workload;
        slow.requests.iter_mut().for_each(|r| r.arrival_time_ns = r.arrival_time_ns + r.arrival_time_ns);
        let twice =
            simulate(&model, &slow, &deployment, &profile(2.0, &[]), times(2.0), &options).unwrap().run;
        prop_assert_eq!(once.steps.len(), twice.steps.len());
        for (a, b) in once.steps.iter().zip(&twice.steps) {
            prop_assert_eq!(&a.batch, &b.batch);
            prop_assert_eq!(2 * a.step_start_ns.0, b.step_start_ns.0);
            prop_assert_eq!(2 * a.step_duration_ns.0, b.step_duration_ns.0);
        }
        for (a, b) in once.tokens.iter().zip(&twice.tokens) {
            prop_assert_eq!(2 * a.token_time_ns.0, b.token_time_ns.0);
        }
        for (a, b) in once.requests.iter().zip(&twice.requests) {
            prop_assert_eq!(a.admitted_time_ns.map(|t| 2 * t.0), b.admitted_time_ns.map(|t| t.0));
        }
    }

    /// Leaving out the requests from some arrival on changes no step that began before it.
    #[test]
    fn the_future_does_not_reach_back(
        workload in workloads(),
        deployment in deployments(),
        share in 0.0_f64..1.0,
    ) {
        let whole = run(&workload, &deployment, 5, &SCATTER).run;
        let kept = ((workload.requests.len() as f64) * share) as usize;
        let cut = workload.requests[kept].arrival_time_ns;
        let mut past = workload;
        past.requests.retain(|r| r.arrival_time_ns < cut);
        let past = run(&past, &deployment, 5, &SCATTER).run;
        let before = |run: &Run| {
            run.steps.iter().filter(|step| step.step_start_ns < cut).cloned().collect::<Vec<_>>()
        };
        prop_assert_eq!(before(&whole), before(&past));
        let tokens = |run: &Run| {
            run.tokens.iter().filter(|t| t.token_time_ns < cut).copied().collect::<Vec<_>>()
        };
        prop_assert_eq!(tokens(&whole), tokens(&past));
    }
}

#[test]
fn preemption_and_rejection_do_happen_in_these_deployments() {
    let deployment = deployment();
    let request =
        |request_id, num_prefill_tokens| WorkloadRequest::new(request_id, Nanos(0), num_prefill_tokens, 50);
    let requests = vec![request(0, 100), request(1, 100), request(2, 350), request(3, 340), request(4, 60)];
    let simulation = run(&Workload { requests }, &deployment, 0, &[]);
    assert_eq!((simulation.counts.finished, simulation.counts.rejected), (3, 2));
    assert!(simulation.counts.preemptions > 0);
    let reasons: Vec<_> = simulation.rejections.iter().map(|(id, why)| format!("{id}: {why}")).collect();
    assert_eq!(
        reasons,
        [
            "2: 399 cached tokens need more than the 19 usable KV blocks of 16",
            "3: 389 cached tokens need more than the 19 usable KV blocks of 16",
        ]
    );
}

#[test]
fn a_simulated_run_reads_back_as_it_was_written() {
    let request = |request_id, num_prefill_tokens| {
        WorkloadRequest::new(request_id, Nanos(request_id * 1_000_000), num_prefill_tokens, 20)
    };
    // The second is too long for the deployment.
    let requests = vec![request(0, 100), request(1, 390), request(2, 60)];
    let simulation = run(&Workload { requests }, &deployment(), 3, &SCATTER);
    let folder = tempfile::tempdir().unwrap();
    simulation.run.write(folder.path()).unwrap();
    assert_eq!(bytes(&Run::read(folder.path()).unwrap()), bytes(&simulation.run));
    assert_eq!(simulation.counts.rejected, 1);
}

#[test]
fn an_idle_gap_makes_the_next_step_slower() {
    let deployment = Deployment { num_gpu_blocks: 1000, ..deployment() };
    let request = |request_id, arrival| WorkloadRequest::new(request_id, Nanos(arrival), 10, 3);
    // The first wakes the engine whenever it comes, the third follows after 10 ms, the fourth after seconds.
    let simulate_at = |arrivals: [u64; 4]| {
        let requests = arrivals.iter().zip(0..).map(|(&arrival, id)| request(id, arrival)).collect();
        run(&Workload { requests }, &deployment, 0, &[])
    };
    let simulation = simulate_at([1_000_000, 1_000_001, 70_000_000, 9_000_000_000]);
    let woken: Vec<_> = simulation
        .step_times
        .iter()
        .zip(&simulation.run.steps)
        .filter(|(time, _)| time.after_idle_ns > 0.0)
        .map(|(_, step)| step.step_start_ns.0 / 1_000_000_000)
        .collect();
    assert_eq!(woken, [0, 9]);
}

#[test]
fn workloads_that_break_their_rules_are_refused() {
    let deployment = deployment();
    let model = ModelSpec::load("qwen3-0.6b").unwrap();
    let error = |deployment: &Deployment, profile: &EngineProfile, requests: &[(u64, u32, u32)]| {
        let of = |&(arrival, num_prefill_tokens, num_decode_tokens)| {
            WorkloadRequest::new(4, Nanos(arrival), num_prefill_tokens, num_decode_tokens)
        };
        let workload = Workload { requests: requests.iter().map(of).collect() };
        let options = SimulateOptions::default();
        simulate(&model, &workload, deployment, profile, times(1.0), &options).unwrap_err().to_string()
    };
    let good = profile(1.0, &[]);
    assert_eq!(
        error(&deployment, &good, &[(5, 1, 1), (4, 1, 1)]),
        "request 4 of the workload: expected arrival_time_ns not before the request above, found 4"
    );
    assert_eq!(
        error(&deployment, &good, &[(0, 1, 0)]),
        "request 4 of the workload: expected num_decode_tokens of at least 1, found 0"
    );
    let unknown = EngineProfile { scheduler: "fifo".into(), ..good.clone() };
    let unknown = error(&deployment, &unknown, &[(0, 1, 1)]);
    assert!(unknown.starts_with("engine profile `test`: expected a scheduler (vllm-v1, "), "{unknown}");
    assert!(unknown.ends_with("), found `fifo`"), "{unknown}");
    let asynchronous = Deployment { async_scheduling: true, ..deployment.clone() };
    let synchronous = EngineProfile { scheduler: "sarathi".into(), ..good.clone() };
    assert!(error(&asynchronous, &synchronous, &[(0, 1, 1)]).contains("`async_scheduling = true`"));
    let two = Deployment { tensor_parallel_size: 2, ..deployment };
    assert!(error(&two, &good, &[(0, 1, 1)]).contains("need times of collectives"));
}

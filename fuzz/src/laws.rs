//! The laws of any simulation of any cluster.

use std::cell::RefCell;

use plumbline_schema::{
    BatchShape, ModelSpec, Nanos, RequestStatus, Workload, forward::forward_pass, roofline::floor_ns,
};
use plumbline_simulator::{
    Outcome, Residuals, SchedulerKind, SimulateOptions, StepTimeModel,
    cluster::{Cluster, Group, KvTransfer, ReplicaReport, Role, Routing},
    output::request_row,
    recorder::ReplicaLog,
    scheduler::Rejection,
    serve::Served,
};

use super::{
    case::{Case, Kind, Requests},
    engine::{gpu, linked_times, profile},
    watch::{Watch, WatchedSource},
};

const SCATTER: [f64; 4] = [0.7, 0.95, 1.05, 2.5];

/// What came out.
#[derive(Debug)]
pub struct Ran {
    pub served: Served,
    pub reports: Vec<ReplicaReport>,
    pub num_taken: u64,
}

fn model() -> ModelSpec {
    ModelSpec::load("qwen3-0.6b").expect("a model that is known")
}

/// Simulates a case with all times times `factor`.
///
/// # Panics
/// When a law is broken, or the simulation fails: no case has a cause to.
#[must_use]
pub fn run(case: &Case, factor: f64, keeps_steps: bool) -> Ran {
    let quantiles = if case.scatters { &SCATTER[..] } else { &[] };
    let step_time = |kind: &Kind| {
        let profile = profile(factor, quantiles);
        let model = StepTimeModel::new(&model(), linked_times(factor), &profile, &kind.deployment);
        RefCell::new(model.expect("an engine whose steps have times"))
    };
    let models: Vec<_> = case.kinds.iter().map(step_time).collect();
    let group = |(kind, step_time)| {
        let &Kind { scheduler, num_replicas, role, .. } = kind;
        Group { step_time, scheduler, num_replicas, role }
    };
    let groups: Vec<_> = case.kinds.iter().zip(&models).map(group).collect();
    let kv_transfer =
        Some(KvTransfer { latency_ns: 5e5 * factor, bytes_per_s: 1e10 / factor, bytes_per_token: 1e5 });
    let residuals = if case.scatters { Residuals::Drawn } else { Residuals::None };
    let options = SimulateOptions { seed: case.seed, residuals, ..SimulateOptions::default() };
    let routing = Routing { router: case.router, kv_transfer };
    let deployments =
        case.kinds.iter().flat_map(|kind| std::iter::repeat_n(&kind.deployment, kind.num_replicas as usize));
    let mut watch = Watch::new(keeps_steps, deployments);
    let mut source = WatchedSource::new(case.source(), case.most_under_way());
    let mut cluster = Cluster::new(&groups, routing, &options).expect("a cluster");
    let reports = cluster.run(&mut source, &mut watch).expect("a simulation to its end");
    Ran { served: watch.into_served(), reports, num_taken: source.num_taken() }
}

/// Holds a case to all laws.
///
/// # Panics
/// When one is broken.
pub fn check(case: &Case) {
    let ran = run(case, 1.0, true);
    check_counts(case, &ran);
    check_rejections(case, &ran);
    check_floor(case, &ran);
    check_stretches(&ran, &run(case, 1.0, false));
    assert_eq!(text(&ran), text(&run(case, 1.0, true)), "same seed, same bytes");
    if let Some(workload) = case.workload() {
        if !case.scatters {
            check_unit(case, workload, &ran);
        }
        check_future(case, workload, &ran);
    }
}

/// Everything that came out, as text.
#[must_use]
pub fn text(ran: &Ran) -> String {
    format!("{:?}\n{:?}\n{:?}", ran.served.requests, ran.served.replicas, ran.reports)
}

/// Requests in = done + rejected; what replicas counted is what requests got.
fn check_counts(case: &Case, ran: &Ran) {
    let requests = &ran.served.requests;
    assert_eq!(ran.num_taken, requests.len() as u64, "all that came left");
    assert!(requests.iter().zip(0..).all(|(outcome, index)| outcome.index == index));
    if let Some(workload) = case.workload() {
        assert!(requests.iter().map(|outcome| &outcome.request).eq(&workload.requests));
    }
    let num_rejected = requests.iter().filter(|outcome| outcome.rejection.is_some()).count() as u64;
    let is_last = |report: &&ReplicaReport| case.kinds[report.group].role != Role::Prefill;
    let last = || ran.reports.iter().filter(is_last).map(|report| report.counts);
    assert_eq!(ran.reports.iter().map(|report| report.counts.rejected).sum::<u64>(), num_rejected);
    assert_eq!(last().map(|counts| counts.finished).sum::<u64>(), ran.num_taken - num_rejected);
    let num_tokens: u64 = requests.iter().map(|outcome| u64::from(outcome.num_tokens)).sum();
    assert_eq!(last().map(|counts| counts.output_tokens).sum::<u64>(), num_tokens);
    for (report, log) in ran.reports.iter().zip(&ran.served.replicas) {
        let computed: u64 = log.steps.iter().map(|step| u64::from(step.batch.shape().num_tokens)).sum();
        assert_eq!((report.counts.steps, report.counts.step_tokens), (log.steps.len() as u64, computed));
        assert!(report.counts.kv_blocks_max <= report.num_kv_blocks);
    }
}

/// What is longer than an engine can ever hold is refused by name, and vLLM's policy refuses nothing else.
fn check_rejections(case: &Case, ran: &Ran) {
    for outcome in &ran.served.requests {
        let report = &ran.reports[outcome.replica as usize];
        let Kind { scheduler, deployment, role, .. } = &case.kinds[report.group];
        // A prefill replica is asked for one token alone.
        let is_prefill = *role == Role::Prefill;
        let num_decode = if is_prefill { 1 } else { outcome.request.num_decode_tokens };
        let num_tokens = u64::from(outcome.request.num_prefill_tokens) + u64::from(num_decode);
        let capacity = u64::from(report.num_kv_blocks) * u64::from(deployment.block_size);
        let is_too_long = num_tokens > u64::from(deployment.max_model_len);
        let is_too_large = num_tokens - 1 > capacity;
        match outcome.rejection {
            None => {
                assert!(
                    !is_too_long && !is_too_large && !is_prefill,
                    "served what does not fit: {outcome:?}"
                );
            }
            Some(Rejection::LongerThanModelLen { .. }) => assert!(is_too_long),
            Some(Rejection::NoTransfer) => assert!(*role == Role::Decode),
            Some(_) if *scheduler == SchedulerKind::VllmV1 => assert!(is_too_large, "{outcome:?}"),
            Some(_) => {}
        }
        let row = request_row(outcome, "test");
        assert_eq!(row.status == RequestStatus::Rejected, outcome.rejection.is_some());
    }
}

/// No step is faster than the data sheet allows for what it computes.
fn check_floor(case: &Case, ran: &Ran) {
    if case.scatters {
        return;
    }
    let (model, gpu) = (model(), gpu());
    for (log, report) in ran.served.replicas.iter().zip(&ran.reports) {
        let tensor_parallel_size = case.kinds[report.group].deployment.tensor_parallel_size;
        let floor = |batch: &BatchShape| -> f64 {
            let calls = forward_pass(&model, batch, tensor_parallel_size).expect("a model that is split so");
            let of_gpu = calls.iter().filter(|call| !call.operator.is_collective());
            of_gpu.map(|call| floor_ns(&call.shape, &gpu) * f64::from(call.repeats)).sum()
        };
        for step in &log.steps {
            let took = step.step_duration_ns.0 as f64;
            assert!(took >= floor(&step.batch.shape()), "under the floor: {step:?}");
        }
    }
}

/// Stretches of steps run at once change nothing.
fn check_stretches(slow: &Ran, fast: &Ran) {
    assert_eq!(slow.served.requests, fast.served.requests, "stretches change nothing");
    let ends = |ran: &Ran| -> Vec<Vec<Nanos>> {
        ran.served.replicas.iter().map(|log: &ReplicaLog| log.step_ends.clone()).collect()
    };
    assert_eq!(ends(slow), ends(fast));
    // Blocks over time are as of a stretch's middle.
    let counted = |ran: &Ran| {
        let mut reports = ran.reports.clone();
        for report in &mut reports {
            report.counts.kv_block_ns = 0;
        }
        reports
    };
    assert_eq!(counted(slow), counted(fast));
}

/// All times in x 2, all times out x 2, to the nanosecond; where stages or steps overlap, a time is a sum of
/// fractions of a nanosecond, which are rounded.
fn check_unit(case: &Case, workload: &Workload, once: &Ran) {
    let is_whole =
        |kind: &Kind| !kind.deployment.async_scheduling && kind.deployment.pipeline_parallel_size == 1;
    if !case.kinds.iter().all(is_whole) {
        return;
    }
    let mut slow = workload.clone();
    slow.requests.iter_mut().for_each(|r| r.arrival_time_ns = Nanos(2 * r.arrival_time_ns.0));
    let twice = run(&Case { requests: Requests::Known(slow), ..case.clone() }, 2.0, false);
    let times = |outcome: &Outcome, factor: u64| {
        let &Outcome { replica, admitted, first_scheduled, first_token, last_token, .. } = outcome;
        let times = [admitted, first_scheduled, first_token, last_token, Some(outcome.executed)];
        (replica, times.map(|time| time.map(|time| factor * time.0)))
    };
    for (a, b) in once.served.requests.iter().zip(&twice.served.requests) {
        assert_eq!(times(a, 2), times(b, 1), "time has no unit of its own");
    }
}

/// Leaving out the requests from some arrival on changes nothing before it.
fn check_future(case: &Case, workload: &Workload, whole: &Ran) {
    let Some(middle) = workload.requests.get(workload.requests.len() / 2) else { return };
    let cut = middle.arrival_time_ns;
    let mut past = workload.clone();
    past.requests.retain(|r| r.arrival_time_ns < cut);
    let past = run(&Case { requests: Requests::Known(past), ..case.clone() }, 1.0, true);
    for (a, b) in whole.served.requests.iter().zip(&past.served.requests) {
        assert_eq!(a.first_token.filter(|t| *t < cut), b.first_token.filter(|t| *t < cut));
        assert_eq!(a.last_token.filter(|t| *t < cut), b.last_token.filter(|t| *t < cut));
        if a.last_token.is_some_and(|time| time < cut) {
            assert_eq!(a, b, "the future reached back");
        }
    }
    let nothing = ReplicaLog::default();
    for (i, a) in whole.served.replicas.iter().enumerate() {
        let b = past.served.replicas.get(i).unwrap_or(&nothing);
        let before = |log: &ReplicaLog| -> Vec<_> {
            log.steps.iter().filter(|step| step.step_start_ns < cut).map(|step| step.batch.clone()).collect()
        };
        assert_eq!(before(a), before(b), "the future reached back");
    }
}

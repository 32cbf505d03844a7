//! What holds of clusters, whatever their shape.

mod common;

use std::cell::RefCell;

use common::{deployment, profile, times, workloads};
use plumbline_schema::{Deployment, ModelSpec, Nanos, Workload};
use plumbline_simulator::{
    RunRecorder, SchedulerKind, SimulateOptions, StepTimeModel, WorkloadSource,
    cluster::{Cluster, Group, KvTransfer, ReplicaReport, Role, RouterKind, Routing},
    serve::Served,
};
use proptest::prelude::*;

/// Replicas of two deployments that differ in budget.
fn served(
    workload: &Workload,
    counts: &[(Role, u32)],
    router: RouterKind,
    seed: u64,
) -> (Served, Vec<ReplicaReport>) {
    let model = ModelSpec::load("qwen3-0.6b").unwrap();
    let of = |max_num_batched_tokens| {
        let deployment = Deployment { max_num_batched_tokens, num_gpu_blocks: 60, ..deployment() };
        let quantiles = [0.7, 0.95, 1.05, 2.5];
        RefCell::new(StepTimeModel::new(&model, times(1.0), &profile(1.0, &quantiles), &deployment).unwrap())
    };
    let models = [of(64), of(200)];
    let group = |(i, &(role, num_replicas)): (usize, &(Role, u32))| Group {
        step_time: &models[i % 2],
        scheduler: SchedulerKind::VllmV1,
        num_replicas,
        role,
    };
    let groups: Vec<_> = counts.iter().enumerate().map(group).collect();
    let kv_transfer = Some(KvTransfer { latency_ns: 5e5, bytes_per_s: 1e10, bytes_per_token: 1e5 });
    let options = SimulateOptions { seed, ..SimulateOptions::default() };
    let mut cluster = Cluster::new(&groups, Routing { router, kv_transfer }, &options).unwrap();
    let mut recorder = RunRecorder::new();
    let mut source = WorkloadSource::new(workload.clone());
    let reports = cluster.run(&mut source, &mut recorder).unwrap();
    (recorder.into_served(), reports)
}

fn routers() -> impl Strategy<Value = RouterKind> {
    prop::sample::select(RouterKind::ALL.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Every request is done or rejected, once, in order of its life; the replicas' counts add up.
    #[test]
    fn every_request_leaves_once(
        workload in workloads(),
        router in routers(),
        shape in prop::sample::select(vec![
            vec![(Role::Whole, 1)],
            vec![(Role::Whole, 3), (Role::Whole, 2)],
            vec![(Role::Prefill, 2), (Role::Decode, 3)],
        ]),
        seed in any::<u64>(),
    ) {
        let (served, reports) = served(&workload, &shape, router, seed);
        prop_assert_eq!(served.requests.len(), workload.requests.len());
        for (outcome, request) in served.requests.iter().zip(&workload.requests) {
            prop_assert_eq!(&outcome.request, request);
            if outcome.rejection.is_some() {
                continue;
            }
            let (admitted, first) = (outcome.admitted.unwrap(), outcome.first_token.unwrap());
            prop_assert!(request.arrival_time_ns <= admitted && admitted < first);
            prop_assert!(first <= outcome.last_token.unwrap());
            prop_assert_eq!(outcome.num_tokens, request.num_decode_tokens);
            prop_assert_eq!(outcome.token_steps.iter().count() as u32, outcome.num_tokens);
        }
        let rejected = served.requests.iter().filter(|o| o.rejection.is_some()).count() as u64;
        prop_assert_eq!(reports.iter().map(|r| r.counts.rejected).sum::<u64>(), rejected);
        let tokens: u64 = served.requests.iter().map(|o| u64::from(o.num_tokens)).sum();
        let disaggregated = shape.len() == 2 && shape[0].0 == Role::Prefill;
        let counted = reports
            .iter()
            .filter(|r| !disaggregated || r.group == 1)
            .map(|r| r.counts.output_tokens)
            .sum::<u64>();
        prop_assert_eq!(counted, tokens);
    }

    /// A cluster of one is a single replica, and same seeds give the same cluster.
    #[test]
    fn one_replica_is_the_plain_simulation(workload in workloads(), router in routers(), seed in any::<u64>()) {
        let shape = [(Role::Whole, 1)];
        let (first, _) = served(&workload, &shape, RouterKind::RoundRobin, seed);
        let (other, _) = served(&workload, &shape, router, seed);
        prop_assert_eq!(first.requests, other.requests);
        let shape = [(Role::Whole, 2), (Role::Whole, 2)];
        let run = || served(&workload, &shape, router, seed).0;
        prop_assert_eq!(run().requests, run().requests);
    }

    /// Routers that heed nothing need no common clock: both ways of moving through time agree.
    #[test]
    fn a_later_arrival_changes_nothing_before_it(
        workload in workloads(), router in routers(), share in 0.0_f64..1.0,
    ) {
        let shape = [(Role::Whole, 3)];
        let kept = ((workload.requests.len() as f64) * share) as usize;
        let cut = workload.requests[kept].arrival_time_ns;
        let mut past = workload.clone();
        past.requests.retain(|r| r.arrival_time_ns < cut);
        let (whole, _) = served(&workload, &shape, router, 1);
        let (past, _) = served(&past, &shape, router, 1);
        for (a, b) in whole.requests.iter().zip(&past.requests) {
            prop_assert_eq!(a.replica, b.replica);
            prop_assert_eq!(a.first_token.filter(|t| *t < cut), b.first_token.filter(|t| *t < cut));
            prop_assert_eq!(a.last_token.filter(|t| *t < cut), b.last_token.filter(|t| *t < cut));
        }
    }
}

#[test]
fn prompts_are_computed_in_one_pool_and_continued_in_the_other() {
    let request = |id: u64| plumbline_schema::WorkloadRequest::new(id, Nanos(id * 1000), 100, 20);
    let workload = Workload { requests: (0..12).map(request).collect() };
    let shape = [(Role::Prefill, 2), (Role::Decode, 1)];
    let (served, reports) = served(&workload, &shape, RouterKind::RoundRobin, 0);
    assert!(served.requests.iter().all(|o| o.replica == 2 && o.num_tokens == 20));
    let [first, second, decode] = &reports[..] else { panic!("three replicas") };
    assert_eq!((first.counts.finished, second.counts.finished, decode.counts.finished), (6, 6, 12));
    assert_eq!(first.counts.step_tokens + second.counts.step_tokens, 1200);
    // The last prompt token is computed again, to get the first output.
    assert_eq!(decode.counts.step_tokens, 12 * 20);
}

#[test]
fn roles_that_make_no_whole_are_refused() {
    let error = |shape: &[(Role, u32)], kv_transfer| {
        let model = ModelSpec::load("qwen3-0.6b").unwrap();
        let step_time = StepTimeModel::new(&model, times(1.0), &profile(1.0, &[]), &deployment()).unwrap();
        let step_time = RefCell::new(step_time);
        let group = |&(role, num_replicas)| Group {
            step_time: &step_time,
            scheduler: SchedulerKind::VllmV1,
            num_replicas,
            role,
        };
        let groups: Vec<_> = shape.iter().map(group).collect();
        let routing = Routing { kv_transfer, ..Routing::default() };
        Cluster::new(&groups, routing, &SimulateOptions::default()).err().map(|error| error.to_string())
    };
    assert_eq!(error(&[], None).unwrap(), "expected at least one replica, found none");
    assert!(error(&[(Role::Whole, 1), (Role::Decode, 1)], None).unwrap().ends_with("found whole and decode"));
    let both = [(Role::Prefill, 1), (Role::Decode, 1)];
    assert!(error(&both, None).unwrap().contains("latency and the bandwidth"));
    let bad = KvTransfer { latency_ns: 0.0, bytes_per_s: 0.0, bytes_per_token: 1.0 };
    assert!(error(&both, Some(bad)).unwrap().contains("bandwidth above 0"));
}

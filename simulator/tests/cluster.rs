//! What holds of clusters, whatever their shape.

mod common;

use std::cell::RefCell;

use common::{
    deployment,
    fuzz::{
        case::{Case, Requests},
        inputs, laws,
    },
    profile, times, workloads,
};
use plumbline_schema::{Deployment, ModelSpec, Nanos, Workload};
use plumbline_simulator::{
    RunRecorder, SchedulerKind, SimulateOptions, StepTimeModel, WorkloadSource,
    cluster::{Cluster, Group, KvTransfer, ReplicaReport, Role, RouterKind, Routing},
    serve::Served,
};
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

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
    let request = |id: u64| plumbline_schema::WorkloadRequest::new(id, Nanos(id * 1000), 60, 20);
    let workload = Workload { requests: (0..12).map(request).collect() };
    let shape = [(Role::Prefill, 2), (Role::Decode, 1)];
    let (served, reports) = served(&workload, &shape, RouterKind::RoundRobin, 0);
    assert!(served.requests.iter().all(|o| o.replica == 2 && o.num_tokens == 20));
    let [first, second, decode] = &reports[..] else { panic!("three replicas") };
    assert_eq!((first.counts.finished, second.counts.finished, decode.counts.finished), (6, 6, 12));
    assert_eq!(first.counts.step_tokens + second.counts.step_tokens, 720);
    assert_eq!(decode.counts.preemptions, 0);
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

/// Bytes of which most are no request that any byte would do for.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..400)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// All policies, routers and shapes, whatever is asked of them.
    #[test]
    fn any_cluster_keeps_the_laws(bytes in bytes()) {
        laws::check(&Case::of(&bytes));
    }

    /// Files that were good until somebody wrote over them.
    #[test]
    fn any_input_is_read_or_refused(
        seed in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0_u8..4, any::<u8>()), 0..12),
    ) {
        let mut seeds: Vec<_> = std::fs::read_dir("../fuzz/seeds/inputs").unwrap().map(|f| f.unwrap().path()).collect();
        seeds.sort();
        let mut content = std::fs::read(seed.get(&seeds)).unwrap();
        // What formats are made of, more often than any other byte.
        let marks = b"0123456789-.,;:\"'[]{}=e\n \r+TZ_#";
        for (at, edit, byte) in edits {
            let at = at.index(content.len() + 1);
            let mark = marks[usize::from(byte) % marks.len()];
            match edit {
                0 => content.insert(at, byte),
                1 => content.insert(at, mark),
                2 => drop(content.drain(at..(at + usize::from(byte % 9)).min(content.len()))),
                _ => if let Some(old) = content.get_mut(at) { *old = mark },
            }
        }
        inputs::read(&content);
    }
}

/// Files that are no seeds are what the laws say they are.
#[test]
fn seeds_of_inputs_are_read() {
    for file in std::fs::read_dir("../fuzz/seeds/inputs").unwrap() {
        inputs::read(&std::fs::read(file.unwrap().path()).unwrap());
    }
}

/// A law that is never tried proves nothing: cases of random bytes have all that makes clusters hard.
#[test]
fn random_bytes_make_hard_cases() {
    let mut counts = [0_u64; 8];
    let mut kinds = std::collections::BTreeSet::new();
    let mut runner = TestRunner::deterministic();
    for _ in 0..150 {
        let case = Case::of(&bytes().new_tree(&mut runner).unwrap().current());
        let ran = laws::run(&case, 1.0, true);
        let deployments = || case.kinds.iter().map(|kind| &kind.deployment);
        kinds.extend(case.kinds.iter().map(|kind| kind.scheduler.name()));
        let rejected = ran.served.requests.iter().filter(|o| o.rejection.is_some()).count() as u64;
        let of = [
            rejected,
            ran.served.requests.len() as u64 - rejected,
            ran.served.num_preemptions(),
            u64::from(case.kinds.len() > 1),
            u64::from(matches!(case.requests, Requests::Made(_)) && case.source().heeds_completions()),
            u64::from(deployments().any(|d| d.async_scheduling)),
            u64::from(deployments().any(|d| d.pipeline_parallel_size > 1)),
            u64::from(deployments().any(|d| d.enable_prefix_caching && d.scheduling_policy == "priority")),
        ];
        counts.iter_mut().zip(of).for_each(|(sum, of)| *sum += of);
    }
    assert_eq!(kinds.len(), SchedulerKind::ALL.len());
    assert!(counts.iter().all(|&count| count >= 10), "{counts:?}");
}

/// Simulations side by side do not touch one another.
#[test]
fn threads_change_nothing() {
    let mut runner = TestRunner::deterministic();
    let cases: Vec<_> =
        (0..12).map(|_| Case::of(&bytes().new_tree(&mut runner).unwrap().current())).collect();
    let of = |case: &Case| laws::text(&laws::run(case, 1.0, true));
    let serial: Vec<_> = cases.iter().map(of).collect();
    let parallel: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = cases.iter().map(|case| scope.spawn(move || of(case))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(serial, parallel);
}

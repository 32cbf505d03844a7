//! What traces and series tell of a simulation, against what the simulation says itself.

#![expect(clippy::float_cmp, reason = "the rows hold whole numbers")]

mod common;

use std::{
    cell::RefCell,
    collections::BTreeMap,
    io::Read,
    path::{Path, PathBuf},
};

use common::{deployment, deployments, profile, times, workloads};
use plumbline_schema::{Deployment, ModelSpec, Nanos, Workload, WorkloadRequest};
use plumbline_simulator::{
    RunRecorder, SchedulerKind, SimulateOptions, StepTimeModel, WorkloadSource,
    cluster::{Cluster, Group, KvTransfer, ReplicaReport, Role, RouterKind, Routing},
    output::{
        series::{HEADER, SeriesRecorder},
        trace::TraceRecorder,
    },
    recorder::Tee,
    serve::Served,
    step_time::timeline::Span,
};
use proptest::prelude::*;
use serde_json::Value;

const SCATTER: [f64; 4] = [0.3, 0.95, 1.05, 2.5];
const WINDOWS: [Nanos; 2] = [Nanos(7_000_003), Nanos(1 << 40)];

/// What was told of one simulation.
struct Observed {
    served: Served,
    reports: Vec<ReplicaReport>,
    trace: Value,
    /// Of each of [`WINDOWS`], rows of numbers; an empty mean is 0.
    series: Vec<Vec<Vec<f64>>>,
}

fn read(path: &Path) -> String {
    let mut text = String::new();
    let bytes = std::fs::read(path).unwrap();
    if path.extension().is_some_and(|extension| extension == "gz") {
        flate2::read::GzDecoder::new(&bytes[..]).read_to_string(&mut text).unwrap();
        return text;
    }
    String::from_utf8(bytes).unwrap()
}

fn rows(text: &str) -> Vec<Vec<f64>> {
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some(HEADER));
    let cell = |cell: &str| if cell.is_empty() { 0.0 } else { cell.parse().unwrap() };
    lines.map(|line| line.split(',').map(cell).collect()).collect()
}

fn column(name: &str) -> usize {
    HEADER.split(',').position(|column| column == name).unwrap()
}

fn simulated(
    workload: &Workload,
    deployment: &Deployment,
    roles: &[(Role, u32)],
    recorder: &mut impl plumbline_simulator::Recorder,
) -> Vec<ReplicaReport> {
    let model = ModelSpec::load("qwen3-0.6b").unwrap();
    let step_time = StepTimeModel::new(&model, times(1.0), &profile(1.0, &SCATTER), deployment).unwrap();
    let step_time = RefCell::new(step_time);
    let group = |&(role, num_replicas)| Group {
        step_time: &step_time,
        scheduler: SchedulerKind::VllmV1,
        num_replicas,
        role,
    };
    let groups: Vec<_> = roles.iter().map(group).collect();
    let kv_transfer = Some(KvTransfer { latency_ns: 5e5, bytes_per_s: 1e10, bytes_per_token: 1e5 });
    let routing = Routing { router: RouterKind::RoundRobin, kv_transfer };
    let mut cluster = Cluster::new(&groups, routing, &SimulateOptions::default()).unwrap();
    cluster.run(&mut WorkloadSource::new(workload.clone()), recorder).unwrap()
}

fn observed(workload: &Workload, deployment: &Deployment, roles: &[(Role, u32)], window: Span) -> Observed {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let series =
        |i: usize| Some(SeriesRecorder::create(&path(&format!("series-{i}.csv")), WINDOWS[i]).unwrap());
    let trace = TraceRecorder::create(&path("trace.json.gz"), window).unwrap();
    let mut all = Tee(RunRecorder::with_steps(), Tee(trace, Tee(series(0), series(1))));
    let reports = simulated(workload, deployment, roles, &mut all);
    assert_eq!(
        std::fs::read_dir(folder.path())
            .unwrap()
            .filter(|e| { !e.as_ref().unwrap().file_name().to_string_lossy().starts_with(".plumb-") })
            .count(),
        0,
        "a file before it is whole"
    );
    let Tee(run, Tee(trace, Tee(first, second))) = all;
    trace.finish().unwrap();
    first.into_iter().chain(second).for_each(|series| series.finish().unwrap());
    Observed {
        served: run.into_served(),
        reports,
        trace: serde_json::from_str(&read(&path("trace.json.gz"))).unwrap(),
        series: (0..2).map(|i| rows(&read(&path(&format!("series-{i}.csv"))))).collect(),
    }
}

/// A time of the trace, back in whole ns.
fn ns(event: &Value, key: &str) -> u64 {
    (event[key].as_f64().unwrap() * 1e3).round() as u64
}

/// Slices of each thread as (start, end, event), in order of start.
/// Slices of one thread: start, end and the event.
type Slices<'a> = Vec<(u64, u64, &'a Value)>;

fn threads(trace: &Value) -> BTreeMap<(u64, u64), Slices<'_>> {
    let mut threads = BTreeMap::<_, Vec<_>>::new();
    for event in trace["traceEvents"].as_array().unwrap() {
        if event["ph"] == "X" {
            let thread = (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap());
            let start = ns(event, "ts");
            threads.entry(thread).or_default().push((start, start + ns(event, "dur"), event));
        }
    }
    for slices in threads.values_mut() {
        slices.sort_by_key(|&(start, end, _)| (start, end));
    }
    threads
}

/// Slices of a thread do not overlap; steps end when the run says; operators fill the GPU's time.
fn check_slices(observed: &Observed) {
    let mut steps = BTreeMap::<u64, Vec<(u64, u64, &Value)>>::new();
    let mut gpu_ns = BTreeMap::<u64, u64>::new();
    let threads = threads(&observed.trace);
    for (&(pid, tid), slices) in &threads {
        for pair in slices.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{:?} overlaps {:?}", pair[0], pair[1]);
        }
        if tid < 10_000 {
            steps.entry(pid).or_default().extend(slices);
        } else if tid > 20_000 {
            *gpu_ns.entry(pid).or_default() += slices.iter().map(|(start, end, _)| end - start).sum::<u64>();
        }
    }
    for (replica, log) in observed.served.replicas.iter().enumerate() {
        let pid = replica as u64 + 1;
        let mut steps = steps.remove(&pid).unwrap_or_default();
        steps.sort_by_key(|step| step.2["args"]["step"].as_u64());
        let told: Vec<_> = steps.iter().map(|step| (step.0, step.1)).collect();
        let run: Vec<_> = log
            .steps
            .iter()
            .map(|step| (step.step_start_ns.0, (step.step_start_ns + step.step_duration_ns).0))
            .collect();
        assert_eq!(told, run);
        let of_steps: u64 = steps.iter().map(|step| step.2["args"]["gpu_ns"].as_u64().unwrap()).sum();
        let of_operators = gpu_ns.get(&pid).copied().unwrap_or_default();
        assert_eq!(of_operators, of_steps);
        let predicted = observed.reports[replica].busy.gpu_ns;
        assert!((of_steps as f64 - predicted).abs() <= steps.len() as f64, "{of_steps} of {predicted}");
    }
    // An operator's slice is its own time, not what was left: the sums before rounding agree with the step's.
    for step_gpu in threads.iter().filter(|((_, tid), _)| *tid > 20_000).flat_map(|(_, slices)| slices) {
        assert!(step_gpu.2["args"]["repeats"].as_u64().unwrap() >= 1);
    }
}

/// Async slices nest, and requests are there from arrival to their last token.
fn check_requests(observed: &Observed) {
    let mut open = BTreeMap::<u64, Vec<(&Value, u64)>>::new();
    let (mut last, mut whole, mut num_preempted) = (BTreeMap::new(), BTreeMap::new(), 0);
    for event in observed.trace["traceEvents"].as_array().unwrap() {
        let phase = event["ph"].as_str().unwrap();
        if phase != "b" && phase != "e" {
            continue;
        }
        let id: u64 = event["id"].as_str().unwrap().parse().unwrap();
        let time = ns(event, "ts");
        assert!(last.insert(id, time).unwrap_or_default() <= time, "{event}");
        let stack = open.entry(id).or_default();
        if phase == "b" {
            stack.push((&event["name"], time));
            num_preempted += u64::from(event["name"] == "preempted");
        } else {
            let (name, start) = stack.pop().unwrap();
            assert_eq!(name, &event["name"]);
            if stack.is_empty() {
                whole.insert(id, (start, time));
            }
        }
    }
    assert!(open.values().all(Vec::is_empty));
    let served = observed.served.requests.iter().filter(|outcome| outcome.rejection.is_none());
    let expected: BTreeMap<_, _> =
        served.map(|o| (o.index, (o.request.arrival_time_ns.0, o.last_token.unwrap().0))).collect();
    assert_eq!(whole, expected);
    assert!(num_preempted <= 2 * observed.served.num_preemptions());
    assert_eq!(num_preempted > 0, observed.served.num_preemptions() > 0);
}

/// Windows add up to the run, whatever their length.
fn check_series(observed: &Observed) {
    for (rows, window) in observed.series.iter().zip(WINDOWS) {
        for (replica, log) in observed.served.replicas.iter().enumerate() {
            let own: Vec<_> = rows.iter().filter(|row| row[0] == replica as f64).collect();
            let sum = |name: &str| own.iter().map(|row| row[column(name)]).sum::<f64>();
            let most = |name: &str| own.iter().map(|row| row[column(name)]).fold(0.0, f64::max);
            let starts = column("window_start_ns");
            assert!(
                own.windows(2).all(|pair| pair[0][starts] < pair[1][starts]),
                "each window once, in order"
            );
            assert!(own.iter().all(|row| row[column("busy_ns")] <= window.0 as f64));
            let counts = observed.reports[replica].counts;
            assert_eq!(sum("steps"), counts.steps as f64);
            assert_eq!(sum("prefill_tokens") + sum("decode_tokens"), counts.step_tokens as f64);
            assert_eq!(sum("preemptions"), counts.preemptions as f64);
            assert_eq!(most("running_max"), counts.running_max as f64);
            assert!(most("kv_used_max") >= f64::from(counts.kv_blocks_max));
            assert!(most("waiting_max") >= counts.waiting_max as f64);
            let mut busy = (0, 0);
            for step in &log.steps {
                let end = (step.step_start_ns + step.step_duration_ns).0;
                busy = (busy.0 + end - step.step_start_ns.0.max(busy.1), end);
            }
            assert_eq!(sum("busy_ns"), busy.0 as f64);
            let gpu = observed.reports[replica].busy.gpu_ns;
            assert!((sum("gpu_ns") - gpu).abs() <= log.steps.len() as f64);
            for row in &own {
                let number = |ns: Nanos| ns.0 / window.0 == row[starts] as u64 / window.0;
                let begun = log.steps.iter().filter(|step| number(step.step_start_ns));
                let seqs: u32 = begun.clone().map(|step| step.batch.shape().num_seqs).sum();
                let steps = begun.count();
                assert_eq!(row[column("steps")] as usize, steps);
                if steps > 0 {
                    assert_eq!(row[column("batch_size_mean")], f64::from(seqs) / steps as f64);
                }
                let done = observed.served.requests.iter().filter(|outcome| {
                    outcome.replica as usize == replica && outcome.last_token.is_some_and(number)
                });
                assert_eq!(row[column("completions")] as usize, done.count());
            }
        }
    }
    // Integrals do not depend on where the edges are.
    let total = |i: usize, name: &str| observed.series[i].iter().map(|row| row[column(name)]).sum::<f64>();
    let blocks = [0, 1].map(|i: usize| total(i, "kv_used_mean") * WINDOWS[i].0 as f64);
    assert!((blocks[0] - blocks[1]).abs() <= 1e-9 * blocks[1], "{blocks:?}");
    for name in ["arrivals", "busy_ns", "gpu_ns"] {
        assert_eq!(total(0, name), total(1, name), "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_told_is_what_was(
        workload in workloads(),
        deployment in deployments(),
        async_scheduling in any::<bool>(),
        num_replicas in 1_u32..3,
    ) {
        let deployment = Deployment { async_scheduling, ..deployment };
        let roles = [(Role::Whole, num_replicas)];
        let observed = observed(&workload, &deployment, &roles, TraceRecorder::WHOLE);
        let mut alone = RunRecorder::new();
        simulated(&workload, &deployment, &roles, &mut alone);
        prop_assert_eq!(&alone.into_served().requests, &observed.served.requests);
        check_slices(&observed);
        check_requests(&observed);
        check_series(&observed);
        let arrivals: f64 = observed.series[0].iter().map(|row| row[column("arrivals")]).sum();
        prop_assert_eq!(arrivals, workload.requests.len() as f64);
    }
}

fn steady_workload() -> Workload {
    Workload {
        requests: (0..12).map(|id| WorkloadRequest::new(id, Nanos(id * 20_000_000), 100, 20)).collect(),
    }
}

#[test]
fn a_window_has_the_steps_that_start_in_it() {
    let window = Span { start: Nanos(50_000_000), end: Nanos(120_000_000) };
    let whole = observed(&steady_workload(), &deployment(), &[(Role::Whole, 1)], TraceRecorder::WHOLE);
    let part = observed(&steady_workload(), &deployment(), &[(Role::Whole, 1)], window);
    let steps = |observed: &Observed| -> Vec<(u64, u64)> {
        threads(&observed.trace)[&(1, 1)].iter().map(|step| (step.0, step.1)).collect()
    };
    let mut expected = steps(&whole);
    expected.retain(|step| (window.start.0..window.end.0).contains(&step.0));
    assert!(!expected.is_empty());
    assert_eq!(steps(&part), expected);
}

#[test]
fn prompts_computed_elsewhere_are_followed() {
    let deployment = Deployment { num_gpu_blocks: 60, ..deployment() };
    let roles = [(Role::Prefill, 2), (Role::Decode, 1)];
    let observed = observed(&steady_workload(), &deployment, &roles, TraceRecorder::WHOLE);
    check_slices(&observed);
    check_requests(&observed);
    check_series(&observed);
    // Every request comes to a prefill replica, and its keys and values to the decode replica.
    let arrivals: f64 = observed.series[0].iter().map(|row| row[column("arrivals")]).sum();
    assert_eq!(arrivals, 24.0);
}

/// A step's operators add up to its GPU time, each at its own length.
#[test]
fn operators_add_up_to_the_step() {
    let model = ModelSpec::load("qwen3-0.6b").unwrap();
    let deployment = Deployment { max_model_len: 4096, ..deployment() };
    let mut profile = profile(1.0, &[]);
    profile.operator_scales.prefill_gemm = 1.25;
    profile.operator_scales.decode_gemm = 1.5;
    profile.operator_scales.prefill_attention = 2.0;
    profile.operator_scales.decode_attention = 3.0;
    profile.operator_scales.other = 0.5;
    let mut step_time = StepTimeModel::new(&model, times(1.0), &profile, &deployment).unwrap();
    for (chunks, decodes) in [("100:0;30:64", "9;700"), ("", "9;700;12"), ("17:1", "")] {
        let batch = plumbline_schema::StepBatch::parse(chunks, decodes).unwrap().shape();
        let gpu_ns = step_time.step_time(&batch, false).unwrap().gpu_ns;
        let operators = step_time.operator_times(&batch).unwrap();
        let sum: f64 = operators[0].iter().map(|part| part.time_ns).sum();
        assert!((sum - gpu_ns).abs() < 1e-9 * gpu_ns, "{sum} of {gpu_ns}");
        let usage = step_time.usage();
        step_time.reset_usage();
        for part in &operators[0] {
            let own = usage.operators[&part.operator];
            assert!((own.gpu_time_ns - part.time_ns).abs() < 1e-9 * gpu_ns, "{:?}", part.operator);
            assert_eq!(own.num_launches, u64::from(part.repeats));
        }
    }
}

//! A simulated engine with a known profile stands in for the real one: its profile must come back.

use std::collections::BTreeMap;

use plumbline_bundles::{
    Dispatch, DispatchCosts, EngineProfile, HostCost, TimeStats,
    engine_profile::{ClientCosts, FittedOn, OperatorScales},
    host::{CpuState, HostCosts},
};
use plumbline_schema::{Deployment, EngineMode, GpuSpec, ModelSpec, Nanos, Workload, WorkloadRequest};
use plumbline_simulator::{SimulateOptions, simulate, times::RooflineTimes};

use super::*;

fn times() -> RooflineTimes {
    RooflineTimes { gpu: GpuSpec::by_name("h100-sxm5-80gb").unwrap(), overhead_ns: 2_000.0 }
}

fn truth() -> EngineProfile {
    let cost = |constant_ns, per_seq_ns| HostCost { constant_ns, per_seq_ns, per_token_ns: 0.0 };
    let noise: Vec<f64> = (0..=100).map(|i| 0.95 + 0.001 * f64::from(i)).collect();
    let costs = |pre, launch_ns, after_idle_ns| DispatchCosts {
        host_pre: pre,
        host_post: HostCost::default(),
        launch_ns,
        launch_per_seq_ns: 0.0,
        after_idle_ns,
        residual_quantiles: noise.clone(),
    };
    EngineProfile {
        name: "truth".into(),
        engine: "known".into(),
        scheduler: "vllm-v1".into(),
        dispatch: BTreeMap::from([
            (Dispatch::Eager, costs(cost(1e6, 20_000.0), 40_000.0, 2e6)),
            (Dispatch::PiecewiseGraph, costs(cost(1e6, 20_000.0), 90_000.0, 2e6)),
            (Dispatch::FullGraph, costs(cost(1.2e6, 15_000.0), 0.0, 0.0)),
        ]),
        schedule: HostCost::default(),
        client: ClientCosts {
            admit_ns: 250_000.0,
            admit_per_token_ns: 100.0,
            between_steps: cost(15_000.0, 500.0),
        },
        operator_scales: OperatorScales::default(),
        idle_threshold_ns: 2e7,
        host_factor: 1.0,
        fitted_on: FittedOn::default(),
    }
}

fn prior() -> EngineProfile {
    let some = |ns| TimeStats::from_times(&[ns]).unwrap();
    let host = HostCosts {
        cpu_model: "test".into(),
        num_cores: 2,
        single_thread_score: 100.0,
        score: None,
        cpu: CpuState::default(),
        launch_rows: vec![],
        launch_arguments: vec![],
        synchronize_after_work_ns: None,
        events: None,
        input_copies: vec![],
        after_idle: vec![],
        kernel_launch_ns: some(2_500.0),
        kernel_gap_ns: some(900.0),
        graph_launch: Vec::new(),
        synchronize_ns: some(2_000.0),
        copies: Vec::new(),
    };
    uncalibrated("fitted", "known", "vllm-v1", &host)
}

fn workload(requests: &[(u64, u32, u32)]) -> Workload {
    let requests = requests.iter().enumerate().map(|(i, &(ms, prompt, output))| {
        WorkloadRequest::new(i as u64, Nanos(ms * 1_000_000), prompt, output)
    });
    Workload { requests: requests.collect() }
}

/// A run of the known engine.
fn real(name: &str, mode: EngineMode, workload: &Workload, profile: &EngineProfile) -> FitRun {
    let model = ModelSpec::load("qwen3-0.6b").unwrap();
    let mut deployment = Deployment::defaults(&model, &times().gpu, mode).unwrap();
    deployment.max_model_len = 20_480;
    let options = SimulateOptions { seed: 7, ..SimulateOptions::default() };
    let run = simulate(&model, workload, &deployment, profile, times(), &options).unwrap().run;
    FitRun { name: name.into(), workload: workload.clone(), run, model, host: "known".into() }
}

fn mixed() -> Workload {
    let requests: Vec<_> =
        (0..40).map(|i| (i * 60, 100 + 37 * ((i * i) as u32 % 60), 20 + (i as u32 * 7) % 50)).collect();
    workload(&requests)
}

fn options() -> CalibrateOptions {
    CalibrateOptions {
        prior: prior(),
        gpu: "h100-sxm5-80gb".into(),
        bundle_gpu: "h100-sxm5-80gb".into(),
        predictors_digest: "0".repeat(64),
    }
}

fn near(found: f64, expected: f64, share: f64) {
    assert!((found / expected - 1.0).abs() <= share, "found {found}, expected {expected} within {share}");
}

fn graph_runs() -> Vec<FitRun> {
    let burst = workload(&[(0, 512, 64); 64]);
    let spaced: Vec<_> = (0..12).map(|i| (i * 1_000, 64, 24)).collect();
    [("burst", burst), ("mixed", mixed()), ("spaced", workload(&spaced))]
        .iter()
        .map(|(name, w)| real(name, EngineMode::Graph, w, &truth()))
        .collect()
}

#[test]
fn a_known_graph_engine_is_recovered_and_predicts_an_unseen_workload() {
    let fitted = calibrate(&graph_runs(), &times(), &options()).unwrap();
    let full = &fitted.dispatch[&Dispatch::FullGraph];
    near(full.host_pre.constant_ns, 1.2e6, 0.15);
    near(full.host_pre.per_seq_ns, 15_000.0, 0.25);
    // What is estimated lies inside of its own interval.
    let scales = &fitted.operator_scales;
    for (name, value) in [
        ("host_pre.constant_ns", full.host_pre.constant_ns),
        ("host_pre.per_seq_ns", full.host_pre.per_seq_ns),
        ("eager.launch_ns", fitted.dispatch[&Dispatch::Eager].launch_ns),
        ("operator_scales.decode_gemm", scales.decode_gemm),
        ("operator_scales.other", scales.other),
    ] {
        let [low, high] = fitted.fitted_on.intervals[name];
        assert!(low <= value && value <= high, "{name}: {value} of {low} to {high}");
    }
    near(fitted.dispatch[&Dispatch::PiecewiseGraph].after_idle_ns, 2e6, 0.2);
    near(fitted.client.admit_ns, 250_000.0, 0.1);
    near(fitted.client.between_steps.constant_ns, 15_000.0, 0.1);
    assert!(fitted.fitted_on.disturbed_share < 1e-9);

    let unseen: Vec<_> =
        (0..120).map(|i| (i * 31, 60 + (i as u32 * 97) % 1500, 10 + (i as u32 * 13) % 80)).collect();
    let held_out = [real("unseen", EngineMode::Graph, &workload(&unseen), &truth())];
    let rows = judge(&held_out, &times(), &prior(), &fitted, 1).unwrap();
    for row in rows.iter().filter(|r| r.stat == crate::metrics::Stat::P50) {
        let (before, after) = (row.before_error_pct.unwrap().abs(), row.after_error_pct.unwrap().abs());
        assert!(after < 4.0, "{row:?}");
        assert!(before > 3.0 * after, "{row:?}");
    }
}

#[test]
fn a_launch_bound_engine_is_told_from_a_busy_gpu() {
    let runs = [real("mixed", EngineMode::Eager, &mixed(), &truth())];
    let fitted = calibrate(&runs, &times(), &options()).unwrap();
    near(fitted.dispatch[&Dispatch::Eager].launch_ns, 40_000.0, 0.1);
    let [low, high] = fitted.fitted_on.intervals["eager.launch_ns"];
    let launch_ns = fitted.dispatch[&Dispatch::Eager].launch_ns;
    assert!(low <= launch_ns && launch_ns <= high && high - low < 0.1 * launch_ns, "{low} to {high}");
    // Nothing waits for the GPU, so nothing is known of its operators.
    assert!(fitted.fitted_on.not_identified.contains(&"operator_scales.prefill_gemm".to_owned()));
    assert!(!fitted.dispatch.contains_key(&Dispatch::FullGraph), "never seen, so not offered");
}

/// Runs count alike, so three short calm ones decide what is predicted; most steps are the long slow run's all the same.
#[test]
fn what_most_steps_have_is_no_disturbance() {
    let whole = real("slow", EngineMode::Eager, &mixed(), &truth());
    let mut runs = vec![whole.clone()];
    let mut shift = Nanos::ZERO;
    for step in &mut runs[0].run.steps {
        step.step_start_ns += shift;
        shift += step.step_duration_ns;
        step.step_duration_ns += step.step_duration_ns;
    }
    for name in ["calm", "calm too", "calm as well"] {
        let mut short = FitRun { name: name.into(), ..whole.clone() };
        let count = short.run.steps.len() / 10;
        short.run.steps.truncate(count);
        runs.push(short);
    }
    let fitted = calibrate(&runs, &times(), &options()).unwrap();
    assert!(fitted.fitted_on.disturbed_share < 1e-9, "{}", fitted.fitted_on.disturbed_share);
}

#[test]
fn a_disturbed_stretch_is_left_out_and_counted() {
    let mut run = real("mixed", EngineMode::Eager, &mixed(), &truth());
    let calm = calibrate(std::slice::from_ref(&run), &times(), &options()).unwrap();
    let n = run.run.steps.len();
    let mut shift = Nanos::ZERO;
    for (i, step) in run.run.steps.iter_mut().enumerate() {
        step.step_start_ns += shift;
        if (n / 3..n / 2).contains(&i) {
            shift += step.step_duration_ns;
            step.step_duration_ns += step.step_duration_ns;
        }
    }
    let disturbed = calibrate(&[run], &times(), &options()).unwrap();
    let share = disturbed.fitted_on.disturbed_share;
    assert!((0.12..0.2).contains(&share), "{share}");
    let launch = |p: &EngineProfile| p.dispatch[&Dispatch::Eager].launch_ns;
    near(launch(&disturbed), launch(&calm), 0.05);
}

#[test]
fn request_times_alone_calibrate_an_engine_that_serves_one_at_a_time() {
    let spaced: Vec<_> = (0..8).map(|i| (i * 2_000, 10, 64)).collect();
    let mut run = real("spaced", EngineMode::Eager, &workload(&spaced), &truth());
    let held_out = [run.clone()];
    run.run.steps.clear();
    run.run.tokens.clear();
    let fitted = calibrate(&[run], &times(), &options()).unwrap();
    let rows = judge(&held_out, &times(), &prior(), &fitted, 1).unwrap();
    assert!(rows.iter().filter_map(|r| r.after_error_pct).all(|e| e.abs() < 6.0), "{rows:?}");

    let mut overlapping = real("burst", EngineMode::Eager, &workload(&[(0, 64, 8); 2]), &truth());
    overlapping.run.steps.clear();
    let error = host_factor(&[overlapping], &times(), &fitted).unwrap_err().to_string();
    assert_eq!(
        error,
        "burst: requests 0 and 1 overlap, so step times cannot be told from request times: record step_metrics.csv"
    );
}

/// Nothing is recorded but when requests arrived, got their first token and were done, many at a time.
#[test]
fn request_times_alone_calibrate_an_engine_that_batches() {
    let mut runs = graph_runs();
    for fit_run in &mut runs {
        fit_run.run.steps.clear();
        fit_run.run.tokens.clear();
    }
    let fitted = calibrate(&runs[..2], &times(), &options()).unwrap();
    let unseen: Vec<_> =
        (0..80).map(|i| (i * 45, 60 + (i as u32 * 97) % 900, 10 + (i as u32 * 13) % 80)).collect();
    let held_out = [real("unseen", EngineMode::Graph, &workload(&unseen), &truth())];
    let rows = judge(&held_out, &times(), &prior(), &fitted, 1).unwrap();
    for row in rows.iter().filter(|r| r.stat == crate::metrics::Stat::P50) {
        let (before, after) = (row.before_error_pct.unwrap().abs(), row.after_error_pct.unwrap().abs());
        assert!(after < 10.0 && before > 2.0 * after, "{row:?}");
    }
    assert_eq!(fitted, calibrate(&runs[..2], &times(), &options()).unwrap());
}

#[test]
fn the_same_runs_give_the_same_profile() {
    let runs = graph_runs();
    assert_eq!(
        calibrate(&runs, &times(), &options()).unwrap(),
        calibrate(&runs, &times(), &options()).unwrap()
    );
    assert!(matches!(calibrate(&[], &times(), &options()), Err(CalibrateError::NoRuns)));
}

/// The same engine on a host half as fast: told by its scheduler's time, when fitting and when predicting.
#[test]
fn a_slower_host_is_told_by_its_scheduler() {
    let mut fast = truth();
    fast.schedule = HostCost { constant_ns: 50_000.0, per_seq_ns: 7_000.0, per_token_ns: 0.0 };
    let slow = EngineProfile { host_factor: 2.0, ..fast.clone() };
    let mut runs = vec![real("fast", EngineMode::Eager, &mixed(), &fast)];
    runs.push(FitRun { host: "slow".into(), ..real("slow", EngineMode::Eager, &mixed(), &slow) });
    let fitted = calibrate(&runs, &times(), &options()).unwrap();
    near(fitted.fitted_on.host_factors["slow"], 2.0, 0.02);
    near(fitted.dispatch[&Dispatch::Eager].launch_ns, 40_000.0, 0.1);
    let factor = |run: &FitRun| host_factor(std::slice::from_ref(run), &times(), &fitted).unwrap().factor;
    near(factor(&runs[0]), 1.0, 0.02);
    near(factor(&runs[1]), 2.0, 0.02);
    let moved = calibrate_host(&runs[1..], &times(), &fitted).unwrap();
    near(moved.host_factor, 2.0, 0.02);
    assert_eq!((&moved.dispatch, &moved.client), (&fitted.dispatch, &fitted.client));
    assert_eq!(moved.fitted_on.host_factor_runs, ["slow"]);
    // Without the scheduler's time the host's share of the steps says the same.
    runs[1].run.steps.iter_mut().for_each(|step| step.schedule_ns = Nanos::ZERO);
    near(factor(&runs[1]), 2.0, 0.05);
}

//! A simulated engine stands in for the real one, and one thing at a time is made wrong: that thing must be blamed.

use plumbline_bundles::{
    Dispatch, DispatchCosts, HostCost, PredictError, Prediction,
    engine_profile::{ClientCosts, FittedOn, OperatorScales},
};
use plumbline_schema::{EngineMode, GpuSpec, Nanos, OperatorShape, WorkloadRequest};
use plumbline_simulator::times::RooflineTimes;

use super::*;

/// Data-sheet times, one operator of which may take longer.
#[derive(Clone)]
struct Times {
    roofline: RooflineTimes,
    slow: Option<Operator>,
}

impl OperatorTimes for Times {
    fn predict(&self, operator: Operator, shape: &OperatorShape) -> Result<Prediction, PredictError> {
        let mut prediction = self.roofline.predict(operator, shape)?;
        if self.slow == Some(operator) {
            prediction.time_ns *= 1.2;
        }
        Ok(prediction)
    }
}

fn times(slow: Option<Operator>) -> Times {
    let gpu = GpuSpec::by_name("h100-sxm5-80gb").unwrap();
    Times { roofline: RooflineTimes { gpu, overhead_ns: 2_000.0 }, slow }
}

fn profile() -> EngineProfile {
    let noise: Vec<f64> = (0..=100).map(|i| 0.95 + 0.001 * f64::from(i)).collect();
    let costs = |constant_ns, launch_ns| DispatchCosts {
        host_pre: HostCost { constant_ns, per_seq_ns: 5_000.0, per_token_ns: 0.0 },
        host_post: HostCost::default(),
        launch_ns,
        launch_per_seq_ns: 0.0,
        after_idle_ns: 0.0,
        residual_quantiles: noise.clone(),
    };
    EngineProfile {
        name: "truth".into(),
        engine: "known".into(),
        scheduler: "vllm-v1".into(),
        dispatch: BTreeMap::from([
            (Dispatch::Eager, costs(1e6, 20_000.0)),
            (Dispatch::PiecewiseGraph, costs(1e6, 5_000.0)),
            (Dispatch::FullGraph, costs(1e6, 0.0)),
        ]),
        schedule: HostCost::default(),
        client: ClientCosts {
            admit_ns: 50_000.0,
            admit_per_token_ns: 0.0,
            between_steps: HostCost { constant_ns: 20_000.0, per_seq_ns: 0.0, per_token_ns: 0.0 },
        },
        operator_scales: OperatorScales::default(),
        idle_threshold_ns: 2e7,
        host_factor: 1.0,
        fitted_on: FittedOn::default(),
    }
}

fn workload() -> Workload {
    let request = |i: u64| {
        let (prompt, output) = (60 + (i * i * 37) % 900, 20 + (i * 13) % 80);
        WorkloadRequest::new(i, Nanos(i * 40_000_000), prompt as u32, output as u32)
    };
    Workload { requests: (0..60).map(request).collect() }
}

/// What one side is made from.
#[derive(Clone)]
struct Engine {
    times: Times,
    profile: EngineProfile,
    deployment: Deployment,
    seed: u64,
}

impl Engine {
    fn new(model: &ModelSpec, mode: EngineMode) -> Self {
        let times = times(None);
        let deployment = Deployment::defaults(model, &times.roofline.gpu, mode).unwrap();
        Self { times, profile: profile(), deployment, seed: 1 }
    }

    fn run(&self, model: &ModelSpec) -> Run {
        let options = SimulateOptions { seed: self.seed, ..SimulateOptions::default() };
        simulate(model, &workload(), &self.deployment, &self.profile, &self.times, &options).unwrap().run
    }
}

fn explained(model: &str, mode: EngineMode, change: impl FnOnce(&mut Engine)) -> Explanation {
    let model = ModelSpec::load(model).unwrap();
    let real = Engine::new(&model, mode);
    let mut sim = Engine { seed: 2, ..real.clone() };
    change(&mut sim);
    let profile = profile();
    let basis = Basis { model: &model, times: times(None), profile: &profile };
    let explanation = explain(&real.run(&model), &sim.run(&model), &workload(), &basis).unwrap();
    for waterfall in &explanation.waterfalls {
        let sum: f64 = waterfall.parts.iter().map(|part| part.ms).sum();
        assert!((waterfall.real_ms + sum - waterfall.sim_ms).abs() < 1e-6, "{waterfall:?}");
    }
    let [ttft, decode, e2e] = &explanation.waterfalls[..] else { panic!("three waterfalls") };
    assert!((ttft.sim_ms + decode.sim_ms - e2e.sim_ms).abs() < 1e-6);
    explanation
}

fn part(explanation: &Explanation, stretch: Stretch, cause: Cause) -> Part {
    let waterfall = explanation.waterfalls.iter().find(|w| w.stretch == stretch).unwrap();
    *waterfall.parts.iter().find(|part| part.cause == cause).unwrap()
}

#[test]
fn the_same_engine_is_blamed_for_nothing() {
    let explanation = explained("qwen3-0.6b", EngineMode::Graph, |_| ());
    let e2e = &explanation.waterfalls[2];
    for part in &e2e.parts {
        assert!(part.ms.abs() < 0.02 * e2e.real_ms, "{e2e:?}");
    }
}

#[test]
fn a_forgotten_host_is_blamed() {
    let explanation = explained("qwen3-0.6b", EngineMode::Eager, |sim| sim.profile.host_factor = 0.05);
    let host = part(&explanation, Stretch::Decode, Cause::Host);
    assert!(host.ms < 0.0 && host.share_pct.unwrap() > 85.0, "{explanation:?}");
    assert!(explanation.real_host_share > 0.8, "{explanation:?}");
}

#[test]
fn a_slow_operator_is_named() {
    let slow = Operator::GateUpProj;
    let explanation = explained("llama3-8b", EngineMode::Graph, |sim| sim.times = times(Some(slow)));
    let operators = part(&explanation, Stretch::E2e, Cause::Operators);
    assert!(operators.ms > 0.0 && operators.share_pct.unwrap() > 60.0, "{explanation:?}");
    let worst = &explanation.operators[0];
    assert_eq!(worst.operator, slow, "{explanation:?}");
    assert!(worst.sim_factor > worst.real_factor + 0.05, "{explanation:?}");
}

#[test]
fn a_halved_cache_is_blamed() {
    let explanation = explained("qwen3-0.6b", EngineMode::Eager, |sim| {
        sim.deployment.num_gpu_blocks = 120;
        sim.deployment.max_model_len = 1_500;
    });
    let capacity = part(&explanation, Stretch::E2e, Cause::KvCapacity);
    assert!(capacity.ms > 0.0 && capacity.share_pct.unwrap() > 80.0, "{explanation:?}");
}

#[test]
fn a_slow_client_is_blamed() {
    let explanation = explained("qwen3-0.6b", EngineMode::Graph, |sim| {
        sim.profile.client.between_steps.constant_ns += 1e6;
    });
    let client = part(&explanation, Stretch::Decode, Cause::Client);
    assert!(client.share_pct.unwrap() > 70.0, "{explanation:?}");
}

#[test]
fn what_cannot_be_explained_says_why() {
    let model = ModelSpec::load("qwen3-0.6b").unwrap();
    let run = Engine::new(&model, EngineMode::Graph).run(&model);
    let profile = profile();
    let basis = Basis { model: &model, times: times(None), profile: &profile };
    let refuse = |real: &Run, sim: &Run| explain(real, sim, &workload(), &basis).unwrap_err().to_string();
    let mut bare = run.clone();
    bare.steps.clear();
    bare.tokens.clear();
    assert!(refuse(&run, &bare).starts_with("the simulated run: requests 0 and 1 overlap"));
    let mut overlapping = run.clone();
    overlapping.steps[3].step_duration_ns += Nanos(1_000_000_000);
    assert!(refuse(&overlapping, &run).contains("step 4 begun before"), "{}", refuse(&overlapping, &run));
    let mut unset = run.clone();
    unset.info.deployment = None;
    assert!(refuse(&unset, &run).contains("deployment"));
    let mut failed = run.clone();
    failed.requests.iter_mut().for_each(|request| request.status = RequestStatus::Incomplete);
    assert!(refuse(&run, &failed).contains("found none"));
}

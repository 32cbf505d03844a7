//! How fast a simulation runs: one step's time, and whole runs by the step.

use std::{collections::BTreeMap, path::Path};

use divan::{Bencher, counter::ItemsCount};
use plumbline_bundles::{
    Dispatch, DispatchCosts, EngineProfile, HostCost, PredictError, Prediction, Provenance,
    engine_profile::{ClientCosts, FittedOn, OperatorScales},
};
use plumbline_schema::{GpuSpec, ModelSpec, Operator, OperatorShape, Run, StepBatch, Workload};
use plumbline_simulator::{OperatorTimes, RooflineTimes, SimulateOptions, StepTimeModel, replay, simulate};

fn main() {
    divan::main();
}

/// A shipped run: its workload has thousands of steps.
fn shipped_run() -> Run {
    let run = "../bundles/data/runs/h100-vllm-0.24/qwen3-0.6b-graph/conv-q8";
    Run::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join(run)).expect("a shipped run")
}

fn times() -> RooflineTimes {
    let gpu = GpuSpec::by_name("h100-sxm5-80gb").expect("a shipped GPU");
    RooflineTimes { gpu, overhead_ns: 2_000.0 }
}

fn profile() -> EngineProfile {
    let costs = || DispatchCosts {
        host_pre: HostCost { constant_ns: 700_000.0, per_seq_ns: 5_000.0, per_token_ns: 50.0 },
        host_post: HostCost { constant_ns: 200_000.0, per_seq_ns: 3_000.0, per_token_ns: 0.0 },
        launch_ns: 8_000.0,
        launch_per_seq_ns: 0.0,
        after_idle_ns: 2_000_000.0,
        residual_quantiles: vec![0.8, 0.95, 1.0, 1.1, 1.6],
    };
    EngineProfile {
        name: "bench".into(),
        engine: "bench".into(),
        scheduler: "vllm-v1".into(),
        dispatch: Dispatch::ALL.into_iter().map(|dispatch| (dispatch, costs())).collect::<BTreeMap<_, _>>(),
        schedule: HostCost::default(),
        client: ClientCosts::default(),
        operator_scales: OperatorScales::default(),
        idle_threshold_ns: 1e8,
        host_factor: 1.0,
        fitted_on: FittedOn::default(),
    }
}

/// Times of one answer: what a step costs beside predicting its attention.
struct FixedTimes;

impl OperatorTimes for FixedTimes {
    fn predict(&self, _operator: Operator, _shape: &OperatorShape) -> Result<Prediction, PredictError> {
        let time_ns = 5_000.0;
        Ok(Prediction { time_ns, low_ns: time_ns, high_ns: time_ns, provenance: Provenance::Interpolated })
    }
}

/// Asks for batches of 1 to 64 decodes in turn, so that no answer is the last one's.
fn step_times(bencher: Bencher, times: impl OperatorTimes) {
    let model = ModelSpec::load("qwen3-0.6b").expect("a shipped model");
    let deployment = shipped_run().info.deployment.expect("a deployment");
    let mut step_time = StepTimeModel::new(&model, times, &profile(), &deployment).expect("valid");
    let decodes = |number: u32| vec![(900 + number).to_string(); number as usize].join(";");
    let batch = |number| StepBatch::parse("", &decodes(number)).expect("a batch").shape();
    let batches: Vec<_> = (1..=64).map(batch).collect();
    bencher.counter(ItemsCount::new(batches.len())).bench_local(|| {
        for batch in &batches {
            divan::black_box(step_time.step_time(divan::black_box(batch), false).expect("a time"));
        }
    });
}

#[divan::bench]
fn step_time(bencher: Bencher) {
    step_times(bencher, times());
}

#[divan::bench]
fn step_time_beside_prediction(bencher: Bencher) {
    step_times(bencher, FixedTimes);
}

#[divan::bench]
fn whole_simulation(bencher: Bencher) {
    let model = ModelSpec::load("qwen3-0.6b").expect("a shipped model");
    let run = shipped_run();
    let (workload, deployment) = (run.workload(), run.info.deployment.expect("a deployment"));
    let options = SimulateOptions::default();
    let simulated = |workload: &Workload| {
        simulate(&model, workload, &deployment, &profile(), times(), &options).expect("a simulation")
    };
    let num_steps = simulated(&workload).run.steps.len();
    bencher.counter(ItemsCount::new(num_steps)).bench_local(|| simulated(divan::black_box(&workload)));
}

#[divan::bench]
fn replaying_a_real_run(bencher: Bencher) {
    let run = shipped_run();
    bencher
        .counter(ItemsCount::new(run.steps.len()))
        .bench_local(|| replay(divan::black_box(&run)).expect("a report"));
}

use std::{cell::Cell, collections::BTreeMap};

use plumbline_bundles::{HostCost, Prediction, Provenance, engine_profile::FittedOn};
use plumbline_schema::{HostFactorBasis, HostInfo, StepBatch};

use super::*;

/// Every launch takes 100 ns, attention 1,000 ns; counts how often it is asked.
#[derive(Default)]
struct FixedTimes {
    num_predictions: Cell<u32>,
}

impl OperatorTimes for FixedTimes {
    fn predict(&self, operator: Operator, _shape: &OperatorShape) -> Result<Prediction, PredictError> {
        self.num_predictions.set(self.num_predictions.get() + 1);
        let (time_ns, provenance) = match operator {
            Operator::Attention => (1000.0, Provenance::Interpolated),
            Operator::AllReduce => {
                let (available, hint) = (String::new(), String::new());
                return Err(PredictError::MissingOperator { operator, available, hint });
            }
            _ => (100.0, Provenance::Measured),
        };
        Ok(Prediction { time_ns, low_ns: time_ns, high_ns: time_ns, provenance })
    }
}

fn costs(constant_ns: f64) -> DispatchCosts {
    DispatchCosts {
        host_pre: HostCost { constant_ns, per_seq_ns: 10.0, per_token_ns: 1.0 },
        host_post: HostCost { constant_ns: 500.0, per_seq_ns: 0.0, per_token_ns: 0.0 },
        launch_ns: 50.0,
        launch_per_seq_ns: 0.0,
        after_idle_ns: 7_000.0,
        residual_quantiles: vec![],
    }
}

fn profile() -> EngineProfile {
    EngineProfile {
        name: "test".into(),
        engine: "test 1".into(),
        scheduler: "vllm-v1".into(),
        dispatch: BTreeMap::from([(Dispatch::Eager, costs(10_000.0)), (Dispatch::FullGraph, costs(1_000.0))]),
        schedule: plumbline_bundles::HostCost::default(),
        client: plumbline_bundles::engine_profile::ClientCosts::default(),
        operator_scales: OperatorScales { decode_attention: 2.0, ..OperatorScales::default() },
        idle_threshold_ns: 1e8,
        host_factor: 1.5,
        fitted_on: FittedOn::default(),
    }
}

fn deployment(mode: EngineMode) -> Deployment {
    Deployment {
        mode,
        model: "qwen3-0.6b".into(),
        max_num_batched_tokens: 2048,
        max_num_seqs: 256,
        max_model_len: 4096,
        num_gpu_blocks: 1000,
        block_size: 16,
        tensor_parallel_size: 1,
        pipeline_parallel_size: 1,
        enable_prefix_caching: false,
        scheduling_policy: "fcfs".into(),
        long_prefill_token_threshold: 0,
        async_scheduling: false,
        cudagraph_sizes: vec![1, 2, 4, 8],
    }
}

fn model_of(mode: EngineMode) -> StepTimeModel<FixedTimes> {
    let qwen = ModelSpec::load("qwen3-0.6b").unwrap();
    StepTimeModel::new(&qwen, FixedTimes::default(), &profile(), &deployment(mode)).unwrap()
}

fn shape(chunks: &str, decodes: &str) -> BatchShape {
    StepBatch::parse(chunks, decodes).unwrap().shape()
}

fn assert_ns(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-6, "{found} ns, expected {expected} ns");
}

#[test]
fn batches_are_dispatched_and_padded_as_a_graph_engine_does() {
    let graph = deployment(EngineMode::Graph);
    assert_eq!(dispatch(&graph, &shape("", "5;5;5")), (Dispatch::FullGraph, 4));
    assert_eq!(dispatch(&graph, &shape("", "5;5;5;5")), (Dispatch::FullGraph, 4));
    assert_eq!(dispatch(&graph, &shape("3:0", "5;5")), (Dispatch::PiecewiseGraph, 8));
    assert_eq!(dispatch(&graph, &shape("9:0", "")), (Dispatch::Eager, 9));
    assert_eq!(dispatch(&deployment(EngineMode::Eager), &shape("", "5")), (Dispatch::Eager, 1));
}

/// Worked by hand: 28 layers of 4 GEMMs and 6 others, LM head, embedding, final norm, sampling.
#[test]
fn an_eager_step_adds_up() {
    let time = model_of(EngineMode::Eager).step_time(&shape("", "5;9"), false).unwrap();
    assert_ns(time.parts.gemm_ns, 100.0 * f64::from(28 * 4 + 1));
    assert_ns(time.parts.other_ns, 100.0 * f64::from(28 * 6 + 3));
    assert_ns(time.parts.decode_attention_ns, 28_000.0);
    assert_ns(time.parts.prefill_attention_ns, 0.0);
    assert_eq!(time.parts.num_launches, 28 * 11 + 4);
    assert_ns(time.gpu_ns, 28_400.0 + 2.0 * 28_000.0);
    assert_ns(time.launch_ns, 1.5 * 312.0 * 50.0);
    assert_ns(time.host_pre_ns, 1.5 * (10_000.0 + 20.0 + 2.0));
    assert_ns(time.total_ns(), 15_033.0 + 84_400.0 + 750.0);
    assert_ns(time.parts.provenance.measured_ns, 28_400.0);
    assert_ns(time.parts.provenance.interpolated_ns, 28_000.0);
}

#[test]
fn a_prefill_chunk_makes_all_attention_prefill_attention() {
    let parts = model_of(EngineMode::Eager).gpu_parts(&shape("4:0", "5;9")).unwrap();
    assert_ns(parts.prefill_attention_ns, 28_000.0);
    assert_ns(parts.decode_attention_ns, 0.0);
}

#[test]
fn a_host_with_half_the_score_doubles_the_hosts_part_and_no_other() {
    let mut known = profile();
    known.fitted_on.host = Some(HostInfo::of_score(110.0));
    let qwen = ModelSpec::load("qwen3-0.6b").unwrap();
    let step = |profile: &EngineProfile| {
        let deployment = deployment(EngineMode::Eager);
        let mut model = StepTimeModel::new(&qwen, FixedTimes::default(), profile, &deployment).unwrap();
        model.step_time(&shape("", "5;9"), true).unwrap()
    };
    let (slow, used) = known.on_host(&HostInfo::of_score(55.0));
    assert_eq!((used.basis, used.fitted_score), (HostFactorBasis::Scores, Some(110.0)));
    assert_ns(used.factor, 2.0 * 1.5);
    let (as_fitted, half) = (step(&known), step(&slow));
    assert_ns(half.host_pre_ns, 2.0 * as_fitted.host_pre_ns);
    assert_ns(half.host_post_ns, 2.0 * as_fitted.host_post_ns);
    assert_ns(half.launch_ns, 2.0 * as_fitted.launch_ns);
    assert_ns(half.after_idle_ns, 2.0 * as_fitted.after_idle_ns);
    assert_ns(half.gpu_ns, as_fitted.gpu_ns);
    assert_eq!(half.parts, as_fitted.parts);

    // The same host changes nothing, and neither does any host where the profile does not know its own.
    assert_eq!(known.on_host(&HostInfo::of_score(110.0)).0, known);
    let (unchanged, used) = profile().on_host(&HostInfo::of_score(55.0));
    assert_eq!(unchanged, profile());
    assert_eq!((used.basis, used.factor), (HostFactorBasis::FittedHostUnknown, 1.5));
}

#[test]
fn launching_and_idling_count_when_they_dominate() {
    let mut model = model_of(EngineMode::Graph);
    let steady = model.step_time(&shape("", "5;9;9"), false).unwrap();
    assert_eq!((steady.parts.dispatch, steady.parts.num_tokens), (Dispatch::FullGraph, 4));
    assert_eq!(steady.parts.num_launches, 1);
    // Host costs count real tokens, not padded ones.
    assert_ns(steady.host_pre_ns, 1.5 * (1_000.0 + 30.0 + 3.0));
    // A busy GPU hides the host's waking up; where launching is the longer part, it shows.
    let woken = model.step_time(&shape("", "5;9;9"), true).unwrap();
    assert_ns(woken.launch_ns - steady.launch_ns, 1.5 * 7_000.0);
    assert_ns(woken.total_ns(), steady.total_ns());
    model.profile.host_factor = 1000.0;
    let woken = model.step_time(&shape("300:0", ""), true).unwrap();
    let steady = model.step_time(&shape("300:0", ""), false).unwrap();
    assert_ns(woken.total_ns() - steady.total_ns(), 1000.0 * 7_000.0);
    let slow = model.step_time(&shape("300:0", ""), false).unwrap();
    assert_ns(slow.total_ns(), slow.host_pre_ns + slow.launch_ns + slow.host_post_ns);
}

#[test]
fn residuals_stretch_the_host_and_not_the_gpu() {
    let mut model = model_of(EngineMode::Eager);
    let mut gpu_bound = model.step_time(&shape("", "5;9"), false).unwrap();
    gpu_bound.residual = 2.0;
    assert_ns(gpu_bound.total_ns(), 84_400.0 + 2.0 * (15_033.0 + 750.0));
    model.profile.host_factor = 15.0;
    let mut host_bound = model.step_time(&shape("", "5;9"), false).unwrap();
    let predicted = host_bound.total_ns();
    assert_ns(predicted, 150_330.0 + 234_000.0 + 7_500.0);
    host_bound.residual = 1.5;
    assert_ns(host_bound.total_ns(), 1.5 * predicted);
    host_bound.residual = 0.0;
    assert_ns(host_bound.total_ns(), 84_400.0);
}

#[test]
fn only_attention_is_predicted_twice() {
    let mut model = model_of(EngineMode::Graph);
    let before = model.times.num_predictions.get();
    let first = model.gpu_parts(&shape("", "5;9;9")).unwrap();
    let asked = model.times.num_predictions.get();
    assert!(asked - before > 10);
    assert_eq!(model.gpu_parts(&shape("", "6;10;10")).unwrap(), first);
    assert_eq!(model.times.num_predictions.get(), asked + 1);
}

#[test]
fn what_is_missing_is_an_error_by_name() {
    let mut model = model_of(EngineMode::Graph);
    assert_eq!(
        model.step_time(&shape("3:0", ""), false).unwrap_err().to_string(),
        "engine profile `test` has no costs of piecewise_graph steps, which this deployment forms"
    );
    let qwen = ModelSpec::load("qwen3-0.6b").unwrap();
    let two = Deployment { tensor_parallel_size: 2, ..deployment(EngineMode::Eager) };
    let error = StepTimeModel::new(&qwen, FixedTimes::default(), &profile(), &two).err().unwrap();
    assert!(matches!(error, StepTimeError::NoCollectives { tensor_parallel_size: 2, .. }), "{error}");
}

#[test]
fn impossible_profiles_are_refused_by_key() {
    let refused = |change: fn(&mut EngineProfile)| {
        let mut profile = profile();
        change(&mut profile);
        let qwen = ModelSpec::load("qwen3-0.6b").unwrap();
        let built =
            StepTimeModel::new(&qwen, FixedTimes::default(), &profile, &deployment(EngineMode::Eager));
        built.err().unwrap().to_string()
    };
    assert_eq!(
        refused(|p| p.host_factor = 0.0),
        "engine profile `test`, key `host_factor`: expected a finite number above 0, found 0"
    );
    assert_eq!(
        refused(|p| p.dispatch.get_mut(&Dispatch::Eager).unwrap().host_pre.per_seq_ns = f64::NAN),
        "engine profile `test`, key `dispatch.eager.host_pre.per_seq_ns`: expected a finite number from 0, found NaN"
    );
    assert_eq!(
        refused(|p| {
            p.dispatch.get_mut(&Dispatch::Eager).unwrap().residual_quantiles = vec![0.9, 0.8];
        }),
        "engine profile `test`, key `dispatch.eager.residual_quantiles[1]`: expected at least 0.9, the one before, found 0.8"
    );
}

use std::{cell::Cell, collections::BTreeMap};

use plumbline_bundles::{HostCost, Prediction, Provenance, engine_profile::FittedOn};
use plumbline_schema::{GpuSpec, HostFactorBasis, HostInfo, Nanos, PrefillChunk, StepBatch};
use proptest::prelude::*;

use super::{timer::StepTimer, usage::Usage, *};
use crate::RooflineTimes;

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
        cudagraph_mode: plumbline_schema::CudagraphMode::default(),
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
    let decode_only = Deployment { cudagraph_mode: CudagraphMode::FullDecodeOnly, ..graph.clone() };
    assert_eq!(dispatch(&decode_only, &shape("", "5;5;5")), (Dispatch::FullGraph, 4));
    assert_eq!(dispatch(&decode_only, &shape("3:0", "5;5")), (Dispatch::Eager, 5));
    let full = Deployment { cudagraph_mode: CudagraphMode::Full, ..graph.clone() };
    assert_eq!(dispatch(&full, &shape("3:0", "5;5")), (Dispatch::FullGraph, 8));
    let pieces = Deployment { cudagraph_mode: CudagraphMode::Piecewise, ..graph };
    assert_eq!(dispatch(&pieces, &shape("", "5;5;5")), (Dispatch::PiecewiseGraph, 4));
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
    let mut model = model_of(EngineMode::Eager);
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
    assert!(error.to_string().contains("`all_reduce`"), "{error}");
    let staged = Deployment { pipeline_parallel_size: 2, ..deployment(EngineMode::Eager) };
    let error = StepTimeModel::new(&qwen, roofline(), &profile(), &staged).err().unwrap();
    assert!(matches!(error, StepTimeError::NoCollectives { pipeline_parallel_size: 2, .. }), "{error}");
    assert!(error.to_string().contains("`send_recv`"), "{error}");
    let too_many = Deployment { pipeline_parallel_size: 29, ..deployment(EngineMode::Eager) };
    let error = StepTimeModel::new(&qwen, FixedTimes::default(), &profile(), &too_many).err().unwrap();
    assert_eq!(error.to_string(), "expected a pipeline_parallel_size from 1 to num_layers = 28, found 29");
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

fn roofline() -> RooflineTimes {
    RooflineTimes { gpu: GpuSpec::by_name("h100-sxm5-80gb").unwrap(), overhead_ns: 2_000.0 }
}

/// Roofline times, and collectives at 400 GB/s after 10 us.
struct Linked(RooflineTimes);

impl OperatorTimes for Linked {
    fn predict(&self, operator: Operator, shape: &OperatorShape) -> Result<Prediction, PredictError> {
        let OperatorShape::Collective { message_bytes, .. } = shape else {
            return self.0.predict(operator, shape);
        };
        let time_ns = 10_000.0 + *message_bytes as f64 / 400.0;
        Ok(Prediction { time_ns, low_ns: time_ns, high_ns: time_ns, provenance: Provenance::Measured })
    }
}

/// A model over several GPUs, all dispatches and factors apart from one another.
fn parallel_model(tp: u32, pp: u32) -> StepTimeModel<Linked> {
    let profile = EngineProfile {
        dispatch: Dispatch::ALL.into_iter().map(|dispatch| (dispatch, costs(10_000.0))).collect(),
        operator_scales: OperatorScales {
            prefill_gemm: 1.1,
            decode_gemm: 0.9,
            prefill_attention: 1.3,
            decode_attention: 0.7,
            other: 1.7,
        },
        ..profile()
    };
    let deployment = Deployment {
        tensor_parallel_size: tp,
        pipeline_parallel_size: pp,
        max_num_batched_tokens: 64,
        max_num_seqs: 4,
        ..deployment(EngineMode::Graph)
    };
    let qwen = ModelSpec::load("qwen3-0.6b").unwrap();
    StepTimeModel::new(&qwen, Linked(roofline()), &profile, &deployment).unwrap()
}

/// Batches inside and outside of what the tables are made for.
fn batches() -> impl Strategy<Value = Vec<(StepBatch, bool)>> {
    let chunk = (1_u32..200, 0_u32..3000)
        .prop_map(|(num_tokens, context_len)| PrefillChunk { num_tokens, context_len });
    let batch = (prop::collection::vec(chunk, 0..3), prop::collection::vec(0_u32..4000, 0..12))
        .prop_map(|(prefill_chunks, decode_contexts)| StepBatch { prefill_chunks, decode_contexts })
        .prop_filter("a step computes something", |batch| !batch.is_empty());
    prop::collection::vec((batch, any::<bool>()), 1..30)
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * b.abs()
}

proptest! {
    #[test]
    fn operators_and_stages_share_out_the_steps_gpu_time(
        batches in batches(),
        (tp, pp) in prop::sample::select(vec![(1, 1), (2, 1), (1, 2), (2, 3), (1, 5)]),
    ) {
        let mut model = parallel_model(tp, pp);
        let mut gpu_ns = 0.0;
        for (batch, after_idle) in &batches {
            let time = model.step_time(&batch.shape(), *after_idle).unwrap();
            gpu_ns += time.gpu_ns;
            let stages = model.stage_times(&time).unwrap();
            prop_assert_eq!(stages.len(), pp as usize);
            prop_assert!(near(stages.iter().map(|stage| stage.gpu_ns).sum(), time.gpu_ns));
            prop_assert!(near(stages.iter().map(|stage| stage.launch_ns).sum(), time.launch_ns));
            prop_assert!(near(time.parts.provenance.total_ns(),
                time.parts.gemm_ns + time.parts.prefill_attention_ns + time.parts.decode_attention_ns + time.parts.other_ns));
        }
        let usage = model.usage();
        prop_assert!(near(usage.gpu_time_ns(), gpu_ns), "{} and {gpu_ns}", usage.gpu_time_ns());
        prop_assert_eq!(usage.num_steps, batches.len() as u64);
        let shares: f64 = Operator::ALL.into_iter().map(|operator| usage.time_share(operator)).sum();
        prop_assert!(near(shares, 1.0));
    }

    /// What was asked before changes no answer, and neither does counting anew.
    #[test]
    fn a_used_model_answers_as_a_new_one(batches in batches()) {
        let mut used = parallel_model(1, 2);
        for (batch, after_idle) in &batches {
            used.step_time(&batch.shape(), *after_idle).unwrap();
        }
        used.reset_usage();
        let mut new = parallel_model(1, 2);
        for (batch, after_idle) in batches.iter().rev() {
            let shape = batch.shape();
            let (a, b) = (used.step_time(&shape, *after_idle), new.step_time(&shape, *after_idle));
            prop_assert_eq!(a.unwrap(), b.unwrap());
        }
        let (a, b) = (used.usage(), new.usage());
        prop_assert!(near(a.gpu_time_ns(), b.gpu_time_ns()) && near(a.model_flops, b.model_flops));
        prop_assert!(a.operators.iter().zip(&b.operators).all(|(a, b)| a.1.num_launches == b.1.num_launches));
    }
}

/// Worked by hand from the shapes: a padded batch computes more than the model needs.
#[test]
fn usage_counts_launches_work_and_traffic() {
    let mut model = model_of(EngineMode::Graph);
    model.gpu_parts(&shape("", "5;9;9")).unwrap();
    assert_eq!(model.usage().operators, BTreeMap::new());
    // Padded to 4 tokens, the sequences are not.
    let time = model.step_time(&shape("", "5;9;9"), false).unwrap();
    let usage = model.usage();
    let qkv = usage.operators[&Operator::QkvProj];
    assert_eq!(qkv.num_launches, 28);
    assert_ns(qkv.gpu_time_ns, 2_800.0);
    assert_ns(qkv.flops, 28.0 * 2.0 * 4.0 * 4096.0 * 1024.0);
    assert_ns(usage.operators[&Operator::LmHead].flops, 2.0 * 3.0 * 151_936.0 * 1024.0);
    let attention = usage.operators[&Operator::Attention];
    assert_ns(attention.gpu_time_ns, 2.0 * 28_000.0);
    // 6 + 10 + 10 keys.
    assert_ns(attention.flops, 28.0 * 4.0 * 2048.0 * 26.0);
    assert_ns(attention.bytes, 28.0 * 4.0 * (3.0 * 2048.0 + 26.0 * 1024.0));
    assert_ns(usage.gpu_time_ns(), time.gpu_ns);
    // Two operations a parameter and token, embedding and norms aside, one row a sequence of the LM head.
    let parameters = f64::from(28 * (1024 * 4096 + 2048 * 1024 + 3 * 1024 * 3072));
    let expected = 3.0 * 2.0 * (parameters + 151_936.0 * 1024.0) + attention.flops;
    assert!(near(usage.model_flops, expected), "{} and {expected}", usage.model_flops);

    let gpu = GpuSpec { bf16_flops_per_s: 1e12, hbm_bandwidth_bytes_per_s: 1e12, ..roofline().gpu };
    let span = Nanos(10_000_000);
    assert!(near(usage.mfu(&gpu, span).unwrap(), expected / 1e10));
    let bytes: f64 = usage.operators.values().map(|usage| usage.bytes).sum();
    assert!(near(usage.mbu(&gpu, span).unwrap(), bytes / 1e10));
    assert_eq!(usage.mfu(&gpu, Nanos::ZERO), None);

    // A replica that does the same in the same time leaves the shares as they are.
    let mut both = Usage::default();
    both += &usage;
    both += &usage;
    assert_eq!((both.num_steps, both.num_gpus), (2, 2));
    assert!(near(both.gpu_time_ns(), 2.0 * usage.gpu_time_ns()));
    assert!(near(both.mfu(&gpu, span).unwrap(), usage.mfu(&gpu, span).unwrap()));
    model.reset_usage();
    assert_eq!(model.usage(), Usage { num_gpus: 1, ..Usage::default() });
}

#[test]
fn stages_have_their_operators_and_launches() {
    let deployment = Deployment { pipeline_parallel_size: 3, ..deployment(EngineMode::Eager) };
    let qwen = ModelSpec::load("qwen3-0.6b").unwrap();
    let mut model = StepTimeModel::new(&qwen, FixedTimes::default(), &profile(), &deployment).unwrap();
    let time = model.step_time(&shape("", "5;9"), true).unwrap();
    // 28 layers are 9, 10 and 9; a layer has 10 operators of 100 ns and attention of 1,000 ns, doubled by its factor.
    let [first, middle, last] = *model.stage_times(&time).unwrap() else { panic!("three stages") };
    assert_ns(first.gpu_ns, 9.0 * 3_000.0 + 100.0 + 200.0);
    assert_ns(middle.gpu_ns, 10.0 * 3_000.0 + 200.0);
    assert_ns(last.gpu_ns, 9.0 * 3_000.0 + 300.0);
    // 11 launches a layer at 50 ns; the first host has slept.
    assert_eq!(time.parts.num_launches, 28 * 11 + 4 + 4);
    assert_ns(first.launch_ns, 1.5 * (102.0 * 50.0 + 7_000.0));
    assert_ns(middle.launch_ns, 1.5 * 112.0 * 50.0);
    assert_ns(last.launch_ns, 1.5 * 102.0 * 50.0);
    let slower = StepTime { residual: 2.0, ..time };
    assert_ns(model.stage_times(&slower).unwrap()[2].launch_ns, 2.0 * last.launch_ns);
    assert_ns(model.stage_times(&slower).unwrap()[2].gpu_ns, last.gpu_ns);
}

#[test]
fn tensor_parallel_gpus_share_work_and_pay_for_it() {
    let batch = shape("500:0", "900;900");
    let step = |tp| parallel_model(tp, 1).step_time(&batch, false).unwrap();
    let (one, two) = (step(1), step(2));
    assert!(two.parts.gemm_ns < one.parts.gemm_ns);
    assert!(two.parts.prefill_attention_ns < one.parts.prefill_attention_ns);
    let exchange_ns = 2.0 * 28.0 * (10_000.0 + 502.0 * 1024.0 * 2.0 / 400.0);
    assert_ns(two.parts.provenance.measured_ns, exchange_ns);
    assert!(two.parts.other_ns > exchange_ns);
    let mut model = parallel_model(2, 1);
    model.step_time(&batch, false).unwrap();
    assert_ns(model.usage().operators[&Operator::AllReduce].gpu_time_ns, 1.7 * exchange_ns);
}

#[test]
fn numbers_beyond_the_deployments_are_answered_too() {
    let mut model = parallel_model(1, 1);
    for num_tokens in [64, 65, 70_000, u32::MAX / 1024] {
        let batch = BatchShape { num_tokens, num_seqs: num_tokens, ..shape("64:0", "") };
        let first = model.step_time(&batch, false).unwrap();
        assert_eq!((first.parts.num_tokens, first.parts.dispatch), (num_tokens, Dispatch::Eager));
        assert_eq!(model.step_time(&batch, false).unwrap(), first);
    }
    assert_eq!(model.usage().num_steps, 8);
}

#[test]
fn a_timer_knows_idle_gaps_by_their_length() {
    let mut model = model_of(EngineMode::Eager);
    let batch = StepBatch::parse("", "5;9").unwrap();
    let mut after_idle = |idle| StepTimer::time(&mut &mut model, &batch, idle).unwrap().after_idle_ns > 0.0;
    assert!(after_idle(None) && after_idle(Some(Nanos(100_000_000))));
    assert!(!after_idle(Some(Nanos(99_999_999))) && !after_idle(Some(Nanos::ZERO)));
    let error = model.time(&StepBatch::default(), None).unwrap_err();
    assert!(matches!(error, StepTimeError::EmptyBatch), "{error}");
}

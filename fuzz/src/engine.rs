//! Engines of the tests.

use std::collections::BTreeMap;

use plumbline_bundles::{
    Dispatch, DispatchCosts, EngineProfile, HostCost, PredictError, Prediction, Provenance,
    engine_profile::{ClientCosts, FittedOn, OperatorScales},
};
use plumbline_schema::{Deployment, EngineMode, GpuSpec, Operator, OperatorShape};
use plumbline_simulator::{OperatorTimes, RooflineTimes, SchedulerKind};

/// The data sheet's times, whole nanoseconds (so that doubling is exact), times `factor`.
#[derive(Clone)]
pub struct WholeTimes {
    roofline: RooflineTimes,
    factor: f64,
    has_links: bool,
}

impl OperatorTimes for WholeTimes {
    fn predict(&self, operator: Operator, shape: &OperatorShape) -> Result<Prediction, PredictError> {
        let prediction = match shape {
            // 400 GB/s after 10 us.
            OperatorShape::Collective { message_bytes, .. } if self.has_links => {
                let time_ns = 10_000.0 + *message_bytes as f64 / 400.0;
                Prediction { time_ns, low_ns: time_ns, high_ns: time_ns, provenance: Provenance::Roofline }
            }
            _ => self.roofline.predict(operator, shape)?,
        };
        let time_ns = prediction.time_ns.round() * self.factor;
        Ok(Prediction { time_ns, low_ns: time_ns, high_ns: time_ns, ..prediction })
    }
}

/// The GPU of all engines here.
#[must_use]
pub fn gpu() -> GpuSpec {
    GpuSpec::by_name("h100-sxm5-80gb").expect("a GPU that is known")
}

/// Times of one GPU alone.
#[must_use]
pub fn times(factor: f64) -> WholeTimes {
    WholeTimes { roofline: RooflineTimes { gpu: gpu(), overhead_ns: 2_000.0 }, factor, has_links: false }
}

/// Times of GPUs that are linked.
#[must_use]
pub fn linked_times(factor: f64) -> WholeTimes {
    WholeTimes { has_links: true, ..times(factor) }
}

/// A profile whose costs are whole nanoseconds, times `factor`.
#[must_use]
pub fn profile(factor: f64, residual_quantiles: &[f64]) -> EngineProfile {
    let cost = |constant: f64, per_seq: f64, per_token: f64| HostCost {
        constant_ns: constant * factor,
        per_seq_ns: per_seq * factor,
        per_token_ns: per_token * factor,
    };
    let costs = |constant| DispatchCosts {
        host_pre: cost(constant, 11_000.0, 90.0),
        host_post: cost(300_000.0, 7_000.0, 0.0),
        launch_ns: 9_000.0 * factor,
        launch_per_seq_ns: 0.0,
        after_idle_ns: 2_000_000.0 * factor,
        residual_quantiles: residual_quantiles.to_vec(),
    };
    EngineProfile {
        name: "test".into(),
        engine: "test 1".into(),
        scheduler: "vllm-v1".into(),
        dispatch: BTreeMap::from([
            (Dispatch::Eager, costs(2_000_000.0)),
            (Dispatch::PiecewiseGraph, costs(900_000.0)),
            (Dispatch::FullGraph, costs(500_000.0)),
        ]),
        schedule: HostCost::default(),
        client: ClientCosts {
            admit_ns: 150_000.0 * factor,
            admit_per_token_ns: 40.0 * factor,
            between_steps: cost(60_000.0, 3_000.0, 0.0),
        },
        operator_scales: OperatorScales::default(),
        idle_threshold_ns: 50_000_000.0 * factor,
        host_factor: 1.0,
        fitted_on: FittedOn::default(),
    }
}

/// An eager engine with 19 usable blocks of 16 tokens.
#[must_use]
pub fn deployment() -> Deployment {
    Deployment {
        mode: EngineMode::Eager,
        model: "qwen3-0.6b".into(),
        max_num_batched_tokens: 200,
        max_num_seqs: 8,
        max_model_len: 400,
        num_gpu_blocks: 20,
        block_size: 16,
        tensor_parallel_size: 1,
        pipeline_parallel_size: 1,
        enable_prefix_caching: false,
        scheduling_policy: "fcfs".into(),
        long_prefill_token_threshold: 0,
        async_scheduling: false,
        cudagraph_sizes: vec![],
        cudagraph_mode: plumbline_schema::CudagraphMode::default(),
    }
}

/// What of a deployment a policy models: tried one by one, what it refuses is left as [`deployment`] has it.
#[must_use]
pub fn modelled(kind: SchedulerKind, wanted: &Deployment) -> Deployment {
    let plain = deployment();
    let block_size = wanted.block_size;
    let mut taken = Deployment {
        enable_prefix_caching: plain.enable_prefix_caching,
        scheduling_policy: plain.scheduling_policy,
        long_prefill_token_threshold: plain.long_prefill_token_threshold,
        async_scheduling: plain.async_scheduling,
        pipeline_parallel_size: plain.pipeline_parallel_size,
        ..wanted.clone()
    };
    if kind.build(&taken).is_err() {
        taken.max_num_batched_tokens = wanted.max_num_batched_tokens.next_multiple_of(block_size);
    }
    let features: [fn(&mut Deployment, &Deployment); 5] = [
        |to, from| to.enable_prefix_caching = from.enable_prefix_caching,
        |to, from| to.scheduling_policy.clone_from(&from.scheduling_policy),
        |to, from| to.long_prefill_token_threshold = from.long_prefill_token_threshold,
        |to, from| to.async_scheduling = from.async_scheduling,
        |to, from| to.pipeline_parallel_size = from.pipeline_parallel_size,
    ];
    for feature in features {
        let mut with = taken.clone();
        feature(&mut with, wanted);
        if kind.build(&with).is_ok() {
            taken = with;
        }
    }
    taken
}

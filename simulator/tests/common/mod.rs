//! Engines, deployments and workloads of the tests.

#![allow(dead_code, reason = "each test needs some of them")]

use std::collections::BTreeMap;

use plumbline_bundles::{
    Dispatch, DispatchCosts, EngineProfile, HostCost, PredictError, Prediction,
    engine_profile::{ClientCosts, FittedOn, OperatorScales},
};
use plumbline_schema::{
    Deployment, EngineMode, GpuSpec, Nanos, Operator, OperatorShape, Workload, WorkloadRequest,
};
use plumbline_simulator::{OperatorTimes, RooflineTimes};
use proptest::prelude::*;

/// The data sheet's times, whole nanoseconds (so that doubling is exact), times `factor`.
pub struct WholeTimes {
    roofline: RooflineTimes,
    factor: f64,
}

impl OperatorTimes for WholeTimes {
    fn predict(&self, operator: Operator, shape: &OperatorShape) -> Result<Prediction, PredictError> {
        let prediction = self.roofline.predict(operator, shape)?;
        let time_ns = prediction.time_ns.round() * self.factor;
        Ok(Prediction { time_ns, low_ns: time_ns, high_ns: time_ns, ..prediction })
    }
}

pub fn times(factor: f64) -> WholeTimes {
    let gpu = GpuSpec::by_name("h100-sxm5-80gb").unwrap();
    WholeTimes { roofline: RooflineTimes { gpu, overhead_ns: 2_000.0 }, factor }
}

/// A profile whose costs are whole nanoseconds, times `factor`.
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
    }
}

prop_compose! {
    /// Tight budgets, seats and blocks, so that chunks, queues, preemptions and rejections all happen.
    pub fn deployments()(
        is_graph in any::<bool>(),
        max_num_batched_tokens in 8_u32..300,
        max_num_seqs in 1_u32..12,
        num_gpu_blocks in 8_u32..80,
        block_size in prop::sample::select(vec![1_u32, 4, 16]),
        long_prefill_token_threshold in prop::sample::select(vec![0_u32, 0, 16]),
    ) -> Deployment {
        Deployment {
            mode: if is_graph { EngineMode::Graph } else { EngineMode::Eager },
            max_num_batched_tokens,
            max_num_seqs,
            num_gpu_blocks,
            block_size,
            long_prefill_token_threshold,
            cudagraph_sizes: if is_graph { vec![1, 2, 4, 8, 16, 32, 64] } else { vec![] },
            ..deployment()
        }
    }
}

/// Up to 24 requests; the gaps hold bursts, steady arrivals and idle spells.
pub fn workloads() -> impl Strategy<Value = Workload> {
    let gap = prop_oneof![
        3 => Just(0_u64),
        4 => 0_u64..20_000_000,
        1 => 60_000_000_u64..400_000_000,
    ];
    prop::collection::vec((gap, 1_u32..350, 1_u32..60), 1..24).prop_map(|requests| {
        let mut time = 0;
        let of = |(i, (gap, num_prefill_tokens, num_decode_tokens)): (usize, (u64, u32, u32))| {
            time += gap;
            WorkloadRequest::new(100 + i as u64, Nanos(time), num_prefill_tokens, num_decode_tokens)
        };
        Workload { requests: requests.into_iter().enumerate().map(of).collect() }
    })
}

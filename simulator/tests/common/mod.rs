//! Engines, deployments and workloads of the tests.

#![allow(dead_code, unused_imports, reason = "each test needs some of them")]

use plumbline_schema::{Deployment, EngineMode, Nanos, Workload, WorkloadRequest};
use plumbline_simulator::SchedulerKind;
use proptest::prelude::*;

#[path = "../../../fuzz/src/lib.rs"]
pub mod fuzz;

pub use fuzz::engine::{deployment, modelled, profile, times};

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

/// A policy and a deployment that it serves.
pub fn engines() -> impl Strategy<Value = (SchedulerKind, Deployment)> {
    (prop::sample::select(SchedulerKind::ALL.to_vec()), deployments())
        .prop_map(|(kind, deployment)| (kind, modelled(kind, &deployment)))
}

//! Bytes as a cluster and what it is asked; any bytes are some simulation, and fewer or smaller bytes a smaller one.

use std::sync::Arc;

use plumbline_schema::{Deployment, EngineMode, Nanos, PromptContent, Workload, WorkloadRequest};
use plumbline_simulator::{
    RequestSource, SchedulerKind, WorkloadSource,
    arrival::{
        Arrival, CountDistribution, Lengths, NextTurn, Prefixes, Priority, Sessions, TimeDistribution,
        WorkloadSpec,
    },
    cluster::{Role, RouterKind},
};

use super::engine::{deployment, modelled};

/// Most requests of a case.
pub const MAX_REQUESTS: u64 = 24;

/// Replicas of one kind.
#[derive(Clone, Debug)]
pub struct Kind {
    pub scheduler: SchedulerKind,
    pub deployment: Deployment,
    pub num_replicas: u32,
    pub role: Role,
}

/// Who asks.
#[derive(Clone, Debug)]
pub enum Requests {
    /// Requests that are known beforehand.
    Known(Workload),
    /// Requests made by rules; of closed loops and conversations as answers come.
    Made(Box<WorkloadSpec>),
}

/// A simulation.
#[derive(Clone, Debug)]
pub struct Case {
    pub kinds: Vec<Kind>,
    pub router: RouterKind,
    pub seed: u64,
    /// Whether steps scatter.
    pub scatters: bool,
    pub requests: Requests,
}

/// Reads numbers off bytes; zeros after their end.
struct Bytes<'a>(std::slice::Iter<'a, u8>);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        self.0.next().copied().unwrap_or_default()
    }

    fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// A number from `least` to `most`.
    fn between(&mut self, least: u32, most: u32) -> u32 {
        let drawn = u32::from(self.byte()) | u32::from(self.byte()) << 8;
        least + drawn % (most - least + 1)
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[usize::from(self.byte()) % from.len()].clone()
    }
}

impl Case {
    /// The simulation that `bytes` stand for.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut bytes = Bytes(bytes.iter());
        let bytes = &mut bytes;
        let router = bytes.pick(&RouterKind::ALL);
        let (seed, scatters) = (u64::from(bytes.byte()), bytes.flag());
        let roles: &[&[Role]] = &[
            &[Role::Whole],
            &[Role::Whole, Role::Whole],
            &[Role::Prefill, Role::Decode],
            &[Role::Prefill, Role::Decode, Role::Prefill],
        ];
        let kinds = bytes.pick(roles).iter().map(|&role| kind(role, bytes)).collect();
        let requests = match bytes.byte() % 3 {
            0 | 1 => Requests::Known(workload(bytes)),
            _ => Requests::Made(Box::new(rules(bytes))),
        };
        Self { kinds, router, seed, scatters, requests }
    }

    /// The requests that are known beforehand, if any are.
    #[must_use]
    pub fn workload(&self) -> Option<&Workload> {
        match &self.requests {
            Requests::Known(workload) => Some(workload),
            Requests::Made(_) => None,
        }
    }

    /// Most requests that can be under way at once.
    #[must_use]
    pub fn most_under_way(&self) -> u64 {
        match &self.requests {
            Requests::Made(spec) => match spec.arrival {
                Arrival::ClosedLoop { users, .. } => u64::from(users),
                _ => MAX_REQUESTS,
            },
            Requests::Known(_) => MAX_REQUESTS,
        }
    }

    /// The requests.
    ///
    /// # Panics
    /// When the rules made of bytes are none: a fault of this file.
    #[must_use]
    pub fn source(&self) -> Box<dyn RequestSource> {
        match &self.requests {
            Requests::Known(workload) => Box::new(WorkloadSource::new(workload.clone())),
            Requests::Made(spec) => spec.source(self.seed).expect("rules that can be followed"),
        }
    }
}

/// Tight budgets, seats and blocks, so that chunks, queues, preemptions and rejections all happen.
fn kind(role: Role, bytes: &mut Bytes<'_>) -> Kind {
    // Only one policy continues what another engine has begun; others refuse it, which is to happen too.
    let is_taken_on = role == Role::Decode && !bytes.byte().is_multiple_of(8);
    let scheduler = if is_taken_on { SchedulerKind::VllmV1 } else { bytes.pick(&SchedulerKind::ALL) };
    let is_graph = bytes.flag();
    let is_roomy = bytes.byte().is_multiple_of(4);
    let wanted = Deployment {
        mode: if is_graph { EngineMode::Graph } else { EngineMode::Eager },
        cudagraph_sizes: if is_graph { vec![1, 2, 4, 8, 16, 32, 64] } else { vec![] },
        max_num_batched_tokens: bytes.between(4, 300),
        max_num_seqs: bytes.between(1, 12),
        num_gpu_blocks: if is_roomy { bytes.between(60, 600) } else { bytes.between(1, 80) },
        block_size: bytes.pick(&[16, 1, 4, 3]),
        enable_prefix_caching: bytes.flag(),
        scheduling_policy: bytes.pick(&["fcfs", "priority"]).into(),
        long_prefill_token_threshold: bytes.pick(&[0, 0, 1, 16]),
        async_scheduling: bytes.flag(),
        pipeline_parallel_size: bytes.pick(&[1, 1, 2, 4]),
        tensor_parallel_size: bytes.pick(&[1, 1, 2]),
        ..deployment()
    };
    let num_replicas = bytes.between(1, 3);
    Kind { scheduler, deployment: modelled(scheduler, &wanted), num_replicas, role }
}

/// Bursts, steady arrivals and idle spells; lengths from one token to more than any deployment here takes.
fn workload(bytes: &mut Bytes<'_>) -> Workload {
    let num_requests = u64::from(bytes.between(0, MAX_REQUESTS as u32));
    let mut arrival = Nanos(0);
    let request = |request_id| {
        let gap = bytes.byte();
        arrival += Nanos(match gap % 8 {
            0..3 => 0,
            // An idle engine is one that slept for 50 ms.
            3 => u64::from(bytes.between(0, 400)) * 1_000_000,
            _ => u64::from(bytes.between(0, 20_000)) * 1_000,
        });
        let most_prefill = bytes.pick(&[20, 350, 500]);
        let (prefill, decode) = (bytes.between(1, most_prefill), bytes.between(1, 60));
        let priority = i32::from(bytes.byte() % 3) - 1;
        let content = content(bytes).map(Arc::new);
        WorkloadRequest { priority, content, ..WorkloadRequest::new(request_id, arrival, prefill, decode) }
    };
    Workload { requests: (100..100 + num_requests).map(request).collect() }
}

fn content(bytes: &mut Bytes<'_>) -> Option<PromptContent> {
    let none = PromptContent::default();
    match bytes.byte() % 5 {
        1 => {
            let (id, prefix_len) = (u64::from(bytes.byte() % 2), bytes.between(0, 120));
            Some(PromptContent { prefix_id: Some(id), prefix_len, ..none })
        }
        2 => Some(PromptContent { session_id: Some(u64::from(bytes.byte() % 3)), ..none }),
        3 => {
            let prefix_hashes = (0..bytes.byte() % 6).map(|_| u64::from(bytes.byte() % 3)).collect();
            Some(PromptContent { prefix_hashes, prefix_hash_tokens: bytes.between(1, 40), ..none })
        }
        _ => None,
    }
}

fn rules(bytes: &mut Bytes<'_>) -> WorkloadSpec {
    let lengths = Lengths::Distributions {
        prefill: CountDistribution::Uniform { min: 1, max: bytes.between(1, 350) },
        decode: CountDistribution::Zipf { min: 1, max: bytes.between(1, 60), exponent: 0.5 },
    };
    let seconds = |milliseconds: u32| f64::from(milliseconds) / 1e3;
    let think_time = match bytes.byte() % 3 {
        0 => TimeDistribution::Fixed { value_s: 0.0 },
        1 => TimeDistribution::Fixed { value_s: seconds(bytes.between(0, 200)) },
        _ => TimeDistribution::Exponential { mean_s: seconds(bytes.between(1, 200)) },
    };
    let arrival = match bytes.byte() % 3 {
        0 => Arrival::ClosedLoop { users: bytes.between(1, 8), think_time: Some(think_time.clone()) },
        1 => Arrival::Poisson { rate_per_s: f64::from(bytes.between(1, 200)) },
        _ => Arrival::Static {},
    };
    let is_closed = matches!(arrival, Arrival::ClosedLoop { .. });
    let mut spec = WorkloadSpec::new(u64::from(bytes.between(1, MAX_REQUESTS as u32)), arrival, lengths);
    if bytes.flag() {
        let turns = CountDistribution::Uniform { min: 1, max: bytes.between(1, 5) };
        let waits = is_closed || bytes.flag();
        let next_turn = if waits { NextTurn::AfterCompletion } else { NextTurn::AfterArrival };
        spec.sessions = Some(Sessions { turns, think_time, next_turn });
    }
    if bytes.flag() {
        let (count, tokens) = (bytes.between(1, 3), bytes.between(1, 100));
        spec.prefixes = Some(Prefixes { count, tokens, exponent: 1.0 });
    }
    if bytes.flag() {
        spec.priorities =
            [(-1, 1.0), (1, 2.0)].map(|(priority, weight)| Priority { priority, weight }).to_vec();
    }
    spec
}

//! A whole simulation of a cluster: engines in words, requests from a source, results to a recorder.

use std::cell::RefCell;

use plumbline_bundles::EngineProfile;
use plumbline_schema::{Deployment, ModelSpec, Nanos};
use serde::Serialize;

use super::{Cluster, Group, ReplicaReport, Role, Routing};
use crate::{
    arrival::RequestSource,
    recorder::Recorder,
    simulate::{SimulateError, SimulateOptions, SimulationCounts, scheduler_of},
    step_time::{StepTimeModel, usage::Usage},
    times::{Coverage, OperatorTimes, ProvenanceTimes},
};

/// Replicas of one kind, in words.
#[derive(Clone, Debug)]
pub struct Engines<T> {
    /// What they serve.
    pub model: ModelSpec,
    /// How they are deployed.
    pub deployment: Deployment,
    /// How they spend what the machine can do; its `scheduler` is the policy.
    pub profile: EngineProfile,
    /// What the machine can do.
    pub times: T,
    /// How many.
    pub num_replicas: u32,
    /// What they are for.
    pub role: Role,
}

impl<T> Engines<T> {
    /// GPUs of all replicas.
    #[must_use]
    pub fn num_gpus(&self) -> u32 {
        let Deployment { tensor_parallel_size, pipeline_parallel_size, .. } = &self.deployment;
        self.num_replicas * tensor_parallel_size * pipeline_parallel_size
    }
}

/// What a simulated cluster did.
#[derive(Clone, Debug)]
pub struct ClusterRun {
    /// Each replica.
    pub replicas: Vec<ReplicaReport>,
    /// What the steps of each kind asked of its GPUs.
    pub usage: Vec<Usage>,
    /// Shares of the predicted GPU time of all steps, by provenance.
    pub coverage: Coverage,
    /// Counts of all replicas.
    pub counts: SimulationCounts,
    /// Output tokens that clients got: a prefill replica's token is computed again by a decode replica.
    pub output_tokens: u64,
    /// When the last replica stood still.
    pub end: Nanos,
}

/// Simulates a cluster that serves every request of `source`.
///
/// # Errors
/// When an engine cannot be simulated as deployed, the kinds make no cluster, or an operator has no time.
pub fn simulate_cluster<T: OperatorTimes, S: RequestSource, R: Recorder>(
    kinds: Vec<Engines<T>>,
    routing: Routing,
    options: &SimulateOptions,
    source: &mut S,
    recorder: &mut R,
) -> Result<ClusterRun, SimulateError> {
    let mut models = Vec::with_capacity(kinds.len());
    for kind in kinds {
        let scheduler = scheduler_of(&kind.profile)?;
        let step_time = StepTimeModel::new(&kind.model, kind.times, &kind.profile, &kind.deployment)?;
        models.push((RefCell::new(step_time), scheduler, kind.num_replicas, kind.role));
    }
    let mut groups = Vec::with_capacity(models.len());
    for &(ref step_time, scheduler, num_replicas, role) in &models {
        groups.push(Group { step_time, scheduler, num_replicas, role });
    }
    let replicas = Cluster::new(&groups, routing, options)?.run(source, recorder)?;
    let usage = models
        .iter()
        .map(|(step_time, _, num_replicas, _)| {
            let step_time = step_time.borrow();
            let stages = step_time.deployment().pipeline_parallel_size;
            Usage { num_gpus: num_replicas * stages, ..step_time.usage() }
        })
        .collect();
    let end = replicas.iter().map(|replica| replica.end).max().unwrap_or_default();
    let (counts, coverage) = totals(&replicas, &groups);
    let gives_out = |replica: &&ReplicaReport| groups[replica.group].role != Role::Prefill;
    let output_tokens = replicas.iter().filter(gives_out).map(|replica| replica.counts.output_tokens).sum();
    Ok(ClusterRun { replicas, usage, coverage, counts, output_tokens, end })
}

/// Counts and coverage over all replicas; a request that went through prefill and decode is one.
fn totals<T>(replicas: &[ReplicaReport], groups: &[Group<'_, T>]) -> (SimulationCounts, Coverage) {
    let mut counts = SimulationCounts::default();
    let mut provenance = ProvenanceTimes::default();
    for ReplicaReport { group, counts: of, busy, .. } in replicas {
        counts.rejected += of.rejected as usize;
        if groups[*group].role != Role::Prefill {
            counts.finished += of.finished as usize;
        }
        counts.preemptions += of.preemptions;
        let [eager, piecewise_graph, full_graph] = busy.steps.map(|steps| steps as usize);
        counts.eager_steps += eager;
        counts.piecewise_graph_steps += piecewise_graph;
        counts.full_graph_steps += full_graph;
        provenance += busy.provenance;
    }
    counts.requests = counts.finished + counts.rejected;
    (counts, provenance.shares())
}

/// What a replica did, as result files tell it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ReplicaSummary {
    /// Its number.
    pub replica: usize,
    /// Its kind's number.
    pub group: usize,
    /// Requests that got all their tokens.
    pub finished: u64,
    /// Requests that could never be served.
    pub rejected: u64,
    /// How often a sequence lost its blocks.
    pub preemptions: u64,
    /// Steps.
    pub steps: u64,
    /// Output tokens.
    pub output_tokens: u64,
    /// Mean sequences of a step; none without steps.
    pub batch_size_mean: Option<f64>,
    /// Share of the time up to the cluster's end in which the GPU worked.
    pub gpu_busy_share: f64,
    /// Mean share of KV blocks in use over that time.
    pub kv_use_mean: f64,
    /// Largest share of KV blocks in use.
    pub kv_use_max: f64,
    /// Most sequences running.
    pub running_max: u64,
    /// Most sequences waiting.
    pub waiting_max: u64,
}

impl ClusterRun {
    /// What each replica did, over the time up to the cluster's end.
    #[must_use]
    pub fn replica_summaries(&self) -> Vec<ReplicaSummary> {
        let span_ns = self.end.0 as f64;
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let summary = |(replica, report): (usize, &ReplicaReport)| {
            let ReplicaReport { group, counts, busy, num_kv_blocks, .. } = *report;
            let blocks = f64::from(num_kv_blocks);
            ReplicaSummary {
                replica,
                group,
                finished: counts.finished,
                rejected: counts.rejected,
                preemptions: counts.preemptions,
                steps: counts.steps,
                output_tokens: counts.output_tokens,
                batch_size_mean: (counts.steps > 0).then(|| counts.step_seqs as f64 / counts.steps as f64),
                gpu_busy_share: share(busy.gpu_ns, span_ns),
                kv_use_mean: share(counts.kv_block_ns as f64, blocks * span_ns),
                kv_use_max: share(f64::from(counts.kv_blocks_max), blocks),
                running_max: counts.running_max,
                waiting_max: counts.waiting_max,
            }
        };
        self.replicas.iter().enumerate().map(summary).collect()
    }
}

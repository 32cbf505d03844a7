//! How many KV blocks an engine gets on a GPU: the memory it may take, less all it needs besides.
//!
//! The accounting is vLLM 0.24's for dense models under its V2 model runner, which is what it takes for the Llama
//! and Qwen3 families (`vllm/config/vllm.py`, `DEFAULT_V2_MODEL_RUNNER_ARCHITECTURES`):
//!
//! - the budget is `ceil(device memory * gpu_memory_utilization)` (`vllm/v1/worker/utils.py`, `request_memory`);
//! - KV gets the budget less the weights, less the peak of torch's allocations in a profiling step of
//!   `max_num_batched_tokens` tokens, less what else the driver gave out since the engine's first snapshot
//!   (`vllm/v1/worker/gpu_worker.py`, `determine_available_memory`; `vllm/utils/mem_utils.py`, `memory_profiling`);
//! - that snapshot comes after the CUDA context and NCCL were set up, so these are outside of the budget; the V2
//!   runner's `profile_cudagraph_memory` answers 0 (`vllm/v1/worker/gpu/model_runner.py`), so graph pools are, too;
//! - blocks are whole, and every GPU gets as many as the tightest (`vllm/v1/core/kv_cache_utils.py`,
//!   `get_num_blocks`, `get_kv_cache_configs`).
//!
//! Where a rule ends and an assumption begins is said at each constant and method, and in `docs/memory-planner.md`.

mod share;

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::share::Share;
pub use self::share::{NON_TORCH_BYTES, PeakMoment};
use crate::{
    deployment::Deployment,
    forward::{Stage, stages},
    gpu::GpuSpec,
    model::ModelSpec,
    units::Bytes,
};

/// Share of the GPU's memory that vLLM 0.24 takes when told nothing (`vllm/config/cache.py`, `CacheConfig`; it was
/// 0.9 in older versions).
pub const GPU_MEMORY_UTILIZATION: f64 = 0.92;

/// No part is larger: it is far above any device, and sums of parts stay below 2^64.
const MAX_PART: u128 = 1 << 60;

/// Turns a product into bytes.
fn bytes(count: u128) -> Bytes {
    Bytes(count.min(MAX_PART) as u64)
}

/// What a plan takes besides the model, the GPU and the deployment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryOptions {
    /// Share of the device's memory that the engine may take, above 0 and at most 1.
    pub gpu_memory_utilization: f64,
    /// The device's memory as the driver reports it; `None` for [`device_memory`] of the GPU.
    pub device: Option<Bytes>,
    /// Whether the engine takes CUDA graph pools out of the budget. vLLM's V1 model runner does since 0.21
    /// (`VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS`), its V2 runner does not.
    pub reserves_graph_pools: bool,
}

impl Default for MemoryOptions {
    /// vLLM 0.24 for Llama and Qwen3 when told nothing.
    fn default() -> Self {
        Self { gpu_memory_utilization: GPU_MEMORY_UTILIZATION, device: None, reserves_graph_pools: false }
    }
}

/// The memory of a GPU that a program can see, less than what its data sheet says.
///
/// H100 and H200: `cuDeviceTotalMem` under driver 580, as the shipped bundles' manifests record it. A100-80GB: what
/// torch's out-of-memory messages of such GPUs state, 79.25 GiB (79.15 to 79.35 by driver). Any other GPU:
/// `hbm_bytes`, which for a GPU without a shipped data sheet is what the driver reported.
#[must_use]
pub fn device_memory(gpu: &GpuSpec) -> Bytes {
    match gpu.name.as_str() {
        "a100-sxm4-80gb" => Bytes(85_094_039_552),
        "h100-sxm5-80gb" => Bytes(85_017_493_504),
        "h200-sxm-141gb" => Bytes(150_109_880_320),
        _ => gpu.hbm_bytes,
    }
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum MemoryError {
    /// The share is no share.
    #[error("gpu_memory_utilization: expected a number above 0 and at most 1, found {0}")]
    Utilization(f64),
    /// The deployment is none for this model: its GPUs cannot share it, or its blocks hold no token.
    #[error("{0}")]
    Deployment(String),
    /// Something does not fit.
    #[error(
        "{model} on {gpu}{}: expected {what} within the budget of {} ({gpu_memory_utilization} of {}), found {}; give \
         each GPU less by `tensor_parallel_size` or `pipeline_parallel_size`, or take a GPU with more memory",
        stage_text(*stage, *num_stages), gib(*budget), gib(*device), gib(*needed)
    )]
    DoesNotFit {
        /// What was to fit: the weights, these and the activations, or these and one KV block.
        what: &'static str,
        /// The model.
        model: String,
        /// The GPU.
        gpu: String,
        /// The pipeline stage, from 0.
        stage: u32,
        /// Pipeline stages.
        num_stages: u32,
        /// What it takes on each GPU of the stage.
        needed: Bytes,
        /// What the engine may take.
        budget: Bytes,
        /// What the device has.
        device: Bytes,
        /// The share that makes the one of the other.
        gpu_memory_utilization: f64,
    },
}

fn all_stages(model: &ModelSpec, deployment: &Deployment) -> Result<Vec<Stage>, MemoryError> {
    stages(model, deployment.pipeline_parallel_size)
        .map_err(|error| MemoryError::Deployment(error.to_string()))
}

fn stage_text(stage: u32, num_stages: u32) -> String {
    if num_stages > 1 { format!(", pipeline stage {} of {num_stages}", stage + 1) } else { String::new() }
}

fn gib(bytes: Bytes) -> String {
    format!("{:.2} GiB", bytes.0 as f64 / f64::from(1 << 30))
}

/// What one GPU's budget is spent on besides KV.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryParts {
    /// This GPU's part of the embedding table; zero behind the first pipeline stage.
    pub embedding: Bytes,
    /// This GPU's part of the stage's layers, and the final norm on the last stage.
    pub layers: Bytes,
    /// This GPU's part of the LM head; zero before the last stage, and where it is the embedding of the same GPU.
    pub lm_head: Bytes,
    /// Sines and cosines of every position.
    pub rope_table: Bytes,
    /// Peak of torch's allocations in the profiling step, cuBLAS's workspace included.
    pub activations: Bytes,
    /// What else the driver gives out after the engine's first snapshot: kernels, library handles.
    pub non_torch: Bytes,
    /// CUDA graph pools, where the engine takes them out of the budget.
    pub graph_pools: Bytes,
}

impl MemoryParts {
    /// What vLLM reports as taken by loading the model.
    #[must_use]
    pub fn weights(&self) -> Bytes {
        self.embedding + self.layers + self.lm_head + self.rope_table
    }

    /// All of it.
    #[must_use]
    pub fn total(&self) -> Bytes {
        self.weights() + self.activations + self.non_torch + self.graph_pools
    }
}

/// The memory of one GPU of an engine. `parts.total() + kv + unused == budget`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// The GPU's name.
    pub gpu: String,
    /// The pipeline stage that this is a GPU of, from 0. All GPUs that share a stage's layers are alike.
    pub stage: u32,
    /// Share of the device that the engine may take.
    pub gpu_memory_utilization: f64,
    /// What the device has.
    pub device: Bytes,
    /// What the engine may take.
    pub budget: Bytes,
    /// What it takes besides KV.
    pub parts: MemoryParts,
    /// When the activations peak.
    pub peak: PeakMoment,
    /// One KV block on this GPU: keys and values of `block_size` tokens over the stage's layers.
    pub block: Bytes,
    /// All KV blocks.
    pub kv: Bytes,
    /// What is left, less than a block.
    pub unused: Bytes,
    /// What CUDA graph pools take at least, from the budget or beside it.
    pub graph_pools: Bytes,
}

impl MemoryPlan {
    /// The plan of the tightest GPU, whose number of blocks all get.
    ///
    /// `deployment.num_gpu_blocks` is not read.
    ///
    /// # Errors
    /// [`MemoryError`]: no share, no way to split the model, or something that does not fit.
    pub fn new(
        model: &ModelSpec,
        gpu: &GpuSpec,
        deployment: &Deployment,
        options: &MemoryOptions,
    ) -> Result<Self, MemoryError> {
        let plans = all_stages(model, deployment)?
            .into_iter()
            .zip(0..)
            .map(|(stage, index)| Self::on(model, gpu, deployment, options, (stage, index)));
        let tightest = plans.reduce(|tightest, plan| {
            let (tightest, plan) = (tightest?, plan?);
            Ok(if plan.num_gpu_blocks() < tightest.num_gpu_blocks() { plan } else { tightest })
        });
        tightest.unwrap_or_else(|| Err(MemoryError::Deployment("expected a stage, found none".into())))
    }

    /// The plan of a GPU of one pipeline stage, from 0, as if it were the only one.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`], and when there is no such stage.
    pub fn of_stage(
        model: &ModelSpec,
        gpu: &GpuSpec,
        deployment: &Deployment,
        options: &MemoryOptions,
        stage: u32,
    ) -> Result<Self, MemoryError> {
        let stages = all_stages(model, deployment)?;
        let found = stages.get(stage as usize).ok_or_else(|| {
            MemoryError::Deployment(format!("expected a stage from 0 to {}, found {stage}", stages.len() - 1))
        })?;
        Self::on(model, gpu, deployment, options, (*found, stage))
    }

    /// The plan of a GPU of a stage, given with its index.
    fn on(
        model: &ModelSpec,
        gpu: &GpuSpec,
        deployment: &Deployment,
        options: &MemoryOptions,
        (stage, index): (Stage, u32),
    ) -> Result<Self, MemoryError> {
        let utilization = options.gpu_memory_utilization;
        if !(utilization > 0.0 && utilization <= 1.0) {
            return Err(MemoryError::Utilization(utilization));
        }
        let share = Share::new(model, gpu, deployment, stage)?;
        let device = bytes(options.device.unwrap_or_else(|| device_memory(gpu)).0.into());
        let budget = Bytes((device.0 as f64 * utilization).ceil() as u64);
        let (activations, peak) = share.activations();
        let graph_pools = share.graph_pools();
        let parts = MemoryParts {
            embedding: share.embedding(),
            layers: share.layers(),
            lm_head: share.lm_head(),
            rope_table: share.rope_table(),
            activations,
            non_torch: NON_TORCH_BYTES,
            graph_pools: if options.reserves_graph_pools { graph_pools } else { Bytes(0) },
        };
        let mut plan = Self {
            gpu: gpu.name.clone(),
            stage: index,
            gpu_memory_utilization: utilization,
            device,
            budget,
            parts,
            peak,
            block: share.block(),
            kv: Bytes(0),
            unused: Bytes(0),
            graph_pools,
        };
        plan.check_fit(model, deployment.pipeline_parallel_size)?;
        let available = budget.0 - parts.total().0;
        // A deployment counts blocks in 32 bits; a model that small leaves the rest unused.
        plan.kv = Bytes((available / plan.block.0).min(u32::MAX.into()) * plan.block.0);
        plan.unused = Bytes(available - plan.kv.0);
        Ok(plan)
    }

    /// Whether the parts and one KV block fit, and which do not.
    fn check_fit(&self, model: &ModelSpec, num_stages: u32) -> Result<(), MemoryError> {
        for (what, needed) in [
            ("the weights", self.parts.weights()),
            ("the weights and activations", self.parts.total()),
            ("the weights, the activations and one KV block", self.parts.total() + self.block),
        ] {
            if needed > self.budget {
                return Err(MemoryError::DoesNotFit {
                    what,
                    model: model.name.clone(),
                    gpu: self.gpu.clone(),
                    stage: self.stage,
                    num_stages,
                    needed,
                    budget: self.budget,
                    device: self.device,
                    gpu_memory_utilization: self.gpu_memory_utilization,
                });
            }
        }
        Ok(())
    }

    /// KV blocks, at least 1.
    #[must_use]
    pub fn num_gpu_blocks(&self) -> u32 {
        u32::try_from(self.kv.0 / self.block.0).unwrap_or(u32::MAX)
    }

    /// Sets the plan beside the number of blocks of an engine.
    #[must_use]
    pub fn check(&self, num_gpu_blocks: u32) -> CapacityCheck {
        let taken = u128::from(self.parts.total().0) + u128::from(num_gpu_blocks) * u128::from(self.block.0);
        CapacityCheck {
            gpu: self.gpu.clone(),
            recorded: num_gpu_blocks,
            planned: self.num_gpu_blocks(),
            gpu_memory_utilization: self.gpu_memory_utilization,
            implied_utilization: taken as f64 / self.device.0 as f64,
        }
    }
}

/// A plan beside the KV blocks that an engine recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CapacityCheck {
    /// The GPU's name.
    pub gpu: String,
    /// The engine's blocks.
    pub recorded: u32,
    /// The plan's.
    pub planned: u32,
    /// Share of the device that the plan is made for.
    pub gpu_memory_utilization: f64,
    /// The share that would give the engine's blocks; above 1 when they do not fit.
    pub implied_utilization: f64,
}

impl CapacityCheck {
    /// How far the plan is from the engine, relative to the engine: 0.01 is 1 % more blocks.
    #[must_use]
    pub fn error(&self) -> f64 {
        f64::from(self.planned) / f64::from(self.recorded.max(1)) - 1.0
    }
}

impl fmt::Display for CapacityCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gpu, recorded, planned, gpu_memory_utilization, implied_utilization } = self;
        write!(
            f,
            "KV blocks: the deployment says {recorded}, the memory plan for {gpu} gives {planned} ({:+.1} %) at \
             gpu_memory_utilization {gpu_memory_utilization}; {recorded} is what {implied_utilization:.3} gives",
            self.error() * 100.0
        )
    }
}

//! What one GPU of an engine holds: its part of the weights, of an activation and of a KV block.

use serde::{Deserialize, Serialize};

use super::{MemoryError, bytes};
use crate::{
    deployment::{Deployment, EngineMode},
    forward::{Stage, heads_per_gpu},
    gpu::GpuSpec,
    model::{BF16_BYTES, ModelSpec},
    units::Bytes,
};

const MIB: u128 = 1 << 20;

/// Bytes of a bf16 element, for products.
const BF16: u128 = BF16_BYTES as u128;

/// What the driver gives out besides torch's allocations between the engine's first snapshot and the end of the
/// profiling step: loaded kernels, library handles, the stacks of kernels.
///
/// An assumption, not a rule: a round 200 MiB, about 0.3 % of an 80 GB GPU.
pub const NON_TORCH_BYTES: Bytes = Bytes(200 << 20);

/// The vocabulary is padded to a multiple of this
/// (vLLM 0.24, `vocab_parallel_embedding.py`, `DEFAULT_VOCAB_PADDING_SIZE`).
const VOCAB_PADDING: u128 = 64;

/// Tokens of the vocabulary that one thread block samples from
/// (vLLM 0.24, `vllm/v1/worker/gpu/sample/gumbel.py`, `gumbel_sample`).
const SAMPLER_BLOCK: u128 = 1024;

/// When torch's allocations peak in the profiling step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PeakMoment {
    /// In the widest layer of the forward pass.
    Forward,
    /// In the sampler, over the logits.
    Sampling,
    /// While the compiler times kernels on arguments of its own, before the forward pass.
    Compilation,
}

/// A GPU's place in an engine.
pub(super) struct Share<'a> {
    model: &'a ModelSpec,
    gpu: &'a GpuSpec,
    deployment: &'a Deployment,
    stage: Stage,
    hidden: u128,
    /// Elements of a token's queries on this GPU.
    q_width: u128,
    /// Elements of a token's keys, or values, on this GPU.
    kv_width: u128,
    /// Its part of the MLP's width.
    intermediate: u128,
    /// Its part of the padded vocabulary.
    vocab: u128,
}

impl<'a> Share<'a> {
    /// Fails when the model's layers cannot be split over the deployment's GPUs.
    pub(super) fn new(
        model: &'a ModelSpec,
        gpu: &'a GpuSpec,
        deployment: &'a Deployment,
        stage: Stage,
    ) -> Result<Self, MemoryError> {
        let tp = deployment.tensor_parallel_size;
        let heads = heads_per_gpu(model, tp).map_err(|error| MemoryError::Deployment(error.to_string()))?;
        if deployment.block_size == 0 {
            return Err(MemoryError::Deployment("expected a block_size of at least 1, found 0".into()));
        }
        let head_dim = u128::from(heads.head_dim);
        Ok(Self {
            model,
            gpu,
            deployment,
            stage,
            hidden: model.hidden_size.into(),
            q_width: u128::from(heads.num_q_heads) * head_dim,
            kv_width: u128::from(heads.num_kv_heads) * head_dim,
            intermediate: (model.intermediate_size / tp).into(),
            vocab: u128::from(model.vocab_size).next_multiple_of(VOCAB_PADDING).div_ceil(tp.into()),
        })
    }

    /// Its part of the embedding table, or of the LM head, bf16.
    fn table(&self) -> u128 {
        self.vocab * self.hidden * BF16
    }

    pub(super) fn embedding(&self) -> Bytes {
        bytes(if self.stage.is_first { self.table() } else { 0 })
    }

    /// A tied head of another stage than the embedding is a copy of it.
    pub(super) fn lm_head(&self) -> Bytes {
        let is_embedding = self.model.tied_embeddings && self.stage.is_first;
        bytes(if self.stage.is_last && !is_embedding { self.table() } else { 0 })
    }

    pub(super) fn layers(&self) -> Bytes {
        let attention = self.hidden * (2 * self.q_width + 2 * self.kv_width);
        let mlp = 3 * self.hidden * self.intermediate;
        let qk_norms = if self.model.qk_norm { 2 * u128::from(self.model.head_dim) } else { 0 };
        let final_norm = if self.stage.is_last { self.hidden } else { 0 };
        bytes((self.num_layers() * (attention + mlp + 2 * self.hidden + qk_norms) + final_norm) * BF16)
    }

    /// One cosine and one sine for each pair of a head's elements at each position the model knows, shared by its
    /// layers (vLLM 0.24, `rotary_embedding/base.py`, `_compute_cos_sin_cache`).
    pub(super) fn rope_table(&self) -> Bytes {
        bytes(u128::from(self.model.max_positions) * u128::from(self.model.head_dim) * BF16)
    }

    /// Keys and values of a block's tokens over the stage's layers.
    pub(super) fn block(&self) -> Bytes {
        bytes(u128::from(self.deployment.block_size) * 2 * self.kv_width * self.num_layers() * BF16)
    }

    fn num_layers(&self) -> u128 {
        self.stage.num_layers.into()
    }

    fn tokens(&self) -> u128 {
        self.deployment.max_num_batched_tokens.into()
    }

    /// The peak of the profiling step, and when it is.
    ///
    /// torch allocates cuBLAS's workspace with the first matrix product, after compilation.
    pub(super) fn activations(&self) -> (Bytes, PeakMoment) {
        let workspace = self.cublas_workspace();
        let moments = [
            (workspace + self.forward(self.tokens()), PeakMoment::Forward),
            (workspace + self.sampling(), PeakMoment::Sampling),
            (self.compilation(), PeakMoment::Compilation),
        ];
        let (peak, moment) = moments.into_iter().max_by_key(|(peak, _)| *peak).unwrap_or(moments[0]);
        (bytes(peak), moment)
    }

    /// The tensors alive at the widest point of a layer, bf16.
    ///
    /// MLP: the normed input, the residual and the output beside gate and up together and their product. Attention:
    /// the same three beside queries, keys and values, the normed copies of queries and keys, and the heads' output.
    fn forward(&self, tokens: u128) -> u128 {
        let copies = if self.model.qk_norm { self.q_width + self.kv_width } else { 0 };
        let attention = self.q_width + 2 * self.kv_width + copies + self.q_width;
        tokens * (3 * self.hidden + attention.max(3 * self.intermediate)) * BF16
    }

    /// The step's hidden states and the sampler's: for each sequence its last hidden state, its logits in bf16 and
    /// in f32, and an index and a maximum for each block of the vocabulary (vLLM 0.24, V2 runner: `_dummy_sampler_run`
    /// of `model_runner.py`, `apply_sampling_params` of `sample/sampler.py`). The logits are whole on every GPU.
    fn sampling(&self) -> u128 {
        if !self.stage.is_last {
            return 0;
        }
        let rows = u128::from(self.deployment.max_num_seqs).min(self.tokens());
        let vocab = u128::from(self.model.vocab_size);
        let row = self.hidden * BF16 + vocab * (BF16 + 4) + vocab.div_ceil(SAMPLER_BLOCK) * (8 + 4);
        self.tokens() * self.hidden * BF16 + rows * row
    }

    /// What the compiler holds while it times the kernel that looks up embeddings and normalises them: arguments of
    /// its own of the real sizes, the table among them, and a buffer to flush the L2 cache with.
    ///
    /// vLLM 0.24 switches `benchmark_combo_kernel` on (`vllm/config/compilation.py`); torch 2.11 then times kernels
    /// on random arguments (`torch/_inductor/codegen/triton.py`, `benchmark_codegened_module`) with such a buffer
    /// (`torch/_inductor/runtime/benchmarking.py`, `InductorBenchmarker.benchmark_gpu`). That this kernel is among
    /// those timed, with two outputs, is inferred from two engines. An engine that finds its kernels in a cache does
    /// not compile.
    fn compilation(&self) -> u128 {
        if self.deployment.mode == EngineMode::Eager || !self.stage.is_first {
            return 0;
        }
        self.table() + 2 * self.tokens() * self.hidden * BF16 + u128::from(self.gpu.l2_bytes.0)
    }

    /// torch's default (2.11, `aten/src/ATen/cuda/CublasHandlePool.cpp`, `parseChosenWorkspaceSize`).
    fn cublas_workspace(&self) -> u128 {
        if self.gpu.compute_capability >= 90 { 32 * MIB } else { (2 * 4096 + 8 * 16) << 10 }
    }

    /// At least what CUDA graphs take: the activations of the largest, and 1 MiB of driver memory for each other.
    ///
    /// As vLLM's V1 runner estimates it (0.24, `gpu_model_runner.py`, `profile_cudagraph_memory`), with its least for
    /// a graph in place of its measurement. One graph a size for decodes alone, and one a size for other steps.
    pub(super) fn graph_pools(&self) -> Bytes {
        let sizes = &self.deployment.cudagraph_sizes;
        let Some(largest) = sizes.last().filter(|_| self.deployment.mode == EngineMode::Graph) else {
            return Bytes(0);
        };
        let num_decode = sizes.iter().filter(|size| **size <= self.deployment.max_num_seqs).count();
        let others = sizes.len() - 1 + num_decode.saturating_sub(1);
        bytes(self.forward((*largest).into()) + others as u128 * MIB)
    }
}

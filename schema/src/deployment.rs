//! How a model is deployed in an engine: budgets, KV blocks, parallelism, graph sizes.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{
    error::{InputError, Location},
    files::read_json,
    gpu::GpuSpec,
    memory::{MemoryError, MemoryOptions, MemoryPlan},
    model::ModelSpec,
};

/// How the engine launches a step's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineMode {
    /// Every kernel by a call of its own.
    Eager,
    /// CUDA graphs where a captured size fits.
    Graph,
}

/// Which steps are CUDA graphs in graph mode, by vLLM's names (vLLM 0.24.0, `vllm/config/compilation.py`,
/// `CUDAGraphMode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum CudagraphMode {
    /// None.
    None,
    /// All are pieces, with attention between them.
    Piecewise,
    /// All are whole.
    Full,
    /// Decodes alone are whole; all else is launched kernel by kernel.
    FullDecodeOnly,
    /// Decodes alone are whole; all else is pieces.
    #[default]
    FullAndPiecewise,
}

/// A deployment, with the key names of a run's `engine.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployment {
    /// Eager or graph.
    pub mode: EngineMode,
    /// The model's name as the engine was given it.
    pub model: String,
    /// Token budget of a step.
    pub max_num_batched_tokens: u32,
    /// Most sequences running at once.
    pub max_num_seqs: u32,
    /// Longest sequence, prompt and output.
    pub max_model_len: u32,
    /// KV blocks.
    pub num_gpu_blocks: u32,
    /// Tokens per KV block.
    pub block_size: u32,
    /// GPUs that share a layer.
    #[serde(default = "one")]
    pub tensor_parallel_size: u32,
    /// Stages of layers, each on GPUs of its own.
    #[serde(default = "one")]
    pub pipeline_parallel_size: u32,
    /// Whether prompts share cached prefixes.
    #[serde(default)]
    pub enable_prefix_caching: bool,
    /// `fcfs` or `priority`.
    #[serde(default = "fcfs")]
    pub scheduling_policy: String,
    /// Longest prefill chunk while several prefills compete; 0 for no such limit.
    #[serde(default)]
    pub long_prefill_token_threshold: u32,
    /// Whether the next step is scheduled while this one runs.
    #[serde(default)]
    pub async_scheduling: bool,
    /// Captured batch sizes in tokens, ascending; empty in eager mode.
    #[serde(default)]
    pub cudagraph_sizes: Vec<u32>,
    /// Which steps are graphs, in graph mode.
    #[serde(default, skip_serializing_if = "is_usual")]
    pub cudagraph_mode: CudagraphMode,
}

/// What a deployment that does not say has, so that it goes without saying.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_usual(mode: &CudagraphMode) -> bool {
    *mode == CudagraphMode::default()
}

fn one() -> u32 {
    1
}

fn fcfs() -> String {
    "fcfs".into()
}

impl Deployment {
    /// Reads and checks an `engine.json`.
    ///
    /// # Errors
    /// Names the file, the line or key, what was expected and what was found.
    pub fn read(path: &Path) -> Result<Self, InputError> {
        let deployment: Self = read_json(path, "an engine.json")?;
        deployment.check().map_err(|(key, expected, found)| {
            InputError::invalid(path, Location::Key(key.into()), expected, found)
        })?;
        Ok(deployment)
    }

    /// What vLLM 0.24 would use for a model on a GPU when told nothing, with the KV blocks of its [`MemoryPlan`].
    ///
    /// # Errors
    /// When the model does not fit on one such GPU.
    pub fn defaults(model: &ModelSpec, gpu: &GpuSpec, mode: EngineMode) -> Result<Self, MemoryError> {
        Self::unplanned(model, mode).planned(model, gpu, &MemoryOptions::default())
    }

    /// The same deployment with the KV blocks of its [`MemoryPlan`].
    ///
    /// # Errors
    /// When the model does not fit on GPUs like this.
    pub fn planned(
        mut self,
        model: &ModelSpec,
        gpu: &GpuSpec,
        options: &MemoryOptions,
    ) -> Result<Self, MemoryError> {
        self.num_gpu_blocks = MemoryPlan::new(model, gpu, &self, options)?.num_gpu_blocks();
        Ok(self)
    }

    /// What vLLM 0.24's server would use for a model when told nothing, with a single KV block: no memory is planned yet.
    ///
    /// The budgets of a step are those for A100s and for GPUs below 70 GiB; larger ones get 8,192 tokens and 1,024
    /// sequences (`vllm/engine/arg_utils.py`, `get_batch_defaults`).
    #[must_use]
    pub fn unplanned(model: &ModelSpec, mode: EngineMode) -> Self {
        Self {
            mode,
            model: model.name.clone(),
            max_num_batched_tokens: 2048,
            max_num_seqs: 256,
            max_model_len: model.max_positions,
            num_gpu_blocks: 1,
            block_size: 16,
            tensor_parallel_size: 1,
            pipeline_parallel_size: 1,
            enable_prefix_caching: false,
            scheduling_policy: fcfs(),
            long_prefill_token_threshold: 0,
            async_scheduling: false,
            cudagraph_sizes: match mode {
                EngineMode::Eager => Vec::new(),
                EngineMode::Graph => {
                    [1, 2, 4].into_iter().chain((8..256).step_by(8)).chain((256..=512).step_by(16)).collect()
                }
            },
            cudagraph_mode: CudagraphMode::default(),
        }
    }

    /// Checks what a simulation relies on; says which key is wrong, what was expected and found.
    ///
    /// # Errors
    /// `(key, expected, found)`.
    pub fn check(&self) -> Result<(), (&'static str, String, String)> {
        let positive = [
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("max_num_seqs", self.max_num_seqs),
            ("max_model_len", self.max_model_len),
            ("num_gpu_blocks", self.num_gpu_blocks),
            ("block_size", self.block_size),
            ("tensor_parallel_size", self.tensor_parallel_size),
            ("pipeline_parallel_size", self.pipeline_parallel_size),
        ];
        for (key, value) in positive {
            if value == 0 {
                return Err((key, "at least 1".into(), "0".into()));
            }
        }
        if !self.cudagraph_sizes.is_sorted() || self.cudagraph_sizes.first() == Some(&0) {
            return Err((
                "cudagraph_sizes",
                "ascending sizes from 1".into(),
                format!("{:?}", self.cudagraph_sizes),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_match_a_real_engine() {
        let gpu = GpuSpec::by_name("h100-sxm5-80gb").unwrap();
        let model = ModelSpec::load("qwen3-0.6b").unwrap();
        let deployment = Deployment::defaults(&model, &gpu, EngineMode::Graph).unwrap();
        assert_eq!(deployment.check(), Ok(()));
        // As vLLM 0.24.0 reports them for this model and GPU: 51 sizes, and 38,419 blocks where it was given 0.85 of
        // the memory; these are for its default share.
        assert_eq!(deployment.cudagraph_sizes.len(), 51);
        assert_eq!(deployment.cudagraph_sizes[34..38], [256, 272, 288, 304]);
        let ratio = f64::from(deployment.num_gpu_blocks) / 38_419.0;
        assert!((1.0..1.1).contains(&ratio), "{ratio}");
        let eager = Deployment::defaults(&model, &gpu, EngineMode::Eager).unwrap();
        assert!(eager.cudagraph_sizes.is_empty());
        // What is usual goes without saying; anything else is written.
        let text = serde_json::to_string(&deployment).unwrap();
        assert!(!text.contains("cudagraph_mode"));
        let other = Deployment { cudagraph_mode: CudagraphMode::FullDecodeOnly, ..deployment };
        let text = serde_json::to_string(&other).unwrap();
        assert!(text.contains(r#""cudagraph_mode":"FULL_DECODE_ONLY""#));
        assert_eq!(serde_json::from_str::<Deployment>(&text).unwrap(), other);
    }
}

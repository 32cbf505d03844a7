//! How a model is deployed in an engine: budgets, KV blocks, parallelism, graph sizes.

use serde::{Deserialize, Serialize};

/// How the engine launches a step's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineMode {
    /// Every kernel by a call of its own.
    Eager,
    /// CUDA graphs where a captured size fits.
    Graph,
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
}

fn one() -> u32 {
    1
}

fn fcfs() -> String {
    "fcfs".into()
}

impl Deployment {
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

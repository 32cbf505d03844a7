//! The engine: a model on a GPU that computes steps.

use std::{
    collections::HashMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use plumbline_profiler::cuda::{
    attention::{AttentionPlan, BLOCK_SIZE, BlockTables, DecodePlan},
    driver::{CudaResult, DeviceMemory, Graph, PinnedMemory, Stream, download},
};
use plumbline_schema::{
    CudagraphMode, Deployment, EngineMode, ModelConfig, ModelSpec, PrefillChunk, StepBatch,
};

use crate::{
    error::EngineError,
    forward::{Forward, Limits, StepShape, max_items},
    gpu::Gpu,
    inputs::{Counts, InputLayout, Part, Written, in_kernel_order, write},
    numerics::Numerics,
    weights::Weights,
};

/// Memory that stays free whatever share may be used: the driver's own, and what libraries take later.
const RESERVE_BYTES: u64 = 512 << 20;

/// Most KV blocks: the copy engine counts a cache's slots in 32 bits.
const MAX_BLOCKS: u32 = 1 << 24;

/// Where a model's weights come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WeightSource {
    /// Random numbers of a seed: times are a real model's, texts are not.
    Random(u64),
    /// A folder of safetensors files.
    Folder(PathBuf),
}

/// What an engine is started with.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineOptions {
    /// The GPU's number.
    pub device: usize,
    /// Weights.
    pub weights: WeightSource,
    /// Mode and limits. `num_gpu_blocks` of 0 or 1 is taken from the memory that is free.
    pub deployment: Deployment,
    /// Share of the GPU's memory that the engine may use in all.
    pub gpu_memory_utilization: f64,
}

/// How a step was launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dispatch {
    /// Kernel by kernel.
    Eager,
    /// As one recorded graph.
    Graph,
}

/// A step under way.
#[derive(Clone, Copy, Debug)]
pub struct LaunchedStep {
    /// How it was launched.
    pub dispatch: Dispatch,
    /// Host time that its inputs took.
    pub prepare: Duration,
    /// Host time that its launches took.
    pub launch: Duration,
    num_samples: usize,
}

/// A model on a GPU.
pub struct Engine {
    gpu: Gpu,
    model: ModelSpec,
    numerics: Numerics,
    deployment: Deployment,
    forward: Forward,
    staging: PinnedMemory,
    inputs: DeviceMemory,
    ids: PinnedMemory,
    graphs: HashMap<u32, Recorded>,
}

/// A graph for batches up to its size.
struct Recorded {
    graph: Graph,
    step: StepShape,
}

impl Engine {
    /// Starts an engine: loads weights, finds the products' algorithms, takes the KV cache, records graphs.
    ///
    /// # Errors
    /// When there is no GPU, a file or the deployment cannot be used, or memory does not hold the model.
    pub fn start(config: &ModelConfig, options: &EngineOptions) -> Result<Self, EngineError> {
        let model = ModelSpec::from_hf_config(&config.name, &config.text, &config.path)?;
        let numerics = Numerics::of(config)?;
        let mut deployment = options.deployment.clone();
        check(&deployment, &model)?;
        deployment.cudagraph_mode = match deployment.mode {
            EngineMode::Eager => CudagraphMode::None,
            EngineMode::Graph => CudagraphMode::FullDecodeOnly,
        };
        let mut gpu = Gpu::open(options.device)?;
        let weights = match &options.weights {
            WeightSource::Random(seed) => Weights::random(&mut gpu, &model, *seed)?,
            WeightSource::Folder(folder) => Weights::load(&gpu, &model, folder)?,
        };
        let limits = Limits {
            tokens: deployment.max_num_batched_tokens,
            seqs: deployment.max_num_seqs,
            model_len: deployment.max_model_len,
        };
        let mut forward = Forward::new(&gpu, &model, &numerics, weights, limits)?;
        let input_bytes = max_input_bytes(&forward, &gpu, limits);
        let staging = PinnedMemory::new(&gpu.context, input_bytes)?;
        let inputs = gpu.zeroed("a step's inputs", input_bytes as u64, "ask for fewer sequences a step")?;
        let ids = PinnedMemory::new(&gpu.context, 4 * deployment.max_num_seqs as usize)?;
        forward.tune(&mut gpu, limits)?;
        if deployment.num_gpu_blocks <= 1 {
            deployment.num_gpu_blocks = free_blocks(&model, options.gpu_memory_utilization)?;
        }
        forward.take_cache(&gpu, deployment.num_gpu_blocks, BLOCK_SIZE)?;
        let mut engine =
            Self { gpu, model, numerics, deployment, forward, staging, inputs, ids, graphs: HashMap::new() };
        engine.record_graphs()?;
        Ok(engine)
    }

    /// The deployment, KV blocks included.
    #[must_use]
    pub fn deployment(&self) -> &Deployment {
        &self.deployment
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &ModelSpec {
        &self.model
    }

    /// The model's constants.
    #[must_use]
    pub fn numerics(&self) -> &Numerics {
        &self.numerics
    }

    /// The GPU's name.
    #[must_use]
    pub fn gpu_name(&self) -> &str {
        &self.gpu.name
    }

    /// Launches a step of at least one part, within the deployment's limits; [`Self::wait`] waits for it.
    ///
    /// # Errors
    /// When a launch fails.
    pub fn launch(&mut self, parts: &[Part<'_>]) -> Result<LaunchedStep, EngineError> {
        let began = Instant::now();
        let parts = in_kernel_order(parts);
        let draws = || parts.iter().filter_map(|part| part.draw);
        let (num_samples, is_greedy) = (draws().count(), draws().all(|draw| draw.is_greedy()));
        let num_decodes = parts.iter().filter(|part| part.is_decode).count();
        let recorded = self.recorded_for(parts.len(), num_decodes, num_samples);
        let attention = self.plan(&parts, recorded.map(|size| max_items_of(&self.graphs[&size])));
        let own;
        let step = if let Some(size) = recorded {
            &self.graphs[&size].step
        } else {
            own = shape(&parts, attention.clone(), num_samples, &self.deployment);
            &own
        };
        let written = write(self.staging.bytes_mut(), &step.layout, &step.counts, &parts, &attention);
        let prepare = began.elapsed();
        let began = Instant::now();
        let inputs = self.inputs.address();
        copy(&self.gpu.stream, &self.staging, inputs, &written)?;
        let dispatch = if let Some(size) = recorded {
            self.graphs[&size].graph.launch(&self.gpu.stream)?;
            Dispatch::Graph
        } else {
            self.forward.enqueue(&mut self.gpu, step, inputs)?;
            Dispatch::Eager
        };
        if num_samples > 0 {
            self.forward.enqueue_sampling(&mut self.gpu, step, inputs, is_greedy)?;
            let ids = &mut self.ids.bytes_mut()[..4 * num_samples];
            self.gpu.stream.copy_to_host(ids, self.forward.ids())?;
        }
        Ok(LaunchedStep { dispatch, prepare, launch: began.elapsed(), num_samples })
    }

    /// Waits for a step; its drawn tokens, chunks' first, each group in the order of the parts.
    ///
    /// # Errors
    /// When the step failed.
    pub fn wait(&mut self, step: &LaunchedStep) -> Result<impl Iterator<Item = u32> + '_, EngineError> {
        self.gpu.stream.synchronize()?;
        let ids = self.ids.bytes()[..4 * step.num_samples].chunks_exact(4);
        Ok(ids.map(|bytes| u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])))
    }

    /// The logits of the step that was waited for last, `[num_samples, vocab_size]` in bf16's bits, rows in the order of
    /// its drawn tokens.
    ///
    /// # Errors
    /// When they cannot be copied.
    pub fn logits(&mut self, step: &LaunchedStep) -> Result<Vec<u16>, EngineError> {
        let mut logits = vec![0u16; step.num_samples * self.model.vocab_size as usize];
        download(&mut logits, self.forward.logits())?;
        Ok(logits)
    }

    /// The size of the graph that serves a step of decodes alone.
    fn recorded_for(&self, num_parts: usize, num_decodes: usize, num_samples: usize) -> Option<u32> {
        if num_decodes < num_parts || num_samples < num_parts {
            return None;
        }
        let sizes = self.graphs.keys().copied().filter(|&size| size as usize >= num_decodes);
        sizes.min()
    }

    fn plan(&self, parts: &[&Part<'_>], max_of_graph: Option<usize>) -> AttentionPlan {
        let mut batch = StepBatch::default();
        for part in parts {
            if part.is_decode {
                batch.decode_contexts.push(part.context_len);
            } else {
                let num_tokens = part.tokens.len() as u32;
                batch.prefill_chunks.push(PrefillChunk { num_tokens, context_len: part.context_len });
            }
        }
        let tables = BlockTables {
            rows: Vec::new(),
            stride: table_stride(self.deployment.max_model_len),
            num_blocks: self.forward.num_blocks(),
        };
        let (heads, chip) = (self.forward.heads(), self.gpu.chip);
        let max = max_of_graph.unwrap_or_else(|| max_items(heads, chip.num_sms, batch.decode_contexts.len()));
        AttentionPlan::over(&batch, heads, chip, tables, max)
    }

    /// Records the decodes of every size that the deployment names.
    fn record_graphs(&mut self) -> Result<(), EngineError> {
        if self.deployment.mode != EngineMode::Graph {
            return Ok(());
        }
        let mut sizes = self.deployment.cudagraph_sizes.clone();
        sizes.retain(|&size| size > 0 && size <= self.deployment.max_num_seqs);
        sizes.sort_unstable();
        self.deployment.cudagraph_sizes.clone_from(&sizes);
        for size in sizes {
            let step = self.recorded_shape(size);
            let (forward, gpu, inputs) = (&mut self.forward, &mut self.gpu, self.inputs.address());
            // Once without recording: kernels are compiled and loaded then, which a recording cannot do.
            forward.enqueue(gpu, &step, inputs)?;
            gpu.stream.synchronize()?;
            let stream = gpu.stream.clone();
            let graph = stream.capture(|| forward.enqueue(gpu, &step, inputs))?;
            graph.upload(&stream)?;
            self.graphs.insert(size, Recorded { graph, step });
        }
        self.gpu.stream.synchronize()?;
        Ok(())
    }

    /// A step of `size` decodes, with room for as many splits as their graph may have.
    fn recorded_shape(&self, size: u32) -> StepShape {
        let count = size as usize;
        let items = max_items(self.forward.heads(), self.gpu.chip.num_sms, count);
        let stride = table_stride(self.deployment.max_model_len);
        let counts = Counts {
            tokens: count,
            samples: count,
            decodes: count,
            items,
            stride: stride as usize,
            ..Counts::default()
        };
        let attention = AttentionPlan {
            num_tokens: size,
            num_blocks: self.forward.num_blocks(),
            table_stride: stride,
            block_table: Vec::new(),
            prefill: None,
            decode: Some(DecodePlan { seqs: vec![[0; 4]; count], items: vec![[0; 4]; items] }),
        };
        StepShape { counts, layout: InputLayout::of(&counts), attention, gathers: false }
    }
}

/// Copies a step's inputs: of the block table, which is the largest part, the entries alone that are used.
fn copy(stream: &Stream, staging: &PinnedMemory, inputs: u64, written: &Written) -> CudaResult<()> {
    let Written { num_bytes, table } = *written;
    stream.copy_to_device(inputs, &staging.bytes()[..num_bytes])?;
    let (begin, end) = (table.begin, table.begin + table.pitch * table.num_rows);
    let rows = &staging.bytes()[begin..end];
    stream.copy_rows_to_device(inputs + begin as u64, rows, table.pitch, table.width, table.num_rows)
}

fn max_items_of(recorded: &Recorded) -> usize {
    recorded.step.counts.items
}

fn shape(
    parts: &[&Part<'_>],
    attention: AttentionPlan,
    num_samples: usize,
    deployment: &Deployment,
) -> StepShape {
    let prefill = attention.prefill.as_ref();
    let decode = attention.decode.as_ref();
    let counts = Counts {
        tokens: attention.num_tokens as usize,
        samples: num_samples,
        chunks: prefill.map_or(0, |prefill| prefill.seqs.len()),
        tiles: prefill.map_or(0, |prefill| prefill.tiles.len()),
        decodes: decode.map_or(0, |decode| decode.seqs.len()),
        items: decode.map_or(0, |decode| decode.items.len()),
        stride: table_stride(deployment.max_model_len) as usize,
    };
    let gathers = num_samples < parts.len() || counts.chunks > 0;
    StepShape { counts, layout: InputLayout::of(&counts), attention, gathers }
}

/// Entries of a row of the block table: enough for the longest sequence, in vectors of four.
fn table_stride(max_model_len: u32) -> u32 {
    max_model_len.div_ceil(BLOCK_SIZE).next_multiple_of(4)
}

/// Bytes of the largest step's inputs.
fn max_input_bytes(forward: &Forward, gpu: &Gpu, limits: Limits) -> usize {
    let (tokens, seqs) = (limits.tokens.max(limits.seqs) as usize, limits.seqs as usize);
    let tiles_of_splits = gpu.chip.num_sms as usize;
    InputLayout::of(&Counts {
        tokens,
        samples: seqs,
        chunks: seqs,
        tiles: tokens / 64 + seqs + tiles_of_splits,
        decodes: seqs,
        items: max_items(forward.heads(), gpu.chip.num_sms, seqs),
        stride: table_stride(limits.model_len) as usize,
    })
    .num_bytes
}

/// KV blocks that the free memory holds.
fn free_blocks(model: &ModelSpec, utilization: f64) -> Result<u32, EngineError> {
    let (free, total) = Gpu::memory_bytes()?;
    let kept = ((1.0 - utilization.clamp(0.0, 1.0)) * total as f64) as u64;
    let block_bytes = u64::from(BLOCK_SIZE) * model.kv_bytes_per_token().0;
    let available = free.saturating_sub(kept.max(RESERVE_BYTES));
    match u32::try_from(available / block_bytes).unwrap_or(u32::MAX) {
        0 | 1 => Err(EngineError::OutOfMemory {
            what: "a KV cache of two blocks",
            needed_bytes: 2 * block_bytes,
            available_bytes: available,
            advice: "take a smaller model, a higher share of the memory, or a GPU that nobody else uses",
        }),
        blocks => Ok(blocks.min(MAX_BLOCKS)),
    }
}

/// Refuses what this engine does not serve.
fn check(deployment: &Deployment, model: &ModelSpec) -> Result<(), EngineError> {
    let refuse = |expected: &str, found: String| {
        Err(EngineError::Unsupported { expected: expected.to_owned(), found })
    };
    if deployment.block_size != BLOCK_SIZE {
        return refuse("block_size = 16", deployment.block_size.to_string());
    }
    for (key, size) in [
        ("tensor_parallel_size", deployment.tensor_parallel_size),
        ("pipeline_parallel_size", deployment.pipeline_parallel_size),
    ] {
        if size != 1 {
            return refuse(&format!("{key} = 1"), size.to_string());
        }
    }
    if deployment.async_scheduling {
        return refuse("async_scheduling = false", "true".to_owned());
    }
    if deployment.max_model_len > model.max_positions {
        let expected = format!("max_model_len of at most {}, as the model has", model.max_positions);
        return refuse(&expected, deployment.max_model_len.to_string());
    }
    if deployment.num_gpu_blocks > MAX_BLOCKS {
        return refuse(&format!("at most {MAX_BLOCKS} KV blocks"), deployment.num_gpu_blocks.to_string());
    }
    Ok(())
}

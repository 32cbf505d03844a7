//! The forward pass: the operators of `plumbline_schema::forward`, launched one after the other.

use std::{collections::HashMap, rc::Rc};

use plumbline_profiler::cuda::{
    attention::{AttentionPlan, decode_columns, decode_items_at_once},
    driver::{CudaResult, DeviceMemory, Event},
    gemm::{GemmLaunch, GemmPlan, WORKSPACE_BYTES},
    launch::{self, AttentionOperands, AttentionTables, Joins},
};
use plumbline_schema::{Heads, ModelSpec};

use crate::{
    error::EngineError,
    gpu::Gpu,
    inputs::{Counts, InputLayout},
    numerics::Numerics,
    weights::{LayerWeights, Weights},
};

/// Algorithms of a product are tried with this many launches each, in so many rounds.
const TRIAL_LAUNCHES: usize = 8;
const TRIAL_ROUNDS: usize = 3;

/// The most that a step may have.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens computed.
    pub tokens: u32,
    /// Sequences.
    pub seqs: u32,
    /// Tokens of a sequence.
    pub model_len: u32,
}

/// A step as the GPU sees it.
#[derive(Clone, Debug)]
pub struct StepShape {
    /// Numbers of its parts, padding included.
    pub counts: Counts,
    /// Where its inputs lie.
    pub layout: InputLayout,
    /// How attention is cut into blocks.
    pub attention: AttentionPlan,
    /// Whether tokens are drawn from some rows alone, and not from all of them in order.
    pub gathers: bool,
}

/// Rows that a product of `num_rows` computes: few sizes in all, so that the best algorithm of each is known before it
/// is needed. Never more than the next tile of a large product would take anyway.
#[must_use]
pub fn padded_rows(num_rows: u32) -> u32 {
    let step = match num_rows {
        0..=64 => 8,
        65..=256 => 16,
        257..=1024 => 64,
        1025..=2048 => 128,
        _ => 256,
    };
    num_rows.next_multiple_of(step)
}

/// The sizes up to one, ascending.
pub fn padded_sizes(max_rows: u32) -> impl Iterator<Item = u32> {
    let mut next = 0;
    std::iter::from_fn(move || {
        next = padded_rows(next + 1);
        (next <= padded_rows(max_rows)).then_some(next)
    })
}

/// A model's memory on the GPU, and its operators.
pub struct Forward {
    model: ModelSpec,
    heads: Heads,
    epsilon: f32,
    weights: Weights,
    cos_sin: DeviceMemory,
    cache: KvCaches,
    activations: Activations,
    workspace: DeviceMemory,
    prefill_joins: JoinsMemory,
    decode_joins: JoinsMemory,
    products: HashMap<(u32, u32, u32), (Rc<GemmPlan>, usize)>,
}

/// Keys and values of all layers, `[layer, key or value, block, token, head, dim]`.
struct KvCaches {
    memory: DeviceMemory,
    num_blocks: u32,
    /// Bytes of one layer's keys, and of its values.
    part_bytes: u64,
}

impl KvCaches {
    fn of_layer(&self, layer: usize) -> (u64, u64) {
        let keys = self.memory.address() + 2 * layer as u64 * self.part_bytes;
        (keys, keys + self.part_bytes)
    }
}

/// Memory of a step's intermediate results.
struct Activations {
    _memory: DeviceMemory,
    /// `[max_tokens, hidden_size]` each; the zeros are the first norm's input.
    zeros: u64,
    residual: u64,
    normed: u64,
    projected: u64,
    /// `[max_tokens, q_width + 2 kv_width]`.
    qkv: u64,
    /// `[max_tokens, q_width]`.
    attended: u64,
    /// `[max_tokens, 2 intermediate_size]`.
    gate_up: u64,
    /// `[max_tokens, intermediate_size]`.
    activated: u64,
    /// `[max_seqs, hidden_size]`.
    gathered: u64,
    /// `[max_seqs, vocab_size]`.
    logits: u64,
    /// Of the greedy choice.
    partials: u64,
    arrived: u64,
    /// `[max_seqs]` int32.
    ids: u64,
}

struct JoinsMemory {
    _memory: DeviceMemory,
    joins: Joins,
}

const LESS: &str = "ask for fewer tokens or sequences a step, or a shorter max_model_len";

impl Forward {
    /// Takes the memory for all but the KV cache, which [`Self::take_cache`] takes of what is left.
    ///
    /// # Errors
    /// When memory does not hold it, or the kernels do not cover the model.
    pub fn new(
        gpu: &Gpu,
        model: &ModelSpec,
        numerics: &Numerics,
        weights: Weights,
        limits: Limits,
    ) -> Result<Self, EngineError> {
        let heads = Heads {
            num_q_heads: model.num_q_heads,
            num_kv_heads: model.num_kv_heads,
            head_dim: model.head_dim,
        };
        let frequencies = numerics.rope_frequencies(model.head_dim);
        let table = launch::rotation_table(limits.model_len, &frequencies);
        let cos_sin = gpu.zeroed("the rotation table", size_of_val(table.as_slice()) as u64, LESS)?;
        gpu.stream.upload(cos_sin.address(), &table)?;
        let rows = u64::from(gpu.chip.num_sms) * 128;
        let prefill_joins = JoinsMemory::new(gpu, heads, rows, gpu.chip.num_sms.into())?;
        let columns = u64::from(decode_columns(heads));
        let items = max_items(heads, gpu.chip.num_sms, limits.seqs as usize) as u64;
        let decode_joins =
            JoinsMemory::new(gpu, heads, 8 * items * columns, u64::from(limits.seqs) * columns)?;
        Ok(Self {
            model: model.clone(),
            heads,
            epsilon: numerics.rms_norm_eps,
            weights,
            cos_sin,
            cache: KvCaches { memory: gpu.zeroed("no KV cache", 0, "")?, num_blocks: 0, part_bytes: 0 },
            activations: Activations::new(gpu, model, heads, limits)?,
            workspace: gpu.zeroed("cuBLASLt's workspace", WORKSPACE_BYTES, LESS)?,
            prefill_joins,
            decode_joins,
            products: HashMap::new(),
        })
    }

    /// Takes memory for a KV cache, in place of the one before.
    ///
    /// # Errors
    /// When memory does not hold it.
    pub fn take_cache(&mut self, gpu: &Gpu, num_blocks: u32, block_size: u32) -> Result<(), EngineError> {
        let part_bytes = 2 * u64::from(num_blocks) * u64::from(block_size) * self.heads.kv_width();
        let num_bytes = 2 * u64::from(self.model.num_layers) * part_bytes;
        let advice = "ask for fewer KV blocks or a lower share of the GPU's memory";
        self.cache =
            KvCaches { memory: gpu.zeroed("the KV cache", num_bytes, advice)?, num_blocks, part_bytes };
        Ok(())
    }

    /// KV blocks.
    #[must_use]
    pub fn num_blocks(&self) -> u32 {
        self.cache.num_blocks
    }

    /// Layout of the heads.
    #[must_use]
    pub fn heads(&self) -> Heads {
        self.heads
    }

    /// Where the drawn tokens are, `[num_samples]` int32.
    #[must_use]
    pub fn ids(&self) -> u64 {
        self.activations.ids
    }

    /// Where the logits are, `[num_samples, vocab_size]` bf16.
    #[must_use]
    pub fn logits(&self) -> u64 {
        self.activations.logits
    }

    /// Memory to try a product's algorithms on: any that is large enough.
    fn trial_input(&self, product: Product) -> u64 {
        let (_, k) = product.shape(&self.model, self.heads);
        if k <= self.model.intermediate_size { self.activations.activated } else { self.activations.zeros }
    }

    /// Finds the best algorithm for every product that steps of up to these sizes need.
    ///
    /// # Errors
    /// When a product fails.
    pub fn tune(&mut self, gpu: &mut Gpu, limits: Limits) -> CudaResult<()> {
        // Products of zeros take less power and time.
        let num_values = u64::from(padded_rows(limits.tokens)) * u64::from(self.model.intermediate_size);
        launch::fill(&mut gpu.kernels, self.activations.activated, 2 * num_values, 1, 1.0)?
            .enqueue(&gpu.stream)?;
        for rows in padded_sizes(limits.tokens) {
            for product in Product::OF_LAYERS {
                self.algorithm(gpu, product, rows)?;
            }
        }
        for rows in padded_sizes(limits.seqs) {
            self.algorithm(gpu, Product::LmHead, rows)?;
        }
        Ok(())
    }

    /// Launches all operators but the drawing of tokens; the inputs lie at `inputs`.
    ///
    /// # Errors
    /// When a launch fails.
    pub fn enqueue(&mut self, gpu: &mut Gpu, step: &StepShape, inputs: u64) -> CudaResult<()> {
        let at = |offset: usize| inputs + offset as u64;
        let layout = step.layout;
        let num_tokens = step.counts.tokens as u32;
        let hidden = self.model.hidden_size;
        let residual = self.activations.residual;
        let ids = [at(layout.ids), self.weights.embedding, residual];
        launch::embedding(&mut gpu.kernels, ids, num_tokens, hidden)?.enqueue(&gpu.stream)?;
        let mut x = self.activations.zeros;
        for layer in 0..self.weights.layers.len() {
            self.enqueue_layer(gpu, step, inputs, layer, x)?;
            x = self.activations.projected;
        }
        let normed = self.activations.normed;
        let operands = [x, residual, self.weights.final_norm, normed];
        launch::rms_norm(&mut gpu.kernels, operands, num_tokens, hidden, self.epsilon)?
            .enqueue(&gpu.stream)?;
        let num_samples = step.counts.samples as u32;
        if num_samples == 0 {
            return Ok(());
        }
        let mut rows = normed;
        if step.gathers {
            rows = self.activations.gathered;
            let operands = [at(layout.rows), normed, rows];
            launch::embedding(&mut gpu.kernels, operands, num_samples, hidden)?.enqueue(&gpu.stream)?;
        }
        self.product(gpu, Product::LmHead, num_samples, 0, rows)
    }

    fn enqueue_layer(
        &mut self,
        gpu: &mut Gpu,
        step: &StepShape,
        inputs: u64,
        layer: usize,
        x: u64,
    ) -> CudaResult<()> {
        let at = |offset: usize| inputs + offset as u64;
        let LayerWeights { input_norm, q_norm, k_norm, post_norm, .. } = self.weights.layers[layer];
        let (hidden, heads, epsilon) = (self.model.hidden_size, self.heads, self.epsilon);
        let Activations { residual, normed, projected, qkv, attended, gate_up, activated, .. } =
            self.activations;
        let num_tokens = step.counts.tokens as u32;
        let kernels = &mut gpu.kernels;
        launch::rms_norm(kernels, [x, residual, input_norm, normed], num_tokens, hidden, epsilon)?
            .enqueue(&gpu.stream)?;
        self.product(gpu, Product::Qkv, num_tokens, layer, normed)?;
        let kernels = &mut gpu.kernels;
        if self.model.qk_norm {
            launch::qk_norm(kernels, [qkv, q_norm, k_norm], num_tokens, heads, epsilon)?
                .enqueue(&gpu.stream)?;
        }
        let operands = [qkv, at(step.layout.positions), self.cos_sin.address()];
        launch::rope(kernels, operands, num_tokens, heads)?.enqueue(&gpu.stream)?;
        let (k_cache, v_cache) = self.cache.of_layer(layer);
        let operands = [qkv, at(step.layout.slots), k_cache, v_cache];
        let (q_width, kv_width) = (heads.q_width() as u32, heads.kv_width() as u32);
        launch::kv_cache_write(kernels, operands, num_tokens, q_width, kv_width)?.enqueue(&gpu.stream)?;
        let operands = AttentionOperands {
            q: qkv,
            q_stride: q_width + 2 * kv_width,
            k_cache,
            v_cache,
            out: attended,
            tables: AttentionTables {
                block_table: at(step.layout.block_table),
                prefill_seqs: at(step.layout.prefill_seqs),
                prefill_tiles: at(step.layout.prefill_tiles),
                decode_seqs: at(step.layout.decode_seqs),
                decode_items: at(step.layout.decode_items),
                prefill_joins: self.prefill_joins.joins,
                decode_joins: self.decode_joins.joins,
            },
        };
        for launch in launch::attention(kernels, &step.attention, heads, &operands)? {
            launch.enqueue(&gpu.stream)?;
        }
        self.product(gpu, Product::O, num_tokens, layer, attended)?;
        let operands = [projected, residual, post_norm, normed];
        launch::rms_norm(&mut gpu.kernels, operands, num_tokens, hidden, epsilon)?.enqueue(&gpu.stream)?;
        self.product(gpu, Product::GateUp, num_tokens, layer, normed)?;
        let intermediate = self.model.intermediate_size;
        launch::silu_mul(&mut gpu.kernels, [gate_up, activated], num_tokens, intermediate)?
            .enqueue(&gpu.stream)?;
        self.product(gpu, Product::Down, num_tokens, layer, activated)
    }

    /// Launches the drawing of tokens.
    ///
    /// # Errors
    /// When the launch fails.
    pub fn enqueue_sampling(
        &mut self,
        gpu: &mut Gpu,
        step: &StepShape,
        inputs: u64,
        is_greedy: bool,
    ) -> CudaResult<()> {
        let Activations { logits, ids, partials, arrived, .. } = self.activations;
        let (num_seqs, vocab) = (step.counts.samples as u32, self.model.vocab_size);
        let launch = if is_greedy {
            let num_parts = launch::sample_parts(num_seqs, vocab, gpu.chip.num_sms);
            launch::sample(&mut gpu.kernels, [logits, ids, partials, arrived], num_seqs, vocab, num_parts)?
        } else {
            let draws = inputs + step.layout.draws as u64;
            launch::sample_random(&mut gpu.kernels, [logits, draws, ids], num_seqs, vocab)?
        };
        launch.enqueue(&gpu.stream)
    }

    fn product(
        &mut self,
        gpu: &Gpu,
        product: Product,
        num_rows: u32,
        layer: usize,
        x: u64,
    ) -> CudaResult<()> {
        let (plan, algorithm) = self.algorithm(gpu, product, padded_rows(num_rows))?;
        let weight = product.weight(&self.weights, layer);
        let (out, workspace) = (product.out(&self.activations), self.workspace.address());
        GemmLaunch { plan, algorithm, x, weight, out, workspace }.enqueue(&gpu.stream)
    }

    /// The product's best algorithm for a number of rows, tried where it is not known yet.
    fn algorithm(&mut self, gpu: &Gpu, product: Product, num_rows: u32) -> CudaResult<(Rc<GemmPlan>, usize)> {
        let (n, k) = product.shape(&self.model, self.heads);
        let key = (num_rows, n, k);
        if let Some(known) = self.products.get(&key) {
            return Ok(known.clone());
        }
        let plan = Rc::new(GemmPlan::new(&gpu.library, num_rows, n, k)?);
        let best = self.try_algorithms(gpu, product, &plan)?;
        self.products.insert(key, (plan.clone(), best));
        Ok((plan, best))
    }

    /// The algorithm that takes least time, with the weights of one layer after the other, as a step has them.
    fn try_algorithms(&self, gpu: &Gpu, product: Product, plan: &Rc<GemmPlan>) -> CudaResult<usize> {
        let out = product.out(&self.activations);
        let x = self.trial_input(product);
        let (start, end) = (Event::new(&gpu.context)?, Event::new(&gpu.context)?);
        let mut best = (f64::INFINITY, 0);
        let layers = self.weights.layers.len();
        let mut times = vec![f64::INFINITY; plan.num_algorithms()];
        for round in 0..TRIAL_ROUNDS {
            for (algorithm, time) in times.iter_mut().enumerate() {
                start.record(&gpu.stream)?;
                for i in 0..TRIAL_LAUNCHES {
                    let weight = product.weight(&self.weights, i % layers);
                    let workspace = self.workspace.address();
                    GemmLaunch { plan: plan.clone(), algorithm, x, weight, out, workspace }
                        .enqueue(&gpu.stream)?;
                }
                end.record(&gpu.stream)?;
                gpu.stream.synchronize()?;
                // The first round also loads the kernels.
                if round > 0 {
                    *time = time.min(start.elapsed_ns(&end)?);
                }
            }
        }
        for (algorithm, time) in times.into_iter().enumerate() {
            if time < best.0 {
                best = (time, algorithm);
            }
        }
        Ok(best.1)
    }
}

/// Splits of a step's decodes at most, which a recorded step has room for.
#[must_use]
pub fn max_items(heads: Heads, num_sms: u32, num_decodes: usize) -> usize {
    2 * num_decodes + decode_items_at_once(heads, num_sms)
}

impl JoinsMemory {
    fn new(gpu: &Gpu, heads: Heads, num_rows: u64, num_counters: u64) -> Result<Self, EngineError> {
        let aligned = |bytes: u64| bytes.next_multiple_of(256);
        let out_bytes = aligned(num_rows * u64::from(heads.head_dim) * 4);
        let stats_bytes = aligned(num_rows * 8);
        let memory = gpu.zeroed("attention's splits", out_bytes + stats_bytes + 4 * num_counters, LESS)?;
        let partial_out = memory.address();
        let partial_stats = partial_out + out_bytes;
        let joins = Joins { partial_out, partial_stats, arrived: partial_stats + stats_bytes };
        Ok(Self { _memory: memory, joins })
    }
}

impl Activations {
    fn new(gpu: &Gpu, model: &ModelSpec, heads: Heads, limits: Limits) -> Result<Self, EngineError> {
        let tokens = u64::from(padded_rows(limits.tokens.max(limits.seqs)));
        let seqs = u64::from(padded_rows(limits.seqs));
        let (hidden, intermediate, vocab) =
            (u64::from(model.hidden_size), u64::from(model.intermediate_size), u64::from(model.vocab_size));
        let mut num_bytes = 0;
        let mut take = |bytes: u64| {
            let begin = num_bytes;
            num_bytes += bytes.next_multiple_of(1024);
            begin
        };
        // Most parts of a row of logits.
        let parts = 64;
        let zeros = take(2 * tokens * hidden.max(heads.q_width()));
        let [residual, normed, projected] = [0; 3].map(|_| take(2 * tokens * hidden));
        let qkv = take(2 * tokens * (heads.q_width() + 2 * heads.kv_width()));
        let attended = take(2 * tokens * heads.q_width());
        let gate_up = take(4 * tokens * intermediate);
        let activated = take(2 * tokens * intermediate);
        let gathered = take(2 * seqs * hidden);
        let logits = take(2 * seqs * vocab);
        let partials = take(8 * seqs * parts);
        let [arrived, ids] = [0; 2].map(|_| take(4 * seqs));
        let memory = gpu.zeroed("a step's intermediate results", num_bytes, LESS)?;
        let base = memory.address();
        Ok(Self {
            _memory: memory,
            zeros: base + zeros,
            residual: base + residual,
            normed: base + normed,
            projected: base + projected,
            qkv: base + qkv,
            attended: base + attended,
            gate_up: base + gate_up,
            activated: base + activated,
            gathered: base + gathered,
            logits: base + logits,
            partials: base + partials,
            arrived: base + arrived,
            ids: base + ids,
        })
    }
}

/// The matrix products of a forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Product {
    Qkv,
    O,
    GateUp,
    Down,
    LmHead,
}

impl Product {
    const OF_LAYERS: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    /// `(n, k)`.
    fn shape(self, model: &ModelSpec, heads: Heads) -> (u32, u32) {
        let (q_width, kv_width) = (heads.q_width() as u32, heads.kv_width() as u32);
        match self {
            Self::Qkv => (q_width + 2 * kv_width, model.hidden_size),
            Self::O => (model.hidden_size, q_width),
            Self::GateUp => (2 * model.intermediate_size, model.hidden_size),
            Self::Down => (model.hidden_size, model.intermediate_size),
            Self::LmHead => (model.vocab_size, model.hidden_size),
        }
    }

    fn weight(self, weights: &Weights, layer: usize) -> u64 {
        let of_layer = &weights.layers[layer];
        match self {
            Self::Qkv => of_layer.qkv,
            Self::O => of_layer.o,
            Self::GateUp => of_layer.gate_up,
            Self::Down => of_layer.down,
            Self::LmHead => weights.lm_head,
        }
    }

    fn out(self, activations: &Activations) -> u64 {
        match self {
            Self::Qkv => activations.qkv,
            Self::O | Self::Down => activations.projected,
            Self::GateUp => activations.gate_up,
            Self::LmHead => activations.logits,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padded_sizes_are_few_and_reach_every_number() {
        let sizes: Vec<_> = padded_sizes(2048).collect();
        assert_eq!(sizes.len(), 8 + 12 + 12 + 8);
        for rows in 1..=2048 {
            let padded = padded_rows(rows);
            assert!(padded >= rows && sizes.contains(&padded), "{rows}");
            assert!(padded - rows < 8.max(rows / 4), "{rows} becomes {padded}");
        }
        assert_eq!(padded_sizes(2049).last(), Some(2304));
    }
}

//! A model's weights on the GPU, from a checkpoint or random.

use std::path::Path;

use half::bf16;
use plumbline_profiler::cuda::{driver::DeviceMemory, launch};
use plumbline_schema::ModelSpec;

use crate::{checkpoint::Checkpoint, error::EngineError, gpu::Gpu};

/// Tensors begin at multiples of this many bytes.
const ALIGNMENT: u64 = 256;
/// Random weights are uniform within this, of a standard deviation of 0.02, as transformers initialises both families.
const RANDOM_SCALE: f32 = 0.034_641_016;

/// Where a layer's weights lie; matrices are `[n, k]`, row by row.
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerWeights {
    /// `[hidden_size]`.
    pub input_norm: u64,
    /// `[q_width + 2 * kv_width, hidden_size]`: queries, keys, values.
    pub qkv: u64,
    /// `[head_dim]`; 0 without.
    pub q_norm: u64,
    /// `[head_dim]`; 0 without.
    pub k_norm: u64,
    /// `[hidden_size, q_width]`.
    pub o: u64,
    /// `[hidden_size]`.
    pub post_norm: u64,
    /// `[2 * intermediate_size, hidden_size]`: gates, then ups.
    pub gate_up: u64,
    /// `[hidden_size, intermediate_size]`.
    pub down: u64,
}

/// A model's weights on the GPU.
pub struct Weights {
    /// `[vocab_size, hidden_size]`.
    pub embedding: u64,
    /// Of each layer.
    pub layers: Vec<LayerWeights>,
    /// `[hidden_size]`.
    pub final_norm: u64,
    /// `[vocab_size, hidden_size]`; the embedding's own where they are tied.
    pub lm_head: u64,
    _memory: DeviceMemory,
}

/// Tensors of a checkpoint that lie behind each other as one.
struct Slot {
    tensors: Vec<(String, Vec<u64>)>,
    offset: u64,
    is_norm: bool,
}

/// Deals the tensors their places.
#[derive(Default)]
struct Layout {
    slots: Vec<Slot>,
    num_bytes: u64,
}

impl Layout {
    fn add(&mut self, tensors: Vec<(String, Vec<u64>)>, is_norm: bool) -> u64 {
        let offset = self.num_bytes;
        let num_values: u64 = tensors.iter().map(|(_, shape)| shape.iter().product::<u64>()).sum();
        self.num_bytes += (2 * num_values).next_multiple_of(ALIGNMENT);
        self.slots.push(Slot { tensors, offset, is_norm });
        offset
    }

    fn matrix(&mut self, names: &[(&str, u64)], prefix: &str, k: u64) -> u64 {
        let of = |&(name, n): &(&str, u64)| (format!("{prefix}{name}.weight"), vec![n, k]);
        self.add(names.iter().map(of).collect(), false)
    }

    fn norm(&mut self, name: &str, prefix: &str, width: u64) -> u64 {
        self.add(vec![(format!("{prefix}{name}.weight"), vec![width])], true)
    }
}

impl Weights {
    /// Loads a checkpoint.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape or type, or memory does not hold them.
    pub fn load(gpu: &Gpu, model: &ModelSpec, folder: &Path) -> Result<Self, EngineError> {
        let checkpoint = Checkpoint::open(folder)?;
        let (layout, weights) = lay_out(gpu, model)?;
        for slot in &layout.slots {
            let mut address = weights.embedding + slot.offset;
            for (name, shape) in &slot.tensors {
                let values = checkpoint.bf16(name, shape)?;
                gpu.stream.upload(address, values.bytes())?;
                address += values.bytes().len() as u64;
            }
        }
        Ok(weights)
    }

    /// Fills matrices with random numbers, the same for the same seed, and norms with ones.
    ///
    /// # Errors
    /// When memory does not hold them.
    pub fn random(gpu: &mut Gpu, model: &ModelSpec, seed: u64) -> Result<Self, EngineError> {
        let (layout, weights) = lay_out(gpu, model)?;
        for (slot, number) in layout.slots.iter().zip(1..) {
            let address = weights.embedding + slot.offset;
            let num_values: u64 = slot.tensors.iter().map(|(_, shape)| shape.iter().product::<u64>()).sum();
            if slot.is_norm {
                gpu.stream.upload(address, &vec![bf16::ONE; num_values as usize])?;
                continue;
            }
            // Streams of different matrices must not overlap: a matrix has fewer than 2^40 values.
            let seed = seed.wrapping_add(number << 40);
            let num_bytes = (2 * num_values).next_multiple_of(16);
            let fill = launch::fill(&mut gpu.kernels, address, num_bytes, seed, RANDOM_SCALE)?;
            fill.enqueue(&gpu.stream)?;
        }
        gpu.stream.synchronize()?;
        Ok(weights)
    }
}

/// Takes memory for a model's weights; the embedding lies at its start.
fn lay_out(gpu: &Gpu, model: &ModelSpec) -> Result<(Layout, Weights), EngineError> {
    let (hidden, head_dim) = (u64::from(model.hidden_size), u64::from(model.head_dim));
    let (q_width, kv_width) =
        (u64::from(model.num_q_heads) * head_dim, u64::from(model.num_kv_heads) * head_dim);
    let (intermediate, vocab) = (u64::from(model.intermediate_size), u64::from(model.vocab_size));
    let mut layout = Layout::default();
    let embedding = layout.matrix(&[("model.embed_tokens", vocab)], "", hidden);
    let mut layers = Vec::with_capacity(model.num_layers as usize);
    for layer in 0..model.num_layers {
        let prefix = &format!("model.layers.{layer}.");
        let qkv =
            [("self_attn.q_proj", q_width), ("self_attn.k_proj", kv_width), ("self_attn.v_proj", kv_width)];
        let mut head_norm = |name| if model.qk_norm { layout.norm(name, prefix, head_dim) } else { 0 };
        let (q_norm, k_norm) = (head_norm("self_attn.q_norm"), head_norm("self_attn.k_norm"));
        layers.push(LayerWeights {
            input_norm: layout.norm("input_layernorm", prefix, hidden),
            qkv: layout.matrix(&qkv, prefix, hidden),
            q_norm,
            k_norm,
            o: layout.matrix(&[("self_attn.o_proj", hidden)], prefix, q_width),
            post_norm: layout.norm("post_attention_layernorm", prefix, hidden),
            gate_up: layout.matrix(
                &[("mlp.gate_proj", intermediate), ("mlp.up_proj", intermediate)],
                prefix,
                hidden,
            ),
            down: layout.matrix(&[("mlp.down_proj", hidden)], prefix, intermediate),
        });
    }
    let final_norm = layout.norm("model.norm", "", hidden);
    let lm_head =
        if model.tied_embeddings { embedding } else { layout.matrix(&[("lm_head", vocab)], "", hidden) };
    let advice = "take a smaller model or a GPU that nobody else uses";
    let memory = gpu.zeroed("the model's weights", layout.num_bytes, advice)?;
    let base = memory.address();
    let at = |layer: LayerWeights| LayerWeights {
        input_norm: base + layer.input_norm,
        qkv: base + layer.qkv,
        q_norm: base + layer.q_norm,
        k_norm: base + layer.k_norm,
        o: base + layer.o,
        post_norm: base + layer.post_norm,
        gate_up: base + layer.gate_up,
        down: base + layer.down,
    };
    let weights = Weights {
        embedding: base + embedding,
        layers: layers.into_iter().map(at).collect(),
        final_norm: base + final_norm,
        lm_head: base + lm_head,
        _memory: memory,
    };
    Ok((layout, weights))
}

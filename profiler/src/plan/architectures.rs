//! Synthetic architectures: the widths and heads that a GPU may see of a dense model that nobody has stated.
//!
//! Candidates come from a Halton sequence over the choices that a model's designer makes. Of these, the few are kept
//! that together have most of the others' layouts near them; two corners span the box around all.

use plumbline_schema::{BatchShape, ModelSpec, Operator, forward::ParallelismError, forward_pass};

use super::{
    layout::{NEAR, Ratio, is_near, layout_of},
    sequence::{halton, log_between},
};

/// Most architectures of the grid, corners included.
const MAX_ARCHITECTURES: usize = 30;
/// Closer than predictors ask for, as real models lie between the candidates.
const CLOSE: Ratio = (8, 5);
/// Candidates that they are chosen from.
const NUM_CANDIDATES: u32 = 512;

/// Query heads per key and value head.
const GQA_RATIOS: [u32; 7] = [1, 2, 4, 5, 7, 8, 16];
/// Vocabularies of known families: Llama 2, OPT, Falcon, Llama 3, Qwen 2.5, Qwen 2.5 from 7B on, Gemma.
const VOCABULARIES: [u32; 7] = [32_000, 50_272, 65_024, 128_256, 151_936, 152_064, 256_000];

/// Operators whose layouts differ from each other's.
const DISTINCT: [Operator; 10] = [
    Operator::RmsNorm,
    Operator::QkvProj,
    Operator::KvCacheWrite,
    Operator::Attention,
    Operator::OProj,
    Operator::GateUpProj,
    Operator::SiluMul,
    Operator::DownProj,
    Operator::LmHead,
    Operator::Sample,
];

/// A set of candidates' layouts, a bit each.
type Bits = Vec<u64>;

/// The architectures, corners first. Each is what one GPU holds: tensor parallelism is within the numbers.
///
/// # Errors
/// Never: on a GPU of its own every model is whole.
pub(super) fn all() -> Result<Vec<ModelSpec>, ParallelismError> {
    let candidates: Vec<ModelSpec> = (1..=NUM_CANDIDATES).map(candidate).collect();
    let layouts = candidates.iter().map(layouts_of).collect::<Result<Vec<_>, _>>()?;
    let mut chosen = corners();
    // First so that all have one near, as predictors ask for; then closer, as long as there is room.
    for ratio in [NEAR, CLOSE] {
        let nears: Vec<Bits> = layouts.iter().map(|own| near(own, &layouts, ratio)).collect();
        let mut seen: Bits = vec![0; (layouts.len() * DISTINCT.len()).div_ceil(64)];
        for architecture in &chosen {
            add(&mut seen, &near(&layouts_of(architecture)?, &layouts, ratio));
        }
        while chosen.len() < MAX_ARCHITECTURES {
            let gain =
                |i: usize| -> u32 { nears[i].iter().zip(&seen).map(|(a, b)| (a & !b).count_ones()).sum() };
            // Of equal ones the first of the sequence; none once there is nothing to gain.
            let best = (0..nears.len()).rev().max_by_key(|&i| gain(i)).filter(|&i| gain(i) > 0);
            let Some(best) = best else { break };
            add(&mut seen, &nears[best]);
            chosen.push(candidates[best].clone());
        }
    }
    Ok(chosen)
}

fn add(seen: &mut Bits, more: &Bits) {
    seen.iter_mut().zip(more).for_each(|(a, b)| *a |= b);
}

/// Which layouts of the candidates lie near an architecture's own.
fn near(own: &[Vec<u64>], candidates: &[Vec<Vec<u64>>], ratio: Ratio) -> Bits {
    let mut bits = vec![0; (candidates.len() * DISTINCT.len()).div_ceil(64)];
    for (i, other) in candidates.iter().enumerate() {
        for (j, &operator) in DISTINCT.iter().enumerate() {
            if is_near(operator, &own[j], &other[j], ratio) {
                let bit = i * DISTINCT.len() + j;
                bits[bit / 64] |= 1 << (bit % 64);
            }
        }
    }
    bits
}

fn layouts_of(model: &ModelSpec) -> Result<Vec<Vec<u64>>, ParallelismError> {
    let calls = forward_pass(model, &BatchShape::default(), 1)?;
    let layout = |&operator: &Operator| {
        let call = calls.iter().find(|call| call.operator == operator);
        call.map_or_else(Vec::new, |call| layout_of(operator, &call.shape))
    };
    Ok(DISTINCT.iter().map(layout).collect())
}

/// What an architecture is made of; the rest of a model does not change its operators.
struct Widths {
    hidden_size: u32,
    num_q_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    intermediate_size: u32,
    vocab_size: u32,
}

impl Widths {
    fn into_model(self, name: String) -> ModelSpec {
        ModelSpec {
            name,
            hidden_size: self.hidden_size,
            num_layers: 1,
            num_q_heads: self.num_q_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            intermediate_size: self.intermediate_size,
            vocab_size: self.vocab_size,
            max_positions: u32::MAX,
            tied_embeddings: false,
            qk_norm: true,
        }
    }
}

/// An eighth of a very small model; the whole of a very large one with as many key and value heads as query heads; and a
/// large vocabulary at a width at which its weights stay within a few GiB.
fn corners() -> Vec<ModelSpec> {
    let small = Widths {
        hidden_size: 512,
        num_q_heads: 1,
        num_kv_heads: 1,
        head_dim: 64,
        intermediate_size: 256,
        vocab_size: 4000,
    };
    let large = Widths {
        hidden_size: 16_384,
        num_q_heads: 128,
        num_kv_heads: 128,
        head_dim: 128,
        intermediate_size: 90_112,
        vocab_size: 131_072,
    };
    let wordy = Widths {
        hidden_size: 5120,
        num_q_heads: 40,
        num_kv_heads: 10,
        head_dim: 128,
        intermediate_size: 27_648,
        vocab_size: 262_144,
    };
    vec![small.into_model("small".into()), large.into_model("large".into()), wordy.into_model("wordy".into())]
}

/// The candidate at an index of the sequence, from 1.
fn candidate(index: u32) -> ModelSpec {
    let [hidden, head, ratio, width, shard, mlp, vocab] = halton(index);
    let hidden_size = rounded(log_between(512.0, 16_384.0, hidden));
    let head_dim = if head < 0.4 && hidden_size <= 8192 { 64 } else { 128 };
    // Every other architecture is a whole model, the others shards of one.
    let shards = if shard < 0.5 { 1 } else { of(&[2, 4, 8], 2.0 * shard - 1.0) };
    // Heads together are about as wide as the hidden state: from 0.8 times (Mistral Nemo) to 2 times (Qwen3-0.6B).
    let q_width = f64::from(hidden_size) * log_between(0.8, 2.0, width);
    let num_heads = (q_width / f64::from(head_dim * shards)).max(1.0);
    let fitting: Vec<u32> = GQA_RATIOS.into_iter().filter(|&r| f64::from(r) <= num_heads).collect();
    let gqa_ratio = of(&fitting, ratio);
    let num_kv_heads = (num_heads / f64::from(gqa_ratio)).round().clamp(1.0, 128.0) as u32;
    let intermediate_size = log_between(2.5, 5.5, mlp) * f64::from(hidden_size) / f64::from(shards);
    let vocab_size = if index.is_multiple_of(2) {
        of(&VOCABULARIES, vocab)
    } else {
        log_between(32_000.0, 262_144.0, vocab) as u32
    };
    let widths = Widths {
        hidden_size,
        num_q_heads: num_kv_heads * gqa_ratio,
        num_kv_heads,
        head_dim,
        intermediate_size: rounded(intermediate_size),
        vocab_size: vocab_size.div_ceil(shards).next_multiple_of(8),
    };
    widths.into_model(format!("candidate-{index}"))
}

/// The item at a share of the way through a list.
fn of(items: &[u32], share: f64) -> u32 {
    items[((share * items.len() as f64) as usize).min(items.len() - 1)]
}

/// To a multiple of 128, and of 256 from 4,096 on.
fn rounded(width: f64) -> u32 {
    let step = if width < 4096.0 { 128.0 } else { 256.0 };
    ((width / step).round().max(1.0) * step) as u32
}

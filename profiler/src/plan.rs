//! The plan: which operators are measured at which shapes.
//!
//! Shapes come from the forward pass itself, for batches that an engine forms: a grid of token counts for
//! everything but attention, and sets of sequences for attention (`batches`). Each operator goes from cheap to
//! long, all of them in step, so that a run that is cut short has covered every operator; the same models and envelope give the same plan.

mod batches;

use std::collections::HashSet;

use plumbline_bundles::CacheState;
use plumbline_schema::{
    AttentionLoad, BatchShape, ModelSpec, Operator, OperatorShape, StepBatch, forward::ParallelismError,
    forward_pass,
};
use serde::{Deserialize, Serialize};

use crate::device::Point;

/// What the engines whose steps are to be predicted will ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// Largest number of tokens of a step, at least 1.
    pub max_num_tokens: u32,
    /// Largest number of sequences of a step, at least 1.
    pub max_num_seqs: u32,
    /// Longest sequence, prompt and output; a model's own limit applies too.
    pub max_model_len: u32,
    /// Most keys of one batch, at least 1: what a KV cache holds.
    pub max_kv_tokens: u64,
    /// Tensor-parallel sizes whose shapes are planned; operators between GPUs are left out.
    pub tensor_parallel_sizes: Vec<u32>,
}

impl Default for Envelope {
    fn default() -> Self {
        Self {
            max_num_tokens: 8192,
            max_num_seqs: 512,
            max_model_len: 32768,
            max_kv_tokens: 524_288,
            tensor_parallel_sizes: vec![1],
        }
    }
}

/// A point to time, and how its operands lie in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PlannedPoint {
    /// The point.
    pub point: Point,
    /// Cold or hot.
    pub cache: CacheState,
}

/// What a profile measures, stored in the bundle as `plan.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Names of the models.
    pub models: Vec<String>,
    /// What was planned for.
    pub envelope: Envelope,
    /// Small points whose results are compared with a reference before anything is timed.
    pub checks: Vec<Point>,
    /// Points to time, in order.
    pub points: Vec<PlannedPoint>,
}

/// Rows of a matrix product: dense below 512, where batches of decodes and captured sizes lie, with sizes on both
/// sides of multiples of 64 and 128, where another row of tiles begins.
const GEMM_TOKENS: [u32; 58] = [
    1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 120, 128, 136, 144, 160, 176, 192, 200, 208,
    224, 240, 256, 264, 288, 320, 336, 352, 384, 392, 416, 448, 480, 496, 512, 520, 576, 640, 704, 768, 832,
    896, 1024, 1032, 1152, 1280, 1536, 1792, 2048, 2056, 3072, 4096, 6144, 8192,
];

/// Tokens of an elementwise operator, whose time is smooth but for where the SMs fill and the L2 cache ends.
const ELEMENTWISE_TOKENS: [u32; 36] = [
    1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640, 704, 768, 896,
    1024, 1152, 1280, 1536, 1792, 2048, 2560, 3072, 4096, 5120, 6144, 8192,
];

/// Sequences of a step, each of which gets logits.
const SEQUENCES: [u32; 24] =
    [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 72, 96, 128, 136, 160, 192, 224, 256, 320, 384, 512];

/// Bytes up to which operands are also measured hot: a launch this small finds what the one before it wrote.
const MAX_HOT_BYTES: u64 = 16 << 20;

impl Plan {
    /// Plans the points of the models within the envelope.
    ///
    /// # Errors
    /// When a tensor-parallel size does not divide a model.
    pub fn new(models: &[ModelSpec], envelope: &Envelope) -> Result<Self, ParallelismError> {
        let mut seen = HashSet::new();
        let mut seen_checks = HashSet::new();
        let mut points = Vec::new();
        let mut checks = Vec::new();
        for model in models {
            for &tp in &envelope.tensor_parallel_sizes {
                for point in model_points(model, envelope, tp)? {
                    if seen.insert(point.clone()) {
                        points.extend(with_cache_states(point));
                    }
                }
                let new_checks = checks_of(model, tp)?;
                checks.extend(new_checks.into_iter().filter(|check| seen_checks.insert(check.clone())));
            }
        }
        let points = interleaved(&points);
        checks.sort_by_key(|check| check.operator);
        Ok(Self {
            models: models.iter().map(|m| m.name.clone()).collect(),
            envelope: envelope.clone(),
            checks,
            points,
        })
    }

    /// The planned operators, in the order of the forward pass.
    pub fn operators(&self) -> impl Iterator<Item = Operator> {
        Operator::ALL.into_iter().filter(|op| self.points.iter().any(|p| p.point.operator == *op))
    }
}

/// Orders the points of each operator cheap to long, and lets the operators advance together.
fn interleaved(points: &[PlannedPoint]) -> Vec<PlannedPoint> {
    let mut ranked = Vec::with_capacity(points.len());
    for operator in Operator::ALL {
        let mut own: Vec<_> = points.iter().filter(|p| p.point.operator == operator).cloned().collect();
        own.sort_by_key(|planned| cost(&planned.point.shape));
        let count = own.len();
        // In millionths of the operator's points, so that the order needs no floating point.
        ranked.extend(own.into_iter().enumerate().map(|(i, planned)| (i * 1_000_000 / count, planned)));
    }
    // Stable: operators that are equally far keep the order of the forward pass.
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, planned)| planned).collect()
}

/// Rough work of a launch, for ordering: bytes, and FLOPs at a GPU's usual ratio of compute to bandwidth.
fn cost(shape: &OperatorShape) -> u64 {
    const FLOPS_PER_BYTE: u64 = 300;
    shape.bytes().0.max(shape.flops().0 / FLOPS_PER_BYTE)
}

/// Cold, and hot where the operands of a model's own launch would still be in the cache.
///
/// Weights and the KV cache are read once a step and are cold then; what an elementwise operator reads was just
/// written. Matrix products and attention are measured hot at a few shapes only, to show the difference.
fn with_cache_states(point: Point) -> Vec<PlannedPoint> {
    let tokens = point.shape.values()[0];
    let is_small = point.shape.bytes().0 <= MAX_HOT_BYTES;
    let is_hot = match point.shape {
        OperatorShape::Attention { load, .. } => {
            is_small
                && load.num_tokens().is_power_of_two()
                && load.num_prefill_seqs + load.num_decode_seqs == 1
        }
        OperatorShape::Gemm { .. } => is_small && [1, 64, 256].contains(&tokens),
        _ => is_small && tokens.is_power_of_two(),
    };
    let hot = is_hot.then(|| PlannedPoint { point: point.clone(), cache: CacheState::Hot });
    [Some(PlannedPoint { point, cache: CacheState::Cold }), hot].into_iter().flatten().collect()
}

fn model_points(model: &ModelSpec, envelope: &Envelope, tp: u32) -> Result<Vec<Point>, ParallelismError> {
    let mut points = Vec::new();
    let with_limit = |grid: &[u32], limit: u32| -> Vec<u32> {
        let mut sizes: Vec<u32> = grid.iter().copied().filter(|&size| size < limit).collect();
        sizes.push(limit);
        sizes
    };
    for (grid, limit, fits) in [
        (&GEMM_TOKENS[..], envelope.max_num_tokens, is_gemm_of_tokens as fn(Operator) -> bool),
        (&ELEMENTWISE_TOKENS[..], envelope.max_num_tokens, is_elementwise_of_tokens),
        (&SEQUENCES[..], envelope.max_num_seqs, is_of_sequences),
    ] {
        for size in with_limit(grid, limit) {
            let batch = BatchShape { num_tokens: size, num_seqs: size, attention: AttentionLoad::default() };
            let calls = forward_pass(model, &batch, tp)?;
            let fitting = calls.iter().filter(|call| fits(call.operator));
            points.extend(fitting.map(|c| Point { operator: c.operator, shape: c.shape, batch: None }));
        }
    }
    for batch in batches::of(envelope, model.max_positions.min(envelope.max_model_len)) {
        points.extend(attention_point(model, batch, tp)?);
    }
    Ok(points)
}

fn is_of_sequences(operator: Operator) -> bool {
    matches!(operator, Operator::LmHead | Operator::Sample)
}

fn is_gemm_of_tokens(operator: Operator) -> bool {
    operator.is_gemm() && !is_of_sequences(operator)
}

fn is_elementwise_of_tokens(operator: Operator) -> bool {
    !(operator.is_gemm()
        || operator.is_collective()
        || operator == Operator::Attention
        || is_of_sequences(operator))
}

fn attention_point(model: &ModelSpec, batch: StepBatch, tp: u32) -> Result<Option<Point>, ParallelismError> {
    let calls = forward_pass(model, &batch.shape(), tp)?;
    let call = calls.into_iter().find(|call| call.operator == Operator::Attention);
    Ok(call.map(|c| Point { operator: c.operator, shape: c.shape, batch: Some(batch) }))
}

/// Small shapes of every operator of a model: few tokens at its own widths, and matrix products cut down so that a
/// CPU can follow.
fn checks_of(model: &ModelSpec, tp: u32) -> Result<Vec<Point>, ParallelismError> {
    const TOKENS: [u32; 3] = [1, 7, 65];
    const MAX_GEMM_WIDTH: u32 = 512;
    // Chunks and decodes, alone and mixed, with contexts that end inside and at the end of KV blocks.
    const BATCHES: [(&str, &str); 5] =
        [("33:0", ""), ("17:47;64:0", ""), ("", "0;15;129"), ("", "511"), ("20:100", "5;63;300")];
    let mut checks = Vec::new();
    for tokens in TOKENS {
        let batch = BatchShape { num_tokens: tokens, num_seqs: tokens, attention: AttentionLoad::default() };
        for call in forward_pass(model, &batch, tp)? {
            let shape = match call.shape {
                OperatorShape::Attention { .. } | OperatorShape::Collective { .. } => continue,
                OperatorShape::Gemm { m, n, k } => {
                    OperatorShape::Gemm { m, n: n.min(MAX_GEMM_WIDTH), k: k.min(MAX_GEMM_WIDTH) }
                }
                shape => shape,
            };
            checks.push(Point { operator: call.operator, shape, batch: None });
        }
    }
    for (chunks, decodes) in BATCHES {
        // The texts above are well formed.
        if let Ok(batch) = StepBatch::parse(chunks, decodes) {
            checks.extend(attention_point(model, batch, tp)?);
        }
    }
    Ok(checks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shipped() -> Vec<ModelSpec> {
        ModelSpec::shipped_names().into_iter().map(|name| ModelSpec::load(name).unwrap()).collect()
    }

    #[test]
    fn the_plan_of_the_shipped_models_has_its_size_and_no_point_twice() {
        let plan = Plan::new(&shipped(), &Envelope::default()).unwrap();
        let unique: HashSet<_> = plan.points.iter().collect();
        assert_eq!(unique.len(), plan.points.len());
        assert!((1200..2200).contains(&plan.points.len()), "{}", plan.points.len());
        assert_eq!(plan.operators().collect::<Vec<_>>(), Operator::ALL[..13]);
        assert!(plan.checks.len() < 120, "{}", plan.checks.len());
        assert_eq!(plan, Plan::new(&shipped(), &Envelope::default()).unwrap());
        // Every operator is checked before it is timed.
        assert!(plan.operators().all(|op| plan.checks.iter().filter(|c| c.operator == op).count() >= 3));
    }

    #[test]
    fn a_tenth_of_the_plan_covers_every_operator() {
        let plan = Plan::new(&shipped(), &Envelope::default()).unwrap();
        let start: HashSet<_> =
            plan.points[..plan.points.len() / 10].iter().map(|p| p.point.operator).collect();
        assert_eq!(start.len(), 13);
    }

    #[test]
    fn points_stay_inside_the_envelope() {
        let envelope = Envelope {
            max_num_tokens: 500,
            max_num_seqs: 20,
            max_model_len: 3000,
            max_kv_tokens: 20_000,
            tensor_parallel_sizes: vec![1, 2],
        };
        let plan = Plan::new(&shipped(), &envelope).unwrap();
        let mut largest = 0;
        for planned in &plan.points {
            match (&planned.point.shape, &planned.point.batch) {
                (OperatorShape::Attention { load, .. }, Some(batch)) => {
                    assert_eq!(*load, batch.shape().attention);
                    assert!(load.num_tokens() <= 500 && batch.shape().num_seqs <= 20, "{batch:?}");
                    assert!(load.prefill_kv_tokens + load.decode_kv_tokens <= 20_000);
                    assert!(batch.prefill_chunks.iter().all(|c| c.num_tokens + c.context_len <= 3000));
                    assert!(batch.decode_contexts.iter().all(|&c| c < 3000));
                }
                (OperatorShape::Collective { .. }, _) => panic!("a collective needs several GPUs"),
                (shape, None) => largest = largest.max(shape.values()[0]),
                (shape, Some(_)) => panic!("{shape:?} with sequences"),
            }
        }
        assert_eq!(largest, 500);
        let bad = Envelope { tensor_parallel_sizes: vec![3], ..envelope };
        assert!(Plan::new(&shipped(), &bad).is_err());
    }
}

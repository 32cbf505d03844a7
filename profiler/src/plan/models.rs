//! Points of the stated models: dense in tokens and sequences at their own widths.

use plumbline_schema::{
    AttentionLoad, BatchShape, ModelSpec, Operator, OperatorShape, StepBatch, forward::ParallelismError,
    forward_pass,
};

use super::{Envelope, batches};
use crate::device::Point;

/// Rows of a matrix product: dense below 512, where batches of decodes and captured sizes lie, with sizes on both
/// sides of multiples of 64 and 128, where another row of tiles begins.
pub(super) const GEMM_TOKENS: [u32; 58] = [
    1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 120, 128, 136, 144, 160, 176, 192, 200, 208,
    224, 240, 256, 264, 288, 320, 336, 352, 384, 392, 416, 448, 480, 496, 512, 520, 576, 640, 704, 768, 832,
    896, 1024, 1032, 1152, 1280, 1536, 1792, 2048, 2056, 3072, 4096, 6144, 8192,
];

/// Tokens of an elementwise operator, whose time is smooth but for where the SMs fill and the L2 cache ends.
pub(super) const ELEMENTWISE_TOKENS: [u32; 36] = [
    1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640, 704, 768, 896,
    1024, 1152, 1280, 1536, 1792, 2048, 2560, 3072, 4096, 5120, 6144, 8192,
];

/// Sequences of a step, each of which gets logits.
pub(super) const SEQUENCES: [u32; 24] =
    [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 72, 96, 128, 136, 160, 192, 224, 256, 320, 384, 512];

pub(super) fn points_of(
    model: &ModelSpec,
    envelope: &Envelope,
    tp: u32,
) -> Result<Vec<Point>, ParallelismError> {
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

pub(super) fn is_of_sequences(operator: Operator) -> bool {
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

pub(super) fn attention_point(
    model: &ModelSpec,
    batch: StepBatch,
    tp: u32,
) -> Result<Option<Point>, ParallelismError> {
    let calls = forward_pass(model, &batch.shape(), tp)?;
    let call = calls.into_iter().find(|call| call.operator == Operator::Attention);
    Ok(call.map(|c| Point { operator: c.operator, shape: c.shape, batch: Some(batch) }))
}

/// Small shapes of every operator of a model: few tokens at its own widths, and matrix products cut down so that a
/// CPU can follow.
pub(super) fn checks_of(model: &ModelSpec, tp: u32) -> Result<Vec<Point>, ParallelismError> {
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

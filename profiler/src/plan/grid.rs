//! The model-agnostic grid: a few sizes of each layout of the synthetic architectures.

use std::collections::HashSet;

use plumbline_schema::{
    AttentionLoad, BatchShape, ModelSpec, Operator, OperatorShape, StepBatch, forward::ParallelismError,
    forward_pass,
};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use super::{
    Envelope, architectures, batches, cost,
    layout::{Ratio, is_near, layout_of},
    loads::{Draw, KINDS},
    models::{ELEMENTWISE_TOKENS, GEMM_TOKENS, SEQUENCES, attention_point, is_of_sequences},
    sequence::{halton, log_between},
};
use crate::device::Point;

/// A layout that differs by less from one the grid has is left out: it would tell little that is new.
const SAME: Ratio = (5, 4);
/// Most bytes that a launch may touch, and the KV cache beneath it.
const MAX_BYTES: u64 = 8 << 30;
/// Longest launch by its roofline, as bytes that a GPU of 3.35 TB/s moves in 20 ms.
const MAX_COST: u64 = 67_000_000_000;

/// Sizes of each layout.
const NUM_GEMM_SIZES: usize = 8;
const NUM_ELEMENTWISE_SIZES: usize = 5;
/// Of many layouts that hardly differ but in width.
const NUM_HEAD_SIZES: usize = 4;
const NUM_SEQUENCE_SIZES: usize = 4;

/// The grid's points within an envelope, each once; the same envelope gives the same grid.
///
/// # Errors
/// Never: every architecture is whole.
pub(super) fn points(envelope: &Envelope) -> Result<Vec<Point>, ParallelismError> {
    let architectures = architectures::all()?;
    let mut points = Vec::new();
    for operator in Operator::ALL.into_iter().filter(|operator| !operator.is_collective()) {
        let mut taken: Vec<Vec<u64>> = Vec::new();
        for (i, model) in architectures.iter().enumerate() {
            let Some(shape) = shape_at(model, operator, 1)? else { continue };
            let layout = layout_of(operator, &shape);
            if taken.iter().any(|other| is_near(operator, other, &layout, SAME)) {
                continue;
            }
            taken.push(layout);
            if operator == Operator::Attention {
                points.extend(attention_points(model, envelope, i)?);
            } else {
                points.extend(points_of(model, operator, envelope, i)?);
            }
        }
    }
    points.extend(extremes(&architectures, envelope)?);
    points.retain(is_affordable);
    let mut seen = HashSet::new();
    points.retain(|point| seen.insert(point.clone()));
    Ok(points)
}

/// Shape of an operator in a step of `size` tokens, or sequences where the operator works on those.
fn shape_at(
    model: &ModelSpec,
    operator: Operator,
    size: u32,
) -> Result<Option<OperatorShape>, ParallelismError> {
    let batch = BatchShape { num_tokens: size, num_seqs: size, attention: AttentionLoad::default() };
    let calls = forward_pass(model, &batch, 1)?;
    Ok(calls.into_iter().find(|call| call.operator == operator).map(|call| call.shape))
}

fn is_affordable(point: &Point) -> bool {
    let kv_bytes = match point.shape {
        OperatorShape::Attention { heads, load } => {
            4 * heads.kv_width() * (load.prefill_kv_tokens + load.decode_kv_tokens)
        }
        _ => 0,
    };
    point.shape.bytes().0.max(kv_bytes) <= MAX_BYTES && cost(&point.shape) <= MAX_COST
}

fn points_of(
    model: &ModelSpec,
    operator: Operator,
    envelope: &Envelope,
    index: usize,
) -> Result<Vec<Point>, ParallelismError> {
    let (list, limit, count) = if is_of_sequences(operator) {
        (&SEQUENCES[..], envelope.max_num_seqs, NUM_SEQUENCE_SIZES)
    } else if operator.is_gemm() {
        (&GEMM_TOKENS[..], envelope.max_num_tokens, NUM_GEMM_SIZES)
    } else if matches!(operator, Operator::QkNorm | Operator::Rope) {
        (&ELEMENTWISE_TOKENS[..], envelope.max_num_tokens, NUM_HEAD_SIZES)
    } else {
        (&ELEMENTWISE_TOKENS[..], envelope.max_num_tokens, NUM_ELEMENTWISE_SIZES)
    };
    let sizes = sizes(list, limit, count, index, operator);
    let mut points = Vec::with_capacity(count);
    for size in sizes {
        let shape = shape_at(model, operator, size)?;
        points.extend(shape.map(|shape| Point { operator, shape, batch: None }));
    }
    Ok(points)
}

/// The smallest and the largest size, without which a predictor would not interpolate between them; and from each
/// stratum of the list between them one of the list, or any other.
fn sizes(list: &[u32], limit: u32, count: usize, index: usize, operator: Operator) -> Vec<u32> {
    let mut random = Pcg64::seed_from_u64((index as u64) << 8 | operator as u64);
    let mut list: Vec<u32> = list.iter().copied().filter(|&size| size < limit).collect();
    list.push(limit);
    let mut sizes = vec![list[0], limit];
    let strata = count.saturating_sub(2);
    for i in 0..strata {
        let (begin, end) = (i * list.len() / strata, (i + 1) * list.len() / strata);
        if begin == end {
            continue;
        }
        let (low, high) = (f64::from(list[begin]), f64::from(list[end - 1]));
        let of_list = list[random.random_range(begin..end)];
        sizes.push(if random.random() {
            of_list
        } else {
            log_between(low, high, random.random()).round() as u32
        });
    }
    sizes
}

fn attention_points(
    model: &ModelSpec,
    envelope: &Envelope,
    index: usize,
) -> Result<Vec<Point>, ParallelismError> {
    let mut draw = Draw::new(envelope, index as u64);
    // A dimension of the sequence for each kind; the kinds beyond share the first ones in reverse.
    let dimensions = halton(index as u32 + 1);
    let mut points = Vec::new();
    for (i, kind) in KINDS.into_iter().enumerate() {
        let share = dimensions.get(i).copied().unwrap_or_else(|| 1.0 - dimensions[i % dimensions.len()]);
        let suits = |batch: &StepBatch| {
            attention_point(model, batch.clone(), 1)
                .is_ok_and(|point| point.is_some_and(|p| is_affordable(&p)))
        };
        if let Some(batch) = draw.batch(kind, share, suits) {
            points.extend(attention_point(model, batch, 1)?);
        }
    }
    Ok(points)
}

/// The extremes of the envelope, each at the first architecture for which it is affordable.
fn extremes(architectures: &[ModelSpec], envelope: &Envelope) -> Result<Vec<Point>, ParallelismError> {
    let mut points = Vec::new();
    for batch in batches::extremes(envelope, envelope.max_model_len) {
        for model in architectures {
            let point = attention_point(model, batch.clone(), 1)?;
            if let Some(point) = point.filter(is_affordable) {
                points.push(point);
                break;
            }
        }
    }
    Ok(points)
}

/// Small models whose results are compared with the reference before a grid is timed: both sizes of a head, with few and
/// many query heads per key and value head.
pub(super) fn checked() -> [ModelSpec; 2] {
    let model = |num_q_heads, num_kv_heads, head_dim| ModelSpec {
        name: "checked".into(),
        hidden_size: 1536,
        num_layers: 1,
        num_q_heads,
        num_kv_heads,
        head_dim,
        intermediate_size: 4096,
        vocab_size: 32_000,
        max_positions: u32::MAX,
        tied_embeddings: false,
        qk_norm: true,
    };
    [model(14, 2, 64), model(16, 1, 128)]
}

//! The forward pass, written once: which operators a step launches, with which shapes, how often.

use crate::{
    batch::BatchShape,
    model::{BF16_BYTES, ModelSpec},
    operator::{Heads, Operator, OperatorShape},
};

/// One operator of a step: its shape and how many times it is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OperatorCall {
    /// Which operator.
    pub operator: Operator,
    /// Shape of one launch.
    pub shape: OperatorShape,
    /// Launches in the step: 1, or once or twice a layer.
    pub repeats: u32,
}

/// A tensor-parallel size that does not divide the model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected a tensor_parallel_size that divides num_kv_heads = {num_kv_heads} and intermediate_size = {intermediate_size}, found {tensor_parallel_size}"
)]
pub struct ParallelismError {
    /// The model's key and value heads.
    pub num_kv_heads: u32,
    /// The model's MLP width.
    pub intermediate_size: u32,
    /// What was asked for.
    pub tensor_parallel_size: u32,
}

/// A number of pipeline stages that the model's layers cannot be split over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected a pipeline_parallel_size from 1 to num_layers = {num_layers}, found {pipeline_parallel_size}"
)]
pub struct StagesError {
    /// The model's layers.
    pub num_layers: u32,
    /// What was asked for.
    pub pipeline_parallel_size: u32,
}

/// The head layout on each of `tensor_parallel_size` GPUs.
///
/// # Errors
/// When the size is zero or does not divide the key and value heads and the MLP.
pub fn heads_per_gpu(model: &ModelSpec, tensor_parallel_size: u32) -> Result<Heads, ParallelismError> {
    let tp = tensor_parallel_size;
    if tp == 0 || !model.num_kv_heads.is_multiple_of(tp) || !model.intermediate_size.is_multiple_of(tp) {
        return Err(ParallelismError {
            num_kv_heads: model.num_kv_heads,
            intermediate_size: model.intermediate_size,
            tensor_parallel_size,
        });
    }
    Ok(Heads {
        num_q_heads: model.num_q_heads / tp,
        num_kv_heads: model.num_kv_heads / tp,
        head_dim: model.head_dim,
    })
}

/// A pipeline stage: consecutive layers on GPUs of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Its layers, at least 1.
    pub num_layers: u32,
    /// It has the embedding.
    pub is_first: bool,
    /// It has the final norm, the LM head and sampling; every other one sends to the next.
    pub is_last: bool,
}

impl Stage {
    /// The one stage of a model that is not split into stages.
    #[must_use]
    pub const fn whole(model: &ModelSpec) -> Self {
        Self { num_layers: model.num_layers, is_first: true, is_last: true }
    }
}

/// The stages of a model, in order.
///
/// As vLLM 0.24 splits layers (`vllm/distributed/utils.py`, `get_pp_indices`): evenly, and what is left over goes one
/// layer each to the stages before the last, from the last but one backwards, so that the embedding's and the LM
/// head's stages get theirs last or never.
///
/// # Errors
/// When there is no stage or one without a layer.
pub fn stages(model: &ModelSpec, pipeline_parallel_size: u32) -> Result<Vec<Stage>, StagesError> {
    let (num_layers, size) = (model.num_layers, pipeline_parallel_size);
    if !(1..=num_layers).contains(&size) {
        return Err(StagesError { num_layers, pipeline_parallel_size });
    }
    let (share, left_over) = (num_layers / size, num_layers % size);
    let stage = |i: u32| {
        let is_last = i + 1 == size;
        // `size - 1 - i` stages stand between this one and the end.
        let has_one_more = !is_last && size - 1 - i <= left_over;
        Stage { num_layers: share + u32::from(has_one_more), is_first: i == 0, is_last }
    };
    Ok((0..size).map(stage).collect())
}

/// Lists the operators of one step on one GPU of a model that is not split into stages; see [`stage_pass`].
///
/// # Errors
/// When `tensor_parallel_size` does not divide the model.
pub fn forward_pass(
    model: &ModelSpec,
    batch: &BatchShape,
    tensor_parallel_size: u32,
) -> Result<Vec<OperatorCall>, ParallelismError> {
    stage_pass(model, batch, tensor_parallel_size, Stage::whole(model))
}

/// Tensors that a stage sends to the next: hidden states and residual (vLLM 0.24, `model_executor/models/llama.py` and
/// `qwen2.py`, the `IntermediateTensors` that `forward` returns).
const TENSORS_SENT: u32 = 2;

/// Lists the operators of one step on one GPU of a stage, in launch order, repeated ones once.
///
/// `batch.num_tokens` may be padded; attention works on the real sequences, and the LM head and
/// sampling on one row per sequence. The residual of the first norm of the pass is the embedding
/// itself; it is counted like the others. Megatron-style tensor parallelism: heads and MLP columns
/// are split, an all-reduce of `[num_tokens, hidden_size]` follows `o_proj` and `down_proj`, and
/// the vocabulary is split for the LM head.
///
/// Every stage but the last ends with its sends to the next, of `[num_tokens, hidden_size]` each. Of tensor-parallel
/// ranks, vLLM 0.24 (`vllm/distributed/parallel_state.py`, `GroupCoordinator.isend_tensor_dict`) lets each send its part
/// to its peer, and the peers gather the parts: over links of one speed a rank receives as many bytes in all as in one
/// message of the whole tensor, and that is what stands here.
///
/// # Errors
/// When `tensor_parallel_size` does not divide the model.
pub fn stage_pass(
    model: &ModelSpec,
    batch: &BatchShape,
    tensor_parallel_size: u32,
    stage: Stage,
) -> Result<Vec<OperatorCall>, ParallelismError> {
    let tp = tensor_parallel_size;
    let heads = heads_per_gpu(model, tp)?;
    let (layers, hidden) = (stage.num_layers, model.hidden_size);
    let (num_tokens, num_seqs) = (batch.num_tokens, batch.num_seqs);
    let q_width = heads.num_q_heads * heads.head_dim;
    let qkv_width = (heads.num_q_heads + 2 * heads.num_kv_heads) * heads.head_dim;
    let intermediate_size = model.intermediate_size / tp;
    let vocab_size = model.vocab_size.div_ceil(tp);
    let gemm = |m, n, k| OperatorShape::Gemm { m, n, k };

    let mut calls = Vec::with_capacity(16);
    let mut push = |operator, shape, repeats| calls.push(OperatorCall { operator, shape, repeats });
    if stage.is_first {
        push(Operator::Embedding, OperatorShape::Embedding { num_tokens, hidden_size: hidden }, 1);
    }
    // Two a layer, and the final one.
    let num_norms = 2 * layers + u32::from(stage.is_last);
    push(Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens, hidden_size: hidden }, num_norms);
    push(Operator::QkvProj, gemm(num_tokens, qkv_width, hidden), layers);
    if model.qk_norm {
        push(Operator::QkNorm, OperatorShape::QkNorm { num_tokens, heads }, layers);
    }
    push(Operator::Rope, OperatorShape::Rope { num_tokens, heads }, layers);
    push(
        Operator::KvCacheWrite,
        OperatorShape::KvCacheWrite {
            num_tokens,
            num_kv_heads: heads.num_kv_heads,
            head_dim: heads.head_dim,
        },
        layers,
    );
    push(Operator::Attention, OperatorShape::Attention { heads, load: batch.attention }, layers);
    push(Operator::OProj, gemm(num_tokens, hidden, q_width), layers);
    push(Operator::GateUpProj, gemm(num_tokens, 2 * intermediate_size, hidden), layers);
    push(Operator::SiluMul, OperatorShape::SiluMul { num_tokens, intermediate_size }, layers);
    push(Operator::DownProj, gemm(num_tokens, hidden, intermediate_size), layers);
    if stage.is_last {
        push(Operator::LmHead, gemm(num_seqs, vocab_size, hidden), 1);
        push(Operator::Sample, OperatorShape::Sample { num_seqs, vocab_size }, 1);
    }
    let message_bytes = u64::from(num_tokens) * u64::from(hidden) * BF16_BYTES;
    if tp > 1 {
        push(Operator::AllReduce, OperatorShape::Collective { message_bytes, num_ranks: tp }, 2 * layers);
    }
    if !stage.is_last {
        push(Operator::SendRecv, OperatorShape::Collective { message_bytes, num_ranks: 2 }, TENSORS_SENT);
    }
    Ok(calls)
}

/// Launches of one step: the sum of repeats. The unit in which an eager engine's host time grows.
#[must_use]
pub fn num_launches(calls: &[OperatorCall]) -> u32 {
    calls.iter().map(|call| call.repeats).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{batch::StepBatch, units::Flops};

    fn calls(model: &str, chunks: &str, decodes: &str, tp: u32) -> Vec<OperatorCall> {
        let shape = StepBatch::parse(chunks, decodes).unwrap().shape();
        forward_pass(&ModelSpec::load(model).unwrap(), &shape, tp).unwrap()
    }

    #[test]
    fn a_dense_step_launches_each_operator_of_the_vocabulary() {
        let qwen = calls("qwen3-0.6b", "", "9", 1);
        let operators: Vec<_> = qwen.iter().map(|c| c.operator).collect();
        assert_eq!(operators, Operator::ALL[..13]);
        // Embedding, LM head, sample, final norm + 28 x (2 norms + 10 others).
        assert_eq!(num_launches(&qwen), 4 + 28 * 12 - 28);
        let llama = calls("llama3-8b", "", "9", 1);
        assert!(llama.iter().all(|c| c.operator != Operator::QkNorm));
    }

    /// The GEMMs of a pass over T tokens cost 2 FLOPs a parameter and token, embedding aside.
    #[test]
    fn gemm_flops_match_the_parameter_count() {
        let model = ModelSpec::load("llama3-8b").unwrap();
        let flops: Flops = calls("llama3-8b", "7:0", "", 1)
            .iter()
            .filter(|c| c.operator.is_gemm() && c.operator != Operator::LmHead)
            .map(|c| Flops(c.shape.flops().0 * u64::from(c.repeats)))
            .sum();
        let embeddings = 2 * u64::from(model.vocab_size) * u64::from(model.hidden_size);
        let norms = (2 * u64::from(model.num_layers) + 1) * u64::from(model.hidden_size);
        assert_eq!(flops.0, 2 * 7 * (model.num_parameters() - embeddings - norms));
    }

    #[test]
    fn tensor_parallelism_splits_work_and_adds_collectives() {
        let one = calls("llama3-8b", "64:0", "100;200", 1);
        let four = calls("llama3-8b", "64:0", "100;200", 4);
        let flops =
            |calls: &[OperatorCall], op| calls.iter().find(|c| c.operator == op).unwrap().shape.flops().0;
        for op in
            [Operator::QkvProj, Operator::Attention, Operator::OProj, Operator::GateUpProj, Operator::LmHead]
        {
            assert_eq!(flops(&one, op), 4 * flops(&four, op), "{op}");
        }
        assert_eq!(four.last().unwrap().operator, Operator::AllReduce);
        let model = ModelSpec::load("llama3-8b").unwrap();
        assert!(forward_pass(&model, &BatchShape::default(), 3).is_err());
    }

    #[test]
    fn layers_are_split_as_vllm_does() {
        let model = |num_layers| ModelSpec { num_layers, ..ModelSpec::load("llama3-8b").unwrap() };
        let layers = |num_layers, size| -> Vec<u32> {
            stages(&model(num_layers), size).unwrap().iter().map(|stage| stage.num_layers).collect()
        };
        assert_eq!(layers(32, 1), [32]);
        assert_eq!(layers(32, 4), [8, 8, 8, 8]);
        // What is left over goes to the middle, then to the first, never to the last.
        assert_eq!(layers(33, 4), [8, 8, 9, 8]);
        assert_eq!(layers(34, 4), [8, 9, 9, 8]);
        assert_eq!(layers(35, 4), [9, 9, 9, 8]);
        assert_eq!(layers(61, 2), [31, 30]);
        assert_eq!(layers(3, 3), [1, 1, 1]);
        assert!(stages(&model(2), 3).is_err() && stages(&model(2), 0).is_err());
    }

    /// The stages together launch what the whole model does, and their sends.
    #[test]
    fn stages_share_the_pass() {
        let model = ModelSpec::load("qwen3-0.6b").unwrap();
        let batch = StepBatch::parse("64:0", "100;200").unwrap().shape();
        let count = |calls: &[OperatorCall], operator| -> u32 {
            calls.iter().filter(|c| c.operator == operator).map(|c| c.repeats).sum()
        };
        for (tp, size) in [(1, 2), (1, 3), (2, 4)] {
            let whole = forward_pass(&model, &batch, tp).unwrap();
            let staged: Vec<_> = stages(&model, size)
                .unwrap()
                .into_iter()
                .flat_map(|stage| stage_pass(&model, &batch, tp, stage).unwrap())
                .collect();
            for operator in Operator::ALL {
                let sent = if operator == Operator::SendRecv { 2 * (size - 1) } else { 0 };
                assert_eq!(count(&staged, operator), count(&whole, operator) + sent, "{operator}");
            }
            let send = staged.iter().find(|c| c.operator == Operator::SendRecv).unwrap();
            assert_eq!(send.shape, OperatorShape::Collective { message_bytes: 66 * 1024 * 2, num_ranks: 2 });
        }
    }
}

//! `mlp.csv`: everything of a layer but attention, by tokens and tensor-parallel size.

use plumbline_schema::{Heads, InputError, Operator, OperatorShape};

use super::{
    Dialect,
    cells::is_missing,
    collect::{Collector, Draft, is_countable},
    tables::{Row, Table, time_column},
};

/// Largest dimension of a model; as in a model's own config.
const MAX_DIMENSION: u64 = 1 << 22;

/// Operators of an `mlp.csv`, in the order of its columns.
pub const SOURCES: [&str; 10] = [
    "emb",
    "input_layernorm",
    "attn_pre_proj",
    "attn_rope",
    "attn_post_proj",
    "post_attention_layernorm",
    "mlp_up_proj",
    "mlp_act",
    "mlp_down_proj",
    "add",
];

/// What decides the shapes of one row of an `mlp.csv`: the model's numbers, split over its GPUs.
#[derive(Clone, Copy, Debug)]
pub struct Keys {
    /// Tokens of the batch.
    pub num_tokens: u32,
    /// Width of the hidden states.
    pub hidden_size: u32,
    /// Heads on one GPU.
    pub heads: Heads,
    /// Width of the MLP on one GPU.
    pub intermediate_size: u32,
    /// Whether the MLP has a gate beside its up projection.
    pub is_gated: bool,
    /// GPUs that the model is split over.
    pub tensor_parallel_size: u32,
}

/// Makes samples of a table.
pub(super) fn take(index: usize, table: &Table, into: &mut Collector) -> Result<(), super::ImportError> {
    if table.times("input_layernorm") && !table.times("add") {
        let reason = "our rms_norm adds the residual, and the table has no `add` to put to it";
        into.leave_out_column(table, "input_layernorm", reason);
        into.leave_out_column(table, "post_attention_layernorm", reason);
    }
    let needed = ["emb", "attn_pre_proj", "attn_rope", "attn_post_proj", "mlp_up_proj", "mlp_down_proj"];
    into.leave_out_missing(table, &needed);
    let mut drafts = Vec::new();
    for row in table.rows() {
        if !into.takes_precision_of(&row) {
            continue;
        }
        let keys = Keys::read(&row)?;
        for draft in drafts_of(&row, keys, table, into)? {
            drafts.push((row, draft));
        }
    }
    into.take_table(index, table, drafts)
}

fn drafts_of(row: &Row, keys: Keys, table: &Table, into: &mut Collector) -> Result<Vec<Draft>, InputError> {
    let Keys { num_tokens, hidden_size, heads, intermediate_size, is_gated, .. } = keys;
    let gemm = |n: u64, k: u64| -> Result<OperatorShape, InputError> {
        Ok(OperatorShape::Gemm { m: num_tokens, n: dimension(row, n)?, k: dimension(row, k)? })
    };
    let (hidden, inner) = (u64::from(hidden_size), u64::from(intermediate_size));
    let qkv_width = heads.q_width() + 2 * heads.kv_width();
    let norm = OperatorShape::RmsNorm { num_tokens, hidden_size };
    let gate_up_width = if is_gated { 2 * inner } else { inner };
    let all: [(Operator, OperatorShape, &'static [&'static str]); 9] = [
        (Operator::Embedding, OperatorShape::Embedding { num_tokens, hidden_size }, &["emb"]),
        // Ours is the sum with the residual and the norm in one kernel.
        (Operator::RmsNorm, norm, &["input_layernorm", "add"]),
        (Operator::QkvProj, gemm(qkv_width, hidden)?, &["attn_pre_proj"]),
        (Operator::Rope, OperatorShape::Rope { num_tokens, heads }, &["attn_rope"]),
        (Operator::OProj, gemm(hidden, heads.q_width())?, &["attn_post_proj"]),
        (Operator::RmsNorm, norm, &["post_attention_layernorm", "add"]),
        (Operator::GateUpProj, gemm(gate_up_width, hidden)?, &["mlp_up_proj"]),
        (Operator::SiluMul, OperatorShape::SiluMul { num_tokens, intermediate_size }, &["mlp_act"]),
        (Operator::DownProj, gemm(hidden, inner)?, &["mlp_down_proj"]),
    ];
    let mut drafts = Vec::with_capacity(all.len());
    for (operator, shape, sources) in all {
        if !sources.iter().all(|source| table.times(source)) {
            continue;
        }
        if !is_countable(&shape) {
            let expected = "a launch that a GPU can hold";
            return Err(row.invalid("num_tokens", expected, format!("{operator} of {:?}", shape.values())));
        }
        if let Some(reason) = not_ours(operator, is_gated) {
            into.leave_out(sources[0], 1, reason);
        } else if is_written_for_one_gpu_only(row, operator, keys, sources, into.dialect) {
            into.leave_out(
                sources[0],
                1,
                "empty, as it is not split over GPUs and stands in the rows of one",
            );
        } else {
            drafts.push(Draft::new(operator, shape, sources));
        }
    }
    Ok(drafts)
}

/// Why a model without a gated MLP has no such operator of ours.
fn not_ours(operator: Operator, is_gated: bool) -> Option<&'static str> {
    match operator {
        Operator::SiluMul if !is_gated => {
            Some("an activation without a gate, which moves other bytes than silu_mul")
        }
        // The models without a gated MLP in these tables (Phi-2) have LayerNorm.
        Operator::RmsNorm if !is_gated => Some("of a model without a gated MLP, whose norm is no RMS norm"),
        _ => None,
    }
}

/// Newer Frontier tables leave the cells of what tensor parallelism does not split empty but for one GPU.
fn is_written_for_one_gpu_only(
    row: &Row,
    operator: Operator,
    keys: Keys,
    sources: &[&str],
    dialect: Dialect,
) -> bool {
    let is_split = !matches!(operator, Operator::Embedding | Operator::RmsNorm);
    let is_empty = |source: &&str| {
        let cells = ["min", "max", "mean", "median", "std"].map(|s| row.text(&time_column(source, s)));
        cells.into_iter().all(|cell| cell.is_none_or(is_missing))
    };
    dialect == Dialect::Frontier && keys.tensor_parallel_size > 1 && !is_split && sources.iter().all(is_empty)
}

/// Whether a row says that it is not of 16-bit floats; tables that say nothing are of those.
pub(super) fn other_precision(row: &Row) -> bool {
    let is_other = |column: &str, known: &[&str]| {
        row.text(column).is_some_and(|text| !known.contains(&text.to_ascii_lowercase().as_str()))
    };
    is_other("profiling_precision", &["", "fp16", "bf16", "float16", "bfloat16"])
        || is_other("quant_signature", &["", "none"])
}

/// The head layout on one GPU and the GPUs, of a table that calls the model's query heads `q_heads_column`.
///
/// # Errors
/// As [`Keys::read`].
pub fn heads(row: &Row, q_heads_column: &str) -> Result<(Heads, u32), InputError> {
    let key = |column: &str| row.whole(column, 1).and_then(|value| dimension_of(row, column, value));
    let (num_q_heads, num_kv_heads) = (key(q_heads_column)?, key("n_kv_head")?);
    let (hidden_size, tp) = (key("n_embd")?, key("num_tensor_parallel_workers")?);
    let divides = |column: &str, value: u32, by: u32, what: &str| {
        if value.is_multiple_of(by) {
            return Ok(value / by);
        }
        Err(row.invalid(column, format!("a divisor of {what} = {value}"), by.to_string()))
    };
    // A table without the column is of a model whose heads fill its hidden size.
    let head_dim = match row.text("head_dim").filter(|text| !is_missing(text)) {
        Some(_) => key("head_dim")?,
        None => divides(q_heads_column, hidden_size, num_q_heads, "n_embd")?,
    };
    let num_q_heads = divides("num_tensor_parallel_workers", num_q_heads, tp, q_heads_column)?;
    // Fewer key and value heads than GPUs are kept once on each.
    let num_kv_heads = if num_kv_heads < tp {
        1
    } else {
        divides("num_tensor_parallel_workers", num_kv_heads, tp, "n_kv_head")?
    };
    Ok((Heads { num_q_heads, num_kv_heads, head_dim }, tp))
}

impl Keys {
    /// Reads and splits them.
    ///
    /// # Errors
    /// `Invalid` with row and column for a number that is none, too large, or that the GPUs do not divide.
    pub fn read(row: &Row) -> Result<Self, InputError> {
        let key = |column: &str| row.whole(column, 1).and_then(|value| dimension_of(row, column, value));
        let (heads, tensor_parallel_size) = heads(row, "n_head")?;
        let inner = key("n_expanded_embd")?;
        if !inner.is_multiple_of(tensor_parallel_size) {
            let expected = format!("a divisor of n_expanded_embd = {inner}");
            let column = "num_tensor_parallel_workers";
            return Err(row.invalid(column, expected, tensor_parallel_size.to_string()));
        }
        Ok(Self {
            num_tokens: key("num_tokens")?,
            hidden_size: key("n_embd")?,
            heads,
            intermediate_size: inner / tensor_parallel_size,
            is_gated: row.flag("use_gated_mlp")?,
            tensor_parallel_size,
        })
    }
}

/// A key as a dimension.
pub(super) fn dimension_of(row: &Row, column: &str, value: u64) -> Result<u32, InputError> {
    u32::try_from(value)
        .ok()
        .filter(|&v| u64::from(v) <= MAX_DIMENSION)
        .ok_or_else(|| row.invalid(column, format!("at most {MAX_DIMENSION}"), value.to_string()))
}

/// A width that follows from several keys.
fn dimension(row: &Row, value: u64) -> Result<u32, InputError> {
    dimension_of(row, "n_embd", value)
}

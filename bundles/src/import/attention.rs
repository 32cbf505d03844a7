//! `attention.csv`: chunks of one sequence, decodes of equal contexts, and the writes of keys and values.

use plumbline_schema::{InputError, Operator, OperatorShape, PrefillChunk, StepBatch};

use super::{
    Clean, Dialect, ImportError,
    cells::{CellFault, is_missing},
    collect::{Collector, Draft, is_countable},
    mlp::{dimension_of, heads},
    tables::{Row, Table, quoted, time_column},
};

/// Most sequences of a row.
const MAX_BATCH_SIZE: u64 = 1 << 16;

const PREFILL: &str = "attn_prefill";
const DECODE: &str = "attn_decode";
const KV_CACHE_SAVE: &str = "attn_kv_cache_save";

/// Makes samples of a table.
pub(super) fn take(index: usize, table: &Table, into: &mut Collector) -> Result<(), ImportError> {
    for source in ["attn_input_reshape", "attn_output_reshape"] {
        into.leave_out_column(table, source, "our kernels read and write the layout as it is");
    }
    into.leave_out_missing(table, &[PREFILL, DECODE, KV_CACHE_SAVE]);
    let mut drafts = Vec::new();
    for row in table.rows() {
        if !into.takes_precision_of(&row) {
            continue;
        }
        if is_mixed(&row) {
            let reason = "their parts are timed apart, and together they are one launch of ours";
            into.leave_out("rows of prefills and decodes, or of unequal lengths", 1, reason);
        } else {
            drafts.extend(drafts_of(&row, table, into)?.into_iter().map(|draft| (row, draft)));
        }
    }
    into.take_table(index, table, drafts)
}

fn drafts_of(row: &Row, table: &Table, into: &mut Collector) -> Result<Vec<Draft>, InputError> {
    let (heads, _) = heads(row, "n_q_head")?;
    let is_prefill = row.flag("is_prefill")?;
    let batch_size = row.whole("batch_size", 1)?;
    if batch_size > MAX_BATCH_SIZE {
        return Err(row.invalid("batch_size", format!("at most {MAX_BATCH_SIZE}"), batch_size.to_string()));
    }
    let context_len = dimension_of(row, "kv_cache_size", row.whole("kv_cache_size", 0)?)?;
    let mut batch = StepBatch::default();
    let (source, idle): (&'static [&'static str], _) = if is_prefill {
        let chunk = dimension_of(row, "prefill_chunk_size", row.whole("prefill_chunk_size", 1)?)?;
        batch.prefill_chunks = vec![PrefillChunk { num_tokens: chunk, context_len }; batch_size as usize];
        (&[PREFILL], DECODE)
    } else {
        batch.decode_contexts = vec![context_len; batch_size as usize];
        (&[DECODE], PREFILL)
    };
    let shape = batch.shape();
    let attention = OperatorShape::Attention { heads, load: shape.attention };
    let write = OperatorShape::KvCacheWrite {
        num_tokens: shape.num_tokens,
        num_kv_heads: heads.num_kv_heads,
        head_dim: heads.head_dim,
    };
    if !(is_countable(&attention) && is_countable(&write)) {
        let found = format!("{batch_size} sequences of {context_len} cached tokens");
        return Err(row.invalid("batch_size", "a launch that a GPU can hold", found));
    }
    let mut drafts = Vec::with_capacity(2);
    if table.times(source[0]) {
        match idle_fault(row, idle, is_prefill, into.dialect) {
            Some(fault) => into.refuse(row, fault),
            None => drafts
                .push(Draft { batch: Some(batch), ..Draft::new(Operator::Attention, attention, source) }),
        }
    }
    if table.times(KV_CACHE_SAVE) {
        let draft = Draft::new(Operator::KvCacheWrite, write, &[KV_CACHE_SAVE]);
        drafts.push(Draft { is_decode: !is_prefill, ..draft });
    }
    Ok(drafts)
}

/// A time of the operator that did not run.
///
/// Vidur leaves its cells empty or writes 0. Newer Frontier tables hold what timing nothing took, which is not read.
fn idle_fault(row: &Row, idle: &str, is_prefill: bool, dialect: Dialect) -> Option<CellFault> {
    if dialect == Dialect::Frontier {
        return None;
    }
    let column = time_column(idle, "median");
    let text = row.text(&column).unwrap_or_default();
    if is_missing(text) || text.parse() == Ok(0.0) {
        return None;
    }
    let is_prefill = if is_prefill { "True" } else { "False" };
    let expected = format!("nothing or 0 in a row with is_prefill = {is_prefill}");
    Some(CellFault { column, expected, found: quoted(text), policy: Clean::DropInvalid })
}

/// Whether a row of newer Frontier tables is of sequences that its keys do not tell.
fn is_mixed(row: &Row) -> bool {
    let says = |column: &str| row.text(column).is_some_and(|text| text.eq_ignore_ascii_case("true"));
    says("is_mixed_batch") || says("is_true_mixed_batch")
}

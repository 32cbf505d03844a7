//! What a step tells the GPU: tokens, positions, cache slots, block tables, and how attention is cut into blocks.
//!
//! All of it lies in one buffer, written by the host and copied at once. Where its parts lie follows from the step's
//! counts alone, so that a recorded graph finds them at the same place again.

use plumbline_profiler::cuda::attention::{AttentionPlan, BLOCK_SIZE};
use plumbline_simulator::kv_cache::BlockId;

/// How a token is drawn from a row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// 1 over the temperature.
    pub inverse_temperature: f32,
    /// Share of the probability that the candidates have; 0 for the largest logit alone.
    pub top_p: f32,
    /// Uniform in [0, 1): what is drawn.
    pub uniform: f32,
}

impl Draw {
    /// The largest logit.
    pub const GREEDY: Self = Self { inverse_temperature: 1.0, top_p: 0.0, uniform: 0.0 };

    /// Whether it is the largest logit, whatever is drawn.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.top_p <= 0.0
    }
}

/// One sequence's part in a step.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// Tokens to compute, at least 1.
    pub tokens: &'a [u32],
    /// Tokens in the cache before them.
    pub context_len: u32,
    /// KV blocks, of `BLOCK_SIZE` tokens each, for context and tokens.
    pub blocks: &'a [BlockId],
    /// Whether it is the decode of one token; all else is a prefill chunk.
    pub is_decode: bool,
    /// How the token after them is drawn; `None` where none is.
    pub draw: Option<Draw>,
}

/// How many of each there are in a step's inputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tokens computed.
    pub tokens: usize,
    /// Tokens drawn.
    pub samples: usize,
    /// Prefill chunks.
    pub chunks: usize,
    /// Blocks of the prefill kernel, in y.
    pub tiles: usize,
    /// Decodes.
    pub decodes: usize,
    /// Splits of decodes.
    pub items: usize,
    /// Entries of a row of the block table.
    pub stride: usize,
}

/// Where each part begins, in bytes from the buffer's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InputLayout {
    /// `[tokens]` int32.
    pub ids: usize,
    /// `[tokens]` int32.
    pub positions: usize,
    /// `[tokens]` int64.
    pub slots: usize,
    /// `[samples]` int32: rows that a token is drawn from.
    pub rows: usize,
    /// `[samples]` of four floats.
    pub draws: usize,
    /// `[chunks]` of four int32.
    pub prefill_seqs: usize,
    /// `[tiles]` of eight int32.
    pub prefill_tiles: usize,
    /// `[decodes]` of four int32.
    pub decode_seqs: usize,
    /// `[items]` of four int32.
    pub decode_items: usize,
    /// `[chunks + decodes, stride]` int32.
    pub block_table: usize,
    /// Bytes of all.
    pub num_bytes: usize,
}

impl InputLayout {
    /// The places for these counts. The block table is the last, so that what is not used of it need not be copied.
    #[must_use]
    pub fn of(counts: &Counts) -> Self {
        let mut next = 0;
        let mut take = |count: usize, bytes: usize| {
            let begin = next;
            // The kernels read vectors of 16 bytes.
            next += (count * bytes).next_multiple_of(16);
            begin
        };
        Self {
            ids: take(counts.tokens, 4),
            positions: take(counts.tokens, 4),
            slots: take(counts.tokens, 8),
            rows: take(counts.samples, 4),
            draws: take(counts.samples, 16),
            prefill_seqs: take(counts.chunks, 16),
            prefill_tiles: take(counts.tiles, 32),
            decode_seqs: take(counts.decodes, 16),
            decode_items: take(counts.items, 16),
            block_table: take((counts.chunks + counts.decodes) * counts.stride, 4),
            num_bytes: next,
        }
    }
}

/// Parts in the order of the kernels, chunks first; each has rows of tokens in this order.
#[must_use]
pub fn in_kernel_order<'a, 'b>(parts: &'b [Part<'a>]) -> Vec<&'b Part<'a>> {
    let chunks = parts.iter().filter(|part| !part.is_decode);
    chunks.chain(parts.iter().filter(|part| part.is_decode)).collect()
}

/// What of the buffer has to be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes from the start on: all but the block table.
    pub num_bytes: usize,
    /// The block table.
    pub table: WrittenRows,
}

/// Rows of which the front is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenRows {
    /// Where the first begins, bytes.
    pub begin: usize,
    /// Bytes from one to the next.
    pub pitch: usize,
    /// Bytes of the longest.
    pub width: usize,
    /// How many.
    pub num_rows: usize,
}

/// Writes a step's inputs at the places of `layout`, which may have room for more than there is: what is left is padding
/// that computes token 0 and keeps nothing.
pub fn write(
    buffer: &mut [u8],
    layout: &InputLayout,
    counts: &Counts,
    parts: &[&Part<'_>],
    plan: &AttentionPlan,
) -> Written {
    let mut writer = Writer { buffer };
    let (mut token, mut sample) = (0, 0);
    for (sequence, part) in parts.iter().enumerate() {
        let row = layout.block_table + 4 * sequence * counts.stride;
        for (place, block) in part.blocks.iter().enumerate() {
            writer.u32(row, place, block.0);
        }
        for (offset, &id) in part.tokens.iter().enumerate() {
            let position = part.context_len + offset as u32;
            let block = part.blocks[(position / BLOCK_SIZE) as usize];
            let slot = i64::from(block.0) * i64::from(BLOCK_SIZE) + i64::from(position % BLOCK_SIZE);
            writer.u32(layout.ids, token, id);
            writer.u32(layout.positions, token, position);
            writer.i64(layout.slots, token, slot);
            token += 1;
        }
        if let Some(Draw { inverse_temperature, top_p, uniform }) = part.draw {
            writer.u32(layout.rows, sample, token as u32 - 1);
            let draw = [inverse_temperature, top_p, uniform, 0.0].map(f32::to_bits);
            writer.u32s(layout.draws, sample, draw);
            sample += 1;
        }
    }
    for place in token..counts.tokens {
        writer.u32(layout.ids, place, 0);
        writer.u32(layout.positions, place, 0);
        writer.i64(layout.slots, place, -1);
    }
    for place in sample..counts.samples {
        writer.u32s(layout.draws, place, [1.0f32.to_bits(), 0, 0, 0]);
    }
    if let Some(prefill) = &plan.prefill {
        prefill.seqs.iter().enumerate().for_each(|(i, seq)| writer.u32s(layout.prefill_seqs, i, *seq));
        prefill.tiles.iter().enumerate().for_each(|(i, tile)| writer.u32s(layout.prefill_tiles, i, *tile));
    }
    if let Some(decode) = &plan.decode {
        decode.seqs.iter().enumerate().for_each(|(i, seq)| writer.u32s(layout.decode_seqs, i, *seq));
        decode.items.iter().enumerate().for_each(|(i, item)| writer.u32s(layout.decode_items, i, *item));
        for place in decode.items.len()..counts.items {
            writer.u32s(layout.decode_items, place, [0; 4]);
        }
    }
    let width = parts.iter().map(|part| part.blocks.len()).max().unwrap_or(0);
    Written {
        num_bytes: layout.block_table,
        table: WrittenRows {
            begin: layout.block_table,
            pitch: 4 * counts.stride,
            width: 4 * width,
            num_rows: parts.len(),
        },
    }
}

struct Writer<'a> {
    buffer: &'a mut [u8],
}

impl Writer<'_> {
    #[inline]
    fn u32(&mut self, part: usize, place: usize, value: u32) {
        let begin = part + 4 * place;
        self.buffer[begin..begin + 4].copy_from_slice(&value.to_ne_bytes());
    }

    #[inline]
    fn i64(&mut self, part: usize, place: usize, value: i64) {
        let begin = part + 8 * place;
        self.buffer[begin..begin + 8].copy_from_slice(&value.to_ne_bytes());
    }

    #[inline]
    fn u32s<const N: usize>(&mut self, part: usize, place: usize, values: [u32; N]) {
        for (i, value) in values.into_iter().enumerate() {
            self.u32(part, N * place + i, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use plumbline_profiler::cuda::attention::{BlockTables, Chip};
    use plumbline_schema::{Heads, StepBatch};

    use super::*;

    fn read(buffer: &[u8], part: usize, count: usize) -> Vec<u32> {
        let bytes = buffer[part..part + 4 * count].chunks_exact(4);
        bytes.map(|bytes| u32::from_ne_bytes(bytes.try_into().unwrap())).collect()
    }

    /// A decode, and a chunk that comes after it in scheduling order, in a buffer with room for more.
    #[test]
    fn chunks_come_first_and_padding_keeps_nothing() {
        let blocks = [3, 9].map(BlockId);
        let other = [5].map(BlockId);
        let decode = Part {
            tokens: &[77],
            context_len: 16,
            blocks: &blocks,
            is_decode: true,
            draw: Some(Draw::GREEDY),
        };
        let chunk =
            Part { tokens: &[11, 12, 13], context_len: 2, blocks: &other, is_decode: false, draw: None };
        let parts = [decode, chunk];
        let parts = in_kernel_order(&parts);
        let batch = StepBatch::parse("3:2", "16").unwrap();
        let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
        let chip = Chip { num_sms: 132, compute_capability: 90 };
        let plan = AttentionPlan::over(&batch, heads, chip, BlockTables::default(), 8);
        let tiles = plan.prefill.as_ref().unwrap().tiles.len();
        let counts = Counts { tokens: 6, samples: 2, chunks: 1, tiles, decodes: 1, items: 8, stride: 4 };
        let layout = InputLayout::of(&counts);
        let mut buffer = vec![0xff; layout.num_bytes];
        let written = write(&mut buffer, &layout, &counts, &parts, &plan);
        assert_eq!(written.num_bytes, layout.block_table);
        let table = WrittenRows { begin: layout.block_table, pitch: 16, width: 8, num_rows: 2 };
        assert_eq!(written.table, table);
        assert_eq!(read(&buffer, layout.ids, 6), [11, 12, 13, 77, 0, 0]);
        assert_eq!(read(&buffer, layout.positions, 6), [2, 3, 4, 16, 0, 0]);
        let slots = read(&buffer, layout.slots, 12);
        assert_eq!(slots, [82, 0, 83, 0, 84, 0, 144, 0, u32::MAX, u32::MAX, u32::MAX, u32::MAX]);
        assert_eq!(read(&buffer, layout.rows, 1), [3]);
        let table = read(&buffer, layout.block_table, 8);
        assert_eq!((table[0], &table[4..6]), (5, &[3, 9][..]));
        let items = read(&buffer, layout.decode_items, 32);
        assert!(items[items.len() - 4..].iter().all(|&number| number == 0));
    }
}

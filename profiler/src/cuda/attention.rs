//! What an attention launch is told about its sequences: block tables, tiles of queries, splits of keys.
//!
//! The kernels read the tables as int32; every number is far below 2^31.

use plumbline_schema::{Heads, StepBatch};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

/// Tokens of a KV block.
pub const BLOCK_SIZE: u32 = 16;
/// Q heads that share a block of the decode kernel.
pub const DECODE_GROUP: u32 = 8;
/// Warps of a block of the decode kernel, each with KV blocks of its own.
const DECODE_WARPS: u32 = 4;
/// Blocks of the decode kernel that a multiprocessor holds.
const DECODE_BLOCKS_PER_SM: u32 = 3;
/// Keys that a prefill kernel for Hopper takes at a time.
const STEP_KEYS: u32 = 128;
/// Fewest steps of a split of a prefill tile: joining costs about as much as two.
const MIN_SPLIT_STEPS: u32 = 6;
/// Most splits of a prefill tile.
const MAX_PREFILL_SPLITS: u32 = 16;
/// Most KV blocks of one split: small enough that uneven sequences still fill the chip.
const MAX_SPLIT_BLOCKS: u64 = 64;

/// Kernels that compute prefill chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefillKernel {
    /// `attention_prefill` with tiles of 64 rows.
    Small,
    /// `attention_prefill` with tiles of 128 rows.
    Large,
    /// `attention_prefill_sm90`, tiles of 128 rows.
    Hopper,
}

impl PrefillKernel {
    /// Query rows of a block.
    #[must_use]
    pub fn tile_rows(self) -> u32 {
        match self {
            Self::Small => 64,
            Self::Large | Self::Hopper => 128,
        }
    }
}

/// What of the GPU decides how attention is cut into blocks.
#[derive(Clone, Copy, Debug)]
pub struct Chip {
    /// Multiprocessors.
    pub num_sms: u32,
    /// Compute capability, times ten.
    pub compute_capability: u32,
}

/// The prefill kernel's work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefillPlan {
    /// First token, tokens, context and 0 of each chunk.
    pub seqs: Vec<[u32; 4]>,
    /// Chunk, first row, first step and past the last step of 128 keys, then first slot, number of items, slot and
    /// group of each block, most keys first. Without splits every block is a tile, and slots and groups are 0.
    pub tiles: Vec<[u32; 8]>,
    /// Slots for the results of splits.
    pub num_slots: u32,
    /// Tiles that are split.
    pub num_groups: u32,
    /// Which kernel.
    pub kernel: PrefillKernel,
}

/// The decode kernel's work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodePlan {
    /// Token, keys, first item and number of items of each sequence.
    pub seqs: Vec<[u32; 4]>,
    /// Sequence, first KV block, past the last KV block and 0 of each split.
    pub items: Vec<[u32; 4]>,
}

/// One step's attention. Tokens of the prefill chunks come first, then the decodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionPlan {
    /// Rows of `q` and `out`.
    pub num_tokens: u32,
    /// KV blocks of the caches.
    pub num_blocks: u32,
    /// Entries of a row of the block table.
    pub table_stride: u32,
    /// A row a sequence, prefill chunks first.
    pub block_table: Vec<u32>,
    /// Chunks, if there are any.
    pub prefill: Option<PrefillPlan>,
    /// Decodes, if there are any.
    pub decode: Option<DecodePlan>,
}

impl AttentionPlan {
    /// Plans a step; blocks are dealt at random, by `seed`.
    #[must_use]
    pub fn new(batch: &StepBatch, heads: Heads, chip: Chip, seed: u64) -> Self {
        let chunks = batch.prefill_chunks.iter().filter(|chunk| chunk.num_tokens > 0);
        let decodes = batch.decode_contexts.iter().map(|context| context.saturating_add(1));
        let lengths: Vec<u32> =
            chunks.map(|chunk| chunk.num_tokens + chunk.context_len).chain(decodes).collect();
        let (block_table, table_stride, num_blocks) = block_table(&lengths, seed);
        let tables = BlockTables { rows: block_table, stride: table_stride, num_blocks };
        Self::over(batch, heads, chip, tables, usize::MAX)
    }

    /// Plans a step over given blocks, with at most `max_items` splits of decodes, but one for each.
    #[must_use]
    pub fn over(batch: &StepBatch, heads: Heads, chip: Chip, tables: BlockTables, max_items: usize) -> Self {
        let chunks = batch.prefill_chunks.iter().filter(|chunk| chunk.num_tokens > 0);
        let chunks: Vec<_> = chunks.map(|chunk| (chunk.num_tokens, chunk.context_len)).collect();
        let decode_lengths: Vec<u32> =
            batch.decode_contexts.iter().map(|context| context.saturating_add(1)).collect();
        let num_prefill_tokens: u32 = chunks.iter().map(|(tokens, _)| tokens).sum();
        Self {
            num_tokens: num_prefill_tokens + decode_lengths.len() as u32,
            num_blocks: tables.num_blocks,
            table_stride: tables.stride,
            block_table: tables.rows,
            prefill: (!chunks.is_empty()).then(|| prefill_plan(&chunks, heads, chip)),
            decode: (!decode_lengths.is_empty())
                .then(|| decode_plan(&decode_lengths, num_prefill_tokens, heads, chip.num_sms, max_items)),
        }
    }
}

/// The KV blocks of a step's sequences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockTables {
    /// Blocks of each sequence, `stride` entries apart, prefill chunks first.
    pub rows: Vec<u32>,
    /// Entries of a row.
    pub stride: u32,
    /// KV blocks of the caches.
    pub num_blocks: u32,
}

/// Deals every sequence the blocks it needs. The rows are padded with block 0 to a multiple of four entries.
fn block_table(lengths: &[u32], seed: u64) -> (Vec<u32>, u32, u32) {
    let blocks: Vec<u32> = lengths.iter().map(|length| length.div_ceil(BLOCK_SIZE)).collect();
    let num_blocks: u32 = blocks.iter().sum();
    let stride = blocks.iter().copied().max().unwrap_or(0).next_multiple_of(4);
    let mut deck: Vec<u32> = (0..num_blocks).collect();
    let mut random = Pcg64Mcg::seed_from_u64(seed);
    for i in (1..deck.len()).rev() {
        deck.swap(i, random.random_range(0..=i));
    }
    let mut table = vec![0; lengths.len() * stride as usize];
    let mut dealt = 0;
    for (row, &count) in table.chunks_mut(stride.max(1) as usize).zip(&blocks) {
        row[..count as usize].copy_from_slice(&deck[dealt..dealt + count as usize]);
        dealt += count as usize;
    }
    (table, stride, num_blocks)
}

fn prefill_plan(chunks: &[(u32, u32)], heads: Heads, chip: Chip) -> PrefillPlan {
    let count_tiles = |rows: u32| chunks.iter().map(|(tokens, _)| tokens.div_ceil(rows)).sum::<u32>();
    // Large tiles read keys half as often, small ones fill the chip when there are few queries.
    let kernel = match chip.compute_capability {
        90 => PrefillKernel::Hopper,
        _ if count_tiles(128) * heads.num_q_heads >= chip.num_sms => PrefillKernel::Large,
        _ => PrefillKernel::Small,
    };
    let rows = kernel.tile_rows();
    let mut plan = PrefillPlan { seqs: Vec::new(), tiles: Vec::new(), num_slots: 0, num_groups: 0, kernel };
    let mut first_token = 0;
    let mut tiles = Vec::new();
    for (seq, &(tokens, context)) in chunks.iter().enumerate() {
        plan.seqs.push([first_token, tokens, context, 0]);
        first_token += tokens;
        tiles.extend((0..tokens.div_ceil(rows)).map(|tile| {
            let row = tile * rows;
            Tile { seq: seq as u32, row, steps: (context + tokens.min(row + rows)).div_ceil(STEP_KEYS) }
        }));
    }
    let share = if kernel == PrefillKernel::Hopper { split_share(&tiles, heads, chip) } else { u32::MAX };
    for tile in &tiles {
        plan.push(tile, share);
    }
    plan.tiles.sort_by_key(|tile| std::cmp::Reverse(tile[3] - tile[2]));
    plan
}

/// Query rows of a chunk that a block takes, and the steps over the keys that they need.
struct Tile {
    seq: u32,
    row: u32,
    steps: u32,
}

/// The shortest share of a tile's steps with which all blocks run at once; the longest tile's when none does.
fn split_share(tiles: &[Tile], heads: Heads, chip: Chip) -> u32 {
    let most = tiles.iter().map(|tile| tile.steps).max().unwrap_or(0).max(1);
    let fits = |&share: &u32| {
        let blocks: u32 = tiles.iter().map(|tile| tile.steps.div_ceil(share)).sum();
        blocks * heads.num_q_heads <= chip.num_sms
    };
    let share = (MIN_SPLIT_STEPS..most).find(fits).unwrap_or(most);
    share.max(most.div_ceil(MAX_PREFILL_SPLITS))
}

impl PrefillPlan {
    /// Adds a tile, cut into even items of at most `share` steps.
    fn push(&mut self, tile: &Tile, share: u32) {
        let items = tile.steps.div_ceil(share);
        let (first_slot, group) = if items > 1 { (self.num_slots, self.num_groups) } else { (0, 0) };
        for item in 0..items {
            let (begin, end) = (tile.steps * item / items, tile.steps * (item + 1) / items);
            self.tiles.push([tile.seq, tile.row, begin, end, first_slot, items, first_slot + item, group]);
        }
        if items > 1 {
            self.num_slots += items;
            self.num_groups += 1;
        }
    }
}

fn decode_plan(
    lengths: &[u32],
    first_token: u32,
    heads: Heads,
    num_sms: u32,
    max_items: usize,
) -> DecodePlan {
    let columns = decode_columns(heads);
    let blocks: Vec<u32> = lengths.iter().map(|length| length.div_ceil(BLOCK_SIZE)).collect();
    let total: u64 = blocks.iter().copied().map(u64::from).sum();
    let whole = (total * u64::from(columns)).div_ceil(decode_capacity(num_sms).max(1));
    let mut fair = (whole.min(MAX_SPLIT_BLOCKS) as u32).next_multiple_of(DECODE_WARPS);
    let count = |fair: u32| blocks.iter().map(|blocks| blocks.div_ceil(fair) as usize).sum::<usize>();
    // Splits twice as long are at most half as many, but for one of each sequence.
    while count(fair) > max_items.max(lengths.len()) {
        fair *= 2;
    }
    let mut seqs = Vec::with_capacity(lengths.len());
    let mut items = Vec::new();
    for (seq, (&length, blocks)) in lengths.iter().zip(blocks).enumerate() {
        let splits = blocks.div_ceil(fair);
        // Even shares, so that no split is a leftover.
        let share = blocks.div_ceil(splits);
        let splits = blocks.div_ceil(share);
        seqs.push([first_token + seq as u32, length, items.len() as u32, splits]);
        items.extend((0..splits).map(|split| {
            let begin = split * share;
            [seq as u32, begin, (begin + share).min(blocks), 0]
        }));
    }
    DecodePlan { seqs, items }
}

/// Blocks of the decode kernel that run at once.
fn decode_capacity(num_sms: u32) -> u64 {
    u64::from(num_sms * DECODE_BLOCKS_PER_SM)
}

/// Splits that fill the chip at once, beside those that each sequence has anyway.
#[must_use]
pub fn decode_items_at_once(heads: Heads, num_sms: u32) -> usize {
    decode_capacity(num_sms).div_ceil(u64::from(decode_columns(heads).max(1))) as usize
}

/// Blocks of the decode kernel side by side for one split.
#[must_use]
pub fn decode_columns(heads: Heads) -> u32 {
    heads.num_kv_heads * (heads.num_q_heads / heads.num_kv_heads).div_ceil(DECODE_GROUP)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };

    fn plan(chunks: &str, decodes: &str) -> AttentionPlan {
        let chip = Chip { num_sms: 132, compute_capability: 80 };
        AttentionPlan::new(&StepBatch::parse(chunks, decodes).unwrap(), HEADS, chip, 7)
    }

    #[test]
    fn every_block_belongs_to_one_place() {
        let plan = plan("100:37;16:0", "0;15;16;700");
        assert_eq!(plan.num_tokens, 120);
        // 9 + 1 blocks of the chunks, 1 + 1 + 2 + 44 of the decodes.
        assert_eq!((plan.num_blocks, plan.table_stride), (58, 44));
        let lengths = [137usize, 16, 1, 16, 17, 701];
        let mut used: Vec<u32> = plan
            .block_table
            .chunks(44)
            .zip(lengths)
            .flat_map(|(row, length)| row[..length.div_ceil(16)].to_vec())
            .collect();
        used.sort_unstable();
        assert_eq!(used, (0..58).collect::<Vec<_>>());
    }

    #[test]
    fn tiles_cover_each_query_once_longest_first() {
        let plan = plan("300:37;16:900", "");
        let prefill = plan.prefill.unwrap();
        assert_eq!(prefill.seqs, [[0, 300, 37, 0], [300, 16, 900, 0]]);
        assert_eq!(prefill.kernel, PrefillKernel::Small);
        assert_eq!(prefill.tiles[0], [1, 0, 0, 8, 0, 1, 0, 0]);
        let rows: Vec<_> = prefill.tiles.iter().filter(|tile| tile[0] == 0).map(|tile| tile[1]).collect();
        assert_eq!(rows, [192, 256, 64, 128, 0]);
        assert!(plan.decode.is_none());
    }

    #[test]
    fn few_queries_over_many_keys_are_split_on_hopper() {
        let chip = Chip { num_sms: 132, compute_capability: 90 };
        let plan = |chunks| AttentionPlan::new(&StepBatch::parse(chunks, "").unwrap(), HEADS, chip, 7);
        let few = plan("64:8192;100:0").prefill.unwrap();
        // Eight blocks a head fit 132 multiprocessors: seven splits of 65 steps, and the short chunk whole.
        let splits: Vec<_> = few.tiles.iter().filter(|tile| tile[0] == 0).collect();
        assert_eq!((splits.len(), few.num_slots, few.num_groups), (7, 7, 1));
        assert_eq!(splits.iter().map(|tile| tile[3] - tile[2]).sum::<u32>(), 65);
        let mut edges: Vec<_> = splits.iter().map(|tile| (tile[2], tile[3], tile[6])).collect();
        edges.sort_unstable();
        assert!(edges.windows(2).all(|pair| pair[0].1 == pair[1].0 && pair[0].2 + 1 == pair[1].2));
        assert_eq!(few.tiles.last().unwrap(), &[1, 0, 0, 1, 0, 1, 0, 0]);
        let many = plan("2048:8192").prefill.unwrap();
        assert_eq!((many.tiles.len(), many.num_slots), (16, 0));
    }

    #[test]
    fn splits_cover_each_key_block_once_and_fill_the_chip() {
        let plan = plan("5:0", "519;519;8191;0");
        let decode = plan.decode.unwrap();
        for (seq, &[token, length, first, count]) in decode.seqs.iter().enumerate() {
            assert_eq!(token, 5 + seq as u32);
            let items = &decode.items[first as usize..(first + count) as usize];
            assert_eq!(items[0][1], 0);
            assert_eq!(items.last().unwrap()[2], length.div_ceil(16));
            assert!(items.windows(2).all(|pair| pair[0][2] == pair[1][1]));
            assert!(items.iter().all(|item| item[0] == seq as u32 && item[1] < item[2]));
        }
        let blocks = decode.items.len() as u32 * decode_columns(HEADS);
        assert!(blocks > 300, "{blocks}");
    }

    #[test]
    fn splits_are_as_few_as_is_asked() {
        let batch = StepBatch::parse("", "519;519;8191;0").unwrap();
        let chip = Chip { num_sms: 132, compute_capability: 80 };
        let count = |max_items| {
            let plan = AttentionPlan::over(&batch, HEADS, chip, BlockTables::default(), max_items);
            plan.decode.unwrap().items.len()
        };
        assert!(count(usize::MAX) > 30);
        for max_items in [30, 17, 9, 5] {
            assert!((4..=max_items).contains(&count(max_items)), "{max_items}");
        }
        assert_eq!(count(1), 4);
    }
}

//! The paged KV cache: which blocks each sequence holds.

use crate::sequence::SequenceId;

/// A KV block; block 0 is the engine's null block and is never handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// Blocks of the KV cache and the sequences that hold them.
///
/// Without prefix caching a block belongs to one sequence. Law: `num_free + num_used = num_blocks`.
#[derive(Clone, Debug)]
pub struct KvCache {
    block_size: u32,
    num_blocks: u32,
    /// Blocks from this id on were never handed out: nothing is allocated for them.
    next_fresh: u32,
    /// Blocks given back; the latest is reused first.
    recycled: Vec<BlockId>,
    /// Block table of each sequence, by id.
    tables: Vec<Vec<BlockId>>,
    num_used: u32,
}

impl KvCache {
    /// An empty cache of `num_gpu_blocks` blocks of `block_size` tokens, as an engine counts them.
    ///
    /// One of them is the null block, which no sequence gets (vLLM 0.24.0, `vllm/v1/core/block_pool.py`),
    /// so [`num_blocks`](Self::num_blocks) is one less. A `block_size` of 0 is taken as 1.
    #[must_use]
    pub fn new(num_gpu_blocks: u32, block_size: u32) -> Self {
        Self {
            block_size: block_size.max(1),
            num_blocks: num_gpu_blocks.saturating_sub(1),
            next_fresh: 1,
            recycled: Vec::new(),
            tables: Vec::new(),
            num_used: 0,
        }
    }

    /// Tokens per block.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Blocks that sequences can hold.
    #[must_use]
    pub fn num_blocks(&self) -> u32 {
        self.num_blocks
    }

    /// Blocks that no sequence holds.
    #[must_use]
    pub fn num_free(&self) -> u32 {
        self.num_blocks + 1 - self.next_fresh + self.recycled.len() as u32
    }

    /// Blocks that sequences hold.
    #[must_use]
    pub fn num_used(&self) -> u32 {
        self.num_used
    }

    /// The blocks of a sequence, in token order; empty when it holds none.
    #[must_use]
    pub fn block_table(&self, sequence: SequenceId) -> &[BlockId] {
        self.tables.get(sequence.index()).map_or(&[], Vec::as_slice)
    }

    /// Blocks that `num_tokens` tokens fill.
    #[must_use]
    pub fn blocks_for(&self, num_tokens: u32) -> u32 {
        num_tokens.div_ceil(self.block_size)
    }

    /// Whether the free blocks, with those the sequence holds, can take `num_tokens` tokens of it.
    #[must_use]
    pub fn can_hold(&self, sequence: SequenceId, num_tokens: u32) -> bool {
        self.missing_blocks(sequence, num_tokens) <= self.num_free()
    }

    /// Gives the sequence the blocks it lacks for `num_tokens` tokens, or none when too few are free.
    ///
    /// Returns whether it now holds enough.
    #[must_use]
    pub fn grow(&mut self, sequence: SequenceId, num_tokens: u32) -> bool {
        let missing = self.missing_blocks(sequence, num_tokens);
        if missing > self.num_free() {
            return false;
        }
        if missing == 0 {
            return true;
        }
        if self.tables.len() <= sequence.index() {
            self.tables.resize_with(sequence.index() + 1, Vec::new);
        }
        let table = &mut self.tables[sequence.index()];
        for _ in 0..missing {
            let block = self.recycled.pop().unwrap_or_else(|| {
                self.next_fresh += 1;
                BlockId(self.next_fresh - 1)
            });
            table.push(block);
        }
        self.num_used += missing;
        true
    }

    /// Takes all blocks of a sequence back.
    pub fn free(&mut self, sequence: SequenceId) {
        let Some(table) = self.tables.get_mut(sequence.index()) else { return };
        self.num_used -= table.len() as u32;
        // Last block first, so that the first is the next to be reused.
        self.recycled.extend(std::mem::take(table).into_iter().rev());
    }

    fn missing_blocks(&self, sequence: SequenceId, num_tokens: u32) -> u32 {
        self.blocks_for(num_tokens).saturating_sub(self.block_table(sequence).len() as u32)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const A: SequenceId = SequenceId(0);
    const B: SequenceId = SequenceId(1);

    #[test]
    fn the_null_block_is_never_handed_out() {
        let mut cache = KvCache::new(4, 16);
        assert_eq!((cache.num_blocks(), cache.num_free()), (3, 3));
        assert!(cache.grow(A, 48));
        assert!(cache.block_table(A).iter().all(|block| *block != BlockId(0)));
        assert!(!cache.grow(B, 1));
    }

    #[test]
    fn a_sequence_grows_by_whole_blocks_and_all_or_nothing() {
        let mut cache = KvCache::new(5, 16);
        assert!(cache.grow(A, 17));
        assert_eq!(cache.num_used(), 2);
        assert!(cache.grow(A, 32), "the second block has room");
        assert_eq!(cache.num_used(), 2);
        assert!(!cache.grow(B, 33), "three blocks are not free");
        assert_eq!(cache.block_table(B), []);
        assert!(cache.can_hold(A, 64) && !cache.can_hold(A, 65));
    }

    #[test]
    fn no_block_has_two_owners_and_freed_blocks_come_back() {
        let mut cache = KvCache::new(9, 4);
        assert!(cache.grow(A, 12) && cache.grow(B, 20));
        let owned: HashSet<_> = cache.block_table(A).iter().chain(cache.block_table(B)).collect();
        assert_eq!(owned.len(), 8);
        cache.free(A);
        assert_eq!((cache.num_free(), cache.num_used()), (3, 5));
        assert!(cache.grow(B, 32));
        let owned: HashSet<_> = cache.block_table(B).iter().collect();
        assert_eq!(owned.len(), 8);
        cache.free(SequenceId(7));
        assert_eq!((cache.num_free(), cache.num_used()), (0, 8));
    }

    #[test]
    fn no_blocks_at_all_hold_nothing() {
        for num_gpu_blocks in [0, 1] {
            let mut cache = KvCache::new(num_gpu_blocks, 16);
            assert_eq!((cache.num_blocks(), cache.num_free()), (0, 0));
            assert!(!cache.grow(A, 1));
        }
    }
}

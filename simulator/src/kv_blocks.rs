//! What can be asked of any KV cache: how many blocks there are, and which each sequence holds.

use std::fmt;

use crate::{
    kv_cache::{BlockId, KvCache},
    sequence::SequenceId,
};

/// The counts and block tables of a KV cache. Law: `num_free + num_used = num_blocks`.
pub trait KvBlocks: fmt::Debug {
    /// Tokens per block, at least 1.
    fn block_size(&self) -> u32;

    /// Blocks that sequences can hold.
    fn num_blocks(&self) -> u32;

    /// Blocks that no unfinished sequence holds; what they still cache is given up for whoever needs them.
    fn num_free(&self) -> u32;

    /// Blocks that unfinished sequences hold, each once, however many share it.
    fn num_used(&self) -> u32;

    /// The blocks of a sequence, in token order; empty when it holds none.
    fn block_table(&self, sequence: SequenceId) -> &[BlockId];

    /// Blocks that `num_tokens` tokens fill.
    fn blocks_for(&self, num_tokens: u32) -> u32 {
        num_tokens.div_ceil(self.block_size())
    }
}

impl KvBlocks for KvCache {
    fn block_size(&self) -> u32 {
        self.block_size()
    }

    fn num_blocks(&self) -> u32 {
        self.num_blocks()
    }

    fn num_free(&self) -> u32 {
        self.num_free()
    }

    fn num_used(&self) -> u32 {
        self.num_used()
    }

    fn block_table(&self, sequence: SequenceId) -> &[BlockId] {
        self.block_table(sequence)
    }
}

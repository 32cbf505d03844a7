//! The paged KV cache: which blocks each sequence holds, and which content free blocks still have.

mod list;
mod prefix;

#[cfg(test)]
mod tests;

use plumbline_schema::WorkloadRequest;

use self::prefix::PrefixCache;
use crate::sequence::SequenceId;

/// A KV block; block 0 is the engine's null block and is never handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

impl BlockId {
    fn index(self) -> usize {
        self.0 as usize
    }
}

/// Cached blocks that begin a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixHit {
    /// Blocks found, from the first on without a gap.
    pub num_blocks: u32,
    /// Those of them that no sequence holds: taking them uses up free blocks.
    pub num_free_blocks: u32,
}

/// Blocks of the KV cache and the sequences that hold them.
///
/// Laws: `num_free + num_used = num_blocks`; without prefix caching a block belongs to one sequence, with it several may
/// hold a block whose content they share.
///
/// With prefix caching, a full block keeps its content when it is freed, until it is handed out again. The order in
/// which free blocks are handed out is that of vLLM 0.24.0 (`vllm/v1/core/block_pool.py`, `BlockPool.free_blocks` and
/// `get_new_blocks`): blocks without content first, the latest freed before all others; then those never used; then
/// those with content, the longest free first and the last block of a sequence before its first.
#[derive(Clone, Debug)]
pub struct KvCache {
    block_size: u32,
    num_blocks: u32,
    /// Blocks from this id on were never handed out: nothing is allocated for them.
    next_fresh: u32,
    /// Free blocks without content; the latest is handed out first.
    recycled: Vec<BlockId>,
    /// Block table of each sequence, by id.
    tables: Vec<Vec<BlockId>>,
    num_used: u32,
    /// What blocks contain; `None` without prefix caching.
    prefix: Option<Box<PrefixCache>>,
}

impl KvCache {
    /// An empty cache of `num_gpu_blocks` blocks of `block_size` tokens, as an engine counts them, that keeps nothing
    /// of what it freed.
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
            prefix: None,
        }
    }

    /// As [`new`](Self::new), with prefix caching.
    #[must_use]
    pub fn with_prefix_caching(num_gpu_blocks: u32, block_size: u32) -> Self {
        Self { prefix: Some(Box::default()), ..Self::new(num_gpu_blocks, block_size) }
    }

    /// Whether freed blocks keep their content.
    #[must_use]
    pub fn has_prefix_caching(&self) -> bool {
        self.prefix.is_some()
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

    /// Blocks that no sequence holds, those with content included.
    #[must_use]
    pub fn num_free(&self) -> u32 {
        self.num_blocks + 1 - self.next_fresh + self.recycled.len() as u32 + self.num_free_with_content()
    }

    /// Blocks that no sequence holds and whose content can still be found; at most as many after a
    /// [`reset`](Self::reset).
    #[must_use]
    pub fn num_free_with_content(&self) -> u32 {
        self.prefix.as_ref().map_or(0, |prefix| prefix.num_free())
    }

    /// Blocks that sequences hold; a shared one counts once.
    #[must_use]
    pub fn num_used(&self) -> u32 {
        self.num_used
    }

    /// The blocks of a sequence, in token order; empty when it holds none.
    #[must_use]
    pub fn block_table(&self, sequence: SequenceId) -> &[BlockId] {
        self.tables.get(sequence.index()).map_or(&[], Vec::as_slice)
    }

    /// Sequences that hold a block.
    #[must_use]
    pub fn num_owners(&self, block: BlockId) -> u32 {
        match &self.prefix {
            Some(prefix) => prefix.num_owners(block),
            None => self.tables.iter().filter(|table| table.contains(&block)).count() as u32,
        }
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

    /// Whether the free blocks can take `num_tokens` tokens of a sequence that holds none and begins with `hit`.
    #[must_use]
    pub fn can_hold_after(&self, hit: PrefixHit, num_tokens: u32) -> bool {
        let missing = self.blocks_for(num_tokens).saturating_sub(hit.num_blocks);
        missing.saturating_add(hit.num_free_blocks) <= self.num_free()
    }

    /// Gives the sequence the blocks it lacks for `num_tokens` tokens, or none when too few are free.
    ///
    /// Returns whether it now holds enough.
    #[must_use]
    #[inline]
    pub fn grow(&mut self, sequence: SequenceId, num_tokens: u32) -> bool {
        // Most often the last block has room; a product is found sooner than a quotient.
        let num_slots = self.block_table(sequence).len() as u64 * u64::from(self.block_size);
        num_slots >= u64::from(num_tokens) || self.hand_out(sequence, num_tokens)
    }

    fn hand_out(&mut self, sequence: SequenceId, num_tokens: u32) -> bool {
        // A decode's next block, most often: one is given sooner than counted.
        if self.prefix.is_none()
            && let Some(table) = self.tables.get_mut(sequence.index())
            && (table.len() as u64 + 1) * u64::from(self.block_size) >= u64::from(num_tokens)
            && let Some(block) = self.recycled.pop()
        {
            table.push(block);
            self.num_used += 1;
            return true;
        }
        let missing = self.missing_blocks(sequence, num_tokens);
        if missing > self.num_free() {
            return false;
        }
        let Self { next_fresh, recycled, tables, num_blocks, prefix, .. } = self;
        let table = table_of(tables, sequence);
        let num_held = table.len();
        let num_recycled = recycled.len().min(missing as usize);
        table.extend(recycled.drain(recycled.len() - num_recycled..).rev());
        let num_fresh = (missing - num_recycled as u32).min(*num_blocks + 1 - *next_fresh);
        table.extend((*next_fresh..*next_fresh + num_fresh).map(BlockId));
        *next_fresh += num_fresh;
        if let Some(prefix) = prefix {
            // Enough are free, so what is left has content.
            while table.len() < num_held + missing as usize {
                table.push(prefix.evict().expect("a free block"));
            }
            table[num_held..].iter().for_each(|&block| prefix.hand_out(block));
        }
        self.num_used += missing;
        true
    }

    /// The longest run of cached blocks with which the first `num_tokens` tokens of a request begin; no more than leave
    /// a token to compute, since the next token comes out of computing the last (vLLM 0.24.0,
    /// `vllm/v1/core/kv_cache_manager.py`, `get_computed_blocks`). Nothing without prefix caching.
    pub fn find_prefix(
        &mut self,
        sequence: SequenceId,
        request: &WorkloadRequest,
        num_tokens: u32,
    ) -> PrefixHit {
        let most_blocks = num_tokens.saturating_sub(1) / self.block_size;
        match &mut self.prefix {
            Some(prefix) => prefix.find(sequence, request, most_blocks, self.block_size),
            None => PrefixHit::default(),
        }
    }

    /// Lets a sequence that holds no blocks hold those that [`find_prefix`](Self::find_prefix) has just found.
    pub fn take_prefix(&mut self, sequence: SequenceId, hit: PrefixHit) {
        let Some(prefix) = &mut self.prefix else { return };
        let table = table_of(&mut self.tables, sequence);
        debug_assert!(table.is_empty(), "only a sequence without blocks begins with cached ones");
        prefix.take(sequence, hit.num_blocks, table);
        self.num_used += hit.num_free_blocks;
    }

    /// Makes the sequence's full blocks among its first `num_tokens` tokens known by their content; nothing without
    /// prefix caching.
    pub fn publish(&mut self, sequence: SequenceId, request: &WorkloadRequest, num_tokens: u32) {
        if let Some(prefix) = &mut self.prefix {
            let table = self.tables.get(sequence.index()).map_or(&[][..], Vec::as_slice);
            prefix.publish(sequence, request, table, num_tokens / self.block_size, self.block_size);
        }
    }

    /// Takes all blocks of a sequence back, and forgets what its tokens are.
    pub fn free(&mut self, sequence: SequenceId) {
        if let Some(prefix) = &mut self.prefix {
            prefix.forget(sequence);
        }
        let Some(table) = self.tables.get_mut(sequence.index()) else { return };
        match &mut self.prefix {
            None => {
                self.num_used -= table.len() as u32;
                // The last block is the next to be handed out.
                self.recycled.append(table);
            }
            Some(prefix) => {
                let num_without_content = self.recycled.len();
                for &block in table.iter().rev() {
                    let Some(has_content) = prefix.release(block) else { continue };
                    self.num_used -= 1;
                    if !has_content {
                        self.recycled.push(block);
                    }
                }
                // The last block is the next to be handed out.
                self.recycled[num_without_content..].reverse();
                table.clear();
            }
        }
    }

    /// Forgets the content of all blocks; false, and nothing is forgotten, while sequences hold some (vLLM 0.24.0,
    /// `vllm/v1/core/block_pool.py`, `reset_prefix_cache`).
    pub fn reset(&mut self) -> bool {
        if self.num_used > 0 {
            return false;
        }
        if let Some(prefix) = &mut self.prefix {
            prefix.reset();
        }
        true
    }

    fn missing_blocks(&self, sequence: SequenceId, num_tokens: u32) -> u32 {
        self.blocks_for(num_tokens).saturating_sub(self.block_table(sequence).len() as u32)
    }
}

fn table_of(tables: &mut Vec<Vec<BlockId>>, sequence: SequenceId) -> &mut Vec<BlockId> {
    if tables.len() <= sequence.index() {
        tables.resize_with(sequence.index() + 1, Vec::new);
    }
    &mut tables[sequence.index()]
}

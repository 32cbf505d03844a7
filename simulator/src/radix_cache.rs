//! A paged KV cache whose prefixes are shared through a radix tree.
//!
//! A block (`SGLang`: a page) is free, in the tree, or held by one sequence alone. A sequence's table begins with blocks
//! of the tree, which it locks, and goes on with its own; what it has computed is handed over to the tree when its
//! prefill and when the sequence itself ends. The rules are those of `SGLang` 0.5.9,
//! `python/sglang/srt/mem_cache/{radix_cache,common}.py` (`cache_unfinished_req`, `cache_finished_req`,
//! `evict_from_tree_cache`).
//!
//! Counts: a cached block that no sequence locks is *free*, since whoever needs it gets it by eviction; *used* are the
//! blocks that unfinished sequences hold or lock, each once, however many share it. Law:
//! `num_free + num_used = num_blocks`, and nothing is used when no sequence is left.

mod tree;

use plumbline_schema::WorkloadRequest;

pub use self::tree::{NodeId, ROOT, RadixTree};
use crate::{kv_blocks::KvBlocks, kv_cache::BlockId, sequence::SequenceId};

/// A prefix of a request that is in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixMatch {
    node: NodeId,
    /// Its length, whole blocks.
    pub num_tokens: u32,
}

/// What a sequence holds.
#[derive(Clone, Debug)]
struct Table {
    blocks: Vec<BlockId>,
    /// The first of them, which are the tree's.
    num_shared: usize,
    /// The node that ends the shared part; locked.
    node: NodeId,
}

impl Default for Table {
    fn default() -> Self {
        Self { blocks: Vec::new(), num_shared: 0, node: ROOT }
    }
}

/// Blocks of the KV cache, the tree of cached prefixes and the sequences' tables.
#[derive(Clone, Debug)]
pub struct RadixCache {
    block_size: u32,
    num_blocks: u32,
    /// Blocks from this id on were never handed out: nothing is allocated for them.
    next_fresh: u32,
    /// Blocks given back or evicted; the latest is reused first.
    recycled: Vec<BlockId>,
    /// `None` when prefixes are not shared.
    tree: Option<RadixTree>,
    tables: Vec<Table>,
    /// Blocks that sequences hold alone.
    num_own: u32,
}

impl RadixCache {
    /// An empty cache of `num_blocks` blocks of `block_size` tokens; without `shares_prefixes` it keeps nothing that
    /// no sequence holds. A `block_size` of 0 is taken as 1.
    #[must_use]
    pub fn new(num_blocks: u32, block_size: u32, shares_prefixes: bool) -> Self {
        let block_size = block_size.max(1);
        Self {
            block_size,
            num_blocks,
            next_fresh: 0,
            recycled: Vec::new(),
            tree: shares_prefixes.then(|| RadixTree::new(block_size)),
            tables: Vec::new(),
            num_own: 0,
        }
    }

    /// Whether prefixes are shared.
    #[must_use]
    pub fn shares_prefixes(&self) -> bool {
        self.tree.is_some()
    }

    /// Blocks that hold nothing, ready to be handed out without eviction.
    #[must_use]
    pub fn num_empty(&self) -> u32 {
        self.num_blocks - self.next_fresh + self.recycled.len() as u32
    }

    /// Cached blocks that no sequence locks.
    #[must_use]
    pub fn num_evictable(&self) -> u32 {
        self.tree.as_ref().map_or(0, RadixTree::num_evictable_blocks)
    }

    /// The longest cached prefix of a request's first `num_tokens` tokens; marks it as just used.
    ///
    /// Good until the next eviction, unless a sequence [takes it up](Self::attach).
    pub fn find(&mut self, request: &WorkloadRequest, num_tokens: u32) -> PrefixMatch {
        let (node, num_tokens) = self.tree.as_mut().map_or((ROOT, 0), |tree| tree.find(request, num_tokens));
        PrefixMatch { node, num_tokens }
    }

    /// Lets a sequence that holds nothing begin with a cached prefix, which stays for as long as it does.
    pub fn attach(&mut self, id: SequenceId, prefix: PrefixMatch) {
        if self.tables.len() <= id.index() {
            self.tables.resize_with(id.index() + 1, Table::default);
        }
        let table = &mut self.tables[id.index()];
        debug_assert!(table.blocks.is_empty(), "a sequence takes up a prefix before anything else");
        if let Some(tree) = &mut self.tree {
            tree.lock(prefix.node);
            tree.blocks_to(prefix.node, &mut table.blocks);
            table.num_shared = table.blocks.len();
            table.node = prefix.node;
        }
    }

    /// Blocks that a sequence lacks for `num_tokens` tokens.
    #[must_use]
    pub fn missing_blocks(&self, id: SequenceId, num_tokens: u32) -> u32 {
        let held = self.tables.get(id.index()).map_or(0, |table| table.blocks.len() as u32);
        self.blocks_for(num_tokens).saturating_sub(held)
    }

    /// Evicts `num_blocks` blocks if fewer are empty (as `SGLang` does: the whole number, not the difference); returns
    /// whether as many are empty then.
    pub fn reserve(&mut self, num_blocks: u32) -> bool {
        if self.num_empty() < num_blocks
            && let Some(tree) = &mut self.tree
        {
            tree.evict(num_blocks, &mut self.recycled);
        }
        self.num_empty() >= num_blocks
    }

    /// Gives a sequence the blocks it lacks for `num_tokens` tokens, evicting where it must, or none when they cannot
    /// be had; returns whether it now holds enough.
    #[must_use]
    pub fn grow(&mut self, id: SequenceId, num_tokens: u32) -> bool {
        let missing = self.missing_blocks(id, num_tokens);
        if missing == 0 {
            return true;
        }
        if !self.reserve(missing) {
            return false;
        }
        if self.tables.len() <= id.index() {
            self.tables.resize_with(id.index() + 1, Table::default);
        }
        let table = &mut self.tables[id.index()];
        for _ in 0..missing {
            let block = self.recycled.pop().unwrap_or_else(|| {
                self.next_fresh += 1;
                BlockId(self.next_fresh - 1)
            });
            table.blocks.push(block);
        }
        self.num_own += missing;
        true
    }

    /// Puts the first `num_tokens` tokens of a sequence, all computed, into the tree, for others to use; the sequence
    /// goes on. Where the tree had them from somebody else, the sequence's own blocks are given back.
    pub fn share(&mut self, id: SequenceId, request: &WorkloadRequest, num_tokens: u32) {
        let num_shared = self.tables.get(id.index()).map_or(0, |table| table.num_shared as u32);
        if self.tree.is_none() || num_tokens < num_shared * self.block_size {
            return;
        }
        let num_shared = self.hand_over(id, request, num_tokens);
        let Some(tree) = &mut self.tree else { return };
        let table = &mut self.tables[id.index()];
        let (node, num_tokens) = tree.find(request, num_tokens);
        debug_assert_eq!(num_tokens / self.block_size, num_shared as u32, "what was just inserted is found");
        tree.lock(node);
        tree.unlock(table.node);
        table.node = node;
        table.num_shared = num_shared;
        let own = table.blocks.split_off(num_shared);
        table.blocks.clear();
        tree.blocks_to(node, &mut table.blocks);
        table.blocks.extend(own);
    }

    /// Takes all blocks of a sequence back; where `kept_tokens` is not 0, so many of its tokens stay in the tree.
    pub fn release(&mut self, id: SequenceId, request: &WorkloadRequest, kept_tokens: u32) {
        if self.tables.get(id.index()).is_none() {
            return;
        }
        let num_handed = if kept_tokens > 0 { self.hand_over(id, request, kept_tokens) } else { 0 };
        let table = std::mem::take(&mut self.tables[id.index()]);
        let own = &table.blocks[table.num_shared.max(num_handed)..];
        self.num_own -= own.len() as u32;
        // Last block first, so that the first is the next to be reused.
        self.recycled.extend(own.iter().rev());
        if let Some(tree) = &mut self.tree {
            tree.unlock(table.node);
        }
    }

    /// Inserts a sequence's tokens; returns how many of its blocks are then the tree's, or freed because the tree had
    /// others with the same tokens.
    fn hand_over(&mut self, id: SequenceId, request: &WorkloadRequest, num_tokens: u32) -> usize {
        let Some(tree) = &mut self.tree else { return 0 };
        let table = &self.tables[id.index()];
        let num_before = (tree.insert(request, num_tokens, &table.blocks) / self.block_size) as usize;
        let num_after = (num_tokens / self.block_size) as usize;
        self.num_own -= num_after.saturating_sub(table.num_shared) as u32;
        let duplicates = &table.blocks[table.num_shared..num_before.max(table.num_shared)];
        self.recycled.extend(duplicates.iter().rev());
        num_after
    }
}

impl KvBlocks for RadixCache {
    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn num_blocks(&self) -> u32 {
        self.num_blocks
    }

    fn num_free(&self) -> u32 {
        self.num_empty() + self.num_evictable()
    }

    fn num_used(&self) -> u32 {
        let num_cached = self.tree.as_ref().map_or(0, RadixTree::num_blocks);
        self.num_own + num_cached - self.num_evictable()
    }

    fn block_table(&self, sequence: SequenceId) -> &[BlockId] {
        self.tables.get(sequence.index()).map_or(&[], |table| &table.blocks)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use plumbline_schema::{Nanos, PromptContent};
    use proptest::prelude::*;

    use super::*;

    const A: SequenceId = SequenceId(0);
    const B: SequenceId = SequenceId(1);

    /// Requests that share their first 10 tokens.
    fn request(id: u64) -> WorkloadRequest {
        let content = PromptContent { prefix_id: Some(1), prefix_len: 10, ..PromptContent::default() };
        WorkloadRequest { content: Some(Arc::new(content)), ..WorkloadRequest::new(id, Nanos(0), 32, 8) }
    }

    fn counts(cache: &RadixCache) -> (u32, u32, u32) {
        assert_eq!(cache.num_free() + cache.num_used(), cache.num_blocks());
        (cache.num_empty(), cache.num_evictable(), cache.num_used())
    }

    #[test]
    fn what_one_computed_the_next_begins_with() {
        let mut cache = RadixCache::new(12, 4, true);
        let none = cache.find(&request(0), 15);
        assert_eq!(none.num_tokens, 0);
        cache.attach(A, none);
        assert!(cache.grow(A, 16));
        assert_eq!(counts(&cache), (8, 0, 4));
        cache.share(A, &request(0), 16);
        assert_eq!(counts(&cache), (8, 0, 4));
        let prefix = cache.find(&request(1), 15);
        assert_eq!(prefix.num_tokens, 8, "two whole blocks of the ten equal tokens");
        cache.attach(B, prefix);
        assert_eq!(cache.block_table(B), &cache.block_table(A)[..2]);
        assert!(cache.grow(B, 16));
        assert_eq!(counts(&cache), (6, 0, 6));
        cache.release(A, &request(0), 18);
        assert_eq!(counts(&cache), (6, 2, 4), "two of A's four blocks are nobody's now");
        cache.release(B, &request(1), 0);
        assert_eq!(counts(&cache), (8, 4, 0));
        assert!(cache.grow(B, 48), "cached blocks are given up");
        assert_eq!(counts(&cache), (0, 0, 12));
    }

    #[test]
    fn tokens_computed_twice_are_kept_once() {
        let mut cache = RadixCache::new(12, 4, true);
        for id in [A, B] {
            cache.attach(id, PrefixMatch { node: ROOT, num_tokens: 0 });
            assert!(cache.grow(id, 16));
        }
        cache.share(A, &request(0), 16);
        cache.share(B, &request(1), 16);
        assert_eq!(cache.block_table(B)[..2], cache.block_table(A)[..2]);
        assert_eq!(counts(&cache), (6, 0, 6));
    }

    #[test]
    fn without_sharing_nothing_is_kept() {
        let mut cache = RadixCache::new(4, 4, false);
        let none = cache.find(&request(0), 15);
        cache.attach(A, none);
        assert!(cache.grow(A, 15) && !cache.grow(A, 17));
        cache.share(A, &request(0), 15);
        cache.release(A, &request(0), 15);
        assert_eq!(counts(&cache), (4, 0, 0));
        cache.release(B, &request(1), 3);
    }

    proptest! {
        /// Whatever sequences do, no block is lost, none is held twice but by sharing, and counts add up.
        #[test]
        fn every_block_is_in_one_place(
            actions in prop::collection::vec((0_usize..6, 0_u8..4, 1_u32..40), 1..60),
            block_size in 1_u32..5,
            shares in any::<bool>(),
        ) {
            let mut cache = RadixCache::new(40, block_size, shares);
            let mut held = [0_u32; 6];
            for (index, action, num_tokens) in actions {
                let (id, request) = (SequenceId(index as u32), request(index as u64));
                match action {
                    0 | 1 if held[index] == 0 => {
                        let prefix = cache.find(&request, num_tokens);
                        cache.attach(id, prefix);
                        held[index] = prefix.num_tokens;
                    }
                    0 | 1 if cache.grow(id, held[index] + num_tokens) => held[index] += num_tokens,
                    2 if held[index] > 0 => cache.share(id, &request, num_tokens.min(held[index])),
                    3 => {
                        cache.release(id, &request, num_tokens.min(held[index]));
                        held[index] = 0;
                    }
                    _ => {}
                }
                counts(&cache);
                let mut owned: Vec<_> = cache.recycled.clone();
                owned.extend(cache.tree.as_ref().map(RadixTree::all_blocks).unwrap_or_default());
                for (table, held) in cache.tables.iter().zip(held) {
                    prop_assert!(table.blocks.len() as u32 >= held.div_ceil(block_size));
                    owned.extend(&table.blocks[table.num_shared..]);
                }
                owned.sort_unstable();
                prop_assert_eq!(owned, (0..cache.next_fresh).map(BlockId).collect::<Vec<_>>());
            }
        }
    }
}

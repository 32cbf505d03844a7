//! Content of blocks, and the free blocks that still have some.
//!
//! The rules are those of vLLM 0.24.0, `vllm/v1/core/block_pool.py` (`BlockHashToBlockMap`, `cache_full_blocks`, `touch`,
//! `free_blocks`) and `vllm/v1/core/single_type_kv_cache_manager.py` (`FullAttentionManager.find_longest_cache_hit`,
//! `cache_blocks`): equal blocks are not made one, since block tables only grow; of several with one content the oldest
//! is found.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

use plumbline_schema::WorkloadRequest;

use super::{
    BlockId, PrefixHit,
    list::{Ends, Links},
};
use crate::{prefix::PrefixHashes, sequence::SequenceId};

/// A block that was handed out at least once.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    num_owners: u32,
    /// The hash of its content and all before it, once it is full.
    content: Option<u64>,
}

/// What is known of a sequence's tokens.
#[derive(Clone, Debug, Default)]
struct Chain {
    /// Content of each full block, as far as asked for.
    contents: Vec<u64>,
    /// Blocks of its table whose content is known.
    num_published: u32,
}

/// The content of all blocks.
#[derive(Clone, Debug)]
pub(super) struct PrefixCache {
    blocks: Vec<Block>,
    /// Free blocks that were freed with content, the longest free first.
    free: Ends,
    free_links: Links,
    num_free: u32,
    /// Blocks by content, the oldest first.
    by_content: HashMap<u64, Ends, BuildHasherDefault<AsItIs>>,
    content_links: Links,
    chains: Vec<Chain>,
}

impl Default for PrefixCache {
    fn default() -> Self {
        Self {
            blocks: Vec::new(),
            free: Ends::EMPTY,
            free_links: Links::default(),
            num_free: 0,
            by_content: HashMap::default(),
            content_links: Links::default(),
            chains: Vec::new(),
        }
    }
}

impl PrefixCache {
    pub fn num_free(&self) -> u32 {
        self.num_free
    }

    pub fn num_owners(&self, block: BlockId) -> u32 {
        self.blocks.get(block.index()).map_or(0, |block| block.num_owners)
    }

    /// Takes the longest free block, which thereby loses its content.
    pub fn evict(&mut self) -> Option<BlockId> {
        let block = self.free.first()?;
        self.free_links.remove(&mut self.free, block);
        self.num_free -= 1;
        self.lose_content(block);
        Some(block)
    }

    /// Gives a free block without content its first owner.
    pub fn hand_out(&mut self, block: BlockId) {
        if self.blocks.len() <= block.index() {
            self.blocks.resize(block.index() + 1, Block::default());
            self.free_links.reach(block);
            self.content_links.reach(block);
        }
        self.blocks[block.index()].num_owners = 1;
    }

    /// The blocks with which the sequence's first `most_blocks` blocks begin.
    pub fn find(
        &mut self,
        sequence: SequenceId,
        request: &WorkloadRequest,
        most_blocks: u32,
        block_size: u32,
    ) -> PrefixHit {
        let mut hit = PrefixHit::default();
        for number in 0..most_blocks {
            // One at a time: where the first is not cached, no other needs to be known.
            let content = chain_of(&mut self.chains, sequence).content(request, number, block_size);
            let Some(block) = self.by_content.get(&content).and_then(|ends| ends.first()) else { break };
            hit.num_blocks += 1;
            hit.num_free_blocks += u32::from(self.blocks[block.index()].num_owners == 0);
        }
        hit
    }

    /// Makes the sequence an owner of the `num_blocks` blocks that `find` has found, and writes them into its table.
    pub fn take(&mut self, sequence: SequenceId, num_blocks: u32, table: &mut Vec<BlockId>) {
        let chain = chain_of(&mut self.chains, sequence);
        chain.num_published = num_blocks;
        for content in &chain.contents[..num_blocks as usize] {
            let block = self.by_content.get(content).and_then(|ends| ends.first()).expect("found before");
            let owners = &mut self.blocks[block.index()].num_owners;
            if *owners == 0 {
                self.free_links.remove(&mut self.free, block);
                self.num_free -= 1;
            }
            *owners += 1;
            table.push(block);
        }
    }

    /// Makes the first `num_blocks` blocks of a table known by their content.
    pub fn publish(
        &mut self,
        sequence: SequenceId,
        request: &WorkloadRequest,
        table: &[BlockId],
        num_blocks: u32,
        block_size: u32,
    ) {
        let chain = chain_of(&mut self.chains, sequence);
        let num_blocks = num_blocks.min(table.len() as u32);
        let first = chain.num_published;
        chain.num_published = first.max(num_blocks);
        for number in first..num_blocks {
            let block = table[number as usize];
            let content = chain.content(request, number, block_size);
            self.blocks[block.index()].content = Some(content);
            let ends = self.by_content.entry(content).or_insert(Ends::EMPTY);
            self.content_links.push_back(ends, block);
        }
    }

    /// Takes one owner from a block; whether it has content, once it has no owner.
    pub fn release(&mut self, block: BlockId) -> Option<bool> {
        let Block { num_owners, content } = &mut self.blocks[block.index()];
        *num_owners -= 1;
        if *num_owners > 0 {
            return None;
        }
        let has_content = content.is_some();
        if has_content {
            self.free_links.push_back(&mut self.free, block);
            self.num_free += 1;
        }
        Some(has_content)
    }

    /// Forgets a sequence's tokens, whose number may be another's next.
    pub fn forget(&mut self, sequence: SequenceId) {
        if let Some(chain) = self.chains.get_mut(sequence.index()) {
            chain.contents.clear();
            chain.num_published = 0;
        }
    }

    /// Forgets all content; the order in which free blocks are handed out stays.
    pub fn reset(&mut self) {
        self.by_content.clear();
        self.blocks.iter_mut().for_each(|block| block.content = None);
    }

    fn lose_content(&mut self, block: BlockId) {
        let Some(content) = self.blocks[block.index()].content.take() else { return };
        let ends = self.by_content.get_mut(&content).expect("every content is listed");
        self.content_links.remove(ends, block);
        if ends.first().is_none() {
            self.by_content.remove(&content);
        }
    }
}

impl Chain {
    /// Content of the sequence's block of that number, of which all before were asked for.
    fn content(&mut self, request: &WorkloadRequest, number: u32, block_size: u32) -> u64 {
        if let Some(&content) = self.contents.get(number as usize) {
            return content;
        }
        let before = self.contents.last().copied().unwrap_or(0);
        let mut hashes = PrefixHashes::resume(request, block_size, number, before);
        let content = hashes.next().expect("a full block of a sequence");
        self.contents.push(content);
        content
    }
}

fn chain_of(chains: &mut Vec<Chain>, sequence: SequenceId) -> &mut Chain {
    if chains.len() <= sequence.index() {
        chains.resize_with(sequence.index() + 1, Chain::default);
    }
    &mut chains[sequence.index()]
}

/// Takes a hash as it is.
#[derive(Clone, Copy, Debug, Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

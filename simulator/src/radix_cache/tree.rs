//! A prefix tree over the content of requests, each edge with the KV blocks of its tokens.
//!
//! The rules are those of `SGLang` 0.5.9, `python/sglang/srt/mem_cache/radix_cache.py`: `match_prefix` and `insert`
//! walk down by the first page of each edge, split an edge where a walk ends inside it and mark all they pass as
//! just used; `inc_lock_ref` and `dec_lock_ref` count on every node up to the root; `evict` takes the least recently
//! used leaf that nobody locks, and then its parent, if that has become such a leaf.
//!
//! `SGLang`'s edges are token arrays. Here tokens are not known, only which are equal
//! ([`WorkloadRequest::content_run`]), so an edge is a list of runs of content streams: its length in memory follows
//! the number of runs, and a comparison takes a step per run.

use std::collections::{BTreeMap, BTreeSet};

use plumbline_schema::{ContentRun, ContentStream, WorkloadRequest};

use crate::kv_cache::BlockId;

/// A node of the tree; good for as long as it is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(u32);

/// The node of the empty prefix; it is never locked or evicted.
pub const ROOT: NodeId = NodeId(0);

/// Content of the first page of an edge, by which a node finds its children.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct PageKey {
    first: ContentStream,
    /// Where the page goes on in another stream. Empty for most, and then nothing is allocated.
    rest: Vec<(u32, ContentStream)>,
}

impl PageKey {
    fn new(start: u32, page_size: u32, run_at: impl Fn(u32) -> ContentRun) -> Self {
        let run = run_at(start);
        let mut key = Self { first: run.stream, rest: Vec::new() };
        let (mut last, mut position) = (run.stream, run.end);
        // Below the end of a prompt and its output, which a u32 holds.
        let end = start.saturating_add(page_size);
        while position < end {
            let run = run_at(position);
            if run.stream != last {
                key.rest.push((position, run.stream));
            }
            (last, position) = (run.stream, run.end);
        }
        key
    }
}

#[derive(Clone, Debug)]
struct Node {
    parent: NodeId,
    /// Position of the edge's first token.
    start: u32,
    /// What the edge's tokens are, from `start` on; the last run ends with the edge.
    runs: Vec<ContentRun>,
    blocks: Vec<BlockId>,
    children: BTreeMap<PageKey, NodeId>,
    num_locks: u32,
    last_use: u64,
}

impl Node {
    fn end(&self) -> u32 {
        self.runs.last().map_or(self.start, |run| run.end)
    }

    fn run_at(&self, position: u32) -> ContentRun {
        self.runs[self.runs.partition_point(|run| run.end <= position)]
    }
}

/// The tree. Lengths are in tokens and cut down to whole pages; counts of blocks are those on its edges.
///
/// A tree without blocks (nothing but empty slices inserted) only compares.
#[derive(Clone, Debug)]
pub struct RadixTree {
    page_size: u32,
    nodes: Vec<Node>,
    vacant: Vec<NodeId>,
    /// Leaves that nobody locks, by their last use.
    evictable: BTreeSet<(u64, NodeId)>,
    /// Counts uses, in place of a clock.
    uses: u64,
    num_blocks: u32,
    num_locked_blocks: u32,
}

impl RadixTree {
    /// A tree of nothing but the empty prefix, with pages of `page_size` tokens, at least 1.
    #[must_use]
    pub fn new(page_size: u32) -> Self {
        let root = Node {
            parent: ROOT,
            start: 0,
            runs: Vec::new(),
            blocks: Vec::new(),
            children: BTreeMap::new(),
            num_locks: 0,
            last_use: 0,
        };
        Self {
            page_size: page_size.max(1),
            nodes: vec![root],
            vacant: Vec::new(),
            evictable: BTreeSet::new(),
            uses: 0,
            num_blocks: 0,
            num_locked_blocks: 0,
        }
    }

    /// Blocks on all edges.
    #[must_use]
    pub fn num_blocks(&self) -> u32 {
        self.num_blocks
    }

    /// Blocks on edges that nobody locks; all of them can be evicted, since whoever locks a node locks those above.
    #[must_use]
    pub fn num_evictable_blocks(&self) -> u32 {
        self.num_blocks - self.num_locked_blocks
    }

    /// The longest prefix of the request's first `num_tokens` tokens in the tree: its node and length in tokens.
    pub fn find(&mut self, request: &WorkloadRequest, num_tokens: u32) -> (NodeId, u32) {
        let end = num_tokens - num_tokens % self.page_size;
        let time = self.next_use();
        let (mut node, mut position) = (ROOT, 0);
        while position < end {
            let key = PageKey::new(position, self.page_size, |at| request.content_run(at));
            let Some(&child) = self.node(node).children.get(&key) else { break };
            self.set_last_use(child, time);
            position = self.common_end(child, request, end);
            if position < self.node(child).end() {
                node = self.split(child, position);
                break;
            }
            node = child;
        }
        (node, position)
    }

    /// Puts the request's first `num_tokens` tokens in, with `blocks` from the first token on, and returns how many
    /// of them were there before; the blocks of those are not taken.
    pub fn insert(&mut self, request: &WorkloadRequest, num_tokens: u32, blocks: &[BlockId]) -> u32 {
        let end = num_tokens - num_tokens % self.page_size;
        let (parent, start) = self.find(request, end);
        if start < end {
            let last_use = self.next_use();
            let (first, last) = ((start / self.page_size) as usize, (end / self.page_size) as usize);
            let blocks = blocks.get(first..last).unwrap_or_default().to_vec();
            self.num_blocks += blocks.len() as u32;
            let key = PageKey::new(start, self.page_size, |at| request.content_run(at));
            let leaf = self.push(Node {
                parent,
                start,
                runs: runs(request, start, end),
                blocks,
                children: BTreeMap::new(),
                num_locks: 0,
                last_use,
            });
            self.change(parent, |node| {
                node.children.insert(key, leaf);
            });
        }
        start
    }

    /// Keeps a node and all above it from being evicted, until as many calls of [`Self::unlock`].
    pub fn lock(&mut self, mut id: NodeId) {
        while id != ROOT {
            self.change(id, |node| node.num_locks += 1);
            let node = self.node(id);
            if node.num_locks == 1 {
                self.num_locked_blocks += node.blocks.len() as u32;
            }
            id = self.node(id).parent;
        }
    }

    /// Takes back one [`Self::lock`].
    pub fn unlock(&mut self, mut id: NodeId) {
        while id != ROOT {
            self.change(id, |node| node.num_locks -= 1);
            let node = self.node(id);
            if node.num_locks == 0 {
                self.num_locked_blocks -= node.blocks.len() as u32;
            }
            id = self.node(id).parent;
        }
    }

    /// Drops the leaves used longest ago, each whole, until at least `num_blocks` blocks are out or no more can be;
    /// their blocks go to `freed`.
    pub fn evict(&mut self, num_blocks: u32, freed: &mut Vec<BlockId>) {
        let enough = freed.len() + num_blocks as usize;
        while freed.len() < enough {
            let Some((_, id)) = self.evictable.pop_first() else { break };
            let node = self.node(id);
            let (parent, start) = (node.parent, node.start);
            let key = PageKey::new(start, self.page_size, |at| node.run_at(at));
            self.num_blocks -= node.blocks.len() as u32;
            freed.append(&mut self.nodes[id.0 as usize].blocks);
            self.vacant.push(id);
            self.change(parent, |node| {
                node.children.remove(&key);
            });
        }
    }

    /// The blocks from the root to a node, in token order, behind those that `table` holds.
    pub fn blocks_to(&self, mut id: NodeId, table: &mut Vec<BlockId>) {
        let mut path = Vec::new();
        while id != ROOT {
            path.push(id);
            id = self.node(id).parent;
        }
        for id in path.into_iter().rev() {
            table.extend_from_slice(&self.node(id).blocks);
        }
    }

    /// Every block of the tree.
    #[cfg(test)]
    pub(super) fn all_blocks(&self) -> Vec<BlockId> {
        self.nodes.iter().flat_map(|node| node.blocks.iter().copied()).collect()
    }

    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    fn next_use(&mut self) -> u64 {
        self.uses += 1;
        self.uses
    }

    fn push(&mut self, node: Node) -> NodeId {
        let id = if let Some(id) = self.vacant.pop() {
            self.nodes[id.0 as usize] = node;
            id
        } else {
            self.nodes.push(node);
            NodeId(self.nodes.len() as u32 - 1)
        };
        self.change(id, |_| {});
        id
    }

    fn set_last_use(&mut self, id: NodeId, time: u64) {
        self.change(id, |node| node.last_use = time);
    }

    /// Changes a node and keeps the list of evictable leaves true.
    fn change(&mut self, id: NodeId, change: impl FnOnce(&mut Node)) {
        let node = &mut self.nodes[id.0 as usize];
        let is_evictable = |node: &Node| id != ROOT && node.num_locks == 0 && node.children.is_empty();
        let before = (is_evictable(node), node.last_use);
        change(node);
        let after = (is_evictable(node), node.last_use);
        if before != after {
            self.evictable.remove(&(before.1, id));
        }
        if after.0 {
            self.evictable.insert((after.1, id));
        }
    }

    /// Where an edge, equal in its first page, and the request's first `end` tokens part, in whole pages.
    fn common_end(&self, id: NodeId, request: &WorkloadRequest, end: u32) -> u32 {
        let node = self.node(id);
        let end = end.min(node.end());
        let mut position = node.start;
        for run in &node.runs {
            while position < run.end.min(end) {
                let theirs = request.content_run(position);
                if theirs.stream != run.stream {
                    return position - (position - node.start) % self.page_size;
                }
                position = theirs.end.min(run.end).min(end);
            }
        }
        position
    }

    /// Cuts an edge in two at a page boundary inside it, and returns the new, upper node.
    fn split(&mut self, lower: NodeId, at: u32) -> NodeId {
        let last_use = self.next_use();
        let page_size = self.page_size;
        let node = &mut self.nodes[lower.0 as usize];
        let key = PageKey::new(node.start, page_size, |position| node.run_at(position));
        let first_below = node.runs.partition_point(|run| run.end <= at);
        let mut runs: Vec<ContentRun> = node.runs.drain(..first_below).collect();
        if runs.last().is_none_or(|run| run.end < at) {
            runs.push(ContentRun { stream: node.runs[0].stream, end: at });
        }
        let num_above = (((at - node.start) / page_size) as usize).min(node.blocks.len());
        let below = node.blocks.split_off(num_above);
        let blocks = std::mem::replace(&mut node.blocks, below);
        let (parent, start, num_locks) = (node.parent, node.start, node.num_locks);
        node.start = at;
        let below_key = PageKey::new(at, page_size, |position| node.run_at(position));
        let children = BTreeMap::from([(below_key, lower)]);
        let upper = self.push(Node { parent, start, runs, blocks, children, num_locks, last_use });
        self.nodes[lower.0 as usize].parent = upper;
        // In the lower node's place, so that the parent stays what it is.
        self.nodes[parent.0 as usize].children.insert(key, upper);
        upper
    }
}

/// The runs of a request's tokens in `start..end`, neighbours of one stream joined.
fn runs(request: &WorkloadRequest, start: u32, end: u32) -> Vec<ContentRun> {
    let mut runs: Vec<ContentRun> = Vec::new();
    let mut position = start;
    while position < end {
        let ContentRun { stream, end: run_end } = request.content_run(position);
        position = run_end.min(end);
        match runs.last_mut() {
            Some(last) if last.stream == stream => last.end = position,
            _ => runs.push(ContentRun { stream, end: position }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use plumbline_schema::{Nanos, PromptContent};
    use proptest::prelude::*;

    use super::*;

    fn request(id: u64, content: PromptContent) -> WorkloadRequest {
        WorkloadRequest { content: Some(Arc::new(content)), ..WorkloadRequest::new(id, Nanos(0), 64, 64) }
    }

    /// A request whose first tokens are a shared prefix, the others its own.
    fn prefixed(id: u64, prefix_len: u32) -> WorkloadRequest {
        request(id, PromptContent { prefix_id: Some(9), prefix_len, ..PromptContent::default() })
    }

    fn blocks(range: std::ops::Range<u32>) -> Vec<BlockId> {
        range.map(BlockId).collect()
    }

    #[test]
    fn a_shared_prefix_is_found_in_whole_pages_and_edges_are_split_there() {
        let mut tree = RadixTree::new(4);
        assert_eq!(tree.find(&prefixed(0, 10), 30), (ROOT, 0));
        assert_eq!(tree.insert(&prefixed(0, 10), 30, &blocks(0..7)), 0, "28 tokens are whole pages");
        assert_eq!(tree.num_blocks(), 7);
        let (node, num_tokens) = tree.find(&prefixed(1, 10), 30);
        assert_eq!(num_tokens, 8, "ten tokens are equal, eight of them in whole pages");
        let mut table = vec![];
        tree.blocks_to(node, &mut table);
        assert_eq!(table, blocks(0..2));
        assert_eq!(tree.insert(&prefixed(1, 10), 16, &blocks(20..24)), 8);
        assert_eq!(tree.num_blocks(), 9);
        let (node, num_tokens) = tree.find(&prefixed(1, 10), 100);
        assert_eq!(num_tokens, 16);
        table.clear();
        tree.blocks_to(node, &mut table);
        assert_eq!(table, [0, 1, 22, 23].map(BlockId));
    }

    #[test]
    fn the_leaf_used_longest_ago_goes_first_and_what_is_locked_stays() {
        let mut tree = RadixTree::new(1);
        for (id, first) in [(0, 0), (1, 10), (2, 20)] {
            tree.insert(&prefixed(id, 3), 5, &blocks(first..first + 5));
        }
        assert_eq!(tree.num_blocks(), 3 + 3 * 2);
        let (locked, _) = tree.find(&prefixed(1, 3), 5);
        tree.lock(locked);
        assert_eq!(tree.num_evictable_blocks(), 4);
        tree.find(&prefixed(0, 3), 5);
        let mut freed = vec![];
        tree.evict(1, &mut freed);
        assert_eq!(freed, blocks(23..25), "request 2's own tokens, whole, though one block was asked for");
        tree.evict(9, &mut freed);
        assert_eq!(freed[2..], blocks(3..5));
        assert_eq!((tree.num_blocks(), tree.num_evictable_blocks()), (5, 0));
        tree.unlock(locked);
        freed.clear();
        tree.evict(9, &mut freed);
        assert_eq!(freed, [13, 14, 0, 1, 2].map(BlockId), "a parent follows its last child");
        assert_eq!(tree.num_blocks(), 0);
    }

    #[test]
    fn a_later_turn_finds_the_output_of_the_one_before() {
        let turn = |id| {
            request(
                id,
                PromptContent {
                    session_id: Some(5),
                    prefix_id: Some(9),
                    prefix_len: 6,
                    ..PromptContent::default()
                },
            )
        };
        let mut tree = RadixTree::new(2);
        tree.insert(&turn(0), 40, &blocks(0..20));
        assert_eq!(tree.find(&turn(1), 63).1, 40);
        assert_eq!(tree.find(&prefixed(7, 6), 63).1, 6);
    }

    /// The first position where two requests' tokens differ.
    fn common(a: &WorkloadRequest, b: &WorkloadRequest, end: u32) -> u32 {
        (0..end).find(|&at| a.content_run(at).stream != b.content_run(at).stream).unwrap_or(end)
    }

    prop_compose! {
        fn contents()(
            session_id in prop::option::of(0_u64..3),
            prefix_id in prop::option::of(0_u64..2),
            prefix_len in 0_u32..20,
            prefix_hashes in prop::collection::vec(0_u64..2, 0..4),
            prefix_hash_tokens in 1_u32..9,
        ) -> PromptContent {
            PromptContent { session_id, prefix_id, prefix_len, prefix_hashes, prefix_hash_tokens }
        }
    }

    proptest! {
        /// What is found is the longest common prefix with anything in the tree, in whole pages; counts add up.
        #[test]
        fn it_finds_what_comparing_with_all_finds(
            inserted in prop::collection::vec((contents(), 1_u32..64), 1..20),
            asked in contents(),
            page_size in 1_u32..6,
            locked in 0_usize..20,
        ) {
            let requests: Vec<_> = inserted.into_iter().zip(0..)
                .map(|((content, len), id)| (request(id, content), len)).collect();
            let mut tree = RadixTree::new(page_size);
            let mut next_block = 0;
            let mut lock = None;
            for (index, (inserted, len)) in requests.iter().enumerate() {
                let pages = len / page_size;
                let longest = |request: &WorkloadRequest, end: u32, before: usize| {
                    let of = |(other, len): &(WorkloadRequest, u32)| {
                        let end = end.min(len - len % page_size);
                        common(request, other, end) / page_size * page_size
                    };
                    requests[..before].iter().map(of).max().unwrap_or(0)
                };
                let found = tree.find(inserted, *len).1;
                prop_assert_eq!(found, longest(inserted, *len, index));
                let there = tree.insert(inserted, *len, &blocks(next_block..next_block + pages));
                prop_assert_eq!(there, found);
                next_block += pages;
                prop_assert_eq!(tree.find(inserted, *len).1, pages * page_size);
                prop_assert_eq!(tree.find(&request(99, asked.clone()), 64).1,
                    longest(&request(99, asked.clone()), 64, index + 1));
                if index == locked {
                    let (node, num_tokens) = tree.find(inserted, *len);
                    tree.lock(node);
                    lock = Some((node, num_tokens / page_size));
                }
                let mut all = tree.all_blocks();
                prop_assert_eq!(all.len(), tree.num_blocks() as usize);
                all.sort_unstable();
                all.dedup();
                prop_assert_eq!(all.len(), tree.num_blocks() as usize, "no block twice");
            }
            let locked = lock.map_or(0, |(_, num_blocks)| num_blocks);
            prop_assert_eq!(tree.num_blocks() - tree.num_evictable_blocks(), locked);
            let mut freed = vec![];
            tree.evict(u32::MAX, &mut freed);
            prop_assert_eq!(tree.num_blocks(), locked);
            if let Some((node, num_blocks)) = lock {
                let mut table = vec![];
                tree.blocks_to(node, &mut table);
                prop_assert_eq!(table.len(), num_blocks as usize);
                tree.unlock(node);
            }
            tree.evict(u32::MAX, &mut freed);
            prop_assert_eq!(tree.num_blocks(), 0);
        }
    }
}

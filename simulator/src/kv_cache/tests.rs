//! Laws of the cache.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    sync::Arc,
};

use plumbline_schema::{ContentStream, Nanos, PromptContent};
use proptest::prelude::*;

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

fn sharing(id: u64, num_prefill_tokens: u32, prefix_id: u64, prefix_len: u32) -> WorkloadRequest {
    let content = PromptContent { prefix_id: Some(prefix_id), prefix_len, ..PromptContent::default() };
    WorkloadRequest {
        content: Some(Arc::new(content)),
        ..WorkloadRequest::new(id, Nanos(0), num_prefill_tokens, 100)
    }
}

/// Blocks of 4: the prefix of 10 fills two whole.
#[test]
fn a_prefix_is_shared_by_whole_blocks_and_stays_when_freed() {
    let mut cache = KvCache::with_prefix_caching(8, 4);
    let (a, b) = (sharing(0, 12, 7, 10), sharing(1, 12, 7, 10));
    assert_eq!(cache.find_prefix(A, &a, 12), PrefixHit::default());
    assert!(cache.grow(A, 12));
    cache.publish(A, &a, 12);
    let hit = cache.find_prefix(B, &b, 12);
    assert_eq!(hit, PrefixHit { num_blocks: 2, num_free_blocks: 0 });
    cache.take_prefix(B, hit);
    assert!(cache.grow(B, 12));
    assert_eq!(cache.block_table(A)[..2], cache.block_table(B)[..2]);
    assert_eq!((cache.num_used(), cache.num_owners(cache.block_table(A)[0])), (4, 2));
    cache.free(A);
    assert_eq!((cache.num_used(), cache.num_free(), cache.num_free_with_content()), (3, 4, 1));
    assert!(!cache.reset(), "B holds blocks");
    cache.free(B);
    // A comes again: all but its last block, of which a token must be computed.
    let hit = cache.find_prefix(A, &a, 12);
    assert_eq!(hit, PrefixHit { num_blocks: 2, num_free_blocks: 2 });
    assert_eq!(cache.find_prefix(A, &a, 13).num_blocks, 3);
    assert!(cache.reset());
    assert_eq!(cache.find_prefix(A, &a, 13), PrefixHit::default());
}

#[test]
fn hits_of_free_blocks_use_up_free_blocks() {
    let mut cache = KvCache::with_prefix_caching(4, 4);
    let a = sharing(0, 8, 7, 8);
    assert!(cache.grow(A, 8));
    cache.publish(A, &a, 8);
    cache.free(A);
    let hit = cache.find_prefix(A, &a, 13);
    assert_eq!(hit.num_free_blocks, 2);
    assert!(cache.can_hold_after(hit, 12) && !cache.can_hold_after(hit, 13));
}

/// A cache written down plainly: one queue of free blocks, and whole token lists for contents.
#[derive(Default)]
struct Plain {
    queue: VecDeque<BlockId>,
    tables: BTreeMap<SequenceId, Vec<BlockId>>,
    num_published: BTreeMap<SequenceId, usize>,
    owners: BTreeMap<BlockId, usize>,
    /// Blocks with the tokens up to their end, the oldest first.
    contents: Vec<(BlockId, Vec<(ContentStream, u32)>)>,
}

fn tokens(request: &WorkloadRequest, num_tokens: usize) -> Vec<(ContentStream, u32)> {
    (0..num_tokens as u32).map(|position| (request.content_run(position).stream, position)).collect()
}

impl Plain {
    fn found(&self, request: &WorkloadRequest, num_tokens: u32) -> Vec<BlockId> {
        let most = num_tokens.saturating_sub(1) as usize / SIZE;
        let block = |i: usize| {
            let wanted = tokens(request, (i + 1) * SIZE);
            self.contents.iter().find(|(_, content)| *content == wanted).map(|(block, _)| *block)
        };
        (0..most).map_while(block).collect()
    }

    fn take(&mut self, id: SequenceId, blocks: &[BlockId]) {
        for block in blocks {
            self.queue.retain(|free| free != block);
            *self.owners.entry(*block).or_default() += 1;
        }
        self.num_published.insert(id, blocks.len());
        self.tables.insert(id, blocks.to_vec());
    }

    fn grow(&mut self, id: SequenceId, num_tokens: usize) -> bool {
        let table = self.tables.entry(id).or_default();
        let missing = num_tokens.div_ceil(SIZE).saturating_sub(table.len());
        if missing > self.queue.len() {
            return false;
        }
        for block in self.queue.drain(..missing) {
            self.contents.retain(|(with, _)| *with != block);
            self.owners.insert(block, 1);
            table.push(block);
        }
        true
    }

    fn publish(&mut self, id: SequenceId, request: &WorkloadRequest, num_tokens: usize) {
        let first = self.num_published.entry(id).or_default();
        for i in *first..num_tokens / SIZE {
            self.contents.push((self.tables[&id][i], tokens(request, (i + 1) * SIZE)));
            *first += 1;
        }
    }

    fn free(&mut self, id: SequenceId) {
        self.num_published.remove(&id);
        let mut without = Vec::new();
        for block in self.tables.remove(&id).unwrap_or_default().into_iter().rev() {
            let owners = self.owners.get_mut(&block).unwrap();
            *owners -= 1;
            if *owners > 0 {
                continue;
            }
            if self.contents.iter().any(|(with, _)| *with == block) {
                self.queue.push_back(block);
            } else {
                without.push(block);
            }
        }
        for block in without.into_iter().rev() {
            self.queue.push_front(block);
        }
    }
}

const SIZE: usize = 4;

#[derive(Clone, Debug)]
enum Act {
    /// Goes on by so many tokens, or begins.
    Compute(u32, u32),
    Free(u32),
    Reset,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        12 => (0..6_u32, 1..14_u32).prop_map(|(id, tokens)| Act::Compute(id, tokens)),
        3 => (0..6_u32).prop_map(Act::Free),
        1 => Just(Act::Reset),
    ];
    prop::collection::vec(act, 1..150)
}

/// Requests of which some share prefixes, conversations and hashed blocks.
fn requests() -> impl Strategy<Value = Vec<WorkloadRequest>> {
    let content = (0..4, 0..2_u64, 0..24_u32).prop_map(|(kind, number, prefix_len)| {
        let content = match kind {
            0 => return None,
            1 => PromptContent { prefix_id: Some(number), prefix_len, ..PromptContent::default() },
            2 => PromptContent { session_id: Some(number), ..PromptContent::default() },
            _ => PromptContent {
                prefix_hashes: vec![9, number, 5],
                prefix_hash_tokens: 6,
                ..PromptContent::default()
            },
        };
        Some(Arc::new(content))
    });
    prop::collection::vec((content, 1..30_u32), 6).prop_map(|requests| {
        let of = |(id, (content, prompt))| WorkloadRequest {
            content,
            ..WorkloadRequest::new(id, Nanos(0), prompt, 100)
        };
        (0..).zip(requests).map(of).collect()
    })
}

proptest! {
    /// Block by block the plainly written cache: what is shared, found, evicted and handed out next.
    #[test]
    fn every_block_is_that_of_the_plain_cache(
        num_blocks in 1..16_u32,
        requests in requests(),
        acts in acts(),
    ) {
        let mut cache = KvCache::with_prefix_caching(num_blocks + 1, SIZE as u32);
        let mut plain = Plain { queue: (1..=num_blocks).map(BlockId).collect(), ..Plain::default() };
        let mut lengths = [0_u32; 6];
        for act in acts {
            match act {
                Act::Compute(number, more) => {
                    let (id, request) = (SequenceId(number), &requests[number as usize]);
                    let length = &mut lengths[number as usize];
                    let known = *length + more;
                    if *length == 0 {
                        let hit = cache.find_prefix(id, request, known);
                        let found = plain.found(request, known);
                        let num_free = found.iter().filter(|block| plain.queue.contains(block)).count();
                        prop_assert_eq!((hit.num_blocks, hit.num_free_blocks), (found.len() as u32, num_free as u32));
                        let missing = known.div_ceil(SIZE as u32) - hit.num_blocks;
                        prop_assert_eq!(
                            cache.can_hold_after(hit, known),
                            missing as usize + num_free <= plain.queue.len()
                        );
                        if !cache.can_hold_after(hit, known) {
                            continue;
                        }
                        cache.take_prefix(id, hit);
                        plain.take(id, &found);
                    }
                    let has_room = cache.grow(id, known);
                    prop_assert_eq!(has_room, plain.grow(id, known as usize));
                    if has_room {
                        cache.publish(id, request, known);
                        plain.publish(id, request, known as usize);
                        *length = known;
                    }
                }
                Act::Free(number) => {
                    cache.free(SequenceId(number));
                    plain.free(SequenceId(number));
                    lengths[number as usize] = 0;
                }
                Act::Reset => {
                    let is_idle = lengths.iter().all(|&length| length == 0);
                    prop_assert_eq!(cache.reset(), is_idle);
                    if is_idle {
                        plain.contents.clear();
                    }
                }
            }
            let none = Vec::new();
            for number in 0..6 {
                let id = SequenceId(number);
                prop_assert_eq!(cache.block_table(id), plain.tables.get(&id).unwrap_or(&none).as_slice());
            }
            for (&block, &owners) in &plain.owners {
                prop_assert_eq!(cache.num_owners(block) as usize, owners);
            }
            prop_assert_eq!(cache.num_free() as usize, plain.queue.len());
            prop_assert_eq!(cache.num_free() + cache.num_used(), num_blocks);
        }
    }
}

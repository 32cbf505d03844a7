//! Laws of the cache.

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

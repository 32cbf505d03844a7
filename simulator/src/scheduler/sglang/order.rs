//! `SGLang`'s order of the waiting queue: the longest cached prefix first.

use std::collections::VecDeque;

use crate::{
    radix_cache::{RadixCache, RadixTree},
    sequence::{SequenceId, Sequences},
};

/// Waiting requests above which the queue stays as it is, since comparing takes too long.
const MAX_ORDERED: usize = 128;

/// Up to so many cached tokens a request is compared with the others that wait
/// (`IN_BATCH_PREFIX_CACHING_CHECK_THRESHOLD`).
const FEW_CACHED_TOKENS: u32 = 32;

/// From so many tokens in common on, the later of two waiting requests is put back
/// (`IN_BATCH_PREFIX_CACHING_DEPRIORITIZE_THRESHOLD`).
const MANY_COMMON_TOKENS: u32 = 32;

/// Sorts the queue by the length of the cached prefix, longest first; equals stay in their order.
///
/// A request with next to nothing cached, whose prefix one before it in the queue shares, goes to the end: once the
/// other has been computed, this one finds it cached.
pub(super) fn by_longest_prefix(
    waiting: &mut VecDeque<SequenceId>,
    sequences: &Sequences,
    cache: &mut RadixCache,
) {
    if !cache.shares_prefixes() || waiting.len() > MAX_ORDERED {
        return;
    }
    let mut others = RadixTree::new(1);
    let mut keyed: Vec<(u32, SequenceId)> = Vec::with_capacity(waiting.len());
    for &id in &*waiting {
        let (request, num_tokens) = (sequences.request(id), sequences[id].num_tokens());
        let num_cached = cache.find(request, num_tokens).num_tokens;
        let mut is_put_back = false;
        if num_cached <= FEW_CACHED_TOKENS {
            is_put_back = others.find(request, num_tokens).1 >= MANY_COMMON_TOKENS;
            if !is_put_back {
                others.insert(request, num_tokens, &[]);
            }
        }
        keyed.push((if is_put_back { 0 } else { num_cached + 1 }, id));
    }
    keyed.sort_by_key(|&(key, _)| std::cmp::Reverse(key));
    waiting.clear();
    waiting.extend(keyed.into_iter().map(|(_, id)| id));
}

//! What every policy does alike: refusing what can never fit, decoding on, and letting finished sequences go.

use plumbline_schema::WorkloadRequest;

use super::{Rejection, ScheduledStep, Steady};
use crate::{
    kv_cache::KvCache,
    sequence::{SequenceId, Sequences},
};

/// Refuses a request that no empty engine could serve to its end.
///
/// # Errors
/// When prompt and output exceed `max_model_len`, or the tokens to be cached exceed the whole cache.
pub(super) fn check_servable(
    request: &WorkloadRequest,
    max_model_len: u32,
    kv_cache: &KvCache,
) -> Result<(), Rejection> {
    let num_tokens = u64::from(request.num_prefill_tokens) + u64::from(request.num_decode_tokens);
    if num_tokens > u64::from(max_model_len) {
        return Err(Rejection::LongerThanModelLen { num_tokens, max_model_len });
    }
    // The last output token is never fed back, so it is never cached. Below 2^32, as checked above.
    let num_cached = num_tokens.saturating_sub(1) as u32;
    if kv_cache.blocks_for(num_cached) > kv_cache.num_blocks() {
        return Err(Rejection::LargerThanKvCache {
            num_tokens: u64::from(num_cached),
            num_blocks: kv_cache.num_blocks(),
            block_size: kv_cache.block_size(),
        });
    }
    Ok(())
}

/// The steps in which all of `running` decode, up to the one before the first ends; none when one is not decoding
/// or the free blocks may not last.
///
/// The policy itself has made sure that it would form no other steps: nothing that waits can be let in, and the
/// budget holds a token of each.
pub(super) fn steady_decodes(
    running: &[SequenceId],
    sequences: &Sequences,
    kv_cache: &KvCache,
) -> Option<Steady> {
    if running.is_empty() {
        return None;
    }
    let mut num_steps = u32::MAX;
    for &id in running {
        let sequence = &sequences[id];
        if !sequence.is_decoding() {
            return None;
        }
        num_steps = num_steps.min(sequence.num_remaining_tokens() - 1);
    }
    // Each sequence may need a block more than its share of whole ones.
    let blocks_each = kv_cache.num_free() / running.len() as u32;
    let num_steps = num_steps.min(blocks_each.saturating_sub(1).saturating_mul(kv_cache.block_size()));
    Steady::of(num_steps, running.iter().map(|&id| &sequences[id]))
}

/// Lets all of `running` decode `num_steps` tokens, as [`steady_decodes`] has found possible.
pub(super) fn advance_decodes(
    running: &[SequenceId],
    sequences: &mut Sequences,
    kv_cache: &mut KvCache,
    num_steps: u32,
) {
    for &id in running {
        let sequence = &mut sequences[id];
        sequence.num_computed_tokens += num_steps;
        sequence.num_output_tokens += num_steps;
        let has_room = kv_cache.grow(id, sequence.num_computed_tokens);
        debug_assert!(has_room, "promised steps have blocks");
    }
}

/// Gives each sequence that a step computed to its end its token; those that are done leave `running`, the cache and
/// `sequences`, in the step's order, into `finished`.
pub(super) fn complete_step(
    step: &ScheduledStep,
    running: &mut Vec<SequenceId>,
    sequences: &mut Sequences,
    kv_cache: &mut KvCache,
    finished: &mut Vec<SequenceId>,
) {
    finished.clear();
    for scheduled in step.sequences.iter().filter(|s| s.samples) {
        let sequence = &mut sequences[scheduled.id];
        sequence.num_output_tokens += 1;
        sequence.num_in_flight_tokens = sequence.num_in_flight_tokens.saturating_sub(1);
        if sequence.num_output_tokens >= sequence.max_output_tokens {
            kv_cache.free(scheduled.id);
            sequences.remove(scheduled.id);
            finished.push(scheduled.id);
        }
    }
    if !finished.is_empty() {
        // Few finish in one step, so a scan beats a set.
        running.retain(|id| !finished.contains(id));
    }
}

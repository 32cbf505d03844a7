//! What every policy does alike: refusing what can never fit, decoding on, and letting finished sequences go.

use plumbline_schema::{AttentionLoad, Deployment, WorkloadRequest};

use super::{Rejection, ScheduledSequence, ScheduledStep, SchedulerError, SchedulerKind, Steady};
use crate::{
    kv_cache::KvCache,
    sequence::{SequenceId, Sequences},
};

/// Refuses a deployment out of range, or with a key (what it is, and the one value that is modelled) set otherwise.
///
/// # Errors
/// Names the first such key.
pub(super) fn check_deployment<const N: usize>(
    deployment: &Deployment,
    scheduler: SchedulerKind,
    modelled: [(&'static str, String, &'static str); N],
) -> Result<(), SchedulerError> {
    deployment.check().map_err(|(key, expected, found)| SchedulerError::Invalid { key, expected, found })?;
    for (key, value, supported) in modelled {
        if value != supported {
            return Err(SchedulerError::Unsupported { scheduler, key, value, supported });
        }
    }
    Ok(())
}

/// Refuses a request that no empty engine could serve to its end.
///
/// # Errors
/// When prompt and output exceed `max_model_len`, or the tokens to be cached exceed the whole cache.
pub(super) fn check_servable(
    request: &WorkloadRequest,
    max_model_len: u32,
    kv_cache: &KvCache,
) -> Result<(), Rejection> {
    let num_tokens = check_model_len(request, max_model_len)?;
    // The last output token is never fed back, so it is never cached.
    check_cache(num_tokens.saturating_sub(1), kv_cache.num_blocks(), kv_cache.block_size())
}

/// Refuses a request whose prompt and output exceed `max_model_len`; returns how many tokens they are.
pub(super) fn check_model_len(request: &WorkloadRequest, max_model_len: u32) -> Result<u32, Rejection> {
    let num_tokens = u64::from(request.num_prefill_tokens) + u64::from(request.num_decode_tokens);
    if num_tokens > u64::from(max_model_len) {
        return Err(Rejection::LongerThanModelLen { num_tokens, max_model_len });
    }
    Ok(num_tokens as u32)
}

/// Refuses a request of which `num_tokens` have to be in the cache at once, where they need more than `num_blocks`.
pub(super) fn check_cache(num_tokens: u32, num_blocks: u32, block_size: u32) -> Result<(), Rejection> {
    if num_tokens.div_ceil(block_size) > num_blocks {
        let num_tokens = u64::from(num_tokens);
        return Err(Rejection::LargerThanKvCache { num_tokens, num_blocks, block_size });
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
    // Each sequence may need a block more than its share of whole ones.
    let blocks_each = kv_cache.num_free() / (running.len() as u32).max(1);
    let max_steps = blocks_each.saturating_sub(1).saturating_mul(kv_cache.block_size());
    steady_decodes_at_most(max_steps, running, sequences)
}

/// As [`steady_decodes`], where the blocks last for `max_steps`.
pub(super) fn steady_decodes_at_most(
    max_steps: u32,
    running: &[SequenceId],
    sequences: &Sequences,
) -> Option<Steady> {
    if running.is_empty() {
        return None;
    }
    let (mut num_steps, mut load) = (max_steps, AttentionLoad::default());
    // The youngest is the likeliest not to decode yet.
    for &id in running.iter().rev() {
        let sequence = &sequences[id];
        if num_steps == 0 || !sequence.is_decoding() {
            return None;
        }
        num_steps = num_steps.min(sequence.num_remaining_tokens() - 1);
        load.add_decode(sequence.num_computed_tokens);
    }
    (num_steps > 0).then_some(Steady { num_steps, load })
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
        // After a preemption the last chunk may be of one token, as a decode is.
        sequence.is_prefilling = false;
        let has_room = kv_cache.grow(id, sequence.num_computed_tokens);
        debug_assert!(has_room, "promised steps have blocks");
    }
}

/// Takes a step's sequences out of flight, and gives each that it computed to its end its token; those that are done
/// leave `running`, the cache and `sequences`, in the step's order, into `finished`.
pub(super) fn complete_step(
    step: &ScheduledStep,
    running: &mut Vec<SequenceId>,
    sequences: &mut Sequences,
    kv_cache: &mut KvCache,
    finished: &mut Vec<SequenceId>,
) {
    finished.clear();
    let mut is_any_done = false;
    for scheduled in &step.sequences {
        let sequence = &mut sequences[scheduled.id];
        let num_tokens = u32::from(scheduled.samples);
        sequence.is_in_flight = false;
        sequence.num_output_tokens += num_tokens;
        sequence.num_in_flight_tokens = sequence.num_in_flight_tokens.saturating_sub(num_tokens);
        is_any_done |= scheduled.samples && sequence.is_done();
    }
    if !is_any_done {
        return;
    }
    // One that is done may still be in a later step that makes nothing of it.
    for &ScheduledSequence { id, samples, .. } in &step.sequences {
        if samples && sequences[id].is_done() {
            kv_cache.free(id);
            sequences.remove(id);
            finished.push(id);
        }
    }
    // Few finish in one step, so a scan beats a set.
    running.retain(|id| !finished.contains(id));
}

//! Sets of sequences at which attention is measured.

use std::collections::HashSet;

use plumbline_schema::{PrefillChunk, StepBatch};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use super::Envelope;

/// Batches drawn at random, so that what lies between the grids is seen too.
const NUM_RANDOM: usize = 96;

/// Every batch within the envelope whose sequences are at most `max_len` long, each once, in a fixed order.
pub(super) fn of(envelope: &Envelope, max_len: u32) -> Vec<StepBatch> {
    let mut batches = equal_decodes();
    batches.extend(skewed_decodes());
    batches.extend(single_chunks());
    batches.extend(several_chunks());
    batches.extend(mixed());
    batches.extend(random(envelope, max_len));
    batches.extend(extremes(envelope, max_len));
    let mut seen = HashSet::new();
    batches.retain(|batch| fits(batch, envelope, max_len) && seen.insert(batch.clone()));
    batches
}

pub(super) fn fits(batch: &StepBatch, envelope: &Envelope, max_len: u32) -> bool {
    let shape = batch.shape();
    let load = shape.attention;
    let chunk_fits = |c: &PrefillChunk| c.num_tokens.saturating_add(c.context_len) <= max_len;
    shape.num_seqs > 0
        && shape.num_seqs <= envelope.max_num_seqs
        && shape.num_tokens <= envelope.max_num_tokens
        && load.prefill_kv_tokens + load.decode_kv_tokens <= envelope.max_kv_tokens
        && batch.prefill_chunks.iter().all(chunk_fits)
        && batch.decode_contexts.iter().all(|&context| context < max_len)
}

/// The batches that ask the most of attention: between them they reach the largest value of each of its numbers that any
/// batch within the envelope can, with sequences of at most `max_len`.
pub(super) fn extremes(envelope: &Envelope, max_len: u32) -> Vec<StepBatch> {
    let max_keys = u32::try_from(envelope.max_kv_tokens).unwrap_or(u32::MAX);
    let max_seqs = envelope.max_num_seqs.min(envelope.max_num_tokens).min(max_keys);
    let longest = max_len.min(max_keys);
    if max_seqs == 0 || longest == 0 {
        return Vec::new();
    }
    // As many keys as there may be, dealt evenly; then all tokens in as many chunks as there may be.
    let num_keys = max_keys.min(max_seqs.saturating_mul(longest));
    let num_tokens = envelope.max_num_tokens.min(num_keys);
    let prompts = even(num_tokens, max_seqs).map(|num_tokens| PrefillChunk { num_tokens, context_len: 0 });
    vec![
        decodes(even(num_keys, max_seqs).map(|keys| keys - 1).collect()),
        decodes(vec![longest - 1]),
        StepBatch { prefill_chunks: prompts.collect(), decode_contexts: Vec::new() },
        most_prefill_keys(num_tokens, num_keys, max_seqs),
        most_prefill_pairs(num_tokens, num_keys, max_seqs, longest),
    ]
}

/// `total` in `count` parts that differ by at most 1, larger ones first.
fn even(total: u32, count: u32) -> impl Iterator<Item = u32> {
    (0..count).map(move |i| total / count + u32::from(i < total % count))
}

/// As many keys as there may be, dealt evenly to as many chunks as there may be.
fn most_prefill_keys(num_tokens: u32, num_keys: u32, num_seqs: u32) -> StepBatch {
    let pairs: Vec<_> = even(num_tokens, num_seqs)
        .zip(even(num_keys, num_seqs))
        .map(|(tokens, keys)| (tokens, keys - tokens))
        .collect();
    chunks(&pairs)
}

/// The chunks with the most query-key pairs.
///
/// `t` tokens at the end of `l` keys make `t l - t (t - 1) / 2` pairs. So keys go to sequences as long as there may be,
/// what is left to one more; and tokens to where the next one has the most keys before it: evenly to the long ones, and to
/// the short one what they have more than it lacks.
fn most_prefill_pairs(num_tokens: u32, num_keys: u32, max_seqs: u32, longest: u32) -> StepBatch {
    let num_long = (num_keys / longest).min(max_seqs).min(num_tokens);
    let rest = if num_long < max_seqs { (num_keys - num_long * longest).min(longest) } else { 0 };
    let lacking = longest - rest;
    let of_rest = match num_tokens.checked_sub(num_long.saturating_mul(lacking)) {
        Some(beyond) if rest > 0 => (beyond / (num_long + 1)).min(rest),
        _ => 0,
    };
    let mut pairs: Vec<(u32, u32)> =
        even(num_tokens - of_rest, num_long).map(|tokens| (tokens, longest - tokens)).collect();
    if of_rest > 0 {
        pairs.push((of_rest, rest - of_rest));
    }
    chunks(&pairs)
}

fn decodes(decode_contexts: Vec<u32>) -> StepBatch {
    StepBatch { prefill_chunks: Vec::new(), decode_contexts }
}

fn chunks(pairs: &[(u32, u32)]) -> StepBatch {
    let prefill_chunks =
        pairs.iter().map(|&(num_tokens, context_len)| PrefillChunk { num_tokens, context_len }).collect();
    StepBatch { prefill_chunks, decode_contexts: Vec::new() }
}

/// Decodes of one length.
fn equal_decodes() -> Vec<StepBatch> {
    let mut batches = Vec::new();
    for batch_size in [1, 2, 4, 8, 16, 32, 64, 128, 256] {
        // One less than a round number: the token itself is read too.
        for keys in [16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384] {
            batches.push(decodes(vec![keys - 1; batch_size]));
        }
    }
    batches
}

/// Decodes of which one is far longer, and decodes spread evenly up to a longest one.
fn skewed_decodes() -> Vec<StepBatch> {
    let mut batches = Vec::new();
    for batch_size in [4u32, 16, 64, 256] {
        for (short, long) in [(100, 4000), (500, 8000), (200, 16000)] {
            let mut contexts = vec![short; batch_size as usize];
            contexts[0] = long;
            batches.push(decodes(contexts));
        }
        for longest in [600, 2000, 8000] {
            batches.push(decodes((1..=batch_size).map(|i| i * longest / batch_size).collect()));
        }
    }
    batches
}

/// One chunk, at the start of its prompt or later.
fn single_chunks() -> Vec<StepBatch> {
    let mut batches = Vec::new();
    for num_tokens in [16, 48, 64, 128, 200, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192] {
        for context in [0, 512, 2048, 8192, 16384] {
            batches.push(chunks(&[(num_tokens, context)]));
        }
    }
    for num_tokens in [64, 256, 512, 1024] {
        for context in [128, 1024, 4096] {
            batches.push(chunks(&[(num_tokens, context)]));
        }
    }
    batches
}

/// Several prompts in one step, of one length and of different lengths.
fn several_chunks() -> Vec<StepBatch> {
    let mut batches = Vec::new();
    for (count, num_tokens) in [
        (2, 64),
        (2, 256),
        (2, 1024),
        (2, 4096),
        (4, 32),
        (4, 128),
        (4, 512),
        (4, 2048),
        (8, 64),
        (8, 256),
        (8, 1024),
        (16, 32),
        (16, 128),
        (16, 512),
        (64, 32),
        (64, 128),
    ] {
        batches.push(chunks(&vec![(num_tokens, 0); count]));
    }
    batches.push(chunks(&[(512, 1024), (512, 0)]));
    batches.push(chunks(&[(1500, 0), (400, 0), (148, 0)]));
    batches.push(chunks(&[(100, 3996), (1800, 0), (148, 0)]));
    batches.push(chunks(&[(256, 2048); 4]));
    batches.push(chunks(&[(700, 0), (300, 0), (200, 0), (100, 0), (50, 0), (25, 0)]));
    batches.push(chunks(&[(1000, 0), (600, 0), (300, 0), (148, 0)]));
    batches.push(chunks(&[(96, 416), (512, 0), (512, 0), (512, 0), (416, 0)]));
    for rest in [64, 256, 512, 1024] {
        batches.push(chunks(&[(2048 - rest, 0), (rest, 0)]));
        batches.push(chunks(&[(rest, 4096), (2048 - rest, 0)]));
    }
    batches
}

/// A chunk, or the chunks of several prompts, among decodes.
fn mixed() -> Vec<StepBatch> {
    let mut batches = Vec::new();
    for (num_tokens, context_len) in
        [(32, 0), (128, 0), (512, 0), (1024, 0), (2000, 0), (500, 1500), (256, 4096)]
    {
        for (batch_size, keys) in [(1, 500), (4, 1000), (16, 400), (40, 1000), (48, 200), (128, 500)] {
            let mut batch = chunks(&[(num_tokens, context_len)]);
            batch.decode_contexts = vec![keys; batch_size];
            batches.push(batch);
        }
    }
    for (count, num_tokens) in [(2, 256), (4, 500), (8, 250), (7, 100)] {
        for (batch_size, keys) in [(8, 300), (32, 600), (100, 300)] {
            let mut batch = chunks(&vec![(num_tokens, 0); count]);
            batch.decode_contexts = vec![keys; batch_size];
            batches.push(batch);
        }
    }
    batches
}

/// Batches as a loaded engine forms them: decodes of any length, often with a chunk or a few.
fn random(envelope: &Envelope, max_len: u32) -> Vec<StepBatch> {
    // Any fixed seed: the plan of the same envelope is the same plan.
    let mut rng = Pcg64::seed_from_u64(0x5eed);
    // Evenly spread over the logarithm, from 1 to `most`.
    let mut draw = |most: u32| f64::from(most.max(1)).powf(rng.random::<f64>()) as u32;
    let mut batches = Vec::new();
    // Bounded: an envelope in which hardly a batch fits must not hold it up.
    for attempt in 0..4 * NUM_RANDOM {
        let num_chunks = match attempt % 4 {
            0 => 0,
            1 | 2 => 1,
            _ => draw(6),
        };
        let longest = draw(max_len).max(64);
        let num_decodes = if attempt % 8 == 1 { 0 } else { draw(envelope.max_num_seqs) };
        let mut batch = decodes((0..num_decodes).map(|_| longest / 8 + draw(longest)).collect());
        for _ in 0..num_chunks {
            let num_tokens = draw(envelope.max_num_tokens.min(4096));
            let context_len = if draw(3) == 1 { 0 } else { draw(longest) };
            batch.prefill_chunks.push(PrefillChunk { num_tokens, context_len });
        }
        if fits(&batch, envelope, max_len) {
            batches.push(batch);
        }
        if batches.len() == NUM_RANDOM {
            break;
        }
    }
    batches
}

//! The tokens of prompts: those of texts, or made up for a workload that states lengths alone.

use plumbline_schema::{ContentStream, WorkloadRequest};

/// A counter-based generator: the finaliser of `SplitMix64` (Steele, Lea, Flood 2014) over a mixed key.
#[must_use]
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The numbers `key` stands for, one of them at each place.
#[must_use]
pub fn number_at(key: u64, place: u64) -> u64 {
    mix(key.wrapping_add((place + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// Uniform in [0, 1), with 24 bits: every one is a float of its own.
#[must_use]
pub fn uniform_at(key: u64, place: u64) -> f32 {
    (number_at(key, place) >> 40) as f32 / (1u32 << 24) as f32
}

/// A request's prompt: random tokens below `vocab_size`, the same where two prompts share their content.
#[must_use]
pub fn made_up_prompt(request: &WorkloadRequest, vocab_size: u32, seed: u64) -> Vec<u32> {
    let mut tokens = Vec::with_capacity(request.num_prefill_tokens as usize);
    while (tokens.len() as u32) < request.num_prefill_tokens {
        let run = request.content_run(tokens.len() as u32);
        let (kind, number) = match run.stream {
            ContentStream::Request(id) => (1, id),
            ContentStream::Prefix(id) => (2, id),
            ContentStream::Session(id) => (3, id),
            ContentStream::Hash(hash) => (4, hash),
        };
        let key = mix(seed ^ mix(number).wrapping_add(kind));
        let first = tokens.len() as u32;
        let end = run.end.min(request.num_prefill_tokens).max(first + 1);
        tokens
            .extend((first..end).map(|place| (number_at(key, place.into()) % u64::from(vocab_size)) as u32));
    }
    tokens
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use plumbline_schema::{Nanos, PromptContent};

    use super::*;

    #[test]
    fn prompts_share_what_their_contents_share() {
        let mut one = WorkloadRequest::new(1, Nanos(0), 50, 1);
        let mut two = WorkloadRequest::new(2, Nanos(0), 40, 1);
        let prompt = |request: &WorkloadRequest| made_up_prompt(request, 1000, 7);
        assert_eq!(prompt(&one).len(), 50);
        assert_eq!(prompt(&one), prompt(&one));
        assert_ne!(prompt(&one)[..40], prompt(&two)[..]);
        assert!(prompt(&one).iter().all(|&token| token < 1000));
        let content = PromptContent { prefix_id: Some(3), prefix_len: 32, ..PromptContent::default() };
        for request in [&mut one, &mut two] {
            request.content = Some(Arc::new(content.clone()));
        }
        assert_eq!(prompt(&one)[..32], prompt(&two)[..32]);
        assert_ne!(prompt(&one)[32..40], prompt(&two)[32..]);
    }

    #[test]
    fn uniform_numbers_fill_their_range() {
        let numbers: Vec<f32> = (0..10_000).map(|place| uniform_at(5, place)).collect();
        assert!(numbers.iter().all(|number| (0.0..1.0).contains(number)));
        let mean = numbers.iter().sum::<f32>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
    }
}

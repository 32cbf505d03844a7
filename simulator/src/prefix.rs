//! Hashes of prefixes: what tells that two requests begin with the same tokens.

use plumbline_schema::{ContentStream, WorkloadRequest};

/// The hash of each successive block of a request's tokens, chained: two requests have the same hash at a block where
/// all their tokens up to its end are the same.
///
/// It goes on over the prompt and, without end, the output. Hashes are 64 bits wide: among a million blocks two have
/// the same hash by chance with a probability of 3e-8.
#[derive(Clone, Debug)]
pub struct PrefixHashes<'a> {
    request: &'a WorkloadRequest,
    block_size: u32,
    position: u32,
    hash: u64,
}

impl<'a> PrefixHashes<'a> {
    /// From the first token, in blocks of `block_size` tokens (0 is taken as 1).
    #[must_use]
    pub fn new(request: &'a WorkloadRequest, block_size: u32) -> Self {
        Self::resume(request, block_size, 0, 0)
    }

    /// From block `index` on, where the block before it has hash `parent` (0 before the first).
    #[must_use]
    pub fn resume(request: &'a WorkloadRequest, block_size: u32, index: u32, parent: u64) -> Self {
        let block_size = block_size.max(1);
        Self { request, block_size, position: index.saturating_mul(block_size), hash: parent }
    }
}

impl Iterator for PrefixHashes<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let end = self.position.checked_add(self.block_size)?;
        let mut hash = mix(self.hash, 0x51);
        while self.position < end {
            let run = self.request.content_run(self.position);
            let (kind, id) = match run.stream {
                ContentStream::Request(id) => (1, id),
                ContentStream::Prefix(id) => (2, id),
                ContentStream::Session(id) => (3, id),
                ContentStream::Hash(id) => (4, id),
            };
            let run_end = run.end.min(end);
            hash = mix(mix(hash, id), kind << 32 | u64::from(run_end - self.position));
            self.position = run_end;
        }
        self.hash = hash;
        Some(hash)
    }
}

/// One step of a hash: a multiplication that every bit of both goes into, folded (as wyhash does).
fn mix(hash: u64, value: u64) -> u64 {
    let product = u128::from(hash ^ 0x9E37_79B9_7F4A_7C15) * u128::from(value ^ 0xE703_7ED1_A0B4_28DB);
    (product as u64) ^ (product >> 64) as u64
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, sync::Arc};

    use plumbline_schema::{Nanos, PromptContent};

    use super::*;

    fn with(id: u64, prompt: u32, content: PromptContent) -> WorkloadRequest {
        let content = Some(Arc::new(content));
        WorkloadRequest { content, ..WorkloadRequest::new(id, Nanos(0), prompt, 8) }
    }

    fn common(a: &WorkloadRequest, b: &WorkloadRequest) -> usize {
        PrefixHashes::new(a, 16).zip(PrefixHashes::new(b, 16)).take(100).take_while(|(a, b)| a == b).count()
    }

    #[test]
    fn requests_share_the_blocks_that_lie_wholly_in_what_they_share() {
        let prefix = |id| PromptContent { prefix_id: Some(id), prefix_len: 40, ..PromptContent::default() };
        assert_eq!(common(&with(0, 100, prefix(5)), &with(1, 100, prefix(5))), 2);
        assert_eq!(common(&with(0, 100, prefix(5)), &with(1, 100, prefix(6))), 0);
        let session = |id| PromptContent { session_id: Some(id), ..PromptContent::default() };
        assert_eq!(common(&with(0, 100, session(1)), &with(1, 500, session(1))), 100);
        let hashes = |hashes: &[u64]| PromptContent {
            prefix_hashes: hashes.to_vec(),
            prefix_hash_tokens: 32,
            ..PromptContent::default()
        };
        assert_eq!(common(&with(0, 96, hashes(&[1, 2, 3])), &with(1, 96, hashes(&[1, 2, 4]))), 4);
        let own = WorkloadRequest::new(0, Nanos(0), 100, 8);
        assert_eq!(common(&own, &own), 100);
        assert_eq!(common(&own, &WorkloadRequest::new(1, Nanos(0), 100, 8)), 0);
    }

    #[test]
    fn a_chain_resumes_and_its_hashes_differ() {
        let request = WorkloadRequest::new(3, Nanos(0), 100, 8);
        let whole: Vec<u64> = PrefixHashes::new(&request, 16).take(1000).collect();
        let rest: Vec<u64> = PrefixHashes::resume(&request, 16, 4, whole[3]).take(996).collect();
        assert_eq!(rest, whole[4..]);
        assert_eq!(whole.iter().collect::<HashSet<_>>().len(), 1000);
    }
}

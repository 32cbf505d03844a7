//! What a scheduler knows of its requests: the tokens of each, computed and known.

use std::mem;

use plumbline_schema::WorkloadRequest;

/// An unfinished request of one scheduler.
///
/// Numbers of finished requests are given out again, so that memory follows the requests in the system and not
/// those ever seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u32);

impl SequenceId {
    /// The number as an index.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Token counts of one unfinished request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Prompt length.
    pub num_prompt_tokens: u32,
    /// Output length at which it is done.
    pub max_output_tokens: u32,
    /// Tokens whose keys and values are in the cache, or will be once the steps in flight end.
    pub num_computed_tokens: u32,
    /// Output tokens so far.
    pub num_output_tokens: u32,
    /// Steps in flight that will each add an output token.
    pub num_in_flight_tokens: u32,
    /// Whether a step in flight has a part of it; told by policies that let a sequence into one step at a time.
    pub is_in_flight: bool,
    /// Whether tokens are left to compute that were known when it was let in; told by policies that ask.
    pub is_prefilling: bool,
}

impl Sequence {
    /// A sequence of which nothing is computed yet.
    #[must_use]
    pub fn new(num_prompt_tokens: u32, max_output_tokens: u32) -> Self {
        Self {
            num_prompt_tokens,
            max_output_tokens,
            num_computed_tokens: 0,
            num_output_tokens: 0,
            num_in_flight_tokens: 0,
            is_in_flight: false,
            is_prefilling: false,
        }
    }

    /// Tokens known so far: prompt and output.
    #[must_use]
    pub fn num_tokens(&self) -> u32 {
        self.num_prompt_tokens + self.num_output_tokens
    }

    /// Known tokens not yet computed; 0 while a step that computes the last of them is in flight.
    #[must_use]
    pub fn num_uncomputed_tokens(&self) -> u32 {
        self.num_tokens().saturating_sub(self.num_computed_tokens)
    }

    /// Output tokens still to come, those in flight included.
    #[must_use]
    pub fn num_remaining_tokens(&self) -> u32 {
        self.max_output_tokens - self.num_output_tokens
    }

    /// Whether it has all its output tokens.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.num_output_tokens >= self.max_output_tokens
    }

    /// Whether its next step computes one token, the newest output.
    #[must_use]
    pub fn is_decoding(&self) -> bool {
        self.num_output_tokens > 0 && self.num_computed_tokens + 1 == self.num_tokens()
    }
}

/// The unfinished requests of one scheduler.
#[derive(Clone, Debug, Default)]
pub struct Sequences {
    // Apart from the requests, since every step walks over the counts alone.
    counts: Vec<Sequence>,
    requests: Vec<WorkloadRequest>,
    vacant: Vec<SequenceId>,
}

impl Sequences {
    /// Takes in a request of which nothing is computed yet.
    pub fn insert(&mut self, request: &WorkloadRequest) -> SequenceId {
        let sequence = Sequence::new(request.num_prefill_tokens, request.num_decode_tokens);
        if let Some(id) = self.vacant.pop() {
            self.counts[id.index()] = sequence;
            self.requests[id.index()] = request.clone();
            return id;
        }
        self.counts.push(sequence);
        self.requests.push(request.clone());
        SequenceId(self.counts.len() as u32 - 1)
    }

    /// Lets a finished request go; its number may be given out again.
    pub fn remove(&mut self, id: SequenceId) {
        // Content may be shared and large.
        drop(mem::take(&mut self.requests[id.index()]));
        self.vacant.push(id);
    }

    /// Requests in the scheduler.
    #[must_use]
    pub fn len(&self) -> usize {
        self.counts.len() - self.vacant.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The request behind a sequence.
    #[must_use]
    pub fn request(&self, id: SequenceId) -> &WorkloadRequest {
        &self.requests[id.index()]
    }
}

impl std::ops::Index<SequenceId> for Sequences {
    type Output = Sequence;

    fn index(&self, id: SequenceId) -> &Sequence {
        &self.counts[id.index()]
    }
}

impl std::ops::IndexMut<SequenceId> for Sequences {
    fn index_mut(&mut self, id: SequenceId) -> &mut Sequence {
        &mut self.counts[id.index()]
    }
}

#[cfg(test)]
mod tests {
    use plumbline_schema::Nanos;

    use super::*;

    #[test]
    fn numbers_are_given_out_again() {
        let mut sequences = Sequences::default();
        let request = |id| WorkloadRequest::new(id, Nanos(0), 10 + id as u32, 2);
        let first = sequences.insert(&request(0));
        let second = sequences.insert(&request(1));
        sequences.remove(first);
        assert_eq!(sequences.len(), 1);
        let third = sequences.insert(&request(2));
        assert_eq!(third, first);
        assert_eq!(sequences[third].num_prompt_tokens, 12);
        assert_eq!(sequences.request(second).request_id, 1);
        assert!(!sequences.is_empty());
    }
}

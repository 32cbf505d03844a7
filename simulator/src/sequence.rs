//! What the scheduler knows of one request's tokens.

/// An admitted request, numbered from 0 in order of admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u32);

impl SequenceId {
    /// The number as an index.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Token counts of one admitted request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Prompt length.
    pub num_prompt_tokens: u32,
    /// Output length at which it is done.
    pub max_output_tokens: u32,
    /// Tokens whose keys and values are in the cache (or will be, once the step being run ends).
    pub num_computed_tokens: u32,
    /// Output tokens so far.
    pub num_output_tokens: u32,
}

impl Sequence {
    /// A sequence of which nothing is computed yet.
    #[must_use]
    pub fn new(num_prompt_tokens: u32, max_output_tokens: u32) -> Self {
        Self { num_prompt_tokens, max_output_tokens, num_computed_tokens: 0, num_output_tokens: 0 }
    }

    /// Tokens known so far: prompt and output.
    #[must_use]
    pub fn num_tokens(&self) -> u32 {
        self.num_prompt_tokens + self.num_output_tokens
    }

    /// Known tokens not yet computed.
    #[must_use]
    pub fn num_uncomputed_tokens(&self) -> u32 {
        self.num_tokens() - self.num_computed_tokens
    }
}

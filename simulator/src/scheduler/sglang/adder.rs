//! `SGLang`'s `PrefillAdder`: which waiting requests the next prefill takes, within budgets of tokens now and of
//! tokens to come.

use crate::{
    kv_blocks::KvBlocks,
    radix_cache::RadixCache,
    sequence::{Sequence, SequenceId, Sequences},
};

/// Output tokens of one request that are planned for at most (`CLIP_MAX_NEW_TOKENS`).
const MAX_PLANNED_TOKENS: u32 = 4096;

/// Prompt tokens of one prefill, unless it is of a single request (`max_prefill_tokens`).
const MAX_PREFILL_TOKENS: i64 = 16_384;

/// Whether more requests can be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// They can.
    Continue,
    /// The cache could not hold them to their end; nothing changes before memory is given back.
    NoMemory,
    /// This prefill is full.
    Full,
}

/// A prefill being put together.
#[derive(Debug)]
pub(super) struct PrefillAdder<'a> {
    cache: &'a mut RadixCache,
    sequences: &'a mut Sequences,
    decoding: &'a [SequenceId],
    rem_input_tokens: i64,
    rem_chunk_tokens: i64,
    /// Tokens that running and added requests may still need.
    total_offset: f64,
    /// Tokens that added requests need now.
    current_offset: i64,
    /// Output tokens left and tokens occupied of each request, the first to end first.
    forecast: Option<Vec<(f64, f64)>>,
    /// The requests so far and the tokens that the step computes of each.
    pub(super) planned: Vec<(SequenceId, u32)>,
    /// The request whose prefill goes on after this step.
    pub(super) chunked: Option<SequenceId>,
}

impl<'a> PrefillAdder<'a> {
    /// Nothing added yet, next to the decodes of `decoding`, of which a share `new_token_ratio` of the outputs to
    /// come is expected.
    pub(super) fn new(
        cache: &'a mut RadixCache,
        sequences: &'a mut Sequences,
        decoding: &'a [SequenceId],
        new_token_ratio: f64,
        chunk_tokens: u32,
    ) -> Self {
        let of = |&id: &SequenceId| {
            f64::from(sequences[id].num_remaining_tokens().min(MAX_PLANNED_TOKENS)) * new_token_ratio
        };
        Self {
            total_offset: decoding.iter().map(of).sum(),
            cache,
            sequences,
            decoding,
            rem_input_tokens: MAX_PREFILL_TOKENS,
            rem_chunk_tokens: i64::from(chunk_tokens),
            current_offset: 0,
            forecast: None,
            planned: Vec::new(),
            chunked: None,
        }
    }

    /// Goes on with a prefill that an earlier step began (`add_chunked_req`).
    ///
    /// Where the blocks at hand do not suffice for the chunk it is cut down to them, and left out when there are none;
    /// `SGLang` would end with an error.
    pub(super) fn add_chunk(&mut self, id: SequenceId) {
        let sequence = self.sequences[id];
        let uncomputed = i64::from(sequence.num_uncomputed_tokens());
        let mut rem_tokens = self.rem_chunk_tokens.min(self.rem_total_tokens() as i64);
        if rem_tokens <= 0 {
            rem_tokens = self.rem_chunk_tokens;
        }
        let block_size = i64::from(self.cache.block_size());
        let num_held = i64::from(self.cache.block_table(id).len() as u32);
        let room = (num_held * block_size - i64::from(sequence.num_computed_tokens)) + self.free_tokens();
        let chunk = uncomputed.min(rem_tokens).min(room);
        let is_cut = chunk < uncomputed;
        if chunk > 0 {
            self.plan(id, chunk, if is_cut { 0 } else { sequence.max_output_tokens });
        }
        self.chunked = is_cut.then_some(id);
    }

    /// Adds a waiting request, if it can be (`add_one_req`).
    pub(super) fn add(&mut self, id: SequenceId) -> Admission {
        let sequence = self.sequences[id];
        // The last token is always computed, since its output is what is wanted.
        let prefix = self.cache.find(self.sequences.request(id), sequence.num_tokens() - 1);
        let uncomputed = i64::from(sequence.num_tokens() - prefix.num_tokens);
        if !self.cache.shares_prefixes() {
            return self.add_by_forecast(id, uncomputed);
        }
        let expected = sequence.num_remaining_tokens().min(MAX_PLANNED_TOKENS);
        let total = uncomputed as f64 + f64::from(expected);
        if total >= self.rem_total_tokens() {
            return Admission::NoMemory;
        }
        if self.whole_blocks(uncomputed) >= self.rem_input_tokens && !self.planned.is_empty() {
            return Admission::Full;
        }
        self.cache.attach(id, prefix);
        // What was just locked can no longer be evicted, so less may be left.
        let admission = if total >= self.rem_total_tokens() {
            Some(Admission::NoMemory)
        } else {
            self.plan_whole_or_chunk(id, &sequence, uncomputed, self.whole_blocks(uncomputed))
        };
        if let Some(refused) = admission {
            self.cache.release(id, self.sequences.request(id), 0);
            return refused;
        }
        self.sequences[id].num_computed_tokens = prefix.num_tokens;
        self.state()
    }

    /// Without a prefix cache, and with outputs of known length (`ignore_eos`): plays the requests through to their
    /// ends, and adds this one if the cache holds out (`add_one_req_ignore_eos`).
    fn add_by_forecast(&mut self, id: SequenceId, uncomputed: i64) -> Admission {
        let free_tokens = self.free_tokens();
        let blocks = self.whole_blocks(uncomputed);
        let rem_now = free_tokens - self.current_offset;
        if blocks > rem_now || blocks as f64 > self.rem_total_tokens() {
            return Admission::NoMemory;
        }
        self.forecast_with(id);
        let forecast = self.forecast.as_deref().unwrap_or_default();
        let mut free = (rem_now - blocks) as f64;
        for (i, &(left, occupied)) in forecast.iter().enumerate() {
            let num_seqs = (forecast.len() - i) as f64;
            // A token of each is kept for corner cases (`IGNORE_EOS_RESERVE_TOKENS`).
            if free - left * num_seqs <= num_seqs {
                return Admission::NoMemory;
            }
            free += occupied;
        }
        let sequence = self.sequences[id];
        self.plan_whole_or_chunk(id, &sequence, uncomputed, uncomputed).unwrap_or_else(|| self.state())
    }

    /// Takes a request into the forecast; the first time also those that are there already.
    fn forecast_with(&mut self, id: SequenceId) {
        let of = |id: SequenceId| {
            let sequence = &self.sequences[id];
            (f64::from(sequence.num_remaining_tokens()), f64::from(sequence.num_tokens()))
        };
        if let Some(forecast) = &mut self.forecast {
            let state = of(id);
            // In front of the first that ends no earlier, else of the last: so SGLang has it.
            let last = forecast.len().saturating_sub(1);
            let at = forecast.iter().position(|other| state.0 <= other.0).unwrap_or(last);
            forecast.insert(at, state);
            return;
        }
        let there = self.decoding.iter().copied().chain(self.planned.iter().map(|&(id, _)| id));
        let mut forecast: Vec<_> = std::iter::once(id).chain(there).map(of).collect();
        forecast.sort_by(|a, b| a.0.total_cmp(&b.0));
        self.forecast = Some(forecast);
    }

    /// Plans all of a request's prefill if `needed` fits the chunk, else as much of it as whole blocks allow; says so
    /// when that is nothing.
    fn plan_whole_or_chunk(
        &mut self,
        id: SequenceId,
        sequence: &Sequence,
        uncomputed: i64,
        needed: i64,
    ) -> Option<Admission> {
        if needed <= self.rem_chunk_tokens {
            self.plan(id, uncomputed, sequence.max_output_tokens);
            return None;
        }
        let block_size = i64::from(self.cache.block_size());
        let chunk = self.rem_chunk_tokens / block_size * block_size;
        if chunk <= 0 || self.chunked.is_some() {
            return Some(Admission::Full);
        }
        self.plan(id, chunk, 0);
        self.chunked = Some(id);
        None
    }

    /// Takes a request in and its tokens off the budgets (`_update_prefill_budget`).
    fn plan(&mut self, id: SequenceId, num_tokens: i64, max_output_tokens: u32) {
        let blocks = self.whole_blocks(num_tokens);
        self.total_offset += blocks as f64 + f64::from(max_output_tokens.min(MAX_PLANNED_TOKENS));
        self.current_offset += blocks;
        self.rem_input_tokens -= blocks;
        self.rem_chunk_tokens -= blocks;
        self.planned.push((id, num_tokens as u32));
    }

    /// Whether anything is left (`budget_state`).
    fn state(&self) -> Admission {
        if self.rem_total_tokens() <= 0.0 || self.free_tokens() <= self.current_offset {
            Admission::NoMemory
        } else if self.rem_input_tokens <= 0 || self.rem_chunk_tokens <= 0 {
            Admission::Full
        } else {
            Admission::Continue
        }
    }

    /// Tokens that can be had, empty or by eviction.
    fn free_tokens(&self) -> i64 {
        i64::from(self.cache.num_free()) * i64::from(self.cache.block_size())
    }

    fn rem_total_tokens(&self) -> f64 {
        self.free_tokens() as f64 - self.total_offset
    }

    fn whole_blocks(&self, num_tokens: i64) -> i64 {
        let block_size = i64::from(self.cache.block_size());
        (num_tokens + block_size - 1) / block_size * block_size
    }
}

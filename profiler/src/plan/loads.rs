//! Sets of sequences for the grid's attention: a few of each kind an engine forms, different for every head layout.

use plumbline_schema::{PrefillChunk, StepBatch};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use super::{Envelope, batches, sequence::log_between};

/// Kinds of batches drawn for a head layout.
pub(super) const KINDS: [Kind; 8] = [
    Kind::EqualDecodes,
    Kind::LogNormalDecodes,
    Kind::OneLongDecode,
    Kind::FirstChunk,
    Kind::LaterChunk,
    Kind::SeveralChunks,
    Kind::ChunkAmongDecodes,
    Kind::ChunksAmongDecodes,
];

/// A kind of batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    EqualDecodes,
    LogNormalDecodes,
    OneLongDecode,
    FirstChunk,
    LaterChunk,
    SeveralChunks,
    ChunkAmongDecodes,
    ChunksAmongDecodes,
}

/// Draws batches within an envelope.
pub(super) struct Draw<'a> {
    envelope: &'a Envelope,
    random: Pcg64,
}

impl<'a> Draw<'a> {
    pub(super) fn new(envelope: &'a Envelope, seed: u64) -> Self {
        Self { envelope, random: Pcg64::seed_from_u64(seed) }
    }

    /// A batch of a kind that the envelope allows and `suits`; `share` (0..1) says how large, among all of the kind.
    ///
    /// `None` where a few dozen tries find none.
    pub(super) fn batch(
        &mut self,
        kind: Kind,
        share: f64,
        suits: impl Fn(&StepBatch) -> bool,
    ) -> Option<StepBatch> {
        const TRIES: u32 = 32;
        (0..TRIES).find_map(|attempt| {
            // Later tries are smaller.
            let share = share * (1.0 - f64::from(attempt) / f64::from(TRIES));
            let batch = self.any(kind, share);
            let max_len = self.envelope.max_model_len;
            (batches::fits(&batch, self.envelope, max_len) && suits(&batch)).then_some(batch)
        })
    }

    fn any(&mut self, kind: Kind, share: f64) -> StepBatch {
        let mut batch = StepBatch::default();
        match kind {
            Kind::EqualDecodes => {
                let (num_seqs, keys) = self.decodes(share);
                batch.decode_contexts = vec![keys - 1; num_seqs as usize];
            }
            Kind::LogNormalDecodes => batch.decode_contexts = self.log_normal(share),
            Kind::OneLongDecode => {
                let (num_seqs, keys) = self.decodes(share);
                batch.decode_contexts = vec![keys - 1; num_seqs as usize];
                batch.decode_contexts[0] =
                    self.up_to(self.envelope.max_model_len.max(keys) / keys, 1.0) * keys - 1;
            }
            Kind::FirstChunk => batch.prefill_chunks = vec![self.chunk(1, share, 0.0)],
            Kind::LaterChunk => batch.prefill_chunks = vec![self.chunk(1, share, 1.0)],
            Kind::SeveralChunks => batch.prefill_chunks = self.chunks(share),
            Kind::ChunkAmongDecodes => {
                batch.decode_contexts = self.log_normal(1.0 - share);
                batch.prefill_chunks = vec![self.chunk(1, share, 0.5)];
            }
            Kind::ChunksAmongDecodes => {
                batch.decode_contexts = self.log_normal(1.0 - share);
                batch.prefill_chunks = self.chunks(share);
            }
        }
        batch
    }

    /// 1 to `most`, at `share` of the way in the logarithm or a little off it.
    fn up_to(&mut self, most: u32, share: f64) -> u32 {
        let share = (share + 0.3 * (self.random.random::<f64>() - 0.5)).clamp(0.0, 1.0);
        log_between(1.0, f64::from(most.max(1)), share).round() as u32
    }

    /// Number of decodes and keys of each, together about `share` of the way to the most there may be.
    fn decodes(&mut self, share: f64) -> (u32, u32) {
        let of_seqs = self.random.random::<f64>();
        let most_keys = self.envelope.max_kv_tokens.min(u64::from(u32::MAX)) as u32;
        let all_keys = self.up_to(most_keys, 0.4 + 0.6 * share);
        let num_seqs = self.up_to(self.envelope.max_num_seqs.min(all_keys), of_seqs);
        (num_seqs, (all_keys / num_seqs).clamp(1, self.envelope.max_model_len.max(1)))
    }

    /// Contexts whose logarithms are normally distributed, as lengths of requests roughly are.
    fn log_normal(&mut self, share: f64) -> Vec<u32> {
        let (num_seqs, median) = self.decodes(share);
        let sigma = 0.3 + 1.2 * self.random.random::<f64>();
        let longest = self.envelope.max_model_len.saturating_sub(1);
        let mut context = || {
            // A normal deviate of two uniform ones (Box and Muller 1958).
            let (radius, angle) = (1.0 - self.random.random::<f64>(), self.random.random::<f64>());
            let normal = (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos();
            ((f64::from(median) * (sigma * normal).exp()) as u32).clamp(1.min(longest), longest)
        };
        (0..num_seqs).map(|_| context()).collect()
    }

    /// One of `count` chunks that share the tokens of a step; it has a context with the chance given.
    fn chunk(&mut self, count: u32, share: f64, chance_of_context: f64) -> PrefillChunk {
        let most = (self.envelope.max_num_tokens / count).min(self.envelope.max_model_len);
        let num_tokens = self.up_to(most, 0.35 + 0.65 * share);
        let has_context = self.random.random::<f64>() < chance_of_context;
        let room = self.envelope.max_model_len.saturating_sub(num_tokens);
        let of_room = self.random.random::<f64>();
        let context_len = if has_context && room > 0 { self.up_to(room, 0.4 + 0.6 * of_room) } else { 0 };
        PrefillChunk { num_tokens, context_len }
    }

    fn chunks(&mut self, share: f64) -> Vec<PrefillChunk> {
        let of_count = self.random.random::<f64>();
        let most = 32.min(self.envelope.max_num_seqs).min(self.envelope.max_num_tokens).max(2);
        let count = self.up_to(most, of_count).max(2);
        (0..count).map(|_| self.chunk(count, share, 0.3)).collect()
    }
}

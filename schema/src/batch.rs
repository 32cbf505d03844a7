//! What one scheduler step computes.

use serde::{Deserialize, Serialize};

/// One slice of a (chunked) prefill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PrefillChunk {
    /// Tokens computed in this step.
    pub num_tokens: u32,
    /// Tokens computed (or found in the cache) before this step.
    pub context_len: u32,
}

/// The prefill chunks and decodes of one scheduler step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StepBatch {
    /// Prefill chunks, in scheduling order.
    pub prefill_chunks: Vec<PrefillChunk>,
    /// Context length of each decode before this step; it attends to one token more.
    pub decode_contexts: Vec<u32>,
}

/// What a step's sequences ask of attention: sums that decide its work, traffic and balance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttentionLoad {
    /// Number of prefill chunks.
    pub num_prefill_seqs: u32,
    /// Tokens of all chunks.
    pub num_prefill_tokens: u32,
    /// Keys the chunks read: sum of `context_len + num_tokens`.
    pub prefill_kv_tokens: u64,
    /// Causal query-key pairs of the chunks: sum of `num_tokens * context_len + num_tokens (num_tokens + 1) / 2`.
    pub prefill_pairs: u64,
    /// Number of decodes.
    pub num_decode_seqs: u32,
    /// Keys the decodes read: sum of `context_len + 1`.
    pub decode_kv_tokens: u64,
    /// Keys the longest decode reads.
    pub max_decode_kv_tokens: u32,
}

/// The numbers of a step that decide its time; `Copy`, so that a simulator needs no allocation for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BatchShape {
    /// Tokens through the linear layers; an engine may pad it up to a captured graph's size.
    pub num_tokens: u32,
    /// Sequences, each of which gets logits.
    pub num_seqs: u32,
    /// The attention part.
    pub attention: AttentionLoad,
}

impl AttentionLoad {
    /// Adds a prefill chunk.
    #[inline]
    pub fn add_prefill(&mut self, chunk: PrefillChunk) {
        let (tokens, context) = (u64::from(chunk.num_tokens), u64::from(chunk.context_len));
        // Saturating: a hostile file may hold 2^32 - 1 anywhere.
        self.num_prefill_seqs += 1;
        self.num_prefill_tokens = self.num_prefill_tokens.saturating_add(chunk.num_tokens);
        self.prefill_kv_tokens = self.prefill_kv_tokens.saturating_add(tokens + context);
        let pairs = (tokens * context).saturating_add(tokens * (tokens + 1) / 2);
        self.prefill_pairs = self.prefill_pairs.saturating_add(pairs);
    }

    /// Adds a decode that finds `context_len` tokens in the cache.
    #[inline]
    pub fn add_decode(&mut self, context_len: u32) {
        self.num_decode_seqs += 1;
        self.decode_kv_tokens += u64::from(context_len) + 1;
        self.max_decode_kv_tokens = self.max_decode_kv_tokens.max(context_len.saturating_add(1));
    }

    /// Tokens computed in this step.
    #[must_use]
    #[inline]
    pub fn num_tokens(&self) -> u32 {
        self.num_prefill_tokens.saturating_add(self.num_decode_seqs)
    }
}

impl BatchShape {
    /// The unpadded shape of a load.
    #[must_use]
    #[inline]
    pub fn from_load(attention: AttentionLoad) -> Self {
        Self {
            num_tokens: attention.num_tokens(),
            num_seqs: attention.num_prefill_seqs + attention.num_decode_seqs,
            attention,
        }
    }
}

impl StepBatch {
    /// The numbers that decide the step's time.
    #[must_use]
    pub fn shape(&self) -> BatchShape {
        let mut load = AttentionLoad::default();
        self.prefill_chunks.iter().for_each(|&chunk| load.add_prefill(chunk));
        self.decode_contexts.iter().for_each(|&context| load.add_decode(context));
        BatchShape::from_load(load)
    }

    /// Whether nothing is computed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.prefill_chunks.is_empty() && self.decode_contexts.is_empty()
    }

    /// Reads the two columns of `step_metrics.csv`: `tokens:context;...` and `context;...`.
    ///
    /// # Errors
    /// Says what was expected and found.
    pub fn parse(prefill_chunks_tokens_context: &str, decode_contexts: &str) -> Result<Self, String> {
        let number = |text: &str| {
            text.parse::<u32>().map_err(|_| format!("expected a whole number below 2^32, found `{text}`"))
        };
        let items = |list: &'_ str| -> Vec<String> {
            list.split(';').filter(|item| !item.is_empty()).map(str::to_owned).collect()
        };
        let chunk = |item: String| -> Result<PrefillChunk, String> {
            let (tokens, context) =
                item.split_once(':').ok_or_else(|| format!("expected `tokens:context`, found `{item}`"))?;
            Ok(PrefillChunk { num_tokens: number(tokens)?, context_len: number(context)? })
        };
        let prefill_chunks =
            items(prefill_chunks_tokens_context).into_iter().map(chunk).collect::<Result<_, _>>()?;
        let decode_contexts =
            items(decode_contexts).iter().map(|item| number(item)).collect::<Result<_, _>>()?;
        Ok(Self { prefill_chunks, decode_contexts })
    }

    /// Writes the prefill chunks as `tokens:context;...`.
    #[must_use]
    pub fn format_prefill_chunks(&self) -> String {
        let items: Vec<_> =
            self.prefill_chunks.iter().map(|c| format!("{}:{}", c.num_tokens, c.context_len)).collect();
        items.join(";")
    }

    /// Writes the decode contexts as `context;...`.
    #[must_use]
    pub fn format_decode_contexts(&self) -> String {
        let items: Vec<_> = self.decode_contexts.iter().map(u32::to_string).collect();
        items.join(";")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips() {
        let batch = StepBatch::parse("512:0;36:512", "9;1024").unwrap();
        assert_eq!(batch.prefill_chunks[1], PrefillChunk { num_tokens: 36, context_len: 512 });
        assert_eq!(batch.format_prefill_chunks(), "512:0;36:512");
        assert_eq!(batch.format_decode_contexts(), "9;1024");
        assert!(StepBatch::parse("", "").unwrap().is_empty());
        assert_eq!(StepBatch::parse("5", "").unwrap_err(), "expected `tokens:context`, found `5`");
        assert!(StepBatch::parse("", "1;-2").unwrap_err().contains("`-2`"));
    }
}

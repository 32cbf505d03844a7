//! What a scheduler hands to whoever runs the step.

use plumbline_schema::{AttentionLoad, BatchShape, PrefillChunk, StepBatch};

use crate::sequence::SequenceId;

/// One sequence's part in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduledSequence {
    /// The sequence.
    pub id: SequenceId,
    /// Tokens computed in this step, at least 1.
    pub num_tokens: u32,
    /// Tokens in the cache before this step.
    pub context_len: u32,
    /// Whether it is a decode: one token, the newest output. All else is a prefill chunk, also the
    /// recomputing of outputs after a preemption.
    pub is_decode: bool,
    /// Whether the step computes the sequence to its end, so that a new token comes out.
    pub samples: bool,
}

/// One step: sequences in scheduling order, and who had to make room.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScheduledStep {
    /// What is computed.
    pub sequences: Vec<ScheduledSequence>,
    /// Sequences that lost their blocks while the step was formed, in that order.
    pub preempted: Vec<SequenceId>,
}

impl ScheduledStep {
    /// Whether nothing is computed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Forgets everything, keeping the memory.
    pub fn clear(&mut self) {
        self.sequences.clear();
        self.preempted.clear();
    }

    /// The step as run files write it.
    #[must_use]
    pub fn batch(&self) -> StepBatch {
        let mut batch = StepBatch::default();
        for s in &self.sequences {
            if s.is_decode {
                batch.decode_contexts.push(s.context_len);
            } else {
                let chunk = PrefillChunk { num_tokens: s.num_tokens, context_len: s.context_len };
                batch.prefill_chunks.push(chunk);
            }
        }
        batch
    }

    /// The numbers that decide the step's time, without allocating.
    #[must_use]
    pub fn shape(&self) -> BatchShape {
        let mut load = AttentionLoad::default();
        for s in &self.sequences {
            if s.is_decode {
                load.add_decode(s.context_len);
            } else {
                load.add_prefill(PrefillChunk { num_tokens: s.num_tokens, context_len: s.context_len });
            }
        }
        BatchShape::from_load(load)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batch_and_shape_agree() {
        let part = |id, num_tokens, context_len, is_decode| ScheduledSequence {
            id: SequenceId(id),
            num_tokens,
            context_len,
            is_decode,
            samples: true,
        };
        let step = ScheduledStep {
            sequences: vec![part(0, 1, 99, true), part(1, 30, 64, false), part(2, 1, 0, false)],
            preempted: vec![],
        };
        assert_eq!(step.batch(), StepBatch::parse("30:64;1:0", "99").unwrap());
        assert_eq!(step.shape(), step.batch().shape());
    }
}

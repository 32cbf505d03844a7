//! Which attention batches hold all the work of another, sequence by sequence.

use std::collections::BTreeMap;

use super::{lines::is_faster, table::Table};
use crate::samples::{CacheState, Sample};

/// Most points of a head layout that are compared pair by pair; no plan holds as many, only a hostile file does.
const MAX_COMPARED: usize = 4096;

/// A row, the fastest row that holds all its work and takes less time, and how many such rows there are.
pub(super) struct Drop {
    pub(super) row: usize,
    pub(super) fastest: usize,
    pub(super) num: usize,
}

/// Sequences of a batch, largest first.
struct Sequences {
    row: usize,
    time_ns: f64,
    /// Tokens and context of each chunk.
    chunks: Vec<(u32, u32)>,
    /// Context of each decode.
    decodes: Vec<u32>,
}

impl Sequences {
    fn of(row: usize, sample: &Sample) -> Option<Self> {
        let batch = sample.batch.as_ref()?;
        let mut chunks: Vec<_> = batch.prefill_chunks.iter().map(|c| (c.num_tokens, c.context_len)).collect();
        let mut decodes = batch.decode_contexts.clone();
        chunks.sort_unstable_by(|a, b| b.cmp(a));
        decodes.sort_unstable_by(|a, b| b.cmp(a));
        Some(Self { row, time_ns: sample.stats.p50_ns, chunks, decodes })
    }

    /// Whether this is another batch, and every sequence of `other` has one here that is at least as large in every number.
    ///
    /// Sums are not enough: eight short prompts may ask for more pairs than one long chunk and still finish sooner,
    /// as they run side by side.
    fn holds(&self, other: &Self) -> bool {
        self.chunks.len() >= other.chunks.len()
            && self.decodes.len() >= other.decodes.len()
            && (&self.chunks, &self.decodes) != (&other.chunks, &other.decodes)
            && self.decodes.iter().zip(&other.decodes).all(|(a, b)| a >= b)
            && self.chunks.iter().zip(&other.chunks).all(|(a, b)| a.0 >= b.0 && a.1 >= b.1)
    }
}

/// Batches that take longer than ones that hold all their work; `skip` names rows that are left out.
pub(super) fn drops(table: &Table, tolerance_ns: f64, skip: &[usize]) -> Vec<Drop> {
    let mut groups: BTreeMap<(CacheState, Vec<u64>), Vec<Sequences>> = BTreeMap::new();
    for (row, sample) in table.samples.iter().enumerate().filter(|(row, _)| !skip.contains(row)) {
        if let Some(sequences) = Sequences::of(row, sample) {
            groups.entry((sample.cache, table.layout(sample))).or_default().push(sequences);
        }
    }
    let mut drops = Vec::new();
    for group in groups.values() {
        let compared = &group[..group.len().min(MAX_COMPARED)];
        for slow in compared {
            let faster = compared
                .iter()
                .filter(|fast| is_faster(fast.time_ns, slow.time_ns, tolerance_ns) && fast.holds(slow));
            let mut faster: Vec<_> = faster.collect();
            faster.sort_by(|a, b| a.time_ns.total_cmp(&b.time_ns));
            if let Some(fastest) = faster.first() {
                drops.push(Drop { row: slow.row, fastest: fastest.row, num: faster.len() });
            }
        }
    }
    drops
}

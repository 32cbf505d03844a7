//! Samples in memory, most of them in eight bytes.

use std::mem;

use super::spill::Sample;

/// Low bits of a word that hold a count; all of them set say that the value is in the next word, and the count in the
/// bits above.
const COUNT_BITS: u32 = 16;
const IN_TWO_WORDS: u64 = (1 << COUNT_BITS) - 1;

/// Words of the smallest buffer.
const MIN_WORDS: usize = 64;

/// Samples, in buffers that never move: each is as large as all before it.
///
/// A sample is a word of its value (below 2^48) and its count (below 2^16 - 1), or else two words.
#[derive(Debug)]
pub(super) struct Held {
    /// The latest, which others may still be equal to; 0 with a count of 0 for none.
    latest: Sample,
    open: Vec<u64>,
    full: Vec<Vec<u64>>,
    spare: Vec<Vec<u64>>,
    /// Of all buffers.
    num_words: usize,
    max_words: usize,
}

impl Held {
    /// No samples, to become no more than `max_bytes`, or two words.
    pub(super) fn new(max_bytes: usize) -> Self {
        Self {
            latest: Sample { value_ns: 0, count: 0 },
            open: Vec::new(),
            full: Vec::new(),
            spare: Vec::new(),
            num_words: 0,
            max_words: (max_bytes / size_of::<u64>()).max(2),
        }
    }

    /// Memory of all buffers.
    #[cfg(test)]
    pub(super) fn num_bytes(&self) -> usize {
        self.num_words * size_of::<u64>()
    }

    /// Most memory of all buffers.
    pub(super) fn max_bytes(&self) -> usize {
        self.max_words * size_of::<u64>()
    }

    /// Counts samples equal to the latest, where they are.
    #[inline]
    pub(super) fn add_to_latest(&mut self, value_ns: u64, count: u32) -> bool {
        match self.latest.count.checked_add(count) {
            Some(count) if self.latest.value_ns == value_ns => {
                self.latest.count = count;
                true
            }
            _ => false,
        }
    }

    /// Whether one more has room.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        self.open.capacity() - self.open.len() >= 2
    }

    /// Adds samples where [`Self::has_room`] says that it can.
    #[inline]
    pub(super) fn push(&mut self, value_ns: u64, count: u32) {
        let Sample { value_ns: value, count } = mem::replace(&mut self.latest, Sample { value_ns, count });
        let count = u64::from(count);
        if value >> (u64::BITS - COUNT_BITS) == 0 && count < IN_TWO_WORDS {
            // None before the first.
            if count > 0 {
                self.open.push(value << COUNT_BITS | count);
            }
        } else {
            self.open.push(count << COUNT_BITS | IN_TWO_WORDS);
            self.open.push(value);
        }
    }

    /// Takes a buffer more; false where that would be too much memory.
    pub(super) fn grow(&mut self) -> bool {
        let next = if let Some(spare) = self.spare.pop() {
            spare
        } else {
            let num_words = self.num_words.max(MIN_WORDS).min(self.max_words - self.num_words);
            if num_words < 2 {
                return false;
            }
            self.num_words += num_words;
            Vec::with_capacity(num_words)
        };
        self.full.push(mem::replace(&mut self.open, next));
        true
    }

    /// Forgets all samples and keeps the memory.
    pub(super) fn clear(&mut self) {
        self.latest = Sample { value_ns: 0, count: 0 };
        self.open.clear();
        self.full.iter_mut().for_each(Vec::clear);
        self.spare.append(&mut self.full);
        // The first buffer of all has no room.
        self.spare.retain(|buffer| buffer.capacity() > 0);
    }

    /// Most samples that there can be in what is held.
    pub(super) fn len(&self) -> usize {
        self.full.iter().map(Vec::len).sum::<usize>() + self.open.len() + 1
    }

    /// Shows every sample to `visit`, in the order in which they came.
    #[inline]
    pub(super) fn for_each(&self, mut visit: impl FnMut(Sample)) {
        for words in self.full.iter().chain([&self.open]) {
            let mut words = words.iter();
            while let Some(&word) = words.next() {
                let (high, low) = (word >> COUNT_BITS, word & IN_TWO_WORDS);
                if low != IN_TWO_WORDS {
                    visit(Sample { value_ns: high, count: low as u32 });
                } else if let Some(&value_ns) = words.next() {
                    visit(Sample { value_ns, count: high as u32 });
                }
            }
        }
        if self.latest.count > 0 {
            visit(self.latest);
        }
    }

    /// Holds no more than the given samples.
    #[cfg(test)]
    pub(super) fn of(samples: &[Sample]) -> Self {
        let mut held = Self::new(samples.len() * 16 + 512);
        for &Sample { value_ns, count } in samples {
            assert!(held.has_room() || held.grow());
            held.push(value_ns, count);
        }
        held
    }

    /// What [`Self::for_each`] shows.
    #[cfg(test)]
    pub(super) fn to_vec(&self) -> Vec<Sample> {
        let mut samples = Vec::new();
        self.for_each(|sample| samples.push(sample));
        samples
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_every_size_come_back() {
        let values = (0..64).map(|shift| u64::MAX >> shift).chain([0]);
        let written: Vec<Sample> = values
            .flat_map(|value_ns| [1, 2, 65_534, 65_535, u32::MAX].map(|count| Sample { value_ns, count }))
            .collect();
        let mut held = Held::of(&written);
        assert_eq!(held.to_vec(), written);
        assert!(held.len() >= written.len());
        let num_bytes = held.num_bytes();
        held.push(u64::MAX, 1);
        held.clear();
        assert_eq!(held.to_vec(), []);
        held.push(7, 1);
        assert_eq!(held.to_vec(), [Sample { value_ns: 7, count: 1 }]);
        while held.has_room() || !held.spare.is_empty() {
            assert!(held.has_room() || held.grow());
            held.push(7, 1);
        }
        assert_eq!(held.num_bytes(), num_bytes, "the memory there was");
    }

    #[test]
    fn equal_neighbours_are_one() {
        let mut held = Held::new(0);
        assert!(held.grow());
        held.push(9, 3);
        assert!(held.add_to_latest(9, 4) && !held.add_to_latest(8, 1) && !held.add_to_latest(9, u32::MAX));
        assert_eq!((held.latest, held.open.len()), (Sample { value_ns: 9, count: 7 }, 0));
    }
}

//! Exact percentiles of any number of samples in bounded memory.

use std::{
    io,
    path::{Path, PathBuf},
};

use plumbline_bundles::stats::QuantilePosition;

use super::spill::{Sample, Spill, damaged};

/// Memory of [`ExactQuantiles`] where nothing else is asked for: 8 MiB, 262,144 different samples before any file.
pub const DEFAULT_MAX_BYTES: usize = 8 << 20;

/// Most bits of a value that one pass over the samples tells apart: a histogram of 256 KiB, within a core's own cache.
const MAX_BITS_PER_PASS: u32 = 15;

/// Collects times, each with how often it occurred, and tells their exact percentiles, mean and extremes.
///
/// Samples are kept as they come, in memory and then in an unnamed temporary file. They are never sorted: a percentile
/// is found by counting, a few bits of the value in each pass over the samples, within the range that the pass before
/// left. That takes two passes for times that differ by up to 1 s (30 bits), three up to 9 h (45 bits).
#[derive(Debug)]
pub struct ExactQuantiles {
    held: Vec<Sample>,
    max_held: usize,
    spilled: Option<Spill>,
    spill_folder: PathBuf,
    /// Of the samples in the file; adding up in bulk is cheaper than with every push.
    totals: Totals,
    has_lost_samples: bool,
}

/// What is known of samples without looking at them again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Totals {
    count: u64,
    /// Exact: fewer than 2^64 samples of less than 2^64 each.
    sum_ns: u128,
    min_ns: u64,
    max_ns: u64,
}

impl Totals {
    const NONE: Self = Self { count: 0, sum_ns: 0, min_ns: u64::MAX, max_ns: 0 };

    fn add(&mut self, other: Self) {
        self.count += other.count;
        self.sum_ns += other.sum_ns;
        self.min_ns = self.min_ns.min(other.min_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    fn of(samples: &[Sample]) -> Self {
        let mut totals = Self::NONE;
        for &Sample { value_ns, count } in samples {
            totals.count += u64::from(count);
            totals.sum_ns += u128::from(value_ns) * u128::from(count);
            totals.min_ns = totals.min_ns.min(value_ns);
            totals.max_ns = totals.max_ns.max(value_ns);
        }
        totals
    }
}

impl Default for ExactQuantiles {
    fn default() -> Self {
        Self::new(DEFAULT_MAX_BYTES)
    }
}

impl ExactQuantiles {
    /// Collects in at most `max_bytes` of memory: half for samples, half for counting them at the end. A file, once
    /// there is one, needs 64 KiB more; a very long list of percentiles may need more to be counted.
    ///
    /// The file lies in the system's folder for temporary files.
    #[must_use]
    pub fn new(max_bytes: usize) -> Self {
        let max_held = (max_bytes / 2 / size_of::<Sample>()).max(1);
        let spill_folder = std::env::temp_dir();
        Self {
            held: Vec::new(),
            max_held,
            spilled: None,
            spill_folder,
            totals: Totals::NONE,
            has_lost_samples: false,
        }
    }

    /// The same with its file in `folder`, for where the system's folder is small or in memory.
    #[must_use]
    pub fn spilling_in(mut self, folder: &Path) -> Self {
        self.spill_folder = folder.to_path_buf();
        self
    }

    /// Adds `count` samples of `value_ns`; the cheapest are those equal to the last.
    ///
    /// # Errors
    /// When memory is full and the file cannot be written. [`Self::finish`] then fails too.
    #[inline]
    pub fn push(&mut self, value_ns: u64, count: u32) -> io::Result<()> {
        if count == 0 {
            return Ok(());
        }
        if let Some(last) = self.held.last_mut()
            && last.value_ns == value_ns
            && let Some(count) = last.count.checked_add(count)
        {
            last.count = count;
            return Ok(());
        }
        if self.held.len() == self.held.capacity() {
            self.make_room()?;
        }
        self.held.push(Sample { value_ns, count });
        Ok(())
    }

    /// Doubles the memory up to what is allowed, then empties it into the file.
    #[cold]
    fn make_room(&mut self) -> io::Result<()> {
        let len = self.held.len();
        if len < self.max_held {
            self.held.reserve_exact(len.max(64).min(self.max_held - len));
            return Ok(());
        }
        self.spill_held().map_err(|e| self.failed(&e))
    }

    fn spill_held(&mut self) -> io::Result<()> {
        self.check_complete()?;
        let spilled = match &mut self.spilled {
            Some(spilled) => spilled,
            none => none.insert(Spill::create(&self.spill_folder)?),
        };
        spilled.append(&self.held)?;
        self.totals.add(Totals::of(&self.held));
        self.held.clear();
        Ok(())
    }

    fn check_complete(&self) -> io::Result<()> {
        if self.has_lost_samples { Err(io::Error::other("samples were lost before")) } else { Ok(()) }
    }

    fn failed(&mut self, error: &io::Error) -> io::Error {
        self.has_lost_samples = true;
        let folder = self.spill_folder.display();
        let text = format!("samples beyond memory go to a temporary file in {folder}, which failed: {error}");
        io::Error::new(error.kind(), text)
    }

    /// Adds the samples of `other`.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn merge(&mut self, other: Self) -> io::Result<()> {
        self.has_lost_samples |= other.has_lost_samples;
        self.check_complete().map_err(|e| self.failed(&e))?;
        match (&mut self.spilled, other.spilled) {
            (Some(spilled), Some(others)) => spilled.append_all_of(others).map_err(|e| self.failed(&e))?,
            (none, others @ Some(_)) => *none = others,
            (_, None) => {}
        }
        for Sample { value_ns, count } in other.held {
            self.push(value_ns, count)?;
        }
        self.totals.add(other.totals);
        Ok(())
    }

    /// The distribution with the given `percentiles`, each from 0 to 100 (beyond is taken for the nearer end).
    ///
    /// # Errors
    /// When the file, where there is one, cannot be read, or could not be written before.
    pub fn finish(mut self, percentiles: &[f64]) -> io::Result<Distribution> {
        self.totals.add(Totals::of(&self.held));
        let totals = self.totals;
        let positions: Vec<_> =
            percentiles.iter().filter_map(|p| QuantilePosition::new(totals.count, p / 100.0)).collect();
        let mut ranks: Vec<u64> = positions.iter().flat_map(|p| [p.below, p.above]).collect();
        ranks.sort_unstable();
        ranks.dedup();
        let values =
            self.check_complete().and_then(|()| self.values_at(&ranks)).map_err(|e| self.failed(&e))?;
        // Every rank of a position is in `ranks`.
        let value = |rank| values[ranks.partition_point(|&r| r < rank)] as f64;
        let percentiles = percentiles
            .iter()
            .zip(positions)
            .map(|(&p, position)| (p, position.between(value(position.below), value(position.above))))
            .collect();
        Ok(Distribution { totals, percentiles })
    }

    /// The values at ascending `ranks`, counted from 0.
    fn values_at(&mut self, ranks: &[u64]) -> io::Result<Vec<u64>> {
        let Totals { min_ns, max_ns, .. } = self.totals;
        let mut targets: Vec<_> = ranks.iter().map(|&rank| Target { prefix: 0, rank }).collect();
        let mut bits_left = u64::BITS - max_ns.saturating_sub(min_ns).leading_zeros();
        while bits_left > 0 && !targets.is_empty() {
            let mut prefixes: Vec<u64> = targets.iter().map(|t| t.prefix).collect();
            prefixes.dedup();
            // Passes as alike as can be: few buckets are looked through faster than many.
            let num_passes = bits_left.div_ceil(self.max_bits_per_pass(prefixes.len()));
            let bits = bits_left.div_ceil(num_passes);
            bits_left -= bits;
            let counts = self.count_within(&prefixes, bits, bits_left)?;
            for target in &mut targets {
                let index = prefixes.partition_point(|&p| p < target.prefix);
                target.descend(&counts[index << bits..][..1 << bits]).ok_or_else(damaged)?;
            }
        }
        Ok(targets.iter().map(|t| min_ns + t.prefix).collect())
    }

    /// Bits for which `num_histograms` find room, and few enough that the buckets are outnumbered by the samples.
    fn max_bits_per_pass(&self, num_histograms: usize) -> u32 {
        let room = self.max_held * size_of::<Sample>() / size_of::<u64>() / num_histograms;
        let worthwhile = if self.spilled.is_none() { self.held.len() / 4 } else { usize::MAX };
        room.min(worthwhile).checked_ilog2().unwrap_or(0).clamp(1, MAX_BITS_PER_PASS)
    }

    /// One histogram for each of the ascending `prefixes`: the samples whose bits (of the value above the least)
    /// begin with it, by the next `bits`, above the last `shift`.
    fn count_within(&mut self, prefixes: &[u64], bits: u32, shift: u32) -> io::Result<Vec<u64>> {
        let min_ns = self.totals.min_ns;
        let mut counts = vec![0; prefixes.len() << bits];
        self.for_each(|sample| {
            let key = (sample.value_ns - min_ns) >> shift;
            if let Ok(index) = prefixes.binary_search(&(key >> bits)) {
                counts[(index << bits) | (key as usize & ((1 << bits) - 1))] += u64::from(sample.count);
            }
        })?;
        Ok(counts)
    }

    fn for_each(&mut self, mut visit: impl FnMut(Sample)) -> io::Result<()> {
        if let Some(spilled) = &mut self.spilled {
            spilled.for_each(&mut visit)?;
        }
        self.held.iter().copied().for_each(visit);
        Ok(())
    }
}

/// A sample that is looked for.
struct Target {
    /// The bits of its value (above the least) that are known.
    prefix: u64,
    /// Its place among the samples that begin with them.
    rank: u64,
}

impl Target {
    /// Learns the next bits from the `histogram` of its prefix, of a power of two in length; `None` when its rank lies
    /// beyond.
    fn descend(&mut self, histogram: &[u64]) -> Option<()> {
        let bucket = histogram.iter().position(|&count| {
            let is_here = self.rank < count;
            self.rank -= if is_here { 0 } else { count };
            is_here
        })?;
        self.prefix = (self.prefix << histogram.len().ilog2()) | bucket as u64;
        Some(())
    }
}

/// Number, mean, extremes and the percentiles asked for, of times in ns.
#[derive(Clone, Debug, PartialEq)]
pub struct Distribution {
    totals: Totals,
    /// Percentile and value.
    percentiles: Vec<(f64, f64)>,
}

impl Distribution {
    /// Number of samples.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.totals.count
    }

    /// Arithmetic mean; `None` without samples.
    #[must_use]
    pub fn mean_ns(&self) -> Option<f64> {
        (self.totals.count > 0).then(|| self.totals.sum_ns as f64 / self.totals.count as f64)
    }

    /// Sum of all samples.
    #[must_use]
    pub const fn sum_ns(&self) -> u128 {
        self.totals.sum_ns
    }

    /// Smallest sample; `None` without samples.
    #[must_use]
    pub fn min_ns(&self) -> Option<u64> {
        (self.totals.count > 0).then_some(self.totals.min_ns)
    }

    /// Largest sample; `None` without samples.
    #[must_use]
    pub fn max_ns(&self) -> Option<u64> {
        (self.totals.count > 0).then_some(self.totals.max_ns)
    }

    /// The percentile `p` (0 to 100) by linear interpolation between the samples at the ranks around `p/100 (n - 1)`
    /// (Hyndman and Fan's type 7); `None` without samples, or when [`ExactQuantiles::finish`] was not asked for it.
    #[must_use]
    pub fn percentile_ns(&self, p: f64) -> Option<f64> {
        self.percentiles.iter().find(|(asked, _)| asked.total_cmp(&p).is_eq()).map(|&(_, value)| value)
    }
}

#[cfg(test)]
mod tests;

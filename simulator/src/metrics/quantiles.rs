//! Exact percentiles of any number of samples in bounded memory.

use std::{
    io,
    path::{Path, PathBuf},
};

use plumbline_bundles::stats::QuantilePosition;

use super::{
    held::Held,
    spill::{Sample, Spill, damaged},
};

/// Memory of [`ExactQuantiles`] where nothing else is asked for: 8 MiB, 524,288 samples before any file.
pub const DEFAULT_MAX_BYTES: usize = 8 << 20;

/// Most bits of a value that one pass over the samples tells apart: a histogram of 64 KiB, within a core's own cache.
const MAX_BITS_PER_PASS: u32 = 13;

/// Collects times, each with how often it occurred, and tells their exact percentiles, mean and extremes.
///
/// Samples are kept as they come, in memory and then in an unnamed temporary file. They are not sorted: a percentile
/// is found by counting, a few bits of the value in each pass over the samples, within the range that the pass before
/// left. What is left when that is little is gathered and sorted, most often after one pass.
#[derive(Debug)]
pub struct ExactQuantiles {
    held: Held,
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

    fn of(samples: &Held) -> Self {
        let mut totals = Self::NONE;
        samples.for_each(|Sample { value_ns, count }| {
            totals.count += u64::from(count);
            totals.sum_ns += u128::from(value_ns) * u128::from(count);
            totals.min_ns = totals.min_ns.min(value_ns);
            totals.max_ns = totals.max_ns.max(value_ns);
        });
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
        let spill_folder = std::env::temp_dir();
        Self {
            held: Held::new(max_bytes / 2),
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
        if !self.held.add_to_latest(value_ns, count) {
            if !self.held.has_room() {
                self.make_room()?;
            }
            self.held.push(value_ns, count);
        }
        Ok(())
    }

    /// Takes more memory up to what is allowed, then empties it into the file.
    #[cold]
    fn make_room(&mut self) -> io::Result<()> {
        if !self.held.grow() {
            self.spill_held().map_err(|e| self.failed(&e))?;
        }
        Ok(())
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
        let mut pushed = Ok(());
        other.held.for_each(|Sample { value_ns, count }| {
            if pushed.is_ok() {
                pushed = self.push(value_ns, count);
            }
        });
        pushed?;
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
            let prefixes = Prefixes::of(&targets);
            let bits = bits_left.min(self.max_bits_per_pass(prefixes.sorted.len()));
            bits_left -= bits;
            let counts = self.count_within(&prefixes, bits, bits_left)?;
            let num_left = narrow(&mut targets, &prefixes, &counts, bits).ok_or_else(damaged)?;
            if num_left <= self.max_gathered() {
                return self.gather(&targets, bits_left);
            }
        }
        Ok(targets.iter().map(|t| min_ns + t.prefix).collect())
    }

    /// Bits for which `num_histograms` find room, and few enough that the buckets are outnumbered by the samples.
    fn max_bits_per_pass(&self, num_histograms: usize) -> u32 {
        let room = self.held.max_bytes() / size_of::<u64>() / num_histograms;
        let worthwhile = if self.spilled.is_none() { self.held.len() / 4 } else { usize::MAX };
        room.min(worthwhile).checked_ilog2().unwrap_or(0).clamp(1, MAX_BITS_PER_PASS)
    }

    /// One histogram for each of the `prefixes`: the samples whose bits (of the value above the least) begin with it,
    /// by the next `bits`, above the last `shift`.
    fn count_within(&mut self, prefixes: &Prefixes, bits: u32, shift: u32) -> io::Result<Vec<u64>> {
        let min_ns = self.totals.min_ns;
        let mut counts = vec![0; prefixes.sorted.len() << bits];
        self.for_each(|sample| {
            let key = (sample.value_ns - min_ns) >> shift;
            if let Some(index) = prefixes.find(key >> bits) {
                counts[(index << bits) | (key as usize & ((1 << bits) - 1))] += u64::from(sample.count);
            }
        })?;
        Ok(counts)
    }

    /// Most samples that are sorted at once, in the memory for counting.
    fn max_gathered(&self) -> u64 {
        (self.held.max_bytes() / size_of::<Sample>()) as u64
    }

    /// The values of `targets`, of which all but the last `shift` bits are known, by sorting the samples that begin as
    /// they do.
    fn gather(&mut self, targets: &[Target], shift: u32) -> io::Result<Vec<u64>> {
        let (min_ns, prefixes) = (self.totals.min_ns, Prefixes::of(targets));
        let mut samples = Vec::new();
        self.for_each(|sample| {
            if prefixes.find((sample.value_ns - min_ns) >> shift).is_some() {
                samples.push(sample);
            }
        })?;
        samples.sort_unstable_by_key(|sample| sample.value_ns);
        let value = |target: &Target| {
            let start = samples.partition_point(|s| (s.value_ns - min_ns) >> shift < target.prefix);
            let mut rank = target.rank;
            let at_rank = samples[start..].iter().find(|sample| {
                let is_here = rank < u64::from(sample.count);
                rank = rank.saturating_sub(sample.count.into());
                is_here
            });
            at_rank.map(|sample| sample.value_ns).ok_or_else(damaged)
        };
        targets.iter().map(value).collect()
    }

    fn for_each(&mut self, mut visit: impl FnMut(Sample)) -> io::Result<()> {
        if let Some(spilled) = &mut self.spilled {
            spilled.for_each(&mut visit)?;
        }
        self.held.for_each(visit);
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

/// Lets ascending `targets` learn the next `bits` from the histograms of their prefixes; returns how many samples begin
/// as they do now, or `None` where a rank lies beyond its histogram.
fn narrow(targets: &mut [Target], prefixes: &Prefixes, counts: &[u64], bits: u32) -> Option<u64> {
    let (mut place, mut bucket, mut before, mut num_left) = (usize::MAX, 0, 0, 0);
    let mut last = None;
    for target in targets {
        let index = prefixes.find(target.prefix)?;
        if index != place {
            (place, bucket, before) = (index, 0, 0);
        }
        let histogram = &counts[index << bits..][..1 << bits];
        let mut count = *histogram.get(bucket)?;
        while before + count <= target.rank {
            before += count;
            bucket += 1;
            count = *histogram.get(bucket)?;
        }
        target.rank -= before;
        target.prefix = (target.prefix << bits) | bucket as u64;
        if last.replace(target.prefix) != Some(target.prefix) {
            num_left += count;
        }
    }
    Some(num_left)
}

/// Last bits of a prefix that are looked at first.
const FILTER_BITS: u32 = 12;

/// The prefixes of targets, each once and ascending.
struct Prefixes {
    sorted: Vec<u64>,
    /// Whether there is one with these last bits, by which most others are told.
    has_bits: [bool; 1 << FILTER_BITS],
}

impl Prefixes {
    /// Of ascending targets.
    fn of(targets: &[Target]) -> Self {
        let mut sorted: Vec<u64> = targets.iter().map(|target| target.prefix).collect();
        sorted.dedup();
        let mut has_bits = [false; 1 << FILTER_BITS];
        for &prefix in &sorted {
            has_bits[prefix as usize % (1 << FILTER_BITS)] = true;
        }
        Self { sorted, has_bits }
    }

    /// The place of a prefix.
    #[inline]
    fn find(&self, prefix: u64) -> Option<usize> {
        if !self.has_bits[prefix as usize % (1 << FILTER_BITS)] {
            return None;
        }
        match self.sorted[..] {
            [only] => (only == prefix).then_some(0),
            _ => self.sorted.binary_search(&prefix).ok(),
        }
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

//! Repeated shapes: kept where they agree, merged or refused where they do not.

use std::collections::BTreeMap;

use plumbline_schema::Operator;

use super::{
    BadCell, Clean,
    collect::{Collected, Collector},
};
use crate::stats::TimeStats;

/// Times of one shape may differ by this factor at most, beyond what rounding explains; as in training.
pub const MAX_DISAGREEMENT: f64 = 2.0;

/// A shape: matrix products are one library call, whatever operator they serve.
type Key = (Option<Operator>, Vec<u64>);

/// Merges what cannot stay apart: writes of the KV cache, times that differ by rounding only, and, where asked for, times
/// that disagree.
pub(super) fn settle(collector: &mut Collector, paths: &[std::path::PathBuf]) {
    let mut groups: BTreeMap<Key, Vec<Collected>> = BTreeMap::new();
    for collected in std::mem::take(&mut collector.samples) {
        let operator = collected.sample.operator;
        let key = ((!operator.is_gemm()).then_some(operator), collected.sample.shape.values());
        groups.entry(key).or_default().push(collected);
    }
    let mut rounded = 0;
    let mut writes = Writes::default();
    for ((operator, _), group) in groups {
        if operator == Some(Operator::KvCacheWrite) {
            collector.samples.extend(writes.merge(group));
            continue;
        }
        match Agreement::of(&group) {
            Agreement::Full => collector.samples.extend(group),
            Agreement::ByRounding => {
                rounded += group.len();
                collector.samples.extend(merge_each(group));
            }
            Agreement::None if collector.clean.contains(&Clean::MedianOfDuplicates) => {
                for collected in &group {
                    let kernel = collected.sample.kernel.clone();
                    *collector.cleaned.entry((Clean::MedianOfDuplicates, kernel)).or_default() += 1;
                }
                collector.samples.extend(merge_each(group));
            }
            Agreement::None => collector.faults.push(disagreement(&group, paths)),
        }
    }
    if rounded > 0 {
        collector.notes.insert(format!(
            "{rounded} samples of repeated shapes differ by over {MAX_DISAGREEMENT}, though not beyond rounding: merged to \
             their medians"
        ));
    }
    collector.notes.extend(writes.note());
    // The order of the tables; merging has mixed it.
    collector.samples.sort_by_key(|collected| (collected.sample.operator, collected.table, collected.line));
}

/// How the times of one shape agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Agreement {
    Full,
    /// Apart by more than the factor, which the rounding of short times explains.
    ByRounding,
    None,
}

impl Agreement {
    fn of(group: &[Collected]) -> Self {
        let (least, most) = extremes(group);
        let (low, high) = (&group[least], &group[most]);
        let time = |collected: &Collected| collected.sample.stats.p50_ns;
        if time(high) <= MAX_DISAGREEMENT * time(low) {
            return Self::Full;
        }
        // Rounded to the nearest, a time lies within half the resolution.
        let (low, high) = (time(low) + low.resolution_ns / 2.0, time(high) - high.resolution_ns / 2.0);
        if high <= MAX_DISAGREEMENT * low { Self::ByRounding } else { Self::None }
    }
}

/// Indices of the shortest and the longest time; a group is never empty.
fn extremes(group: &[Collected]) -> (usize, usize) {
    let time = |i: &usize| group[*i].sample.stats.p50_ns;
    let by_time = |a: &usize, b: &usize| time(a).total_cmp(&time(b));
    let all = || 0..group.len();
    (all().min_by(by_time).unwrap_or(0), all().max_by(by_time).unwrap_or(0))
}

/// One sample of each operator of a group, all with the group's time.
fn merge_each(group: Vec<Collected>) -> Vec<Collected> {
    let stats = merged_stats(&group);
    let mut merged: BTreeMap<Operator, Collected> = BTreeMap::new();
    for mut collected in group {
        collected.sample.stats = stats;
        merged.entry(collected.sample.operator).or_insert(collected);
    }
    merged.into_values().collect()
}

/// Statistics over the medians of several samples; how often a table timed each is not known, so that `n` stays 1.
fn merged_stats(group: &[Collected]) -> TimeStats {
    let mut medians: Vec<f64> = group.iter().map(|collected| collected.sample.stats.p50_ns).collect();
    medians.sort_by(f64::total_cmp);
    // Times are finite and there is at least one.
    TimeStats::from_times(&medians).map_or(group[0].sample.stats, |stats| TimeStats { n: 1, ..stats })
}

fn disagreement(group: &[Collected], paths: &[std::path::PathBuf]) -> BadCell {
    let (least, most) = extremes(group);
    let (low, high) = (&group[least], &group[most]);
    let (first, second) =
        if (low.table, low.line) < (high.table, high.line) { (low, high) } else { (high, low) };
    let ms = |collected: &Collected| collected.sample.stats.p50_ns / super::cells::NS_PER_MS;
    let path = |collected: &Collected| paths.get(collected.table).cloned().unwrap_or_default();
    BadCell {
        path: path(second),
        line: second.line,
        column: second.column.clone(),
        expected: format!(
            "a time within a factor of {MAX_DISAGREEMENT} of {} ms, which {}, line {}, has for the same shape",
            ms(first),
            path(first).display(),
            first.line
        ),
        found: ms(second).to_string(),
        policy: Clean::MedianOfDuplicates,
    }
}

/// Writes of keys and values: a table times them anew for each context, which does not matter to them.
#[derive(Debug, Default)]
struct Writes {
    rows: usize,
    samples: usize,
    set_aside: usize,
}

impl Writes {
    /// One sample of a token count: the median over its rows, and over those of decodes only where there are any.
    ///
    /// `FlashInfer` appends a chunk with fewer SMs than as many decodes, so that the two differ by up to 20 at one count.
    fn merge(&mut self, group: Vec<Collected>) -> Option<Collected> {
        self.rows += group.len();
        self.samples += 1;
        let num_all = group.len();
        let (decodes, prefills): (Vec<_>, Vec<_>) = group.into_iter().partition(|c| c.is_decode);
        let kept = if decodes.is_empty() { prefills } else { decodes };
        self.set_aside += num_all - kept.len();
        let stats = merged_stats(&kept);
        let mut first = kept.into_iter().next()?;
        first.sample.stats = stats;
        Some(first)
    }

    fn note(&self) -> Option<String> {
        (self.rows > self.samples).then(|| {
            format!(
                "kv_cache_write: {} rows became {} samples, each the median of a token count over its rows; {} of prefills were \
                 set aside where decodes write as many tokens",
                self.rows, self.samples, self.set_aside
            )
        })
    }
}

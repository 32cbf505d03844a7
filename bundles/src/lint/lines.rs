//! Lines of points that differ in one number of the batch, and what is off them.

use std::collections::BTreeMap;

use plumbline_schema::{Operator, StepBatch};

use super::table::Table;
use crate::{samples::CacheState, stats::percentile_of_sorted};

/// A point may differ by this ratio from what its neighbours say.
///
/// Where the batch grows by a row of tiles or a wave of blocks, or the library takes another algorithm, times step; on
/// an H100 such steps reach 13 % between shapes whose own samples scatter by 0.3 %, and repeat.
pub(super) const TOLERANCE: f64 = 0.15;

/// Largest ratio to its neighbours' interpolation that a step of tiles or waves explains: from two waves to three.
const MAX_STEP: f64 = 0.5;

/// A point must also lie further off than this many median absolute deviations of its line.
const MAX_DEVIATIONS: f64 = 4.0;

/// Fewest deviations whose median is a yardstick.
const MIN_DEVIATIONS: usize = 5;

/// One measured point of a line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct LinePoint {
    /// The number that varies: tokens, rows, keys or sequences.
    pub(super) x: u64,
    /// Median time, ns.
    pub(super) time_ns: f64,
    /// Row of the table.
    pub(super) row: usize,
}

/// Points of one layout and cache state, by ascending `x`; no `x` twice.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Line {
    pub(super) points: Vec<LinePoint>,
    /// Largest slope of ln time over ln x that the work allows: 1 where work is linear in `x`, 2 where quadratic.
    pub(super) max_slope: f64,
    /// Whether tiles or a choice of splits make the times a staircase: matrix products and attention.
    pub(super) has_steps: bool,
}

/// The lines of an operator. For attention: even decodes by keys and by number, even prompts by tokens.
pub(super) fn lines(table: &Table) -> Vec<Line> {
    let mut groups: BTreeMap<(CacheState, Vec<u64>), Line> = BTreeMap::new();
    for (row, sample) in table.samples.iter().enumerate() {
        let layout = table.layout(sample);
        let axes = match &sample.batch {
            None => vec![(vec![], sample.shape.values()[0], 1.0)],
            Some(batch) => attention_axes(batch),
        };
        for (fixed, x, max_slope) in axes {
            let line = groups.entry((sample.cache, [layout.clone(), fixed].concat())).or_default();
            line.max_slope = max_slope;
            line.has_steps = table.operator.is_gemm() || !has_one_axis(table.operator);
            line.points.push(LinePoint { x, time_ns: sample.stats.p50_ns, row });
        }
    }
    let mut lines: Vec<Line> = groups.into_values().collect();
    for line in &mut lines {
        // The shortest of repeated measurements stands for its shape.
        line.points.sort_by(|a, b| a.x.cmp(&b.x).then(a.time_ns.total_cmp(&b.time_ns)));
        line.points.dedup_by_key(|point| point.x);
    }
    lines
}

/// What stays fixed, what varies and the largest slope, for each line that a batch is on.
fn attention_axes(batch: &StepBatch) -> Vec<(Vec<u64>, u64, f64)> {
    let (chunks, contexts) = (&batch.prefill_chunks, &batch.decode_contexts);
    if let (true, Some(&first)) = (chunks.is_empty(), contexts.first())
        && contexts.iter().all(|&context| context == first)
    {
        let (keys, num) = (u64::from(first) + 1, contexts.len() as u64);
        return vec![(vec![0, num], keys, 1.0), (vec![1, keys], num, 1.0)];
    }
    if let (true, Some(&first)) = (contexts.is_empty(), chunks.first())
        && first.context_len == 0
        && chunks.iter().all(|&chunk| chunk == first)
    {
        return vec![(vec![2, chunks.len() as u64], u64::from(first.num_tokens), 2.0)];
    }
    Vec::new()
}

/// A point and the time that its neighbours say, ns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spike {
    pub(super) point: LinePoint,
    pub(super) expected_ns: f64,
}

impl Line {
    /// Points that neither what lies below them nor what lies above explains.
    ///
    /// Suspect is a point further than [`TOLERANCE`], [`MAX_DEVIATIONS`] median absolute deviations and `tolerance_ns`
    /// off the interpolation (in logarithms) of its two neighbours. A step of the curve makes its points suspect too,
    /// but continues the curve on one side; so only a point that also lies above, or below, what continues both sides is a spike.
    /// On a staircase it may also be the edge of a step of its own, up to [`MAX_STEP`], and lies between its neighbours.
    pub(super) fn spikes(&self, tolerance_ns: f64) -> Vec<Spike> {
        let expected: Vec<_> = self.points.windows(3).map(|w| between(w[0], w[2], w[1].x)).collect();
        let deviations: Vec<f64> =
            expected.iter().zip(&self.points[1..]).map(|(ns, p)| (p.time_ns / ns).ln().abs()).collect();
        let is_spike = |&(i, expected_ns): &(usize, f64)| {
            let point = self.points[i + 1];
            let is_off = deviations[i] > TOLERANCE.ln_1p()
                && (point.time_ns - expected_ns).abs() > tolerance_ns
                && deviations[i] > MAX_DEVIATIONS * median_elsewhere(&deviations, i);
            let below = self.continuation(&self.points[..=i], point.x, false);
            let above = self.continuation(&self.points[i + 2..], point.x, true);
            let is_step = self.has_steps
                && deviations[i] <= MAX_STEP.ln_1p()
                && (self.points[i].time_ns..=self.points[i + 2].time_ns).contains(&point.time_ns);
            is_off && !is_step && lies_off(point.time_ns, expected_ns, [below, above])
        };
        let spikes = expected.iter().copied().enumerate().filter(is_spike);
        spikes.map(|(i, expected_ns)| Spike { point: self.points[i + 1], expected_ns }).collect()
    }

    /// Range of times at `x` that continues the points of one side; ln time has a slope of 0 to `max_slope` over ln x.
    ///
    /// The slope is that of the nearest points which lie at least half as far apart, in logarithms, as `x` does: the
    /// noise of a short span would grow over a long one. Where there are none, any slope goes.
    fn continuation(&self, side: &[LinePoint], x: u64, is_above: bool) -> (f64, f64) {
        let mut outwards: Box<dyn Iterator<Item = &LinePoint>> =
            if is_above { Box::new(side.iter()) } else { Box::new(side.iter().rev()) };
        let Some(near) = outwards.next() else { return (0.0, f64::INFINITY) };
        let distance = |point: &LinePoint| (point.x as f64 / near.x as f64).ln().abs();
        let gap = (x as f64 / near.x as f64).ln();
        let at = |slope: f64| near.time_ns * (slope * gap).exp();
        if let Some(far) = outwards.find(|far| distance(far) >= 0.5 * gap.abs()) {
            let slope = (far.time_ns / near.time_ns).ln() / (far.x as f64 / near.x as f64).ln();
            let ns = at(slope.clamp(0.0, self.max_slope));
            return (ns, ns);
        }
        let (flat, steep) = (at(0.0), at(self.max_slope));
        (flat.min(steep), flat.max(steep))
    }

    /// Points slower than larger ones by more than the tolerances: each with the fastest larger one.
    ///
    /// Points in `skip` (rows) are left out; they are doubtful for another reason.
    pub(super) fn drops(&self, tolerance_ns: f64, skip: &[usize]) -> Vec<(LinePoint, LinePoint, usize)> {
        let mut drops: Vec<(LinePoint, LinePoint, usize)> = Vec::new();
        let mut peak: Option<LinePoint> = None;
        for &point in self.points.iter().filter(|point| !skip.contains(&point.row)) {
            let Some(slowest) = peak.filter(|peak| peak.time_ns > point.time_ns) else {
                peak = Some(point);
                continue;
            };
            if is_faster(point.time_ns, slowest.time_ns, tolerance_ns) {
                match drops.last_mut().filter(|(from, ..)| from.row == slowest.row) {
                    Some((_, fastest, num)) => {
                        *num += 1;
                        if point.time_ns < fastest.time_ns {
                            *fastest = point;
                        }
                    }
                    None => drops.push((slowest, point, 1)),
                }
            }
        }
        drops
    }
}

/// Whether a time beats another by more than the tolerances.
pub(super) fn is_faster(time_ns: f64, than_ns: f64, tolerance_ns: f64) -> bool {
    time_ns * (1.0 + TOLERANCE) < than_ns && than_ns - time_ns > tolerance_ns
}

/// Median of the deviations that the point at `i` has no part in; 0 where they are too few to be a yardstick.
fn median_elsewhere(deviations: &[f64], i: usize) -> f64 {
    let elsewhere = deviations.iter().enumerate().filter(|(j, _)| j.abs_diff(i) > 1);
    let mut sorted: Vec<f64> = elsewhere.map(|(_, &deviation)| deviation).collect();
    sorted.sort_by(f64::total_cmp);
    if sorted.len() < MIN_DEVIATIONS { 0.0 } else { percentile_of_sorted(&sorted, 0.5) }
}

/// Whether a time lies above all ranges by more than the tolerance, or below all: on the side that it is off.
fn lies_off(time_ns: f64, expected_ns: f64, ranges: [(f64, f64); 2]) -> bool {
    if time_ns > expected_ns {
        ranges.iter().all(|(_, high)| time_ns > high * (1.0 + TOLERANCE))
    } else {
        ranges.iter().all(|(low, _)| time_ns * (1.0 + TOLERANCE) < *low)
    }
}

/// Time at `x` on the straight line in logarithms through two points.
fn between(a: LinePoint, b: LinePoint, x: u64) -> f64 {
    let part = (x as f64 / a.x as f64).ln() / (b.x as f64 / a.x as f64).ln();
    (a.time_ns.ln() * (1.0 - part) + b.time_ns.ln() * part).exp()
}

/// Whether an operator's batch is one number.
pub(super) fn has_one_axis(operator: Operator) -> bool {
    operator != Operator::Attention
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(points: &[(u64, f64)]) -> Line {
        let point = |(row, &(x, time_ns)): (usize, &(u64, f64))| LinePoint { x, time_ns, row };
        Line { points: points.iter().enumerate().map(point).collect(), max_slope: 1.0, has_steps: false }
    }

    fn spikes_at(points: &[(u64, f64)]) -> Vec<u64> {
        line(points).spikes(500.0).iter().map(|spike| spike.point.x).collect()
    }

    #[test]
    fn a_spike_is_off_both_sides_and_a_step_off_one() {
        // Flat, then proportional; a knee is no spike.
        let knee = [(1, 5e3), (2, 5e3), (4, 5e3), (8, 5e3), (16, 5e3), (32, 10e3), (64, 20e3)];
        assert!(spikes_at(&knee).is_empty());
        // Another wave: a step by half.
        let step = [(1, 5e3), (2, 5e3), (4, 5e3), (8, 7.5e3), (16, 7.5e3), (32, 7.5e3)];
        assert!(spikes_at(&step).is_empty());
        // Off by a half where the curve is flat, and where it is steep: there it lies between its neighbours.
        let mut flat = knee;
        flat[2].1 = 7.5e3;
        assert_eq!(spikes_at(&flat), [4]);
        let mut steep = [(1, 5e3), (2, 10e3), (4, 20e3), (8, 40e3), (16, 80e3), (32, 160e3), (64, 320e3)];
        steep[3].1 = 59e3;
        assert_eq!(spikes_at(&steep), [8]);
        // On a staircase that may be a further wave; twice the time is none.
        let on_stairs = |points: &[(u64, f64)]| Line { has_steps: true, ..line(points) }.spikes(500.0).len();
        assert_eq!(on_stairs(&steep), 0);
        steep[3].1 = 79e3;
        assert_eq!(on_stairs(&steep), 1);
        // Between neighbours far apart a curve may bend anywhere.
        assert!(spikes_at(&[(1, 5e3), (2, 5.1e3), (640, 6e3), (4096, 38e3), (4608, 42e3)]).is_empty());
        // A constant and a linear part, wide apart: below the interpolation, above both continuations.
        assert!(
            spikes_at(&[(1, 1.80e3), (37, 1.84e3), (640, 2.57e3), (2933, 5.38e3), (8192, 11.7e3)]).is_empty()
        );
        // Small against the gap between launches.
        assert!(spikes_at(&[(1, 1000.0), (2, 1000.0), (4, 1300.0), (8, 1000.0), (16, 1000.0)]).is_empty());
    }

    #[test]
    fn more_work_in_less_time_is_told_once_by_its_slowest_point() {
        let points = [(1, 5e3), (2, 9e3), (4, 5.5e3), (8, 5e3), (16, 8e3), (32, 20e3), (64, 18e3)];
        let drops = line(&points).drops(500.0, &[]);
        assert_eq!(drops.len(), 1);
        let (from, to, num) = drops[0];
        assert_eq!((from.x, to.x, num), (2, 8, 2));
        assert!(line(&points).drops(500.0, &[1]).is_empty());
    }

    #[test]
    fn even_batches_lie_on_lines() {
        let axes = |chunks: &str, decodes: &str| attention_axes(&StepBatch::parse(chunks, decodes).unwrap());
        assert_eq!(axes("", "9;9"), [(vec![0, 2], 10, 1.0), (vec![1, 10], 2, 1.0)]);
        assert_eq!(axes("64:0;64:0", ""), [(vec![2, 2], 64, 2.0)]);
        for (chunks, decodes) in [("", "9;8"), ("64:1", ""), ("64:0;32:0", ""), ("64:0", "9")] {
            assert!(axes(chunks, decodes).is_empty(), "{chunks} {decodes}");
        }
    }
}

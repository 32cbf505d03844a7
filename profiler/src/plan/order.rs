//! Which points are held out, and in which order all are measured.

use std::collections::BTreeMap;

use plumbline_bundles::CacheState;
use plumbline_schema::{Operator, OperatorShape};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use super::{PlannedPoint, PointSource, cost, layout::layout_of, sequence::spread};

/// One point in so many is held out, of each operator.
const ONE_IN: usize = 20;
/// The whole of a group of points; ranks are shares of it, so that the order needs no floating point.
const WHOLE: u64 = 1 << 32;
/// By this share of all other points every held-out point has been measured.
const HELD_OUT_BY: u64 = WHOLE / 5;

/// Points that differ only in the batch.
type Group = (Operator, PointSource, Vec<u64>);

fn group_of(planned: &PlannedPoint) -> Group {
    let operator = planned.point.operator;
    (operator, planned.source, layout_of(operator, &planned.point.shape))
}

fn is_main(planned: &PlannedPoint) -> bool {
    planned.cache == CacheState::in_model(planned.point.operator)
}

/// Like with like, then small to large.
fn size_key(planned: &PlannedPoint) -> (u8, u64) {
    let kind = match planned.point.shape {
        OperatorShape::Attention { load, .. } => {
            let several = u8::from(load.num_prefill_seqs > 1);
            let decodes = u64::from(load.num_decode_seqs);
            let is_uneven = decodes * u64::from(load.max_decode_kv_tokens) > 2 * load.decode_kv_tokens;
            let chunks = if load.num_prefill_seqs == 0 { 0 } else { 1 + several };
            3 * chunks + if decodes == 0 { 0 } else { 1 + u8::from(is_uneven) }
        }
        _ => 0,
    };
    (kind, cost(&planned.point.shape))
}

/// Marks a random point in twenty of each operator, stratified by layout and size, as held out.
///
/// Never the extremes of a layout, without which its other points would be extrapolated.
pub(super) fn hold_out(points: &mut [PlannedPoint]) {
    let mut groups: BTreeMap<Group, Vec<usize>> = BTreeMap::new();
    for (i, planned) in points.iter().enumerate().filter(|(_, planned)| is_main(planned)) {
        groups.entry(group_of(planned)).or_default().push(i);
    }
    let mut of_operator: BTreeMap<Operator, Vec<(usize, bool)>> = BTreeMap::new();
    for ((operator, ..), mut group) in groups {
        group.sort_by_key(|&i| size_key(&points[i]));
        let is_extreme = extremes(&group, points);
        of_operator.entry(operator).or_default().extend(group.into_iter().zip(is_extreme));
    }
    for (operator, all) in of_operator {
        let mut random = Pcg64::seed_from_u64(operator as u64);
        let count = all.len().div_ceil(ONE_IN);
        for stratum in 0..count {
            let range = stratum * all.len() / count..(stratum + 1) * all.len() / count;
            let inner: Vec<usize> =
                all[range].iter().filter(|(_, extreme)| !extreme).map(|(i, _)| *i).collect();
            if !inner.is_empty() {
                points[inner[random.random_range(0..inner.len())]].is_held_out = true;
            }
        }
    }
}

/// Whether each point of a group has the least or the most work, or is alone in having the least or the most of some
/// number of its shape.
fn extremes(group: &[usize], points: &[PlannedPoint]) -> Vec<bool> {
    let mut numbers: Vec<Vec<u64>> = group.iter().map(|&i| points[i].point.shape.values()).collect();
    let mut is_extreme = vec![false; group.len()];
    let costs: Vec<u64> = group.iter().map(|&i| cost(&points[i].point.shape)).collect();
    for (i, numbers) in numbers.iter_mut().enumerate() {
        numbers.push(costs[i]);
    }
    for column in 0..numbers.first().map_or(0, Vec::len) {
        let all = || numbers.iter().map(|numbers| numbers[column]);
        for bound in [all().min(), all().max()].into_iter().flatten() {
            let mut at = all().enumerate().filter(|(_, value)| *value == bound).map(|(i, _)| i);
            if let (Some(only), None) = (at.next(), at.next()) {
                is_extreme[only] = true;
            }
        }
    }
    is_extreme
}

/// Orders points by importance, so that every prefix is a good plan of its size.
///
/// First the least and then the most work of each layout of the stated models; then from each layout, and from each
/// operator's held-out points, the same share, spread over sizes; held-out points are through after a fifth.
pub(super) fn by_importance(points: Vec<PlannedPoint>) -> Vec<PlannedPoint> {
    let mut groups: BTreeMap<Group, Vec<PlannedPoint>> = BTreeMap::new();
    let mut held_out: BTreeMap<Operator, Vec<PlannedPoint>> = BTreeMap::new();
    for planned in points {
        if planned.is_held_out {
            held_out.entry(planned.point.operator).or_default().push(planned);
        } else {
            groups.entry(group_of(&planned)).or_default().push(planned);
        }
    }
    let mut ranked: Vec<(u64, Operator, PlannedPoint)> = Vec::new();
    let offsets = offsets(groups.keys());
    for (((operator, source, _), mut group), offset) in groups.into_iter().zip(offsets) {
        group.sort_by_key(|planned| cost(&planned.point.shape));
        if source == PointSource::Model {
            let (first, last, rest) = ends(group);
            ranked.extend(first.map(|planned| (0, operator, planned)));
            ranked.extend(last.map(|planned| (1, operator, planned)));
            group = rest;
        }
        let (main, other): (Vec<_>, Vec<_>) = group.into_iter().partition(is_main);
        // From 2, behind the ends. The other cache state only shows a difference: it has time.
        ranked.extend(shares(main, offset, 2..WHOLE).map(|(rank, p)| (rank, operator, p)));
        ranked.extend(shares(other, offset, WHOLE / 2..WHOLE).map(|(rank, p)| (rank, operator, p)));
    }
    for (operator, points) in held_out {
        ranked.extend(
            shares(points, operator as u64 * WHOLE / 16, 2..HELD_OUT_BY).map(|(rank, p)| (rank, operator, p)),
        );
    }
    ranked.sort_by_key(|(rank, operator, _)| (*rank, *operator));
    ranked.into_iter().map(|(_, _, planned)| planned).collect()
}

/// Where each group begins, as a share of the distance of its points: of an operator's groups from one source the first
/// and the last layout at once, then those between, spread.
fn offsets<'a>(groups: impl Iterator<Item = &'a Group>) -> Vec<u64> {
    let keys: Vec<_> = groups.map(|(operator, source, _)| (*operator, *source)).collect();
    let mut offsets = vec![0; keys.len()];
    let mut begin = 0;
    while begin < keys.len() {
        let count = keys[begin..].iter().take_while(|&&key| key == keys[begin]).count();
        let between = spread(count.saturating_sub(2), 0).into_iter().map(|i| i + 1);
        let order = [0, count - 1].into_iter().take(count).chain(between);
        for (place, i) in order.enumerate() {
            offsets[begin + i] = place as u64 * WHOLE / count as u64;
        }
        begin += count;
    }
    offsets
}

/// The first and the last point in the main cache state, and the others.
fn ends(mut group: Vec<PlannedPoint>) -> (Option<PlannedPoint>, Option<PlannedPoint>, Vec<PlannedPoint>) {
    let last = group.iter().rposition(is_main).map(|i| group.remove(i));
    let first = group.iter().position(is_main).map(|i| group.remove(i));
    // A single point is the first.
    if first.is_none() { (last, None, group) } else { (first, last, group) }
}

/// Ranks points evenly over a range, in an order that is spread over kinds and sizes.
fn shares(
    mut points: Vec<PlannedPoint>,
    offset: u64,
    range: std::ops::Range<u64>,
) -> impl Iterator<Item = (u64, PlannedPoint)> {
    points.sort_by_key(size_key);
    let count = points.len().max(1) as u64;
    // Groups that begin at different places go through their sizes in different orders.
    let order = spread(points.len(), (offset >> 16) as u32);
    let length = range.end - range.start;
    let mut slots: Vec<Option<PlannedPoint>> = points.into_iter().map(Some).collect();
    order.into_iter().enumerate().filter_map(move |(j, i)| {
        let place = (j as u64 * WHOLE + offset) / count;
        // In units of 2^-16, so that the product stays below 2^64.
        slots[i].take().map(|planned| (range.start + (place >> 16) * (length >> 16), planned))
    })
}

//! Where an operator was measured: evenly over its layouts, without holes?

use std::collections::{BTreeMap, BTreeSet};

use plumbline_schema::{Operator, OperatorShape};

use super::{
    Finding, Rule, Severity,
    table::{Table, share},
};
use crate::samples::{CacheState, Sample};

/// Layouts of an operator may reach up to sizes that differ by this ratio, and hold numbers of points that do.
const MAX_RANGE_RATIO: f64 = 2.0;

/// Neighbouring sizes may lie this ratio apart. Between them a curve goes from bound by launching to bound by memory or
/// compute; over a wider gap that knee can lie anywhere.
const MAX_GAP_RATIO: f64 = 4.0;

/// One number of the batch along which sizes are compared.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Axis {
    name: &'static str,
    /// Whether single sizes matter, or only how far they reach.
    has_gaps: bool,
}

/// Sizes of one axis, by layout.
type Sizes = BTreeMap<Axis, BTreeMap<Vec<u64>, BTreeSet<u64>>>;

/// Judges the samples in the state in which a model runs the operator; the other state is measured sparsely on purpose.
pub(super) fn check(table: &Table, findings: &mut Vec<Finding>) {
    let own = CacheState::in_model(table.operator);
    let mut sizes = Sizes::new();
    for sample in table.samples.iter().filter(|sample| sample.cache == own) {
        for (axis, value) in axes(table.operator, sample) {
            sizes.entry(axis).or_default().entry(table.layout(sample)).or_default().insert(value);
        }
    }
    for (axis, layouts) in &sizes {
        ragged(table, *axis, layouts, findings);
        if axis.has_gaps {
            holes(table, *axis, layouts, findings);
        }
    }
}

fn axes(operator: Operator, sample: &Sample) -> Vec<(Axis, u64)> {
    let sized = |name| Axis { name, has_gaps: true };
    let summed = |name| Axis { name, has_gaps: false };
    let OperatorShape::Attention { load, .. } = sample.shape else {
        return vec![(sized(operator.shape_columns()[0]), sample.shape.values()[0])];
    };
    // Sums of keys are spread by nature; a batch without decodes says nothing of decodes.
    let all = [
        (sized("num_prefill_tokens"), load.num_prefill_tokens.into()),
        (summed("prefill_kv_tokens"), load.prefill_kv_tokens),
        (sized("num_decode_seqs"), load.num_decode_seqs.into()),
        (summed("decode_kv_tokens"), load.decode_kv_tokens),
    ];
    all.into_iter().filter(|(_, value)| *value > 0).collect()
}

fn ragged(
    table: &Table,
    axis: Axis,
    layouts: &BTreeMap<Vec<u64>, BTreeSet<u64>>,
    findings: &mut Vec<Finding>,
) {
    let last = |sizes: &BTreeSet<u64>| sizes.last().copied().unwrap_or(0);
    let reach: Vec<(&Vec<u64>, u64)> = layouts.iter().map(|(layout, sizes)| (layout, last(sizes))).collect();
    let farthest = reach.iter().map(|(_, max)| *max).max().unwrap_or(0);
    let is_short = |max: u64| (max as f64) * MAX_RANGE_RATIO < farthest as f64;
    let num_short = reach.iter().filter(|(_, max)| is_short(*max)).count();
    if let Some((layout, max)) = reach.iter().min_by_key(|(_, max)| *max).filter(|(_, max)| is_short(*max)) {
        let expected = format!("every layout measured up to about {} = {farthest}", axis.name);
        let found =
            format!("{} layouts end below half of it; the first at {max}", share(num_short, reach.len()));
        let hint = "larger launches of these layouts are extrapolated: measure them too";
        let finding = table.whole(Rule::RaggedGrid, Severity::Warning, expected, found, hint);
        findings.push(finding.on(table.describe_layout(layout)));
    }
    if !axis.has_gaps {
        return;
    }
    let most = layouts.values().map(BTreeSet::len).max().unwrap_or(0);
    let sparse: Vec<_> =
        layouts.iter().filter(|(_, s)| (s.len() as f64) * MAX_RANGE_RATIO < most as f64).collect();
    if let Some((layout, sizes)) = sparse.first() {
        let expected = format!("about as many sizes of {} in every layout, {most}", axis.name);
        let found = format!(
            "{} layouts have less than half; the first {}",
            share(sparse.len(), layouts.len()),
            sizes.len()
        );
        let hint = "fine where these layouts only help to predict others; errors on them are larger";
        let finding = table.whole(Rule::RaggedGrid, Severity::Info, expected, found, hint);
        findings.push(finding.on(table.describe_layout(layout)));
    }
}

fn holes(
    table: &Table,
    axis: Axis,
    layouts: &BTreeMap<Vec<u64>, BTreeSet<u64>>,
    findings: &mut Vec<Finding>,
) {
    let single: Vec<_> = layouts.iter().filter(|(_, sizes)| sizes.len() == 1).collect();
    if let Some((layout, _)) = single.first() {
        let found = format!("{} layouts have one", share(single.len(), layouts.len()));
        let expected = format!("several sizes of {} in every layout", axis.name);
        let hint = "how a layout's time grows cannot be told from one size: measure more";
        let finding = table.whole(Rule::SinglePoint, Severity::Warning, expected, found, hint);
        findings.push(finding.on(table.describe_layout(layout)));
    }
    let mut num = 0;
    let mut widest: Option<(f64, &Vec<u64>, u64, u64)> = None;
    for (layout, sizes) in layouts {
        let gaps = sizes.iter().zip(sizes.iter().skip(1)).map(|(&a, &b)| (b as f64 / a as f64, a, b));
        let Some((ratio, a, b)) = gaps.max_by(|x, y| x.0.total_cmp(&y.0)) else { continue };
        if ratio > MAX_GAP_RATIO {
            num += 1;
            if widest.is_none_or(|(wide, ..)| ratio > wide) {
                widest = Some((ratio, layout, a, b));
            }
        }
    }
    if let Some((ratio, layout, a, b)) = widest {
        let expected = format!("neighbouring sizes of {} at most {MAX_GAP_RATIO} times apart", axis.name);
        let found = format!("{a} and {b}, {ratio:.1} times apart; {} layouts", share(num, layouts.len()));
        let hint = "measure sizes between them";
        let finding = table.whole(Rule::Hole, Severity::Warning, expected, found, hint);
        findings.push(finding.on(table.describe_layout(layout)));
    }
}

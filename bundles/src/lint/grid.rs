//! Where an operator was measured: evenly over its layouts, without holes?

use std::collections::{BTreeMap, BTreeSet};

use plumbline_schema::{ModelSpec, Operator, OperatorShape, StepBatch, forward_pass};

use super::{
    Finding, Rule, Severity,
    table::{Table, share},
};
use crate::{
    features::batch_columns,
    samples::{CacheState, Sample},
};

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

/// What is known along one axis, by layout.
type Layouts = BTreeMap<Vec<u64>, Known>;

/// A layout with what is known of it.
struct Known {
    sizes: BTreeSet<u64>,
    /// Whether a model that is asked about has this layout.
    is_of_model: bool,
}

/// Judges the samples in the state in which a model runs the operator; the other state is measured sparsely on purpose.
///
/// Curves are expected of the layouts of `models` and of those measured at no fewer than half as many sizes as the
/// densest. A sparser layout is there to tell how times depend on the layout, so its sizes lie anywhere.
pub(super) fn check(table: &Table, models: &[ModelSpec], findings: &mut Vec<Finding>) {
    let own = CacheState::in_model(table.operator);
    let of_models = model_layouts(table.operator, models);
    let mut axes_known: BTreeMap<Axis, Layouts> = BTreeMap::new();
    for sample in table.samples.iter().filter(|sample| sample.cache == own) {
        for (axis, value) in axes(table.operator, sample) {
            let layout = table.layout(sample);
            let is_of_model = of_models.contains(&layout);
            let layouts = axes_known.entry(axis).or_default();
            let known = layouts.entry(layout).or_insert(Known { sizes: BTreeSet::new(), is_of_model });
            known.sizes.insert(value);
        }
    }
    for (axis, mut layouts) in axes_known {
        sparse(table, axis, &mut layouts, findings);
        short(table, axis, &layouts, findings);
        if axis.has_gaps {
            holes(table, axis, &layouts, findings);
        }
    }
}

/// Layouts that an operator has in some models.
fn model_layouts(operator: Operator, models: &[ModelSpec]) -> BTreeSet<Vec<u64>> {
    let batch = StepBatch { decode_contexts: vec![0], ..StepBatch::default() }.shape();
    // One GPU divides every model.
    let calls = models.iter().flat_map(|model| forward_pass(model, &batch, 1).unwrap_or_default());
    let own = calls.filter(|call| call.operator == operator);
    own.map(|call| {
        let mut values = call.shape.values();
        values.drain(batch_columns(operator));
        values
    })
    .collect()
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

/// Takes out the layouts that are sparse on purpose, with a remark; warns of those of models that are as sparse.
fn sparse(table: &Table, axis: Axis, layouts: &mut Layouts, findings: &mut Vec<Finding>) {
    let num_layouts = layouts.len();
    let most = layouts.values().map(|known| known.sizes.len()).max().unwrap_or(0);
    let is_sparse = |known: &Known| (known.sizes.len() as f64) * MAX_RANGE_RATIO < most as f64;
    for is_of_model in [true, false] {
        let found: Vec<_> = layouts
            .iter()
            .filter(|(_, known)| is_sparse(known) && known.is_of_model == is_of_model)
            .collect();
        let Some((layout, known)) = found.first().filter(|_| axis.has_gaps) else { continue };
        let (severity, whose, hint) = if is_of_model {
            (Severity::Warning, "a model's layouts", "measure these layouts at more sizes")
        } else {
            (Severity::Info, "layouts", "fine where these layouts only help to predict others")
        };
        let expected = format!("about as many sizes of {} in every layout, {most}", axis.name);
        let part = share(found.len(), num_layouts);
        let text = format!("{part} are {whose} with less than half; the first {}", known.sizes.len());
        let finding = table.whole(Rule::RaggedGrid, severity, expected, text, hint);
        findings.push(finding.on(table.describe_layout(layout)));
    }
    layouts.retain(|_, known| known.is_of_model || !is_sparse(known));
}

fn short(table: &Table, axis: Axis, layouts: &Layouts, findings: &mut Vec<Finding>) {
    let last = |known: &Known| known.sizes.last().copied().unwrap_or(0);
    let reach: Vec<(&Vec<u64>, u64)> = layouts.iter().map(|(layout, known)| (layout, last(known))).collect();
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
}

fn holes(table: &Table, axis: Axis, layouts: &Layouts, findings: &mut Vec<Finding>) {
    let single: Vec<_> = layouts.iter().filter(|(_, known)| known.sizes.len() == 1).collect();
    if let Some((layout, _)) = single.first() {
        let found = format!("{} layouts have one", share(single.len(), layouts.len()));
        let expected = format!("several sizes of {} in every layout", axis.name);
        let hint = "how a layout's time grows cannot be told from one size: measure more";
        let finding = table.whole(Rule::SinglePoint, Severity::Warning, expected, found, hint);
        findings.push(finding.on(table.describe_layout(layout)));
    }
    let mut num = 0;
    let mut widest: Option<(f64, &Vec<u64>, u64, u64)> = None;
    for (layout, Known { sizes, .. }) in layouts {
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

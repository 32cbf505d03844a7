//! Layouts: the numbers of a shape that the model decides, and when measured ones say something of another.

use plumbline_schema::{Operator, operator::MAX_SHAPE_COLUMNS};

use crate::features::batch_columns;

/// Fewest measured layouts that can surround another.
pub const MIN_LAYOUTS: usize = 8;
/// Some measured layout must be within this factor of each number of a surrounded one.
pub const NEAR_FACTOR: u64 = 2;
/// Most layouts that an error names.
const MAX_NAMED: usize = 8;

/// Index of the first shape column that the model decides, and one past the last.
#[must_use]
pub const fn layout_columns(operator: Operator) -> std::ops::Range<usize> {
    let batch = batch_columns(operator);
    if batch.start > 0 { 0..batch.start } else { batch.end..operator.shape_columns().len() }
}

/// Whether measured layouts surround another, so that its times are interpolated between theirs.
///
/// That is so when at least [`MIN_LAYOUTS`] were measured, each number lies between the smallest and the largest
/// measured, and one measured layout is within [`NEAR_FACTOR`] in each number, with the same `head_dim` where there is
/// one. Layouts are given each once, with the numbers of [`layout_columns`] in their order; those of matrix products
/// come from all five operators.
#[must_use]
pub fn layouts_surround<'a>(
    operator: Operator,
    measured: impl IntoIterator<Item = &'a [u64]>,
    wanted: &[u64],
) -> bool {
    let (mut least, mut most) = ([u64::MAX; MAX_SHAPE_COLUMNS], [0; MAX_SHAPE_COLUMNS]);
    let (mut num_layouts, mut has_near) = (0, false);
    for other in measured {
        num_layouts += 1;
        has_near |= is_near(operator, other, wanted);
        for (c, &value) in other.iter().enumerate() {
            least[c] = least[c].min(value);
            most[c] = most[c].max(value);
        }
    }
    let is_inside = wanted.iter().enumerate().all(|(c, value)| (least[c]..=most[c]).contains(value));
    num_layouts >= MIN_LAYOUTS && has_near && is_inside
}

/// Whether a layout is within [`NEAR_FACTOR`] of another in each number, and of the same `head_dim`.
pub(super) fn is_near(operator: Operator, other: &[u64], wanted: &[u64]) -> bool {
    let head_dim = head_dim_place(operator);
    let is_near = |(c, (&a, &b)): (usize, (&u64, &u64))| {
        let factor = if Some(c) == head_dim { 1 } else { NEAR_FACTOR };
        a <= b.saturating_mul(factor) && b <= a.saturating_mul(factor)
    };
    other.iter().zip(wanted).enumerate().all(is_near)
}

/// Place of `head_dim` in a layout; asked for each layout of a bundle, so not found by its name.
const fn head_dim_place(operator: Operator) -> Option<usize> {
    match operator {
        Operator::QkNorm | Operator::Rope | Operator::Attention => Some(2),
        Operator::KvCacheWrite => Some(1),
        _ => None,
    }
}

/// The numbers of a shape that the model decides.
pub(super) fn layout(operator: Operator, values: &[u64]) -> &[u64] {
    &values[layout_columns(operator)]
}

/// A layout in words, and of the measured ones those nearest to it.
pub(super) fn describe_nearest<'a>(
    operator: Operator,
    wanted: &[u64],
    measured: impl Iterator<Item = &'a [u64]>,
) -> (String, String) {
    let describe = |layout: &[u64]| {
        let names = &operator.shape_columns()[layout_columns(operator)];
        let named = names.iter().zip(layout).map(|(name, value)| format!("{name} = {value}"));
        named.collect::<Vec<_>>().join(", ")
    };
    let distance = |other: &[u64]| {
        other.iter().zip(wanted).map(|(&a, &b)| (a as f64 / b as f64).ln().abs()).sum::<f64>()
    };
    let mut nearest: Vec<&[u64]> = measured.collect();
    nearest.sort_by(|a, b| distance(a).total_cmp(&distance(b)));
    let num_more = nearest.len().saturating_sub(MAX_NAMED);
    nearest.truncate(MAX_NAMED);
    nearest.sort_unstable();
    let mut named: Vec<String> = nearest.iter().map(|layout| describe(layout)).collect();
    if num_more > 0 {
        named.push(format!("{num_more} more, farther away"));
    }
    (describe(wanted), named.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_the_columns_beside_the_batch() {
        for operator in Operator::ALL {
            let columns = operator.shape_columns();
            let (layout, batch) = (layout_columns(operator), batch_columns(operator));
            assert_eq!(layout.len() + batch.len(), columns.len(), "{operator}");
            assert!(layout.clone().all(|column| !batch.contains(&column)), "{operator}");
            let place = columns[layout].iter().position(|&name| name == "head_dim");
            assert_eq!(head_dim_place(operator), place, "{operator}");
        }
    }
}

//! Layouts: the numbers of a shape that the model decides, and how near they lie to each other.

use plumbline_bundles::{features::batch_columns, predictor::NEAR_FACTOR};
use plumbline_schema::{Operator, OperatorShape};

/// A ratio of two numbers, `.0 / .1`, at least 1.
pub(super) type Ratio = (u64, u64);

/// Layouts that differ by more in a number say nothing of each other, by the rule of the predictors.
pub(super) const NEAR: Ratio = (NEAR_FACTOR, 1);

/// The numbers of a shape that the model decides, in the order of their columns.
pub(super) fn layout_of(operator: Operator, shape: &OperatorShape) -> Vec<u64> {
    let batch = batch_columns(operator);
    let values = shape.values().into_iter().enumerate();
    values.filter(|(column, _)| !batch.contains(column)).map(|(_, value)| value).collect()
}

/// Whether two layouts have heads of one size and differ by at most `ratio` in every other number.
pub(super) fn is_near(operator: Operator, a: &[u64], b: &[u64], ratio: Ratio) -> bool {
    let batch = batch_columns(operator);
    let columns = operator.shape_columns().iter().enumerate();
    let mut names = columns.filter(|(column, _)| !batch.contains(column)).map(|(_, name)| *name);
    a.iter().zip(b).all(|(&a, &b)| match names.next() {
        // Kernels are built for one size of a head.
        Some("head_dim") => a == b,
        _ => a.max(b) * ratio.1 <= a.min(b) * ratio.0,
    })
}

//! Honest errors: every shape is predicted by a model that never saw it.

use std::collections::BTreeMap;

use linfa::prelude::SingleTargetRegression;
use ndarray::Array1;
use plumbline_bundles::{
    predictor::{ErrorSummary, RatioRange, layout_columns},
    stats::percentile_of_sorted,
};
use plumbline_schema::Operator;
use rand::Rng;
use rand_pcg::Pcg64;

use crate::dataset::Row;

/// How rows are dealt into folds.
///
/// linfa's own `fold` cuts rows where they lie and leaves out the last `n % k`; it serves where the data is
/// already in random order and many, neither of which a measuring plan is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Folds {
    /// At random, by the seed. A row is a shape, so no shape lies in two folds.
    Shuffled {
        /// Seed of the order.
        seed: u64,
    },
    /// Runs of neighbours in the order given, so that each fold is a gap or an edge.
    Blocked,
}

/// Deals `n` rows into at most `k` folds of nearly one size; each row lies in exactly one.
#[must_use]
pub fn folds(n: usize, k: usize, how: Folds) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..n).collect();
    if let Folds::Shuffled { seed } = how {
        let mut rng = Pcg64::new(u128::from(seed), 0x000f_01d5);
        for i in (1..n).rev() {
            order.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
        }
    }
    let k = k.clamp(1, n.max(1));
    (0..k).map(|fold| order[fold * n / k..(fold + 1) * n / k].to_vec()).collect()
}

/// Deals rows into at most `k` folds of whole layouts, shuffled by the seed; each row lies in exactly one.
#[must_use]
pub fn layout_folds(operator: Operator, rows: &[Row], k: usize, seed: u64) -> Vec<Vec<usize>> {
    let columns = layout_columns(operator);
    let mut by_layout: BTreeMap<&[u64], Vec<usize>> = BTreeMap::new();
    for (i, row) in rows.iter().enumerate() {
        by_layout.entry(&row.values[columns.clone()]).or_default().push(i);
    }
    let layouts: Vec<Vec<usize>> = by_layout.into_values().collect();
    let folds = folds(layouts.len(), k, Folds::Shuffled { seed });
    folds
        .iter()
        .map(|fold| fold.iter().flat_map(|&layout| layouts[layout].iter().copied()).collect())
        .collect()
}

/// Summarises predictions against measurements; `None` when there are none.
#[must_use]
pub fn summarise(predicted: &[f64], measured: &[f64]) -> Option<ErrorSummary> {
    if predicted.is_empty() || predicted.len() != measured.len() {
        return None;
    }
    let signed: Vec<f64> = predicted.iter().zip(measured).map(|(p, m)| p / m - 1.0).collect();
    let mut sorted: Vec<f64> = signed.iter().map(|error| error.abs()).collect();
    sorted.sort_by(f64::total_cmp);
    // linfa divides by the array it is called on.
    let mean = Array1::from(measured.to_vec())
        .mean_absolute_percentage_error(&Array1::from(predicted.to_vec()))
        .ok()?;
    Some(ErrorSummary {
        n: predicted.len() as u32,
        mean,
        p50: percentile_of_sorted(&sorted, 0.5),
        p90: percentile_of_sorted(&sorted, 0.9),
        p99: percentile_of_sorted(&sorted, 0.99),
        max: *sorted.last()?,
        bias: signed.iter().sum::<f64>() / signed.len() as f64,
    })
}

/// The central range of `measured / predicted` that holds `coverage` of the pairs, widened to include 1.
#[must_use]
pub fn ratio_range(predicted: &[f64], measured: &[f64], coverage: f64) -> RatioRange {
    let mut ratios: Vec<f64> = measured.iter().zip(predicted).map(|(m, p)| m / p).collect();
    if ratios.is_empty() {
        return RatioRange { low: 1.0, high: 1.0 };
    }
    ratios.sort_by(f64::total_cmp);
    let tail = (1.0 - coverage) / 2.0;
    RatioRange {
        low: percentile_of_sorted(&ratios, tail).min(1.0),
        high: percentile_of_sorted(&ratios, 1.0 - tail).max(1.0),
    }
}

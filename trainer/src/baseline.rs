//! Fitting the baseline: the fixed overhead of a launch and a coefficient for each of its roofline parts.
//!
//! Minimises the sum of `(baseline / time - 1)^2` over the rows with all coefficients at least 0, by
//! coordinate descent on the normal equations; with under ten unknowns that takes microseconds.

use plumbline_bundles::features::parts_ns;
use plumbline_schema::GpuSpec;

use crate::dataset::Row;

/// The overhead is at least this share of the shortest time: a launch is never free.
const MIN_OVERHEAD_SHARE: f64 = 0.05;
/// Relative errors beyond this count by their size rather than its square, so that a few odd shapes do not
/// bend the law of the others (Huber 1964).
const LARGE_ERROR: f64 = 0.05;
/// Rounds of weighing rows by their last error.
const REWEIGHTINGS: usize = 8;
/// Weight of the squared coefficients, in rows: a part that hardly shows in the rows must not take a large coefficient
/// from noise, which shapes where it does show would then pay for.
const SHRINKAGE: f64 = 1e-5;
/// Sweeps over all unknowns; the small quadratic has settled long before.
const SWEEPS: usize = 2000;

/// A fitted baseline.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Baseline {
    /// Fixed cost of a launch, ns.
    pub(crate) overhead_ns: f64,
    /// Factors on the roofline parts, in their order.
    pub(crate) coefficients: Vec<f64>,
}

/// Fits the baseline to rows of one operator (or of several that share their parts), at least one.
pub(crate) fn fit(rows: &[&Row], gpu: &GpuSpec) -> Baseline {
    let shortest = rows.iter().map(|row| row.time_ns).fold(f64::INFINITY, f64::min);
    // Unknown 0 is the overhead, in units of the shortest time so that all columns are of similar size.
    let columns: Vec<Vec<f64>> = rows
        .iter()
        .map(|row| {
            let parts = parts_ns(&row.shape, gpu);
            let relative = parts.as_slice().iter().map(|part| part / row.time_ns);
            std::iter::once(shortest / row.time_ns).chain(relative).collect()
        })
        .collect();
    let mut weights = vec![1.0; rows.len()];
    let mut x = solve(&columns, &weights);
    for _ in 0..REWEIGHTINGS {
        for (weight, row) in weights.iter_mut().zip(&columns) {
            let error = (row.iter().zip(&x).map(|(part, x)| part * x).sum::<f64>() - 1.0).abs();
            *weight = if error > LARGE_ERROR { LARGE_ERROR / error } else { 1.0 };
        }
        x = solve(&columns, &weights);
    }
    Baseline { overhead_ns: x[0] * shortest, coefficients: x[1..].to_vec() }
}

/// Coefficients that bring the weighted rows closest to 1.
fn solve(columns: &[Vec<f64>], weights: &[f64]) -> Vec<f64> {
    let unknowns = columns[0].len();
    let weighted = || columns.iter().zip(weights);
    let product = |i: usize, j: usize| weighted().map(|(row, weight)| weight * row[i] * row[j]).sum::<f64>();
    let mut gram: Vec<Vec<f64>> =
        (0..unknowns).map(|i| (0..unknowns).map(|j| product(i, j)).collect()).collect();
    let shrinkage = SHRINKAGE * weights.iter().sum::<f64>();
    gram.iter_mut().enumerate().skip(1).for_each(|(i, row)| row[i] += shrinkage);
    let target: Vec<f64> =
        (0..unknowns).map(|i| weighted().map(|(row, weight)| weight * row[i]).sum()).collect();
    let mut x = vec![0.0; unknowns];
    for _ in 0..SWEEPS {
        for i in 0..unknowns {
            if gram[i][i] <= 0.0 {
                continue;
            }
            let others: f64 = (0..unknowns).filter(|&j| j != i).map(|j| gram[i][j] * x[j]).sum();
            let (low, high) = if i == 0 { (MIN_OVERHEAD_SHARE, 1.0) } else { (0.0, f64::INFINITY) };
            x[i] = ((target[i] - others) / gram[i][i]).clamp(low, high);
        }
    }
    x
}

#[cfg(test)]
mod tests {
    use plumbline_schema::OperatorShape;

    use super::*;

    /// Rows of `1500 ns + 2 x roofline`, times a factor by size.
    fn rows(factor: impl Fn(u32) -> f64) -> Vec<Row> {
        let gpu = GpuSpec::shipped().remove(1);
        let row = |i: u32| {
            let shape = OperatorShape::RmsNorm { num_tokens: 3 * i * i, hidden_size: 4096 };
            let time_ns = (1500.0 + 2.0 * parts_ns(&shape, &gpu).as_slice()[0]) * factor(i);
            Row { shape, values: shape.values(), time_ns, low_ns: time_ns, high_ns: time_ns }
        };
        (1..60).map(row).collect()
    }

    fn fitted(rows: &[Row]) -> impl Fn(&Row) -> f64 {
        let gpu = GpuSpec::shipped().remove(1);
        let baseline = fit(&rows.iter().collect::<Vec<_>>(), &gpu);
        assert!(baseline.coefficients.iter().all(|&coefficient| coefficient >= 0.0));
        move |row| {
            let parts = parts_ns(&row.shape, &gpu);
            let weighted = baseline.coefficients.iter().zip(parts.as_slice()).map(|(c, ns)| c * ns);
            baseline.overhead_ns + weighted.sum::<f64>()
        }
    }

    #[test]
    fn an_exact_law_is_fitted() {
        let rows = rows(|_| 1.0);
        let baseline = fitted(&rows);
        for row in &rows {
            assert!((baseline(row) / row.time_ns - 1.0).abs() < 0.01, "{:?} {}", row, baseline(row));
        }
    }

    #[test]
    fn odd_shapes_do_not_bend_the_others() {
        let bent = rows(|i| if i % 10 == 0 { 3.0 } else { 1.0 });
        let baseline = fitted(&bent);
        for row in rows(|_| 1.0) {
            assert!((baseline(&row) / row.time_ns - 1.0).abs() < 0.05, "{row:?} {}", baseline(&row));
        }
    }

    #[test]
    fn the_overhead_is_never_nothing() {
        let gpu = GpuSpec::shipped().remove(1);
        let mut rows = rows(|_| 1.0);
        for row in &mut rows {
            row.time_ns = 10.0 * parts_ns(&row.shape, &gpu).as_slice()[0];
        }
        let shortest = rows.iter().map(|row| row.time_ns).fold(f64::INFINITY, f64::min);
        let baseline = fit(&rows.iter().collect::<Vec<_>>(), &gpu);
        assert!(baseline.overhead_ns >= MIN_OVERHEAD_SHARE * shortest);
    }
}

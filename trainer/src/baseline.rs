//! Fitting the baseline: the fixed overhead of a launch and a coefficient for each of its roofline parts.
//!
//! Minimises the sum of `(baseline / time - 1)^2` over the rows with all coefficients at least 0, by
//! coordinate descent on the normal equations; with under ten unknowns that takes microseconds. Where parts are joined
//! by a norm, their slopes at the last coefficients stand for them, again and again: Gauss-Newton steps.

use plumbline_bundles::features::{joined, part_names, part_norm, parts_ns};
use plumbline_schema::{GpuSpec, Operator};

use crate::dataset::Row;

/// The overhead is at least this share of the shortest time: a launch is never free.
const MIN_OVERHEAD_SHARE: f64 = 0.05;
/// Relative errors beyond this count by their size rather than its square, so that a few odd shapes do not
/// bend the law of the others (Huber 1964).
const LARGE_ERROR: f64 = 0.05;
/// Rounds of weighing rows by their last error.
const REWEIGHTINGS: usize = 8;
/// Rounds, and the share of each step that is taken, where parts are joined by a norm above 1.
const JOINED_ROUNDS: usize = 60;
const JOINED_STEP: f64 = 0.5;
/// Least coefficient of a part that is joined, at the start.
const LEAST_START: f64 = 0.3;
/// What an operator's coefficients are drawn to, and the weight of that per row.
///
/// A part that hardly shows in the rows must not take a coefficient from noise, which shapes where it does show would
/// then pay for: with large batches alone measured, nothing tells how fast weights are read.
#[derive(Clone, Copy)]
struct Prior {
    coefficients: &'static [f64],
    weight: f64,
    /// Whether a kernel may be slower by a factor than any that is known: the prior gives way as the factor's square.
    gives_way: bool,
}

/// Matrix products reach 75 to 90 % of what data sheets say, all else that is bound by memory about 85 %; nominal parts
/// are as they may be. Of 1e-5 to 1e-2 the weights err least on blocks held out at the edges of A100 tables.
const fn prior(operator: Operator) -> Prior {
    if operator.is_gemm() {
        return Prior { coefficients: &[1.3, 1.25, 0.7, 0.0], weight: 1e-3, gives_way: false };
    }
    match operator {
        Operator::Attention => Prior { coefficients: &[], weight: 3e-6, gives_way: false },
        _ => Prior { coefficients: &[1.2], weight: 1e-4, gives_way: true },
    }
}

/// Parts that step from wave to wave; without them the baseline is smooth.
const STEPPED_PARTS: [&str; 2] = ["row_waves", "busiest_sm"];
/// Most sweeps over all unknowns, and the change of any below which they end: no time shows it.
const SWEEPS: usize = 2000;
const SETTLED: f64 = 1e-9;

/// A fitted baseline.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Baseline {
    /// Fixed cost of a launch, ns.
    pub(crate) overhead_ns: f64,
    /// Factors on the roofline parts, in their order.
    pub(crate) coefficients: Vec<f64>,
}

/// Whether an operator's baseline has parts that step from wave to wave and that it can do without.
pub(crate) fn has_optional_steps(operator: Operator) -> bool {
    part_names(operator).iter().any(|name| STEPPED_PARTS.contains(name))
}

/// Fits the baseline to rows of one operator (or of several that share their parts), at least one.
///
/// Without `has_steps` the parts that step from wave to wave get no weight.
pub(crate) fn fit(operator: Operator, rows: &[&Row], has_steps: bool, gpu: &GpuSpec) -> Baseline {
    let shortest = rows.iter().map(|row| row.time_ns).fold(f64::INFINITY, f64::min);
    // Unknown 0 is the overhead, in units of the shortest time so that all columns are of similar size.
    let columns: Vec<Vec<f64>> = rows
        .iter()
        .map(|row| {
            let parts = parts_ns(&row.shape, gpu);
            let is_used = |name: &&str| has_steps || !STEPPED_PARTS.contains(name);
            let named = part_names(operator).iter().zip(parts.as_slice());
            let relative = named.map(|(name, part)| if is_used(name) { part / row.time_ns } else { 0.0 });
            std::iter::once(shortest / row.time_ns).chain(relative).collect()
        })
        .collect();
    let norm = part_norm(operator);
    let rounds = if norm == 1 { REWEIGHTINGS } else { JOINED_ROUNDS };
    let mut prior = prior(operator);
    if prior.gives_way {
        let free = solve(&columns, &vec![1.0; rows.len()], &Prior { weight: 1e-6 * prior.weight, ..prior });
        let factor = (prior.coefficients.iter().zip(&free[1..])).map(|(known, found)| found / known);
        prior.weight /= factor.fold(1.0, f64::max).powi(2);
    }
    let mut x = solve(&columns, &vec![1.0; rows.len()], &prior);
    if norm > 1 {
        // From a coefficient of 0 a joined part has no slope to leave it by.
        x.iter_mut().skip(1).for_each(|x| *x = x.max(LEAST_START));
    }
    for _ in 0..rounds {
        // Parts that add up are their own slopes.
        let slopes: Vec<Vec<f64>> =
            if norm == 1 { Vec::new() } else { columns.iter().map(|row| slopes(row, &x, norm)).collect() };
        let slopes = if norm == 1 { &columns } else { &slopes };
        let weights: Vec<f64> = slopes.iter().map(|row| weight(row, &x)).collect();
        let next = solve(slopes, &weights, &prior);
        let step = if norm == 1 { 1.0 } else { JOINED_STEP };
        x.iter_mut().zip(next).for_each(|(x, next)| *x += step * (next - *x));
    }
    Baseline { overhead_ns: x[0] * shortest, coefficients: x[1..].to_vec() }
}

/// Derivatives of a row's baseline by each unknown; times the unknowns they sum to the baseline itself, as the norm
/// of parts twice as long is twice as long (Euler).
fn slopes(row: &[f64], x: &[f64], norm: i32) -> Vec<f64> {
    let weighted = || row[1..].iter().zip(&x[1..]).map(|(part, x)| part * x);
    let whole = joined(weighted(), norm).max(f64::MIN_POSITIVE);
    let slope = |(part, weighted): (&f64, f64)| part * (weighted / whole).powi(norm - 1);
    std::iter::once(row[0]).chain(row[1..].iter().zip(weighted()).map(slope)).collect()
}

/// Weight of a row by its error under the present unknowns.
fn weight(slopes: &[f64], x: &[f64]) -> f64 {
    let error = (slopes.iter().zip(x).map(|(slope, x)| slope * x).sum::<f64>() - 1.0).abs();
    if error > LARGE_ERROR { LARGE_ERROR / error } else { 1.0 }
}

/// Coefficients that bring the weighted rows closest to 1.
fn solve(columns: &[Vec<f64>], weights: &[f64], prior: &Prior) -> Vec<f64> {
    let unknowns = columns[0].len();
    let drawn_to = |i: usize| i.checked_sub(1).and_then(|part| prior.coefficients.get(part)).unwrap_or(&0.0);
    let shrinkage = prior.weight * weights.iter().sum::<f64>();
    let mut gram = vec![vec![0.0; unknowns]; unknowns];
    let mut target: Vec<f64> = (0..unknowns).map(|i| shrinkage * drawn_to(i)).collect();
    let mut present = Vec::with_capacity(unknowns);
    for (row, weight) in columns.iter().zip(weights) {
        // A launch has few of the parts: decodes have none of a chunk's.
        present.clear();
        present.extend((0..unknowns).filter(|&i| row[i] != 0.0));
        for (place, &i) in present.iter().enumerate() {
            let weighted = weight * row[i];
            target[i] += weighted;
            for &j in &present[place..] {
                gram[i][j] += weighted * row[j];
            }
        }
    }
    let upper = gram.clone();
    for (i, row) in gram.iter_mut().enumerate() {
        row[..i].iter_mut().zip(&upper).for_each(|(below, above)| *below = above[i]);
        row[i] += if i > 0 { shrinkage } else { 0.0 };
    }
    let mut x = vec![0.0; unknowns];
    for _ in 0..SWEEPS {
        let mut largest_step = 0.0f64;
        for i in 0..unknowns {
            if gram[i][i] <= 0.0 {
                continue;
            }
            let others: f64 = (0..unknowns).filter(|&j| j != i).map(|j| gram[i][j] * x[j]).sum();
            let (low, high) = if i == 0 { (MIN_OVERHEAD_SHARE, 1.0) } else { (0.0, f64::INFINITY) };
            let next = ((target[i] - others) / gram[i][i]).clamp(low, high);
            largest_step = largest_step.max((next - x[i]).abs());
            x[i] = next;
        }
        if largest_step < SETTLED {
            break;
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

    fn fitted(operator: Operator, rows: &[Row]) -> impl Fn(&Row) -> f64 {
        let gpu = GpuSpec::shipped().remove(1);
        let baseline = fit(operator, &rows.iter().collect::<Vec<_>>(), true, &gpu);
        assert!(baseline.coefficients.iter().all(|&coefficient| coefficient >= 0.0));
        move |row| {
            let parts = parts_ns(&row.shape, &gpu);
            let weighted = baseline.coefficients.iter().zip(parts.as_slice()).map(|(c, ns)| c * ns);
            baseline.overhead_ns + joined(weighted, part_norm(operator))
        }
    }

    #[test]
    fn an_exact_law_is_fitted() {
        let rows = rows(|_| 1.0);
        let baseline = fitted(Operator::RmsNorm, &rows);
        for row in &rows {
            assert!((baseline(row) / row.time_ns - 1.0).abs() < 0.01, "{:?} {}", row, baseline(row));
        }
    }

    #[test]
    fn an_exact_law_of_overlapping_parts_is_fitted() {
        let gpu = GpuSpec::shipped().remove(1);
        let truth = [1.5, 1.1, 0.0, 1.6];
        let row = |(m, n, k): (u32, u32, u32)| {
            let shape = OperatorShape::Gemm { m, n, k };
            let parts = parts_ns(&shape, &gpu);
            let weighted = truth.iter().zip(parts.as_slice()).map(|(c, ns)| c * ns);
            let time_ns = 2000.0 + joined(weighted, part_norm(Operator::OProj));
            Row { shape, values: shape.values(), time_ns, low_ns: time_ns, high_ns: time_ns }
        };
        let sizes = [512, 1024, 3072, 4096, 14336];
        let layouts = sizes.iter().flat_map(|&n| sizes.iter().map(move |&k| (n, k)));
        let rows: Vec<Row> =
            layouts.flat_map(|(n, k)| (0..14).map(move |i| (1 << i, n, k))).map(row).collect();
        let baseline = fitted(Operator::OProj, &rows);
        // What kernels usually reach draws the law by a little, here most where `k_steps` decides.
        for row in &rows {
            assert!((baseline(row) / row.time_ns - 1.0).abs() < 0.03, "{row:?} {}", baseline(row));
        }
    }

    /// Large batches are bound by the tensor cores, so nothing in them tells how fast weights are read.
    #[test]
    fn what_no_row_tells_is_what_kernels_usually_reach() {
        let gpu = GpuSpec::shipped().remove(1);
        let row = |m: u32, n: u32| {
            let shape = OperatorShape::Gemm { m, n, k: 4096 };
            let [compute, memory, ..] = *parts_ns(&shape, &gpu).as_slice() else { unreachable!() };
            let time_ns = 3000.0 + joined([1.3 * compute, 1.2 * memory].into_iter(), 3);
            Row { shape, values: shape.values(), time_ns, low_ns: time_ns, high_ns: time_ns }
        };
        let large: Vec<Row> = (2..40).flat_map(|i| [4096, 14336].map(|n| row(512 * i, n))).collect();
        let baseline = fitted(Operator::GateUpProj, &large);
        for m in [1, 16, 64] {
            let small = row(m, 28672);
            let error = baseline(&small) / small.time_ns - 1.0;
            assert!(error.abs() < 0.1, "{m}: {error}");
        }
    }

    #[test]
    fn a_kernel_of_another_speed_than_any_known_is_still_fitted() {
        let gpu = GpuSpec::shipped().remove(1);
        let slow: Vec<Row> = rows(|_| 1.0)
            .into_iter()
            .map(|row| {
                let time_ns = 1500.0 + 60.0 * parts_ns(&row.shape, &gpu).as_slice()[0];
                Row { time_ns, low_ns: time_ns, high_ns: time_ns, ..row }
            })
            .collect();
        let baseline = fitted(Operator::RmsNorm, &slow);
        for row in &slow {
            assert!((baseline(row) / row.time_ns - 1.0).abs() < 0.02, "{row:?} {}", baseline(row));
        }
    }

    #[test]
    fn odd_shapes_do_not_bend_the_others() {
        let bent = rows(|i| if i % 10 == 0 { 3.0 } else { 1.0 });
        let baseline = fitted(Operator::RmsNorm, &bent);
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
        let baseline = fit(Operator::RmsNorm, &rows.iter().collect::<Vec<_>>(), true, &gpu);
        assert!(baseline.overhead_ns >= MIN_OVERHEAD_SHARE * shortest);
    }
}

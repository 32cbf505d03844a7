//! Rows as the grower wants them.
//!
//! Each feature's values are replaced by their rank among its distinct values, the code. Rows that agree in all
//! features can never be parted, so they form one cell. Targets become whole numbers so small that every sum of
//! them is exact in f64: a split's gain is then the same in whatever order rows are added, and ties are ties.

use linfa::Float;
use ndarray::{ArrayBase, ArrayView1, Data, Ix2};
use rayon::prelude::*;

use super::{error::ForestError, split::Weighted};

/// Sums stay below 2 to this power, which leaves a bit to spare in f64.
const SUM_BITS: i32 = 52;

/// A row that is used.
pub(super) struct Row {
    /// Its index in the data set.
    pub(super) index: u32,
    pub(super) cell: u32,
    pub(super) content: Weighted,
}

/// A feature of the rows that are used.
struct Column {
    /// Distinct values, ascending.
    values: Vec<f32>,
    /// Codes by row.
    codes: Vec<u32>,
}

/// The rows with weight, merged and sorted.
pub(super) struct Table {
    /// Sorted by cell.
    pub(super) rows: Vec<Row>,
    pub(super) num_cells: usize,
    pub(super) features: Vec<Feature>,
    /// Features of the cells, row by row, as they are predicted from.
    pub(super) records: Vec<f32>,
    /// Whether weights differ, so that a sum of them is no count.
    pub(super) is_weighted: bool,
    pub(super) scale: Scale,
    /// Lowest and highest target.
    pub(super) range: (f64, f64),
}

/// One feature.
pub(super) struct Feature {
    /// Distinct values, ascending.
    pub(super) values: Vec<f32>,
    /// Codes by cell.
    pub(super) codes: Vec<u32>,
    /// All cells by code, equal ones by index.
    pub(super) order: Vec<u32>,
}

/// How whole numbers become targets again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scale {
    centre: f64,
    unit: f64,
}

impl Scale {
    /// Mean target of whole-number sums.
    pub(super) fn mean(self, target: f64, weight: f64) -> f64 {
        self.centre + target / weight * self.unit
    }
}

/// The power of two by which numbers up to `sum` are divided to stay within [`SUM_BITS`].
fn unit_of(sum: f64) -> f64 {
    if sum > 0.0 { 2.0f64.powi((sum.log2().ceil() as i32 - SUM_BITS).max(-1000)) } else { 1.0 }
}

impl Table {
    /// Checks and sorts a data set; `num_draws` tells how many rows a tree draws of so many, `None` that it takes all.
    pub(super) fn new<F: Float, D: Data<Elem = F>>(
        records: &ArrayBase<D, Ix2>,
        targets: ArrayView1<F>,
        weights: Option<&[f32]>,
        num_draws: impl FnOnce(usize) -> Option<usize>,
    ) -> Result<Self, ForestError> {
        let targets: Vec<f64> = targets.iter().map(|target| target.to_f64().unwrap_or(f64::NAN)).collect();
        check_sizes(records.dim(), targets.len(), weights.map(<[f32]>::len))?;
        let weights = weights.map_or_else(|| vec![1.0; targets.len()], <[f32]>::to_vec);
        let kept = kept_rows(records, &targets, &weights)?;
        let numbers = |column: ArrayView1<F>| kept.iter().map(|&row| to_f32(column[row as usize])).collect();
        let numbers: Vec<Vec<f32>> = records.columns().into_iter().map(numbers).collect();
        let columns: Vec<Column> = numbers.into_par_iter().map(|column| Column::new(&column)).collect();

        let first = weights[kept[0] as usize];
        let is_weighted = kept.iter().any(|&row| weights[row as usize].to_bits() != first.to_bits());
        let weight = |&row: &u32| if is_weighted { f64::from(weights[row as usize]) } else { 1.0 };
        let weights: Vec<f64> = kept.iter().map(weight).collect();
        let targets: Vec<f64> = kept.iter().map(|&row| targets[row as usize]).collect();
        let (scale, contents) = contents(&targets, &weights, num_draws(kept.len()));
        let (order, cell_of) = merge(&columns, kept.len());
        let num_cells = cell_of.last().map_or(0, |&last| last as usize + 1);
        let rows = order.iter().zip(&cell_of).map(|(&place, &cell)| Row {
            index: kept[place as usize],
            cell,
            content: contents[place as usize],
        });
        let rows: Vec<Row> = rows.collect();
        let by_cell = |column: Column| {
            let mut codes = vec![0; num_cells];
            order
                .iter()
                .zip(&cell_of)
                .for_each(|(&place, &cell)| codes[cell as usize] = column.codes[place as usize]);
            Feature::new(column.values, codes)
        };
        let features: Vec<Feature> = columns.into_par_iter().map(by_cell).collect();
        let mut cells = vec![0.0; num_cells * features.len()];
        for (cell, record) in cells.chunks_exact_mut(features.len()).enumerate() {
            record.iter_mut().zip(&features).for_each(|(x, f)| *x = f.values[f.codes[cell] as usize]);
        }
        Ok(Self { rows, num_cells, features, records: cells, is_weighted, scale, range: range(&targets) })
    }
}

fn to_f32<F: Float>(value: F) -> f32 {
    // Adding 0 turns -0 into 0: a tree compares them as equal, their bits are not.
    value.to_f32().unwrap_or(f32::NAN) + 0.0
}

fn check_sizes(
    (rows, features): (usize, usize),
    targets: usize,
    weights: Option<usize>,
) -> Result<(), ForestError> {
    if rows != targets {
        return Err(ForestError::MismatchedTargets { rows, targets });
    }
    if let Some(weights) = weights.filter(|&weights| weights != rows) {
        return Err(ForestError::MismatchedWeights { rows, weights });
    }
    if rows == 0 || features == 0 {
        return Err(ForestError::Empty);
    }
    // Rows are counted in u32 and features in u16.
    if rows >= u32::MAX as usize || features > usize::from(u16::MAX) {
        return Err(ForestError::TooLarge { rows, features });
    }
    Ok(())
}

/// Indices of the rows that have weight, all of them finite.
fn kept_rows<F: Float, D: Data<Elem = F>>(
    records: &ArrayBase<D, Ix2>,
    targets: &[f64],
    weights: &[f32],
) -> Result<Vec<u32>, ForestError> {
    for (row, (features, &target)) in records.rows().into_iter().zip(targets).enumerate() {
        let weight = weights[row];
        if !(weight >= 0.0 && weight.is_finite()) {
            return Err(ForestError::InvalidWeight { row, weight });
        }
        if !features.iter().all(|&x| to_f32(x).is_finite()) || !(target as f32).is_finite() {
            return Err(ForestError::NotFinite { row });
        }
    }
    let kept: Vec<u32> = (0..targets.len() as u32).filter(|&row| weights[row as usize] > 0.0).collect();
    if kept.is_empty() { Err(ForestError::NoWeight) } else { Ok(kept) }
}

/// Weights and weighted targets as whole numbers.
///
/// A target is kept to `2^-52 n` of the range of targets, of `n` rows of like weight; in a row whose weight is a
/// fraction of the others' to that much more.
fn contents(targets: &[f64], weights: &[f64], num_draws: Option<usize>) -> (Scale, Vec<Weighted>) {
    let (low, high) = range(targets);
    let centre = f64::midpoint(low, high);
    let sum: f64 = weights.iter().sum();
    // Of the mean, so that a row of weight 2 is rounded as two rows are.
    let usual = 2.0f64.powi((sum / weights.len() as f64).log2().floor() as i32);
    let most = num_draws.map_or(sum, |draws| draws as f64 * range(weights).1);
    let weight_unit = unit_of(most);
    let unit = unit_of(most * (high - centre).max(centre - low));
    let content = |(&target, &weight): (&f64, &f64)| {
        // A weight that is nothing beside the others still counts.
        let weight = ((weight / weight_unit).round() * weight_unit).max(weight_unit);
        let target = ((target - centre) / unit * usual).round() / usual;
        Weighted { target: (target * weight).round(), weight }
    };
    (Scale { centre, unit }, targets.iter().zip(weights).map(content).collect())
}

/// The lowest and the highest.
fn range(numbers: &[f64]) -> (f64, f64) {
    numbers.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &x| (low.min(x), high.max(x)))
}

impl Column {
    fn new(numbers: &[f32]) -> Self {
        // The bits of positive floats are in their order, those of negative ones in the reverse order.
        let ordered = |x: f32| x.to_bits() ^ if x < 0.0 { u32::MAX } else { 1 << 31 };
        let mut places: Vec<u64> =
            numbers.iter().enumerate().map(|(i, &x)| u64::from(ordered(x)) << 32 | i as u64).collect();
        places.sort_unstable();
        let mut values: Vec<f32> = Vec::new();
        let mut codes = vec![0; numbers.len()];
        for place in places {
            let row = place as u32 as usize;
            if values.last() != Some(&numbers[row]) {
                values.push(numbers[row]);
            }
            codes[row] = values.len() as u32 - 1;
        }
        Self { values, codes }
    }
}

impl Feature {
    fn new(values: Vec<f32>, codes: Vec<u32>) -> Self {
        let order = sorted_by(&codes, values.len(), 0..codes.len() as u32);
        Self { values, codes, order }
    }
}

/// Counting sort, which keeps the order of equals.
fn sorted_by(codes: &[u32], num_codes: usize, items: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut next = vec![0; num_codes + 1];
    for &code in codes {
        next[code as usize + 1] += 1;
    }
    for i in 0..num_codes {
        next[i + 1] += next[i];
    }
    let mut sorted = vec![0; codes.len()];
    for item in items {
        let place = &mut next[codes[item as usize] as usize];
        sorted[*place] = item;
        *place += 1;
    }
    sorted
}

/// Rows sorted by all their features, and the cell of each: rows that agree in all of them share one.
fn merge(columns: &[Column], num_rows: usize) -> (Vec<u32>, Vec<u32>) {
    let mut order: Vec<u32> = (0..num_rows as u32).collect();
    for column in columns.iter().rev() {
        order = sorted_by(&column.codes, column.values.len(), order.into_iter());
    }
    let mut cell = 0;
    let mut cell_of = vec![0; num_rows];
    for i in 1..num_rows {
        let differs =
            |column: &Column| column.codes[order[i] as usize] != column.codes[order[i - 1] as usize];
        cell += u32::from(columns.iter().any(differs));
        cell_of[i] = cell;
    }
    (order, cell_of)
}

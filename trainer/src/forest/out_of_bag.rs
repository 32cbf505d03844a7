//! What the trees that did not draw a row say about it.

use plumbline_bundles::Tree;

use super::table::Table;

/// Whole-number steps that the targets' range is cut into.
const STEPS: f64 = (1u64 << 40) as f64;

/// Sums of the answers about each row, in the order of [`Table::rows`].
///
/// They are whole numbers, so that it does not matter which thread adds which trees. With 2^40 steps there is room
/// for 2^22 trees.
pub(super) struct OutOfBag {
    sums: Vec<i64>,
    counts: Vec<u32>,
    /// Rows not drawn and their cells.
    rows: Vec<u32>,
    cells: Vec<u32>,
}

impl OutOfBag {
    pub(super) fn new(num_rows: usize) -> Self {
        Self {
            sums: vec![0; num_rows],
            counts: vec![0; num_rows],
            rows: vec![0; num_rows + 1],
            cells: Vec::new(),
        }
    }

    /// Adds what a tree says about the rows that it did not draw.
    pub(super) fn add_tree(&mut self, table: &Table, tree: &Tree, drawn: &[u32]) {
        let mut num_rows = 0;
        for (row, &times) in (0..).zip(drawn) {
            self.rows[num_rows] = row;
            num_rows += usize::from(times == 0);
        }
        let (low, high) = table.range;
        let steps = if high > low { STEPS / (high - low) } else { 0.0 };
        let rows = &self.rows[..num_rows];
        self.cells.clear();
        self.cells.extend(rows.iter().map(|&row| table.rows[row as usize].cell));
        tree.predict_each(&table.records, table.features.len(), &self.cells, |i, answer| {
            let row = rows[i] as usize;
            self.sums[row] += ((f64::from(answer) - low) * steps) as i64;
            self.counts[row] += 1;
        });
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.sums.iter_mut().zip(&other.sums).for_each(|(sum, other)| *sum += other);
        self.counts.iter_mut().zip(&other.counts).for_each(|(count, other)| *count += other);
    }

    /// Mean answers by the rows of the data set; `None` where no tree answers.
    pub(super) fn means(&self, table: &Table, num_rows: usize) -> Vec<Option<f64>> {
        let mut means = vec![None; num_rows];
        let (low, high) = table.range;
        for ((row, &sum), &count) in table.rows.iter().zip(&self.sums).zip(&self.counts) {
            let mean = sum as f64 / f64::from(count) / STEPS;
            means[row.index as usize] = (count > 0).then_some(low + mean * (high - low));
        }
        means
    }
}

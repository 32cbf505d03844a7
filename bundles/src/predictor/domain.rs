//! What was measured, and where a shape lies in it.

use plumbline_schema::{Operator, operator::MAX_SHAPE_COLUMNS};
use serde::{Deserialize, Serialize};

use super::PredictError;
use crate::features::batch_columns;

/// The shapes that were measured, as columns, sorted by the model's numbers and then the batch's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Domain {
    /// Names of the shape's numbers, as [`Operator::shape_columns`].
    pub columns: Vec<String>,
    /// Smallest measured of each column.
    pub min: Vec<u64>,
    /// Largest measured of each column.
    pub max: Vec<u64>,
    /// Measured shapes, one after another, each as long as `columns`.
    pub shapes: Vec<u64>,
    /// Median measured time of each shape, ns.
    pub time_ns: Vec<f64>,
    /// Shortest measured time of each shape, ns.
    pub low_ns: Vec<f64>,
    /// 95th percentile of the measured times of each shape, ns.
    pub high_ns: Vec<f64>,
    /// What the forest leaves of each shape: `ln(time / baseline)` less its answer; empty when not used.
    pub residual: Vec<f32>,
}

impl Domain {
    /// Collects measured shapes, given as `(shape values, median, shortest, 95th percentile)`; sorts them.
    #[must_use]
    pub fn from_rows(operator: Operator, mut rows: Vec<(Vec<u64>, f64, f64, f64)>) -> Self {
        let columns: Vec<_> = operator.shape_columns().iter().map(|&name| name.to_owned()).collect();
        rows.sort_by(|a, b| compare(operator, &a.0, &b.0));
        let of = |pick: fn(&[u64], usize) -> u64, all: fn(u64, u64) -> u64| -> Vec<u64> {
            let column = |c| rows.iter().map(|row| pick(&row.0, c)).reduce(all).unwrap_or(0);
            (0..columns.len()).map(column).collect()
        };
        Self {
            min: of(|row, c| row[c], u64::min),
            max: of(|row, c| row[c], u64::max),
            shapes: rows.iter().flat_map(|row| row.0.iter().copied()).collect(),
            time_ns: rows.iter().map(|row| row.1).collect(),
            low_ns: rows.iter().map(|row| row.2).collect(),
            high_ns: rows.iter().map(|row| row.3).collect(),
            residual: Vec::new(),
            columns,
        }
    }

    /// Number of measured shapes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.time_ns.len()
    }

    /// Whether nothing was measured.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.time_ns.is_empty()
    }

    /// The measured shape at an index, in the order of `columns`.
    fn shape(&self, index: usize) -> &[u64] {
        let width = self.columns.len();
        &self.shapes[index * width..(index + 1) * width]
    }

    /// Index of a measured shape.
    pub(super) fn find(&self, operator: Operator, values: &[u64]) -> Option<usize> {
        let index = self.lower_bound(operator, values);
        (index < self.len() && self.shape(index) == values).then_some(index)
    }

    /// Index of the first measured shape that does not lie before `values`.
    fn lower_bound(&self, operator: Operator, values: &[u64]) -> usize {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low.midpoint(high);
            if compare(operator, self.shape(middle), values).is_lt() {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }

    /// Whether the model's numbers of a shape were measured together.
    fn has_layout(&self, operator: Operator, values: &[u64]) -> bool {
        // Sorted by layout first: the lowest shape not below this layout's first one has it, or none has.
        let mut first = [0; MAX_SHAPE_COLUMNS];
        let first = &mut first[..values.len()];
        first.copy_from_slice(values);
        first[batch_columns(operator)].fill(0);
        let low = self.lower_bound(operator, first);
        low < self.len() && layout(operator, self.shape(low)).eq(layout(operator, values))
    }

    /// What the forest leaves near a shape: between the measured neighbours of its layout, by the logarithm.
    ///
    /// 0 for a layout that was not measured and for operators whose batch is more than one number.
    pub(super) fn residual_near(&self, operator: Operator, values: &[u64]) -> f64 {
        let batch = batch_columns(operator);
        if batch.len() != 1 || self.residual.is_empty() {
            return 0.0;
        }
        let above = self.lower_bound(operator, values);
        let of_layout =
            |i: usize| i < self.len() && layout(operator, self.shape(i)).eq(layout(operator, values));
        let at = |i: usize| ((self.shape(i)[batch.start] as f64).ln(), f64::from(self.residual[i]));
        match (above.checked_sub(1).filter(|&i| of_layout(i)), Some(above).filter(|&i| of_layout(i))) {
            (Some(below), Some(above)) => {
                let ((x0, y0), (x1, y1)) = (at(below), at(above));
                y0 + (y1 - y0) * ((values[batch.start] as f64).ln() - x0) / (x1 - x0)
            }
            (Some(edge), None) | (None, Some(edge)) => at(edge).1,
            (None, None) => 0.0,
        }
    }

    /// Says in words which layouts were measured.
    fn describe_layouts(&self, operator: Operator) -> String {
        let mut all: Vec<String> =
            (0..self.len()).map(|i| describe_layout(operator, self.shape(i))).collect();
        all.dedup();
        all.join("; ")
    }

    /// How a shape lies outside what was measured, if it does.
    pub(super) fn outside(&self, operator: Operator, values: &[u64]) -> Option<PredictError> {
        for (c, &column) in operator.shape_columns().iter().enumerate() {
            let (value, min, max) = (values[c], self.min[c], self.max[c]);
            if !(min..=max).contains(&value) {
                return Some(PredictError::OutOfDomain { operator, column, value, min, max });
            }
        }
        (!self.has_layout(operator, values)).then(|| PredictError::UnmeasuredLayout {
            operator,
            layout: describe_layout(operator, values),
            measured: self.describe_layouts(operator),
        })
    }

    pub(super) fn check(&self, operator: Operator) -> Result<(), String> {
        let width = operator.shape_columns().len();
        if self.columns != operator.shape_columns() {
            return Err(format!("domain of {:?}, expected {:?}", self.columns, operator.shape_columns()));
        }
        let n = self.len();
        if n == 0 || self.low_ns.len() != n || self.high_ns.len() != n || self.shapes.len() != n * width {
            return Err(format!(
                "domain with {n} times, {} lows, {} highs and {} shape numbers of {width} each",
                self.low_ns.len(),
                self.high_ns.len(),
                self.shapes.len()
            ));
        }
        if !(self.residual.is_empty() || self.residual.len() == n) {
            return Err(format!("domain with {} residuals for {n} shapes", self.residual.len()));
        }
        if self.residual.iter().any(|residual| !residual.is_finite()) {
            return Err("domain with a residual that is not finite".into());
        }
        if self.min.len() != width || self.max.len() != width {
            return Err(format!("domain with {} minima and {} maxima", self.min.len(), self.max.len()));
        }
        for i in 0..n {
            let (low, time, high) = (self.low_ns[i], self.time_ns[i], self.high_ns[i]);
            if !(low > 0.0 && low <= time && time <= high && high.is_finite()) {
                return Err(format!("measured shape {i} with times {low}, {time} and {high} ns"));
            }
            if i > 0 && !compare(operator, self.shape(i - 1), self.shape(i)).is_lt() {
                return Err(format!("measured shape {i} out of order"));
            }
            let inside = |c: usize| (self.min[c]..=self.max[c]).contains(&self.shape(i)[c]);
            if !(0..width).all(inside) {
                return Err(format!("measured shape {i} outside the stated domain"));
            }
        }
        Ok(())
    }
}

/// The numbers of a shape that the model decides.
fn layout(operator: Operator, values: &[u64]) -> impl Iterator<Item = u64> + '_ {
    let batch = batch_columns(operator);
    values.iter().enumerate().filter(move |(c, _)| !batch.contains(c)).map(|(_, &value)| value)
}

/// Orders shapes by layout, then by batch.
fn compare(operator: Operator, a: &[u64], b: &[u64]) -> std::cmp::Ordering {
    let batch = batch_columns(operator);
    layout(operator, a).cmp(layout(operator, b)).then_with(|| a[batch.clone()].cmp(&b[batch.clone()]))
}

fn describe_layout(operator: Operator, values: &[u64]) -> String {
    let batch = batch_columns(operator);
    let named = operator.shape_columns().iter().zip(values).enumerate().filter(|(c, _)| !batch.contains(c));
    named.map(|(_, (name, value))| format!("{name} = {value}")).collect::<Vec<_>>().join(", ")
}

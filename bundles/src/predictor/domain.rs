//! What was measured, and where a shape lies in it.

use plumbline_schema::Operator;
use serde::{Deserialize, Serialize};

use super::{
    PredictError,
    layout::{MIN_LAYOUTS, describe_nearest, is_near, layout},
};
use crate::features::batch_columns;

/// The shapes that were measured, as columns, sorted by the model's numbers and then the batch's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "DomainColumns")]
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
    /// Index of the first shape of each layout; follows from `shapes`.
    #[serde(skip)]
    layout_starts: Vec<u32>,
}

/// A domain as files hold it; the fields are those of [`Domain`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DomainColumns {
    columns: Vec<String>,
    min: Vec<u64>,
    max: Vec<u64>,
    shapes: Vec<u64>,
    time_ns: Vec<f64>,
    low_ns: Vec<f64>,
    high_ns: Vec<f64>,
    residual: Vec<f32>,
}

impl From<DomainColumns> for Domain {
    fn from(file: DomainColumns) -> Self {
        let DomainColumns { columns, min, max, shapes, time_ns, low_ns, high_ns, residual } = file;
        let layout_starts = Vec::new();
        let mut domain =
            Self { columns, min, max, shapes, time_ns, low_ns, high_ns, residual, layout_starts };
        domain.index_layouts();
        domain
    }
}

/// Where a shape lies in what was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Measured, at this index.
    Measured(usize),
    /// Its layout was measured, below and above its batch.
    MeasuredLayout,
    /// Its layout was not measured around its batch, but others surround it.
    SurroundedLayout,
    /// None of these; [`Domain::outside`] says why.
    Outside,
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
        let mut domain = Self {
            min: of(|row, c| row[c], u64::min),
            max: of(|row, c| row[c], u64::max),
            shapes: rows.iter().flat_map(|row| row.0.iter().copied()).collect(),
            time_ns: rows.iter().map(|row| row.1).collect(),
            low_ns: rows.iter().map(|row| row.2).collect(),
            high_ns: rows.iter().map(|row| row.3).collect(),
            residual: Vec::new(),
            layout_starts: Vec::new(),
            columns,
        };
        domain.index_layouts();
        domain
    }

    /// Finds where each layout starts; shapes that are not sorted or whole are found by [`Self::check`].
    fn index_layouts(&mut self) {
        let named = |operator: &Operator| self.columns == operator.shape_columns();
        // Operators with the same columns have the same layouts.
        let Some(operator) = Operator::ALL.into_iter().find(named) else { return };
        let is_whole = self.shapes.len() == self.len() * self.columns.len();
        let starts =
            |&i: &usize| i == 0 || layout(operator, self.shape(i)) != layout(operator, self.shape(i - 1));
        let all = if is_whole { 0..self.len() } else { 0..0 };
        self.layout_starts = all.filter(starts).map(|i| i as u32).collect();
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

    /// The measured shapes with their median times in ns, by the model's numbers and then the batch's.
    pub(crate) fn measured(&self) -> impl Iterator<Item = (&[u64], f64)> {
        (0..self.len()).map(|i| (self.shape(i), self.time_ns[i]))
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

    /// Where a shape lies; its numbers as [`Operator::shape_columns`] orders them.
    pub(super) fn place(&self, operator: Operator, values: &[u64]) -> Place {
        let index = self.lower_bound(operator, values);
        if index < self.len() && self.shape(index) == values {
            return Place::Measured(index);
        }
        if !self.has_in_box(values) {
            return Place::Outside;
        }
        let wanted = layout(operator, values);
        let own = |i: usize| i < self.len() && layout(operator, self.shape(i)) == wanted;
        // A batch of several numbers has no below and above.
        let is_along = batch_columns(operator).len() == 1;
        let (below, above) = (index.checked_sub(1).is_some_and(own), own(index));
        if (below && above) || (!is_along && (below || above)) {
            return Place::MeasuredLayout;
        }
        // What is in the box of all shapes is in that of all layouts, so this is `layouts_surround`.
        let says_something = |rows: std::ops::Range<usize>| {
            is_near(operator, layout(operator, self.shape(rows.start)), wanted)
                && self.covers(operator, rows, values)
        };
        let is_surrounded = self.layout_starts.len() >= MIN_LAYOUTS && self.layouts().any(says_something);
        if is_surrounded { Place::SurroundedLayout } else { Place::Outside }
    }

    /// Where all shapes of a layout lie whose batch is of several numbers, all between the smallest and the largest
    /// measured, but for those that were measured themselves.
    pub(super) fn place_inside(&self, operator: Operator, layout: &[u64]) -> Place {
        // Such a batch lies in its layout wherever it lies.
        match self.place(operator, &[layout, &self.min[batch_columns(operator)]].concat()) {
            Place::Measured(_) => Place::MeasuredLayout,
            place => place,
        }
    }

    /// Whether a shape would be answered from what was measured around it, its own layout or its neighbours.
    #[must_use]
    pub fn answers(&self, operator: Operator, values: &[u64]) -> bool {
        self.place(operator, values) != Place::Outside
    }

    /// Whether each number lies between the smallest and the largest measured.
    pub(super) fn has_in_box(&self, values: &[u64]) -> bool {
        values.iter().zip(self.min.iter().zip(&self.max)).all(|(v, (min, max))| (min..=max).contains(&v))
    }

    /// Indices of each layout's shapes.
    fn layouts(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let ends = self.layout_starts.iter().skip(1).map(|&end| end as usize).chain([self.len()]);
        self.layout_starts.iter().zip(ends).map(|(&start, end)| start as usize..end)
    }

    /// Whether a layout was measured below and above a batch; a batch of several numbers need only be in the box.
    fn covers(&self, operator: Operator, rows: std::ops::Range<usize>, values: &[u64]) -> bool {
        let batch = batch_columns(operator);
        let (first, last) = (self.shape(rows.start)[batch.start], self.shape(rows.end - 1)[batch.start]);
        batch.len() > 1 || (first..=last).contains(&values[batch.start])
    }

    /// What is interpolated near a shape, and how far the shape lies beyond its layout.
    ///
    /// Between the measured neighbours of its layout, by the logarithm; beyond the layout's edge what the edge has, with
    /// the logarithm of the factor between them, otherwise 0. `None` for a layout that was not measured and for
    /// operators whose batch is more than one number.
    pub(super) fn residual_near(&self, operator: Operator, values: &[u64]) -> Option<(f64, f64)> {
        if self.residual.is_empty() {
            return None;
        }
        let (below, above) = self.neighbours(operator, values)?;
        let column = batch_columns(operator).start;
        let at = |i: usize| ((self.shape(i)[column] as f64).ln(), f64::from(self.residual[i]));
        let x = (values[column] as f64).ln();
        match (below, above) {
            (Some(below), Some(above)) => {
                let ((x0, y0), (x1, y1)) = (at(below), at(above));
                Some((y0 + (y1 - y0) * (x - x0) / (x1 - x0), 0.0))
            }
            (Some(edge), None) | (None, Some(edge)) => {
                let (x0, y0) = at(edge);
                Some((y0, (x - x0).abs()))
            }
            (None, None) => None,
        }
    }

    /// How far a batch lies beyond every measured one: the logarithm of the factor, summed over its numbers; 0 inside.
    pub(super) fn ln_beyond(&self, operator: Operator, values: &[u64]) -> f64 {
        let ln = |value: u64| (value as f64).ln_1p();
        let beyond = |c: usize| {
            let value = values[c];
            if value < self.min[c] {
                ln(self.min[c]) - ln(value)
            } else if value > self.max[c] {
                ln(value) - ln(self.max[c])
            } else {
                0.0
            }
        };
        batch_columns(operator).map(beyond).sum()
    }

    /// Indices of the measured shapes of the layout next below a batch, and at or above it; `None` for operators whose
    /// batch is more than one number.
    fn neighbours(&self, operator: Operator, values: &[u64]) -> Option<(Option<usize>, Option<usize>)> {
        if batch_columns(operator).len() != 1 {
            return None;
        }
        let above = self.lower_bound(operator, values);
        let is_own =
            |&i: &usize| i < self.len() && layout(operator, self.shape(i)) == layout(operator, values);
        Some((above.checked_sub(1).filter(is_own), Some(above).filter(is_own)))
    }

    /// Says how a shape lies outside what was measured, when it does.
    pub(super) fn outside(&self, operator: Operator, values: &[u64]) -> PredictError {
        for (c, &column) in operator.shape_columns().iter().enumerate() {
            let (value, min, max) = (values[c], self.min[c], self.max[c]);
            if !(min..=max).contains(&value) {
                return PredictError::OutOfDomain { operator, column, value, min, max };
            }
        }
        let wanted = layout(operator, values);
        let own = self.layouts().find(|rows| layout(operator, self.shape(rows.start)) == wanted);
        if let Some(rows) = own {
            let c = batch_columns(operator).start;
            let (min, max) = (self.shape(rows.start)[c], self.shape(rows.end - 1)[c]);
            let column = operator.shape_columns()[c];
            return PredictError::OutOfDomain { operator, column, value: values[c], min, max };
        }
        let all = self.layouts().map(|rows| layout(operator, self.shape(rows.start)));
        let (layout, measured) = describe_nearest(operator, wanted, all);
        PredictError::UnmeasuredLayout { operator, layout, measured }
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

/// Orders shapes by layout, then by batch.
fn compare(operator: Operator, a: &[u64], b: &[u64]) -> std::cmp::Ordering {
    let batch = batch_columns(operator);
    layout(operator, a).cmp(layout(operator, b)).then_with(|| a[batch.clone()].cmp(&b[batch]))
}

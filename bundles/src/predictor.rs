//! From an operator's shape to its time, with the interval and the provenance of that number.
//!
//! A predictor never holds raw times alone: its forest says by which factor a launch differs from a
//! baseline, `overhead + sum of coefficient x roofline part`, whose parts follow from the GPU's data sheet.

use plumbline_schema::{GpuSpec, Operator, OperatorShape, roofline::floor_ns};
use serde::{Deserialize, Serialize};

use crate::{
    features::{
        MAX_SHAPE_COLUMNS, Row, batch_columns, feature_names, features, part_names, parts_ns, shape_values,
    },
    forest::Forest,
};

/// Where a predicted time comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Provenance {
    /// This very shape was measured on this GPU.
    Measured,
    /// Lies within what was measured on this GPU.
    Interpolated,
    /// Lies outside what was measured on this GPU.
    Extrapolated,
    /// Measured or predicted on another GPU and carried over by the two data sheets.
    Transferred,
    /// The data sheet alone.
    Roofline,
}

/// A predicted time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Expected GPU time of one launch, ns; above 0 and never under the physical floor.
    pub time_ns: f64,
    /// Lower end of the interval, ns; at most `time_ns`, never under the physical floor.
    pub low_ns: f64,
    /// Upper end of the interval, ns; at least `time_ns`.
    pub high_ns: f64,
    /// Where the time comes from.
    pub provenance: Provenance,
}

/// What to do about a shape outside the measured domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OutOfDomain {
    /// Return [`PredictError::OutOfDomain`] or [`PredictError::UnmeasuredLayout`].
    #[default]
    Refuse,
    /// Predict with the ratio at the domain's edge and tag the result [`Provenance::Extrapolated`].
    Extrapolate,
}

/// Why a time cannot be predicted.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PredictError {
    /// The bundle has no predictor of the operator.
    #[error("no predictor for operator `{operator}`; available: {available}; {hint}")]
    MissingOperator {
        /// The operator asked for.
        operator: Operator,
        /// Names of the operators there are, joined by commas; `none` when there are none.
        available: String,
        /// What to do about it.
        hint: String,
    },
    /// A number of the shape lies outside what was measured.
    #[error("operator `{operator}`: {column} = {value} is outside the measured {min}..={max}")]
    OutOfDomain {
        /// The operator asked for.
        operator: Operator,
        /// Which number of the shape.
        column: &'static str,
        /// Its value.
        value: u64,
        /// Smallest measured.
        min: u64,
        /// Largest measured.
        max: u64,
    },
    /// The numbers that the model decides were not measured together.
    #[error("operator `{operator}`: {layout} was not measured; measured: {measured}")]
    UnmeasuredLayout {
        /// The operator asked for.
        operator: Operator,
        /// The model's numbers asked for: `n = 4096, k = 1024`.
        layout: String,
        /// The ones measured, in the same form, joined by semicolons.
        measured: String,
    },
    /// The shape is another operator's, empty, or too large to count its work.
    #[error("operator `{operator}`: expected {expected}, found {found}")]
    WrongShape {
        /// The operator asked for.
        operator: Operator,
        /// What a shape of the operator looks like.
        expected: String,
        /// The shape asked for.
        found: String,
    },
}

/// Absolute percentage errors on held-out shapes, as 0..1 ratios.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ErrorSummary {
    /// Held-out samples.
    pub n: u32,
    /// Mean of `|predicted / measured - 1|`.
    pub mean: f64,
    /// Its median.
    pub p50: f64,
    /// Its 90th percentile.
    pub p90: f64,
    /// Its largest.
    pub max: f64,
    /// Mean of `predicted / measured - 1`, signed.
    pub bias: f64,
}

/// Errors on held-out shapes under two ways of holding out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeldOutError {
    /// Shapes dealt at random into folds; all samples of a shape lie in one fold.
    pub shuffled: ErrorSummary,
    /// Folds are runs of neighbouring shapes, so each is predicted across a gap or beyond an edge.
    pub blocked: ErrorSummary,
}

/// A range of `measured / predicted`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RatioRange {
    /// Lower end, above 0 and at most 1.
    pub low: f64,
    /// Upper end, at least 1.
    pub high: f64,
}

/// Quantiles of `measured / predicted` on held-out shapes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Share of held-out samples inside the range, 0..1.
    pub coverage: f64,
    /// For interpolated times: from the shuffled folds.
    pub interpolated: RatioRange,
    /// For extrapolated and transferred times: from the blocked folds.
    pub extrapolated: RatioRange,
}

/// One roofline part of the baseline with its coefficient.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaselinePart {
    /// Name, one of the operator's [`part_names`].
    pub name: String,
    /// Factor on the part's roofline time, at least 0; its inverse is the efficiency reached.
    pub coefficient: f64,
}

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

/// How a forest was grown.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HyperParameters {
    /// Trees of the forest.
    pub num_trees: u32,
    /// Deepest level of a tree.
    pub max_depth: u32,
    /// Fewest samples of a leaf.
    pub min_samples_leaf: u32,
    /// Features tried at each split.
    pub max_features: u32,
    /// Whether samples of all matrix products were used.
    pub pooled: bool,
    /// Whether what the forest leaves is interpolated between measured neighbours of a layout.
    pub interpolates_residuals: bool,
}

/// What was learned about one operator: a file `predictors/<operator>.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatorPredictor {
    /// Which operator.
    pub operator: Operator,
    /// Names of the forest's features; must be [`feature_names`] of the operator.
    pub features: Vec<String>,
    /// Fixed cost of a launch, ns, above 0.
    pub overhead_ns: f64,
    /// Roofline parts of the baseline, in the order of [`part_names`].
    pub parts: Vec<BaselinePart>,
    /// Predicts `ln(time / baseline)`.
    pub forest: Forest,
    /// What was measured.
    pub domain: Domain,
    /// Errors on held-out shapes.
    pub error: HeldOutError,
    /// Spread of held-out shapes around their predictions.
    pub interval: Interval,
    /// Digest of the samples trained on: `sha256:` and 64 hexadecimal digits.
    pub samples_digest: String,
    /// Seed of the forest.
    pub seed: u64,
    /// How the forest was grown.
    pub hyper_parameters: HyperParameters,
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

    fn find(&self, operator: Operator, values: &[u64]) -> Option<usize> {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low.midpoint(high);
            match compare(operator, self.shape(middle), values) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return Some(middle),
            }
        }
        None
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
    fn residual_near(&self, operator: Operator, values: &[u64]) -> f64 {
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

    fn check(&self, operator: Operator) -> Result<(), String> {
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

impl OperatorPredictor {
    /// Checks everything a prediction relies on; call it on anything read from a file.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self) -> Result<(), String> {
        if self.features != feature_names(self.operator) {
            return Err(format!(
                "features {:?}, expected {:?}: train again with this version",
                self.features,
                feature_names(self.operator)
            ));
        }
        if !self.parts.iter().map(|part| part.name.as_str()).eq(part_names(self.operator).iter().copied()) {
            let names: Vec<_> = self.parts.iter().map(|part| part.name.as_str()).collect();
            return Err(format!("baseline parts {names:?}, expected {:?}", part_names(self.operator)));
        }
        let positive = |x: f64| x.is_finite() && x > 0.0;
        if !positive(self.overhead_ns) {
            return Err(format!("overhead_ns = {}, expected above 0", self.overhead_ns));
        }
        if let Some(part) =
            self.parts.iter().find(|part| !(part.coefficient >= 0.0 && part.coefficient < 1e9))
        {
            return Err(format!("coefficient {} of baseline part {}", part.coefficient, part.name));
        }
        if self.forest.num_features != self.features.len() {
            return Err(format!("a forest of {} features", self.forest.num_features));
        }
        self.forest.check()?;
        self.domain.check(self.operator)?;
        for range in [self.interval.interpolated, self.interval.extrapolated] {
            if !(range.low > 0.0 && range.low <= 1.0 && range.high >= 1.0 && range.high.is_finite()) {
                return Err(format!("interval {}..{}, expected one around 1", range.low, range.high));
            }
        }
        Ok(())
    }

    /// Overhead and roofline parts of a shape on a GPU, ns; the forest's ratio is to this.
    #[must_use]
    pub fn baseline_ns(&self, shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
        let parts = parts_ns(shape, gpu);
        let weighted = self.parts.iter().zip(parts.as_slice()).map(|(part, ns)| part.coefficient * ns);
        self.overhead_ns + weighted.sum::<f64>()
    }

    /// Modelled time in ns of a shape on the GPU whose samples were trained on, whatever its domain.
    ///
    /// Not under the physical floor. The shape must be this operator's and not empty; see [`Predictors::predict`].
    #[must_use]
    pub fn predict(&self, shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
        self.predict_on(shape, gpu, gpu)
    }

    /// The ratio comes from the GPU that was measured, the baseline from the one that is asked about.
    fn predict_on(&self, shape: &OperatorShape, source: &GpuSpec, target: &GpuSpec) -> f64 {
        let row = features(shape, source, self.overhead_ns);
        let mut ln_ratio = self.forest.predict(row.as_slice());
        if let Some(values) = shape_values(self.operator, shape) {
            ln_ratio += self.domain.residual_near(self.operator, values.as_slice());
        }
        let ratio = ln_ratio.exp();
        (self.baseline_ns(shape, target) * ratio).max(floor_ns(shape, target))
    }
}

/// Why predictors cannot be used together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PredictorsError {
    /// Two predictors of one operator.
    #[error("two predictors for operator `{operator}`")]
    Duplicate {
        /// The operator.
        operator: Operator,
    },
    /// A predictor that [`OperatorPredictor::check`] refuses.
    #[error("predictor for operator `{operator}`: {reason}")]
    Invalid {
        /// The operator.
        operator: Operator,
        /// What is wrong with it.
        reason: String,
    },
}

/// The predictors of one GPU.
#[derive(Clone, Debug)]
pub struct Predictors {
    source: GpuSpec,
    target: GpuSpec,
    is_transferred: bool,
    /// At the operator's place in [`Operator::ALL`].
    by_operator: Vec<Option<OperatorPredictor>>,
}

impl Predictors {
    /// Checks and collects the predictors trained on samples of `gpu`.
    ///
    /// # Errors
    /// When one is invalid or an operator has two.
    pub fn new(gpu: GpuSpec, predictors: Vec<OperatorPredictor>) -> Result<Self, PredictorsError> {
        let mut by_operator: Vec<Option<OperatorPredictor>> = Operator::ALL.iter().map(|_| None).collect();
        for predictor in predictors {
            let operator = predictor.operator;
            predictor.check().map_err(|reason| PredictorsError::Invalid { operator, reason })?;
            if by_operator[operator as usize].replace(predictor).is_some() {
                return Err(PredictorsError::Duplicate { operator });
            }
        }
        Ok(Self { source: gpu.clone(), target: gpu, is_transferred: false, by_operator })
    }

    /// Predicts times of another GPU by its data sheet; every prediction is tagged [`Provenance::Transferred`].
    ///
    /// A launch keeps its overhead and its ratio to the baseline; the roofline parts of the baseline become
    /// those of `gpu`.
    #[must_use]
    pub fn transferred_to(mut self, gpu: GpuSpec) -> Self {
        self.target = gpu;
        self.is_transferred = true;
        self
    }

    /// The GPU whose times are predicted.
    #[must_use]
    pub fn gpu(&self) -> &GpuSpec {
        &self.target
    }

    /// The GPU whose samples were trained on.
    #[must_use]
    pub fn source_gpu(&self) -> &GpuSpec {
        &self.source
    }

    /// The operators that can be predicted, in the order of the forward pass.
    pub fn operators(&self) -> impl Iterator<Item = Operator> {
        self.by_operator.iter().flatten().map(|predictor| predictor.operator)
    }

    /// The predictor of an operator.
    #[must_use]
    pub fn get(&self, operator: Operator) -> Option<&OperatorPredictor> {
        self.by_operator[operator as usize].as_ref()
    }

    /// Predicts the GPU time of one launch.
    ///
    /// A shape that was measured gets its median time; every other one the model's.
    ///
    /// # Errors
    /// When the operator has no predictor, the shape is not one of its shapes or is empty, or (with
    /// [`OutOfDomain::Refuse`]) lies outside what was measured.
    pub fn predict(
        &self,
        operator: Operator,
        shape: &OperatorShape,
        out_of_domain: OutOfDomain,
    ) -> Result<Prediction, PredictError> {
        let predictor = self.get(operator).ok_or_else(|| self.missing(operator))?;
        let values = checked_values(operator, shape)?;
        let values = values.as_slice();
        let found = predictor.domain.find(operator, values);
        if let (Some(i), false) = (found, self.is_transferred) {
            let domain = &predictor.domain;
            return Ok(Prediction {
                time_ns: domain.time_ns[i].max(floor_ns(shape, &self.target)),
                low_ns: domain.low_ns[i],
                high_ns: domain.high_ns[i],
                provenance: Provenance::Measured,
            });
        }
        let outside = if found.is_some() { None } else { predictor.outside(values) };
        let provenance = match outside {
            Some(error) if out_of_domain == OutOfDomain::Refuse => return Err(error),
            _ if self.is_transferred => Provenance::Transferred,
            Some(_) => Provenance::Extrapolated,
            None => Provenance::Interpolated,
        };
        let time_ns = predictor.predict_on(shape, &self.source, &self.target);
        let range = match provenance {
            Provenance::Interpolated => predictor.interval.interpolated,
            _ => predictor.interval.extrapolated,
        };
        let low_ns = (time_ns * range.low).max(floor_ns(shape, &self.target));
        Ok(Prediction { time_ns, low_ns, high_ns: time_ns * range.high, provenance })
    }

    fn missing(&self, operator: Operator) -> PredictError {
        let names: Vec<_> = self.operators().map(Operator::name).collect();
        let available = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        let hint = if operator.is_collective() {
            "collectives need samples of several GPUs; use one GPU per replica".to_owned()
        } else {
            format!("profile `{operator}` on this GPU and train the bundle again")
        };
        PredictError::MissingOperator { operator, available, hint }
    }
}

impl OperatorPredictor {
    /// How a shape lies outside what was measured, if it does.
    fn outside(&self, values: &[u64]) -> Option<PredictError> {
        let (operator, domain) = (self.operator, &self.domain);
        for (c, &column) in operator.shape_columns().iter().enumerate() {
            let (value, min, max) = (values[c], domain.min[c], domain.max[c]);
            if !(min..=max).contains(&value) {
                return Some(PredictError::OutOfDomain { operator, column, value, min, max });
            }
        }
        (!domain.has_layout(operator, values)).then(|| PredictError::UnmeasuredLayout {
            operator,
            layout: describe_layout(operator, values),
            measured: domain.describe_layouts(operator),
        })
    }
}

/// The shape's numbers, if the shape is one of the operator's, not empty, and its work can be counted.
fn checked_values(
    operator: Operator,
    shape: &OperatorShape,
) -> Result<Row<u64, MAX_SHAPE_COLUMNS>, PredictError> {
    let wrong = |expected: &str| PredictError::WrongShape {
        operator,
        expected: expected.to_owned(),
        found: format!("{shape:?}"),
    };
    let row = shape_values(operator, shape)
        .ok_or_else(|| wrong(&format!("a shape with {}", operator.shape_columns().join(", "))))?;
    let is_whole = match *shape {
        OperatorShape::Attention { load, .. } => {
            let is_consistent = |seqs: u32, tokens: u64| (seqs == 0) == (tokens == 0);
            load.num_tokens() > 0
                && is_consistent(load.num_prefill_seqs, load.num_prefill_tokens.into())
                && is_consistent(load.num_prefill_seqs, load.prefill_pairs)
                && is_consistent(load.num_prefill_seqs, load.prefill_kv_tokens)
                && is_consistent(load.num_decode_seqs, load.decode_kv_tokens)
                && is_consistent(load.num_decode_seqs, load.max_decode_kv_tokens.into())
                && layout(operator, row.as_slice()).all(|value| value > 0)
        }
        _ => row.as_slice().iter().all(|&value| value > 0),
    };
    if !is_whole {
        return Err(wrong("a launch with work to do"));
    }
    // FLOPs and bytes are counted in u64; 2^10 exceeds every constant factor in their formulas.
    let work: f64 = match *shape {
        OperatorShape::Attention { heads, load } => {
            let tokens =
                load.prefill_kv_tokens as f64 + f64::from(load.num_tokens()) + load.decode_kv_tokens as f64;
            let q_heads = f64::from(heads.num_q_heads.max(heads.num_kv_heads));
            q_heads * f64::from(heads.head_dim) * (load.prefill_pairs as f64 + tokens)
        }
        _ => row.as_slice().iter().map(|&value| value as f64).product(),
    };
    if work >= (1u64 << 53) as f64 {
        return Err(wrong("at most 2^53 elements of work"));
    }
    Ok(row)
}

//! What a predictor sees of a launch: roofline parts that make its baseline, and features of its ratio to that.
//!
//! Both are computed on the stack, as they are asked for once per operator and simulated step. Their names
//! are written into every predictor file, and a file that names others is refused: a forest fitted on one
//! meaning of a column must never be read with another. Each family of operators (`rows`, `gemm`, `attention`)
//! states its names beside the code that computes them.

mod attention;
mod distance;
mod gemm;
mod logarithm;
mod rows;
#[cfg(test)]
mod tests;

use plumbline_schema::{
    GpuSpec, Operator, OperatorShape,
    operator::MAX_SHAPE_COLUMNS,
    roofline::{roofline_ns, tensor_flops_per_s},
};

pub(crate) use attention::{DECODE_FEATURES, DECODE_PARTS, Decode, HEADS_FEATURES, Launches, SCALES};
pub use distance::LnShape;

/// Most features or parts that any operator has.
pub const MAX_COLUMNS: usize = 32;

/// Nominal cost of what no data sheet tells, ns; its coefficient says what it is.
pub const NOMINAL_NS: f64 = 1000.0;

/// Bytes of one bf16 element.
const BF16_BYTES: f64 = 2.0;

/// Up to [`MAX_COLUMNS`] numbers without an allocation.
#[derive(Clone, Copy, Debug)]
pub struct Row<T, const N: usize = MAX_COLUMNS> {
    values: [T; N],
    len: usize,
}

impl<T: Copy + Default, const N: usize> Row<T, N> {
    fn from_slice(slice: &[T]) -> Self {
        let mut values = [T::default(); N];
        values[..slice.len()].copy_from_slice(slice);
        Self { values, len: slice.len() }
    }

    /// The numbers, in the order of their names.
    #[must_use]
    pub fn as_slice(&self) -> &[T] {
        &self.values[..self.len]
    }
}

/// Names of an operator's features, in the order of [`features`].
#[must_use]
pub const fn feature_names(operator: Operator) -> &'static [&'static str] {
    if operator.is_gemm() {
        return &gemm::FEATURES;
    }
    match operator {
        Operator::Attention => &attention::FEATURES,
        _ => &rows::FEATURES,
    }
}

/// Names of the roofline parts of an operator's baseline, in the order of [`parts_ns`].
#[must_use]
pub const fn part_names(operator: Operator) -> &'static [&'static str] {
    if operator.is_gemm() {
        return &gemm::PARTS;
    }
    match operator {
        Operator::Attention => &attention::PARTS,
        _ => &rows::PARTS,
    }
}

/// Roofline times in ns that, weighted and joined by [`joined`], make the baseline with the overhead.
///
/// They are named and explained in the family's file.
#[must_use]
pub fn parts_ns(shape: &OperatorShape, gpu: &GpuSpec) -> Row<f64> {
    match *shape {
        OperatorShape::Gemm { m, n, k } => gemm::parts_ns(m, n, k, shape, gpu),
        OperatorShape::Attention { heads, load } => attention::parts_ns(heads, load, gpu),
        _ => rows::parts_ns(shape, gpu),
    }
}

/// Exponent by which the weighted parts of an operator's baseline are joined: `(sum of part^norm)^(1/norm)`.
///
/// 1 adds parts that follow each other. Matrix products read, compute and walk along `k` at once, so the longest part
/// decides, and near a tie each delays the other: 3, which errs least on layouts that were held out.
#[must_use]
pub const fn part_norm(operator: Operator) -> i32 {
    if operator.is_gemm() { 3 } else { 1 }
}

/// Joins weighted parts, each at least 0, by a norm that [`part_norm`] gives.
#[must_use]
pub fn joined(weighted: impl Iterator<Item = f64>, norm: i32) -> f64 {
    match norm {
        3 => weighted.map(|part| part * part * part).sum::<f64>().cbrt(),
        _ => weighted.sum(),
    }
}

/// Features of the ratio of a launch's time to its baseline; see [`feature_names`].
///
/// All are logarithms or fractions, so that their spacing resembles that of their effect, and none holds a
/// time by itself: times enter as ratios to each other or to the fixed overhead.
#[must_use]
pub fn features(shape: &OperatorShape, gpu: &GpuSpec, overhead_ns: f64) -> Row<f32> {
    let over_overhead = || ln(roofline_ns(shape, gpu) / overhead_ns);
    match *shape {
        OperatorShape::Gemm { m, n, k } => gemm::features(m, n, k, shape, gpu, over_overhead()),
        OperatorShape::Attention { heads, load } => attention::features(heads, load, gpu, overhead_ns),
        _ => rows::features(shape, gpu, over_overhead()),
    }
}

/// [`features`] and [`parts_ns`] on one GPU, which attention makes of the same numbers; `None` where nothing is shared.
pub(crate) fn features_and_parts(
    shape: &OperatorShape,
    gpu: &GpuSpec,
    overhead_ns: f64,
) -> Option<(Row<f32>, Row<f64>)> {
    match *shape {
        OperatorShape::Attention { heads, load } => {
            Some(attention::features_and_parts(heads, load, gpu, overhead_ns))
        }
        _ => None,
    }
}

/// The shape's numbers as [`Operator::shape_columns`] orders them; `None` when the shape is another operator's.
#[must_use]
pub fn shape_values(operator: Operator, shape: &OperatorShape) -> Option<Row<u64, MAX_SHAPE_COLUMNS>> {
    shape.is_of(operator).then(|| {
        let mut values = [0; MAX_SHAPE_COLUMNS];
        let len = shape.fill_values(&mut values);
        Row { values, len }
    })
}

/// Index of the first shape column that the batch decides, and one past the last; the others are the model's.
#[must_use]
pub const fn batch_columns(operator: Operator) -> std::ops::Range<usize> {
    match operator {
        Operator::Attention => 3..10,
        _ => 0..1,
    }
}

/// Natural logarithm, kept finite so that an empty count cannot poison a sum.
fn ln(x: f64) -> f32 {
    x.max(1e-30).ln() as f32
}

/// How a feature follows from the number that it tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    /// Its logarithm.
    Ln,
    /// `ln(1 + number)`.
    Ln1p,
    /// The number itself.
    Plain,
}

impl Scale {
    /// By the system's logarithms.
    pub(crate) fn of(self, argument: f64) -> f32 {
        match self {
            Self::Ln => ln(argument),
            Self::Ln1p => argument.ln_1p() as f32,
            Self::Plain => argument as f32,
        }
    }
}

/// `x.ceil()` of a number that is not below 0, without the call that it takes where processors of any age are served.
#[inline]
fn ceil(x: f64) -> f64 {
    /// From here on all numbers are whole, and up to twice this they are the only ones.
    const WHOLE: f64 = (1u64 << 52) as f64;
    if x < WHOLE {
        let nearest = (x + WHOLE) - WHOLE;
        // No branch: no processor could tell which way it goes.
        nearest + f64::from(nearest < x)
    } else {
        x
    }
}

/// `x / ceil(x)`: how full the last wave leaves the GPU; 1 for nothing.
#[inline]
fn wave_fill(waves: f64) -> f64 {
    if waves > 0.0 { waves / ceil(waves) } else { 1.0 }
}

fn memory_ns(shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
    shape.bytes().0 as f64 / gpu.hbm_bandwidth_bytes_per_s * 1e9
}

/// Time at the tensor cores' peak at the highest clock, as in [`roofline_ns`].
fn compute_ns(flops: f64, gpu: &GpuSpec) -> f64 {
    flops / tensor_flops_per_s(gpu) * 1e9
}

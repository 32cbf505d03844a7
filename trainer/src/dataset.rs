//! Samples to rows: one row per measured shape, refused when it cannot be true.

use std::collections::BTreeSet;

use plumbline_bundles::{CacheState, Sample, features::shape_values};
use plumbline_schema::{GpuSpec, Operator, OperatorShape, roofline::floor_ns};
use sha2::{Digest, Sha256};

use crate::error::TrainError;

/// Repeated measurements of one shape may differ by this factor at most.
pub const MAX_DISAGREEMENT: f64 = 2.0;

/// One measured shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The shape.
    pub shape: OperatorShape,
    /// Its numbers, in the order of [`Operator::shape_columns`].
    pub values: Vec<u64>,
    /// Median time, ns: the mean over repeated measurements of the shape.
    pub time_ns: f64,
    /// Shortest time of all measurements of the shape, ns.
    pub low_ns: f64,
    /// Largest 95th percentile of all measurements of the shape, ns.
    pub high_ns: f64,
}

impl Row {
    /// The shape as `column = value`, joined by commas.
    #[must_use]
    pub fn describe(&self, operator: Operator) -> String {
        let named = operator.shape_columns().iter().zip(&self.values);
        named.map(|(name, value)| format!("{name} = {value}")).collect::<Vec<_>>().join(", ")
    }
}

/// The measured shapes of one operator.
#[derive(Clone, Debug, PartialEq)]
pub struct OperatorRows {
    /// Which operator.
    pub operator: Operator,
    /// State of the cache in all samples used.
    pub cache: CacheState,
    /// Sorted by shape; no shape twice.
    pub rows: Vec<Row>,
    /// Samples the rows were made of.
    pub num_samples: usize,
    /// Samples with flags: throttled, noisy or cut short. They are used, being what the GPU does.
    pub num_flagged: usize,
}

/// Collects the samples of every operator, in the order of the forward pass.
///
/// Of an operator those of [`CacheState::in_model`] are taken. Where that is hot and was measured at fewer than half as
/// many shapes as cold, as older bundles did to show the difference only, the cold ones are taken in its place.
/// The other way round there is no such choice: weights found in the cache tell nothing of weights that are not.
///
/// # Errors
/// When a sample has a time that is not above 0 and finite, or a shape that is not its operator's; when two
/// samples of a shape disagree by more than [`MAX_DISAGREEMENT`]; when an operator whose state is cold has hot samples
/// only.
pub fn collect(samples: &[Sample]) -> Result<Vec<OperatorRows>, TrainError> {
    if samples.is_empty() {
        return Err(TrainError::NoSamples);
    }
    let mut all = Vec::new();
    for operator in Operator::ALL {
        let own: Vec<&Sample> = samples.iter().filter(|sample| sample.operator == operator).collect();
        if !own.is_empty() {
            all.push(collect_operator(operator, &own)?);
        }
    }
    Ok(all)
}

/// A sample's numbers, which of the operator's samples it is, from 1, and itself.
type Numbered<'a> = (Vec<u64>, usize, &'a Sample);

fn collect_operator(operator: Operator, samples: &[&Sample]) -> Result<OperatorRows, TrainError> {
    let mut numbered = Vec::new();
    for (i, sample) in samples.iter().enumerate() {
        let values = check_sample(operator, i + 1, sample)?;
        numbered.push((values, i + 1, *sample));
    }
    let cache = trained_state(operator, &numbered);
    numbered.retain(|(_, _, sample)| sample.cache == cache);
    if numbered.is_empty() {
        return Err(TrainError::NoColdSamples { operator, found: samples.len() });
    }
    let num_flagged = numbered.iter().filter(|(_, _, sample)| !sample.flags.is_empty()).count();
    numbered.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.cmp(&b.1)));
    let rows = numbered.chunk_by(|a, b| a.0 == b.0).map(|same| merge(operator, same));
    Ok(OperatorRows {
        operator,
        cache,
        rows: rows.collect::<Result<_, _>>()?,
        num_samples: numbered.len(),
        num_flagged,
    })
}

/// The state whose samples are used; see [`collect`].
fn trained_state(operator: Operator, samples: &[Numbered]) -> CacheState {
    let num_shapes = |state: CacheState| {
        let of_state = samples.iter().filter(|(_, _, sample)| sample.cache == state);
        of_state.map(|(values, _, _)| values.as_slice()).collect::<BTreeSet<_>>().len()
    };
    let wanted = CacheState::in_model(operator);
    let is_sparse = 2 * num_shapes(CacheState::Hot) < num_shapes(CacheState::Cold);
    if wanted == CacheState::Hot && is_sparse { CacheState::Cold } else { wanted }
}

/// The rows of several operators that run the same kernels, as if they were one's: a shape is the mean over them.
///
/// # Errors
/// When two operators' times of a shape disagree by more than [`MAX_DISAGREEMENT`].
pub fn pool(sets: &[&OperatorRows]) -> Result<Vec<Row>, TrainError> {
    let mut all: Vec<(Operator, &Row)> =
        sets.iter().flat_map(|set| set.rows.iter().map(|row| (set.operator, row))).collect();
    all.sort_by(|a, b| a.1.values.cmp(&b.1.values));
    all.chunk_by(|a, b| a.1.values == b.1.values).map(merge_operators).collect()
}

fn merge_operators(same: &[(Operator, &Row)]) -> Result<Row, TrainError> {
    let mut row = same[0].1.clone();
    for &(operator, other) in &same[1..] {
        let (least, most) = (row.time_ns.min(other.time_ns), row.time_ns.max(other.time_ns));
        if most > MAX_DISAGREEMENT * least {
            return Err(TrainError::PoolDisagreement {
                first: same[0].0,
                second: operator,
                shape: row.describe(operator),
                first_ns: row.time_ns,
                second_ns: other.time_ns,
                factor: MAX_DISAGREEMENT,
            });
        }
        row.low_ns = row.low_ns.min(other.low_ns);
        row.high_ns = row.high_ns.max(other.high_ns);
    }
    row.time_ns = same.iter().map(|(_, row)| row.time_ns).sum::<f64>() / same.len() as f64;
    Ok(row)
}

/// Refuses times that the data sheet of the GPU sampled rules out.
pub(crate) fn check_floor(set: &OperatorRows, gpu: &GpuSpec) -> Result<(), TrainError> {
    let floor = |row: &Row| floor_ns(&row.shape, gpu);
    let Some(row) = set.rows.iter().find(|row| row.time_ns < floor(row)) else { return Ok(()) };
    Err(TrainError::UnderFloor {
        operator: set.operator,
        shape: row.describe(set.operator),
        time_ns: row.time_ns,
        floor_ns: floor(row),
    })
}

fn check_sample(operator: Operator, row: usize, sample: &Sample) -> Result<Vec<u64>, TrainError> {
    let bad = |found: String, expected| TrainError::BadSample { operator, row, found, expected };
    let stats = &sample.stats;
    for (name, time) in [("min_ns", stats.min_ns), ("p50_ns", stats.p50_ns), ("p95_ns", stats.p95_ns)] {
        if !(time.is_finite() && time > 0.0) {
            return Err(bad(format!("{name} = {time}"), "a finite time above 0"));
        }
    }
    let values = shape_values(operator, &sample.shape)
        .ok_or_else(|| bad(format!("{:?}", sample.shape), "a shape of this operator"))?;
    if sample.shape.bytes().0 == 0 {
        return Err(bad(format!("{:?}", sample.shape), "a launch that moves at least one byte"));
    }
    Ok(values.as_slice().to_vec())
}

/// Makes one row of all samples of a shape.
fn merge(operator: Operator, same: &[Numbered]) -> Result<Row, TrainError> {
    let time = |entry: &Numbered| entry.2.stats.p50_ns;
    let by_time = |a: &&Numbered, b: &&Numbered| time(a).total_cmp(&time(b));
    // A chunk holds at least one entry, so both exist.
    let (Some(fastest), Some(slowest)) = (same.iter().min_by(by_time), same.iter().max_by(by_time)) else {
        return Err(TrainError::NoSamples);
    };
    if time(slowest) > MAX_DISAGREEMENT * time(fastest) {
        let (first, second) = if fastest.1 < slowest.1 { (fastest, slowest) } else { (slowest, fastest) };
        return Err(TrainError::Disagreement {
            operator,
            first: first.1,
            second: second.1,
            first_ns: time(first),
            second_ns: time(second),
            factor: MAX_DISAGREEMENT,
        });
    }
    let time_ns = same.iter().map(time).sum::<f64>() / same.len() as f64;
    let low = same.iter().map(|entry| entry.2.stats.min_ns).fold(f64::INFINITY, f64::min);
    let high = same.iter().map(|entry| entry.2.stats.p95_ns).fold(0.0, f64::max);
    Ok(Row {
        shape: fastest.2.shape,
        values: fastest.0.clone(),
        time_ns,
        low_ns: low.min(time_ns),
        high_ns: high.max(time_ns),
    })
}

/// Digest of all that training sees of an operator: `sha256:` and 64 hexadecimal digits.
///
/// Covers names, shapes and times bit by bit, in the order given.
#[must_use]
pub fn digest(sets: &[&OperatorRows]) -> String {
    let mut hasher = Sha256::new();
    for set in sets {
        hasher.update(set.operator.name());
        hasher.update((set.rows.len() as u64).to_le_bytes());
        for row in &set.rows {
            row.values.iter().for_each(|value| hasher.update(value.to_le_bytes()));
            for time in [row.time_ns, row.low_ns, row.high_ns] {
                hasher.update(time.to_bits().to_le_bytes());
            }
        }
    }
    let mut text = String::from("sha256:");
    for byte in hasher.finalize() {
        for half in [byte >> 4, byte & 15] {
            text.extend(char::from_digit(u32::from(half), 16));
        }
    }
    text
}

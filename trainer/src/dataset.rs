//! Samples to rows: one row per measured shape, refused when it cannot be true.

use plumbline_bundles::{CacheState, Sample, features::shape_values};
use plumbline_schema::{Operator, OperatorShape};
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
    /// Sorted by shape; no shape twice.
    pub rows: Vec<Row>,
    /// Samples the rows were made of.
    pub num_samples: usize,
    /// Samples with flags: throttled, noisy or cut short. They are used, being what the GPU does.
    pub num_flagged: usize,
}

/// Collects the cold samples of every operator, in the order of the forward pass.
///
/// # Errors
/// When a sample has a time that is not above 0 and finite, or a shape that is not its operator's; when two
/// samples of a shape disagree by more than [`MAX_DISAGREEMENT`]; when an operator has hot samples only.
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

fn collect_operator(operator: Operator, samples: &[&Sample]) -> Result<OperatorRows, TrainError> {
    let mut numbered = Vec::new();
    for (i, sample) in samples.iter().enumerate() {
        let values = check_sample(operator, i + 1, sample)?;
        if sample.cache == CacheState::Cold {
            numbered.push((values, i + 1, *sample));
        }
    }
    if numbered.is_empty() {
        return Err(TrainError::NoColdSamples { operator, found: samples.len() });
    }
    let num_flagged = numbered.iter().filter(|(_, _, sample)| !sample.flags.is_empty()).count();
    numbered.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.cmp(&b.1)));
    let rows = numbered.chunk_by(|a, b| a.0 == b.0).map(|same| merge(operator, same));
    Ok(OperatorRows {
        operator,
        rows: rows.collect::<Result<_, _>>()?,
        num_samples: numbered.len(),
        num_flagged,
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
fn merge(operator: Operator, same: &[(Vec<u64>, usize, &Sample)]) -> Result<Row, TrainError> {
    let time = |entry: &(Vec<u64>, usize, &Sample)| entry.2.stats.p50_ns;
    let by_time =
        |a: &&(Vec<u64>, usize, &Sample), b: &&(Vec<u64>, usize, &Sample)| time(a).total_cmp(&time(b));
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

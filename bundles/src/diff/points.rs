//! What a comparison needs of a measured point, and a small file of it.
//!
//! A statistics file is a CSV (or `.csv.zst`) with a row per point: `operator`, `shape` (its numbers, with blanks
//! between), `sequences` (digest of an attention launch's sequences), `cache`, `p50_ns`, `n`, `std_ns`,
//! `sm_clock_mhz`, `kernel`. A profile of a megabyte becomes some tens of kilobytes, enough to compare later ones with.

use std::{collections::BTreeMap, path::Path};

use plumbline_schema::{InputError, Location, Operator, OperatorShape, StepBatch, files};
use serde::{Deserialize, Serialize};

use crate::{
    bundle::sha256_hex,
    samples::{CacheState, Sample},
};

/// Hex digits of the digest of an attention launch's sequences: 64 bits tell a profile's thousands of launches apart.
const DIGEST_DIGITS: usize = 16;

/// Largest number of a shape, as in `samples/`.
const MAX_SHAPE_VALUE: u64 = 1 << 40;

/// What makes two points the same point of two profiles.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PointKey {
    /// Which operator.
    pub operator: Operator,
    /// Shape of the launch.
    pub shape: OperatorShape,
    /// Digest of the very sequences of an attention launch; `None` for other operators.
    pub sequences: Option<String>,
    /// Cold or hot.
    pub cache: CacheState,
}

/// One measured point as far as a comparison needs it.
///
/// Times are rounded (`p50_ns` to six significant digits, `std_ns` to three), so that a bundle and its statistics
/// file give the same comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct PointStats {
    /// Which point.
    pub key: PointKey,
    /// Median GPU time of one launch, ns.
    pub p50_ns: f64,
    /// Repeated measurements.
    pub n: u32,
    /// Standard deviation of the measurements, ns.
    pub std_ns: f64,
    /// SM clock around the measurement, MHz; `None` when not known.
    pub sm_clock_mhz: Option<u32>,
    /// What ran; empty when not known.
    pub kernel: String,
}

impl PointStats {
    /// What a comparison needs of a sample.
    #[must_use]
    pub fn from_sample(sample: &Sample) -> Self {
        let key = PointKey {
            operator: sample.operator,
            shape: sample.shape,
            sequences: sample.batch.as_ref().map(sequences_digest),
            cache: sample.cache,
        };
        Self {
            key,
            p50_ns: rounded(sample.stats.p50_ns, 6),
            n: sample.stats.n,
            std_ns: rounded(sample.stats.std_ns, 3),
            sm_clock_mhz: sample.sm_clock_mhz,
            kernel: sample.kernel.clone(),
        }
    }

    /// Relative standard error of the median from the scatter of the measurements, were they independent and normal.
    #[must_use]
    pub fn relative_error(&self) -> f64 {
        // Of a normal sample's median, against its mean: sqrt(pi / 2).
        let median_factor = std::f64::consts::FRAC_PI_2.sqrt();
        median_factor * self.std_ns / (self.p50_ns * f64::from(self.n.max(1)).sqrt())
    }
}

/// The points of samples, each once, in the order of their keys. Where a point was measured twice, the one with more
/// measurements is kept, the first of equals.
#[must_use]
pub fn from_samples(samples: &[Sample]) -> Vec<PointStats> {
    let mut points = BTreeMap::<PointKey, PointStats>::new();
    for point in samples.iter().map(PointStats::from_sample) {
        let kept = points.entry(point.key.clone()).or_insert_with(|| point.clone());
        if point.n > kept.n {
            *kept = point;
        }
    }
    points.into_values().collect()
}

/// A digest that two launches share when they have the same sequences.
fn sequences_digest(batch: &StepBatch) -> String {
    let text = format!("{}|{}", batch.format_prefill_chunks(), batch.format_decode_contexts());
    sha256_hex(text.as_bytes())[..DIGEST_DIGITS].to_owned()
}

/// `value` with so many significant digits.
fn rounded(value: f64, num_digits: usize) -> f64 {
    format!("{value:.*e}", num_digits - 1).parse().unwrap_or(value)
}

/// A row of a statistics file.
#[derive(Serialize, Deserialize)]
struct Row {
    operator: String,
    shape: String,
    sequences: String,
    cache: String,
    p50_ns: f64,
    n: u32,
    std_ns: f64,
    sm_clock_mhz: Option<u32>,
    #[serde(default)]
    kernel: String,
}

/// Writes a statistics file of samples; compressed when the name ends in `.zst`.
///
/// # Errors
/// Any I/O error.
pub fn write_stats(path: &Path, samples: &[Sample]) -> Result<(), InputError> {
    let row = |point: PointStats| Row {
        operator: point.key.operator.to_string(),
        shape: point.key.shape.values().iter().map(u64::to_string).collect::<Vec<_>>().join(" "),
        sequences: point.key.sequences.unwrap_or_default(),
        cache: point.key.cache.name().to_owned(),
        p50_ns: point.p50_ns,
        n: point.n,
        std_ns: point.std_ns,
        sm_clock_mhz: point.sm_clock_mhz,
        kernel: point.kernel,
    };
    files::write_csv(path, from_samples(samples).into_iter().map(row))
}

/// Reads a statistics file, in the order of the points' keys.
///
/// # Errors
/// `Io`, or `Invalid` with line and column: a missing column, a number out of range, a point that stands there twice, no
/// row at all.
pub fn read_stats(path: &Path) -> Result<Vec<PointStats>, InputError> {
    let rows: Vec<Row> = files::read_csv(path, "statistics of a point")?;
    if rows.is_empty() {
        return Err(InputError::invalid(path, Location::File, "at least one row", "none"));
    }
    let mut points = BTreeMap::new();
    for (index, row) in rows.into_iter().enumerate() {
        // The header is line 1, and no field holds a line break.
        let line = index as u64 + 2;
        let point = parse(row).map_err(|(column, expected, found)| {
            let location = Location::Cell { line, column: column.into() };
            InputError::invalid(path, location, expected, found)
        })?;
        if points.insert(point.key.clone(), point).is_some() {
            let expected = "each point once";
            return Err(InputError::invalid(path, Location::Line(line), expected, "one from a line above"));
        }
    }
    Ok(points.into_values().collect())
}

/// Column, what was expected there, what was found.
type Fault = (&'static str, String, String);

fn parse(row: Row) -> Result<PointStats, Fault> {
    let fault = |column, expected: &str, found: String| Err((column, expected.to_owned(), found));
    let operator: Operator = match row.operator.parse() {
        Ok(operator) => operator,
        Err(_) => return fault("operator", "an operator's name", format!("`{}`", row.operator)),
    };
    let cache = match row.cache.as_str() {
        "cold" => CacheState::Cold,
        "hot" => CacheState::Hot,
        other => return fault("cache", "`cold` or `hot`", format!("`{other}`")),
    };
    let Some(shape) = parse_shape(operator, &row.shape) else {
        let columns = operator.shape_columns().join(" ");
        return fault("shape", &format!("numbers for {columns}"), format!("`{}`", row.shape));
    };
    let is_digest = row.sequences.len() == DIGEST_DIGITS
        && row.sequences.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let sequences = match (operator == Operator::Attention, is_digest) {
        (true, true) => Some(row.sequences),
        (false, _) if row.sequences.is_empty() => None,
        (true, false) => {
            let expected = format!("{DIGEST_DIGITS} lower-case hex digits");
            return fault("sequences", &expected, format!("`{}`", row.sequences));
        }
        (false, _) => return fault("sequences", "nothing", format!("`{}`", row.sequences)),
    };
    if !row.p50_ns.is_finite() || row.p50_ns <= 0.0 {
        return fault("p50_ns", "a finite time above 0", row.p50_ns.to_string());
    }
    if !row.std_ns.is_finite() || row.std_ns < 0.0 {
        return fault("std_ns", "a finite time from 0", row.std_ns.to_string());
    }
    if row.n == 0 {
        return fault("n", "at least 1", "0".into());
    }
    Ok(PointStats {
        key: PointKey { operator, shape, sequences, cache },
        p50_ns: row.p50_ns,
        n: row.n,
        std_ns: row.std_ns,
        sm_clock_mhz: row.sm_clock_mhz,
        kernel: row.kernel,
    })
}

fn parse_shape(operator: Operator, text: &str) -> Option<OperatorShape> {
    let values: Vec<u64> = text.split(' ').map(|v| v.parse().ok()).collect::<Option<_>>()?;
    let fits = values.iter().all(|v| *v <= MAX_SHAPE_VALUE);
    OperatorShape::from_values(operator, &values).filter(|_| fits)
}

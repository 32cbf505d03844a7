//! `samples/<operator>.csv`: a row per measured point.
//!
//! Columns: those of [`Operator::shape_columns`]; for attention the sequences themselves
//! (`prefill_chunks_tokens_context`, `decode_contexts`); then [`COMMON_COLUMNS`], of which [`OPTIONAL_COLUMNS`] may
//! be absent.

use std::path::Path;

use csv::StringRecord;
use plumbline_schema::{InputError, Location, Operator, OperatorShape, StepBatch};
use serde::{Deserialize, Serialize};

use crate::stats::TimeStats;

/// Columns that every operator's file has, behind the shape.
pub const COMMON_COLUMNS: [&str; 16] = [
    "cache",
    "num_samples",
    "min_ns",
    "p50_ns",
    "mean_ns",
    "p95_ns",
    "max_ns",
    "std_ns",
    "stop",
    "num_attempts",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "power_w",
    "throttle",
    "kernel",
    "flags",
];

/// Columns that tables of format 1.0 and imported ones lack; they read as not known and as one attempt.
pub const OPTIONAL_COLUMNS: [&str; 2] = ["stop", "num_attempts"];

/// Columns of the very sequences of an attention launch, between the shape and [`COMMON_COLUMNS`].
pub const BATCH_COLUMNS: [&str; 2] = ["prefill_chunks_tokens_context", "decode_contexts"];

/// Largest number of a shape; more cannot be measured, and sums and products of it stay exact.
const MAX_SHAPE_VALUE: u64 = 1 << 40;

/// Largest product of a shape's numbers: FLOPs and bytes derived from it stay below 2^63.
const MAX_SHAPE_PRODUCT: u128 = 1 << 58;

/// Whether a launch finds its large operands in the L2 cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheState {
    /// Operands rotate among buffers that exceed the L2 cache, as a model's layers do.
    Cold,
    /// The same buffers each time.
    Hot,
}

impl CacheState {
    /// The state in which a model's own launch finds the operands of an operator.
    ///
    /// Weights, the KV cache and rows of the embedding were last touched a step ago: cold. What works on activations
    /// alone finds them where the launch before has just written them: hot.
    #[must_use]
    pub const fn in_model(operator: Operator) -> Self {
        match operator {
            Operator::RmsNorm | Operator::QkNorm | Operator::Rope | Operator::SiluMul | Operator::Sample => {
                Self::Hot
            }
            _ => Self::Cold,
        }
    }

    /// The name in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Hot => "hot",
        }
    }
}

/// Why the repetition of a measurement ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The mean is known as precisely as asked.
    Converged,
    /// As many samples as allowed, and not as precise as asked.
    MaxSamples,
    /// As long as allowed, and not as precise as asked.
    TimeLimit,
}

impl StopReason {
    /// The name in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Converged => "converged",
            Self::MaxSamples => "max_samples",
            Self::TimeLimit => "time_limit",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Converged, Self::MaxSamples, Self::TimeLimit].into_iter().find(|reason| reason.name() == text)
    }
}

/// One measured point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Which operator.
    pub operator: Operator,
    /// Shape of the launch.
    pub shape: OperatorShape,
    /// The very sequences of an attention launch; `None` for other operators.
    pub batch: Option<StepBatch>,
    /// Cold or hot.
    pub cache: CacheState,
    /// GPU time of one launch, launched back to back from a graph, gap included.
    pub stats: TimeStats,
    /// Why the repetition ended; `None` when not known.
    pub stop: Option<StopReason>,
    /// How often the point was measured until the samples were kept: more than 1 after a throttled, clock-shifted or
    /// bimodal attempt.
    pub num_attempts: u32,
    /// SM clock around the measurement, MHz; `None` when not known.
    pub sm_clock_mhz: Option<u32>,
    /// Memory clock around the measurement, MHz; `None` when not known.
    pub memory_clock_mhz: Option<u32>,
    /// Board power around the measurement, W; `None` when not known.
    pub power_w: Option<f64>,
    /// Throttle reasons joined by `|`; empty when none.
    pub throttle: String,
    /// What ran: kernel and configuration, or the library's algorithm.
    pub kernel: String,
    /// Marks joined by `|`: `throttled`, `clock_shifted`, `bimodal`, `noisy`, `time_limit`, `below_floor`; empty when
    /// none.
    pub flags: String,
}

impl Sample {
    /// A point of which nothing but its times is known: measured once, in the state in which a model's own launch
    /// finds its operands, nobody says on which clocks.
    #[must_use]
    pub fn bare(operator: Operator, shape: OperatorShape, stats: TimeStats) -> Self {
        Self {
            operator,
            shape,
            batch: None,
            cache: CacheState::in_model(operator),
            stats,
            stop: None,
            num_attempts: 1,
            sm_clock_mhz: None,
            memory_clock_mhz: None,
            power_w: None,
            throttle: String::new(),
            kernel: String::new(),
            flags: String::new(),
        }
    }

    /// Whether the flags hold `flag`.
    #[must_use]
    pub fn has_flag(&self, flag: &str) -> bool {
        self.flags.split('|').any(|f| f == flag)
    }
}

/// The columns of an operator's file, in order.
#[must_use]
pub fn columns(operator: Operator) -> Vec<&'static str> {
    let batch: &[&str] = if operator == Operator::Attention { &BATCH_COLUMNS } else { &[] };
    [operator.shape_columns(), batch, &COMMON_COLUMNS].concat()
}

/// Writes the samples of one operator as CSV, in the order given.
///
/// # Panics
/// Never: writing to memory does not fail.
#[must_use]
pub fn to_csv<'a>(operator: Operator, samples: impl IntoIterator<Item = &'a Sample>) -> Vec<u8> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    let mut write = |row: &[String]| writer.write_record(row).expect("writing to memory does not fail");
    write(&columns(operator).into_iter().map(str::to_owned).collect::<Vec<_>>());
    for sample in samples {
        write(&to_row(sample));
    }
    writer.into_inner().expect("flushing to memory does not fail")
}

fn to_row(sample: &Sample) -> Vec<String> {
    let mut row: Vec<String> = sample.shape.values().iter().map(u64::to_string).collect();
    if sample.operator == Operator::Attention {
        let batch = sample.batch.clone().unwrap_or_default();
        row.extend([batch.format_prefill_chunks(), batch.format_decode_contexts()]);
    }
    let stats = &sample.stats;
    row.extend([sample.cache.name().to_owned(), stats.n.to_string()]);
    // `{}` writes the shortest text that reads back as the same number.
    let times = [stats.min_ns, stats.p50_ns, stats.mean_ns, stats.p95_ns, stats.max_ns, stats.std_ns];
    row.extend(times.map(|time| time.to_string()));
    row.extend([sample.stop.map_or("", StopReason::name).to_owned(), sample.num_attempts.to_string()]);
    let clock = |mhz: Option<u32>| mhz.map_or_else(String::new, |v| v.to_string());
    row.extend([
        clock(sample.sm_clock_mhz),
        clock(sample.memory_clock_mhz),
        sample.power_w.map_or_else(String::new, |v| v.to_string()),
        sample.throttle.clone(),
        sample.kernel.clone(),
        sample.flags.clone(),
    ]);
    row
}

/// Parses the CSV of one operator; `path` is what errors name. Columns may stand in any order, and
/// further ones are ignored.
///
/// # Errors
/// `Invalid` with line and column: a missing column, a number out of range, statistics out of order,
/// sequences that contradict the shape.
pub fn from_csv(operator: Operator, bytes: &[u8], path: &Path) -> Result<Vec<Sample>, InputError> {
    let mut reader = csv::ReaderBuilder::new().from_reader(bytes);
    let header = reader.headers().map_err(|e| InputError::csv(path, "a header", e))?.clone();
    let columns = columns(operator);
    let positions = columns
        .iter()
        .map(|column| {
            let found = header.iter().position(|name| name == *column);
            if found.is_none() && !OPTIONAL_COLUMNS.contains(column) {
                let names: Vec<_> = header.iter().collect();
                let expected = format!("a column `{column}`");
                let names = format!("`{}`", names.join(","));
                return Err(InputError::invalid(path, Location::Line(1), expected, names));
            }
            Ok(found)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut samples = Vec::new();
    for record in reader.into_records() {
        let record = record.map_err(|e| InputError::csv(path, "a row of samples", e))?;
        let line = record.position().map_or(0, csv::Position::line);
        let row = Row { path, line, columns: &columns, positions: &positions, record: &record };
        samples.push(row.parse(operator)?);
    }
    if samples.is_empty() {
        return Err(InputError::invalid(path, Location::File, "at least one row", "none"));
    }
    Ok(samples)
}

/// One row while it is parsed.
struct Row<'a> {
    path: &'a Path,
    line: u64,
    columns: &'a [&'static str],
    positions: &'a [Option<usize>],
    record: &'a StringRecord,
}

impl Row<'_> {
    fn invalid(&self, column: &str, expected: impl Into<String>, found: impl Into<String>) -> InputError {
        let location = Location::Cell { line: self.line, column: column.into() };
        InputError::invalid(self.path, location, expected, found)
    }

    /// The text of a column; `columns` has every name asked for.
    fn text(&self, column: &str) -> &str {
        let at = self.columns.iter().position(|name| *name == column);
        at.and_then(|i| self.positions[i]).and_then(|at| self.record.get(at)).unwrap_or_default()
    }

    fn parse_as<T: std::str::FromStr>(&self, column: &str, expected: &str) -> Result<T, InputError> {
        let text = self.text(column);
        text.parse().map_err(|_| self.invalid(column, expected, format!("`{text}`")))
    }

    fn optional<T: std::str::FromStr>(&self, column: &str, expected: &str) -> Result<Option<T>, InputError> {
        if self.text(column).is_empty() { Ok(None) } else { self.parse_as(column, expected).map(Some) }
    }

    fn parse(&self, operator: Operator) -> Result<Sample, InputError> {
        let shape = self.shape(operator)?;
        let batch = match shape {
            OperatorShape::Attention { load, .. } => Some(self.batch(load)?),
            _ => None,
        };
        let cache = match self.text("cache") {
            "cold" => CacheState::Cold,
            "hot" => CacheState::Hot,
            other => return Err(self.invalid("cache", "`cold` or `hot`", format!("`{other}`"))),
        };
        let power_w: Option<f64> = self.optional("power_w", "a power in W, or nothing")?;
        if let Some(power) = power_w.filter(|p| !p.is_finite() || *p < 0.0) {
            return Err(self.invalid("power_w", "a finite power from 0", power.to_string()));
        }
        Ok(Sample {
            operator,
            shape,
            batch,
            cache,
            stats: self.stats()?,
            stop: self.stop()?,
            num_attempts: self.optional("num_attempts", "a count")?.unwrap_or(1),
            sm_clock_mhz: self.optional("sm_clock_mhz", "a clock in MHz, or nothing")?,
            memory_clock_mhz: self.optional("memory_clock_mhz", "a clock in MHz, or nothing")?,
            power_w,
            throttle: self.text("throttle").to_owned(),
            kernel: self.text("kernel").to_owned(),
            flags: self.text("flags").to_owned(),
        })
    }

    fn shape(&self, operator: Operator) -> Result<OperatorShape, InputError> {
        let names = operator.shape_columns();
        let mut values = Vec::with_capacity(names.len());
        for column in names {
            let value: u64 = self.parse_as(column, &format!("a whole number up to {MAX_SHAPE_VALUE}"))?;
            // An attention launch may lack prefills or decodes; every other number is a dimension.
            let is_load = operator == Operator::Attention && values.len() >= 3;
            let least = u64::from(!is_load);
            if !(least..=MAX_SHAPE_VALUE).contains(&value) {
                let expected = format!("{least} to {MAX_SHAPE_VALUE}");
                return Err(self.invalid(column, expected, value.to_string()));
            }
            values.push(value);
        }
        let product = |values: &[u64]| values.iter().fold(1u128, |p, &v| p.saturating_mul(v.into()));
        let size = if operator == Operator::Attention {
            let work: u128 = values[3..].iter().map(|&v| u128::from(v)).sum();
            product(&values[..3]).saturating_mul(work)
        } else {
            product(&values)
        };
        let shape = OperatorShape::from_values(operator, &values);
        shape.filter(|_| size <= MAX_SHAPE_PRODUCT).ok_or_else(|| {
            let expected = "a shape that a GPU can hold";
            self.invalid(names[0], expected, format!("{values:?}"))
        })
    }

    /// The sequences, which must add up to the numbers of the shape.
    fn batch(&self, load: plumbline_schema::AttentionLoad) -> Result<StepBatch, InputError> {
        let [chunks, contexts] = BATCH_COLUMNS;
        let batch = StepBatch::parse(self.text(chunks), self.text(contexts))
            .map_err(|text| self.invalid(chunks, "sequences", text))?;
        if batch.is_empty() {
            return Err(self.invalid(chunks, "a chunk or a decode", "neither"));
        }
        let counted = batch.shape().attention;
        if counted != load {
            let expected = format!("sequences with {load:?}, as the shape says");
            return Err(self.invalid(chunks, expected, format!("{counted:?}")));
        }
        Ok(batch)
    }

    fn stop(&self) -> Result<Option<StopReason>, InputError> {
        let text = self.text("stop");
        if text.is_empty() {
            return Ok(None);
        }
        let expected = "`converged`, `max_samples`, `time_limit`, or nothing";
        StopReason::parse(text).map(Some).ok_or_else(|| self.invalid("stop", expected, format!("`{text}`")))
    }

    fn stats(&self) -> Result<TimeStats, InputError> {
        let time = |column: &str| self.parse_as::<f64>(column, "a time in ns");
        let stats = TimeStats {
            n: self.parse_as("num_samples", "a count")?,
            min_ns: time("min_ns")?,
            p50_ns: time("p50_ns")?,
            mean_ns: time("mean_ns")?,
            p95_ns: time("p95_ns")?,
            max_ns: time("max_ns")?,
            std_ns: time("std_ns")?,
        };
        stats.check().map_err(|e| {
            // A column `n` would be a GEMM's second dimension.
            let column = if e.key == "n" { "num_samples" } else { &e.key };
            self.invalid(column, e.expected, e.found)
        })?;
        Ok(stats)
    }
}

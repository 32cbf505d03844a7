//! An engine's kernels at known shapes, and how the measured operators stand against them.
//!
//! A peers file is a CSV, a row for each operator (or operators that the engine runs as one) and phase, with the
//! columns of [`COLUMNS`]. The shipped one holds durations that CUPTI took of vLLM's kernels.

use std::{path::Path, str::FromStr};

use csv::StringRecord;
use plumbline_schema::{InputError, Location, Operator, OperatorShape, StepBatch};
use serde::Serialize;

use crate::{
    predictor::{OutOfDomain, Predictors, Provenance},
    samples::{CacheState, Sample},
};

/// Columns of a peers file.
pub const COLUMNS: [&str; 17] = [
    "engine",
    "gpu",
    "model",
    "phase",
    "operators",
    "shapes",
    "prefill_chunks_tokens_context",
    "decode_contexts",
    "median_ns",
    "p10_ns",
    "p90_ns",
    "median_period_ns",
    "num_kernels",
    "kernels",
    "num_launches",
    "warm",
    "note",
];

/// vLLM 0.24.0 on an H100 80GB HBM3, Qwen3-0.6B; see docs/measuring.md.
const VLLM_H100: &str = include_str!("../../data/peers/vllm-0.24-h100.csv");
/// What errors name it.
const VLLM_H100_PATH: &str = "bundles/data/peers/vllm-0.24-h100.csv";

/// Times within this ratio of each other are level.
const LEVEL_RATIO: f64 = 0.03;
/// Times within this many ns of each other are level: what CUPTI's durations are good for at small kernels.
const LEVEL_NS: f64 = 300.0;

/// One operator of a launch, with its shape.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    /// The operator.
    pub operator: Operator,
    /// Its shape.
    #[serde(serialize_with = "serialize_values")]
    pub shape: OperatorShape,
}

fn serialize_values<S: serde::Serializer>(shape: &OperatorShape, serializer: S) -> Result<S::Ok, S::Error> {
    shape.values().serialize(serializer)
}

/// An engine's kernels for one operator, or for several that it fuses, at one shape.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Peer {
    /// Engine and version.
    pub engine: String,
    /// Plumbline's name of the GPU it ran on.
    pub gpu: String,
    /// The model it ran.
    pub model: String,
    /// The steps it was seen in: phase and size.
    pub phase: String,
    /// The operators that its kernels do, in order.
    pub parts: Vec<Part>,
    /// Prefill chunks of an attention launch, `tokens:context;...`; empty for others.
    pub prefill_chunks_tokens_context: String,
    /// Decode contexts of an attention launch; empty for others.
    pub decode_contexts: String,
    /// Time that its kernels were running, without the gaps between them: median over launches, ns.
    pub median_ns: f64,
    /// 10th percentile, ns.
    pub p10_ns: f64,
    /// 90th percentile, ns.
    pub p90_ns: f64,
    /// Median time from the end of the launch before to the end of this one, ns; `None` where the host launched
    /// the kernels one by one and the GPU waited.
    pub median_period_ns: Option<f64>,
    /// Kernels a launch.
    pub num_kernels: u32,
    /// Their names, shortened, joined by `+`.
    pub kernels: String,
    /// Launches seen.
    pub num_launches: u32,
    /// What the L2 cache holds of the operands, in words; `none` when nothing.
    pub warm: String,
    /// What else differs, in words; empty when nothing.
    pub note: String,
}

/// How a measured operator stands against an engine's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Verdict {
    /// Faster by more than is level.
    Faster {
        /// By this much of the engine's time, percent.
        percent: f64,
    },
    /// Within 3 % or 0.3 us.
    Level,
    /// Slower by more than is level.
    Slower {
        /// By this much of the engine's time, percent.
        percent: f64,
    },
    /// No time of ours at that shape.
    NotMeasured,
}

/// Our time for an engine's launch.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ours {
    /// Sum of the parts' medians, ns.
    pub time_ns: f64,
    /// The weakest evidence among the parts.
    pub provenance: Provenance,
    /// The cache states of the parts, joined by `+`; empty for what was predicted.
    pub cache: String,
    /// Marks of the parts' samples, joined by `|`.
    pub flags: String,
    /// The lowest SM clock of the parts' samples, MHz; `None` when not known.
    pub sm_clock_mhz: Option<u32>,
}

/// One row of the comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The engine's kernels.
    pub peer: Peer,
    /// Our time; `None` when there is none.
    pub ours: Option<Ours>,
    /// How it stands.
    pub verdict: Verdict,
}

impl Peer {
    /// The shipped rows for a GPU; none when there are none for it.
    ///
    /// # Errors
    /// Those of [`parse`]; the shipped file has none.
    pub fn shipped(gpu: &str) -> Result<Vec<Self>, InputError> {
        let mut rows = parse(VLLM_H100.as_bytes(), Path::new(VLLM_H100_PATH))?;
        rows.retain(|row| row.gpu == gpu);
        Ok(rows)
    }

    fn is_attention(&self) -> bool {
        self.parts.iter().any(|part| part.operator == Operator::Attention)
    }
}

/// Parses a peers file; `path` is what errors name.
///
/// # Errors
/// `Invalid` with line and column.
pub fn parse(bytes: &[u8], path: &Path) -> Result<Vec<Peer>, InputError> {
    let mut reader = csv::ReaderBuilder::new().from_reader(bytes);
    let header = reader.headers().map_err(|e| InputError::csv(path, "a header", e))?;
    if !header.iter().eq(COLUMNS) {
        let names: Vec<_> = header.iter().collect();
        let (expected, found) = (COLUMNS.join(","), names.join(","));
        return Err(InputError::invalid(path, Location::Line(1), expected, found));
    }
    let mut rows = Vec::new();
    for record in reader.into_records() {
        let record = record.map_err(|e| InputError::csv(path, "a row of an engine's kernels", e))?;
        let line = record.position().map_or(0, csv::Position::line);
        rows.push(Row { path, line, record: &record }.parse()?);
    }
    Ok(rows)
}

/// One row while it is parsed.
struct Row<'a> {
    path: &'a Path,
    line: u64,
    record: &'a StringRecord,
}

impl Row<'_> {
    fn text(&self, column: &str) -> &str {
        COLUMNS.iter().position(|name| *name == column).and_then(|at| self.record.get(at)).unwrap_or_default()
    }

    fn invalid(&self, column: &str, expected: impl Into<String>, found: impl Into<String>) -> InputError {
        let location = Location::Cell { line: self.line, column: column.into() };
        InputError::invalid(self.path, location, expected, found)
    }

    fn number<T: FromStr>(&self, column: &str) -> Result<T, InputError> {
        let text = self.text(column);
        text.parse().map_err(|_| self.invalid(column, "a number", format!("`{text}`")))
    }

    fn time(&self, column: &str) -> Result<f64, InputError> {
        let time: f64 = self.number(column)?;
        let is_time = time.is_finite() && time > 0.0;
        if is_time { Ok(time) } else { Err(self.invalid(column, "a time above 0, ns", time.to_string())) }
    }

    fn parse(&self) -> Result<Peer, InputError> {
        let text = |column: &str| self.text(column).to_owned();
        let (median_ns, p10_ns, p90_ns) =
            (self.time("median_ns")?, self.time("p10_ns")?, self.time("p90_ns")?);
        if !(p10_ns <= median_ns && median_ns <= p90_ns) {
            let found = format!("{p10_ns}, {median_ns}, {p90_ns}");
            return Err(self.invalid("median_ns", "p10 <= median <= p90", found));
        }
        let has_period = !self.text("median_period_ns").is_empty();
        let peer = Peer {
            engine: text("engine"),
            gpu: text("gpu"),
            model: text("model"),
            phase: text("phase"),
            parts: self.parts()?,
            prefill_chunks_tokens_context: text("prefill_chunks_tokens_context"),
            decode_contexts: text("decode_contexts"),
            median_ns,
            p10_ns,
            p90_ns,
            median_period_ns: if has_period { Some(self.time("median_period_ns")?) } else { None },
            num_kernels: self.number("num_kernels")?,
            kernels: text("kernels"),
            num_launches: self.number("num_launches")?,
            warm: text("warm"),
            note: text("note"),
        };
        self.check_batch(&peer)?;
        Ok(peer)
    }

    fn parts(&self) -> Result<Vec<Part>, InputError> {
        let (operators, shapes) = (self.text("operators"), self.text("shapes"));
        let (names, shapes): (Vec<_>, Vec<_>) = (operators.split('+').collect(), shapes.split('+').collect());
        if names.len() != shapes.len() {
            let expected = format!("{} shapes joined by `+`", names.len());
            return Err(self.invalid("shapes", expected, self.text("shapes")));
        }
        let part = |(name, shape): (&str, &str)| {
            let operator: Operator =
                name.parse().map_err(|_| self.invalid("operators", "operators joined by `+`", name))?;
            let values: Result<Vec<u64>, _> = shape.split('x').map(str::parse).collect();
            let shape = values.ok().and_then(|values| OperatorShape::from_values(operator, &values));
            shape.map(|shape| Part { operator, shape }).ok_or_else(|| {
                let expected = format!("{} joined by `x`", operator.shape_columns().join(", "));
                self.invalid("shapes", expected, self.text("shapes"))
            })
        };
        names.into_iter().zip(shapes).map(part).collect()
    }

    /// The sequences must add up to an attention's shape.
    fn check_batch(&self, peer: &Peer) -> Result<(), InputError> {
        let [chunks, contexts] = crate::samples::BATCH_COLUMNS;
        let batch = StepBatch::parse(self.text(chunks), self.text(contexts))
            .map_err(|text| self.invalid(chunks, "sequences", text))?;
        let counted = batch.shape().attention;
        for part in &peer.parts {
            if let OperatorShape::Attention { load, .. } = part.shape
                && load != counted
            {
                let expected = format!("sequences with {load:?}, as the shape says");
                return Err(self.invalid(chunks, expected, format!("{counted:?}")));
            }
        }
        Ok(())
    }
}

/// Compares measured, or else predicted, times with an engine's, row by row.
///
/// A time per launch in a graph is what CUPTI says of the kernel itself, so nothing is taken off for launching.
#[must_use]
pub fn compare(peers: Vec<Peer>, samples: &[Sample], predictors: Option<&Predictors>) -> Vec<Comparison> {
    let row = |peer: Peer| {
        let ours = ours(&peer, samples, predictors);
        let verdict = ours.as_ref().map_or(Verdict::NotMeasured, |ours| judge(ours.time_ns, peer.median_ns));
        Comparison { peer, ours, verdict }
    };
    peers.into_iter().map(row).collect()
}

fn judge(ours_ns: f64, theirs_ns: f64) -> Verdict {
    let margin = LEVEL_NS.max(LEVEL_RATIO * theirs_ns);
    let over_ns = ours_ns - theirs_ns;
    let percent = 100.0 * over_ns / theirs_ns;
    if over_ns.abs() <= margin {
        Verdict::Level
    } else if over_ns < 0.0 {
        Verdict::Faster { percent: -percent }
    } else {
        Verdict::Slower { percent }
    }
}

/// The sum over the parts; `None` when one is neither measured nor predicted.
fn ours(peer: &Peer, samples: &[Sample], predictors: Option<&Predictors>) -> Option<Ours> {
    let parts = peer.parts.iter().map(|part| {
        let sample = nearest(peer, part, samples);
        sample.map(measured).or_else(|| predicted(part, predictors?))
    });
    let parts: Vec<Ours> = parts.collect::<Option<_>>()?;
    let join = |pick: fn(&Ours) -> &str, by: &str| {
        let mut texts: Vec<_> = parts.iter().map(pick).filter(|t| !t.is_empty()).collect();
        texts.dedup();
        texts.join(by)
    };
    Some(Ours {
        time_ns: parts.iter().map(|ours| ours.time_ns).sum(),
        provenance: parts.iter().map(|ours| ours.provenance).max()?,
        cache: join(|ours| &ours.cache, "+"),
        flags: join(|ours| &ours.flags, "|"),
        sm_clock_mhz: parts.iter().filter_map(|ours| ours.sm_clock_mhz).min(),
    })
}

/// The sample of exactly that shape and those sequences, in the state that a model's launch sees if there is one.
fn nearest<'a>(peer: &Peer, part: &Part, samples: &'a [Sample]) -> Option<&'a Sample> {
    let is_batch = |sample: &Sample| {
        let batch = sample.batch.as_ref();
        !peer.is_attention()
            || batch.is_some_and(|batch| {
                batch.format_prefill_chunks() == peer.prefill_chunks_tokens_context
                    && batch.format_decode_contexts() == peer.decode_contexts
            })
    };
    let fitting = samples
        .iter()
        .filter(|s| s.operator == part.operator && s.shape == part.shape && is_batch(s))
        .filter(|s| !s.has_flag("below_floor"));
    fitting.min_by_key(|sample| sample.cache != CacheState::in_model(part.operator))
}

fn measured(sample: &Sample) -> Ours {
    Ours {
        time_ns: sample.stats.p50_ns,
        provenance: Provenance::Measured,
        cache: sample.cache.name().to_owned(),
        flags: sample.flags.clone(),
        sm_clock_mhz: sample.sm_clock_mhz,
    }
}

fn predicted(part: &Part, predictors: &Predictors) -> Option<Ours> {
    let prediction = predictors.predict(part.operator, &part.shape, OutOfDomain::Refuse).ok()?;
    Some(Ours {
        time_ns: prediction.time_ns,
        provenance: prediction.provenance,
        cache: String::new(),
        flags: String::new(),
        sm_clock_mhz: None,
    })
}

//! Traces that others publish: their columns, and what becomes of their rows.
//!
//! Start with [`read_trace`], which gives a trace's requests one at a time.

mod mooncake;
mod timestamp;

use std::{ops::ControlFlow, path::Path, sync::Arc};

use plumbline_schema::{InputError, Location, Nanos, PromptContent, Workload, files::CsvRows};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Whose format a trace has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TraceFormat {
    /// A workload of this project.
    Plumbline,
    /// Azure's LLM inference traces of 2023 and 2024: `TIMESTAMP,ContextTokens,GeneratedTokens`.
    Azure,
    /// Mooncake's: a JSON object a line with `timestamp` in ms, `input_length`, `output_length` and `hash_ids`.
    Mooncake,
    /// `BurstGPT`'s: `Timestamp` in s, `Request tokens`, `Response tokens`.
    Burstgpt,
    /// Vidur's processed traces: `num_prefill_tokens,num_decode_tokens`, and `arrived_at` in s where known.
    Vidur,
    /// Lengths alone, as counted from `ShareGPT`: `num_prefill_tokens` (or `prompt_len`, `prompt_tokens`,
    /// `input_len`, `input_length`, `input_tokens`) and `num_decode_tokens` (or `output_len`, `completion_tokens`,
    /// `response_tokens`, `output_length`, `output_tokens`).
    Lengths,
}

impl TraceFormat {
    /// All formats.
    pub const ALL: [Self; 6] =
        [Self::Plumbline, Self::Azure, Self::Mooncake, Self::Burstgpt, Self::Vidur, Self::Lengths];

    /// The name in specifications and commands.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Plumbline => "plumbline",
            Self::Azure => "azure",
            Self::Mooncake => "mooncake",
            Self::Burstgpt => "burstgpt",
            Self::Vidur => "vidur",
            Self::Lengths => "lengths",
        }
    }

    /// The format of that name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }
}

/// A request of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceRow {
    /// Its line in the file, from 1.
    pub line: u64,
    /// When it arrived, from whatever the trace counts from; `None` in traces of lengths alone.
    pub time: Option<Nanos>,
    /// Prompt length, at least 1.
    pub num_prefill_tokens: u32,
    /// Output length, at least 1.
    pub num_decode_tokens: u32,
    /// Lower is served first.
    pub priority: i32,
    /// What the prompt shares with others.
    pub content: Option<Arc<PromptContent>>,
}

impl TraceRow {
    fn new(line: u64, time: Option<Nanos>, num_prefill_tokens: u32, num_decode_tokens: u32) -> Self {
        Self { line, time, num_prefill_tokens, num_decode_tokens, priority: 0, content: None }
    }
}

/// Rows of a trace that are no request that can be served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceCounts {
    /// Rows read.
    pub num_rows: u64,
    /// Of these left out without an output: in `BurstGPT` those that failed.
    pub num_without_output: u64,
    /// Of these left out without a prompt, but with an output.
    pub num_without_prompt: u64,
}

/// Reads a trace, `.zst` or not, and hands each request that has a prompt and an output to `visit`, until it breaks.
///
/// # Errors
/// `Io`, or `Invalid` with file, line and column; and what `visit` returns.
pub fn read_trace(
    path: &Path,
    format: TraceFormat,
    mut visit: impl FnMut(TraceRow) -> Result<ControlFlow<()>, InputError>,
) -> Result<TraceCounts, InputError> {
    let mut counts = TraceCounts::default();
    let mut take = |row: TraceRow| {
        counts.num_rows += 1;
        if row.num_decode_tokens == 0 {
            counts.num_without_output += 1;
        } else if row.num_prefill_tokens == 0 {
            counts.num_without_prompt += 1;
        } else {
            return visit(row);
        }
        Ok(ControlFlow::Continue(()))
    };
    match format {
        TraceFormat::Plumbline => plumbline(path, &mut take)?,
        TraceFormat::Azure => csv::<AzureRow>(path, "an Azure trace's row", &mut take)?,
        TraceFormat::Burstgpt => csv::<BurstRow>(path, "a BurstGPT row", &mut take)?,
        TraceFormat::Vidur => csv::<VidurRow>(path, "a row of Vidur's trace", &mut take)?,
        TraceFormat::Lengths => csv::<LengthsRow>(path, "a row of lengths", &mut take)?,
        TraceFormat::Mooncake => mooncake::read(path, &mut take)?,
    }
    Ok(counts)
}

type Take<'a> = dyn FnMut(TraceRow) -> Result<ControlFlow<()>, InputError> + 'a;

/// A cell that cannot be used: its column, what was expected, what was found.
type CellError = (&'static str, String, String);

/// A row of a CSV trace.
trait CsvRow: DeserializeOwned {
    fn request(self, line: u64) -> Result<TraceRow, CellError>;
}

fn csv<R: CsvRow>(path: &Path, expected: &str, take: &mut Take) -> Result<(), InputError> {
    let mut rows = CsvRows::<R>::open(path, expected)?;
    while let Some(row) = rows.next() {
        let (line, row) = row?;
        let row = row.request(line).map_err(|(column, expected, found)| {
            InputError::invalid(rows.path(), Location::Cell { line, column: column.into() }, expected, found)
        })?;
        if take(row)?.is_break() {
            break;
        }
    }
    Ok(())
}

fn plumbline(path: &Path, take: &mut Take) -> Result<(), InputError> {
    for (i, request) in Workload::read(path)?.requests.into_iter().enumerate() {
        let row = TraceRow {
            line: i as u64 + 2,
            time: Some(request.arrival_time_ns),
            num_prefill_tokens: request.num_prefill_tokens,
            num_decode_tokens: request.num_decode_tokens,
            priority: request.priority,
            content: request.content,
        };
        if take(row)?.is_break() {
            break;
        }
    }
    Ok(())
}

/// <https://github.com/Azure/AzurePublicDataset>, `AzureLLMInferenceDataset2023.md` and `...2024.md`.
#[derive(Deserialize)]
struct AzureRow {
    #[serde(rename = "TIMESTAMP")]
    timestamp: String,
    #[serde(rename = "ContextTokens")]
    context: u32,
    #[serde(rename = "GeneratedTokens")]
    generated: u32,
}

impl CsvRow for AzureRow {
    fn request(self, line: u64) -> Result<TraceRow, CellError> {
        let time = timestamp::parse(&self.timestamp).ok_or_else(|| {
            let expected = "a time as 2023-11-16 18:15:46.6805900".to_owned();
            ("TIMESTAMP", expected, format!("`{}`", self.timestamp))
        })?;
        Ok(TraceRow::new(line, Some(time), self.context, self.generated))
    }
}

/// <https://github.com/HPMLL/BurstGPT>, README.md, "Schema".
#[derive(Deserialize)]
struct BurstRow {
    #[serde(rename = "Timestamp")]
    timestamp: f64,
    #[serde(rename = "Request tokens")]
    request: u32,
    #[serde(rename = "Response tokens")]
    response: u32,
}

impl CsvRow for BurstRow {
    fn request(self, line: u64) -> Result<TraceRow, CellError> {
        Ok(TraceRow::new(line, Some(time_of("Timestamp", self.timestamp, 1e9)?), self.request, self.response))
    }
}

/// <https://github.com/microsoft/vidur>, `data/processed_traces`.
#[derive(Deserialize)]
struct VidurRow {
    #[serde(default)]
    arrived_at: Option<f64>,
    num_prefill_tokens: u32,
    num_decode_tokens: u32,
}

impl CsvRow for VidurRow {
    fn request(self, line: u64) -> Result<TraceRow, CellError> {
        let time = self.arrived_at.map(|seconds| time_of("arrived_at", seconds, 1e9)).transpose()?;
        Ok(TraceRow::new(line, time, self.num_prefill_tokens, self.num_decode_tokens))
    }
}

/// Lengths alone, under one of the names that benchmarks give them.
#[derive(Deserialize)]
struct LengthsRow {
    #[serde(
        alias = "prompt_len",
        alias = "prompt_tokens",
        alias = "input_len",
        alias = "input_length",
        alias = "input_tokens"
    )]
    num_prefill_tokens: u32,
    #[serde(
        alias = "output_len",
        alias = "completion_tokens",
        alias = "response_tokens",
        alias = "output_length",
        alias = "output_tokens"
    )]
    num_decode_tokens: u32,
}

impl CsvRow for LengthsRow {
    fn request(self, line: u64) -> Result<TraceRow, CellError> {
        Ok(TraceRow::new(line, None, self.num_prefill_tokens, self.num_decode_tokens))
    }
}

/// A time of a trace in units of `unit_ns`.
fn time_of(column: &'static str, value: f64, unit_ns: f64) -> Result<Nanos, CellError> {
    // What a double tells apart to the microsecond or better.
    let most = 4e18 / unit_ns;
    if (0.0..=most).contains(&value) {
        Ok(Nanos::from_f64(value * unit_ns))
    } else {
        Err((column, format!("a time of 0 to {most:e}"), value.to_string()))
    }
}

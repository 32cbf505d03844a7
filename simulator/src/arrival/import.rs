//! From a published trace to a workload.

use std::{ops::ControlFlow, path::Path};

use plumbline_schema::{InputError, Location, Nanos, Workload, WorkloadRequest, files::plain_or_zst};
use serde::{Deserialize, Serialize};

use super::{
    ArrivalError,
    lengths::{Pair, clamp},
    spec::{Arrival, require},
    times::Times,
    trace::{TraceFormat, TraceRow, read_trace},
};

/// How a trace becomes a workload.
#[derive(Clone, Debug, PartialEq)]
pub struct ImportOptions {
    /// Requests to take at most, of those that are kept; none: all.
    pub limit: Option<u64>,
    /// Most tokens of prompt and output together; none: no limit.
    pub max_total_tokens: Option<u32>,
    /// What becomes of requests over it.
    pub too_long: TooLongRow,
    /// When requests arrive.
    pub arrivals: ImportArrivals,
}

/// What becomes of a trace's request that is too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TooLongRow {
    /// The import ends there with an error.
    #[default]
    Refuse,
    /// It is left out, and counted.
    Drop,
    /// Its prompt is shortened (and where the output alone is too long the output as well, to leave one prompt
    /// token), and it is counted.
    Clamp,
}

/// When imported requests arrive.
#[derive(Clone, Debug, PartialEq)]
pub enum ImportArrivals {
    /// As in the trace, of which the first request that is kept becomes time 0.
    Trace {
        /// Requests arrive this many times as fast.
        rate_factor: f64,
    },
    /// By a process, in the trace's order.
    Process {
        /// Any process but a closed loop.
        arrival: Arrival,
        /// Its seed.
        seed: u64,
    },
}

/// What became of a trace's rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportCounts {
    /// Rows read.
    pub num_rows: u64,
    /// Rows left out without an output: in `BurstGPT` those that failed.
    pub num_without_output: u64,
    /// Rows left out without a prompt, but with an output.
    pub num_without_prompt: u64,
    /// Requests left out because they are too long.
    pub num_dropped: u64,
    /// Requests shortened.
    pub num_clamped: u64,
    /// Requests that stood behind one that arrived later; all are put in order.
    pub num_reordered: u64,
}

/// Makes a workload of a trace. Requests are numbered from 0 in their order of arrival.
///
/// # Errors
/// Names file, line and column of what cannot be used; a trace of lengths alone without a process of arrivals; a
/// process that cannot be.
pub fn import(
    path: &Path,
    format: TraceFormat,
    options: &ImportOptions,
) -> Result<(Workload, ImportCounts), ArrivalError> {
    if let ImportArrivals::Trace { rate_factor } = options.arrivals {
        let is_fine = (1e-6..=1e6).contains(&rate_factor);
        require(is_fine, "rate_factor", "0.000001 to 1000000", rate_factor)?;
    }
    let mut counts = ImportCounts::default();
    let mut kept: Vec<TraceRow> = Vec::new();
    let mut refused = None;
    let limit = options.limit.unwrap_or(u64::MAX);
    let found_path = plain_or_zst(path);
    let rows = read_trace(path, format, |mut row| {
        match fit(&mut row, options, &mut counts) {
            Fit::Kept => kept.push(row),
            Fit::LeftOut => {}
            Fit::Refused => refused = Some(row),
        }
        let is_done = refused.is_some() || kept.len() as u64 >= limit;
        Ok(if is_done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    if let (Some(row), Some(max)) = (refused, options.max_total_tokens) {
        let expected = format!("prompt and output of at most {max} tokens together");
        let found = format!("{} and {}", row.num_prefill_tokens, row.num_decode_tokens);
        let error = InputError::invalid(found_path, Location::Line(row.line), expected, found);
        return Err(ArrivalError::TooLong(error));
    }
    counts.num_rows = rows.num_rows;
    counts.num_without_output = rows.num_without_output;
    counts.num_without_prompt = rows.num_without_prompt;
    if kept.is_empty() {
        let found = format!("none ({} rows read)", counts.num_rows);
        let expected = "at least one request to import";
        return Err(InputError::invalid(found_path, Location::File, expected, found).into());
    }
    counts.num_reordered = put_in_order(&mut kept);
    let times = arrivals(&kept, options, &found_path)?;
    let requests = kept
        .into_iter()
        .zip(times)
        .enumerate()
        .map(|(id, (row, arrival_time_ns))| WorkloadRequest {
            request_id: id as u64,
            arrival_time_ns,
            num_prefill_tokens: row.num_prefill_tokens,
            num_decode_tokens: row.num_decode_tokens,
            priority: row.priority,
            content: row.content,
        })
        .collect();
    Ok((Workload { requests }, counts))
}

enum Fit {
    Kept,
    LeftOut,
    Refused,
}

/// Whether the row is kept; shortens it where that is asked for.
fn fit(row: &mut TraceRow, options: &ImportOptions, counts: &mut ImportCounts) -> Fit {
    let (prefill, decode) = (row.num_prefill_tokens, row.num_decode_tokens);
    let Some(max) = options.max_total_tokens else { return Fit::Kept };
    if u64::from(prefill) + u64::from(decode) <= u64::from(max) {
        return Fit::Kept;
    }
    match options.too_long {
        TooLongRow::Drop => {
            counts.num_dropped += 1;
            Fit::LeftOut
        }
        TooLongRow::Clamp if max >= 2 => {
            counts.num_clamped += 1;
            let pair = clamp(Pair { prefill, decode }, 0, max);
            (row.num_prefill_tokens, row.num_decode_tokens) = (pair.prefill, pair.decode);
            Fit::Kept
        }
        TooLongRow::Refuse | TooLongRow::Clamp => Fit::Refused,
    }
}

/// Sorts by time, rows of one time as they stand; returns how many stood behind a later one.
fn put_in_order(rows: &mut [TraceRow]) -> u64 {
    let mut latest = None;
    let mut num_reordered = 0;
    for row in rows.iter() {
        num_reordered += u64::from(row.time < latest);
        latest = latest.max(row.time);
    }
    rows.sort_by_key(|row| row.time);
    num_reordered
}

fn arrivals(rows: &[TraceRow], options: &ImportOptions, path: &Path) -> Result<Vec<Nanos>, ArrivalError> {
    let no_time = |line: u64| {
        let expected = "an arrival time, or a process of arrivals in its place";
        ArrivalError::LengthsAlone(InputError::invalid(path, Location::Line(line), expected, "lengths alone"))
    };
    match &options.arrivals {
        ImportArrivals::Trace { rate_factor } => {
            let first = rows.first().and_then(|row| row.time).unwrap_or_default();
            rows.iter()
                .map(|row| {
                    let time = row.time.ok_or_else(|| no_time(row.line))?;
                    let since = time.saturating_since(first);
                    // Untouched times stay exact beyond what a double holds.
                    let is_same = (rate_factor - 1.0).abs() < f64::EPSILON;
                    Ok(if is_same { since } else { Nanos::from_f64(since.0 as f64 / rate_factor) })
                })
                .collect()
        }
        ImportArrivals::Process { arrival: Arrival::ClosedLoop { .. }, .. } => {
            Err(ArrivalError::HeedsCompletions)
        }
        ImportArrivals::Process { arrival, seed } => {
            arrival.check()?;
            let mut times = Times::new(arrival, Vec::new(), *seed)?;
            let times: Vec<_> = std::iter::from_fn(|| times.next()).take(rows.len()).collect();
            let found = format!("one of {}", times.len());
            require(
                times.len() == rows.len(),
                "arrival",
                format!("a process of {} arrivals", rows.len()),
                found,
            )?;
            Ok(times)
        }
    }
}

#[cfg(test)]
mod tests;

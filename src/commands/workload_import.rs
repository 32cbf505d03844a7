//! `plumb workload import`: published traces to a workload.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use plumbline_schema::WorkloadSummary;
use plumbline_simulator::arrival::{
    Arrival, ImportArrivals, ImportCounts, ImportOptions, TooLongRow, TraceFormat, import,
};
use serde::Serialize;

use super::workload;
use crate::{
    exit::Exit,
    failure::Failure,
    output::{Output, Text},
};

/// Make a workload of a published trace
///
/// Requests keep their lengths, and their arrival times unless --rate or --static replaces them; the first request arrives at
/// 0. Requests without an output (as failed ones) or without a prompt are left out, and counted.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Whose trace it is
    format: Format,

    /// The trace (or its .zst)
    path: PathBuf,

    /// Workload to write: .csv or .csv.zst
    #[arg(long, value_name = "FILE")]
    out: PathBuf,

    /// Most tokens of prompt and output together
    #[arg(long, value_name = "N")]
    max_total_tokens: Option<u32>,

    /// What becomes of requests over --max-total-tokens
    #[arg(long, value_enum, default_value_t = TooLongArg::Refuse, requires = "max_total_tokens")]
    too_long: TooLongArg,

    /// Take the first so many requests of those that are kept
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,

    /// Arrivals by a Poisson process of so many requests per second, in place of the trace's
    #[arg(long, value_name = "RATE", conflicts_with_all = ["rate_factor", "at_once"])]
    rate: Option<f64>,

    /// Arrivals as in the trace, this many times as fast
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    rate_factor: f64,

    /// All requests arrive at time 0
    #[arg(long = "static", conflicts_with = "rate_factor")]
    at_once: bool,

    /// Seed of what --rate draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// Azure's LLM inference traces of 2023 and 2024: `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`
    Azure,
    /// Mooncake's: JSON lines with `timestamp`, `input_length`, `output_length`, `hash_ids`
    Mooncake,
    /// The columns `Timestamp`, `Request tokens`, `Response tokens`
    Burstgpt,
    /// Vidur's processed traces: `num_prefill_tokens`, `num_decode_tokens` and, where known, `arrived_at`
    Vidur,
    /// Lengths alone: `num_prefill_tokens` or `prompt_len`, `num_decode_tokens` or `output_len`, and the like
    Lengths,
    /// A workload of plumb's, to filter it or to change its arrivals
    Plumbline,
}

impl From<Format> for TraceFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Azure => Self::Azure,
            Format::Mooncake => Self::Mooncake,
            Format::Burstgpt => Self::Burstgpt,
            Format::Vidur => Self::Vidur,
            Format::Lengths => Self::Lengths,
            Format::Plumbline => Self::Plumbline,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TooLongArg {
    /// Fail, and say where
    Refuse,
    /// Leave them out, and count them
    Drop,
    /// Shorten the prompt, and the output where it alone is too long, and count them
    Clamp,
}

#[derive(Serialize)]
struct Report<'a> {
    workload: &'a Path,
    trace: &'a Path,
    counts: ImportCounts,
    summary: WorkloadSummary,
}

/// Runs the verb.
///
/// # Errors
/// When the trace cannot be used as asked, or the workload cannot be written.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let (requests, counts) = import(&args.path, args.format.into(), &args.options())?;
    requests.write(&args.out)?;
    let report = Report { workload: &args.out, trace: &args.path, counts, summary: requests.summary() };
    output.print(&report, || report.text())?;
    output.note(format!("wrote {}", args.out.display()));
    Ok(Exit::Fine)
}

impl Args {
    fn options(&self) -> ImportOptions {
        let process = |arrival| ImportArrivals::Process { arrival, seed: self.seed };
        ImportOptions {
            limit: self.limit,
            max_total_tokens: self.max_total_tokens,
            too_long: match self.too_long {
                TooLongArg::Refuse => TooLongRow::Refuse,
                TooLongArg::Drop => TooLongRow::Drop,
                TooLongArg::Clamp => TooLongRow::Clamp,
            },
            arrivals: match self.rate {
                Some(rate_per_s) => process(Arrival::Poisson { rate_per_s }),
                None if self.at_once => process(Arrival::Static {}),
                None => ImportArrivals::Trace { rate_factor: self.rate_factor },
            },
        }
    }
}

impl Report<'_> {
    fn text(&self) -> String {
        let mut text = Text::default();
        let counts = &self.counts;
        text.line(format_args!("{} rows of {}", counts.num_rows, self.trace.display()));
        for (count, what) in [
            (counts.num_without_output, "without an output, left out"),
            (counts.num_without_prompt, "without a prompt, left out"),
            (counts.num_dropped, "too long, left out"),
            (counts.num_clamped, "too long, shortened"),
            (counts.num_reordered, "behind a later arrival, put in order"),
        ] {
            if count > 0 {
                text.line(format_args!("{count} {what}"));
            }
        }
        text.line(workload::text(&self.summary).trim_end());
        text.finish()
    }
}

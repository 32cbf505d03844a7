//! `plumb workload`: look at workloads.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use plumbline_schema::{LengthSummary, Workload, WorkloadSummary};
use serde::Serialize;

use crate::{
    exit::Exit,
    failure::Failure,
    output::{Output, Table},
};

/// Look at workloads
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Inspect(InspectArgs),
}

/// Check a workload and say what it asks for
#[derive(Debug, clap::Args)]
struct InspectArgs {
    /// Workload: a CSV file (or .csv.zst) with the columns `request_id`, `arrival_time_ns`,
    /// `num_prefill_tokens` and `num_decode_tokens`
    workload: PathBuf,
}

#[derive(Serialize)]
struct Report<'a> {
    workload: &'a Path,
    summary: WorkloadSummary,
}

/// Runs the verb.
///
/// # Errors
/// When the file is no workload.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let Verb::Inspect(args) = &args.verb;
    let workload = Workload::read(&args.workload)?;
    let report = Report { workload: &args.workload, summary: workload.summary() };
    output.print(&report, || text(&report.summary))?;
    Ok(Exit::Fine)
}

fn text(summary: &WorkloadSummary) -> String {
    let mut table = Table::new(&["tokens per request", ">min", ">mean", ">max", ">total"]);
    let mut row = |name: &str, lengths: &LengthSummary| {
        table.row([
            name.to_owned(),
            lengths.min.to_string(),
            format!("{:.1}", lengths.mean),
            lengths.max.to_string(),
            lengths.total.to_string(),
        ]);
    };
    row("prefill", &summary.num_prefill_tokens);
    row("decode", &summary.num_decode_tokens);
    let rate = summary
        .mean_rate_per_s
        .map_or_else(|| "all at one time".to_owned(), |rate| format!("{rate:.3} requests/s on average"));
    format!("{} requests over {}, {rate}\n{table}", summary.num_requests, summary.span_ns)
}

//! `plumb workload`: look at, make and convert workloads.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use plumbline_schema::{LengthSummary, Workload, WorkloadSummary};
use plumbline_simulator::arrival::{ArrivalError, TraceFormat};
use serde::Serialize;

use super::{workload_generate, workload_import};
use crate::{
    exit::Exit,
    failure::Failure,
    output::{Output, Table},
};

/// Look at, make and convert workloads
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Inspect(InspectArgs),
    Generate(Box<workload_generate::Args>),
    Import(workload_import::Args),
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
/// When a file cannot be used, or a workload cannot be made as asked.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    match &args.verb {
        Verb::Inspect(args) => inspect(args, output),
        Verb::Generate(args) => workload_generate::run(args, output),
        Verb::Import(args) => workload_import::run(args, output),
    }
}

fn inspect(args: &InspectArgs, output: Output) -> Result<Exit, Failure> {
    let workload = Workload::read(&args.workload)?;
    let report = Report { workload: &args.workload, summary: workload.summary() };
    output.print(&report, || text(&report.summary))?;
    Ok(Exit::Fine)
}

impl From<ArrivalError> for Failure {
    fn from(error: ArrivalError) -> Self {
        match error {
            ArrivalError::Input(error) => error.into(),
            ArrivalError::TooLong(error) => Self::from(error).with_hint(
                "--too-long drop leaves such requests out, --too-long clamp shortens their prompts",
            ),
            ArrivalError::LengthsAlone(error) => Self::from(error).with_hint(
                "--rate R makes arrivals of a Poisson process, --static has all requests arrive at once",
            ),
            error @ ArrivalError::HeedsCompletions => Self::new(Exit::BadInput, error).with_hint(
                "only a simulation knows when those requests arrive; for a file, sessions can have \
                 `next_turn = \"after_arrival\"`",
            ),
            error @ ArrivalError::Spec(_) => Self::new(Exit::BadInput, error),
        }
    }
}

/// A trace as an argument: `FORMAT:PATH`.
#[derive(Clone, Debug)]
pub struct TraceArg {
    pub format: TraceFormat,
    pub path: PathBuf,
}

impl std::str::FromStr for TraceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, path) = text.split_once(':').ok_or("expected FORMAT:PATH")?;
        Ok(Self { format: trace_format(name)?, path: path.into() })
    }
}

/// The trace format of that name.
pub fn trace_format(name: &str) -> Result<TraceFormat, String> {
    TraceFormat::by_name(name).ok_or_else(|| {
        let names = TraceFormat::ALL.map(TraceFormat::name).join(", ");
        format!("expected one of {names}, found `{name}`")
    })
}

/// What a workload asks for, for people.
pub fn text(summary: &WorkloadSummary) -> String {
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

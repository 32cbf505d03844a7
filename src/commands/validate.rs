//! `plumb validate`: the main job.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use plumbline_validator::{
    CaseStatus, Suite, SuiteResult, ValidateOptions, render_table, validate, write_report,
};

use super::{simulate::ResidualsArg, strict};
use crate::engines::OutOfDomainArg;
use crate::{data, exit::Exit, failure::Failure, output::Output};

/// Simulate every case of a suite, compare it with its real runs, write a report
///
/// The table shows p50 of TTFT, ITL, TPOT and E2E: real (median over repeats), the noise floor (half of the repeats' range),
/// simulated, signed error, and whether that lies in the band, the range of the repeats widened by 5 %. Exit codes: 0 when
/// every case could be judged, 5 when some could not, 2 when none could.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Suite: a TOML file. Without it, the shipped one
    #[arg(long, value_name = "FILE")]
    suite: Option<PathBuf>,

    /// Report folder to write; an earlier report there is replaced
    #[arg(long, value_name = "DIR", default_value = "plumb-report")]
    out: PathBuf,

    /// Only cases whose name holds this text (can be repeated)
    #[arg(long, value_name = "TEXT")]
    case: Vec<String>,

    /// Print the names of the cases that would run, and run none
    #[arg(long)]
    list: bool,

    /// Refuse, with exit code 2, unless every setting is known to match: model, KV blocks, budgets, engine, GPU, workload
    #[arg(long)]
    strict: bool,

    #[command(flatten)]
    simulation: SimulationArgs,
}

/// How cases are simulated.
#[derive(Debug, clap::Args)]
pub struct SimulationArgs {
    /// What to do about shapes outside of what was measured
    #[arg(long, value_enum, default_value_t = OutOfDomainArg::Extrapolate)]
    out_of_domain: OutOfDomainArg,

    /// Split each case's error by cause, for the report: see `plumb explain`
    #[arg(long)]
    explain: bool,

    /// Whether step times scatter as measured ones do
    #[arg(long, value_enum, default_value_t = ResidualsArg::Drawn)]
    residuals: ResidualsArg,

    /// Simulations of each case; a simulated value is the median over them
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=99))]
    simulations: u32,

    /// Seed of each case's first simulation; the next ones count up from it
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Runs the verb.
///
/// # Errors
/// When the suite cannot be used, no case can be judged, or the report cannot be written.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let suite = load_suite(args.suite.as_deref(), &args.case)?;
    if args.list {
        let names: Vec<_> = suite.cases.iter().map(|case| case.name.as_str()).collect();
        output.print(&names, || names.join("\n"))?;
        return Ok(Exit::Fine);
    }
    let result = simulate_and_compare(&suite, &args.simulation, output);
    let failures = failures(&result);
    if result.cases.iter().all(|case| case.status == CaseStatus::Failed) {
        if output.json {
            output.print(&result, String::new)?;
        }
        return Err(Failure::message(Exit::BadInput, failures.unwrap_or_default()));
    }
    if args.strict {
        strict::check(&result)?;
    }
    write_report(&result, &args.out)?;
    output.print(&result, || render_table(&result))?;
    output.note(format!("report in {}", args.out.display()));
    match failures {
        None => Ok(Exit::Fine),
        Some(text) => Err(Failure::message(Exit::Incomplete, text)),
    }
}

/// Runs every case, with progress on stderr.
pub(super) fn simulate_and_compare(suite: &Suite, args: &SimulationArgs, output: Output) -> SuiteResult {
    let options = ValidateOptions {
        seed: args.seed,
        simulations: args.simulations,
        residuals: args.residuals.into(),
        out_of_domain: args.out_of_domain.into(),
        explains: args.explain,
    };
    let total = suite.cases.len() as u64;
    let bar = output.bar(total);
    let done = AtomicU64::new(0);
    validate(suite, &options, &|case| {
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        bar.set(done, total, &case.name);
    })
}

/// The suite, or the shipped one, less the cases whose names hold none of the texts of `case`; all without a text.
///
/// # Errors
/// When the suite cannot be read, or no case is left.
pub(super) fn load_suite(path: Option<&Path>, case: &[String]) -> Result<Suite, Failure> {
    let mut suite = if let Some(path) = path {
        // Bundles by name need the shipped data; a suite of paths does not.
        Suite::load(path, &data::folder().unwrap_or_default())?
    } else {
        let data = data::folder()?;
        Suite::load(&data.join("suite.toml"), &data)?
    };
    let is_wanted = |name: &str| case.is_empty() || case.iter().any(|text| name.contains(text));
    let names: Vec<_> = suite.cases.iter().map(|case| case.name.clone()).collect();
    suite.cases.retain(|case| is_wanted(&case.name));
    if suite.cases.is_empty() {
        let text = format!("--case: expected part of a case's name, found {case:?}");
        return Err(Failure::message(Exit::BadInput, text).with_hint(format!(
            "{} has {}",
            suite.path.display(),
            names.join(", ")
        )));
    }
    Ok(suite)
}

/// What could not be judged, in one line; none when everything could.
fn failures(result: &SuiteResult) -> Option<String> {
    let mut failed = result.failures();
    let first = failed.next()?;
    let why = first.error.as_deref().unwrap_or("no reason given");
    let text = format!("case `{}`: {why}", first.name);
    Some(match failed.count() {
        0 => text,
        more => format!("{text} (and {more} more cases could not be judged)"),
    })
}

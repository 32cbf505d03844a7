//! `plumb compare`: real repeats against one simulated run, or against the scheduler alone.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use plumbline_schema::{Run, StepBatch, StepRequests};
use plumbline_simulator::replay::{ReplayReport, StepDifference, replay_folder};
use plumbline_validator::{
    CaseResult, Evidence, Role, SuiteResult, compare, render_table, variants, write_report,
};
use serde::Serialize;

use super::strict;
use crate::{
    exit::Exit,
    failure::Failure,
    output::{Output, Table, ns_to_ms},
};

/// Compare real runs with one simulated run, or replay their steps through the scheduler
///
/// With --replay-steps, the scheduler is fed the admitted times and step starts of each real run; the exit code is 3
/// when it forms another step than the real engine did: another batch, or, where the run records them, another's tokens,
/// other preemptions or another number of free blocks. Priorities and shared prompts are those of workload.csv in the
/// run folder, or else of workloads/NAME.csv in one of the three folders above.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Real run folder; several are taken as repeats of one workload (can be repeated)
    #[arg(required = true)]
    real: Vec<PathBuf>,

    /// Simulated run folder of the same workload
    #[arg(long, value_name = "RUN", required_unless_present = "replay_steps", requires = "out")]
    sim: Option<PathBuf>,

    /// Report folder to write
    #[arg(long, value_name = "DIR", required_unless_present = "replay_steps")]
    out: Option<PathBuf>,

    /// Refuse, with exit code 2, unless every setting is known to match: model, KV blocks, budgets, engine, GPU, workload
    #[arg(long, conflicts_with = "replay_steps")]
    strict: bool,

    /// Does the scheduler, fed the real step starts, form the steps that the real engine formed?
    #[arg(long, conflicts_with_all = ["sim", "out"])]
    replay_steps: bool,
}

/// Runs the verb.
///
/// # Errors
/// When a run cannot be read, compared or replayed.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    match (&args.sim, &args.out) {
        (Some(sim), Some(out)) => compare_runs(args, sim, out, output),
        _ => replay_steps(&args.real, output),
    }
}

fn compare_runs(args: &Args, sim: &Path, out: &Path, output: Output) -> Result<Exit, Failure> {
    let real = args.real.iter().map(|folder| Run::read(folder)).collect::<Result<Vec<_>, _>>()?;
    let simulated = Run::read(sim)?;
    let started = Instant::now();
    let comparison = compare(&real, &simulated).map_err(|error| Failure::new(Exit::BadInput, error))?;
    let name = sim.display().to_string();
    let folders = args.real.iter().map(|folder| folder.display().to_string()).collect();
    let evidence = Evidence::of_runs(folders, name.clone(), &simulated);
    let mut case = CaseResult::compared(name, Role::HeldOut, comparison).with_runs(&real, &simulated);
    case.evidence = Some(evidence);
    if let Some(first) = real.first() {
        case.variants = variants::rows(first, &simulated);
    }
    case.notes.extend(source_notes(&real, &simulated));
    let result = SuiteResult::new(vec![case], ns_to_ms(started.elapsed().as_nanos() as f64));
    if args.strict {
        strict::check(&result)?;
    }
    write_report(&result, out)?;
    output.print(&result, || render_table(&result))?;
    output.note(format!("report in {}", out.display()));
    Ok(Exit::Fine)
}

/// What the imports of the runs noted.
fn source_notes(real: &[Run], simulated: &Run) -> Vec<String> {
    let mut notes = Vec::new();
    for (run, kind) in real.iter().map(|run| (run, "real")).chain([(simulated, "simulated")]) {
        let Some(source) = &run.info.source else { continue };
        let of = format!("{kind}, {} of {}", source.file, source.tool);
        notes.push(format!("{of}: times count from {}", source.arrivals.text()));
        notes.extend(source.notes.iter().map(|note| format!("{of}: {note}")));
    }
    notes
}

#[derive(Serialize)]
struct Replays<'a> {
    runs: Vec<Replay<'a>>,
}

#[derive(Serialize)]
struct Replay<'a> {
    name: &'a Path,
    steps: usize,
    identical: usize,
    preemptions: usize,
    unfinished: usize,
    first_difference: Option<Difference<'a>>,
}

#[derive(Serialize)]
struct Difference<'a> {
    step: usize,
    step_start_ns: u64,
    /// `batch`, `requests`, `preempted` or `free_blocks`.
    part: &'static str,
    real: &'a StepBatch,
    replayed: &'a StepBatch,
    real_requests: Option<Requests<'a>>,
    replayed_requests: Requests<'a>,
}

#[derive(Serialize)]
struct Requests<'a> {
    prefill: &'a [u64],
    decode: &'a [u64],
    preempted: &'a [u64],
    free_blocks: Option<u32>,
}

impl<'a> From<&'a StepRequests> for Requests<'a> {
    fn from(requests: &'a StepRequests) -> Self {
        Self {
            prefill: &requests.prefill_request_ids,
            decode: &requests.decode_request_ids,
            preempted: &requests.preempted_request_ids,
            free_blocks: requests.free_blocks,
        }
    }
}

fn replay_steps(real: &[PathBuf], output: Output) -> Result<Exit, Failure> {
    let mut reports = Vec::with_capacity(real.len());
    for folder in real {
        let report = replay_folder(folder).map_err(|error| {
            let context = format!("{}", folder.display());
            Failure::new(Exit::BadInput, anyhow::Error::new(error).context(context))
        })?;
        reports.push((folder.as_path(), report));
    }
    let runs = reports.iter().map(|(name, report)| describe(name, report)).collect();
    output.print(&Replays { runs }, || text(&reports))?;
    let all_identical = reports.iter().all(|(_, report)| report.is_identical());
    Ok(if all_identical { Exit::Fine } else { Exit::OutsideTolerance })
}

fn describe<'a>(name: &'a Path, report: &'a ReplayReport) -> Replay<'a> {
    Replay {
        name,
        steps: report.steps,
        identical: report.identical,
        preemptions: report.preemptions,
        unfinished: report.unfinished,
        first_difference: report.first_difference.as_ref().map(|difference| Difference {
            step: difference.step,
            step_start_ns: difference.step_start_ns.0,
            part: difference.part.name(),
            real: &difference.real,
            replayed: &difference.replayed,
            real_requests: difference.real_requests.as_ref().map(Requests::from),
            replayed_requests: Requests::from(&difference.replayed_requests),
        }),
    }
}

fn text(reports: &[(&Path, ReplayReport)]) -> String {
    let mut table = Table::new(&["run", ">steps", ">identical", ">preemptions", ">unfinished"]);
    for (name, report) in reports {
        table.row([
            name.display().to_string(),
            report.steps.to_string(),
            report.identical.to_string(),
            report.preemptions.to_string(),
            report.unfinished.to_string(),
        ]);
    }
    let mut text = table.to_string();
    for (name, report) in reports {
        if let Some(difference) = &report.first_difference {
            text.push_str(&difference_text(name, difference));
        }
    }
    text
}

fn difference_text(name: &Path, difference: &StepDifference) -> String {
    let side = |batch: &StepBatch, requests: Option<&StepRequests>| {
        let mut text = format!(
            "prefill {} decode {}",
            or_none(batch.format_prefill_chunks()),
            or_none(batch.format_decode_contexts())
        );
        if let Some(requests) = requests {
            text.push_str(&requests_text(requests));
        }
        text
    };
    format!(
        "{}: first differs in step {} at {}, in {}\n  real     {}\n  replayed {}\n",
        name.display(),
        difference.step,
        difference.step_start_ns,
        difference.part.name(),
        side(&difference.real, difference.real_requests.as_ref()),
        // Beside a run that records no requests they say nothing.
        side(
            &difference.replayed,
            difference.real_requests.as_ref().and(Some(&difference.replayed_requests))
        ),
    )
}

fn requests_text(requests: &StepRequests) -> String {
    let ids = |ids: &[u64]| or_none(ids.iter().map(u64::to_string).collect::<Vec<_>>().join(";"));
    let mut text = format!(
        "\n           of requests {} and {}, preempted {}",
        ids(&requests.prefill_request_ids),
        ids(&requests.decode_request_ids),
        ids(&requests.preempted_request_ids)
    );
    if let Some(free_blocks) = requests.free_blocks {
        // Writing to a string does not fail.
        let _ = write!(text, ", {free_blocks} blocks free");
    }
    text
}

fn or_none(text: String) -> String {
    if text.is_empty() { "none".to_owned() } else { text }
}

//! A grid of deployments: read, simulated in parallel, told by what they cost.

use std::{io::IsTerminal, path::Path};

use plumbline_schema::files::{write_csv, write_json, write_text};
use plumbline_simulator::{
    BundleTimes,
    search::{Found, GpuKind, Grid, Journal, Kind, Progress, Scenario, sweep},
};
use plumbline_validator::report::frontier_svg;

use super::report::{GridReport, in_words};
use crate::{engines::EngineArgs, exit::Exit, failure::Failure, output::Output};

/// The file that an interrupted sweep goes on from.
const JOURNAL: &str = "journal.jsonl";

/// Sweeps the grid of `file` and writes what was found into `out`.
///
/// # Errors
/// When the grid or one of its bundles cannot be used, or a file cannot be written.
pub fn run(
    engine: &EngineArgs,
    file: &Path,
    out: &Path,
    scenario: &Scenario<'_>,
    output: Output,
) -> Result<Exit, Failure> {
    let grid = Grid::read(file)?;
    let kinds = grid.gpu.iter().map(|named| kind(engine, named)).collect::<Result<Vec<_>, _>>()?;
    let journal = Journal::open(&out.join(JOURNAL))?;
    let candidates = grid.candidates(&kinds);
    let bar = output.bar(candidates.len() as u64);
    let rows = sweep(candidates, scenario, Some(&journal), &|progress| {
        let line = line(&progress);
        bar.set(progress.done as u64, progress.total as u64, &line);
        if !std::io::stderr().is_terminal() {
            output.note(format!("{}/{} {line}", progress.done, progress.total));
        }
    })?;
    drop(bar);
    let report = GridReport::new(scenario, rows);
    write(&report, out)?;
    output.print(&report, || report.text())?;
    output.note(format!("wrote {}", out.display()));
    Ok(if report.has_a_rate() { Exit::Fine } else { Exit::Incomplete })
}

/// Reads a kind of GPU; its deployments get the KV blocks of their own memory plans unless the command line says how
/// many there are.
fn kind(engine: &EngineArgs, named: &GpuKind) -> Result<Kind<BundleTimes>, Failure> {
    let mut args = EngineArgs {
        bundle: named.bundle.clone(),
        engine: named.engine.clone(),
        gpu: named.gpu.clone(),
        ..engine.clone()
    };
    let plans_memory =
        !args.set.iter().any(|set| set.split('=').next().is_some_and(|k| k.trim() == "num_gpu_blocks"));
    if plans_memory {
        // The base alone may not fit on one GPU.
        args.set.push("num_gpu_blocks=1".to_owned());
    }
    let out_of_domain = format!("{:?}", args.out_of_domain);
    // What is said of the base's own memory plan is about none of the deployments.
    let opened = args.open(Output { json: false, quiet: true })?;
    Ok(Kind {
        base: opened.engines,
        gpu: opened.gpu,
        bundle_digest: opened.bundle.digest().to_owned(),
        out_of_domain,
        plans_memory,
    })
}

fn write(report: &GridReport<'_>, out: &Path) -> Result<(), Failure> {
    write_json(&out.join("search.json"), report)?;
    write_csv(&out.join("pareto.csv"), report.pareto_rows())?;
    let (all, front) = report.places();
    if let Some(svg) = frontier_svg(&all, &front) {
        let svg =
            svg.map_err(|reason| Failure::message(Exit::Unexpected, format!("pareto.svg: {reason}")))?;
        write_text(&out.join("pareto.svg"), &svg)?;
    }
    Ok(())
}

/// A deployment that is done, in a line.
fn line(progress: &Progress<'_>) -> String {
    let Progress { is_reused, row, .. } = progress;
    let found = match (row.status, &row.economics) {
        (Found::Bracketed, Some(economics)) => format!("{:.4} requests/s", economics.rate_per_s),
        (Found::Failed, _) => "cannot be simulated".to_owned(),
        _ => "not bracketed".to_owned(),
    };
    let reused = if *is_reused { ", from the journal" } else { "" };
    format!("{}: {found}{reused}", in_words(&row.point))
}

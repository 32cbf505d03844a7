//! `plumb bundle`: look after bundles.

use clap::Subcommand;
use plumbline_bundles::{Bundle, HostCosts, Inspection, TimeStats, VerifyReport, inspect::OperatorSummary};
use plumbline_schema::Nanos;

use super::{bundle_diff, bundle_efficiency, bundle_export, bundle_import, bundle_judge, bundle_lint};
use crate::{
    data,
    exit::Exit,
    failure::Failure,
    output::{Output, Table, Text, percent},
};

/// Look after bundles
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Inspect(InspectArgs),
    Verify(VerifyArgs),
    Lint(bundle_lint::Args),
    Diff(bundle_diff::DiffArgs),
    Stats(bundle_diff::StatsArgs),
    Efficiency(bundle_efficiency::Args),
    Judge(bundle_judge::Args),
    Import(bundle_import::Args),
    Export(bundle_export::Args),
}

/// Say what a bundle holds: machine, operators with their points and errors, host costs, engine profiles
#[derive(Debug, clap::Args)]
struct InspectArgs {
    /// Bundle folder, or the name of a shipped bundle
    bundle: String,
}

/// Check every file of a bundle: length, digest, content, and no time under the physical floor
///
/// Prints every problem and exits with 2 when there is one.
#[derive(Debug, clap::Args)]
struct VerifyArgs {
    /// Bundle folder, or the name of a shipped bundle
    bundle: String,
}

/// Runs the verb.
///
/// # Errors
/// When the bundle cannot be opened, or is not sound.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    match &args.verb {
        Verb::Lint(args) => bundle_lint::run(args, output),
        Verb::Diff(args) => bundle_diff::run_diff(args, output),
        Verb::Stats(args) => bundle_diff::run_stats(args, output),
        Verb::Efficiency(args) => bundle_efficiency::run(args, output),
        Verb::Judge(args) => bundle_judge::run(args, output),
        Verb::Import(args) => bundle_import::run(args, output),
        Verb::Export(args) => bundle_export::run(args, output),
        Verb::Inspect(args) => {
            let inspection = Bundle::open(&data::bundle(&args.bundle)?)?.inspect()?;
            output.print(&inspection, || inspection_text(&inspection))?;
            Ok(Exit::Fine)
        }
        Verb::Verify(args) => {
            let report = Bundle::open(&data::bundle(&args.bundle)?)?.verify()?;
            output.print(&report, || verify_text(&report))?;
            match report.problems.split_first() {
                None => Ok(Exit::Fine),
                Some((first, [])) => Err(Failure::message(Exit::BadInput, first)),
                Some((first, more)) => {
                    let text = format!("{first} (and {} more, listed above)", more.len());
                    Err(Failure::message(Exit::BadInput, text))
                }
            }
        }
    }
}

fn verify_text(report: &VerifyReport) -> String {
    let mut text = Text::default();
    text.line(format_args!(
        "{} files, {} bytes: {} samples, {} predictors, {} engine profiles",
        report.num_files, report.num_bytes, report.num_samples, report.num_predictors, report.num_engines
    ));
    if report.num_incomplete > 0 {
        text.line(format_args!("{} points were planned but not measured", report.num_incomplete));
    }
    for name in &report.stray_files {
        text.line(format_args!("not part of the bundle: {name}"));
    }
    for problem in &report.problems {
        text.line(format_args!("problem: {problem}"));
    }
    text.line(if report.is_sound() { "sound" } else { "not sound" });
    text.finish()
}

fn inspection_text(inspection: &Inspection) -> String {
    let or_unknown = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".to_owned());
    let mut facts = Table::plain();
    let mut fact = |name: &str, value: String| facts.row([name.to_owned(), value]);
    fact("gpu", inspection.gpu.clone());
    fact("device", or_unknown(&inspection.device_name));
    fact("driver", or_unknown(&inspection.driver_version));
    fact("measured", format!("{} by plumbline {}", inspection.created, inspection.plumbline_version));
    fact("format", inspection.format_version.clone());
    fact("digest", inspection.digest.clone());
    fact("models", inspection.models.join(", "));
    fact(
        "engines",
        if inspection.engines.is_empty() { "none".into() } else { inspection.engines.join(", ") },
    );
    let mut text = Text::default();
    text.line(facts);
    text.line(operators_table(&inspection.operators));
    if let Some(host) = &inspection.host {
        text.line(host_facts(host));
        text.line(host_table(host));
    }
    for (title, lines) in [("not measured", &inspection.incomplete), ("note", &inspection.notes)] {
        for line in lines {
            text.line(format_args!("{title}: {line}"));
        }
    }
    text.finish()
}

fn operators_table(operators: &[OperatorSummary]) -> Table {
    let mut table = Table::new(&[
        "operator",
        ">points",
        ">cold",
        ">hot",
        ">flagged",
        ">error p50",
        ">error p90",
        ">blocked p50",
    ]);
    for operator in operators {
        let error = |pick: fn(&plumbline_bundles::predictor::HeldOutError) -> f64| {
            operator.error.as_ref().map_or_else(|| "-".to_owned(), |error| percent(pick(error)))
        };
        table.row([
            operator.operator.to_string(),
            operator.num_points.to_string(),
            operator.num_cold.to_string(),
            operator.num_hot.to_string(),
            operator.num_flagged.to_string(),
            error(|e| e.shuffled.p50),
            error(|e| e.shuffled.p90),
            error(|e| e.blocked.p50),
        ]);
    }
    table
}

fn host_facts(host: &HostCosts) -> Table {
    let mut table = Table::plain();
    for (name, value) in super::host::facts(&host.cpu_model, host.num_cores, &host.cpu) {
        table.row([name.to_owned(), value]);
    }
    table.row(["score".to_owned(), super::host::score(host.single_thread_score, host.score.as_ref())]);
    table
}

fn host_table(host: &HostCosts) -> Table {
    let mut table = Table::new(&["host cost", ">min", ">p50", ">p95"]);
    let time = |ns: f64| Nanos::from_f64(ns).to_string();
    let mut row = |name: String, stats: &TimeStats| {
        table.row([name, time(stats.min_ns), time(stats.p50_ns), time(stats.p95_ns)]);
    };
    row("kernel launch".into(), &host.kernel_launch_ns);
    for cost in &host.launch_rows {
        row(format!("kernel launch, {} in a row", cost.num_launches), &cost.launch_ns);
    }
    for cost in &host.launch_arguments {
        row(format!("kernel launch, {} arguments", cost.num_arguments), &cost.launch_ns);
    }
    row("kernel gap on the GPU".into(), &host.kernel_gap_ns);
    for graph in &host.graph_launch {
        row(format!("graph launch, {} kernels", graph.num_nodes), &graph.launch_ns);
    }
    row("synchronise".into(), &host.synchronize_ns);
    if let Some(stats) = &host.synchronize_after_work_ns {
        row("synchronise, work just done".into(), stats);
    }
    if let Some(events) = &host.events {
        row("event record".into(), &events.record_ns);
        row("event query".into(), &events.query_ns);
        row("event synchronise".into(), &events.synchronize_ns);
    }
    for copy in &host.copies {
        row(format!("copy {} bytes to the GPU", copy.num_bytes), &copy.to_device_ns);
        row(format!("copy {} bytes to the host", copy.num_bytes), &copy.to_host_ns);
    }
    for copy in &host.input_copies {
        for (kind, times) in [("pinned", &copy.pinned), ("pageable", &copy.pageable)] {
            row(format!("input of {} {kind} bytes, call", copy.num_bytes), &times.call_ns);
            row(format!("input of {} {kind} bytes, done", copy.num_bytes), &times.done_ns);
        }
    }
    for cost in &host.after_idle {
        let idle = Nanos(cost.idle_ns);
        row(format!("launch and wait after {idle} idle"), &cost.launch_and_wait_ns);
        row(format!("matrix product after {idle} idle, on the GPU"), &cost.compute_ns);
    }
    table
}

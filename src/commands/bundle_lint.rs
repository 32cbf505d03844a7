//! `plumb bundle lint`: what speaks against a bundle, and its grade.

use std::{collections::BTreeMap, path::PathBuf};

use plumbline_bundles::{
    Bundle, LintOptions, LintReport, lint,
    lint::{Finding, Grade, ModelCoverage, Severity},
};
use plumbline_schema::{ModelSpec, Workload};

use crate::{
    data,
    exit::Exit,
    failure::Failure,
    output::{Output, Table, Text, percent},
};

/// Findings of one rule and severity that the text shows; `--json` holds all.
const MAX_SHOWN: usize = 5;

/// Look for everything that speaks against a bundle, and grade it from A to F
///
/// Times that cannot be true or that their neighbours contradict, readings of another machine, uneven grids, numbers
/// that do not scatter as measured ones do, missing evidence, and launches that a model's steps would ask for in vain.
/// Every reason says what would raise the grade. Exits with 3 when the grade is below `--min-grade`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Bundle folder, or the name of a shipped bundle
    bundle: String,

    /// Workload whose longest and shortest requests the bundle must cover: a CSV file (or .csv.zst). Without it, any
    /// request of up to 32,768 tokens
    #[arg(long, value_name = "FILE")]
    workload: Option<PathBuf>,

    /// Model that the bundle must cover: a shipped name, or a Hugging Face config.json (can be repeated). Without it, the
    /// shipped ones among those that the bundle names
    #[arg(long)]
    model: Vec<String>,

    /// Most tokens of a step that the bundle must cover
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    max_num_tokens: u32,

    /// Most sequences of a step that the bundle must cover
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    max_num_seqs: u32,

    /// Worst grade that passes: A, B, C, D or F
    #[arg(long, value_name = "GRADE", default_value_t = Grade::D)]
    min_grade: Grade,
}

/// Runs the verb.
///
/// # Errors
/// When the bundle, the workload or a model cannot be read.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let options = LintOptions {
        models: args.model.iter().map(|model| ModelSpec::load(model)).collect::<Result<_, _>>()?,
        workload: args.workload.as_deref().map(Workload::read).transpose()?,
        max_num_tokens: args.max_num_tokens,
        max_num_seqs: args.max_num_seqs,
    };
    let report = lint(&Bundle::open(&data::bundle(&args.bundle)?)?, &options)?;
    output.print(&report, || text(&report))?;
    Ok(if report.grade <= args.min_grade { Exit::Fine } else { Exit::OutsideTolerance })
}

fn text(report: &LintReport) -> String {
    let counts = &report.counts;
    let mut text = Text::default();
    text.line(format_args!(
        "{} points; {} errors, {} warnings, {} remarks",
        counts.num_points, counts.num_errors, counts.num_warnings, counts.num_infos
    ));
    let mut groups: BTreeMap<_, Vec<&Finding>> = BTreeMap::new();
    for finding in &report.findings {
        groups.entry((std::cmp::Reverse(finding.severity), finding.rule)).or_default().push(finding);
    }
    for ((std::cmp::Reverse(severity), rule), findings) in groups {
        text.line(format_args!("\n{}: {}", severity.name(), rule.name()));
        for finding in findings.iter().take(MAX_SHOWN) {
            text.line(format_args!("  {}", finding_line(finding)));
        }
        if findings.len() > MAX_SHOWN {
            text.line(format_args!("  and {} more; --json lists all", findings.len() - MAX_SHOWN));
        }
        if severity > Severity::Info {
            text.line(format_args!("  hint: {}", findings[0].hint));
        }
    }
    if !report.coverage.is_empty() {
        text.line("");
        text.line(coverage_table(&report.coverage));
    }
    text.line(format_args!("grade {}", report.grade));
    for reason in &report.reasons {
        text.line(format_args!("  at best {}: {}", reason.cap, reason.text));
        text.line(format_args!("    to raise it: {}", reason.raise));
    }
    text.finish()
}

fn finding_line(finding: &Finding) -> String {
    let file = match (&finding.file, finding.line) {
        (Some(file), Some(line)) => Some(format!("{file}, line {line}")),
        (Some(file), None) => Some(file.clone()),
        (None, _) => None,
    };
    let operator = finding.operator.filter(|_| finding.file.is_none()).map(|operator| operator.to_string());
    let place: Vec<_> = [file, operator, finding.shape.clone()].into_iter().flatten().collect();
    let place = if place.is_empty() { String::new() } else { format!("{}: ", place.join(": ")) };
    format!("{place}expected {}, found {}", finding.expected, finding.found)
}

fn coverage_table(coverage: &[ModelCoverage]) -> Table {
    let mut table =
        Table::new(&["launches of the steps of", ">asked", ">measured", ">predicted", ">refused"]);
    for model in coverage {
        let share = |num: usize| percent(num as f64 / model.num_shapes.max(1) as f64);
        table.row([
            model.model.clone(),
            model.num_shapes.to_string(),
            share(model.num_measured),
            share(model.num_shapes - model.num_measured - model.num_refused),
            share(model.num_refused),
        ]);
    }
    table
}

//! `plumb check`: a gate for CI.

use std::path::{Path, PathBuf};

use plumbline_bundles::surface::DEFAULT_TOLERANCE_PCT;
use plumbline_schema::files::write_atomically;
use plumbline_validator::{
    SuiteResult,
    check::{Baseline, Change, CheckReport, DEFAULT_MIN_CHANGE_PCT, Verdict, junit, markdown},
    write_report,
};

use super::{
    check_bundle,
    validate::{SimulationArgs, load_suite, simulate_and_compare},
};
use crate::{
    exit::Exit,
    failure::Failure,
    output::{Output, Table, Text},
};

/// Gate a change: judge a suite by its tolerances and against an earlier result
///
/// Every case is simulated and compared with its real runs, as by `plumb validate`. A number fails when it is outside of the
/// tolerance that the suite gives it (`[tolerance]` and `[case.tolerance]`), or when its error is worse than the baseline's by
/// more than the noise floor of the real repeats, the scatter over seeds and --min-change-pct; with other real runs also the
/// 95 % intervals count. What moved is named: the model, the real runs (hardware drift), both, or noise. Exit codes: 0 when
/// something was judged and nothing failed; 3 when something failed, a case could not be judged, or nothing was judged.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Suite: a TOML file. Without it, the shipped one
    #[arg(long, value_name = "FILE")]
    suite: Option<PathBuf>,

    /// Earlier result to compare with: a report folder of `plumb validate` or `plumb check`, or its results.json
    #[arg(long, value_name = "RESULT")]
    baseline: Option<PathBuf>,

    /// Least change of an error's size that is better or worse than the baseline's, in percentage points
    #[arg(long, value_name = "POINTS", default_value_t = DEFAULT_MIN_CHANGE_PCT, value_parser = parse_points)]
    min_change_pct: f64,

    /// `JUnit` XML file to write
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,

    /// Markdown file to write, as CI systems show it
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,

    /// Report folder to write, which can be the baseline of later checks; an earlier report there is replaced
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Only cases whose name holds this text (can be repeated)
    #[arg(long, value_name = "TEXT")]
    case: Vec<String>,

    /// Judge a bundle in place of an older one, and no suite: folders, or names of shipped bundles
    ///
    /// Both are asked for every shape that either measured, shapes between, and the launches of the shipped models that either
    /// names. An answer is `OK`, `DATA_MISS` (none) or `INVALID` (a time that cannot be true); what was `OK` and no longer is
    /// fails.
    #[arg(long, num_args = 2, value_names = ["OLD", "NEW"], conflicts_with_all = SUITE_ARGS)]
    bundle: Option<Vec<String>>,

    /// With --bundle: change of a launch's time that is worth a line, in percent
    #[arg(
        long,
        value_name = "PCT",
        default_value_t = DEFAULT_TOLERANCE_PCT,
        value_parser = parse_points,
        requires = "bundle"
    )]
    tolerance_pct: f64,

    /// With --bundle: a time that changed by more than --tolerance-pct fails, too
    #[arg(long, requires = "bundle")]
    strict: bool,

    #[command(flatten)]
    simulation: SimulationArgs,
}

/// Arguments that are about a suite.
const SUITE_ARGS: [&str; 6] = ["suite", "baseline", "junit", "markdown", "out", "case"];

fn parse_points(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(points) if points.is_finite() && points >= 0.0 => Ok(points),
        _ => Err("expected a number from 0 on".into()),
    }
}

/// Runs the verb.
///
/// # Errors
/// When the suite, the baseline or a bundle cannot be read, or a file cannot be written.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    if let Some([old, new]) = args.bundle.as_deref() {
        return check_bundle::run(old, new, args.tolerance_pct, args.strict, output);
    }
    let suite = load_suite(args.suite.as_deref(), &args.case)?;
    let mut baseline = args.baseline.as_deref().map(Baseline::read).transpose()?;
    if let Some(baseline) = baseline.as_mut().filter(|_| !args.case.is_empty()) {
        // What was not asked for is not missing.
        baseline.result.cases.retain(|case| args.case.iter().any(|text| case.name.contains(text.as_str())));
    }
    let result = simulate_and_compare(&suite, &args.simulation, output);
    let report = CheckReport::new(&suite, &result, baseline.as_ref(), args.min_change_pct);
    write_files(args, &result, &report, output)?;
    output.print(&report, || text(&report))?;
    Ok(if report.passed { Exit::Fine } else { Exit::OutsideTolerance })
}

fn write_files(
    args: &Args,
    result: &SuiteResult,
    report: &CheckReport,
    output: Output,
) -> Result<(), Failure> {
    if let Some(out) = &args.out {
        write_report(result, out)?;
        output.note(format!("report in {}", out.display()));
    }
    if let Some(path) = &args.junit {
        let xml = junit::render(report).map_err(|error| Failure::new(Exit::Unexpected, error))?;
        write_text(path, &xml)?;
    }
    if let Some(path) = &args.markdown {
        write_text(path, &markdown::render(report))?;
    }
    Ok(())
}

fn write_text(path: &Path, text: &str) -> Result<(), Failure> {
    Ok(write_atomically(path, |out| out.write_all(text.as_bytes()))?)
}

/// What failed or changed; none when nothing did.
fn table_of(report: &CheckReport) -> Option<Table> {
    let mut table = Table::new(&[
        "case",
        "metric",
        ">real ms",
        ">sim ms",
        ">error",
        ">noise",
        ">tolerance",
        ">baseline",
        "verdict",
    ]);
    let mut num_shown = 0;
    for (case, row) in report.rows() {
        let baseline = row.baseline.as_ref();
        if row.verdict != Verdict::Failed && baseline.is_none_or(|before| before.change == Change::Same) {
            continue;
        }
        num_shown += 1;
        let ms = |value: Option<f64>| value.map_or_else(|| "n/a".to_owned(), |ms| format!("{ms:.2}"));
        let pct = |value: Option<f64>| value.map_or_else(|| "n/a".to_owned(), |pct| format!("{pct:+.1} %"));
        table.row([
            case.name.clone(),
            format!("{} {}", row.metric.title(), row.stat),
            ms(row.real_ms),
            ms(row.sim_ms),
            pct(row.error_pct),
            row.noise_pct.map_or_else(|| "1 run".to_owned(), |noise| format!("±{noise:.1} %")),
            row.tolerance.clone().unwrap_or_else(|| "-".into()),
            baseline.map_or_else(|| "-".into(), |before| pct(Some(before.error_pct))),
            markdown::verdict(row),
        ]);
    }
    (num_shown > 0).then_some(table)
}

fn text(report: &CheckReport) -> String {
    let mut text = Text::default();
    if let Some(table) = table_of(report) {
        text.line(table);
    }
    for case in &report.cases {
        if let Some(error) = &case.error {
            text.line(format_args!("{}: could not be judged: {error}", case.name));
        } else if case.verdict == Verdict::NotJudged {
            text.line(format_args!("{}: not judged: no tolerance, and no baseline that has it", case.name));
        }
    }
    for name in &report.missing_cases {
        text.line(format_args!("{name}: in the baseline, and not run"));
    }
    for name in &report.new_cases {
        text.line(format_args!("{name}: new since the baseline"));
    }
    if report.baseline.is_some() {
        text.line(format_args!("baseline: {} better, {} worse", report.num_better, report.num_worse));
    }
    text.line(report.headline());
    text.finish()
}

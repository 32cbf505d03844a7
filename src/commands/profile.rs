//! `plumb profile`: a GPU and its host to a bundle.

use std::{path::PathBuf, str::FromStr, time::Duration};

use plumbline_bundles::{CurvePoint, Efficiency};
use plumbline_profiler::{
    CudaDevice, Device, FakeDevice, ProfileOptions, ProfileOutcome, Progress, Stage, profile,
};
use plumbline_schema::{ModelSpec, Workload};
use serde::Serialize;

use crate::{
    commands::{advice::TrainedAdvisor, bundle_efficiency::shares},
    exit::Exit,
    failure::Failure,
    output::{Bar, Output, Table, Text, percent},
};

/// Measure this GPU and its host for some models, and write a bundle
///
/// Every operator of the models' forward pass is checked against a reference and then timed over a plan of shapes: the
/// models' own and a model-agnostic grid. Clocks, power, temperature and throttling are recorded. No setting of the GPU
/// is changed. `plumb train` comes next. Exit code 4 without a usable GPU, 5 when some points could not be measured (the
/// bundle lists them).
///
/// Every result goes at once to a journal, BUNDLE.journal; after a kill or a lost device, `--resume` goes on from there.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model: a shipped name (qwen3-0.6b, llama3-8b), or a Hugging Face config.json (can be repeated)
    #[arg(long, required = true)]
    model: Vec<String>,

    /// Bundle folder to write; nothing may exist there yet
    #[arg(long, value_name = "BUNDLE")]
    out: PathBuf,

    /// GPU by its CUDA number, or `fake` for a made-up one with a known law
    #[arg(long, value_name = "N|fake", default_value = "0")]
    device: DeviceChoice,

    /// Measure for this long, like 90s, 5m or 1h, at the points that the predictors are least sure of
    #[arg(long, value_name = "TIME", value_parser = parse_budget)]
    budget: Option<Duration>,

    /// Plan for requests as long as this workload's too
    #[arg(long, value_name = "FILE")]
    workload: Option<PathBuf>,

    /// Only the models' own shapes: other models cannot be predicted then
    #[arg(long)]
    no_grid: bool,

    /// Go on with the run of the same models whose journal lies beside BUNDLE
    #[arg(long)]
    resume: bool,

    /// Seed of the fake device's noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, Debug)]
enum DeviceChoice {
    Cuda(usize),
    Fake,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "fake" {
            return Ok(Self::Fake);
        }
        text.parse().map(Self::Cuda).map_err(|_| "expected a GPU's number or `fake`".to_owned())
    }
}

fn parse_budget(text: &str) -> Result<Duration, String> {
    let expected = || "expected a time like 90s, 5m or 1h".to_owned();
    let unit = text.chars().last().ok_or_else(expected)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        _ => return Err(expected()),
    };
    let number: u64 = text[..text.len() - unit.len_utf8()].parse().map_err(|_| expected())?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(expected)
}

#[derive(Serialize)]
struct Report {
    bundle: String,
    digest: String,
    gpu: String,
    num_planned: usize,
    num_measured: usize,
    uncovered: Vec<String>,
    num_left_out: usize,
    num_measured_again: usize,
    num_throttled: usize,
    num_clock_shifted: usize,
    num_bimodal: usize,
    num_below_floor: usize,
    wall_s: f64,
    curve: Vec<CurvePoint>,
    /// `None` when no ceiling or no point was measured.
    efficiency: Option<Efficiency>,
    incomplete: Vec<String>,
}

/// Runs the verb.
///
/// # Errors
/// When there is no usable device, nothing could be measured, or the bundle cannot be written.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let models = args.model.iter().map(|name| ModelSpec::load(name)).collect::<Result<Vec<_>, _>>()?;
    let mut options = ProfileOptions::new(models, args.out.clone());
    options.budget = args.budget;
    options.grid = !args.no_grid;
    options.resume = args.resume;
    if let Some(path) = &args.workload {
        let asked = options.envelope.of_workload(&Workload::read(path)?);
        options.envelope.max_model_len = options.envelope.max_model_len.max(asked.max_model_len);
    }
    let mut device = open(args.device, args.seed)?;
    let mut advisor = TrainedAdvisor::new(device.spec().clone());
    let bar = output.bar(0);
    let outcome =
        profile(device.as_mut(), &options, Some(&mut advisor), &mut |progress| show(&bar, &progress))?;
    drop(bar);
    let report = report(&outcome);
    output.print(&report, || text(&report))?;
    output.note(format!("wrote {}; next: plumb train {}", report.bundle, report.bundle));
    Ok(if outcome.is_complete() { Exit::Fine } else { Exit::Incomplete })
}

fn open(choice: DeviceChoice, seed: u64) -> Result<Box<dyn Device>, Failure> {
    Ok(match choice {
        DeviceChoice::Fake => Box::new(FakeDevice::new(seed)),
        DeviceChoice::Cuda(ordinal) => Box::new(CudaDevice::open(ordinal)?),
    })
}

fn show(bar: &Bar, progress: &Progress) {
    let what = match (progress.stage, progress.operator) {
        (Stage::Machine, _) => "machine".to_owned(),
        (Stage::Checks, Some(operator)) => format!("checking {operator}"),
        (Stage::Checks, None) => "checking".to_owned(),
        (Stage::Points, Some(operator)) => operator.to_string(),
        (Stage::Points, None) => "measuring".to_owned(),
        (Stage::SecondLook, _) => "looking again".to_owned(),
        (Stage::Writing, _) => "writing".to_owned(),
    };
    bar.set_with_time_left(progress.num_done as u64, progress.num_total as u64, &what, progress.time_left);
}

fn report(outcome: &ProfileOutcome) -> Report {
    let manifest = &outcome.bundle.manifest;
    Report {
        bundle: outcome.bundle.root.display().to_string(),
        digest: outcome.bundle.digest().to_owned(),
        gpu: manifest.gpu.name.clone(),
        num_planned: outcome.num_planned,
        num_measured: outcome.num_measured,
        uncovered: outcome.uncovered.clone(),
        num_left_out: outcome.num_left_out,
        num_measured_again: outcome.num_measured_again,
        num_throttled: outcome.num_throttled,
        num_clock_shifted: outcome.num_clock_shifted,
        num_bimodal: outcome.num_bimodal,
        num_below_floor: outcome.num_below_floor,
        wall_s: outcome.wall.as_secs_f64(),
        curve: outcome.curve.clone(),
        efficiency: Efficiency::of(&outcome.bundle).ok(),
        incomplete: manifest.incomplete.clone(),
    }
}

fn text(report: &Report) -> String {
    let mut text = Text::default();
    text.line(format_args!(
        "{}: {} of {} points measured in {:.1} s, {} left out by the budget",
        report.gpu, report.num_measured, report.num_planned, report.wall_s, report.num_left_out
    ));
    text.line(format_args!(
        "{} measured again; in every attempt {} throttled, {} with a moving clock, {} in two groups; {} under the \
         physical floor",
        report.num_measured_again,
        report.num_throttled,
        report.num_clock_shifted,
        report.num_bimodal,
        report.num_below_floor
    ));
    for line in &report.incomplete {
        text.line(format_args!("not measured: {line}"));
    }
    for line in &report.uncovered {
        text.line(format_args!("asked for, and not covered by the plan: {line}"));
    }
    if !report.curve.is_empty() {
        let mut table = Table::new(&["time", "samples", "held out", "error p50", "p90", "worst operator"]);
        for point in &report.curve {
            let error = &point.error;
            table.row([
                format!("{:.0} s", point.elapsed_s),
                point.num_samples.to_string(),
                error.num_points.to_string(),
                percent(error.p50),
                percent(error.p90),
                percent(error.worst_operator_p50),
            ]);
        }
        text.line("error of the predictors at held-out points, while measuring:");
        text.line(table);
    }
    if let Some(efficiency) = &report.efficiency {
        text.line(shares(efficiency));
    }
    text.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_have_a_unit() {
        assert_eq!(parse_budget("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_budget("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_budget("1h"), Ok(Duration::from_secs(3600)));
        for text in ["", "5", "m", "-1m", "5 m", "5µ", "99999999999999999999h", "18446744073709551615h"] {
            assert!(parse_budget(text).is_err(), "{text}");
        }
    }
}

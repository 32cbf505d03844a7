//! `plumb profile`: a GPU and its host to a bundle.

use std::{path::PathBuf, str::FromStr, time::Duration};

use plumbline_profiler::{
    CudaDevice, Device, FakeDevice, ProfileOptions, ProfileOutcome, Progress, Stage, profile,
};
use plumbline_schema::ModelSpec;
use serde::Serialize;

use crate::{
    exit::Exit,
    failure::Failure,
    output::{Bar, Output, Text},
};

/// Measure this GPU and its host for some models, and write a bundle
///
/// Every operator of the models' forward pass is checked against a reference and then timed over a plan of shapes; clocks,
/// power, temperature and throttling are recorded. `plumb train` comes next. Exit code 4 without a usable GPU, 5 when some
/// points could not be measured (the bundle lists them).
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

    /// Stop beginning new points after this long, like 90s, 5m or 1h; what is left out is listed in the bundle
    #[arg(long, value_name = "TIME", value_parser = parse_budget)]
    budget: Option<Duration>,

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
    num_throttled: usize,
    num_below_floor: usize,
    wall_s: f64,
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
    let mut device = open(args.device, args.seed)?;
    let bar = output.bar(0);
    let outcome = profile(device.as_mut(), &options, &mut |progress| show(&bar, &progress))?;
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
        num_throttled: outcome.num_throttled,
        num_below_floor: outcome.num_below_floor,
        wall_s: outcome.wall.as_secs_f64(),
        incomplete: manifest.incomplete.clone(),
    }
}

fn text(report: &Report) -> String {
    let mut text = Text::default();
    text.line(format_args!(
        "{}: {} of {} points measured in {:.1} s, {} throttled, {} under the physical floor",
        report.gpu,
        report.num_measured,
        report.num_planned,
        report.wall_s,
        report.num_throttled,
        report.num_below_floor
    ));
    for line in &report.incomplete {
        text.line(format_args!("not measured: {line}"));
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

//! `plumb calibrate`: real runs to an engine profile.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use plumbline_bundles::{
    Bundle, EngineProfile, OutOfDomain,
    bundle::{engine_name, to_json},
};
use plumbline_schema::{HostInfo, ModelSpec};
use plumbline_simulator::BundleTimes;
use plumbline_validator::calibrate::{
    CalibrateError, CalibrateOptions, FitRun, HeldOutRow, calibrate, calibrate_host, judge, uncalibrated,
};
use serde::Serialize;

use crate::{
    data,
    engines::{engine, predictors},
    exit::Exit,
    failure::Failure,
    output::{Output, Table, Text, percent},
};

/// The scheduler of a profile that starts from nothing.
const SCHEDULER: &str = "vllm-v1";

/// Fit an engine profile's host part on real runs, and judge it on others
///
/// The runs need their deployment (run.json, or engine.json beside or above them); best are those with recorded steps. What the
/// runs cannot pin stays as it was and is named.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Real run folder to fit on (can be repeated)
    #[arg(long, value_name = "RUN", required = true, num_args = 1..)]
    real: Vec<PathBuf>,

    /// Real run folder to judge the result on, before and after (can be repeated)
    #[arg(long, value_name = "RUN", num_args = 1..)]
    hold_out: Vec<PathBuf>,

    /// Fit one thing of the profile, and leave all else as it is: `host-factor`, the speed of another machine's host, from
    /// half a minute of a real run there
    #[arg(long, value_enum)]
    only: Option<Only>,

    /// Bundle folder, or the name of a shipped bundle
    #[arg(long)]
    bundle: String,

    /// Engine profile to start from: its name in the bundle, or a JSON file; another name starts from nothing but the
    /// bundle's launch costs
    #[arg(long)]
    engine: String,

    /// Model of the runs: a shipped name, or a Hugging Face config.json. Without it, the shipped model that each run's
    /// deployment names
    #[arg(long)]
    model: Option<String>,

    /// GPU of the runs, when it is not the bundle's: times are then carried over by the two data sheets
    #[arg(long, value_name = "GPU")]
    gpu: Option<String>,

    /// Engine profile to write, a JSON file. Without it, engines/NAME.json of the bundle
    #[arg(long, value_name = "PROFILE")]
    out: Option<PathBuf>,

    /// Host of the (first) runs, when they do not record it, so that the profile can be told for others by their
    /// scores: a JSON file of `plumb host --out`, a score, or `bundle` for the host that the bundle was measured on
    #[arg(long, value_name = "FILE|SCORE|bundle")]
    host: Option<String>,

    /// The same by its single-thread score alone
    #[arg(long, value_name = "SCORE", conflicts_with = "host")]
    host_score: Option<f64>,

    /// Seed of the simulations of held-out runs
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// What alone is fitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Only {
    /// The factor on all host costs
    HostFactor,
}

#[derive(Serialize)]
struct Report<'a> {
    out: String,
    profile: &'a EngineProfile,
    held_out: &'a [HeldOutRow],
    /// How it was judged when no run was named for that.
    #[serde(skip_serializing_if = "Option::is_none")]
    left_out: Option<&'a str>,
}

/// Runs the verb.
///
/// # Errors
/// When an input cannot be used, a run lacks what fitting needs, or the profile cannot be written.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let mut bundle = Bundle::open(&data::bundle(&args.bundle)?)?;
    let predictors = predictors(&bundle, args.gpu.as_deref())?;
    let host = host(args, &bundle)?;
    let fit_on = read_runs(&args.real, args.model.as_deref())?;
    let held_out = read_runs(&args.hold_out, args.model.as_deref())?;
    let options = CalibrateOptions {
        prior: prior(&bundle, &args.engine, &fit_on)?,
        gpu: predictors.gpu().name.clone(),
        bundle_gpu: bundle.manifest.gpu.name.clone(),
        predictors_digest: bundle.predictors_digest(),
    };
    let times = BundleTimes::new(Arc::new(predictors), OutOfDomain::Extrapolate);
    let fit = |runs: &[FitRun]| match args.only {
        Some(Only::HostFactor) => calibrate_host(runs, &times, &options.prior),
        None => calibrate(runs, &times, &options),
    };
    let mut profile = fit(&fit_on)?;
    if host.is_some() {
        profile.fitted_on.host = host;
    }
    let judge =
        |runs: &[FitRun], profile: &EngineProfile| judge(runs, &times, &options.prior, profile, args.seed);
    let (rows, left_out) = if held_out.is_empty() {
        judge_by_leaving_out(&fit_on, &fit, &judge)
    } else {
        (judge(&held_out, &profile)?, None)
    };
    let out = save(&profile, args.out.as_deref(), &mut bundle)?;
    let report = Report {
        out: out.display().to_string(),
        profile: &profile,
        held_out: &rows,
        left_out: left_out.as_deref(),
    };
    output.print(&report, || text(&profile, &rows, left_out.as_deref()))?;
    if profile.fitted_on.host.is_none() {
        output.note(
            "note: the runs do not record their host's score, so `plumb simulate --host` cannot tell this profile for \
             another host; name it with --host or --host-score",
        );
    }
    output.note(format!("wrote {}", out.display()));
    Ok(Exit::Fine)
}

type Judged = Result<Vec<HeldOutRow>, CalibrateError>;

/// Judges a fit on all runs but those of the workload with the most requests on one of these; and says so, or why it
/// could not.
fn judge_by_leaving_out(
    runs: &[FitRun],
    fit: &dyn Fn(&[FitRun]) -> Result<EngineProfile, CalibrateError>,
    judge: &dyn Fn(&[FitRun], &EngineProfile) -> Judged,
) -> (Vec<HeldOutRow>, Option<String>) {
    let largest = runs.iter().max_by_key(|run| run.run.requests.len());
    // A run's repeats would tell what it holds.
    let others = |of: &FitRun| -> Vec<FitRun> {
        runs.iter().filter(|run| run.workload != of.workload).cloned().collect()
    };
    let Some((run, others)) = largest.map(|run| (run, others(run))).filter(|(_, others)| !others.is_empty())
    else {
        let text = "nothing was held out: how well it predicts other runs is not known (--hold-out)";
        return (Vec::new(), Some(text.to_owned()));
    };
    let name = &run.name;
    match fit(&others).and_then(|profile| judge(std::slice::from_ref(run), &profile)) {
        Ok(rows) => {
            let text = format!("no --hold-out: judged is a second fit, without {name} and its repeats");
            (rows, Some(text))
        }
        Err(error) => {
            let text = format!("no --hold-out, and a fit without {name} cannot predict it: {error}");
            (Vec::new(), Some(text))
        }
    }
}

/// The host of the runs, as named by an option; `None` leaves it to what the runs record.
fn host(args: &Args, bundle: &Bundle) -> Result<Option<HostInfo>, Failure> {
    match (&args.host, args.host_score) {
        (Some(name), _) => super::host::named(name, bundle).map(Some),
        (None, Some(score)) => super::host::of_score("--host-score", score).map(Some),
        (None, None) => Ok(None),
    }
}

/// The profile to start from.
fn prior(bundle: &Bundle, name_or_path: &str, runs: &[FitRun]) -> Result<EngineProfile, Failure> {
    if data::is_file(name_or_path) || bundle.engine_names().contains(&name_or_path) {
        return engine(bundle, name_or_path);
    }
    let engine = runs.first().map_or("unknown", |first| first.run.info.engine.as_str());
    Ok(uncalibrated(name_or_path, engine, SCHEDULER, &bundle.host()?))
}

/// Reads runs to fit on or to judge by.
pub fn read_runs(folders: &[PathBuf], model: Option<&str>) -> Result<Vec<FitRun>, Failure> {
    let model = model.map(ModelSpec::load).transpose()?;
    let read = |folder: &PathBuf| {
        FitRun::read(folder, model.as_ref()).map_err(|error| match error {
            unknown @ CalibrateError::UnknownModel { .. } => {
                Failure::message(Exit::BadInput, unknown.to_string()).with_hint("name it with --model")
            }
            other => other.into(),
        })
    };
    folders.iter().map(read).collect()
}

/// Writes the profile where asked, or into the bundle; returns where.
fn save(profile: &EngineProfile, out: Option<&Path>, bundle: &mut Bundle) -> Result<PathBuf, Failure> {
    if let Some(path) = out {
        profile.write(path)?;
        return Ok(path.to_path_buf());
    }
    profile.check().map_err(|error| error.at(&bundle.root))?;
    let name = engine_name(&profile.name);
    let bytes = to_json(&name, profile)?;
    let path = bundle.root.join(&name);
    bundle.update(vec![(name, bytes)])?;
    Ok(path)
}

fn text(profile: &EngineProfile, rows: &[HeldOutRow], left_out: Option<&str>) -> String {
    let fitted = &profile.fitted_on;
    let mut text = Text::default();
    text.line(format_args!("{}: fitted on {}", profile.name, fitted.runs.join(", ")));
    for (dispatch, steps) in &fitted.num_steps {
        let error = fitted.step_error.get(dispatch).map_or_else(|| "n/a".to_owned(), |error| percent(*error));
        text.line(format_args!("{dispatch}: {steps} steps, median absolute error {error}"));
    }
    if let Some(host) = &fitted.host {
        let cpu = host.cpu_model.as_deref().unwrap_or("CPU not named");
        let score = super::host::score(host.single_thread_score, None);
        text.line(format_args!("host of the costs: {cpu}, {score}"));
    }
    if fitted.host_factors.len() > 1 {
        let factors = fitted.host_factors.iter().map(|(host, factor)| format!("{host} {factor:.2}"));
        text.line(format_args!("host factors: {}", factors.collect::<Vec<_>>().join(", ")));
    }
    if !fitted.host_factor_runs.is_empty() {
        let runs = fitted.host_factor_runs.join(", ");
        text.line(format_args!("host factor {:.2}, fitted on {runs}", profile.host_factor));
    }
    if fitted.disturbed_share > 0.0 {
        let share = percent(fitted.disturbed_share);
        text.line(format_args!("left out, as the host was disturbed: {share} of the steps"));
    }
    if !fitted.not_identified.is_empty() {
        text.line(format_args!("not identified by these runs: {}", fitted.not_identified.join(", ")));
    }
    if !fitted.intervals.is_empty() {
        let mut table = Table::new(&["parameter", ">5 %", ">95 %"]);
        for (name, [low, high]) in &fitted.intervals {
            let decimals = if name.starts_with("operator_scales") { 3 } else { 0 };
            table.row([name.clone(), format!("{low:.decimals$}"), format!("{high:.decimals$}")]);
        }
        text.line(format_args!("\nby bootstrap over runs and stretches of their steps:\n{table}"));
    }
    if let Some(left_out) = left_out {
        text.line(left_out);
    }
    if rows.is_empty() {
        return text.finish();
    }
    let mut table = Table::new(&[
        "held out",
        "metric",
        "stat",
        ">real ms",
        ">before ms",
        ">error",
        ">after ms",
        ">error",
    ]);
    for row in rows {
        let ms = |value: Option<f64>| value.map_or_else(|| "n/a".to_owned(), |ms| format!("{ms:.3}"));
        let pct = |value: Option<f64>| value.map_or_else(|| "n/a".to_owned(), |pct| format!("{pct:+.1} %"));
        table.row([
            row.run.clone(),
            row.metric.title().to_owned(),
            row.stat.name().to_owned(),
            ms(row.real_ms),
            ms(row.before_ms),
            pct(row.before_error_pct),
            ms(row.after_ms),
            pct(row.after_error_pct),
        ]);
    }
    text.line(format_args!("\n{table}"));
    text.finish()
}

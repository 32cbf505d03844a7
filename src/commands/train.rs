//! `plumb train`: samples to predictors.

use std::path::PathBuf;

use plumbline_bundles::{
    Bundle, Sample,
    predictor::{ErrorSummary, payloads},
};
use plumbline_schema::{GpuSpec, Nanos};
use plumbline_trainer::{
    OperatorReport, TrainOptions, TrainOutcome, TrainReport, report,
    select::{Grid, Selection, SelectionTrial, Setting, TIE, select},
    train,
};
use serde::Serialize;

use super::train_transfer;
use crate::{
    data,
    exit::Exit,
    failure::Failure,
    output::{Output, Table, percent, signed_percent},
};

/// Fit the predictors of a bundle and report their error on held-out shapes
///
/// Each operator gets a random forest that predicts the ratio to its roofline. Predictors are written into the
/// bundle; the same samples and seed give the same bytes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Bundle folder with samples, as `plumb profile` writes it
    bundle: String,

    /// Seed of the forests and of the folds that errors are measured on
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Search for the trees, depth, leaf size and features per split that err least on held-out shapes
    ///
    /// One after the other is varied from the default, nine trainings in all; the table says what was tried and why
    /// one was taken. The predictors are then trained with it.
    #[arg(long)]
    model_selection: bool,

    /// Write figures and tables of the held-out shapes into this folder: `report.html`, `report.md`, `held_out.csv`
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,

    /// Carry the predictors of this bundle, of another GPU, over to this bundle's GPU by the two data sheets
    ///
    /// The samples of this bundle judge them. All their answers are tagged `transferred`.
    #[arg(long, value_name = "BUNDLE", conflicts_with_all = ["model_selection", "report"])]
    transfer_from: Option<String>,

    /// Adapt them to so many shapes of each operator of this bundle; all others are the judges
    #[arg(long, value_name = "N", default_value_t = 0, requires = "transfer_from")]
    few_shot: usize,
}

#[derive(Serialize)]
struct Trained<'a> {
    bundle: String,
    digest: &'a str,
    report: &'a TrainReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    selection: Option<&'a Selection>,
}

/// Runs the verb.
///
/// # Errors
/// When the bundle or the report cannot be read or written, or the samples cannot be true or are too few.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    if let Some(from) = &args.transfer_from {
        return train_transfer::run(&args.bundle, from, args.few_shot, args.seed, output);
    }
    let mut bundle = Bundle::open(&data::bundle(&args.bundle)?)?;
    let samples = bundle.samples()?;
    let (selection, outcome) = fit(args, &samples, &bundle.manifest.gpu, output)?;
    bundle.update(payloads(&outcome.predictors)?)?;
    if let Some(folder) = &args.report {
        report::write(folder, &outcome, &bundle.manifest.gpu)?;
    }
    let trained = Trained {
        bundle: bundle.root.display().to_string(),
        digest: bundle.digest(),
        report: &outcome.report,
        selection: selection.as_ref(),
    };
    output.print(&trained, || {
        let searched = selection.as_ref().map(|selection| format!("{}\n", selection_text(selection)));
        searched.unwrap_or_default() + &text(&outcome.report)
    })?;
    output.note(format!("wrote {} predictors into {}", outcome.predictors.len(), bundle.root.display()));
    if let Some(folder) = &args.report {
        output.note(format!("wrote {}", folder.join("report.html").display()));
    }
    Ok(Exit::Fine)
}

/// Searches where asked to, and trains.
fn fit(
    args: &Args,
    samples: &[Sample],
    gpu: &GpuSpec,
    output: Output,
) -> Result<(Option<Selection>, TrainOutcome), Failure> {
    let mut options = TrainOptions { seed: args.seed, ..TrainOptions::default() };
    let bar = output.bar(0);
    let mut selection = None;
    if args.model_selection {
        let found = select(samples, gpu, &options, &Grid::default(), |progress| {
            let what = format!("trial {} of {}", progress.trial, progress.num_trials);
            bar.set(progress.done as u64, progress.total as u64, &what);
        })?;
        options = found.setting().applied_to(&options);
        selection = Some(found);
    }
    let outcome = train(samples, gpu, &options, |progress| {
        bar.set(progress.done as u64, progress.total as u64, progress.operator.name());
    })?;
    Ok((selection, outcome))
}

fn text(report: &TrainReport) -> String {
    let columns =
        ["operator", ">overhead", "held out", ">n", ">mean", ">p50", ">p90", ">p99", ">max", ">bias"];
    let mut table = Table::new(&columns);
    for operator in &report.operators {
        for (i, (way, error)) in ways(operator).into_iter().enumerate() {
            let first = |text: String| if i == 0 { text } else { String::new() };
            table.row([
                first(operator.operator.to_string()),
                first(Nanos::from_f64(operator.overhead_ns).to_string()),
                way.into(),
                error.n.to_string(),
                percent(error.mean),
                percent(error.p50),
                percent(error.p90),
                if error.n < report::MIN_FOR_P99 { "n/a".into() } else { percent(error.p99) },
                percent(error.max),
                signed_percent(error.bias),
            ]);
        }
    }
    format!(
        "Absolute error on held-out shapes, {}; bias is the mean signed error, p99 wants {} shapes.\n\
         Blocked: predicted across a gap or beyond an edge.\n\
         Layouts: those of a model that was not measured, where others surround them; none where too few were measured.\n\
         Roofline: the data sheet plus the overhead, for comparison.\n\n{table}",
        report.gpu,
        report::MIN_FOR_P99
    )
}

/// The rows of an operator: its errors by way of holding out, and what they are compared with.
fn ways(operator: &OperatorReport) -> Vec<(&'static str, ErrorSummary)> {
    let error = &operator.error;
    let mut ways = vec![("shuffled", error.shuffled), ("blocked", error.blocked)];
    ways.extend(error.layouts.map(|layouts| ("layouts", layouts)));
    ways.push(("(roofline)", operator.roofline_error));
    ways
}

fn selection_text(selection: &Selection) -> String {
    let columns = [
        ">trees",
        ">depth",
        ">leaf",
        ">features",
        ">shuffled",
        ">blocked",
        ">above lowest",
        ">std. error",
        ">nodes",
        "",
    ];
    let mut table = Table::new(&columns);
    for (i, trial) in selection.trials.iter().enumerate() {
        let Setting { num_trees, max_depth, min_samples_leaf, features_share } = trial.setting;
        let is_lowest = i == selection.lowest;
        let points = |ratio: f64| if is_lowest { "-".into() } else { format!("{:.3} pp", 100.0 * ratio) };
        table.row([
            num_trees.to_string(),
            max_depth.to_string(),
            min_samples_leaf.to_string(),
            format!("{:.0} %", 100.0 * features_share),
            format!("{:.3} %", 100.0 * trial.shuffled_error),
            format!("{:.3} %", 100.0 * trial.blocked_error),
            points(trial.above_lowest),
            points(trial.standard_error),
            trial.num_nodes.to_string(),
            mark(selection, i).into(),
        ]);
    }
    format!(
        "Model selection: mean error over all operators, one factor after the other varied from the best so far.\n\
         Of the trials within {:.2} percentage points or one standard error of the lowest sum of both errors the one\n\
         with the fewest nodes is taken.\n\n{table}",
        100.0 * TIE
    )
}

fn mark(selection: &Selection, trial: usize) -> &'static str {
    let SelectionTrial { is_tied, .. } = selection.trials[trial];
    match (trial == selection.lowest, trial == selection.chosen) {
        (true, true) => "lowest, taken",
        (false, true) => "tied, taken",
        (true, false) => "lowest",
        (false, false) if is_tied => "tied",
        (false, false) => "",
    }
}

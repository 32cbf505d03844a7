//! `plumb train`: samples to predictors.

use plumbline_bundles::{Bundle, bundle::predictor_name, predictor::ErrorSummary};
use plumbline_schema::Nanos;
use plumbline_trainer::{TrainOptions, TrainReport, train};
use serde::Serialize;

use crate::{
    data,
    exit::Exit,
    failure::Failure,
    output::{Output, Table, percent},
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
}

#[derive(Serialize)]
struct Trained<'a> {
    bundle: String,
    digest: &'a str,
    report: &'a TrainReport,
}

/// Runs the verb.
///
/// # Errors
/// When the bundle cannot be read or written, or its samples cannot be true or are too few.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let mut bundle = Bundle::open(&data::bundle(&args.bundle)?)?;
    let samples = bundle.samples()?;
    let options = TrainOptions { seed: args.seed, ..TrainOptions::default() };
    let bar = output.bar(0);
    let outcome = train(&samples, &bundle.manifest.gpu, &options, |progress| {
        bar.set(progress.done as u64, progress.total as u64, progress.operator.name());
    })?;
    drop(bar);
    let mut changes = Vec::with_capacity(outcome.predictors.len());
    for predictor in &outcome.predictors {
        changes.push((predictor_name(predictor.operator), predictor.to_json()?));
    }
    bundle.update(changes)?;
    let trained = Trained {
        bundle: bundle.root.display().to_string(),
        digest: bundle.digest(),
        report: &outcome.report,
    };
    output.print(&trained, || text(&outcome.report))?;
    output.note(format!("wrote {} predictors into {}", outcome.predictors.len(), bundle.root.display()));
    Ok(Exit::Fine)
}

fn text(report: &TrainReport) -> String {
    let mut table = Table::new(&[
        "operator",
        ">shapes",
        ">overhead",
        ">mean",
        ">p50",
        ">p90",
        ">max",
        ">blocked p50",
        ">blocked p90",
        ">layouts p50",
        ">layouts p90",
        ">roofline p50",
    ]);
    for operator in &report.operators {
        let error = &operator.error;
        let layouts =
            |pick: fn(&ErrorSummary) -> f64| error.layouts.as_ref().map_or("-".into(), |e| percent(pick(e)));
        table.row([
            operator.operator.to_string(),
            operator.num_shapes.to_string(),
            Nanos::from_f64(operator.overhead_ns).to_string(),
            percent(error.shuffled.mean),
            percent(error.shuffled.p50),
            percent(error.shuffled.p90),
            percent(error.shuffled.max),
            percent(error.blocked.p50),
            percent(error.blocked.p90),
            layouts(|e| e.p50),
            layouts(|e| e.p90),
            percent(operator.roofline_error.p50),
        ]);
    }
    format!(
        "Absolute error on held-out shapes, {}. Blocked: predicted across a gap or beyond an edge.\n\
         Layouts: those of a model that was not measured, where others surround them; - where too few were measured.\n\
         Roofline: the data sheet plus the overhead, for comparison.\n\n{table}",
        report.gpu
    )
}

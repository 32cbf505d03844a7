//! `plumb bundle judge`: predictors against samples that they have not seen.

use std::path::Path;

use plumbline_bundles::{
    Bundle,
    diff::{self, PointStats},
};
use plumbline_trainer::judge::{Judgement, OperatorJudgement, judge};

use crate::{
    data,
    exit::Exit,
    failure::Failure,
    output::{Output, Table, Text, percent},
};

/// Judge a bundle's predictors by another profile's samples
///
/// The other profile is of the same kind of GPU: a model that the first one's profile did not plan, or another day. Shapes
/// that the predictors were trained on are counted and left out.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Bundle whose predictors are judged: a folder, or the name of a shipped bundle
    bundle: String,

    /// Profile whose samples judge them: a bundle folder, the name of a shipped bundle, or a file of `plumb bundle stats`
    by: String,
}

/// Runs the verb.
///
/// # Errors
/// When a bundle cannot be read, or the two are of different GPUs.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let bundle = Bundle::open(&data::bundle(&args.bundle)?)?;
    let judgement = judge(&bundle.predictors()?, &points_of(&args.by, &bundle.manifest.gpu.name)?);
    output.print(&judgement, || text(&judgement))?;
    Ok(Exit::Fine)
}

/// The points of a profile of `gpu`; a statistics file does not name its GPU.
fn points_of(by: &str, gpu: &str) -> Result<Vec<PointStats>, Failure> {
    let path = Path::new(by);
    if diff::is_stats_file(path) {
        return Ok(diff::read_stats(path)?);
    }
    let by = Bundle::open(&data::bundle(by)?)?;
    let found = &by.manifest.gpu.name;
    if found != gpu {
        let text = format!("expected samples of `{gpu}`, as the predictors, found those of `{found}`");
        return Err(Failure::message(Exit::BadInput, text));
    }
    Ok(by.samples()?.iter().map(PointStats::from_sample).collect())
}

fn text(judgement: &Judgement) -> String {
    let mut table = Table::new(&[
        "operator",
        "judged",
        "trained on",
        "refused",
        "error p50",
        "p90",
        "max",
        "bias",
        "in interval",
    ]);
    for operator in &judgement.operators {
        table.row(row(operator));
    }
    let mut text = Text::default();
    text.line(table);
    if let (Some(median), Some(p90)) = (judgement.median_of_medians, judgement.p90_of_medians) {
        text.line(format_args!(
            "median error of an operator: {} in the median, {} at p90",
            percent(median),
            percent(p90)
        ));
    }
    text.finish()
}

fn row(operator: &OperatorJudgement) -> [String; 9] {
    let shown = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), percent);
    let error = operator.error;
    [
        operator.operator.to_string(),
        error.map_or(0, |e| e.n).to_string(),
        operator.num_measured.to_string(),
        operator.num_refused.to_string(),
        shown(error.map(|e| e.p50)),
        shown(error.map(|e| e.p90)),
        shown(error.map(|e| e.max)),
        shown(error.map(|e| e.bias)),
        shown(operator.coverage),
    ]
}

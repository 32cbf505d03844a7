//! `plumb train --transfer-from`: another GPU's predictors, adapted to a few samples of this one.

use plumbline_bundles::{
    Bundle,
    predictor::{ErrorSummary, payloads},
};
use plumbline_schema::{Nanos, Operator};
use plumbline_trainer::transfer::{OperatorTransfer, TransferOptions, TransferReport, transfer};
use serde::Serialize;

use crate::{
    data,
    exit::Exit,
    failure::Failure,
    output::{Output, Table, percent, signed_percent},
};

#[derive(Serialize)]
struct Transferred<'a> {
    bundle: String,
    from: String,
    digest: &'a str,
    report: &'a TransferReport,
}

/// Carries the predictors of the bundle `from` over to `bundle` and writes them into it.
///
/// # Errors
/// When a bundle cannot be read or written, `from` has no predictors of its own, or `bundle` lacks the samples asked for
/// or has some that cannot be true.
pub fn run(bundle: &str, from: &str, few_shot: usize, seed: u64, output: Output) -> Result<Exit, Failure> {
    let mut bundle = Bundle::open(&data::bundle(bundle)?)?;
    let from = Bundle::open(&data::bundle(from)?)?;
    let source = from.predictors()?;
    let predictors: Vec<_> =
        Operator::ALL.into_iter().filter_map(|operator| source.get(operator).cloned()).collect();
    let options = TransferOptions { seed, few_shot, ..TransferOptions::default() };
    let samples = bundle.samples()?;
    let outcome = transfer(&predictors, &from.manifest.gpu, &samples, &bundle.manifest.gpu, &options)?;
    bundle.update(payloads(&outcome.predictors)?)?;
    let transferred = Transferred {
        bundle: bundle.root.display().to_string(),
        from: from.root.display().to_string(),
        digest: bundle.digest(),
        report: &outcome.report,
    };
    output.print(&transferred, || text(&outcome.report))?;
    if !outcome.report.not_covered.is_empty() {
        let names: Vec<_> = outcome.report.not_covered.iter().map(|operator| operator.name()).collect();
        output.note(format!("no predictor to carry over, though sampled: {}", names.join(", ")));
    }
    output.note(format!("wrote {} predictors into {}", outcome.predictors.len(), bundle.root.display()));
    Ok(Exit::Fine)
}

fn text(report: &TransferReport) -> String {
    let columns = [
        "operator",
        ">overhead",
        ">ratio",
        "by",
        ">n",
        ">mean",
        ">p50",
        ">p90",
        ">max",
        ">bias",
        ">in interval",
    ];
    let mut table = Table::new(&columns);
    for operator in &report.operators {
        let coverage = operator.coverage.map_or_else(|| "-".to_owned(), percent);
        let is_adapted = operator.num_pooled > 0;
        let of_sheets = if is_adapted { String::new() } else { coverage.clone() };
        row(&mut table, operator, "data sheets".into(), operator.data_sheets, of_sheets);
        if is_adapted {
            row(&mut table, operator, way(operator), operator.few_shot, coverage);
        }
    }
    let refused: usize = report.operators.iter().map(|operator| operator.num_refused).sum();
    format!(
        "Predictors of {} carried over to {}: absolute error at samples that were not used; bias is the mean signed error.\n\
         Ratio: the share of {}'s ratio to its baseline that is taken to hold. Samples of matrix products count for all of them.\n\
         {refused} shapes lie outside what was measured on {} and were not judged.\n\n{table}",
        report.from, report.gpu, report.from, report.from
    )
}

fn way(operator: &OperatorTransfer) -> String {
    if operator.num_pooled > operator.num_used {
        format!("{} of {} samples", operator.num_used, operator.num_pooled)
    } else {
        format!("{} samples", operator.num_used)
    }
}

fn row(
    table: &mut Table,
    operator: &OperatorTransfer,
    way: String,
    error: Option<ErrorSummary>,
    coverage: String,
) {
    let is_first = way == "data sheets";
    let first = |text: String| if is_first { text } else { String::new() };
    let shown = |pick: fn(&ErrorSummary) -> f64| {
        error.as_ref().map_or_else(|| "-".to_owned(), |error| percent(pick(error)))
    };
    table.row([
        first(operator.operator.to_string()),
        first(Nanos::from_f64(operator.overhead_ns).to_string()),
        first(percent(operator.ratio_share)),
        way,
        error.map_or(0, |error| error.n).to_string(),
        shown(|e| e.mean),
        shown(|e| e.p50),
        shown(|e| e.p90),
        shown(|e| e.max),
        error.map_or_else(|| "-".to_owned(), |error| signed_percent(error.bias)),
        coverage,
    ]);
}

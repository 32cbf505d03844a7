//! `plumb bundle export`: predicted times as another simulator's tables.

use std::path::PathBuf;

use clap::ValueEnum;
use plumbline_bundles::{
    Bundle, OutOfDomain,
    export::vidur::{ExportError, ExportReport, VidurOptions, export},
};
use plumbline_schema::ModelSpec;
use serde::Serialize;

use crate::{
    data,
    exit::Exit,
    failure::Failure,
    output::{Output, Text},
};

/// Write a bundle's predictions as another simulator's profiling tables
///
/// Writes DIR/compute/GPU/MODEL/mlp.csv and attention.csv in Vidur's columns, unit (ms) and grid. Minimum and maximum are the
/// ends of a prediction's interval, mean and median the predicted time.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Whose tables to write
    format: Format,

    /// Bundle folder with predictors, or the name of a shipped bundle
    bundle: String,

    /// Model: a shipped name (qwen3-0.6b, llama3-8b), or a Hugging Face config.json
    #[arg(long)]
    model: String,

    /// Folder to write into; no table may stand there yet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Tensor-parallel sizes, each with rows of its own
    #[arg(long, value_name = "SIZES", value_delimiter = ',', default_value = "1")]
    tensor_parallel: Vec<u32>,

    /// Most tokens of a batch, and the longest sequence
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=131_072))]
    max_tokens: u32,

    /// Most decodes of a batch
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1024))]
    max_batch_size: u32,

    /// Predict outside what was measured too
    #[arg(long)]
    extrapolate: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// Vidur
    Vidur,
}

#[derive(Serialize)]
struct Report<'a> {
    files: Vec<String>,
    #[serde(flatten)]
    export: &'a ExportReport,
}

/// Runs the verb.
///
/// # Errors
/// When the bundle has no predictors, does not cover the model's shapes, or the tables cannot be written.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let Format::Vidur = args.format;
    let model = ModelSpec::load(&args.model)?;
    let predictors = Bundle::open(&data::bundle(&args.bundle)?)?.predictors()?;
    let options = VidurOptions {
        tensor_parallel_sizes: args.tensor_parallel.clone(),
        max_tokens: args.max_tokens,
        max_batch_size: args.max_batch_size,
        out_of_domain: if args.extrapolate { OutOfDomain::Extrapolate } else { OutOfDomain::Refuse },
    };
    let exported = export(&predictors, &model, &options).map_err(failure)?;
    let paths = exported.write(&args.out).map_err(failure)?;
    let files: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    let report = Report { files, export: &exported.report };
    output.print(&report, || text(&report))?;
    Ok(Exit::Fine)
}

fn failure(error: ExportError) -> Failure {
    use plumbline_bundles::PredictError::{OutOfDomain, UnmeasuredLayout};
    match error {
        ExportError::Input(error) => error.into(),
        error @ ExportError::Predict(OutOfDomain { .. } | UnmeasuredLayout { .. }) => {
            Failure::new(Exit::BadInput, error).with_hint(
                "--max-tokens and --max-batch-size make the grid smaller, --extrapolate predicts outside too",
            )
        }
        error => Failure::new(Exit::BadInput, error),
    }
}

fn text(report: &Report) -> String {
    let ExportReport { gpu, model, num_rows, num_predictions, notes } = report.export;
    let mut text = Text::default();
    let rows: Vec<_> = num_rows.iter().map(|(name, num)| format!("{name} with {num} rows")).collect();
    text.line(format_args!("{model} on {gpu}: {}", rows.join(", ")));
    let count = |(tag, num)| format!("{num} {tag:?}").to_lowercase();
    let counts: Vec<_> = num_predictions.iter().map(count).collect();
    text.line(format_args!("predictions: {}", counts.join(", ")));
    for note in notes {
        text.line(format_args!("note: {note}"));
    }
    for file in &report.files {
        text.line(format_args!("wrote {file}"));
    }
    text.finish()
}

//! `plumb bundle import`: other tools' profiling tables to a bundle.

use std::{path::PathBuf, time::SystemTime};

use clap::ValueEnum;
use plumbline_bundles::import::{Clean, Dialect, ImportError, ImportOptions, ImportReport, import};
use plumbline_profiler::profile::rfc3339;
use serde::Serialize;

use crate::{
    exit::Exit,
    failure::Failure,
    output::{Output, Table, Text},
};

/// Make a bundle of another simulator's profiling tables
///
/// Reads `mlp`, `attention`, `all_reduce` and `send_recv` tables (.csv, .csv.gz, .csv.zst) anywhere below a folder: a model's, a
/// GPU's, or the whole data/profiling. `plumb train` comes next. Cells that cannot be true are refused with file, line and
/// column, unless --clean names what to do about them; the bundle then says what was cleaned.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Whose tables they are
    format: Format,

    /// Folder with the tables
    dir: PathBuf,

    /// Bundle folder to write; nothing may exist there yet
    #[arg(long, value_name = "BUNDLE")]
    out: PathBuf,

    /// GPU of the tables, like a100 or a100-sxm4-80gb, where the paths do not name it or name several
    #[arg(long, value_name = "GPU")]
    gpu: Option<String>,

    /// Folder of the network tables to read, like `a100_dgx`, where there are several
    #[arg(long, value_name = "NODE")]
    network: Option<String>,

    /// What to do about cells that cannot be true (can be repeated)
    #[arg(long, value_name = "POLICY")]
    clean: Vec<Policy>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// Vidur
    Vidur,
    /// Frontier, a descendant of Vidur
    Frontier,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Policy {
    /// Leave out samples of which a cell is empty
    DropMissing,
    /// Leave out samples of which a cell is no time: text, zero, negative, not finite, out of order, absurdly long
    DropInvalid,
    /// Leave out samples with times below what the data sheet allows
    DropBelowFloor,
    /// Make one sample, the median, of times of one shape that disagree
    MedianOfDuplicates,
}

impl From<Format> for Dialect {
    fn from(format: Format) -> Self {
        match format {
            Format::Vidur => Self::Vidur,
            Format::Frontier => Self::Frontier,
        }
    }
}

impl From<Policy> for Clean {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::DropMissing => Self::DropMissing,
            Policy::DropInvalid => Self::DropInvalid,
            Policy::DropBelowFloor => Self::DropBelowFloor,
            Policy::MedianOfDuplicates => Self::MedianOfDuplicates,
        }
    }
}

impl From<ImportError> for Failure {
    fn from(error: ImportError) -> Self {
        match error {
            ImportError::Input(error) => error.into(),
            error => Self::new(Exit::BadInput, error),
        }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    bundle: String,
    digest: &'a str,
    #[serde(flatten)]
    import: &'a ImportReport,
}

/// Runs the verb.
///
/// # Errors
/// When the tables cannot be used as they are, or the bundle cannot be written.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let options = ImportOptions {
        gpu: args.gpu.clone(),
        network: args.network.clone(),
        clean: args.clean.iter().map(|&policy| policy.into()).collect(),
    };
    let imported = import(&args.dir, args.format.into(), &options)?;
    let bundle = imported.write(&args.out, rfc3339(SystemTime::now()))?;
    let root = bundle.root.display().to_string();
    let report = Report { bundle: root.clone(), digest: bundle.digest(), import: &imported.report };
    output.print(&report, || text(&imported.report))?;
    output.note(format!("wrote {root}; next: plumb train {root}"));
    Ok(Exit::Fine)
}

fn text(report: &ImportReport) -> String {
    let mut text = Text::default();
    let num_rows: usize = report.tables.iter().map(|table| table.num_rows).sum();
    text.line(format_args!("{}: {} tables with {num_rows} rows", report.gpu, report.tables.len()));
    text.line("");
    let mut table = Table::new(&["operator", ">samples", ">shapes", "of"]);
    for operator in &report.operators {
        table.row([
            operator.operator.to_string(),
            operator.num_samples.to_string(),
            operator.num_shapes.to_string(),
            operator.sources.join(", "),
        ]);
    }
    text.line(table);
    if !report.left_out.is_empty() {
        let mut table = Table::new(&["left out", ">rows", "because"]);
        for left_out in &report.left_out {
            table.row([left_out.what.clone(), left_out.num_rows.to_string(), left_out.reason.clone()]);
        }
        text.line(table);
    }
    if !report.cleaned.is_empty() {
        let mut table = Table::new(&["cleaned by", ">cells", "of"]);
        for cleaned in &report.cleaned {
            table.row([cleaned.policy.to_string(), cleaned.num_cells.to_string(), cleaned.column.clone()]);
        }
        text.line(table);
    }
    for note in &report.notes {
        text.line(format_args!("note: {note}"));
    }
    for file in &report.ignored_files {
        text.line(format_args!("not read: {file}"));
    }
    text.finish()
}

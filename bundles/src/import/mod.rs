//! Other tools' profiling tables as samples: Vidur's, and those of Frontier, its descendant.
//!
//! Start with [`vidur`]; [`tables`] reads one table as named cells. What each column becomes is in `docs/importing.md`.
//! Cells that cannot be true are refused, and cleaned only by the policies asked for ([`Clean`]).

mod attention;
mod cells;
mod collect;
mod duplicates;
mod error;
mod find;
pub mod mlp;
mod network;
mod report;
pub mod tables;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
};

use plumbline_schema::{GpuSpec, Operator};
use serde::{Deserialize, Serialize};

use self::{
    collect::Collector,
    find::{Found, Kind},
    tables::Table,
};
use crate::{
    bundle::{Bundle, BundleWriter},
    error::BundleError,
    manifest::{FormatVersion, Manifest},
    samples::Sample,
};

pub use self::{
    cells::{NS_PER_MS, RESOLUTION_NS, SHORTEST_KERNEL_NS},
    duplicates::MAX_DISAGREEMENT,
    error::{BadCell, ImportError},
    find::short_gpu_name,
    report::{Cleaned, ImportReport, LeftOut, OperatorImport, TableReport},
};

/// The payload of an imported bundle that says what it was made of: an [`ImportReport`].
pub const IMPORT: &str = "import.json";

/// Whose tables are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dialect {
    /// Vidur's own.
    Vidur,
    /// Those of Frontier: as Vidur's, but for `linear_op` tables, cells of what did not run, which may hold anything,
    /// and cells left empty for more than one GPU.
    Frontier,
}

impl Dialect {
    /// The name, as kernels of samples begin with it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vidur => "vidur",
            Self::Frontier => "frontier",
        }
    }
}

/// What to do about cells that cannot be true; nothing is done unless asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clean {
    /// Leave out samples of which a cell is empty.
    DropMissing,
    /// Leave out samples of which a cell is no time: text, zero, negative, not finite, out of order, absurdly long.
    DropInvalid,
    /// Leave out samples with times below what the GPU's data sheet allows.
    DropBelowFloor,
    /// Make one sample, the median, of times of one shape that disagree.
    MedianOfDuplicates,
}

impl Clean {
    /// The name on the command line and in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::DropMissing => "drop-missing",
            Self::DropInvalid => "drop-invalid",
            Self::DropBelowFloor => "drop-below-floor",
            Self::MedianOfDuplicates => "median-of-duplicates",
        }
    }
}

impl fmt::Display for Clean {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How to import.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    /// The GPU, by its spec's or its folder's name; found in the paths where `None`.
    pub gpu: Option<String>,
    /// The folder of the network tables to read, as `a100_dgx`; needed where there are several.
    pub network: Option<String>,
    /// Policies for cells that cannot be true.
    pub clean: BTreeSet<Clean>,
}

/// Samples made of tables.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The GPU they are of.
    pub gpu: GpuSpec,
    /// Names of the models whose tables were read, from the paths.
    pub models: Vec<String>,
    /// The samples, operators in the order of the forward pass, rows in the order of the tables.
    pub samples: Vec<Sample>,
    /// What was read, left out and cleaned.
    pub report: ImportReport,
}

/// Imports the tables below a folder of Vidur's `data/profiling`: a model's, a GPU's, or all of it.
///
/// # Errors
/// When there are no tables, or of several GPUs or nodes; when a table cannot be read or a key makes no sense; when
/// cells cannot be true and no policy of the options covers them.
pub fn vidur(dir: &Path, options: &ImportOptions) -> Result<Imported, ImportError> {
    import(dir, Dialect::Vidur, options)
}

/// Imports the tables of Frontier; as [`vidur`].
///
/// # Errors
/// As [`vidur`].
pub fn frontier(dir: &Path, options: &ImportOptions) -> Result<Imported, ImportError> {
    import(dir, Dialect::Frontier, options)
}

/// Imports the tables of a dialect; as [`vidur`].
///
/// # Errors
/// As [`vidur`].
pub fn import(dir: &Path, dialect: Dialect, options: &ImportOptions) -> Result<Imported, ImportError> {
    let selection = find::select(dir, dialect, options)?;
    let mut collector = Collector::new(&selection.gpu, dialect, &options.clean);
    let mut num_rows = Vec::new();
    for (index, found) in selection.tables.iter().enumerate() {
        let table = Table::read(&found.path)?;
        num_rows.push(table.num_rows());
        take(index, found.kind, &table, &mut collector)?;
    }
    let mut num_samples = vec![0; num_rows.len()];
    collector.samples.iter().for_each(|collected| num_samples[collected.table] += 1);
    let paths: Vec<PathBuf> = selection.tables.iter().map(|found| found.path.clone()).collect();
    duplicates::settle(&mut collector, &paths);
    if let Some(first) = collector.faults.first() {
        return Err(cells_error(first.clone(), &collector.faults));
    }
    if collector.samples.is_empty() {
        let found = "tables of which nothing is left".to_owned();
        return Err(ImportError::NoTables {
            dir: dir.into(),
            expected: "times of our operators".into(),
            found,
        });
    }
    let reports = selection.tables.iter().zip(num_rows.into_iter().zip(num_samples));
    let tables = reports.map(|(found, (num_rows, num_samples))| TableReport {
        path: found.path.display().to_string(),
        num_rows,
        num_samples,
    });
    let report = ImportReport {
        dialect,
        gpu: selection.gpu.name.clone(),
        tables: tables.collect(),
        operators: operators(&collector),
        left_out: left_out(&collector),
        cleaned: cleaned(&collector),
        notes: selection.notes.into_iter().chain(collector.notes).collect(),
        ignored_files: selection.ignored.iter().map(|path| path.display().to_string()).collect(),
    };
    let samples = collector.samples.into_iter().map(|collected| collected.sample).collect();
    Ok(Imported { models: models(&selection.tables), samples, report, gpu: selection.gpu })
}

fn take(index: usize, kind: Kind, table: &Table, into: &mut Collector) -> Result<(), ImportError> {
    match kind {
        Kind::Mlp => mlp::take(index, table, into),
        Kind::Attention => attention::take(index, table, into),
        Kind::AllReduce => network::take(index, table, Operator::AllReduce, into),
        Kind::SendRecv => network::take(index, table, Operator::SendRecv, into),
    }
}

/// The first bad cell in the order of the tables (disagreements are found last), and what would clean all of them.
fn cells_error(first: BadCell, faults: &[BadCell]) -> ImportError {
    let mut counts: BTreeMap<Clean, usize> = BTreeMap::new();
    for fault in faults {
        *counts.entry(fault.policy).or_default() += 1;
    }
    let policies: Vec<_> = counts.iter().map(|(policy, num)| format!("--clean {policy} ({num})")).collect();
    ImportError::Cells { first: Box::new(first), num: faults.len(), policies: policies.join(", ") }
}

fn operators(collector: &Collector) -> Vec<OperatorImport> {
    let of = |operator: Operator| {
        let own: Vec<_> = collector.samples.iter().filter(|c| c.sample.operator == operator).collect();
        let shapes: BTreeSet<_> = own.iter().map(|c| c.sample.shape.values()).collect();
        let sources: BTreeSet<_> = own.iter().map(|c| c.sample.kernel.clone()).collect();
        (!own.is_empty()).then(|| OperatorImport {
            operator,
            num_samples: own.len(),
            num_shapes: shapes.len(),
            sources: sources.into_iter().collect(),
        })
    };
    Operator::ALL.into_iter().filter_map(of).collect()
}

fn left_out(collector: &Collector) -> Vec<LeftOut> {
    let one = |(what, reason, num_rows): (&str, &str, usize)| LeftOut {
        what: what.to_owned(),
        num_rows,
        reason: reason.to_owned(),
    };
    collector.left_out().map(one).collect()
}

fn cleaned(collector: &Collector) -> Vec<Cleaned> {
    let one = |((policy, column), &num_cells): (&(Clean, String), &usize)| Cleaned {
        policy: *policy,
        column: column.clone(),
        num_cells,
    };
    collector.cleaned.iter().map(one).collect()
}

fn models(tables: &[Found]) -> Vec<String> {
    tables.iter().filter_map(|found| found.model.clone()).collect::<BTreeSet<_>>().into_iter().collect()
}

impl Imported {
    /// Writes the samples as a bundle; `created` is now, RFC 3339 in UTC, as tables do not say when they were measured.
    ///
    /// # Errors
    /// When something stands at `out`, or any I/O error; nothing is left behind then.
    pub fn write(&self, out: &Path, created: String) -> Result<Bundle, BundleError> {
        let mut writer = BundleWriter::new(out)?;
        writer.add_samples(&self.samples)?;
        writer.add_json(IMPORT, &self.report)?;
        writer.finish(Manifest {
            format_version: FormatVersion::CURRENT,
            plumbline_version: env!("CARGO_PKG_VERSION").into(),
            created,
            gpu: self.gpu.clone(),
            device: None,
            evidence: None,
            models: self.models.clone(),
            incomplete: self.report.incomplete(),
            files: BTreeMap::new(),
        })
    }
}

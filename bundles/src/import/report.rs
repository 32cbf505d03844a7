//! What an import did, for people and for the bundle.

use plumbline_schema::Operator;
use serde::{Deserialize, Serialize};

use super::{Clean, Dialect};

/// What was read, made, left out and cleaned; stored in the bundle as [`IMPORT`](super::IMPORT).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImportReport {
    /// Whose tables they are.
    pub dialect: Dialect,
    /// Name of the GPU the samples are of.
    pub gpu: String,
    /// The tables, in the order read.
    pub tables: Vec<TableReport>,
    /// What became of them, in the order of the forward pass.
    pub operators: Vec<OperatorImport>,
    /// What no operator here can hold, in words.
    pub left_out: Vec<LeftOut>,
    /// What the policies asked for took; empty when nothing was.
    pub cleaned: Vec<Cleaned>,
    /// What else is to be known, in words.
    pub notes: Vec<String>,
    /// CSV files below the folder that are none of the tables.
    pub ignored_files: Vec<String>,
}

/// One table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableReport {
    /// The file, as named by the caller.
    pub path: String,
    /// Its rows.
    pub num_rows: usize,
    /// Samples made of it, before repeated shapes were merged.
    pub num_samples: usize,
}

/// One operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatorImport {
    /// The operator.
    pub operator: Operator,
    /// Its samples.
    pub num_samples: usize,
    /// Distinct shapes of them.
    pub num_shapes: usize,
    /// What they were made of: the kernels' names.
    pub sources: Vec<String>,
}

/// Rows or columns of which nothing was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// What: a column's operator, or rows in words.
    pub what: String,
    /// Rows in which it stood.
    pub num_rows: usize,
    /// Why.
    pub reason: String,
}

/// What one policy took in one column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cleaned {
    /// The policy.
    pub policy: Clean,
    /// The column; for repeated shapes the kernel's name.
    pub column: String,
    /// Cells that it took; for repeated shapes the samples that were merged.
    pub num_cells: usize,
}

impl ImportReport {
    /// What the samples lack, one line each, as a manifest's `incomplete` says it.
    #[must_use]
    pub fn incomplete(&self) -> Vec<String> {
        let lines = self.cleaned.iter().map(|cleaned| {
            let Cleaned { policy, column, num_cells } = cleaned;
            match policy {
                Clean::MedianOfDuplicates => {
                    format!("{policy}: {num_cells} samples of {column} that disagreed became their medians")
                }
                _ => format!("{policy}: {num_cells} bad cells of {column}"),
            }
        });
        lines.collect()
    }
}

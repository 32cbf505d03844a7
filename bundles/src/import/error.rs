//! Why tables cannot be imported.

use std::path::PathBuf;

use plumbline_schema::{InputError, Location};

use super::Clean;

/// A table that cannot be imported, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// A file that cannot be read, is no table, or has a key that no launch can have.
    #[error(transparent)]
    Input(#[from] InputError),
    /// No table below the folder.
    #[error("{}: expected tables named {expected}, found {found}", dir.display())]
    NoTables {
        /// The folder.
        dir: PathBuf,
        /// Names of tables that are read.
        expected: String,
        /// CSV files that are there.
        found: String,
    },
    /// Tables of no known GPU, or of several.
    #[error("{}: expected tables of one known GPU ({known}), found {found}", dir.display())]
    Gpu {
        /// The folder.
        dir: PathBuf,
        /// Names of the GPUs there are data sheets of.
        known: String,
        /// The GPUs that the paths name.
        found: String,
    },
    /// Tables of several kinds of node.
    #[error("{}: expected network tables of one kind of node, found {found}; name one with --network", dir.display())]
    Network {
        /// The folder.
        dir: PathBuf,
        /// The kinds of node there are.
        found: String,
    },
    /// A column whose times are of another unit, or not of the operator at all.
    #[error(
        "{}, column `{column}`: expected times in milliseconds, found {num_cells} of which the median is {ratio:.2e} times what \
         the GPU's data sheet says; another unit, or not the time of this operator", path.display()
    )]
    Unit {
        /// The table.
        path: PathBuf,
        /// The column.
        column: String,
        /// Times in it.
        num_cells: usize,
        /// Median of time over roofline time.
        ratio: f64,
    },
    /// Cells that cannot be true, and no policy that says what to do about them.
    #[error("{first}{}; nothing is cleaned unless asked for: {policies}", and_more(*num))]
    Cells {
        /// The first of them.
        first: Box<BadCell>,
        /// How many there are in all tables.
        num: usize,
        /// The policies that would clean them, each with the number of its cells.
        policies: String,
    },
}

/// A cell that cannot be true.
#[derive(Clone, Debug, PartialEq)]
pub struct BadCell {
    /// The table.
    pub path: PathBuf,
    /// Line in it, from 1.
    pub line: u64,
    /// The column.
    pub column: String,
    /// What must stand there.
    pub expected: String,
    /// What stands there.
    pub found: String,
    /// The policy that would clean it.
    pub policy: Clean,
}

impl std::fmt::Display for BadCell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let location = Location::Cell { line: self.line, column: self.column.clone() };
        write!(f, "{}{location}: expected {}, found {}", self.path.display(), self.expected, self.found)
    }
}

fn and_more(num: usize) -> String {
    match num {
        0 | 1 => String::new(),
        n => format!(" (and {} more like it)", n - 1),
    }
}

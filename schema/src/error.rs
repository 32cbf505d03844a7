//! One error for everything read from a file: what was expected, what was found, where, what to do.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use thiserror::Error;

/// Where in a file the trouble is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// The file as a whole.
    File,
    /// A line, counted from 1.
    Line(u64),
    /// A line and the column's name in a CSV file; lines are counted from 1, the header is line 1.
    Cell {
        /// Line number, from 1.
        line: u64,
        /// Column name.
        column: String,
    },
    /// A key of a JSON or TOML document, as a dotted path.
    Key(String),
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File => Ok(()),
            Self::Line(line) => write!(f, ", line {line}"),
            Self::Cell { line, column } => write!(f, ", line {line}, column `{column}`"),
            Self::Key(key) => write!(f, ", key `{key}`"),
        }
    }
}

/// A file that cannot be used, and why.
#[derive(Debug, Error)]
pub enum InputError {
    /// The file holds something other than what it must hold.
    #[error("{}{location}: expected {expected}, found {found}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The place in it.
        location: Location,
        /// What must stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

impl InputError {
    /// Wraps an I/O error with the path it happened at.
    pub fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    /// Builds an `Invalid` error.
    pub fn invalid(
        path: impl Into<PathBuf>,
        location: Location,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Invalid { path: path.into(), location, expected: expected.into(), found: found.into() }
    }

    /// Turns a JSON error into `Invalid` at its line.
    #[must_use]
    pub fn json(path: &Path, expected: &str, error: &serde_json::Error) -> Self {
        let location = match error.line() {
            0 => Location::File,
            line => Location::Line(line as u64),
        };
        Self::invalid(path, location, expected, strip_position(&error.to_string()))
    }

    /// Turns the TOML error of a document with this `text` into `Invalid` at its line.
    #[must_use]
    pub fn toml(path: &Path, expected: &str, text: &str, error: &toml::de::Error) -> Self {
        let location = error.span().map_or(Location::File, |span| {
            let before = text.get(..span.start).unwrap_or(text);
            Location::Line(1 + before.matches('\n').count() as u64)
        });
        // One line: the message may span several.
        let found = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
        Self::invalid(path, location, expected, found)
    }

    /// Turns a CSV error into `Invalid` (or `Io`) at its line and, where known, column.
    #[must_use]
    pub fn csv(path: &Path, expected: &str, error: csv::Error) -> Self {
        let line = error.position().map(csv::Position::line);
        match error.into_kind() {
            csv::ErrorKind::Io(source) => Self::io(path, source),
            csv::ErrorKind::Deserialize { err, pos } => {
                let line = pos.map_or(line, |p| Some(p.line()));
                let location = line.map_or(Location::File, Location::Line);
                Self::invalid(path, location, expected, err.to_string())
            }
            csv::ErrorKind::UnequalLengths { expected_len, len, .. } => Self::invalid(
                path,
                line.map_or(Location::File, Location::Line),
                format!("{expected_len} columns"),
                format!("{len}"),
            ),
            csv::ErrorKind::Utf8 { .. } => {
                Self::invalid(path, line.map_or(Location::File, Location::Line), "UTF-8 text", "other bytes")
            }
            kind => Self::invalid(
                path,
                line.map_or(Location::File, Location::Line),
                expected,
                format!("{kind:?}"),
            ),
        }
    }
}

/// Drops serde's own " at line L column C", which `Location` already says.
fn strip_position(text: &str) -> &str {
    text.rfind(" at line ").map_or(text, |at| &text[..at])
}

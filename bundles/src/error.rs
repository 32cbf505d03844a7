//! What can be wrong with a bundle.

use std::{fmt::Display, path::PathBuf};

use plumbline_schema::{InputError, Location};
use thiserror::Error;

use crate::manifest::FormatVersion;

/// A bundle, or a part of one, that cannot be used, and what to do about it.
#[derive(Debug, Error)]
pub enum BundleError {
    /// A file cannot be read or written, or holds something other than it must.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The bundle's format is not this build's.
    #[error("{}: expected bundle format {supported}, found {found}: {action}", path.display())]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Version that the bundle states.
        found: FormatVersion,
        /// Version that this build reads.
        supported: FormatVersion,
        /// Which side to upgrade.
        action: &'static str,
    },
    /// A file is not the one that the manifest lists.
    #[error("{}: expected {what} {expected} as manifest.json says, found {found}: {hint}", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What differs: `length` or `sha256`.
        what: &'static str,
        /// What the manifest says.
        expected: String,
        /// What the file has.
        found: String,
        /// What to do.
        hint: String,
    },
    /// A file or a part is not there.
    #[error("{}: no {what}: {hint}", path.display())]
    Missing {
        /// The bundle or file.
        path: PathBuf,
        /// What is missing.
        what: String,
        /// What there is instead, or the command that makes it.
        hint: String,
    },
}

impl BundleError {
    /// Builds an [`InputError::Invalid`] error.
    pub(crate) fn invalid(
        path: impl Into<PathBuf>,
        location: Location,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        InputError::invalid(path, location, expected, found).into()
    }
}

/// A value that fails a check: its key, what was expected, what was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckError {
    /// Dotted path of the key.
    pub key: String,
    /// What must stand there.
    pub expected: String,
    /// What stands there.
    pub found: String,
}

impl CheckError {
    /// Builds the error.
    pub fn new(key: impl Into<String>, expected: impl Into<String>, found: impl Display) -> Self {
        Self { key: key.into(), expected: expected.into(), found: found.to_string() }
    }

    /// The same error with `prefix.` before its key.
    #[must_use]
    pub fn under(mut self, prefix: &str) -> Self {
        self.key = format!("{prefix}.{}", self.key);
        self
    }

    /// The same error at a file.
    #[must_use]
    pub fn at(self, path: impl Into<PathBuf>) -> InputError {
        InputError::invalid(path, Location::Key(self.key), self.expected, self.found)
    }
}

/// Passes a finite number from 0 up.
///
/// # Errors
/// Names the key.
pub fn check_non_negative(key: &str, value: f64) -> Result<(), CheckError> {
    if value.is_finite() && value >= 0.0 {
        Ok(())
    } else {
        Err(CheckError::new(key, "a finite number from 0", value))
    }
}

/// Passes a finite number above 0.
///
/// # Errors
/// Names the key.
pub fn check_positive(key: &str, value: f64) -> Result<(), CheckError> {
    if value.is_finite() && value > 0.0 {
        Ok(())
    } else {
        Err(CheckError::new(key, "a finite number above 0", value))
    }
}

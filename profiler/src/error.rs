//! What can go wrong while measuring.

use plumbline_bundles::BundleError;
use plumbline_schema::{InputError, Operator, OperatorShape};
use thiserror::Error;

/// A failed measurement, with what it was about.
#[derive(Debug, Error)]
pub enum ProfileError {
    /// There is no GPU to measure, or a library it needs cannot be loaded.
    #[error("no usable device: {reason}")]
    NoDevice {
        /// Which library or driver call failed, and how.
        reason: String,
    },
    /// A kernel does not compile.
    #[error("kernel `{kernel}` does not compile with {options}: {log}")]
    Compile {
        /// Source file.
        kernel: String,
        /// Compiler options.
        options: String,
        /// The compiler's log.
        log: String,
    },
    /// An operator cannot run at a shape.
    #[error("{operator} at {shape:?}: {reason}")]
    Operator {
        /// The operator.
        operator: Operator,
        /// The shape.
        shape: OperatorShape,
        /// What failed.
        reason: String,
        /// Whether later measurements on the same device are pointless.
        fatal: bool,
    },
    /// A device call outside of an operator failed.
    #[error("{call}: {reason}")]
    Device {
        /// What was called.
        call: String,
        /// The driver's reason.
        reason: String,
    },
    /// A kernel's result is wrong.
    #[error(
        "{operator} at {shape:?} is wrong: relative error {relative_error:.3e}, at most {tolerance:.1e} passes"
    )]
    Wrong {
        /// The operator.
        operator: Operator,
        /// The shape.
        shape: OperatorShape,
        /// Error found.
        relative_error: f64,
        /// Largest error that passes.
        tolerance: f64,
    },
    /// The journal cannot be written: measuring on would lose what it finds.
    #[error("the journal {} cannot be written: {source}; free some space, then go on with `--resume`", path.display())]
    Journal {
        /// The journal.
        path: std::path::PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A bundle cannot be written.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A file cannot be read or written.
    #[error(transparent)]
    Input(#[from] InputError),
}

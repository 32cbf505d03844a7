//! Why an engine cannot start or go on.

use std::path::PathBuf;

use plumbline_profiler::{ProfileError, cuda::driver::CudaError};
use plumbline_schema::InputError;
use thiserror::Error;

/// Why an engine cannot start or go on.
#[derive(Debug, Error)]
pub enum EngineError {
    /// A file cannot be used.
    #[error(transparent)]
    Input(#[from] InputError),
    /// There is no GPU to run on, or none that the kernels run on.
    #[error("{0}")]
    NoDevice(String),
    /// A tensor of a checkpoint is not what the model needs.
    #[error("{}: tensor `{name}`: expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file, or the folder where no file has the tensor.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// What the model needs.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The GPU's memory does not hold it.
    #[error(
        "{what} needs {:.2} GiB of GPU memory, {:.2} GiB are left: {advice}",
        gib(*needed_bytes),
        gib(*available_bytes)
    )]
    OutOfMemory {
        /// What was to be stored.
        what: &'static str,
        /// Bytes it needs.
        needed_bytes: u64,
        /// Bytes there are.
        available_bytes: u64,
        /// What would help.
        advice: &'static str,
    },
    /// The engine does not serve what it is asked for.
    #[error("expected {expected}, found {found}")]
    Unsupported {
        /// What it serves.
        expected: String,
        /// What was asked for.
        found: String,
    },
    /// A call failed while the engine ran.
    #[error("the GPU failed: {0}")]
    Device(CudaError),
    /// Somebody asked it to stop.
    #[error("interrupted")]
    Interrupted,
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

impl From<CudaError> for EngineError {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::Unsupported(found) => {
                Self::Unsupported { expected: "shapes that the kernels cover".to_owned(), found }
            }
            error => Self::Device(error),
        }
    }
}

impl From<ProfileError> for EngineError {
    fn from(error: ProfileError) -> Self {
        Self::NoDevice(error.to_string())
    }
}

//! The profiler: the operators of the forward pass on a GPU, their timing, the evidence and the plan.
//!
//! Start with [`device`] (the seam: what can be measured), then [`mod@profile`] (the run) and [`plan`] (which
//! points). [`evidence`] reads the GPU's state through NVML.
//!
//! `cuda/` drives a real GPU, [`fake`] a device with a known law; both stand behind [`device::Device`].

pub mod cuda;
pub mod device;
pub mod error;
pub mod evidence;
pub mod fake;
pub mod host;
pub mod plan;
pub mod profile;
pub mod reference;

pub use cuda::CudaDevice;
pub use device::{ActivityTimes, CheckReport, CrossCheckOutcome, Device, Measurement, Point, StoppingRule};
pub use error::ProfileError;
pub use evidence::NvmlMonitor;
pub use fake::FakeDevice;
pub use plan::{Envelope, Gap, OperatorPoints, Plan, PlanSummary, PlannedPoint, PointSource, Uncovered};
pub use profile::{ProfileOptions, ProfileOutcome, Progress, Stage, profile};

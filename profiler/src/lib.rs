//! The profiler: the operators of the forward pass on a GPU, their timing, the evidence and the plan.
//!
//! Start with [`device`] (the seam: what can be measured), then [`mod@profile`] (the run), [`plan`] (which points) and
//! [`quality`] (which measurements are doubted). [`evidence`] reads the GPU's state through NVML, [`journal`] keeps
//! every result the moment it is there, [`advisor`] is asked what to measure next.
//!
//! `cuda/` drives a real GPU, [`fake`] a device with a known law; both stand behind [`device::Device`].

pub mod advisor;
pub mod cuda;
pub mod device;
pub mod error;
pub mod evidence;
pub mod fake;
pub mod host;
pub mod journal;
pub mod plan;
pub mod profile;
pub mod quality;
pub mod reference;
mod results;
mod rounds;
mod run;
mod second_look;

pub use advisor::{Advisor, choose};
pub use cuda::CudaDevice;
pub use device::{ActivityTimes, CheckReport, CrossCheckOutcome, Device, Measurement, Point, StoppingRule};
pub use error::ProfileError;
pub use evidence::NvmlMonitor;
pub use fake::FakeDevice;
pub use plan::{Envelope, Gap, OperatorPoints, Plan, PlanSummary, PlannedPoint, PointSource, Uncovered};
pub use profile::{ProfileOptions, ProfileOutcome, Progress, Stage, profile};

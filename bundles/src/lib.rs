//! The bundle format: what one machine can do, as files.
//!
//! Start with [`bundle`] (opening, verifying and writing a folder), [`predictor`] (from a shape to a time with
//! its provenance) and [`engine_profile`] (how an engine spends it).

pub mod bundle;
pub mod curve;
pub mod diff;
pub mod efficiency;
pub mod engine_profile;
pub mod error;
pub mod evidence;
pub mod export;
pub mod features;
pub mod forest;
pub mod host;
pub mod import;
pub mod inspect;
pub mod lint;
pub mod manifest;
pub mod predictor;
pub mod samples;
pub mod stats;
pub mod surface;
pub mod verify;

mod parallel;

pub use bundle::{Bundle, BundleWriter};
pub use curve::{CurveError, CurvePoint};
pub use diff::BundleDiff;
pub use efficiency::Efficiency;
pub use engine_profile::{Dispatch, DispatchCosts, EngineProfile, HostCost};
pub use error::{BundleError, CheckError};
pub use evidence::{CrossCheck, DeviceIdentity, Evidence, GpuState};
pub use forest::{Forest, Tree};
pub use host::HostCosts;
pub use inspect::Inspection;
pub use lint::{LintOptions, LintReport, lint};
pub use manifest::{FormatVersion, Manifest};
pub use predictor::{
    CompiledPredictors, OperatorPredictor, OutOfDomain, PredictError, Prediction, Predictors,
    PredictorsError, Provenance,
};
pub use samples::{CacheState, Sample, StopReason};
pub use stats::TimeStats;
pub use surface::SurfaceDiff;
pub use verify::VerifyReport;

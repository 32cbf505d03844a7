//! A real GPU behind [`crate::device::Device`]: the driver, run-time compilation, cuBLASLt and the operators.
//!
//! Start with [`CudaDevice`]; then [`launch`] (operands to launches), `operands` (what a timed launch works on),
//! `timing` (how it is timed), `activity` (how it is timed a second way, by `cupti`'s records) and `check` (how it is
//! compared with `crate::reference`).
//!
//! What an engine needs to run the very kernels that are timed here is public: [`driver`], [`kernels`], [`gemm`],
//! [`attention`] and [`launch`].

mod activity;
pub mod attention;
mod ceilings;
mod check;
mod compile;
mod cupti;
mod device;
pub mod driver;
pub mod gemm;
mod host;
pub mod kernels;
pub mod launch;
mod libraries;
mod memory;
mod operands;
mod timing;

pub use activity::RecordedWay;
pub use compile::{Compiled, KernelSource, compile, kernel_hash, supported_architectures};
pub use device::CudaDevice;
pub use libraries::{load_nvrtc_from, nvrtc_is_present, require_all as require_libraries};

//! Evidence: what proves that a number was measured on a GPU in a known state.

use serde::{Deserialize, Serialize};

/// The machine a bundle was measured on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceIdentity {
    /// Name as the driver gives it.
    pub device_name: String,
    /// Compute capability times ten.
    pub compute_capability: u32,
    /// Streaming multiprocessors present.
    pub num_sms: u32,
    /// L2 cache, bytes.
    pub l2_bytes: u64,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Driver version; `None` when NVML did not say.
    pub driver_version: Option<String>,
    /// CUDA version of the driver, as 13000 for 13.0.
    pub cuda_driver_version: i32,
    /// NVRTC version, as `13.0`.
    pub nvrtc_version: String,
    /// cuBLASLt version number.
    pub cublaslt_version: u64,
    /// Whether ECC is on; `None` when not known.
    pub ecc: Option<bool>,
    /// Whether MIG is on; `None` when not known.
    pub mig: Option<bool>,
    /// SHA-256 over kernel sources and compile options, hex.
    pub kernel_hash: String,
}

/// One reading of a GPU's state; `None` where NVML did not say.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GpuState {
    /// Milliseconds since the profile began.
    pub at_ms: u64,
    /// SM clock, MHz.
    pub sm_clock_mhz: Option<u32>,
    /// Memory clock, MHz.
    pub memory_clock_mhz: Option<u32>,
    /// Temperature, degrees C.
    pub temperature_c: Option<u32>,
    /// Board power, W.
    pub power_w: Option<f64>,
    /// Energy since the driver was loaded, J.
    pub energy_j: Option<f64>,
    /// Throttle reasons that reduce clocks, by NVML's names; empty when none.
    pub throttle_reasons: Vec<String>,
}

/// NVML readings before, during and after a profile, and what went wrong on the way.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// Before the first measurement.
    pub before: GpuState,
    /// About once a second while measuring.
    pub during: Vec<GpuState>,
    /// After the last measurement.
    pub after: GpuState,
    /// Largest memory bandwidth seen in a device copy (bytes read plus written), bytes/s.
    pub copy_bandwidth_bytes_per_s: Option<f64>,
    /// Largest rate seen in a large bf16 matrix product, FLOP/s.
    pub matmul_flops_per_s: Option<f64>,
    /// What could not be read or measured, in words.
    pub notes: Vec<String>,
}

//! What a GPU is by its data sheet: the ceilings that no measured time may beat.

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// A GPU's data sheet, the source of every roofline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuSpec {
    /// Plumbline's name, as bundles use it: `h100-sxm5-80gb`.
    pub name: String,
    /// Compute capability times ten: 80 for A100, 90 for H100 and H200.
    pub compute_capability: u32,
    /// Number of streaming multiprocessors enabled.
    pub num_sms: u32,
    /// Dense bf16 tensor-core peak at boost clock, FLOP/s.
    pub bf16_flops_per_s: f64,
    /// fp32 peak outside tensor cores, FLOP/s.
    pub fp32_flops_per_s: f64,
    /// Memory bandwidth, bytes/s.
    pub hbm_bandwidth_bytes_per_s: f64,
    /// Memory size.
    pub hbm_bytes: Bytes,
    /// L2 cache size.
    pub l2_bytes: Bytes,
    /// SM clock behind the stated peaks, MHz.
    pub boost_clock_mhz: u32,
    /// Highest SM clock the chip reaches, MHz; the compute floor is taken at this clock.
    pub max_clock_mhz: u32,
    /// Board power limit, W.
    pub power_limit_w: u32,
}

impl GpuSpec {
    /// The shipped specs: A100-SXM4-80GB, H100-SXM5-80GB, H200-SXM-141GB.
    ///
    /// Sources: NVIDIA A100 data sheet (June 2021: 312 TFLOP/s bf16 dense, 19.5 TFLOP/s fp32,
    /// 2,039 GB/s, 40 MB L2, 1,410 MHz, 400 W), H100 data sheet (989.4 TFLOP/s bf16 dense,
    /// 66.9 TFLOP/s fp32, 3.35 TB/s, 50 MB L2, 700 W) and H200 data sheet (the same chip with
    /// 141 GB at 4.8 TB/s). H100's stated peak is 132 SMs x 4,096 FLOP x 1,830 MHz, yet its SMs run
    /// at up to 1,980 MHz, so rooflines scale the compute peaks by `max_clock / boost_clock`.
    #[must_use]
    pub fn shipped() -> Vec<Self> {
        vec![
            Self {
                name: "a100-sxm4-80gb".into(),
                compute_capability: 80,
                num_sms: 108,
                bf16_flops_per_s: 312e12,
                fp32_flops_per_s: 19.5e12,
                hbm_bandwidth_bytes_per_s: 2.039e12,
                hbm_bytes: Bytes(80 << 30),
                l2_bytes: Bytes(40 << 20),
                boost_clock_mhz: 1410,
                max_clock_mhz: 1410,
                power_limit_w: 400,
            },
            Self {
                name: "h100-sxm5-80gb".into(),
                compute_capability: 90,
                num_sms: 132,
                bf16_flops_per_s: 989.4e12,
                fp32_flops_per_s: 66.9e12,
                hbm_bandwidth_bytes_per_s: 3.35e12,
                hbm_bytes: Bytes(80 << 30),
                l2_bytes: Bytes(50 << 20),
                boost_clock_mhz: 1830,
                max_clock_mhz: 1980,
                power_limit_w: 700,
            },
            Self {
                name: "h200-sxm-141gb".into(),
                compute_capability: 90,
                num_sms: 132,
                bf16_flops_per_s: 989.4e12,
                fp32_flops_per_s: 66.9e12,
                hbm_bandwidth_bytes_per_s: 4.8e12,
                hbm_bytes: Bytes(141_000_000_000),
                l2_bytes: Bytes(60 << 20),
                boost_clock_mhz: 1830,
                max_clock_mhz: 1980,
                power_limit_w: 700,
            },
        ]
    }

    /// A shipped spec by name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::shipped().into_iter().find(|spec| spec.name == name)
    }

    /// The shipped spec for a device as the driver names it (`NVIDIA H100 80GB HBM3`).
    #[must_use]
    pub fn by_device_name(device_name: &str) -> Option<Self> {
        let known = [
            ("A100-SXM4-80GB", "a100-sxm4-80gb"),
            ("H100 80GB HBM3", "h100-sxm5-80gb"),
            ("H200", "h200-sxm-141gb"),
        ];
        let (_, name) = known.iter().find(|(part, _)| device_name.contains(part))?;
        Self::by_name(name)
    }
}

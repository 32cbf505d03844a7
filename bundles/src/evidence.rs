//! Evidence: what proves that a number was measured on a GPU in a known state.

use plumbline_schema::{GpuSpec, Operator, OperatorShape};
use serde::{Deserialize, Serialize};

use crate::{samples::CacheState, stats::percentile_of_sorted};

/// Times of two clocks that differ by at most this share agree.
const MAX_RELATIVE_DIFFERENCE: f64 = 0.02;

/// Or by at most this, ns: what an event's resolution and the tracing of a kernel may come to.
const MAX_DIFFERENCE_NS: f64 = 500.0;

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
    /// Median memory bandwidth of a large device copy (bytes read plus written), bytes/s.
    pub copy_bandwidth_bytes_per_s: Option<f64>,
    /// Median rate of a large bf16 matrix product, each after a rest, FLOP/s.
    pub matmul_flops_per_s: Option<f64>,
    /// What could not be read or measured, in words.
    pub notes: Vec<String>,
    /// Points timed by the GPU's activity records as well; empty where none were, as in older bundles.
    #[serde(default)]
    pub cross_checks: Vec<CrossCheck>,
    /// Compute-bound points timed again under a load that lasts; empty where none were, as in older bundles.
    #[serde(default)]
    pub sustained: Vec<Sustained>,
}

/// A compute-bound point timed in a burst, as samples are, and again after the same launches have run for a while: what
/// the power limit takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sustained {
    /// The operator.
    pub operator: Operator,
    /// The numbers of its shape, in the order of the columns of its samples.
    pub shape: Vec<u64>,
    /// Median time of a launch in a burst, ns: that of the sample.
    pub burst_p50_ns: f64,
    /// Median time of a launch after the load, ns.
    pub sustained_p50_ns: f64,
    /// SM clock after the load, MHz; `None` when not known.
    pub sm_clock_mhz: Option<u32>,
    /// Board power after the load, W; `None` when not known.
    pub power_w: Option<f64>,
}

/// How many times longer launches bound by arithmetic take under a lasting load than in a burst, at least 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SustainedSlowdown {
    /// Matrix products.
    pub gemm: f64,
    /// Attention.
    pub attention: f64,
}

impl Default for SustainedSlowdown {
    /// None.
    fn default() -> Self {
        Self { gemm: 1.0, attention: 1.0 }
    }
}

impl SustainedSlowdown {
    /// The medians over the points that are bound by arithmetic on `gpu`; 1 where there are none.
    #[must_use]
    pub fn of(sustained: &[Sustained], gpu: &GpuSpec) -> Self {
        let median = |is_of: fn(Operator) -> bool| {
            let is_judged = |s: &&Sustained| {
                let shape = OperatorShape::from_values(s.operator, &s.shape);
                is_of(s.operator) && shape.is_some_and(|shape| is_bound_by_arithmetic(&shape, gpu))
            };
            let points = sustained.iter().filter(is_judged);
            let mut ratios: Vec<f64> = points.map(|s| s.sustained_p50_ns / s.burst_p50_ns).collect();
            ratios.sort_by(f64::total_cmp);
            if ratios.is_empty() { 1.0 } else { percentile_of_sorted(&ratios, 0.5).max(1.0) }
        };
        Self {
            gemm: median(Operator::is_gemm),
            attention: median(|operator| operator == Operator::Attention),
        }
    }

    /// The factor of a launch: 1 unless it is bound by arithmetic on `gpu`.
    #[must_use]
    pub fn factor(self, operator: Operator, shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
        let factor = match operator {
            Operator::Attention => self.attention,
            operator if operator.is_gemm() => self.gemm,
            _ => return 1.0,
        };
        if is_bound_by_arithmetic(shape, gpu) { factor } else { 1.0 }
    }
}

/// Whether the arithmetic of a launch takes longer than its bytes, each at the data sheet's rate.
fn is_bound_by_arithmetic(shape: &OperatorShape, gpu: &GpuSpec) -> bool {
    let compute_s = shape.flops().0 as f64 / gpu.bf16_flops_per_s;
    compute_s >= shape.bytes().0 as f64 / gpu.hbm_bandwidth_bytes_per_s
}

/// A point timed twice: by events around many launches, as samples are, and by each kernel's own start and end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CrossCheck {
    /// The operator.
    pub operator: Operator,
    /// The numbers of its shape, in the order of the columns of its samples.
    pub shape: Vec<u64>,
    /// State of the L2 cache.
    pub cache: CacheState,
    /// Median time of a launch as the profiler takes it, ns: from its start to the next one's.
    pub event_p50_ns: f64,
    /// Median over the runs of a launch's kernels, each from its own start to its own end, added up, ns.
    pub activity_duration_p50_ns: f64,
    /// Median time from a launch's first kernel to the next launch's by the records, ns; `None` where launches did
    /// not follow one another without a pause.
    pub activity_period_p50_ns: Option<f64>,
    /// Median time of a launch by events during the run that the records are of, ns. What it exceeds `event_p50_ns`
    /// by is what recording costs, and the period has it too. `None` where no events were recorded.
    pub recorded_event_p50_ns: Option<f64>,
    /// Time between two kernels that follow each other, which `event_p50_ns` includes, ns; as `kernel_gap_ns`.
    pub gap_ns: f64,
    /// Whether the two clocks agree, see [`CrossCheck::times_agree`].
    pub agrees: bool,
}

impl CrossCheck {
    /// Compares the times of a point, all in ns; see the fields.
    #[must_use]
    pub fn new(
        (operator, shape, cache): (Operator, &OperatorShape, CacheState),
        event_p50_ns: f64,
        activity_duration_p50_ns: f64,
        activity_period_p50_ns: Option<f64>,
        recorded_event_p50_ns: Option<f64>,
        gap_ns: f64,
    ) -> Self {
        let expected_ns = activity_period_p50_ns.unwrap_or(activity_duration_p50_ns + gap_ns);
        Self {
            operator,
            shape: shape.values(),
            cache,
            event_p50_ns,
            activity_duration_p50_ns,
            activity_period_p50_ns,
            recorded_event_p50_ns,
            gap_ns,
            agrees: Self::times_agree(event_p50_ns, expected_ns),
        }
    }

    /// Whether a time by events agrees with what the records let expect: the period or, without one, the kernels'
    /// duration and a gap. They may differ by 2 % of the time by events or by 500 ns, whichever is more.
    #[must_use]
    pub fn times_agree(event_ns: f64, expected_ns: f64) -> bool {
        (event_ns - expected_ns).abs() <= MAX_DIFFERENCE_NS.max(MAX_RELATIVE_DIFFERENCE * event_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cross_check(event_ns: f64, duration_ns: f64, period_ns: Option<f64>) -> CrossCheck {
        let shape = OperatorShape::Gemm { m: 8, n: 4096, k: 1024 };
        let point = (Operator::OProj, &shape, CacheState::Cold);
        CrossCheck::new(point, event_ns, duration_ns, period_ns, None, 900.0)
    }

    #[test]
    fn a_short_launch_may_differ_by_half_a_microsecond_and_a_long_one_by_two_percent() {
        assert!(cross_check(3_000.0, 0.0, Some(3_500.0)).agrees);
        assert!(!cross_check(3_000.0, 0.0, Some(3_501.0)).agrees);
        assert!(!cross_check(3_000.0, 0.0, Some(2_499.0)).agrees);
        assert!(cross_check(1e6, 0.0, Some(1.02e6)).agrees);
        assert!(!cross_check(1e6, 0.0, Some(1.0201e6)).agrees);
        assert!(!cross_check(f64::NAN, 0.0, Some(1e6)).agrees);
    }

    #[test]
    fn without_a_period_the_duration_and_a_gap_stand_for_it() {
        assert!(cross_check(3_000.0, 2_100.0, None).agrees);
        assert!(!cross_check(3_000.0, 3_000.0, None).agrees);
        assert!(!cross_check(3_000.0, 2_100.0, Some(2_100.0)).agrees, "a period is used where there is one");
    }

    #[test]
    fn a_lasting_load_slows_what_is_bound_by_arithmetic() {
        let gpu = GpuSpec::shipped().into_iter().find(|gpu| gpu.name == "h100-sxm5-80gb").unwrap();
        let point = |operator, shape: &[u64], ratio: f64| Sustained {
            operator,
            shape: shape.to_vec(),
            burst_p50_ns: 1000.0,
            sustained_p50_ns: 1000.0 * ratio,
            sm_clock_mhz: None,
            power_w: None,
        };
        let points = [
            point(Operator::GateUpProj, &[2048, 28_672, 4096], 1.12),
            point(Operator::DownProj, &[4096, 4096, 14_336], 1.06),
            point(Operator::LmHead, &[8, 128_256, 4096], 3.0),
        ];
        let slowdown = SustainedSlowdown::of(&points, &gpu);
        assert!((slowdown.gemm - 1.09).abs() < 1e-9, "{slowdown:?}");
        assert!((slowdown.attention - 1.0).abs() < 1e-12, "nothing is known of attention");
        let factor = |m| slowdown.factor(Operator::OProj, &OperatorShape::Gemm { m, n: 4096, k: 4096 }, &gpu);
        assert!((factor(4096) - 1.09).abs() < 1e-9 && (factor(8) - 1.0).abs() < 1e-12);
        assert_eq!(SustainedSlowdown::of(&[], &gpu), SustainedSlowdown::default());
    }

    #[test]
    fn evidence_of_older_bundles_has_no_cross_checks() {
        let mut evidence = Evidence::default();
        let mut json = serde_json::to_value(&evidence).unwrap();
        json.as_object_mut().unwrap().remove("cross_checks");
        assert_eq!(serde_json::from_value::<Evidence>(json).unwrap(), evidence);
        evidence.cross_checks.push(cross_check(3_000.0, 2_100.0, Some(3_100.0)));
        assert_eq!(evidence.cross_checks[0].shape, [8, 4096, 1024]);
        let text = serde_json::to_string(&evidence).unwrap();
        assert_eq!(serde_json::from_str::<Evidence>(&text).unwrap(), evidence);
    }
}

//! The seam between what is measured and what measures: a GPU through CUDA, or a fake with a known law.

use std::{collections::BTreeSet, time::Duration};

use plumbline_bundles::{CacheState, DeviceIdentity, GpuState, HostCosts, Sample, StopReason, TimeStats};
use plumbline_schema::{GpuSpec, Operator, OperatorShape, StepBatch};
use serde::{Deserialize, Serialize};

use crate::{error::ProfileError, evidence::NvmlMonitor};

/// One point of the plan: an operator at a shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Point {
    /// Which operator.
    pub operator: Operator,
    /// Shape of the launch.
    pub shape: OperatorShape,
    /// The very sequences of an attention launch; `None` for other operators.
    pub batch: Option<StepBatch>,
}

/// When to stop repeating a measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StoppingRule {
    /// At least this many samples.
    pub min_samples: u32,
    /// At most this many samples.
    pub max_samples: u32,
    /// Stop once the standard error of the mean is below this share of the mean.
    pub max_relative_error: f64,
    /// Stop after this long, ns.
    pub time_limit_ns: u64,
    /// Run the point's own launches for this long before the first sample, ns: clocks are then those it sustains.
    pub warm_up_ns: u64,
    /// Rest for this long before each sample, ns, or for ten times as long as it takes: clocks are then those of a
    /// launch on its own. 0 takes samples back to back.
    pub pause_ns: u64,
}

/// How long the GPU rests before a sample of a launch that draws much power, ns.
///
/// Back to back, such launches draw more power than the board may: clocks sink within a millisecond, how far depends on the
/// chip and on what ran before.
pub const PAUSE_NS: u64 = 12_000_000;

impl Default for StoppingRule {
    /// At least 10 and at most 60 samples, until the mean is known to 0.5 %, for at most 100 ms; no warm-up
    /// of its own and no pauses.
    fn default() -> Self {
        Self {
            min_samples: 10,
            max_samples: 60,
            max_relative_error: 0.005,
            time_limit_ns: 100_000_000,
            warm_up_ns: 0,
            pause_ns: 0,
        }
    }
}

impl StoppingRule {
    /// Standard error of the mean as a share of the mean; infinite for fewer than two samples.
    #[must_use]
    pub fn relative_error(stats: &TimeStats) -> f64 {
        if stats.n < 2 { f64::INFINITY } else { stats.std_ns / f64::from(stats.n).sqrt() / stats.mean_ns }
    }

    /// Whether these samples are enough.
    #[must_use]
    pub fn is_met_by(&self, stats: &TimeStats) -> bool {
        stats.n >= self.min_samples && Self::relative_error(stats) <= self.max_relative_error
    }
}

/// A measured time and what ran.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    /// GPU time of one launch, launched back to back, gap included.
    pub stats: TimeStats,
    /// The times themselves, ns, in the order in which they were taken.
    pub times_ns: Vec<f64>,
    /// The GPU right before the first time was taken, warmed up.
    pub before: GpuState,
    /// The GPU right after the last.
    pub after: GpuState,
    /// Kernel and configuration, or the library's algorithm.
    pub kernel: String,
    /// Why the repetition ended.
    pub stop: StopReason,
}

impl Measurement {
    /// The sample of a point measured so, at the first attempt and without flags.
    #[must_use]
    pub fn into_sample(self, point: &Point, cache: CacheState) -> Sample {
        let throttle: BTreeSet<&str> = [&self.before, &self.after]
            .iter()
            .flat_map(|state| state.throttle_reasons.iter().map(String::as_str))
            .collect();
        Sample {
            batch: point.batch.clone(),
            cache,
            stop: Some(self.stop),
            sm_clock_mhz: self.after.sm_clock_mhz,
            memory_clock_mhz: self.after.memory_clock_mhz,
            power_w: self.after.power_w,
            throttle: throttle.into_iter().collect::<Vec<_>>().join("|"),
            kernel: self.kernel,
            ..Sample::bare(point.operator, point.shape, self.stats)
        }
    }
}

/// How a numeric check against the f64 reference went.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CheckReport {
    /// `||out - reference|| / ||reference||` over all outputs, or the share of wrong indices.
    pub relative_error: f64,
    /// The largest error that passes.
    pub tolerance: f64,
}

impl CheckReport {
    /// Whether the output is right; NaN is not.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.relative_error <= self.tolerance
    }
}

/// Rates reached in the run itself, against which operators are judged.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Large device copy, bytes read plus written, bytes/s.
    pub copy_bandwidth_bytes_per_s: f64,
    /// Large bf16 matrix product on random data, FLOP/s.
    pub matmul_flops_per_s: f64,
}

/// Times of a launch from the device's own record of each kernel's start and end.
///
/// A number here is the mean over the launches of one uninterrupted run, as a measured sample is; the statistics are
/// over several runs.
#[derive(Clone, Debug, PartialEq)]
pub struct ActivityTimes {
    /// The launch's kernels, each from its start to its end, added up.
    pub duration: TimeStats,
    /// From a launch's first kernel to the next launch's; `None` where a run was one launch.
    ///
    /// Recording makes the gaps between kernels longer, so this is at least what the launch takes unrecorded.
    pub period: Option<TimeStats>,
    /// The same runs timed by events around them, recording and all; `None` where none were placed.
    pub event: Option<TimeStats>,
    /// Kernels of one launch; more than one for chunks and decodes together, or a product in parts and their sum.
    pub num_kernels_per_launch: f64,
    /// Their names, in order.
    pub kernel_names: Vec<String>,
}

/// How a cross-check of a point went.
#[derive(Clone, Debug, PartialEq)]
pub enum CrossCheckOutcome {
    /// The device recorded its kernels.
    Times(ActivityTimes),
    /// It could not; nothing is wrong with the point's measured time.
    Unavailable {
        /// Why, in words.
        reason: String,
    },
}

/// Something whose operators can be measured.
pub trait Device {
    /// What the device is.
    fn identity(&self) -> &DeviceIdentity;

    /// Its data sheet.
    fn spec(&self) -> &GpuSpec;

    /// Clocks, power and the like at this moment; fields that cannot be read are `None`.
    fn state(&mut self) -> GpuState;

    /// Time since the device was opened: a fake device's is made up, so that runs on it repeat exactly.
    fn elapsed(&self) -> Duration;

    /// What a reader of its measurements should know of the device, in words: a part of a GPU, readings not permitted.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// What reads the device's state from another thread while it measures; `None` where nothing can.
    fn monitor(&self) -> Option<NvmlMonitor> {
        None
    }

    /// Compares the operator with an f64 reference on fresh random inputs at a shape small enough for a CPU.
    ///
    /// # Errors
    /// When it cannot run; a wrong result is a report that did not pass.
    fn check(&mut self, point: &Point) -> Result<CheckReport, ProfileError>;

    /// Times the operator at the point, once the clocks have recovered from what ran before.
    ///
    /// # Errors
    /// When it cannot run: out of memory, a failing kernel. The device stays usable unless the error says not.
    fn measure(
        &mut self,
        point: &Point,
        cache: CacheState,
        rule: &StoppingRule,
    ) -> Result<Measurement, ProfileError>;

    /// Times the point a second way, by the device's own record of each kernel's start and end.
    ///
    /// Recording may leave traces in the driver, so a run cross-checks after it has measured. Whatever stands in the
    /// way of recording is an outcome and no error.
    ///
    /// # Errors
    /// When the device is lost.
    fn cross_check(
        &mut self,
        _point: &Point,
        _cache: CacheState,
        _pause_ns: u64,
    ) -> Result<CrossCheckOutcome, ProfileError> {
        Ok(CrossCheckOutcome::Unavailable { reason: "this device keeps no record of its kernels".into() })
    }

    /// Measures the ceilings.
    ///
    /// # Errors
    /// When they cannot run.
    fn ceilings(&mut self) -> Result<Ceilings, ProfileError>;

    /// Measures what it costs this host to drive the device.
    ///
    /// # Errors
    /// When it cannot run.
    fn host_costs(&mut self) -> Result<HostCosts, ProfileError>;
}

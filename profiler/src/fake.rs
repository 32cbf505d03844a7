//! A device with a known law: drives profile, train and simulate without a GPU, and shows whether training
//! recovers what is true.
//!
//! The law, per launch: `overhead + max(compute, memory)` in ns.
//!
//! - Compute: `flops / (peak * 0.75)`. A GEMM runs in waves of 128 x 128 tiles on all multiprocessors; its compute
//!   time grows by `(waves * num_sms / tiles)^0.3`, the mild form of wave quantisation.
//! - Memory: `bytes / (bandwidth * 0.85)`, and 0.4 times that for what stays in the L2 cache: hot operands of up to a
//!   quarter of its size, and of larger ones a share that falls to none at its whole size.
//! - Attention: prefills and decodes follow one another, each the larger of its compute and memory time; decodes
//!   take at least what the longest one needs on its own, [`DECODE_NS_PER_KEY`] a key.
//!
//! A measured time is the law times log-normal noise, which depends on seed, point and cache state only: neither
//! order nor repetition changes it.

use std::time::Duration;

use plumbline_bundles::{
    CacheState, DeviceIdentity, GpuState, HostCosts, StopReason, TimeStats,
    bundle::sha256_hex,
    host::{
        AfterIdleCost, CopyCost, CopyTimes, CpuState, EventCosts, GraphLaunchCost, InputCopyCost,
        LaunchArgumentsCost, LaunchRowCost, ScoreSpread,
    },
};
use plumbline_schema::{Bytes, GpuSpec, Operator, OperatorShape, roofline::floor_ns};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::{
    device::{
        ActivityTimes, Ceilings, CheckReport, CrossCheckOutcome, Device, Measurement, Point, StoppingRule,
    },
    error::ProfileError,
};

/// Share of the compute peak that a full wave reaches.
const COMPUTE_EFFICIENCY: f64 = 0.75;

/// Share of the memory bandwidth that a launch reaches.
const MEMORY_EFFICIENCY: f64 = 0.85;

/// Memory time of operands in the L2 cache, against memory.
const HOT_FACTOR: f64 = 0.4;

/// Rows and columns of a GEMM tile.
const TILE: u32 = 128;

/// How strongly an incomplete wave shows.
const WAVE_EXPONENT: f64 = 0.3;

/// What the longest decode of a batch takes for each key, ns.
pub const DECODE_NS_PER_KEY: f64 = 1.5;

/// Fixed time of every launch, ns.
pub const OVERHEAD_NS: f64 = 1800.0;

/// What measuring a point takes on the device's own clock, beside the launches themselves.
pub const POINT_COST: Duration = Duration::from_millis(20);

/// Standard deviation of the logarithm of a measured time.
pub const DEFAULT_NOISE: f64 = 0.01;

/// Something that goes wrong on purpose.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// Measuring the operator fails where its shape's first number is at least `from`.
    Fails {
        /// The operator.
        operator: Operator,
        /// Least first number of the shape that fails: tokens, rows or sequences (attention: query heads).
        from: u64,
        /// Whether the device is unusable afterwards.
        fatal: bool,
    },
    /// Every launch that touches more bytes than this is out of memory.
    OutOfMemory {
        /// Largest number of bytes that fits.
        num_bytes: u64,
    },
    /// The operator's results are wrong.
    Wrong {
        /// The operator.
        operator: Operator,
    },
    /// The state shows a throttle reason around measurements of the operator.
    Throttled {
        /// The operator.
        operator: Operator,
        /// Attempts at each point that it lasts for.
        attempts: u32,
    },
    /// The SM clock drops while the operator is measured.
    ClockShifted {
        /// The operator.
        operator: Operator,
        /// Attempts at each point that it lasts for.
        attempts: u32,
    },
    /// Every other time of the operator is a fifth longer.
    Bimodal {
        /// The operator.
        operator: Operator,
        /// Attempts at each point that it lasts for.
        attempts: u32,
    },
    /// The process is as good as killed: the measurement of this many points succeeds, the next one ends the run.
    Stops {
        /// Points measured before.
        after: u64,
    },
    /// The operator's measured times lie under the physical floor.
    BelowFloor {
        /// The operator.
        operator: Operator,
    },
}

/// A made-up device whose times follow the law that this module states.
#[derive(Clone, Debug)]
pub struct FakeDevice {
    identity: DeviceIdentity,
    spec: GpuSpec,
    seed: u64,
    noise: f64,
    faults: Vec<Fault>,
    notes: Vec<String>,
    is_dead: bool,
    clock: Duration,
    num_measured: u64,
    /// The last point measured, and how often in a row.
    attempts: Option<(Point, CacheState, u32)>,
}

impl FakeDevice {
    /// Makes a device without faults.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let spec = Self::gpu_spec();
        let identity = DeviceIdentity {
            device_name: "fake".into(),
            compute_capability: spec.compute_capability,
            num_sms: spec.num_sms,
            l2_bytes: spec.l2_bytes.0,
            memory_bytes: spec.hbm_bytes.0,
            driver_version: None,
            cuda_driver_version: 0,
            nvrtc_version: "none".into(),
            cublaslt_version: 0,
            ecc: None,
            mig: None,
            kernel_hash: sha256_hex(b"fake"),
        };
        Self {
            identity,
            spec,
            seed,
            noise: DEFAULT_NOISE,
            faults: Vec::new(),
            notes: Vec::new(),
            is_dead: false,
            clock: Duration::ZERO,
            num_measured: 0,
            attempts: None,
        }
    }

    /// The data sheet of the made-up GPU.
    #[must_use]
    pub fn gpu_spec() -> GpuSpec {
        GpuSpec {
            name: "fake-gpu".into(),
            compute_capability: 90,
            num_sms: 100,
            bf16_flops_per_s: 500e12,
            fp32_flops_per_s: 50e12,
            hbm_bandwidth_bytes_per_s: 2e12,
            hbm_bytes: Bytes(64 << 30),
            l2_bytes: Bytes(40 << 20),
            boost_clock_mhz: 1500,
            max_clock_mhz: 1500,
            power_limit_w: 500,
        }
    }

    /// Sets the standard deviation of the logarithm of measured times; 0 for none.
    #[must_use]
    pub fn with_noise(mut self, noise: f64) -> Self {
        self.noise = noise;
        self
    }

    /// Adds a fault.
    #[must_use]
    pub fn with_fault(mut self, fault: Fault) -> Self {
        self.faults.push(fault);
        self
    }

    /// Adds something that the device says of itself.
    #[must_use]
    pub fn with_note(mut self, note: &str) -> Self {
        self.notes.push(note.to_owned());
        self
    }

    /// The noise-free time of a launch with cold operands, ns: what training is to recover.
    #[must_use]
    pub fn true_time_ns(&self, point: &Point) -> f64 {
        self.time_ns(point, CacheState::Cold)
    }

    fn time_ns(&self, point: &Point, cache: CacheState) -> f64 {
        OVERHEAD_NS
            + match point.shape {
                OperatorShape::Attention { heads, load } => {
                    let bytes_per_query = 4.0 * heads.q_width() as f64;
                    let bytes_per_key = 4.0 * heads.kv_width() as f64;
                    let part = |pairs: u64, queries: u32, keys: u64| {
                        let flops = 4.0 * heads.q_width() as f64 * pairs as f64;
                        let bytes = f64::from(queries) * bytes_per_query + keys as f64 * bytes_per_key;
                        (flops / (self.spec.bf16_flops_per_s * COMPUTE_EFFICIENCY) * 1e9)
                            .max(self.memory_ns(bytes, cache))
                    };
                    let prefill = part(load.prefill_pairs, load.num_prefill_tokens, load.prefill_kv_tokens);
                    let decode = part(load.decode_kv_tokens, load.num_decode_seqs, load.decode_kv_tokens);
                    let longest = f64::from(load.max_decode_kv_tokens) * DECODE_NS_PER_KEY;
                    prefill + decode.max(longest)
                }
                shape => self.compute_ns(&shape).max(self.memory_ns(shape.bytes().0 as f64, cache)),
            }
    }

    fn compute_ns(&self, shape: &OperatorShape) -> f64 {
        let flops = shape.flops().0 as f64;
        let OperatorShape::Gemm { m, n, .. } = *shape else {
            return flops / (self.spec.fp32_flops_per_s * COMPUTE_EFFICIENCY) * 1e9;
        };
        let tiles = f64::from(m.div_ceil(TILE)) * f64::from(n.div_ceil(TILE));
        let sms = f64::from(self.spec.num_sms);
        let slowdown = ((tiles / sms).ceil() * sms / tiles).powf(WAVE_EXPONENT);
        flops / (self.spec.bf16_flops_per_s * COMPUTE_EFFICIENCY) * 1e9 * slowdown
    }

    fn memory_ns(&self, bytes: f64, cache: CacheState) -> f64 {
        let factor = 1.0 - self.resident_share(bytes, cache) * (1.0 - HOT_FACTOR);
        bytes / (self.spec.hbm_bandwidth_bytes_per_s * MEMORY_EFFICIENCY) * 1e9 * factor
    }

    /// Share of a launch's operands that is found in the L2 cache. Without a jump, which no plan could find the place of.
    fn resident_share(&self, bytes: f64, cache: CacheState) -> f64 {
        let room = (self.spec.l2_bytes.0 as f64 / bytes).log(4.0);
        if cache == CacheState::Hot { room.clamp(0.0, 1.0) } else { 0.0 }
    }

    fn operator_error(point: &Point, reason: &str, fatal: bool) -> ProfileError {
        ProfileError::Operator { operator: point.operator, shape: point.shape, reason: reason.into(), fatal }
    }

    fn check_alive(&self, point: &Point) -> Result<(), ProfileError> {
        if self.is_dead {
            return Err(Self::operator_error(point, "the device is gone", true));
        }
        Ok(())
    }

    /// How often the point was measured in a row, this time included.
    fn count_attempt(&mut self, point: &Point, cache: CacheState) -> u32 {
        let attempt = match &self.attempts {
            Some((last, state, count)) if last == point && *state == cache => count + 1,
            _ => 1,
        };
        self.attempts = Some((point.clone(), cache, attempt));
        attempt
    }

    /// Noise of one point: log-normal with median 1.
    fn noise_of(&self, point: &Point, cache: CacheState) -> impl FnMut() -> f64 + use<> {
        let key = format!("{} {point:?} {}", self.seed, cache.name());
        let digest = sha256_hex(key.as_bytes());
        let seed = u64::from_str_radix(&digest[..16], 16).unwrap_or(self.seed);
        let mut rng = Pcg64::seed_from_u64(seed);
        let sigma = self.noise;
        move || {
            // Box and Muller: two uniforms make a normal one; 1 - u is never 0.
            let (u, v): (f64, f64) = (rng.random(), rng.random());
            let normal = (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos();
            (sigma * normal).exp()
        }
    }
}

impl Device for FakeDevice {
    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    fn spec(&self) -> &GpuSpec {
        &self.spec
    }

    fn state(&mut self) -> GpuState {
        GpuState { sm_clock_mhz: Some(self.spec.boost_clock_mhz), ..GpuState::default() }
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }

    fn elapsed(&self) -> Duration {
        self.clock
    }

    fn check(&mut self, point: &Point) -> Result<CheckReport, ProfileError> {
        self.check_alive(point)?;
        let is_wrong =
            self.faults.iter().any(|f| matches!(f, Fault::Wrong { operator } if *operator == point.operator));
        Ok(CheckReport { relative_error: if is_wrong { 0.5 } else { 0.0 }, tolerance: 0.01 })
    }

    fn measure(
        &mut self,
        point: &Point,
        cache: CacheState,
        rule: &StoppingRule,
    ) -> Result<Measurement, ProfileError> {
        self.check_alive(point)?;
        self.clock += POINT_COST;
        let attempt = self.count_attempt(point, cache);
        let mut before = self.state();
        let mut after = before.clone();
        let mut is_bimodal = false;
        let mut scale = 1.0;
        for fault in &self.faults {
            match *fault {
                Fault::Fails { operator, from, fatal }
                    if operator == point.operator && point.shape.values()[0] >= from =>
                {
                    self.is_dead = fatal;
                    return Err(Self::operator_error(point, "launch failed", fatal));
                }
                Fault::OutOfMemory { num_bytes } if point.shape.bytes().0 > num_bytes => {
                    return Err(Self::operator_error(point, "out of memory", false));
                }
                Fault::BelowFloor { operator } if operator == point.operator => {
                    scale = 0.5 * floor_ns(&point.shape, &self.spec) / self.time_ns(point, cache);
                }
                Fault::Throttled { operator, attempts }
                    if operator == point.operator && attempt <= attempts =>
                {
                    before.throttle_reasons = vec!["sw_power_cap".into()];
                    before.sm_clock_mhz = Some(self.spec.boost_clock_mhz * 9 / 10);
                    after.sm_clock_mhz = before.sm_clock_mhz;
                    after.throttle_reasons.clone_from(&before.throttle_reasons);
                }
                Fault::ClockShifted { operator, attempts }
                    if operator == point.operator && attempt <= attempts =>
                {
                    after.sm_clock_mhz = Some(self.spec.boost_clock_mhz * 9 / 10);
                }
                Fault::Bimodal { operator, attempts }
                    if operator == point.operator && attempt <= attempts =>
                {
                    is_bimodal = true;
                }
                Fault::Stops { after } if self.num_measured >= after => {
                    self.is_dead = true;
                    return Err(Self::operator_error(point, "the device is gone", true));
                }
                _ => {}
            }
        }
        let time_ns = self.time_ns(point, cache) * scale;
        let mut noise = self.noise_of(point, cache);
        let mut times_ns = Vec::new();
        loop {
            let mode = if is_bimodal && times_ns.len() % 2 == 1 { 1.2 } else { 1.0 };
            // A picosecond is the least that the format can hold as a time.
            times_ns.push((time_ns * mode * noise()).max(1e-3));
            let stats = TimeStats::from_times(&times_ns)
                .ok_or_else(|| Self::operator_error(point, "a time that is not finite", false))?;
            let stop = match stats.n {
                _ if rule.is_met_by(&stats) => StopReason::Converged,
                n if n >= rule.max_samples => StopReason::MaxSamples,
                _ => continue,
            };
            self.num_measured += 1;
            self.clock += Duration::from_nanos(times_ns.iter().sum::<f64>() as u64);
            return Ok(Measurement { stats, times_ns, before, after, kernel: "law".into(), stop });
        }
    }

    fn ceilings(&mut self) -> Result<Ceilings, ProfileError> {
        Ok(Ceilings {
            copy_bandwidth_bytes_per_s: self.spec.hbm_bandwidth_bytes_per_s * MEMORY_EFFICIENCY,
            matmul_flops_per_s: self.spec.bf16_flops_per_s * COMPUTE_EFFICIENCY,
        })
    }

    /// Kernels that follow each other at the law's times, of which the overhead is the gap between two of them.
    fn cross_check(
        &mut self,
        point: &Point,
        cache: CacheState,
        _pause_ns: u64,
    ) -> Result<CrossCheckOutcome, ProfileError> {
        self.check_alive(point)?;
        let period_ns = self.time_ns(point, cache);
        let duration_ns = (period_ns - OVERHEAD_NS).max(1e-3);
        let constant = |ns: f64| TimeStats::from_times(&[ns; 5]);
        Ok(match constant(duration_ns) {
            Some(duration) => CrossCheckOutcome::Times(ActivityTimes {
                duration,
                period: constant(period_ns),
                event: None,
                num_kernels_per_launch: 1.0,
                kernel_names: vec!["law".into()],
            }),
            None => CrossCheckOutcome::Unavailable { reason: "a time that is not finite".into() },
        })
    }

    fn host_costs(&mut self) -> Result<HostCosts, ProfileError> {
        let constant = |ns: f64| TimeStats {
            n: 1,
            min_ns: ns,
            p50_ns: ns,
            mean_ns: ns,
            p95_ns: ns,
            max_ns: ns,
            std_ns: 0.0,
        };
        let graph = |num_nodes: u32| GraphLaunchCost {
            num_nodes,
            launch_ns: constant(6000.0 + 15.0 * f64::from(num_nodes)),
        };
        let copy = |num_bytes: u64| CopyCost {
            num_bytes,
            to_device_ns: constant(8000.0 + num_bytes as f64 / 20.0),
            to_host_ns: constant(9000.0 + num_bytes as f64 / 20.0),
        };
        let copy_times = |call_ns: f64, num_bytes: u64| CopyTimes {
            call_ns: constant(call_ns),
            done_ns: constant(call_ns + 6000.0 + num_bytes as f64 / 20.0),
        };
        let input_copy = |num_bytes: u64| InputCopyCost {
            num_bytes,
            pinned: copy_times(2000.0, num_bytes),
            pageable: copy_times(3000.0 + num_bytes as f64 / 10.0, num_bytes),
        };
        let launch_row = |num_launches: u32| LaunchRowCost { num_launches, launch_ns: constant(2500.0) };
        let launch_arguments = |num_arguments: u32| LaunchArgumentsCost {
            num_arguments,
            launch_ns: constant(2400.0 + 20.0 * f64::from(num_arguments)),
        };
        // Clocks sink within 10 ms of idling, to four fifths.
        let after_idle = |idle_ms: u64| AfterIdleCost {
            idle_ns: 1_000_000 * idle_ms,
            launch_and_wait_ns: constant(8000.0 + 200.0 * idle_ms.min(100) as f64),
            compute_ns: constant(200_000.0 * (1.0 + 0.025 * idle_ms.min(10) as f64)),
        };
        Ok(HostCosts {
            cpu_model: "fake".into(),
            num_cores: 1,
            single_thread_score: 100.0,
            score: ScoreSpread::from_scores(&[99.0, 100.0, 101.0]),
            cpu: CpuState::default(),
            kernel_launch_ns: constant(2500.0),
            launch_rows: [1, 4, 16, 64, 256, 1000].map(launch_row).to_vec(),
            launch_arguments: [1, 4, 8, 16].map(launch_arguments).to_vec(),
            kernel_gap_ns: constant(OVERHEAD_NS),
            graph_launch: [1, 10, 100, 300].map(graph).to_vec(),
            synchronize_ns: constant(3000.0),
            synchronize_after_work_ns: Some(constant(3500.0)),
            events: Some(EventCosts {
                record_ns: constant(900.0),
                query_ns: constant(400.0),
                synchronize_ns: constant(600.0),
            }),
            copies: [64, 4096, 65536].map(copy).to_vec(),
            input_copies: [64, 4096, 65536].map(input_copy).to_vec(),
            after_idle: [0, 1, 10, 100, 1000].map(after_idle).to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use plumbline_bundles::CrossCheck;

    use super::*;

    fn gemm(m: u32) -> Point {
        Point { operator: Operator::OProj, shape: OperatorShape::Gemm { m, n: 4096, k: 4096 }, batch: None }
    }

    const RULE: StoppingRule = StoppingRule {
        min_samples: 5,
        max_samples: 200,
        max_relative_error: 1e-3,
        time_limit_ns: 0,
        warm_up_ns: 0,
        pause_ns: 0,
    };

    #[test]
    fn the_law_matches_hand_worked_times() {
        let device = FakeDevice::new(0);
        // Memory-bound: 2 * (4096 + 4096^2 + 4096) bytes at 1.7 TB/s = 19,747.5 ns, and the overhead.
        assert!((device.true_time_ns(&gemm(1)) - 21_547.5).abs() < 0.1);
        // Compute-bound: 64 * 32 tiles in 21 waves of 100; 2 * 8192 * 4096^2 FLOP at 375 TFLOP/s.
        let full = 2.0 * 8192.0 * 4096.0 * 4096.0 / 375e12 * 1e9;
        let expected = OVERHEAD_NS + full * (2100.0f64 / 2048.0).powf(0.3);
        assert!((device.true_time_ns(&gemm(8192)) - expected).abs() < 1.0);
    }

    #[test]
    fn noise_depends_on_seed_and_point_alone() {
        let mut device = FakeDevice::new(1);
        let first = device.measure(&gemm(8), CacheState::Cold, &RULE).unwrap();
        device.measure(&gemm(9), CacheState::Cold, &RULE).unwrap();
        assert_eq!(device.measure(&gemm(8), CacheState::Cold, &RULE).unwrap(), first);
        let other = FakeDevice::new(2).measure(&gemm(8), CacheState::Cold, &RULE).unwrap();
        assert_ne!(other, first);
        let error = first.stats.mean_ns / device.true_time_ns(&gemm(8)) - 1.0;
        assert!(error.abs() < 0.01, "{error}");
    }

    #[test]
    fn a_cross_check_follows_the_same_law() {
        let mut device = FakeDevice::new(1);
        let measured = device.measure(&gemm(8), CacheState::Cold, &RULE).unwrap();
        let gap_ns = device.host_costs().unwrap().kernel_gap_ns.p50_ns;
        let CrossCheckOutcome::Times(times) = device.cross_check(&gemm(8), CacheState::Cold, 0).unwrap()
        else {
            panic!("the fake device records its kernels");
        };
        let period_ns = times.period.unwrap().p50_ns;
        assert!((period_ns - device.true_time_ns(&gemm(8))).abs() < 1e-6);
        assert!((period_ns - times.duration.p50_ns - gap_ns).abs() < 1e-6);
        let gemm = gemm(8);
        let compared = CrossCheck::new(
            (gemm.operator, &gemm.shape, CacheState::Cold),
            measured.stats.p50_ns,
            times.duration.p50_ns,
            Some(period_ns),
            None,
            gap_ns,
        );
        assert!(compared.agrees, "{compared:?}");
    }

    #[test]
    fn measuring_stops_by_the_rule() {
        let quiet = FakeDevice::new(1).with_noise(0.0).measure(&gemm(8), CacheState::Cold, &RULE).unwrap();
        assert_eq!(quiet.stats.n, RULE.min_samples);
        let loud = FakeDevice::new(1).with_noise(0.5).measure(&gemm(8), CacheState::Cold, &RULE).unwrap();
        assert_eq!(loud.stats.n, RULE.max_samples);
    }
}

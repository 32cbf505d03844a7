//! The run: evidence, checks, every planned point, and a bundle of what was measured.
//!
//! A point that fails is recorded and the run goes on; an operator whose results are wrong is not timed at all; a
//! device that is lost ends the measuring, and what was measured until then is kept.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use plumbline_bundles::{
    Bundle, BundleWriter, Evidence, FormatVersion, GpuState, HostCosts, Manifest, Sample, StopReason, bundle,
};
use plumbline_schema::{
    InputError, Location, ModelSpec, Operator,
    roofline::{floor_ns, roofline_ns},
};

use crate::{
    device::{Device, Measurement, Point, StoppingRule},
    error::ProfileError,
    evidence::{Readings, StateSampler},
    plan::{Envelope, Plan, PlannedPoint},
};

/// So many failed device calls in a row, at different points, mean that the device is lost.
const MAX_DEVICE_ERRORS: u32 = 5;

/// Longest wait for clocks to come back before a point, and between looks at them.
const MAX_SETTLE: Duration = Duration::from_millis(250);
const SETTLE_STEP: Duration = Duration::from_millis(5);
/// How long compute-bound launches run before they are timed, ns: an engine's prefill steps follow each other.
const SUSTAINED_NS: u64 = 150_000_000;

/// The payload that holds the plan.
pub const PLAN: &str = "plan.json";

/// What to profile, and how thoroughly.
#[derive(Clone, Debug)]
pub struct ProfileOptions {
    /// Models whose shapes are measured, at least one.
    pub models: Vec<ModelSpec>,
    /// What the engines to be predicted will ask for.
    pub envelope: Envelope,
    /// Where the bundle goes; nothing may exist there yet.
    pub out: PathBuf,
    /// When measuring begins, RFC 3339 in UTC; see [`rfc3339`].
    pub created: String,
    /// When to stop repeating a measurement.
    pub rule: StoppingRule,
    /// Points that are not begun by then are left out and listed; `None` for no limit.
    pub budget: Option<Duration>,
}

impl ProfileOptions {
    /// The usual options for some models.
    #[must_use]
    pub fn new(models: Vec<ModelSpec>, out: PathBuf) -> Self {
        Self {
            models,
            envelope: Envelope::default(),
            out,
            created: rfc3339(SystemTime::now()),
            rule: StoppingRule::default(),
            budget: None,
        }
    }
}

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// Points done in this stage, failed ones too.
    pub num_done: usize,
    /// Points of this stage.
    pub num_total: usize,
    /// The operator at work; `None` outside of checks and points.
    pub operator: Option<Operator>,
    /// Since the run began.
    pub elapsed: Duration,
    /// Estimated time left; `None` until some points are timed.
    pub time_left: Option<Duration>,
}

/// A part of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Ceilings and host costs.
    Machine,
    /// Results against the reference.
    Checks,
    /// Times.
    Points,
    /// Writing the bundle.
    Writing,
}

/// A finished run.
#[derive(Clone, Debug)]
pub struct ProfileOutcome {
    /// The bundle written.
    pub bundle: Bundle,
    /// Points planned.
    pub num_planned: usize,
    /// Points measured.
    pub num_measured: usize,
    /// Points measured while clocks were held down.
    pub num_throttled: usize,
    /// Points under the physical floor, which cannot be true.
    pub num_below_floor: usize,
    /// Wall time of the run.
    pub wall: Duration,
}

impl ProfileOutcome {
    /// Whether everything planned was measured.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.bundle.manifest.incomplete.is_empty()
    }
}

/// Measures the device and writes a bundle.
///
/// # Errors
/// When there is nothing to plan, nothing could be measured at all, or the bundle cannot be written; anything
/// less is recorded in the bundle's `incomplete`.
pub fn profile(
    device: &mut dyn Device,
    options: &ProfileOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<ProfileOutcome, ProfileError> {
    let plan = Plan::new(&options.models, &options.envelope).map_err(|e| {
        let expected = format!(
            "divisors of num_kv_heads = {} and intermediate_size = {}",
            e.num_kv_heads, e.intermediate_size
        );
        invalid("tensor_parallel_sizes", expected, e.tensor_parallel_size.to_string())
    })?;
    if plan.points.is_empty() {
        return Err(invalid("models", "at least one", "none").into());
    }
    // First, so that a place that cannot be written is known before minutes are spent.
    let writer = BundleWriter::new(&options.out)?;
    let run = Run {
        device,
        options,
        progress,
        started: Instant::now(),
        evidence: Evidence::default(),
        readings: Readings::default(),
        samples: Vec::new(),
        incomplete: Vec::new(),
        blocked: BTreeMap::new(),
        lost: None,
        unreached: BTreeMap::new(),
        num_device_errors: 0,
        first_error: None,
    };
    run.measure(&plan, writer)
}

/// An option that cannot be followed.
fn invalid(key: &str, expected: impl Into<String>, found: impl Into<String>) -> InputError {
    InputError::invalid("profile options", Location::Key(key.into()), expected, found)
}

/// Why an operator is not timed, and how many of its points that leaves out.
#[derive(Debug)]
struct Blocked {
    reason: String,
    num_points: usize,
}

/// The state of a run.
struct Run<'a> {
    device: &'a mut dyn Device,
    options: &'a ProfileOptions,
    progress: &'a mut dyn FnMut(Progress),
    started: Instant,
    evidence: Evidence,
    /// Readings between points, where no thread can take them.
    readings: Readings,
    samples: Vec<Sample>,
    incomplete: Vec<String>,
    /// Operators that are not timed any more.
    blocked: BTreeMap<Operator, Blocked>,
    /// Why measuring ended before its time.
    lost: Option<String>,
    /// Points that were not measured since.
    unreached: BTreeMap<Operator, usize>,
    /// Failed device calls outside of operators in a row.
    num_device_errors: u32,
    /// Returned when nothing at all was measured.
    first_error: Option<ProfileError>,
}

impl Run<'_> {
    fn measure(mut self, plan: &Plan, writer: BundleWriter) -> Result<ProfileOutcome, ProfileError> {
        self.evidence.before = self.state();
        let sampler = self.device.monitor().map(|monitor| StateSampler::start(monitor, self.started));
        let host = self.measure_machine();
        self.run_checks(&plan.checks);
        self.measure_points(&plan.points);
        if let (true, Some(error)) = (self.samples.is_empty(), self.first_error.take()) {
            return Err(error);
        }
        self.evidence.after = self.state();
        let from_thread = sampler.and_then(StateSampler::finish);
        self.evidence.during = from_thread.unwrap_or_else(|| std::mem::take(&mut self.readings).into_vec());
        self.write(plan, host.as_ref(), writer)
    }

    /// The device's state, its time counted from the beginning of the run.
    fn state(&mut self) -> GpuState {
        let at_ms = self.started.elapsed().as_millis() as u64;
        GpuState { at_ms, ..self.device.state() }
    }

    fn report(
        &mut self,
        stage: Stage,
        num_done: usize,
        num_total: usize,
        operator: Option<Operator>,
        time_left: Option<Duration>,
    ) {
        let elapsed = self.started.elapsed();
        (self.progress)(Progress { stage, num_done, num_total, operator, elapsed, time_left });
    }

    /// Ceilings and host costs; what fails is noted.
    fn measure_machine(&mut self) -> Option<HostCosts> {
        self.report(Stage::Machine, 0, 2, None, None);
        match self.device.ceilings() {
            Ok(ceilings) => {
                self.evidence.copy_bandwidth_bytes_per_s = Some(ceilings.copy_bandwidth_bytes_per_s);
                self.evidence.matmul_flops_per_s = Some(ceilings.matmul_flops_per_s);
            }
            Err(error) => self.evidence.notes.push(format!("ceilings not measured: {error}")),
        }
        self.report(Stage::Machine, 1, 2, None, None);
        match self.device.host_costs() {
            Ok(host) => Some(host),
            Err(error) => {
                self.incomplete.push(format!("host costs not measured: {error}"));
                None
            }
        }
    }

    /// Compares results with the reference; an operator that fails once is not timed.
    fn run_checks(&mut self, checks: &[Point]) {
        for (i, point) in checks.iter().enumerate() {
            if self.lost.is_some() {
                return;
            }
            if self.blocked.contains_key(&point.operator) {
                continue;
            }
            self.report(Stage::Checks, i, checks.len(), Some(point.operator), None);
            let error = match self.device.check(point) {
                Ok(report) if report.passed() => continue,
                Ok(report) => ProfileError::Wrong {
                    operator: point.operator,
                    shape: point.shape,
                    relative_error: report.relative_error,
                    tolerance: report.tolerance,
                },
                Err(error) => error,
            };
            self.note_failure(point, error, true);
        }
    }

    /// Blocks an operator, ends the run or lists the point, as the error asks for.
    fn note_failure(&mut self, point: &Point, error: ProfileError, is_check: bool) {
        let text = error.to_string();
        tracing::warn!(operator = %point.operator, "{text}");
        let is_device_error = matches!(error, ProfileError::Device { .. });
        self.num_device_errors = if is_device_error { self.num_device_errors + 1 } else { 0 };
        let is_lost = self.num_device_errors >= MAX_DEVICE_ERRORS
            || matches!(error, ProfileError::Operator { fatal: true, .. } | ProfileError::NoDevice { .. });
        let concerns_all =
            is_check || matches!(error, ProfileError::Wrong { .. } | ProfileError::Compile { .. });
        self.first_error.get_or_insert(error);
        // A check is no planned point.
        let num_points = usize::from(!is_check);
        if is_lost {
            self.lost = Some(text);
            *self.unreached.entry(point.operator).or_default() += num_points;
        } else if concerns_all {
            self.blocked.insert(point.operator, Blocked { reason: text, num_points });
        } else {
            self.incomplete.push(text);
        }
    }

    fn measure_points(&mut self, points: &[PlannedPoint]) {
        let began = Instant::now();
        let mut num_timed = 0u32;
        for (i, planned) in points.iter().enumerate() {
            let operator = planned.point.operator;
            if self.lost.is_none() && self.options.budget.is_some_and(|b| self.started.elapsed() >= b) {
                self.lost = Some("the time budget is spent".into());
            }
            if self.lost.is_some() {
                *self.unreached.entry(operator).or_default() += 1;
                continue;
            }
            if let Some(blocked) = self.blocked.get_mut(&operator) {
                blocked.num_points += 1;
                continue;
            }
            // Points are ordered by operator in step, so those done stand for those left.
            let left = (points.len() - i) as u32;
            let time_left = (num_timed > 0).then(|| began.elapsed() / num_timed * left);
            self.report(Stage::Points, i, points.len(), Some(operator), time_left);
            num_timed += 1;
            match self.measure_point(planned) {
                Ok(()) => self.num_device_errors = 0,
                Err(error) => self.note_failure(&planned.point, error, false),
            }
        }
        self.list_unmeasured();
    }

    fn list_unmeasured(&mut self) {
        for (operator, Blocked { reason, num_points }) in &self.blocked {
            self.incomplete.push(format!("{operator}: {num_points} points not measured: {reason}"));
        }
        if let Some(reason) = &self.lost {
            let total: usize = self.unreached.values().sum();
            let counts: Vec<_> = self.unreached.iter().map(|(op, count)| format!("{op} {count}")).collect();
            self.incomplete.push(format!("{total} points not measured ({}): {reason}", counts.join(", ")));
        }
    }

    fn measure_point(&mut self, planned: &PlannedPoint) -> Result<(), ProfileError> {
        let PlannedPoint { point, cache, .. } = planned;
        self.settle();
        let rule = self.rule_of(point);
        let measurement = self.device.measure(point, *cache, &rule)?;
        measurement.stats.check().map_err(|e| ProfileError::Operator {
            operator: point.operator,
            shape: point.shape,
            reason: format!("{}: expected {}, found {}", e.key, e.expected, e.found),
            fatal: false,
        })?;
        // Right after the measurement, while the clocks are still those it ran at.
        let state = self.state();
        self.readings.take_when_due(Instant::now(), || state.clone());
        let flags = self.flags(point, &measurement, &state);
        self.samples.push(Sample {
            operator: point.operator,
            shape: point.shape,
            batch: point.batch.clone(),
            cache: *cache,
            stats: measurement.stats,
            stop: Some(measurement.stop),
            num_attempts: 1,
            sm_clock_mhz: state.sm_clock_mhz,
            memory_clock_mhz: state.memory_clock_mhz,
            power_w: state.power_w,
            throttle: state.throttle_reasons.join("|"),
            kernel: measurement.kernel,
            flags: flags.join("|"),
        });
        Ok(())
    }

    /// A point bound by the tensor cores draws more power than the board may; it is timed at the clocks it sustains.
    fn rule_of(&self, point: &Point) -> StoppingRule {
        let rule = self.options.rule;
        let is_matrix_work = point.operator.is_gemm() || point.operator == Operator::Attention;
        let memory_ns = point.shape.bytes().0 as f64 / self.device.spec().hbm_bandwidth_bytes_per_s * 1e9;
        if is_matrix_work && roofline_ns(&point.shape, self.device.spec()) > memory_ns {
            StoppingRule { warm_up_ns: rule.warm_up_ns.max(SUSTAINED_NS), ..rule }
        } else {
            rule
        }
    }

    /// Lets the GPU recover from the points before: clocks held down are then the point's own doing.
    fn settle(&self) {
        let Some(monitor) = self.device.monitor() else { return };
        let began = Instant::now();
        while began.elapsed() < MAX_SETTLE && !monitor.state().throttle_reasons.is_empty() {
            std::thread::sleep(SETTLE_STEP);
        }
    }

    fn flags(&self, point: &Point, measurement: &Measurement, state: &GpuState) -> Vec<&'static str> {
        let stats = &measurement.stats;
        let is_noisy = StoppingRule::relative_error(stats) > self.options.rule.max_relative_error;
        let is_below = stats.min_ns < floor_ns(&point.shape, self.device.spec());
        [
            ("throttled", !state.throttle_reasons.is_empty()),
            ("noisy", is_noisy),
            ("time_limit", measurement.stop == StopReason::TimeLimit),
            ("below_floor", is_below),
        ]
        .into_iter()
        .filter_map(|(flag, is_set)| is_set.then_some(flag))
        .collect()
    }

    fn write(
        mut self,
        plan: &Plan,
        host: Option<&HostCosts>,
        mut writer: BundleWriter,
    ) -> Result<ProfileOutcome, ProfileError> {
        self.report(Stage::Writing, 0, 1, None, Some(Duration::ZERO));
        let count = |flag: &str| self.samples.iter().filter(|s| s.has_flag(flag)).count();
        let (num_throttled, num_below_floor) = (count("throttled"), count("below_floor"));
        if num_throttled > 0 {
            let reasons: BTreeSet<_> =
                self.samples.iter().map(|s| s.throttle.as_str()).filter(|t| !t.is_empty()).collect();
            let reasons: Vec<_> = reasons.into_iter().collect();
            self.evidence.notes.push(format!(
                "{num_throttled} points measured with clocks held down: {}",
                reasons.join(", ")
            ));
        }
        if self.evidence.before == (GpuState { at_ms: self.evidence.before.at_ms, ..GpuState::default() }) {
            self.evidence.notes.push("the state of the GPU could not be read".into());
        }
        sort_samples(&mut self.samples);
        writer.add_samples(&self.samples)?;
        if let Some(host) = host {
            writer.add_json(bundle::HOST, host)?;
        }
        writer.add_json(PLAN, plan)?;
        let bundle = writer.finish(Manifest {
            format_version: FormatVersion::CURRENT,
            plumbline_version: env!("CARGO_PKG_VERSION").into(),
            created: self.options.created.clone(),
            gpu: self.device.spec().clone(),
            device: Some(self.device.identity().clone()),
            evidence: Some(self.evidence),
            models: plan.models.clone(),
            incomplete: self.incomplete,
            files: BTreeMap::new(),
        })?;
        Ok(ProfileOutcome {
            bundle,
            num_planned: plan.points.len(),
            num_measured: self.samples.len(),
            num_throttled,
            num_below_floor,
            wall: self.started.elapsed(),
        })
    }
}

/// Orders rows by shape, cold before hot, as a person would look for them.
fn sort_samples(samples: &mut [Sample]) {
    samples.sort_by_cached_key(|s| {
        let batch = s.batch.as_ref().map(|b| (b.format_prefill_chunks(), b.format_decode_contexts()));
        let mut values = s.shape.values();
        if batch.is_none() {
            // Widths before tokens: a model's rows stay together.
            values.rotate_left(1);
        }
        (s.operator, values, batch, s.cache)
    });
}

/// A moment as RFC 3339 in UTC, to the second; moments before 1970 become its start.
#[must_use]
pub fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let is_leap =
        |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    let mut left = days;
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        if left < length {
            break;
        }
        left -= length;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if left < length {
            break;
        }
        left -= length;
        month += 1;
    }
    (year, month, left + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_rfc_3339() {
        let text = |seconds| rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(text(0), "1970-01-01T00:00:00Z");
        assert_eq!(text(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(text(1_767_225_599), "2025-12-31T23:59:59Z");
        assert_eq!(text(4_107_542_400), "2100-03-01T00:00:00Z");
    }
}

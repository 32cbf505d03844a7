//! One run: machine, checks, points in rounds, and what is written of them.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use plumbline_bundles::{
    BundleWriter, CacheState, CurvePoint, Evidence, FormatVersion, GpuState, Manifest, Sample, StopReason,
    bundle,
};
use plumbline_schema::{GpuSpec, Operator, roofline::floor_ns};

use crate::{
    advisor::{Advisor, choose},
    device::{Device, Measurement, PAUSE_NS, Point, StoppingRule},
    error::ProfileError,
    evidence::{Readings, StateSampler},
    journal::{Entry, Journal},
    plan::{Plan, PlannedPoint},
    profile::{PLAN, ProfileOptions, ProfileOutcome, Progress, Stage, sort_samples},
    quality::{Doubt, doubts},
    results::Results,
    rounds::{Costs, Looks, Todo},
    second_look::{self, point_of},
};

/// So many failed device calls in a row, at different points, mean that the device is lost.
const MAX_DEVICE_ERRORS: u32 = 5;
/// Times that a point is measured until it is kept with its doubts.
const MAX_ATTEMPTS: u32 = 3;
/// A launch draws much power when its arithmetic, at the peak rate, takes at least this share of the time of its bytes.
const HEAVY_SHARE: f64 = 0.4;
/// Its samples are taken after rests, and there are fewer of them: at least and at most so many.
const HEAVY_SAMPLES: (u32, u32) = (5, 8);

/// Why an operator is not timed, and how many of its points that leaves out.
#[derive(Debug)]
struct Blocked {
    reason: String,
    num_points: usize,
}

/// Why the measuring of points ended before the plan did.
#[derive(Debug)]
enum Ended {
    /// The budget is spent, which is no failure.
    Budget,
    /// The device is lost, or the journal cannot be written.
    Lost(String),
}

/// The state of a run.
pub(crate) struct Run<'a> {
    device: &'a mut dyn Device,
    options: &'a ProfileOptions,
    plan: &'a Plan,
    journal: Journal,
    results: Results,
    advisor: Option<&'a mut dyn Advisor>,
    progress: &'a mut dyn FnMut(Progress),
    /// Of the device's own clock.
    started: Duration,
    evidence: Evidence,
    /// Readings between points, where no thread can take them.
    readings: Readings,
    incomplete: Vec<String>,
    curve: Vec<CurvePoint>,
    /// Operators that are not timed any more.
    blocked: BTreeMap<Operator, Blocked>,
    ended: Option<Ended>,
    costs: Costs,
    /// Points that were left, by operator.
    unreached: BTreeMap<Operator, usize>,
    /// Failed device calls outside of operators in a row.
    num_device_errors: u32,
    /// Returned when nothing at all was measured.
    first_error: Option<ProfileError>,
}

impl<'a> Run<'a> {
    pub(crate) fn new(
        device: &'a mut dyn Device,
        options: &'a ProfileOptions,
        plan: &'a Plan,
        journal: Journal,
        results: Results,
        advisor: Option<&'a mut dyn Advisor>,
        progress: &'a mut dyn FnMut(Progress),
    ) -> Self {
        Self {
            started: device.elapsed(),
            device,
            options,
            plan,
            journal,
            incomplete: results.failed.values().cloned().collect(),
            results,
            advisor,
            progress,
            evidence: Evidence::default(),
            readings: Readings::default(),
            curve: Vec::new(),
            blocked: BTreeMap::new(),
            ended: None,
            costs: Costs::default(),
            unreached: BTreeMap::new(),
            num_device_errors: 0,
            first_error: None,
        }
    }

    /// Measures everything that has no result yet.
    pub(crate) fn measure(&mut self) -> Result<(), ProfileError> {
        self.evidence.before = self.state();
        self.evidence.notes = self.device.notes();
        let sampler = self.device.monitor().map(|monitor| StateSampler::start(monitor, Instant::now()));
        self.measure_machine()?;
        self.run_checks()?;
        self.measure_points()?;
        if self.results.samples.is_empty()
            && let Some(error) = self.first_error.take()
        {
            return Err(error);
        }
        self.look_again();
        self.evidence.after = self.state();
        let from_thread = sampler.and_then(StateSampler::finish);
        self.evidence.during = from_thread.unwrap_or_else(|| std::mem::take(&mut self.readings).into_vec());
        Ok(())
    }

    /// Leaves nothing behind when nothing was measured.
    pub(crate) fn give_up(self) {
        if self.results.samples.is_empty() {
            self.journal.discard();
        }
    }

    /// Measuring time of this run and the ones that it continues.
    fn elapsed(&self) -> Duration {
        self.results.earlier + self.device.elapsed().saturating_sub(self.started)
    }

    /// The device's state, its time counted from the beginning of the run.
    fn state(&mut self) -> GpuState {
        let at_ms = self.elapsed().as_millis() as u64;
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
        let elapsed = self.elapsed();
        (self.progress)(Progress { stage, num_done, num_total, operator, elapsed, time_left });
    }

    /// Ceilings and host costs; what fails is noted.
    fn measure_machine(&mut self) -> Result<(), ProfileError> {
        self.report(Stage::Machine, 0, 2, None, None);
        if self.results.ceilings.is_none() {
            match self.device.ceilings() {
                Ok(ceilings) => {
                    self.journal.append(&Entry::Ceilings(ceilings))?;
                    self.results.ceilings = Some(ceilings);
                }
                Err(error) => self.evidence.notes.push(format!("ceilings not measured: {error}")),
            }
        }
        self.report(Stage::Machine, 1, 2, None, None);
        if self.results.host.is_none() {
            match self.device.host_costs() {
                Ok(host) => {
                    self.journal.append(&Entry::Host(Box::new(host.clone())))?;
                    self.results.host = Some(host);
                }
                Err(error) => self.incomplete.push(format!("host costs not measured: {error}")),
            }
        }
        Ok(())
    }

    /// Compares results with the reference; an operator that fails once is not timed.
    fn run_checks(&mut self) -> Result<(), ProfileError> {
        let checks = &self.plan.checks;
        for (i, point) in checks.iter().enumerate() {
            if self.ended.is_some() {
                break;
            }
            if self.blocked.contains_key(&point.operator) || self.results.checked.contains(&i) {
                continue;
            }
            self.report(Stage::Checks, i, checks.len(), Some(point.operator), None);
            let error = match self.device.check(point) {
                Ok(report) if report.passed() => {
                    self.journal.append(&Entry::Checked { check: i })?;
                    continue;
                }
                Ok(report) => ProfileError::Wrong {
                    operator: point.operator,
                    shape: point.shape,
                    relative_error: report.relative_error,
                    tolerance: report.tolerance,
                },
                Err(error) => error,
            };
            self.note_failure(point, error, None);
        }
        Ok(())
    }

    /// Blocks an operator, ends the run or lists the point, as the error asks for. A check is no planned point.
    fn note_failure(&mut self, point: &Point, error: ProfileError, planned: Option<usize>) {
        let text = error.to_string();
        tracing::warn!(operator = %point.operator, "{text}");
        let is_device_error = matches!(error, ProfileError::Device { .. });
        self.num_device_errors = if is_device_error { self.num_device_errors + 1 } else { 0 };
        let is_lost = self.num_device_errors >= MAX_DEVICE_ERRORS
            || matches!(error, ProfileError::Operator { fatal: true, .. } | ProfileError::NoDevice { .. });
        let concerns_all =
            planned.is_none() || matches!(error, ProfileError::Wrong { .. } | ProfileError::Compile { .. });
        self.first_error.get_or_insert(error);
        let num_points = usize::from(planned.is_some());
        if is_lost {
            self.ended = Some(Ended::Lost(text));
            *self.unreached.entry(point.operator).or_default() += num_points;
        } else if concerns_all {
            self.blocked.insert(point.operator, Blocked { reason: text, num_points });
        } else {
            if let Some(point) = planned {
                self.results.failed.insert(point, text.clone());
            }
            self.incomplete.push(text);
        }
    }

    fn measure_points(&mut self) -> Result<(), ProfileError> {
        let mut todo = Todo::new(self.results.open_points(self.plan));
        let mut looks = Looks::new(self.options.budget, &todo);
        while !todo.is_empty() {
            let is_going = self.ended.is_none() && !self.is_budget_spent();
            if is_going && looks.is_due(self.elapsed(), &todo) {
                self.look(&mut todo, &looks);
            }
            let block = todo.next_block();
            for (i, &point) in block.iter().enumerate() {
                self.take_point(point, &block[i + 1..], &todo)?;
            }
        }
        self.look(&mut todo, &looks);
        self.list_unmeasured();
        Ok(())
    }

    fn is_budget_spent(&self) -> bool {
        self.options.budget.is_some_and(|budget| self.elapsed() >= budget)
    }

    /// Measures a point unless there is a reason not to.
    fn take_point(&mut self, index: usize, block: &[usize], todo: &Todo) -> Result<(), ProfileError> {
        let planned = &self.plan.points[index];
        let operator = planned.point.operator;
        if self.ended.is_none() && self.is_budget_spent() {
            self.ended = Some(Ended::Budget);
        }
        if self.ended.is_some() {
            *self.unreached.entry(operator).or_default() += 1;
            return Ok(());
        }
        if let Some(blocked) = self.blocked.get_mut(&operator) {
            blocked.num_points += 1;
            return Ok(());
        }
        let num_left = 1 + block.len() + todo.points().len();
        let time_left = self.time_left(index, block, todo);
        let total = self.plan.points.len();
        self.report(Stage::Points, total - num_left, total, Some(operator), Some(time_left));
        self.journal.append(&Entry::Begun { point: index })?;
        let began = self.device.elapsed();
        match self.measure_point(planned) {
            Ok(sample) => {
                self.num_device_errors = 0;
                self.costs.add(self.is_heavy(&planned.point), self.device.elapsed().saturating_sub(began));
                let elapsed_ms = self.elapsed().as_millis() as u64;
                let sample_entry = Box::new(sample.clone());
                self.journal.append(&Entry::Measured { point: index, elapsed_ms, sample: sample_entry })?;
                self.results.samples.insert(index, sample);
            }
            Err(error) => {
                self.journal.append(&Entry::Failed { point: index, reason: error.to_string() })?;
                self.note_failure(&planned.point, error, Some(index));
            }
        }
        Ok(())
    }

    fn time_left(&self, index: usize, block: &[usize], todo: &Todo) -> Duration {
        let cost = |&point: &usize| self.costs.of(self.is_heavy(&self.plan.points[point].point));
        let all: Duration = std::iter::once(&index).chain(block).chain(todo.points()).map(cost).sum();
        match self.options.budget {
            Some(budget) => all.min(budget.saturating_sub(self.elapsed())),
            None => all,
        }
    }

    /// Judges the predictor by the held-out points measured so far, and puts those in front that it is least sure of.
    fn look(&mut self, todo: &mut Todo, looks: &Looks) {
        let elapsed = self.elapsed();
        let Some(advisor) = self.advisor.as_deref_mut() else { return };
        let plan = self.plan;
        let is_held_out = |point: usize| plan.points[point].is_held_out;
        let samples = |held_out: bool| -> Vec<Sample> {
            let all = self.results.samples.iter();
            all.filter(|(point, _)| is_held_out(**point) == held_out).map(|(_, s)| s.clone()).collect()
        };
        let (known, held_out) = (samples(false), samples(true));
        if let Some(error) = advisor.held_out_error(&known, &held_out) {
            self.curve.push(CurvePoint { elapsed_s: elapsed.as_secs_f64(), num_samples: known.len(), error });
        }
        let Some(round) = looks.round() else { return };
        // The other cache state is measured to show the difference; predictors do not learn from it.
        let is_asked = |&point: &usize| {
            let planned = &plan.points[point];
            !planned.is_held_out && planned.cache == CacheState::in_model(planned.point.operator)
        };
        let open: Vec<usize> = todo.points().iter().copied().filter(is_asked).collect();
        if open.is_empty() {
            return;
        }
        let points: Vec<Point> = open.iter().map(|&p| plan.points[p].point.clone()).collect();
        let unsureness = advisor.unsureness(&known, &points);
        let cost = |point: &Point| self.costs.of(self.is_heavy(point)).as_nanos() as f64;
        let costs: Vec<f64> = points.iter().map(cost).collect();
        let chosen = choose(&unsureness, &points, &costs, round.as_nanos() as f64);
        todo.prefer(&chosen.into_iter().map(|i| open[i]).collect::<Vec<_>>());
    }

    fn list_unmeasured(&mut self) {
        for (operator, Blocked { reason, num_points }) in &self.blocked {
            self.incomplete.push(format!("{operator}: {num_points} points not measured: {reason}"));
        }
        if matches!(self.ended, Some(Ended::Budget)) && self.results.samples.is_empty() {
            self.incomplete.push("no point measured: the time budget was spent before the first".into());
        }
        if let Some(Ended::Lost(reason)) = &self.ended {
            let total: usize = self.unreached.values().sum();
            let counts: Vec<_> = self.unreached.iter().map(|(op, count)| format!("{op} {count}")).collect();
            self.incomplete.push(format!("{total} points not measured ({}): {reason}", counts.join(", ")));
        }
    }

    /// Measures until there is no doubt, or often enough; the attempt with the fewest doubts is kept.
    fn measure_point(&mut self, planned: &PlannedPoint) -> Result<Sample, ProfileError> {
        let PlannedPoint { point, cache, .. } = planned;
        let rule = self.rule_of(point);
        let mut kept: Option<(Measurement, Vec<Doubt>)> = None;
        let mut num_attempts = 0;
        while num_attempts < MAX_ATTEMPTS && kept.as_ref().is_none_or(|(_, doubts)| !doubts.is_empty()) {
            num_attempts += 1;
            let measurement = self.device.measure(point, *cache, &rule)?;
            measurement.stats.check().map_err(|e| ProfileError::Operator {
                operator: point.operator,
                shape: point.shape,
                reason: format!("{}: expected {}, found {}", e.key, e.expected, e.found),
                fatal: false,
            })?;
            let doubts = doubts(&measurement, self.device.spec().max_clock_mhz);
            if kept.as_ref().is_none_or(|(_, before)| doubts.len() < before.len()) {
                kept = Some((measurement, doubts));
            }
        }
        let Some((measurement, doubts)) = kept else {
            // At least one attempt is made, so that this does not happen.
            return Err(ProfileError::Device { call: "measure".into(), reason: "no attempt".into() });
        };
        let now = self.elapsed().as_millis() as u64;
        self.readings.take_when_due(Instant::now(), || GpuState { at_ms: now, ..measurement.after.clone() });
        let flags = self.flags(point, &measurement, &doubts);
        let sample = measurement.into_sample(point, *cache);
        Ok(Sample { num_attempts, flags: flags.join("|"), ..sample })
    }

    /// Cross-checks and lasting loads; nothing that goes wrong here spoils what was measured.
    fn look_again(&mut self) {
        if matches!(self.ended, Some(Ended::Lost(_))) {
            return;
        }
        self.report(Stage::SecondLook, 0, 1, None, None);
        let clean: Vec<&Sample> = self.results.samples.values().filter(|s| s.flags.is_empty()).collect();
        let heavy: Vec<&Sample> = clean.iter().copied().filter(|s| self.is_heavy(&point_of(s))).collect();
        match second_look::sustained(self.device, &heavy, self.options.rule) {
            Ok(sustained) => self.evidence.sustained = sustained,
            Err(error) => self.evidence.notes.push(format!("no measurement under a lasting load: {error}")),
        }
        let spec = self.device.spec().clone();
        let pause_ns_of = |point: &Point| if is_heavy(point, &spec) { PAUSE_NS } else { 0 };
        let gap_ns = self.results.host.as_ref().map_or(0.0, |host| host.kernel_gap_ns.p50_ns);
        // Last, as recording may leave traces in the driver.
        self.evidence.cross_checks =
            second_look::cross_checks(self.device, &clean, gap_ns, pause_ns_of, &mut self.evidence.notes);
    }

    fn is_heavy(&self, point: &Point) -> bool {
        is_heavy(point, self.device.spec())
    }

    fn rule_of(&self, point: &Point) -> StoppingRule {
        let rule = self.options.rule;
        if !self.is_heavy(point) {
            return rule;
        }
        let (min_samples, max_samples) = HEAVY_SAMPLES;
        StoppingRule {
            min_samples: rule.min_samples.min(min_samples),
            max_samples: rule.max_samples.min(max_samples),
            time_limit_ns: 4 * rule.time_limit_ns,
            pause_ns: PAUSE_NS,
            ..rule
        }
    }

    fn flags(&self, point: &Point, measurement: &Measurement, doubts: &[Doubt]) -> Vec<&'static str> {
        let stats = &measurement.stats;
        let is_noisy = StoppingRule::relative_error(stats) > self.options.rule.max_relative_error;
        let is_below = stats.min_ns < floor_ns(&point.shape, self.device.spec());
        let others = [
            ("noisy", is_noisy),
            ("time_limit", measurement.stop == StopReason::TimeLimit),
            ("below_floor", is_below),
        ];
        let others = others.into_iter().filter_map(|(flag, is_set)| is_set.then_some(flag));
        doubts.iter().map(|doubt| doubt.flag()).chain(others).collect()
    }

    /// Writes the bundle, and deletes the journal unless it could still be gone on with.
    pub(crate) fn write(mut self, created: String) -> Result<ProfileOutcome, ProfileError> {
        self.report(Stage::Writing, 0, 1, None, Some(Duration::ZERO));
        let mut counts = Counts::of(self.results.samples.values());
        counts.left_out = match self.ended {
            Some(Ended::Budget) => self.unreached.values().sum(),
            _ => 0,
        };
        self.note_counts(&counts);
        if let Some(ceilings) = self.results.ceilings {
            self.evidence.copy_bandwidth_bytes_per_s = Some(ceilings.copy_bandwidth_bytes_per_s);
            self.evidence.matmul_flops_per_s = Some(ceilings.matmul_flops_per_s);
        }
        let mut samples: Vec<Sample> = self.results.samples.values().cloned().collect();
        sort_samples(&mut samples);
        if self.options.resume && self.options.out.exists() {
            // What an earlier run could not finish; its results are all in the journal.
            self.remove_unfinished()?;
        }
        let mut writer = BundleWriter::new(&self.options.out)?;
        writer.add_samples(&samples)?;
        if let Some(host) = &self.results.host {
            writer.add_json(bundle::HOST, host)?;
        }
        writer.add_json(PLAN, self.plan)?;
        if !self.curve.is_empty() {
            writer.add_json(bundle::CURVE, &self.curve)?;
        }
        let wall = self.elapsed();
        let bundle = writer.finish(Manifest {
            format_version: FormatVersion::CURRENT,
            plumbline_version: env!("CARGO_PKG_VERSION").into(),
            created,
            gpu: self.device.spec().clone(),
            device: Some(self.device.identity().clone()),
            evidence: Some(self.evidence),
            models: self.plan.models.clone(),
            incomplete: self.incomplete,
            files: BTreeMap::new(),
        })?;
        if !matches!(self.ended, Some(Ended::Lost(_))) {
            self.journal.discard();
        }
        Ok(ProfileOutcome {
            bundle,
            num_planned: self.plan.points.len(),
            num_measured: samples.len(),
            uncovered: self.plan.uncovered.iter().map(ToString::to_string).collect(),
            num_left_out: counts.left_out,
            num_measured_again: counts.measured_again,
            num_throttled: counts.throttled,
            num_clock_shifted: counts.clock_shifted,
            num_bimodal: counts.bimodal,
            num_below_floor: counts.below_floor,
            curve: self.curve,
            wall,
        })
    }

    fn remove_unfinished(&self) -> Result<(), ProfileError> {
        let bundle = plumbline_bundles::Bundle::open(&self.options.out)?;
        if bundle.manifest.incomplete.is_empty() {
            let expected = "nothing, or a bundle that lacks points";
            let found = "a complete bundle";
            let location = plumbline_schema::Location::File;
            let path = &self.options.out;
            return Err(plumbline_schema::InputError::invalid(path, location, expected, found).into());
        }
        std::fs::remove_dir_all(&self.options.out)
            .map_err(|e| plumbline_schema::InputError::io(&self.options.out, e).into())
    }

    fn note_counts(&mut self, counts: &Counts) {
        let notes = &mut self.evidence.notes;
        let texts = [
            (counts.measured_again, "points were measured again, as the first attempt was doubtful"),
            (counts.throttled, "points have clocks held down in every attempt"),
            (counts.clock_shifted, "points have an SM clock that moved in every attempt"),
            (counts.bimodal, "points have times that fall into two groups in every attempt"),
            (counts.left_out, "points were left out, as the time budget was spent"),
        ];
        notes.extend(texts.iter().filter(|(n, _)| *n > 0).map(|(n, text)| format!("{n} {text}")));
        if !self.results.earlier.is_zero() {
            notes.push("measured in more than one run; clocks and power are those of the last".into());
        }
        if self.evidence.before == (GpuState { at_ms: self.evidence.before.at_ms, ..GpuState::default() }) {
            self.evidence.notes.push("the state of the GPU could not be read".into());
        }
    }
}

fn is_heavy(point: &Point, spec: &GpuSpec) -> bool {
    let is_matrix_work = point.operator.is_gemm() || point.operator == Operator::Attention;
    let memory_ns = point.shape.bytes().0 as f64 / spec.hbm_bandwidth_bytes_per_s * 1e9;
    let compute_ns = point.shape.flops().0 as f64 / spec.bf16_flops_per_s * 1e9;
    is_matrix_work && compute_ns >= HEAVY_SHARE * memory_ns
}

/// How many points have a mark.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    left_out: usize,
    measured_again: usize,
    throttled: usize,
    clock_shifted: usize,
    bimodal: usize,
    below_floor: usize,
}

impl Counts {
    fn of<'s>(samples: impl Iterator<Item = &'s Sample>) -> Self {
        let mut counts = Self::default();
        for sample in samples {
            let has = |flag| usize::from(sample.has_flag(flag));
            counts.measured_again += usize::from(sample.num_attempts > 1);
            counts.throttled += has("throttled");
            counts.clock_shifted += has("clock_shifted");
            counts.bimodal += has("bimodal");
            counts.below_floor += has("below_floor");
        }
        counts
    }
}

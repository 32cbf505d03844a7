//! The run: evidence, checks, every planned point, and a bundle of what was measured.
//!
//! A point that fails is recorded and the run goes on; an operator whose results are wrong is not timed at all; a
//! device that is lost ends the measuring, and what was measured until then is kept. The run itself is in `run`, what
//! it has found so far in `results` and on disk in `journal`.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use plumbline_bundles::{Bundle, BundleWriter, CurvePoint, Sample, bundle};
use plumbline_schema::{InputError, Location, ModelSpec, Operator};

use crate::{
    advisor::Advisor,
    device::{Device, StoppingRule},
    error::ProfileError,
    journal::{self, Header, Journal},
    plan::{Envelope, Plan},
    results::Results,
    run::Run,
};

/// The payload that holds the plan.
pub const PLAN: &str = "plan.json";

/// What to profile, and how thoroughly.
#[derive(Clone, Debug)]
pub struct ProfileOptions {
    /// Models whose shapes are measured, at least one.
    pub models: Vec<ModelSpec>,
    /// What the engines to be predicted will ask for.
    pub envelope: Envelope,
    /// Whether the model-agnostic grid is measured too, so that models that were not named can be predicted.
    pub grid: bool,
    /// Where the bundle goes; nothing may exist there yet.
    pub out: PathBuf,
    /// When measuring begins, RFC 3339 in UTC; see [`rfc3339`].
    pub created: String,
    /// When to stop repeating a measurement.
    pub rule: StoppingRule,
    /// Measuring time, of all runs together; points that are not begun by then are left out. `None` for the whole plan.
    pub budget: Option<Duration>,
    /// Go on with a run that was killed, or that lost its device.
    pub resume: bool,
}

impl ProfileOptions {
    /// The usual options for some models.
    #[must_use]
    pub fn new(models: Vec<ModelSpec>, out: PathBuf) -> Self {
        Self {
            models,
            envelope: Envelope::default(),
            grid: false,
            out,
            created: rfc3339(SystemTime::now()),
            rule: StoppingRule::default(),
            budget: None,
            resume: false,
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
    /// A few points again, another way.
    SecondLook,
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
    /// What the models can ask for within the envelope and the plan does not cover, in words.
    pub uncovered: Vec<String>,
    /// Points left out as the budget was spent; not counted as incomplete.
    pub num_left_out: usize,
    /// Points measured more than once, as the first attempt was doubtful.
    pub num_measured_again: usize,
    /// Points measured while clocks were held down, in every attempt.
    pub num_throttled: usize,
    /// Points during which the SM clock moved, in every attempt.
    pub num_clock_shifted: usize,
    /// Points whose times fall into two groups, in every attempt.
    pub num_bimodal: usize,
    /// Points under the physical floor, which cannot be true.
    pub num_below_floor: usize,
    /// How the predictor's error fell; empty without an advisor.
    pub curve: Vec<CurvePoint>,
    /// Measuring time of all runs.
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
/// Every result goes to a journal beside the bundle first; `options.resume` goes on from there after a run that was
/// killed or lost its device. With an `advisor` a budget goes to the points that the predictor is least sure of, and
/// the bundle holds the curve of its error.
///
/// # Errors
/// When there is nothing to plan, nothing could be measured at all, or the journal or the bundle cannot be written;
/// anything less is recorded in the bundle's `incomplete`.
pub fn profile(
    device: &mut dyn Device,
    options: &ProfileOptions,
    advisor: Option<&mut dyn Advisor>,
    progress: &mut dyn FnMut(Progress),
) -> Result<ProfileOutcome, ProfileError> {
    let plan = plan_of(options)?;
    if !options.resume {
        // Now, so that a place that cannot be written is known before minutes are spent.
        drop(BundleWriter::new(&options.out)?);
    }
    let header = Header {
        journal_version: journal::JOURNAL_VERSION,
        created: options.created.clone(),
        plan_sha256: bundle::sha256_hex(&bundle::to_json(PLAN, &plan)?),
        device: device.identity().clone(),
    };
    let path = journal::path_of(&options.out);
    let (journal, created, entries) = if options.resume {
        let (journal, created, entries) = Journal::resume(&path, &header)?;
        (journal, created, entries)
    } else {
        (Journal::create(&path, &header)?, header.created, Vec::new())
    };
    let results = Results::new(&plan, entries);
    // A reborrow: the lifetime of a trait object inside an option does not shrink by itself.
    let advisor = advisor.map(|advisor| advisor as &mut dyn Advisor);
    let mut run = Run::new(device, options, &plan, journal, results, advisor, progress);
    if let Err(error) = run.measure() {
        run.give_up();
        return Err(error);
    }
    run.write(created)
}

fn plan_of(options: &ProfileOptions) -> Result<Plan, ProfileError> {
    let plan = if options.grid { Plan::with_grid } else { Plan::new };
    let plan = plan(&options.models, &options.envelope).map_err(|e| {
        let expected = format!(
            "divisors of num_kv_heads = {} and intermediate_size = {}",
            e.num_kv_heads, e.intermediate_size
        );
        invalid("tensor_parallel_sizes", expected, e.tensor_parallel_size.to_string())
    })?;
    if plan.points.is_empty() {
        return Err(invalid("models", "at least one", "none").into());
    }
    Ok(plan)
}

/// An option that cannot be followed.
fn invalid(key: &str, expected: impl Into<String>, found: impl Into<String>) -> InputError {
    InputError::invalid("profile options", Location::Key(key.into()), expected, found)
}

/// Orders rows by shape, cold before hot, as a person would look for them.
pub(crate) fn sort_samples(samples: &mut [Sample]) {
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

//! Against an earlier result: better, the same or worse, and by what.

use std::path::Path;

use plumbline_schema::{InputError, Location, files::read_json};
use serde::Serialize;

use crate::{compare::MetricRow, report::RESULTS, results::SuiteResult};

/// What became of the size of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Smaller by more than the margin.
    Better,
    /// Not told apart from the baseline's.
    Same,
    /// Larger by more than the margin.
    Worse,
    /// The baseline has the number, and now it is n/a.
    Lost,
}

impl Change {
    /// The name in files and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Better => "better",
            Self::Same => "same",
            Self::Worse => "worse",
            Self::Lost => "lost",
        }
    }
}

/// What moved since the baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Nothing: the numbers are the same.
    None,
    /// Numbers differ by no more than repeats, seeds and requests explain.
    Noise,
    /// The simulated value, and the real one did not: the simulator or what it is given changed.
    Model,
    /// The real value, and the simulated one did not: the hardware drifted, or other real runs were taken.
    RealRuns,
    /// Both.
    ModelAndRealRuns,
}

impl Cause {
    /// In words.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::None => "no change",
            Self::Noise => "noise",
            Self::Model => "model change",
            Self::RealRuns => "hardware drift or other real runs",
            Self::ModelAndRealRuns => "model change and other real runs",
        }
    }
}

/// A row beside the baseline's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BaselineCheck {
    /// The baseline's real value, ms.
    pub real_ms: f64,
    /// The baseline's simulated value, ms.
    pub sim_ms: f64,
    /// The baseline's error, signed.
    pub error_pct: f64,
    /// How much the size of the error may change before it is better or worse, in percentage points; none when lost.
    pub margin_pct: Option<f64>,
    /// What became of the size of the error.
    pub change: Change,
    /// What moved.
    pub cause: Cause,
}

/// An earlier result, and where it is from.
#[derive(Clone, Debug, PartialEq)]
pub struct Baseline {
    /// The file.
    pub path: String,
    /// What it holds.
    pub result: SuiteResult,
}

impl Baseline {
    /// Reads the `results.json` of a report folder, or such a file.
    ///
    /// # Errors
    /// `Io`, or `Invalid` with the line; also a result without a case.
    pub fn read(path: &Path) -> Result<Self, InputError> {
        let file = if path.is_dir() { path.join(RESULTS) } else { path.to_path_buf() };
        let result: SuiteResult = read_json(&file, "the results.json of a `plumb validate` report")?;
        if result.cases.is_empty() {
            let key = Location::Key("cases".into());
            return Err(InputError::invalid(&file, key, "at least one case", "none"));
        }
        Ok(Self { path: file.display().to_string(), result })
    }
}

/// Numbers of a row that is not n/a.
#[derive(Clone, Copy)]
struct Numbers {
    real_ms: f64,
    sim_ms: f64,
    error_pct: f64,
    /// Half of the range over the simulations, in percent of the real value.
    seeds_pct: f64,
    /// Half of the range over the repeats, in percent; 0 for a single run, whose noise nobody knows.
    noise_pct: f64,
    /// Half of the width of the error's interval; 0 where there is none.
    half_width_pct: f64,
}

impl Numbers {
    fn of(row: &MetricRow) -> Option<Self> {
        let (real_ms, sim_ms, error_pct) = (row.real_ms?, row.sim_ms?, row.error_pct?);
        let half = |low: Option<f64>, high: Option<f64>| low.zip(high).map_or(0.0, |(l, h)| (h - l) / 2.0);
        Some(Self {
            real_ms,
            sim_ms,
            error_pct,
            seeds_pct: 100.0 * half(row.sim_min_ms, row.sim_max_ms) / real_ms,
            noise_pct: row.noise_pct.unwrap_or(0.0),
            half_width_pct: half(row.error_low_pct, row.error_high_pct),
        })
    }
}

/// Compares a row with the baseline's; `None` when the baseline has no such number.
///
/// The margin is the largest of `min_change_pct`, the noise floor of the real repeats and the scatter over the simulation's
/// seeds (half of its range), each the larger of then and now; with other real runs also of the two intervals, added as
/// independent errors are. With the same real runs the intervals do not count: what real requests were drawn is the same
/// then and now, and cancels.
pub(super) fn against(
    now: Option<&MetricRow>,
    before: &MetricRow,
    min_change_pct: f64,
) -> Option<BaselineCheck> {
    let old = Numbers::of(before)?;
    let check = |margin_pct, change, cause| BaselineCheck {
        real_ms: old.real_ms,
        sim_ms: old.sim_ms,
        error_pct: old.error_pct,
        margin_pct,
        change,
        cause,
    };
    let Some(new) = now.and_then(Numbers::of) else {
        return Some(check(None, Change::Lost, Cause::None));
    };
    let seeds = new.seeds_pct.max(old.seeds_pct);
    let noise = new.noise_pct.max(old.noise_pct);
    let has_same_real = is_same(new.real_ms, old.real_ms);
    let mut margin = min_change_pct.max(seeds).max(noise);
    if !has_same_real {
        margin = margin.max(new.half_width_pct.hypot(old.half_width_pct));
    }
    let growth = new.error_pct.abs() - old.error_pct.abs();
    let change = match growth {
        g if g > margin => Change::Worse,
        g if g < -margin => Change::Better,
        _ => Change::Same,
    };
    let sim_moved = change_pct(old.sim_ms, new.sim_ms);
    let real_moved = change_pct(old.real_ms, new.real_ms);
    let real_margin = min_change_pct.max(noise);
    let cause = match (sim_moved > min_change_pct.max(seeds), real_moved > real_margin) {
        (false, false) if change != Change::Same && sim_moved >= real_moved => Cause::Model,
        (false, false) if change != Change::Same => Cause::RealRuns,
        (false, false) if has_same_real && is_same(new.sim_ms, old.sim_ms) => Cause::None,
        (false, false) => Cause::Noise,
        (true, false) => Cause::Model,
        (false, true) => Cause::RealRuns,
        (true, true) => Cause::ModelAndRealRuns,
    };
    Some(check(Some(margin), change, cause))
}

/// The size of a change in percent of what was.
fn change_pct(before: f64, now: f64) -> f64 {
    if before == 0.0 && now == 0.0 { 0.0 } else { 100.0 * ((now - before) / before).abs() }
}

/// Whether two numbers are the same but for the rounding of another build.
fn is_same(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * a.abs().max(b.abs())
}

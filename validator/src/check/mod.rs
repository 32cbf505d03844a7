//! A gate: may this change of the simulator, a bundle or a profile go in?
//!
//! Each case is judged by the [`tolerance`]s of its suite and against a [`baseline`], an earlier result of the same suite.
//! [`junit`] and [`markdown`] render the report for a CI system.

pub mod baseline;
pub mod junit;
pub mod markdown;
pub mod tolerance;

use std::collections::{HashMap, HashSet};

use serde::Serialize;

pub use self::{
    baseline::{Baseline, BaselineCheck, Cause, Change},
    tolerance::{Tolerance, Tolerances},
};
use crate::{
    compare::MetricRow,
    metrics::{Metric, Stat},
    results::{CaseResult, CaseStatus, SuiteResult},
    suite::{Case, Suite},
};

/// Smallest change of an error's size that counts as better or worse, in percentage points, unless told otherwise.
pub const DEFAULT_MIN_CHANGE_PCT: f64 = 1.0;

/// What the gate says of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Outside of its tolerance, or worse than the baseline.
    Failed,
    /// Judged, and neither.
    Passed,
    /// Nothing to judge it by.
    NotJudged,
}

impl Verdict {
    /// The name in tables.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Passed => "passed",
            Self::NotJudged => "not judged",
        }
    }
}

/// One number of a case, judged.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RowCheck {
    /// The metric.
    pub metric: Metric,
    /// The statistic.
    pub stat: Stat,
    /// Real, ms; none when n/a.
    pub real_ms: Option<f64>,
    /// Simulated, ms; none when n/a.
    pub sim_ms: Option<f64>,
    /// `100 (sim - real) / real`; none when n/a.
    pub error_pct: Option<f64>,
    /// The noise floor of the real repeats; none of a single run.
    pub noise_pct: Option<f64>,
    /// What the error may be, in words; none without a tolerance.
    pub tolerance: Option<String>,
    /// Whether it is; none without a tolerance, or when n/a.
    pub inside_tolerance: Option<bool>,
    /// Against the baseline; none when it has no such number.
    pub baseline: Option<BaselineCheck>,
    /// What follows.
    pub verdict: Verdict,
    /// Why it failed or was not judged; none when it passed.
    pub reason: Option<String>,
}

/// A case, judged.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CaseCheck {
    /// The case's name.
    pub name: String,
    /// What follows from its numbers, or from its having none.
    pub verdict: Verdict,
    /// Why it could not be simulated or compared; none when it could.
    pub error: Option<String>,
    /// Every metric and statistic that is known now or was in the baseline.
    pub rows: Vec<RowCheck>,
}

/// What the gate found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckReport {
    /// Whether the gate is open: something was judged, and nothing failed.
    pub passed: bool,
    /// The baseline's file.
    pub baseline: Option<String>,
    /// Cases that failed, whole or in a number.
    pub num_failed_cases: usize,
    /// Numbers judged, by tolerance or baseline.
    pub num_judged: usize,
    /// Of these, failed ones.
    pub num_failed: usize,
    /// Of these, ones whose error became smaller.
    pub num_better: usize,
    /// Of these, ones whose error became larger.
    pub num_worse: usize,
    /// Cases in the order of the suite.
    pub cases: Vec<CaseCheck>,
    /// Cases of the baseline that are no longer run.
    pub missing_cases: Vec<String>,
    /// Cases that the baseline does not know.
    pub new_cases: Vec<String>,
}

impl CheckReport {
    /// Judges a suite's result; `min_change_pct` is the least change that counts against the baseline.
    #[must_use]
    pub fn new(
        suite: &Suite,
        result: &SuiteResult,
        baseline: Option<&Baseline>,
        min_change_pct: f64,
    ) -> Self {
        let known: HashMap<&str, &CaseResult> = baseline
            .iter()
            .flat_map(|baseline| &baseline.result.cases)
            .map(|case| (case.name.as_str(), case))
            .collect();
        let settings: HashMap<&str, &Case> = suite.cases.iter().map(|c| (c.name.as_str(), c)).collect();
        let none = Tolerances::default();
        let judge = |case: &CaseResult| {
            let tolerances = settings.get(case.name.as_str()).map_or(&none, |case| &case.tolerances);
            check_case(case, tolerances, known.get(case.name.as_str()).copied(), min_change_pct)
        };
        let cases: Vec<_> = result.cases.iter().map(judge).collect();
        let names: HashSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        let of_baseline = baseline.iter().flat_map(|baseline| &baseline.result.cases);
        let missing = of_baseline.map(|case| &case.name).filter(|name| !names.contains(name.as_str()));
        let new = cases.iter().map(|case| &case.name).filter(|name| !known.contains_key(name.as_str()));
        let rows = || cases.iter().flat_map(|case| &case.rows);
        let num_rows = |is_counted: &dyn Fn(&&RowCheck) -> bool| rows().filter(is_counted).count();
        let changed = |change: Change| {
            num_rows(&|row| row.baseline.as_ref().is_some_and(|baseline| baseline.change == change))
        };
        let num_judged = num_rows(&|row| row.verdict != Verdict::NotJudged);
        let num_failed_cases = cases.iter().filter(|case| case.verdict == Verdict::Failed).count();
        Self {
            passed: num_judged > 0 && num_failed_cases == 0,
            baseline: baseline.map(|baseline| baseline.path.clone()),
            num_failed_cases,
            num_judged,
            num_failed: num_rows(&|row| row.verdict == Verdict::Failed),
            num_better: changed(Change::Better),
            num_worse: changed(Change::Worse) + changed(Change::Lost),
            missing_cases: missing.cloned().collect(),
            new_cases: if baseline.is_some() { new.cloned().collect() } else { Vec::new() },
            cases,
        }
    }

    /// In one line: `failed: 2 of 16 numbers in 1 of 4 cases`.
    #[must_use]
    pub fn headline(&self) -> String {
        let (judged, cases) = (self.num_judged, self.cases.len());
        if judged == 0 && self.num_failed_cases == 0 {
            return "failed: nothing was judged; give cases a tolerance, or a baseline that has them".into();
        }
        if self.passed {
            let unjudged = self.cases.iter().filter(|case| case.verdict == Verdict::NotJudged).count();
            let rest = if unjudged > 0 { format!("; {unjudged} cases not judged") } else { String::new() };
            return format!("passed: {judged} numbers of {} cases{rest}", cases - unjudged);
        }
        format!(
            "failed: {} of {judged} numbers, in {} of {cases} cases",
            self.num_failed, self.num_failed_cases
        )
    }

    /// Numbers that failed, with their case.
    pub fn failures(&self) -> impl Iterator<Item = (&CaseCheck, &RowCheck)> {
        self.rows().filter(|(_, row)| row.verdict == Verdict::Failed)
    }

    /// All numbers, with their case.
    pub fn rows(&self) -> impl Iterator<Item = (&CaseCheck, &RowCheck)> {
        self.cases.iter().flat_map(|case| case.rows.iter().map(move |row| (case, row)))
    }
}

fn check_case(
    case: &CaseResult,
    tolerances: &Tolerances,
    before: Option<&CaseResult>,
    min_change_pct: f64,
) -> CaseCheck {
    if case.status == CaseStatus::Failed {
        let error = case.error.clone().unwrap_or_else(|| "no reason given".into());
        let name = case.name.clone();
        return CaseCheck { name, verdict: Verdict::Failed, error: Some(error), rows: Vec::new() };
    }
    let mut rows = Vec::new();
    for metric in Metric::ALL {
        for stat in Stat::ALL {
            let now = case.row(metric, stat);
            let before = before.and_then(|case| case.row(metric, stat));
            let baseline = before.and_then(|before| baseline::against(now, before, min_change_pct));
            rows.extend(check_row((metric, stat), now, tolerances.get(metric, stat), baseline));
        }
    }
    let has = |verdict| rows.iter().any(|row: &RowCheck| row.verdict == verdict);
    let verdict = if has(Verdict::Failed) {
        Verdict::Failed
    } else if has(Verdict::Passed) {
        Verdict::Passed
    } else {
        Verdict::NotJudged
    };
    CaseCheck { name: case.name.clone(), verdict, error: None, rows }
}

/// `None` for a number that is n/a and of which nothing is asked.
fn check_row(
    (metric, stat): (Metric, Stat),
    now: Option<&MetricRow>,
    tolerance: Option<(Tolerance, bool)>,
    baseline: Option<BaselineCheck>,
) -> Option<RowCheck> {
    let error_pct = now.and_then(|row| row.error_pct);
    let must_be_known = matches!(tolerance, Some((_, true)));
    if error_pct.is_none() && !must_be_known && baseline.is_none() {
        return None;
    }
    let inside_tolerance = tolerance.zip(now).and_then(|((tolerance, _), row)| tolerance.allows(row));
    let mut reasons = Vec::new();
    match (tolerance, inside_tolerance, error_pct) {
        (Some((tolerance, _)), Some(false), Some(error)) => {
            reasons.push(format!("expected an error within {tolerance}, found {error:+.1} %"));
        }
        (Some((tolerance, true)), None, _) => {
            let why = now.and_then(|row| row.na_reason.as_deref()).unwrap_or("it is not known");
            reasons.push(format!("expected an error within {tolerance}, found none: {why}"));
        }
        _ => {}
    }
    reasons.extend(baseline.as_ref().and_then(|baseline| worsening(baseline, error_pct)));
    let verdict = if !reasons.is_empty() {
        Verdict::Failed
    } else if inside_tolerance.is_some() || baseline.is_some() {
        Verdict::Passed
    } else {
        reasons.push("no tolerance, and no baseline that has it".into());
        Verdict::NotJudged
    };
    Some(RowCheck {
        metric,
        stat,
        real_ms: now.and_then(|row| row.real_ms),
        sim_ms: now.and_then(|row| row.sim_ms),
        error_pct,
        noise_pct: now.and_then(|row| row.noise_pct),
        tolerance: tolerance.map(|(tolerance, _)| tolerance.to_string()),
        inside_tolerance,
        baseline,
        verdict,
        reason: (!reasons.is_empty()).then(|| reasons.join("; ")),
    })
}

/// What became worse, in words.
fn worsening(baseline: &BaselineCheck, error_pct: Option<f64>) -> Option<String> {
    let before = baseline.error_pct;
    match (baseline.change, error_pct, baseline.margin_pct) {
        (Change::Worse, Some(now), Some(margin)) => Some(format!(
            "worse than the baseline: from {before:+.1} % to {now:+.1} %, margin {margin:.1} points ({})",
            baseline.cause.text()
        )),
        (Change::Lost, ..) => Some(format!("the baseline has an error of {before:+.1} %, now there is none")),
        _ => None,
    }
}

#[cfg(test)]
mod tests;

//! What a validation found, as `plumb validate --json` prints it.

use std::collections::BTreeMap;

use plumbline_bundles::stats::percentile_of_sorted;
use plumbline_schema::Run;
use serde::{Deserialize, Serialize};

use crate::{
    compare::{Comparison, E2eParts, MetricRow, PairedRow, RequestCounts},
    evidence::Evidence,
    metrics::{Metric, RunMetrics, Stat},
    report::Waterfall,
    settings::{Setting, settings},
    suite::Role,
    timeline::Timeline,
    variants::VariantRow,
};

/// Whether a case could be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaseStatus {
    /// It was simulated and compared.
    Ok,
    /// It was not; the error says why.
    Failed,
}

/// One case of a suite.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaseResult {
    /// The case's name.
    pub name: String,
    /// Whether it could be judged.
    pub status: CaseStatus,
    /// Why it failed; null when it did not.
    pub error: Option<String>,
    /// Every metric and statistic; empty when it failed.
    pub metrics: Vec<MetricRow>,
    /// Share of simulated operator time (0..1) by where the times come from; empty when not known.
    pub coverage: BTreeMap<String, f64>,
    /// Fitted on or held out.
    #[serde(default)]
    pub role: Role,
    /// Errors request by request.
    #[serde(default)]
    pub paired: Vec<PairedRow>,
    /// The end-to-end time in its parts; none when it failed.
    #[serde(default)]
    pub e2e_parts: Option<E2eParts>,
    /// How requests ended; none when it failed.
    #[serde(default)]
    pub requests: Option<RequestCounts>,
    /// Wall time of the simulation alone; none when it did not run.
    #[serde(default)]
    pub simulate_ms: Option<f64>,
    /// Share of the simulated steps' time that is the host's, 0..=1: near 1, faster kernels change nothing.
    #[serde(default)]
    pub host_share: Option<f64>,
    /// The figures as the tool that recorded the real run defines them; empty where no other tool did.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub variants: Vec<VariantRow>,
    /// What a reader should know before trusting a number.
    #[serde(default)]
    pub notes: Vec<String>,
    /// What must be the same on both sides, and whether it is; empty when it failed.
    #[serde(default)]
    pub settings: Vec<Setting>,
    /// What the numbers rest on; none when it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Evidence>,
    /// How the difference comes about; none when it was not asked for. Not in the JSON.
    #[serde(skip)]
    pub waterfall: Option<Waterfall>,
    /// Steps to be seen; none when none are recorded. Not in the JSON.
    #[serde(skip)]
    pub timeline: Option<Timeline>,
    /// The samples behind the numbers, for figures; not in the JSON.
    #[serde(skip)]
    pub samples: Option<Samples>,
}

/// Samples of all runs of a case.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples {
    /// Each real repeat.
    pub real: Vec<RunMetrics>,
    /// The simulated run.
    pub sim: RunMetrics,
}

impl CaseResult {
    /// A case that was compared.
    #[must_use]
    pub fn compared(name: impl Into<String>, role: Role, comparison: Comparison) -> Self {
        let Comparison { metrics, paired, e2e_parts, requests, real, sim } = comparison;
        let mut notes: Vec<_> = e2e_parts.iter().filter_map(E2eParts::cancellation).collect();
        let unfinished = |o: &crate::metrics::Outcomes| o.rejected + o.incomplete;
        if requests.real.iter().chain([&requests.sim]).any(|o| unfinished(o) > 0) {
            let real: Vec<_> = requests.real.iter().map(|o| unfinished(o).to_string()).collect();
            notes.push(format!(
                "requests that did not finish, left out: {} real, {} simulated",
                real.join(" / "),
                unfinished(&requests.sim)
            ));
        }
        Self {
            name: name.into(),
            status: CaseStatus::Ok,
            error: None,
            metrics,
            coverage: BTreeMap::new(),
            role,
            paired,
            e2e_parts,
            requests: Some(requests),
            simulate_ms: None,
            host_share: None,
            variants: Vec::new(),
            notes,
            settings: Vec::new(),
            evidence: None,
            waterfall: None,
            timeline: None,
            samples: Some(Samples { real, sim }),
        }
    }

    /// With what is known of the runs themselves: settings and steps.
    #[must_use]
    pub fn with_runs(mut self, real: &[Run], sim: &Run) -> Self {
        self.settings = settings(real, sim);
        self.timeline = real.first().and_then(|first| Timeline::busiest(first, sim));
        self
    }

    /// A case that could not be judged.
    #[must_use]
    pub fn failed(name: impl Into<String>, role: Role, error: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            status: CaseStatus::Failed,
            error: Some(error.into()),
            metrics: Vec::new(),
            coverage: BTreeMap::new(),
            role,
            paired: Vec::new(),
            e2e_parts: None,
            requests: None,
            simulate_ms: None,
            host_share: None,
            variants: Vec::new(),
            notes: Vec::new(),
            settings: Vec::new(),
            evidence: None,
            waterfall: None,
            timeline: None,
            samples: None,
        }
    }

    /// The row of a metric and statistic.
    #[must_use]
    pub fn row(&self, metric: Metric, stat: Stat) -> Option<&MetricRow> {
        self.metrics.iter().find(|row| row.metric == metric && row.stat == stat)
    }

    /// Number of real repeats; 0 when the case failed.
    #[must_use]
    pub fn num_repeats(&self) -> usize {
        self.requests.as_ref().map_or(0, |r| r.real.len())
    }
}

/// Errors of one metric's p50 over the cases of one role.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ErrorSummary {
    /// Cases that have the number.
    pub num_cases: u64,
    /// Cases whose simulated value lies inside the band of the real repeats.
    pub num_inside_band: u64,
    /// Median over cases of the absolute error.
    pub median_abs_error_pct: f64,
    /// Largest absolute error.
    pub worst_abs_error_pct: f64,
    /// The case that has it.
    pub worst_case: String,
}

/// A suite in a few numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Cases run.
    pub num_cases: u64,
    /// Cases judged.
    pub num_ok: u64,
    /// Cases that failed.
    pub num_failed: u64,
    /// From reading the first file to the last comparison.
    pub wall_ms: f64,
    /// The longest single simulation; none when none ran.
    pub max_simulate_ms: Option<f64>,
    /// Errors of p50, by role and metric; a role without judged cases is absent.
    pub p50_errors: BTreeMap<Role, BTreeMap<Metric, ErrorSummary>>,
}

/// Everything a validation found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SuiteResult {
    /// Cases in the order of the suite.
    pub cases: Vec<CaseResult>,
    /// All of them in a few numbers.
    pub summary: Summary,
}

impl SuiteResult {
    /// Collects cases and sums them up.
    #[must_use]
    pub fn new(cases: Vec<CaseResult>, wall_ms: f64) -> Self {
        let num_ok = cases.iter().filter(|c| c.status == CaseStatus::Ok).count() as u64;
        let summary = Summary {
            num_cases: cases.len() as u64,
            num_ok,
            num_failed: cases.len() as u64 - num_ok,
            wall_ms,
            max_simulate_ms: cases.iter().filter_map(|c| c.simulate_ms).max_by(f64::total_cmp),
            p50_errors: Role::ALL
                .into_iter()
                .map(|role| (role, summarise(&cases, role)))
                .filter(|(_, errors)| !errors.is_empty())
                .collect(),
        };
        Self { cases, summary }
    }

    /// Cases as reports show them: what was held out before what was fitted on.
    pub fn cases_by_role(&self) -> impl Iterator<Item = &CaseResult> {
        Role::ALL.into_iter().flat_map(|role| self.cases.iter().filter(move |c| c.role == role))
    }

    /// Cases that could not be judged.
    pub fn failures(&self) -> impl Iterator<Item = &CaseResult> {
        self.cases.iter().filter(|c| c.status == CaseStatus::Failed)
    }
}

fn summarise(cases: &[CaseResult], role: Role) -> BTreeMap<Metric, ErrorSummary> {
    Metric::ALL
        .into_iter()
        .filter_map(|metric| {
            let mut errors: Vec<(f64, &str, bool)> = cases
                .iter()
                .filter(|case| case.role == role)
                .filter_map(|case| {
                    let row = case.row(metric, Stat::P50)?;
                    Some((row.error_pct?.abs(), case.name.as_str(), row.inside_band == Some(true)))
                })
                .collect();
            errors.sort_by(|a, b| a.0.total_cmp(&b.0));
            let &(worst_abs_error_pct, worst_case, _) = errors.last()?;
            let sorted: Vec<f64> = errors.iter().map(|e| e.0).collect();
            let summary = ErrorSummary {
                num_cases: errors.len() as u64,
                num_inside_band: errors.iter().filter(|e| e.2).count() as u64,
                median_abs_error_pct: percentile_of_sorted(&sorted, 0.5),
                worst_abs_error_pct,
                worst_case: worst_case.into(),
            };
            Some((metric, summary))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        compare::compare,
        testing::{request, run},
    };

    fn case(name: &str, role: Role, sim_ttft: u64) -> CaseResult {
        let make =
            |ttft: u64| run(vec![request(0, 0, &[ttft * 1_000_000, (ttft + 10) * 1_000_000])]).with_tokens();
        let mut case = CaseResult::compared(name, role, compare(&[make(20)], &make(sim_ttft)).unwrap());
        case.simulate_ms = Some(sim_ttft as f64);
        case
    }

    fn result() -> SuiteResult {
        let cases = vec![
            case("f", Role::Fit, 20),
            case("a", Role::HeldOut, 21),
            case("b", Role::HeldOut, 16),
            case("c", Role::HeldOut, 23),
            CaseResult::failed("d", Role::HeldOut, "no such file"),
        ];
        SuiteResult::new(cases, 12.5)
    }

    #[test]
    fn the_summary_gives_median_and_worst_by_role() {
        let SuiteResult { summary, .. } = result();
        assert_eq!((summary.num_cases, summary.num_ok, summary.num_failed), (5, 4, 1));
        assert_eq!(summary.max_simulate_ms, Some(23.0));
        let held_out = &summary.p50_errors[&Role::HeldOut][&Metric::Ttft];
        assert_eq!((held_out.num_cases, held_out.num_inside_band), (3, 1));
        assert!((held_out.median_abs_error_pct - 15.0).abs() < 1e-9);
        assert!((held_out.worst_abs_error_pct - 20.0).abs() < 1e-9);
        assert_eq!(held_out.worst_case, "b");
        let fit = &summary.p50_errors[&Role::Fit][&Metric::E2e];
        assert_eq!((fit.worst_abs_error_pct, fit.num_inside_band), (0.0, 1));
    }

    #[test]
    fn json_has_the_documented_keys_and_reads_back() {
        let result = result();
        let json = serde_json::to_value(&result).unwrap();
        let first = &json["cases"][1];
        assert_eq!(first["name"], "a");
        assert_eq!(first["status"], "ok");
        assert!(first["error"].is_null() && first["coverage"].is_object());
        let row = first["metrics"][1].as_object().unwrap();
        let keys = [
            "metric",
            "stat",
            "n",
            "real_ms",
            "real_min_ms",
            "real_max_ms",
            "sim_ms",
            "sim_min_ms",
            "sim_max_ms",
            "error_pct",
            "error_low_pct",
            "error_high_pct",
            "noise_pct",
            "inside_band",
            "bands_na_reason",
        ];
        let mut expected: Vec<_> = keys.to_vec();
        expected.sort_unstable();
        let mut found: Vec<_> = row.keys().map(String::as_str).collect();
        found.sort_unstable();
        assert_eq!(found, expected);
        assert_eq!((row["metric"].as_str(), row["stat"].as_str()), (Some("ttft"), Some("p50")));
        assert_eq!(row["inside_band"], true);
        assert_eq!(json["cases"][4]["status"], "failed");
        assert_eq!(json["cases"][4]["error"], "no such file");
        assert_eq!(json["summary"]["p50_errors"]["held_out"]["ttft"]["worst_case"], "b");

        let mut back: SuiteResult = serde_json::from_value(json).unwrap();
        for (case, original) in back.cases.iter_mut().zip(&result.cases) {
            case.samples.clone_from(&original.samples);
        }
        assert_eq!(back, result);
    }

    #[test]
    fn held_out_cases_come_first_in_reports() {
        let result = result();
        let names: Vec<_> = result.cases_by_role().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c", "d", "f"]);
    }

    #[test]
    fn requests_left_out_are_noted() {
        let run = run(vec![request(0, 0, &[10, 20]), request(1, 0, &[10, 20])]).with_tokens();
        let mut sim = run.clone();
        sim.requests[1].status = plumbline_schema::RequestStatus::Rejected;
        let case = CaseResult::compared("x", Role::HeldOut, compare(&[run], &sim).unwrap());
        assert_eq!(case.notes, ["requests that did not finish, left out: 0 real, 1 simulated"]);
    }
}

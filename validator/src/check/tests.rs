use std::path::{Path, PathBuf};

use super::*;
use crate::{compare::compare, suite::Role, testing::spread_run};

/// A suite of one case a name, each with these lines.
fn suite(names: &[&str], lines: &str) -> Suite {
    let case = |name: &&str| {
        format!(
            "[[case]]\nname = \"{name}\"\nreal = [\"runs/a\"]\nbundle = \"b\"\nmodel = \"qwen3-0.6b\"\n\
             engine = \"e\"\n{lines}\n"
        )
    };
    let text: String = names.iter().map(case).collect();
    Suite::parse(&text, Path::new("/suite.toml"), Path::new("/data")).unwrap()
}

/// A case of real repeats with these TTFTs, and one simulation.
fn case(name: &str, real_ms: &[f64], sim_ms: f64) -> CaseResult {
    let real: Vec<_> = real_ms.iter().map(|&ttft| spread_run(ttft, 4.0)).collect();
    CaseResult::compared(name, Role::HeldOut, compare(&real, &spread_run(sim_ms, 4.0)).unwrap())
}

fn result(cases: Vec<CaseResult>) -> SuiteResult {
    SuiteResult::new(cases, 1.0)
}

fn baseline(cases: Vec<CaseResult>) -> Baseline {
    Baseline { path: "old/results.json".into(), result: result(cases) }
}

fn check(lines: &str, now: CaseResult, before: Option<CaseResult>) -> CheckReport {
    let before = before.map(|case| baseline(vec![case]));
    CheckReport::new(&suite(&["a"], lines), &result(vec![now]), before.as_ref(), DEFAULT_MIN_CHANGE_PCT)
}

fn ttft(report: &CheckReport) -> &RowCheck {
    report.cases[0].rows.iter().find(|r| r.metric == Metric::Ttft && r.stat == Stat::P50).unwrap()
}

#[test]
fn an_error_within_its_tolerance_passes_and_one_outside_fails() {
    let now = || case("a", &[20.0], 21.8);
    let report = check("tolerance = { ttft.p50 = 10 }", now(), None);
    assert!(report.passed, "{report:?}");
    assert_eq!((report.num_judged, ttft(&report).inside_tolerance), (1, Some(true)));
    let report = check("tolerance = { ttft = { p50 = 8.0 } }", now(), None);
    assert!(!report.passed);
    let row = ttft(&report);
    assert_eq!(row.verdict, Verdict::Failed);
    assert_eq!(row.reason.as_deref(), Some("expected an error within 8 %, found +9.0 %"));
    assert_eq!(report.headline(), "failed: 1 of 1 numbers, in 1 of 1 cases");
}

#[test]
fn a_band_can_be_the_tolerance() {
    // 10 % beyond the median and inside of the repeats' range.
    let now = || case("a", &[18.0, 20.0, 23.0], 22.0);
    assert!(check("tolerance.ttft.p50 = \"band\"", now(), None).passed);
    assert!(check("tolerance.ttft.p50 = { pct = 5.0, or_band = true }", now(), None).passed);
    assert!(!check("tolerance.ttft.p50 = { pct = 5.0 }", now(), None).passed);
    assert!(!check("tolerance.ttft.p50 = \"band\"", case("a", &[20.0], 22.0), None).passed);
}

#[test]
fn a_gate_that_judged_nothing_is_closed() {
    let report = check("", case("a", &[20.0], 20.0), None);
    assert_eq!((report.passed, report.num_judged), (false, 0));
    assert!(report.headline().contains("nothing was judged"));
    assert_eq!(report.cases[0].verdict, Verdict::NotJudged);
    // A baseline that knows other cases alone judges nothing either.
    let before = baseline(vec![case("b", &[20.0], 20.0)]);
    let now = result(vec![case("a", &[20.0], 20.0)]);
    let report = CheckReport::new(&suite(&["a"], ""), &now, Some(&before), DEFAULT_MIN_CHANGE_PCT);
    assert!(!report.passed);
    assert_eq!((report.missing_cases, report.new_cases), (vec!["b".to_owned()], vec!["a".to_owned()]));
}

#[test]
fn a_case_that_cannot_be_run_closes_the_gate() {
    let now = result(vec![case("a", &[20.0], 20.0), CaseResult::failed("b", Role::HeldOut, "no such run")]);
    let report = CheckReport::new(&suite(&["a", "b"], "tolerance.ttft.p50 = 5"), &now, None, 1.0);
    assert!(!report.passed);
    assert_eq!(report.headline(), "failed: 0 of 1 numbers, in 1 of 2 cases");
    assert_eq!(report.cases[1].error.as_deref(), Some("no such run"));
}

#[test]
fn what_a_case_asks_of_itself_must_be_known() {
    let few = |requests: usize| {
        let cut = |mut run: plumbline_schema::Run| {
            run.requests.truncate(requests);
            run.tokens.retain(|token| token.request_id < requests as u64);
            run
        };
        let comparison = compare(&[cut(spread_run(20.0, 4.0))], &cut(spread_run(20.0, 4.0))).unwrap();
        CaseResult::compared("a", Role::HeldOut, comparison)
    };
    let report = check("tolerance = { ttft.p99 = 5, ttft.p50 = 5 }", few(50), None);
    let p99 = report.failures().next().unwrap().1;
    assert_eq!(
        p99.reason.as_deref(),
        Some("expected an error within 5 %, found none: p99 wants 100 samples, there are 50")
    );
    // A suite's default is for those that have the number.
    let text = "tolerance = { ttft.p99 = 5.0, ttft.p50 = 5.0 }\n[[case]]\nname = \"a\"\nreal = [\"r\"]\n\
                bundle = \"b\"\nmodel = \"qwen3-0.6b\"\nengine = \"e\"\n";
    let suite = Suite::parse(text, Path::new("s.toml"), &PathBuf::new()).unwrap();
    let report = CheckReport::new(&suite, &result(vec![few(50)]), None, 1.0);
    assert!(report.passed, "{report:?}");
    assert_eq!(report.num_judged, 1);
}

#[test]
fn a_changed_model_is_named_and_a_larger_error_is_worse() {
    let report = check("", case("a", &[20.0], 22.0), Some(case("a", &[20.0], 21.0)));
    let before = ttft(&report).baseline.clone().unwrap();
    assert_eq!((before.change, before.cause), (Change::Worse, Cause::Model));
    assert!((before.error_pct - 5.0).abs() < 0.01);
    assert!(!report.passed);
    let reason = ttft(&report).reason.clone().unwrap();
    assert_eq!(reason, "worse than the baseline: from +5.0 % to +10.0 %, margin 1.0 points (model change)");
    // The sign may change; what counts is the size.
    let report = check("", case("a", &[20.0], 20.2), Some(case("a", &[20.0], 18.0)));
    let before = ttft(&report).baseline.clone().unwrap();
    assert_eq!((before.change, before.cause), (Change::Better, Cause::Model));
    assert!(report.passed && report.num_better > 0);
}

#[test]
fn drift_of_the_hardware_is_named_drift() {
    let report = check("", case("a", &[24.0, 24.2], 20.0), Some(case("a", &[20.0, 20.2], 20.0)));
    let before = ttft(&report).baseline.clone().unwrap();
    assert_eq!((before.change, before.cause), (Change::Worse, Cause::RealRuns), "{before:?}");
    // When the simulator follows the machine, the error stays, and both are known to have moved.
    let report = check("", case("a", &[24.0, 24.2], 24.0), Some(case("a", &[20.0, 20.2], 20.0)));
    let before = ttft(&report).baseline.clone().unwrap();
    assert_eq!((before.change, before.cause), (Change::Same, Cause::ModelAndRealRuns));
    assert!(report.passed);
}

#[test]
fn noise_is_not_worse() {
    // The error grew by 3 points; the repeats differ by 4 % either way.
    let report = check("", case("a", &[19.2, 20.8], 20.8), Some(case("a", &[19.2, 20.8], 20.2)));
    let before = ttft(&report).baseline.clone().unwrap();
    assert_eq!(before.change, Change::Same, "{before:?}");
    assert!(before.margin_pct.unwrap() > 3.9);
    assert!(report.passed);
    // New repeats of the same machine.
    let report = check("", case("a", &[19.4, 20.4], 20.0), Some(case("a", &[19.2, 20.8], 20.0)));
    assert_eq!(ttft(&report).baseline.as_ref().unwrap().cause, Cause::Noise);
    assert!(report.passed);
    let same = check("", case("a", &[20.0], 21.0), Some(case("a", &[20.0], 21.0)));
    let before = ttft(&same).baseline.clone().unwrap();
    assert_eq!((before.change, before.cause), (Change::Same, Cause::None));
}

#[test]
fn a_number_that_is_gone_is_lost() {
    let mut now = case("a", &[20.0], 21.0);
    let row = now.metrics.iter_mut().find(|r| r.metric == Metric::Itl && r.stat == Stat::P50).unwrap();
    (row.real_ms, row.sim_ms, row.error_pct, row.inside_band) = (None, None, None, None);
    let report = check("", now, Some(case("a", &[20.0], 21.0)));
    let (_, row) = report.failures().next().unwrap();
    assert_eq!((row.metric, row.baseline.as_ref().unwrap().change), (Metric::Itl, Change::Lost));
    assert_eq!((report.passed, report.num_worse), (false, 1));
}

#[test]
fn suites_refuse_tolerances_that_mean_nothing() {
    let error = |lines: &str| {
        let text = format!(
            "[[case]]\nname = \"a\"\nreal = [\"r\"]\nbundle = \"b\"\nmodel = \"qwen3-0.6b\"\nengine = \"e\"\n{lines}\n"
        );
        Suite::parse(&text, Path::new("s.toml"), Path::new("/data")).unwrap_err().to_string()
    };
    for (lines, contains) in [
        ("tolerance.tfft.p50 = 8", "unknown variant `tfft`"),
        ("tolerance.ttft.p95 = 8", "unknown variant `p95`"),
        ("tolerance.ttft.p50 = -8", "from 0 on"),
        ("tolerance.ttft.p50 = nan", "from 0 on"),
        ("tolerance.ttft.p50 = \"bond\"", "a percentage, \"band\", or"),
        ("tolerance.ttft.p50 = { pct = 8, or = \"band\" }", "a percentage, \"band\", or"),
        ("tolerances.ttft.p50 = 8", "unknown field `tolerances`"),
    ] {
        let text = error(lines);
        assert!(text.starts_with("s.toml, line 7") && text.contains(contains), "{lines}: {text}");
    }
}

#[test]
fn baselines_are_read_from_a_report_folder_or_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let written = result(vec![case("a", &[20.0], 21.0)]);
    crate::report::write_report(&written, &folder.path().join("report")).unwrap();
    let from_folder = Baseline::read(&folder.path().join("report")).unwrap();
    assert_eq!(from_folder, Baseline::read(&folder.path().join("report/results.json")).unwrap());
    assert_eq!(from_folder.result.cases[0].metrics, written.cases[0].metrics);
    let error = Baseline::read(&folder.path().join("none")).unwrap_err().to_string();
    assert!(error.contains("none"), "{error}");
    std::fs::write(folder.path().join("bad.json"), "{\"cases\": []}").unwrap();
    assert!(Baseline::read(&folder.path().join("bad.json")).is_err());
}

fn failing() -> CheckReport {
    let now = result(vec![
        case("a|<1>&", &[20.0], 22.0),
        case("b", &[20.0], 20.0),
        CaseResult::failed("c", Role::HeldOut, "no \u{1b}[31mrun"),
    ]);
    let suite = suite(&["a|<1>&", "b", "c"], "tolerance.ttft.p50 = 5");
    let before = baseline(vec![case("b", &[20.0], 23.0), case("gone", &[20.0], 20.0)]);
    CheckReport::new(&suite, &now, Some(&before), 1.0)
}

#[test]
fn junit_reads_back_as_what_was_found() {
    let text = junit::render(&failing()).unwrap();
    let read = quick_junit::Report::deserialize_from_str(&text).unwrap();
    assert_eq!(read.test_suites.len(), 1);
    let suite = &read.test_suites[0];
    let report = failing();
    let num_rows = report.rows().count();
    // The case that failed and the one that is gone are a test each.
    assert_eq!((suite.tests, suite.failures, suite.errors), (num_rows + 2, 1, 1));
    let is_failed = |case: &&quick_junit::TestCase| {
        case.classname.as_deref() == Some("a|<1>&") && case.name.as_str() == "ttft p50"
    };
    let failed = suite.test_cases.iter().find(is_failed).unwrap();
    assert!(matches!(failed.status, quick_junit::TestCaseStatus::NonSuccess { .. }), "{failed:?}");
    assert!(text.contains("expected an error within 5 %, found +10.0 %"), "{text}");
    assert!(!text.contains('\u{1b}'));
}

#[test]
fn markdown_puts_failures_first_and_is_short_when_all_is_well() {
    let text = markdown::render(&failing());
    assert!(text.starts_with("### ❌ plumb check failed: 1 of "), "{text}");
    let failed = text.find("| a\\|&lt;1>& | TTFT p50 | 20.00 | 22.00 | +10.0 % | 1 run | 5 % | none | failed: outside tolerance |");
    let better = text.find("better (model change)");
    assert!(failed.unwrap() < better.unwrap(), "{text}");
    assert!(
        text.contains("- c: no ") && text.contains("baseline has them: gone.") && text.contains("New since")
    );
    let well = check("tolerance.ttft.p50 = 5", case("a", &[20.0], 20.1), None);
    assert_eq!(markdown::render(&well), "### ✅ plumb check passed: 1 numbers of 1 cases\n");
}

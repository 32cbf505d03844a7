//! The report as `JUnit` XML, which every CI system shows.

use quick_junit::{NonSuccessKind, Report, SerializeError, TestCase, TestCaseStatus, TestSuite};

use super::{CheckReport, RowCheck, Verdict};

/// Name of the report and of its one test suite.
pub const SUITE: &str = "plumb check";

/// Renders one test a case and number, with the case as its class; a case that could not be run is one test in error.
///
/// # Errors
/// When the text cannot be made into XML.
pub fn render(report: &CheckReport) -> Result<String, SerializeError> {
    let mut suite = TestSuite::new(SUITE);
    for case in &report.cases {
        if let Some(error) = &case.error {
            let status = not_passed(NonSuccessKind::Error, "the case could not be judged", error);
            suite.add_test_case(test(&case.name, "run", status));
        }
        for row in &case.rows {
            suite.add_test_case(test(&case.name, &format!("{} {}", row.metric, row.stat), status(row)));
        }
    }
    for name in &report.missing_cases {
        let status = skipped("the baseline has this case, and it was not run");
        suite.add_test_case(test(name, "run", status));
    }
    if report.num_judged == 0 {
        let status = not_passed(NonSuccessKind::Error, "nothing was judged", &report.headline());
        suite.add_test_case(test(SUITE, "something is judged", status));
    }
    let mut whole = Report::new(SUITE);
    whole.add_test_suite(suite);
    whole.to_string()
}

fn test(class: &str, name: &str, status: TestCaseStatus) -> TestCase {
    let mut test = TestCase::new(name, status);
    test.set_classname(class);
    test
}

fn status(row: &RowCheck) -> TestCaseStatus {
    let reason = row.reason.as_deref().unwrap_or_default();
    match row.verdict {
        Verdict::Passed => TestCaseStatus::success(),
        Verdict::NotJudged => skipped(reason),
        Verdict::Failed => not_passed(NonSuccessKind::Failure, reason, &details(row)),
    }
}

fn skipped(message: &str) -> TestCaseStatus {
    let mut status = TestCaseStatus::skipped();
    status.set_message(message);
    status
}

fn not_passed(kind: NonSuccessKind, message: &str, details: &str) -> TestCaseStatus {
    let mut status = TestCaseStatus::non_success(kind);
    status.set_message(message).set_description(details);
    status
}

/// Everything known of a number, a line each.
fn details(row: &RowCheck) -> String {
    let number = |value: Option<f64>, unit: &str| {
        value.map_or_else(|| "n/a".to_owned(), |value| format!("{value:.3} {unit}"))
    };
    let mut lines = vec![
        format!("real: {}", number(row.real_ms, "ms")),
        format!("simulated: {}", number(row.sim_ms, "ms")),
        format!("error: {}", number(row.error_pct, "%")),
        format!("noise floor of the real repeats: {}", number(row.noise_pct, "%")),
        format!("tolerance: {}", row.tolerance.as_deref().unwrap_or("none")),
    ];
    lines.push(match &row.baseline {
        Some(before) => format!(
            "baseline: error {:.3} %, real {:.3} ms, simulated {:.3} ms: {}, {}",
            before.error_pct,
            before.real_ms,
            before.sim_ms,
            before.change.name(),
            before.cause.text()
        ),
        None => "baseline: none".to_owned(),
    });
    lines.join("\n")
}

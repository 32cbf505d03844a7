//! The report as GitHub-flavoured markdown: short when all is well.

use std::fmt::Write as _;

use super::{CaseCheck, Change, CheckReport, RowCheck, Verdict};
use crate::report::markdown_cell as cell;

/// Most rows of a table; a summary that is too long is not shown at all by some systems.
const MAX_ROWS: usize = 200;

/// Renders the headline; then what failed, what became better, and how cases differ from the baseline's.
#[must_use]
pub fn render(report: &CheckReport) -> String {
    let sign = if report.passed { "✅" } else { "❌" };
    let mut text = format!("### {sign} plumb check {}\n", report.headline());
    if let Some(baseline) = &report.baseline {
        let (better, worse) = (report.num_better, report.num_worse);
        let _ = writeln!(text, "\nAgainst `{}`: {better} better, {worse} worse.", cell(baseline));
    }
    let broken: Vec<_> = report.cases.iter().filter(|case| case.error.is_some()).collect();
    if !broken.is_empty() {
        text.push_str("\nCould not be judged:\n\n");
        for case in broken {
            let error = case.error.as_deref().unwrap_or_default();
            let _ = writeln!(text, "- {}: {}", cell(&case.name), cell(error));
        }
    }
    table(&mut text, &report.failures().collect::<Vec<_>>());
    let is_better = |row: &RowCheck| {
        row.verdict == Verdict::Passed
            && row.baseline.as_ref().is_some_and(|baseline| baseline.change == Change::Better)
    };
    table(&mut text, &report.rows().filter(|(_, row)| is_better(row)).collect::<Vec<_>>());
    names(&mut text, "Not run, though the baseline has them", &report.missing_cases);
    names(&mut text, "New since the baseline", &report.new_cases);
    let unjudged = report.cases.iter().filter(|case| case.verdict == Verdict::NotJudged);
    names(&mut text, "Not judged", &unjudged.map(|case| case.name.clone()).collect::<Vec<_>>());
    text
}

fn table(text: &mut String, rows: &[(&CaseCheck, &RowCheck)]) {
    if rows.is_empty() {
        return;
    }
    text.push_str(
        "\n| case | metric | real ms | sim ms | error | noise | tolerance | baseline error | verdict |\n",
    );
    text.push_str("| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | --- |\n");
    for (case, row) in rows.iter().take(MAX_ROWS) {
        let number =
            |value: Option<f64>| value.map_or_else(|| "n/a".to_owned(), |value| format!("{value:.2}"));
        let error =
            |value: Option<f64>| value.map_or_else(|| "n/a".to_owned(), |value| format!("{value:+.1} %"));
        let noise = row.noise_pct.map_or_else(|| "1 run".to_owned(), |noise| format!("±{noise:.1} %"));
        let _ = writeln!(
            text,
            "| {} | {} {} | {} | {} | {} | {noise} | {} | {} | {} |",
            cell(&case.name),
            row.metric.title(),
            row.stat,
            number(row.real_ms),
            number(row.sim_ms),
            error(row.error_pct),
            row.tolerance.as_deref().unwrap_or("none"),
            row.baseline.as_ref().map_or_else(|| "none".into(), |before| error(Some(before.error_pct))),
            cell(&verdict(row)),
        );
    }
    if rows.len() > MAX_ROWS {
        let _ = writeln!(text, "\nand {} more", rows.len() - MAX_ROWS);
    }
}

/// What follows of a number and why, in a few words: `failed: outside tolerance, worse (model change)`.
#[must_use]
pub fn verdict(row: &RowCheck) -> String {
    let mut parts = Vec::new();
    if row.inside_tolerance == Some(false) {
        parts.push("outside tolerance".to_owned());
    } else if row.error_pct.is_none() {
        parts.push("n/a".to_owned());
    }
    if let Some(before) = &row.baseline {
        match before.change {
            Change::Same => {}
            Change::Lost => parts.push(before.change.name().to_owned()),
            change => parts.push(format!("{} ({})", change.name(), before.cause.text())),
        }
    }
    let title = row.verdict.title();
    if parts.is_empty() { title.to_owned() } else { format!("{title}: {}", parts.join(", ")) }
}

fn names(text: &mut String, title: &str, names: &[String]) {
    if !names.is_empty() {
        let names: Vec<_> = names.iter().map(|name| cell(name)).collect();
        let _ = writeln!(text, "\n{title}: {}.", names.join(", "));
    }
}

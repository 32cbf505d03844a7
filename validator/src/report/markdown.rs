//! `summary.md`.

use std::fmt::Write as _;

use super::{format, variants};
use crate::{
    results::{CaseResult, CaseStatus, SuiteResult},
    settings::{Setting, Verdict, count},
};

pub(super) fn render(result: &SuiteResult) -> String {
    let mut text = String::from("# Validation\n\n");
    let summary = &result.summary;
    let _ = writeln!(
        text,
        "{} of {} cases judged in {:.2} s. Error is `100 (sim - real) / real` against the median of the real \
         repeats; ✓ means inside their range widened by 5 %.\n",
        summary.num_ok,
        summary.num_cases,
        summary.wall_ms / 1e3
    );
    for (role, errors) in &summary.p50_errors {
        let _ = writeln!(text, "- {}, absolute error at p50:", role.title());
        for (metric, summary) in errors {
            let _ = writeln!(text, "  - {}: {}", metric.title(), cell(&format::error_summary(summary)));
        }
    }
    if summary.num_failed > 0 {
        text.push_str("\n## Failed\n\n");
        for case in result.failures() {
            let _ = writeln!(text, "- {}: {}", cell(&case.name), cell(case.error.as_deref().unwrap_or("")));
        }
    }
    text.push_str("\n## Cases\n\n");
    text.push_str(
        "The noise floor is half of the range of the real repeats in percent of their median; the interval holds the error \
         of 95 % of the resamples of requests, repeats and simulations.\n\n",
    );
    text.push_str(
        "| case | metric | stat | n | real ms | repeats | noise | simulated ms | error | interval | band |\n",
    );
    text.push_str("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | :---: |\n");
    for case in result.cases_by_role().filter(|c| c.status == CaseStatus::Ok) {
        rows(&mut text, case);
    }
    text.push_str("\n## Where the time goes, and where operator times come from\n\n");
    text.push_str(
        "The host's share is what steps wait for it: near 100 %, faster kernels would change nothing.\n\n",
    );
    text.push_str("| case | role | host's share of steps | share of operator time | simulated in |\n");
    text.push_str("| --- | --- | ---: | --- | ---: |\n");
    for case in result.cases_by_role().filter(|c| c.status == CaseStatus::Ok) {
        let wall = case.simulate_ms.map_or_else(|| "n/a".into(), |ms| format!("{ms:.1} ms"));
        let coverage = format::coverage(case).unwrap_or_else(|| "not known".into());
        let host = case.host_share.map_or_else(|| "n/a".into(), |share| format!("{:.0} %", 100.0 * share));
        let _ =
            writeln!(text, "| {} | {} | {host} | {coverage} | {wall} |", cell(&case.name), case.role.title());
    }
    text.push_str("\n## Request by request\n\n");
    text.push_str("Errors of each request's own value; a request is too short when it is simulated faster than it was.\n\n");
    text.push_str(
        "| case | metric | requests | median error | median absolute | p90 absolute | too short |\n",
    );
    text.push_str("| --- | --- | ---: | ---: | ---: | ---: | ---: |\n");
    for case in result.cases_by_role() {
        for row in &case.paired {
            let pct = |value: Option<f64>| value.map_or_else(|| "n/a".into(), |e| format!("{e:.1} %"));
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} |",
                cell(&case.name),
                row.metric.title(),
                row.n,
                row.median_error_pct.map_or_else(|| "n/a".into(), format::signed_pct),
                pct(row.median_abs_error_pct),
                pct(row.p90_abs_error_pct),
                row.share_too_short.map_or_else(|| "n/a".into(), |share| format!("{:.0} %", 100.0 * share)),
            );
        }
    }
    e2e_parts(&mut text, result);
    settings(&mut text, result);
    for case in result.cases_by_role() {
        text.push_str(&variants::markdown(case));
    }
    notes(&mut text, result);
    text
}

/// A total never without its parts.
fn e2e_parts(text: &mut String, result: &SuiteResult) {
    text.push_str("\n## End to end in its parts\n\n");
    text.push_str(
        "Mean time to the first token (prefill) and from there to the last (decode); errors in percent of the real \
         end-to-end time, so that they add up.\n\n",
    );
    text.push_str("| case | real prefill ms | real decode ms | prefill | decode | end to end |\n");
    text.push_str("| --- | ---: | ---: | ---: | ---: | ---: |\n");
    for case in result.cases_by_role() {
        let Some(parts) = &case.e2e_parts else { continue };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {}{} |",
            cell(&case.name),
            format::ms(parts.real_prefill_ms),
            format::ms(parts.real_decode_ms),
            format::signed_pct(parts.prefill_pct),
            format::signed_pct(parts.decode_pct),
            format::signed_pct(parts.total_pct),
            if parts.cancels { ", parts cancel" } else { "" },
        );
    }
}

fn rows(text: &mut String, case: &CaseResult) {
    for row in &case.metrics {
        let band = match row.inside_band {
            Some(true) => "✓",
            Some(false) => "✗",
            None => "n/a",
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {band} |",
            cell(&case.name),
            row.metric.title(),
            row.stat,
            row.n,
            format::ms_or_na(row.real_ms),
            format::range(row, case.num_repeats()),
            format::noise(row),
            format::ms_or_na(row.sim_ms),
            row.error_pct.map_or_else(|| "n/a".into(), format::signed_pct),
            format::interval(row),
        );
    }
}

/// The settings that are not known to match; those that are, counted.
fn settings(text: &mut String, result: &SuiteResult) {
    let matching: usize = result.cases.iter().map(|case| count(&case.settings, Verdict::Match)).sum();
    let of_case = |case: &CaseResult| {
        let name = cell(&case.name);
        let others = case.settings.iter().filter(|setting| setting.verdict != Verdict::Match);
        let row = |setting: &Setting| {
            let [real, sim] =
                [&setting.real, &setting.sim].map(|value| cell(&format::setting_value(value.as_deref())));
            format!("| {name} | {} | {real} | {sim} | {} |\n", cell(&setting.setting), setting.verdict.name())
        };
        others.map(row).collect::<String>()
    };
    let rows: String = result.cases_by_role().map(of_case).collect();
    if rows.is_empty() && matching == 0 {
        return;
    }
    let _ = writeln!(text, "\n## Settings\n\nSettings that match on both sides: {matching}.");
    if !rows.is_empty() {
        text.push_str("\n| case | setting | real | simulated | verdict |\n| --- | --- | --- | --- | --- |\n");
        text.push_str(&rows);
    }
}

fn notes(text: &mut String, result: &SuiteResult) {
    let mut lines = String::new();
    for case in result.cases_by_role() {
        for note in case.notes.iter().cloned().chain(format::na_reasons(case)) {
            let _ = writeln!(lines, "- {}: {}", cell(&case.name), cell(&note));
        }
    }
    if !lines.is_empty() {
        let _ = write!(text, "\n## Notes\n\n{lines}");
    }
}

/// Text that stays inside its table cell and its line.
pub(crate) fn cell(text: &str) -> String {
    text.replace('\\', "\\\\").replace('|', "\\|").replace('<', "&lt;").replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::suite_result;

    #[test]
    fn held_out_cases_stand_before_fitted_ones_and_every_row_has_eleven_cells() {
        let text = render(&suite_result());
        let held_out = text.find("| llama3-8b-graph/static-b128-p256 | TTFT").unwrap();
        assert!(held_out < text.find("| seed &lt;fit>").unwrap());
        let table = text.split("## Cases\n\n").nth(1).unwrap().split("\n\n").nth(1).unwrap();
        assert_eq!(table.lines().count(), 2 + 3 * 16);
        assert!(table.lines().all(|line| line.matches('|').count() == 12), "{table}");
        assert!(text.contains("| llama3-8b-graph/static-b128-p256 | TTFT | p50 | 101 | 20.50 | 20.00..21.00 | ±2.4 % | 18.00 | -12.2 % |"));
        assert!(text.contains("| interpolated 97 %, extrapolated 3 % | 18.0 ms |"), "{text}");
        assert!(text.contains("- broken: runs/none: no such file"));
    }

    #[test]
    fn a_cell_cannot_break_its_table() {
        assert_eq!(cell("a|b\nc<d"), "a\\|b c&lt;d");
    }
}

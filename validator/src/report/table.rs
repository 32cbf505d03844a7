//! The table on the terminal.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, ContentLineStyle, LineStyle, Table, TableStyle};

use super::{format, variants};
use crate::{
    compare::E2eParts,
    metrics::{Metric, Stat},
    results::{CaseResult, CaseStatus, SuiteResult},
    settings::{Setting, Verdict, count},
    suite::Role,
};

/// No line of the table is wider, in columns.
pub const TABLE_WIDTH: usize = 110;

/// What is left for the case's name beside the other columns at their widest.
const NAME_WIDTH: usize = 26;

/// Renders one row per case and metric at p50, with p99 beside it; then what failed, and the summary.
#[must_use]
pub fn render_table(result: &SuiteResult) -> String {
    let mut text = String::new();
    for role in Role::ALL {
        let cases: Vec<_> =
            result.cases.iter().filter(|c| c.role == role && c.status == CaseStatus::Ok).collect();
        if !cases.is_empty() {
            let _ = writeln!(text, "{} (ms)\n{}\n", capitalised(role.title()), table_of(&cases));
        }
    }
    for case in result.cases_by_role() {
        text += &variants::text(case);
    }
    for case in result.failures() {
        let _ =
            writeln!(text, "failed: {}: {}", case.name, case.error.as_deref().unwrap_or("no reason given"));
    }
    if result.summary.num_failed > 0 {
        text.push('\n');
    }
    text + &summary_lines(result)
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

fn table_of(cases: &[&CaseResult]) -> String {
    let mut table = Table::new();
    let style = TableStyle::new()
        .header_lines(ContentLineStyle::none())
        .header_separator(LineStyle::none().fill('─'))
        .content_lines(ContentLineStyle::none());
    table.load_style(style);
    table.set_header([
        "case", "metric", "real p50", "noise", "sim p50", "error", "real p99", "sim p99", "error",
    ]);
    for case in cases {
        for (i, metric) in Metric::ALL.into_iter().enumerate() {
            let name = if i == 0 { shorten(&case.name, NAME_WIDTH) } else { String::new() };
            table.add_row(row(case, metric, name));
        }
    }
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if i >= 2 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

fn row(case: &CaseResult, metric: Metric, name: String) -> Vec<String> {
    let mut cells = vec![name, metric.title().into()];
    let Some(p50) = case.row(metric, Stat::P50) else { return cells };
    cells.push(format::ms_or_na(p50.real_ms));
    cells.push(format::noise(p50));
    cells.push(format::ms_or_na(p50.sim_ms));
    cells.push(format::error_with_mark(p50));
    if let Some(p99) = case.row(metric, Stat::P99) {
        cells.push(format::ms_or_na(p99.real_ms));
        cells.push(format::ms_or_na(p99.sim_ms));
        cells.push(format::error_with_mark(p99));
    }
    cells
}

/// Cuts the middle out of a long name: its head says which engine, its tail which workload.
fn shorten(name: &str, width: usize) -> String {
    let chars: Vec<char> = name.chars().collect();
    if chars.len() <= width {
        return name.into();
    }
    let head = (width - 1) / 2;
    let tail = width - 1 - head;
    chars[..head].iter().chain(&['…']).chain(&chars[chars.len() - tail..]).collect()
}

fn summary_lines(result: &SuiteResult) -> String {
    let mut text = String::new();
    for (role, errors) in &result.summary.p50_errors {
        let _ = writeln!(text, "{}, |error| at p50:", capitalised(role.title()));
        for (metric, summary) in errors {
            let _ = writeln!(text, "  {:<5}{}", metric.title(), format::error_summary(summary));
        }
    }
    for case in result.cases_by_role() {
        if let Some(hidden) = case.e2e_parts.as_ref().and_then(E2eParts::cancellation) {
            let _ = writeln!(text, "{}: {hidden}", case.name);
        }
    }
    text += &settings_lines(result);
    let summary = &result.summary;
    let _ = write!(
        text,
        "{} of {} cases judged in {:.2} s",
        summary.num_ok,
        summary.num_cases,
        summary.wall_ms / 1e3
    );
    if let Some(longest) = summary.max_simulate_ms {
        let _ = write!(text, "; longest simulation {longest:.1} ms");
    }
    text += "\n✓ inside the range of the real repeats widened by 5 %, ✗ outside; noise: half of that range; n/a: too few\n  samples, or not recorded\n";
    text
}

/// The settings that do not match, and how many do.
fn settings_lines(result: &SuiteResult) -> String {
    let mut text = String::new();
    let of = |verdict| result.cases.iter().map(|case| count(&case.settings, verdict)).sum::<usize>();
    let [matching, mismatching, unknown] = [Verdict::Match, Verdict::Mismatch, Verdict::Unknown].map(of);
    if matching + mismatching + unknown == 0 {
        return text;
    }
    for case in result.cases_by_role() {
        for setting in case.settings.iter().filter(|s| s.verdict == Verdict::Mismatch) {
            let shown = Setting {
                real: Some(format::setting_value(setting.real.as_deref())),
                sim: Some(format::setting_value(setting.sim.as_deref())),
                ..setting.clone()
            };
            let line = format!("MISMATCH: {}, {}", case.name, shown.describe());
            let _ = writeln!(text, "{}", shorten(&line, TABLE_WIDTH));
        }
    }
    let _ = writeln!(
        text,
        "settings: {matching} match, {mismatching} do not, {unknown} unknown (the report lists them)"
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::suite_result;

    #[test]
    fn no_line_is_wider_than_promised() {
        let text = render_table(&suite_result());
        for line in text.lines() {
            assert!(line.chars().count() <= TABLE_WIDTH, "{} columns: {line}", line.chars().count());
        }
    }

    #[test]
    fn the_table_shows_real_simulated_error_and_band() {
        let text = render_table(&suite_result());
        let held_out = text.find("Held out (ms)").unwrap();
        assert!(held_out < text.find("Fitted on (ms)").unwrap(), "{text}");
        let row = text.lines().find(|line| line.contains("TTFT") && line.contains("llama3")).unwrap();
        let cells: Vec<_> = row.split_whitespace().collect();
        assert_eq!(cells[0], "llama3-8b-gr…tic-b128-p256");
        assert_eq!(&cells[1..6], ["TTFT", "20.50", "±2.4", "%", "18.00"], "{row}");
        assert!(row.contains("-12.2 % ✗"), "{row}");
        assert!(row.contains("✗"));
        assert!(text.contains("failed: broken: runs/none: no such file"));
        assert!(text.contains("3 of 4 cases judged in 0.25 s; longest simulation 18.0 ms"), "{text}");
    }

    #[test]
    fn settings_that_do_not_match_are_named_and_the_rest_counted() {
        let mut result = suite_result();
        assert!(!render_table(&result).contains("settings:"));
        let setting = |name: &str, verdict| Setting {
            setting: name.into(),
            real: Some("38419".into()),
            sim: Some("a".repeat(64)),
            verdict,
        };
        result.cases[1].settings = vec![
            setting("kv", Verdict::Mismatch),
            setting("gpu", Verdict::Unknown),
            setting("x", Verdict::Match),
        ];
        let text = render_table(&result);
        assert!(text.contains("kv: real 38419, simulated aaaaaaaaaaaa…\n"), "{text}");
        assert!(text.contains("settings: 1 match, 1 do not, 1 unknown"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= TABLE_WIDTH));
    }

    #[test]
    fn long_names_keep_head_and_tail() {
        assert_eq!(shorten("short", 9), "short");
        assert_eq!(shorten("abcdefghijkl", 9), "abcd…ijkl");
        assert_eq!(shorten("äöüäöüäöüäöü", 5).chars().count(), 5);
    }
}

//! What stands before the cases: the judgement in a few lines and tables.

use std::fmt::Write as _;

use super::{END_TABLE, begin_table, escape, header_row, mark};
use crate::{
    compare::MetricRow,
    metrics::{Metric, Stat},
    report::format,
    results::{CaseResult, CaseStatus, SuiteResult},
    settings::{Verdict, count},
    suite::Role,
};

pub(super) fn header(page: &mut String, result: &SuiteResult) {
    let summary = &result.summary;
    let _ = write!(
        page,
        "<header>\n<h1>Validation</h1>\n<p>{} of {} cases judged in {:.2} s. An error is 100 (sim − real) / real, \
         against the median of the real repeats: below 0, the simulation is too fast. \
         <span class=\"in\">✓</span> is inside the range of the repeats widened by 5 %, \
         <span class=\"out\">✗</span> outside; ± is half the range of the repeats, their noise.</p>\n",
        summary.num_ok,
        summary.num_cases,
        summary.wall_ms / 1e3
    );
    page.push_str("<nav aria-label=\"Contents\">\n<ul>\n");
    let mut link = |href: &str, text: &str| {
        let _ = writeln!(page, "<li><a href=\"{href}\">{text}</a></li>");
    };
    if summary.num_failed > 0 {
        link("#failed", "Failed");
    }
    link("#totals", "Errors");
    link("#cases", "Every case");
    link("#settings", "Settings");
    for role in Role::ALL {
        if result.cases.iter().any(|case| case.role == role && case.status == CaseStatus::Ok) {
            link(&format!("#{}", role.name()), &format!("Cases {}", role.title()));
        }
    }
    link("results.json", "results.json");
    link("summary.md", "summary.md");
    page.push_str("</ul>\n</nav>\n</header>\n");
}

pub(super) fn failures(page: &mut String, result: &SuiteResult) {
    if result.summary.num_failed == 0 {
        return;
    }
    page.push_str(
        "<section class=\"failed\" aria-labelledby=\"failed\">\n<h2 id=\"failed\">Failed</h2>\n<ul>\n",
    );
    for case in result.failures() {
        let error = escape(case.error.as_deref().unwrap_or("no reason given"));
        let _ = writeln!(page, "<li><strong>{}</strong>: {error}</li>", escape(&case.name));
    }
    page.push_str("</ul>\n</section>\n");
}

pub(super) fn totals(page: &mut String, result: &SuiteResult) {
    page.push_str("<section aria-labelledby=\"totals\">\n<h2 id=\"totals\">Errors</h2>\n");
    begin_table(page, "Absolute error at p50, over the cases");
    header_row(
        page,
        &[
            ("Cases", false),
            ("Metric", false),
            ("Median", true),
            ("Worst", true),
            ("Worst case", false),
            ("In band", true),
        ],
    );
    page.push_str("<tbody>\n");
    for (role, errors) in &result.summary.p50_errors {
        for (metric, e) in errors {
            let _ = writeln!(
                page,
                "<tr><td>{}</td><th scope=\"row\">{}</th><td class=\"num\">{:.1} %</td><td class=\"num\">{:.1} %</td>\
                 <td>{}</td><td class=\"num\">{} of {}</td></tr>",
                role.title(),
                metric.title(),
                e.median_abs_error_pct,
                e.worst_abs_error_pct,
                escape(&e.worst_case),
                e.num_inside_band,
                e.num_cases
            );
        }
    }
    page.push_str(END_TABLE);
    page.push_str("</section>\n");
}

/// A line a case: every metric's error at p50 and p99.
pub(super) fn cases(page: &mut String, result: &SuiteResult) {
    page.push_str("<section aria-labelledby=\"cases\">\n<h2 id=\"cases\">Every case</h2>\n");
    begin_table(page, "Signed error of each metric, and the noise of the real repeats");
    page.push_str("<thead>\n<tr><th scope=\"col\" rowspan=\"2\" class=\"stay\">Case</th>");
    for metric in Metric::ALL {
        let _ = write!(page, "<th scope=\"colgroup\" colspan=\"2\" class=\"group\">{}</th>", metric.title());
    }
    page.push_str("</tr>\n<tr>");
    for _ in Metric::ALL {
        page.push_str("<th scope=\"col\" class=\"num\">p50</th><th scope=\"col\" class=\"num\">p99</th>");
    }
    page.push_str("</tr>\n</thead>\n");
    for role in Role::ALL {
        let cases: Vec<_> = result.cases.iter().enumerate().filter(|(_, case)| case.role == role).collect();
        if cases.is_empty() {
            continue;
        }
        let _ = writeln!(
            page,
            "<tbody>\n<tr><th scope=\"rowgroup\" colspan=\"{}\" class=\"role\">{}</th></tr>",
            1 + 2 * Metric::ALL.len(),
            role.title()
        );
        for (i, case) in cases {
            case_row(page, i, case);
        }
        page.push_str("</tbody>\n");
    }
    page.push_str("</table></div>\n</section>\n");
}

fn case_row(page: &mut String, i: usize, case: &CaseResult) {
    let name = escape(&case.name);
    if case.status == CaseStatus::Failed {
        let span = 2 * Metric::ALL.len();
        let _ = writeln!(
            page,
            "<tr><th scope=\"row\" class=\"stay\">{name}</th><td colspan=\"{span}\" class=\"out\">✗ failed</td></tr>"
        );
        return;
    }
    let _ =
        write!(page, "<tr><th scope=\"row\" class=\"stay\"><a href=\"#case-{i}-content\">{name}</a></th>");
    for metric in Metric::ALL {
        for stat in [Stat::P50, Stat::P99] {
            match case.row(metric, stat) {
                Some(row) => error_cell(page, row),
                None => page.push_str("<td class=\"num na\">n/a</td>"),
            }
        }
    }
    page.push_str("</tr>\n");
}

fn error_cell(page: &mut String, row: &MetricRow) {
    let Some(error) = row.error_pct else {
        page.push_str("<td class=\"num na\">n/a</td>");
        return;
    };
    let (class, sign, word) = mark(row.inside_band);
    let noise =
        row.noise_pct.map_or_else(String::new, |noise| format!(" <span class=\"noise\">± {noise:.1}</span>"));
    let _ = write!(
        page,
        "<td class=\"num {class}\">{} <span aria-hidden=\"true\">{sign}</span>\
         <span class=\"unseen\">, {word}</span>{noise}</td>",
        format::signed_pct(error)
    );
}

/// What does not match, and how much is not known.
pub(super) fn settings(page: &mut String, result: &SuiteResult) {
    page.push_str("<section aria-labelledby=\"settings\">\n<h2 id=\"settings\">Settings</h2>\n");
    let of = |verdict| result.cases.iter().map(|case| count(&case.settings, verdict)).sum::<usize>();
    let (matching, mismatching, unknown) = (of(Verdict::Match), of(Verdict::Mismatch), of(Verdict::Unknown));
    let _ = writeln!(
        page,
        "<p>What must be the same in a real run and its simulation: {matching} settings match, {mismatching} do not, of \
         {unknown} a side does not say. Each case has its table.</p>"
    );
    if mismatching > 0 {
        begin_table(page, "Settings that do not match");
        header_row(page, &[("Case", false), ("Setting", false), ("Real", false), ("Simulated", false)]);
        page.push_str("<tbody>\n");
        for case in result.cases_by_role() {
            for setting in case.settings.iter().filter(|s| s.verdict == Verdict::Mismatch) {
                let _ = writeln!(
                    page,
                    "<tr><td>{}</td><th scope=\"row\">{}</th><td class=\"text\">{}</td><td class=\"text\">{}</td></tr>",
                    escape(&case.name),
                    escape(&setting.setting),
                    escape(&format::setting_value(setting.real.as_deref())),
                    escape(&format::setting_value(setting.sim.as_deref()))
                );
            }
        }
        page.push_str(END_TABLE);
    }
    page.push_str("</section>\n");
}

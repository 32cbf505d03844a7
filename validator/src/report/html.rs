//! `report.html`: one file that opens offline, with the figures inside it.

use std::fmt::Write as _;

use super::{figures::DRAWN, format};
use crate::{
    metrics::{Metric, Stat},
    results::{CaseResult, CaseStatus, SuiteResult},
    suite::Role,
};

const STYLE: &str = include_str!("report.css");

/// Renders the page; `figure` gives the SVG of a case (by its place in the result) and metric.
pub(super) fn render(result: &SuiteResult, figure: impl Fn(usize, Metric) -> Option<String>) -> String {
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>Validation</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
    );
    overview(&mut page, result);
    for role in Role::ALL {
        let mut heading = Some(format!("<h2>Cases {}</h2>\n", role.title()));
        for (i, case) in result.cases.iter().enumerate() {
            if case.role == role && case.status == CaseStatus::Ok {
                page += &heading.take().unwrap_or_default();
                section(&mut page, case, &|metric| figure(i, metric));
            }
        }
    }
    page += "</main>\n</body>\n</html>\n";
    page
}

fn overview(page: &mut String, result: &SuiteResult) {
    let summary = &result.summary;
    let _ = write!(
        page,
        "<h1>Validation</h1>\n<p>{} of {} cases judged in {:.2} s. Error is 100 (sim − real) / real against the \
         median of the real repeats. <span class=\"in\">✓</span> means inside their range widened by 5 %, \
         <span class=\"out\">✗</span> outside.</p>\n",
        summary.num_ok,
        summary.num_cases,
        summary.wall_ms / 1e3
    );
    if summary.num_failed > 0 {
        page.push_str("<section class=\"failed\">\n<h2>Failed</h2>\n<ul>\n");
        for case in result.failures() {
            let error = escape(case.error.as_deref().unwrap_or(""));
            let _ = writeln!(page, "<li><strong>{}</strong>: {error}</li>", escape(&case.name));
        }
        page.push_str("</ul>\n</section>\n");
    }
    page.push_str("<h2>Absolute error at p50</h2>\n<div class=\"scroll\"><table>\n<thead><tr>");
    let columns = [("Cases", false), ("Metric", false), ("Median", true), ("Worst", true)];
    header(page, &columns);
    header(page, &[("Worst case", false), ("In band", true)]);
    page.push_str("</tr></thead>\n<tbody>\n");
    for (role, errors) in &summary.p50_errors {
        for (metric, e) in errors {
            let _ = writeln!(
                page,
                "<tr><td>{}</td><th scope=\"row\">{}</th><td class=\"num\">{:.1} %</td>\
                 <td class=\"num\">{:.1} %</td><td>{}</td><td class=\"num\">{} of {}</td></tr>",
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
    page.push_str("</tbody>\n</table></div>\n");
}

/// Header cells; `true` for columns of numbers.
fn header(page: &mut String, names: &[(&str, bool)]) {
    for (name, is_number) in names {
        let class = if *is_number { " class=\"num\"" } else { "" };
        let _ = write!(page, "<th scope=\"col\"{class}>{name}</th>");
    }
}

fn section(page: &mut String, case: &CaseResult, figure: &dyn Fn(Metric) -> Option<String>) {
    let _ = writeln!(page, "<section class=\"case\">\n<h3>{}</h3>", escape(&case.name));
    let repeats = match case.num_repeats() {
        1 => "1 real run".to_owned(),
        n => format!("{n} real repeats"),
    };
    let _ = write!(page, "<p class=\"meta\">{repeats}");
    if let Some(ms) = case.simulate_ms {
        let _ = write!(page, "; simulated in {ms:.1} ms");
    }
    if let Some(share) = case.host_share {
        let _ = write!(page, "; host's share of the steps: {:.0} %", 100.0 * share);
    }
    if let Some(coverage) = format::coverage(case) {
        let _ = write!(page, "; operator time: {}", escape(&coverage));
    }
    page.push_str(".</p>\n");
    for note in &case.notes {
        let _ = writeln!(page, "<p class=\"note\">{}</p>", escape(note));
    }
    metric_table(page, case);
    page.push_str("<div class=\"figures\">\n");
    for metric in DRAWN {
        if let Some(svg) = figure(metric) {
            let label = format!("Cumulative distribution of {}, real and simulated", metric.title());
            let _ = writeln!(page, "<figure role=\"img\" aria-label=\"{label}\">{}</figure>", scalable(&svg));
        }
    }
    page.push_str("</div>\n</section>\n");
}

fn metric_table(page: &mut String, case: &CaseResult) {
    page.push_str("<div class=\"scroll\"><table>\n<thead><tr>");
    header(page, &[("Metric", false), ("Statistic", false), ("n", true), ("Real, ms", true)]);
    header(page, &[("Repeats, ms", true), ("Simulated, ms", true), ("Error", true), ("Band", false)]);
    page.push_str("</tr></thead>\n<tbody>\n");
    for row in &case.metrics {
        let (class, mark) = match row.inside_band {
            Some(true) => ("in", "✓"),
            Some(false) => ("out", "✗"),
            None => ("na", "n/a"),
        };
        let title = row.na_reason.as_ref().map_or_else(String::new, |r| format!(" title=\"{}\"", escape(r)));
        let rows = case.metrics.iter().filter(|other| other.metric == row.metric).count();
        let start = if row.stat == Stat::ALL[0] {
            format!(
                "<tr class=\"first\"><th scope=\"rowgroup\" rowspan=\"{rows}\">{}</th>",
                row.metric.title()
            )
        } else {
            "<tr>".into()
        };
        let _ = writeln!(
            page,
            "{start}<td>{}</td><td class=\"num\">{}</td><td class=\"num\">{}</td><td class=\"num\">{}</td>\
             <td class=\"num\">{}</td><td class=\"num\">{}</td><td class=\"{class}\"{title}>{mark}</td></tr>",
            row.stat,
            row.n,
            format::ms_or_na(row.real_ms),
            format::range(row, case.num_repeats()),
            format::ms_or_na(row.sim_ms),
            row.error_pct.map_or_else(|| "n/a".into(), format::signed_pct),
        );
    }
    page.push_str("</tbody>\n</table></div>\n");
    let reasons = format::na_reasons(case);
    if !reasons.is_empty() {
        let _ = writeln!(page, "<p class=\"note\">n/a: {}.</p>", escape(&reasons.join("; ")));
    }
}

/// Lets CSS size an inlined figure: the drawing's own width and height would fix it.
fn scalable(svg: &str) -> String {
    match (svg.find(" width=\""), svg.find(" viewBox=")) {
        (Some(from), Some(to)) if from < to => format!("{}{}", &svg[..from], &svg[to..]),
        _ => svg.into(),
    }
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{report::figures::cdf_svg, testing::suite_result};

    fn page() -> String {
        let result = suite_result();
        render(&result, |i, metric| cdf_svg(&result.cases[i], metric).and_then(Result::ok))
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        let page = page();
        for foreign in ["<script", "<link", "src=", "@import", "url("] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        // The only address is the SVG namespace.
        let addresses: Vec<_> = page.match_indices("http").map(|(at, _)| &page[at..at + 26]).collect();
        assert!(addresses.iter().all(|a| *a == "http://www.w3.org/2000/svg"), "{addresses:?}");
        assert_eq!(page.matches("<svg").count(), 3 * DRAWN.len());
    }

    #[test]
    fn names_are_escaped_and_tags_balance() {
        let page = page();
        assert!(page.contains("<h3>seed &lt;fit&gt; &amp; &quot;quoted&quot;</h3>"));
        for tag in ["table", "thead", "tbody", "section", "figure", "div", "main", "svg", "ul"] {
            let open = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
            assert_eq!(open, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }
}

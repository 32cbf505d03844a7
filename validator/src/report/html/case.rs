//! One case: its numbers, figures, settings and evidence.

use std::fmt::Write as _;

use super::{CaseFiles, END_TABLE, begin_table, escape, header_row, mark};
use crate::{
    compare::E2eParts,
    evidence::Evidence,
    metrics::{Metric, Stat},
    report::{figures::Figure, format, variants},
    results::CaseResult,
    settings::{Verdict, count},
};

pub(super) fn section(page: &mut String, i: usize, case: &CaseResult, files: &CaseFiles<'_>, is_open: bool) {
    let open = if is_open { " open" } else { "" };
    let _ = writeln!(
        page,
        "<details class=\"case\" id=\"case-{i}\"{open}>\n<summary><h3>{}</h3>{}</summary>\n<div id=\"case-{i}-content\">",
        escape(&case.name),
        verdicts(case)
    );
    meta(page, case);
    metric_table(page, case);
    for group in files.figures.chunk_by(|a, b| a.heading == b.heading) {
        let _ = writeln!(page, "<h4>{}</h4>\n<div class=\"figures\">", group[0].heading);
        for figure in group {
            inline(page, &format!("case-{i}-{}", figure.key), figure);
        }
        page.push_str("</div>\n");
    }
    variant_table(page, case);
    settings(page, case);
    evidence(page, case);
    let _ = writeln!(
        page,
        "<h4>Tables</h4>\n<ul class=\"files\">\n<li><a href=\"tables/{0}.csv\">metrics</a></li>\n\
         <li><a href=\"tables/{0}-requests.csv\">every request</a></li>\n\
         <li><a href=\"tables/{0}-cdf.csv\">distributions</a></li>\n\
         <li><a href=\"tables/{0}-settings.csv\">settings</a></li>\n</ul>\n</div>\n</details>",
        files.name
    );
}

/// The four metrics at p50, to be read while the case is closed.
fn verdicts(case: &CaseResult) -> String {
    let mut text = String::from("<span class=\"chips\">");
    for metric in Metric::ALL {
        let Some(row) = case.row(metric, Stat::P50) else { continue };
        let (class, sign, word) = mark(row.inside_band);
        let error = row.error_pct.map_or_else(|| "n/a".into(), format::signed_pct);
        let _ = write!(
            text,
            "<span class=\"chip {class}\">{} {error} <span aria-hidden=\"true\">{sign}</span>\
             <span class=\"unseen\">, {word}; </span></span>",
            metric.title()
        );
    }
    let mismatches = count(&case.settings, Verdict::Mismatch);
    if mismatches > 0 {
        let _ = write!(text, "<span class=\"chip out\">{mismatches} settings differ</span>");
    }
    text + "</span>"
}

fn meta(page: &mut String, case: &CaseResult) {
    let repeats = match case.num_repeats() {
        1 => "1 real run".to_owned(),
        n => format!("{n} real repeats"),
    };
    let _ = write!(page, "<p class=\"meta\">{repeats}");
    if let Some(requests) = &case.requests {
        let _ = write!(page, "; {} requests compared", requests.compared);
    }
    if let Some(ms) = case.simulate_ms {
        let _ = write!(page, "; simulated in {ms:.1} ms");
    }
    if let Some(share) = case.host_share {
        let _ = write!(page, "; host's share of the steps: {:.0} %", 100.0 * share);
    }
    page.push_str(".</p>\n");
    for note in &case.notes {
        let _ = writeln!(page, "<p class=\"note\">{}</p>", escape(note));
    }
}

fn metric_table(page: &mut String, case: &CaseResult) {
    page.push_str("<h4>Metrics</h4>\n");
    begin_table(page, &format!("Real and simulated times of {}, ms", case.name));
    header_row(
        page,
        &[
            ("Metric", false),
            ("Statistic", false),
            ("n", true),
            ("Real", true),
            ("Repeats", true),
            ("Noise", true),
            ("Simulated", true),
            ("Error", true),
            ("95 % interval", true),
            ("Band", false),
        ],
    );
    page.push_str("<tbody>\n");
    for row in &case.metrics {
        let (class, sign, word) = mark(row.inside_band);
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
            "{start}<th scope=\"row\">{}</th><td class=\"num\">{}</td><td class=\"num\">{}</td><td class=\"num\">{}</td>\
             <td class=\"num\">{}</td><td class=\"num\">{}</td><td class=\"num\">{}</td><td class=\"num\">{}</td>\
             <td class=\"{class}\">{sign} {word}</td></tr>",
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
    page.push_str(END_TABLE);
    if let Some(parts) = &case.e2e_parts {
        e2e_parts(page, parts);
    }
    let reasons = format::na_reasons(case);
    if !reasons.is_empty() {
        let _ = writeln!(page, "<p class=\"note\">n/a: {}.</p>", escape(&reasons.join("; ")));
    }
}

/// A total is never without its parts: errors of opposite sign would hide in it.
fn e2e_parts(page: &mut String, parts: &E2eParts) {
    let _ = writeln!(
        page,
        "<p>Mean E2E in its parts, errors in percent of the whole: to the first token {} → {} ms ({}), from there to the \
         last {} → {} ms ({}), together {}{}.</p>",
        format::ms(parts.real_prefill_ms),
        format::ms(parts.sim_prefill_ms),
        format::signed_pct(parts.prefill_pct),
        format::ms(parts.real_decode_ms),
        format::ms(parts.sim_decode_ms),
        format::signed_pct(parts.decode_pct),
        format::signed_pct(parts.total_pct),
        if parts.cancels { ": the parts cancel" } else { "" }
    );
}

/// The figures as the tool that recorded the real run defines them; nothing where that is not known.
fn variant_table(page: &mut String, case: &CaseResult) {
    let Some(first) = case.variants.first() else { return };
    let _ = writeln!(page, "<h4>As {} defines them</h4>", escape(&first.tool));
    page.push_str(
        "<p class=\"note\">Published is what the tool's own file says; the rest is computed anew by its formulas, over a \
         request's arrival a, first token t0, last token c and n tokens.</p>\n",
    );
    begin_table(page, &format!("Figures by the definitions of {}", first.tool));
    let columns: Vec<_> =
        variants::COLUMNS.iter().enumerate().map(|(i, name)| (*name, i >= variants::FIRST_NUMBER)).collect();
    header_row(page, &columns);
    page.push_str("<tbody>\n");
    for row in &case.variants {
        page.push_str("<tr>");
        for (i, text) in variants::cells(row).iter().enumerate() {
            let text = escape(text);
            let _ = match i {
                0 => write!(page, "<th scope=\"row\">{text}</th>"),
                i if i >= variants::FIRST_NUMBER => write!(page, "<td class=\"num\">{text}</td>"),
                _ => write!(page, "<td>{text}</td>"),
            };
        }
        page.push_str("</tr>\n");
    }
    page.push_str(END_TABLE);
}

/// A figure whose words a screen reader finds; `id` is unique in the page.
fn inline(page: &mut String, id: &str, figure: &Figure) {
    let class = if figure.is_wide { " class=\"wide\"" } else { "" };
    let _ = write!(page, "<figure{class}>\n{}", named(&figure.svg, id, figure));
    let _ = write!(page, "<figcaption>{}", escape(&figure.title));
    if let Some(note) = &figure.note {
        let _ = write!(page, ". <span class=\"note\">{}</span>", escape(note));
    }
    page.push_str("</figcaption>\n</figure>\n");
}

/// The drawing with its title and description, and without its own size, so that CSS can give it one.
fn named(svg: &str, id: &str, figure: &Figure) -> String {
    let words = format!(
        "<title id=\"{id}-t\">{}</title><desc id=\"{id}-d\">{}</desc>",
        escape(&figure.title),
        escape(&figure.description)
    );
    let (Some(view), Some(end)) = (svg.find(" viewBox="), svg.find('>')) else { return svg.into() };
    if view > end {
        return svg.into();
    }
    format!(
        "<svg role=\"img\" aria-labelledby=\"{id}-t {id}-d\"{}>{words}{}",
        &svg[view..end],
        &svg[end + 1..]
    )
}

fn settings(page: &mut String, case: &CaseResult) {
    if case.settings.is_empty() {
        return;
    }
    page.push_str("<h4>Settings</h4>\n");
    begin_table(page, &format!("What must be the same on both sides, of {}", case.name));
    header_row(page, &[("Setting", false), ("Real", false), ("Simulated", false), ("Verdict", false)]);
    page.push_str("<tbody>\n");
    for setting in &case.settings {
        let (class, sign) = match setting.verdict {
            Verdict::Match => ("in", "✓"),
            Verdict::Mismatch => ("out", "✗"),
            Verdict::Unknown => ("na", "?"),
        };
        let _ = writeln!(
            page,
            "<tr><th scope=\"row\">{}</th><td class=\"text\">{}</td><td class=\"text\">{}</td>\
             <td class=\"{class}\">{sign} {}</td></tr>",
            escape(&setting.setting),
            escape(&format::setting_value(setting.real.as_deref())),
            escape(&format::setting_value(setting.sim.as_deref())),
            setting.verdict.name()
        );
    }
    page.push_str(END_TABLE);
}

fn evidence(page: &mut String, case: &CaseResult) {
    page.push_str("<h4>Coverage and evidence</h4>\n<dl>\n");
    let mut fact = |name: &str, value: Option<String>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            let _ = writeln!(page, "<dt>{name}</dt><dd>{}</dd>", escape(&value));
        }
    };
    let coverage = format::coverage(case).unwrap_or_else(|| "not known".into());
    fact("Simulated operator time, by where it comes from", Some(coverage));
    if let Some(evidence) = &case.evidence {
        for (name, value) in facts(evidence) {
            fact(name, value);
        }
    }
    page.push_str("</dl>\n");
}

fn facts(evidence: &Evidence) -> Vec<(&'static str, Option<String>)> {
    let fitted = match (&evidence.fitted_gpu, evidence.fitted_runs.as_slice()) {
        (_, []) => None,
        (gpu, runs) => {
            let on = gpu.as_ref().map_or_else(String::new, |gpu| format!(" on {gpu}"));
            Some(format!("{}{on}", runs.join(", ")))
        }
    };
    let seeds = evidence.seed.map(|seed| match evidence.num_simulations {
        0 | 1 => format!("1, of seed {seed}"),
        n => format!("{n}, of seeds from {seed}"),
    });
    vec![
        ("Real runs", Some(evidence.real_runs.join(", "))),
        ("Simulated run", evidence.sim_run.clone()),
        ("Simulations", seeds),
        ("Bundle", evidence.bundle.clone()),
        ("Bundle's digest", evidence.bundle_digest.clone()),
        ("GPU predicted", evidence.gpu.clone()),
        ("Engine profile", evidence.engine_profile.clone()),
        ("Fitted on", fitted),
        ("Host factor", evidence.host_factor.map(|factor| format!("{factor:.3}"))),
    ]
}

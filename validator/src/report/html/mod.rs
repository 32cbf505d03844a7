//! `report.html`: one file that opens offline, with the figures inside it.
//!
//! No script: what opens and closes are `details`, which every browser knows, and which a page of print style opens.

mod case;
mod overview;

use std::fmt::Write as _;

use super::figures::Figure;
use crate::{
    results::{CaseStatus, SuiteResult},
    suite::Role,
};

const STYLE: &str = include_str!("../report.css");

/// Up to so many cases are open from the start; of more, a reader opens the ones of interest.
const MAX_OPEN: usize = 2;

/// A case's files and figures, in the order of the result's cases.
pub(super) struct CaseFiles<'a> {
    /// What its files' names begin with.
    pub name: &'a str,
    pub figures: &'a [Figure],
}

/// Renders the page; `files` are of the result's cases, in their order.
pub(super) fn render(result: &SuiteResult, files: &[CaseFiles<'_>]) -> String {
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>Validation</title>\n\
         <link rel=\"icon\" href=\"data:,\">\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <a class=\"skip\" href=\"#main\">Skip to the results</a>\n"
    );
    let judged = || result.cases.iter().filter(|case| case.status == CaseStatus::Ok);
    overview::header(&mut page, result);
    page += "<main id=\"main\">\n";
    overview::failures(&mut page, result);
    overview::totals(&mut page, result);
    overview::cases(&mut page, result);
    overview::settings(&mut page, result);
    for role in Role::ALL {
        if !judged().any(|case| case.role == role) {
            continue;
        }
        let _ = writeln!(
            page,
            "<section aria-labelledby=\"{0}\">\n<h2 id=\"{0}\">Cases {1}</h2>",
            role.name(),
            role.title()
        );
        for (i, (case, files)) in result.cases.iter().zip(files).enumerate() {
            if case.role == role && case.status == CaseStatus::Ok {
                case::section(&mut page, i, case, files, judged().count() <= MAX_OPEN);
            }
        }
        page += "</section>\n";
    }
    page += "</main>\n</body>\n</html>\n";
    page
}

/// Header cells; `true` for columns of numbers.
fn header_row(page: &mut String, names: &[(&str, bool)]) {
    page.push_str("<thead><tr>");
    for (name, is_number) in names {
        let class = if *is_number { " class=\"num\"" } else { "" };
        let _ = write!(page, "<th scope=\"col\"{class}>{name}</th>");
    }
    page.push_str("</tr></thead>\n");
}

/// A table's begin: it scrolls within itself, by keyboard too, where the page is narrow.
fn begin_table(page: &mut String, caption: &str) {
    let _ = writeln!(
        page,
        "<div class=\"scroll\" role=\"region\" aria-label=\"{0}\" tabindex=\"0\"><table>\n<caption>{0}</caption>",
        escape(caption)
    );
}

const END_TABLE: &str = "</tbody>\n</table></div>\n";

/// Whether a value is inside the band, by sign, by word and by colour: `(class, sign, word)`.
fn mark(inside_band: Option<bool>) -> (&'static str, &'static str, &'static str) {
    match inside_band {
        Some(true) => ("in", "✓", "inside the band"),
        Some(false) => ("out", "✗", "outside the band"),
        None => ("na", "", "not judged"),
    }
}

/// Text that is nothing but text in HTML.
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
mod tests;

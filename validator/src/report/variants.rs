//! The figures as the tool that recorded the real run defines them.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use super::{format, markdown::cell};
use crate::{results::CaseResult, variants::VariantRow};

/// What the columns hold.
pub(super) const COLUMNS: [&str; 7] =
    ["metric", "formula", "stat", "published ms", "real ms", "simulated ms", "error"];

/// Columns before this one hold words, the others numbers.
pub(super) const FIRST_NUMBER: usize = 3;

/// A row's text by column.
pub(super) fn cells(row: &VariantRow) -> [String; 7] {
    [
        row.name.clone(),
        row.formula.clone(),
        row.stat.clone(),
        format::ms_or_na(row.published_ms),
        format::ms_or_na(row.real_ms),
        format::ms_or_na(row.sim_ms),
        row.error_pct.map_or_else(|| "n/a".into(), format::signed_pct),
    ]
}

/// For the terminal; nothing without such figures.
pub(super) fn text(case: &CaseResult) -> String {
    let Some(first) = case.variants.first() else { return String::new() };
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(COLUMNS);
    for row in &case.variants {
        table.add_row(cells(row));
    }
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if i >= FIRST_NUMBER {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    format!("As {} defines them, in the file and computed anew\n{}\n\n", first.tool, table.trim_fmt())
}

/// For `summary.md`; nothing without such figures.
pub(super) fn markdown(case: &CaseResult) -> String {
    let Some(first) = case.variants.first() else { return String::new() };
    let mut text = format!("\n## {}, as {} defines the figures\n\n", cell(&case.name), first.tool);
    text.push_str(
        "Published is what the tool's own file says; the rest is computed anew by its formulas, over a request's arrival a, \
         first token t0, last token c and n tokens.\n\n",
    );
    let _ = writeln!(text, "| {} |\n| --- | --- | --- | ---: | ---: | ---: | ---: |", COLUMNS.join(" | "));
    for row in &case.variants {
        let _ = writeln!(text, "| {} |", cells(row).map(|text| cell(&text)).join(" | "));
    }
    text
}

//! `report.md`: the table and links to the figures.

use std::fmt::Write as _;

use super::{
    page::{Page, Section},
    summary::{COLUMNS, way_name},
};

/// Renders the file; figures are those in [`super::FIGURES`] beside it.
pub(super) fn render(page: &Page) -> String {
    let mut text = format!("# {}\n\n", page.title);
    for paragraph in &page.how_to_read {
        let _ = writeln!(text, "{paragraph}\n");
    }
    table(&mut text, page);
    let mut last = None;
    for section in &page.sections {
        let operator = section.row.operator;
        if last != Some(operator) {
            let _ = writeln!(text, "\n## `{operator}`");
        }
        last = Some(operator);
        figures(&mut text, section);
    }
    text
}

fn table(text: &mut String, page: &Page) {
    let names: Vec<&str> = COLUMNS.iter().map(|(name, _)| *name).collect();
    let rules: Vec<&str> =
        COLUMNS.iter().map(|(_, is_number)| if *is_number { "--:" } else { "---" }).collect();
    let _ = writeln!(text, "| {} |\n|{}|", names.join(" | "), rules.join("|"));
    for Section { row, .. } in &page.sections {
        let cells = row.cells().join(" | ");
        let _ = writeln!(text, "| `{}` | {} | {cells} |", row.operator, way_name(row.way));
    }
}

fn figures(text: &mut String, section: &Section) {
    let name = section.heading();
    let _ = writeln!(text, "\n### {name}\n\n{}\n", section.caption);
    let _ = writeln!(
        text,
        "![Predicted against measured time, {name}]({})\n![Signed error over measured time, {name}]({})",
        section.parity_path, section.residual_path
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::testing::{gpu, outcome};

    #[test]
    fn the_file_has_one_table_and_links_to_each_figure() {
        let page = Page::new(&outcome(), &gpu()).unwrap();
        let text = render(&page);
        assert_eq!(text.matches("| Operator |").count(), 1, "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("| `")).count(), page.sections.len());
        for section in &page.sections {
            assert!(text.contains(&format!("]({})", section.parity_path)));
            assert!(text.contains(&format!("]({})", section.residual_path)));
        }
        let widths: Vec<usize> =
            text.lines().filter(|line| line.starts_with('|')).map(|line| line.matches('|').count()).collect();
        assert!(widths.iter().all(|width| *width == COLUMNS.len() + 1), "{text}");
    }
}

//! `report.html`: one file that opens offline, with the figures inside it.

use std::fmt::Write as _;

use super::{
    page::{Page, Section},
    summary::{COLUMNS, way_name},
};

const STYLE: &str = include_str!("report.css");

/// Renders the page.
pub(super) fn render(page: &Page) -> String {
    let title = escape(&page.title);
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
    );
    for paragraph in &page.how_to_read {
        let _ = writeln!(html, "<p>{}</p>", escape(paragraph));
    }
    table(&mut html, page);
    for of_operator in page.sections.chunk_by(|a, b| a.row.operator == b.row.operator) {
        let operator = of_operator[0].row.operator;
        let _ = writeln!(html, "<section class=\"operator\" id=\"{operator}\">\n<h2>{operator}</h2>");
        for section in of_operator {
            figures(&mut html, section);
        }
        html.push_str("</section>\n");
    }
    html.push_str("</main>\n</body>\n</html>\n");
    html
}

fn table(html: &mut String, page: &Page) {
    html.push_str("<div class=\"scroll\"><table>\n<thead><tr>");
    for (name, is_number) in COLUMNS {
        let class = if is_number { " class=\"num\"" } else { "" };
        let _ = write!(html, "<th scope=\"col\"{class}>{name}</th>");
    }
    html.push_str("</tr></thead>\n<tbody>\n");
    for of_operator in page.sections.chunk_by(|a, b| a.row.operator == b.row.operator) {
        for (i, Section { row, .. }) in of_operator.iter().enumerate() {
            if i == 0 {
                let (operator, rows) = (row.operator, of_operator.len());
                let _ = write!(
                    html,
                    "<tr class=\"first\"><th scope=\"rowgroup\" rowspan=\"{rows}\">\
                     <a href=\"#{operator}\">{operator}</a></th>"
                );
            } else {
                html.push_str("<tr>");
            }
            let _ = write!(html, "<td>{}</td>", way_name(row.way));
            for cell in row.cells() {
                let _ = write!(html, "<td class=\"num\">{cell}</td>");
            }
            html.push_str("</tr>\n");
        }
    }
    html.push_str("</tbody>\n</table></div>\n");
}

fn figures(html: &mut String, section: &Section) {
    let name = escape(&section.heading());
    let _ = writeln!(
        html,
        "<h3>{name}</h3>\n<p class=\"note\">{}</p>\n<div class=\"figures\">",
        escape(&section.caption)
    );
    for (what, svg) in [
        ("Predicted against measured time", &section.figures.parity),
        ("Signed error over measured time", &section.figures.residual),
    ] {
        let _ =
            writeln!(html, "<figure role=\"img\" aria-label=\"{what}, {name}\">{}</figure>", scalable(svg));
    }
    html.push_str("</div>\n");
}

/// Lets CSS size an inlined figure: the drawing's own width and height would fix it.
fn scalable(svg: &str) -> String {
    match (svg.find(" width=\""), svg.find(" viewBox=")) {
        (Some(from), Some(to)) if from < to => format!("{}{}", &svg[..from], &svg[to..]),
        _ => svg.into(),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::testing::{gpu, outcome};

    fn page() -> (Page, String) {
        let mut outcome = outcome();
        outcome.report.gpu = "a <b> & \"c\"".into();
        let page = Page::new(&outcome, &gpu()).unwrap();
        let html = render(&page);
        (page, html)
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        let (page, html) = page();
        for foreign in ["<script", "<link", "src=", "@import", "url("] {
            assert!(!html.contains(foreign), "{foreign}");
        }
        // The only address is the SVG namespace.
        let addresses: Vec<_> = html.match_indices("http").map(|(at, _)| &html[at..at + 26]).collect();
        assert!(addresses.iter().all(|a| *a == "http://www.w3.org/2000/svg"), "{addresses:?}");
        assert_eq!(html.matches("<svg").count(), 2 * page.sections.len());
    }

    #[test]
    fn names_are_escaped_and_tags_balance() {
        let (_, html) = page();
        assert!(html.contains("a &lt;b&gt; &amp; &quot;c&quot;</h1>"), "{html}");
        for tag in ["table", "thead", "tbody", "tr", "section", "figure", "div", "main", "svg"] {
            let open = html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
            assert_eq!(open, html.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }
}

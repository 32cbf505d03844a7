use std::collections::HashSet;

use super::*;
use crate::{
    evidence::Evidence,
    metrics::Metric,
    report::figures::{self, Waterfall},
    settings::{Setting, Verdict},
    testing::suite_result,
    variants::VariantRow,
};

fn result() -> SuiteResult {
    let mut result = suite_result();
    let case = &mut result.cases[1];
    case.settings = vec![
        Setting {
            setting: "num_gpu_blocks".into(),
            real: Some("38419".into()),
            sim: Some("19209".into()),
            verdict: Verdict::Mismatch,
        },
        Setting { setting: "gpu".into(), real: None, sim: Some("<h100>".into()), verdict: Verdict::Unknown },
    ];
    case.waterfall = Some(Waterfall {
        title: "E2E p50".into(),
        start: ("real".into(), 20.0),
        parts: vec![("host & launch".into(), -2.0)],
        end: ("simulated".into(), 18.0),
    });
    case.variants = vec![VariantRow {
        tool: "a <tool>".into(),
        name: "ttft".into(),
        formula: "t0 - a".into(),
        ours: Metric::Ttft,
        stat: "p50".into(),
        published_ms: Some(20.5),
        real_ms: None,
        sim_ms: Some(18.0),
        error_pct: Some(-12.2),
    }];
    case.evidence = Some(Evidence { real_runs: vec!["runs/<a>".into()], ..Evidence::default() });
    result
}

fn page(result: &SuiteResult) -> String {
    let drawn: Vec<_> = result.cases.iter().map(|case| figures::draw(case).unwrap().figures).collect();
    let files: Vec<_> = drawn.iter().map(|figures| CaseFiles { name: "case-file", figures }).collect();
    render(result, &files)
}

#[test]
fn the_page_needs_nothing_from_elsewhere() {
    let page = page(&result());
    for foreign in ["<script", "src=", "@import", "url(", "//cdn"] {
        assert!(!page.contains(foreign), "{foreign}");
    }
    // The only link is to no icon, so that a browser asks for none.
    assert_eq!(page.matches("<link").count(), 1);
    assert!(page.contains("<link rel=\"icon\" href=\"data:,\">"));
    // The only address is the SVG namespace.
    let addresses: Vec<_> = page.match_indices("http").map(|(at, _)| &page[at..at + 26]).collect();
    assert!(addresses.iter().all(|a| *a == "http://www.w3.org/2000/svg"), "{addresses:?}");
}

#[test]
fn every_section_stands_in_the_page_once_and_in_order() {
    let page = page(&result());
    let mut from = 0;
    for part in [
        "<a class=\"skip\"",
        "<header>",
        "<nav aria-label=",
        "<main id=\"main\">",
        "id=\"failed\"",
        "id=\"totals\"",
        "id=\"cases\"",
        "id=\"settings\"",
        "id=\"held_out\"",
        "<details class=\"case\" id=\"case-1\"",
        "id=\"case-1-ttft-t\"",
        "id=\"case-1-itl-t\"",
        "id=\"case-1-tpot-t\"",
        "id=\"case-1-e2e-t\"",
        "id=\"case-1-ttft-requests-t\"",
        "id=\"case-1-e2e-requests-t\"",
        "id=\"case-1-waterfall-t\"",
        "<h4>As a &lt;tool&gt; defines them</h4>",
        "<td>t0 - a</td><td>p50</td><td class=\"num\">20.50</td><td class=\"num\">n/a</td>",
        "<h4>Settings</h4>",
        "<h4>Coverage and evidence</h4>",
        "tables/case-file-requests.csv",
        "id=\"case-2\"",
        "id=\"fit\"",
        "id=\"case-0\"",
    ] {
        let at =
            page[from..].find(part).unwrap_or_else(|| panic!("no {part} after {}", &page[from..from + 80]));
        from += at;
    }
    assert!(
        page.contains("<td class=\"out\">✗ MISMATCH</td>")
            && page.contains("<td class=\"na\">? unknown</td>")
    );
}

#[test]
fn ids_are_unique_and_links_lead_somewhere() {
    let page = page(&result());
    let values = |attribute: &str| -> Vec<String> {
        let starts = page.match_indices(attribute).map(|(at, _)| at + attribute.len());
        starts.map(|at| page[at..].split('"').next().unwrap().to_owned()).collect()
    };
    let ids = values(" id=\"");
    let unique: HashSet<_> = ids.iter().collect();
    assert_eq!(unique.len(), ids.len(), "{ids:?}");
    for target in values(" href=\"#") {
        assert!(unique.contains(&target), "{target}");
    }
    for named in values("aria-labelledby=\"") {
        for id in named.split(' ') {
            assert!(ids.contains(&id.to_owned()), "{id}");
        }
    }
}

#[test]
fn names_are_escaped_and_tags_balance() {
    let page = page(&result());
    assert!(page.contains("<h3>seed &lt;fit&gt; &amp; &quot;quoted&quot;</h3>"));
    assert!(page.contains("runs/&lt;a&gt;") && !page.contains("<h100>"));
    let tags = [
        "table", "thead", "tbody", "section", "figure", "div", "main", "svg", "ul", "details", "span", "dl",
        "tr",
    ];
    for tag in tags {
        let open = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(open, page.matches(&format!("</{tag}>")).count(), "{tag}");
    }
}

#[test]
fn tables_have_captions_and_headings_do_not_skip_a_level() {
    let page = page(&result());
    assert_eq!(page.matches("<table>").count(), page.matches("<caption>").count());
    assert!(!page.contains("<th>"), "a header cell without a scope");
    let mut level = 0;
    for (at, _) in page.match_indices("<h") {
        let Some(found) = page[at + 2..].chars().next().and_then(|c| c.to_digit(10)) else { continue };
        assert!(found <= level + 1, "from h{level} to h{found}");
        level = found;
    }
}

#[test]
fn a_few_cases_are_open_and_many_are_not() {
    assert!(!page(&result()).contains(" open>"));
    let mut few = result();
    few.cases.truncate(2);
    assert_eq!(page(&few).matches(" open>").count(), 2);
}

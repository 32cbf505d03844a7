//! The report folder: made aside, then moved into place whole.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
};

use plumbline_schema::{
    InputError,
    files::{write_atomically, write_csv, write_json},
};
use rayon::prelude::*;
use serde::Serialize;
use thiserror::Error;

use super::{
    figures::{self, Drawn, Figure},
    html, markdown,
};
use crate::{
    compare::MetricRow,
    metrics::{Metric, Stat},
    results::{CaseResult, CaseStatus, SuiteResult},
};

/// What marks a folder as a report.
pub(crate) const MARKER: &str = "results.json";

/// Everything a report folder holds; a folder with anything else is not replaced.
const ENTRIES: [&str; 5] = [MARKER, "summary.md", "report.html", "tables", "figs"];

/// Why a report cannot be written.
#[derive(Debug, Error)]
pub enum ReportError {
    /// The folder holds something that is not a report.
    #[error(
        "{}: expected a new, an empty or a report folder, found {found}; name another or remove it",
        path.display()
    )]
    NotAReport {
        /// The folder.
        path: PathBuf,
        /// What it holds.
        found: String,
    },
    /// A file cannot be written.
    #[error(transparent)]
    Io(#[from] InputError),
    /// A figure cannot be drawn.
    #[error("a figure of case {case:?}: {reason}")]
    Figure {
        /// The case.
        case: String,
        /// The reason.
        reason: String,
    },
}

/// Writes `results.json`, `summary.md`, `report.html`, `tables/` and `figs/` as the folder `target`.
///
/// The folder appears whole or not at all; an earlier report there is replaced.
///
/// # Errors
/// `NotAReport` when `target` holds something else, `Io` with the path; `target` is then as it was.
pub fn write_report(result: &SuiteResult, target: &Path) -> Result<(), ReportError> {
    check_target(target)?;
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let at = |path: &Path| {
        let path = path.to_path_buf();
        move |source: io::Error| InputError::io(path, source)
    };
    fs::create_dir_all(parent).map_err(at(parent))?;
    let workspace =
        tempfile::Builder::new().prefix(".plumb-report-").tempdir_in(parent).map_err(at(parent))?;
    let fresh = workspace.path().join("new");
    fill(result, &fresh)?;
    // The old report is kept until the new one stands.
    let old = workspace.path().join("old");
    let had_old = target.exists();
    if had_old {
        fs::rename(target, &old).map_err(at(target))?;
    }
    if let Err(e) = fs::rename(&fresh, target) {
        if had_old && fs::rename(&old, target).is_err() {
            // Better a stray folder than a lost report.
            let _ = workspace.keep();
        }
        return Err(at(target)(e).into());
    }
    Ok(())
}

fn check_target(target: &Path) -> Result<(), ReportError> {
    let not_a_report = |found: String| Err(ReportError::NotAReport { path: target.into(), found });
    match fs::symlink_metadata(target) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(InputError::io(target, e).into()),
        Ok(metadata) if !metadata.is_dir() => return not_a_report("a file".into()),
        Ok(_) => {}
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(target).map_err(|e| InputError::io(target, e))? {
        let entry = entry.map_err(|e| InputError::io(target, e))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    if let Some(foreign) = names.iter().find(|name| !ENTRIES.contains(&name.as_str())) {
        return not_a_report(format!("{foreign:?} in it"));
    }
    if !names.is_empty() && !names.iter().any(|name| name == MARKER) {
        return not_a_report(format!("no {MARKER} in it"));
    }
    Ok(())
}

fn fill(result: &SuiteResult, folder: &Path) -> Result<(), ReportError> {
    let names = file_names(result.cases.iter().map(|case| case.name.as_str()));
    let cases: Vec<_> = result.cases.iter().zip(&names).collect();
    let figures = cases
        .into_par_iter()
        .map(|(case, name)| fill_case(case, name, folder))
        .collect::<Result<Vec<_>, _>>()?;
    let files: Vec<_> =
        names.iter().zip(&figures).map(|(name, figures)| html::CaseFiles { name, figures }).collect();
    write_text(&folder.join("report.html"), &html::render(result, &files))?;
    write_text(&folder.join("summary.md"), &markdown::render(result))?;
    write_json(&folder.join(MARKER), result)?;
    Ok(())
}

/// Writes a case's tables and figures; a case that failed has none.
fn fill_case(case: &CaseResult, name: &str, folder: &Path) -> Result<Vec<Figure>, ReportError> {
    if case.status == CaseStatus::Failed {
        return Ok(Vec::new());
    }
    let Drawn { figures, cdf, requests } = figures::draw(case)
        .map_err(|error| ReportError::Figure { case: case.name.clone(), reason: error.to_string() })?;
    let table = |kind: &str| folder.join("tables").join(format!("{name}{kind}.csv"));
    write_csv(&table(""), case.metrics.iter().map(CsvRow::from))?;
    write_csv(&table("-requests"), requests)?;
    write_csv(&table("-cdf"), cdf)?;
    write_csv(&table("-settings"), &case.settings)?;
    for figure in &figures {
        write_text(&folder.join("figs").join(format!("{name}-{}.svg", figure.key)), &figure.svg)?;
    }
    Ok(figures)
}

fn write_text(path: &Path, text: &str) -> Result<(), InputError> {
    write_atomically(path, |out| out.write_all(text.as_bytes()))
}

/// A row of `tables/<case>.csv`; a cell is empty where the number is n/a.
#[derive(Serialize)]
struct CsvRow<'a> {
    metric: Metric,
    stat: Stat,
    n: u64,
    real_ms: Option<f64>,
    real_min_ms: Option<f64>,
    real_max_ms: Option<f64>,
    sim_ms: Option<f64>,
    error_pct: Option<f64>,
    inside_band: Option<bool>,
    na_reason: Option<&'a str>,
}

impl<'a> From<&'a MetricRow> for CsvRow<'a> {
    fn from(row: &'a MetricRow) -> Self {
        Self {
            metric: row.metric,
            stat: row.stat,
            n: row.n,
            real_ms: row.real_ms,
            real_min_ms: row.real_min_ms,
            real_max_ms: row.real_max_ms,
            sim_ms: row.sim_ms,
            error_pct: row.error_pct,
            inside_band: row.inside_band,
            na_reason: row.na_reason.as_deref(),
        }
    }
}

/// File names for case names, each its own: what a file system may not hold becomes `-`.
fn file_names<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut taken = HashSet::new();
    names
        .map(|name| {
            let keep = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
            // A leading dot would hide the file; a very long name would not be created.
            let mut safe: String = name.trim_start_matches('.').chars().map(keep).take(120).collect();
            if safe.is_empty() {
                safe.push_str("case");
            }
            let mut unique = safe.clone();
            let mut number = 2;
            // Lower case: some file systems do not tell cases apart.
            while !taken.insert(unique.to_lowercase()) {
                unique = format!("{safe}-{number}");
                number += 1;
            }
            unique
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::suite_result;

    fn names_in(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_report_holds_results_tables_and_figures_and_nothing_is_left_beside_it() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("deep/report");
        let result = suite_result();
        write_report(&result, &target).unwrap();
        assert_eq!(names_in(&parent.path().join("deep")), ["report"]);
        assert_eq!(names_in(&target), ["figs", "report.html", "results.json", "summary.md", "tables"]);
        assert_eq!(
            names_in(&target.join("tables")),
            ["llama3-8b-graph-static-b128-p256", "qwen3-0.6b-graph-conv-q8", "seed--fit-----quoted-"]
                .map(|name| ["-cdf", "-requests", "-settings", ""].map(|kind| format!("{name}{kind}.csv")))
                .concat()
        );
        // Four distributions and two scatter plots of each of three cases.
        assert_eq!(names_in(&target.join("figs")).len(), 18);
        let back: SuiteResult = plumbline_schema::files::read_json(&target.join(MARKER), "results").unwrap();
        assert_eq!(back.summary, result.summary);
        let csv = fs::read_to_string(target.join("tables/llama3-8b-graph-static-b128-p256.csv")).unwrap();
        assert_eq!(csv.lines().count(), 17);
        assert!(csv.starts_with(
            "metric,stat,n,real_ms,real_min_ms,real_max_ms,sim_ms,error_pct,inside_band,na_reason\n"
        ));
        let requests = target.join("tables/llama3-8b-graph-static-b128-p256-requests.csv");
        let requests = fs::read_to_string(requests).unwrap();
        assert!(requests.starts_with(
            "request_id,ttft_real_ms,ttft_sim_ms,tpot_real_ms,tpot_sim_ms,e2e_real_ms,e2e_sim_ms\n0,10.25,9.0,"
        ));
        assert_eq!(requests.lines().count(), 102);
        assert!(csv.contains("\nttft,p50,101,20.5,20.0,21.0,18.0,-12.19"), "{csv}");
    }

    #[test]
    fn an_earlier_report_and_an_empty_folder_are_replaced() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("report");
        fs::create_dir(&target).unwrap();
        write_report(&suite_result(), &target).unwrap();
        let only_one = SuiteResult::new(vec![suite_result().cases.remove(1)], 1.0);
        write_report(&only_one, &target).unwrap();
        assert!(names_in(&target.join("tables")).iter().all(|name| name.starts_with("llama3-8b")));
        assert_eq!(names_in(parent.path()), ["report"]);
    }

    #[test]
    fn any_other_folder_is_refused_and_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("work");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("thesis.tex"), "years").unwrap();
        fs::write(target.join(MARKER), "{}").unwrap();
        let error = write_report(&suite_result(), &target).unwrap_err().to_string();
        assert!(error.ends_with("found \"thesis.tex\" in it; name another or remove it"), "{error}");
        assert_eq!(names_in(&target), [MARKER, "thesis.tex"]);

        let other = parent.path().join("other");
        fs::create_dir_all(other.join("figs")).unwrap();
        assert!(
            write_report(&suite_result(), &other).unwrap_err().to_string().contains("no results.json in it")
        );

        let file = parent.path().join("file");
        fs::write(&file, "text").unwrap();
        assert!(write_report(&suite_result(), &file).unwrap_err().to_string().contains("found a file"));
        assert_eq!(names_in(parent.path()), ["file", "other", "work"]);
    }

    #[test]
    fn file_names_are_safe_and_unique() {
        let names = ["a/b", "a-b", "A b", "../x", "", ""];
        assert_eq!(file_names(names.into_iter()), ["a-b", "a-b-2", "A-b-3", "-x", "case", "case-2"]);
    }
}

//! A folder that shows how well training did: `report.html`, `report.md`, the figures and the points behind them.
//!
//! Start with [`write()`]. `summary.rs` is the table, `figures.rs` the drawings, `page.rs` what is said about them.

mod axis;
mod figures;
mod html;
mod markdown;
mod page;
mod points;
mod summary;
#[cfg(test)]
mod testing;

use std::path::Path;

use plumbline_schema::{
    GpuSpec, InputError, Operator,
    files::{write_atomically, write_csv},
};
use serde::Serialize;

pub use summary::MIN_FOR_P99;

use crate::train::{HeldOutPoint, HeldOutWay, TrainOutcome};

/// Folder of the figures inside the report's.
const FIGURES: &str = "figs";

/// Why a report cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A file cannot be written.
    #[error(transparent)]
    Io(#[from] InputError),
    /// A figure cannot be drawn.
    #[error("figure of `{operator}`, {}: {reason}", summary::way_name(*way))]
    Figure {
        /// The operator.
        operator: Operator,
        /// How its shapes were held out.
        way: HeldOutWay,
        /// What the drawing library says.
        reason: String,
    },
}

/// Writes `report.html`, `report.md`, `held_out.csv` and `figs/OPERATOR-WAY-{parity,residual}.svg` into `folder`, which
/// is made if need be.
///
/// `gpu` is the one trained for. Each file appears whole or not at all; other files in the folder are left alone.
///
/// # Errors
/// `Io` with the path, `Figure` when the drawing library fails.
pub fn write(folder: &Path, outcome: &TrainOutcome, gpu: &GpuSpec) -> Result<(), ReportError> {
    let page = page::Page::new(outcome, gpu)?;
    for section in &page.sections {
        write_text(&folder.join(&section.parity_path), &section.figures.parity)?;
        write_text(&folder.join(&section.residual_path), &section.figures.residual)?;
    }
    write_csv(&folder.join("held_out.csv"), outcome.held_out.iter().map(CsvRow::from))?;
    write_text(&folder.join("report.md"), &markdown::render(&page))?;
    write_text(&folder.join("report.html"), &html::render(&page))?;
    Ok(())
}

fn write_text(path: &Path, text: &str) -> Result<(), InputError> {
    write_atomically(path, |out| out.write_all(text.as_bytes()))
}

/// A row of `held_out.csv`.
#[derive(Serialize)]
struct CsvRow {
    operator: Operator,
    way: HeldOutWay,
    fold: u32,
    /// `column = value`, joined by commas: operators differ in their columns.
    shape: String,
    measured_ns: f64,
    predicted_ns: f64,
    low_ns: f64,
    high_ns: f64,
}

impl From<&HeldOutPoint> for CsvRow {
    fn from(point: &HeldOutPoint) -> Self {
        Self {
            operator: point.operator,
            way: point.way,
            fold: point.fold,
            shape: points::describe(point),
            measured_ns: point.measured_ns,
            predicted_ns: point.predicted_ns,
            low_ns: point.low_ns,
            high_ns: point.high_ns,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use testing::{gpu, outcome};

    #[test]
    fn a_report_holds_every_file_it_links_to_and_leaves_others_alone() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("deep/report");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("notes.txt"), "mine").unwrap();
        let outcome = outcome();
        write(&folder, &outcome, &gpu()).unwrap();
        write(&folder, &outcome, &gpu()).unwrap();
        let text = std::fs::read_to_string(folder.join("report.md")).unwrap();
        let links: Vec<&str> =
            text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link).collect();
        assert!(links.len() >= 4, "{text}");
        for link in links {
            assert!(std::fs::read_to_string(folder.join(link)).unwrap().starts_with("<svg"), "{link}");
        }
        let csv = std::fs::read_to_string(folder.join("held_out.csv")).unwrap();
        assert_eq!(csv.lines().count(), 1 + outcome.held_out.len());
        assert!(csv.starts_with("operator,way,fold,shape,measured_ns,predicted_ns,low_ns,high_ns\n"));
        assert!(csv.contains("\nrms_norm,blocked,0,\"num_tokens = "), "{csv}");
        assert_eq!(std::fs::read_to_string(folder.join("notes.txt")).unwrap(), "mine");
        let mut names: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["figs", "held_out.csv", "notes.txt", "report.html", "report.md"]);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let parent = tempfile::tempdir().unwrap();
        let file = parent.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = write(&file.join("report"), &outcome(), &gpu()).unwrap_err().to_string();
        assert!(error.contains("file"), "{error}");
    }
}

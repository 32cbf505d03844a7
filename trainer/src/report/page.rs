//! What the report says, before it is markup.

use std::fmt::Write as _;

use plumbline_schema::GpuSpec;
use rayon::prelude::*;

use super::{
    ReportError,
    axis::format_time,
    figures::{self, Figures},
    points::{describe, error_pct},
    summary::{Group, Row, groups, how_to_read, row, signed_percent, way_name},
};
use crate::train::{HeldOutPoint, TrainOutcome};

/// The whole report.
#[derive(Clone, Debug)]
pub(super) struct Page {
    pub title: String,
    /// Paragraphs above the table.
    pub how_to_read: [String; 3],
    /// By operator, then by way.
    pub sections: Vec<Section>,
}

/// The held-out shapes of an operator and way.
#[derive(Clone, Debug)]
pub(super) struct Section {
    pub row: Row,
    pub figures: Figures,
    pub caption: String,
    /// Where the figures lie in the folder.
    pub parity_path: String,
    pub residual_path: String,
}

impl Page {
    /// Draws and words everything.
    pub(super) fn new(outcome: &TrainOutcome, gpu: &GpuSpec) -> Result<Self, ReportError> {
        let groups = groups(outcome);
        let sections = groups
            .par_iter()
            .map(|group| {
                // Groups are those of predictors.
                let own = outcome.predictors.iter().find(|predictor| predictor.operator == group.operator);
                own.map(|predictor| Section::new(group, row(group, predictor, gpu)))
            })
            .flatten_iter()
            .collect::<Result<_, _>>()?;
        Ok(Self {
            title: format!("Training: errors on held-out shapes, {}", outcome.report.gpu),
            how_to_read: how_to_read(outcome),
            sections,
        })
    }
}

impl Section {
    fn new(group: &Group<'_>, row: Row) -> Result<Self, ReportError> {
        let figures = figures::draw(&group.points).map_err(|reason| ReportError::Figure {
            operator: group.operator,
            way: group.way,
            reason,
        })?;
        let path =
            |kind: &str| format!("{}/{}-{}-{kind}.svg", super::FIGURES, group.operator, way_name(group.way));
        Ok(Self {
            caption: caption(group, &figures),
            parity_path: path("parity"),
            residual_path: path("residual"),
            row,
            figures,
        })
    }

    pub(super) fn heading(&self) -> String {
        format!("{}, {}", self.row.operator, way_name(self.row.way))
    }
}

fn caption(group: &Group<'_>, figures: &Figures) -> String {
    let n = group.points.len();
    let mut text = match figures.num_drawn {
        drawn if drawn < n => {
            format!("{drawn} of {n} shapes are drawn, those with the largest errors among them.")
        }
        1 => "1 shape.".into(),
        _ => format!("{n} shapes."),
    };
    match figures.num_beyond {
        0 => {}
        1 => text.push_str(" 1 error is beyond the axis, drawn as a triangle at its edge."),
        beyond => {
            let _ = write!(text, " {beyond} errors are beyond the axis, drawn as triangles at its edge.");
        }
    }
    let by_size = |a: &&&HeldOutPoint, b: &&&HeldOutPoint| error_pct(a).abs().total_cmp(&error_pct(b).abs());
    if let Some(worst) = group.points.iter().max_by(by_size) {
        let _ = write!(
            text,
            " Largest error: {} of a measured {} at {}.",
            signed_percent(error_pct(worst) / 100.0),
            format_time(worst.measured_ns),
            describe(worst)
        );
    }
    text
}

//! Figures of a case, as SVG: what plotters draws, in colours that are read on white and on near-black alike.

pub(super) mod axis;
mod cdf;
mod scatter;
mod thin;
mod timeline;
mod waterfall;

use plotters::prelude::*;
use plumbline_bundles::stats::percentile_of_sorted;
use serde::Serialize;

pub(super) use self::{axis::Axis, thin::quantile_ranks};
use super::requests::{self, RequestRow};
use crate::{
    metrics::Metric,
    results::{CaseResult, Samples},
};

pub use self::waterfall::{Waterfall, waterfall_svg};

/// Width and height in px.
pub(super) const SIZE: (u32, u32) = (480, 320);

pub(super) const REAL: RGBColor = RGBColor(59, 130, 196);
pub(super) const SIMULATED: RGBColor = RGBColor(222, 115, 28);
/// Steps with a part of a prompt.
const PREFILL: RGBColor = RGBColor(22, 150, 130);
pub(super) const GRID: RGBColor = RGBColor(140, 140, 140);

/// Why a figure cannot be drawn: what the drawing library says.
pub(super) type DrawResult<T> = Result<T, Box<dyn std::error::Error>>;

/// What is drawn on.
type Chart<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<Axis, Axis>>;

/// A figure and the words for it.
#[derive(Clone, Debug)]
pub(super) struct Figure {
    /// Unique in its case; part of the file's name.
    pub key: String,
    /// What it is about, together with the figures beside it.
    pub heading: &'static str,
    /// What it shows, in a line.
    pub title: String,
    /// What is to be seen, for whom does not see it.
    pub description: String,
    /// How to read it, or what was left out; none when it speaks for itself.
    pub note: Option<String>,
    /// Whether it takes the page's whole width.
    pub is_wide: bool,
    /// The drawing.
    pub svg: String,
}

/// Ascending samples of a metric in ms: of each real repeat, and of the simulation.
struct Sorted {
    real: Vec<Vec<f64>>,
    sim: Vec<f64>,
}

impl Sorted {
    /// None when a run has no samples.
    fn of(samples: &Samples, metric: Metric) -> Option<Self> {
        let in_ms = |values: Vec<f64>| values.into_iter().map(|ns| ns / 1e6).collect::<Vec<f64>>();
        let real: Vec<_> = samples.real.iter().map(|run| in_ms(run.sorted_ns(metric))).collect();
        let sim = in_ms(samples.sim.sorted_ns(metric));
        let has_all = !sim.is_empty() && real.iter().all(|values| !values.is_empty());
        has_all.then_some(Self { real, sim })
    }
}

/// A point of the distributions of a metric, as `tables/*-cdf.csv` has it: `share` of the samples is at most as long.
#[derive(Serialize)]
pub(super) struct CdfPoint {
    pub metric: Metric,
    /// `real 1`, `real 2`, ..., `simulated`.
    pub run: String,
    pub share: f64,
    pub ms: f64,
}

/// Everything drawn of a case, and the points behind it.
#[derive(Default)]
pub(super) struct Drawn {
    pub figures: Vec<Figure>,
    pub cdf: Vec<CdfPoint>,
    pub requests: Vec<RequestRow>,
}

/// Draws all figures for which the case has what they need.
pub(super) fn draw(case: &CaseResult) -> DrawResult<Drawn> {
    let mut drawn = Drawn::default();
    if let Some(samples) = &case.samples {
        for metric in Metric::ALL {
            let Some(sorted) = Sorted::of(samples, metric) else { continue };
            drawn.figures.push(cdf::figure(metric, &sorted)?);
            let numbered = (1..).map(|number| format!("real {number}"));
            let runs = numbered.zip(&sorted.real).chain([("simulated".to_owned(), &sorted.sim)]);
            drawn.cdf.extend(runs.flat_map(|(run, values)| cdf_points(metric, run, values)));
        }
        drawn.requests = requests::rows(samples);
        for metric in [Metric::Ttft, Metric::E2e] {
            drawn.figures.extend(scatter::figure(metric, &drawn.requests)?);
        }
    }
    if let Some(timeline) = &case.timeline {
        drawn.figures.push(timeline::figure(timeline)?);
    }
    if let Some(waterfall) = &case.waterfall {
        drawn.figures.push(waterfall::figure(waterfall)?);
    }
    Ok(drawn)
}

fn cdf_points(metric: Metric, run: String, sorted: &[f64]) -> impl Iterator<Item = CdfPoint> {
    let share = |rank: usize| (rank + 1) as f64 / sorted.len() as f64;
    quantile_ranks(sorted.len()).into_iter().map(move |rank| CdfPoint {
        metric,
        run: run.clone(),
        share: share(rank),
        ms: sorted[rank],
    })
}

/// Grid, ticks and titles, the same in every chart.
pub(super) fn mesh(
    chart: &mut Chart<'_>,
    (x_title, y_title): (&str, &str),
    (num_x, num_y): (usize, usize),
    format_y: &dyn Fn(&f64) -> String,
) -> DrawResult<()> {
    chart
        .configure_mesh()
        .x_desc(x_title)
        .y_desc(y_title)
        .x_labels(num_x)
        .y_labels(num_y)
        .x_label_formatter(&|x| axis::format_tick(*x))
        .y_label_formatter(format_y)
        .bold_line_style(GRID.mix(0.35))
        .light_line_style(TRANSPARENT)
        .axis_style(GRID)
        .label_style(("sans-serif", 13))
        .axis_desc_style(("sans-serif", 14))
        .draw()?;
    Ok(())
}

/// The legend, in the corner that the drawing leaves free.
pub(super) fn legend(chart: &mut Chart<'_>, position: SeriesLabelPosition) -> DrawResult<()> {
    chart
        .configure_series_labels()
        .position(position)
        .margin(12)
        .legend_area_size(28)
        .background_style(WHITE.mix(0.8))
        .label_font(("sans-serif", 14))
        .draw()?;
    Ok(())
}

/// Median and 99th percentile in words.
fn in_words(sorted: &[f64]) -> String {
    let at = |share| super::format::ms(percentile_of_sorted(sorted, share));
    format!("median {} ms, 99 % within {} ms", at(0.5), at(0.99))
}

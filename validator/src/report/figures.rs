//! Figures: the distribution of a metric, real against simulated, as SVG.

use std::{fmt::Display, ops::Range};

use plotters::{
    coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged},
    prelude::*,
};

use crate::{
    metrics::Metric,
    results::{CaseResult, Samples},
};

/// Width and height in px.
pub(super) const SIZE: (u32, u32) = (480, 320);

/// Readable on white and on near-black alike.
pub(super) const REAL: RGBColor = RGBColor(59, 130, 196);
pub(super) const SIMULATED: RGBColor = RGBColor(222, 115, 28);
pub(super) const GRID: RGBColor = RGBColor(140, 140, 140);

/// From this ratio of largest to smallest value on, the axis is logarithmic.
const LOG_FROM_RATIO: f64 = 10.0;

/// More points than this are not seen on a line; it keeps files small.
const MAX_POINTS: usize = 400;

/// The metrics drawn; TPOT is a smoothed ITL.
pub(super) const DRAWN: [Metric; 3] = [Metric::Ttft, Metric::Itl, Metric::E2e];

/// Draws the cumulative distribution of a metric: every real repeat and the simulated run.
///
/// `None` when the case has no samples of it.
pub(super) fn cdf_svg(case: &CaseResult, metric: Metric) -> Option<Result<String, String>> {
    let Samples { real, sim } = case.samples.as_ref()?;
    let in_ms = |values: Vec<f64>| values.into_iter().map(|ns| ns / 1e6).collect::<Vec<f64>>();
    let real: Vec<_> = real.iter().map(|run| in_ms(run.sorted_ns(metric))).collect();
    let sim = in_ms(sim.sorted_ns(metric));
    if sim.is_empty() || real.iter().any(Vec::is_empty) {
        return None;
    }
    Some(draw(metric, &real, &sim).map_err(|e| e.to_string()))
}

fn draw(metric: Metric, real: &[Vec<f64>], sim: &[f64]) -> Result<String, Box<dyn std::error::Error>> {
    let axis = MsAxis::spanning(real.iter().map(Vec::as_slice).chain([sim]));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(54)
            .build_cartesian_2d(axis.clone(), 0.0..1.0)?;
        let scale = if axis.is_log { ", log scale" } else { "" };
        chart
            .configure_mesh()
            .x_desc(format!("{} (ms{scale})", metric.title()))
            .y_desc(format!("share of {}", if metric == Metric::Itl { "gaps" } else { "requests" }))
            .x_labels(7)
            .y_labels(6)
            .x_label_formatter(&|ms| format_tick(*ms))
            .y_label_formatter(&|share| format!("{:.0} %", share * 100.0))
            .bold_line_style(GRID.mix(0.35))
            .light_line_style(TRANSPARENT)
            .axis_style(GRID)
            .label_style(("sans-serif", 13))
            .axis_desc_style(("sans-serif", 14))
            .draw()?;
        let repeats = real.len();
        // Wide and see-through, so that a simulated line on top of it leaves it in sight.
        let real_line = REAL.mix(0.6).stroke_width(4);
        for (i, values) in real.iter().enumerate() {
            let line = chart.draw_series(LineSeries::new(steps(values, &axis), real_line))?;
            if i == 0 {
                line.label(if repeats == 1 { "real".into() } else { format!("real, {repeats} repeats") })
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], real_line));
            }
        }
        chart
            .draw_series(LineSeries::new(steps(sim, &axis), SIMULATED.stroke_width(2)))?
            .label("simulated")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], SIMULATED.stroke_width(2)));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .margin(12)
            .legend_area_size(28)
            .label_font(("sans-serif", 14))
            .draw()?;
        root.present()?;
    }
    Ok(svg)
}

/// The steps of the empirical distribution, from the axis' left end to its right end.
fn steps(sorted: &[f64], axis: &MsAxis) -> Vec<(f64, f64)> {
    let n = sorted.len();
    let num_points = n.min(MAX_POINTS);
    let mut points = vec![(axis.low, 0.0)];
    let mut share = 0.0;
    for k in 1..=num_points {
        // The last of the k-th of `num_points` equal parts, so that the largest value always ends the line.
        let last = k * n / num_points - 1;
        points.push((sorted[last], share));
        share = (last + 1) as f64 / n as f64;
        points.push((sorted[last], share));
    }
    points.push((axis.high, 1.0));
    points
}

pub(super) fn format_tick(ms: f64) -> String {
    // Ticks are 1, 2 or 5 times a power of ten or multiples of such: few digits, never rounding noise.
    let rounded = (ms * 1e6).round() / 1e6;
    trimmed(&rounded)
}

fn trimmed(value: &impl Display) -> String {
    value.to_string()
}

/// An axis of numbers of at least 0 (times in ms, rates, costs), linear from 0 or logarithmic.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct MsAxis {
    low: f64,
    high: f64,
    pub(super) is_log: bool,
}

impl MsAxis {
    /// The axis that holds all of the ascending, non-empty `series`.
    pub(super) fn spanning<'a>(series: impl Iterator<Item = &'a [f64]> + Clone) -> Self {
        let lowest = series.clone().map(|s| s[0]).fold(f64::INFINITY, f64::min);
        let highest = series.map(|s| s[s.len() - 1]).fold(0.0, f64::max);
        if lowest > 0.0 && highest / lowest > LOG_FROM_RATIO {
            return Self { low: lowest / 1.1, high: highest * 1.1, is_log: true };
        }
        let span = (highest - lowest).max(highest * 0.02).max(1e-6);
        // A range far from 0 would be squeezed into the axis' right end.
        let low = if lowest > span { lowest - 0.1 * span } else { 0.0 };
        Self { low, high: highest + 0.1 * span, is_log: false }
    }

    fn linear_ticks(&self, max_points: usize) -> Vec<f64> {
        let rough = (self.high - self.low) / max_points.max(1) as f64;
        let magnitude = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * magnitude).into_iter().find(|s| *s >= rough);
        let step = step.unwrap_or(10.0 * magnitude);
        let first = (self.low / step).ceil() as u64;
        let last = (self.high / step).floor() as u64;
        (first..=last).map(|i| i as f64 * step).collect()
    }

    fn log_ticks(&self, max_points: usize) -> Vec<f64> {
        let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let ticks = |multiples: &[f64]| -> Vec<f64> {
            decades
                .clone()
                .flat_map(|decade| multiples.iter().map(move |m| m * 10f64.powi(decade)))
                .filter(|tick| (self.low..=self.high).contains(tick))
                .collect()
        };
        let fine = ticks(&[1.0, 2.0, 5.0]);
        if fine.len() <= max_points { fine } else { ticks(&[1.0]) }
    }
}

impl Ranged for MsAxis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let share = if self.is_log {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        from + (share * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // Light lines ask for many more; the labelled ones are enough.
        let max_points = hint.bold_points().min(12);
        if self.is_log { self.log_ticks(max_points.max(4)) } else { self.linear_ticks(max_points) }
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::suite_result;

    #[test]
    fn a_figure_has_both_lines_units_and_a_legend() {
        let result = suite_result();
        let svg = cdf_svg(&result.cases[1], Metric::Ttft).unwrap().unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for text in ["TTFT (ms)", "share of requests", "real, 2 repeats", "simulated", "100 %"] {
            assert!(svg.contains(text), "no {text:?}");
        }
        // Two repeats and one simulated run, besides the legend's own strokes.
        assert_eq!(svg.matches("#3B82C4").count(), 3);
        assert_eq!(svg.matches("#DE731C").count(), 2);
        assert!(cdf_svg(&result.cases[3], Metric::Ttft).is_none());
    }

    #[test]
    fn steps_rise_from_0_to_1_and_jump_at_the_values() {
        let axis = MsAxis { low: 0.0, high: 5.0, is_log: false };
        let points = steps(&[1.0, 4.0], &axis);
        assert_eq!(points, [(0.0, 0.0), (1.0, 0.0), (1.0, 0.5), (4.0, 0.5), (4.0, 1.0), (5.0, 1.0)]);
        let many: Vec<f64> = (0..5_003).map(f64::from).collect();
        let points = steps(&many, &MsAxis { low: 0.0, high: 6e3, is_log: false });
        assert!(points.len() <= 2 * MAX_POINTS + 2);
        assert_eq!(points[points.len() - 2], (5_002.0, 1.0));
        assert!(points.is_sorted_by(|a, b| a.0 <= b.0 && a.1 <= b.1));
    }

    #[test]
    fn the_axis_turns_logarithmic_where_values_span_more_than_10_times() {
        let axis = |values: &[f64]| MsAxis::spanning([values].into_iter());
        assert!(!axis(&[1.0, 10.0]).is_log);
        assert!(axis(&[1.0, 10.1]).is_log);
        assert!(!axis(&[0.0, 10.1]).is_log);
        assert_eq!(axis(&[3.0, 300.0]).log_ticks(8), [5.0, 10.0, 20.0, 50.0, 100.0, 200.0]);
        assert_eq!(
            MsAxis { low: 0.0, high: 21.0, is_log: false }.linear_ticks(8),
            [0.0, 5.0, 10.0, 15.0, 20.0]
        );
        let flat = axis(&[7.0, 7.0]);
        assert!(flat.low < 7.0 && flat.high > 7.0 && flat.linear_ticks(8).len() > 1);
    }

    #[test]
    fn ticks_are_short() {
        assert_eq!(format_tick(0.1 + 0.2), "0.3");
        assert_eq!(format_tick(2000.0), "2000");
    }
}

//! Figures of held-out shapes as SVG: predicted against measured times, and signed errors over measured times.

use plotters::{
    chart::SeriesAnno,
    coord::{
        Shift,
        ranged1d::{Ranged, ValueFormatter},
    },
    prelude::*,
};
use plumbline_bundles::stats::percentile_of_sorted;

use super::{
    axis::{TimeAxis, error_range, format_time},
    points::{band_pct, error_pct, is_inside, thinned},
};
use crate::train::HeldOutPoint;

/// Figures are drawn so many times as large as they are shown: coordinates are whole numbers, and points would lie
/// on a visible grid.
const SCALE: u32 = 2;

/// Width and height as shown, px: a parity plot is square.
const PARITY_SIZE: (u32, u32) = (400, 400);
const RESIDUAL_SIZE: (u32, u32) = (600, 400);

/// Readable on white and on near-black alike.
const INSIDE: RGBColor = RGBColor(59, 130, 196);
const OUTSIDE: RGBColor = RGBColor(222, 115, 28);
const LINES: RGBColor = RGBColor(140, 140, 140);

/// Opacity of a point: where many lie on top of each other is seen.
const OPACITY: f64 = 0.5;
const RADIUS: u32 = 3 * SCALE;

/// Parts that an axis of times is cut into where the interval differs along it.
const BAND_PARTS: usize = 24;

type DrawError = Box<dyn std::error::Error>;

/// Both figures of an operator and way.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Figures {
    /// Predicted against measured time.
    pub parity: String,
    /// Signed error over measured time.
    pub residual: String,
    /// Points drawn.
    pub num_drawn: usize,
    /// Points drawn at the edge of the residual plot, being beyond it.
    pub num_beyond: usize,
}

/// Draws both figures of `points`, at least one.
///
/// # Errors
/// What the drawing library says.
pub(super) fn draw(points: &[&HeldOutPoint]) -> Result<Figures, String> {
    let drawn = thinned(points);
    let range = error_range(points.iter().map(|point| error_pct(point)));
    let num_beyond = drawn.iter().filter(|point| !range.contains(&error_pct(point))).count();
    Ok(Figures {
        parity: parity(&drawn).map_err(|e| e.to_string())?,
        residual: residual(&drawn, &range).map_err(|e| e.to_string())?,
        num_drawn: drawn.len(),
        num_beyond,
    })
}

fn parity(points: &[&HeldOutPoint]) -> Result<String, DrawError> {
    let axis = TimeAxis::spanning(points.iter().flat_map(|p| [p.measured_ns, p.predicted_ns]));
    figure(PARITY_SIZE, |root| {
        let mut chart = chart(root).build_cartesian_2d(axis, axis)?;
        mesh(&mut chart, "predicted time (log scale)", &|ns| format_time(*ns))?;
        let (low, high) = (axis.low_ns(), axis.high_ns());
        let line = |factor: f64| {
            // Cut at the frame.
            let from = low.max(low / factor);
            let to = high.min(high / factor);
            [(from, from * factor), (to, to * factor)]
        };
        let exact = LINES.stroke_width(SCALE);
        let within = LINES.mix(0.9).stroke_width(SCALE / 2);
        legend_line(chart.draw_series(LineSeries::new(line(1.0), exact))?, "1 : 1", exact);
        legend_line(chart.draw_series(LineSeries::new(line(1.1), within))?, "± 10 %", within);
        chart.draw_series(LineSeries::new(line(0.9), within))?;
        for (colour, _, is_wanted) in kinds() {
            let own = points.iter().filter(|p| is_inside(p) == is_wanted);
            chart.draw_series(own.map(|p| dot((p.measured_ns, p.predicted_ns), colour)))?;
        }
        legend(&mut chart, SeriesLabelPosition::UpperLeft)
    })
}

fn residual(points: &[&HeldOutPoint], range: &std::ops::Range<f64>) -> Result<String, DrawError> {
    let axis = TimeAxis::spanning(points.iter().map(|p| p.measured_ns));
    figure(RESIDUAL_SIZE, |root| {
        let mut chart = chart(root).build_cartesian_2d(axis, range.clone())?;
        let outline = band(points, axis);
        let cut = |(ns, pct): (f64, f64)| (ns, pct.clamp(range.start, range.end));
        let area = LINES.mix(0.18).filled();
        chart
            .draw_series([Polygon::new(outline.into_iter().map(cut).collect::<Vec<_>>(), area)])?
            .label("interval")
            .legend(move |(x, y)| Rectangle::new([(x, y - 8), (x + 44, y + 8)], area));
        mesh(&mut chart, "(predicted − measured) / measured", &|pct| format_pct(*pct))?;
        let exact = LINES.stroke_width(SCALE);
        chart.draw_series(LineSeries::new([(axis.low_ns(), 0.0), (axis.high_ns(), 0.0)], exact))?;
        for (colour, name, is_wanted) in kinds() {
            let own = points.iter().filter(|p| is_inside(p) == is_wanted);
            let (on_axis, beyond): (Vec<_>, Vec<_>) =
                own.map(|p| (p.measured_ns, error_pct(p))).partition(|(_, pct)| range.contains(pct));
            let style = colour.mix(OPACITY).filled();
            chart
                .draw_series(on_axis.into_iter().map(|at| dot(at, colour)))?
                .label(name)
                .legend(move |(x, y)| Circle::new((x + 22, y), RADIUS, colour.mix(0.8).filled()));
            let edge = beyond.into_iter().map(cut);
            chart.draw_series(edge.map(|at| TriangleMarker::new(at, 2 * RADIUS, style)))?;
        }
        legend(&mut chart, SeriesLabelPosition::UpperRight)
    })
}

/// Colour, name and whether inside the interval, in the order of drawing.
fn kinds() -> [(RGBColor, &'static str, bool); 2] {
    [(INSIDE, "in the interval", true), (OUTSIDE, "outside", false)]
}

fn dot<T>(at: T, colour: RGBColor) -> Circle<T, u32> {
    Circle::new(at, RADIUS, colour.mix(OPACITY).filled())
}

/// The outline of the band that errors lie in whose measured time lies in the interval.
///
/// Each fold has its own interval. Where folds are runs of sizes the band steps along the axis; where they are dealt at
/// random it is the median all along.
fn band(points: &[&HeldOutPoint], axis: TimeAxis) -> Vec<(f64, f64)> {
    let (low, high) = (axis.low_ns(), axis.high_ns());
    let bands: Vec<(f64, f64, f64)> = points
        .iter()
        .map(|point| (point.measured_ns, band_pct(point)))
        .map(|(ns, (from, to))| (ns, from, to))
        .collect();
    let num_parts = if varies(&bands) { BAND_PARTS } else { 1 };
    let part_of = |ns: f64| {
        let share = (ns / low).ln() / (high / low).ln();
        ((share * num_parts as f64) as usize).min(num_parts - 1)
    };
    let mut parts = vec![(Vec::new(), Vec::new()); num_parts];
    for (ns, from, to) in bands {
        let part = &mut parts[part_of(ns)];
        part.0.push(from);
        part.1.push(to);
    }
    let medians: Vec<Option<(f64, f64)>> =
        parts.into_iter().map(|(from, to)| Some((median(from)?, median(to)?))).collect();
    let edge = |part: usize| low * (high / low).powf(part as f64 / num_parts as f64);
    // A part without points has the band of the last one with points before it.
    let mut last = medians.iter().flatten().next().copied().unwrap_or((0.0, 0.0));
    let (mut under, mut over) = (Vec::new(), Vec::new());
    for (part, of_part) in medians.into_iter().enumerate() {
        last = of_part.unwrap_or(last);
        for at in [edge(part), edge(part + 1)] {
            under.push((at, last.0));
            over.push((at, last.1));
        }
    }
    under.extend(over.into_iter().rev());
    under
}

/// Whether the middle half of the bands differ by more than a tenth of their width.
fn varies(bands: &[(f64, f64, f64)]) -> bool {
    let spread = |pick: fn(&(f64, f64, f64)) -> f64| {
        let mut values: Vec<f64> = bands.iter().map(pick).collect();
        values.sort_by(f64::total_cmp);
        percentile_of_sorted(&values, 0.75) - percentile_of_sorted(&values, 0.25)
    };
    let width = median(bands.iter().map(|(_, from, to)| to - from).collect()).unwrap_or(0.0);
    spread(|band| band.1).max(spread(|band| band.2)) > 0.1 * width
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn format_pct(pct: f64) -> String {
    let rounded = pct.round();
    if rounded == 0.0 { "0 %".into() } else { format!("{rounded:+} %") }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<TimeAxis, Y>>;

/// An SVG of `size` that `fill` draws.
fn figure(
    size: (u32, u32),
    fill: impl FnOnce(&Area<'_>) -> Result<(), DrawError>,
) -> Result<String, DrawError> {
    let (width, height) = (SCALE * size.0, SCALE * size.1);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        root.fill(&WHITE)?;
        fill(&root)?;
        root.present()?;
    }
    let as_drawn = format!("<svg width=\"{width}\" height=\"{height}\"");
    Ok(svg.replacen(&as_drawn, &format!("<svg width=\"{}\" height=\"{}\"", size.0, size.1), 1))
}

fn chart<'a, 'b>(root: &'a Area<'b>) -> ChartBuilder<'a, 'b, SVGBackend<'b>> {
    let mut builder = ChartBuilder::on(root);
    builder
        .margin(10 * SCALE)
        .margin_right(24 * SCALE)
        .x_label_area_size(40 * SCALE)
        .y_label_area_size(62 * SCALE);
    builder
}

fn font(size: u32) -> (&'static str, u32) {
    ("sans-serif", size * SCALE)
}

fn mesh<Y: Ranged<ValueType = f64> + ValueFormatter<f64>>(
    chart: &mut Chart<'_, '_, Y>,
    y_desc: &str,
    y_label: &dyn Fn(&f64) -> String,
) -> Result<(), DrawError> {
    chart
        .configure_mesh()
        .x_desc("measured time (log scale)")
        .y_desc(y_desc)
        .x_labels(7)
        .y_labels(9)
        .x_label_formatter(&|ns| format_time(*ns))
        .y_label_formatter(y_label)
        .bold_line_style(LINES.mix(0.3).stroke_width(SCALE / 2))
        .light_line_style(TRANSPARENT)
        .axis_style(LINES)
        .label_style(font(12))
        .axis_desc_style(font(13))
        .draw()?;
    Ok(())
}

fn legend_line(series: &mut SeriesAnno<'_, SVGBackend<'_>>, name: &str, style: ShapeStyle) {
    series.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 44, y)], style));
}

fn legend<'a, 'b: 'a, Y: Ranged<ValueType = f64>>(
    chart: &mut Chart<'a, 'b, Y>,
    position: SeriesLabelPosition,
) -> Result<(), DrawError> {
    chart
        .configure_series_labels()
        .position(position)
        .margin(8 * SCALE)
        .legend_area_size(28 * SCALE)
        .label_font(font(12))
        .draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::testing::points;

    fn drawn(points: &[HeldOutPoint]) -> Figures {
        draw(&points.iter().collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn figures_have_axes_lines_a_legend_and_every_point() {
        let points = points(60);
        let Figures { parity, residual, num_drawn, num_beyond } = drawn(&points);
        assert_eq!((num_drawn, num_beyond), (60, 1));
        for svg in [&parity, &residual] {
            assert!(svg.starts_with("<svg width=") && svg.trim_end().ends_with("</svg>"), "{svg}");
            assert!(svg.contains("measured time (log scale)") && svg.contains("10 µs"), "{svg}");
        }
        assert!(parity.contains("width=\"400\" height=\"400\" viewBox=\"0 0 800 800\""));
        for text in ["predicted time (log scale)", "1 : 1", "± 10 %"] {
            assert!(parity.contains(text), "no {text:?}");
        }
        for text in ["(predicted − measured) / measured", "+10 %", "in the interval", "outside", "interval"]
        {
            assert!(residual.contains(text), "no {text:?}");
        }
        assert_eq!(parity.matches("<circle").count(), 60);
        let num_inside = points.iter().filter(|point| is_inside(point)).count();
        assert_eq!(parity.matches("#3B82C4").count(), num_inside);
        // Two of the legend; the one beyond is a triangle.
        assert_eq!(residual.matches("<circle").count(), 60 - 1 + 2);
    }

    #[test]
    fn the_band_steps_where_intervals_do() {
        let same = points(40);
        let all: Vec<&HeldOutPoint> = same.iter().collect();
        let axis = TimeAxis::spanning(all.iter().map(|p| p.measured_ns));
        assert_eq!(band(&all, axis).len(), 4);
        let mut wider = points(40);
        for point in wider.iter_mut().filter(|p| p.measured_ns > 50e3) {
            point.high_ns *= 1.5;
        }
        let all: Vec<&HeldOutPoint> = wider.iter().collect();
        let outline = band(&all, axis);
        assert_eq!(outline.len(), 4 * BAND_PARTS);
        // Times longer than predicted are errors below 0.
        assert!(outline[2 * BAND_PARTS - 1].1 < outline[0].1 - 10.0, "{outline:?}");
    }

    #[test]
    fn one_point_and_points_without_a_spread_are_drawn() {
        let mut one = points(1);
        assert_eq!(drawn(&one).num_drawn, 1);
        one[0].predicted_ns = one[0].measured_ns;
        (one[0].low_ns, one[0].high_ns) = (one[0].measured_ns, one[0].measured_ns);
        assert!(drawn(&one).residual.contains("<circle"));
    }
}

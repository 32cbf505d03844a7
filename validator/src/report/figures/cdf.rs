//! The cumulative distribution of a metric, real against simulated.

use plotters::prelude::*;

use super::{
    Axis, DrawResult, Figure, REAL, SIMULATED, SIZE, Sorted, in_words, legend, mesh, quantile_ranks,
};
use crate::{compare::BAND_MARGIN, metrics::Metric};

/// Every real repeat, their band and the simulated run.
pub(super) fn figure(metric: Metric, sorted: &Sorted) -> DrawResult<Figure> {
    let repeats = sorted.real.iter().map(|values| in_words(values)).collect::<Vec<_>>().join("; ");
    Ok(Figure {
        key: metric.name().to_owned(),
        heading: "Distributions",
        title: format!("Distribution of {}", metric.title()),
        description: format!(
            "Cumulative distribution of {}. Real: {repeats}. Simulated: {}.",
            metric.title(),
            in_words(&sorted.sim)
        ),
        note: None,
        is_wide: false,
        svg: draw(metric, sorted)?,
    })
}

fn draw(metric: Metric, Sorted { real, sim }: &Sorted) -> DrawResult<String> {
    let band = band(real);
    // The band is in sight whole: beside it, a small error looks small.
    let ends = band
        .iter()
        .map(|point| point.0)
        .fold([f64::INFINITY, 0.0], |[low, high], ms| [low.min(ms), high.max(ms)]);
    let axis = Axis::spanning([sim.as_slice(), ends.as_slice()].into_iter());
    let shares = Axis { low: 0.0, high: 1.0, is_log: false };
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(54)
            .build_cartesian_2d(axis.clone(), shares)?;
        let scale = if axis.is_log { ", log scale" } else { "" };
        let of = if metric == Metric::Itl { "share of gaps" } else { "share of requests" };
        let x_title = format!("{} (ms{scale})", metric.title());
        mesh(&mut chart, (&x_title, of), (7, 6), &|share| format!("{:.0} %", share * 100.0))?;
        chart
            .draw_series([Polygon::new(band, REAL.mix(0.18).filled())])?
            .label("real, widened by 5 %")
            .legend(|(x, y)| Rectangle::new([(x, y - 5), (x + 22, y + 5)], REAL.mix(0.25).filled()));
        let repeats = real.len();
        // Wide and see-through, so that a simulated line on top of it leaves it in sight.
        let real_line = REAL.mix(0.6).stroke_width(if repeats == 1 { 4 } else { 2 });
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
        legend(&mut chart, SeriesLabelPosition::LowerRight)?;
        root.present()?;
    }
    Ok(svg)
}

/// The steps of the empirical distribution, from the axis' left end to its right end.
fn steps(sorted: &[f64], axis: &Axis) -> Vec<(f64, f64)> {
    let mut points = vec![(axis.low, 0.0)];
    let mut share = 0.0;
    for rank in quantile_ranks(sorted.len()) {
        points.push((sorted[rank], share));
        share = (rank + 1) as f64 / sorted.len() as f64;
        points.push((sorted[rank], share));
    }
    points.push((axis.high, 1.0));
    points
}

/// A share times its number of samples is the rank it was made from, but for rounding.
const ROUNDING: f64 = 1e-6;

/// What lies between the fastest and the slowest repeat, share by share, widened as the judgement widens it.
fn band(real: &[Vec<f64>]) -> Vec<(f64, f64)> {
    let shortest = real.iter().map(Vec::len).min().unwrap_or(0);
    let shares: Vec<f64> =
        quantile_ranks(shortest).into_iter().map(|rank| (rank + 1) as f64 / shortest as f64).collect();
    let edge = |pick: fn(f64, f64) -> f64, factor: f64| -> Vec<(f64, f64)> {
        let mut before = 0.0;
        let step = |&share: &f64| {
            // The sample at this share of each repeat, though one may have more than another.
            let rank = |n: usize| ((share * n as f64 - ROUNDING).ceil() as usize).clamp(1, n) - 1;
            let ms = real.iter().map(|v| v[rank(v.len())]).reduce(pick).unwrap_or_default() * factor;
            [(ms, std::mem::replace(&mut before, share)), (ms, share)]
        };
        shares.iter().flat_map(step).collect()
    };
    let mut outline = edge(f64::min, 1.0 - BAND_MARGIN);
    outline.extend(edge(f64::max, 1.0 + BAND_MARGIN).into_iter().rev());
    outline
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{report::figures, testing::suite_result};

    #[test]
    fn a_figure_has_lines_band_units_and_a_legend() {
        let result = suite_result();
        let drawn = figures::draw(&result.cases[1]).unwrap();
        let keys: Vec<_> = drawn.figures.iter().map(|figure| figure.key.as_str()).collect();
        assert_eq!(keys[..4], ["ttft", "itl", "tpot", "e2e"]);
        let Figure { svg, description, .. } = &drawn.figures[0];
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for text in ["TTFT (ms)", "share of requests", "real, 2 repeats", "simulated", "100 %"] {
            assert!(svg.contains(text), "no {text:?}");
        }
        // Two repeats and their band, and the legend's strokes of both; a simulated run and its stroke.
        assert_eq!(svg.matches("#3B82C4").count(), 5);
        assert_eq!(svg.matches("#DE731C").count(), 2);
        assert!(description.contains("Simulated: median 18.00 ms"), "{description}");
        assert!(figures::draw(&result.cases[3]).unwrap().figures.is_empty());
    }

    #[test]
    fn steps_rise_from_0_to_1_and_jump_at_the_values() {
        let axis = Axis { low: 0.0, high: 5.0, is_log: false };
        let points = steps(&[1.0, 4.0], &axis);
        assert_eq!(points, [(0.0, 0.0), (1.0, 0.0), (1.0, 0.5), (4.0, 0.5), (4.0, 1.0), (5.0, 1.0)]);
        let many: Vec<f64> = (0..5_003).map(f64::from).collect();
        let points = steps(&many, &Axis { low: 0.0, high: 6e3, is_log: false });
        assert!(points.len() <= 1000);
        assert_eq!(points[points.len() - 2], (5_002.0, 1.0));
        assert!(points.is_sorted_by(|a, b| a.0 <= b.0 && a.1 <= b.1));
    }

    #[test]
    fn the_band_is_the_repeats_range_widened() {
        let outline = band(&[vec![10.0, 20.0], vec![20.0, 40.0]]);
        let faster = [(9.5, 0.0), (9.5, 0.5), (19.0, 0.5), (19.0, 1.0)];
        let slower = [(42.0, 1.0), (42.0, 0.5), (21.0, 0.5), (21.0, 0.0)];
        assert_eq!(outline, [faster, slower].concat());
    }
}

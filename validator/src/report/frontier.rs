//! A figure of what deployments bear and cost, and of those that no other beats.

use plotters::prelude::*;

use super::figures::{Axis, REAL, SIMULATED, SIZE, axis::format_tick, legend, mesh};

/// Draws deployments as (cost per hour, requests per second), and the `front` among them, in order of cost.
///
/// `None` when there is no deployment.
///
/// # Errors
/// What the drawing library says.
#[must_use]
pub fn frontier_svg(all: &[(f64, f64)], front: &[(f64, f64)]) -> Option<Result<String, String>> {
    (!all.is_empty()).then(|| draw(all, front).map_err(|error| error.to_string()))
}

/// The axis of one of the two numbers.
fn axis(all: &[(f64, f64)], number: impl Fn(&(f64, f64)) -> f64) -> Axis {
    let mut values: Vec<f64> = all.iter().map(number).collect();
    values.sort_by(f64::total_cmp);
    Axis::spanning([values.as_slice()].into_iter())
}

fn draw(all: &[(f64, f64)], front: &[(f64, f64)]) -> Result<String, Box<dyn std::error::Error>> {
    let (costs, rates) = (axis(all, |point| point.0), axis(all, |point| point.1));
    let scale = |axis: &Axis| if axis.is_log { " (log scale)" } else { "" };
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(54)
            .build_cartesian_2d(costs.clone(), rates.clone())?;
        let titles = [("cost per hour", &costs), ("requests/s within the limits", &rates)];
        let [x_title, y_title] = titles.map(|(title, axis)| format!("{title}{}", scale(axis)));
        mesh(&mut chart, (&x_title, &y_title), (7, 6), &|rate| format_tick(*rate))?;
        let dots = all.iter().map(|&point| Circle::new(point, 4, REAL.mix(0.5).filled()));
        chart
            .draw_series(dots)?
            .label("deployment")
            .legend(|(x, y)| Circle::new((x + 11, y), 4, REAL.mix(0.8).filled()));
        let line = SIMULATED.stroke_width(2);
        chart
            .draw_series(LineSeries::new(front.iter().copied(), line).point_size(4))?
            .label("no other beats")
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], line));
        legend(&mut chart, SeriesLabelPosition::LowerRight)?;
        root.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_deployment_and_the_front_are_drawn() {
        let all = [(1.0, 3.0), (2.0, 5.0), (2.0, 4.0), (30.0, 9.0)];
        let svg = frontier_svg(&all, &[all[0], all[1], all[3]]).unwrap().unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for text in
            ["cost per hour (log scale)", "requests/s within the limits", "no other beats", "deployment"]
        {
            assert!(svg.contains(text), "no {text:?}");
        }
        // Four deployments, three in front, and one in the legend.
        assert_eq!(svg.matches("<circle").count(), 8);
        assert!(frontier_svg(&[], &[]).is_none());
        assert!(frontier_svg(&all[..1], &all[..1]).unwrap().is_ok());
    }
}

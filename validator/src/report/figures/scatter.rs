//! Request by request: a request's real value against its simulated one.

use plotters::prelude::*;

use super::{Axis, DrawResult, Figure, GRID, REAL, SIZE, axis::format_tick, legend, mesh, thin::evenly};
use crate::{metrics::Metric, report::requests::RequestRow};

/// More dots than this are not told apart, and would make the file large.
const MAX_DOTS: usize = 2_000;

/// None where no request has both values.
pub(super) fn figure(metric: Metric, rows: &[RequestRow]) -> DrawResult<Option<Figure>> {
    let mut pairs: Vec<(f64, f64)> = rows.iter().filter_map(|row| row.pair(metric)).collect();
    if pairs.is_empty() {
        return Ok(None);
    }
    let num_requests = pairs.len();
    let num_slower = pairs.iter().filter(|(real, sim)| sim > real).count();
    pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
    let pairs: Vec<_> = evenly(num_requests, MAX_DOTS).into_iter().map(|i| pairs[i]).collect();
    let title = metric.title();
    let note = (num_requests > MAX_DOTS)
        .then(|| format!("{MAX_DOTS} of {num_requests} requests, evenly from the fastest to the slowest."));
    Ok(Some(Figure {
        key: format!("{}-requests", metric.name()),
        heading: "Request by request",
        title: format!("{title} of each request"),
        description: format!(
            "Real {title} of each request against its simulated one: {num_slower} of {num_requests} requests are \
             simulated slower than they were."
        ),
        note,
        is_wide: false,
        svg: draw(metric, &pairs)?,
    }))
}

/// Both axes are the same, so that the diagonal is where a request is predicted exactly.
fn draw(metric: Metric, pairs: &[(f64, f64)]) -> DrawResult<String> {
    let mut values: Vec<f64> = pairs.iter().flat_map(|(real, sim)| [*real, *sim]).collect();
    values.sort_by(f64::total_cmp);
    let axis = Axis::spanning([values.as_slice()].into_iter());
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(64)
            .build_cartesian_2d(axis.clone(), axis.clone())?;
        let scale = if axis.is_log { ", log scale" } else { "" };
        let titles = ["real", "simulated"].map(|side| format!("{side} {} (ms{scale})", metric.title()));
        mesh(&mut chart, (&titles[0], &titles[1]), (7, 6), &|ms| format_tick(*ms))?;
        let diagonal = GRID.stroke_width(2);
        chart
            .draw_series(LineSeries::new([(axis.low, axis.low), (axis.high, axis.high)], diagonal))?
            .label("predicted exactly")
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], diagonal));
        let dot = REAL.mix(0.55).filled();
        chart
            .draw_series(pairs.iter().map(|&pair| Circle::new(pair, 3, dot)))?
            .label("request")
            .legend(move |(x, y)| Circle::new((x + 11, y), 3, dot));
        // In the corner that fewer requests lie towards.
        let num_below = pairs.iter().filter(|(real, sim)| sim < real).count();
        let is_mostly_below = 2 * num_below > pairs.len();
        legend(
            &mut chart,
            if is_mostly_below { SeriesLabelPosition::UpperLeft } else { SeriesLabelPosition::LowerRight },
        )?;
        root.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        compare::compare, report::requests::rows, results::CaseResult, suite::Role, testing::spread_run,
    };

    #[test]
    fn every_request_is_a_dot_and_the_words_say_on_which_side() {
        let comparison = compare(&[spread_run(20.0, 4.0)], &spread_run(18.0, 4.0)).unwrap();
        let rows = rows(&CaseResult::compared("x", Role::HeldOut, comparison).samples.unwrap());
        let drawn = figure(Metric::Ttft, &rows).unwrap().unwrap();
        assert_eq!(drawn.svg.matches("<circle").count(), 101 + 1);
        assert!(drawn.description.ends_with("0 of 101 requests are simulated slower than they were."));
        assert_eq!(drawn.note, None);
        assert!(figure(Metric::Itl, &rows).unwrap().is_none());
    }

    #[test]
    fn of_very_many_requests_some_are_drawn_and_the_figure_says_so() {
        let row = |i: u32| RequestRow {
            request_id: u64::from(i),
            ttft_real_ms: Some(f64::from(i)),
            ttft_sim_ms: Some(f64::from(i) + 1.0),
            tpot_real_ms: None,
            tpot_sim_ms: None,
            e2e_real_ms: None,
            e2e_sim_ms: None,
        };
        let rows: Vec<_> = (1..=100_000).map(row).collect();
        let drawn = figure(Metric::Ttft, &rows).unwrap().unwrap();
        assert_eq!(drawn.svg.matches("<circle").count(), MAX_DOTS + 1);
        let note = drawn.note.unwrap();
        assert_eq!(note, "2000 of 100000 requests, evenly from the fastest to the slowest.");
        assert!(drawn.description.contains("100000 of 100000 requests"), "{}", drawn.description);
    }
}

//! Steps over time: what was computed when, real above simulated.

use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{Axis, DrawResult, Figure, PREFILL, REAL, SIMULATED, axis::format_tick, mesh};
use crate::timeline::{Timeline, TimelineStep};

const SIZE: (u32, u32) = (980, 590);

/// The strip above the panels that says what the colours are.
const KEY_HEIGHT: i32 = 30;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The figure of a window of steps.
pub(super) fn figure(timeline: &Timeline) -> DrawResult<Figure> {
    let seconds = |ns: u64| ns as f64 / 1e9;
    let (from, to) = (seconds(timeline.start_ns), seconds(timeline.end_ns));
    let side = |name: &str, steps: &[TimelineStep]| {
        if steps.is_empty() {
            return format!("{name} steps are not recorded");
        }
        let prefills = steps.iter().filter(|step| step.prefill_tokens > 0).count();
        let tokens: u64 = steps.iter().map(|step| u64::from(step.num_tokens())).sum();
        format!("{name}: {} steps, {prefills} of them with a prefill, {tokens} tokens", steps.len())
    };
    let of = if timeline.is_whole { "the whole run" } else { "its busiest part" };
    Ok(Figure {
        key: "timeline".to_owned(),
        heading: "Steps over time",
        title: format!("Steps from {from:.3} s to {to:.3} s, {of}"),
        description: format!(
            "Tokens computed by each step, and sequences in it, over time. {}; {}.",
            side("Real", &timeline.real),
            side("Simulated", &timeline.sim)
        ),
        note: Some(
            "A bar is a step, from its start to its end; its height is the tokens it computes, on a log scale. Only the \
             first of the real repeats and the first simulation are shown."
                .to_owned(),
        ),
        is_wide: true,
        svg: draw(timeline)?,
    })
}

fn draw(timeline: &Timeline) -> DrawResult<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let time = Axis {
            low: timeline.start_ns as f64 / 1e6,
            high: (timeline.end_ns as f64 / 1e6).max(timeline.start_ns as f64 / 1e6 + 1e-6),
            is_log: false,
        };
        let sides = [("real", &timeline.real, REAL), ("simulated", &timeline.sim, SIMULATED)];
        let steps = || timeline.real.iter().chain(&timeline.sim);
        let most_tokens = steps().map(TimelineStep::num_tokens).max().unwrap_or(1).max(10);
        // From below 1, so that a step of one token is a bar.
        let tokens = Axis { low: 0.7, high: f64::from(most_tokens) * 1.5, is_log: true };
        let (key, panels) = root.split_vertically(KEY_HEIGHT);
        draw_key(&key)?;
        let rows = panels.split_evenly((3, 1));
        for (row, (name, steps, colour)) in rows.iter().zip(sides) {
            bars(row, name, steps, colour, time.clone(), tokens.clone())?;
        }
        let most_seqs = steps().map(|step| step.num_seqs).max().unwrap_or(1).max(1);
        let seqs = Axis { low: 0.0, high: f64::from(most_seqs) * 1.1, is_log: false };
        sequences(&rows[2], &sides, time, seqs)?;
        root.present()?;
    }
    Ok(svg)
}

fn bars(
    area: &Area<'_>,
    name: &str,
    steps: &[TimelineStep],
    colour: RGBColor,
    time: Axis,
    tokens: Axis,
) -> DrawResult<()> {
    let mut builder = ChartBuilder::on(area);
    let low = tokens.low;
    let mut chart =
        builder.margin(10).x_label_area_size(30).y_label_area_size(64).build_cartesian_2d(time, tokens)?;
    mesh(&mut chart, ("", &format!("tokens, {name}")), (12, 5), &|tokens| format_tick(*tokens))?;
    for (has_prefill, colour) in [(true, PREFILL), (false, colour)] {
        let of_kind = steps.iter().filter(|step| (step.prefill_tokens > 0) == has_prefill);
        let bar = |step: &TimelineStep| {
            let (from, to) = step.span_ms();
            Rectangle::new([(from, low), (to, f64::from(step.num_tokens()))], colour.mix(0.8).filled())
        };
        chart.draw_series(of_kind.map(bar))?;
    }
    Ok(())
}

/// In a strip of its own: no corner of a panel is free for sure.
fn draw_key(area: &Area<'_>) -> DrawResult<()> {
    let entries = [
        ("step with a prefill", PREFILL),
        ("real, decodes alone", REAL),
        ("simulated, decodes alone", SIMULATED),
    ];
    let middle = KEY_HEIGHT / 2;
    let style = TextStyle::from(("sans-serif", 15).into_font()).pos(Pos::new(HPos::Left, VPos::Center));
    for ((text, colour), i) in entries.into_iter().zip(0..) {
        let x = 84 + 260 * i;
        area.draw(&Rectangle::new([(x, middle - 6), (x + 22, middle + 6)], colour.mix(0.8).filled()))?;
        area.draw(&Text::new(text, (x + 30, middle), style.clone()))?;
    }
    Ok(())
}

fn sequences(
    area: &Area<'_>,
    sides: &[(&str, &Vec<TimelineStep>, RGBColor)],
    time: Axis,
    seqs: Axis,
) -> DrawResult<()> {
    let mut builder = ChartBuilder::on(area);
    let mut chart =
        builder.margin(10).x_label_area_size(42).y_label_area_size(64).build_cartesian_2d(time, seqs)?;
    mesh(&mut chart, ("time (ms)", "sequences"), (12, 5), &|seqs| format_tick(*seqs))?;
    for (_, steps, colour) in sides {
        chart.draw_series(LineSeries::new(running(steps), colour.stroke_width(2)))?;
    }
    Ok(())
}

/// Sequences of each step from its start to the next step's; a gap between steps keeps the last one's.
fn running(steps: &[TimelineStep]) -> Vec<(f64, f64)> {
    let mut points: Vec<(f64, f64)> = Vec::new();
    // Steps of as many sequences are one line: fewer points, a smaller file.
    for alike in steps.chunk_by(|a, b| a.num_seqs == b.num_seqs) {
        let (Some(first), Some(last)) = (alike.first(), alike.last()) else { continue };
        let (from, seqs) = (first.span_ms().0, f64::from(first.num_seqs));
        if let Some(&(_, before)) = points.last() {
            points.push((from, before));
        }
        points.extend([(from, seqs), (last.span_ms().1, seqs)]);
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(start_ns: u64, prefill_tokens: u32, decode_tokens: u32) -> TimelineStep {
        let num_seqs = decode_tokens + u32::from(prefill_tokens > 0);
        TimelineStep { start_ns, end_ns: start_ns + 4_000_000, prefill_tokens, decode_tokens, num_seqs }
    }

    #[test]
    fn each_step_is_a_bar_of_its_side() {
        let timeline = Timeline {
            start_ns: 0,
            end_ns: 20_000_000,
            is_whole: true,
            real: vec![step(0, 100, 2), step(5_000_000, 0, 3), step(10_000_000, 0, 3)],
            sim: vec![step(0, 100, 2)],
        };
        let figure = figure(&timeline).unwrap();
        // Bars and the key's patches.
        assert_eq!(figure.svg.matches("fill=\"#169682\"").count(), 2 + 1);
        assert_eq!(figure.svg.matches("fill=\"#3B82C4\"").count(), 2 + 1);
        assert!(figure.description.contains("Real: 3 steps, 1 of them with a prefill, 108 tokens"));
        assert!(figure.title.ends_with("0.020 s, the whole run"), "{}", figure.title);
        let without = Timeline { sim: Vec::new(), ..timeline };
        assert!(super::figure(&without).unwrap().description.contains("Simulated steps are not recorded"));
    }

    #[test]
    fn the_running_line_steps_where_the_batch_changes() {
        let points = running(&[step(0, 0, 3), step(4_000_000, 0, 3), step(8_000_000, 0, 2)]);
        assert_eq!(points, [(0.0, 3.0), (8.0, 3.0), (8.0, 3.0), (8.0, 2.0), (12.0, 2.0)]);
    }
}

//! From the real to the simulated value, part by part.

use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use serde::{Deserialize, Serialize};

use super::{DrawResult, Figure, GRID, REAL, SIMULATED};
use crate::report::format::{ms, signed_ms};

/// How a difference comes about: `start` and the parts sum up to `end`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Waterfall {
    /// What is explained: `E2E p50`.
    pub title: String,
    /// Where it begins, and how long that is in ms: the real value.
    pub start: (String, f64),
    /// What changes it, and by how many ms, signed.
    pub parts: Vec<(String, f64)>,
    /// Where it ends, in ms: the simulated value.
    pub end: (String, f64),
}

/// Parts that make the simulation slower than the real run.
const SLOWER: RGBColor = RGBColor(196, 62, 62);

const WIDTH: i32 = 980;
const ROW_HEIGHT: i32 = 30;
const TOP: i32 = 12;
/// Where the bars begin, behind their labels, and where they end, before their numbers.
const LEFT: i32 = 280;
const RIGHT: i32 = 860;

pub(super) fn figure(waterfall: &Waterfall) -> DrawResult<Figure> {
    let Waterfall { title, start, parts, end } = waterfall;
    let told: Vec<_> =
        parts.iter().map(|(label, change)| format!("{label} {}", signed_ms(*change))).collect();
    Ok(Figure {
        key: "waterfall".to_owned(),
        heading: "From real to simulated",
        title: format!("{title}: from {} to {}", start.0, end.0),
        description: format!(
            "{} {} ms; {}; {} {} ms.",
            start.0,
            ms(start.1),
            told.join("; "),
            end.0,
            ms(end.1)
        ),
        note: None,
        is_wide: true,
        svg: draw(start, parts, end)?,
    })
}

/// Draws a waterfall: a bar of the start, each part where the ones before it left off, a bar of the end; all in ms.
///
/// # Errors
/// What the drawing library says.
pub fn waterfall_svg(
    title: &str,
    start: (&str, f64),
    parts: &[(&str, f64)],
    end: (&str, f64),
) -> Result<String, String> {
    let owned = |(label, ms): (&str, f64)| (label.to_owned(), ms);
    let waterfall = Waterfall {
        title: title.to_owned(),
        start: owned(start),
        parts: parts.iter().copied().map(owned).collect(),
        end: owned(end),
    };
    figure(&waterfall).map(|figure| figure.svg).map_err(|error| error.to_string())
}

/// A row: from and to in ms, and what stands beside it.
struct Row<'a> {
    label: &'a str,
    from: f64,
    to: f64,
    value: String,
    colour: RGBColor,
}

fn rows<'a>(start: &'a (String, f64), parts: &'a [(String, f64)], end: &'a (String, f64)) -> Vec<Row<'a>> {
    let total = |(label, at): &'a (String, f64), colour| Row {
        label,
        from: 0.0,
        to: *at,
        value: format!("{} ms", ms(*at)),
        colour,
    };
    let mut rows = vec![total(start, REAL)];
    let mut at = start.1;
    for (label, change) in parts {
        // The sign stands beside the bar; the colour repeats it.
        let colour = if *change < 0.0 { GRID } else { SLOWER };
        rows.push(Row { label, from: at, to: at + change, value: signed_ms(*change), colour });
        at += change;
    }
    rows.push(total(end, SIMULATED));
    rows
}

fn draw(start: &(String, f64), parts: &[(String, f64)], end: &(String, f64)) -> DrawResult<String> {
    let rows = rows(start, parts, end);
    let ends = || rows.iter().flat_map(|row| [row.from, row.to]);
    let (low, high) = (ends().fold(0.0, f64::min), ends().fold(0.0, f64::max));
    let span = (high - low).max(1e-9);
    let x = |value: f64| LEFT + ((value - low) / span * f64::from(RIGHT - LEFT)).round() as i32;
    let num_rows = i32::try_from(rows.len())?;
    let height = 2 * TOP + ROW_HEIGHT * num_rows;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32)).into_drawing_area();
        root.fill(&WHITE)?;
        let text =
            |anchor| TextStyle::from(("sans-serif", 15).into_font()).pos(Pos::new(anchor, VPos::Center));
        root.draw(&PathElement::new([(x(0.0), TOP / 2), (x(0.0), height - TOP / 2)], GRID))?;
        for (row, i) in rows.iter().zip(0..) {
            let middle = TOP + ROW_HEIGHT * i + ROW_HEIGHT / 2;
            let (left, right) = (x(row.from.min(row.to)), x(row.from.max(row.to)));
            root.draw(&Text::new(row.label.to_owned(), (LEFT - 12, middle), text(HPos::Right)))?;
            // A part too small to see is still a line.
            let bar = [(left, middle - 10), (right.max(left + 1), middle + 10)];
            root.draw(&Rectangle::new(bar, row.colour.filled()))?;
            root.draw(&Text::new(row.value.clone(), (right + 8, middle), text(HPos::Left)))?;
            if i + 1 < num_rows {
                let next = [(x(row.to), middle + 10), (x(row.to), middle + ROW_HEIGHT - 10)];
                root.draw(&PathElement::new(next, GRID))?;
            }
        }
        root.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made() -> Waterfall {
        let part = |label: &str, ms: f64| (label.to_owned(), ms);
        Waterfall {
            title: "E2E p50".into(),
            start: part("real", 300.0),
            parts: vec![
                part("operators", -40.0),
                part("host & launch <x>", -100.0),
                part("scheduling", 10.0),
            ],
            end: part("simulated", 170.0),
        }
    }

    #[test]
    fn each_part_begins_where_the_one_before_ended() {
        let waterfall = made();
        let rows = rows(&waterfall.start, &waterfall.parts, &waterfall.end);
        let spans: Vec<_> = rows.iter().map(|row| (row.from, row.to)).collect();
        assert_eq!(spans, [(0.0, 300.0), (300.0, 260.0), (260.0, 160.0), (160.0, 170.0), (0.0, 170.0)]);
    }

    #[test]
    fn a_waterfall_names_every_part_with_its_sign() {
        let svg = waterfall_svg(
            "E2E p50",
            ("real", 300.0),
            &[("operators", -40.0), ("host & launch <x>", -100.0), ("scheduling", 10.0)],
            ("simulated", 170.0),
        )
        .unwrap();
        for text in ["real", "-40.00 ms", "host &amp; launch &lt;x&gt;", "+10.00 ms", "170.0 ms"] {
            assert!(svg.contains(text), "no {text:?} in {svg}");
        }
        // Five bars on a ground.
        assert_eq!(svg.matches("<rect").count(), 6);
        let figure = figure(&made()).unwrap();
        assert!(
            figure.description.starts_with("real 300.0 ms; operators -40.00 ms;"),
            "{}",
            figure.description
        );
        // Values below 0 and no parts at all are drawn too.
        assert!(waterfall_svg("x", ("a", 0.0), &[], ("b", 0.0)).is_ok());
        assert!(waterfall_svg("x", ("a", -1.0), &[("c", -5.0)], ("b", -6.0)).is_ok());
    }
}

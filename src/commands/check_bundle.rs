//! `plumb check --bundle`: a bundle in place of an older one.

use plumbline_bundles::{
    Bundle, SurfaceDiff,
    surface::{OperatorSurface, SurfacePoint},
};
use plumbline_schema::Nanos;
use serde::Serialize;

use crate::{
    data,
    exit::Exit,
    failure::Failure,
    output::{Output, Table, Text},
};

/// Points of a list that the text shows; `--json` holds all.
const MAX_SHOWN: usize = 10;

#[derive(Serialize)]
struct Report<'a> {
    passed: bool,
    #[serde(flatten)]
    diff: &'a SurfaceDiff,
}

/// Asks both bundles for the whole support surface.
///
/// # Errors
/// When a bundle cannot be read.
pub fn run(
    old: &str,
    new: &str,
    tolerance_pct: f64,
    is_strict: bool,
    output: Output,
) -> Result<Exit, Failure> {
    let open = |name: &str| -> Result<Bundle, Failure> { Ok(Bundle::open(&data::bundle(name)?)?) };
    let diff = SurfaceDiff::between(&open(old)?, &open(new)?, tolerance_pct)?;
    let passed = diff.has_judged() && diff.lost.is_empty() && (!is_strict || diff.moved.is_empty());
    output.print(&Report { passed, diff: &diff }, || text(&diff, is_strict))?;
    Ok(if passed { Exit::Fine } else { Exit::OutsideTolerance })
}

fn text(diff: &SurfaceDiff, is_strict: bool) -> String {
    let mut text = Text::default();
    if diff.old_gpu != diff.new_gpu {
        text.line(format_args!("the old bundle is of {}, the new one of {}", diff.old_gpu, diff.new_gpu));
    }
    text.line(operators_table(diff));
    points(&mut text, "no longer OK", &diff.lost, lost_line);
    let moved = format!("moved by more than {} %", diff.tolerance_pct);
    points(&mut text, &moved, &diff.moved, moved_line);
    text.line(headline(diff, is_strict));
    text.finish()
}

fn headline(diff: &SurfaceDiff, is_strict: bool) -> String {
    let (num, lost, moved) = (diff.num_points(), diff.lost.len(), diff.moved.len());
    if !diff.has_judged() {
        "failed: nothing was judged; the old bundle answers no launch".into()
    } else if lost > 0 {
        format!("failed: {lost} of {num} launches are no longer OK; measure and train what is missing")
    } else if is_strict && moved > 0 {
        format!("failed: {moved} of {num} launches moved")
    } else {
        format!("passed: all of {num} launches that were OK still are; {moved} moved")
    }
}

fn operators_table(diff: &SurfaceDiff) -> Table {
    let mut table = Table::new(&[
        "operator",
        ">launches",
        ">OK before",
        ">OK now",
        ">lost",
        ">gained",
        ">moved",
        ">largest change",
    ]);
    for (operator, counts) in &diff.operators {
        let OperatorSurface { num_points, num_old_ok, num_new_ok, num_lost, num_gained, num_moved, .. } =
            counts;
        let numbers = [num_points, num_old_ok, num_new_ok, num_lost, num_gained, num_moved];
        let change = counts.worst_change_pct.map_or_else(|| "-".to_owned(), |pct| format!("{pct:+.1} %"));
        let row = [operator.to_string()].into_iter().chain(numbers.map(ToString::to_string)).chain([change]);
        table.row(row);
    }
    table
}

fn points(text: &mut Text, title: &str, points: &[SurfacePoint], line: impl Fn(&SurfacePoint) -> String) {
    if points.is_empty() {
        return;
    }
    text.line(format_args!("{title}:"));
    for point in points.iter().take(MAX_SHOWN) {
        text.line(format_args!("  {} {}: {}", point.operator, point.shape, line(point)));
    }
    if points.len() > MAX_SHOWN {
        text.line(format_args!("  and {} more; --json lists all", points.len() - MAX_SHOWN));
    }
}

fn lost_line(point: &SurfacePoint) -> String {
    let reason = point.reason.as_deref().unwrap_or_default();
    format!("{} -> {}: {reason}", point.old.name(), point.new.name())
}

fn moved_line(point: &SurfacePoint) -> String {
    let time = |ns: Option<f64>| ns.map_or_else(|| "n/a".to_owned(), |ns| Nanos::from_f64(ns).to_string());
    let change = point.change_pct.unwrap_or_default();
    format!("{} -> {} ({change:+.1} %)", time(point.old_ns), time(point.new_ns))
}

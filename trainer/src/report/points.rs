//! What of the held-out shapes is drawn.

use plumbline_bundles::features::shape_values;

use crate::train::HeldOutPoint;

/// More points than this are not told apart in a figure and make its file large.
pub(super) const MAX_DRAWN: usize = 2_000;

/// Of more points than [`MAX_DRAWN`] so many with the largest errors are always drawn.
const ALWAYS_DRAWN: usize = 200;

/// Signed error of the prediction, in % of the measured time.
pub(super) fn error_pct(point: &HeldOutPoint) -> f64 {
    100.0 * (point.predicted_ns / point.measured_ns - 1.0)
}

/// Whether the measured time lies in the interval.
pub(super) fn is_inside(point: &HeldOutPoint) -> bool {
    (point.low_ns..=point.high_ns).contains(&point.measured_ns)
}

/// Errors, in %, that a prediction may have whose measured time lies in the interval: from and to.
///
/// The error is of the measured time, so the interval's upper end gives the lower error.
pub(super) fn band_pct(point: &HeldOutPoint) -> (f64, f64) {
    let error = |measured_ns: f64| 100.0 * (point.predicted_ns / measured_ns - 1.0);
    (error(point.high_ns), error(point.low_ns))
}

/// The shape as `column = value`, joined by commas.
pub(super) fn describe(point: &HeldOutPoint) -> String {
    let Some(values) = shape_values(point.operator, &point.shape) else {
        // A shape of another operator, which training refuses.
        return format!("{:?}", point.shape);
    };
    let named = point.operator.shape_columns().iter().zip(values.as_slice());
    named.map(|(name, value)| format!("{name} = {value}")).collect::<Vec<_>>().join(", ")
}

/// At most [`MAX_DRAWN`] of the points: those with the largest errors, and of the others every so-many-th by measured
/// time.
pub(super) fn thinned<'a>(points: &[&'a HeldOutPoint]) -> Vec<&'a HeldOutPoint> {
    if points.len() <= MAX_DRAWN {
        return points.to_vec();
    }
    let mut by_error = points.to_vec();
    by_error.sort_by(|a, b| error_pct(b).abs().total_cmp(&error_pct(a).abs()));
    let mut others = by_error.split_off(ALWAYS_DRAWN);
    others.sort_by(|a, b| a.measured_ns.total_cmp(&b.measured_ns));
    let wanted = MAX_DRAWN - ALWAYS_DRAWN;
    let mut drawn: Vec<_> = (0..wanted).map(|i| others[i * others.len() / wanted]).collect();
    // The far ones last, on top.
    drawn.append(&mut by_error);
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::testing::points;

    #[test]
    fn an_error_inside_the_interval_lies_in_the_band() {
        for point in points(50) {
            let (from, to) = band_pct(&point);
            assert_eq!(is_inside(&point), (from..=to).contains(&error_pct(&point)), "{point:?}");
        }
    }

    #[test]
    fn thinning_keeps_the_ends_and_the_largest_errors() {
        let many = points(9_000);
        let all: Vec<&HeldOutPoint> = many.iter().collect();
        let drawn = thinned(&all);
        assert_eq!(drawn.len(), MAX_DRAWN);
        let worst = |points: &[&HeldOutPoint]| points.iter().map(|p| error_pct(p).abs()).fold(0.0, f64::max);
        assert!((worst(&drawn) - worst(&all)).abs() < 1e-12);
        let shapes: std::collections::HashSet<String> = drawn.iter().map(|p| describe(p)).collect();
        assert_eq!(shapes.len(), MAX_DRAWN, "no point twice");
        assert_eq!(thinned(&all[..MAX_DRAWN]).len(), MAX_DRAWN);
    }
}

//! Axes of figures: times, rates, costs and shares.

use std::{fmt::Display, ops::Range};

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};

/// From this ratio of largest to smallest value on, the axis is logarithmic.
const LOG_FROM_RATIO: f64 = 10.0;

/// An axis of numbers of at least 0, linear or logarithmic.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::report) struct Axis {
    pub(in crate::report) low: f64,
    pub(in crate::report) high: f64,
    pub(in crate::report) is_log: bool,
}

impl Axis {
    /// The axis that holds all of the ascending, non-empty `series`.
    pub(in crate::report) fn spanning<'a>(series: impl Iterator<Item = &'a [f64]> + Clone) -> Self {
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

impl Ranged for Axis {
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

pub(in crate::report) fn format_tick(ms: f64) -> String {
    // Ticks are 1, 2 or 5 times a power of ten or multiples of such: few digits, never rounding noise.
    let rounded = (ms * 1e6).round() / 1e6;
    trimmed(&rounded)
}

fn trimmed(value: &impl Display) -> String {
    value.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_axis_turns_logarithmic_where_values_span_more_than_10_times() {
        let axis = |values: &[f64]| Axis::spanning([values].into_iter());
        assert!(!axis(&[1.0, 10.0]).is_log);
        assert!(axis(&[1.0, 10.1]).is_log);
        assert!(!axis(&[0.0, 10.1]).is_log);
        assert_eq!(axis(&[3.0, 300.0]).log_ticks(8), [5.0, 10.0, 20.0, 50.0, 100.0, 200.0]);
        assert_eq!(
            Axis { low: 0.0, high: 21.0, is_log: false }.linear_ticks(8),
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

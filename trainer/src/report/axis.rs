//! The axes of the figures: times on a logarithmic scale, signed errors on a linear one.

use std::ops::Range;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};

/// Ends that an axis of errors may have, in %: few, so that figures of one page compare.
const ERROR_ENDS_PCT: [f64; 11] = [5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 75.0, 100.0, 200.0, 500.0, 1000.0];

/// Share of the points that an axis of errors holds at least; those beyond are drawn at its edge, as a single far one
/// would press all others into a line.
const SHARE_ON_AXIS: f64 = 0.98;

/// A logarithmic axis of times in ns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct TimeAxis {
    low_ns: f64,
    high_ns: f64,
}

impl TimeAxis {
    /// The axis that holds all `times_ns`, each above 0, with a little room at both ends.
    pub(super) fn spanning(times_ns: impl Iterator<Item = f64> + Clone) -> Self {
        let low = times_ns.clone().fold(f64::INFINITY, f64::min);
        let high = times_ns.fold(0.0, f64::max);
        if !(low > 0.0 && low <= high && high.is_finite()) {
            return Self { low_ns: 1.0, high_ns: 10.0 };
        }
        // Values all alike still need an axis with a length.
        let room = (high / low).powf(0.04).max(1.1);
        Self { low_ns: low / room, high_ns: high * room }
    }

    pub(super) fn low_ns(self) -> f64 {
        self.low_ns
    }

    pub(super) fn high_ns(self) -> f64 {
        self.high_ns
    }

    fn ticks(self, max_points: usize) -> Vec<f64> {
        let decades = self.low_ns.log10().floor() as i32..=self.high_ns.log10().ceil() as i32;
        let of = |multiples: &[f64]| -> Vec<f64> {
            let all = decades.clone().flat_map(|d| multiples.iter().map(move |m| m * 10f64.powi(d)));
            all.filter(|tick| (self.low_ns..=self.high_ns).contains(tick)).collect()
        };
        let choices = [of(&[1.0, 2.0, 5.0]), of(&[1.0, 3.0]), of(&[1.0])];
        let fitting = choices.iter().find(|ticks| ticks.len() <= max_points);
        fitting.unwrap_or(&choices[2]).clone()
    }
}

impl Ranged for TimeAxis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let share = (value.max(self.low_ns) / self.low_ns).ln() / (self.high_ns / self.low_ns).ln();
        from + (share * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // Light lines ask for many more; the labelled ones are enough.
        self.ticks(hint.bold_points().clamp(4, 9))
    }

    fn range(&self) -> Range<f64> {
        self.low_ns..self.high_ns
    }
}

/// A tick of a time axis with its unit: `20 µs`.
pub(super) fn format_time(ns: f64) -> String {
    let (value, unit) = match ns {
        ns if ns < 0.999e3 => (ns, "ns"),
        ns if ns < 0.999e6 => (ns / 1e3, "µs"),
        ns if ns < 0.999e9 => (ns / 1e6, "ms"),
        ns => (ns / 1e9, "s"),
    };
    // Powers of ten are not exact; ticks have one digit or two.
    format!("{} {unit}", (value * 1e3).round() / 1e3)
}

/// The ends of the axis that holds nearly all of `errors_pct`, signed errors in %.
///
/// No prediction is more than 100 % too short.
pub(super) fn error_range(errors_pct: impl Iterator<Item = f64>) -> Range<f64> {
    let mut sizes: Vec<f64> = errors_pct.map(f64::abs).collect();
    sizes.sort_by(f64::total_cmp);
    let last_on_axis = (SHARE_ON_AXIS * sizes.len() as f64).ceil() as usize;
    let wanted = sizes.get(last_on_axis.saturating_sub(1)).copied().unwrap_or(0.0);
    let end = ERROR_ENDS_PCT.into_iter().find(|end| *end >= wanted).unwrap_or(ERROR_ENDS_PCT[10]);
    -end.min(100.0)..end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_of_times_holds_all_and_has_few_ticks() {
        let axis = TimeAxis::spanning([2.4e3, 9.1e6, 30e3].into_iter());
        assert!(axis.low_ns < 2.4e3 && axis.high_ns > 9.1e6);
        assert_eq!(axis.map(&axis.low_ns, (0, 100)), 0);
        assert_eq!(axis.map(&axis.high_ns, (0, 100)), 100);
        assert_eq!(axis.ticks(9).len(), 8);
        assert_eq!(axis.ticks(5), [1e4, 1e5, 1e6, 1e7]);
        let flat = TimeAxis::spanning([5e3, 5e3].into_iter());
        assert!(flat.low_ns < 5e3 && flat.high_ns > 5e3);
        assert_eq!(TimeAxis::spanning(std::iter::empty()), TimeAxis { low_ns: 1.0, high_ns: 10.0 });
    }

    #[test]
    fn ticks_carry_their_unit() {
        let texts = [500.0, 1e3, 2e4, 0.999_999_9e6, 3e7, 1e9].map(format_time);
        assert_eq!(texts, ["500 ns", "1 µs", "20 µs", "1 ms", "30 ms", "1 s"]);
    }

    #[test]
    fn an_axis_of_errors_leaves_the_farthest_out_and_ends_at_a_round_number() {
        let mut errors: Vec<f64> = (0..100).map(|i| f64::from(i % 13) - 6.0).collect();
        assert_eq!(error_range(errors.iter().copied()), -10.0..10.0);
        errors[7] = 800.0;
        assert_eq!(error_range(errors.iter().copied()), -10.0..10.0);
        errors[10..20].fill(150.0);
        assert_eq!(error_range(errors.iter().copied()), -100.0..200.0);
        assert_eq!(error_range(std::iter::empty()), -5.0..5.0);
    }
}

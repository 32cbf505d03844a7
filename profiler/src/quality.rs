//! Whether a measurement can be believed: the clocks it ran at, and the shape of its times.

use plumbline_bundles::GpuState;

use crate::device::Measurement;

/// SM clocks before and after may differ by this share: one step of 15 MHz and a little more.
const MAX_CLOCK_SHIFT: f64 = 0.012;
/// Two groups of times count as two modes when their means differ by this share of the median,
const MIN_MODE_DISTANCE: f64 = 0.02;
/// lie so many times further apart than they are wide (2 is a clean separation to Ashman, Bird and Zepf 1994; but the
/// cut is put where it looks best, and ten normal times seem separated by 4 in a fifth of cases, by 8 in 0.2 %),
const MIN_MODE_SEPARATION: f64 = 8.0;
/// and each hold this share of the times.
const MIN_MODE_SHARE: f64 = 0.2;
/// Fewer times than these cannot tell.
const MIN_TIMES: usize = 8;

/// Why a measurement is doubtful.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// Clocks were held down right before or right after it.
    Throttled,
    /// The SM clock moved while it was taken.
    ClockShifted,
    /// Its times fall into two groups.
    Bimodal,
}

impl Doubt {
    /// The flag of a sample that keeps the doubt.
    #[must_use]
    pub const fn flag(self) -> &'static str {
        match self {
            Self::Throttled => "throttled",
            Self::ClockShifted => "clock_shifted",
            Self::Bimodal => "bimodal",
        }
    }
}

/// Whether clocks are held down: there is a reason for it, and the SM clock is below the highest that the GPU has, or
/// not known. The reasons alone outlast their effect.
#[must_use]
pub fn is_held_down(state: &GpuState, max_clock_mhz: u32) -> bool {
    let is_low = |mhz: u32| f64::from(mhz) < f64::from(max_clock_mhz) * (1.0 - MAX_CLOCK_SHIFT);
    !state.throttle_reasons.is_empty() && state.sm_clock_mhz.is_none_or(is_low)
}

/// All doubts about a measurement on a GPU whose SM clock goes up to `max_clock_mhz`.
#[must_use]
pub fn doubts(measurement: &Measurement, max_clock_mhz: u32) -> Vec<Doubt> {
    let (before, after) = (&measurement.before, &measurement.after);
    let is_throttled = is_held_down(before, max_clock_mhz) || is_held_down(after, max_clock_mhz);
    [
        (Doubt::Throttled, is_throttled),
        (Doubt::ClockShifted, clock_shift(before, after) > MAX_CLOCK_SHIFT),
        (Doubt::Bimodal, is_bimodal(&measurement.times_ns)),
    ]
    .into_iter()
    .filter_map(|(doubt, is_there)| is_there.then_some(doubt))
    .collect()
}

/// How far the SM clock moved, as a share of the higher one; 0 when it is not known.
fn clock_shift(before: &GpuState, after: &GpuState) -> f64 {
    let (Some(before), Some(after)) = (before.sm_clock_mhz, after.sm_clock_mhz) else { return 0.0 };
    f64::from(before.abs_diff(after)) / f64::from(before.max(after).max(1))
}

/// Whether times fall into two groups, cut where neighbours in order are furthest apart.
#[must_use]
pub fn is_bimodal(times_ns: &[f64]) -> bool {
    let mut sorted = times_ns.to_vec();
    sorted.sort_by(f64::total_cmp);
    let gap = |i: usize| sorted[i] - sorted[i - 1];
    let Some(cut) = (1..sorted.len()).max_by(|&a, &b| gap(a).total_cmp(&gap(b))) else { return false };
    let (low, high) = sorted.split_at(cut);
    if sorted.len() < MIN_TIMES {
        return false;
    }
    let least = MIN_MODE_SHARE * sorted.len() as f64;
    if (low.len().min(high.len()) as f64) < least.max(2.0) {
        return false;
    }
    let ((low_mean, low_std), (high_mean, high_std)) = (mean_and_std(low), mean_and_std(high));
    let distance = high_mean - low_mean;
    distance > MIN_MODE_DISTANCE * sorted[sorted.len() / 2]
        && distance > MIN_MODE_SEPARATION * f64::midpoint(low_std.powi(2), high_std.powi(2)).sqrt()
}

fn mean_and_std(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
    (mean, (squares / (n - 1.0).max(1.0)).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_groups_are_two_modes_and_a_tail_is_not() {
        let near = |center: f64, count: usize| -> Vec<f64> {
            (0..count).map(|i| center * (1.0 + 0.002 * (i as f64 / count as f64 - 0.5))).collect()
        };
        let two = [near(100.0, 6), near(110.0, 4)].concat();
        assert!(is_bimodal(&two));
        assert!(!is_bimodal(&near(100.0, 10)));
        // One or two stragglers of twenty are outliers, not a mode.
        assert!(!is_bimodal(&[near(100.0, 19), near(150.0, 1)].concat()));
        // Groups closer than anyone cares about.
        assert!(!is_bimodal(&[near(100.0, 6), near(101.0, 6)].concat()));
        // An even spread has a widest gap too.
        assert!(!is_bimodal(&(0..20).map(|i| 100.0 + f64::from(i)).collect::<Vec<_>>()));
        assert!(!is_bimodal(&[]) && !is_bimodal(&[1.0]));
    }

    #[test]
    fn a_reason_without_its_effect_holds_nothing_down() {
        let state = |mhz, reasons: &[&str]| GpuState {
            sm_clock_mhz: mhz,
            throttle_reasons: reasons.iter().map(|&reason| reason.to_owned()).collect(),
            ..GpuState::default()
        };
        assert!(is_held_down(&state(Some(1700), &["sw_power_cap"]), 1980));
        assert!(is_held_down(&state(None, &["sw_power_cap"]), 1980));
        assert!(!is_held_down(&state(Some(1965), &["sw_power_cap"]), 1980));
        assert!(!is_held_down(&state(Some(1200), &[]), 1980), "clocks that someone has set");
    }

    #[test]
    fn a_clock_step_is_no_shift_but_a_dip_is() {
        let at = |mhz| GpuState { sm_clock_mhz: Some(mhz), ..GpuState::default() };
        assert!(clock_shift(&at(1980), &at(1965)) <= MAX_CLOCK_SHIFT);
        assert!(clock_shift(&at(1980), &at(1935)) > MAX_CLOCK_SHIFT);
        assert!(clock_shift(&at(1980), &GpuState::default()) <= 0.0);
    }
}

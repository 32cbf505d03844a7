//! Where between two values a split lies.

/// Powers of ten up to the highest that a difference of two f32 holds.
const LOWEST: i32 = -46;
const HIGHEST: i32 = 39;
const NUM_TENS: usize = (HIGHEST - LOWEST) as usize + 1;

/// Finds thresholds; it knows the powers of ten.
pub(super) struct Thresholds {
    /// From `10^LOWEST` on.
    tens: [f64; NUM_TENS],
}

impl Thresholds {
    pub(super) fn new() -> Self {
        let mut tens = [0.0; NUM_TENS];
        tens.iter_mut().zip(LOWEST..).for_each(|(ten, exponent)| *ten = 10f64.powi(exponent));
        Self { tens }
    }

    /// A number from `below` on and before `above`: near the middle, and of few decimal digits, as files hold
    /// thousands.
    pub(super) fn between(&self, below: f32, above: f32) -> f32 {
        #[expect(clippy::needless_bitwise_bool, reason = "branches here could not be foretold")]
        let is_inside = |x: f32| (x >= below) & (x < above);
        // A choice between whole numbers takes no branch either.
        let either = |is_first: bool, first: f32, other: f32| {
            f32::from_bits(if is_first { first.to_bits() } else { other.to_bits() })
        };
        // Halved before they are added, so that it cannot overflow; rounding must not move it up to `above`.
        let middle = below / 2.0 + above / 2.0;
        let digit = self.power_within(f64::from(above) - f64::from(below));
        let short = (round(f64::from(middle) / digit) * digit) as f32;
        either(is_inside(short), short, either(is_inside(middle), middle, below))
    }

    /// The highest power of ten that is not above a positive difference of two f32.
    ///
    /// A logarithm and a power for every split would be a tenth of the time that a forest takes.
    fn power_within(&self, difference: f64) -> f64 {
        let exponent = (difference.to_bits() >> 52) as i32 - 1023;
        // 1233 / 4096 is log10(2) near enough: too low by at most one power, and never too high.
        let place = ((exponent * 1233) >> 12).clamp(LOWEST, HIGHEST - 1) - LOWEST;
        let place = place as usize;
        self.tens[place + usize::from(difference >= self.tens[place + 1])]
    }
}

/// As [`f64::round`], for numbers within i64: two conversions instead of a call.
fn round(x: f64) -> f64 {
    // The largest number below 0.5: with 0.5 itself, what is just below a half would be rounded up.
    ((x + 0.499_999_999_999_999_94_f64.copysign(x)) as i64 as f64).copysign(x)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The same by the library's logarithm, power and rounding.
    fn slowly(below: f32, above: f32) -> f32 {
        let middle = below / 2.0 + above / 2.0;
        let digit = 10f64.powi((f64::from(above) - f64::from(below)).log10().floor() as i32);
        let short = ((f64::from(middle) / digit).round() * digit) as f32;
        let is_inside = |x: &f32| *x >= below && *x < above;
        [short, middle].into_iter().find(is_inside).unwrap_or(below)
    }

    #[test]
    fn thresholds_lie_between_and_are_short() {
        for (below, above, expected) in [
            (0.0, 1.0, 0.5f32),
            (128.0, 256.0, 192.0),
            (1.234_567, 1.345_678, 1.3),
            (-3.3, 7.9, 2.0),
            (2.0, f32::from_bits(2.0f32.to_bits() + 1), 2.0),
            (f32::MIN, f32::MAX, 0.0),
        ] {
            let found = Thresholds::new().between(below, above);
            assert!(found >= below && found < above, "{below} {found} {above}");
            assert!((found - expected).abs() <= (above / 2.0 - below / 2.0), "{below} {found} {above}");
            assert!(found.to_string().len() <= 5, "{found}");
        }
    }

    #[test]
    fn every_power_of_two_has_its_power_of_ten() {
        for exponent in -149..128 {
            let difference = 2f64.powi(exponent);
            let power = 10f64.powi(difference.log10().floor() as i32);
            assert_eq!(Thresholds::new().power_within(difference).to_bits(), power.to_bits(), "2^{exponent}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn a_threshold_is_near_the_middle_and_parts_the_values(
            (a, b) in prop_oneof![
                (any::<f32>(), any::<f32>()),
                (-100i16..100, -100i16..100).prop_map(|(a, b)| (f32::from(a), f32::from(b))),
                (-1.0f32..1.0, -1.0f32..1.0),
                (any::<f32>(), 1u32..9).prop_map(|(a, up)| (a, f32::from_bits(a.to_bits().saturating_add(up)))),
            ],
        ) {
            let (a, b) = (a.min(b), a.max(b));
            if a >= b || !b.is_finite() || !a.is_finite() {
                return Ok(());
            }
            let found = Thresholds::new().between(a, b);
            prop_assert!(found >= a && found < b, "{a} {found} {b}");
            let (middle, width) = (f64::midpoint(f64::from(a), f64::from(b)), f64::from(b) - f64::from(a));
            prop_assert!((f64::from(found) - middle).abs() <= 0.5 * width, "{a} {found} {b}");
            prop_assert_eq!(found.to_bits(), slowly(a, b).to_bits(), "{} {}", a, b);
        }
    }
}

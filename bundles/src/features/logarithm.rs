//! Logarithms of all features of a launch together, in half of the time that the system's take one by one.
//!
//! A feature has 24 bits of its logarithm. A series tells many more than those; where they lie too near to the middle of
//! two features, the system's logarithm decides. So every feature has the bits that the system's would give it.

use std::f64::consts::{LN_2, SQRT_2};

use super::Scale;

/// Numbers whose logarithm is computed here: not below [`LEAST`] or above this.
const MOST: f64 = 1e300;
/// The logarithm of anything below is taken to be that of this.
const LEAST: f64 = 1e-30;
/// Least number to which 1 can be added without losing bits that count.
const LEAST_BESIDE_1: f64 = 1.0 / 1024.0;

/// Bits of an `f64` that an `f32` has not, the middle between two of these, and how near to it a series cannot tell:
/// 2^-39 of the logarithm, where it errs by 2^-42 at most.
const LOST: u64 = (1 << 29) - 1;
const MIDDLE: u64 = 1 << 28;
const NEAR: u64 = 1 << 13;

/// What features tell of their numbers, each in its way.
///
/// One step after another for all of them, so that the processor takes several at once.
#[inline]
pub(super) fn all<const N: usize>(scales: &[Scale; N], arguments: &[f64; N]) -> [f32; N] {
    let mut values: [f64; N] = std::array::from_fn(|i| shifted(scales[i], arguments[i]));
    each_series(&mut values);
    std::array::from_fn(|i| scaled(scales[i], arguments[i], values[i]))
}

/// Never inlined: it is to stay a loop of vectors, whatever becomes of the numbers around it.
#[inline(never)]
fn each_series(numbers: &mut [f64]) {
    for x in numbers {
        *x = series(*x);
    }
}

/// The number whose logarithm is asked for.
#[inline]
fn shifted(scale: Scale, argument: f64) -> f64 {
    match scale {
        Scale::Ln => argument.max(LEAST),
        Scale::Ln1p => 1.0 + argument,
        Scale::Plain => 1.0,
    }
}

/// A feature by what [`series`] says of its number.
#[inline]
fn scaled(scale: Scale, argument: f64, value: f64) -> f32 {
    let is_in_range = match scale {
        Scale::Ln => argument <= MOST,
        Scale::Ln1p => (LEAST_BESIDE_1..=MOST).contains(&argument) || argument == 0.0,
        Scale::Plain => return argument as f32,
    };
    let is_told = (value.to_bits() & LOST).abs_diff(MIDDLE) > NEAR;
    if is_in_range && is_told { value as f32 } else { exact(scale, argument) }
}

/// Never inlined: the system's logarithm would be computed in any case, to save a branch.
#[cold]
#[inline(never)]
fn exact(scale: Scale, argument: f64) -> f32 {
    scale.of(argument)
}

/// `ln(x) = k ln 2 + 2 artanh((m - 1) / (m + 1))` where `x = 2^k m`, `m` within a factor of the root of 2 of 1; of a
/// number between [`LEAST`] and [`MOST`].
#[inline]
fn series(x: f64) -> f64 {
    /// A number whose last bits are those of any whole number below 2^52 that is added to it.
    const WHOLE: f64 = (1u64 << 52) as f64;
    // Mantissas from the root of 2 on count as halves of the next power.
    let offset = 1f64.to_bits() - (SQRT_2 / 2.0).to_bits();
    let exponent = x.to_bits().wrapping_add(offset) >> 52;
    let k = f64::from_bits(WHOLE.to_bits() | exponent) - (WHOLE + 1023.0);
    let m = f64::from_bits(x.to_bits().wrapping_sub((exponent << 52).wrapping_sub(1f64.to_bits())));
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    // 1, 1/3, 1/5 and so on; |s| is below 0.172, so the first one left out is below 2^-44 of the sum.
    let odd = [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0];
    let sum = odd.iter().rev().fold(0.0, |sum, odd| sum * square + 1.0 / odd);
    k * LN_2 + 2.0 * s * sum
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn number() -> impl Strategy<Value = f64> {
        prop_oneof![
            (0..1u64 << 40).prop_map(|n| n as f64),
            0.0..2.0,
            (-1e-6..1e-6).prop_map(|x| 1.0 + x),
            (-110.0..700.0f64).prop_map(f64::exp),
            (-80.0..80.0f32).prop_map(|feature| f64::from(feature).exp()),
            any::<f64>(),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn features_have_the_bits_of_the_system_s_logarithms(x in number()) {
            let scales = [Scale::Ln, Scale::Ln1p, Scale::Plain];
            // No count is below 0, and -0 is as good as 0.
            let x = if x > 0.0 { x } else { 0.0 };
            for (found, scale) in all(&scales, &[x; 3]).into_iter().zip(scales) {
                prop_assert_eq!(found.to_bits(), scale.of(x).to_bits(), "{:?} {}", scale, x);
            }
        }

        /// Far less than the distance at which the system's logarithm is asked.
        #[test]
        fn the_series_errs_by_little(x in number()) {
            prop_assume!((LEAST..=MOST).contains(&x));
            let (found, expected) = (series(x), x.ln());
            prop_assert!((found - expected).abs() <= expected.abs() * 2f64.powi(-43), "{}: {} {}", x, found, expected);
        }
    }

    #[test]
    fn few_logarithms_are_left_to_the_system() {
        let is_left = |value: f64| (value.to_bits() & LOST).abs_diff(MIDDLE) <= NEAR;
        let num_left = (1..100_000).filter(|&n| is_left(series(f64::from(n)))).count();
        assert!(num_left < 20, "{num_left}");
        // One that lies in the middle of two features is.
        let middle = f64::midpoint(7.5, f64::from(7.5f32.next_up())).exp();
        assert!(is_left(series(middle)));
        let found = all(&[Scale::Ln; 2], &[middle, f64::INFINITY]).map(f32::to_bits);
        assert_eq!(found, [(middle.ln() as f32).to_bits(), f32::INFINITY.to_bits()]);
    }
}

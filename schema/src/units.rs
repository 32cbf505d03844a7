//! Units as types: what can be confused is a newtype, and converted once, where it enters.

use std::{
    fmt,
    iter::Sum,
    ops::{Add, AddAssign, Sub},
};

use serde::{Deserialize, Serialize};

/// A point in or a span of simulated or measured time, in whole nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nanos(pub u64);

impl Nanos {
    /// The start of every run.
    pub const ZERO: Self = Self(0);

    /// Rounds a float number of nanoseconds, halves up; negative and NaN become zero, infinity the maximum.
    #[must_use]
    #[inline]
    pub fn from_f64(ns: f64) -> Self {
        // `as` saturates and maps NaN to 0. The part after the point is exact below 2^53; there is none above.
        let whole = ns as u64;
        Self(whole.saturating_add(u64::from(ns - whole as f64 >= 0.5)))
    }

    /// The same span in milliseconds, for people.
    #[must_use]
    pub fn as_ms(self) -> f64 {
        self.0 as f64 / 1e6
    }

    /// The span from `earlier` to `self`, zero when `earlier` is later.
    #[must_use]
    pub fn saturating_since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

impl Add for Nanos {
    type Output = Self;
    /// Saturates: 2^64 ns is 584 years, which only a hostile file holds.
    fn add(self, rhs: Self) -> Self {
        Self(self.0.saturating_add(rhs.0))
    }
}

impl AddAssign for Nanos {
    fn add_assign(&mut self, rhs: Self) {
        *self = *self + rhs;
    }
}

impl Sub for Nanos {
    type Output = Self;
    fn sub(self, rhs: Self) -> Self {
        Self(self.0 - rhs.0)
    }
}

impl Sum for Nanos {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, Add::add)
    }
}

impl fmt::Display for Nanos {
    /// Picks the unit a person would: ns, us, ms or s, with three decimals at most.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ns = self.0 as f64;
        match self.0 {
            0..1_000 => write!(f, "{} ns", self.0),
            1_000..1_000_000 => write!(f, "{:.2} us", ns / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.3} ms", ns / 1e6),
            _ => write!(f, "{:.3} s", ns / 1e9),
        }
    }
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Add for Bytes {
    type Output = Self;
    fn add(self, rhs: Self) -> Self {
        Self(self.0 + rhs.0)
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self(0), Add::add)
    }
}

/// A count of floating-point operations; a multiply-add counts as two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Flops(pub u64);

impl Add for Flops {
    type Output = Self;
    fn add(self, rhs: Self) -> Self {
        Self(self.0 + rhs.0)
    }
}

impl Sum for Flops {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self(0), Add::add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nanos_from_float_never_wraps() {
        assert_eq!(Nanos::from_f64(1.5), Nanos(2));
        assert_eq!(Nanos::from_f64(-3.0), Nanos(0));
        assert_eq!(Nanos::from_f64(f64::NAN), Nanos(0));
        assert_eq!(Nanos::from_f64(f64::INFINITY), Nanos(u64::MAX));
    }

    #[test]
    fn nanos_display_picks_a_readable_unit() {
        assert_eq!(Nanos(17).to_string(), "17 ns");
        assert_eq!(Nanos(5_810).to_string(), "5.81 us");
        assert_eq!(Nanos(2_360_000).to_string(), "2.360 ms");
        assert_eq!(Nanos(2_000_000_000).to_string(), "2.000 s");
    }
}

//! Raw statistics of repeated measurements.

use serde::{Deserialize, Serialize};

use crate::error::CheckError;

/// Statistics of `n` repeated times; percentiles by linear interpolation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimeStats {
    /// Number of measurements.
    pub n: u32,
    /// Shortest, ns.
    pub min_ns: f64,
    /// Median, ns.
    pub p50_ns: f64,
    /// Mean, ns.
    pub mean_ns: f64,
    /// 95th percentile, ns.
    pub p95_ns: f64,
    /// Longest, ns.
    pub max_ns: f64,
    /// Sample standard deviation, ns; 0 for one measurement.
    pub std_ns: f64,
}

impl TimeStats {
    /// Summarises times in ns; `None` when there are none or one is not finite.
    #[must_use]
    pub fn from_times(times_ns: &[f64]) -> Option<Self> {
        if times_ns.is_empty() || times_ns.iter().any(|t| !t.is_finite()) {
            return None;
        }
        let mut sorted = times_ns.to_vec();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let mean = sorted.iter().sum::<f64>() / n as f64;
        let squares = sorted.iter().map(|t| (t - mean).powi(2)).sum::<f64>();
        Some(Self {
            n: n as u32,
            min_ns: sorted[0],
            p50_ns: percentile_of_sorted(&sorted, 0.50),
            mean_ns: mean,
            p95_ns: percentile_of_sorted(&sorted, 0.95),
            max_ns: sorted[n - 1],
            std_ns: if n > 1 { (squares / (n - 1) as f64).sqrt() } else { 0.0 },
        })
    }

    /// The statistics of times `factor` as long.
    #[must_use]
    pub fn scaled(self, factor: f64) -> Self {
        Self {
            n: self.n,
            min_ns: self.min_ns * factor,
            p50_ns: self.p50_ns * factor,
            mean_ns: self.mean_ns * factor,
            p95_ns: self.p95_ns * factor,
            max_ns: self.max_ns * factor,
            std_ns: self.std_ns * factor,
        }
    }

    /// Checks that the numbers can be statistics of positive times: finite, above 0 and in order.
    ///
    /// # Errors
    /// Names the field.
    pub fn check(&self) -> Result<(), CheckError> {
        // A mean of equal times may differ from them in the last bits.
        const ROUNDING: f64 = 1e-9;
        if self.n == 0 {
            return Err(CheckError::new("n", "at least 1", 0));
        }
        let mut below = ("0", 0.0);
        for (key, value) in [
            ("min_ns", self.min_ns),
            ("p50_ns", self.p50_ns),
            ("p95_ns", self.p95_ns),
            ("max_ns", self.max_ns),
        ] {
            if !value.is_finite() || value <= 0.0 {
                return Err(CheckError::new(key, "a finite time above 0", value));
            }
            if value < below.1 {
                return Err(CheckError::new(key, format!("at least {} = {}", below.0, below.1), value));
            }
            below = (key, value);
        }
        let inside = self.min_ns * (1.0 - ROUNDING)..=self.max_ns * (1.0 + ROUNDING);
        if !inside.contains(&self.mean_ns) {
            let expected = format!("{} to {}, the shortest and the longest", self.min_ns, self.max_ns);
            return Err(CheckError::new("mean_ns", expected, self.mean_ns));
        }
        if !self.std_ns.is_finite() || self.std_ns < 0.0 {
            return Err(CheckError::new("std_ns", "a finite time from 0", self.std_ns));
        }
        Ok(())
    }
}

/// Where a quantile lies among ascending values: linear interpolation (Hyndman and Fan's type 7).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantilePosition {
    /// Rank of the value below, from 0.
    pub below: u64,
    /// Rank of the value above; at most the last.
    pub above: u64,
    /// Share of the way from the one to the other, from 0 to below 1.
    pub fraction: f64,
}

impl QuantilePosition {
    /// The position of the `q` quantile (0..=1) among `n` values; `None` when there are none.
    #[must_use]
    #[inline]
    pub fn new(n: u64, q: f64) -> Option<Self> {
        let last = n.checked_sub(1)?;
        let position = q.clamp(0.0, 1.0) * last as f64;
        // Not below 0, so that cutting off is rounding down.
        let below = (position as u64).min(last);
        Some(Self { below, above: (below + 1).min(last), fraction: position - below as f64 })
    }

    /// The quantile, of the values at the two ranks.
    #[must_use]
    #[inline]
    pub fn between(self, below: f64, above: f64) -> f64 {
        below + (above - below) * self.fraction
    }
}

/// The `q` quantile (0..=1) of ascending, non-empty `sorted`, at its [`QuantilePosition`].
///
/// # Panics
/// When `sorted` is empty.
#[must_use]
#[inline]
pub fn percentile_of_sorted(sorted: &[f64], q: f64) -> f64 {
    let position = QuantilePosition::new(sorted.len() as u64, q).expect("values");
    position.between(sorted[position.below as usize], sorted[position.above as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_match_a_worked_example() {
        let stats = TimeStats::from_times(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(
            (stats.n, stats.min_ns, stats.p50_ns, stats.mean_ns, stats.max_ns),
            (4, 1.0, 2.5, 2.5, 4.0)
        );
        assert!((stats.p95_ns - 3.85).abs() < 1e-12);
        assert!((stats.std_ns - (5.0f64 / 3.0).sqrt()).abs() < 1e-12);
        assert!(TimeStats::from_times(&[]).is_none());
        assert!(TimeStats::from_times(&[1.0, f64::NAN]).is_none());
    }
    #[test]
    fn impossible_statistics_name_the_field() {
        let good = TimeStats::from_times(&[0.1 + 0.2; 7]).unwrap();
        good.check().unwrap();
        let key = |stats: TimeStats| stats.check().unwrap_err().key;
        assert_eq!(key(TimeStats { n: 0, ..good }), "n");
        assert_eq!(key(TimeStats { min_ns: 0.0, ..good }), "min_ns");
        assert_eq!(key(TimeStats { p50_ns: f64::NAN, ..good }), "p50_ns");
        assert_eq!(key(TimeStats { p95_ns: 0.2, ..good }), "p95_ns");
        assert_eq!(key(TimeStats { max_ns: f64::INFINITY, ..good }), "max_ns");
        assert_eq!(key(TimeStats { mean_ns: 0.5, ..good }), "mean_ns");
        assert_eq!(key(TimeStats { std_ns: -1.0, ..good }), "std_ns");
    }
}

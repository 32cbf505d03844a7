//! Raw statistics of repeated measurements.

use serde::{Deserialize, Serialize};

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
}

/// The `q` quantile (0..=1) of ascending, non-empty `sorted`, by linear interpolation (Hyndman and Fan's type 7).
///
/// # Panics
/// When `sorted` is empty.
#[must_use]
pub fn percentile_of_sorted(sorted: &[f64], q: f64) -> f64 {
    let position = q.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let below = position.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    let fraction = position - below as f64;
    sorted[below] + (sorted[above] - sorted[below]) * fraction
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
}

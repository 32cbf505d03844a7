//! Limits on latencies.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::output::{DistributionSummary, Summaries};

/// A latency as docs/metrics.md defines it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Latency {
    /// Time to first token.
    Ttft,
    /// Time per output token: a request's mean gap.
    Tpot,
    /// Every gap between tokens.
    Itl,
    /// End to end.
    E2e,
}

impl Latency {
    /// Every latency.
    pub const ALL: [Self; 4] = [Self::Ttft, Self::Tpot, Self::Itl, Self::E2e];

    /// The name in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::Itl => "itl",
            Self::E2e => "e2e",
        }
    }

    /// Its distribution; empty where nothing was collected.
    #[must_use]
    pub fn of(self, summaries: &Summaries) -> DistributionSummary {
        let name = match self {
            Self::Ttft => "ttft_ns",
            Self::Tpot => "tpot_ns",
            Self::Itl => "itl_ns",
            Self::E2e => "e2e_ns",
        };
        summaries.get(name).copied().unwrap_or_default()
    }
}

/// A percentile that can be limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Percentile {
    /// Median.
    P50,
    /// 90th percentile.
    P90,
    /// 95th percentile.
    P95,
    /// 99th percentile.
    P99,
}

impl Percentile {
    /// Every percentile.
    pub const ALL: [Self; 4] = [Self::P50, Self::P90, Self::P95, Self::P99];

    const fn percent(self) -> u64 {
        match self {
            Self::P50 => 50,
            Self::P90 => 90,
            Self::P95 => 95,
            Self::P99 => 99,
        }
    }

    /// Fewest samples that support it: one beyond it on average.
    #[must_use]
    pub const fn min_samples(self) -> u64 {
        100 / (100 - self.percent())
    }

    const fn of(self, summary: &DistributionSummary) -> Option<f64> {
        match self {
            Self::P50 => summary.p50,
            Self::P90 => summary.p90,
            Self::P95 => summary.p95,
            Self::P99 => summary.p99,
        }
    }
}

impl fmt::Display for Percentile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}", self.percent())
    }
}

/// The most that a percentile of a latency may be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Limit {
    /// What is limited.
    pub metric: Latency,
    /// Which percentile of it.
    pub stat: Percentile,
    /// The most it may be, milliseconds.
    pub max_ms: f64,
}

/// How a limit stands in a simulation.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Standing {
    Met,
    /// Not met, and why.
    Broken(String),
    /// Too few samples to tell.
    Unsupported(String),
}

/// A limit that is none.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "expected a limit like ttft_p99_ms=200 ({metrics}; p50, p90, p95 or p99; milliseconds above 0), found `{found}`"
)]
pub struct LimitError {
    metrics: String,
    found: String,
}

impl Limit {
    /// A limit on the 99th percentile.
    #[must_use]
    pub const fn p99(metric: Latency, max_ms: f64) -> Self {
        Self { metric, stat: Percentile::P99, max_ms }
    }

    /// Whether it can be met at all.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.max_ms.is_finite() && self.max_ms > 0.0
    }

    pub(super) fn judge(&self, summaries: &Summaries) -> Standing {
        let Self { metric, stat, max_ms } = self;
        let summary = metric.of(summaries);
        let min = stat.min_samples();
        if summary.n < min {
            return Standing::Unsupported(format!(
                "{} {stat} wants {min} samples, there are {}",
                metric.name(),
                summary.n
            ));
        }
        match stat.of(&summary).map(|ns| ns / 1e6) {
            Some(ms) if ms <= *max_ms => Standing::Met,
            ms => Standing::Broken(format!(
                "{} {stat} is {:.3} ms, over {max_ms} ms",
                metric.name(),
                ms.unwrap_or(f64::NAN)
            )),
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} <= {} ms", self.metric.name(), self.stat, self.max_ms)
    }
}

impl FromStr for Limit {
    type Err = LimitError;

    fn from_str(text: &str) -> Result<Self, LimitError> {
        let wrong =
            || LimitError { metrics: Latency::ALL.map(Latency::name).join(", "), found: text.to_owned() };
        let (key, value) = text.split_once('=').ok_or_else(wrong)?;
        let mut parts = key.trim().split('_');
        let (Some(metric), Some(stat), Some("ms"), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(wrong());
        };
        let metric = Latency::ALL.into_iter().find(|m| m.name() == metric).ok_or_else(wrong)?;
        let stat = Percentile::ALL.into_iter().find(|p| p.to_string() == stat).ok_or_else(wrong)?;
        let limit = Self { metric, stat, max_ms: value.trim().parse().map_err(|_| wrong())? };
        if limit.is_valid() { Ok(limit) } else { Err(wrong()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_and_judged() {
        let limit: Limit = "ttft_p90_ms = 1.5".parse().unwrap();
        assert_eq!(limit, Limit { metric: Latency::Ttft, stat: Percentile::P90, max_ms: 1.5 });
        assert_eq!(limit.to_string(), "ttft p90 <= 1.5 ms");
        for wrong in
            ["ttft_p90=1", "ttft_p91_ms=1", "x_p90_ms=1", "ttft_p90_ms=0", "ttft_p90_ms=nan", "ttft_p90_ms"]
        {
            assert!(wrong.parse::<Limit>().is_err(), "{wrong}");
        }
        let summary = |n, p90| DistributionSummary { n, p90: Some(p90), ..DistributionSummary::default() };
        let judge = |n, p90| limit.judge(&Summaries::from([("ttft_ns", summary(n, p90))]));
        assert_eq!(judge(10, 1.5e6), Standing::Met);
        let text = "ttft p90 is 1.600 ms, over 1.5 ms".to_owned();
        assert_eq!(judge(10, 1.6e6), Standing::Broken(text));
        let text = "ttft p90 wants 10 samples, there are 9".to_owned();
        assert_eq!(judge(9, 1.0), Standing::Unsupported(text));
        assert_eq!(Percentile::ALL.map(Percentile::min_samples), [2, 10, 20, 100]);
    }
}

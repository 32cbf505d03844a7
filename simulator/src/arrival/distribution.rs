//! Distributions of counts (tokens, turns) and of times, and drawing from them.

use plumbline_schema::Nanos;
use rand_distr::{Distribution, LogNormal, StandardUniform, Uniform, Zipf};
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};

use super::spec::{MAX_SECONDS, SpecError, check_exponent, check_seconds, require, up_to};

/// Draws without a hit after which something is taken for impossible.
pub(super) const MAX_MISSES: u32 = 10_000;

/// How many: tokens, turns. Always at least 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "distribution", rename_all = "snake_case", deny_unknown_fields)]
pub enum CountDistribution {
    /// Always the same.
    Fixed {
        /// The number.
        value: u32,
    },
    /// Each number of a range alike.
    Uniform {
        /// Smallest.
        min: u32,
        /// Largest.
        max: u32,
    },
    /// Zipf's law over a range: the k-th number from `min` on comes in proportion to `k^-exponent`.
    Zipf {
        /// Smallest, and the most frequent.
        min: u32,
        /// Largest.
        max: u32,
        /// 0: each alike.
        exponent: f64,
    },
    /// A number whose logarithm is normally distributed, rounded; draws outside the bounds are drawn again.
    LogNormal {
        /// Half of all draws are below, but for the bounds.
        median: f64,
        /// Standard deviation of the natural logarithm.
        sigma: f64,
        /// Smallest.
        #[serde(default = "one")]
        min: u32,
        /// Largest; none: no bound but what is possible at all.
        max: Option<u32>,
    },
}

const fn one() -> u32 {
    1
}

impl CountDistribution {
    /// Smallest number that can come.
    #[must_use]
    pub fn least(&self) -> u32 {
        match self {
            Self::Fixed { value } => *value,
            Self::Uniform { min, .. } | Self::Zipf { min, .. } | Self::LogNormal { min, .. } => *min,
        }
    }

    /// Checks the parameters; no number above `most` may come.
    pub(super) fn check(&self, key: &str, most: u32) -> Result<(), SpecError> {
        let key_of = |name: &str| format!("{key}.{name}");
        let check_range = |min: u32, max: u32| {
            require((1..=most).contains(&min), &key_of("min"), up_to(most), min)?;
            require((min..=most).contains(&max), &key_of("max"), format!("{min} (`min`) to {most}"), max)
        };
        match self {
            Self::Fixed { value } => {
                require((1..=most).contains(value), &key_of("value"), up_to(most), value)
            }
            Self::Uniform { min, max } => check_range(*min, *max),
            Self::Zipf { min, max, exponent } => {
                check_range(*min, *max)?;
                check_exponent(&key_of("exponent"), *exponent)
            }
            Self::LogNormal { median, sigma, min, max } => {
                check_range(*min, max.unwrap_or(most))?;
                let is_fine = *median >= 0.5 && *median <= f64::from(most);
                require(is_fine, &key_of("median"), format!("0.5 to {most}"), median)?;
                require((0.0..=10.0).contains(sigma), &key_of("sigma"), "0 to 10", sigma)?;
                let sampler = self.sampler(most)?;
                let mut rng = crate::residual::stream(0, "bounds");
                let hits = (0..MAX_MISSES).any(|_| sampler.try_draw(&mut rng).is_some());
                let expected = format!("bounds between which one in {MAX_MISSES} draws falls");
                require(hits, key, expected, format!("{min} to {}", max.unwrap_or(most)))
            }
        }
    }

    /// Draws from it; `most` is the bound of a distribution without one.
    pub(super) fn sampler(&self, most: u32) -> Result<CountSampler, SpecError> {
        let wrong = |error: &dyn std::fmt::Display| {
            SpecError::new("distribution", "parameters of a distribution", error)
        };
        Ok(match *self {
            Self::Fixed { value } => CountSampler::Fixed(value),
            Self::Uniform { min, max } => {
                CountSampler::Uniform(Uniform::new_inclusive(min, max).map_err(|e| wrong(&e))?)
            }
            Self::Zipf { min, max, exponent } => {
                let ranks = f64::from(max - min) + 1.0;
                CountSampler::Zipf { min, max, ranks: Zipf::new(ranks, exponent).map_err(|e| wrong(&e))? }
            }
            Self::LogNormal { median, sigma, min, max } => {
                let normal = LogNormal::new(median.ln(), sigma).map_err(|e| wrong(&e))?;
                CountSampler::LogNormal { normal, min, max: max.unwrap_or(most) }
            }
        })
    }
}

/// Draws from a [`CountDistribution`].
#[derive(Clone, Debug)]
pub(super) enum CountSampler {
    Fixed(u32),
    Uniform(Uniform<u32>),
    Zipf { min: u32, max: u32, ranks: Zipf<f64> },
    LogNormal { normal: LogNormal<f64>, min: u32, max: u32 },
}

impl CountSampler {
    /// Draws, again and again until a draw is within the bounds; that one comes was checked with the parameters.
    pub(super) fn draw(&self, rng: &mut Pcg64) -> u32 {
        loop {
            if let Some(count) = self.try_draw(rng) {
                return count;
            }
        }
    }

    fn try_draw(&self, rng: &mut Pcg64) -> Option<u32> {
        match self {
            Self::Fixed(value) => Some(*value),
            Self::Uniform(uniform) => Some(uniform.sample(rng)),
            Self::Zipf { min, max, ranks } => Some((min - 1 + ranks.sample(rng) as u32).min(*max)),
            Self::LogNormal { normal, min, max } => {
                let count = normal.sample(rng).round();
                (count >= f64::from(*min) && count <= f64::from(*max)).then_some(count as u32)
            }
        }
    }
}

/// How long: think times.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "distribution", rename_all = "snake_case", deny_unknown_fields)]
pub enum TimeDistribution {
    /// Always the same.
    Fixed {
        /// Seconds.
        value_s: f64,
    },
    /// Exponentially distributed.
    Exponential {
        /// Mean, in seconds.
        mean_s: f64,
    },
    /// A time whose logarithm is normally distributed.
    LogNormal {
        /// Half of all draws are below, in seconds.
        median_s: f64,
        /// Standard deviation of the natural logarithm.
        sigma: f64,
    },
}

impl TimeDistribution {
    pub(super) fn check(&self, key: &str) -> Result<(), SpecError> {
        match self {
            Self::Fixed { value_s } => {
                let is_fine = (0.0..=MAX_SECONDS).contains(value_s);
                require(is_fine, &format!("{key}.value_s"), format!("0 to {MAX_SECONDS}"), value_s)
            }
            Self::Exponential { mean_s } => check_seconds(&format!("{key}.mean_s"), *mean_s),
            Self::LogNormal { median_s, sigma } => {
                check_seconds(&format!("{key}.median_s"), *median_s)?;
                require((0.0..=10.0).contains(sigma), &format!("{key}.sigma"), "0 to 10", sigma)
            }
        }
    }

    pub(super) fn draw(&self, rng: &mut Pcg64) -> Nanos {
        let seconds = match self {
            Self::Fixed { value_s } => *value_s,
            Self::Exponential { mean_s } => mean_s * unit_exponential(rng),
            Self::LogNormal { median_s, sigma } => {
                let normal: f64 = rand_distr::StandardNormal.sample(rng);
                median_s * (sigma * normal).exp()
            }
        };
        Nanos::from_f64(seconds * 1e9)
    }
}

/// A draw of the exponential distribution of mean 1, by inversion: `-ln(1 - u)` of a uniform `u` below 1, so that no
/// draw is cut and none is infinite.
pub(super) fn unit_exponential(rng: &mut Pcg64) -> f64 {
    -(-uniform(rng)).ln_1p()
}

/// A draw from 0 to 1, without 1.
pub(super) fn uniform(rng: &mut Pcg64) -> f64 {
    StandardUniform.sample(rng)
}

//! What the step-time model leaves unexplained, drawn from its measured distribution.

use plumbline_bundles::{Dispatch, stats::percentile_of_sorted};
use rand_pcg::{Pcg64, rand_core::Rng};

/// Whether simulated steps scatter as measured ones do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Residuals {
    /// Each step's host time is multiplied by a draw from its dispatch's residual distribution.
    #[default]
    Drawn,
    /// Every step takes its predicted time.
    None,
}

/// The random stream of one part of a simulation, decided by `(seed, part)` alone.
///
/// Parts draw from streams of their own, so that a draw more in one leaves the others as they were.
#[must_use]
pub fn stream(seed: u64, part: &str) -> Pcg64 {
    // FNV-1a (Fowler, Noll, Vo), 64 bits: stable across platforms and versions, unlike `std`'s hashers.
    let name = part.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    Pcg64::new(u128::from(seed), u128::from(name))
}

/// Draws residuals, a stream for each dispatch.
#[derive(Clone, Debug)]
pub struct ResidualSampler {
    eager: Pcg64,
    piecewise_graph: Pcg64,
    full_graph: Pcg64,
}

impl ResidualSampler {
    /// Streams at their beginning.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::of_replica(seed, 0)
    }

    /// As [`Self::new`]; each replica of a cluster has streams of its own.
    #[must_use]
    pub fn of_replica(seed: u64, replica: u32) -> Self {
        let of = |dispatch: Dispatch| match replica {
            0 => stream(seed, &format!("residual/{}", dispatch.name())),
            _ => stream(seed, &format!("residual/{}/{replica}", dispatch.name())),
        };
        Self {
            eager: of(Dispatch::Eager),
            piecewise_graph: of(Dispatch::PiecewiseGraph),
            full_graph: of(Dispatch::FullGraph),
        }
    }

    /// Draws a ratio of real to predicted host time by inverting the distribution whose quantiles, evenly
    /// spaced from 0 to 1 and ascending, are given; linear in between. 1 when there are none.
    #[inline]
    pub fn draw(&mut self, dispatch: Dispatch, quantiles: &[f64]) -> f64 {
        if quantiles.is_empty() {
            return 1.0;
        }
        let stream = match dispatch {
            Dispatch::Eager => &mut self.eager,
            Dispatch::PiecewiseGraph => &mut self.piecewise_graph,
            Dispatch::FullGraph => &mut self.full_graph,
        };
        // The 53 highest bits: every multiple of 2^-53 below 1, equally likely.
        let uniform = (stream.next_u64() >> 11) as f64 * (1.0 / (1_u64 << 53) as f64);
        percentile_of_sorted(quantiles, uniform)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_quantiles() {
        let quantiles = [0.8, 0.9, 1.0, 1.2, 2.0];
        let mut sampler = ResidualSampler::new(7);
        let mut draws: Vec<f64> = (0..40_000).map(|_| sampler.draw(Dispatch::Eager, &quantiles)).collect();
        draws.sort_by(f64::total_cmp);
        assert!(draws[0] >= 0.8 && draws[draws.len() - 1] <= 2.0);
        for (i, expected) in quantiles.iter().enumerate() {
            let found = percentile_of_sorted(&draws, i as f64 / 4.0);
            assert!((found - expected).abs() < 0.02, "quantile {i}: {found}, expected {expected}");
        }
    }

    #[test]
    fn streams_depend_on_seed_and_part_alone() {
        let first = |seed, part| stream(seed, part).next_u64();
        assert_eq!(first(1, "a"), first(1, "a"));
        assert_ne!(first(1, "a"), first(2, "a"));
        assert_ne!(first(1, "a"), first(1, "b"));
        let quantiles = [0.5, 1.5];
        let (mut plain, mut mixed) = (ResidualSampler::new(3), ResidualSampler::new(3));
        let _ = mixed.draw(Dispatch::Eager, &quantiles);
        let expected = plain.draw(Dispatch::FullGraph, &quantiles).to_bits();
        assert_eq!(mixed.draw(Dispatch::FullGraph, &quantiles).to_bits(), expected);
    }

    #[test]
    fn no_quantiles_mean_no_scatter() {
        assert_eq!(ResidualSampler::new(0).draw(Dispatch::Eager, &[]).to_bits(), 1.0_f64.to_bits());
    }
}

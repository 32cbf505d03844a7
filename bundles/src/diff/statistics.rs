//! The statistics behind a comparison, on the logarithms of ratios.
//!
//! Points of one profile are not independent: those of one layout share weights, buffers and the library's choice of
//! algorithm. So interval and test both work on clusters of points, and a cluster counts as one observation.

use rand::RngExt;
use rand_pcg::Pcg64;

use crate::stats::percentile_of_sorted;

/// Share of resamples that an interval covers.
pub const COVERAGE: f64 = 0.95;

/// Resamples of a bootstrap: the 2.5 % tails hold 50 of them each.
pub const NUM_RESAMPLES: usize = 2000;

/// Makes the median absolute deviation of a normal distribution its standard deviation: `1 / quantile(0.75)`.
const MAD_TO_SIGMA: f64 = 1.482_602_218_505_602;

/// Most observations whose signed ranks are counted out; beyond, the normal approximation is good to three digits.
const MAX_EXACT: usize = 100;

/// The median; 0 of nothing.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    percentile_of_sorted(&sorted, 0.5)
}

/// Standard deviation of the bulk of `values`: scaled median absolute deviation around their median. Up to half of the
/// values may lie anywhere without moving it much.
#[must_use]
pub fn robust_sigma(values: &[f64]) -> f64 {
    let middle = median(values);
    let deviations: Vec<_> = values.iter().map(|v| (v - middle).abs()).collect();
    MAD_TO_SIGMA * median(&deviations)
}

/// Interval of the median of `values` by the percentile bootstrap over clusters.
///
/// Whole clusters are drawn with replacement (Davison and Hinkley 1997, section 3.8); `clusters` has the cluster of
/// each value, counted from 0, without a gap.
#[must_use]
pub fn bootstrap_median(values: &[f64], clusters: &[usize], rng: &mut Pcg64) -> (f64, f64) {
    let num_clusters = clusters.iter().max().map_or(0, |last| last + 1);
    if num_clusters == 0 {
        return (0.0, 0.0);
    }
    let mut sorted: Vec<_> = values.iter().copied().zip(clusters.iter().copied()).collect();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut counts = vec![0u64; num_clusters];
    let mut medians = Vec::with_capacity(NUM_RESAMPLES);
    for _ in 0..NUM_RESAMPLES {
        counts.fill(0);
        for _ in 0..num_clusters {
            counts[rng.random_range(0..num_clusters)] += 1;
        }
        medians.push(weighted_median(&sorted, &counts));
    }
    medians.sort_by(f64::total_cmp);
    let tail = (1.0 - COVERAGE) / 2.0;
    (percentile_of_sorted(&medians, tail), percentile_of_sorted(&medians, 1.0 - tail))
}

/// The median of ascending `(value, cluster)` pairs when each stands there as often as its cluster's count says.
fn weighted_median(sorted: &[(f64, usize)], counts: &[u64]) -> f64 {
    let total: u64 = sorted.iter().map(|&(_, cluster)| counts[cluster]).sum();
    let (below, above) = (total.saturating_sub(1) / 2, total / 2);
    let mut passed = 0;
    let mut low = None;
    for &(value, cluster) in sorted {
        passed += counts[cluster];
        if passed > below && low.is_none() {
            low = Some(value);
        }
        if passed > above {
            return f64::midpoint(low.unwrap_or(value), value);
        }
    }
    0.0
}

/// Two-sided p-value of Wilcoxon's signed-rank test that `values` scatter symmetrically around 0.
///
/// With one value per cluster the null hypothesis is that swapping the two profiles within a cluster changes nothing.
/// That holds for any distribution of the noise, and no other assumption is made: up to `MAX_EXACT` values every
/// assignment of signs is counted. Against the sign test it also uses how far values lie from 0. Zeros are left out,
/// ties share their mean rank (Hollander and Wolfe 1999, section 3.1).
#[must_use]
pub fn signed_rank_p(values: &[f64]) -> f64 {
    let mut nonzero: Vec<f64> = values.iter().copied().filter(|v| *v != 0.0).collect();
    if nonzero.is_empty() {
        return 1.0;
    }
    nonzero.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
    let doubled_ranks = doubled_ranks(&nonzero);
    let total: u64 = doubled_ranks.iter().sum();
    let positive: u64 = nonzero.iter().zip(&doubled_ranks).filter(|(v, _)| **v > 0.0).map(|(_, r)| r).sum();
    let smaller = positive.min(total - positive);
    let one_sided = if nonzero.len() <= MAX_EXACT {
        exact_tail(&doubled_ranks, smaller)
    } else {
        let variance = doubled_ranks.iter().map(|&r| (r as f64).powi(2)).sum::<f64>() / 4.0;
        let z = (total as f64 / 2.0 - smaller as f64) / variance.sqrt();
        normal_tail(z)
    };
    (2.0 * one_sided).min(1.0)
}

/// Twice the rank of each value by size, ascending by size; doubled so that mean ranks of ties are whole.
fn doubled_ranks(ascending: &[f64]) -> Vec<u64> {
    let mut ranks = Vec::with_capacity(ascending.len());
    while ranks.len() < ascending.len() {
        let start = ranks.len();
        let size = ascending[start].abs();
        let num_tied = ascending[start..].iter().take_while(|v| v.abs() <= size).count();
        // Ranks start + 1 to start + num_tied.
        ranks.extend(std::iter::repeat_n((2 * start + num_tied + 1) as u64, num_tied));
    }
    ranks
}

/// Probability that the ranks with a positive sign sum to at most `limit`, each sign being a coin's throw.
fn exact_tail(ranks: &[u64], limit: u64) -> f64 {
    let mut probability = vec![0.0; limit as usize + 1];
    probability[0] = 1.0;
    for &rank in ranks {
        let rank = rank as usize;
        for sum in (0..probability.len()).rev() {
            let with = if sum >= rank { probability[sum - rank] } else { 0.0 };
            probability[sum] = 0.5 * (probability[sum] + with);
        }
    }
    probability.iter().sum()
}

/// Probability that a standard normal variable is above `z >= 0`.
///
/// Abramowitz and Stegun 1964, formula 26.2.17; absolute error below 7.5e-8.
fn normal_tail(z: f64) -> f64 {
    const B: [f64; 5] = [0.319_381_530, -0.356_563_782, 1.781_477_937, -1.821_255_978, 1.330_274_429];
    let t = 1.0 / (1.0 + 0.231_641_9 * z);
    let polynomial = B.iter().rev().fold(0.0, |sum, b| (sum + b) * t);
    let density = (-z * z / 2.0).exp() / std::f64::consts::TAU.sqrt();
    (density * polynomial).clamp(0.0, 0.5)
}

/// p-values adjusted for having done all these tests (Holm 1979): rejecting those below `alpha` errs anywhere with
/// probability `alpha` at most, whatever the tests have to do with each other.
#[must_use]
pub fn holm(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<_> = (0..p_values.len()).collect();
    order.sort_by(|&a, &b| p_values[a].total_cmp(&p_values[b]));
    let mut adjusted = vec![1.0; p_values.len()];
    let mut largest: f64 = 0.0;
    for (place, &i) in order.iter().enumerate() {
        largest = largest.max((p_values.len() - place) as f64 * p_values[i]).min(1.0);
        adjusted[i] = largest;
    }
    adjusted
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn normal(rng: &mut Pcg64) -> f64 {
        let (u, v): (f64, f64) = (rng.random(), rng.random());
        (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    #[test]
    fn the_signed_rank_test_matches_a_published_example() {
        // Hollander and Wolfe's depression scale factors; R's `wilcox.test(paired = TRUE)` gives V = 40, p = 0.03906.
        // In thousandths.
        let x = [1830, 500, 1620, 2480, 1680, 1880, 1550, 3060, 1300];
        let y = [878, 647, 598, 2050, 1060, 1290, 1060, 3140, 1290];
        let differences: Vec<_> = x.iter().zip(y).map(|(x, y)| f64::from(x - y)).collect();
        assert!((signed_rank_p(&differences) - 20.0 / 512.0).abs() < 1e-12);
    }

    #[test]
    fn one_sided_values_have_the_least_p_that_their_number_allows() {
        assert!((signed_rank_p(&[1.0, 2.0, 3.0, 4.0, 5.0]) - 2.0 / 32.0).abs() < 1e-15);
        // All tied, as when an operator slows down by one factor.
        assert!((signed_rank_p(&[-0.05; 10]) - 2.0 / 1024.0).abs() < 1e-15);
        assert!((signed_rank_p(&[0.0; 50]) - 1.0).abs() < 1e-15);
        assert!((signed_rank_p(&[1.0, -1.0]) - 1.0).abs() < 1e-15);
        assert!((signed_rank_p(&[]) - 1.0).abs() < 1e-15);
    }

    #[test]
    fn the_normal_approximation_joins_the_exact_count() {
        let values = |n: i32| (1..=n).map(|i| f64::from(i) * if i % 3 == 0 { -1.0 } else { 1.0 });
        let exact = signed_rank_p(&values(99).collect::<Vec<_>>());
        let approximate = signed_rank_p(&values(102).collect::<Vec<_>>());
        assert!(exact < 0.01 && (exact - approximate).abs() < 0.001, "{exact} {approximate}");
        // 1.96 standard deviations.
        assert!((normal_tail(1.959_963_985) - 0.025).abs() < 1e-7);
        assert!((normal_tail(0.0) - 0.5).abs() < 1e-7);
    }

    #[test]
    fn holm_matches_a_worked_example() {
        // 3 x 0.01; 2 x 0.02; the last may not be below the one before it.
        let adjusted = holm(&[0.03, 0.01, 0.02]);
        for (found, expected) in adjusted.iter().zip([0.04, 0.03, 0.04]) {
            assert!((found - expected).abs() < 1e-15, "{adjusted:?}");
        }
        assert!(holm(&[0.6, 0.9]).iter().all(|p| (p - 1.0).abs() < 1e-15));
        assert!(holm(&[]).is_empty());
    }

    #[test]
    fn the_robust_sigma_ignores_outliers() {
        let mut rng = Pcg64::seed_from_u64(1);
        let mut values: Vec<_> = (0..2000).map(|_| 3.0 + 0.5 * normal(&mut rng)).collect();
        let clean = robust_sigma(&values);
        assert!((clean - 0.5).abs() < 0.03, "{clean}");
        values[..100].fill(1e9);
        assert!((robust_sigma(&values) - clean).abs() < 0.05);
    }

    #[test]
    fn a_weighted_median_is_the_median_of_the_repeated_values() {
        let sorted = [(1.0, 0), (2.0, 1), (3.0, 0), (10.0, 2)];
        for (counts, expanded) in [
            ([1, 1, 1], vec![1.0, 2.0, 3.0, 10.0]),
            ([2, 0, 1], vec![1.0, 1.0, 3.0, 3.0, 10.0]),
            ([0, 0, 3], vec![10.0; 3]),
            ([0, 3, 3], vec![2.0, 2.0, 2.0, 10.0, 10.0, 10.0]),
        ] {
            let found = weighted_median(&sorted, &counts);
            assert!((found - median(&expanded)).abs() < 1e-15, "{counts:?}: {found}");
        }
    }

    #[test]
    fn intervals_cover_the_truth_as_often_as_they_say_although_points_hang_together() {
        // Twenty layouts with a common error each, twenty points in each with a smaller one of their own.
        let mut rng = Pcg64::seed_from_u64(2);
        let clusters: Vec<_> = (0..400).map(|i| i / 20).collect();
        let singles: Vec<_> = (0..400).collect();
        let (mut num_covered, mut num_covered_by_points) = (0, 0);
        for _ in 0..100 {
            let common: Vec<_> = (0..20).map(|_| 0.02 * normal(&mut rng)).collect();
            let values: Vec<_> =
                clusters.iter().map(|&c: &usize| common[c] + 0.005 * normal(&mut rng)).collect();
            let covers = |(low, high): (f64, f64)| usize::from(low <= 0.0 && high >= 0.0);
            num_covered += covers(bootstrap_median(&values, &clusters, &mut rng));
            num_covered_by_points += covers(bootstrap_median(&values, &singles, &mut rng));
        }
        assert!(num_covered >= 88, "{num_covered} of 100");
        assert!(num_covered_by_points < 75, "points taken as independent: {num_covered_by_points} of 100");
    }
}

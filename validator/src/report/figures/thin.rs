//! As many points as a figure can show.

/// Parts of equal size into which a distribution is cut.
const NUM_PARTS: usize = 400;

/// Ranks, from 0, of the samples that stand for `n` ascending ones: all of a few, and of many the last of each of 400
/// equal parts with the ends, where equal parts see nothing, twice as close to it each time.
pub(in crate::report) fn quantile_ranks(n: usize) -> Vec<usize> {
    if n <= NUM_PARTS {
        return (0..n).collect();
    }
    let mut ranks: Vec<usize> = (1..=NUM_PARTS).map(|k| k * n / NUM_PARTS - 1).collect();
    let part = n / NUM_PARTS;
    let near_the_end = std::iter::successors(Some(1), |distance| Some(distance * 2));
    for distance in near_the_end.take_while(|distance| *distance < 2 * part) {
        ranks.extend([distance - 1, n - distance]);
    }
    ranks.sort_unstable();
    ranks.dedup();
    ranks
}

/// Indices of at most `most` of `n` things, evenly, with the first and the last.
pub(super) fn evenly(n: usize, most: usize) -> Vec<usize> {
    if n <= most {
        return (0..n).collect();
    }
    (0..most).map(|k| k * (n - 1) / (most - 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_samples_all_count_and_many_keep_their_ends() {
        assert_eq!(quantile_ranks(3), [0, 1, 2]);
        assert_eq!(quantile_ranks(0), [0; 0]);
        for n in [401, 5_003, 2_000_000] {
            let ranks = quantile_ranks(n);
            assert!(ranks.len() <= 450, "{} of {n}", ranks.len());
            assert!(ranks.is_sorted() && ranks[0] == 0 && ranks[ranks.len() - 1] == n - 1);
            // Nowhere is more left out than a part.
            assert!(ranks.windows(2).all(|pair| pair[1] - pair[0] <= n / NUM_PARTS + 1));
        }
        // The five slowest of two million are told from one another.
        assert_eq!(quantile_ranks(2_000_000).iter().filter(|rank| **rank >= 1_999_992).count(), 4);
    }

    #[test]
    fn evenly_has_both_ends() {
        assert_eq!(evenly(3, 5), [0, 1, 2]);
        assert_eq!(evenly(100, 4), [0, 33, 66, 99]);
    }
}

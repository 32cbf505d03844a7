//! Points that fill a range evenly from the first on.

/// Numbers of a Halton point: one per prime base.
const BASES: [u32; 7] = [2, 3, 5, 7, 11, 13, 17];

/// The point of the Halton sequence at an index, from 1; each number in 0..1 (Halton 1960).
pub(super) fn halton(index: u32) -> [f64; 7] {
    BASES.map(|base| radical_inverse(index, base))
}

/// The digits of `index` in a base, mirrored at the point.
fn radical_inverse(mut index: u32, base: u32) -> f64 {
    let (mut value, mut digit) = (0.0, 1.0);
    while index > 0 {
        digit /= f64::from(base);
        value += digit * f64::from(index % base);
        index /= base;
    }
    value
}

/// The number at `share` (0..=1) of the way from `low` to `high` in their logarithms.
pub(super) fn log_between(low: f64, high: f64, share: f64) -> f64 {
    low * (high / low).powf(share)
}

/// The numbers from 0 to `len - 1` so that each prefix is spread over all of them; masks give different orders.
pub(super) fn spread(len: usize, mask: u32) -> Vec<usize> {
    let bits = len.max(1).next_power_of_two().trailing_zeros();
    let mut order: Vec<usize> = (0..len).collect();
    let mirrored = |i: usize| if bits == 0 { 0 } else { (i as u32).reverse_bits() >> (32 - bits) };
    let mask = mask & ((1u64 << bits) - 1) as u32;
    order.sort_by_key(|&i| mirrored(i) ^ mask);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halton_points_are_those_of_the_definition() {
        let first: Vec<f64> = (1..=5).map(|i| halton(i)[0]).collect();
        assert_eq!(first, [0.5, 0.25, 0.75, 0.125, 0.625]);
        assert!((halton(4)[1] - 4.0 / 9.0).abs() < 1e-12);
    }

    #[test]
    fn every_prefix_of_a_spread_order_is_spread() {
        for (len, mask) in [(0, 3), (1, 7), (8, 0), (58, 0), (58, 37), (100, 99)] {
            let order = spread(len, mask);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..len).collect::<Vec<_>>());
            if len > 50 {
                // Of four, one in each quarter of the next power of two that has numbers in it.
                let quarter = len.next_power_of_two() / 4;
                let seen: std::collections::HashSet<_> = order[..4].iter().map(|i| i / quarter).collect();
                assert_eq!(seen.len(), 4, "{len} {mask} {order:?}");
            }
        }
    }
}

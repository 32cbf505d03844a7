use plumbline_bundles::stats::percentile_of_sorted;
use proptest::{collection::vec, prelude::*};

use super::*;

const PERCENTILES: [f64; 7] = [0.0, 0.1, 25.0, 50.0, 90.0, 99.9, 100.0];

/// What a sort of every single sample gives.
fn naive(samples: &[(u64, u32)]) -> Distribution {
    let mut totals = Totals::NONE;
    let mut sorted = Vec::new();
    for &(value_ns, count) in samples {
        for _ in 0..count {
            sorted.push(value_ns as f64);
            totals.add(Totals::of(&Held::of(&[Sample { value_ns, count: 1 }])));
        }
    }
    sorted.sort_by(f64::total_cmp);
    let asked = PERCENTILES.iter().filter(|_| !sorted.is_empty());
    let percentiles = asked.map(|&p| (p, percentile_of_sorted(&sorted, p / 100.0))).collect();
    Distribution { totals, percentiles }
}

fn collect(max_bytes: usize, samples: &[(u64, u32)]) -> ExactQuantiles {
    let mut quantiles = ExactQuantiles::new(max_bytes);
    for &(value_ns, count) in samples {
        quantiles.push(value_ns, count).unwrap();
    }
    quantiles
}

/// Anything, ties, a narrow range far up, and the ends.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..8_u64,
        (0..1_000_u64).prop_map(|v| v + (1 << 52)),
        (0..40_u32).prop_map(|shift| 1 << shift),
        Just(u64::MAX),
    ]
}

fn samples(max_len: usize) -> impl Strategy<Value = Vec<(u64, u32)>> {
    vec((value(), 0..5_u32), 0..max_len)
}

proptest! {
    #[test]
    fn any_memory_gives_what_a_sort_gives(samples in samples(300), max_bytes in 0..2_000_usize) {
        let distribution = collect(max_bytes, &samples).finish(&PERCENTILES).unwrap();
        prop_assert_eq!(distribution, naive(&samples));
    }

    #[test]
    fn values_of_one_kind_give_what_a_sort_gives(
        low in any::<u64>(),
        bits in 0..64_u32,
        offsets in vec(any::<u64>(), 1..200),
        max_bytes in prop_oneof![Just(64_usize), Just(DEFAULT_MAX_BYTES)],
    ) {
        let mask = (1 << bits) - 1;
        let samples: Vec<_> = offsets.iter().map(|offset| (low.saturating_add(offset & mask), 1)).collect();
        let distribution = collect(max_bytes, &samples).finish(&PERCENTILES).unwrap();
        prop_assert_eq!(distribution, naive(&samples));
    }

    #[test]
    fn merged_collections_are_one_collection(
        parts in vec((samples(100), 0..800_usize), 1..5),
    ) {
        let all: Vec<_> = parts.iter().flat_map(|(samples, _)| samples.iter().copied()).collect();
        let mut merged = ExactQuantiles::new(200);
        for (samples, max_bytes) in &parts {
            merged.merge(collect(*max_bytes, samples)).unwrap();
            prop_assert!(merged.held.num_bytes() <= 100);
        }
        let expected = naive(&all);
        prop_assert_eq!(merged.finish(&PERCENTILES).unwrap(), expected);
    }

    #[test]
    fn a_large_count_weighs_as_many_samples(count in 1..=u32::MAX, more in 1..=u32::MAX, value in value()) {
        // The same value twice: their counts together may exceed a u32.
        let samples = [(value, count), (value, more), (value.saturating_add(10), 1)];
        let distribution = collect(DEFAULT_MAX_BYTES, &samples).finish(&[50.0, 100.0]).unwrap();
        prop_assert_eq!(distribution.count(), u64::from(count) + u64::from(more) + 1);
        prop_assert_eq!(distribution.percentile_ns(50.0), Some(value as f64));
        prop_assert_eq!(distribution.percentile_ns(100.0), Some(value.saturating_add(10) as f64));
    }
}

#[test]
fn percentiles_lie_between_order_statistics() {
    let mut quantiles = ExactQuantiles::default();
    for value_ns in [40, 10, 30, 20] {
        quantiles.push(value_ns, 1).unwrap();
    }
    let distribution = quantiles.finish(&[50.0, 90.0, 250.0, -3.0]).unwrap();
    assert_eq!(distribution.percentile_ns(50.0), Some(25.0));
    // Rank 2.7: seven tenths of the way from 30 to 40.
    assert_eq!(distribution.percentile_ns(90.0), Some(30.0 + 10.0 * (0.9 * 3.0 - 2.0)));
    assert_eq!(
        (distribution.percentile_ns(250.0), distribution.percentile_ns(-3.0)),
        (Some(40.0), Some(10.0))
    );
    assert_eq!(distribution.percentile_ns(99.0), None, "not asked for");
    assert_eq!((distribution.mean_ns(), distribution.sum_ns()), (Some(25.0), 100));
    assert_eq!((distribution.min_ns(), distribution.max_ns()), (Some(10), Some(40)));
}

#[test]
fn without_samples_there_are_no_numbers() {
    let mut quantiles = ExactQuantiles::default();
    quantiles.push(7, 0).unwrap();
    let distribution = quantiles.finish(&[50.0]).unwrap();
    assert_eq!(
        (distribution.count(), distribution.mean_ns(), distribution.percentile_ns(50.0)),
        (0, None, None)
    );
    assert_eq!((distribution.min_ns(), distribution.max_ns()), (None, None));
}

#[test]
fn the_sum_is_exact_where_floats_are_not() {
    let distribution = collect(64, &[(u64::MAX, u32::MAX), (1, 1)]).finish(&[]).unwrap();
    assert_eq!(distribution.sum_ns(), u128::from(u64::MAX) * u128::from(u32::MAX) + 1);
}

/// Scattered over 2^24 values, so that neighbours differ.
fn scattered(i: u64) -> u64 {
    5_000_000 + (i.wrapping_mul(11_400_714_819_323_198_485) >> 40)
}

#[test]
fn ten_million_samples_take_no_more_memory_than_allowed() {
    const MAX_BYTES: usize = 1 << 20;
    const NUM_SAMPLES: u64 = 10_000_000;
    let mut quantiles = ExactQuantiles::new(MAX_BYTES);
    let mut most = 0;
    for i in 0..NUM_SAMPLES {
        quantiles.push(scattered(i), 1).unwrap();
        most = most.max(quantiles.held.num_bytes());
    }
    assert_eq!(most, MAX_BYTES / 2);
    for num_histograms in 1..16 {
        let bits = quantiles.max_bits_per_pass(num_histograms);
        assert!((num_histograms << bits) * size_of::<u64>() <= MAX_BYTES / 2, "{bits} bits");
    }
    let distribution = quantiles.finish(&[50.0, 99.0]).unwrap();
    assert_eq!(distribution.count(), NUM_SAMPLES);
    let mut sorted: Vec<u64> = (0..NUM_SAMPLES).map(scattered).collect();
    sorted.sort_unstable();
    let sum: u128 = sorted.iter().copied().map(u128::from).sum();
    assert_eq!(distribution.sum_ns(), sum);
    for p in [50.0, 99.0] {
        let position = QuantilePosition::new(NUM_SAMPLES, p / 100.0).unwrap();
        let [below, above] = [position.below, position.above].map(|rank| sorted[rank as usize] as f64);
        assert_eq!(distribution.percentile_ns(p), Some(position.between(below, above)));
    }
}

#[test]
fn equal_neighbours_take_no_memory() {
    let mut quantiles = ExactQuantiles::new(64);
    for _ in 0..1_000 {
        quantiles.push(9, 3).unwrap();
    }
    assert_eq!(quantiles.held.to_vec(), [Sample { value_ns: 9, count: 3_000 }]);
    assert!(quantiles.spilled.is_none());
}

#[test]
fn samples_that_found_no_file_are_not_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    let fill = || {
        let mut quantiles = ExactQuantiles::new(32).spilling_in(&missing);
        quantiles.push(1, 1).unwrap();
        quantiles.push(2, 1).unwrap();
        let error = quantiles.push(3, 1).unwrap_err();
        (quantiles, error)
    };
    let (mut quantiles, error) = fill();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(error.to_string().contains(missing.to_str().unwrap()), "{error}");
    // There may be a file by now, but the sample is gone.
    std::fs::create_dir(&missing).unwrap();
    assert!(quantiles.push(4, 1).is_err());
    let error = quantiles.finish(&[50.0]).unwrap_err();
    assert!(error.to_string().contains("lost before"), "{error}");
    std::fs::remove_dir(&missing).unwrap();
    let mut whole = collect(64, &[(1, 1), (2, 1), (3, 1)]);
    assert!(whole.merge(fill().0).is_err());
    assert!(whole.finish(&[50.0]).is_err(), "what lacks samples makes the whole lack them");
}

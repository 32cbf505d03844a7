use proptest::prelude::*;

use super::*;
use crate::testing::{request, run};

const MS: u64 = 1_000_000;

/// Two requests; every token `gap` ms apart, the first `ttft` ms after the arrival.
fn spaced(ttft: u64, gap: u64) -> Run {
    let tokens = |start: u64| [0, 1, 2].map(|i| (start + ttft + i * gap) * MS);
    run(vec![request(0, 0, &tokens(0)), request(1, 500 * MS, &tokens(500))]).with_tokens()
}

fn p50(comparison: &Comparison, metric: Metric) -> &MetricRow {
    comparison.row(metric, Stat::P50).unwrap()
}

#[test]
fn real_is_the_median_of_the_repeats_and_the_error_is_signed() {
    let real = [spaced(20, 10), spaced(24, 12), spaced(21, 11)];
    let comparison = compare(&real, &spaced(18, 13)).unwrap();
    let ttft = p50(&comparison, Metric::Ttft);
    assert_eq!(ttft.n, 2);
    assert_eq!((ttft.real_ms, ttft.real_min_ms, ttft.real_max_ms), (Some(21.0), Some(20.0), Some(24.0)));
    assert_eq!(ttft.sim_ms, Some(18.0));
    assert!((ttft.error_pct.unwrap() - 100.0 * (18.0 - 21.0) / 21.0).abs() < 1e-12);
    // 18 is under 20 - 5 % = 19.
    assert_eq!(ttft.inside_band, Some(false));
    let itl = p50(&comparison, Metric::Itl);
    assert_eq!((itl.n, itl.real_ms, itl.sim_ms), (4, Some(11.0), Some(13.0)));
    assert!(itl.error_pct.unwrap() > 0.0);
    // 13 is over 12 + 5 % = 12.6.
    assert_eq!(itl.inside_band, Some(false));
    assert_eq!(p50(&comparison, Metric::Tpot).sim_ms, Some(13.0));
    assert_eq!(p50(&comparison, Metric::E2e).real_ms, Some(43.0));
}

#[test]
fn the_band_is_the_range_widened_by_5_percent_and_closed() {
    assert!(is_inside_band(95.0, 100.0, 200.0));
    assert!(is_inside_band(210.0, 100.0, 200.0));
    assert!(!is_inside_band(94.9, 100.0, 200.0));
    assert!(!is_inside_band(210.1, 100.0, 200.0));
    assert!(!is_inside_band(f64::NAN, 100.0, 200.0));
}

#[test]
fn a_statistic_without_enough_samples_is_na_with_the_reason() {
    let comparison = compare(&[spaced(20, 10)], &spaced(20, 10)).unwrap();
    let row = comparison.row(Metric::Ttft, Stat::P99).unwrap();
    assert_eq!((row.n, row.real_ms, row.sim_ms, row.error_pct, row.inside_band), (2, None, None, None, None));
    assert_eq!(row.na_reason.as_deref(), Some("p99 wants 100 samples, there are 2"));
    let json = serde_json::to_value(row).unwrap();
    assert!(json["real_ms"].is_null() && json["inside_band"].is_null());
    assert!(p50(&comparison, Metric::Ttft).na_reason.is_none());
}

#[test]
fn itl_needs_token_times_of_every_run_and_names_the_one_without() {
    let mut second = spaced(21, 10);
    second.tokens.clear();
    let comparison = compare(&[spaced(20, 10), second], &spaced(20, 10)).unwrap();
    let itl = p50(&comparison, Metric::Itl);
    assert_eq!(itl.na_reason.as_deref(), Some("real run 2 records no token times"));
    assert_eq!(p50(&comparison, Metric::Tpot).real_ms, Some(10.0));
}

#[test]
fn itl_of_a_partial_token_table_is_na() {
    let mut real = spaced(20, 10);
    real.tokens.truncate(3);
    let comparison = compare(&[real], &spaced(20, 10)).unwrap();
    let reason = p50(&comparison, Metric::Itl).na_reason.clone().unwrap();
    assert_eq!(reason, "the runs record different numbers of gaps: real run 1 2, the simulated run 4");
}

#[test]
fn requests_are_paired_by_id_not_by_order() {
    let real = [spaced(20, 10)];
    let mut sim = spaced(30, 10);
    sim.requests.reverse();
    let comparison = compare(&real, &sim).unwrap();
    let ttft = &comparison.paired[0];
    assert_eq!((ttft.metric, ttft.n, ttft.median_abs_error_pct), (Metric::Ttft, 2, Some(50.0)));
    let e2e = &comparison.paired[2];
    assert_eq!((e2e.metric, e2e.median_abs_error_pct), (Metric::E2e, Some(25.0)));
}

#[test]
fn paired_errors_show_what_equal_percentiles_hide() {
    // The same two TTFTs, swapped between the requests.
    let tokens = |arrival: u64, ttft: u64| [(arrival + ttft) * MS, (arrival + ttft + 10) * MS];
    let make = |a, b| run(vec![request(0, 0, &tokens(0, a)), request(1, 500 * MS, &tokens(500, b))]);
    let comparison = compare(&[make(10, 20).with_tokens()], &make(20, 10).with_tokens()).unwrap();
    assert_eq!(p50(&comparison, Metric::Ttft).error_pct, Some(0.0));
    assert_eq!(comparison.paired[0].median_abs_error_pct, Some(75.0));
}

#[test]
fn a_request_one_run_did_not_finish_is_counted_and_left_out() {
    let mut sim = spaced(20, 10);
    sim.requests[1].status = RequestStatus::Rejected;
    let comparison = compare(&[spaced(20, 10)], &sim).unwrap();
    assert_eq!(comparison.requests.compared, 1);
    assert_eq!(comparison.requests.sim, Outcomes { ok: 1, rejected: 1, incomplete: 0 });
    assert_eq!(comparison.requests.real, [Outcomes { ok: 2, rejected: 0, incomplete: 0 }]);
    assert_eq!(p50(&comparison, Metric::Itl).n, 2);
    sim.requests[0].status = RequestStatus::Incomplete;
    let error = compare(&[spaced(20, 10)], &sim).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no request is ok in every run: real run 1 has 2 ok, 0 rejected, 0 incomplete; \
         the simulated run has 0 ok, 1 rejected, 1 incomplete"
    );
}

#[test]
fn only_the_requests_asked_for_are_judged() {
    let mut sim = spaced(20, 10);
    sim.requests[0].first_token_time_ns = Some(plumbline_schema::Nanos(40 * MS));
    let only = BTreeSet::from([1]);
    let comparison = compare_requests(&[spaced(20, 10)], std::slice::from_ref(&sim), Some(&only)).unwrap();
    assert_eq!(p50(&comparison, Metric::Ttft).sim_ms, Some(20.0));
    assert_eq!(comparison.requests.sim.ok, 1);
    let error =
        compare_requests(&[spaced(20, 10)], std::slice::from_ref(&sim), Some(&BTreeSet::from([1, 8, 9])))
            .unwrap_err();
    assert_eq!(error.to_string(), "expected requests of the run, found 8, 9");
}

#[test]
fn runs_of_different_requests_are_refused_by_name() {
    let mut sim = spaced(20, 10);
    sim.requests[1].request_id = 5;
    let error = compare(&[spaced(20, 10)], &sim).unwrap_err();
    let expected = "the simulated run is not of the same requests as real run 1: it lacks 1; it adds 5";
    assert_eq!(error.to_string(), expected);

    let many = |ids: std::ops::Range<u64>| run(ids.map(|i| request(i, 0, &[10, 20])).collect()).with_tokens();
    let error = compare(&[many(0..9), many(0..2)], &many(0..9)).unwrap_err();
    let expected = "real run 2 is not of the same requests as real run 1: it lacks 2, 3, 4, 5, 6 and 2 more";
    assert_eq!(error.to_string(), expected);
    assert_eq!(compare(&[], &many(0..1)).unwrap_err(), CompareError::NoRealRun);
}

#[test]
fn lengths_and_arrivals_must_match() {
    let mut sim = spaced(20, 10);
    for request in &mut sim.requests {
        request.num_prefill_tokens = 17;
    }
    let error = compare(&[spaced(20, 10)], &sim).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the simulated run, request 0: expected num_prefill_tokens 16, as in real run 1, found 17 \
         (2 requests differ)"
    );

    let mut sim = spaced(20, 10);
    sim.requests[1].num_decode_tokens_actual = 2;
    let error = compare(&[spaced(20, 10)], &sim).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the simulated run, request 1: expected num_decode_tokens_actual 3, as in real run 1, found 2"
    );

    let mut repeat = spaced(20, 10);
    repeat.requests[1].arrival_time_ns.0 += ARRIVAL_TOLERANCE_NS;
    assert!(compare(&[spaced(20, 10), repeat.clone()], &spaced(20, 10)).is_ok());
    repeat.requests[1].arrival_time_ns.0 += 1;
    let error = compare(&[spaced(20, 10), repeat], &spaced(20, 10)).unwrap_err();
    assert!(error.to_string().starts_with("real run 2, request 1: expected arrival_time_ns 500000000"));
}

#[test]
fn a_real_value_of_zero_has_no_relative_error() {
    let instant = || run(vec![request(0, 0, &[0, 0])]).with_tokens();
    let comparison = compare(&[instant()], &instant()).unwrap();
    let row = p50(&comparison, Metric::Ttft);
    assert_eq!((row.real_ms, row.error_pct), (Some(0.0), None));
    assert_eq!(row.na_reason.as_deref(), Some("the real value is 0"));
    assert_eq!(comparison.paired[0].median_abs_error_pct, None);
}

/// Requests with ascending token times, from gaps in ns.
fn arbitrary_run() -> impl Strategy<Value = Vec<(u64, Vec<u64>)>> {
    let gaps = prop::collection::vec(1u64..50_000_000, 2..12);
    prop::collection::vec((0u64..1_000_000_000, gaps), 1..12)
}

fn build(requests: &[(u64, Vec<u64>)], scale: u64, slower: u64) -> Run {
    let rows = requests.iter().enumerate().map(|(i, (arrival, gaps))| {
        let mut time = arrival * scale;
        let tokens: Vec<_> = gaps
            .iter()
            .map(|gap| {
                time += gap * slower * scale;
                time
            })
            .collect();
        request(i as u64, arrival * scale, &tokens)
    });
    run(rows.collect()).with_tokens()
}

proptest! {
    #[test]
    fn scaling_all_times_scales_metrics_and_leaves_errors(
        requests in arbitrary_run(), scale in 1u64..50, slower in 1u64..4,
    ) {
        let once = compare(&[build(&requests, 1, 1)], &build(&requests, 1, slower)).unwrap();
        let scaled = compare(&[build(&requests, scale, 1)], &build(&requests, scale, slower)).unwrap();
        for (a, b) in once.metrics.iter().zip(&scaled.metrics) {
            prop_assert_eq!(a.n, b.n);
            prop_assert_eq!(&a.na_reason, &b.na_reason);
            for (x, y) in [(a.real_ms, b.real_ms), (a.sim_ms, b.sim_ms), (a.real_max_ms, b.real_max_ms)] {
                let (Some(x), Some(y)) = (x, y) else { prop_assert_eq!(x, y); continue };
                prop_assert!((x * scale as f64 - y).abs() <= 1e-9 * y);
            }
            if let (Some(x), Some(y)) = (a.error_pct, b.error_pct) {
                prop_assert!((x - y).abs() < 1e-6, "{x} {y}");
                prop_assert!((x - 100.0 * (slower - 1) as f64).abs() < 1e-6, "{x}");
            }
        }
    }

    #[test]
    fn a_run_against_itself_is_exact_and_inside_its_band(requests in arbitrary_run()) {
        let run = build(&requests, 1, 1);
        let comparison = compare(std::slice::from_ref(&run), &run).unwrap();
        for row in comparison.metrics.iter().filter(|row| row.real_ms.is_some()) {
            prop_assert_eq!(row.error_pct, Some(0.0));
            prop_assert_eq!(row.inside_band, Some(true));
        }
        let num_tokens: usize = requests.iter().map(|(_, gaps)| gaps.len()).sum();
        let itl = comparison.row(Metric::Itl, Stat::P50).unwrap();
        prop_assert_eq!(itl.n, (num_tokens - requests.len()) as u64);
    }
}

#[test]
fn simulations_are_summed_up_by_their_median_and_range() {
    let sims = [30, 10, 20].map(|ttft| spaced(ttft, 10));
    let comparison = compare_requests(&[spaced(20, 10)], &sims, None).unwrap();
    let row = comparison.row(Metric::Ttft, Stat::P50).unwrap();
    let one = |ttft| {
        compare(&[spaced(20, 10)], &spaced(ttft, 10)).unwrap().row(Metric::Ttft, Stat::P50).unwrap().sim_ms
    };
    assert_eq!((row.sim_min_ms, row.sim_ms, row.sim_max_ms), (one(10), one(20), one(30)));
    assert!(matches!(compare_requests(&[spaced(20, 10)], &[], None), Err(CompareError::NoSimulatedRun)));
}

#[test]
fn paired_errors_keep_their_sign() {
    let tokens = |arrival: u64, ttft: u64| [(arrival + ttft) * MS, (arrival + ttft + 10) * MS];
    let make = |ttfts: [u64; 4]| {
        let requests =
            (0..4u64).zip(ttfts).map(|(id, ttft)| request(id, id * 500 * MS, &tokens(id * 500, ttft)));
        run(requests.collect()).with_tokens()
    };
    // -20, -10, +10 and -40 %.
    let comparison = compare(&[make([10, 10, 10, 10])], &make([8, 9, 11, 6])).unwrap();
    let ttft = &comparison.paired[0];
    assert_eq!(ttft.n, 4);
    let close = |found: Option<f64>, expected: f64| {
        assert!((found.unwrap() - expected).abs() < 1e-9, "{found:?}, expected {expected}");
    };
    close(ttft.median_error_pct, -15.0);
    close(ttft.median_abs_error_pct, 15.0);
    close(ttft.p90_abs_error_pct, 34.0);
    close(ttft.share_too_short, 0.75);
}

#[test]
fn parts_of_opposite_sign_that_cancel_in_the_total_are_named() {
    // 20 ms and two gaps of 10; 26 ms and two gaps of 7.
    let sim = {
        let tokens = |start: u64| [0, 1, 2].map(|i| (start + 26) * MS + i * 7 * MS);
        run(vec![request(0, 0, &tokens(0)), request(1, 500 * MS, &tokens(500))]).with_tokens()
    };
    let parts = compare(&[spaced(20, 10)], &sim).unwrap().e2e_parts.unwrap();
    assert_eq!((parts.real_prefill_ms, parts.real_decode_ms), (20.0, 20.0));
    assert_eq!((parts.prefill_pct, parts.decode_pct, parts.total_pct), (15.0, -15.0, 0.0));
    assert!(parts.cancels);
    assert_eq!(
        parts.cancellation().as_deref(),
        Some("prefill +15.0 % and decode -15.0 % of the real E2E cancel: its mean is off by +0.0 % only")
    );
    let same_sign = compare(&[spaced(20, 10)], &spaced(22, 11)).unwrap().e2e_parts.unwrap();
    assert_eq!((same_sign.cancels, same_sign.total_pct), (false, 10.0));
}

#[test]
fn a_shifted_clock_is_named() {
    let mut late = spaced(20, 10);
    for request in &mut late.requests {
        request.arrival_time_ns.0 += 3_500_000_000;
        request.first_token_time_ns.as_mut().unwrap().0 += 3_500_000_000;
        request.completion_time_ns.as_mut().unwrap().0 += 3_500_000_000;
    }
    let error = compare(&[spaced(20, 10), late.clone()], &spaced(20, 10)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "real run 2: every arrival_time_ns is 3500 ms later than in real run 1: its clock is shifted; expected times \
         from the same start of the workload"
    );
    let error = compare(&[late], &spaced(20, 10)).unwrap_err().to_string();
    assert!(error.starts_with("the simulated run: every arrival_time_ns is 3500 ms earlier"), "{error}");
}

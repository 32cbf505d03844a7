//! Laws of everything that makes requests.

use std::collections::{BTreeMap, BTreeSet};

use plumbline_schema::{Nanos, Workload, WorkloadRequest};
use proptest::prelude::*;

use super::*;

const MANY: u64 = 200_000;

fn fixed(value: u32) -> CountDistribution {
    CountDistribution::Fixed { value }
}

fn short() -> Lengths {
    Lengths::Distributions { prefill: fixed(10), decode: fixed(5) }
}

/// Gaps between arrivals in seconds, the first from time 0.
fn gaps_s(workload: &Workload) -> Vec<f64> {
    let mut last = Nanos::ZERO;
    let gap = |request: &WorkloadRequest| {
        let gap = (request.arrival_time_ns - last).0 as f64 / 1e9;
        last = request.arrival_time_ns;
        gap
    };
    workload.requests.iter().map(gap).collect()
}

/// Mean and standard deviation.
fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    (mean, (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n).sqrt())
}

fn near(found: f64, expected: f64, share: f64) -> bool {
    (found - expected).abs() <= share * expected
}

/// Serves each request a while after it arrives, one after the other at `num_servers` places; returns what arrived
/// and the most that was under way at once.
fn serve(
    source: &mut dyn RequestSource,
    service: Nanos,
    num_servers: usize,
) -> (Vec<WorkloadRequest>, usize) {
    let mut places = vec![Nanos::ZERO; num_servers];
    let mut under_way: BTreeSet<(Nanos, u64)> = BTreeSet::new();
    let (mut taken, mut most) = (Vec::new(), 0);
    loop {
        let arrival = source.next_arrival();
        let done = under_way.first().copied();
        match (arrival, done) {
            (Some(arrival), done) if done.is_none_or(|(time, _)| arrival <= time) => {
                let request = source.take().expect("it was announced");
                assert_eq!(request.arrival_time_ns, arrival);
                let place = places.iter_mut().min().expect("a place");
                *place = (*place).max(arrival) + service;
                under_way.insert((*place, request.request_id));
                most = most.max(under_way.len());
                taken.push(request);
            }
            (_, Some((time, id))) => {
                under_way.pop_first();
                source.completed(id, time);
            }
            (_, None) => return (taken, most),
        }
    }
}

fn closed_loop(users: u32, think_time: Option<TimeDistribution>) -> WorkloadSpec {
    WorkloadSpec::new(500, Arrival::ClosedLoop { users, think_time }, short())
}

fn sessions(next_turn: NextTurn) -> WorkloadSpec {
    let uniform = |min, max| CountDistribution::Uniform { min, max };
    let lengths = Lengths::Distributions { prefill: uniform(1, 50), decode: uniform(1, 40) };
    WorkloadSpec {
        sessions: Some(Sessions {
            turns: uniform(1, 6),
            think_time: TimeDistribution::Exponential { mean_s: 2.0 },
            next_turn,
        }),
        prefixes: Some(Prefixes { count: 3, tokens: 64, exponent: 1.0 }),
        ..WorkloadSpec::new(600, Arrival::Poisson { rate_per_s: 5.0 }, lengths)
    }
}

fn any_arrival() -> impl Strategy<Value = Arrival> {
    let rate = 0.01_f64..1000.0;
    prop_oneof![
        Just(Arrival::Static {}),
        (1e-3_f64..10.0).prop_map(|interval_s| Arrival::Fixed { interval_s }),
        rate.clone().prop_map(|rate_per_s| Arrival::Poisson { rate_per_s }),
        (rate.clone(), 0.1_f64..4.0).prop_map(|(rate_per_s, cv)| Arrival::Gamma { rate_per_s, cv }),
        (rate.clone(), 0.0_f64..=1.0, 1.0_f64..1e5, -1e4_f64..1e4).prop_map(
            |(mean_rate_per_s, amplitude, period_s, peak_at_s)| Arrival::Diurnal {
                mean_rate_per_s,
                amplitude,
                period_s,
                peak_at_s
            }
        ),
        (rate.clone(), rate.clone(), any::<bool>()).prop_map(|(a, b, repeats)| Arrival::RateTable {
            rates: vec![
                RateFrom { from_s: 0.0, rate_per_s: a },
                RateFrom { from_s: 3.0, rate_per_s: 0.0 },
                RateFrom { from_s: 4.0, rate_per_s: b },
            ],
            period_s: repeats.then_some(6.0),
        }),
        (rate, 0.1_f64..20.0, 0.1_f64..20.0).prop_map(|(on_rate_per_s, mean_on_s, mean_off_s)| {
            Arrival::Burst { on_rate_per_s, off_rate_per_s: 0.0, mean_on_s, mean_off_s }
        }),
    ]
}

fn any_count(most: u32) -> impl Strategy<Value = CountDistribution> {
    let range = (1..most, 1..most).prop_map(|(a, b)| (a.min(b), a.max(b)));
    prop_oneof![
        (1..most).prop_map(|value| CountDistribution::Fixed { value }),
        range.clone().prop_map(|(min, max)| CountDistribution::Uniform { min, max }),
        (range, 0.0_f64..3.0).prop_map(|((min, max), exponent)| CountDistribution::Zipf {
            min,
            max,
            exponent
        }),
        (1.0_f64..200.0, 0.0_f64..1.5).prop_map(move |(median, sigma)| CountDistribution::LogNormal {
            median,
            sigma,
            min: 1,
            max: Some(most)
        }),
    ]
}

fn any_spec() -> impl Strategy<Value = WorkloadSpec> {
    let lengths = (any_count(300), any_count(300))
        .prop_map(|(prefill, decode)| Lengths::Distributions { prefill, decode });
    let too_long = prop_oneof![Just(TooLong::Drop), Just(TooLong::Resample), Just(TooLong::Clamp)];
    let prefixes = proptest::option::of(
        (1_u32..20, 1_u32..100, 0.0_f64..2.0).prop_map(|(count, tokens, exponent)| Prefixes {
            count,
            tokens,
            exponent,
        }),
    );
    let limit = proptest::option::of(250_u32..900);
    (any_arrival(), lengths, too_long, prefixes, limit, any::<bool>(), 1_u64..300).prop_map(
        |(arrival, lengths, too_long, prefixes, max_total_tokens, has_sessions, num_requests)| {
            let mut spec = WorkloadSpec::new(num_requests, arrival, lengths);
            (spec.prefixes, spec.max_total_tokens, spec.too_long) = (prefixes, max_total_tokens, too_long);
            spec.priorities =
                vec![Priority { priority: -1, weight: 1.0 }, Priority { priority: 7, weight: 3.0 }];
            if has_sessions && too_long != TooLong::Resample {
                spec.sessions = sessions(NextTurn::AfterArrival).sessions;
            }
            spec
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn generated_requests_keep_the_laws(spec in any_spec(), seed in any::<u64>()) {
        // Some limits no request can keep: those are refused, by their key.
        let source = match spec.open(seed) {
            Ok(source) => source,
            Err(ArrivalError::Spec(error)) => {
                prop_assert_eq!(error.key, "max_total_tokens");
                return Ok(());
            }
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        };
        let workload = spec.generate(seed).unwrap();
        prop_assert_eq!(workload.requests.len() as u64, spec.num_requests.unwrap());
        prop_assert_eq!(spec.generate(seed).unwrap().canonical_text(), workload.canonical_text());

        let mut streamed: Box<dyn RequestSource> = Box::new(source);
        prop_assert!(!streamed.heeds_completions());
        let (mut last, limit) = (Nanos::ZERO, spec.max_total_tokens.unwrap_or(u32::MAX));
        for (i, expected) in workload.requests.iter().enumerate() {
            prop_assert_eq!(streamed.remaining(), Some((workload.requests.len() - i) as u64));
            let next = streamed.next_arrival();
            let request = streamed.take().unwrap();
            prop_assert_eq!(&request, expected);
            prop_assert_eq!(next, Some(request.arrival_time_ns));
            prop_assert!(request.arrival_time_ns >= last);
            last = request.arrival_time_ns;
            prop_assert_eq!(request.request_id, i as u64);
            prop_assert!(request.num_prefill_tokens >= 1 && request.num_decode_tokens >= 1);
            prop_assert!(request.num_prefill_tokens + request.num_decode_tokens <= limit);
            prop_assert!([-1, 7].contains(&request.priority));
            let prefix = spec.prefixes.map_or(0, |prefixes| prefixes.tokens);
            prop_assert!(request.num_prefill_tokens > prefix);
        }
        prop_assert!(streamed.next_arrival().is_none() && streamed.take().is_none());
        prop_assert_eq!(streamed.remaining(), Some(0));

        // A file holds all of it.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.csv");
        workload.write(&path).unwrap();
        prop_assert_eq!(Workload::read(&path).unwrap(), workload);
    }

    #[test]
    fn a_longer_workload_begins_as_the_shorter(spec in any_spec(), seed in any::<u64>()) {
        let longer = WorkloadSpec { num_requests: Some(spec.num_requests.unwrap() * 2), ..spec.clone() };
        if let (Ok(short), Ok(long)) = (spec.generate(seed), longer.generate(seed)) {
            prop_assert_eq!(&short.requests[..], &long.requests[..short.requests.len()]);
        }
    }

    #[test]
    fn a_closed_loop_has_no_more_under_way_than_users(
        users in 1_u32..40,
        think_s in proptest::option::of(0.0_f64..5.0),
        service_ns in 1_u64..3_000_000_000,
        num_servers in 1_usize..50,
        seed in any::<u64>(),
    ) {
        let think_time = think_s.map(|value_s| TimeDistribution::Fixed { value_s });
        let spec = closed_loop(users, think_time);
        let mut source = spec.source(seed).unwrap();
        prop_assert!(source.heeds_completions());
        let (taken, most) = serve(&mut *source, Nanos(service_ns), num_servers);
        prop_assert_eq!(taken.len(), 500);
        prop_assert!(most <= users as usize);
        if think_s.is_none() {
            prop_assert_eq!(most, users as usize);
        }
        prop_assert!(taken.windows(2).all(|pair| pair[0].arrival_time_ns <= pair[1].arrival_time_ns));
        prop_assert_eq!(source.remaining(), Some(0));
    }

    #[test]
    fn sessions_grow_and_share_what_came_before(
        seed in any::<u64>(),
        waits in any::<bool>(),
        users in proptest::option::of(1_u32..20),
        limit in proptest::option::of(200_u32..400),
        service_ns in 1_u64..3_000_000_000,
    ) {
        let next_turn =
            if waits || users.is_some() { NextTurn::AfterCompletion } else { NextTurn::AfterArrival };
        let mut spec = WorkloadSpec { max_total_tokens: limit, ..sessions(next_turn) };
        if let Some(users) = users {
            spec.arrival = Arrival::ClosedLoop { users, think_time: None };
        }
        let (taken, _) = serve(&mut *spec.source(seed).unwrap(), Nanos(service_ns), 4);
        prop_assert_eq!(taken.len(), 600);
        let mut turns: BTreeMap<u64, Vec<&WorkloadRequest>> = BTreeMap::new();
        for request in &taken {
            let content = request.content.as_deref().unwrap();
            turns.entry(content.session_id.unwrap()).or_default().push(request);
        }
        prop_assert!(turns.values().any(|turns| turns.len() > 1));
        for turns in turns.values() {
            prop_assert!(turns.len() <= 6 && turns[0].num_prefill_tokens > 64);
            for pair in turns.windows(2) {
                let (before, after) = (pair[0], pair[1]);
                let shared = before.num_prefill_tokens + before.num_decode_tokens;
                prop_assert!(after.num_prefill_tokens > shared);
                let mut position = 0;
                while position < shared {
                    let (a, b) = (before.content_run(position), after.content_run(position));
                    prop_assert_eq!(a, b);
                    position = a.end.min(shared);
                }
                if next_turn == NextTurn::AfterCompletion {
                    prop_assert!(after.arrival_time_ns.0 >= before.arrival_time_ns.0 + service_ns);
                }
            }
        }
    }
}

#[test]
fn what_a_session_asks_for_does_not_depend_on_the_server() {
    let spec = sessions(NextTurn::AfterCompletion);
    let asked = |service: Nanos, places: usize| {
        let mut lengths: BTreeMap<(u64, u32), u32> = BTreeMap::new();
        for request in serve(&mut *spec.source(3).unwrap(), service, places).0 {
            let id = request.content.as_deref().and_then(|content| content.session_id).unwrap();
            lengths.insert((id, request.num_prefill_tokens), request.num_decode_tokens);
        }
        lengths
    };
    let (fast, slow) = (asked(Nanos(1), 9), asked(Nanos(700_000_000), 3));
    assert_ne!(fast.keys().max(), slow.keys().max());
    let common = fast.iter().filter(|(key, _)| key.0 < 50 && slow.contains_key(key));
    let (common, equal): (Vec<_>, Vec<_>) = common.map(|(key, decode)| ((), slow[key] == *decode)).unzip();
    assert!(common.len() > 50 && equal.into_iter().all(|is_equal| is_equal));
}

#[test]
fn poisson_and_gamma_gaps_have_the_mean_and_spread_asked_for() {
    let cases = [
        (Arrival::Poisson { rate_per_s: 4.0 }, 4.0, 1.0),
        (Arrival::Gamma { rate_per_s: 4.0, cv: 1.0 }, 4.0, 1.0),
        (Arrival::Gamma { rate_per_s: 40.0, cv: 0.25 }, 40.0, 0.25),
        (Arrival::Gamma { rate_per_s: 0.5, cv: 2.0 }, 0.5, 2.0),
    ];
    for (arrival, rate, cv) in cases {
        let gaps = gaps_s(&WorkloadSpec::new(MANY, arrival.clone(), short()).generate(1).unwrap());
        let (mean, deviation) = moments(&gaps);
        assert!(near(mean, 1.0 / rate, 0.01), "{arrival:?}: {mean}");
        assert!(near(deviation / mean, cv, 0.02), "{arrival:?}: {}", deviation / mean);
        if (cv - 1.0).abs() < f64::EPSILON {
            // e^-3 of the gaps are longer than three means: 4.98 %.
            let long = gaps.iter().filter(|gap| **gap * rate > 3.0).count() as f64 / gaps.len() as f64;
            assert!(near(long, (-3.0_f64).exp(), 0.05), "{arrival:?}: {long}");
        }
    }
}

#[test]
fn changing_rates_are_kept_on_the_whole_and_in_their_parts() {
    let arrival =
        Arrival::Diurnal { mean_rate_per_s: 20.0, amplitude: 0.8, period_s: 1000.0, peak_at_s: 250.0 };
    let spec = WorkloadSpec {
        num_requests: None,
        duration_s: Some(10_000.0),
        ..WorkloadSpec::new(1, arrival, short())
    };
    let times: Vec<f64> = spec
        .generate(2)
        .unwrap()
        .requests
        .iter()
        .map(|request| request.arrival_time_ns.0 as f64 / 1e9)
        .collect();
    assert!(near(times.len() as f64, 200_000.0, 0.01), "{}", times.len());
    // Over the half of a period around the peak the mean is 1 + 0.8 (2 / pi) of the whole.
    let around = times.iter().filter(|time| **time % 1000.0 < 500.0).count() as f64 / times.len() as f64;
    let expected = f64::midpoint(1.0, 0.8 * 2.0 / std::f64::consts::PI);
    assert!(near(around, expected, 0.01), "{around}, expected {expected}");

    let rate = |from_s, rate_per_s| RateFrom { from_s, rate_per_s };
    let table = |period_s, duration_s| {
        let rates = vec![rate(0.0, 30.0), rate(10.0, 0.0), rate(15.0, 6.0)];
        let arrival = Arrival::RateTable { rates, period_s };
        let spec = WorkloadSpec {
            num_requests: None,
            duration_s: Some(duration_s),
            ..WorkloadSpec::new(1, arrival, short())
        };
        spec.generate(5).unwrap()
    };
    let repeated = table(Some(20.0), 12_000.0);
    let in_part = |from: u64, to: u64| {
        let part = |request: &&WorkloadRequest| {
            (from..to).contains(&(request.arrival_time_ns.0 % 20_000_000_000 / 1_000_000_000))
        };
        repeated.requests.iter().filter(part).count() as f64
    };
    assert!(near(in_part(0, 10), 600.0 * 300.0, 0.01) && near(in_part(15, 20), 600.0 * 30.0, 0.03));
    assert!(in_part(10, 15) < f64::EPSILON);
    let once = table(None, 10_015.0);
    assert!(near(once.requests.len() as f64, 300.0 + 60_000.0, 0.02), "{}", once.requests.len());
}

#[test]
fn bursts_keep_the_mean_rate_and_are_burstier_than_poisson() {
    let arrival =
        Arrival::Burst { on_rate_per_s: 50.0, off_rate_per_s: 2.0, mean_on_s: 1.0, mean_off_s: 3.0 };
    let workload = WorkloadSpec::new(MANY, arrival, short()).generate(9).unwrap();
    let (mean, deviation) = moments(&gaps_s(&workload));
    // (50 x 1 + 2 x 3) requests in 4 s on average.
    assert!(near(mean, 4.0 / 56.0, 0.02), "{mean}");
    assert!(deviation / mean > 1.5, "{}", deviation / mean);
}

#[test]
fn lengths_follow_their_distributions() {
    let draw = |prefill: CountDistribution| -> Vec<u32> {
        let lengths = Lengths::Distributions { prefill, decode: fixed(1) };
        let workload = WorkloadSpec::new(MANY, Arrival::Static {}, lengths).generate(4).unwrap();
        workload.requests.iter().map(|request| request.num_prefill_tokens).collect()
    };
    let share = |drawn: &[u32], value: u32| {
        drawn.iter().filter(|found| **found == value).count() as f64 / drawn.len() as f64
    };
    let uniform = draw(CountDistribution::Uniform { min: 3, max: 12 });
    assert!((3..=12).all(|value| near(share(&uniform, value), 0.1, 0.05)));
    assert!(uniform.iter().all(|found| (3..=12).contains(found)));
    let zipf = draw(CountDistribution::Zipf { min: 5, max: 104, exponent: 1.2 });
    let weight = |rank: u32| f64::from(rank).powf(-1.2);
    let sum: f64 = (1..=100).map(weight).sum();
    for rank in [1, 2, 3, 10] {
        let found = share(&zipf, rank + 4);
        assert!(near(found, weight(rank) / sum, 0.05), "rank {rank}: {found}");
    }
    assert!(zipf.iter().all(|found| (5..=104).contains(found)));
    let logs: Vec<f64> = draw(CountDistribution::LogNormal { median: 900.0, sigma: 0.7, min: 1, max: None })
        .iter()
        .map(|found| f64::from(*found).ln())
        .collect();
    let (mean, deviation) = moments(&logs);
    assert!((mean - 900.0_f64.ln()).abs() < 0.01 && near(deviation, 0.7, 0.01), "{mean} {deviation}");
}

#[test]
fn what_is_too_long_is_counted_and_only_changed_when_asked() {
    let lengths = || Lengths::Distributions {
        prefill: CountDistribution::Uniform { min: 1, max: 100 },
        decode: CountDistribution::Uniform { min: 1, max: 100 },
    };
    let of = |too_long| {
        let spec = WorkloadSpec {
            max_total_tokens: Some(101),
            too_long,
            ..WorkloadSpec::new(20_000, Arrival::Poisson { rate_per_s: 10.0 }, lengths())
        };
        let (workload, counts) = spec.generate_counted(8).unwrap();
        (workload.summary(), counts)
    };
    let (dropped, counts) = of(TooLong::Drop);
    // 5050 of 10000 pairs fit, so that as many arrivals are left out as are kept, nearly.
    assert!(near(counts.num_dropped as f64, 20_000.0 * 4950.0 / 5050.0, 0.03), "{counts:?}");
    assert!(near(dropped.mean_rate_per_s.unwrap(), 5.05, 0.03));
    assert_eq!((counts.num_resampled, counts.num_clamped), (0, 0));
    let (resampled, counts) = of(TooLong::Resample);
    assert!(near(resampled.mean_rate_per_s.unwrap(), 10.0, 0.03) && counts.num_resampled > 18_000);
    assert_eq!((counts.num_dropped, counts.num_clamped), (0, 0));
    let (clamped, counts) = of(TooLong::Clamp);
    assert!(near(counts.num_clamped as f64, 20_000.0 * 0.495, 0.03), "{counts:?}");
    // Outputs stay: the prompt is what is shortened.
    assert!(near(clamped.num_decode_tokens.mean, 50.5, 0.01));
    assert_eq!((counts.num_dropped, counts.num_resampled), (0, 0));
}

#[test]
fn popular_prefixes_and_heavy_priorities_come_more_often() {
    let spec = WorkloadSpec {
        prefixes: Some(Prefixes { count: 4, tokens: 32, exponent: 1.0 }),
        priorities: vec![Priority { priority: 5, weight: 1.0 }, Priority { priority: 0, weight: 3.0 }],
        ..WorkloadSpec::new(40_000, Arrival::Static {}, short())
    };
    let workload = spec.generate(6).unwrap();
    let share = |is: &dyn Fn(&WorkloadRequest) -> bool| {
        workload.requests.iter().filter(|request| is(request)).count() as f64 / 40_000.0
    };
    let sum = 1.0 + 1.0 / 2.0 + 1.0 / 3.0 + 1.0 / 4.0;
    for id in 0..4_u64 {
        let found = share(&|r| r.content.as_ref().is_some_and(|content| content.prefix_id == Some(id)));
        assert!(near(found, 1.0 / (id + 1) as f64 / sum, 0.03), "{id}: {found}");
    }
    assert!(near(share(&|r| r.priority == 0), 0.75, 0.02));
    assert!(workload.requests.iter().all(|request| request.num_prefill_tokens == 42));
}

#[test]
fn a_list_is_refused_where_arrivals_wait_for_answers() {
    for spec in [closed_loop(3, None), sessions(NextTurn::AfterCompletion)] {
        assert!(matches!(spec.generate(0), Err(ArrivalError::HeedsCompletions)));
    }
}

#[test]
fn a_duration_ends_closed_loops_too() {
    let spec = WorkloadSpec { num_requests: None, duration_s: Some(10.0), ..closed_loop(3, None) };
    let (taken, _) = serve(&mut *spec.source(0).unwrap(), Nanos(1_000_000_000), 3);
    assert_eq!(taken.len(), 30);
}

#[test]
fn a_workload_comes_in_its_order() {
    let requests = vec![WorkloadRequest::new(4, Nanos(1), 2, 3), WorkloadRequest::new(2, Nanos(1), 5, 6)];
    let mut source: Box<dyn RequestSource> =
        Box::new(WorkloadSource::new(Workload { requests: requests.clone() }));
    let mut taken = Vec::new();
    while let Some(time) = source.next_arrival() {
        assert_eq!(source.remaining(), Some(2 - taken.len() as u64));
        taken.extend(source.take());
        assert_eq!(taken.last().map(|request| request.arrival_time_ns), Some(time));
    }
    assert_eq!(taken, requests);
    assert!(source.take().is_none() && !source.heeds_completions());
}

use rand_distr::{Distribution, StandardNormal};

use super::{super::rows, *};
use crate::{compare::MetricRow, metrics::RequestSample};

fn normal(rng: &mut Pcg64) -> f64 {
    StandardNormal.sample(rng)
}

fn run_of(requests: Vec<RequestSample>) -> RunMetrics {
    RunMetrics { requests, has_token_times: true, ..RunMetrics::default() }
}

/// Runs of the same requests: `num` of them, each slower or faster as a whole by `run_sigma`, each request by
/// `request_sigma`; all `factor` times as long as they are in truth.
fn runs(rng: &mut Pcg64, sizes: &[f64], num: usize, factor: f64, run_sigma: f64) -> Vec<RunMetrics> {
    let one = |rng: &mut Pcg64| {
        let run = factor * (run_sigma * normal(rng)).exp();
        let requests = sizes.iter().enumerate().map(|(i, size)| {
            let value = |rng: &mut Pcg64| 1e6 * size * run * (0.1 * normal(rng)).exp();
            let (ttft_ns, own) = (20.0 * value(rng), value(rng));
            let gaps_ns: Vec<_> = (0..20).map(|_| own * (0.1 * normal(rng)).exp()).collect();
            let e2e_ns = ttft_ns + gaps_ns.iter().sum::<f64>();
            RequestSample { request_id: i as u64, ttft_ns, tpot_ns: Some(own), e2e_ns, gaps_ns }
        });
        run_of(requests.collect())
    };
    (0..num).map(|_| one(rng)).collect()
}

fn sizes(rng: &mut Pcg64, num: usize) -> Vec<f64> {
    (0..num).map(|_| (0.5 * normal(rng)).exp()).collect()
}

fn row_of(metric: Metric, stat: Stat, real: &[RunMetrics], sims: &[RunMetrics]) -> MetricRow {
    let ids: Vec<_> = real[0].requests.iter().map(|r| r.request_id).collect();
    let resamples = Resamples::draw(&ids, real.len(), sims.len());
    let rows = rows(metric, real, sims, resamples.as_ref());
    rows.into_iter().find(|row| row.stat == stat).unwrap()
}

fn interval(row: &MetricRow) -> (f64, f64) {
    (row.error_low_pct.unwrap(), row.error_high_pct.unwrap())
}

/// Share of 200 worlds in which the interval holds the true error of +10 %.
fn share_covered(metric: Metric, stat: Stat, num_real: usize, run_sigma: f64) -> f64 {
    const WORLDS: u64 = 200;
    let is_covered = |world: u64| {
        let mut rng = Pcg64::new(world.into(), 7);
        let sizes = sizes(&mut rng, 120);
        let real = runs(&mut rng, &sizes, num_real, 1.0, run_sigma);
        let sims = runs(&mut rng, &sizes, 5, 1.1, 0.002);
        let (low, high) = interval(&row_of(metric, stat, &real, &sims));
        (low..=high).contains(&10.0)
    };
    (0..WORLDS).filter(|&world| is_covered(world)).count() as f64 / WORLDS as f64
}

#[test]
fn intervals_hold_the_true_error_as_often_as_they_say() {
    for (metric, stat) in [
        (Metric::Ttft, Stat::Mean),
        (Metric::Ttft, Stat::P50),
        (Metric::E2e, Stat::P90),
        (Metric::Itl, Stat::P50),
        (Metric::Itl, Stat::P99),
    ] {
        let share = share_covered(metric, stat, 1, 0.0);
        assert!((0.90..=0.99).contains(&share), "one run, {metric} {stat}: {share}");
    }
}

#[test]
fn repeats_that_differ_widen_the_interval_and_it_still_holds() {
    // On the safe side where repeats differ little: what requests do to each repeat is then counted twice.
    for (num_real, run_sigma, least) in [(2, 0.005, 0.93), (6, 0.02, 0.93), (3, 0.06, 0.85), (6, 0.06, 0.88)]
    {
        let share = share_covered(Metric::Ttft, Stat::P50, num_real, run_sigma);
        assert!(share >= least, "{num_real} repeats that differ by {run_sigma}: {share}");
    }
    let width = |run_sigma| {
        let mut rng = Pcg64::new(3, 0);
        let sizes = sizes(&mut rng, 120);
        let real = runs(&mut rng, &sizes, 4, 1.0, run_sigma);
        let sims = runs(&mut rng, &sizes, 5, 1.1, 0.0);
        let (low, high) = interval(&row_of(Metric::Ttft, Stat::Mean, &real, &sims));
        high - low
    };
    assert!(width(0.1) > 2.0 * width(0.0), "{} {}", width(0.1), width(0.0));
}

#[test]
fn gaps_are_drawn_with_their_requests() {
    // Twenty gaps that are all the same say no more than one: the interval of ITL is as wide as that of TPOT.
    let mut rng = Pcg64::new(1, 0);
    let sizes = sizes(&mut rng, 100);
    let same_gaps = |runs: Vec<RunMetrics>| -> Vec<RunMetrics> {
        let flatten = |mut run: RunMetrics| {
            for request in &mut run.requests {
                request.gaps_ns = vec![request.tpot_ns.unwrap(); 20];
            }
            run
        };
        runs.into_iter().map(flatten).collect()
    };
    let real = same_gaps(runs(&mut rng, &sizes, 1, 1.0, 0.0));
    let sims = same_gaps(runs(&mut rng, &sizes, 1, 1.2, 0.0));
    let width = |metric| {
        let (low, high) = interval(&row_of(metric, Stat::P50, &real, &sims));
        high - low
    };
    let ratio = width(Metric::Itl) / width(Metric::Tpot);
    assert!((0.8..1.25).contains(&ratio), "{ratio}");
}

/// A statistic of a resample the slow way.
fn slowly(stat: Stat, samples: &UnitSamples, weights: &[u32]) -> f64 {
    let all: Vec<f64> = samples
        .sorted
        .iter()
        .flat_map(|&(value, unit)| std::iter::repeat_n(value, weights[unit as usize] as usize))
        .collect();
    stat.of_sorted(&all).unwrap()
}

fn spread(values: impl Iterator<Item = f64>) -> f64 {
    let values: Vec<_> = values.collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}

#[test]
fn influences_scatter_statistics_as_sorting_each_resample_would() {
    let mut rng = Pcg64::new(5, 0);
    let sizes = sizes(&mut rng, 400);
    let run = &runs(&mut rng, &sizes, 1, 1.0, 0.0)[0];
    let ids: Vec<_> = (0..400).collect();
    let resamples = Resamples::draw(&ids, 1, 1).unwrap();
    for metric in [Metric::Ttft, Metric::Itl] {
        let samples = resamples.samples(run, metric);
        for stat in Stat::ALL {
            let influence = samples.influence(stat).unwrap();
            let weights = || resamples.weights.chunks(resamples.num_units);
            let dot = |weights: &[u32]| weights.iter().zip(&influence).map(|(&w, i)| f64::from(w) * i).sum();
            let (fast, slow) =
                (spread(weights().map(dot)), spread(weights().map(|w| slowly(stat, &samples, w).ln())));
            // Four requests lie beyond p99: their distances from each other are no slope to speak of, and the far one counts.
            let most = if stat == Stat::P99 { 2.0 } else { 1.33 };
            assert!((0.75..most).contains(&(fast / slow)), "{metric} {stat}: {fast} {slow}");
        }
    }
}

#[test]
fn many_requests_are_drawn_as_neighbours_and_few_have_no_interval() {
    let ids: Vec<u64> = (0..10_000).collect();
    let resamples = Resamples::draw(&ids, 1, 1).unwrap();
    assert_eq!(resamples.num_units, 500);
    assert_eq!((resamples.unit_of[&0], resamples.unit_of[&19], resamples.unit_of[&20]), (0, 0, 1));
    assert!(Resamples::draw(&ids[..MIN_INTERVAL_REQUESTS - 1], 1, 1).is_none());
    let mut rng = Pcg64::new(2, 0);
    let few = runs(&mut rng, &[1.0, 2.0], 1, 1.0, 0.0);
    let row = row_of(Metric::Ttft, Stat::P50, &few, &few);
    assert_eq!((row.error_low_pct, row.noise_pct), (None, None));
    assert_eq!(
        row.bands_na_reason.as_deref(),
        Some(
            "no noise floor: it wants 2 real repeats, there is 1; \
             no interval: it wants 8 requests, there are 2"
        )
    );
}

#[test]
fn the_same_runs_have_the_same_interval_around_their_error() {
    let mut rng = Pcg64::new(4, 0);
    let sizes = sizes(&mut rng, 50);
    let real = runs(&mut rng, &sizes, 2, 1.0, 0.01);
    let sims = runs(&mut rng, &sizes, 2, 0.9, 0.0);
    for (metric, stat) in [(Metric::Ttft, Stat::Mean), (Metric::E2e, Stat::P90), (Metric::Itl, Stat::P99)] {
        let row = row_of(metric, stat, &real, &sims);
        assert_eq!(row, row_of(metric, stat, &real, &sims));
        let (low, high) = interval(&row);
        assert!(low <= row.error_pct.unwrap() && row.error_pct.unwrap() <= high && low < high, "{row:?}");
        let range = row.real_max_ms.unwrap() - row.real_min_ms.unwrap();
        let expected = 50.0 * range / row.real_ms.unwrap();
        assert!((row.noise_pct.unwrap() - expected).abs() < 1e-9);
    }
}

//! Whether the requests in an engine became more and more.

use plumbline_schema::Nanos;
use serde::{Deserialize, Serialize};

use crate::{
    output::Reporter,
    recorder::{Outcome, Recorder, StepRecord},
    replica::RequestIds,
    scheduler::ScheduledStep,
    serve::StepSpan,
};

/// Requests in the engine, waiting or served, as arriving requests find them.
///
/// The first quarter of the arrivals, in which an empty engine fills, counts for nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Backlog {
    /// Mean over the second, third and fourth quarter of the arrivals.
    pub quarter_means: [f64; 3],
    /// The most that an arrival found.
    pub max: u64,
    /// Arrivals.
    pub num_arrivals: u64,
}

/// Growth a request from which on a backlog is not a stable queue's: an engine that serves 2 % less than comes.
const MIN_GROWTH_PER_ARRIVAL: f64 = 0.02;

/// Growth that chance does not explain, in standard deviations of a Poisson number with the second quarter's mean: that
/// of the requests found in an engine with room for all of them (M/G/infinity).
const MIN_DEVIATIONS: f64 = 3.0;

/// Share of the growth from the second quarter to the fourth that the fourth must have, for it to go on: with steady
/// growth it is half, with an engine still filling up in the third quarter next to none.
const MIN_LAST_SHARE: f64 = 0.25;

impl Backlog {
    /// From when requests came and went.
    #[must_use]
    pub fn of(mut stays: Vec<(Nanos, Nanos)>) -> Self {
        stays.sort_unstable();
        let mut ends: Vec<Nanos> = stays.iter().map(|&(_, end)| end).collect();
        ends.sort_unstable();
        let (mut num_ended, mut max) = (0, 0);
        let mut found = Vec::with_capacity(stays.len());
        for (num_before, &(arrival, _)) in stays.iter().enumerate() {
            num_ended += ends[num_ended..].iter().take_while(|&&end| end <= arrival).count();
            let backlog = (num_before - num_ended) as u64;
            max = max.max(backlog);
            found.push(backlog);
        }
        let n = found.len();
        let mean = |quarter: usize| {
            let part = &found[quarter * n / 4..(quarter + 1) * n / 4];
            part.iter().sum::<u64>() as f64 / part.len().max(1) as f64
        };
        Self { quarter_means: [1, 2, 3].map(mean), max, num_arrivals: n as u64 }
    }

    /// From the second quarter to the fourth.
    #[must_use]
    pub fn growth(&self) -> f64 {
        self.quarter_means[2] - self.quarter_means[0]
    }

    /// Whether more came than was served, beyond what chance makes of a stable queue, and to the end: then latencies
    /// tell how long the run was and not what the engine bears.
    #[must_use]
    pub fn is_growing(&self) -> bool {
        let [second, third, fourth] = self.quarter_means;
        let growth = self.growth();
        growth > MIN_GROWTH_PER_ARRIVAL * self.num_arrivals as f64 / 2.0
            && growth > MIN_DEVIATIONS * second.max(1.0).sqrt()
            && fourth - third > MIN_LAST_SHARE * growth
    }
}

/// Keeps the distributions of a simulation, and when requests came and went.
pub(super) struct BacklogRecorder {
    pub reporter: Reporter,
    pub stays: Vec<(Nanos, Nanos)>,
    pub num_output_tokens: u64,
    pub num_rejected: u64,
}

impl BacklogRecorder {
    pub(super) fn new() -> Self {
        Self { reporter: Reporter::without_files(), stays: Vec::new(), num_output_tokens: 0, num_rejected: 0 }
    }
}

impl Recorder for BacklogRecorder {
    fn wants_batches(&self) -> bool {
        self.reporter.wants_batches()
    }

    fn step(&mut self, record: &StepRecord<'_>, step: &ScheduledStep, requests: &RequestIds<'_>) {
        self.reporter.step(record, step, requests);
    }

    fn step_end(&mut self, replica: u32, number: u32, start: Nanos, end: Nanos) {
        self.reporter.step_end(replica, number, start, end);
    }

    fn decode_steps(&mut self, replica: u32, first_number: u32, steps: &[StepSpan], num_seqs: u32) {
        self.reporter.decode_steps(replica, first_number, steps, num_seqs);
    }

    fn gaps(&mut self, gap: Nanos, count: u32) {
        self.reporter.gaps(gap, count);
    }

    fn request(&mut self, outcome: Outcome) {
        if let Some(end) = outcome.last_token {
            self.stays.push((outcome.request.arrival_time_ns, end));
            self.num_output_tokens += u64::from(outcome.num_tokens);
        }
        self.num_rejected += u64::from(outcome.rejection.is_some());
        self.reporter.request(outcome);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand_distr::{Distribution, Exp1};

    use super::*;
    use crate::residual::stream;

    /// A single server of mean service time 1 s with Poisson arrivals of `load` requests a second.
    fn queue(load: f64, n: usize, seed: u64) -> Backlog {
        let (mut rng, mut now, mut free) = (stream(seed, "queue"), 0.0_f64, 0.0_f64);
        let mut draw = || -> f64 { Exp1.sample(&mut rng) };
        let stays = (0..n).map(|_| {
            now += draw() / load;
            free = free.max(now) + draw();
            (Nanos::from_f64(now * 1e9), Nanos::from_f64(free * 1e9))
        });
        Backlog::of(stays.collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// What a scan of all stays finds.
        #[test]
        fn arrivals_find_who_is_there(stays in prop::collection::vec((0..1000_u64, 1..300_u64), 0..60)) {
            let stays: Vec<_> = stays.into_iter().map(|(at, takes)| (Nanos(at), Nanos(at + takes))).collect();
            let max = stays.iter().map(|&(at, _)| {
                // Of those that arrive together each but one finds another.
                let before = stays.iter().filter(|&&(other, _)| other < at).count();
                let gone = stays.iter().filter(|&&(_, end)| end <= at).count();
                before + stays.iter().filter(|&&(other, _)| other == at).count() - 1 - gone
            });
            prop_assert_eq!(Backlog::of(stays.clone()).max, max.max().unwrap_or(0) as u64);
        }

        #[test]
        fn queues_are_told_apart(seed in any::<u64>()) {
            prop_assert!(!queue(0.7, 2000, seed).is_growing(), "{:?}", queue(0.7, 2000, seed));
            prop_assert!(queue(1.4, 2000, seed).is_growing(), "{:?}", queue(1.4, 2000, seed));
        }
    }

    #[test]
    fn an_engine_that_fills_is_stable_once_it_is_full_and_not_before() {
        let stays = |stay: u64| (0..1000).map(|i| (Nanos(i), Nanos(i + stay))).collect();
        let full = Backlog::of(stays(400));
        assert_eq!((full.quarter_means[1], full.quarter_means[2], full.max), (399.0, 399.0, 399));
        assert!(!full.is_growing() && Backlog::of(stays(1)).max == 0);
        assert!(Backlog::of(stays(5000)).is_growing());
        assert!(!Backlog::of(Vec::new()).is_growing());
    }
}

//! The steps of a real and a simulated run in a window of time that shows something.

use plumbline_schema::{Run, StepMetrics};

/// Steps of the real run that a window holds, about: more are not told apart, fewer show little.
const NUM_STEPS: usize = 200;

/// The most steps kept of a side; a simulation in tiny steps is cut.
const MAX_STEPS: usize = 4 * NUM_STEPS;

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimelineStep {
    /// Its start, from the run's.
    pub start_ns: u64,
    /// When its tokens were out.
    pub end_ns: u64,
    /// Tokens of its prefill chunks.
    pub prefill_tokens: u32,
    /// Its decodes, of one token each.
    pub decode_tokens: u32,
    /// Its sequences.
    pub num_seqs: u32,
}

impl TimelineStep {
    fn of(step: &StepMetrics) -> Self {
        let load = step.batch.shape().attention;
        Self {
            start_ns: step.step_start_ns.0,
            end_ns: step.end_ns().0,
            prefill_tokens: load.num_prefill_tokens,
            decode_tokens: load.num_decode_seqs,
            num_seqs: load.num_prefill_seqs + load.num_decode_seqs,
        }
    }

    /// Tokens computed in it.
    #[must_use]
    pub fn num_tokens(&self) -> u32 {
        self.prefill_tokens.saturating_add(self.decode_tokens)
    }

    /// Start and end in ms.
    pub(crate) fn span_ms(&self) -> (f64, f64) {
        (self.start_ns as f64 / 1e6, self.end_ns as f64 / 1e6)
    }
}

/// A window and the steps that start in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeline {
    /// Its start, from the runs' start.
    pub start_ns: u64,
    /// Its end.
    pub end_ns: u64,
    /// Whether it holds every step.
    pub is_whole: bool,
    /// Real steps; empty when not recorded.
    pub real: Vec<TimelineStep>,
    /// Simulated steps; empty when not recorded.
    pub sim: Vec<TimelineStep>,
}

impl Timeline {
    /// The window of about 200 steps in which the real run computes the most tokens, or the simulated one where the real
    /// one does not record steps; none when neither does.
    #[must_use]
    pub fn busiest(real: &Run, sim: &Run) -> Option<Self> {
        let decides = if real.steps.is_empty() { &sim.steps } else { &real.steps };
        let (from, to) = busiest_window(decides)?;
        let within = |steps: &[StepMetrics]| -> Vec<TimelineStep> {
            let first = steps.partition_point(|step| step.step_start_ns.0 < from);
            let after = steps.partition_point(|step| step.step_start_ns.0 < to);
            steps[first..after].iter().take(MAX_STEPS).map(TimelineStep::of).collect()
        };
        let (shown_real, shown_sim) = (within(&real.steps), within(&sim.steps));
        let end_ns = shown_real.iter().chain(&shown_sim).map(|step| step.end_ns).max()?;
        let is_whole = shown_real.len() == real.steps.len() && shown_sim.len() == sim.steps.len();
        Some(Self { start_ns: from, end_ns, is_whole, real: shown_real, sim: shown_sim })
    }
}

/// Start, and the first time after it, of the window; its length is that of 200 median steps, but at most the run's.
fn busiest_window(steps: &[StepMetrics]) -> Option<(u64, u64)> {
    let (first, last) = (steps.first()?, steps.last()?);
    let mut durations: Vec<u64> = steps.iter().map(|step| step.step_duration_ns.0).collect();
    durations.sort_unstable();
    // Idle time between steps belongs to a run of few requests; steps close to each other set the pace.
    let length = durations[durations.len() / 2].max(1).saturating_mul(NUM_STEPS as u64);
    if steps.len() <= NUM_STEPS && last.end_ns().0.saturating_sub(first.step_start_ns.0) <= 4 * length {
        let (from, to) = (first.step_start_ns.0, last.end_ns().0);
        // A simulation that takes longer is shown to its end as well.
        return Some((from, to.saturating_add((to - from) / 2).saturating_add(1)));
    }
    let tokens: Vec<u64> =
        steps.iter().map(|step| u64::from(step.batch.shape().attention.num_tokens())).collect();
    let (mut begin, mut sum) = (0, 0);
    let mut best = (0, 0);
    for (end, step) in steps.iter().enumerate() {
        sum += tokens[end];
        while step.step_start_ns.0 - steps[begin].step_start_ns.0 >= length {
            sum -= tokens[begin];
            begin += 1;
        }
        if sum > best.0 {
            best = (sum, begin);
        }
    }
    let from = steps[best.1].step_start_ns.0;
    Some((from, from.saturating_add(length)))
}

#[cfg(test)]
mod tests {
    use plumbline_schema::{Nanos, StepBatch};

    use super::*;
    use crate::testing::run;

    const STEP_NS: u64 = 10_000_000;

    /// Steps back to back, each of so many decodes.
    fn steps(decodes: impl Iterator<Item = usize>) -> Vec<StepMetrics> {
        decodes
            .enumerate()
            .map(|(i, decodes)| StepMetrics {
                step_start_ns: Nanos(i as u64 * STEP_NS),
                step_duration_ns: Nanos(STEP_NS),
                schedule_ns: Nanos::ZERO,
                batch: StepBatch { decode_contexts: vec![7; decodes], ..StepBatch::default() },
                requests: None,
                phases: None,
            })
            .collect()
    }

    fn run_of(steps: Vec<StepMetrics>) -> Run {
        Run { steps, ..run(Vec::new()).with_tokens() }
    }

    #[test]
    fn the_busiest_steps_of_the_real_run_are_shown_of_both() {
        let busy = 500..700;
        let real = run_of(steps((0..1000).map(|i| if busy.contains(&i) { 9 } else { 1 })));
        let sim = run_of(steps((0..1000).map(|_| 2)));
        let timeline = Timeline::busiest(&real, &sim).unwrap();
        assert_eq!((timeline.start_ns, timeline.end_ns), (500 * STEP_NS, 700 * STEP_NS));
        assert_eq!((timeline.real.len(), timeline.sim.len(), timeline.is_whole), (200, 200, false));
        assert!(timeline.real.iter().all(|step| step.num_tokens() == 9 && step.num_seqs == 9));
    }

    #[test]
    fn a_short_run_is_shown_whole_and_one_without_steps_by_the_other() {
        let real = run_of(steps([3, 2, 1].into_iter()));
        let timeline = Timeline::busiest(&real, &run_of(Vec::new())).unwrap();
        assert_eq!((timeline.real.len(), timeline.sim.len(), timeline.is_whole), (3, 0, true));
        assert_eq!(Timeline::busiest(&run_of(Vec::new()), &real).unwrap().sim.len(), 3);
        assert_eq!(Timeline::busiest(&run_of(Vec::new()), &run_of(Vec::new())), None);
    }
}

//! Several batches in flight: when the host, each pipeline stage and each batch is done.

use plumbline_schema::Nanos;

use super::timeline::Span;

/// One pipeline stage's part of a step, ns.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StageTime {
    /// The stage's GPU is busy for so long, sending to the next stage included.
    pub gpu_ns: f64,
    /// The stage's host needs so long to launch the stage's kernels; it overlaps with `gpu_ns`.
    pub launch_ns: f64,
}

/// What a step asks of the host and of the stages, ns.
#[derive(Clone, Copy, Debug)]
pub struct StepParts<'a> {
    /// Host work before the first kernel.
    pub host_pre_ns: f64,
    /// Each stage in order; as many as the pipeline has.
    pub stages: &'a [StageTime],
    /// Host work after the last kernel.
    pub host_post_ns: f64,
}

/// A batch in flight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Launched {
    /// The host has launched the first stage and can form the next batch.
    pub host_free: Nanos,
    /// The last stage's GPU is done.
    pub gpu_end: Nanos,
    start: Nanos,
    /// `gpu_end` from `start` on before rounding, so that a sum of parts is rounded once.
    until_gpu_end_ns: f64,
    host_post_ns: f64,
}

/// When a stage launches and runs a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageSpans {
    /// Its host launches the kernels.
    pub launch: Span,
    /// Its GPU runs them; where it waits for launches, that is at the end and left out.
    pub gpu: Span,
}

/// The clocks of an engine with batches in flight: one host a stage and one GPU a stage, each of which does one thing
/// at a time and takes batches in order.
///
/// As vLLM 0.24 does it (`vllm/v1/engine/core.py`, `EngineCore.step_with_batch_queue`): the host forms and launches a
/// batch, and while fewer batches than allowed are in flight it goes on to the next; otherwise it waits for the oldest
/// and handles its tokens. An engine that allows one batch is the synchronous one. So, with `depth` batches allowed:
///
/// ```text
/// while there is work {
///     if in_flight.len() < depth && a batch can be formed at host_free {
///         in_flight.push_back(pipeline.launch(pipeline.host_free(), &parts));
///         if in_flight.len() < depth { continue }
///     }
///     let end = pipeline.finish(&in_flight.pop_front());   // its tokens are out
/// }
/// ```
#[derive(Clone, Debug)]
pub struct Pipeline {
    host_free: Vec<Nanos>,
    gpu_free: Vec<Nanos>,
    /// Of the batch launched last.
    spans: Vec<StageSpans>,
}

impl Pipeline {
    /// A pipeline of so many stages (at least one) in which nothing has run, at time 0.
    #[must_use]
    pub fn new(num_stages: usize) -> Self {
        let num_stages = num_stages.max(1);
        let free = vec![Nanos::ZERO; num_stages];
        let spans = vec![StageSpans::default(); num_stages];
        Self { host_free: free.clone(), gpu_free: free, spans }
    }

    /// When the host that forms batches has nothing to do.
    #[must_use]
    pub fn host_free(&self) -> Nanos {
        self.host_free[0]
    }

    /// When each stage launches and runs the batch launched last.
    #[must_use]
    pub fn spans(&self) -> &[StageSpans] {
        &self.spans
    }

    /// Launches a batch at `start`, or as soon as the host is free.
    ///
    /// The host of a later stage begins to launch when that of the stage before has, which sends it the tensors' sizes;
    /// its GPU begins when the stage before is done and its own earlier batches are.
    ///
    /// # Panics
    /// When `parts` has another number of stages than the pipeline.
    pub fn launch(&mut self, start: Nanos, parts: &StepParts<'_>) -> Launched {
        assert_eq!(parts.stages.len(), self.gpu_free.len(), "stages of a step and of the pipeline");
        let since_start = |time: Nanos| time.saturating_since(start).0 as f64;
        let span = |from_ns: f64, ns: f64| Span {
            start: start + Nanos::from_f64(from_ns),
            end: start + Nanos::from_f64(from_ns + ns),
        };
        let mut launched_ns = since_start(self.host_free[0]) + parts.host_pre_ns;
        let mut gpu_end_ns = launched_ns;
        for (i, stage) in parts.stages.iter().enumerate() {
            let launch_start_ns = launched_ns.max(since_start(self.host_free[i]));
            launched_ns = launch_start_ns + stage.launch_ns;
            let gpu_start_ns = gpu_end_ns.max(since_start(self.gpu_free[i]));
            gpu_end_ns = (gpu_start_ns + stage.gpu_ns).max(launched_ns);
            self.spans[i] = StageSpans {
                launch: span(launch_start_ns, stage.launch_ns),
                gpu: span(gpu_start_ns, stage.gpu_ns),
            };
            self.host_free[i] = start + Nanos::from_f64(launched_ns);
            self.gpu_free[i] = start + Nanos::from_f64(gpu_end_ns);
        }
        Launched {
            host_free: self.host_free[0],
            gpu_end: start + Nanos::from_f64(gpu_end_ns),
            start,
            until_gpu_end_ns: gpu_end_ns,
            host_post_ns: parts.host_post_ns,
        }
    }

    /// Waits for a batch, the oldest in flight, and handles its tokens, which are out at the time returned.
    ///
    /// The host is busy until then. With no other batch launched since, the time is the start plus the sum of the
    /// parts, rounded once.
    pub fn finish(&mut self, launched: &Launched) -> Nanos {
        let host_free = self.host_free[0];
        let host_free_ns = host_free.saturating_since(launched.start).0 as f64;
        // Less than the 1 ns of the clock is rounding: the host has not launched anything since.
        let waits_for_gpu = host_free_ns - launched.until_gpu_end_ns < 1.0;
        let begin_ns = if waits_for_gpu { launched.until_gpu_end_ns } else { host_free_ns };
        let end = launched.start + Nanos::from_f64(begin_ns + launched.host_post_ns);
        self.host_free[0] = end.max(host_free);
        self.host_free[0]
    }

    /// Adds time in which the host does something else, ns: taking in requests, say.
    pub fn occupy_host(&mut self, from: Nanos, ns: f64) {
        self.host_free[0] = self.host_free[0].max(from) + Nanos::from_f64(ns);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Parts of a step in whole ns: before the first kernel, GPU and launching of each stage, after the last.
    type Step = (u32, Vec<(u32, u32)>, u32);

    fn steps(num_stages: usize) -> impl Strategy<Value = Vec<Step>> {
        let part = || 0_u32..1_000_000;
        let stages = prop::collection::vec((part(), part()), num_stages);
        prop::collection::vec((part(), stages, part()), 1..20)
    }

    fn pipelines() -> impl Strategy<Value = (usize, Vec<Step>)> {
        (1_usize..5).prop_flat_map(|num_stages| (Just(num_stages), steps(num_stages)))
    }

    /// Launches with at most `depth` in flight, each as soon as the host is free; what was launched, and its end.
    fn run(num_stages: usize, steps: &[Step], depth: usize, scale: f64) -> Vec<(Launched, Nanos)> {
        let mut pipeline = Pipeline::new(num_stages);
        let mut in_flight = std::collections::VecDeque::new();
        let mut done = Vec::new();
        for (host_pre, stages, host_post) in steps {
            if in_flight.len() == depth {
                let launched: Launched = in_flight.pop_front().unwrap();
                done.push((launched, pipeline.finish(&launched)));
            }
            let stage = |&(gpu, launch): &(u32, u32)| StageTime {
                gpu_ns: scale * f64::from(gpu),
                launch_ns: scale * f64::from(launch),
            };
            let parts = StepParts {
                host_pre_ns: scale * f64::from(*host_pre),
                stages: &stages.iter().map(stage).collect::<Vec<_>>(),
                host_post_ns: scale * f64::from(*host_post),
            };
            in_flight.push_back(pipeline.launch(pipeline.host_free(), &parts));
        }
        done.extend(in_flight.iter().map(|launched| (*launched, pipeline.finish(launched))));
        done
    }

    proptest! {
        #[test]
        fn no_batch_is_faster_than_its_parts_and_batches_end_in_order(
            (num_stages, steps) in pipelines(),
            depth in 1_usize..6,
        ) {
            let done = run(num_stages, &steps, depth, 1.0);
            for ((launched, end), (pre, stages, post)) in done.iter().zip(&steps) {
                let gpu: u64 = stages.iter().map(|s| u64::from(s.0)).sum();
                let parts = u64::from(*pre) + gpu + u64::from(*post);
                prop_assert!(end.0 >= launched.start.0 + parts);
                prop_assert!(launched.start <= launched.host_free && launched.host_free <= *end);
                prop_assert!(launched.gpu_end <= *end);
            }
            for pair in done.windows(2) {
                prop_assert!(pair[0].1 <= pair[1].1 && pair[0].0.gpu_end <= pair[1].0.gpu_end);
            }
        }

        /// The time of an engine that waits for each batch, to the last ns and with any fraction of one.
        #[test]
        fn one_batch_in_flight_is_the_synchronous_sum(
            steps in prop::collection::vec((0.0..1e7, 0.0..1e7, 0.0..1e7, 0.0..1e7), 1..20),
        ) {
            let mut pipeline = Pipeline::new(1);
            let mut clock = Nanos::ZERO;
            for (host_pre_ns, gpu_ns, launch_ns, host_post_ns) in steps {
                let stages = [StageTime { gpu_ns, launch_ns }];
                let launched = pipeline.launch(clock, &StepParts { host_pre_ns, stages: &stages, host_post_ns });
                let sum: f64 = host_pre_ns + f64::max(gpu_ns, launch_ns) + host_post_ns;
                clock += Nanos::from_f64(sum);
                prop_assert_eq!(pipeline.finish(&launched), clock);
            }
        }

        #[test]
        fn more_in_flight_ends_no_later((num_stages, steps) in pipelines(), depth in 1_usize..5) {
            let end = |depth| run(num_stages, &steps, depth, 1.0).last().unwrap().1;
            // The host handles the tokens of earlier batches later, never more of them.
            prop_assert!(end(depth + 1) <= end(depth));
        }

        #[test]
        fn all_times_by_k_is_every_end_by_k(
            (num_stages, steps) in pipelines(),
            depth in 1_usize..5,
            factor in 1_u32..1000,
        ) {
            let once = run(num_stages, &steps, depth, 1.0);
            let scaled = run(num_stages, &steps, depth, f64::from(factor));
            for (one, by_factor) in once.iter().zip(&scaled) {
                prop_assert_eq!(by_factor.1.0, one.1.0 * u64::from(factor));
                prop_assert_eq!(by_factor.0.host_free.0, one.0.host_free.0 * u64::from(factor));
            }
        }
    }

    #[test]
    fn full_stages_give_one_batch_a_stage_time() {
        for num_stages in [2, 3, 4] {
            let steps = vec![(1_000, vec![(100_000, 500); num_stages], 2_000); 400];
            let last = run(num_stages, &steps, num_stages + 1, 1.0).last().unwrap().1;
            let per_batch = last.0 as f64 / 400.0;
            assert!(
                (100_000.0..102_000.0).contains(&per_batch),
                "{num_stages} stages: {per_batch} ns a batch"
            );
            // With one in flight it is the sum of the stages.
            let last = run(num_stages, &steps, 1, 1.0).last().unwrap().1;
            assert_eq!(last.0, 400 * (1_000 + 100_000 * num_stages as u64 + 2_000));
        }
    }

    #[test]
    fn the_next_batch_is_prepared_while_the_gpu_runs() {
        // Host 30 + 10 (launch) + 20, GPU 100: the GPU is the bottleneck once two are in flight.
        let steps = vec![(30, vec![(100, 10)], 20); 50];
        let ends: Vec<_> = run(1, &steps, 2, 1.0).iter().map(|done| done.1.0).collect();
        assert_eq!(ends[..3], [150, 250, 350]);
        // GPU 40: the host is.
        let steps = vec![(30, vec![(40, 10)], 20); 50];
        let ends: Vec<_> = run(1, &steps, 2, 1.0).iter().map(|done| done.1.0).collect();
        assert_eq!(ends[..3], [100, 160, 220]);
    }
}

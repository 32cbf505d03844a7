//! What every policy promises, over random workloads, deployments and numbers of steps in flight.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use plumbline_schema::{
    AttentionLoad, BatchShape, Deployment, EngineMode, Nanos, PromptContent, WorkloadRequest,
};
use plumbline_simulator::{
    Scheduler, SchedulerKind,
    scheduler::{ScheduledStep, Steady},
    sequence::SequenceId,
};
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

/// A request and the number of the step before which it comes.
type Arrival = (u32, WorkloadRequest);

/// The policies held to their promises here.
const KINDS: [SchedulerKind; 2] = [SchedulerKind::Lightllm, SchedulerKind::Sglang];

/// The deployment without what a policy does not model.
fn modelled(kind: SchedulerKind, deployment: Deployment) -> Deployment {
    match kind {
        SchedulerKind::Lightllm => {
            Deployment { enable_prefix_caching: false, pipeline_parallel_size: 1, ..deployment }
        }
        _ => deployment,
    }
}

prop_compose! {
    /// Tight budgets, seats and blocks, so that chunks, queues, pauses and rejections all happen.
    fn deployments()(
        num_batched_blocks in 4_u32..40,
        max_num_seqs in 1_u32..10,
        num_tokens in prop_oneof![1 => 30_u32..100, 3 => 100_u32..500],
        block_size in prop::sample::select(vec![1_u32, 4, 16]),
        pipeline_parallel_size in 1_u32..4,
        enable_prefix_caching in any::<bool>(),
    ) -> Deployment {
        Deployment {
            mode: EngineMode::Eager,
            model: "qwen3-0.6b".into(),
            max_num_batched_tokens: num_batched_blocks * block_size,
            max_num_seqs,
            max_model_len: 400,
            num_gpu_blocks: num_tokens.div_ceil(block_size),
            block_size,
            tensor_parallel_size: 1,
            pipeline_parallel_size,
            enable_prefix_caching,
            scheduling_policy: "fcfs".into(),
            long_prefill_token_threshold: 0,
            async_scheduling: false,
            cudagraph_sizes: vec![],
            cudagraph_mode: plumbline_schema::CudagraphMode::default(),
        }
    }
}

/// Up to 30 requests, of which some share prefixes, are turns of one conversation, or have hashed prompts.
fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
    let content = prop_oneof![
        2 => Just(None),
        2 => (0_u64..2, 1_u32..120).prop_map(|(id, prefix_len)| Some(PromptContent {
            prefix_id: Some(id),
            prefix_len,
            ..PromptContent::default()
        })),
        2 => (0_u64..3).prop_map(|id| Some(PromptContent { session_id: Some(id), ..PromptContent::default() })),
        1 => prop::collection::vec(0_u64..3, 1..6).prop_map(|prefix_hashes| Some(PromptContent {
            prefix_hashes,
            prefix_hash_tokens: 24,
            ..PromptContent::default()
        })),
    ];
    let gap = prop_oneof![2 => Just(0_u32), 4 => 0_u32..8, 1 => 0_u32..60];
    prop::collection::vec((gap, 1_u32..160, 1_u32..120, content), 1..30).prop_map(|requests| {
        let mut step = 0;
        let of = |(id, (gap, prefill, decode, content)): (u64, (u32, u32, u32, Option<PromptContent>))| {
            step += gap;
            let content = content.map(Arc::new);
            (step, WorkloadRequest { content, ..WorkloadRequest::new(id, Nanos(0), prefill, decode) })
        };
        (0..).zip(requests).map(of).collect()
    })
}

/// What a policy is known to have done with a request.
struct Progress {
    request: WorkloadRequest,
    /// Tokens in the cache, the step in flight included.
    num_computed: u32,
    /// The most that ever were.
    most_computed: u32,
    num_output: u32,
    num_sampling: u32,
    is_in_cache: bool,
}

/// What came out of a run, for comparing two.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    shapes: Vec<BatchShape>,
    /// Step, request.
    finished: Vec<(usize, u64)>,
    preempted: Vec<(usize, u64)>,
    rejected: Vec<u64>,
    /// Tokens found in the cache, and prefills that did not end with their step.
    num_cached: u32,
    num_chunks: usize,
    /// Waiting, running and free blocks before a step, where they were looked at.
    states: BTreeMap<usize, (usize, usize, u32)>,
}

/// Drives a policy and holds it to its promises.
struct Driver {
    scheduler: Box<dyn Scheduler>,
    deployment: Deployment,
    progress: BTreeMap<SequenceId, Progress>,
    /// Requests that are done, and how many of their tokens were computed.
    past: Vec<(WorkloadRequest, u32)>,
    in_flight: VecDeque<ScheduledStep>,
    num_received: usize,
    outcome: Outcome,
}

/// How many of the first `end` tokens of two requests are the same.
fn common_tokens(a: &WorkloadRequest, b: &WorkloadRequest, end: u32) -> u32 {
    (0..end).find(|&at| a.content_run(at).stream != b.content_run(at).stream).unwrap_or(end)
}

impl Driver {
    fn new(kind: SchedulerKind, deployment: &Deployment) -> Self {
        Self {
            scheduler: kind.build(deployment).unwrap(),
            deployment: deployment.clone(),
            progress: BTreeMap::new(),
            past: Vec::new(),
            in_flight: VecDeque::new(),
            num_received: 0,
            outcome: Outcome::default(),
        }
    }

    /// Runs until all is done, with up to `depth` steps in flight.
    fn run(mut self, arrivals: &[Arrival], depth: usize, heeds_steady: bool) -> Outcome {
        let mut arrivals = arrivals.iter().peekable();
        loop {
            let number = self.outcome.shapes.len();
            let is_idle = self.scheduler.state().num_unfinished() == 0;
            // With nothing to do, time jumps to the next arrival.
            let bound = if is_idle { arrivals.peek().map_or(0, |(step, _)| *step as usize) } else { 0 };
            while let Some((_, request)) = arrivals.next_if(|(step, _)| *step as usize <= number.max(bound)) {
                self.add(request);
            }
            if self.scheduler.state().num_unfinished() == 0 {
                if arrivals.peek().is_none() {
                    return self.outcome;
                }
                continue;
            }
            assert!(number < 200_000, "never done");
            self.check();
            if heeds_steady
                && self.in_flight.is_empty()
                && let Some(steady) = self.scheduler.steady()
            {
                let left = arrivals.peek().map_or(u32::MAX, |(step, _)| step - number as u32);
                // Sometimes less than promised, as where a horizon cuts a stretch.
                let num_steps = steady.num_steps.min(left).min(1 + number as u32 % 7);
                self.advance(&steady, num_steps);
                continue;
            }
            let mut step = ScheduledStep::default();
            self.scheduler.schedule(&mut step);
            if step.is_empty() {
                assert!(!self.in_flight.is_empty(), "stalled: {:?}", self.scheduler.state());
            } else {
                self.launch(step);
            }
            if self.in_flight.len() >= depth || self.outcome.shapes.len() == number {
                self.complete();
            }
        }
    }

    fn add(&mut self, request: &WorkloadRequest) {
        self.num_received += 1;
        match self.scheduler.add(request) {
            Ok(id) => {
                let progress = Progress {
                    request: request.clone(),
                    num_computed: 0,
                    most_computed: 0,
                    num_output: 0,
                    num_sampling: 0,
                    is_in_cache: false,
                };
                assert!(self.progress.insert(id, progress).is_none(), "a number given out twice");
            }
            Err(_) => self.outcome.rejected.push(request.request_id),
        }
    }

    /// Requests in = done + running + waiting + rejected; free + used = total, each block used once.
    fn check(&mut self) {
        let state = self.scheduler.state();
        let outcome = &mut self.outcome;
        let num_gone = outcome.finished.len() + outcome.rejected.len();
        assert_eq!(self.num_received, num_gone + state.num_running + state.num_waiting);
        assert_eq!(state.num_running, self.scheduler.running().len());
        assert!(state.num_running <= self.deployment.max_num_seqs as usize);
        let cache = state.kv_cache;
        assert_eq!(cache.num_free() + cache.num_used(), cache.num_blocks());
        let held: BTreeSet<_> =
            self.scheduler.running().iter().flat_map(|&id| cache.block_table(id)).collect();
        assert_eq!(held.len(), cache.num_used() as usize, "used are the blocks that sequences hold");
        outcome.states.insert(outcome.shapes.len(), (state.num_waiting, state.num_running, cache.num_free()));
    }

    /// Takes in what a step says, and holds it against what is known.
    fn launch(&mut self, step: ScheduledStep) {
        let number = self.outcome.shapes.len();
        for id in &step.preempted {
            let progress = self.progress.get_mut(id).unwrap();
            assert_eq!(progress.num_sampling, 0, "preempted in flight");
            (progress.num_computed, progress.is_in_cache) = (0, false);
            self.outcome.preempted.push((number, progress.request.request_id));
        }
        let state = self.scheduler.state();
        let num_prefill: u32 = step.sequences.iter().filter(|s| !s.is_decode).map(|s| s.num_tokens).sum();
        assert!(num_prefill <= self.deployment.max_num_batched_tokens);
        let ids: BTreeSet<_> = step.sequences.iter().map(|s| s.id).collect();
        assert_eq!(ids.len(), step.sequences.len(), "a sequence twice in a step");
        // Before anything of this step counts as computed.
        step.sequences.iter().for_each(|s| self.check_context(s.id, s.context_len));
        for s in &step.sequences {
            let progress = self.progress.get_mut(&s.id).unwrap();
            assert_eq!(progress.num_sampling, 0, "its newest token is not known yet");
            assert!(s.num_tokens > 0);
            let num_cached = if progress.is_in_cache { 0 } else { s.context_len };
            self.outcome.num_cached += num_cached;
            self.outcome.num_chunks += usize::from(!s.samples);
            progress.num_computed = s.context_len + s.num_tokens;
            progress.most_computed = progress.most_computed.max(progress.num_computed);
            progress.is_in_cache = true;
            let num_tokens = progress.request.num_prefill_tokens + progress.num_output;
            assert!(progress.num_computed <= num_tokens);
            assert_eq!(s.samples, progress.num_computed == num_tokens);
            assert!(!s.is_decode || s.samples && s.num_tokens == 1 && progress.num_output > 0);
            progress.num_sampling += u32::from(s.samples);
            let held = state.kv_cache.block_table(s.id).len() as u32 * state.kv_cache.block_size();
            assert!(held >= progress.num_computed, "tokens without a block");
        }
        self.outcome.shapes.push(step.shape());
        self.in_flight.push_back(step);
    }

    /// A sequence goes on where it was, or begins with what somebody has computed before.
    fn check_context(&self, id: SequenceId, context_len: u32) {
        let own = &self.progress[&id];
        if own.is_in_cache {
            assert_eq!(context_len, own.num_computed);
            return;
        }
        if !self.deployment.enable_prefix_caching {
            assert_eq!(context_len, 0);
        }
        let running = self.progress.values().map(|other| (&other.request, other.most_computed));
        let longest = running
            .chain(self.past.iter().map(|(request, num_computed)| (request, *num_computed)))
            .map(|(other, num_computed)| common_tokens(&own.request, other, num_computed))
            .max();
        assert!(context_len <= longest.unwrap_or(0), "tokens cached that nobody has computed");
    }

    fn complete(&mut self) {
        let step = self.in_flight.pop_front().unwrap();
        for s in step.sequences.iter().filter(|s| s.samples) {
            let progress = self.progress.get_mut(&s.id).unwrap();
            progress.num_output += 1;
            progress.num_sampling -= 1;
        }
        let mut finished = Vec::new();
        self.scheduler.complete(&step, &mut finished);
        for id in finished {
            let progress = self.progress.remove(&id).unwrap();
            assert_eq!(progress.num_output, progress.request.num_decode_tokens);
            self.outcome.finished.push((self.outcome.shapes.len(), progress.request.request_id));
            self.past.push((progress.request, progress.most_computed));
        }
        assert!(self.progress.values().all(|p| p.num_output < p.request.num_decode_tokens));
    }

    fn advance(&mut self, steady: &Steady, num_steps: u32) {
        let running = self.scheduler.running().to_vec();
        for i in 0..num_steps {
            let mut load = AttentionLoad::default();
            for &id in &running {
                load.add_decode(self.scheduler.sequence(id).num_computed_tokens + i);
            }
            assert!(i > 0 || load == steady.load);
            self.outcome.shapes.push(BatchShape::from_load(load));
        }
        self.scheduler.advance(num_steps);
        for id in running {
            let progress = self.progress.get_mut(&id).unwrap();
            progress.num_computed += num_steps;
            progress.num_output += num_steps;
            progress.most_computed = progress.num_computed;
            let sequence = self.scheduler.sequence(id);
            assert_eq!(sequence.num_computed_tokens, progress.num_computed);
            assert_eq!(sequence.num_output_tokens, progress.num_output);
        }
    }
}

/// The cases are not all idle ones: what makes policies hard does happen in them.
#[test]
fn queues_evictions_and_stretches_do_happen() {
    for kind in KINDS {
        let mut runner = TestRunner::deterministic();
        let cases = (deployments(), arrivals());
        let (mut preempted, mut rejected, mut waited, mut cached, mut stretched, mut chunked) =
            (0, 0, 0, 0, 0, 0);
        for _ in 0..200 {
            let (deployment, arrivals) = cases.new_tree(&mut runner).unwrap().current();
            let deployment = modelled(kind, deployment);
            let outcome = Driver::new(kind, &deployment).run(&arrivals, 3, false);
            preempted += outcome.preempted.len();
            rejected += outcome.rejected.len();
            waited += outcome.states.values().filter(|(num_waiting, ..)| *num_waiting > 0).count();
            cached += outcome.num_cached;
            chunked += outcome.num_chunks;
            let single = Driver::new(kind, &deployment).run(&arrivals, 1, true);
            stretched += single.shapes.len() - single.states.len();
        }
        let is_sglang = kind == SchedulerKind::Sglang;
        // LightLLM's forecast errs only where steps in flight get sequences out of step.
        assert!(preempted > if is_sglang { 100 } else { 0 }, "{kind}: {preempted} preemptions");
        assert!(waited > 1000 && rejected > 100, "{kind}: {waited} waits, {rejected} rejections");
        assert!(stretched > 1000, "{kind}: {stretched} steps in stretches");
        assert_eq!(is_sglang, cached > 1000, "{kind}: {cached} cached tokens");
        assert_eq!(is_sglang, chunked > 100, "{kind}: {chunked} chunks");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Every request is somewhere and gets its tokens, whatever the number of steps in flight.
    #[test]
    fn policies_keep_their_promises(
        deployment in deployments(), arrivals in arrivals(), depth in 1_usize..4,
    ) {
        for kind in KINDS {
            let outcome =
                Driver::new(kind, &modelled(kind, deployment.clone())).run(&arrivals, depth, false);
            prop_assert_eq!(outcome.finished.len() + outcome.rejected.len(), arrivals.len());
        }
    }

    /// Stretches change nothing but the number of questions.
    #[test]
    fn policies_do_the_same_in_stretches(deployment in deployments(), arrivals in arrivals()) {
        for kind in KINDS {
            let deployment = modelled(kind, deployment.clone());
            let single = Driver::new(kind, &deployment).run(&arrivals, 1, false);
            let mut stretched = Driver::new(kind, &deployment).run(&arrivals, 1, true);
            for (step, state) in &stretched.states {
                prop_assert_eq!(single.states.get(step), Some(state), "{} before step {}", kind, step);
            }
            stretched.states.clone_from(&single.states);
            prop_assert_eq!(single, stretched);
        }
    }
}

//! The laws of policies that serve in order and let a sequence into one step at a time, over random workloads and
//! deployments, with up to four steps in flight.

use std::collections::{BTreeMap, VecDeque};

use plumbline_schema::{Deployment, EngineMode, Nanos, WorkloadRequest};
use proptest::prelude::*;

use super::{ScheduledSequence, ScheduledStep, Scheduler, SchedulerKind};
use crate::sequence::SequenceId;

/// An engine with a budget of 32 tokens, 4 seats, and 100 usable blocks of 4 tokens.
pub(super) fn deployment() -> Deployment {
    Deployment {
        mode: EngineMode::Eager,
        model: "qwen3-0.6b".into(),
        max_num_batched_tokens: 32,
        max_num_seqs: 4,
        max_model_len: 128,
        num_gpu_blocks: 101,
        block_size: 4,
        tensor_parallel_size: 1,
        pipeline_parallel_size: 1,
        enable_prefix_caching: false,
        scheduling_policy: "fcfs".into(),
        long_prefill_token_threshold: 0,
        async_scheduling: false,
        cudagraph_sizes: vec![],
        cudagraph_mode: plumbline_schema::CudagraphMode::default(),
    }
}

pub(super) fn request(num_prefill_tokens: u32, num_decode_tokens: u32) -> WorkloadRequest {
    WorkloadRequest::new(0, Nanos(0), num_prefill_tokens, num_decode_tokens)
}

/// A step as `chunks|decodes|preempted`.
pub(super) fn line(step: &ScheduledStep) -> String {
    let batch = step.batch();
    let preempted: Vec<_> = step.preempted.iter().map(|id| id.0.to_string()).collect();
    format!("{}|{}|{}", batch.format_prefill_chunks(), batch.format_decode_contexts(), preempted.join(";"))
}

/// The steps that serve requests, all there at once, with as many in flight as the deployment has pipeline stages.
pub(super) fn steps(kind: SchedulerKind, deployment: &Deployment, requests: &[(u32, u32)]) -> Vec<String> {
    let mut scheduler = kind.build(deployment).unwrap();
    for &(prefill, decode) in requests {
        scheduler.add(&request(prefill, decode)).unwrap();
    }
    let (mut in_flight, mut finished, mut lines) = (VecDeque::new(), vec![], vec![]);
    while scheduler.state().num_unfinished() > 0 {
        while in_flight.len() < deployment.pipeline_parallel_size as usize {
            let mut step = ScheduledStep::default();
            scheduler.schedule(&mut step);
            if step.is_empty() {
                break;
            }
            lines.push(line(&step));
            in_flight.push_back(step);
        }
        let oldest = in_flight.pop_front().unwrap_or_else(|| panic!("stalled after {lines:?}"));
        scheduler.complete(&oldest, &mut finished);
    }
    assert_eq!(scheduler.state().kv_cache.num_used(), 0);
    lines
}

/// What `scheduler` refuses a request for.
pub(super) fn rejection(kind: SchedulerKind, deployment: &Deployment, prefill: u32, decode: u32) -> String {
    let mut scheduler = kind.build(deployment).unwrap();
    scheduler.add(&request(prefill, decode)).unwrap_err().to_string()
}

const KINDS: [SchedulerKind; 4] =
    [SchedulerKind::Sarathi, SchedulerKind::VllmV0, SchedulerKind::Orca, SchedulerKind::FasterTransformer];

fn has_budget(kind: SchedulerKind) -> bool {
    matches!(kind, SchedulerKind::Sarathi | SchedulerKind::VllmV0)
}

prop_compose! {
    /// Tight budgets, seats and blocks, so that chunks, queues, preemptions and rejections all happen.
    fn deployments()(
        max_num_batched_tokens in 4_u32..300,
        max_num_seqs in 1_u32..12,
        num_gpu_blocks in prop_oneof![3 => 2_u32..60, 1 => 100_u32..350],
        block_size in prop::sample::select(vec![1_u32, 3, 4, 16]),
        pipeline_parallel_size in 1_u32..=4,
    ) -> Deployment {
        Deployment {
            max_num_batched_tokens,
            max_num_seqs,
            max_model_len: 400,
            num_gpu_blocks,
            block_size,
            pipeline_parallel_size,
            ..deployment()
        }
    }
}

fn workloads() -> impl Strategy<Value = Vec<WorkloadRequest>> {
    let lengths = (prop_oneof![1_u32..20, 1_u32..350], prop_oneof![1_u32..8, 1_u32..80]);
    prop::collection::vec((0_u64..3, lengths), 1..24).prop_map(|requests| {
        let mut time = 0;
        let of = |(i, (gap, (prefill, decode))): (usize, (u64, (u32, u32)))| {
            time += gap;
            WorkloadRequest::new(i as u64, Nanos(time), prefill, decode)
        };
        requests.into_iter().enumerate().map(of).collect()
    })
}

/// What the laws know of an unfinished sequence.
struct Told {
    request: WorkloadRequest,
    num_computed: u32,
    num_output: u32,
    /// Tokens known when it was let in.
    num_prefill: u32,
    is_in_flight: bool,
}

impl Told {
    fn num_tokens(&self) -> u32 {
        self.request.num_prefill_tokens + self.num_output
    }
}

/// A scheduler watched in all it does.
struct Watched {
    kind: SchedulerKind,
    deployment: Deployment,
    scheduler: Box<dyn Scheduler>,
    in_flight: VecDeque<ScheduledStep>,
    unfinished: BTreeMap<SequenceId, Told>,
    finished: Vec<SequenceId>,
    num_received: usize,
    num_rejected: usize,
    num_done: usize,
}

impl Watched {
    fn new(kind: SchedulerKind, deployment: &Deployment) -> Self {
        Self {
            kind,
            scheduler: kind.build(deployment).unwrap(),
            deployment: deployment.clone(),
            in_flight: VecDeque::new(),
            unfinished: BTreeMap::new(),
            finished: vec![],
            num_received: 0,
            num_rejected: 0,
            num_done: 0,
        }
    }

    fn add(&mut self, request: &WorkloadRequest) {
        self.num_received += 1;
        match self.scheduler.add(request) {
            Ok(id) => {
                let told = Told {
                    request: request.clone(),
                    num_computed: 0,
                    num_output: 0,
                    num_prefill: 0,
                    is_in_flight: false,
                };
                assert!(self.unfinished.insert(id, told).is_none(), "{id:?} given out twice");
            }
            Err(_) => self.num_rejected += 1,
        }
        self.check();
    }

    /// Forms a step; false when there is none.
    fn schedule(&mut self) -> bool {
        let mut step = ScheduledStep::default();
        self.scheduler.schedule(&mut step);
        for id in &step.preempted {
            let told = self.unfinished.get_mut(id).expect("unfinished ones are preempted");
            assert!(!told.is_in_flight, "preempted in flight");
            told.num_computed = 0;
        }
        if step.is_empty() {
            let num_unfinished = self.scheduler.state().num_unfinished();
            assert!(num_unfinished == 0 || !self.in_flight.is_empty(), "{}: stalled", self.kind);
            assert!(step.preempted.is_empty(), "preempted for nothing");
            return false;
        }
        self.check_step(&step);
        self.check_policy(&step);
        self.in_flight.push_back(step);
        self.check();
        true
    }

    /// Every part of a step goes on where the sequence was, in blocks that it has.
    fn check_step(&mut self, step: &ScheduledStep) {
        let cache = self.scheduler.state().kv_cache;
        for part in &step.sequences {
            let told = self.unfinished.get_mut(&part.id).expect("unfinished ones are computed");
            assert!(!told.is_in_flight, "{:?} is in two steps", part.id);
            assert_eq!(part.context_len, told.num_computed);
            assert!(part.num_tokens > 0);
            if part.context_len == 0 {
                told.num_prefill = told.num_tokens();
            }
            told.is_in_flight = true;
            told.num_computed += part.num_tokens;
            assert!(told.num_computed <= told.num_tokens(), "unknown tokens computed");
            assert_eq!(part.samples, told.num_computed == told.num_tokens());
            let is_newest = part.num_tokens == 1 && part.samples && told.num_output > 0;
            assert_eq!(part.is_decode, is_newest);
            let held = cache.block_table(part.id).len() as u32 * cache.block_size();
            assert!(held >= told.num_computed, "tokens without a block");
        }
        assert!(step.sequences.len() <= self.deployment.max_num_seqs as usize);
        if has_budget(self.kind) {
            assert!(step.shape().num_tokens <= self.deployment.max_num_batched_tokens);
            assert!(self.scheduler.state().num_running <= self.deployment.max_num_seqs as usize);
        }
    }

    fn check_policy(&self, step: &ScheduledStep) {
        let decodes = step.sequences.iter().filter(|s| s.is_decode).count();
        let is_whole = step.sequences.iter().all(|s| s.is_decode || (s.context_len == 0 && s.samples));
        match self.kind {
            SchedulerKind::Sarathi => {
                let is_prefill = |s: &ScheduledSequence| s.context_len < self.unfinished[&s.id].num_prefill;
                assert!(step.sequences.is_sorted_by_key(is_prefill), "decodes come first");
                self.check_no_stall(step.sequences.iter().filter(|s| !is_prefill(s)).count());
            }
            SchedulerKind::VllmV0 => {
                assert!(is_whole && (decodes == 0 || decodes == step.sequences.len()), "two kinds");
            }
            SchedulerKind::Orca => assert!(is_whole && step.preempted.is_empty()),
            _ => {
                assert!(is_whole && (decodes == 0 || decodes == step.sequences.len()), "a late one joined");
                assert!(step.preempted.is_empty());
            }
        }
    }

    /// Whoever can decode does, unless the budget or the blocks are used up.
    fn check_no_stall(&self, num_decodes: usize) {
        let held_back = self.scheduler.running().iter().any(|&id| {
            let told = &self.unfinished[&id];
            !told.is_in_flight && told.num_computed >= told.num_prefill
        });
        let is_budget_used = num_decodes == self.deployment.max_num_batched_tokens as usize;
        let is_cache_used = self.scheduler.state().kv_cache.num_free() == 0;
        assert!(!held_back || is_budget_used || is_cache_used, "a decode is held back");
    }

    /// Completes the oldest step.
    fn complete(&mut self) {
        let Some(step) = self.in_flight.pop_front() else { return };
        self.scheduler.complete(&step, &mut self.finished);
        let mut done = vec![];
        for part in &step.sequences {
            let told = self.unfinished.get_mut(&part.id).expect("unfinished");
            told.is_in_flight = false;
            told.num_output += u32::from(part.samples);
            if told.num_output == told.request.num_decode_tokens {
                done.push(part.id);
                self.unfinished.remove(&part.id);
            }
        }
        assert_eq!(self.finished, done, "exactly its tokens");
        self.num_done += done.len();
        self.check();
    }

    /// requests in = done + running + waiting + rejected; free + used blocks = total; the counts are right.
    fn check(&self) {
        let state = self.scheduler.state();
        let num_known = self.num_done + state.num_running + state.num_waiting + self.num_rejected;
        assert_eq!(self.num_received, num_known);
        assert_eq!(self.unfinished.len(), state.num_unfinished());
        assert_eq!(state.num_running, self.scheduler.running().len());
        let cache = state.kv_cache;
        assert_eq!(cache.num_free() + cache.num_used(), cache.num_blocks());
        let held: usize = (0..64).map(|i| cache.block_table(SequenceId(i)).len()).sum();
        assert_eq!(held, cache.num_used() as usize);
        for (&id, told) in &self.unfinished {
            let sequence = self.scheduler.sequence(id);
            let is_running = self.scheduler.running().contains(&id);
            // A preemption may be told with the step after.
            assert_eq!(sequence.num_computed_tokens, if is_running { told.num_computed } else { 0 });
            assert_eq!(sequence.num_output_tokens, told.num_output);
            assert_eq!(is_running, !cache.block_table(id).is_empty());
        }
    }

    fn depth(&self) -> usize {
        self.deployment.pipeline_parallel_size as usize
    }

    /// Forms all steps that can be in flight, and completes the oldest.
    fn turn(&mut self) {
        while self.in_flight.len() < self.depth() && self.schedule() {}
        self.complete();
    }
}

/// What has to be alike after the same steps, however they were made.
fn outline(scheduler: &dyn Scheduler) -> String {
    let state = scheduler.state();
    let of = |&id: &SequenceId| (id, *scheduler.sequence(id), state.kv_cache.block_table(id).len());
    let running: Vec<_> = scheduler.running().iter().map(of).collect();
    format!("{} {} {running:?}", state.num_waiting, state.kv_cache.num_free())
}

/// Takes `num_steps` of the steps that `watched` has just promised one by one, and at once in a copy of it that was
/// led there by the same calls.
fn check_steady(watched: &mut Watched, copy: &mut dyn Scheduler, num_steps: u32) {
    let mut load = watched.scheduler.steady().expect("promised").load;
    for _ in 0..num_steps {
        assert!(watched.schedule());
        let step = &watched.in_flight[0];
        assert_eq!(step.sequences.len(), watched.scheduler.running().len());
        assert!(step.preempted.is_empty() && step.sequences.iter().all(|s| s.is_decode));
        assert_eq!(step.shape(), plumbline_schema::BatchShape::from_load(load));
        assert!(watched.depth() == 1 || !watched.schedule(), "another step beside a promised one");
        watched.complete();
        assert!(watched.finished.is_empty(), "an end among promised steps");
        load.decode_kv_tokens += u64::from(load.num_decode_seqs);
        load.max_decode_kv_tokens += 1;
    }
    copy.advance(num_steps);
}

/// Serves a workload, some requests a turn, in two ways at once: a step at a time, and by promised stretches.
fn serve(kind: SchedulerKind, workload: &[WorkloadRequest], deployment: &Deployment, pace: &[u8]) -> u32 {
    let mut watched = Watched::new(kind, deployment);
    let mut copy = kind.build(deployment).unwrap();
    let mut copied = VecDeque::new();
    let (mut finished, mut num_steady) = (vec![], 0);
    let (mut requests, mut pace) = (workload.iter(), pace.iter().cycle());
    for turn in 0.. {
        assert!(turn < 100_000, "never done");
        let mut next = || u32::from(*pace.next().unwrap());
        let is_idle = watched.scheduler.state().num_unfinished() == 0;
        let num_new = (next() as usize % 3).max(usize::from(is_idle));
        for request in requests.by_ref().take(num_new) {
            watched.add(request);
            let _ = copy.add(request);
        }
        if requests.len() == 0 && watched.scheduler.state().num_unfinished() == 0 {
            break;
        }
        let steady = if watched.in_flight.is_empty() { copy.steady() } else { None };
        if let Some(steady) = steady {
            assert!(steady.num_steps > 0);
            let num_steps = 1 + next() % steady.num_steps;

            check_steady(&mut watched, &mut *copy, num_steps);
            num_steady += num_steps;
        } else {
            while copied.len() < watched.depth() {
                let mut step = ScheduledStep::default();
                copy.schedule(&mut step);
                if step.is_empty() {
                    break;
                }
                copied.push_back(step);
            }
            watched.turn();
            if let Some(step) = copied.pop_front() {
                copy.complete(&step, &mut finished);
            }
            assert_eq!(copied, watched.in_flight);
        }
        assert_eq!(outline(&*copy), outline(&*watched.scheduler));
    }
    assert_eq!(watched.num_received, watched.num_done + watched.num_rejected);
    assert_eq!(watched.scheduler.state().kv_cache.num_used(), 0);
    num_steady
}

proptest! {
    #[test]
    fn every_policy_keeps_the_laws_and_its_promises(
        workload in workloads(),
        deployment in deployments(),
        pace in prop::collection::vec(any::<u8>(), 1..40),
    ) {
        for kind in KINDS {
            serve(kind, &workload, &deployment, &pace);
        }
    }
}

/// A law that is never tried proves nothing.
#[test]
fn most_steps_of_long_outputs_are_promised() {
    for kind in KINDS {
        // As many as begin together, so that one batch holds all with two in flight, too.
        for (num_requests, pipeline_parallel_size) in [(8, 1), (2, 2)] {
            let request = |i| WorkloadRequest::new(i, Nanos(i), 16, 100 + i as u32);
            let workload: Vec<_> = (0..num_requests).map(request).collect();
            let deployment = Deployment {
                max_num_batched_tokens: 128,
                num_gpu_blocks: 400,
                pipeline_parallel_size,
                ..deployment()
            };
            let num_steady = serve(kind, &workload, &deployment, &[8, 200, 100]);
            assert!(num_steady > 90, "{kind}: {num_steady} promised steps");
        }
    }
}

#[test]
fn what_is_not_modelled_is_refused_by_name() {
    for kind in KINDS {
        let refused = |deployment: Deployment| kind.build(&deployment).err().unwrap().to_string();
        let not_modelled =
            |what: &str, only: &str| format!("scheduler {kind} does not model `{what}`, only {only}");
        assert_eq!(
            refused(Deployment { enable_prefix_caching: true, ..deployment() }),
            not_modelled("enable_prefix_caching = true", "false")
        );
        assert_eq!(
            refused(Deployment { scheduling_policy: "priority".into(), ..deployment() }),
            not_modelled("scheduling_policy = priority", "fcfs")
        );
        assert_eq!(
            refused(Deployment { async_scheduling: true, ..deployment() }),
            not_modelled("async_scheduling = true", "false")
        );
        assert_eq!(
            refused(Deployment { long_prefill_token_threshold: 8, ..deployment() }),
            not_modelled("long_prefill_token_threshold = 8", "0")
        );
        assert_eq!(
            refused(Deployment { block_size: 0, ..deployment() }),
            "deployment key `block_size`: expected at least 1, found 0"
        );
    }
}

#[test]
fn what_exceeds_the_model_is_rejected_and_forgotten() {
    for kind in KINDS {
        assert_eq!(
            rejection(kind, &deployment(), 100, 29),
            "129 tokens of prompt and output exceed max_model_len = 128"
        );
        let mut scheduler = kind.build(&deployment()).unwrap();
        assert!(scheduler.add(&request(u32::MAX, u32::MAX)).is_err());
        assert_eq!(scheduler.state().num_unfinished(), 0);
        assert!(scheduler.add_transferred(&request(4, 1), 4).is_err());
    }
}

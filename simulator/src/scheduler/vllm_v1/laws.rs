//! The laws, over random workloads and deployments.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use plumbline_schema::{AttentionLoad, Nanos, PromptContent};
use proptest::prelude::*;

use super::{tests::deployment, *};

prop_compose! {
    /// Tight budgets, seats and blocks, so that chunks, queues, hits, evictions and preemptions all happen.
    fn deployments()(
        max_num_batched_tokens in 1..40_u32,
        max_num_seqs in 1..7_u32,
        num_gpu_blocks in 8..50_u32,
        block_size in prop::sample::select(vec![1_u32, 3, 4, 16]),
        long_prefill_token_threshold in prop::sample::select(vec![0_u32, 0, 7]),
        (enable_prefix_caching, has_priorities) in any::<(bool, bool)>(),
    ) -> Deployment {
        Deployment {
            max_num_batched_tokens,
            max_num_seqs,
            num_gpu_blocks,
            block_size,
            long_prefill_token_threshold,
            enable_prefix_caching,
            scheduling_policy: if has_priorities { "priority" } else { "fcfs" }.into(),
            ..deployment()
        }
    }
}

/// A request, after how many steps it is added, and how much of its prompt was computed elsewhere.
#[derive(Clone, Debug)]
struct Arrival {
    after_steps: u32,
    request: WorkloadRequest,
    num_transferred: Option<u32>,
}

fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
    let content = (0..4, 0..2_u64, 1..30_u32).prop_map(|(kind, number, prefix_len)| match kind {
        0 | 1 => None,
        2 => Some(PromptContent { prefix_id: Some(number), prefix_len, ..PromptContent::default() }),
        _ => Some(PromptContent { session_id: Some(number), ..PromptContent::default() }),
    });
    let gap = prop_oneof![Just(0_u32), 0..12_u32];
    let arrival = (gap, 1..40_u32, 1..50_u32, -1..2_i32, content, prop::option::weighted(0.1, 0..40_u32));
    prop::collection::vec(arrival, 1..16).prop_map(|arrivals| {
        let mut after_steps = 0;
        let of = |(id, (gap, prompt, output, priority, content, num_transferred))| {
            after_steps += gap;
            let arrival = Nanos(u64::from(after_steps));
            let content = Option::map(content, Arc::new);
            let request =
                WorkloadRequest { priority, content, ..WorkloadRequest::new(id, arrival, prompt, output) };
            Arrival { after_steps, request, num_transferred }
        };
        (0..).zip(arrivals).map(of).collect()
    })
}

/// Adds what has come by then; the ids of what was let in.
fn add_due(scheduler: &mut VllmV1, arrivals: &mut VecDeque<Arrival>, num_steps: u32) -> Vec<SequenceId> {
    let mut added = Vec::new();
    while arrivals.front().is_some_and(|arrival| arrival.after_steps <= num_steps) {
        let Arrival { request, num_transferred, .. } = arrivals.pop_front().expect("just seen");
        added.extend(match num_transferred {
            Some(num_tokens) => scheduler.add_transferred(&request, num_tokens),
            None => scheduler.add(&request),
        });
    }
    added
}

/// Blocks are held by whoever's table has them, and by nobody else.
fn check_blocks(scheduler: &VllmV1) -> Result<(), TestCaseError> {
    let cache = &scheduler.kv_cache;
    let mut owners = BTreeMap::<_, u32>::new();
    for &id in &scheduler.running {
        let table = cache.block_table(id);
        prop_assert_eq!(table.len() as u32, cache.blocks_for(scheduler.sequences[id].num_computed_tokens));
        prop_assert_eq!(table.iter().collect::<BTreeSet<_>>().len(), table.len(), "a block twice in a table");
        for &block in table {
            *owners.entry(block).or_default() += 1;
        }
    }
    prop_assert_eq!(cache.num_used() as usize, owners.len());
    prop_assert_eq!(cache.num_free() + cache.num_used(), cache.num_blocks());
    for (block, num_owners) in owners {
        prop_assert_eq!(cache.num_owners(block), num_owners);
        prop_assert!(num_owners == 1 || cache.has_prefix_caching(), "shared without content");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Steady stretches taken at once, of any length promised, are the single steps: the same batches, preemptions and
    /// free blocks ever after.
    #[test]
    fn steady_stretches_are_single_steps(
        deployment in deployments(),
        arrivals in arrivals(),
        shares in prop::collection::vec(0.0..1.0_f64, 1..20),
    ) {
        let (mut single, mut whole) = (VllmV1::new(&deployment).unwrap(), VllmV1::new(&deployment).unwrap());
        let (mut due_single, mut due_whole) = (VecDeque::from(arrivals.clone()), VecDeque::from(arrivals));
        let (mut step, mut other, mut finished) = (ScheduledStep::default(), ScheduledStep::default(), vec![]);
        let (mut num_steps, mut shares) = (0_u32, shares.into_iter().cycle());
        loop {
            add_due(&mut single, &mut due_single, num_steps);
            add_due(&mut whole, &mut due_whole, num_steps);
            let num_unfinished = single.state().num_unfinished();
            prop_assert_eq!(num_unfinished, whole.state().num_unfinished());
            if num_unfinished == 0 {
                let Some(next) = due_single.front() else { break };
                num_steps = next.after_steps;
                continue;
            }
            let Some(steady) = whole.steady() else {
                single.schedule(&mut step);
                whole.schedule(&mut other);
                prop_assert_eq!(&step, &other);
                prop_assert!(!step.is_empty(), "stalled");
                prop_assert_eq!(single.kv_cache.num_free(), whole.kv_cache.num_free());
                check_blocks(&whole)?;
                single.complete(&step, &mut finished);
                whole.complete(&other, &mut finished);
                num_steps += 1;
                continue;
            };
            let until_next = due_whole.front().map_or(u32::MAX, |next| next.after_steps - num_steps);
            let most = f64::from(steady.num_steps.min(until_next));
            let count = (most * shares.next().unwrap()).ceil().clamp(1.0, most) as u32;
            whole.advance(count);
            for later in 0..count {
                single.schedule(&mut step);
                let mut load = AttentionLoad::default();
                step.sequences.iter().for_each(|s| load.add_decode(s.context_len - later));
                prop_assert_eq!(load, steady.load);
                prop_assert!(step.sequences.iter().all(|s| s.is_decode) && step.preempted.is_empty());
                single.complete(&step, &mut finished);
                prop_assert!(finished.is_empty());
            }
            num_steps += count;
        }
        prop_assert_eq!(whole.kv_cache.num_used(), 0);
    }

    /// However many steps are in flight: each request computes each token once between preemptions and gets its output,
    /// no more; with one step in flight, asynchronous is synchronous.
    #[test]
    fn requests_get_their_tokens_however_many_steps_are_in_flight(
        deployment in deployments(),
        arrivals in arrivals(),
        depth in 1..5_usize,
        is_async in any::<bool>(),
        num_stages in 1..4_u32,
    ) {
        let pipelined = Deployment {
            async_scheduling: is_async,
            pipeline_parallel_size: num_stages,
            ..deployment.clone()
        };
        let (mut scheduler, mut plain) = (VllmV1::new(&pipelined).unwrap(), VllmV1::new(&deployment).unwrap());
        let (mut due, mut due_plain) = (VecDeque::from(arrivals.clone()), VecDeque::from(arrivals));
        let mut in_flight: VecDeque<ScheduledStep> = VecDeque::new();
        let (mut expected, mut finished) = (ScheduledStep::default(), vec![]);
        let mut outputs = BTreeMap::new();
        let mut num_steps = 0;
        loop {
            for id in add_due(&mut scheduler, &mut due, num_steps) {
                outputs.insert(id, (0, scheduler.sequences[id].max_output_tokens));
            }
            add_due(&mut plain, &mut due_plain, num_steps);
            let mut step = ScheduledStep::default();
            if in_flight.len() < depth && scheduler.state().num_unfinished() > 0 {
                scheduler.schedule(&mut step);
                num_steps += 1;
                check_blocks(&scheduler)?;
            }
            if !step.is_empty() {
                prop_assert!(step.sequences.iter().map(|s| s.num_tokens).sum::<u32>() <= deployment.max_num_batched_tokens);
                for s in &step.sequences {
                    let sequence = &scheduler.sequences[s.id];
                    prop_assert!(s.context_len + s.num_tokens < sequence.num_prompt_tokens + sequence.max_output_tokens);
                    let num_coming = sequence.num_output_tokens + sequence.num_in_flight_tokens;
                    prop_assert!(num_coming <= sequence.max_output_tokens);
                }
                if depth == 1 {
                    plain.schedule(&mut expected);
                    prop_assert_eq!(&step, &expected);
                    prop_assert_eq!(scheduler.kv_cache.num_free(), plain.kv_cache.num_free());
                }
                in_flight.push_back(step);
                continue;
            }
            let Some(oldest) = in_flight.pop_front() else {
                prop_assert_eq!(scheduler.state().num_unfinished(), 0, "stalled");
                let Some(next) = due.front() else { break };
                num_steps = next.after_steps;
                continue;
            };
            if depth == 1 {
                plain.complete(&expected, &mut finished);
            }
            scheduler.complete(&oldest, &mut finished);
            for s in oldest.sequences.iter().filter(|s| s.samples) {
                outputs.get_mut(&s.id).expect("unfinished").0 += 1;
            }
            for id in &finished {
                let (num_tokens, max_tokens) = outputs.remove(id).expect("unfinished");
                prop_assert_eq!(num_tokens, max_tokens);
            }
        }
        prop_assert!(outputs.is_empty());
        prop_assert_eq!(scheduler.kv_cache.num_used(), 0);
    }
}

//! The rules one by one.

use std::sync::Arc;

use plumbline_schema::{Nanos, PromptContent};

use super::*;
pub(super) use crate::scheduler::laws::deployment;
use crate::scheduler::laws::{line, request};

/// Forms the next step and completes it.
fn next(scheduler: &mut VllmV1) -> String {
    let mut step = ScheduledStep::default();
    scheduler.schedule(&mut step);
    assert!(!step.is_empty(), "stalled");
    scheduler.complete(&step, &mut vec![]);
    line(&step)
}

/// Forms four steps, none of which completes.
fn four_in_flight(scheduler: &mut VllmV1) -> Vec<ScheduledStep> {
    let mut steps = vec![ScheduledStep::default(); 4];
    for step in &mut steps {
        scheduler.schedule(step);
    }
    steps
}

/// Runs until all is done.
fn steps_of(deployment: &Deployment, requests: &[WorkloadRequest]) -> Vec<String> {
    let mut scheduler = VllmV1::new(deployment).unwrap();
    for request in requests {
        scheduler.add(request).unwrap();
    }
    let mut lines = vec![];
    while scheduler.state().num_unfinished() > 0 {
        lines.push(next(&mut scheduler));
    }
    assert_eq!(scheduler.kv_cache.num_used(), 0);
    lines
}

fn steps(deployment: &Deployment, requests: &[(u32, u32)]) -> Vec<String> {
    let requests: Vec<_> =
        (0..).zip(requests).map(|(id, &(p, d))| WorkloadRequest::new(id, Nanos(0), p, d)).collect();
    steps_of(deployment, &requests)
}

#[test]
fn prefills_are_chunked_to_the_budget_behind_decodes() {
    let lines = steps(&deployment(), &[(20, 2), (40, 1)]);
    assert_eq!(lines, ["20:0;12:0||", "28:12|20|"]);
}

#[test]
fn long_prefills_are_capped_when_a_threshold_is_set() {
    let deployment = Deployment { long_prefill_token_threshold: 8, ..deployment() };
    assert_eq!(steps(&deployment, &[(18, 1), (4, 1)]), ["8:0;4:0||", "8:8||", "2:16||"]);
}

#[test]
fn no_more_than_max_num_seqs_run() {
    let deployment = Deployment { max_num_seqs: 1, ..deployment() };
    assert_eq!(steps(&deployment, &[(4, 2), (5, 1)]), ["4:0||", "|4|", "5:0||"]);
}

/// Five usable blocks of 4: both prompts fill two; the first decodes take one and none is left.
#[test]
fn the_last_running_sequence_is_preempted_and_recomputed() {
    let deployment = Deployment { num_gpu_blocks: 6, ..deployment() };
    let lines = steps(&deployment, &[(8, 3), (8, 3)]);
    assert_eq!(lines, ["8:0;8:0||", "|8|1", "|9|", "9:0||", "|9|"]);
}

/// A preempted sequence waits at the front, and its outputs are recomputed with the prompt.
#[test]
fn a_preempted_sequence_comes_back_before_newer_ones() {
    let deployment = Deployment { num_gpu_blocks: 7, max_num_seqs: 2, ..deployment() };
    let lines = steps(&deployment, &[(8, 6), (8, 6), (4, 1)]);
    assert_eq!(lines, ["8:0;8:0||", "|8;8|", "|9;9|", "|10;10|", "|11;11|", "|12|1", "13:0;4:0||",]);
}

/// Four usable blocks hold one sequence whole; the second waits though its first chunk would fit.
#[test]
fn a_waiting_sequence_must_fit_whole() {
    let deployment = Deployment { num_gpu_blocks: 5, max_num_batched_tokens: 10, ..deployment() };
    assert_eq!(steps(&deployment, &[(7, 2), (9, 1)]), ["7:0||", "|7|", "9:0||"]);
}

#[test]
fn what_can_never_be_served_is_rejected_by_name() {
    let mut scheduler = VllmV1::new(&Deployment { num_gpu_blocks: 6, ..deployment() }).unwrap();
    assert_eq!(
        scheduler.add(&request(100, 29)).unwrap_err().to_string(),
        "129 tokens of prompt and output exceed max_model_len = 128"
    );
    assert_eq!(
        scheduler.add(&request(20, 2)).unwrap_err().to_string(),
        "21 cached tokens need more than the 5 usable KV blocks of 4"
    );
    assert!(scheduler.add(&request(u32::MAX, u32::MAX)).is_err());
    assert!(scheduler.add(&request(20, 1)).is_ok());
    assert_eq!(scheduler.state().num_unfinished(), 1);
}

#[test]
fn what_is_not_modelled_is_refused_by_name() {
    let refused = |deployment: Deployment| VllmV1::new(&deployment).unwrap_err().to_string();
    assert_eq!(
        refused(Deployment { scheduling_policy: "sjf".into(), ..deployment() }),
        "scheduler vllm-v1 does not model `scheduling_policy = sjf`, only fcfs and priority"
    );
    assert_eq!(
        refused(Deployment { block_size: 0, ..deployment() }),
        "deployment key `block_size`: expected at least 1, found 0"
    );
}

fn caching() -> Deployment {
    Deployment { enable_prefix_caching: true, ..deployment() }
}

fn sharing(id: u64, num_prefill_tokens: u32, prefix_len: u32) -> WorkloadRequest {
    let content = PromptContent { prefix_id: Some(7), prefix_len, ..PromptContent::default() };
    WorkloadRequest {
        content: Some(Arc::new(content)),
        ..WorkloadRequest::new(id, Nanos(0), num_prefill_tokens, 1)
    }
}

/// The prefix of 10 fills two blocks of 4, which are known as soon as the first request is scheduled.
#[test]
fn a_shared_prefix_is_computed_once() {
    assert_eq!(steps_of(&caching(), &[sharing(0, 12, 10), sharing(1, 14, 10)]), ["12:0;6:8||"]);
    assert_eq!(steps_of(&deployment(), &[sharing(0, 12, 10), sharing(1, 14, 10)]), ["12:0;14:0||"]);
}

/// Both blocks of the second prompt are cached, but a token must be computed, and hits are whole blocks.
#[test]
fn of_a_prompt_that_is_all_cached_the_last_block_is_computed() {
    assert_eq!(steps_of(&caching(), &[sharing(0, 8, 8), sharing(1, 8, 8)]), ["8:0;4:4||"]);
}

/// As without caching, but the preempted sequence's two full blocks are still there when it comes back.
#[test]
fn a_preempted_sequence_finds_its_own_blocks() {
    let deployment = Deployment { num_gpu_blocks: 6, ..caching() };
    let lines = steps(&deployment, &[(8, 3), (8, 3)]);
    assert_eq!(lines, ["8:0;8:0||", "|8|1", "|9|", "|8|", "|9|"]);
}

/// The second turn's prompt begins with the first's prompt and output, of which all but the last token were computed.
#[test]
fn a_conversation_goes_on_where_it_ended() {
    let turn = |id, num_prefill_tokens, num_decode_tokens| {
        let content = PromptContent { session_id: Some(1), ..PromptContent::default() };
        WorkloadRequest {
            content: Some(Arc::new(content)),
            ..WorkloadRequest::new(id, Nanos(0), num_prefill_tokens, num_decode_tokens)
        }
    };
    let deployment = Deployment { max_num_seqs: 1, ..caching() };
    assert_eq!(steps_of(&deployment, &[turn(0, 7, 2), turn(1, 20, 1)]), ["7:0||", "|7|", "12:8||"]);
}

fn with_priority(id: u64, priority: i32, num_prefill_tokens: u32) -> WorkloadRequest {
    WorkloadRequest { priority, ..WorkloadRequest::new(id, Nanos(id), num_prefill_tokens, 6) }
}

fn by_priority() -> Deployment {
    Deployment { scheduling_policy: "priority".into(), max_num_batched_tokens: 16, ..deployment() }
}

#[test]
fn the_lower_priority_value_runs_first_and_equals_in_order_of_arrival() {
    let deployment = Deployment { max_num_seqs: 1, ..by_priority() };
    let requests =
        [with_priority(0, 1, 4), with_priority(1, 0, 5), with_priority(2, 0, 6), with_priority(3, -1, 7)];
    let lines = steps_of(&deployment, &requests);
    let prefills: Vec<_> = lines.iter().filter(|line| !line.starts_with('|')).collect();
    assert_eq!(prefills, ["7:0||", "5:0||", "6:0||", "4:0||"]);
}

/// Five usable blocks. The first to run has the higher value: it is part of the step already when the second needs its
/// blocks.
#[test]
fn a_victim_leaves_the_step_it_is_part_of() {
    let mut scheduler = VllmV1::new(&Deployment { num_gpu_blocks: 6, ..by_priority() }).unwrap();
    scheduler.add(&with_priority(0, 1, 8)).unwrap();
    assert_eq!(next(&mut scheduler), "8:0||");
    scheduler.add(&with_priority(1, 0, 8)).unwrap();
    assert_eq!(next(&mut scheduler), "8:0|8|");
    assert_eq!(next(&mut scheduler), "|8|0");
    assert_eq!(scheduler.sequences[SequenceId(0)].num_in_flight_tokens, 0);
    assert_eq!(next(&mut scheduler), "|9|");
}

/// Seven usable blocks. In the last step the budget of 4 is a decode of the first, one of the second and two tokens of
/// the third's prompt; the second finds no block, and the third gets the first's token.
#[test]
fn a_victims_tokens_return_to_the_budget() {
    let deployment = Deployment { num_gpu_blocks: 8, max_num_batched_tokens: 4, ..by_priority() };
    let mut scheduler = VllmV1::new(&deployment).unwrap();
    let longer = |request| WorkloadRequest { num_decode_tokens: 10, ..request };
    scheduler.add(&longer(with_priority(0, 1, 4))).unwrap();
    assert_eq!(next(&mut scheduler), "4:0||");
    scheduler.add(&longer(with_priority(1, 0, 5))).unwrap();
    scheduler.add(&longer(with_priority(2, 0, 12))).unwrap();
    let lines: Vec<_> = (0..6).map(|_| next(&mut scheduler)).collect();
    assert_eq!(lines, ["3:0|4|", "2:3;1:0|5|", "2:1|6;5|", "2:3|7;6|", "2:5|8;7|", "3:7|8|0"]);
}

/// Five usable blocks. The first to run finds no block and has to go itself; the step is formed anew without it.
#[test]
fn a_step_that_only_preempts_is_followed_at_once() {
    let mut scheduler = VllmV1::new(&Deployment { num_gpu_blocks: 6, ..by_priority() }).unwrap();
    scheduler.add(&with_priority(0, 1, 8)).unwrap();
    assert_eq!(next(&mut scheduler), "8:0||");
    scheduler.add(&with_priority(1, 0, 5)).unwrap();
    let lines: Vec<_> = (0..5).map(|_| next(&mut scheduler)).collect();
    assert_eq!(lines, ["5:0|8|", "|9;5|", "|10;6|", "|11;7|", "|8|0"]);
}

#[test]
fn asynchronous_scheduling_goes_on_with_tokens_in_flight_up_to_the_last() {
    let in_flight = |is_async| {
        let deployment = Deployment { async_scheduling: is_async, ..deployment() };
        let mut scheduler = VllmV1::new(&deployment).unwrap();
        scheduler.add(&request(4, 3)).unwrap();
        let steps = four_in_flight(&mut scheduler);
        let lines: Vec<_> = steps.iter().map(line).collect();
        for step in &steps {
            scheduler.complete(step, &mut vec![]);
        }
        (lines, scheduler.state().num_unfinished())
    };
    assert_eq!(in_flight(true), (vec!["4:0||".into(), "|4|".into(), "|5|".into(), "||".into()], 0));
    assert_eq!(in_flight(false), (vec!["4:0||".into(), "||".into(), "||".into(), "||".into()], 1));
}

/// Prefill chunks follow each other without waiting.
#[test]
fn a_prompt_fills_a_pipeline() {
    let deployment = Deployment { max_num_batched_tokens: 8, pipeline_parallel_size: 4, ..deployment() };
    let mut scheduler = VllmV1::new(&deployment).unwrap();
    scheduler.add(&request(20, 2)).unwrap();
    let steps = four_in_flight(&mut scheduler);
    assert_eq!(steps.iter().map(line).collect::<Vec<_>>(), ["8:0||", "8:8||", "4:16||", "||"]);
}

/// In an asynchronous pipeline two decodes of a sequence are as many steps apart as there are stages.
#[test]
fn an_asynchronous_pipeline_spaces_decodes() {
    let deployment = Deployment { async_scheduling: true, pipeline_parallel_size: 2, ..deployment() };
    let mut scheduler = VllmV1::new(&deployment).unwrap();
    scheduler.add(&request(4, 5)).unwrap();
    let steps = four_in_flight(&mut scheduler);
    assert_eq!(steps.iter().map(line).collect::<Vec<_>>(), ["4:0||", "||", "|4|", "||"]);
}

/// Ten tokens need three blocks; the last of them is computed here. Once preempted, all are.
#[test]
fn a_transferred_prompt_needs_blocks_and_one_token() {
    let mut scheduler = VllmV1::new(&Deployment { num_gpu_blocks: 6, ..deployment() }).unwrap();
    scheduler.add(&request(7, 6)).unwrap();
    scheduler.add_transferred(&request(10, 5), 10).unwrap();
    assert_eq!(next(&mut scheduler), "7:0;1:9||");
    assert_eq!(scheduler.kv_cache.num_used(), 5);
    assert_eq!(next(&mut scheduler), "|7;10|");
    assert_eq!(next(&mut scheduler), "|8|1");
    for context in 9..12 {
        assert_eq!(next(&mut scheduler), format!("|{context}|"));
    }
    assert_eq!(next(&mut scheduler), "12:0||");
    assert!(scheduler.add_transferred(&request(100, 29), 5).is_err());
}

//! The rules one by one, and the laws.

use plumbline_schema::{EngineMode, Nanos};

use super::*;

fn deployment() -> Deployment {
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
    }
}

fn request(num_prefill_tokens: u32, num_decode_tokens: u32) -> WorkloadRequest {
    WorkloadRequest::new(0, Nanos(0), num_prefill_tokens, num_decode_tokens)
}

/// Runs until all is done; each step as `chunks|decodes|preempted`.
fn steps(deployment: &Deployment, requests: &[(u32, u32)]) -> Vec<String> {
    let mut scheduler = VllmV1::new(deployment).unwrap();
    for &(prefill, decode) in requests {
        scheduler.add(&request(prefill, decode)).unwrap();
    }
    let (mut step, mut finished, mut lines) = (ScheduledStep::default(), vec![], vec![]);
    while scheduler.state().num_unfinished() > 0 {
        scheduler.schedule(&mut step);
        assert!(!step.is_empty(), "stalled after {lines:?}");
        let batch = step.batch();
        let preempted: Vec<_> = step.preempted.iter().map(|id| id.0.to_string()).collect();
        let (chunks, decodes) = (batch.format_prefill_chunks(), batch.format_decode_contexts());
        lines.push(format!("{chunks}|{decodes}|{}", preempted.join(";")));
        scheduler.complete(&step, &mut finished);
    }
    assert_eq!(scheduler.kv_cache.num_used(), 0);
    lines
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

use std::sync::Arc;

use plumbline_schema::{Nanos, PromptContent};

use super::{
    super::laws::{deployment, line, rejection, steps},
    *,
};

/// An engine run by hand, its steps as `chunks|decodes|preempted`.
struct Engine(Sglang);

impl Engine {
    fn new(deployment: &Deployment) -> Self {
        Self(Sglang::new(deployment).unwrap())
    }

    fn add(&mut self, request: &WorkloadRequest) -> &mut Self {
        self.0.add(request).unwrap();
        self
    }

    /// Forms and completes a step.
    fn step(&mut self) -> String {
        let mut step = ScheduledStep::default();
        self.0.schedule(&mut step);
        self.0.complete(&step, &mut Vec::new());
        line(&step)
    }

    fn steps(&mut self, num_steps: usize) -> Vec<String> {
        (0..num_steps).map(|_| self.step()).collect()
    }

    fn all(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        while self.0.state().num_unfinished() > 0 {
            lines.push(self.step());
        }
        lines
    }
}

fn caching(max_num_batched_tokens: u32) -> Deployment {
    Deployment { enable_prefix_caching: true, max_num_batched_tokens, max_model_len: 400, ..deployment() }
}

/// A request whose first tokens are those of all with this prefix.
fn prefixed(request_id: u64, prefix_id: u64, prefix_len: u32, num_prefill_tokens: u32) -> WorkloadRequest {
    let content = PromptContent { prefix_id: Some(prefix_id), prefix_len, ..PromptContent::default() };
    WorkloadRequest {
        content: Some(Arc::new(content)),
        ..WorkloadRequest::new(request_id, Nanos(0), num_prefill_tokens, 1)
    }
}

#[test]
fn prefills_are_chunked_and_hold_decodes_back() {
    let lines = steps(SchedulerKind::Sglang, &deployment(), &[(20, 2), (40, 1)]);
    assert_eq!(lines, ["20:0;12:0||", "28:12||", "|20|"]);
}

/// The first sequence ends in the second step; the third request is let in after the decode that misses it.
#[test]
fn a_seat_is_free_after_the_decode_that_misses_its_sequence() {
    let deployment = Deployment { max_num_seqs: 2, ..deployment() };
    let lines = steps(SchedulerKind::Sglang, &deployment, &[(4, 2), (4, 5), (5, 1)]);
    assert_eq!(lines, ["4:0;4:0||", "|4;4|", "|5|", "5:0||", "|6|", "|7|"]);
}

#[test]
fn what_is_cached_is_not_computed_and_goes_first() {
    let mut engine = Engine::new(&caching(64));
    assert_eq!(engine.add(&prefixed(0, 1, 40, 48)).all(), ["48:0||"]);
    engine.add(&prefixed(1, 2, 0, 20)).add(&prefixed(2, 1, 40, 50));
    assert_eq!(engine.all(), ["10:40;20:0||"]);
    // All is cached, and yet the last token has to be computed, in whole blocks of 4.
    assert_eq!(engine.add(&prefixed(2, 1, 40, 48)).all(), ["4:44||"]);
}

#[test]
fn without_prefix_caching_all_is_computed_in_order() {
    let mut engine = Engine::new(&Deployment { enable_prefix_caching: false, ..caching(64) });
    assert_eq!(engine.add(&prefixed(0, 1, 40, 48)).all(), ["48:0||"]);
    engine.add(&prefixed(1, 2, 0, 20)).add(&prefixed(2, 1, 40, 44));
    assert_eq!(engine.all(), ["20:0;44:0||"]);
}

#[test]
fn a_request_waits_for_another_to_compute_their_prefix() {
    let mut engine = Engine::new(&caching(80));
    engine.add(&prefixed(0, 1, 40, 48)).add(&prefixed(1, 1, 40, 48)).add(&prefixed(2, 2, 0, 32));
    assert_eq!(engine.all(), ["48:0;32:0||", "8:40||"]);
}

#[test]
fn the_next_turn_begins_with_the_output_of_the_one_before() {
    let turn = |id, prefill, decode| {
        let content = PromptContent { session_id: Some(3), ..PromptContent::default() };
        WorkloadRequest {
            content: Some(Arc::new(content)),
            ..WorkloadRequest::new(id, Nanos(0), prefill, decode)
        }
    };
    let mut engine = Engine::new(&caching(64));
    engine.add(&turn(0, 10, 7)).all();
    // 16 tokens were computed, all but the last output.
    assert_eq!(engine.add(&turn(1, 30, 1)).all(), ["14:16||"]);
}

/// 60 tokens. The second request fits beside the first while 0.7 of that one's 19 tokens to come are expected (36
/// into 60 - 10 - 13.3); in the end they need 29 and 35.
#[test]
fn a_sequence_is_retracted_and_comes_back_when_it_fits() {
    let deployment = Deployment { num_gpu_blocks: 60, block_size: 1, ..caching(32) };
    let mut engine = Engine::new(&deployment);
    let alone = |id, prefill| WorkloadRequest::new(id, Nanos(0), prefill, 20);
    assert_eq!(engine.add(&alone(0, 10)).step(), "10:0||");
    assert_eq!(engine.add(&alone(1, 16)).step(), "16:0||");
    let decodes = engine.steps(17);
    assert_eq!((&*decodes[0], &*decodes[16]), ("|10;16|", "|26;32|"));
    assert_eq!(engine.0.state().kv_cache.num_free(), 0);
    let expected = 17.0f64.mul_add(-NEW_TOKEN_RATIO_DECAY, INIT_NEW_TOKEN_RATIO);
    assert!((engine.0.new_token_ratio - expected).abs() < 1e-9);
    // Of two with 18 outputs each the longer prompt goes. Room for 20 decodes of the other is made at once, so that
    // even its prompt is forgotten.
    assert_eq!(engine.step(), "|27|1");
    assert!((engine.0.new_token_ratio - 1.0).abs() < 1e-9, "(18 + 20) of 20 outputs");
    // 34 tokens and two to come do not fit into 32. The budget is of 32, too.
    assert_eq!(engine.all(), ["|28|", "32:0||", "2:32||", "|34|"]);
}

#[test]
fn a_prefill_of_a_chunk_keeps_the_next_one_first() {
    let lines = steps(SchedulerKind::Sglang, &deployment(), &[(70, 1), (3, 1)]);
    assert_eq!(lines, ["32:0||", "32:32||", "6:64;3:0||"]);
}

/// Two batches of two take turns, and neither waits for the other.
#[test]
fn pipeline_stages_have_batches_of_their_own() {
    let deployment = Deployment { pipeline_parallel_size: 2, ..deployment() };
    let lines = steps(SchedulerKind::Sglang, &deployment, &[(4, 3), (5, 3), (6, 3), (7, 3)]);
    assert_eq!(lines, ["4:0;5:0||", "6:0;7:0||", "|4;5|", "|6;7|", "|5;6|", "|7;8|"]);
}

#[test]
fn what_can_never_be_served_is_rejected_by_name() {
    let refused = |deployment: &Deployment, prefill, decode| {
        rejection(SchedulerKind::Sglang, deployment, prefill, decode)
    };
    assert_eq!(refused(&deployment(), 100, 29), "129 tokens of prompt and output exceed max_model_len = 128");
    let small = Deployment { num_gpu_blocks: 6, ..deployment() };
    assert_eq!(refused(&small, 20, 6), "25 cached tokens need more than the 6 usable KV blocks of 4");
    assert_eq!(
        refused(&small, 15, 5),
        "20 tokens of prompt and output exceed the 19 that sglang plans for at most"
    );
    assert_eq!(steps(SchedulerKind::Sglang, &small, &[(18, 1)]), ["18:0||"]);
}

#[test]
fn what_is_not_modelled_is_refused_by_name() {
    let refused = |deployment: Deployment| Sglang::new(&deployment).unwrap_err().to_string();
    assert_eq!(
        refused(Deployment { async_scheduling: true, ..deployment() }),
        "scheduler sglang does not model `async_scheduling = true`, only false"
    );
    assert_eq!(
        refused(Deployment { scheduling_policy: "priority".into(), ..deployment() }),
        "scheduler sglang does not model `scheduling_policy = priority`, only fcfs"
    );
    assert_eq!(
        refused(Deployment { long_prefill_token_threshold: 8, ..deployment() }),
        "scheduler sglang does not model `long_prefill_token_threshold = 8`, only 0"
    );
    assert_eq!(
        refused(Deployment { max_num_batched_tokens: 30, ..deployment() }),
        "deployment key `max_num_batched_tokens`: expected a multiple of block_size = 4, as SGLang demands of its \
         chunks, found 30"
    );
}

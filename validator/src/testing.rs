//! Small runs for the unit tests.

use plumbline_schema::{Nanos, RequestMetrics, RequestStatus, Run, RunInfo, RunKind, TokenMetrics};

use crate::{
    compare::compare,
    results::{CaseResult, SuiteResult},
    suite::Role,
};

/// A finished request that arrives at `arrival` and has its tokens out at `tokens`.
pub(crate) fn request(request_id: u64, arrival: u64, tokens: &[u64]) -> (RequestMetrics, Vec<u64>) {
    let (first, last) = (tokens[0], tokens[tokens.len() - 1]);
    let row = RequestMetrics {
        request_id,
        arrival_time_ns: Nanos(arrival),
        admitted_time_ns: None,
        first_token_time_ns: Some(Nanos(first)),
        ttft_ns: Some(Nanos(first - arrival)),
        completion_time_ns: Some(Nanos(last)),
        num_prefill_tokens: 16,
        num_decode_tokens: tokens.len() as u32,
        num_decode_tokens_actual: tokens.len() as u32,
        status: RequestStatus::Ok,
        backend: "test".into(),
    };
    (row, tokens.to_vec())
}

pub(crate) fn token_times(request_id: u64, times: &[u64]) -> Vec<TokenMetrics> {
    times
        .iter()
        .enumerate()
        .map(|(i, &time)| TokenMetrics {
            request_id,
            token_index: i as u32,
            token_time_ns: Nanos(time),
            token_latency_ns: Nanos(if i == 0 { 0 } else { time - times[i - 1] }),
        })
        .collect()
}

/// A run without token times until [`TestRun::with_tokens`] is called.
pub(crate) fn run(requests: Vec<(RequestMetrics, Vec<u64>)>) -> TestRun {
    let info = RunInfo::new(RunKind::Real, "test");
    let tokens = requests.iter().flat_map(|(r, times)| token_times(r.request_id, times)).collect();
    let requests = requests.into_iter().map(|(r, _)| r).collect();
    TestRun { run: Run { info, requests, tokens: Vec::new(), steps: Vec::new() }, tokens }
}

/// A run and the token times it may record.
pub(crate) struct TestRun {
    run: Run,
    tokens: Vec<TokenMetrics>,
}

impl TestRun {
    pub(crate) fn with_tokens(mut self) -> Run {
        self.run.tokens = self.tokens;
        self.run
    }
}

impl std::ops::Deref for TestRun {
    type Target = Run;
    fn deref(&self) -> &Run {
        &self.run
    }
}

impl std::ops::DerefMut for TestRun {
    fn deref_mut(&mut self) -> &mut Run {
        &mut self.run
    }
}

const MS: f64 = 1e6;

/// 101 requests of five tokens whose TTFT is spread evenly from half to one and a half times `ttft_ms`.
pub(crate) fn spread_run(ttft_ms: f64, gap_ms: f64) -> Run {
    let rows = (0..101u64).map(|i| {
        let arrival = i * 100_000_000;
        // 37 is coprime to 101: every factor once, in no order.
        let factor = 0.5 + ((i * 37) % 101) as f64 / 100.0;
        let first = arrival + (ttft_ms * factor * MS) as u64;
        let tokens: Vec<u64> = (0..5).map(|t| first + (gap_ms * factor * MS * f64::from(t)) as u64).collect();
        request(i, arrival, &tokens)
    });
    run(rows.collect()).with_tokens()
}

/// Two held-out cases, one fitted on and one that failed.
pub(crate) fn suite_result() -> SuiteResult {
    let judged = |name: &str, role, repeats: &[f64], sim_ms: f64| {
        let real: Vec<_> = repeats.iter().map(|&ttft| spread_run(ttft, ttft / 5.0)).collect();
        let mut case =
            CaseResult::compared(name, role, compare(&real, &spread_run(sim_ms, sim_ms / 5.0)).unwrap());
        case.simulate_ms = Some(sim_ms);
        case.coverage = [("interpolated".to_owned(), 0.97), ("extrapolated".to_owned(), 0.03)].into();
        case
    };
    let cases = vec![
        judged("seed <fit> & \"quoted\"", Role::Fit, &[17.28], 17.0),
        judged("llama3-8b-graph/static-b128-p256", Role::HeldOut, &[20.0, 21.0], 18.0),
        judged("qwen3-0.6b-graph/conv-q8", Role::HeldOut, &[16.0, 18.8, 17.0], 16.5),
        CaseResult::failed("broken", Role::HeldOut, "runs/none: no such file"),
    ];
    SuiteResult::new(cases, 250.0)
}

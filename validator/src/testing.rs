//! Small runs for the unit tests.

use plumbline_schema::{Nanos, RequestMetrics, RequestStatus, Run, RunInfo, RunKind, TokenMetrics};

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

/// A run without token times until [`WithTokens::with_tokens`] is called.
pub(crate) fn run(requests: Vec<(RequestMetrics, Vec<u64>)>) -> TestRun {
    let info = RunInfo {
        kind: RunKind::Real,
        engine: "test".into(),
        gpu: None,
        deployment: None,
        workload_digest: None,
        bundle_digest: None,
        seed: None,
    };
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

//! What a real run says about step times and about the time between steps.

use plumbline_bundles::EngineProfile;
use plumbline_schema::{Nanos, PrefillChunk, RequestMetrics, RequestStatus, Run, StepBatch, StepMetrics};

/// A step with what came before it.
#[derive(Clone, Debug, PartialEq)]
pub struct ObservedStep {
    /// What was computed.
    pub batch: StepBatch,
    /// When it began, on the run's clock.
    pub start_ns: f64,
    /// How long it took, ns.
    pub time_ns: f64,
    /// The scheduler's part of it, ns; `None` when not recorded.
    pub schedule_ns: Option<f64>,
    /// The least and the most that the GPU can have worked in it, ns, by the phases of its host; `None` when not recorded.
    pub gpu_bounds_ns: Option<(f64, f64)>,
    /// Whether the engine had nothing to do before it.
    pub after_idle: bool,
}

/// The time between two steps, or between an arrival at an idle engine and the step that follows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ObservedGap {
    /// Length, ns.
    pub time_ns: f64,
    /// Sequences of the step before; `None` when the engine was idle.
    pub seqs_before: Option<u32>,
    /// Tokens of the step before.
    pub tokens_before: u32,
    /// Requests taken in.
    pub num_admitted: u32,
    /// Prompt tokens taken in.
    pub admitted_tokens: u64,
}

/// An engine that had work starts its next step sooner than this; one that lets longer pass was waiting.
const WAITING: Nanos = Nanos(1_000_000);

/// Where a run's step times come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// `step_metrics.csv`.
    Steps,
    /// Distinct token times of requests that never overlap.
    Tokens,
    /// First token and completion of requests that never overlap.
    Requests,
}

/// Whether a run says what its steps were: it records them, or no two of its requests overlap.
#[must_use]
pub fn has_steps(run: &Run) -> bool {
    !run.steps.is_empty() || overlapping(&in_order(run)).is_none()
}

/// Finished requests by arrival.
fn in_order(run: &Run) -> Vec<&RequestMetrics> {
    let mut requests: Vec<_> = run.requests.iter().filter(|r| r.status == RequestStatus::Ok).collect();
    requests.sort_by_key(|r| r.arrival_time_ns);
    requests
}

/// The first two requests that were served at the same time.
fn overlapping(requests: &[&RequestMetrics]) -> Option<(u64, u64)> {
    let overlap = |pair: &&[&RequestMetrics]| {
        pair[0].completion_time_ns.is_some_and(|end| end > pair[1].arrival_time_ns)
    };
    requests.windows(2).find(overlap).map(|pair| (pair[0].request_id, pair[1].request_id))
}

/// Reads a run's steps from the best source it has.
///
/// Without step metrics, only requests that never overlap say what a step computed: the time to first token is one
/// prefill, and each token after it one decode. With request metrics alone the decodes share their mean.
///
/// # Errors
/// In words, when requests overlap and there are no step metrics.
pub fn observed_steps(run: &Run, profile: &EngineProfile) -> Result<(Source, Vec<ObservedStep>), String> {
    if !run.steps.is_empty() {
        return Ok((Source::Steps, from_steps(&run.steps, profile.idle_threshold_ns)));
    }
    let requests = in_order(run);
    if let Some((a, b)) = overlapping(&requests) {
        return Err(format!(
            "requests {a} and {b} overlap, so step times cannot be told from request times: record step_metrics.csv"
        ));
    }
    let source = if run.tokens.is_empty() { Source::Requests } else { Source::Tokens };
    let mut steps = Vec::new();
    let mut last_end: Option<Nanos> = None;
    for request in requests {
        let (Some(first), Some(end)) = (request.first_token_time_ns, request.completion_time_ns) else {
            continue;
        };
        let idle =
            last_end.is_none_or(|last| is_idle(last, request.arrival_time_ns, profile.idle_threshold_ns));
        last_end = Some(end);
        let chunk = PrefillChunk { num_tokens: request.num_prefill_tokens, context_len: 0 };
        steps.push(ObservedStep {
            batch: StepBatch { prefill_chunks: vec![chunk], decode_contexts: Vec::new() },
            start_ns: request.arrival_time_ns.0 as f64,
            time_ns: first.saturating_since(request.arrival_time_ns).0 as f64,
            schedule_ns: None,
            gpu_bounds_ns: None,
            after_idle: idle,
        });
        let mut start_ns = first.0 as f64;
        let gaps = decode_gaps(run, request, first, end);
        for (i, gap) in gaps.into_iter().enumerate() {
            let context = request.num_prefill_tokens.saturating_add(i as u32);
            let batch = StepBatch { prefill_chunks: Vec::new(), decode_contexts: vec![context] };
            steps.push(ObservedStep {
                batch,
                start_ns,
                time_ns: gap,
                schedule_ns: None,
                gpu_bounds_ns: None,
                after_idle: false,
            });
            start_ns += gap;
        }
    }
    Ok((source, steps))
}

/// Gaps between a request's tokens, ns: its own token times, or their mean as often.
fn decode_gaps(run: &Run, request: &RequestMetrics, first: Nanos, end: Nanos) -> Vec<f64> {
    let times: Vec<Nanos> =
        run.tokens.iter().filter(|t| t.request_id == request.request_id).map(|t| t.token_time_ns).collect();
    if times.len() > 1 {
        return times.windows(2).map(|pair| pair[1].saturating_since(pair[0]).0 as f64).collect();
    }
    let num_gaps = request.num_decode_tokens_actual.saturating_sub(1);
    vec![end.saturating_since(first).0 as f64 / f64::from(num_gaps.max(1)); num_gaps as usize]
}

fn from_steps(steps: &[StepMetrics], idle_threshold_ns: f64) -> Vec<ObservedStep> {
    let mut last_end: Option<Nanos> = None;
    steps
        .iter()
        .map(|step| {
            let after_idle = last_end.is_none_or(|last| is_idle(last, step.step_start_ns, idle_threshold_ns));
            last_end = Some(step.end_ns());
            ObservedStep {
                batch: step.batch.clone(),
                start_ns: step.step_start_ns.0 as f64,
                time_ns: step.step_duration_ns.0 as f64,
                schedule_ns: Some(step.schedule_ns.0 as f64),
                // The GPU works from the first launch on at the earliest, and all the time that the host waits for it.
                gpu_bounds_ns: step
                    .phases
                    .map(|phases| (phases.wait_ns.0 as f64, (phases.launch_ns + phases.wait_ns).0 as f64)),
                after_idle,
            }
        })
        .collect()
}

fn is_idle(last_end: Nanos, next: Nanos, idle_threshold_ns: f64) -> bool {
    next.saturating_since(last_end).0 as f64 >= idle_threshold_ns
}

/// Reads the times between steps; empty when the run does not record when requests were admitted.
#[must_use]
pub fn observed_gaps(run: &Run) -> Vec<ObservedGap> {
    let mut admitted: Vec<(Nanos, &RequestMetrics)> =
        run.requests.iter().filter_map(|r| Some((r.admitted_time_ns?, r))).collect();
    if admitted.len() != run.requests.len() {
        return Vec::new();
    }
    admitted.sort_by_key(|(time, _)| *time);
    let mut next = 0;
    let mut before: Option<&StepMetrics> = None;
    let mut gaps = Vec::with_capacity(run.steps.len());
    for step in &run.steps {
        let from = next;
        while next < admitted.len() && admitted[next].0 <= step.step_start_ns {
            next += 1;
        }
        let taken = &admitted[from..next];
        let first_arrival = taken.iter().map(|(_, r)| r.arrival_time_ns).min();
        let admitted_tokens = taken.iter().map(|(_, r)| u64::from(r.num_prefill_tokens)).sum();
        let idle_since = match (before, first_arrival) {
            // The engine waited for this arrival.
            (Some(last), Some(arrival)) if arrival > last.end_ns() + WAITING => Some(arrival),
            (None, Some(arrival)) => Some(arrival),
            _ => None,
        };
        let start = idle_since.or(before.map(StepMetrics::end_ns));
        if let Some(start) = start {
            let load = before.map(|b| b.batch.shape()).unwrap_or_default();
            gaps.push(ObservedGap {
                time_ns: step.step_start_ns.saturating_since(start).0 as f64,
                seqs_before: (idle_since.is_none()).then_some(load.num_seqs),
                tokens_before: load.num_tokens,
                num_admitted: taken.len() as u32,
                admitted_tokens,
            });
        }
        before = Some(step);
    }
    gaps
}

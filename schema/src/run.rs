//! One run of a workload, real or simulated: the same files for both.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    batch::StepBatch,
    deployment::Deployment,
    environment::Environment,
    error::{InputError, Location},
    files::{plain_or_zst, read_csv, read_json, write_json},
    host::{HostFactorUsed, HostInfo},
    rows::{PhasedStep, write_rows},
    source::RunSource,
    units::Nanos,
    workload::{Workload, WorkloadRequest},
};

/// A request's first token in `token_metrics.csv` may be this far from the one in `request_metrics.csv`: what rounding of
/// other tools' times makes of the same event. Further apart, the files are of different clocks or runs.
const SAME_EVENT_NS: u64 = 1_000_000;

/// Whether a run happened or was predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunKind {
    /// Measured on an engine.
    Real,
    /// Predicted by a simulator.
    Simulated,
}

/// `run.json`: what a run was made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// Real or simulated.
    pub kind: RunKind,
    /// The engine, or the engine profile of a simulation.
    pub engine: String,
    /// Plumbline's name of the GPU; `None` when not recorded.
    #[serde(default)]
    pub gpu: Option<String>,
    /// The deployment; `None` when not recorded.
    #[serde(default)]
    pub deployment: Option<Deployment>,
    /// SHA-256 of the workload, hex.
    #[serde(default)]
    pub workload_digest: Option<String>,
    /// SHA-256 of the bundle's manifest, hex; simulated runs only.
    #[serde(default)]
    pub bundle_digest: Option<String>,
    /// Seed of the simulation.
    #[serde(default)]
    pub seed: Option<u64>,
    /// The host of a real run, or the one that a simulation was asked to predict; `None` when not recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostInfo>,
    /// The factor on host costs and why; simulations that were asked for another host only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_factor: Option<HostFactorUsed>,
    /// How the run went; of this project's own engine only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conduct: Option<RunConduct>,
    /// Model, dtype and versions; `None` when none is recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub environment: Option<Environment>,
    /// The other tool's file that it was made of; imported runs only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<RunSource>,
}

impl RunInfo {
    /// A run of an engine of which nothing else is recorded.
    #[must_use]
    pub fn new(kind: RunKind, engine: impl Into<String>) -> Self {
        Self {
            kind,
            engine: engine.into(),
            gpu: None,
            deployment: None,
            workload_digest: None,
            bundle_digest: None,
            seed: None,
            host: None,
            host_factor: None,
            conduct: None,
            environment: None,
            source: None,
        }
    }
}

/// How a real run went, for whoever doubts it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunConduct {
    /// Why it ended early; the files then hold what was done until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incomplete: Option<String>,
    /// The host's single-thread score before, in idle moments and after: a host that was disturbed shows.
    pub host_scores: Vec<HostScore>,
    /// The warm-up before it; one for all runs of an engine's start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm_up: Option<WarmUp>,
    /// Steps launched as one recorded graph.
    pub graph_steps: u64,
    /// Steps launched kernel by kernel.
    pub eager_steps: u64,
    /// Time with nothing to do, ns.
    pub idle_ns: u64,
    /// The GPU's name as its driver tells it.
    pub device_name: String,
    /// Where the weights came from.
    pub weights: String,
}

/// The host's score at some time of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostScore {
    /// From the run's start, ns; below 0 before it.
    pub time_ns: i64,
    /// Million iterations a second.
    pub single_thread_score: f64,
}

/// What an engine did before its first run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WarmUp {
    /// How long it took, ns.
    pub duration_ns: u64,
    /// Steps run.
    pub steps: u64,
    /// Whether step times had stopped to change when it ended.
    pub is_steady: bool,
    /// How much they still changed, as a share.
    pub last_change: f64,
}

/// What an `engine.json` may say besides the deployment.
#[derive(Debug, Default, Deserialize)]
struct EngineExtras {
    #[serde(default)]
    host: Option<HostInfo>,
    #[serde(default)]
    gpu: Option<String>,
    #[serde(default)]
    dtype: Option<String>,
    #[serde(default)]
    engine_version: Option<String>,
    #[serde(default)]
    driver_version: Option<String>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestStatus {
    /// All its tokens were produced.
    Ok,
    /// It could never fit and was refused.
    Rejected,
    /// It failed, or the run ended before it did.
    Incomplete,
}

impl RequestStatus {
    /// The name in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Rejected => "rejected",
            Self::Incomplete => "incomplete",
        }
    }
}

/// A row of `request_metrics.csv`; times from the start of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestMetrics {
    /// Unique in the run.
    pub request_id: u64,
    /// Arrival as scheduled.
    pub arrival_time_ns: Nanos,
    /// When the engine had taken it in; not every source records it.
    #[serde(default)]
    pub admitted_time_ns: Option<Nanos>,
    /// When its first token was out; none when it never was.
    pub first_token_time_ns: Option<Nanos>,
    /// First token minus scheduled arrival.
    pub ttft_ns: Option<Nanos>,
    /// When its last token was out.
    pub completion_time_ns: Option<Nanos>,
    /// Prompt length; 0 of a failed request where nobody recorded it.
    pub num_prefill_tokens: u32,
    /// Output length asked for; 0 likewise.
    pub num_decode_tokens: u32,
    /// Output length produced.
    pub num_decode_tokens_actual: u32,
    /// How it ended.
    pub status: RequestStatus,
    /// What served it.
    pub backend: String,
}

/// A row of `token_metrics.csv`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenMetrics {
    /// The request.
    pub request_id: u64,
    /// Position in its output, from 0.
    pub token_index: u32,
    /// When the token was out.
    pub token_time_ns: Nanos,
    /// Time since the token before; 0 at index 0, which is not an interval.
    pub token_latency_ns: Nanos,
}

/// A row of `step_metrics.csv` as it is read; [`StepMetrics`]' own [`Row`](crate::rows::Row) writes it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
struct StepRow {
    step_start_ns: Nanos,
    step_duration_ns: Nanos,
    schedule_ns: Nanos,
    num_prefill_seqs: u32,
    num_prefill_tokens: u32,
    num_decode_seqs: u32,
    #[serde(default)]
    prefill_chunks_tokens_context: String,
    #[serde(default)]
    decode_contexts: String,
    #[serde(default)]
    prefill_request_ids: Option<String>,
    #[serde(default)]
    decode_request_ids: Option<String>,
    #[serde(default)]
    preempted_request_ids: Option<String>,
    #[serde(default)]
    free_blocks: Option<u32>,
    #[serde(default)]
    prepare_ns: Option<Nanos>,
    #[serde(default)]
    launch_ns: Option<Nanos>,
    #[serde(default)]
    wait_ns: Option<Nanos>,
    #[serde(default)]
    sample_ns: Option<Nanos>,
    #[serde(default)]
    finish_ns: Option<Nanos>,
}

impl StepRow {
    fn phases(&self) -> Option<StepPhases> {
        Some(StepPhases {
            prepare_ns: self.prepare_ns?,
            launch_ns: self.launch_ns?,
            wait_ns: self.wait_ns?,
            sample_ns: self.sample_ns?,
            finish_ns: self.finish_ns?,
        })
    }
}

/// One scheduler step of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepMetrics {
    /// When the step began.
    pub step_start_ns: Nanos,
    /// From begin to the tokens being out.
    pub step_duration_ns: Nanos,
    /// The scheduler's part of it.
    pub schedule_ns: Nanos,
    /// What was computed.
    pub batch: StepBatch,
    /// Whose tokens they were; `None` when not recorded.
    pub requests: Option<StepRequests>,
    /// What the host did; `None` when not recorded.
    pub phases: Option<StepPhases>,
}

/// What an engine's host did in a step, one after the other, behind the scheduler's part.
///
/// `schedule + prepare + launch + wait + sample` is the step's duration, but for the reading of the clock; `finish` comes
/// after it, before the next step can begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepPhases {
    /// Making the GPU's inputs: tokens, positions, block tables.
    pub prepare_ns: Nanos,
    /// Copying them and launching the kernels, or the graph.
    pub launch_ns: Nanos,
    /// Waiting for the GPU.
    pub wait_ns: Nanos,
    /// Handing out the drawn tokens.
    pub sample_ns: Nanos,
    /// From the tokens being out to the scheduler's having accounted for them.
    pub finish_ns: Nanos,
}

/// The requests of a step, as far as an engine records them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepRequests {
    /// Request of each prefill chunk, in scheduling order.
    pub prefill_request_ids: Vec<u64>,
    /// Request of each decode, in scheduling order.
    pub decode_request_ids: Vec<u64>,
    /// Requests that lost their KV blocks while the step was formed, ascending.
    pub preempted_request_ids: Vec<u64>,
    /// KV blocks free after the step was formed.
    pub free_blocks: Option<u32>,
}

impl StepMetrics {
    /// When the step's tokens were out.
    #[must_use]
    pub fn end_ns(&self) -> Nanos {
        self.step_start_ns + self.step_duration_ns
    }
}

/// A run in memory.
#[derive(Clone, Debug)]
pub struct Run {
    /// What it was made from.
    pub info: RunInfo,
    /// Requests, in the order of the file.
    pub requests: Vec<RequestMetrics>,
    /// Tokens, by request and index; empty when not recorded.
    pub tokens: Vec<TokenMetrics>,
    /// Steps in time order; empty when not recorded.
    pub steps: Vec<StepMetrics>,
}

impl Run {
    /// Reads a run folder: `request_metrics.csv`, and `run.json` (or the `engine.json` of the folder or
    /// its parent), `token_metrics.csv`, `step_metrics.csv` where present; CSVs may be `.csv.zst`.
    ///
    /// # Errors
    /// `Invalid` names file, line and column: a repeated or unknown request id, times that run
    /// backwards, token times of another clock than the requests', token indices with holes, step columns that contradict each other.
    pub fn read(folder: &Path) -> Result<Self, InputError> {
        let requests_path = folder.join("request_metrics.csv");
        let requests: Vec<RequestMetrics> = read_csv(&requests_path, "a request_metrics row")?;
        check_requests(&plain_or_zst(&requests_path), &requests)?;
        let tokens = match optional(folder, "token_metrics.csv") {
            Some(path) => {
                let tokens: Vec<TokenMetrics> = read_csv(&path, "a token_metrics row")?;
                check_tokens(&path, &requests, &tokens)?;
                tokens
            }
            None => Vec::new(),
        };
        let steps = match optional(folder, "step_metrics.csv") {
            Some(path) => read_steps(&path)?,
            None => Vec::new(),
        };
        Ok(Self { info: read_info(folder, &requests)?, requests, tokens, steps })
    }

    /// Writes the run's files into `folder`, each atomically, `run.json` last.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn write(&self, folder: &Path) -> Result<(), InputError> {
        write_rows(&folder.join("request_metrics.csv"), &self.requests)?;
        if !self.tokens.is_empty() {
            write_rows(&folder.join("token_metrics.csv"), &self.tokens)?;
        }
        if !self.steps.is_empty() {
            write_steps(&folder.join("step_metrics.csv"), &self.steps)?;
        }
        write_json(&folder.join("run.json"), &self.info)
    }

    /// The workload that the run was given: every request at its scheduled arrival. Failed requests of which nobody
    /// recorded the lengths are left out.
    #[must_use]
    pub fn workload(&self) -> Workload {
        let mut requests: Vec<_> = self
            .requests
            .iter()
            .filter(|r| r.num_prefill_tokens > 0 && r.num_decode_tokens > 0)
            .map(|r| {
                let (prefill, decode) = (r.num_prefill_tokens, r.num_decode_tokens);
                WorkloadRequest::new(r.request_id, r.arrival_time_ns, prefill, decode)
            })
            .collect();
        // Stable: requests that arrive together keep the file's order.
        requests.sort_by_key(|r| r.arrival_time_ns);
        Workload { requests }
    }
}

/// With the columns of the host's phases where all steps have them.
fn write_steps(path: &Path, steps: &[StepMetrics]) -> Result<(), InputError> {
    let phased: Option<Vec<_>> = steps.iter().map(|step| Some(PhasedStep(step, step.phases?))).collect();
    match phased {
        Some(steps) => write_rows(path, &steps),
        None => write_rows(path, steps),
    }
}

fn optional(folder: &Path, name: &str) -> Option<PathBuf> {
    let path = plain_or_zst(&folder.join(name));
    path.exists().then_some(path)
}

fn read_info(folder: &Path, requests: &[RequestMetrics]) -> Result<RunInfo, InputError> {
    let run_json = folder.join("run.json");
    if run_json.exists() {
        let info: RunInfo = read_json(&run_json, "a run.json")?;
        check_host(info.host.as_ref(), &run_json)?;
        return Ok(info);
    }
    let beside = folder.join("engine.json");
    let above = folder.parent().map(|parent| parent.join("engine.json"));
    let engine_json = [Some(beside), above].into_iter().flatten().find(|path| path.exists());
    let (deployment, extras) = match engine_json {
        Some(path) => {
            let deployment: Deployment = read_json(&path, "an engine.json")?;
            deployment.check().map_err(|(key, expected, found)| {
                InputError::invalid(&path, Location::Key(key.into()), expected, found)
            })?;
            let extras: EngineExtras = read_json(&path, "an engine.json")?;
            check_host(extras.host.as_ref(), &path)?;
            (Some(deployment), extras)
        }
        None => (None, EngineExtras::default()),
    };
    let EngineExtras { host, gpu, dtype, engine_version, driver_version } = extras;
    Ok(RunInfo {
        gpu,
        deployment,
        host,
        environment: Environment { model: None, dtype, engine_version, driver_version }.if_known(),
        ..RunInfo::new(RunKind::Real, requests.first().map_or_else(String::new, |r| r.backend.clone()))
    })
}

fn check_host(host: Option<&HostInfo>, path: &Path) -> Result<(), InputError> {
    host.map_or(Ok(()), |host| host.check_at(path, "host.single_thread_score"))
}

fn check_requests(path: &Path, requests: &[RequestMetrics]) -> Result<(), InputError> {
    if requests.is_empty() {
        return Err(InputError::invalid(path, Location::File, "at least one request", "none"));
    }
    let mut seen = HashMap::new();
    for (i, r) in requests.iter().enumerate() {
        let line = i as u64 + 2;
        let bad = |column: &str, expected: &str, found: String| {
            Err(InputError::invalid(path, Location::Cell { line, column: column.into() }, expected, found))
        };
        if let Some(first) = seen.insert(r.request_id, line) {
            return bad(
                "request_id",
                "an id of its own",
                format!("{} again (first in line {first})", r.request_id),
            );
        }
        if r.num_prefill_tokens == 0 && r.status == RequestStatus::Ok {
            return bad("num_prefill_tokens", "at least 1, as status is ok", "0".into());
        }
        if r.status != RequestStatus::Ok {
            continue;
        }
        let Some(first) = r.first_token_time_ns else {
            return bad("first_token_time_ns", "a time, as status is ok", "nothing".into());
        };
        let Some(last) = r.completion_time_ns else {
            return bad("completion_time_ns", "a time, as status is ok", "nothing".into());
        };
        if first < r.arrival_time_ns {
            return bad("first_token_time_ns", "no time before the arrival", first.0.to_string());
        }
        if last < first {
            return bad("completion_time_ns", "no time before the first token", last.0.to_string());
        }
        if r.num_decode_tokens_actual == 0 {
            return bad("num_decode_tokens_actual", "at least 1, as status is ok", "0".into());
        }
    }
    Ok(())
}

fn check_tokens(path: &Path, requests: &[RequestMetrics], tokens: &[TokenMetrics]) -> Result<(), InputError> {
    // Next index and last time of each request.
    let mut state: HashMap<u64, (u32, Nanos)> =
        requests.iter().map(|r| (r.request_id, (0, r.arrival_time_ns))).collect();
    let firsts: HashMap<u64, Nanos> =
        requests.iter().filter_map(|r| Some((r.request_id, r.first_token_time_ns?))).collect();
    for (i, token) in tokens.iter().enumerate() {
        let line = i as u64 + 2;
        let bad = |column: &str, expected: String, found: String| {
            Err(InputError::invalid(path, Location::Cell { line, column: column.into() }, expected, found))
        };
        let Some((next, last)) = state.get_mut(&token.request_id) else {
            return bad("request_id", "a request of request_metrics".into(), token.request_id.to_string());
        };
        if token.token_index != *next {
            return bad("token_index", next.to_string(), token.token_index.to_string());
        }
        if token.token_time_ns < *last {
            return bad(
                "token_time_ns",
                format!("no time before {}", last.0),
                token.token_time_ns.0.to_string(),
            );
        }
        if let Some(first) = firsts.get(&token.request_id).filter(|_| token.token_index == 0)
            && first.0.abs_diff(token.token_time_ns.0) > SAME_EVENT_NS
        {
            let expected = format!("{}, the first token of request_metrics, to 1 ms", first.0);
            let found = format!("{} (another clock, or another run's file)", token.token_time_ns.0);
            return bad("token_time_ns", expected, found);
        }
        *next += 1;
        *last = token.token_time_ns;
    }
    Ok(())
}

fn read_steps(path: &Path) -> Result<Vec<StepMetrics>, InputError> {
    let rows: Vec<StepRow> = read_csv(path, "a step_metrics row")?;
    let mut last_end = Nanos::ZERO;
    let mut steps = Vec::with_capacity(rows.len());
    for (i, row) in rows.into_iter().enumerate() {
        let line = i as u64 + 2;
        let at = |column: &str| Location::Cell { line, column: column.into() };
        let batch = StepBatch::parse(&row.prefill_chunks_tokens_context, &row.decode_contexts)
            .map_err(|text| InputError::invalid(path, Location::Line(line), "chunks and contexts", text))?;
        let shape = batch.shape().attention;
        for (column, stated, counted) in [
            ("num_prefill_seqs", row.num_prefill_seqs, shape.num_prefill_seqs),
            ("num_prefill_tokens", row.num_prefill_tokens, shape.num_prefill_tokens),
            ("num_decode_seqs", row.num_decode_seqs, shape.num_decode_seqs),
        ] {
            if stated != counted {
                let expected = format!("{counted}, as the chunks and contexts say");
                return Err(InputError::invalid(path, at(column), expected, stated.to_string()));
            }
        }
        if row.step_start_ns < last_end {
            let found = row.step_start_ns.0.to_string();
            let expected = format!("no step before the end of the one above ({})", last_end.0);
            return Err(InputError::invalid(path, at("step_start_ns"), expected, found));
        }
        last_end = row.step_start_ns + row.step_duration_ns;
        let requests = step_requests(&row, &batch)
            .map_err(|(column, expected, found)| InputError::invalid(path, at(column), expected, found))?;
        steps.push(StepMetrics {
            step_start_ns: row.step_start_ns,
            step_duration_ns: row.step_duration_ns,
            schedule_ns: row.schedule_ns,
            phases: row.phases(),
            batch,
            requests,
        });
    }
    Ok(steps)
}

/// The columns of request ids, or `(column, expected, found)`.
fn step_requests(
    row: &StepRow,
    batch: &StepBatch,
) -> Result<Option<StepRequests>, (&'static str, String, String)> {
    let ids = |column: &'static str, text: &Option<String>| -> Result<Vec<u64>, _> {
        let items = text.as_deref().unwrap_or_default().split(';').filter(|item| !item.is_empty());
        items
            .map(|id| id.parse().map_err(|_| (column, "request ids joined by `;`".to_owned(), id.to_owned())))
            .collect()
    };
    let mut requests = StepRequests {
        prefill_request_ids: ids("prefill_request_ids", &row.prefill_request_ids)?,
        decode_request_ids: ids("decode_request_ids", &row.decode_request_ids)?,
        preempted_request_ids: ids("preempted_request_ids", &row.preempted_request_ids)?,
        free_blocks: row.free_blocks,
    };
    if requests == StepRequests::default() {
        return Ok(None);
    }
    requests.preempted_request_ids.sort_unstable();
    for (column, ids, count) in [
        ("prefill_request_ids", &requests.prefill_request_ids, batch.prefill_chunks.len()),
        ("decode_request_ids", &requests.decode_request_ids, batch.decode_contexts.len()),
    ] {
        if ids.len() != count {
            return Err((column, format!("{count} ids, as many as the batch has"), ids.len().to_string()));
        }
    }
    Ok(Some(requests))
}

//! What a simulation leaves behind: distributions of its times, and the rows of its files as they come.

mod distributions;
pub mod series;
pub mod trace;

use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
};

use plumbline_schema::{
    InputError, Nanos, RequestMetrics, RequestStatus, StepMetrics, TokenMetrics,
    rows::{Row, RowFile},
};

pub use self::distributions::{DistributionSummary, Distributions, Summaries};
use crate::{
    recorder::{Outcome, Recorder, StepRecord, step_requests},
    replica::RequestIds,
    scheduler::{Rejection, ScheduledStep},
    serve::StepSpan,
};

/// Which files to write, each into the run's folder.
#[expect(clippy::struct_excessive_bools, reason = "each file is wanted or not")]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutputOptions {
    /// `request_metrics.csv`.
    pub requests: bool,
    /// `token_metrics.csv`.
    pub tokens: bool,
    /// `step_metrics.csv`; of a cluster one in the folder `replica-<number>` of each replica.
    pub steps: bool,
    /// What the rows call the engine.
    pub backend: String,
    /// Whether there are several replicas; each row then says which one served it.
    pub is_cluster: bool,
}

/// Most rejections that are remembered one by one.
pub const MAX_REJECTIONS: usize = 1000;

/// Keeps distributions, writes rows, and forgets everything else.
///
/// Memory follows the requests in the system, not those served: only with `tokens` is there a number a step.
pub struct Reporter {
    folder: PathBuf,
    options: OutputOptions,
    distributions: Distributions,
    rejections: Vec<(u64, Rejection)>,
    /// Outcomes that wait for one of an earlier request, from `next_index` on.
    waiting: VecDeque<Option<Outcome>>,
    next_index: u64,
    requests: Option<RowFile<RequestMetrics>>,
    tokens: Option<RowFile<TokenMetrics>>,
    replicas: Vec<ReplicaOutput>,
    /// The first thing that went wrong; nothing is kept after it.
    failure: Option<InputError>,
}

#[derive(Default)]
struct ReplicaOutput {
    /// Kept with `tokens` alone.
    step_ends: Vec<Nanos>,
    /// Steps in flight, oldest first.
    in_flight: VecDeque<StepMetrics>,
    steps: Option<RowFile<StepMetrics>>,
}

impl Reporter {
    /// Writes into `folder`, which is made where it is missing.
    ///
    /// # Errors
    /// When a file cannot be begun.
    pub fn new(folder: &Path, options: OutputOptions) -> Result<Self, InputError> {
        let requests = options.requests.then(|| RowFile::create(&folder.join("request_metrics.csv")));
        let tokens = options.tokens.then(|| RowFile::create(&folder.join("token_metrics.csv")));
        Ok(Self {
            folder: folder.to_path_buf(),
            distributions: Distributions::default(),
            rejections: Vec::new(),
            waiting: VecDeque::new(),
            next_index: 0,
            requests: requests.transpose()?,
            tokens: tokens.transpose()?,
            replicas: Vec::new(),
            failure: None,
            options,
        })
    }

    /// Keeps distributions and no file.
    #[must_use]
    pub fn without_files() -> Self {
        // Without a file there is none that could not be begun.
        let options = OutputOptions::default();
        Self::new(Path::new(""), options).unwrap_or_else(|error| unreachable!("{error}"))
    }

    /// Ends the files and tells the distributions, and the first rejections with their reasons.
    ///
    /// # Errors
    /// The first thing that went wrong; the files are then not there.
    pub fn finish(mut self) -> Result<(Summaries, Vec<(u64, Rejection)>), InputError> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        self.requests.take().map_or(Ok(()), finish_rows)?;
        self.tokens.take().map_or(Ok(()), finish_rows)?;
        for replica in &mut self.replicas {
            replica.steps.take().map_or(Ok(()), finish_rows)?;
        }
        let folder = self.folder;
        let summaries = self.distributions.finish().map_err(|source| InputError::io(&folder, source))?;
        Ok((summaries, self.rejections))
    }

    #[inline]
    fn try_io(&mut self, result: io::Result<()>) {
        if let Err(source) = result {
            self.try_rows(Err(InputError::io(&self.folder, source)));
        }
    }

    fn try_rows(&mut self, result: Result<(), InputError>) {
        if let Err(error) = result {
            self.failure.get_or_insert(error);
        }
    }

    fn replica(&mut self, replica: u32) -> &mut ReplicaOutput {
        let replica = replica as usize;
        if self.replicas.len() <= replica {
            self.replicas.resize_with(replica + 1, ReplicaOutput::default);
        }
        &mut self.replicas[replica]
    }

    /// The rows of a request whose turn it is.
    fn write(&mut self, outcome: &Outcome) -> Result<(), InputError> {
        if let Some(requests) = &mut self.requests {
            let backend = &self.options.backend;
            let row = if self.options.is_cluster {
                request_row(outcome, &format!("{backend}/{}", outcome.replica))
            } else {
                request_row(outcome, backend)
            };
            requests.push(&row)?;
        }
        let Some(tokens) = &mut self.tokens else { return Ok(()) };
        let step_ends = self.replicas.get(outcome.replica as usize).map_or(&[][..], |r| &r.step_ends);
        token_rows(outcome, step_ends).try_for_each(|row| tokens.push(&row))
    }

    fn end_step(&mut self, replica: u32, end: Nanos) -> Result<(), InputError> {
        let (is_cluster, keeps_ends) = (self.options.is_cluster, self.options.tokens);
        let folder = is_cluster.then(|| self.folder.join(format!("replica-{replica}")));
        let folder = folder.unwrap_or_else(|| self.folder.clone());
        let output = self.replica(replica);
        if keeps_ends {
            output.step_ends.push(end);
        }
        let Some(mut step) = output.in_flight.pop_front() else { return Ok(()) };
        step.step_duration_ns = end.saturating_since(step.step_start_ns);
        let rows = match &mut output.steps {
            Some(rows) => rows,
            none => none.insert(RowFile::create(&folder.join("step_metrics.csv"))?),
        };
        rows.push(&step)
    }
}

/// An empty file is left out, as of a run without such rows.
fn finish_rows<R: Row>(rows: RowFile<R>) -> Result<(), InputError> {
    if rows.num_rows() == 0 { Ok(()) } else { rows.finish() }
}

impl Recorder for Reporter {
    fn wants_batches(&self) -> bool {
        self.options.steps
    }

    fn step(&mut self, record: &StepRecord<'_>, step: &ScheduledStep, requests: &RequestIds<'_>) {
        let result = self.distributions.batches(record.shape.num_seqs, record.shape.num_tokens, 1);
        self.try_io(result);
        if self.options.steps {
            let step = StepMetrics {
                step_start_ns: record.start,
                step_duration_ns: Nanos::ZERO,
                schedule_ns: record.schedule,
                batch: step.batch(),
                requests: Some(step_requests(step, &record.state, requests)),
                phases: None,
            };
            self.replica(record.replica).in_flight.push_back(step);
        }
    }

    fn step_end(&mut self, replica: u32, _number: u32, start: Nanos, end: Nanos) {
        let result = self.distributions.batch_time(end.saturating_since(start));
        self.try_io(result);
        if self.options.tokens || self.options.steps {
            let result = self.end_step(replica, end);
            self.try_rows(result);
        }
    }

    fn decode_steps(&mut self, replica: u32, _first_number: u32, steps: &[StepSpan], num_seqs: u32) {
        let batches = self.distributions.batches(num_seqs, num_seqs, steps.len() as u32);
        let mut durations = steps.iter().map(|step| step.duration);
        let times = durations.try_for_each(|duration| self.distributions.batch_time(duration));
        self.try_io(batches.and(times));
        if self.options.tokens {
            self.replica(replica).step_ends.extend(steps.iter().map(StepSpan::end));
        }
    }

    fn gaps(&mut self, gap: Nanos, count: u32) {
        let result = self.distributions.gaps(gap, count);
        self.try_io(result);
    }

    fn request(&mut self, outcome: Outcome) {
        if let Some(rejection) = outcome.rejection
            && self.rejections.len() < MAX_REJECTIONS
        {
            self.rejections.push((outcome.request.request_id, rejection));
        }
        let result = self.distributions.request(&outcome);
        self.try_io(result);
        if self.requests.is_none() && self.tokens.is_none() || self.failure.is_some() {
            return;
        }
        let place = (outcome.index - self.next_index) as usize;
        if self.waiting.len() <= place {
            self.waiting.resize_with(place + 1, || None);
        }
        self.waiting[place] = Some(outcome);
        while let Some(Some(outcome)) = self.waiting.front_mut().map(Option::take) {
            self.waiting.pop_front();
            self.next_index += 1;
            let result = self.write(&outcome);
            self.try_rows(result);
        }
    }
}

/// The row of `request_metrics.csv`.
#[must_use]
pub fn request_row(outcome: &Outcome, backend: &str) -> RequestMetrics {
    let request = &outcome.request;
    RequestMetrics {
        request_id: request.request_id,
        arrival_time_ns: request.arrival_time_ns,
        admitted_time_ns: outcome.admitted,
        first_token_time_ns: outcome.first_token,
        ttft_ns: outcome.ttft(),
        completion_time_ns: outcome.last_token,
        num_prefill_tokens: request.num_prefill_tokens,
        num_decode_tokens: request.num_decode_tokens,
        num_decode_tokens_actual: outcome.num_tokens,
        status: if outcome.rejection.is_some() {
            RequestStatus::Rejected
        } else if outcome.num_tokens < request.num_decode_tokens {
            RequestStatus::Incomplete
        } else {
            RequestStatus::Ok
        },
        backend: backend.to_owned(),
    }
}

/// The rows of `token_metrics.csv`, from when each of the replica's steps ended.
pub fn token_rows<'a>(
    outcome: &'a Outcome,
    step_ends: &'a [Nanos],
) -> impl Iterator<Item = TokenMetrics> + 'a {
    let mut last = None;
    outcome.token_steps.iter().zip(0..).map(move |(step, token_index)| {
        let token_time_ns = step_ends[step as usize];
        let before = last.replace(token_time_ns).unwrap_or(token_time_ns);
        let token_latency_ns = token_time_ns.saturating_since(before);
        TokenMetrics { request_id: outcome.request.request_id, token_index, token_time_ns, token_latency_ns }
    })
}

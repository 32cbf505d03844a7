//! What replicas did over time, a row for each window of time.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{self, Write},
    path::Path,
};

use plumbline_schema::{
    InputError, Nanos,
    files::{Compression, OutputFile},
};

use crate::{
    recorder::{Outcome, Recorder, StepRecord},
    replica::RequestIds,
    scheduler::{ScheduledStep, SchedulerState},
    serve::StepSpan,
    step_time::timeline::{Span, TimelineDetail},
};

/// The first line of `series.csv`.
pub const HEADER: &str = "replica,window_start_ns,window_ns,steps,batch_size_mean,batch_num_tokens_mean,\
                          prefill_tokens,decode_tokens,kv_used_mean,kv_used_max,running_max,waiting_max,busy_ns,\
                          gpu_ns,arrivals,completions,preemptions";

/// The window that is used unless another is asked for.
pub const DEFAULT_WINDOW: Nanos = Nanos(1_000_000_000);

/// Writes `series.csv`; `docs/metrics.md` defines its columns.
///
/// A row is written when nothing more can fall into its window: those of one replica in order of time, those of several
/// as they come. A window in which a replica held no request and did nothing has no row. Memory follows the windows
/// that steps in flight reach into.
pub struct SeriesRecorder {
    out: OutputFile,
    /// Length of a window, at least 1 ns.
    window_ns: u64,
    replicas: Vec<ReplicaSeries>,
    failure: Option<InputError>,
}

#[derive(Default)]
struct ReplicaSeries {
    /// By number from time 0 on; those with something in them.
    windows: BTreeMap<u64, Window>,
    /// Where its sequences stand, and since when.
    level: Level,
    since: Nanos,
    /// When each step in flight began, oldest first.
    in_flight: VecDeque<Nanos>,
    last_start: Nanos,
    last_end: Nanos,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Level {
    kv_blocks: u32,
    running: usize,
    waiting: usize,
}

#[derive(Default)]
struct Window {
    steps: u64,
    seqs: u64,
    prefill_tokens: u64,
    decode_tokens: u64,
    kv_block_ns: u128,
    kv_used_max: u32,
    running_max: usize,
    waiting_max: usize,
    busy_ns: u64,
    gpu_ns: u64,
    arrivals: u64,
    completions: u64,
    preemptions: u64,
}

impl Window {
    fn write(&self, replica: usize, number: u64, window_ns: u64, out: &mut impl Write) -> io::Result<()> {
        write!(out, "{replica},{},{window_ns},{},", number * window_ns, self.steps)?;
        let tokens = self.prefill_tokens + self.decode_tokens;
        if self.steps > 0 {
            let mean = |sum: u64| sum as f64 / self.steps as f64;
            write!(out, "{},{},", mean(self.seqs), mean(tokens))?;
        } else {
            write!(out, ",,")?;
        }
        writeln!(
            out,
            "{},{},{},{},{},{},{},{},{},{},{}",
            self.prefill_tokens,
            self.decode_tokens,
            self.kv_block_ns as f64 / window_ns as f64,
            self.kv_used_max,
            self.running_max,
            self.waiting_max,
            self.busy_ns,
            self.gpu_ns,
            self.arrivals,
            self.completions,
            self.preemptions
        )
    }
}

impl ReplicaSeries {
    fn at(&mut self, time: Nanos, window_ns: u64) -> &mut Window {
        self.windows.entry(time.0 / window_ns).or_default()
    }

    /// Adds each window's part of a span, ns.
    fn over(&mut self, span: Span, window_ns: u64, mut add: impl FnMut(&mut Window, u64)) {
        let mut from = span.start.0;
        while from < span.end.0 {
            let number = from / window_ns;
            let to = span.end.0.min((number + 1).saturating_mul(window_ns));
            add(self.windows.entry(number).or_default(), to - from);
            from = to;
        }
    }

    /// From `time` on sequences stand elsewhere.
    fn stand(&mut self, time: Nanos, state: &SchedulerState<'_>, window_ns: u64) {
        let next = Level {
            kv_blocks: state.kv_cache.num_used(),
            running: state.num_running,
            waiting: state.num_waiting,
        };
        let Level { kv_blocks, running, waiting } = self.level;
        if self.level != Level::default() {
            self.over(Span { start: self.since, end: time }, window_ns, |window, ns| {
                window.kv_block_ns += u128::from(kv_blocks) * u128::from(ns);
                window.kv_used_max = window.kv_used_max.max(kv_blocks);
                window.running_max = window.running_max.max(running);
                window.waiting_max = window.waiting_max.max(waiting);
            });
        }
        self.since = self.since.max(time);
        self.level = next;
    }
}

impl SeriesRecorder {
    /// Begins the file that is to stand at `path`, with windows of a length (at least 1 ns) that begin at multiples of it;
    /// compressed where its name ends in `.zst`.
    ///
    /// # Errors
    /// When the file cannot be begun.
    pub fn create(path: &Path, window: Nanos) -> Result<Self, InputError> {
        let mut out = OutputFile::create(path, Compression::Fast)?;
        writeln!(out, "{HEADER}").map_err(|source| InputError::io(path, source))?;
        Ok(Self { out, window_ns: window.0.max(1), replicas: Vec::new(), failure: None })
    }

    /// Writes the last rows and ends the file.
    ///
    /// # Errors
    /// The first thing that went wrong; the file is then not there.
    pub fn finish(mut self) -> Result<(), InputError> {
        for replica in 0..self.replicas.len() {
            self.write_before(replica, u64::MAX);
        }
        match self.failure {
            Some(failure) => Err(failure),
            None => self.out.finish(),
        }
    }

    fn replica(&mut self, replica: u32) -> (&mut ReplicaSeries, u64) {
        let replica = replica as usize;
        if self.replicas.len() <= replica {
            self.replicas.resize_with(replica + 1, ReplicaSeries::default);
        }
        (&mut self.replicas[replica], self.window_ns)
    }

    /// Writes a replica's windows with smaller numbers.
    fn write_before(&mut self, replica: usize, number: u64) {
        let Self { out, window_ns, replicas, failure } = self;
        let windows = &mut replicas[replica].windows;
        while let Some(first) = windows.first_entry()
            && *first.key() < number
        {
            let (number, window) = first.remove_entry();
            if failure.is_none() {
                let written = window.write(replica, number, *window_ns, out);
                *failure = written.err().map(|source| InputError::io(out.path(), source));
            }
        }
    }
}

impl Recorder for SeriesRecorder {
    fn wants_batches(&self) -> bool {
        true
    }

    fn wants_timelines(&self) -> TimelineDetail {
        TimelineDetail::Parts
    }

    fn arrival(&mut self, replica: u32, time: Nanos) {
        let (series, window_ns) = self.replica(replica);
        series.at(time, window_ns).arrivals += 1;
    }

    fn state(&mut self, replica: u32, time: Nanos, state: &SchedulerState<'_>) {
        let (series, window_ns) = self.replica(replica);
        series.stand(time, state, window_ns);
    }

    fn step(&mut self, record: &StepRecord<'_>, step: &ScheduledStep, _requests: &RequestIds<'_>) {
        let (series, window_ns) = self.replica(record.replica);
        series.stand(record.start, &record.state, window_ns);
        let window = series.at(record.start, window_ns);
        window.steps += 1;
        window.seqs += u64::from(record.shape.num_seqs);
        window.prefill_tokens += u64::from(record.shape.attention.num_prefill_tokens);
        window.decode_tokens += u64::from(record.shape.attention.num_decode_seqs);
        window.preemptions += step.preempted.len() as u64;
        for stage in record.timeline.iter().flat_map(|timeline| &timeline.stages) {
            series.over(stage.gpu, window_ns, |window, ns| window.gpu_ns += ns);
        }
        series.in_flight.push_back(record.start);
        // What came before the step before began has been told when that was formed.
        let told = series.last_start.min(series.in_flight[0]);
        series.last_start = record.start;
        self.write_before(record.replica as usize, told.0 / window_ns);
    }

    fn step_end(&mut self, replica: u32, _number: u32, start: Nanos, end: Nanos) {
        let (series, window_ns) = self.replica(replica);
        series.in_flight.pop_front();
        // Steps end in the order in which they began: what the one before did not cover is new.
        let span = Span { start: start.max(series.last_end), end };
        series.last_end = end;
        series.over(span, window_ns, |window, ns| window.busy_ns += ns);
    }

    fn decode_steps(&mut self, replica: u32, first_number: u32, _steps: &[StepSpan], _num_seqs: u32) {
        unreachable!("replica {replica} told step {first_number} without its batch, which is wanted");
    }

    fn gaps(&mut self, _gap: Nanos, _count: u32) {}

    fn request(&mut self, outcome: Outcome) {
        if let Some(last_token) = outcome.last_token {
            let (series, window_ns) = self.replica(outcome.replica);
            series.at(last_token, window_ns).completions += 1;
        }
    }
}

//! A simulation as a trace to look at: steps, hosts, GPUs with their operators, requests and counters over time.
//!
//! The format is the Trace Event Format in JSON ("Trace Event Format", Google, the document that Chrome's tracing and
//! <https://ui.perfetto.dev> go by): complete events (`X`), nestable async events (`b`, `e`), counters (`C`), instants
//! (`i`) and metadata (`M`). Its times are microseconds; three decimals keep every nanosecond.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    io::{self, Write},
    path::Path,
};

use flate2::{Compression as Gzip, write::GzEncoder};
use plumbline_schema::{
    InputError, Nanos,
    files::{Compression, OutputFile},
};

use crate::{
    recorder::{Outcome, Recorder, StepRecord},
    replica::RequestIds,
    scheduler::{ScheduledStep, SchedulerState},
    serve::StepSpan,
    step_time::timeline::{Span, StageTimeline, StepTimeline, TimelineDetail},
};

/// Threads of a process: lanes of steps from here on,
const STEPS: u32 = 1;
/// the host of each pipeline stage,
const HOSTS: u32 = 10_001;
/// and a GPU of each stage.
const GPUS: u32 = 20_001;

/// Writes a trace; one process a replica.
///
/// | thread | slices |
/// |---|---|
/// | `steps` | each step, by its dispatch; with several in flight a thread for each |
/// | `host` | `host_pre`, `launch` and `host_post`; of a later pipeline stage `launch` alone |
/// | `gpu` | operators end to end in the order of the forward pass, the launches of one merged |
///
/// Requests are async slices: `request` from arrival to last token, and in it `waiting`, `prefill`, `decode`, and in
/// those `preempted`. Where prompts are computed by other replicas, `waiting` includes that. Counters change when a step
/// is formed, a request is taken in, or a step is complete.
///
/// Rows are written as they come; memory follows the requests in the system that were preempted. The file stands when
/// [`Self::finish`] has been called, and is compressed where its name ends in `.gz` or `.zst`.
pub struct TraceRecorder {
    out: Sink,
    window: Span,
    has_events: bool,
    replicas: Vec<ReplicaTrace>,
    /// When requests lost their blocks, and when they came back, by id.
    preempted: BTreeMap<u64, Vec<(Nanos, Option<Nanos>)>>,
    failure: Option<InputError>,
}

#[derive(Default)]
struct ReplicaTrace {
    has_name: bool,
    /// Whether each thread of steps has a step in flight.
    lanes: Vec<bool>,
    /// Steps in flight, oldest first; `None` for one outside of the window.
    in_flight: VecDeque<Option<InFlight>>,
    /// Until when each stage's host is drawn.
    host_ends: Vec<Nanos>,
    counters: Option<Counters>,
}

struct InFlight {
    lane: usize,
    name: &'static str,
    host_post: Nanos,
    args: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Counters {
    running: usize,
    waiting: usize,
    kv_blocks: u32,
    batch_tokens: u32,
}

enum Sink {
    /// Plain, or `.zst`.
    File(OutputFile),
    Gz(GzEncoder<OutputFile>),
}

impl Sink {
    fn out(&mut self) -> &mut dyn Write {
        match self {
            Self::File(file) => file,
            Self::Gz(encoder) => encoder,
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::File(file) => file.path(),
            Self::Gz(encoder) => encoder.get_ref().path(),
        }
    }

    fn finish(self) -> Result<(), InputError> {
        match self {
            Self::File(file) => file.finish(),
            Self::Gz(encoder) => {
                let path = encoder.get_ref().path().to_path_buf();
                encoder.finish().map_err(|source| InputError::io(&path, source))?.finish()
            }
        }
    }
}

/// A time as the format writes it: microseconds, to the nanosecond.
struct Micros(Nanos);

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Nanos(ns) = self.0;
        write!(f, "{}.{:03}", ns / 1000, ns % 1000)
    }
}

impl TraceRecorder {
    /// Begins the trace that is to stand at `path`, of the steps that start within `window` and of the requests that
    /// were there in it; those are drawn whole.
    ///
    /// # Errors
    /// When the file cannot be begun.
    pub fn create(path: &Path, window: Span) -> Result<Self, InputError> {
        let file = OutputFile::create(path, Compression::Fast)?;
        let is_gz = path.extension().is_some_and(|extension| extension == "gz");
        let out = if is_gz { Sink::Gz(GzEncoder::new(file, Gzip::fast())) } else { Sink::File(file) };
        let mut trace = Self {
            out,
            window,
            has_events: false,
            replicas: Vec::new(),
            preempted: BTreeMap::new(),
            failure: None,
        };
        trace.write(format_args!("{{\"displayTimeUnit\":\"ns\",\"traceEvents\":["));
        Ok(trace)
    }

    /// The window of all time.
    pub const WHOLE: Span = Span { start: Nanos::ZERO, end: Nanos(u64::MAX) };

    /// Ends the file.
    ///
    /// # Errors
    /// The first thing that went wrong; the file is then not there.
    pub fn finish(mut self) -> Result<(), InputError> {
        self.write(format_args!("\n]}}\n"));
        match self.failure {
            Some(failure) => Err(failure),
            None => self.out.finish(),
        }
    }

    fn write(&mut self, text: fmt::Arguments<'_>) {
        if self.failure.is_none() {
            let written: io::Result<()> = self.out.out().write_fmt(text);
            self.failure = written.err().map(|source| InputError::io(self.out.path(), source));
        }
    }

    /// Writes an event: `{"ph":PHASE,"pid":...` and what is given.
    fn event(&mut self, phase: char, replica: u32, rest: fmt::Arguments<'_>) {
        let comma = if self.has_events { "," } else { "" };
        self.has_events = true;
        // Process 0 is the idle one to some viewers.
        let pid = u64::from(replica) + 1;
        self.write(format_args!("{comma}\n{{\"ph\":\"{phase}\",\"pid\":{pid},{rest}}}"));
    }

    fn slice(&mut self, replica: u32, thread: u32, name: &str, span: Span, args: &str) {
        let (ts, dur) = (Micros(span.start), Micros(span.duration()));
        self.event(
            'X',
            replica,
            format_args!(
                "\"tid\":{thread},\"ts\":{ts},\"dur\":{dur},\"name\":\"{name}\",\"args\":{{{args}}}"
            ),
        );
    }

    fn name_thread(&mut self, replica: u32, thread: u32, name: &str) {
        self.event(
            'M',
            replica,
            format_args!("\"tid\":{thread},\"name\":\"thread_name\",\"args\":{{\"name\":\"{name}\"}}"),
        );
    }

    fn replica(&mut self, replica: u32) -> &mut ReplicaTrace {
        let place = replica as usize;
        if self.replicas.len() <= place {
            self.replicas.resize_with(place + 1, ReplicaTrace::default);
        }
        if !self.replicas[place].has_name {
            self.replicas[place].has_name = true;
            self.event(
                'M',
                replica,
                format_args!("\"name\":\"process_name\",\"args\":{{\"name\":\"replica {replica}\"}}"),
            );
        }
        &mut self.replicas[place]
    }

    /// The thread of a step that begins: the first without one in flight.
    fn take_lane(&mut self, replica: u32) -> usize {
        let lanes = &mut self.replica(replica).lanes;
        if let Some(lane) = lanes.iter().position(|is_taken| !is_taken) {
            lanes[lane] = true;
            return lane;
        }
        let lane = lanes.len();
        lanes.push(true);
        let name = if lane == 0 { "steps".to_owned() } else { format!("steps, {lane} in flight before") };
        self.name_thread(replica, STEPS + lane as u32, &name);
        lane
    }

    /// Draws what a host does, no earlier than what it did before: parts are rounded one by one.
    fn host_slice(&mut self, replica: u32, stage: usize, name: &str, span: Span) {
        let host_ends = &mut self.replica(replica).host_ends;
        if host_ends.len() <= stage {
            host_ends.resize(stage + 1, Nanos::ZERO);
        }
        let start = span.start.max(host_ends[stage]);
        let end = span.end.max(start);
        host_ends[stage] = end;
        self.slice(replica, HOSTS + stage as u32, name, Span { start, end }, "");
    }

    fn gpu_slices(&mut self, replica: u32, stage: usize, timeline: &StageTimeline) {
        let Span { start, end } = timeline.gpu;
        let (mut sum_ns, mut from) = (0.0, start);
        for (place, part) in timeline.operators.iter().enumerate() {
            sum_ns += part.time_ns;
            let is_last = place + 1 == timeline.operators.len();
            let to = if is_last { end } else { (start + Nanos::from_f64(sum_ns)).clamp(from, end) };
            let args = format!("\"repeats\":{}", part.repeats);
            self.slice(
                replica,
                GPUS + stage as u32,
                part.operator.name(),
                Span { start: from, end: to },
                &args,
            );
            from = to;
        }
    }

    /// The slices of a step that has been launched: all but those that end with it.
    fn launched(&mut self, replica: u32, timeline: &StepTimeline) {
        let stages_known = self.replica(replica).host_ends.len();
        for stage in stages_known..timeline.stages.len() {
            let of = |what: &str| {
                if timeline.stages.len() > 1 { format!("{what} of stage {stage}") } else { what.to_owned() }
            };
            self.name_thread(replica, HOSTS + stage as u32, &of("host"));
            self.name_thread(replica, GPUS + stage as u32, &of("gpu"));
        }
        self.host_slice(replica, 0, "host_pre", timeline.host_pre);
        for (stage, part) in timeline.stages.iter().enumerate() {
            self.host_slice(replica, stage, "launch", part.launch);
            self.gpu_slices(replica, stage, part);
        }
    }

    fn counters(&mut self, replica: u32, time: Nanos, state: &SchedulerState<'_>, batch_tokens: u32) {
        let kv_blocks = state.kv_cache.num_used();
        let now =
            Counters { running: state.num_running, waiting: state.num_waiting, kv_blocks, batch_tokens };
        let before = self.replica(replica).counters.replace(now);
        let ts = Micros(time);
        let values = |of: Counters| {
            [
                ("running", of.running as u64),
                ("waiting", of.waiting as u64),
                ("kv_blocks", of.kv_blocks.into()),
                ("batch_tokens", of.batch_tokens.into()),
            ]
        };
        for (place, (name, value)) in values(now).into_iter().enumerate() {
            if before.is_none_or(|before| values(before)[place].1 != value) {
                let rest = format_args!("\"ts\":{ts},\"name\":\"{name}\",\"args\":{{\"{name}\":{value}}}");
                self.event('C', replica, rest);
            }
        }
    }

    /// Notes whose blocks a step that begins has taken, and who is back in it.
    fn follow_preempted(&mut self, start: Nanos, step: &ScheduledStep, requests: &RequestIds<'_>) {
        for &id in &step.preempted {
            self.preempted.entry(requests.of(id)).or_default().push((start, None));
        }
        if self.preempted.is_empty() {
            return;
        }
        for s in &step.sequences {
            let last = self.preempted.get_mut(&requests.of(s.id)).and_then(|spans| spans.last_mut());
            if let Some((_, until @ None)) = last {
                *until = Some(start);
            }
        }
    }

    fn async_slice(
        &mut self,
        outcome: &Outcome,
        name: &str,
        span: Span,
        args: &str,
        inner: &mut dyn FnMut(&mut Self),
    ) {
        let (replica, id) = (outcome.replica, outcome.index);
        let common = format!("\"cat\":\"request\",\"id\":\"{id}\",\"tid\":{STEPS},\"name\":\"{name}\"");
        self.event('b', replica, format_args!("{common},\"ts\":{},\"args\":{{{args}}}", Micros(span.start)));
        inner(self);
        self.event('e', replica, format_args!("{common},\"ts\":{}", Micros(span.end)));
    }

    fn served(&mut self, outcome: &Outcome, preempted: &[(Nanos, Option<Nanos>)]) {
        let arrival = outcome.request.arrival_time_ns;
        let (Some(first_scheduled), Some(first_token), Some(last_token)) =
            (outcome.first_scheduled, outcome.first_token, outcome.last_token)
        else {
            return;
        };
        let args = format!(
            "\"request_id\":{},\"prefill_tokens\":{},\"decode_tokens\":{},\"preemptions\":{}",
            outcome.request.request_id,
            outcome.request.num_prefill_tokens,
            outcome.num_tokens,
            outcome.num_preemptions
        );
        let whole = Span { start: arrival, end: last_token };
        let phases = [
            ("waiting", Span { start: arrival, end: first_scheduled }),
            ("prefill", Span { start: first_scheduled, end: first_token }),
            ("decode", Span { start: first_token, end: last_token }),
        ];
        self.async_slice(outcome, "request", whole, &args, &mut |trace| {
            for (name, phase) in phases.iter().filter(|(_, phase)| phase.start < phase.end) {
                trace.async_slice(outcome, name, *phase, "", &mut |trace| {
                    for &(from, to) in preempted {
                        // Blocks lost while a step in flight still computes a token are missed from that token on.
                        let start = from.max(phase.start);
                        let end = to.unwrap_or(last_token).min(phase.end);
                        if start < end {
                            trace.async_slice(outcome, "preempted", Span { start, end }, "", &mut |_| {});
                        }
                    }
                });
            }
        });
    }
}

/// What is told of a step beside its times.
fn step_args(record: &StepRecord<'_>, step: &ScheduledStep) -> String {
    let shape = &record.shape;
    let of_time = record.timeline.map_or_else(String::new, |timeline| {
        format!(
            ",\"padded_tokens\":{},\"gpu_ns\":{},\"residual\":{}",
            timeline.num_padded_tokens,
            timeline.gpu_time().0,
            timeline.residual
        )
    });
    format!(
        "\"step\":{},\"batch_size\":{},\"prefill_tokens\":{},\"decode_tokens\":{},\"kv_blocks\":{},\
         \"preempted\":{}{of_time}",
        record.number,
        shape.num_seqs,
        shape.attention.num_prefill_tokens,
        shape.attention.num_decode_seqs,
        record.state.kv_cache.num_used(),
        step.preempted.len()
    )
}

impl Recorder for TraceRecorder {
    fn wants_batches(&self) -> bool {
        true
    }

    fn wants_timelines(&self) -> TimelineDetail {
        TimelineDetail::Operators
    }

    fn state(&mut self, replica: u32, time: Nanos, state: &SchedulerState<'_>) {
        if self.window.start <= time && time < self.window.end {
            let trace = self.replica(replica);
            let batch_tokens = match trace.counters {
                Some(counters) if !trace.in_flight.is_empty() => counters.batch_tokens,
                _ => 0,
            };
            self.counters(replica, time, state, batch_tokens);
        }
    }

    fn step(&mut self, record: &StepRecord<'_>, step: &ScheduledStep, requests: &RequestIds<'_>) {
        let StepRecord { replica, start, shape, state, timeline, .. } = record;
        self.follow_preempted(*start, step, requests);
        if !(self.window.start..self.window.end).contains(start) {
            self.replica(*replica).in_flight.push_back(None);
            return;
        }
        let lane = self.take_lane(*replica);
        let (mut name, mut host_post) = ("step", Nanos::ZERO);
        if let Some(timeline) = timeline {
            (name, host_post) = (timeline.dispatch.name(), timeline.host_post);
            self.launched(*replica, timeline);
        }
        let args = step_args(record, step);
        self.replica(*replica).in_flight.push_back(Some(InFlight { lane, name, host_post, args }));
        self.counters(*replica, *start, state, shape.num_tokens);
    }

    fn step_end(&mut self, replica: u32, _number: u32, start: Nanos, end: Nanos) {
        let trace = self.replica(replica);
        let Some(Some(step)) = trace.in_flight.pop_front() else { return };
        trace.lanes[step.lane] = false;
        if step.host_post > Nanos::ZERO {
            let from = end.saturating_since(step.host_post).max(start);
            self.host_slice(replica, 0, "host_post", Span { start: from, end });
        }
        self.slice(replica, STEPS + step.lane as u32, step.name, Span { start, end }, &step.args);
    }

    fn decode_steps(&mut self, replica: u32, first_number: u32, _steps: &[StepSpan], _num_seqs: u32) {
        unreachable!("replica {replica} told step {first_number} without its batch, which is wanted");
    }

    fn gaps(&mut self, _gap: Nanos, _count: u32) {}

    fn request(&mut self, outcome: Outcome) {
        let preempted = self.preempted.remove(&outcome.request.request_id).unwrap_or_default();
        let arrival = outcome.request.arrival_time_ns;
        if arrival >= self.window.end || outcome.last_token.unwrap_or(arrival) < self.window.start {
            return;
        }
        self.replica(outcome.replica);
        if outcome.rejection.is_some() {
            let (ts, id) = (Micros(arrival), outcome.request.request_id);
            self.event(
                'i',
                outcome.replica,
                format_args!(
                    "\"tid\":{STEPS},\"ts\":{ts},\"s\":\"p\",\"name\":\"rejected\",\"args\":{{\"request_id\":{id}}}"
                ),
            );
            return;
        }
        self.served(&outcome, &preempted);
    }
}

//! Requests made by a [`WorkloadSpec`], one at a time.
//!
//! Everything of a session (a single request is one of one turn) is drawn when it is prepared, and sessions are
//! prepared in the order of their numbers: what a session asks for does not depend on how fast the server is.
//! Memory holds what is under way, not what is done.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    ops::ControlFlow,
    path::Path,
    sync::Arc,
};

use plumbline_schema::{
    InputError, Location, Nanos, PromptContent, Workload, WorkloadRequest,
    workload::DEFAULT_PREFIX_HASH_TOKENS,
};
use rand_distr::{Distribution, Zipf, weighted::WeightedIndex};
use rand_pcg::Pcg64;

use super::{
    ArrivalError, RequestSource,
    distribution::{CountSampler, TimeDistribution},
    lengths::{Draw, LengthSource, Pair, TooLongCounts},
    spec::{Arrival, Lengths, MAX_TURNS, NextTurn, SpecError, WorkloadSpec},
    times::Times,
    trace::{TraceFormat, TraceRow, read_trace},
};
use crate::residual::stream;

/// A conversation, or a single request: what is still to come of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Session {
    id: u64,
    prefix: Option<u64>,
    priority: i32,
    /// The turns to come: time before it, prompt, output.
    turns: VecDeque<(Nanos, u32, u32)>,
    /// Time that a user of a closed loop takes after the last turn.
    rest: Nanos,
}

/// Where sessions begin.
#[derive(Clone, Debug)]
enum Starts {
    Open(Times),
    /// When each user without a session asks again.
    Closed {
        free: BinaryHeap<Reverse<Nanos>>,
        think_time: Option<TimeDistribution>,
        rng: Pcg64,
    },
}

/// Turns of sessions and the time between them.
#[derive(Clone, Debug)]
struct Turns {
    count: CountSampler,
    count_rng: Pcg64,
    think_time: TimeDistribution,
    think_rng: Pcg64,
    next_turn: NextTurn,
}

/// Draws what a session has besides lengths.
#[derive(Clone, Debug)]
struct Traits {
    prefix: Option<(Zipf<f64>, Pcg64)>,
    prefix_tokens: u32,
    priority: Option<(WeightedIndex<f64>, Vec<i32>, Pcg64)>,
}

/// Requests of a specification and a seed, in order of arrival.
#[derive(Clone, Debug)]
pub struct SpecSource {
    starts: Starts,
    lengths: LengthSource,
    turns: Option<Turns>,
    traits: Traits,
    /// The next session, with its arrival where that is known beforehand.
    prepared: Option<(Nanos, Session)>,
    /// No session comes after the prepared one.
    has_ended: bool,
    next_session_id: u64,
    /// Later turns that have their time.
    due: BinaryHeap<Reverse<(Nanos, Session)>>,
    /// What comes after requests under way, by their id. Never iterated.
    under_way: HashMap<u64, Session>,
    num_taken: u64,
    num_requests: Option<u64>,
    end: Option<Nanos>,
    last_arrival: Nanos,
    heeds_completions: bool,
}

impl WorkloadSpec {
    /// The requests, one at a time; reads the traces that the specification names.
    ///
    /// # Errors
    /// The first key, or the line and column of a trace, that cannot be used.
    pub fn open(&self, seed: u64) -> Result<SpecSource, ArrivalError> {
        self.check()?;
        let lengths = match &self.lengths {
            Lengths::Trace { path, format, .. } => read_lengths(path, *format)?,
            Lengths::Distributions { .. } => Vec::new(),
        };
        let lengths = LengthSource::new(self, lengths, seed)?;
        let starts = match &self.arrival {
            Arrival::ClosedLoop { users, think_time } => Starts::Closed {
                free: (0..*users).map(|_| Reverse(Nanos::ZERO)).collect(),
                think_time: think_time.clone(),
                rng: stream(seed, "rest"),
            },
            Arrival::Trace { path, format, .. } => {
                Starts::Open(Times::new(&self.arrival, read_times(path, *format)?, seed)?)
            }
            arrival => Starts::Open(Times::new(arrival, Vec::new(), seed)?),
        };
        let turns = self.sessions.as_ref().map(|sessions| {
            Ok::<_, SpecError>(Turns {
                count: sessions.turns.sampler(MAX_TURNS)?,
                count_rng: stream(seed, "turns"),
                think_time: sessions.think_time.clone(),
                think_rng: stream(seed, "think"),
                next_turn: sessions.next_turn,
            })
        });
        Ok(SpecSource {
            starts,
            lengths,
            turns: turns.transpose()?,
            traits: Traits::new(self, seed)?,
            prepared: None,
            has_ended: false,
            next_session_id: 0,
            due: BinaryHeap::new(),
            under_way: HashMap::new(),
            num_taken: 0,
            num_requests: self.num_requests,
            end: self.duration_s.map(|seconds| Nanos::from_f64(seconds * 1e9)),
            last_arrival: Nanos::ZERO,
            heeds_completions: self.heeds_completions(),
        })
    }

    /// As [`Self::open`], for whoever does not ask what became of requests that were too long.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn source(&self, seed: u64) -> Result<Box<dyn RequestSource + Send>, ArrivalError> {
        Ok(Box::new(self.open(seed)?))
    }

    /// All requests at once; see [`Self::generate_counted`].
    ///
    /// # Errors
    /// As [`Self::generate_counted`].
    pub fn generate(&self, seed: u64) -> Result<Workload, ArrivalError> {
        Ok(self.generate_counted(seed)?.0)
    }

    /// All requests at once, and what became of those that were too long.
    ///
    /// # Errors
    /// As [`Self::open`]; when arrivals depend on completions; when a trace ends before `num_requests`.
    pub fn generate_counted(&self, seed: u64) -> Result<(Workload, TooLongCounts), ArrivalError> {
        if self.heeds_completions() {
            return Err(ArrivalError::HeedsCompletions);
        }
        let mut source = self.open(seed)?;
        let mut requests = Vec::new();
        requests.extend(std::iter::from_fn(|| source.take()));
        if let (Some(asked), None) = (self.num_requests, self.duration_s)
            && (requests.len() as u64) < asked
        {
            let expected = format!("at most {}, after which the trace ends", requests.len());
            return Err(SpecError::new("num_requests", expected, asked).into());
        }
        Ok((Workload { requests }, source.counts()))
    }
}

/// The pairs of a trace, of which there must be one.
fn read_lengths(path: &Path, format: TraceFormat) -> Result<Vec<Pair>, InputError> {
    read_all(path, format, |row| Ok(Pair { prefill: row.num_prefill_tokens, decode: row.num_decode_tokens }))
}

/// The times of a trace in ascending order, of which the first becomes 0.
fn read_times(path: &Path, format: TraceFormat) -> Result<Vec<Nanos>, InputError> {
    let mut times = read_all(path, format, |row| {
        row.time.ok_or_else(|| {
            InputError::invalid(path, Location::Line(row.line), "an arrival time", "lengths alone")
        })
    })?;
    times.sort_unstable();
    let first = times[0];
    Ok(times.into_iter().map(|time| time.saturating_since(first)).collect())
}

/// Something of each request of a trace, of which there must be one.
fn read_all<T>(
    path: &Path,
    format: TraceFormat,
    mut of: impl FnMut(&TraceRow) -> Result<T, InputError>,
) -> Result<Vec<T>, InputError> {
    let mut all = Vec::new();
    read_trace(path, format, |row| {
        all.push(of(&row)?);
        Ok(ControlFlow::Continue(()))
    })?;
    if all.is_empty() {
        return Err(InputError::invalid(path, Location::File, "at least one request", "none"));
    }
    Ok(all)
}

impl Traits {
    fn new(spec: &WorkloadSpec, seed: u64) -> Result<Self, SpecError> {
        let prefix = spec.prefixes.map(|prefixes| {
            Zipf::new(f64::from(prefixes.count), prefixes.exponent)
                .map(|ranks| (ranks, stream(seed, "prefix")))
                .map_err(|e| SpecError::new("prefixes.exponent", "an exponent of Zipf's law", e))
        });
        let priority = (!spec.priorities.is_empty()).then(|| {
            WeightedIndex::new(spec.priorities.iter().map(|priority| priority.weight))
                .map(|index| {
                    let priorities = spec.priorities.iter().map(|priority| priority.priority).collect();
                    (index, priorities, stream(seed, "priority"))
                })
                .map_err(|e| SpecError::new("priorities", "weights", e))
        });
        Ok(Self {
            prefix: prefix.transpose()?,
            prefix_tokens: spec.prefix_tokens(),
            priority: priority.transpose()?,
        })
    }

    /// The prefix's id, from 0, the most popular first.
    fn prefix(&mut self) -> Option<u64> {
        self.prefix.as_mut().map(|(ranks, rng)| ranks.sample(rng) as u64 - 1)
    }

    fn priority(&mut self) -> i32 {
        self.priority.as_mut().map_or(0, |(index, priorities, rng)| priorities[index.sample(rng)])
    }
}

impl SpecSource {
    /// What became of requests that were too long, so far.
    #[must_use]
    pub fn counts(&self) -> TooLongCounts {
        self.lengths.counts
    }

    /// Whether the number of requests asked for is reached.
    fn is_full(&self) -> bool {
        self.num_requests.is_some_and(|num_requests| self.num_taken >= num_requests)
    }

    /// The arrival of the next session that is not under way, which it prepares.
    fn next_start(&mut self) -> Option<Nanos> {
        while self.prepared.is_none() && !self.has_ended {
            // In a closed loop the time is asked for below, since it may still become earlier.
            let time = match &mut self.starts {
                Starts::Open(times) => times.next(),
                Starts::Closed { .. } => Some(Nanos::ZERO),
            };
            let is_due = time.is_some_and(|time| self.end.is_none_or(|end| time < end));
            let (Some(time), true) = (time, is_due) else {
                self.has_ended = true;
                break;
            };
            self.prepare(time);
        }
        let (time, _) = self.prepared.as_ref()?;
        match &self.starts {
            Starts::Open(_) => Some(*time),
            Starts::Closed { free, .. } => free.peek().map(|Reverse(time)| *time),
        }
    }

    /// Draws a session; it becomes the next one unless its first turn is too long or the trace is at its end.
    fn prepare(&mut self, time: Nanos) {
        let num_turns = self.turns.as_mut().map_or(1, |turns| turns.count.draw(&mut turns.count_rng));
        let prefix = self.traits.prefix();
        let mut history = if prefix.is_some() { self.traits.prefix_tokens } else { 0 };
        let mut turns = VecDeque::new();
        for i in 0..num_turns {
            match self.lengths.draw(history) {
                Draw::Fits(pair) => {
                    let think = match &mut self.turns {
                        Some(turns) if i > 0 => turns.think_time.draw(&mut turns.think_rng),
                        _ => Nanos::ZERO,
                    };
                    turns.push_back((think, pair.prefill, pair.decode));
                    // Within the limit, which fits.
                    history = pair.prefill + pair.decode;
                }
                Draw::TooLong => {
                    // Turns after it would have been longer still.
                    self.lengths.counts.num_dropped += u64::from(num_turns - i);
                    break;
                }
                Draw::End => {
                    self.has_ended = true;
                    break;
                }
            }
        }
        if turns.is_empty() {
            return;
        }
        let rest = match &mut self.starts {
            Starts::Closed { think_time: Some(time), rng, .. } => time.draw(rng),
            _ => Nanos::ZERO,
        };
        let (id, priority) = (self.next_session_id, self.traits.priority());
        self.next_session_id += 1;
        self.prepared = Some((time, Session { id, prefix, priority, turns, rest }));
    }

    /// Takes the next session or turn and its arrival.
    fn pop(&mut self) -> Option<(Nanos, Session)> {
        let time = self.next_arrival()?;
        // A turn of an older session comes before a new session of the same time.
        let is_turn = self.due.peek().is_some_and(|Reverse((due, _))| *due <= time);
        let session = if is_turn {
            self.due.pop()?.0.1
        } else {
            if let Starts::Closed { free, .. } = &mut self.starts {
                free.pop();
            }
            self.prepared.take()?.1
        };
        Some((time, session))
    }

    /// What happens after a turn that arrived: the next is due, or waits for its completion.
    fn go_on(&mut self, request_id: u64, arrival: Nanos, session: Session) {
        let next_turn = self.turns.as_ref().map(|turns| turns.next_turn);
        let think = session.turns.front().map(|turn| turn.0);
        match (think, next_turn) {
            (Some(think), Some(NextTurn::AfterArrival)) => self.due.push(Reverse((arrival + think, session))),
            (Some(_), _) => drop(self.under_way.insert(request_id, session)),
            (None, _) if matches!(self.starts, Starts::Closed { .. }) => {
                self.under_way.insert(request_id, session);
            }
            (None, _) => {}
        }
    }
}

impl RequestSource for SpecSource {
    fn next_arrival(&mut self) -> Option<Nanos> {
        if self.is_full() {
            return None;
        }
        let start = self.next_start();
        let turn = self.due.peek().map(|Reverse((time, _))| *time);
        let time = [start, turn].into_iter().flatten().min()?;
        self.end.is_none_or(|end| time < end).then_some(time)
    }

    fn take(&mut self) -> Option<WorkloadRequest> {
        let (arrival, mut session) = self.pop()?;
        let (_, num_prefill_tokens, num_decode_tokens) = session.turns.pop_front()?;
        let request_id = self.num_taken;
        self.num_taken += 1;
        self.last_arrival = arrival;
        let session_id = self.turns.is_some().then_some(session.id);
        let is_shared = session_id.is_some() || session.prefix.is_some();
        let content = is_shared.then(|| {
            Arc::new(PromptContent {
                session_id,
                prefix_id: session.prefix,
                prefix_len: session.prefix.map_or(0, |_| self.traits.prefix_tokens),
                prefix_hashes: Vec::new(),
                prefix_hash_tokens: DEFAULT_PREFIX_HASH_TOKENS,
            })
        });
        let priority = session.priority;
        self.go_on(request_id, arrival, session);
        Some(WorkloadRequest {
            request_id,
            arrival_time_ns: arrival,
            num_prefill_tokens,
            num_decode_tokens,
            priority,
            content,
        })
    }

    fn completed(&mut self, request_id: u64, time: Nanos) {
        let Some(session) = self.under_way.remove(&request_id) else { return };
        // Arrivals never step back, whatever the caller's order.
        let time = time.max(self.last_arrival);
        if let Some((think, ..)) = session.turns.front() {
            self.due.push(Reverse((time + *think, session)));
        } else if let Starts::Closed { free, .. } = &mut self.starts {
            free.push(Reverse(time + session.rest));
        }
    }

    fn heeds_completions(&self) -> bool {
        self.heeds_completions
    }

    fn remaining(&self) -> Option<u64> {
        let has_none =
            self.has_ended && self.prepared.is_none() && self.due.is_empty() && self.under_way.is_empty();
        if has_none { Some(0) } else { self.num_requests.map(|num_requests| num_requests - self.num_taken) }
    }
}

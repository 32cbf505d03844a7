//! Many replicas behind a router: of one kind or several, or split into prefill and decode.

pub mod router;
mod run;

use std::{
    cell::RefCell,
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
};

use plumbline_schema::{Nanos, WorkloadRequest};

pub use self::{
    router::{Loads, Router, RouterKind},
    run::{ClusterRun, Engines, ReplicaSummary, simulate_cluster},
};
use crate::{
    arrival::RequestSource,
    executor::{Busy, SimulatedExecutor},
    recorder::{Outcome, Recorder, StepRecord},
    replica::{Arrival, Departure, Replica, ReplicaCounts, RequestIds},
    scheduler::{ScheduledStep, SchedulerKind, SchedulerState},
    serve::StepSpan,
    simulate::{SimulateError, SimulateOptions},
    step_time::{StepTimeModel, timeline::TimelineDetail},
    times::OperatorTimes,
};

/// Replicas of one kind.
#[derive(Clone, Copy, Debug)]
pub struct Group<'a, T> {
    /// Model, deployment, engine profile and GPU.
    pub step_time: &'a RefCell<StepTimeModel<T>>,
    /// The policy.
    pub scheduler: SchedulerKind,
    /// How many.
    pub num_replicas: u32,
    /// What they are for.
    pub role: Role,
}

/// What a replica is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Prompts and outputs.
    #[default]
    Whole,
    /// Prompts alone; their keys and values go on to a decode replica.
    Prefill,
    /// Outputs of prompts computed elsewhere.
    Decode,
}

/// What it takes to send a prompt's keys and values from a prefill to a decode replica.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvTransfer {
    /// Before the first byte, ns.
    pub latency_ns: f64,
    /// Bytes per second, above 0.
    pub bytes_per_s: f64,
    /// Of one token, all layers.
    pub bytes_per_token: f64,
}

impl KvTransfer {
    fn time(&self, num_tokens: u32) -> Nanos {
        let seconds = f64::from(num_tokens) * self.bytes_per_token / self.bytes_per_s;
        Nanos::from_f64(self.latency_ns + seconds * 1e9)
    }
}

/// How requests reach replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Routing {
    /// The router of every pool.
    pub router: RouterKind,
    /// Needed with prefill and decode replicas.
    pub kv_transfer: Option<KvTransfer>,
}

/// What one replica did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ReplicaReport {
    /// Its group's number.
    pub group: usize,
    /// What it counted.
    pub counts: ReplicaCounts,
    /// What its time went into.
    pub busy: Busy,
    /// When its last step ended.
    pub end: Nanos,
    /// Usable KV blocks.
    pub num_kv_blocks: u32,
}

/// A cluster that serves requests from a source.
pub struct Cluster<'a, T: OperatorTimes> {
    replicas: Vec<Member<'a, T>>,
    /// Where new requests go, and where prompts go that were computed; the same without disaggregation.
    pools: Vec<Pool>,
    kv_transfer: Option<KvTransfer>,
    heeds_load: bool,
    /// When each replica does something next, and who; one that is out of date is passed over.
    events: BinaryHeap<Reverse<(Nanos, u32)>>,
    next_times: Vec<Option<Nanos>>,
    transfers: BinaryHeap<Reverse<Transfer>>,
    /// Requests in prefill replicas, by index.
    in_prefill: HashMap<u64, WorkloadRequest>,
    num_arrivals: u64,
}

struct Member<'a, T: OperatorTimes> {
    replica: Replica<SimulatedExecutor<'a, &'a RefCell<StepTimeModel<T>>>>,
    group: usize,
    role: Role,
    pool: usize,
    /// Its place in the pool.
    place: usize,
}

struct Pool {
    router: Box<dyn Router>,
    loads: Loads,
    /// Numbers of its replicas.
    members: Vec<u32>,
}

/// Keys and values on their way; in order of time, then of arrival.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Transfer {
    ready: Nanos,
    index: u64,
}

/// Why a cluster cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// No replica that takes in new requests.
    #[error("expected at least one replica, found none")]
    Empty,
    /// Roles that do not make a whole.
    #[error(
        "expected replicas of one role (whole), or both prefill and decode replicas and no other, found {found}"
    )]
    Roles {
        /// The roles.
        found: String,
    },
    /// Nothing says what it takes to send keys and values.
    #[error(
        "prefill and decode replicas need the latency and the bandwidth at which keys and values are sent"
    )]
    NoKvTransfer,
    /// Out of range.
    #[error("expected a KV transfer of {expected}, found {found}")]
    KvTransfer {
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
}

impl<'a, T: OperatorTimes> Cluster<'a, T> {
    /// An idle cluster; replicas are numbered through the groups.
    ///
    /// # Errors
    /// When there is no replica, roles do not make a whole, or a scheduler cannot serve its deployment.
    pub fn new(
        groups: &[Group<'a, T>],
        routing: Routing,
        options: &SimulateOptions,
    ) -> Result<Self, SimulateError> {
        let has = |role| groups.iter().any(|group| group.role == role && group.num_replicas > 0);
        let (whole, prefill, decode) = (has(Role::Whole), has(Role::Prefill), has(Role::Decode));
        match (whole, prefill, decode) {
            (true, false, false) => {}
            (false, true, true) => check_transfer(routing.kv_transfer)?,
            (false, false, false) => return Err(ClusterError::Empty.into()),
            _ => {
                let found = [(whole, "whole"), (prefill, "prefill"), (decode, "decode")];
                let found: Vec<_> = found.iter().filter(|(is, _)| *is).map(|(_, name)| *name).collect();
                return Err(ClusterError::Roles { found: found.join(" and ") }.into());
            }
        }
        let mut replicas = Vec::new();
        let mut members = vec![Vec::new(); if prefill { 2 } else { 1 }];
        for (group, kind) in groups.iter().enumerate() {
            for _ in 0..kind.num_replicas {
                let number = replicas.len() as u32;
                let executor = SimulatedExecutor::of_replica(kind.step_time, options, number);
                let scheduler = kind.scheduler.build(kind.step_time.borrow().deployment())?;
                let pool = usize::from(kind.role == Role::Decode);
                let place = members[pool].len();
                members[pool].push(number);
                let replica = Replica::new(number, scheduler, executor);
                replicas.push(Member { replica, group, role: kind.role, pool, place });
            }
        }
        let block_size = groups.first().map_or(1, |group| group.step_time.borrow().deployment().block_size);
        let pool = |members: Vec<u32>| Pool {
            router: routing.router.build(options.seed, block_size),
            loads: Loads::new(members.len()),
            members,
        };
        Ok(Self {
            next_times: vec![None; replicas.len()],
            replicas,
            pools: members.into_iter().map(pool).collect(),
            kv_transfer: routing.kv_transfer,
            heeds_load: routing.router.heeds_load(),
            events: BinaryHeap::new(),
            transfers: BinaryHeap::new(),
            in_prefill: HashMap::new(),
            num_arrivals: 0,
        })
    }

    /// Serves every request of `source`.
    ///
    /// # Errors
    /// When an operator has no time, or a scheduler has work and forms no step.
    pub fn run<S: RequestSource, R: Recorder>(
        &mut self,
        source: &mut S,
        recorder: &mut R,
    ) -> Result<Vec<ReplicaReport>, SimulateError> {
        let has_feedback = source.heeds_completions() || self.pools.len() > 1;
        if has_feedback || self.heeds_load {
            if has_feedback {
                self.replicas.iter_mut().for_each(|member| member.replica.pause_at_departures());
            }
            self.run_in_order(source, recorder, has_feedback)?;
        } else {
            self.run_apart(source, recorder)?;
        }
        Ok(self.reports())
    }

    /// Replicas that cannot heed each other each go on alone when a request comes to them.
    fn run_apart<S: RequestSource, R: Recorder>(
        &mut self,
        source: &mut S,
        recorder: &mut R,
    ) -> Result<(), SimulateError> {
        while let Some(request) = source.take() {
            let arrival = Arrival::new(request, self.num_arrivals);
            self.num_arrivals += 1;
            let pool = &mut self.pools[0];
            let place = pool.router.route(&arrival.request, &pool.loads);
            let replica = &mut self.replicas[pool.members[place] as usize].replica;
            replica.run_until(arrival.ready, recorder)?;
            replica.push(arrival);
            drop(replica.departures());
            debug_assert!(self.adds_up());
        }
        for member in &mut self.replicas {
            member.replica.run_until(Nanos(u64::MAX), recorder)?;
        }
        debug_assert!(self.adds_up());
        Ok(())
    }

    /// All replicas move through time together, so that routers, clients and decode replicas learn of each end when it
    /// has come.
    fn run_in_order<S: RequestSource, R: Recorder>(
        &mut self,
        source: &mut S,
        recorder: &mut R,
        has_feedback: bool,
    ) -> Result<(), SimulateError> {
        loop {
            debug_assert!(self.adds_up());
            let transfer = self.transfers.peek().map(|Reverse(transfer)| transfer.ready);
            let arrival = source.next_arrival();
            let input = [arrival, transfer].into_iter().flatten().min();
            let event = self.next_event();
            match (input, event) {
                (None, None) => return Ok(()),
                (Some(time), event) if event.is_none_or(|(at, _)| at >= time) => {
                    // An arrival goes before keys and values that come at the same time.
                    if arrival == Some(time) {
                        if let Some(request) = source.take() {
                            self.arrive(request);
                        }
                    } else {
                        self.deliver();
                    }
                }
                (input, Some((at, number))) => {
                    self.events.pop();
                    // With feedback, no further than to where another replica may make something happen.
                    let other = if has_feedback { self.next_event().map(|(at, _)| at) } else { None };
                    let horizon = [input, other].into_iter().flatten().min().unwrap_or(Nanos(u64::MAX));
                    self.advance(number, horizon.max(at + Nanos(1)), source, recorder)?;
                }
                (Some(_), None) => {}
            }
        }
    }

    /// Whether every request that came is in one place (an inbox, a scheduler, on its way to a decode replica, done or
    /// rejected) and every KV block is free or in use.
    fn adds_up(&self) -> bool {
        let mut num_requests = self.transfers.len() as u64;
        for Member { replica, role, .. } in &self.replicas {
            let counts = replica.counts();
            num_requests += replica.num_outstanding() as u64 + counts.rejected;
            // What a prefill replica is done with is on its way or further.
            num_requests += if *role == Role::Prefill { 0 } else { counts.finished };
            let kv_cache = replica.scheduler().state().kv_cache;
            if kv_cache.num_free() + kv_cache.num_used() != kv_cache.num_blocks() {
                return false;
            }
        }
        num_requests == self.num_arrivals
    }

    /// The replica that does something first, and when.
    fn next_event(&mut self) -> Option<(Nanos, u32)> {
        while let Some(&Reverse((at, number))) = self.events.peek() {
            if self.next_times[number as usize] == Some(at) {
                return Some((at, number));
            }
            self.events.pop();
        }
        None
    }

    fn arrive(&mut self, mut request: WorkloadRequest) {
        let index = self.num_arrivals;
        self.num_arrivals += 1;
        if self.pools.len() > 1 {
            self.in_prefill.insert(index, request.clone());
            request.num_decode_tokens = 1;
        }
        self.send(0, Arrival::new(request, index));
    }

    /// The first of the keys and values on their way reach a decode replica.
    fn deliver(&mut self) {
        let Some(Reverse(Transfer { ready, index })) = self.transfers.pop() else { return };
        let Some(request) = self.in_prefill.remove(&index) else { return };
        let num_transferred_tokens = request.num_prefill_tokens;
        self.send(1, Arrival { request, index, ready, num_transferred_tokens });
    }

    fn send(&mut self, pool: usize, arrival: Arrival) {
        let pool = &mut self.pools[pool];
        let place = pool.router.route(&arrival.request, &pool.loads);
        pool.loads.sent(place);
        let number = pool.members[place];
        self.replicas[number as usize].replica.push(arrival);
        self.schedule(number);
    }

    /// Notes when a replica does something next.
    fn schedule(&mut self, number: u32) {
        let next = self.replicas[number as usize].replica.next_time();
        if next != self.next_times[number as usize] {
            self.next_times[number as usize] = next;
            self.events.extend(next.map(|at| Reverse((at, number))));
        }
    }

    /// Lets a replica go on up to `horizon`, and hands on what leaves it.
    fn advance<S: RequestSource, R: Recorder>(
        &mut self,
        number: u32,
        horizon: Nanos,
        source: &mut S,
        recorder: &mut R,
    ) -> Result<(), SimulateError> {
        self.next_times[number as usize] = None;
        let Member { replica, role, pool, place, .. } = &mut self.replicas[number as usize];
        let (role, pool, place) = (*role, *pool, *place);
        if role == Role::Prefill {
            let mut recorder = PrefillRecorder { recorder, whole: &self.in_prefill };
            replica.run_until(horizon, &mut recorder)?;
        } else {
            replica.run_until(horizon, recorder)?;
        }
        for Departure { index, request_id, time, is_rejected } in replica.departures() {
            self.pools[pool].loads.left(place);
            if role == Role::Prefill && !is_rejected {
                let num_tokens = self.in_prefill.get(&index).map_or(0, |request| request.num_prefill_tokens);
                let takes = self.kv_transfer.map_or(Nanos::ZERO, |transfer| transfer.time(num_tokens));
                self.transfers.push(Reverse(Transfer { ready: time + takes, index }));
            } else {
                self.in_prefill.remove(&index);
                source.completed(request_id, time);
            }
        }
        self.schedule(number);
        Ok(())
    }

    fn reports(&self) -> Vec<ReplicaReport> {
        let report = |member: &Member<'a, T>| ReplicaReport {
            group: member.group,
            counts: member.replica.counts(),
            busy: member.replica.executor().busy(),
            end: member.replica.executor().last_end(),
            num_kv_blocks: member.replica.scheduler().state().kv_cache.num_blocks(),
        };
        self.replicas.iter().map(report).collect()
    }
}

fn check_transfer(transfer: Option<KvTransfer>) -> Result<(), ClusterError> {
    let Some(transfer) = transfer else { return Err(ClusterError::NoKvTransfer) };
    let KvTransfer { latency_ns, bytes_per_s, bytes_per_token } = transfer;
    let bad = |expected, found: f64| Err(ClusterError::KvTransfer { expected, found: found.to_string() });
    if !(latency_ns.is_finite() && latency_ns >= 0.0) {
        return bad("a latency of at least 0 ns", latency_ns);
    }
    if !(bytes_per_s.is_finite() && bytes_per_s > 0.0) {
        return bad("a bandwidth above 0 bytes/s", bytes_per_s);
    }
    if !(bytes_per_token.is_finite() && bytes_per_token > 0.0) {
        return bad("more than 0 bytes a token", bytes_per_token);
    }
    Ok(())
}

/// Keeps a prefill replica's steps and rejections; its requests are not done when they leave it.
struct PrefillRecorder<'a, R> {
    recorder: &'a mut R,
    /// Its requests as they came, by index.
    whole: &'a HashMap<u64, WorkloadRequest>,
}

impl<R: Recorder> Recorder for PrefillRecorder<'_, R> {
    fn wants_batches(&self) -> bool {
        self.recorder.wants_batches()
    }

    fn wants_timelines(&self) -> TimelineDetail {
        self.recorder.wants_timelines()
    }

    fn arrival(&mut self, replica: u32, time: Nanos) {
        self.recorder.arrival(replica, time);
    }

    fn state(&mut self, replica: u32, time: Nanos, state: &SchedulerState<'_>) {
        self.recorder.state(replica, time, state);
    }

    fn step(&mut self, record: &StepRecord<'_>, step: &ScheduledStep, requests: &RequestIds<'_>) {
        self.recorder.step(record, step, requests);
    }

    fn step_end(&mut self, replica: u32, number: u32, start: Nanos, end: Nanos) {
        self.recorder.step_end(replica, number, start, end);
    }

    fn decode_steps(&mut self, replica: u32, first_number: u32, steps: &[StepSpan], num_seqs: u32) {
        self.recorder.decode_steps(replica, first_number, steps, num_seqs);
    }

    fn gaps(&mut self, _gap: Nanos, _count: u32) {}

    fn request(&mut self, mut outcome: Outcome) {
        if outcome.rejection.is_some() {
            if let Some(whole) = self.whole.get(&outcome.index) {
                outcome.request.clone_from(whole);
            }
            self.recorder.request(outcome);
        }
    }
}

//! Where requests come from: a workload that is known, or one that is made while the simulation runs.
//!
//! Start with [`RequestSource`] (what a simulation asks), [`WorkloadSpec`] (a workload in words) and
//! [`SpecSource`] (its requests). [`import()`] makes workloads of published traces. To add a process of arrivals, add
//! a case to [`Arrival`] and to `times.rs`; a distribution of lengths, to [`CountDistribution`].

mod distribution;
mod import;
mod lengths;
mod source;
mod spec;
#[cfg(test)]
mod tests;
mod times;
mod trace;

use std::sync::Arc;

use plumbline_schema::{InputError, Nanos, Workload, WorkloadRequest};
use thiserror::Error;

pub use distribution::{CountDistribution, TimeDistribution};
pub use import::{ImportArrivals, ImportCounts, ImportOptions, TooLongRow, import};
pub use lengths::TooLongCounts;
pub use source::SpecSource;
pub use spec::{
    Arrival, Lengths, MAX_SECONDS, MAX_TOKENS, MAX_TURNS, NextTurn, Prefixes, Priority, RateFrom, Sessions,
    SpecError, TooLong, TraceOrder, WorkloadSpec,
};
pub use trace::{TraceCounts, TraceFormat, TraceRow, read_trace};

/// Why there are no requests.
#[derive(Debug, Error)]
pub enum ArrivalError {
    /// The specification asks for what cannot be.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A trace cannot be used.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A request of a trace is over the limit, and nothing says what to do about it.
    #[error(transparent)]
    TooLong(InputError),
    /// A trace has no arrival times, and nothing says when its requests arrive.
    #[error(transparent)]
    LengthsAlone(InputError),
    /// A list of requests is asked for, which there is only once a server has answered them.
    #[error(
        "expected arrivals that are known beforehand, found a closed loop or sessions that wait for answers"
    )]
    HeedsCompletions,
}

/// Where requests come from while a simulation runs.
pub trait RequestSource {
    /// When the next request arrives; `None` when none is due before another completes, or at the end. Never before
    /// an arrival already taken.
    fn next_arrival(&mut self) -> Option<Nanos>;
    /// Takes the next request.
    fn take(&mut self) -> Option<WorkloadRequest>;
    /// A request has all its tokens, or was rejected, at `time`; requests that this makes arrive do so at `time` or
    /// later.
    fn completed(&mut self, _request_id: u64, _time: Nanos) {}
    /// Whether `completed` can make requests arrive (closed loops, sessions).
    fn heeds_completions(&self) -> bool {
        false
    }
    /// Requests that may still come beyond those taken, where known.
    fn remaining(&self) -> Option<u64>;
}

impl<S: RequestSource + ?Sized> RequestSource for Box<S> {
    fn next_arrival(&mut self) -> Option<Nanos> {
        (**self).next_arrival()
    }
    fn take(&mut self) -> Option<WorkloadRequest> {
        (**self).take()
    }
    fn completed(&mut self, request_id: u64, time: Nanos) {
        (**self).completed(request_id, time);
    }
    fn heeds_completions(&self) -> bool {
        (**self).heeds_completions()
    }
    fn remaining(&self) -> Option<u64> {
        (**self).remaining()
    }
}

/// The requests of a workload, in its order.
#[derive(Clone, Debug)]
pub struct WorkloadSource {
    workload: Arc<Workload>,
    next: usize,
}

impl WorkloadSource {
    /// From the workload's first request.
    #[must_use]
    pub fn new(workload: impl Into<Arc<Workload>>) -> Self {
        Self { workload: workload.into(), next: 0 }
    }
}

impl RequestSource for WorkloadSource {
    fn next_arrival(&mut self) -> Option<Nanos> {
        self.workload.requests.get(self.next).map(|request| request.arrival_time_ns)
    }

    fn take(&mut self) -> Option<WorkloadRequest> {
        let request = self.workload.requests.get(self.next)?.clone();
        self.next += 1;
        Some(request)
    }

    fn remaining(&self) -> Option<u64> {
        Some((self.workload.requests.len() - self.next) as u64)
    }
}

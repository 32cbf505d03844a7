//! Where requests come from: a workload that is known, or one that is made while the simulation runs.
//!
//! Start with [`RequestSource`].

use std::sync::Arc;

use plumbline_schema::{Nanos, Workload, WorkloadRequest};

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_comes_in_its_order() {
        let requests = vec![WorkloadRequest::new(4, Nanos(1), 2, 3), WorkloadRequest::new(2, Nanos(1), 5, 6)];
        let mut source: Box<dyn RequestSource> =
            Box::new(WorkloadSource::new(Workload { requests: requests.clone() }));
        let mut taken = Vec::new();
        while let Some(time) = source.next_arrival() {
            assert_eq!(source.remaining(), Some(2 - taken.len() as u64));
            taken.extend(source.take());
            assert_eq!(taken.last().map(|request| request.arrival_time_ns), Some(time));
        }
        assert_eq!(taken, requests);
        assert!(source.take().is_none() && !source.heeds_completions());
    }
}

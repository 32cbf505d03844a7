//! The queue of requests that do not run, and who must make room for those that do.

use std::collections::{BTreeSet, VecDeque};

use plumbline_schema::{Nanos, WorkloadRequest};

use crate::sequence::SequenceId;

/// Who comes before whom: the lower priority value, then the earlier arrival, then who was added first.
///
/// vLLM 0.24.0 compares request ids last (`vllm/v1/request.py`, `Request.__lt__`); its arrival times are read off a clock
/// when a request is added, so that they differ in the order of adding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    priority: i32,
    arrival: Nanos,
    number: u64,
    id: SequenceId,
}

/// vLLM's request queues (0.24.0, `vllm/v1/core/sched/request_queue.py`).
#[derive(Clone, Debug)]
pub(super) enum Waiting {
    /// First come, first served; who was preempted comes back first.
    Fcfs(VecDeque<SequenceId>),
    /// By rank.
    Priority {
        /// Those that wait.
        queue: BTreeSet<Rank>,
        /// Of each unfinished sequence, by id.
        ranks: Vec<Rank>,
        /// Sequences ever added.
        num_added: u64,
    },
}

impl Waiting {
    /// An empty queue in order of arrival.
    pub fn fcfs() -> Self {
        Self::Fcfs(VecDeque::new())
    }

    /// An empty queue in order of priority.
    pub fn priority() -> Self {
        Self::Priority { queue: BTreeSet::new(), ranks: Vec::new(), num_added: 0 }
    }

    pub fn len(&self) -> usize {
        match self {
            Self::Fcfs(queue) => queue.len(),
            Self::Priority { queue, .. } => queue.len(),
        }
    }

    /// Who is to run next.
    pub fn first(&self) -> Option<SequenceId> {
        match self {
            Self::Fcfs(queue) => queue.front().copied(),
            Self::Priority { queue, .. } => queue.first().map(|rank| rank.id),
        }
    }

    pub fn remove_first(&mut self) {
        match self {
            Self::Fcfs(queue) => drop(queue.pop_front()),
            Self::Priority { queue, .. } => drop(queue.pop_first()),
        }
    }

    /// Takes in a new sequence.
    pub fn add(&mut self, id: SequenceId, request: &WorkloadRequest) {
        match self {
            Self::Fcfs(queue) => queue.push_back(id),
            Self::Priority { queue, ranks, num_added } => {
                let (priority, arrival) = (request.priority, request.arrival_time_ns);
                let rank = Rank { priority, arrival, number: *num_added, id };
                *num_added += 1;
                if ranks.len() <= id.index() {
                    ranks.resize(id.index() + 1, rank);
                }
                ranks[id.index()] = rank;
                queue.insert(rank);
            }
        }
    }

    /// Takes a preempted sequence back.
    pub fn put_back(&mut self, id: SequenceId) {
        match self {
            Self::Fcfs(queue) => queue.push_front(id),
            Self::Priority { queue, ranks, .. } => drop(queue.insert(ranks[id.index()])),
        }
    }

    /// Lets sequences go that were done before they ran again.
    pub fn remove_all(&mut self, ids: &[SequenceId]) {
        match self {
            Self::Fcfs(queue) => queue.retain(|id| !ids.contains(id)),
            Self::Priority { queue, .. } => queue.retain(|rank| !ids.contains(&rank.id)),
        }
    }

    /// Which of the running loses its blocks first: the last, or that of the highest rank.
    pub fn victim(&self, running: &[SequenceId]) -> Option<usize> {
        match self {
            Self::Fcfs(_) => running.len().checked_sub(1),
            Self::Priority { ranks, .. } => {
                (0..running.len()).max_by_key(|&index| ranks[running[index].index()])
            }
        }
    }
}

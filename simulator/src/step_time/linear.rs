//! Times of the operators that see no context, by the number of tokens or of sequences, remembered in tables.

use std::{collections::BTreeMap, ops::Range};

use plumbline_schema::{Operator, OperatorShape};

use crate::times::ProvenanceTimes;

/// Summed times of a number of tokens (or sequences), repeats included: what a step reads.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LinearTimes {
    pub gemm_ns: f64,
    pub other_ns: f64,
    pub provenance: ProvenanceTimes,
    /// Steps that used it, by [`is_decode_only`](super::GpuParts::is_decode_only).
    pub num_uses: [u64; 2],
}

/// What one operator adds to a [`LinearTimes`].
#[derive(Clone, Copy, Debug)]
pub(super) struct PricedCall {
    pub operator: Operator,
    /// Shape of one launch.
    pub shape: OperatorShape,
    pub repeats: u32,
    /// Time of all launches, ns.
    pub time_ns: f64,
}

/// A pipeline stage's part of a [`LinearTimes`], ns.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StageLinear {
    pub gemm_ns: f64,
    pub other_ns: f64,
}

/// Numbers up to this are looked up in a table of 4 bytes each, however many tokens a deployment allows.
const MAX_DENSE: u32 = 1 << 16;

/// [`LinearTimes`] by number.
#[derive(Clone, Debug)]
pub(super) struct LinearTable {
    /// Place of each number plus one, 0 for none; grows as numbers come.
    dense: Vec<u32>,
    max_dense: u32,
    /// Places of larger numbers.
    sparse: BTreeMap<u32, u32>,
    times: Vec<LinearTimes>,
    calls: Vec<Vec<PricedCall>>,
    /// As many to each place as there are stages.
    stages: Vec<StageLinear>,
    num_stages: usize,
}

impl LinearTable {
    /// A table of what the deployment's steps hold at most (more is looked up more slowly), for so many stages.
    pub fn new(max_number: u32, num_stages: usize) -> Self {
        Self {
            dense: Vec::new(),
            max_dense: max_number.min(MAX_DENSE),
            sparse: BTreeMap::new(),
            times: Vec::new(),
            calls: Vec::new(),
            stages: Vec::new(),
            num_stages,
        }
    }

    /// The place of a number that was put.
    #[inline]
    pub fn place(&self, number: u32) -> Option<usize> {
        match self.dense.get(number as usize) {
            Some(&place) => (place as usize).checked_sub(1),
            None if number <= self.max_dense => None,
            None => self.sparse.get(&number).map(|&place| place as usize),
        }
    }

    #[inline]
    pub fn at(&self, place: usize) -> &LinearTimes {
        &self.times[place]
    }

    /// Counts a step that used a place.
    #[inline]
    pub fn count(&mut self, place: usize, is_decode_only: bool) {
        self.times[place].num_uses[usize::from(is_decode_only)] += 1;
    }

    /// Each stage's part of a place.
    pub fn stages(&self, place: usize) -> &[StageLinear] {
        let Range { start, end } = place * self.num_stages..(place + 1) * self.num_stages;
        &self.stages[start..end]
    }

    /// Adds times with the calls they are made of, for a number.
    pub fn put(
        &mut self,
        number: u32,
        times: LinearTimes,
        calls: Vec<PricedCall>,
        stages: &[StageLinear],
    ) -> usize {
        debug_assert_eq!(stages.len(), self.num_stages);
        let place = self.times.len();
        self.times.push(times);
        self.calls.push(calls);
        self.stages.extend_from_slice(stages);
        self.stand(number, place);
        place
    }

    /// Lets a number have its place.
    fn stand(&mut self, number: u32, place: usize) {
        // As many places as a run has numbers: far from 2^32.
        let place = place as u32;
        if number > self.max_dense {
            self.sparse.insert(number, place);
            return;
        }
        let index = number as usize;
        if self.dense.len() <= index {
            let len = (index + 1).next_power_of_two().min(self.max_dense as usize + 1);
            self.dense.resize(len, 0);
        }
        self.dense[index] = place + 1;
    }

    /// Everything put, with the calls it is made of.
    pub fn uses(&self) -> impl Iterator<Item = (&LinearTimes, &[PricedCall])> {
        self.times.iter().zip(self.calls.iter().map(Vec::as_slice))
    }

    /// Forgets how often each was used.
    pub fn reset_uses(&mut self) {
        self.times.iter_mut().for_each(|times| times.num_uses = [0; 2]);
    }
}

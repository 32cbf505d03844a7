//! Every deployment of a grid, in parallel.

use std::sync::atomic::{AtomicUsize, Ordering};

use plumbline_schema::InputError;
use rayon::prelude::*;
use serde::Serialize;

use super::{
    Bracket, Candidate, Economics, Journal, Point, Probe, Scenario, SearchError, grid::full_key, highest_rate,
};
use crate::times::OperatorTimes;

/// What became of a deployment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    /// It has a highest rate.
    Bracketed,
    /// Every rate tried meets the limits, or none does.
    NotBracketed,
    /// It cannot be simulated.
    Failed,
}

/// A deployment and what was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The deployment.
    #[serde(flatten)]
    pub point: Point,
    /// What became of it.
    pub status: Found,
    /// Why it has no highest rate.
    pub reason: Option<String>,
    /// Rate and costs, where it has a highest rate.
    #[serde(flatten)]
    pub economics: Option<Economics>,
    /// Every rate tried.
    pub probes: Vec<Probe>,
}

/// A deployment is done.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// How many are.
    pub done: usize,
    /// Of how many.
    pub total: usize,
    /// Whether it was done before.
    pub is_reused: bool,
    /// What was found.
    pub row: &'a Row,
}

/// The highest rate of each deployment, on the threads of rayon's present pool; the order is that of `candidates` and
/// the result the same with any number of threads.
///
/// What the journal has is taken from it, and what is found goes there the moment it is. A deployment that cannot be
/// simulated is told with the reason and not kept there.
///
/// # Errors
/// When the journal, or a temporary file, cannot be written.
pub fn sweep<T: OperatorTimes + Send>(
    candidates: Vec<Candidate<T>>,
    scenario: &Scenario<'_>,
    journal: Option<&Journal>,
    progress: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<Vec<Row>, InputError> {
    let (total, num_done) = (candidates.len(), AtomicUsize::new(0));
    let rows = candidates.into_par_iter().map(|candidate| {
        let (row, is_reused) = one(candidate, scenario, journal)?;
        let done = num_done.fetch_add(1, Ordering::Relaxed) + 1;
        progress(Progress { done, total, is_reused, row: &row });
        Ok(row)
    });
    rows.collect()
}

/// A deployment's row, and whether it was there before.
fn one<T: OperatorTimes>(
    candidate: Candidate<T>,
    scenario: &Scenario<'_>,
    journal: Option<&Journal>,
) -> Result<(Row, bool), InputError> {
    let Candidate { point, router, engines } = candidate;
    let (engines, key) = match engines {
        Ok(both) => both,
        Err(reason) => return Ok((Row::failed(point, reason), false)),
    };
    let scenario = Scenario { router, ..*scenario };
    let key = full_key(&key, &scenario);
    if let Some(result) = journal.and_then(|journal| journal.get(&key)) {
        return Ok((Row::new(point, result.clone()), true));
    }
    match highest_rate(engines, &scenario, |_| {}) {
        Ok(result) => {
            journal.map_or(Ok(()), |journal| journal.add(&key, &result))?;
            Ok((Row::new(point, result), false))
        }
        Err(SearchError::Input(error)) => Err(error),
        Err(error) => Ok((Row::failed(point, error.to_string()), false)),
    }
}

impl Row {
    fn failed(point: Point, reason: String) -> Self {
        Self { point, status: Found::Failed, reason: Some(reason), economics: None, probes: Vec::new() }
    }

    fn new(point: Point, result: Bracket<Probe>) -> Self {
        let (status, reason, economics) = match result.ends() {
            Ok((low, _)) => {
                let tokens = low.output_tokens_per_s.unwrap_or(0.0);
                let economics = Economics::new(low.rate_per_s, tokens, point.cost_per_hour);
                (Found::Bracketed, None, Some(economics))
            }
            Err(why) => (Found::NotBracketed, Some(result.in_words(why)), None),
        };
        Self { point, status, reason, economics, probes: result.probes }
    }
}

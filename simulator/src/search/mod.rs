//! The highest load within latency limits, and the deployment that bears it at the least cost.
//!
//! Start with [`highest_rate`] (one deployment) and [`sweep`] (a grid of them). `bracket.rs` is the search itself,
//! `probe.rs` what is simulated at a rate and whether that is good enough, `backlog.rs` whether a queue was stable,
//! `grid.rs` the grid, `journal.rs` what lets an interrupted sweep go on, `front.rs` costs and the Pareto front.

mod backlog;
mod bracket;
mod front;
mod grid;
mod journal;
mod limits;
mod load;
mod probe;
mod sweep;

use plumbline_schema::InputError;
use thiserror::Error;

pub use self::{
    backlog::Backlog,
    bracket::{Bracket, BracketOptions, Judged, NotBracketed, bracket},
    front::{Economics, pareto_front},
    grid::{Candidate, GpuKind, Grid, Kind, Point},
    journal::Journal,
    limits::{Latency, Limit, Percentile},
    load::{Load, LoadError, NoRate},
    probe::{Latencies, Probe, Prober, Scenario},
    sweep::{Found, Progress, Row, sweep},
};
use crate::{arrival::ArrivalError, cluster::Engines, simulate::SimulateError, times::OperatorTimes};

/// Why a search ends without a result.
#[derive(Debug, Error)]
pub enum SearchError {
    /// A rate cannot be simulated.
    #[error(transparent)]
    Simulate(#[from] SimulateError),
    /// The requests cannot be made.
    #[error(transparent)]
    Arrival(#[from] ArrivalError),
    /// A file cannot be read or written.
    #[error(transparent)]
    Input(#[from] InputError),
}

/// The highest rate at which `engines` meet all limits of `scenario`.
///
/// # Errors
/// When a rate cannot be simulated.
pub fn highest_rate<T: OperatorTimes>(
    engines: Engines<T>,
    scenario: &Scenario<'_>,
    mut tried: impl FnMut(&Probe),
) -> Result<Bracket<Probe>, SearchError> {
    let prober = Prober::new(engines, scenario)?;
    bracket(scenario.bracket, |rate_per_s| {
        let probe = prober.probe(rate_per_s)?;
        tried(&probe);
        Ok(probe)
    })
}

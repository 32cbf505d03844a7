//! How large an error of a case may be.

use std::{collections::BTreeMap, fmt};

use serde::Deserialize;

use crate::{
    compare::MetricRow,
    metrics::{Metric, Stat},
};

/// What an error of one metric and statistic may be.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(try_from = "ToleranceFile")]
pub enum Tolerance {
    /// At most so many percent in size.
    Pct(f64),
    /// The simulated value must lie inside the range of the real repeats widened by 5 %.
    Band,
    /// Either of the two.
    PctOrBand(f64),
}

/// A tolerance as suites hold it: `8.0`, `"band"` or `{ pct = 8.0, or_band = true }`.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a percentage, \"band\", or { pct = 8.0, or_band = true }")]
enum ToleranceFile {
    Pct(f64),
    Word(BandWord),
    Table(ToleranceTable),
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum BandWord {
    Band,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ToleranceTable {
    pct: f64,
    #[serde(default)]
    or_band: bool,
}

impl TryFrom<ToleranceFile> for Tolerance {
    type Error = String;

    fn try_from(file: ToleranceFile) -> Result<Self, String> {
        let tolerance = match file {
            ToleranceFile::Word(BandWord::Band) => Self::Band,
            ToleranceFile::Pct(pct) | ToleranceFile::Table(ToleranceTable { pct, or_band: false }) => {
                Self::Pct(pct)
            }
            ToleranceFile::Table(ToleranceTable { pct, or_band: true }) => Self::PctOrBand(pct),
        };
        match tolerance {
            Self::Pct(pct) | Self::PctOrBand(pct) if !(pct.is_finite() && pct >= 0.0) => {
                Err(format!("expected a percentage from 0 on, found {pct}"))
            }
            tolerance => Ok(tolerance),
        }
    }
}

impl Tolerance {
    /// Whether it allows the row's error; none for a row that is n/a.
    #[must_use]
    pub fn allows(self, row: &MetricRow) -> Option<bool> {
        let (error, inside) = (row.error_pct?, row.inside_band?);
        Some(match self {
            Self::Pct(pct) => error.abs() <= pct,
            Self::Band => inside,
            Self::PctOrBand(pct) => error.abs() <= pct || inside,
        })
    }
}

impl fmt::Display for Tolerance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pct(pct) => write!(f, "{pct} %"),
            Self::Band => f.write_str("band"),
            Self::PctOrBand(pct) => write!(f, "{pct} % or band"),
        }
    }
}

/// Tolerances by metric and statistic, as a `[tolerance]` table holds them.
pub type ToleranceMap = BTreeMap<Metric, BTreeMap<Stat, Tolerance>>;

/// A case's tolerances: its own, and those of the suite where it has none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tolerances {
    own: ToleranceMap,
    of_suite: ToleranceMap,
}

impl Tolerances {
    /// A case's own tolerances laid over those of its suite.
    #[must_use]
    pub fn new(own: ToleranceMap, of_suite: ToleranceMap) -> Self {
        Self { own, of_suite }
    }

    /// The tolerance of a metric and statistic, and whether the case itself asks for it.
    ///
    /// What the suite asks of all cases is not asked of those that have no such number; what a case asks of itself is.
    #[must_use]
    pub fn get(&self, metric: Metric, stat: Stat) -> Option<(Tolerance, bool)> {
        let find = |map: &ToleranceMap| map.get(&metric).and_then(|stats| stats.get(&stat)).copied();
        find(&self.own)
            .map(|tolerance| (tolerance, true))
            .or_else(|| find(&self.of_suite).map(|tolerance| (tolerance, false)))
    }
}

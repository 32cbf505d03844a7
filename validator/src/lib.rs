//! How far a simulation stands from the truth, metric by metric.
//!
//! Start with [`metrics`] (the dictionary: TTFT, ITL, TPOT, E2E), [`mod@compare`] (repeats of a real run against a
//! simulated one) and [`mod@validate`] (a whole [`suite`] of such cases). [`report`] renders the [`results`], [`check`]
//! judges them, [`mod@explain`] says why. Runs that other tools recorded come by [`import`]; what those tools mean by their names is
//! in [`variants`].

pub mod calibrate;
pub mod check;
pub mod compare;
pub mod evidence;
pub mod explain;
pub mod import;
pub mod metrics;
pub mod report;
pub mod results;
pub mod settings;
pub mod suite;
#[cfg(test)]
mod testing;
pub mod timeline;
pub mod validate;
pub mod variants;

pub use compare::{CompareError, Comparison, MetricRow, compare, compare_requests};
pub use evidence::Evidence;
pub use import::{ImportOptions, Imported, ResultFormat, import_run};
pub use metrics::{Metric, RunMetrics, Stat, Unavailable};
pub use report::{ReportError, Waterfall, render_table, waterfall_svg, write_report};
pub use results::{CaseResult, CaseStatus, SuiteResult, Summary};
pub use settings::{Setting, Verdict};
pub use suite::{Case, Role, Suite};
pub use validate::{CaseError, ValidateOptions, validate};

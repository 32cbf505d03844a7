//! Judging a bundle: what in it cannot be true, what is doubtful, what is missing, and a grade with its reasons.
//!
//! [`verify`](crate::verify) asks whether a bundle is the one that was written; [`lint()`] asks whether it deserves
//! belief. Start with `report` (what is found), `grade` (how the grade follows) and `times` (which times are
//! doubtful); each other file holds one family of rules.

mod attention;
mod coverage;
mod grade;
mod grid;
mod identity;
mod lines;
mod quality;
mod report;
mod spread;
mod table;
mod times;
mod trained;

use plumbline_schema::{ModelSpec, Operator, Workload};

pub(crate) use coverage::launches;
pub use coverage::{ModelCoverage, OperatorCoverage};
pub use grade::{Grade, Reason};
pub use report::{Counts, Finding, LintReport, Rule, Severity};

use self::table::Table;
use crate::{
    bundle::{Bundle, HOST},
    error::BundleError,
    host::HostCosts,
    predictor::Predictors,
};

/// What a bundle is asked to cover.
#[derive(Clone, Debug, PartialEq)]
pub struct LintOptions {
    /// Models whose steps it must know; empty for the shipped ones among those that the bundle names.
    pub models: Vec<ModelSpec>,
    /// Workload whose extremes the steps reach; `None` for any prompt and sequence up to the profiler's own envelope.
    pub workload: Option<Workload>,
    /// Most tokens of a step, at least 1.
    pub max_num_tokens: u32,
    /// Most sequences of a step, at least 1.
    pub max_num_seqs: u32,
}

impl Default for LintOptions {
    fn default() -> Self {
        Self { models: Vec::new(), workload: None, max_num_tokens: 8192, max_num_seqs: 256 }
    }
}

/// A bundle's parts, read and checked once.
struct Subject<'a> {
    bundle: &'a Bundle,
    /// Operators with samples, in the order of the forward pass.
    tables: Vec<Table>,
    host: Option<HostCosts>,
    predictors: Option<Predictors>,
}

/// Looks for everything that speaks against a bundle, and grades it.
///
/// The same bundle and options give the same report.
///
/// # Errors
/// When a part that the manifest lists cannot be read: such a bundle is unsound, and `verify` names all of it.
pub fn lint(bundle: &Bundle, options: &LintOptions) -> Result<LintReport, BundleError> {
    let subject = Subject::read(bundle)?;
    let mut findings = Vec::new();
    let models = coverage::models(&subject, options, &mut findings);
    for table in &subject.tables {
        times::check(&subject, table, &mut findings);
        grid::check(table, &models, &mut findings);
        spread::check_table(table, &mut findings);
        quality::check(table, &mut findings);
    }
    spread::check_readings(&subject, &mut findings);
    identity::check(&subject, &mut findings);
    trained::check(&subject, &mut findings)?;
    let coverage = coverage::check(&subject, &models, options, &mut findings);
    Ok(grade::report(&subject, findings, coverage))
}

impl<'a> Subject<'a> {
    fn read(bundle: &'a Bundle) -> Result<Self, BundleError> {
        let mut tables = Vec::new();
        for operator in Operator::ALL {
            if let Some(file) = bundle.samples_file(operator) {
                tables.push(Table { operator, file, samples: bundle.operator_samples(operator)? });
            }
        }
        let has_predictors = bundle.predicted_operators().next().is_some();
        Ok(Self {
            bundle,
            tables,
            host: if bundle.manifest.files.contains_key(HOST) { Some(bundle.host()?) } else { None },
            predictors: if has_predictors { Some(bundle.predictors()?) } else { None },
        })
    }

    fn num_points(&self) -> usize {
        self.tables.iter().map(|table| table.samples.len()).sum()
    }
}

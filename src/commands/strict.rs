//! `--strict`: no figure from a simulation that is not known to be of the same thing as the real run.

use plumbline_validator::{CaseResult, SuiteResult, Verdict};

use crate::{exit::Exit, failure::Failure};

/// The most settings that an error names; the report, without `--strict`, has all.
const SHOWN: usize = 8;

/// Refuses a result with a setting that does not match or is not known.
///
/// # Errors
/// `BadInput`, naming case, setting and both values.
pub fn check(result: &SuiteResult) -> Result<(), Failure> {
    let of_case = |case: &CaseResult| -> Vec<String> {
        let others = case.settings.iter().filter(|setting| setting.verdict != Verdict::Match);
        others
            .map(|setting| format!("{}, {} ({})", case.name, setting.describe(), setting.verdict.name()))
            .collect()
    };
    let named: Vec<String> = result.cases.iter().flat_map(of_case).collect();
    if named.is_empty() {
        return Ok(());
    }
    let more = match named.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    let shown = named[..named.len().min(SHOWN)].join("; ");
    let text = format!(
        "--strict: expected every setting to match, found {} that do not: {shown}{more}",
        named.len()
    );
    let hint = "without --strict, the report's settings table shows them all; engine.json or run.json of a real run may \
                hold what is unknown";
    Err(Failure::message(Exit::BadInput, text).with_hint(hint))
}

//! The figures that a tool computed itself, against the same figures computed anew from its details.

use plumbline_schema::Run;
use serde::Serialize;

use super::record::Parsed;
use crate::variants::{PercentileRule, figure_of};

/// Rounding that explains a difference: each span was rounded to a nanosecond, and clocks since 1970 as floats to 240 ns.
const ROUNDING_MS: f64 = 1e-3;

/// Relative rounding: files hold figures with six digits at least.
const RELATIVE_ROUNDING: f64 = 1e-5;

/// A figure of the file and the same computed from its details.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FigureCheck {
    /// The tool's name of it.
    pub name: String,
    /// What the file says, ms.
    pub published_ms: f64,
    /// What its details say, ms; none where they do not hold enough.
    pub computed_ms: Option<f64>,
    /// Whether both agree but for rounding; none where there is nothing to compare.
    pub agrees: Option<bool>,
}

/// Checks the figures against `run`, whose arrivals must be those that the tool counted from.
pub(super) fn check(tool: &str, parsed: &Parsed, run: &Run) -> Vec<FigureCheck> {
    let mut samples: Vec<(&str, Vec<f64>)> = Vec::new();
    let mut checks = Vec::with_capacity(parsed.published.len());
    for (name, published_ms) in &parsed.published {
        let Some((variant, statistic)) = figure_of(tool, name) else { continue };
        let is_unchecked = parsed.unchecked.is_some_and(|(names, _)| names.contains(&variant.name));
        let known = samples.iter().position(|(name, _)| *name == variant.name).unwrap_or_else(|| {
            let sorted =
                if is_unchecked { Vec::new() } else { variant.definition.sorted_ns(run).unwrap_or_default() };
            samples.push((variant.name, sorted));
            samples.len() - 1
        });
        let computed_ms =
            statistic.of_sorted(&samples[known].1, PercentileRule::of_tool(tool)).map(|ns| ns / 1e6);
        checks.push(FigureCheck {
            name: name.clone(),
            published_ms: *published_ms,
            computed_ms,
            agrees: computed_ms.map(|computed| {
                (computed - published_ms).abs() <= ROUNDING_MS + RELATIVE_ROUNDING * published_ms.abs()
            }),
        });
    }
    checks
}

/// The disagreements, in words.
pub(super) fn warnings(checks: &[FigureCheck]) -> impl Iterator<Item = String> {
    checks.iter().filter(|check| check.agrees == Some(false)).map(|check| {
        format!(
            "the file says {} = {} ms, its details say {} ms",
            check.name,
            check.published_ms,
            check.computed_ms.unwrap_or_default()
        )
    })
}

//! How well the points were measured, by what was noted with them.

use super::{
    Finding, Rule, Severity,
    table::{Table, share},
};
use crate::samples::Sample;

/// What can disturb a point, besides heat, as flags of a sample.
const DISTURBANCES: [&str; 4] = ["clock_shifted", "bimodal", "noisy", "time_limit"];

/// Share of disturbed points of an operator above which it is a warning.
const MAX_DISTURBED_SHARE: f64 = 0.05;

/// Fewest repeated measurements that a median and a 95th percentile rest on.
const MIN_SAMPLES: u32 = 5;

/// Share of points of too few samples above which it is a warning.
const MAX_FEW_SHARE: f64 = 0.05;

/// Whether heat held clocks down: unlike the power cap, that is the machine's state and not the launch's doing.
fn is_hot(sample: &Sample) -> bool {
    sample.throttle.split('|').any(|reason| reason.contains("thermal"))
}

/// Whether something disturbed the point.
pub(super) fn is_disturbed(sample: &Sample) -> bool {
    is_hot(sample) || DISTURBANCES.iter().any(|flag| sample.has_flag(flag))
}

pub(super) fn check(table: &Table, findings: &mut Vec<Finding>) {
    let samples = &table.samples;
    let num = samples.len();
    let count = |test: &dyn Fn(&Sample) -> bool| samples.iter().filter(|sample| test(sample)).count();
    let num_capped = count(&|sample| sample.has_flag("throttled") && !is_hot(sample));
    if num_capped > 0 {
        let found = format!("{} points with clocks held down", share(num_capped, num));
        let hint = "what a GPU sustains under its power cap is the truth for prefills; it costs no grade";
        let expected = "points at free clocks";
        findings.push(table.whole(Rule::Throttled, Severity::Info, expected, found, hint));
    }
    let num_disturbed = count(&is_disturbed);
    if num_disturbed > 0 {
        let mut parts = vec![("heat", count(&is_hot))];
        parts.extend(DISTURBANCES.map(|flag| (flag, count(&|sample| sample.has_flag(flag)))));
        let parts: Vec<_> =
            parts.iter().filter(|(_, n)| *n > 0).map(|(what, n)| format!("{what} {n}")).collect();
        let is_much = num_disturbed as f64 > MAX_DISTURBED_SHARE * num as f64;
        let severity = if is_much { Severity::Warning } else { Severity::Info };
        let found = format!("{} points: {}", share(num_disturbed, num), parts.join(", "));
        let expected = format!("at most {:.0} % of points disturbed", 100.0 * MAX_DISTURBED_SHARE);
        let hint = "measure on an idle, cool GPU with locked clocks";
        findings.push(table.whole(Rule::Disturbed, severity, expected, found, hint));
    }
    let num_few = count(&|sample| sample.stats.n < MIN_SAMPLES);
    if num_few > 0 {
        let is_much = num_few as f64 > MAX_FEW_SHARE * num as f64;
        let severity = if is_much { Severity::Warning } else { Severity::Info };
        let found = format!("{} points with fewer", share(num_few, num));
        let expected = format!("{MIN_SAMPLES} samples a point or more");
        let hint = "let each point take more time";
        findings.push(table.whole(Rule::FewSamples, severity, expected, found, hint));
    }
}

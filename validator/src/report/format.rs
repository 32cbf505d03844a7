//! Numbers as people read them.

use crate::{
    compare::MetricRow,
    results::{CaseResult, ErrorSummary},
};

/// Milliseconds with about four digits.
pub(super) fn ms(value: f64) -> String {
    let decimals = match value.abs() {
        v if v < 1.0 => 3,
        v if v < 100.0 => 2,
        v if v < 1000.0 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

/// A difference in milliseconds, signed; a zero has no sign.
pub(super) fn signed_ms(value: f64) -> String {
    let text = ms(value.abs());
    if text == ms(0.0) {
        return "0 ms".into();
    }
    format!("{}{text} ms", if value < 0.0 { "-" } else { "+" })
}

pub(super) fn ms_or_na(value: Option<f64>) -> String {
    value.map_or_else(|| "n/a".into(), ms)
}

/// A signed percentage; a zero has no sign.
pub(super) fn signed_pct(value: f64) -> String {
    let text = format!("{value:+.1} %");
    if text == "-0.0 %" || text == "+0.0 %" { "0.0 %".into() } else { text }
}

/// The error and whether it is inside the band: `+3.1 % ✓`.
pub(super) fn error_with_mark(row: &MetricRow) -> String {
    let error = row.error_pct.map_or_else(|| "n/a".into(), signed_pct);
    match row.inside_band {
        Some(true) => format!("{error} ✓"),
        Some(false) => format!("{error} ✗"),
        None => error,
    }
}

/// The range of the repeats; a single run has none.
pub(super) fn range(row: &MetricRow, num_repeats: usize) -> String {
    match (row.real_min_ms, row.real_max_ms) {
        (Some(min), Some(max)) if num_repeats > 1 => format!("{}..{}", ms(min), ms(max)),
        (Some(_), Some(_)) => "1 run".into(),
        _ => "n/a".into(),
    }
}

/// The noise floor, `±2.4 %`; a single run has none.
pub(super) fn noise(row: &MetricRow) -> String {
    match (row.noise_pct, row.error_pct) {
        (Some(noise), _) => format!("±{noise:.1} %"),
        (None, Some(_)) => "1 run".into(),
        (None, None) => "n/a".into(),
    }
}

/// The 95 % interval of the error: `-14.1..-10.2 %`.
pub(super) fn interval(row: &MetricRow) -> String {
    match (row.error_low_pct, row.error_high_pct) {
        (Some(low), Some(high)) => format!("{low:+.1}..{high:+.1} %"),
        _ => "n/a".into(),
    }
}

/// A setting's value; of a digest, its beginning, which tells it from any other.
pub(super) fn setting_value(value: Option<&str>) -> String {
    let is_digest = |part: &str| part.len() == 64 && part.bytes().all(|b| b.is_ascii_hexdigit());
    let shown = |part: &str| if is_digest(part) { format!("{}…", &part[..12]) } else { part.to_owned() };
    value.map_or_else(
        || "not recorded".into(),
        |value| value.split(" / ").map(shown).collect::<Vec<_>>().join(" / "),
    )
}

/// A case's shares of operator time by provenance, largest first: `interpolated 96 %, measured 4 %`; none
/// when not known.
pub(super) fn coverage(case: &CaseResult) -> Option<String> {
    let mut shares: Vec<_> = case.coverage.iter().filter(|(_, share)| **share > 0.0).collect();
    shares.sort_by(|a, b| b.1.total_cmp(a.1));
    let texts: Vec<_> = shares
        .into_iter()
        .map(|(name, share)| match 100.0 * share {
            pct if pct < 0.95 => format!("{name} {pct:.1} %"),
            pct => format!("{name} {pct:.0} %"),
        })
        .collect();
    (!texts.is_empty()).then(|| texts.join(", "))
}

/// `median 3.1 %, worst 8.2 % (name), 5 of 7 in band`.
pub(super) fn error_summary(summary: &ErrorSummary) -> String {
    format!(
        "median {:.1} %, worst {:.1} % ({}), {} of {} in band",
        summary.median_abs_error_pct,
        summary.worst_abs_error_pct,
        summary.worst_case,
        summary.num_inside_band,
        summary.num_cases
    )
}

/// Reasons for n/a of a case, each once, in order.
pub(super) fn na_reasons(case: &CaseResult) -> Vec<String> {
    let mut reasons: Vec<String> = Vec::new();
    for row in &case.metrics {
        if let Some(reason) = &row.na_reason {
            let text = format!("{} {}: {reason}", row.metric.title(), row.stat);
            if !reasons.contains(&text) {
                reasons.push(text);
            }
        }
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_keep_about_four_digits() {
        let texts: Vec<_> = [0.0, 0.0251, 1.82, 17.28, 99.994, 123.45, 2185.4].map(ms).into();
        assert_eq!(texts, ["0.000", "0.025", "1.82", "17.28", "99.99", "123.5", "2185"]);
    }

    #[test]
    fn errors_are_signed_except_zero() {
        assert_eq!(signed_pct(3.12), "+3.1 %");
        assert_eq!(signed_pct(-88.6), "-88.6 %");
        assert_eq!(signed_pct(-0.01), "0.0 %");
        assert_eq!(signed_pct(0.0), "0.0 %");
        assert_eq!([3.5, -640.0, -0.0001].map(signed_ms), ["+3.50 ms", "-640.0 ms", "0 ms"]);
    }
}

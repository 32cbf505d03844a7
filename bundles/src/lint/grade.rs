//! The grade: the worst of what each rule allows, with its reasons.
//!
//! An error makes an F. Otherwise each rule that found something caps the grade:
//!
//! | what | A | B | C | D |
//! |---|---|---|---|---|
//! | points that a warning doubts | up to 1 % | 3 % | 10 % | more |
//! | disturbed points | up to 5 % | 15 % | 30 % | more |
//! | refused shapes of the worst model | none | up to 5 % | 20 % | more |
//! | entries of `incomplete` | none | up to 10 | more | |
//! | ragged grid, holes, single points, samples not trained on, host costs or ceilings missing | | always | | |
//! | any other warning | | | always | |
//! | no samples | | | | always |
//!
//! Infos cap nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

use serde::Serialize;

use super::{
    Counts, Finding, LintReport, ModelCoverage, Rule, Severity, Subject, quality::is_disturbed, table::share,
};

/// How far a bundle deserves belief.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Grade {
    /// Nothing speaks against it.
    A,
    /// Small doubts or gaps.
    B,
    /// Usable with care: something is missing or doubtful.
    C,
    /// Much is missing or doubtful.
    D,
    /// Something in it cannot be true.
    F,
}

impl Grade {
    /// Every grade, best first; there is no E.
    pub const ALL: [Self; 5] = [Self::A, Self::B, Self::C, Self::D, Self::F];
}

impl fmt::Display for Grade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self {
            Self::A => "A",
            Self::B => "B",
            Self::C => "C",
            Self::D => "D",
            Self::F => "F",
        };
        f.pad(letter)
    }
}

impl FromStr for Grade {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|grade| grade.to_string().eq_ignore_ascii_case(text));
        found.ok_or_else(|| format!("expected A, B, C, D or F, found `{text}`"))
    }
}

/// Why a grade is not better.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// The best grade that a bundle with this can have.
    pub cap: Grade,
    /// The rules behind it.
    pub rules: Vec<Rule>,
    /// What is the matter, in words.
    pub text: String,
    /// What would raise the grade.
    pub raise: String,
}

/// Largest shares for an A, a B and a C.
struct Limits([f64; 3]);

const DOUBTFUL: Limits = Limits([0.01, 0.03, 0.10]);
const DISTURBED: Limits = Limits([0.05, 0.15, 0.30]);
const REFUSED: Limits = Limits([0.0, 0.05, 0.20]);

/// Most entries of `incomplete` for a B; an entry may stand for several points.
const MAX_INCOMPLETE: usize = 10;

impl Limits {
    fn grade(&self, share: f64) -> Grade {
        let met = self.0.iter().zip(Grade::ALL).find(|(limit, _)| share <= **limit);
        met.map_or(Grade::D, |(_, grade)| grade)
    }
}

pub(super) fn report(
    subject: &Subject,
    mut findings: Vec<Finding>,
    coverage: Vec<ModelCoverage>,
) -> LintReport {
    findings.sort_by(|a, b| {
        let key = |f: &Finding| (std::cmp::Reverse(f.severity), f.rule, f.operator, f.file.clone(), f.line);
        key(a).cmp(&key(b))
    });
    let counts = counts(subject, &findings);
    let mut reasons = errors(&findings);
    reasons.extend(shares(subject, &counts, &findings, &coverage));
    reasons.extend(warnings(&findings));
    // Stable: reasons of one cap keep the order of the rules above.
    reasons.sort_by_key(|reason| std::cmp::Reverse(reason.cap));
    let grade = reasons.iter().map(|reason| reason.cap).max().unwrap_or(Grade::A);
    LintReport { grade, reasons, findings, counts, coverage }
}

fn counts(subject: &Subject, findings: &[Finding]) -> Counts {
    let of = |severity: Severity| findings.iter().filter(|f| f.severity == severity).count();
    let doubtful: BTreeSet<_> = findings
        .iter()
        .filter(|f| f.rule.is_of_points() && f.severity > Severity::Info)
        .map(|f| (f.operator, f.line))
        .collect();
    let mut by_rule = BTreeMap::new();
    for finding in findings {
        *by_rule.entry(finding.rule).or_insert(0) += 1;
    }
    let samples = subject.tables.iter().flat_map(|table| &table.samples);
    Counts {
        num_points: subject.num_points(),
        num_doubtful_points: doubtful.len(),
        num_disturbed_points: samples.filter(|sample| is_disturbed(sample)).count(),
        num_errors: of(Severity::Error),
        num_warnings: of(Severity::Warning),
        num_infos: of(Severity::Info),
        by_rule,
    }
}

/// One reason for each rule with an error.
fn errors(findings: &[Finding]) -> Vec<Reason> {
    let errors = findings.iter().filter(|f| f.severity == Severity::Error);
    let mut by_rule: BTreeMap<Rule, Vec<&Finding>> = BTreeMap::new();
    errors.for_each(|finding| by_rule.entry(finding.rule).or_default().push(finding));
    let reason = |(rule, found): (Rule, Vec<&Finding>)| Reason {
        cap: Grade::F,
        rules: vec![rule],
        text: format!("{} of what cannot be true: {}", found.len(), rule.name()),
        raise: found[0].hint.clone(),
    };
    by_rule.into_iter().map(reason).collect()
}

/// Reasons whose cap follows from a share.
fn shares(
    subject: &Subject,
    counts: &Counts,
    findings: &[Finding],
    coverage: &[ModelCoverage],
) -> Vec<Reason> {
    let ratio = |part: usize, whole: usize| part as f64 / whole.max(1) as f64;
    let num_incomplete = subject.bundle.manifest.incomplete.len();
    let incomplete = match num_incomplete {
        0 => Grade::A,
        1..=MAX_INCOMPLETE => Grade::B,
        _ => Grade::C,
    };
    let point_rules: BTreeSet<_> =
        findings.iter().map(|f| f.rule).filter(|rule| rule.is_of_points()).collect();
    let names: Vec<_> = point_rules.iter().map(|rule| rule.name()).collect();
    let mut all = vec![
        Reason {
            cap: DOUBTFUL.grade(ratio(counts.num_doubtful_points, counts.num_points)),
            rules: point_rules.iter().copied().collect(),
            text: format!(
                "{} points are doubtful: {}",
                share(counts.num_doubtful_points, counts.num_points),
                names.join(", ")
            ),
            raise: "measure the points that the findings name again, and train".into(),
        },
        Reason {
            cap: DISTURBED.grade(ratio(counts.num_disturbed_points, counts.num_points)),
            rules: vec![Rule::Disturbed],
            text: format!(
                "{} points were disturbed while measured",
                share(counts.num_disturbed_points, counts.num_points)
            ),
            raise: "measure on an idle, cool GPU with locked clocks".into(),
        },
        Reason {
            cap: incomplete,
            rules: vec![Rule::Incomplete],
            text: format!("{num_incomplete} entries of what was planned and not measured"),
            raise: "profile again with more time, or resume".into(),
        },
    ];
    let worst = coverage
        .iter()
        .max_by(|a, b| ratio(a.num_refused, a.num_shapes).total_cmp(&ratio(b.num_refused, b.num_shapes)));
    if let Some(worst) = worst {
        all.push(Reason {
            cap: REFUSED.grade(ratio(worst.num_refused, worst.num_shapes)),
            rules: vec![Rule::Refused],
            text: format!(
                "{} launches that steps of {} ask for would be refused",
                share(worst.num_refused, worst.num_shapes),
                worst.model
            ),
            raise: "see the hints of the findings; a workload that asks for less also raises it".into(),
        });
    }
    all.retain(|reason| reason.cap > Grade::A);
    all
}

/// One reason for each other rule with a warning.
fn warnings(findings: &[Finding]) -> Vec<Reason> {
    let is_shared = |rule: Rule| {
        rule.is_of_points() || matches!(rule, Rule::Disturbed | Rule::Incomplete | Rule::Refused)
    };
    let warnings = findings.iter().filter(|f| f.severity == Severity::Warning && !is_shared(f.rule));
    let mut by_rule: BTreeMap<(Grade, Rule), Vec<&Finding>> = BTreeMap::new();
    warnings.for_each(|finding| by_rule.entry((cap(finding.rule), finding.rule)).or_default().push(finding));
    let reason = |((cap, rule), found): ((Grade, Rule), Vec<&Finding>)| {
        let more = if found.len() > 1 { format!(" (and {} more)", found.len() - 1) } else { String::new() };
        let (first, operator) = (found[0], found[0].operator.map_or(String::new(), |o| format!(" of {o}")));
        Reason {
            cap,
            rules: vec![rule],
            text: format!(
                "{}{operator}: expected {}, found {}{more}",
                rule.name(),
                first.expected,
                first.found
            ),
            raise: first.hint.clone(),
        }
    };
    by_rule.into_iter().map(reason).collect()
}

/// The best grade with a warning whose weight is no share.
const fn cap(rule: Rule) -> Grade {
    match rule {
        Rule::RaggedGrid
        | Rule::Hole
        | Rule::SinglePoint
        | Rule::UnseenSamples
        | Rule::MissingCeilings
        | Rule::MissingHostCosts => Grade::B,
        Rule::NoSamples => Grade::D,
        _ => Grade::C,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_fall_on_the_side_that_the_table_says() {
        for (share, grade) in
            [(0.0, Grade::A), (0.01, Grade::A), (0.0101, Grade::B), (0.1, Grade::C), (0.5, Grade::D)]
        {
            assert_eq!(DOUBTFUL.grade(share), grade, "{share}");
        }
        assert_eq!(REFUSED.grade(1e-9), Grade::B);
    }

    #[test]
    fn grades_are_read_as_they_are_written() {
        for grade in Grade::ALL {
            assert_eq!(grade.to_string().parse(), Ok(grade));
        }
        assert_eq!("b".parse(), Ok(Grade::B));
        assert!("E".parse::<Grade>().unwrap_err().contains("found `E`"));
        assert!(Grade::A < Grade::F);
    }
}

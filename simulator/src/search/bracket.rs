//! The highest rate that is good enough, between one that is and one that is not.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where to look, and how closely.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BracketOptions {
    /// The rate tried first, requests per second.
    pub start_rate_per_s: f64,
    /// No lower rate is tried.
    pub min_rate_per_s: f64,
    /// No higher rate is tried.
    pub max_rate_per_s: f64,
    /// The rate that fails is at most this share above the one that meets the limits.
    pub tolerance: f64,
}

/// Doublings and halvings from the first rate that are tried where nothing else is asked for.
const MAX_DOUBLINGS: i32 = 20;

impl BracketOptions {
    /// From a first rate, to a million times of it and a millionth, within 2 %.
    #[must_use]
    pub fn from_start(start_rate_per_s: f64) -> Self {
        let factor = 2_f64.powi(MAX_DOUBLINGS);
        Self {
            start_rate_per_s,
            min_rate_per_s: start_rate_per_s / factor,
            max_rate_per_s: start_rate_per_s * factor,
            tolerance: 0.02,
        }
    }

    /// Checks that there is something to search.
    ///
    /// # Errors
    /// `(name, expected, found)`.
    pub fn check(&self) -> Result<(), (&'static str, String, f64)> {
        let Self { start_rate_per_s: start, min_rate_per_s: min, max_rate_per_s: max, tolerance } = *self;
        let is_rate = |rate: f64| rate.is_finite() && rate > 0.0;
        if !is_rate(min) {
            return Err(("lowest rate", "requests/s above 0".into(), min));
        }
        if !(is_rate(max) && max >= min) {
            return Err(("highest rate", format!("requests/s of at least {min}"), max));
        }
        if !(min..=max).contains(&start) {
            return Err(("first rate", format!("{min} to {max} requests/s"), start));
        }
        // Below, rounding to nanoseconds decides.
        if !(1e-4..=1.0).contains(&tolerance) {
            return Err(("tolerance", "0.0001 to 1".into(), tolerance));
        }
        Ok(())
    }
}

/// What was found at a rate.
pub trait Judged {
    /// The rate, requests per second.
    fn rate_per_s(&self) -> f64;
    /// Whether it is good enough.
    fn meets(&self) -> bool;
    /// Whether no lower rate does better.
    fn is_hopeless(&self) -> bool;
}

/// Every rate tried, in order, and the two ends among them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bracket<P> {
    /// What was tried.
    pub probes: Vec<P>,
    /// The highest rate known to be good enough; a place in `probes`.
    pub low: Option<usize>,
    /// The rate above it that is not.
    pub high: Option<usize>,
}

/// Why there is no highest rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotBracketed {
    /// Even the highest rate tried is good enough.
    AllMeet,
    /// Not even the lowest rate tried is.
    NoneMeets,
}

impl fmt::Display for NotBracketed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AllMeet => "even the highest rate tried meets the limits",
            Self::NoneMeets => "not even the lowest rate tried meets the limits",
        })
    }
}

impl<P> Bracket<P> {
    /// Both ends: a rate that is good enough and one above it that is not.
    ///
    /// # Errors
    /// Which of the two there is not.
    pub fn ends(&self) -> Result<(&P, &P), NotBracketed> {
        match (self.low, self.high) {
            (Some(low), Some(high)) => Ok((&self.probes[low], &self.probes[high])),
            (Some(_), None) => Err(NotBracketed::AllMeet),
            (None, _) => Err(NotBracketed::NoneMeets),
        }
    }
}

/// Looks for the highest rate that is good enough: doubles or halves until one is and one is not, then halves the
/// interval between their logarithms until it is within the tolerance.
///
/// Both ends are tried, never inferred: where goodness does not fall steadily with the rate, the answer is still a rate
/// that is good enough beside one that is not, if not the only such pair.
///
/// # Errors
/// The first of `probe`.
pub fn bracket<P: Judged, E>(
    options: &BracketOptions,
    mut probe: impl FnMut(f64) -> Result<P, E>,
) -> Result<Bracket<P>, E> {
    let mut found = Bracket { probes: Vec::new(), low: None, high: None };
    let mut rate = options.start_rate_per_s;
    while found.low.is_none() || found.high.is_none() {
        let tried = found.add(probe(rate)?);
        rate = if tried.meets() {
            if rate >= options.max_rate_per_s {
                break;
            }
            (rate * 2.0).min(options.max_rate_per_s)
        } else {
            if rate <= options.min_rate_per_s || tried.is_hopeless() {
                break;
            }
            (rate / 2.0).max(options.min_rate_per_s)
        };
    }
    while let Ok((low, high)) = found.ends() {
        let (low, high) = (low.rate_per_s(), high.rate_per_s());
        let middle = low * (high / low).sqrt();
        if high <= low * (1.0 + options.tolerance) || middle <= low || middle >= high {
            break;
        }
        found.add(probe(middle)?);
    }
    Ok(found)
}

impl<P: Judged> Bracket<P> {
    /// Keeps what was tried, as the new end that it is.
    fn add(&mut self, probe: P) -> &P {
        let place = self.probes.len();
        let end = if probe.meets() { &mut self.low } else { &mut self.high };
        *end = Some(place);
        self.probes.push(probe);
        &self.probes[place]
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Tried {
        rate: f64,
        meets: bool,
        is_hopeless: bool,
    }

    impl Judged for Tried {
        fn rate_per_s(&self) -> f64 {
            self.rate
        }
        fn meets(&self) -> bool {
            self.meets
        }
        fn is_hopeless(&self) -> bool {
            self.is_hopeless
        }
    }

    fn search(options: &BracketOptions, judge: impl Fn(f64) -> bool) -> Bracket<Tried> {
        let probe = |rate| Ok::<_, Infallible>(Tried { rate, meets: judge(rate), is_hopeless: false });
        bracket(options, probe).unwrap()
    }

    proptest! {
        /// Of a threshold, both ends lie on their sides of it, within the tolerance, in few steps.
        #[test]
        fn a_threshold_is_enclosed(
            exponent in -15.0..15.0_f64,
            start in 0.001..1e4_f64,
            tolerance in 1e-3..0.5_f64,
        ) {
            let threshold = start * 2_f64.powf(exponent);
            let options = BracketOptions { tolerance, ..BracketOptions::from_start(start) };
            let found = search(&options, |rate| rate <= threshold);
            let (low, high) = found.ends().unwrap();
            prop_assert!(low.meets && low.rate <= threshold);
            prop_assert!(!high.meets && high.rate > threshold);
            prop_assert!(high.rate <= low.rate * (1.0 + tolerance), "{} {}", low.rate, high.rate);
            let steps = exponent.abs() + 2.0 + (1.0 / (1.0 + tolerance).log2()).log2().max(0.0) + 1.0;
            prop_assert!(found.probes.len() as f64 <= steps, "{} of {steps}", found.probes.len());
            prop_assert_eq!(&found, &search(&options, |rate| rate <= threshold));
        }

        /// Whatever the answers, the ends are what was answered, and no rate is tried twice or outside of the limits.
        #[test]
        fn ends_are_what_was_tried(answers in prop::collection::vec(any::<bool>(), 200), start in 0.01..100.0_f64) {
            let options = BracketOptions::from_start(start);
            let mut next = answers.iter().copied();
            let probe = |rate| {
                Ok::<_, Infallible>(Tried { rate, meets: next.next().unwrap_or(false), is_hopeless: false })
            };
            let found = bracket(&options, probe).unwrap();
            for (i, tried) in found.probes.iter().enumerate() {
                prop_assert!((options.min_rate_per_s..=options.max_rate_per_s).contains(&tried.rate));
                prop_assert!(found.probes[..i].iter().all(|other| other.rate.to_bits() != tried.rate.to_bits()));
            }
            if let Ok((low, high)) = found.ends() {
                prop_assert!(low.meets && !high.meets && low.rate < high.rate);
                prop_assert!(high.rate <= low.rate * (1.0 + options.tolerance));
            }
        }
    }

    #[test]
    fn what_is_not_bracketed_says_which_end_is_missing() {
        let options =
            BracketOptions { max_rate_per_s: 10.0, min_rate_per_s: 0.3, ..BracketOptions::from_start(1.0) };
        let all = search(&options, |_| true);
        assert_eq!(all.ends(), Err(NotBracketed::AllMeet));
        assert_eq!(all.probes.iter().map(|p| p.rate).collect::<Vec<_>>(), [1.0, 2.0, 4.0, 8.0, 10.0]);
        let none = search(&options, |_| false);
        assert_eq!(none.ends(), Err(NotBracketed::NoneMeets));
        assert_eq!(none.probes.iter().map(|p| p.rate).collect::<Vec<_>>(), [1.0, 0.5, 0.3]);
    }

    #[test]
    fn lower_rates_are_not_tried_where_none_does_better() {
        let probe = |rate| Ok::<_, Infallible>(Tried { rate, meets: false, is_hopeless: rate < 0.6 });
        let found = bracket(&BracketOptions::from_start(1.0), probe).unwrap();
        assert_eq!(found.probes.len(), 2);
        assert_eq!(found.ends(), Err(NotBracketed::NoneMeets));
    }

    #[test]
    fn options_that_make_no_search_are_refused() {
        let fine = BracketOptions::from_start(3.0);
        assert_eq!(fine.check(), Ok(()));
        for (bad, name) in [
            (BracketOptions { tolerance: 0.0, ..fine }, "tolerance"),
            (BracketOptions { tolerance: f64::NAN, ..fine }, "tolerance"),
            (BracketOptions { min_rate_per_s: 0.0, ..fine }, "lowest rate"),
            (BracketOptions { max_rate_per_s: f64::INFINITY, ..fine }, "highest rate"),
            (BracketOptions { max_rate_per_s: 2.0, ..fine }, "first rate"),
        ] {
            assert_eq!(bad.check().unwrap_err().0, name);
        }
    }
}

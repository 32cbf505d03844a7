//! The one record that every format is read into.

use std::{collections::HashMap, path::Path};

use plumbline_schema::{ArrivalBasis, InputError, Location, Nanos, RequestStatus};

/// Longest span and latest time taken, seconds: 300 years hold any clock since 1970, and no sum of them overflows.
const MAX_SECONDS: f64 = 9e9;

/// Most tokens of a prompt or an output: no context is longer, and counts stay far from overflow.
const MAX_TOKENS: f64 = 1e9;

/// A request as its tool recorded it; spans count from when it was sent.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Record {
    /// Where it stands in the file.
    pub place: Location,
    /// Its own number; none where the tool gives none that says more than its place.
    pub request_id: Option<u64>,
    /// When it was due, by the tool's clock.
    pub scheduled: Option<Nanos>,
    /// When it was sent, by the tool's clock.
    pub sent: Option<Nanos>,
    /// Its first token.
    pub first_token: Option<Nanos>,
    /// Its last token.
    pub last_token: Option<Nanos>,
    /// Gaps between the pieces in which its output came, of one or more tokens each; none when not recorded.
    pub gaps: Option<Vec<Nanos>>,
    /// Prompt length.
    pub num_prefill_tokens: u32,
    /// Output length asked for; none when not recorded.
    pub num_decode_tokens: Option<u32>,
    /// Output length produced.
    pub num_decode_tokens_actual: u32,
    /// How it ended.
    pub status: RequestStatus,
}

/// A whole file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Parsed {
    /// The tool's version.
    pub version: Option<String>,
    /// What served the requests.
    pub backend: Option<String>,
    /// The model's name.
    pub model: Option<String>,
    /// What arrivals are when no schedule is given apart; none where they are not recorded.
    pub arrivals: Option<ArrivalBasis>,
    /// Whether requests without a number of their own are numbered by their arrival, not by their place.
    pub by_arrival: bool,
    /// At least one.
    pub records: Vec<Record>,
    /// The tool's own figures, ms, by its names.
    pub published: Vec<(String, f64)>,
    /// Names of figures that cannot be computed anew, and why.
    pub unchecked: Option<(&'static [&'static str], &'static str)>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// Expected and found.
pub(super) type Bad = (String, String);

/// A time or span of so many seconds.
pub(super) fn seconds(value: f64) -> Result<Nanos, Bad> {
    if (0.0..=MAX_SECONDS).contains(&value) {
        return Ok(Nanos::from_f64(value * 1e9));
    }
    Err((format!("seconds, 0 to {MAX_SECONDS:e}"), format!("{value:?}")))
}

/// A time of so many whole nanoseconds.
pub(super) fn nanoseconds(value: u64) -> Result<Nanos, Bad> {
    if value as f64 <= MAX_SECONDS * 1e9 {
        return Ok(Nanos(value));
    }
    Err((format!("ns, 0 to {:e}", MAX_SECONDS * 1e9), format!("{value:?}")))
}

/// A number of tokens; tables that were joined hold whole numbers as `9.0`.
pub(super) fn tokens(value: f64) -> Result<u32, Bad> {
    if (0.0..=MAX_TOKENS).contains(&value) && value.fract() == 0.0 {
        return Ok(value as u32);
    }
    Err((format!("a whole number of tokens, 0 to {MAX_TOKENS:e}"), format!("{value:?}")))
}

/// The span between two times of one clock.
pub(super) fn between(from: Nanos, to: Nanos, from_name: &str) -> Result<Nanos, Bad> {
    if to < from {
        return Err((format!("no time before {from_name} ({} ns)", from.0), format!("{} ns", to.0)));
    }
    Ok(to.saturating_since(from))
}

/// Ids of requests that are names, not numbers: a doubled request would count twice.
#[derive(Debug, Default)]
pub(super) struct Names(HashMap<String, Location>);

impl Names {
    /// Takes the name of the request at `place`, if it has one.
    pub(super) fn take(
        &mut self,
        path: &Path,
        name: Option<&String>,
        place: Location,
    ) -> Result<(), InputError> {
        let Some(name) = name else { return Ok(()) };
        match self.0.insert(name.clone(), place.clone()) {
            None => Ok(()),
            Some(first) => {
                let found = format!("{name:?} again (first{first})");
                Err(InputError::invalid(path, place, "a request id of its own", found))
            }
        }
    }
}

/// Names the place of a [`Bad`].
pub(super) trait At<T> {
    /// The error of the file at `path`.
    fn at(self, path: &Path, place: impl FnOnce() -> Location) -> Result<T, InputError>;
}

impl<T> At<T> for Result<T, Bad> {
    fn at(self, path: &Path, place: impl FnOnce() -> Location) -> Result<T, InputError> {
        self.map_err(|(expected, found)| InputError::invalid(path, place(), expected, found))
    }
}

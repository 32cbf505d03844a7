//! A workload in words: which arrivals, which lengths, what prompts share; and whether that makes sense.
//!
//! [`WorkloadSpec`] is the TOML or JSON document; docs/workloads.md is its reference.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
};

use plumbline_schema::{
    InputError, Location,
    files::{read_json, read_toml},
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{
    distribution::{CountDistribution, TimeDistribution},
    times::check_rate,
    trace::TraceFormat,
};

/// Largest length of a prompt or output in tokens: a thousand times what models of today take.
pub const MAX_TOKENS: u32 = 1 << 30;

/// Most turns of a session.
pub const MAX_TURNS: u32 = 100_000;

/// Longest time in a specification, in seconds: 31 years.
pub const MAX_SECONDS: f64 = 1e9;

/// A key of a specification whose value cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("key `{key}`: expected {expected}, found {found}")]
pub struct SpecError {
    /// The key, as a dotted path.
    pub key: String,
    /// What must stand there.
    pub expected: String,
    /// What stands there.
    pub found: String,
}

impl SpecError {
    pub(super) fn new(key: &str, expected: impl Into<String>, found: impl Display) -> Self {
        Self { key: key.to_owned(), expected: expected.into(), found: found.to_string() }
    }

    /// The error of a file that holds the specification.
    #[must_use]
    pub fn in_file(self, path: &Path) -> InputError {
        InputError::invalid(path, Location::Key(self.key), self.expected, self.found)
    }
}

/// `Err` with the key unless `is_fine`.
pub(super) fn require(
    is_fine: bool,
    key: &str,
    expected: impl Into<String>,
    found: impl Display,
) -> Result<(), SpecError> {
    if is_fine { Ok(()) } else { Err(SpecError::new(key, expected, found)) }
}

/// A workload that is made by rules.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkloadSpec {
    /// Requests to make; fewer only where a trace or `duration_s` ends first.
    pub num_requests: Option<u64>,
    /// No request arrives at or after this time, in seconds.
    pub duration_s: Option<f64>,
    /// When requests (of sessions: their first turns) arrive.
    pub arrival: Arrival,
    /// Prompt and output lengths.
    pub lengths: Lengths,
    /// Most tokens of prompt and output together; none: no limit.
    pub max_total_tokens: Option<u32>,
    /// What becomes of a request over `max_total_tokens`.
    #[serde(default)]
    pub too_long: TooLong,
    /// Conversations of several turns; none: every request stands alone.
    pub sessions: Option<Sessions>,
    /// Prefixes that prompts share; none: nothing but a session's own turns is shared.
    pub prefixes: Option<Prefixes>,
    /// Priorities and how often each comes; none: all are 0.
    #[serde(default)]
    pub priorities: Vec<Priority>,
}

/// When requests arrive.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "process", rename_all = "snake_case", deny_unknown_fields)]
pub enum Arrival {
    /// All at time 0.
    Static {},
    /// Every `interval_s`, from time 0 on.
    Fixed {
        /// Seconds between arrivals.
        interval_s: f64,
    },
    /// A Poisson process: exponential gaps, never cut short.
    Poisson {
        /// Requests per second.
        rate_per_s: f64,
    },
    /// Gamma-distributed gaps.
    Gamma {
        /// Requests per second.
        rate_per_s: f64,
        /// Standard deviation of the gaps over their mean; 1 is a Poisson process, above comes in bursts.
        cv: f64,
    },
    /// A Poisson process whose rate is `mean (1 + amplitude cos(2 pi (t - peak_at) / period))`.
    Diurnal {
        /// Requests per second over a whole period.
        mean_rate_per_s: f64,
        /// 0 to 1.
        amplitude: f64,
        /// Seconds from peak to peak.
        period_s: f64,
        /// Time of the first peak, in seconds.
        #[serde(default)]
        peak_at_s: f64,
    },
    /// A Poisson process whose rate is a table's.
    RateTable {
        /// Rates, each until the next begins; the first from 0.
        rates: Vec<RateFrom>,
        /// Seconds after which the table starts again; none: the last rate lasts.
        period_s: Option<f64>,
    },
    /// A Poisson process that is switched on and off: both phases last exponentially distributed times.
    Burst {
        /// Requests per second while on.
        on_rate_per_s: f64,
        /// Requests per second while off.
        #[serde(default)]
        off_rate_per_s: f64,
        /// Mean seconds of an on phase.
        mean_on_s: f64,
        /// Mean seconds of an off phase.
        mean_off_s: f64,
    },
    /// The times of a trace, of which the first becomes 0.
    Trace {
        /// The trace.
        path: PathBuf,
        /// Whose format it is.
        format: TraceFormat,
        /// Requests arrive this many times as fast.
        #[serde(default = "one")]
        rate_factor: f64,
    },
    /// Users who each wait for their request, think and ask again; all start at time 0.
    ClosedLoop {
        /// Number of users, so most requests under way.
        users: u32,
        /// Time between an answer and the next request; none: none.
        think_time: Option<TimeDistribution>,
    },
}

/// A rate from a time on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateFrom {
    /// Seconds.
    pub from_s: f64,
    /// Requests per second.
    pub rate_per_s: f64,
}

/// Prompt and output lengths, in tokens. A shared prefix comes on top of the prompt's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case", deny_unknown_fields)]
pub enum Lengths {
    /// Two distributions, drawn independently.
    Distributions {
        /// Prompt tokens; of a session's turn the new ones.
        prefill: CountDistribution,
        /// Output tokens.
        decode: CountDistribution,
    },
    /// Pairs of a trace.
    Trace {
        /// The trace.
        path: PathBuf,
        /// Whose format it is.
        format: TraceFormat,
        /// Which pair comes next.
        #[serde(default)]
        order: TraceOrder,
    },
}

/// Which pair of a trace comes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TraceOrder {
    /// As in the trace, each once.
    #[default]
    InOrder,
    /// Each once, in an order of the seed's.
    Shuffled,
    /// Any, drawn anew each time.
    Sampled,
}

/// What becomes of a request whose prompt and output are too long together. Each case is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TooLong {
    /// It is left out, and its arrival with it. A session ends before such a turn.
    #[default]
    Drop,
    /// Its lengths are drawn again (the next pair of a trace is taken); its arrival stays.
    Resample,
    /// Its prompt is shortened (of a session's turn the new part), and where the output alone is too long the output
    /// as well, to leave one prompt token.
    Clamp,
}

/// Conversations: each prompt is the prompt and output of the turn before, and new tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sessions {
    /// Turns of a session.
    pub turns: CountDistribution,
    /// Time before a next turn.
    pub think_time: TimeDistribution,
    /// From when on the think time counts.
    #[serde(default)]
    pub next_turn: NextTurn,
}

/// From when on the think time of a session counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NextTurn {
    /// From the completion of the turn before: what people do. Arrivals then depend on the server.
    #[default]
    AfterCompletion,
    /// From the arrival of the turn before: arrivals are known beforehand, as a file needs them.
    AfterArrival,
}

/// Prefixes that prompts begin with, as system prompts do. A prompt's own tokens follow.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prefixes {
    /// Number of different prefixes.
    pub count: u32,
    /// Tokens of each.
    pub tokens: u32,
    /// The k-th most popular comes in proportion to `k^-exponent`; 0: all alike.
    #[serde(default)]
    pub exponent: f64,
}

/// A priority and how often it comes. All turns of a session have one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Priority {
    /// Lower is served first.
    pub priority: i32,
    /// Weight against the others.
    pub weight: f64,
}

const fn one() -> f64 {
    1.0
}

impl WorkloadSpec {
    /// A workload of single requests without limits.
    #[must_use]
    pub fn new(num_requests: u64, arrival: Arrival, lengths: Lengths) -> Self {
        Self {
            num_requests: Some(num_requests),
            duration_s: None,
            arrival,
            lengths,
            max_total_tokens: None,
            too_long: TooLong::default(),
            sessions: None,
            prefixes: None,
            priorities: Vec::new(),
        }
    }

    /// Reads a specification: JSON where the name ends in `.json`, else TOML. Paths in it start from its folder.
    ///
    /// # Errors
    /// Names the file, the line or key, what was expected and what was found.
    pub fn read(path: &Path) -> Result<Self, InputError> {
        let is_json = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
        let expected = "a workload specification";
        let mut spec: Self = if is_json { read_json(path, expected)? } else { read_toml(path, expected)? };
        let folder = path.parent().unwrap_or(Path::new(""));
        if let Arrival::Trace { path, .. } = &mut spec.arrival {
            *path = folder.join(&*path);
        }
        if let Lengths::Trace { path, .. } = &mut spec.lengths {
            *path = folder.join(&*path);
        }
        spec.check().map_err(|error| error.in_file(path))?;
        Ok(spec)
    }

    /// Whether arrivals depend on completions, so that no file can hold them.
    #[must_use]
    pub fn heeds_completions(&self) -> bool {
        self.is_closed_loop()
            || self.sessions.as_ref().is_some_and(|s| s.next_turn == NextTurn::AfterCompletion)
    }

    pub(super) fn is_closed_loop(&self) -> bool {
        matches!(self.arrival, Arrival::ClosedLoop { .. })
    }

    /// Tokens of a shared prefix; 0 without.
    pub(super) fn prefix_tokens(&self) -> u32 {
        self.prefixes.map_or(0, |prefixes| prefixes.tokens)
    }

    /// Checks everything but the files that it names.
    ///
    /// # Errors
    /// The first key whose value cannot be used.
    pub fn check(&self) -> Result<(), SpecError> {
        self.check_end()?;
        self.arrival.check()?;
        self.lengths.check()?;
        if let Some(max) = self.max_total_tokens {
            let least = u64::from(self.prefix_tokens()) + self.lengths.least_tokens();
            let expected = format!("at least {least}, which the shortest request has");
            require(u64::from(max) >= least, "max_total_tokens", expected, max)?;
        }
        if let Some(sessions) = &self.sessions {
            sessions.turns.check("sessions.turns", MAX_TURNS)?;
            sessions.think_time.check("sessions.think_time")?;
            let expected = "`drop` or `clamp`, since a session's later turns only get longer";
            require(self.too_long != TooLong::Resample, "too_long", expected, "`resample`")?;
            if self.is_closed_loop() {
                let expected = "`after_completion` in a closed loop";
                require(
                    sessions.next_turn == NextTurn::AfterCompletion,
                    "sessions.next_turn",
                    expected,
                    "`after_arrival`",
                )?;
            }
        }
        if let Some(prefixes) = &self.prefixes {
            require(prefixes.count > 0, "prefixes.count", "at least 1", prefixes.count)?;
            let tokens = prefixes.tokens;
            require((1..=MAX_TOKENS).contains(&tokens), "prefixes.tokens", up_to(MAX_TOKENS), tokens)?;
            check_exponent("prefixes.exponent", prefixes.exponent)?;
        }
        for (i, priority) in self.priorities.iter().enumerate() {
            let is_fine = priority.weight.is_finite() && priority.weight > 0.0;
            let key = format!("priorities[{i}].weight");
            require(is_fine, &key, "a finite weight above 0", priority.weight)?;
        }
        Ok(())
    }

    fn check_end(&self) -> Result<(), SpecError> {
        if let Some(num_requests) = self.num_requests {
            require(num_requests > 0, "num_requests", "at least 1", num_requests)?;
        }
        if let Some(duration) = self.duration_s {
            check_seconds("duration_s", duration)?;
        }
        let ends = match (&self.arrival, &self.lengths) {
            (Arrival::Trace { .. }, _) => true,
            (_, Lengths::Trace { order, .. }) => *order != TraceOrder::Sampled,
            (Arrival::Static {}, _) => false,
            _ => self.duration_s.is_some(),
        };
        let expected = "a number of requests, for without it this workload has no end";
        require(ends || self.num_requests.is_some(), "num_requests", expected, "none")
    }
}

impl Arrival {
    pub(super) fn check(&self) -> Result<(), SpecError> {
        match self {
            Self::Static {} => Ok(()),
            Self::Fixed { interval_s } => check_seconds("arrival.interval_s", *interval_s),
            Self::Poisson { rate_per_s } => check_rate("arrival.rate_per_s", *rate_per_s),
            Self::Gamma { rate_per_s, cv } => {
                check_rate("arrival.rate_per_s", *rate_per_s)?;
                require((0.01..=100.0).contains(cv), "arrival.cv", "0.01 to 100", cv)
            }
            Self::Diurnal { mean_rate_per_s, amplitude, period_s, peak_at_s } => {
                check_rate("arrival.mean_rate_per_s", *mean_rate_per_s)?;
                require((0.0..=1.0).contains(amplitude), "arrival.amplitude", "0 to 1", amplitude)?;
                check_seconds("arrival.period_s", *period_s)?;
                let is_fine = peak_at_s.abs() <= MAX_SECONDS;
                require(is_fine, "arrival.peak_at_s", format!("-{MAX_SECONDS} to {MAX_SECONDS}"), peak_at_s)
            }
            Self::RateTable { rates, period_s } => check_table(rates, *period_s),
            Self::Burst { on_rate_per_s, off_rate_per_s, mean_on_s, mean_off_s } => {
                check_rate("arrival.on_rate_per_s", *on_rate_per_s)?;
                if *off_rate_per_s != 0.0 {
                    check_rate("arrival.off_rate_per_s", *off_rate_per_s)?;
                }
                check_seconds("arrival.mean_on_s", *mean_on_s)?;
                check_seconds("arrival.mean_off_s", *mean_off_s)?;
                let per_cycle = on_rate_per_s * mean_on_s + off_rate_per_s * mean_off_s;
                check_per_cycle("arrival.mean_on_s", per_cycle)
            }
            Self::Trace { rate_factor, .. } => {
                let is_fine = (1e-6..=1e6).contains(rate_factor);
                require(is_fine, "arrival.rate_factor", "0.000001 to 1000000", rate_factor)
            }
            Self::ClosedLoop { users, think_time } => {
                let is_fine = (1..=10_000_000).contains(users);
                require(is_fine, "arrival.users", "1 to 10000000 users", users)?;
                think_time.as_ref().map_or(Ok(()), |time| time.check("arrival.think_time"))
            }
        }
    }
}

fn check_table(rates: &[RateFrom], period_s: Option<f64>) -> Result<(), SpecError> {
    let first = rates.first().map(|rate| rate.from_s);
    let found = first.map_or_else(|| "none".to_owned(), |from| from.to_string());
    require(first == Some(0.0), "arrival.rates", "rates of which the first is from 0", found)?;
    let mut last = f64::NEG_INFINITY;
    for (i, rate) in rates.iter().enumerate() {
        let key = |field: &str| format!("arrival.rates[{i}].{field}");
        let is_fine = rate.from_s > last && rate.from_s <= MAX_SECONDS;
        require(
            is_fine,
            &key("from_s"),
            format!("a time after the one before, to {MAX_SECONDS}"),
            rate.from_s,
        )?;
        last = rate.from_s;
        if rate.rate_per_s != 0.0 {
            check_rate(&key("rate_per_s"), rate.rate_per_s)?;
        }
    }
    let Some(period) = period_s else {
        let is_fine = rates.iter().any(|rate| rate.rate_per_s > 0.0);
        return require(is_fine, "arrival.rates", "a rate above 0", "none");
    };
    let is_fine = period > last && period <= MAX_SECONDS;
    require(is_fine, "arrival.period_s", format!("a time after the last rate's, to {MAX_SECONDS}"), period)?;
    let ends = rates.iter().skip(1).map(|rate| rate.from_s).chain([period]);
    check_per_cycle(
        "arrival.rates",
        rates.iter().zip(ends).map(|(rate, end)| rate.rate_per_s * (end - rate.from_s)).sum(),
    )
}

/// A cycle of almost no request would be gone through for ever before one comes.
fn check_per_cycle(key: &str, requests_per_cycle: f64) -> Result<(), SpecError> {
    let expected = "at least 0.0001 requests in a cycle";
    require(requests_per_cycle >= 1e-4, key, expected, requests_per_cycle)
}

impl Lengths {
    fn check(&self) -> Result<(), SpecError> {
        match self {
            Self::Distributions { prefill, decode } => {
                prefill.check("lengths.prefill", MAX_TOKENS)?;
                decode.check("lengths.decode", MAX_TOKENS)
            }
            Self::Trace { .. } => Ok(()),
        }
    }

    /// Fewest tokens of prompt and output together, as far as known without reading a file.
    fn least_tokens(&self) -> u64 {
        match self {
            Self::Distributions { prefill, decode } => u64::from(prefill.least()) + u64::from(decode.least()),
            Self::Trace { .. } => 2,
        }
    }
}

pub(super) fn check_seconds(key: &str, seconds: f64) -> Result<(), SpecError> {
    let is_fine = (1e-9..=MAX_SECONDS).contains(&seconds);
    require(is_fine, key, format!("seconds above 0, to {MAX_SECONDS}"), seconds)
}

pub(super) fn check_exponent(key: &str, exponent: f64) -> Result<(), SpecError> {
    require((0.0..=100.0).contains(&exponent), key, "an exponent of 0 to 100", exponent)
}

pub(super) fn up_to(most: u32) -> String {
    format!("1 to {most}")
}

//! When requests arrive, one time after the other, whatever the server does.

use plumbline_schema::Nanos;
use rand_distr::{Distribution, Gamma};
use rand_pcg::Pcg64;

use super::{
    distribution::{uniform, unit_exponential},
    spec::{Arrival, RateFrom, SpecError, require},
};
use crate::residual::stream;

/// Rates that a specification may ask for, in requests per second: at most one a nanosecond.
const RATES: std::ops::RangeInclusive<f64> = 1e-6..=1e9;

const NS_PER_S: f64 = 1e9;

pub(super) fn check_rate(key: &str, rate_per_s: f64) -> Result<(), SpecError> {
    let expected = format!("{} to {} requests/s", RATES.start(), RATES.end());
    require(RATES.contains(&rate_per_s), key, expected, rate_per_s)
}

/// Arrival times of one process; they never step back.
#[derive(Clone, Debug)]
pub(super) struct Times {
    process: Process,
    rng: Pcg64,
    /// The last arrival, in nanoseconds, not rounded: rounding errors do not add up.
    now_ns: f64,
}

#[derive(Clone, Debug)]
enum Process {
    Static,
    Fixed { interval_ns: f64, index: u64 },
    Poisson { mean_gap_ns: f64 },
    Gamma { gap_ns: Gamma<f64> },
    Diurnal(Diurnal),
    Steps(Steps),
    Trace { times: std::vec::IntoIter<Nanos>, rate_factor: f64 },
}

impl Times {
    /// A process as a checked specification describes it; `trace` are the times of its trace, of which the first
    /// is 0, empty for other processes.
    pub(super) fn new(arrival: &Arrival, trace: Vec<Nanos>, seed: u64) -> Result<Self, SpecError> {
        let process = match arrival {
            Arrival::Static {} | Arrival::ClosedLoop { .. } => Process::Static,
            Arrival::Fixed { interval_s } => Process::Fixed { interval_ns: interval_s * NS_PER_S, index: 0 },
            Arrival::Poisson { rate_per_s } => Process::Poisson { mean_gap_ns: NS_PER_S / rate_per_s },
            Arrival::Gamma { rate_per_s, cv } => {
                // Mean shape x scale and variance shape x scale^2, so that the variance over the squared mean is
                // 1 / shape.
                let shape = 1.0 / (cv * cv);
                let scale = NS_PER_S / (rate_per_s * shape);
                let wrong = |e| SpecError::new("arrival.cv", "parameters of a gamma distribution", e);
                Process::Gamma { gap_ns: Gamma::new(shape, scale).map_err(wrong)? }
            }
            Arrival::Diurnal { mean_rate_per_s, amplitude, period_s, peak_at_s } => {
                Process::Diurnal(Diurnal {
                    mean_rate_per_ns: mean_rate_per_s / NS_PER_S,
                    amplitude: *amplitude,
                    period_ns: period_s * NS_PER_S,
                    peak_at_ns: peak_at_s * NS_PER_S,
                })
            }
            Arrival::RateTable { rates, period_s } => Process::Steps(Steps::table(rates, *period_s)),
            Arrival::Burst { on_rate_per_s, off_rate_per_s, mean_on_s, mean_off_s } => {
                let on = (on_rate_per_s / NS_PER_S, mean_on_s * NS_PER_S);
                let off = (off_rate_per_s / NS_PER_S, mean_off_s * NS_PER_S);
                Process::Steps(Steps::switched(on, off, stream(seed, "arrival/phases")))
            }
            Arrival::Trace { rate_factor, .. } => {
                Process::Trace { times: trace.into_iter(), rate_factor: *rate_factor }
            }
        };
        Ok(Self { process, rng: stream(seed, "arrival"), now_ns: 0.0 })
    }

    /// The next arrival; `None` when there is no other.
    pub(super) fn next(&mut self) -> Option<Nanos> {
        let rng = &mut self.rng;
        self.now_ns = match &mut self.process {
            Process::Static => 0.0,
            Process::Fixed { interval_ns, index } => {
                *index += 1;
                (*index - 1) as f64 * *interval_ns
            }
            Process::Poisson { mean_gap_ns } => self.now_ns + *mean_gap_ns * unit_exponential(rng),
            Process::Gamma { gap_ns } => self.now_ns + gap_ns.sample(rng),
            Process::Diurnal(diurnal) => diurnal.after(self.now_ns, rng),
            Process::Steps(steps) => steps.after(self.now_ns, rng)?,
            Process::Trace { times, rate_factor } => times.next()?.0 as f64 / *rate_factor,
        };
        Some(Nanos::from_f64(self.now_ns))
    }
}

/// A rate that goes up and down as a cosine.
#[derive(Clone, Copy, Debug)]
struct Diurnal {
    mean_rate_per_ns: f64,
    amplitude: f64,
    period_ns: f64,
    peak_at_ns: f64,
}

impl Diurnal {
    /// The arrival after `now_ns`, by thinning a Poisson process of the highest rate (Lewis and Shedler, Simulation
    /// of nonhomogeneous Poisson processes by thinning, 1979, algorithm 1).
    fn after(&self, mut now_ns: f64, rng: &mut Pcg64) -> f64 {
        let highest = 1.0 + self.amplitude;
        loop {
            now_ns += unit_exponential(rng) / (self.mean_rate_per_ns * highest);
            let angle = std::f64::consts::TAU * (now_ns - self.peak_at_ns) / self.period_ns;
            if uniform(rng) * highest < 1.0 + self.amplitude * angle.cos() {
                return now_ns;
            }
        }
    }
}

/// A rate that is constant for a while, then another.
#[derive(Clone, Debug)]
struct Steps {
    rates: Rates,
    rate_per_ns: f64,
    /// When the next rate begins.
    until_ns: f64,
}

#[derive(Clone, Debug)]
enum Rates {
    /// Rates per ns and for how long; the last for ever unless the table starts again.
    Table { steps: Vec<(f64, f64)>, index: usize, repeats: bool },
    /// Two rates per ns and their mean durations, in turn.
    Switched { current: (f64, f64), other: (f64, f64), rng: Pcg64 },
}

impl Steps {
    fn table(rates: &[RateFrom], period_s: Option<f64>) -> Self {
        let ends = rates.iter().skip(1).map(|rate| rate.from_s).chain([period_s.unwrap_or(f64::INFINITY)]);
        let steps: Vec<_> = rates
            .iter()
            .zip(ends)
            .map(|(rate, end_s)| (rate.rate_per_s / NS_PER_S, (end_s - rate.from_s) * NS_PER_S))
            .collect();
        let (rate_per_ns, until_ns) = steps[0];
        Self { rates: Rates::Table { steps, index: 0, repeats: period_s.is_some() }, rate_per_ns, until_ns }
    }

    /// Begins on or off as often as it is found so at any time, so that the mean rate holds from the start.
    fn switched(on: (f64, f64), off: (f64, f64), mut rng: Pcg64) -> Self {
        let begins_on = uniform(&mut rng) * (on.1 + off.1) < on.1;
        let (current, other) = if begins_on { (on, off) } else { (off, on) };
        let until_ns = current.1 * unit_exponential(&mut rng);
        Self { rates: Rates::Switched { current, other, rng }, rate_per_ns: current.0, until_ns }
    }

    /// The arrival after `now_ns`: where the rate's integral from there on reaches a draw of the unit exponential
    /// distribution (Cinlar, Introduction to stochastic processes, 1975, section 4.7), which is exact.
    fn after(&mut self, mut now_ns: f64, rng: &mut Pcg64) -> Option<f64> {
        let mut left = unit_exponential(rng);
        loop {
            if self.rate_per_ns > 0.0 {
                let here = (self.until_ns - now_ns) * self.rate_per_ns;
                if left <= here {
                    return Some(now_ns + left / self.rate_per_ns);
                }
                left -= here;
            }
            now_ns = self.until_ns;
            self.step()?;
        }
    }

    /// Goes on to the next rate; `None` when the present one lasts for ever.
    fn step(&mut self) -> Option<()> {
        let (rate, duration) = match &mut self.rates {
            Rates::Table { steps, index, repeats } => {
                let is_last = *index + 1 == steps.len();
                if is_last && !*repeats {
                    return None;
                }
                *index = if is_last { 0 } else { *index + 1 };
                steps[*index]
            }
            Rates::Switched { current, other, rng } => {
                std::mem::swap(current, other);
                (current.0, current.1 * unit_exponential(rng))
            }
        };
        self.rate_per_ns = rate;
        self.until_ns += duration;
        Some(())
    }
}

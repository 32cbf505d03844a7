//! `plumb workload generate`: a workload by rules.

use std::{path::PathBuf, str::FromStr};

use clap::{ArgGroup, ValueEnum};
use plumbline_schema::WorkloadSummary;
use plumbline_simulator::arrival::{
    Arrival, CountDistribution, Lengths, TooLong, TooLongCounts, TraceOrder, WorkloadSpec,
};
use serde::Serialize;

use super::workload::{self, TraceArg};
use crate::{
    exit::Exit,
    failure::Failure,
    output::{Output, Text},
};

/// Make a workload: by a few options, or by a specification (TOML or JSON) that can ask for everything
///
/// Lengths are LENGTHS = N, uniform:MIN:MAX, zipf:MIN:MAX:EXPONENT or lognormal:MEDIAN:SIGMA[:MAX], in tokens. A TRACE is
/// FORMAT:PATH with one of the formats of `plumb workload import`. The same options and seed give the same bytes.
#[allow(rustdoc::broken_intra_doc_links, reason = "brackets of the help text")]
#[derive(Debug, clap::Args)]
#[command(group = ArgGroup::new("arrival").args(["at_once", "interval_s", "poisson", "gamma", "arrivals", "spec"]).required(true))]
pub struct Args {
    /// Requests to make; replaces that of a specification
    #[arg(long, value_name = "N", required_unless_present = "spec")]
    requests: Option<u64>,

    /// All requests arrive at time 0
    #[arg(long = "static")]
    at_once: bool,

    /// One request every so many seconds, from time 0 on
    #[arg(long, value_name = "SECONDS")]
    interval_s: Option<f64>,

    /// A Poisson process of so many requests per second; its gaps are never cut
    #[arg(long, value_name = "RATE")]
    poisson: Option<f64>,

    /// Gamma-distributed gaps: requests per second, and the gaps' standard deviation over their mean
    #[arg(long, value_name = "RATE:CV")]
    gamma: Option<Gamma>,

    /// The arrival times of a trace
    #[arg(long, value_name = "TRACE")]
    arrivals: Option<TraceArg>,

    /// With --arrivals: requests arrive this many times as fast
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, requires = "arrivals")]
    rate_factor: f64,

    /// A specification; docs/workloads.md says what can be in it
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["prefill", "decode", "lengths", "max_total_tokens", "too_long"]
    )]
    spec: Option<PathBuf>,

    /// Prompt lengths
    #[arg(long, value_name = "LENGTHS", required_unless_present_any = ["spec", "lengths"], requires = "decode")]
    prefill: Option<LengthsArg>,

    /// Output lengths
    #[arg(long, value_name = "LENGTHS", required_unless_present_any = ["spec", "lengths"], requires = "prefill")]
    decode: Option<LengthsArg>,

    /// Prompt and output lengths of a trace, in pairs
    #[arg(long, value_name = "TRACE", conflicts_with_all = ["prefill", "decode"])]
    lengths: Option<TraceArg>,

    /// With --lengths: which pair comes next
    #[arg(long, value_enum, default_value_t = PairOrder::AsListed, requires = "lengths")]
    order: PairOrder,

    /// Most tokens of prompt and output together
    #[arg(long, value_name = "N", requires = "too_long")]
    max_total_tokens: Option<u32>,

    /// What becomes of requests over --max-total-tokens; each is counted
    #[arg(long, value_enum, requires = "max_total_tokens")]
    too_long: Option<TooLongArg>,

    /// Seed of everything drawn
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Workload to write: .csv or .csv.zst
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PairOrder {
    /// As in the trace, each once
    #[value(name = "in-order")]
    AsListed,
    /// Each once, in an order of the seed's
    Shuffled,
    /// Any, drawn anew each time
    Sampled,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TooLongArg {
    /// Leave them out, and their arrivals
    Drop,
    /// Draw their lengths again (take a trace's next pair)
    Resample,
    /// Shorten the prompt, and the output where it alone is too long
    Clamp,
}

#[derive(Clone, Copy, Debug)]
struct Gamma {
    rate_per_s: f64,
    cv: f64,
}

impl FromStr for Gamma {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = numbers(text)?;
        let [rate_per_s, cv] = numbers[..] else { return Err("expected RATE:CV".to_owned()) };
        Ok(Self { rate_per_s, cv })
    }
}

/// A distribution of lengths as an argument.
#[derive(Clone, Debug)]
struct LengthsArg(CountDistribution);

impl FromStr for LengthsArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, parameters) = text.split_once(':').unwrap_or(("fixed", text));
        let wrong = || {
            "expected N, uniform:MIN:MAX, zipf:MIN:MAX:EXPONENT or lognormal:MEDIAN:SIGMA[:MAX]".to_owned()
        };
        let numbers = numbers(parameters).map_err(|_| wrong())?;
        let whole = |number: f64| {
            let is_whole = (0.0..=f64::from(u32::MAX)).contains(&number) && number.fract() == 0.0;
            if is_whole { Ok(number as u32) } else { Err(format!("expected whole numbers, found {number}")) }
        };
        Ok(Self(match (name, &numbers[..]) {
            ("fixed", &[value]) => CountDistribution::Fixed { value: whole(value)? },
            ("uniform", &[min, max]) => CountDistribution::Uniform { min: whole(min)?, max: whole(max)? },
            ("zipf", &[min, max, exponent]) => {
                CountDistribution::Zipf { min: whole(min)?, max: whole(max)?, exponent }
            }
            ("lognormal", &[median, sigma]) => {
                CountDistribution::LogNormal { median, sigma, min: 1, max: None }
            }
            ("lognormal", &[median, sigma, max]) => {
                CountDistribution::LogNormal { median, sigma, min: 1, max: Some(whole(max)?) }
            }
            _ => return Err(wrong()),
        }))
    }
}

fn numbers(text: &str) -> Result<Vec<f64>, String> {
    let number =
        |part: &str| part.parse().map_err(|_| format!("expected numbers joined by `:`, found `{part}`"));
    text.split(':').map(number).collect()
}

#[derive(Serialize)]
struct Report<'a> {
    workload: &'a std::path::Path,
    seed: u64,
    too_long: TooLongCounts,
    summary: WorkloadSummary,
}

/// Runs the verb.
///
/// # Errors
/// When the options or the specification cannot be used, or the workload cannot be written.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let spec = args.spec()?;
    let (requests, too_long) = spec.generate_counted(args.seed)?;
    requests.write(&args.out)?;
    let report = Report { workload: &args.out, seed: args.seed, too_long, summary: requests.summary() };
    output.print(&report, || report.text())?;
    output.note(format!("wrote {}", args.out.display()));
    Ok(Exit::Fine)
}

impl Report<'_> {
    fn text(&self) -> String {
        let mut text = Text::default();
        text.line(workload::text(&self.summary).trim_end());
        let counts = &self.too_long;
        for (count, what) in [
            (counts.num_dropped, "left out"),
            (counts.num_resampled, "drawn again"),
            (counts.num_clamped, "shortened"),
        ] {
            if count > 0 {
                text.line(format_args!("too long and {what}: {count}"));
            }
        }
        text.finish()
    }
}

impl Args {
    /// What the options ask for.
    fn spec(&self) -> Result<WorkloadSpec, Failure> {
        if let Some(path) = &self.spec {
            let mut spec = WorkloadSpec::read(path)?;
            spec.num_requests = self.requests.or(spec.num_requests);
            return Ok(spec);
        }
        // The command line's rules leave none of these open; what is left is said as clap would.
        let incomplete = || Failure::message(Exit::BadInput, "expected --requests, arrivals and lengths");
        let (Some(requests), Some(arrival)) = (self.requests, self.arrival()) else {
            return Err(incomplete());
        };
        let lengths = match (&self.prefill, &self.decode, &self.lengths) {
            (_, _, Some(trace)) => Lengths::Trace {
                path: trace.path.clone(),
                format: trace.format,
                order: match self.order {
                    PairOrder::AsListed => TraceOrder::InOrder,
                    PairOrder::Shuffled => TraceOrder::Shuffled,
                    PairOrder::Sampled => TraceOrder::Sampled,
                },
            },
            (Some(prefill), Some(decode), None) => {
                Lengths::Distributions { prefill: prefill.0.clone(), decode: decode.0.clone() }
            }
            _ => return Err(incomplete()),
        };
        let mut spec = WorkloadSpec::new(requests, arrival, lengths);
        spec.max_total_tokens = self.max_total_tokens;
        spec.too_long = match self.too_long {
            None | Some(TooLongArg::Drop) => TooLong::Drop,
            Some(TooLongArg::Resample) => TooLong::Resample,
            Some(TooLongArg::Clamp) => TooLong::Clamp,
        };
        Ok(spec)
    }

    fn arrival(&self) -> Option<Arrival> {
        if self.at_once {
            return Some(Arrival::Static {});
        }
        let interval = self.interval_s.map(|interval_s| Arrival::Fixed { interval_s });
        let poisson = self.poisson.map(|rate_per_s| Arrival::Poisson { rate_per_s });
        let gamma = self.gamma.map(|Gamma { rate_per_s, cv }| Arrival::Gamma { rate_per_s, cv });
        let trace = self.arrivals.as_ref().map(|trace| Arrival::Trace {
            path: trace.path.clone(),
            format: trace.format,
            rate_factor: self.rate_factor,
        });
        interval.or(poisson).or(gamma).or(trace)
    }
}

//! `plumb search`: the highest load within latency limits, and the best deployment.

mod grid;
mod report;

use std::path::PathBuf;

use clap::{ArgMatches, Command, FromArgMatches, builder::ArgPredicate};
use plumbline_schema::Workload;
use plumbline_simulator::{
    arrival::WorkloadSpec,
    cluster::RouterKind,
    search::{BracketOptions, Latency, Limit, Load, LoadError, Probe, Scenario, SearchError, highest_rate},
    simulate::check_workload,
};

use self::report::RateReport;
use super::simulate::ResidualsArg;
use crate::{engines::EngineArgs, exit::Exit, failure::Failure, output::Output};

/// Find the highest request rate within latency limits, of a deployment or a grid
///
/// Rates are doubled or halved until one meets all limits and one does not, then the interval between them is halved
/// until it is within the tolerance; both ends are simulated. A rate at which requests are rejected, or at which the
/// backlog grows over the run, does not meet the limits. Of a grid: cost per million output tokens, and the deployments
/// that no other beats in rate and cost. Exit code 5 when there is no such rate.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: OneOrGrid,

    /// Deployments to compare, in place of one: a TOML file; docs/search.md says what can be in it
    #[arg(long, value_name = "FILE", requires = "out", conflicts_with_all = ["replicas", "router"])]
    grid: Option<PathBuf>,

    /// Workload: a CSV file (or .csv.zst), whose arrivals are made to come faster or slower
    #[arg(long, required_unless_present = "spec")]
    workload: Option<PathBuf>,

    /// Workload by rules: a TOML or JSON file, whose rate is changed
    #[arg(long, value_name = "FILE", conflicts_with = "workload")]
    spec: Option<PathBuf>,

    /// Most that the 99th percentile of the time to the first token may be
    #[arg(long, value_name = "MS")]
    ttft_p99_ms: Option<f64>,

    /// Most that the 99th percentile of requests' mean time per output token may be
    #[arg(long, value_name = "MS")]
    tpot_p99_ms: Option<f64>,

    /// Most that the 99th percentile of all gaps between tokens may be
    #[arg(long, value_name = "MS")]
    itl_p99_ms: Option<f64>,

    /// Most that the 99th percentile of the time to the last token may be
    #[arg(long, value_name = "MS")]
    e2e_p99_ms: Option<f64>,

    /// Another limit, like `ttft_p90_ms=200` (can be repeated)
    #[arg(long, value_name = "LIMIT")]
    limit: Vec<Limit>,

    /// The rate that fails is at most this share above the one that meets the limits
    #[arg(long, default_value_t = 0.02)]
    tolerance: f64,

    /// Rate to try first, requests/s; the workload's own where it is not given
    #[arg(long, value_name = "RATE")]
    start_rate: Option<f64>,

    /// Lowest rate to try, requests/s; a millionth of the first where it is not given
    #[arg(long, value_name = "RATE")]
    min_rate: Option<f64>,

    /// Highest rate to try, requests/s; a million times the first where it is not given
    #[arg(long, value_name = "RATE")]
    max_rate: Option<f64>,

    /// Replicas of the engine
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    replicas: u32,

    /// How requests reach replicas: random, round-robin, least-outstanding, power-of-two or prefix-aware
    #[arg(long, value_name = "NAME")]
    router: Option<RouterKind>,

    /// Whether step times scatter as measured ones do
    #[arg(long, value_enum, default_value_t = ResidualsArg::Drawn)]
    residuals: ResidualsArg,

    /// Seed of everything drawn
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Folder for search.json and, of a grid, pareto.csv, pareto.svg and the journal from which it goes on after an
    /// interruption
    #[arg(long)]
    out: Option<PathBuf>,
}

/// The engine's options; those that a grid has in their place are empty with one.
#[derive(Debug)]
struct OneOrGrid(EngineArgs);

impl FromArgMatches for OneOrGrid {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        EngineArgs::from_arg_matches(matches).map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.update_from_arg_matches(matches)
    }
}

impl clap::Args for OneOrGrid {
    fn augment_args(command: Command) -> Command {
        let command =
            ["bundle", "engine"].into_iter().fold(EngineArgs::augment_args(command), |command, id| {
                command.mut_arg(id, |arg| {
                    arg.required(false)
                        .required_unless_present("grid")
                        .default_value_if("grid", ArgPredicate::IsPresent, Some(""))
                        .conflicts_with("grid")
                })
            });
        ["scheduler", "gpu"]
            .into_iter()
            .fold(command, |command, id| command.mut_arg(id, |arg| arg.conflicts_with("grid")))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// Runs the verb.
///
/// # Errors
/// When an input cannot be used, or a rate cannot be simulated.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let limits = args.limits()?;
    let load = args.load()?;
    let bracket = args.bracket(&load)?;
    let scenario = Scenario {
        load: &load,
        limits: &limits,
        bracket: &bracket,
        router: args.router.unwrap_or_default(),
        seed: args.seed,
        residuals: args.residuals.into(),
    };
    if let (Some(file), Some(out)) = (&args.grid, &args.out) {
        return grid::run(&args.engine.0, file, out, &scenario, output);
    }
    let mut engines = args.engine.0.open(output)?.engines;
    engines.num_replicas = args.replicas;
    let found = highest_rate(engines, &scenario, |probe| output.note(line(probe)))?;
    let report = RateReport::new(&scenario, &found);
    if let Some(out) = &args.out {
        plumbline_schema::files::write_json(&out.join("search.json"), &report)?;
        output.note(format!("wrote {}", out.join("search.json").display()));
    }
    output.print(&report, || report.text())?;
    Ok(if found.ends().is_ok() { Exit::Fine } else { Exit::Incomplete })
}

/// A rate that was tried, in a line.
fn line(probe: &Probe) -> String {
    let verdict = if probe.meets { "meets the limits".to_owned() } else { probe.reasons.join("; ") };
    format!("{:.4} requests/s: {verdict}", probe.rate_per_s)
}

impl Args {
    fn limits(&self) -> Result<Vec<Limit>, Failure> {
        let named = [
            (Latency::Ttft, self.ttft_p99_ms),
            (Latency::Tpot, self.tpot_p99_ms),
            (Latency::Itl, self.itl_p99_ms),
            (Latency::E2e, self.e2e_p99_ms),
        ];
        let named = named.into_iter().filter_map(|(metric, ms)| Some(Limit::p99(metric, ms?)));
        let limits: Vec<Limit> = named.chain(self.limit.iter().copied()).collect();
        if limits.is_empty() {
            let text = "expected at least one limit (--ttft-p99-ms, --tpot-p99-ms, --itl-p99-ms, --e2e-p99-ms, --limit), \
                        found none";
            return Err(Failure::message(Exit::BadInput, text));
        }
        if let Some(limit) = limits.iter().find(|limit| !limit.is_valid()) {
            let (metric, stat, found) = (limit.metric.name(), limit.stat, limit.max_ms);
            let text = format!("--{metric}-{stat}-ms: expected milliseconds above 0, found {found}");
            return Err(Failure::message(Exit::BadInput, text));
        }
        Ok(limits)
    }

    fn load(&self) -> Result<Load, Failure> {
        if let Some(path) = &self.spec {
            return Ok(Load::of_spec(WorkloadSpec::read(path)?)?);
        }
        // One of the two is required.
        let path = self.workload.clone().unwrap_or_default();
        let workload = Workload::read(&path)?;
        check_workload(&workload)?;
        Ok(Load::of_workload(workload).map_err(LoadError::from)?)
    }

    fn bracket(&self, load: &Load) -> Result<BracketOptions, Failure> {
        let own = load.rate_per_s();
        // Without a rate of its own to start from, one within the bounds.
        let start = self.start_rate.unwrap_or_else(|| {
            own.max(self.min_rate.unwrap_or(own)).min(self.max_rate.unwrap_or(f64::INFINITY))
        });
        let from_start = BracketOptions::from_start(start);
        let options = BracketOptions {
            start_rate_per_s: start,
            min_rate_per_s: self.min_rate.unwrap_or(from_start.min_rate_per_s),
            max_rate_per_s: self.max_rate.unwrap_or(from_start.max_rate_per_s),
            tolerance: self.tolerance,
        };
        options.check().map_err(|(name, expected, found)| {
            Failure::message(Exit::BadInput, format!("{name}: expected {expected}, found {found}"))
        })?;
        Ok(options)
    }
}

impl From<LoadError> for Failure {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Arrival(error) => error.into(),
            LoadError::Input(error) => error.into(),
            error @ LoadError::NoRate(_) => Self::new(Exit::BadInput, error).with_hint(
                "`plumb workload import plumbline FILE --rate R` gives requests arrivals of a Poisson process",
            ),
        }
    }
}

impl From<SearchError> for Failure {
    fn from(error: SearchError) -> Self {
        match error {
            SearchError::Simulate(error) => error.into(),
            SearchError::Arrival(error) => error.into(),
            SearchError::Input(error) => error.into(),
        }
    }
}

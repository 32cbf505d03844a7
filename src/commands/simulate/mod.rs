//! `plumb simulate`: one simulated run of an engine, or of a cluster of engines.

mod cluster_file;
mod report;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::ValueEnum;
use plumbline_bundles::{EngineProfile, bundle::sha256_hex};
use plumbline_schema::{
    HostFactorBasis, HostFactorUsed, HostInfo, InputError, Nanos, RunInfo, RunKind, Workload,
    files::{read_json, read_text, write_json},
};
use plumbline_simulator::{
    BundleTimes, RequestSource, Residuals, SimulateOptions, WorkloadSource,
    arrival::WorkloadSpec,
    cluster::{ClusterRun, Engines, RouterKind, Routing, simulate_cluster},
    output::{
        OutputOptions, Reporter, Summaries,
        series::{DEFAULT_WINDOW, SeriesRecorder},
        trace::TraceRecorder,
    },
    recorder::{Recorder, Tee},
    simulate::check_workload,
    step_time::timeline::Span,
    times::{Edge, EdgeTimes},
};
use plumbline_validator::{calibrate::host_factor, settings::simulated_environment};

use self::{cluster_file::ClusterFile, report::Report};
use crate::{
    engines::{EngineArgs, Opened},
    exit::Exit,
    failure::Failure,
    output::Output,
};

/// Simulate one engine or a cluster that serves a workload, on the machine of a bundle
///
/// Writes a run folder with the same files as a real run's. The same inputs and seed give the same bytes.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,

    /// Workload: a CSV file (or .csv.zst)
    #[arg(long, required_unless_present = "spec")]
    workload: Option<PathBuf>,

    /// Workload by rules: a TOML or JSON file, whose requests are made while the simulation runs
    #[arg(long, value_name = "FILE", conflicts_with = "workload")]
    spec: Option<PathBuf>,

    /// Run folder to write
    #[arg(long)]
    out: PathBuf,

    /// Files to write besides run.json and summary.json
    #[arg(long, value_enum, default_value_t = DetailArg::Steps)]
    detail: DetailArg,

    /// Also write a trace to look at with ui.perfetto.dev (.json, .json.gz or .json.zst): steps,
    /// hosts, operators on the GPUs, requests and counters
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,

    /// What of the run the trace shows, as seconds from its start
    #[arg(long, value_name = "FROM:TO", requires = "trace", value_parser = seconds)]
    trace_window: Option<Span>,

    /// Also write `series.csv`: what each replica did, second by second
    #[arg(long)]
    series: bool,

    /// Replicas of the engine
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    replicas: u32,

    /// How requests reach replicas: random, round-robin, least-outstanding, power-of-two or prefix-aware
    #[arg(long, value_name = "NAME")]
    router: Option<String>,

    /// Cluster of several kinds of engines, or of prefill and decode replicas: a TOML file
    #[arg(long, value_name = "FILE", conflicts_with = "replicas")]
    cluster: Option<PathBuf>,

    /// Also simulate with all operator times at the low and at the high end of their intervals, and show what that
    /// makes of every number
    #[arg(long)]
    intervals: bool,

    /// Real run on the host to predict, whose speed it pins against the host the engine profile was fitted on (can be
    /// repeated)
    #[arg(long, value_name = "RUN")]
    host_run: Vec<PathBuf>,

    /// Predict another host by single-thread scores: a score, a JSON file of `plumb host --out`, or `bundle` for the
    /// host that the bundle was measured on. Without it, host costs are as in the engine profile
    #[arg(long, value_name = "FILE|SCORE|bundle", conflicts_with = "host_run")]
    host: Option<String>,

    /// Whether step times scatter as measured ones do
    #[arg(long, value_enum, default_value_t = ResidualsArg::Drawn)]
    residuals: ResidualsArg,

    /// Seed of everything drawn
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// How much of a simulation is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum DetailArg {
    /// Nothing: memory does not grow with the number of requests
    Summary,
    /// `request_metrics.csv`
    Requests,
    /// and `token_metrics.csv`
    Tokens,
    /// and `step_metrics.csv`, of a cluster one for each replica
    Steps,
}

/// How steps scatter.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ResidualsArg {
    /// Each step's host time is multiplied by a draw from its dispatch's residuals
    Drawn,
    /// Every step takes its predicted time
    None,
}

impl From<ResidualsArg> for Residuals {
    fn from(arg: ResidualsArg) -> Self {
        match arg {
            ResidualsArg::Drawn => Self::Drawn,
            ResidualsArg::None => Self::None,
        }
    }
}

/// Runs the verb.
///
/// # Errors
/// When an input cannot be used, or an operator has no time.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    check_out(&args.out)?;
    let scenario = Scenario::open(args, output)?;
    let output_options = OutputOptions {
        requests: args.detail >= DetailArg::Requests,
        tokens: args.detail >= DetailArg::Tokens,
        steps: args.detail >= DetailArg::Steps,
        backend: scenario.info.engine.clone(),
        is_cluster: scenario.num_replicas() > 1,
    };
    let is_new = !args.out.exists();
    let simulated = Reporter::new(&args.out, output_options)
        .map_err(Failure::from)
        .and_then(|r| scenario.watched(args, r));
    if simulated.is_err() && is_new {
        // Gone unless something lies in it.
        let _ = std::fs::remove_dir(&args.out);
    }
    let (run, summaries, rejections) = simulated?;
    remove_stale(args)?;
    let edges = if args.intervals {
        let at = |edge| {
            let of = |times| EdgeTimes::new(times, edge);
            let mut reporter = Reporter::without_files();
            scenario.simulate(of, &mut reporter)?;
            Ok::<_, Failure>(reporter.finish()?.0)
        };
        Some([at(Edge::Low)?, at(Edge::High)?])
    } else {
        None
    };
    let report =
        Report::new(&args.out, &scenario.info, &scenario.gpus, &run, &summaries, edges.as_ref(), &rejections);
    write_json(&args.out.join("summary.json"), &report)?;
    write_json(&args.out.join("run.json"), &scenario.info)?;
    output.print(&report, || report.text())?;
    output.note(format!("wrote {}", args.out.display()));
    Ok(Exit::Fine)
}

/// Files of an earlier simulation into the same folder that this one does not write.
fn remove_stale(args: &Args) -> Result<(), Failure> {
    for (detail, name) in [
        (DetailArg::Requests, "request_metrics.csv"),
        (DetailArg::Tokens, "token_metrics.csv"),
        (DetailArg::Steps, "step_metrics.csv"),
    ] {
        let path = args.out.join(name);
        if args.detail < detail && path.exists() {
            std::fs::remove_file(&path).map_err(|source| InputError::io(&path, source))?;
        }
    }
    Ok(())
}

/// Everything that decides a simulation.
struct Scenario {
    kinds: Vec<Engines<BundleTimes>>,
    /// The GPU of each kind.
    gpus: Vec<plumbline_schema::GpuSpec>,
    routing: Routing,
    options: SimulateOptions,
    requests: Requests,
    info: RunInfo,
}

/// Where requests come from, as often as they are asked for.
enum Requests {
    Workload(Arc<Workload>),
    Spec(Box<WorkloadSpec>),
}

type Simulated = (ClusterRun, Summaries, Vec<(u64, plumbline_simulator::Rejection)>);

impl Scenario {
    fn open(args: &Args, output: Output) -> Result<Self, Failure> {
        let (requests, workload_digest) = requests(args)?;
        let router = args.router.as_deref().map(str::parse).transpose();
        let router: Option<RouterKind> = router.map_err(|error| Failure::new(Exit::BadInput, error))?;
        let file = args.cluster.as_deref().map(ClusterFile::read).transpose()?;
        let groups = if let Some(file) = &file {
            file.groups(&args.engine, output)?
        } else {
            let mut opened = args.engine.open(output)?;
            opened.engines.num_replicas = args.replicas;
            vec![opened]
        };
        let routing = match &file {
            Some(file) => file.routing(router, &groups[0].engines)?,
            None => Routing { router: router.unwrap_or_default(), kv_transfer: None },
        };
        let bundle_digest = groups[0].bundle.digest().to_owned();
        let first = &groups[0];
        let environment = simulated_environment(
            &first.engines.model,
            &first.engines.profile,
            &first.bundle,
            &first.gpu.name,
        );
        let host =
            args.host.as_deref().map(|name| super::host::named(name, &groups[0].bundle)).transpose()?;
        let (mut kinds, mut gpus, mut used) = (Vec::new(), Vec::new(), None);
        for Opened { gpu, mut engines, .. } in groups {
            used = move_to_host(args, host.as_ref(), &engines.times, &mut engines.profile, output)?;
            kinds.push(engines);
            gpus.push(gpu);
        }
        let options = SimulateOptions {
            seed: args.seed,
            residuals: args.residuals.into(),
            ..SimulateOptions::default()
        };
        let mut names: Vec<&str> = kinds.iter().map(|kind| kind.profile.name.as_str()).collect();
        names.dedup();
        let is_one = kinds.len() == 1;
        let info = RunInfo {
            gpu: is_one.then(|| gpus[0].name.clone()),
            deployment: is_one.then(|| kinds[0].deployment.clone()),
            workload_digest: Some(workload_digest),
            bundle_digest: is_one.then_some(bundle_digest),
            seed: Some(args.seed),
            host,
            host_factor: used,
            environment: is_one.then_some(environment),
            ..RunInfo::new(RunKind::Simulated, names.join("+"))
        };
        Ok(Self { kinds, gpus, routing, options, requests, info })
    }

    fn num_replicas(&self) -> u32 {
        self.kinds.iter().map(|kind| kind.num_replicas).sum()
    }

    /// Simulates, and writes the trace and the series that are asked for.
    fn watched(&self, args: &Args, mut reporter: Reporter) -> Result<Simulated, Failure> {
        let window = args.trace_window.unwrap_or(TraceRecorder::WHOLE);
        let trace = args.trace.as_ref().map(|path| TraceRecorder::create(path, window)).transpose()?;
        let series = args.series.then(|| SeriesRecorder::create(&args.out.join(SERIES), DEFAULT_WINDOW));
        let series = series.transpose()?;
        let run = if trace.is_none() && series.is_none() {
            self.simulate(|times| times, &mut reporter)?
        } else {
            let mut all = Tee(reporter, Tee(series, trace));
            let run = self.simulate(|times| times, &mut all)?;
            let Tee(told, Tee(series, trace)) = all;
            reporter = told;
            series.map_or(Ok(()), SeriesRecorder::finish)?;
            trace.map_or(Ok(()), TraceRecorder::finish)?;
            run
        };
        let (summaries, rejections) = reporter.finish()?;
        Ok((run, summaries, rejections))
    }

    /// Simulates with operator times made of each kind's by `times`.
    fn simulate<T: plumbline_simulator::OperatorTimes, R: Recorder>(
        &self,
        times: impl Fn(BundleTimes) -> T,
        recorder: &mut R,
    ) -> Result<ClusterRun, Failure> {
        let kinds = self.kinds.iter().map(|kind| Engines {
            model: kind.model.clone(),
            deployment: kind.deployment.clone(),
            profile: kind.profile.clone(),
            times: times(kind.times.clone()),
            num_replicas: kind.num_replicas,
            role: kind.role,
        });
        let mut source: Box<dyn RequestSource> = match &self.requests {
            Requests::Workload(workload) => Box::new(WorkloadSource::new(Arc::clone(workload))),
            Requests::Spec(spec) => {
                spec.source(self.options.seed).map_err(|error| Failure::new(Exit::BadInput, error))?
            }
        };
        Ok(simulate_cluster(kinds.collect(), self.routing, &self.options, &mut source, recorder)?)
    }
}

/// The file of `--series`, in the run's folder.
const SERIES: &str = "series.csv";

/// `FROM:TO` in seconds; one that is left out is the run's start or end.
fn seconds(text: &str) -> Result<Span, String> {
    let wrong = || format!("expected seconds as FROM:TO with FROM before TO, found `{text}`");
    let of = |part: &str, default: Nanos| match part.trim() {
        "" => Ok(default),
        number => match number.parse::<f64>() {
            Ok(seconds) if seconds >= 0.0 => Ok(Nanos::from_f64(seconds * 1e9)),
            _ => Err(wrong()),
        },
    };
    let (from, to) = text.split_once(':').ok_or_else(wrong)?;
    let span = Span { start: of(from, TraceRecorder::WHOLE.start)?, end: of(to, TraceRecorder::WHOLE.end)? };
    if span.start < span.end { Ok(span) } else { Err(wrong()) }
}

/// The requests, and the digest of what says them.
fn requests(args: &Args) -> Result<(Requests, String), Failure> {
    if let Some(path) = &args.spec {
        let text = read_text(path)?;
        let spec = WorkloadSpec::read(path)?;
        return Ok((Requests::Spec(Box::new(spec)), sha256_hex(text.as_bytes())));
    }
    // One of the two is required.
    let path = args.workload.clone().unwrap_or_default();
    let workload = Workload::read(&path)?;
    check_workload(&workload)?;
    let digest = sha256_hex(workload.canonical_text().as_bytes());
    Ok((Requests::Workload(Arc::new(workload)), digest))
}

/// Gives the profile the factor of the host asked for, and says which it is and why; `None` when none was asked for.
fn move_to_host(
    args: &Args,
    host: Option<&HostInfo>,
    times: &BundleTimes,
    profile: &mut EngineProfile,
    output: Output,
) -> Result<Option<HostFactorUsed>, Failure> {
    if !args.host_run.is_empty() {
        let runs = super::calibrate::read_runs(&args.host_run, None)?;
        let read = host_factor(&runs, times, profile)?;
        profile.host_factor = read.factor;
        let num_steps = Some(read.num_steps as u64);
        let basis = HostFactorBasis::Runs;
        return Ok(Some(HostFactorUsed { factor: read.factor, basis, fitted_score: None, num_steps }));
    }
    let Some(host) = host else { return Ok(None) };
    let (on_host, used) = profile.on_host(host);
    if used.basis == HostFactorBasis::FittedHostUnknown {
        output.note(format!(
            "note: engine profile `{}` does not say which host it was fitted on, so --host changes nothing (host factor \
             {}); `plumb calibrate --host` records it, and --host-run needs no score",
            profile.name, used.factor
        ));
    }
    *profile = on_host;
    Ok(Some(used))
}

/// Refuses to write over anything but an earlier simulation.
fn check_out(out: &Path) -> Result<(), Failure> {
    let occupied = |what: &str| {
        let expected = "expected a new folder, or that of an earlier simulation";
        Err(Failure::message(Exit::BadInput, format!("{}: {expected}, found {what}", out.display())))
    };
    if out.is_file() {
        return occupied("a file");
    }
    if !out.is_dir() {
        return Ok(());
    }
    let run_json = out.join("run.json");
    if run_json.exists() {
        return match read_json::<RunInfo>(&run_json, "a run.json") {
            Ok(info) if info.kind == RunKind::Simulated => Ok(()),
            Ok(_) => occupied("a real run"),
            Err(_) => occupied("files that are no simulated run"),
        };
    }
    if out.join("request_metrics.csv").exists() {
        return occupied("a real run");
    }
    match std::fs::read_dir(out).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        _ => occupied("other files"),
    }
}

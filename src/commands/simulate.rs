//! `plumb simulate`: one simulated run.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::ValueEnum;
use plumbline_bundles::{Bundle, Dispatch, EngineProfile, OutOfDomain, Predictors, bundle::sha256_hex};
use plumbline_schema::{
    Deployment, EngineMode, GpuSpec, HostFactorBasis, HostFactorUsed, HostInfo, MemoryOptions, MemoryPlan,
    ModelSpec, Run, RunKind, Workload,
};
use plumbline_simulator::{
    BundleTimes, Coverage, Residuals, SimulateOptions, Simulation, SimulationCounts, simulate,
};
use plumbline_validator::{Metric, RunMetrics, Stat, calibrate::host_factor, suite::Overrides};
use serde::Serialize;

use crate::{
    data,
    exit::Exit,
    failure::Failure,
    output::{Output, Table, Text, ns_to_ms, percent},
};

/// Simulate an engine that serves a workload on the machine of a bundle
///
/// Writes a run folder with the same files as a real run's. The same inputs and seed give the same bytes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Bundle folder, or the name of a shipped bundle
    #[arg(long)]
    bundle: String,

    /// Engine profile: its name in the bundle, or a JSON file
    #[arg(long)]
    engine: String,

    /// Model: a shipped name (qwen3-0.6b, llama3-8b), or a Hugging Face config.json
    #[arg(long)]
    model: String,

    /// Workload: a CSV file (or .csv.zst)
    #[arg(long)]
    workload: PathBuf,

    /// Run folder to write
    #[arg(long)]
    out: PathBuf,

    /// Deployment: an engine.json. Without it, what vLLM would use for the model and GPU when told nothing
    #[arg(long, value_name = "FILE")]
    deployment: Option<PathBuf>,

    /// Replace one key of the deployment, like `max_num_seqs=64` (can be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,

    /// Predict this GPU from the bundle's by their data sheets; every time is then tagged `transferred`
    #[arg(long, value_name = "GPU")]
    gpu: Option<String>,

    /// Real run on the host to predict, whose speed it pins against the host the engine profile was fitted on (can be
    /// repeated)
    #[arg(long, value_name = "RUN")]
    host_run: Vec<PathBuf>,

    /// Predict another host by single-thread scores: a score, a JSON file of `plumb host --out`, or `bundle` for the
    /// host that the bundle was measured on. Without it, host costs are as in the engine profile
    #[arg(long, value_name = "FILE|SCORE|bundle", conflicts_with = "host_run")]
    host: Option<String>,

    /// What to do about shapes outside of what was measured
    #[arg(long, value_enum, default_value_t = OutOfDomainArg::Extrapolate)]
    out_of_domain: OutOfDomainArg,

    /// Whether step times scatter as measured ones do
    #[arg(long, value_enum, default_value_t = ResidualsArg::Drawn)]
    residuals: ResidualsArg,

    /// Seed of everything drawn
    #[arg(long, default_value_t = 0)]
    seed: u64,
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

/// What to do about shapes that were not measured.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum OutOfDomainArg {
    /// Predict with the ratio at the edge, tagged `extrapolated`
    Extrapolate,
    /// Fail
    Refuse,
}

impl From<OutOfDomainArg> for OutOfDomain {
    fn from(arg: OutOfDomainArg) -> Self {
        match arg {
            OutOfDomainArg::Extrapolate => Self::Extrapolate,
            OutOfDomainArg::Refuse => Self::Refuse,
        }
    }
}

/// Runs the verb.
///
/// # Errors
/// When an input cannot be used, or an operator has no time.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    check_out(&args.out)?;
    let model = ModelSpec::load(&args.model)?;
    let workload = Workload::read(&args.workload)?;
    let bundle = Bundle::open(&data::bundle(&args.bundle)?)?;
    let mut profile = engine(&bundle, &args.engine)?;
    let predictors = Arc::new(predictors(&bundle, args.gpu.as_deref())?);
    let deployment = deployment(args, &model, predictors.gpu(), &profile, output)?;
    let times = BundleTimes::new(Arc::clone(&predictors), args.out_of_domain.into());
    let host = args.host.as_deref().map(|name| super::host::named(name, &bundle)).transpose()?;
    let host_factor = move_to_host(args, host.as_ref(), &times, &mut profile, output)?;
    let options = SimulateOptions {
        seed: args.seed,
        residuals: args.residuals.into(),
        gpu: Some(predictors.gpu().name.clone()),
        workload_digest: Some(sha256_hex(workload.canonical_text().as_bytes())),
        bundle_digest: Some(bundle.digest().to_owned()),
        host,
        host_factor,
    };
    let simulation = simulate(&model, &workload, &deployment, &profile, times, &options)?;
    simulation.run.write(&args.out)?;
    let report = Report::of(&args.out, &simulation);
    output.print(&report, || report.text())?;
    output.note(format!("wrote {}", args.out.display()));
    Ok(Exit::Fine)
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
    if out.join("run.json").exists() || out.join("request_metrics.csv").exists() {
        return match Run::read(out) {
            Ok(run) if run.info.kind == RunKind::Simulated => Ok(()),
            Ok(_) => occupied("a real run"),
            Err(_) => occupied("files that are no simulated run"),
        };
    }
    match std::fs::read_dir(out).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        _ => occupied("other files"),
    }
}

/// An engine profile by file, or by its name in the bundle.
pub fn engine(bundle: &Bundle, name_or_path: &str) -> Result<EngineProfile, Failure> {
    if data::is_file(name_or_path) {
        Ok(EngineProfile::read(Path::new(name_or_path))?)
    } else {
        Ok(bundle.engine(name_or_path)?)
    }
}

/// A bundle's predictors, carried over to another GPU where one is named.
pub fn predictors(bundle: &Bundle, gpu: Option<&str>) -> Result<Predictors, Failure> {
    let predictors = bundle.predictors()?;
    let Some(name) = gpu.filter(|name| *name != predictors.gpu().name) else { return Ok(predictors) };
    let gpu = GpuSpec::by_name(name).ok_or_else(|| {
        let known = GpuSpec::shipped().into_iter().map(|gpu| gpu.name).collect::<Vec<_>>().join(", ");
        Failure::message(Exit::BadInput, format!("--gpu: expected one of {known}, found `{name}`"))
    })?;
    Ok(predictors.transferred_to(gpu))
}

fn deployment(
    args: &Args,
    model: &ModelSpec,
    gpu: &GpuSpec,
    profile: &EngineProfile,
    output: Output,
) -> Result<Deployment, Failure> {
    let base = if let Some(path) = &args.deployment {
        Deployment::read(path)?
    } else {
        let has_graphs = profile.dispatch.keys().any(|dispatch| *dispatch != Dispatch::Eager);
        let mode = if has_graphs { EngineMode::Graph } else { EngineMode::Eager };
        Deployment::unplanned(model, mode)
    };
    let deployment = Overrides::from_assignments(&args.set)
        .and_then(|overrides| overrides.apply(&base))
        .map_err(|(key, expected, found)| {
            Failure::message(Exit::BadInput, format!("--set {key}: expected {expected}, found {found}"))
        })?;
    let is_set = |set: &String| set.split('=').next().is_some_and(|key| key.trim() == "num_gpu_blocks");
    plan_memory(deployment, args.deployment.is_some() || args.set.iter().any(is_set), model, gpu, output)
}

/// A relative difference between planned and recorded KV blocks that is worth a note.
const KV_BLOCKS_TOLERANCE: f64 = 0.03;

/// Gives the deployment the KV blocks of the memory plan, or, where they are `known`, notes when the plan differs.
fn plan_memory(
    deployment: Deployment,
    known: bool,
    model: &ModelSpec,
    gpu: &GpuSpec,
    output: Output,
) -> Result<Deployment, Failure> {
    let options = MemoryOptions::default();
    if !known {
        let hint = "--deployment or --set num_gpu_blocks=N says how many KV blocks there are";
        return deployment
            .planned(model, gpu, &options)
            .map_err(|error| Failure::new(Exit::BadInput, error).with_hint(hint));
    }
    let blocks = deployment.num_gpu_blocks;
    match MemoryPlan::new(model, gpu, &deployment, &options).map(|plan| plan.check(blocks)) {
        Ok(check) if check.error().abs() > KV_BLOCKS_TOLERANCE => output.note(format!("note: {check}")),
        Ok(_) => {}
        Err(error) => {
            output.note(format!("note: KV blocks: the deployment says {blocks}, no memory plan: {error}"))
        }
    }
    Ok(deployment)
}

/// What is printed about a simulation.
#[derive(Serialize)]
struct Report<'a> {
    out: &'a Path,
    counts: SimulationCounts,
    coverage: Coverage,
    metrics: Vec<MetricLine>,
    rejected: Vec<Rejected>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<&'a HostInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_factor: Option<&'a HostFactorUsed>,
}

#[derive(Serialize)]
struct MetricLine {
    metric: Metric,
    stat: Stat,
    sim_ms: Option<f64>,
    na_reason: Option<String>,
}

#[derive(Serialize)]
struct Rejected {
    request_id: u64,
    reason: String,
}

impl<'a> Report<'a> {
    fn of(out: &'a Path, simulation: &'a Simulation) -> Self {
        let measured = RunMetrics::of(&simulation.run);
        let pairs = Metric::ALL.into_iter().flat_map(|metric| Stat::ALL.map(|stat| (metric, stat)));
        let line = |(metric, stat)| match measured.stat_ns(metric, stat) {
            Ok(ns) => MetricLine { metric, stat, sim_ms: Some(ns_to_ms(ns)), na_reason: None },
            Err(reason) => MetricLine { metric, stat, sim_ms: None, na_reason: Some(reason.to_string()) },
        };
        let rejected = simulation.rejections.iter();
        Self {
            out,
            counts: simulation.counts,
            coverage: simulation.coverage,
            metrics: pairs.map(line).collect(),
            rejected: rejected
                .map(|(id, reason)| Rejected { request_id: *id, reason: reason.to_string() })
                .collect(),
            host: simulation.run.info.host.as_ref(),
            host_factor: simulation.run.info.host_factor.as_ref(),
        }
    }

    /// What a host factor rests on, in words.
    fn why(&self, used: &HostFactorUsed) -> String {
        match (used.basis, used.fitted_score, self.host) {
            (HostFactorBasis::Scores, Some(fitted), Some(host)) => format!(
                "the host fitted on scores {fitted:.1}, the one asked for {:.1}",
                host.single_thread_score
            ),
            (HostFactorBasis::Runs, ..) => {
                format!("read off {} steps of real runs", used.num_steps.unwrap_or_default())
            }
            _ => "as in the engine profile, which does not say which host it was fitted on".to_owned(),
        }
    }

    fn text(&self) -> String {
        let mut table = Table::new(&["metric", ">mean ms", ">p50 ms", ">p90 ms", ">p99 ms"]);
        for rows in self.metrics.chunks(Stat::ALL.len()) {
            let cell =
                |row: &MetricLine| row.sim_ms.map_or_else(|| "n/a".to_owned(), |ms| format!("{ms:.3}"));
            table.row([rows[0].metric.title().to_owned()].into_iter().chain(rows.iter().map(cell)));
        }
        let counts = &self.counts;
        let coverage = [
            ("measured", self.coverage.measured),
            ("interpolated", self.coverage.interpolated),
            ("extrapolated", self.coverage.extrapolated),
            ("transferred", self.coverage.transferred),
            ("roofline", self.coverage.roofline),
        ];
        let shares: Vec<_> = coverage
            .iter()
            .filter(|(_, share)| *share > 0.0)
            .map(|(name, share)| format!("{} {name}", percent(*share)))
            .collect();
        let mut text = Text::default();
        text.line(format_args!(
            "{} requests: {} finished, {} rejected; {} preemptions",
            counts.requests, counts.finished, counts.rejected, counts.preemptions
        ));
        text.line(format_args!(
            "steps: {} eager, {} piecewise graph, {} full graph",
            counts.eager_steps, counts.piecewise_graph_steps, counts.full_graph_steps
        ));
        text.line(format_args!("GPU time: {}", shares.join(", ")));
        if let Some(used) = self.host_factor {
            text.line(format_args!("host factor {:.3}: {}", used.factor, self.why(used)));
        }
        text.line("");
        text.line(table);
        for rejected in &self.rejected {
            text.line(format_args!("rejected request {}: {}", rejected.request_id, rejected.reason));
        }
        text.finish()
    }
}

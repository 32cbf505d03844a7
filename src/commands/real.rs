//! `plumb real`: a workload served for real, by this project's own engine.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use clap::ValueEnum;
use plumbline_bundles::bundle::sha256_hex;
use plumbline_engine::{
    Engine, EngineError, EngineOptions, RealRun, RunOptions, Sampling, WeightSource, serve_workload,
};
use plumbline_schema::{
    Deployment, EngineMode, GpuSpec, ModelConfig, ModelSpec, StepPhases, WarmUp, Workload, files::write_json,
};
use plumbline_simulator::{SchedulerKind, simulate::check_workload};
use plumbline_validator::{Metric, RunMetrics, Stat, suite::Overrides};
use serde::Serialize;

use crate::{
    exit::Exit,
    failure::Failure,
    output::{Output, Table, Text, ns_to_ms},
};

/// Serve workloads for real on a GPU, and write what happened as run folders
///
/// One start of the engine serves all workloads. With one workload and one repeat, OUT is the run's folder; otherwise
/// each run has a folder of its own in OUT, named after the workload, with `-r0`, `-r1` for repeats. What a run did
/// until it was interrupted or failed is kept (exit code 5).
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What serves it
    #[arg(long, value_enum)]
    backend: Backend,

    #[command(flatten)]
    engine: NativeArgs,

    /// Workload: a CSV file (or .csv.zst; can be repeated)
    #[arg(long, required = true)]
    workload: Vec<PathBuf>,

    /// Runs of each workload
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    repeats: u32,

    /// Folder to write
    #[arg(long)]
    out: PathBuf,

    /// Scheduler: vllm-v1, vllm-v0, sarathi, orca, faster-transformer, lightllm or sglang
    #[arg(long, value_name = "NAME", default_value = "vllm-v1")]
    scheduler: String,

    #[command(flatten)]
    sampling: SamplingArgs,
}

/// What serves a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// This project's own engine: the simulator's scheduler, the profiler's operators, one GPU
    Native,
}

/// How the native engine is started.
#[derive(Clone, Debug, clap::Args)]
pub struct NativeArgs {
    /// Model: a folder with config.json and safetensors weights, or with `--weights random` also a shipped name
    #[arg(long)]
    pub model: String,

    /// `random`, or a folder of safetensors weights in place of the model's own
    #[arg(long, value_name = "random|FOLDER")]
    pub weights: Option<String>,

    /// How steps are launched
    #[arg(long, value_enum, default_value_t = ModeArg::Graph)]
    pub mode: ModeArg,

    /// Deployment: an engine.json. Without it, what vLLM would use for the model when told nothing
    #[arg(long, value_name = "FILE")]
    pub deployment: Option<PathBuf>,

    /// Replace one key of the deployment, like `max_num_seqs=64` (can be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,

    /// Share of the GPU's memory that the engine may use
    #[arg(long, default_value_t = 0.9)]
    pub gpu_memory_utilization: f64,

    /// Number of the GPU
    #[arg(long, default_value_t = 0)]
    pub device: usize,
}

/// How steps are launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    /// Kernel by kernel
    Eager,
    /// Decodes as one recorded CUDA graph, padded to the sizes of the deployment; all else kernel by kernel
    Graph,
}

/// How tokens are drawn.
#[derive(Clone, Debug, clap::Args)]
pub struct SamplingArgs {
    /// Temperature; 0 takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,

    /// Share of the probability that the candidates have
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,

    /// Seed of random weights, of made-up prompts and of draws
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl SamplingArgs {
    /// Checks the numbers.
    ///
    /// # Errors
    /// When one is out of its range.
    pub fn sampling(&self) -> Result<Sampling, Failure> {
        let bad = |text: String| Err(Failure::message(Exit::BadInput, text));
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return bad(format!(
                "--temperature: expected a number of at least 0, found {}",
                self.temperature
            ));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad(format!("--top-p: expected a number above 0 and up to 1, found {}", self.top_p));
        }
        Ok(Sampling { temperature: self.temperature, top_p: self.top_p, seed: self.seed })
    }
}

impl NativeArgs {
    /// Starts the engine.
    ///
    /// # Errors
    /// When an input cannot be used, or there is no GPU or too little memory.
    pub fn start(&self, seed: u64, output: Output) -> Result<Engine, Failure> {
        let config = ModelConfig::find(&self.model)?;
        let model = ModelSpec::from_hf_config(&config.name, &config.text, &config.path)?;
        let weights = match self.weights.as_deref() {
            Some("random") => WeightSource::Random(seed),
            Some(folder) => WeightSource::Folder(PathBuf::from(folder)),
            None if Path::new(&self.model).is_dir() => WeightSource::Folder(PathBuf::from(&self.model)),
            None => {
                let text = format!("--model {}: expected a folder with weights, found none", self.model);
                let hint = "say --weights random for times without texts, or --weights FOLDER";
                return Err(Failure::message(Exit::BadInput, text).with_hint(hint));
            }
        };
        if !(self.gpu_memory_utilization > 0.0 && self.gpu_memory_utilization <= 1.0) {
            let text = format!(
                "--gpu-memory-utilization: expected a share above 0 and up to 1, found {}",
                self.gpu_memory_utilization
            );
            return Err(Failure::message(Exit::BadInput, text));
        }
        let deployment = self.deployment(&model)?;
        output.note(format!("starting the engine: {}, {}", model.name, self.weights_text()));
        let options = EngineOptions {
            device: self.device,
            weights,
            deployment,
            gpu_memory_utilization: self.gpu_memory_utilization,
        };
        Ok(Engine::start(&config, &options)?)
    }

    /// The weights in words.
    pub fn weights_text(&self) -> String {
        match self.weights.as_deref() {
            Some("random") => "random weights".to_owned(),
            Some(folder) => format!("weights of {folder}"),
            None => format!("weights of {}", self.model),
        }
    }

    fn deployment(&self, model: &ModelSpec) -> Result<Deployment, Failure> {
        let mode = match self.mode {
            ModeArg::Eager => EngineMode::Eager,
            ModeArg::Graph => EngineMode::Graph,
        };
        let base = match &self.deployment {
            Some(path) => {
                let read = Deployment::read(path)?;
                let cudagraph_sizes = match mode {
                    EngineMode::Eager => Vec::new(),
                    EngineMode::Graph if read.cudagraph_sizes.is_empty() => {
                        Deployment::unplanned(model, mode).cudagraph_sizes
                    }
                    EngineMode::Graph => read.cudagraph_sizes.clone(),
                };
                Deployment { mode, model: model.name.clone(), cudagraph_sizes, ..read }
            }
            // The engine counts the blocks that its memory holds.
            None => Deployment { num_gpu_blocks: 1, ..Deployment::unplanned(model, mode) },
        };
        Overrides::from_assignments(&self.set).and_then(|overrides| overrides.apply(&base)).map_err(
            |(key, expected, found)| {
                Failure::message(Exit::BadInput, format!("--set {key}: expected {expected}, found {found}"))
            },
        )
    }
}

/// Set when the user asks to stop, by Ctrl-C or a termination.
///
/// # Errors
/// When the system lets nobody listen.
pub fn stop_flag() -> Result<Arc<AtomicBool>, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed))
        .map_err(|error| Failure::new(Exit::Unexpected, error))?;
    Ok(stop)
}

/// Runs the verb.
///
/// # Errors
/// When an input cannot be used, or the engine does not start.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let Backend::Native = args.backend;
    let sampling = args.sampling.sampling()?;
    let scheduler: SchedulerKind =
        args.scheduler.parse().map_err(|error| Failure::new(Exit::BadInput, anyhow::Error::from(error)))?;
    let workloads = args.workload.iter().map(|path| named_workload(path)).collect::<Result<Vec<_>, _>>()?;
    let folders = folders(args, &workloads)?;
    let stop = stop_flag()?;
    let mut engine = args.engine.start(args.sampling.seed, output)?;
    let warm_up = engine.warm_up()?;
    note_warm_up(&warm_up, output);
    write_json(&args.out.join("engine.json"), engine.deployment())?;
    let gpu = GpuSpec::by_device_name(engine.gpu_name()).map(|gpu| gpu.name);
    let mut report =
        Report { out: &args.out, deployment: engine.deployment().clone(), warm_up, runs: Vec::new() };
    let mut exit = Exit::Fine;
    for ((_, workload), folder) in
        workloads.iter().flat_map(|workload| vec![workload; args.repeats as usize]).zip(&folders)
    {
        let options = RunOptions {
            scheduler,
            sampling,
            keeps_outputs: false,
            workload_digest: Some(sha256_hex(workload.canonical_text().as_bytes())),
            gpu: gpu.clone(),
            weights: args.engine.weights_text(),
            warm_up: Some(warm_up),
        };
        let real = serve_workload(&mut engine, workload, &options, &stop)?;
        real.write(folder)?;
        // What requests share and their priorities stand nowhere else in a run.
        if !workload.is_plain() {
            workload.write(&folder.join("workload.csv"))?;
        }
        output.note(format!("wrote {}", folder.display()));
        report.runs.push(RunReport::new(folder, &real));
        if let Some(error) = &real.error {
            output.note(format!("error: the run ended early: {error}; what was done until then is kept"));
            exit = Exit::Incomplete;
            break;
        }
    }
    output.print(&report, || report.text())?;
    Ok(exit)
}

fn note_warm_up(warm_up: &WarmUp, output: Output) {
    let seconds = warm_up.duration_ns as f64 / 1e9;
    let steps = warm_up.steps;
    let change = 100.0 * warm_up.last_change;
    if warm_up.is_steady {
        output.note(format!("warmed up: step times are steady after {steps} steps in {seconds:.1} s"));
    } else {
        output.note(format!(
            "note: after {steps} steps in {seconds:.1} s, step times still change by {change:.1} %; the host or the GPU \
             is disturbed"
        ));
    }
}

fn named_workload(path: &Path) -> Result<(String, Workload), Failure> {
    let workload = Workload::read(path)?;
    check_workload(&workload)?;
    let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let name = name.trim_end_matches(".zst").trim_end_matches(".csv").to_owned();
    Ok((name, workload))
}

/// The folder of each run, workload by workload; two must not be one.
fn folders(args: &Args, workloads: &[(String, Workload)]) -> Result<Vec<PathBuf>, Failure> {
    if workloads.len() == 1 && args.repeats == 1 {
        return Ok(vec![args.out.clone()]);
    }
    let mut folders = Vec::new();
    for (name, _) in workloads {
        for repeat in 0..args.repeats {
            let name = if args.repeats == 1 { name.clone() } else { format!("{name}-r{repeat}") };
            let folder = args.out.join(name);
            if folders.contains(&folder) {
                let text = format!("--workload: two of them would write {}", folder.display());
                return Err(
                    Failure::message(Exit::BadInput, text).with_hint("give the files different names")
                );
            }
            folders.push(folder);
        }
    }
    Ok(folders)
}

#[derive(Serialize)]
struct Report<'a> {
    out: &'a Path,
    deployment: Deployment,
    warm_up: WarmUp,
    runs: Vec<RunReport>,
}

#[derive(Serialize)]
struct RunReport {
    folder: PathBuf,
    requests: usize,
    incomplete: Option<String>,
    rejected: Vec<Rejected>,
    graph_steps: u64,
    eager_steps: u64,
    /// From the run's start to its last step's end.
    end_ns: u64,
    metrics: Vec<MetricLine>,
    /// Mean of a step.
    schedule_ns: Option<u64>,
    prepare_ns: Option<u64>,
    launch_ns: Option<u64>,
    wait_ns: Option<u64>,
    sample_ns: Option<u64>,
    finish_ns: Option<u64>,
    /// The host's scores before, in idle moments and after.
    host_scores: Vec<f64>,
}

#[derive(Serialize)]
struct Rejected {
    request_id: u64,
    reason: String,
}

#[derive(Serialize)]
struct MetricLine {
    metric: Metric,
    stat: Stat,
    real_ms: Option<f64>,
}

impl RunReport {
    fn new(folder: &Path, real: &RealRun) -> Self {
        let metrics = RunMetrics::of(&real.run);
        let pairs = Metric::ALL.into_iter().flat_map(|metric| Stat::ALL.map(|stat| (metric, stat)));
        let line = |(metric, stat)| {
            let real_ms = metrics.stat_ns(metric, stat).ok().map(ns_to_ms);
            MetricLine { metric, stat, real_ms }
        };
        let conduct = real.run.info.conduct.clone().unwrap_or_default();
        let phases = real.mean_phases();
        let phase = |of: fn(&StepPhases) -> u64| phases.as_ref().map(|(_, phases)| of(phases));
        Self {
            folder: folder.to_path_buf(),
            requests: real.run.requests.len(),
            incomplete: conduct.incomplete,
            rejected: real
                .rejections
                .iter()
                .map(|(request_id, reason)| Rejected { request_id: *request_id, reason: reason.clone() })
                .collect(),
            graph_steps: conduct.graph_steps,
            eager_steps: conduct.eager_steps,
            end_ns: real.run.steps.last().map_or(0, |step| step.end_ns().0),
            metrics: pairs.map(line).collect(),
            schedule_ns: phases.as_ref().map(|(schedule, _)| schedule.0),
            prepare_ns: phase(|phases| phases.prepare_ns.0),
            launch_ns: phase(|phases| phases.launch_ns.0),
            wait_ns: phase(|phases| phases.wait_ns.0),
            sample_ns: phase(|phases| phases.sample_ns.0),
            finish_ns: phase(|phases| phases.finish_ns.0),
            host_scores: conduct.host_scores.iter().map(|score| score.single_thread_score).collect(),
        }
    }
}

impl Report<'_> {
    fn text(&self) -> String {
        let mut text = Text::default();
        let mut table = Table::new(&["run", "metric", ">mean ms", ">p50 ms", ">p90 ms", ">p99 ms"]);
        for run in &self.runs {
            let name =
                run.folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            for metric in Metric::ALL {
                let cell = |stat| {
                    let line = run.metrics.iter().find(|line| line.metric == metric && line.stat == stat);
                    line.and_then(|line| line.real_ms)
                        .map_or_else(|| "n/a".to_owned(), |ms| format!("{ms:.3}"))
                };
                let cells = [Stat::Mean, Stat::P50, Stat::P90, Stat::P99].map(cell);
                let [mean, p50, p90, p99] = cells;
                table.row([name.clone(), metric.to_string(), mean, p50, p90, p99]);
            }
        }
        text.line(table);
        let mut table = Table::new(&[
            "run",
            ">steps",
            ">as graphs",
            ">schedule us",
            ">prepare us",
            ">launch us",
            ">wait us",
            ">sample us",
            ">finish us",
        ]);
        for run in &self.runs {
            let name =
                run.folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            let us =
                |ns: Option<u64>| ns.map_or_else(|| "n/a".to_owned(), |ns| format!("{:.1}", ns as f64 / 1e3));
            table.row([
                name,
                (run.graph_steps + run.eager_steps).to_string(),
                run.graph_steps.to_string(),
                us(run.schedule_ns),
                us(run.prepare_ns),
                us(run.launch_ns),
                us(run.wait_ns),
                us(run.sample_ns),
                us(run.finish_ns),
            ]);
        }
        text.line(table);
        for run in &self.runs {
            for rejected in &run.rejected {
                text.line(format!("rejected: request {}: {}", rejected.request_id, rejected.reason));
            }
        }
        text.finish()
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        let exit = match &error {
            EngineError::Input(_) | EngineError::Tensor { .. } | EngineError::Unsupported { .. } => {
                Exit::BadInput
            }
            EngineError::NoDevice(_) | EngineError::OutOfMemory { .. } => Exit::NoDevice,
            EngineError::Interrupted => Exit::Incomplete,
            EngineError::Device(_) => Exit::Unexpected,
        };
        match error {
            EngineError::Input(error) => error.into(),
            error => Self::new(exit, error),
        }
    }
}

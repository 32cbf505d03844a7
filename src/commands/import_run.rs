//! `plumb import-run`: another tool's result file to a run folder.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::ValueEnum;
use plumbline_schema::{Deployment, GpuSpec, InputError, Location, Run, RunKind, RunSource};
use plumbline_validator::{
    ImportOptions, Imported, Metric, ResultFormat, RunMetrics, Stat, import::FigureCheck, import_run,
    metrics::Outcomes, suite::Overrides,
};
use serde::Serialize;

use crate::{
    exit::Exit,
    failure::Failure,
    output::{Output, Table, Text, ns_to_ms},
};

/// Make a run of another tool's result file
///
/// Times are taken as they were recorded: token times only where every token has one, failed requests with their status.
/// Most tools record when they sent a request, and count from then; with --workload times count from the schedule.
/// Figures that the file holds are computed anew from its details; where both disagree, a warning says so.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Whose file it is
    format: Format,

    /// The file
    path: PathBuf,

    /// Run folder to make
    #[arg(long, value_name = "RUN")]
    out: PathBuf,

    /// When requests were due: a workload, or any CSV with `request_id` and `arrival_time_ns`; in the order of the file
    /// where its requests have no numbers
    #[arg(long, value_name = "FILE")]
    workload: Option<PathBuf>,

    /// Which result to take of a file that holds several, from 1
    #[arg(long, value_name = "N")]
    part: Option<usize>,

    /// The model's name, in place of the file's
    #[arg(long, value_name = "NAME")]
    model: Option<String>,

    /// What served the requests, in place of the file's
    #[arg(long, value_name = "NAME")]
    backend: Option<String>,

    /// The GPU: a shipped name
    #[arg(long, value_name = "NAME")]
    gpu: Option<String>,

    /// The deployment: an engine.json
    #[arg(long, value_name = "FILE")]
    engine_json: Option<PathBuf>,

    /// A key of the deployment, in place of the file's (can be repeated)
    #[arg(long, value_name = "KEY=VALUE", requires = "engine_json")]
    deployment: Vec<String>,

    /// A simulator made the file
    #[arg(long)]
    simulated: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// `vllm bench serve --save-result --save-detailed`: the JSON file
    VllmBench,
    /// SGLang's `bench_serving --output-details`: the JSON lines
    SglangBench,
    /// GuideLLM's benchmarks.json
    Guidellm,
    /// AIPerf's `profile_export.jsonl`, with `profile_export_aiperf.json` beside it where there is one
    Aiperf,
    /// inference-perf's `per_request_lifecycle_metrics.json`, with `summary_lifecycle_metrics.json` likewise
    InferencePerf,
    /// Vidur's `request_metrics.csv`
    Vidur,
    /// Sarathi-Serve's `sequence_metrics.csv`
    Sarathi,
    /// `request_metrics.csv` with token, trace and percentile tables beside it, or their folder
    Seed,
}

impl From<Format> for ResultFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::VllmBench => Self::VllmBench,
            Format::SglangBench => Self::SglangBench,
            Format::Guidellm => Self::Guidellm,
            Format::Aiperf => Self::Aiperf,
            Format::InferencePerf => Self::InferencePerf,
            Format::Vidur => Self::Vidur,
            Format::Sarathi => Self::Sarathi,
            Format::Seed => Self::Seed,
        }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    run: &'a Path,
    kind: RunKind,
    requests: Outcomes,
    has_token_times: bool,
    metrics: Vec<Row>,
    figures: &'a [FigureCheck],
    source: Option<&'a RunSource>,
}

/// A metric as this project defines it.
#[derive(Serialize)]
struct Row {
    metric: Metric,
    n: usize,
    p50_ms: Option<f64>,
    p90_ms: Option<f64>,
    p99_ms: Option<f64>,
}

/// Runs the verb.
///
/// # Errors
/// When the file cannot be used as it is, or the run cannot be written.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    check_new(&args.out)?;
    let Imported { run, figures } = import_run(&args.path, args.format.into(), &args.options()?)?;
    write_whole(&run, &args.out)?;
    let metrics = RunMetrics::of(&run);
    let report = Report {
        run: &args.out,
        kind: run.info.kind,
        requests: metrics.outcomes,
        has_token_times: metrics.has_token_times,
        metrics: Metric::ALL.map(|metric| Row::of(&metrics, metric)).into(),
        figures: &figures,
        source: run.info.source.as_ref(),
    };
    output.print(&report, || report.text())?;
    output.note(format!("wrote {}", args.out.display()));
    Ok(Exit::Fine)
}

impl Args {
    fn options(&self) -> Result<ImportOptions, Failure> {
        let gpu = self.gpu.as_deref().map(known_gpu).transpose()?;
        Ok(ImportOptions {
            schedule: self.workload.clone(),
            part: self.part,
            model: self.model.clone(),
            backend: self.backend.clone(),
            gpu,
            deployment: self.engine_json.as_deref().map(|path| self.deployment(path)).transpose()?,
            simulated: self.simulated,
        })
    }

    fn deployment(&self, path: &Path) -> Result<Deployment, Failure> {
        let base = Deployment::read(path)?;
        let overrides = Overrides::from_assignments(&self.deployment);
        overrides.and_then(|overrides| overrides.apply(&base)).map_err(|(key, expected, found)| {
            let text = format!("--deployment {key}: expected {expected}, found {found}");
            Failure::message(Exit::BadInput, text)
        })
    }
}

fn known_gpu(name: &str) -> Result<String, Failure> {
    GpuSpec::by_name(name).map(|gpu| gpu.name).ok_or_else(|| {
        let known: Vec<_> = GpuSpec::shipped().into_iter().map(|gpu| gpu.name).collect();
        Failure::message(
            Exit::BadInput,
            format!("--gpu: expected one of {}, found {name:?}", known.join(", ")),
        )
    })
}

fn check_new(out: &Path) -> Result<(), Failure> {
    if fs::symlink_metadata(out).is_err() {
        return Ok(());
    }
    let expected = "a path where nothing exists yet, for the run";
    Err(InputError::invalid(out, Location::File, expected, "something; name another or remove it").into())
}

/// The folder appears whole or not at all, and only when it reads as a run.
fn write_whole(run: &Run, out: &Path) -> Result<(), Failure> {
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let at = |source| Failure::from(InputError::io(out, source));
    fs::create_dir_all(parent).map_err(at)?;
    let workspace = tempfile::Builder::new().prefix(".plumb-run-").tempdir_in(parent).map_err(at)?;
    let fresh = workspace.path().join("run");
    run.write(&fresh)?;
    Run::read(&fresh)?;
    fs::rename(&fresh, out).map_err(at)
}

impl Row {
    fn of(metrics: &RunMetrics, metric: Metric) -> Self {
        let stat = |stat| metrics.stat_ns(metric, stat).ok().map(ns_to_ms);
        let n = metrics.sorted_ns(metric).len();
        Self { metric, n, p50_ms: stat(Stat::P50), p90_ms: stat(Stat::P90), p99_ms: stat(Stat::P99) }
    }
}

impl Report<'_> {
    fn text(&self) -> String {
        let ms = |ms: Option<f64>| ms.map_or_else(|| "n/a".to_owned(), |ms| format!("{ms:.2}"));
        let mut text = Text::default();
        let Outcomes { ok, rejected, incomplete } = self.requests;
        text.line(format_args!("{ok} requests ok, {rejected} rejected, {incomplete} incomplete"));
        if let Some(source) = self.source {
            text.line(format_args!("times count from {}", source.arrivals.text()));
        }
        text.line("");
        let mut table = Table::new(&["ms", ">n", ">p50", ">p90", ">p99"]);
        for row in &self.metrics {
            let cells = [row.p50_ms, row.p90_ms, row.p99_ms].map(ms);
            table.row([row.metric.title().to_owned(), row.n.to_string()].into_iter().chain(cells));
        }
        text.line(table);
        let agree = self.figures.iter().filter(|figure| figure.agrees == Some(true)).count();
        let compared = self.figures.iter().filter(|figure| figure.agrees.is_some()).count();
        if !self.figures.is_empty() {
            let all = self.figures.len();
            text.line(format_args!(
                "{agree} of {compared} figures agree with the details, of {all} in the file"
            ));
        }
        let notes = self.source.map(|source| source.notes.as_slice()).unwrap_or_default();
        for note in notes {
            text.line(format_args!("note: {note}"));
        }
        text.finish()
    }
}

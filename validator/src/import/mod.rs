//! Runs out of other tools' result files.
//!
//! Each format has a file here, which reads it into one kind of record; `assemble` alone makes a run of those. What the
//! tools mean by their names is in [`variants`](crate::variants), and figures that a file holds are computed anew from its
//! details and compared.

mod aiperf;
mod assemble;
mod bench;
mod figures;
mod guidellm;
mod inference_perf;
mod json;
mod record;
mod schedule;
mod seed;
mod vidur;

use std::path::{Path, PathBuf};

use plumbline_schema::{Deployment, InputError, Location, Run};

pub use figures::FigureCheck;

/// Whose file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResultFormat {
    /// `vllm bench serve --save-result --save-detailed`.
    VllmBench,
    /// SGLang's `bench_serving --output-details`.
    SglangBench,
    /// `benchmarks.json` of `guidellm`.
    Guidellm,
    /// `profile_export.jsonl` of AIPerf.
    Aiperf,
    /// `per_request_lifecycle_metrics.json` of `inference-perf`.
    InferencePerf,
    /// `request_metrics.csv` of Vidur.
    Vidur,
    /// `sequence_metrics.csv` of Sarathi-Serve.
    Sarathi,
    /// The request, token and trace tables of the case in `docs/seed-case.md`.
    Seed,
}

impl ResultFormat {
    /// Every format.
    pub const ALL: [Self; 8] = [
        Self::VllmBench,
        Self::SglangBench,
        Self::Guidellm,
        Self::Aiperf,
        Self::InferencePerf,
        Self::Vidur,
        Self::Sarathi,
        Self::Seed,
    ];

    /// The name on the command line and in `run.json`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::VllmBench => "vllm-bench",
            Self::SglangBench => "sglang-bench",
            Self::Guidellm => "guidellm",
            Self::Aiperf => "aiperf",
            Self::InferencePerf => "inference-perf",
            Self::Vidur => "vidur",
            Self::Sarathi => "sarathi",
            Self::Seed => "seed",
        }
    }
}

/// What the file itself does not say.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    /// A CSV with `request_id`, `arrival_time_ns` and perhaps the lengths of a workload: the schedule.
    pub schedule: Option<PathBuf>,
    /// Which of several results in the file, from 1.
    pub part: Option<usize>,
    /// The model's name, in place of the file's.
    pub model: Option<String>,
    /// What served the requests, in place of the file's.
    pub backend: Option<String>,
    /// Plumbline's name of the GPU.
    pub gpu: Option<String>,
    /// The deployment.
    pub deployment: Option<Deployment>,
    /// Whether a simulator made the file, where its format does not say so.
    pub simulated: bool,
}

/// A run, and how the figures in its file compare with it.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The run.
    pub run: Run,
    /// Each figure in the file that can be computed anew.
    pub figures: Vec<FigureCheck>,
}

/// Makes a run of a result file.
///
/// # Errors
/// `Io`, or `Invalid` with file, and line or key: what cannot be read, times that are negative, not finite or run
/// backwards, lists of unequal lengths, repeated ids, a schedule of other requests.
pub fn import_run(
    path: &Path,
    format: ResultFormat,
    options: &ImportOptions,
) -> Result<Imported, InputError> {
    let parsed = match format {
        ResultFormat::VllmBench => bench::read_vllm(path)?,
        ResultFormat::SglangBench => bench::read_sglang(path, options.part)?,
        ResultFormat::Guidellm => guidellm::read(path, options.part)?,
        ResultFormat::Aiperf => aiperf::read(path)?,
        ResultFormat::InferencePerf => inference_perf::read(path)?,
        ResultFormat::Vidur | ResultFormat::Sarathi => vidur::read(path)?,
        ResultFormat::Seed => seed::read(path, options.simulated)?,
    };
    assemble::assemble(path, format, parsed, options)
}

/// The one of several results in a file that `part`, from 1, names; the only one without it.
fn choose<T>(path: &Path, mut parts: Vec<T>, part: Option<usize>, what: &str) -> Result<T, InputError> {
    let n = parts.len();
    let index = match part {
        None if n == 1 => 0,
        Some(part) if (1..=n).contains(&part) => part - 1,
        None if n > 1 => {
            let expected = format!("one result, or --part to say which of {n}");
            return Err(InputError::invalid(path, Location::File, expected, format!("{n} {what}")));
        }
        _ => {
            let expected = part.map_or("a result".to_owned(), |part| format!("a result number {part}"));
            return Err(InputError::invalid(path, Location::File, expected, format!("{n} {what}")));
        }
    };
    Ok(parts.swap_remove(index))
}

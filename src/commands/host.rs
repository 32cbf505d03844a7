//! `plumb host`: this host without its GPU, and how other verbs are told of a host.

use std::path::{Path, PathBuf};

use plumbline_bundles::{
    Bundle,
    host::{CpuState, ScoreSpread},
};
use plumbline_profiler::host::HostReport;
use plumbline_schema::{HostInfo, files::write_json};

use crate::{
    data,
    exit::Exit,
    failure::Failure,
    output::{Output, Table},
};

/// Tell this host's CPU, its load and its single-thread score; needs no GPU
///
/// The score carries host costs over to another host: `plumb simulate --host`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Also write it as JSON, for `--host` of simulate and calibrate
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Runs the verb.
///
/// # Errors
/// When the file cannot be written.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let report = HostReport::measure();
    if cfg!(debug_assertions) {
        output.note("note: this plumb was built without full optimisation; its score is no other build's");
    }
    if report.score.is_disturbed() {
        output.note("note: the runs lie over 10 % apart, so the score is no quiet host's; measure again when it is idle");
    }
    if let Some(path) = &args.out {
        write_json(path, &report)?;
    }
    output.print(&report, || text(&report))?;
    if let Some(path) = &args.out {
        output.note(format!("wrote {}", path.display()));
    }
    Ok(Exit::Fine)
}

fn text(report: &HostReport) -> String {
    let mut table = Table::plain();
    let num_cores = report.num_cores;
    for (name, value) in facts(&report.cpu_model, num_cores, &report.cpu) {
        table.row([name.to_owned(), value]);
    }
    table.row(["score".to_owned(), score(report.single_thread_score, Some(&report.score))]);
    table.to_string()
}

/// What is known of a host's CPU, by name; what is not known is left out.
pub fn facts(cpu_model: &str, num_cores: u32, cpu: &CpuState) -> Vec<(&'static str, String)> {
    let mut facts = vec![("cpu", cpu_model.to_owned()), ("cores", num_cores.to_string())];
    let mhz = |value: f64| format!("{value:.0} MHz");
    let load = |value: f64| format!("{value:.2}");
    let pair = |first: Option<String>, second: Option<String>| {
        let parts: Vec<_> = first.into_iter().chain(second).collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    };
    let clock = pair(cpu.current_mhz.map(mhz), cpu.max_mhz.map(|value| format!("at most {}", mhz(value))));
    let busy = pair(
        cpu.load_before.map(|value| format!("{} before", load(value))),
        cpu.load_after.map(|value| format!("{} after", load(value))),
    );
    for (name, value) in [("governor", cpu.governor.clone()), ("clock", clock), ("load", busy)] {
        facts.extend(value.map(|value| (name, value)));
    }
    facts
}

/// A score in words, with its spread where that is known.
pub fn score(median: f64, spread: Option<&ScoreSpread>) -> String {
    let spread = spread.map(|s| format!(" (median of {} runs, {:.1} to {:.1})", s.n, s.min, s.max));
    format!("{median:.1} million iterations/s{}", spread.unwrap_or_default())
}

/// The host that `--host` names: a score, `bundle` for the one that `bundle` was measured on, a JSON file with a
/// score (of `plumb host --out`, or a bundle's `host.json`), or another bundle.
///
/// # Errors
/// When it is none of these, or its score is no positive number.
pub fn named(text: &str, bundle: &Bundle) -> Result<HostInfo, Failure> {
    if let Ok(score) = text.parse() {
        return of_score("--host", score);
    }
    if text == "bundle" {
        return Ok(bundle.host()?.info());
    }
    if data::is_file(text) && !Path::new(text).is_dir() {
        return Ok(HostInfo::read(Path::new(text))?);
    }
    Ok(Bundle::open(&data::bundle(text)?)?.host()?.info())
}

/// A host of which only the score is known, as an option states it.
///
/// # Errors
/// When it is no positive number.
pub fn of_score(option: &str, score: f64) -> Result<HostInfo, Failure> {
    let host = HostInfo::of_score(score);
    if host.is_sound() {
        return Ok(host);
    }
    let text = format!("{option}: expected a finite score above 0, found {score}");
    Err(Failure::message(Exit::BadInput, text))
}

//! `plumb explain`: the difference between a simulated and a real run, by cause.

use std::{path::PathBuf, sync::Arc};

use plumbline_bundles::{Bundle, OutOfDomain};
use plumbline_schema::{ModelSpec, Run};
use plumbline_simulator::{BundleTimes, replay::served_workload};
use plumbline_validator::explain::{Basis, Cause, Explanation, Stretch, explain};

use crate::{
    data,
    engines::{engine, predictors},
    exit::Exit,
    failure::Failure,
    output::{Output, Table, Text, percent},
};

/// Split a simulation's error by cause: operators, host, client, capacity, scheduling
///
/// The real run's steps are timed once as they were and once as the simulation would have timed them; a bundle and an
/// engine profile tell the GPU's part of a step from the host's. The parts of each column add up to its difference.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Real run folder
    #[arg(long, value_name = "RUN")]
    real: PathBuf,

    /// Simulated run folder of the same workload, of this or another simulator
    #[arg(long, value_name = "RUN")]
    sim: PathBuf,

    /// Bundle folder, or the name of a shipped bundle. Without it, the shipped one of the runs' GPU
    #[arg(long)]
    bundle: Option<String>,

    /// Engine profile of the real engine: its name in the bundle, or a JSON file. Without it, the one that the simulation
    /// used
    #[arg(long)]
    engine: Option<String>,

    /// Model: a shipped name, or a Hugging Face config.json. Without it, the one that the real run's deployment names
    #[arg(long)]
    model: Option<String>,

    /// GPU of the runs, when it is not the bundle's: times are then carried over by the two data sheets
    #[arg(long, value_name = "GPU")]
    gpu: Option<String>,
}

/// Runs the verb.
///
/// # Errors
/// When an input cannot be used, or the runs cannot be explained.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let (real, sim) = (Run::read(&args.real)?, Run::read(&args.sim)?);
    let missing = |option: &str, what: &str| {
        Failure::message(Exit::BadInput, format!("expected {option}: no run names {what}"))
    };
    let gpu = real.info.gpu.as_ref().or(sim.info.gpu.as_ref());
    let name = args.bundle.as_ref().or(gpu).ok_or_else(|| missing("--bundle", "its GPU"))?;
    let bundle = Bundle::open(&data::bundle(name)?)?;
    let profile = engine(&bundle, args.engine.as_ref().unwrap_or(&sim.info.engine))?;
    let named = real.info.deployment.as_ref().map(|deployment| &deployment.model);
    let model = args.model.as_ref().or(named).ok_or_else(|| missing("--model", "its model"))?;
    let model = ModelSpec::load(model)?;
    let predictors = predictors(&bundle, args.gpu.as_deref())?;
    let times = BundleTimes::new(Arc::new(predictors), OutOfDomain::Extrapolate);
    let workload = served_workload(&real, &args.real).map_err(|e| Failure::new(Exit::BadInput, e))?;
    let basis = Basis { model: &model, times, profile: &profile };
    let mut explanation =
        explain(&real, &sim, &workload, &basis).map_err(|error| Failure::new(Exit::BadInput, error))?;
    if sim.info.bundle_digest.as_ref().is_some_and(|digest| digest != bundle.digest()) {
        let note =
            format!("the simulation used another bundle than `{name}`, by which its parts are told apart");
        explanation.notes.push(note);
    }
    output.print(&explanation, || text(&explanation))?;
    Ok(Exit::Fine)
}

fn text(explanation: &Explanation) -> String {
    let mut text = Text::default();
    text.line(format!("means over {} requests, ms", explanation.num_requests));
    text.line(waterfalls(explanation));
    text.line(format!(
        "the host's share of a step: {} real, {} simulated",
        percent(explanation.real_host_share),
        percent(explanation.sim_host_share)
    ));
    text.line("operators that cost most, E2E");
    let mut table = Table::new(&["operator", ">ms", ">real / expected", ">simulated / expected"]);
    for part in &explanation.operators {
        let factors = [part.real_factor, part.sim_factor].map(|factor| format!("{factor:.2}"));
        let [real, sim] = factors;
        table.row([part.operator.name().to_owned(), signed(part.ms), real, sim]);
    }
    text.line(&table);
    text.line("steps that cost most, E2E");
    let mut table = Table::new(&[
        ">step",
        ">at ms",
        ">chunks",
        ">decodes",
        ">tokens",
        ">real ms",
        ">simulated ms",
        ">ms",
    ]);
    for part in &explanation.steps {
        table.row([
            part.step.to_string(),
            format!("{:.1}", part.start_ms),
            part.num_prefill_chunks.to_string(),
            part.num_decodes.to_string(),
            part.num_tokens.to_string(),
            format!("{:.3}", part.real_ms),
            format!("{:.3}", part.sim_ms),
            signed(part.ms),
        ]);
    }
    text.line(&table);
    for note in &explanation.notes {
        text.line(format!("note: {note}"));
    }
    text.finish()
}

/// A row a cause, a column a stretch of a request's time.
fn waterfalls(explanation: &Explanation) -> String {
    let mut table = Table::new(&["", ">ttft", ">decode", ">e2e", ">of the difference"]);
    let all = &explanation.waterfalls;
    let row = |name: &str, values: Vec<String>, share: String| {
        let mut cells = vec![name.to_owned()];
        cells.extend(values);
        cells.push(share);
        cells
    };
    table.row(row("real", all.iter().map(|w| format!("{:.3}", w.real_ms)).collect(), String::new()));
    for (i, cause) in Cause::ALL.into_iter().enumerate() {
        let values = all.iter().map(|w| signed(w.parts[i].ms)).collect();
        let whole = all.iter().find(|w| w.stretch == Stretch::E2e);
        let share = whole
            .and_then(|w| w.parts[i].share_pct)
            .map_or_else(String::new, |pct| format!("{:.0} %", without_sign_of_zero(pct)));
        table.row(row(cause.title(), values, share));
    }
    table.row(row("simulated", all.iter().map(|w| format!("{:.3}", w.sim_ms)).collect(), String::new()));
    table.to_string()
}

fn signed(ms: f64) -> String {
    format!("{:+.3}", without_sign_of_zero(ms))
}

/// What rounds to nothing is nothing, not a negative nothing.
fn without_sign_of_zero(number: f64) -> f64 {
    if number.abs() < 5e-4 { 0.0 } else { number }
}

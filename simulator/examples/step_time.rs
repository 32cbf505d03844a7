//! Step times without a simulation: what a mock engine or another simulator asks for.
//!
//! `cargo run --release -p plumbline-simulator --example step_time -- BUNDLE ENGINE [MODEL]`, with a bundle's folder, the
//! name of one of its engine profiles and a shipped model (`qwen3-0.6b` unless named), prints what steps of a few batches
//! take on the bundle's GPU.

use std::{env, error::Error, path::Path, sync::Arc};

use plumbline_bundles::{Bundle, Dispatch, OutOfDomain};
use plumbline_schema::{Deployment, EngineMode, ModelSpec, Nanos, StepBatch};
use plumbline_simulator::{BundleTimes, StepTimeModel, StepTimer};

/// Prefill chunks (`tokens:context`) and decode contexts, and how long the engine had nothing to do before.
const BATCHES: [(&str, &str, Option<Nanos>); 5] = [
    ("512:0", "", None),
    ("", "512", Some(Nanos::ZERO)),
    ("", "512;800;1024;90;90;2000;77", Some(Nanos::ZERO)),
    ("256:512", "512;800;1024", Some(Nanos::ZERO)),
    ("2000:0", "", Some(Nanos(5_000_000_000))),
];

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (bundle, engine, model) = match arguments.as_slice() {
        [bundle, engine] => (bundle, engine, "qwen3-0.6b"),
        [bundle, engine, model] => (bundle, engine, model.as_str()),
        _ => return Err("expected BUNDLE ENGINE [MODEL]".into()),
    };
    let bundle = Bundle::open(Path::new(bundle))?;
    let profile = bundle.engine(engine)?;
    let predictors = Arc::new(bundle.predictors()?);
    let model = ModelSpec::load(model)?;
    let is_graph = profile.dispatch.contains_key(&Dispatch::FullGraph);
    let mode = if is_graph { EngineMode::Graph } else { EngineMode::Eager };
    let deployment = Deployment::defaults(&model, predictors.gpu(), mode)?;
    let times = BundleTimes::new(predictors, OutOfDomain::Extrapolate);
    let mut timer = StepTimeModel::new(&model, times, &profile, &deployment)?;

    println!("{} under {}, us", model.name, profile.name);
    println!("dispatch         tokens  host_pre      gpu   launch  host_post    total  measured  batch");
    for (chunks, decodes, idle) in BATCHES {
        let time = timer.time(&StepBatch::parse(chunks, decodes)?, idle)?;
        let us = |ns: f64| ns / 1e3;
        println!(
            "{:<15} {:>7} {:>9.1} {:>8.1} {:>8.1} {:>10.1} {:>8.1} {:>8.0} %  [{chunks}] [{decodes}]",
            time.parts.dispatch.name(),
            time.parts.num_tokens,
            us(time.host_pre_ns),
            us(time.gpu_ns),
            us(time.launch_ns),
            us(time.host_post_ns),
            us(time.total_ns()),
            100.0 * time.parts.provenance.shares().measured,
        );
    }
    let usage = timer.usage();
    println!("GPU time by operator over these steps:");
    for &operator in usage.operators.keys() {
        println!("{operator:<15} {:>5.1} %", 100.0 * usage.time_share(operator));
    }
    Ok(())
}

//! Engines as the command line names them: a bundle, an engine profile, a model, a deployment.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::ValueEnum;
use plumbline_bundles::{Bundle, Dispatch, EngineProfile, OutOfDomain, Predictors};
use plumbline_schema::{Deployment, EngineMode, GpuSpec, MemoryOptions, MemoryPlan, ModelSpec};
use plumbline_simulator::{
    BundleTimes,
    cluster::{Engines, Role},
    simulate::scheduler_of,
};
use plumbline_validator::suite::Overrides;

use crate::{data, exit::Exit, failure::Failure, output::Output};

/// Which engine to simulate, on which machine.
#[derive(Clone, Debug, clap::Args)]
pub struct EngineArgs {
    /// Bundle folder, or the name of a shipped bundle
    #[arg(long)]
    pub bundle: String,

    /// Engine profile: its name in the bundle, or a JSON file
    #[arg(long)]
    pub engine: String,

    /// Model: a shipped name (qwen3-0.6b, llama3-8b), or a Hugging Face config.json
    #[arg(long)]
    pub model: String,

    /// Deployment: an engine.json. Without it, what vLLM would use for the model and GPU when told nothing
    #[arg(long, value_name = "FILE")]
    pub deployment: Option<PathBuf>,

    /// Replace one key of the deployment, like `max_num_seqs=64` (can be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,

    /// Scheduler, in place of the engine profile's: vllm-v1, vllm-v0, sarathi, orca, faster-transformer, lightllm or
    /// sglang
    #[arg(long, value_name = "NAME")]
    pub scheduler: Option<String>,

    /// Predict this GPU from the bundle's by their data sheets; every time is then tagged `transferred`
    #[arg(long, value_name = "GPU")]
    pub gpu: Option<String>,

    /// What to do about shapes outside of what was measured
    #[arg(long, value_enum, default_value_t = OutOfDomainArg::Extrapolate)]
    pub out_of_domain: OutOfDomainArg,
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

/// One replica of what [`EngineArgs`] names, and what it was read from.
#[derive(Debug)]
pub struct Opened {
    /// The bundle.
    pub bundle: Bundle,
    /// The GPU that is predicted.
    pub gpu: GpuSpec,
    /// The engine.
    pub engines: Engines<BundleTimes>,
}

impl EngineArgs {
    /// Reads all of it, and plans the KV blocks where nothing says how many there are.
    ///
    /// # Errors
    /// When one of the inputs cannot be used.
    pub fn open(&self, output: Output) -> Result<Opened, Failure> {
        let model = ModelSpec::load(&self.model)?;
        let bundle = Bundle::open(&data::bundle(&self.bundle)?)?;
        let mut profile = engine(&bundle, &self.engine)?;
        if let Some(scheduler) = &self.scheduler {
            profile.scheduler.clone_from(scheduler);
            if let Err(error) = scheduler_of(&profile) {
                return Err(Failure::new(Exit::BadInput, error));
            }
        }
        let predictors = Arc::new(predictors(&bundle, self.gpu.as_deref())?);
        let gpu = predictors.gpu().clone();
        let deployment = self.deployment(&model, &gpu, &profile, output)?;
        let times = BundleTimes::new(predictors, self.out_of_domain.into());
        let engines = Engines { model, deployment, profile, times, num_replicas: 1, role: Role::Whole };
        Ok(Opened { bundle, gpu, engines })
    }

    fn deployment(
        &self,
        model: &ModelSpec,
        gpu: &GpuSpec,
        profile: &EngineProfile,
        output: Output,
    ) -> Result<Deployment, Failure> {
        let base = if let Some(path) = &self.deployment {
            Deployment::read(path)?
        } else {
            let has_graphs = profile.dispatch.keys().any(|dispatch| *dispatch != Dispatch::Eager);
            let mode = if has_graphs { EngineMode::Graph } else { EngineMode::Eager };
            Deployment::unplanned(model, mode)
        };
        let deployment = Overrides::from_assignments(&self.set)
            .and_then(|overrides| overrides.apply(&base))
            .map_err(|(key, expected, found)| {
                let text = format!("--set {key}: expected {expected}, found {found}");
                Failure::message(Exit::BadInput, text)
            })?;
        let is_set = |set: &String| set.split('=').next().is_some_and(|key| key.trim() == "num_gpu_blocks");
        plan_memory(deployment, self.deployment.is_some() || self.set.iter().any(is_set), model, gpu, output)
    }
}

/// An engine profile by file, or by its name in the bundle.
///
/// # Errors
/// When there is none.
pub fn engine(bundle: &Bundle, name_or_path: &str) -> Result<EngineProfile, Failure> {
    if data::is_file(name_or_path) {
        Ok(EngineProfile::read(Path::new(name_or_path))?)
    } else {
        Ok(bundle.engine(name_or_path)?)
    }
}

/// A bundle's predictors, carried over to another GPU where one is named.
///
/// # Errors
/// When they cannot be read, or the GPU is not known.
pub fn predictors(bundle: &Bundle, gpu: Option<&str>) -> Result<Predictors, Failure> {
    let predictors = bundle.predictors()?;
    let Some(name) = gpu.filter(|name| *name != predictors.gpu().name) else { return Ok(predictors) };
    let gpu = GpuSpec::by_name(name).ok_or_else(|| {
        let known = GpuSpec::shipped().into_iter().map(|gpu| gpu.name).collect::<Vec<_>>().join(", ");
        Failure::message(Exit::BadInput, format!("--gpu: expected one of {known}, found `{name}`"))
    })?;
    Ok(predictors.transferred_to(gpu))
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
            output.note(format!("note: KV blocks: the deployment says {blocks}, no memory plan: {error}"));
        }
    }
    Ok(deployment)
}

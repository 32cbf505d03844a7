//! A suite, run: every case simulated and compared with its real runs.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use plumbline_bundles::{
    Bundle, EngineProfile, OutOfDomain, Predictors, bundle::sha256_hex, error::BundleError,
};
use plumbline_schema::{Deployment, Environment, GpuSpec, HostInfo, InputError, ModelSpec, Run, RunKind};
use plumbline_simulator::{
    BundleTimes, Coverage, OperatorTimes, Residuals, SimulateError, SimulateOptions,
    replay::{ReplayError, served_workload},
    simulate_with,
    step_time::{StepTime, StepTimeModel},
};
use rayon::prelude::*;
use thiserror::Error;

use crate::{
    calibrate::{CalibrateError, FitRun, host_factor},
    compare::{CompareError, compare_requests},
    evidence::Evidence,
    explain::{Basis, explain},
    results::{CaseResult, SuiteResult},
    settings::simulated_environment,
    suite::{Case, EngineRef, KeyError, Role, Suite},
};

/// How to simulate the cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValidateOptions {
    /// Seed of every case's first simulation; the next ones count up from it.
    pub seed: u64,
    /// Simulations of a case, at least 1: a simulated statistic is the median over them.
    pub simulations: u32,
    /// Whether steps scatter.
    pub residuals: Residuals,
    /// What to do about operator shapes that the bundle did not measure.
    pub out_of_domain: OutOfDomain,
    /// Whether each case's error is split by cause, which takes longer than simulating it.
    pub explains: bool,
}

impl Default for ValidateOptions {
    /// Nine simulations from seed 0, steps scatter, shapes beyond the measured ones are extrapolated and show in the coverage.
    fn default() -> Self {
        Self {
            seed: 0,
            simulations: 9,
            residuals: Residuals::Drawn,
            out_of_domain: OutOfDomain::Extrapolate,
            explains: false,
        }
    }
}

/// Why a case cannot be judged.
#[derive(Debug, Error)]
pub enum CaseError {
    /// A real run, model or engine profile cannot be read.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A real run's workload is not its own.
    #[error(transparent)]
    Workload(#[from] ReplayError),
    /// The bundle cannot be used; it may serve several cases, so its error is text.
    #[error("{0}")]
    Bundle(String),
    /// The host's speed cannot be told.
    #[error(transparent)]
    Host(#[from] CalibrateError),
    /// The engine profile is not in the bundle.
    #[error(transparent)]
    Engine(#[from] BundleError),
    /// A real run does not say how the engine was set.
    #[error(
        "{}: expected a deployment in run.json, or an engine.json in the run's folder or its parent, found none",
        run.display()
    )]
    NoDeployment {
        /// The run's folder.
        run: PathBuf,
    },
    /// The suite's overrides and the run's deployment make no deployment.
    #[error("deployment.{key}: expected {expected}, found {found}")]
    Deployment {
        /// The key.
        key: String,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The simulation failed.
    #[error(transparent)]
    Simulate(#[from] SimulateError),
    /// The runs are not of the same requests.
    #[error(transparent)]
    Compare(#[from] CompareError),
}

impl From<KeyError> for CaseError {
    fn from((key, expected, found): KeyError) -> Self {
        Self::Deployment { key, expected, found }
    }
}

/// Runs every case of a suite; `on_done` hears of each as it ends.
///
/// A case that cannot be judged is reported as failed, and the others go on.
#[must_use]
pub fn validate(
    suite: &Suite,
    options: &ValidateOptions,
    on_done: &(dyn Fn(&CaseResult) + Sync),
) -> SuiteResult {
    let start = Instant::now();
    let machines = Machines::load(&suite.cases);
    let base = suite.path.parent().unwrap_or(Path::new(""));
    let cases = suite
        .cases
        .par_iter()
        .map(|case| {
            let mut result = run_case(case, &machines, options)
                .unwrap_or_else(|error| CaseResult::failed(&case.name, case.role, error.to_string()));
            result.evidence = result.evidence.map(|evidence| evidence.below(base));
            on_done(&result);
            result
        })
        .collect();
    SuiteResult::new(cases, start.elapsed().as_secs_f64() * 1e3)
}

/// A bundle opened once for all the cases that predict the same GPU from it.
struct Machine {
    bundle: Bundle,
    predictors: Arc<Predictors>,
}

/// Bundle folder, and the GPU to carry its times over to.
type MachineKey = (PathBuf, Option<String>);

struct Machines(HashMap<MachineKey, Result<Machine, String>>);

impl Machines {
    fn load(cases: &[Case]) -> Self {
        let wanted: BTreeMap<MachineKey, &Case> =
            cases.iter().map(|case| (machine_key(case), case)).collect();
        let load = |case: &Case| -> Result<Machine, BundleError> {
            let bundle = Bundle::open(&case.bundle)?;
            let predictors = bundle.predictors()?;
            let predictors = match &case.gpu {
                Some(gpu) if gpu.name != predictors.gpu().name => predictors.transferred_to(gpu.clone()),
                _ => predictors,
            };
            Ok(Machine { bundle, predictors: Arc::new(predictors) })
        };
        let loaded = wanted.into_par_iter().map(|(key, case)| (key, load(case).map_err(|e| e.to_string())));
        Self(loaded.collect())
    }

    fn of(&self, case: &Case) -> Result<&Machine, CaseError> {
        match self.0.get(&machine_key(case)) {
            Some(Ok(machine)) => Ok(machine),
            Some(Err(text)) => Err(CaseError::Bundle(text.clone())),
            None => Err(CaseError::Bundle(format!("{}: not loaded", case.bundle.display()))),
        }
    }
}

fn machine_key(case: &Case) -> MachineKey {
    (case.bundle.clone(), case.gpu.as_ref().map(|gpu| gpu.name.clone()))
}

fn run_case(case: &Case, machines: &Machines, options: &ValidateOptions) -> Result<CaseResult, CaseError> {
    let machine = machines.of(case)?;
    let mut profile = match &case.engine {
        EngineRef::InBundle(name) => machine.bundle.engine(name)?,
        EngineRef::File(path) => EngineProfile::read(path)?,
    };
    let model = ModelSpec::load(&case.model)?;
    let times = BundleTimes::new(Arc::clone(&machine.predictors), options.out_of_domain);
    let mut notes = Vec::new();
    let fitted_with = &profile.fitted_on.predictors_digest;
    if !fitted_with.is_empty() && *fitted_with != machine.bundle.predictors_digest() {
        notes.push(format!("`{}` was calibrated with other predictors than the bundle's", profile.name));
    }
    if !case.host_runs.is_empty() {
        let runs = case.host_runs.iter().map(|folder| FitRun::read(folder, Some(&model)));
        let runs = runs.collect::<Result<Vec<_>, _>>()?;
        let host = host_factor(&runs, &times, &profile)?;
        profile.host_factor = host.factor;
        let names: Vec<_> = runs.iter().map(|run| run.name.as_str()).collect();
        let (factor, steps, names) = (host.factor, host.num_steps, names.join(", "));
        notes.push(format!("host factor {factor:.2}, from {steps} steps of {names}"));
    }
    let gpu = machine.predictors.gpu();
    let prediction = Prediction {
        model: &model,
        environment: simulated_environment(&model, &profile, &machine.bundle, &gpu.name),
        profile: &profile,
        gpu,
        bundle_digest: machine.bundle.digest(),
        times,
    };
    let mut result = judge(case, &read_runs(&case.real)?, prediction, options)?;
    result.notes.extend(notes);
    Ok(result)
}

fn read_runs(folders: &[PathBuf]) -> Result<Vec<Run>, InputError> {
    folders.iter().map(|folder| Run::read(folder)).collect()
}

/// What a case's simulation is made from, besides its workload and deployment.
struct Prediction<'a, T> {
    model: &'a ModelSpec,
    environment: Environment,
    profile: &'a EngineProfile,
    gpu: &'a GpuSpec,
    bundle_digest: &'a str,
    times: T,
}

fn judge<T: OperatorTimes>(
    case: &Case,
    real: &[Run],
    prediction: Prediction<'_, T>,
    options: &ValidateOptions,
) -> Result<CaseResult, CaseError> {
    let (Some(first), Some(folder)) = (real.first(), case.real.first()) else {
        return Err(CompareError::NoRealRun.into());
    };
    let recorded = first.info.deployment.as_ref();
    let recorded = recorded.ok_or_else(|| CaseError::NoDeployment { run: folder.clone() })?;
    let deployment = case.deployment.apply(recorded)?;
    let workload = served_workload(first, folder)?;
    let Prediction { model, environment, profile, gpu, bundle_digest, times } = prediction;
    let simulate_options = SimulateOptions {
        seed: options.seed,
        residuals: options.residuals,
        gpu: Some(gpu.name.clone()),
        workload_digest: Some(sha256_hex(workload.canonical_text().as_bytes())),
        bundle_digest: Some(bundle_digest.to_owned()),
    };
    let start = Instant::now();
    let mut step_time =
        StepTimeModel::new(model, &times, profile, &deployment).map_err(SimulateError::StepTime)?;
    let mut simulations = Vec::new();
    // Without scatter every seed gives the same run.
    let count = if options.residuals == Residuals::None { 1 } else { u64::from(options.simulations.max(1)) };
    for seed in options.seed..options.seed.saturating_add(count) {
        let simulate_options = SimulateOptions { seed, ..simulate_options.clone() };
        simulations.push(simulate_with(&mut step_time, &workload, &simulate_options)?);
    }
    let simulate_ms = start.elapsed().as_secs_f64() * 1e3 / simulations.len() as f64;

    let (mut runs, simulations): (Vec<_>, Vec<_>) =
        simulations.into_iter().map(|s| (s.run, (s.step_times, s.coverage, s.rejections))).unzip();
    let comparison = compare_requests(real, &runs, case.requests.as_ref())?;
    let (Some(run), Some((step_times, shares, rejections))) = (runs.first_mut(), simulations.first()) else {
        return Err(CompareError::NoSimulatedRun.into());
    };
    run.info.environment = Some(environment);
    let mut result = CaseResult::compared(&case.name, case.role, comparison).with_runs(real, run);
    let evidence = Evidence {
        real_runs: case.real.iter().map(|folder| folder.display().to_string()).collect(),
        bundle: case.bundle.file_name().map(|name| name.to_string_lossy().into_owned()),
        bundle_digest: Some(bundle_digest.to_owned()),
        gpu: Some(gpu.name.clone()),
        num_simulations: count as u32,
        seed: Some(options.seed),
        ..Evidence::default()
    };
    result.evidence = Some(evidence.with_profile(profile));
    if options.explains {
        match explain(first, run, &workload, &Basis { model, times: &times, profile }) {
            Ok(explanation) => result.waterfall = explanation.figure(),
            Err(error) => result.notes.push(format!("not explained: {error}")),
        }
    }
    result.simulate_ms = Some(simulate_ms);
    result.host_share = host_share(step_times);
    result.coverage = coverage(shares);
    result.notes.extend(notes(case, real, recorded, profile, gpu));
    if let Some((id, reason)) = rejections.first() {
        let count = rejections.len();
        result.notes.push(format!("the simulated engine rejected {count} requests, first {id}: {reason}"));
    }
    Ok(result)
}

/// Share of the steps' time that the host takes on the critical path: preparing, launching, reading back.
fn host_share(steps: &[StepTime]) -> Option<f64> {
    let total: f64 = steps.iter().map(StepTime::predicted_ns).sum();
    let host: f64 = steps.iter().map(StepTime::host_critical_ns).sum();
    (total > 0.0).then(|| host / total)
}

fn coverage(shares: &Coverage) -> BTreeMap<String, f64> {
    let Coverage { measured, interpolated, extrapolated, transferred, roofline } = *shares;
    [
        ("measured", measured),
        ("interpolated", interpolated),
        ("extrapolated", extrapolated),
        ("transferred", transferred),
        ("roofline", roofline),
    ]
    .map(|(name, share)| (name.to_owned(), share))
    .into()
}

/// What makes the comparison less than like with like.
fn notes(
    case: &Case,
    real: &[Run],
    recorded: &Deployment,
    profile: &EngineProfile,
    gpu: &GpuSpec,
) -> Vec<String> {
    let mut notes = Vec::new();
    for (i, run) in real.iter().enumerate() {
        let number = i + 1;
        if run.info.kind == RunKind::Simulated {
            notes.push(format!("real run {number} is itself simulated"));
        }
        if let Some(of) = run.info.gpu.as_ref().filter(|of| **of != gpu.name) {
            notes.push(format!("real run {number} is of {of}, the prediction of {}", gpu.name));
        }
        match &run.info.deployment {
            Some(deployment) => {
                let keys = differing_keys(recorded, deployment);
                if !keys.is_empty() {
                    notes.push(format!("real run {number} was deployed with another {}", keys.join(", ")));
                }
            }
            None => notes.push(format!("real run {number} does not say how it was deployed")),
        }
    }
    notes.extend(staleness(profile, real));
    if case.role == Role::HeldOut {
        let is_fitted_on = |folder: &&PathBuf| profile.fitted_on.runs.iter().any(|run| names(folder, run));
        for folder in case.real.iter().filter(is_fitted_on) {
            notes.push(format!("held out, yet `{}` was fitted on {}", profile.name, folder.display()));
        }
        for folder in case.real.iter().filter(|folder| case.host_runs.contains(folder)) {
            notes.push(format!("held out, yet the host's speed is taken from {}", folder.display()));
        }
    }
    notes
}

/// What the profile was fitted under that is no longer so: its costs may not hold for these runs.
fn staleness(profile: &EngineProfile, real: &[Run]) -> Vec<String> {
    let fitted = &profile.fitted_on;
    let mut notes = Vec::new();
    for (i, run) in real.iter().enumerate() {
        let environment = run.info.environment.as_ref();
        let cpu = |host: Option<&HostInfo>| host.and_then(|host| host.cpu_model.clone());
        let parts = [
            ("engine", fitted.engine_version.clone(), environment.and_then(|e| e.engine_version.clone())),
            ("driver", fitted.driver_version.clone(), environment.and_then(|e| e.driver_version.clone())),
            ("CPU", cpu(fitted.host.as_ref()), cpu(run.info.host.as_ref())),
        ];
        for (what, then, now) in parts {
            if let (Some(then), Some(now)) = (then, now)
                && then != now
            {
                notes.push(format!(
                    "`{}` was fitted with the {what} {then}, real run {} has {now}: calibrate anew",
                    profile.name,
                    i + 1
                ));
            }
        }
    }
    notes
}

/// Whether the name of a run fitted on is the end of a run folder's path, by whole parts.
fn names(folder: &Path, run: &str) -> bool {
    !run.is_empty() && folder.ends_with(run)
}

fn differing_keys(a: &Deployment, b: &Deployment) -> Vec<String> {
    let (Ok(serde_json::Value::Object(a)), Ok(serde_json::Value::Object(b))) =
        (serde_json::to_value(a), serde_json::to_value(b))
    else {
        return Vec::new();
    };
    a.into_iter().filter(|(key, value)| b.get(key) != Some(value)).map(|(key, _)| key).collect()
}

#[cfg(test)]
mod tests;

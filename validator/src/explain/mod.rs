//! Why a simulation differs from a real run: the difference of the mean request times, split by cause.
//!
//! A request's time is the steps that run while it waits, and what lies between them. So the mean time of a run is a sum over
//! its steps (`exposure`), and each step's time a sum of the GPU's and the host's part (`split`). The real run's own
//! steps are timed once as they were and once as the simulation would have timed them; what the two sums differ by is the
//! operators' and the host's doing. What the simulation spends between steps beside the real run is the client's. Where the
//! two deployments differ, the difference between two simulations, one with each, is theirs. What then is left comes from
//! other batches: the scheduler's doing, or a consequence of the other causes. The parts add up to the whole by
//! construction.

mod exposure;
mod split;

use std::{collections::BTreeMap, fmt};

use plumbline_bundles::EngineProfile;
use plumbline_schema::{Deployment, ModelSpec, Operator, RequestStatus, Run, Workload};
use plumbline_simulator::{
    Residuals, SimulateOptions, simulate,
    step_time::{StepTimeError, StepTimeModel},
    times::OperatorTimes,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::{
    exposure::{Interval, exposure},
    split::{Expectations, Factors, factors, gpu_parts},
};
use crate::{
    calibrate::observe::{ObservedStep, Source, observed_steps},
    report,
};

/// Why a simulation's time differs from the real one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The GPU's operators take another time in the same steps.
    Operators,
    /// The host takes another time to prepare, launch and finish the same steps.
    Host,
    /// Another time passes between steps and until a request is taken in: the client's and the arrivals' boundary.
    Client,
    /// Another number of KV blocks.
    KvCapacity,
    /// Other settings of the deployment.
    Settings,
    /// Other batches, or another wait for them: of the scheduler, or a consequence of steps of another length.
    Scheduling,
}

impl Cause {
    /// Every cause, in the order of a waterfall.
    pub const ALL: [Self; 6] =
        [Self::Operators, Self::Host, Self::Client, Self::KvCapacity, Self::Settings, Self::Scheduling];

    /// As people read it.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Operators => "operator time",
            Self::Host => "launch and host time",
            Self::Client => "between steps, client",
            Self::KvCapacity => "KV capacity",
            Self::Settings => "other settings",
            Self::Scheduling => "other batches and waits",
        }
    }
}

/// Which of a request's times is explained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stretch {
    /// From its scheduled arrival to its first token: TTFT.
    Ttft,
    /// From its first token to its last.
    Decode,
    /// Both: E2E.
    E2e,
}

impl Stretch {
    /// The two parts and the whole.
    pub const ALL: [Self; 3] = [Self::Ttft, Self::Decode, Self::E2e];
}

impl fmt::Display for Stretch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ttft => "ttft",
            Self::Decode => "decode",
            Self::E2e => "e2e",
        })
    }
}

/// What one cause adds to the simulated time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// The cause.
    pub cause: Cause,
    /// Signed: negative where the simulation takes less than the real run.
    pub ms: f64,
    /// Of the whole difference, in percent; `None` where there is none.
    pub share_pct: Option<f64>,
}

/// From the real mean to the simulated one: `real_ms` and all parts add up to `sim_ms`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Waterfall {
    /// What is explained.
    pub stretch: Stretch,
    /// Mean over the requests, ms.
    pub real_ms: f64,
    /// Mean over the requests, ms.
    pub sim_ms: f64,
    /// One a cause, in the order of [`Cause::ALL`].
    pub parts: Vec<Part>,
}

/// What one operator adds to the simulated mean E2E.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperatorPart {
    /// The operator.
    pub operator: Operator,
    /// Signed, ms a request.
    pub ms: f64,
    /// Real time over what bundle and profile say; 1 where the steps do not tell it from others.
    pub real_factor: f64,
    /// The same of the simulated run.
    pub sim_factor: f64,
}

/// What one real step adds to the simulated mean E2E.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepPart {
    /// Its number in the real run, from 0.
    pub step: usize,
    /// When it began, ms.
    pub start_ms: f64,
    /// Prompt chunks and decodes in it.
    pub num_prefill_chunks: u32,
    /// See above.
    pub num_decodes: u32,
    /// Tokens computed.
    pub num_tokens: u32,
    /// How long it took, ms.
    pub real_ms: f64,
    /// How long it takes by the simulation, ms.
    pub sim_ms: f64,
    /// Signed, ms a request: the difference times the share of requests that waited for it.
    pub ms: f64,
}

/// Why a simulation differs from a real run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// Requests that are ok in both runs; means are over them.
    pub num_requests: usize,
    /// TTFT, decode and E2E: a total never hides parts of opposite sign.
    pub waterfalls: Vec<Waterfall>,
    /// The operators that cost most, most first.
    pub operators: Vec<OperatorPart>,
    /// The steps that cost most, most first.
    pub steps: Vec<StepPart>,
    /// Share of the real steps' time that is the host's, 0..=1.
    pub real_host_share: f64,
    /// The same of the simulated steps.
    pub sim_host_share: f64,
    /// What a reader should know before trusting a number.
    pub notes: Vec<String>,
}

impl Explanation {
    /// The waterfall of E2E, to be drawn.
    #[must_use]
    pub fn figure(&self) -> Option<report::Waterfall> {
        let whole = self.waterfalls.iter().find(|waterfall| waterfall.stretch == Stretch::E2e)?;
        Some(report::Waterfall {
            title: "Mean E2E".to_owned(),
            start: ("real".to_owned(), whole.real_ms),
            parts: whole.parts.iter().map(|part| (part.cause.title().to_owned(), part.ms)).collect(),
            end: ("simulated".to_owned(), whole.sim_ms),
        })
    }
}

/// How many operators and steps are named.
const NAMED: usize = 3;

/// Why a pair cannot be explained.
#[derive(Debug, Error)]
pub enum ExplainError {
    /// A run's steps are not known.
    #[error("the {run} run: {reason}")]
    NoSteps {
        /// `real` or `simulated`.
        run: &'static str,
        /// Why.
        reason: String,
    },
    /// A run's steps overlap.
    #[error(
        "the {run} run: expected steps one after the other, found step {step} begun before the last one ended: \
         asynchronous scheduling and pipelines are not explained"
    )]
    StepsOverlap {
        /// `real` or `simulated`.
        run: &'static str,
        /// The first such step.
        step: usize,
    },
    /// Neither run says how its engine was set.
    #[error(
        "expected a deployment in the real run's run.json, or an engine.json beside or above it, found none"
    )]
    NoDeployment,
    /// No request can be compared.
    #[error("expected requests that are ok in both runs, found none")]
    NoRequests,
    /// Bundle or profile do not know a step.
    #[error("the {run} run: {source}")]
    StepTime {
        /// `real` or `simulated`.
        run: &'static str,
        /// What is missing.
        source: StepTimeError,
    },
    /// A simulation that tells what the deployments' difference does failed.
    #[error("simulating with the real run's deployment: {0}")]
    Simulate(String),
}

/// What is known of the engine: the model of step times by which parts are told apart.
#[derive(Debug)]
pub struct Basis<'a, T> {
    /// The model served.
    pub model: &'a ModelSpec,
    /// Operator times.
    pub times: T,
    /// The engine's costs; best the ones that the simulation used.
    pub profile: &'a EngineProfile,
}

/// A run's steps and what the basis says of them.
struct Side {
    steps: Vec<ObservedStep>,
    expected: Expectations,
    factors: Factors,
    gpu_ns: Vec<f64>,
}

impl Side {
    fn new<T: OperatorTimes>(
        run: &Run,
        label: &'static str,
        deployment: &Deployment,
        basis: &Basis<'_, T>,
    ) -> Result<Self, ExplainError> {
        let (source, steps) = observed_steps(run, basis.profile)
            .map_err(|reason| ExplainError::NoSteps { run: label, reason })?;
        if source == Source::Steps {
            let overlaps = |pair: &[ObservedStep]| pair[0].start_ns + pair[0].time_ns > pair[1].start_ns;
            if let Some(step) = steps.windows(2).position(overlaps) {
                return Err(ExplainError::StepsOverlap { run: label, step: step + 1 });
            }
        }
        let steps: Vec<_> = steps.into_iter().filter(|step| !step.batch.is_empty()).collect();
        let wrap = |source| ExplainError::StepTime { run: label, source };
        let mut model =
            StepTimeModel::new(basis.model, &basis.times, basis.profile, deployment).map_err(wrap)?;
        let expected = Expectations::new(&mut model, &steps).map_err(wrap)?;
        let factors = factors(&expected, &steps);
        let gpu_ns = gpu_parts(&expected, &factors, &steps);
        Ok(Self { steps, expected, factors, gpu_ns })
    }

    fn intervals(&self) -> Vec<Interval> {
        self.steps.iter().map(|step| (step.start_ns, step.start_ns + step.time_ns)).collect()
    }

    fn host_share(&self) -> f64 {
        let total: f64 = self.steps.iter().map(|step| step.time_ns).sum();
        1.0 - self.gpu_ns.iter().sum::<f64>() / total.max(1.0)
    }

    /// This side's factors in the order of another's operators; 1 for one that it does not have.
    fn factors_for(&self, other: &Expectations) -> Factors {
        let own: BTreeMap<_, _> = self.expected.operators.iter().zip(&self.factors.operators).collect();
        let operators = other.operators.iter().map(|o| own.get(o).map_or(1.0, |factor| **factor)).collect();
        Factors { operators, host: self.factors.host }
    }
}

/// Splits the difference between a simulated and a real run of one workload by cause.
///
/// `workload` is what the real run served. Means are over the requests that are ok in both runs.
///
/// # Errors
/// When the runs share no request, do not say what their steps were, or the basis does not know them.
pub fn explain<T: OperatorTimes>(
    real: &Run,
    sim: &Run,
    workload: &Workload,
    basis: &Basis<'_, T>,
) -> Result<Explanation, ExplainError> {
    let real_deployment = real.info.deployment.as_ref().ok_or(ExplainError::NoDeployment)?;
    let sim_deployment = sim.info.deployment.as_ref().unwrap_or(real_deployment);
    let requests = Requests::new(real, sim)?;
    let real_side = Side::new(real, "real", real_deployment, basis)?;
    let sim_side = Side::new(sim, "simulated", sim_deployment, basis)?;
    let as_simulated = sim_side.factors_for(&real_side.expected);
    let deployments = Deployments::new(real_deployment, sim_deployment, workload, basis, &requests)?;
    let waterfalls = Stretch::ALL
        .into_iter()
        .map(|stretch| waterfall(stretch, &requests, &real_side, &sim_side, &as_simulated, &deployments))
        .collect();
    let (shares, _) = exposure(&real_side.intervals(), &requests.real(Stretch::E2e));
    Ok(Explanation {
        num_requests: requests.pairs.len(),
        waterfalls,
        operators: costliest_operators(&real_side, &as_simulated, &shares),
        steps: costliest_steps(&real_side, &as_simulated, &shares),
        real_host_share: real_side.host_share(),
        sim_host_share: sim_side.host_share(),
        notes: notes(real, sim),
    })
}

fn waterfall(
    stretch: Stretch,
    requests: &Requests,
    real: &Side,
    sim: &Side,
    as_simulated: &Factors,
    deployments: &Deployments,
) -> Waterfall {
    let mean_ns =
        |all: &[Interval]| all.iter().map(|(from, to)| to - from).sum::<f64>() / all.len().max(1) as f64;
    let (real_requests, sim_requests) = (requests.real(stretch), requests.sim(stretch));
    let (shares, real_between) = exposure(&real.intervals(), &real_requests);
    let (_, sim_between) = exposure(&sim.intervals(), &sim_requests);
    let (mut operators, mut host) = (0.0, 0.0);
    for (i, share) in shares.iter().enumerate() {
        let step = &real.expected.steps[i];
        let gpu = step.gpu_ns(as_simulated);
        let real_gpu = real.gpu_ns[i];
        operators += share * (gpu - real_gpu);
        host += share * (step.step_ns(as_simulated) - gpu - (real.steps[i].time_ns - real_gpu));
    }
    let (real_ns, sim_ns) = (mean_ns(&real_requests), mean_ns(&sim_requests));
    let client = sim_between - real_between;
    let (kv_capacity, settings) = deployments.of(stretch);
    let whole = sim_ns - real_ns;
    let scheduling = whole - operators - host - client - kv_capacity - settings;
    let parts = [operators, host, client, kv_capacity, settings, scheduling];
    let part = |(cause, ns): (Cause, f64)| Part {
        cause,
        ms: ns / 1e6,
        share_pct: (whole != 0.0).then(|| 100.0 * ns / whole),
    };
    Waterfall {
        stretch,
        real_ms: real_ns / 1e6,
        sim_ms: sim_ns / 1e6,
        parts: Cause::ALL.into_iter().zip(parts).map(part).collect(),
    }
}

fn costliest_operators(real: &Side, as_simulated: &Factors, shares: &[f64]) -> Vec<OperatorPart> {
    let mut parts: Vec<_> = real
        .expected
        .operators
        .iter()
        .enumerate()
        .map(|(k, &operator)| {
            let steps = real.expected.steps.iter().zip(shares);
            let exposed: f64 = steps.map(|(step, share)| share * step.operators_ns[k]).sum();
            let (real_factor, sim_factor) = (real.factors.operators[k], as_simulated.operators[k]);
            OperatorPart { operator, ms: exposed * (sim_factor - real_factor) / 1e6, real_factor, sim_factor }
        })
        .collect();
    parts.sort_by(|a, b| b.ms.abs().total_cmp(&a.ms.abs()));
    parts.truncate(NAMED);
    parts
}

fn costliest_steps(real: &Side, as_simulated: &Factors, shares: &[f64]) -> Vec<StepPart> {
    let part = |i: usize| {
        let (step, shape) = (&real.steps[i], real.steps[i].batch.shape());
        let sim_ns = real.expected.steps[i].step_ns(as_simulated);
        StepPart {
            step: i,
            start_ms: step.start_ns / 1e6,
            num_prefill_chunks: shape.attention.num_prefill_seqs,
            num_decodes: shape.attention.num_decode_seqs,
            num_tokens: shape.num_tokens,
            real_ms: step.time_ns / 1e6,
            sim_ms: sim_ns / 1e6,
            ms: shares[i] * (sim_ns - step.time_ns) / 1e6,
        }
    };
    let mut parts: Vec<_> = (0..real.steps.len()).map(part).collect();
    parts.sort_by(|a, b| b.ms.abs().total_cmp(&a.ms.abs()));
    parts.truncate(NAMED);
    parts
}

fn notes(real: &Run, sim: &Run) -> Vec<String> {
    let mut notes = Vec::new();
    for (label, run) in [("real", real), ("simulated", sim)] {
        if run.steps.is_empty() {
            let from = if run.tokens.is_empty() { "request" } else { "token" };
            notes.push(format!(
                "the {label} run records no steps: they are taken from its {from} times, which holds where no two requests \
                 overlap, and includes what passes between steps"
            ));
        } else if label == "real" && run.steps.iter().any(|step| step.phases.is_none()) {
            notes.push(
                "the real run does not record its host's phases: its GPU and host are told apart by how its steps go with \
                 their shapes"
                    .to_owned(),
            );
        }
    }
    notes
}

/// Arrival, first token and completion of each compared request, ns.
struct Requests {
    /// Real and simulated.
    pairs: Vec<[[f64; 3]; 2]>,
    ids: Vec<u64>,
}

fn times(run: &Run) -> BTreeMap<u64, [f64; 3]> {
    run.requests
        .iter()
        .filter(|r| r.status == RequestStatus::Ok)
        .filter_map(|r| {
            let times = [r.arrival_time_ns, r.first_token_time_ns?, r.completion_time_ns?];
            Some((r.request_id, times.map(|t| t.0 as f64)))
        })
        .collect()
}

impl Requests {
    fn new(real: &Run, sim: &Run) -> Result<Self, ExplainError> {
        let sims = times(sim);
        let both: Vec<_> =
            times(real).into_iter().filter_map(|(id, real)| Some((id, [real, *sims.get(&id)?]))).collect();
        if both.is_empty() {
            return Err(ExplainError::NoRequests);
        }
        let (ids, pairs) = both.into_iter().unzip();
        Ok(Self { pairs, ids })
    }

    fn real(&self, stretch: Stretch) -> Vec<Interval> {
        self.pairs.iter().map(|pair| interval(&pair[0], stretch)).collect()
    }

    fn sim(&self, stretch: Stretch) -> Vec<Interval> {
        self.pairs.iter().map(|pair| interval(&pair[1], stretch)).collect()
    }

    /// Mean of the stretch over these requests in another run, ns; 0 where it served none of them.
    fn mean_ns(&self, run: &Run, stretch: Stretch) -> f64 {
        let times = times(run);
        let lengths: Vec<f64> = self
            .ids
            .iter()
            .filter_map(|id| times.get(id))
            .map(|times| {
                let (from, to) = interval(times, stretch);
                to - from
            })
            .collect();
        lengths.iter().sum::<f64>() / lengths.len().max(1) as f64
    }
}

fn interval([arrival, first, completion]: &[f64; 3], stretch: Stretch) -> Interval {
    match stretch {
        Stretch::Ttft => (*arrival, *first),
        Stretch::Decode => (*first, *completion),
        Stretch::E2e => (*arrival, *completion),
    }
}

/// What the deployments' difference does, by simulations that differ in nothing else: ns by stretch, of the KV blocks
/// and of all other settings.
struct Deployments(BTreeMap<Stretch, (f64, f64)>);

impl Deployments {
    fn new<T: OperatorTimes>(
        real: &Deployment,
        sim: &Deployment,
        workload: &Workload,
        basis: &Basis<'_, T>,
        requests: &Requests,
    ) -> Result<Self, ExplainError> {
        // The real run's model may have another name for the same thing.
        let real = Deployment { model: sim.model.clone(), ..real.clone() };
        if real == *sim {
            return Ok(Self(BTreeMap::new()));
        }
        let options = SimulateOptions { residuals: Residuals::None, ..SimulateOptions::default() };
        let run = |deployment: &Deployment| {
            simulate(basis.model, workload, deployment, basis.profile, &basis.times, &options)
                .map(|simulation| simulation.run)
                .map_err(|error| ExplainError::Simulate(error.to_string()))
        };
        let as_simulated = run(sim)?;
        let with_blocks = run(&Deployment { num_gpu_blocks: real.num_gpu_blocks, ..sim.clone() })?;
        let as_real = run(&real)?;
        let of = |stretch| {
            let [a, b, c] = [&as_simulated, &with_blocks, &as_real].map(|run| requests.mean_ns(run, stretch));
            (stretch, (a - b, b - c))
        };
        Ok(Self(Stretch::ALL.into_iter().map(of).collect()))
    }

    fn of(&self, stretch: Stretch) -> (f64, f64) {
        self.0.get(&stretch).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;

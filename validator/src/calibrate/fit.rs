//! From observations to the numbers of an engine profile.

use std::collections::BTreeMap;

use plumbline_bundles::{
    Dispatch, DispatchCosts, HostCost,
    engine_profile::{ClientCosts, OperatorScales},
    stats::percentile_of_sorted,
};
use plumbline_schema::BatchShape;

use super::{
    observe::ObservedGap,
    solve::{Parameter, Row, Solution, solve},
};

/// GPU time of a step by the classes that have a scale of their own, ns, unscaled.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ClassTimes {
    /// Matrix products.
    pub gemm: f64,
    /// Attention of steps with a prefill chunk.
    pub prefill_attention: f64,
    /// Attention of decode-only steps.
    pub decode_attention: f64,
    /// Everything else.
    pub other: f64,
}

/// One observed step with what the bundle says about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Observation {
    /// Index of its run: runs count alike, however long.
    pub run: usize,
    /// How the engine dispatched it.
    pub dispatch: Dispatch,
    /// Its unpadded shape.
    pub batch: BatchShape,
    /// Predicted operator times.
    pub gpu: ClassTimes,
    /// Launches under its dispatch.
    pub num_launches: u32,
    /// First after an idle gap.
    pub after_idle: bool,
    /// Measured, ns.
    pub time_ns: f64,
}

/// A fitted host part.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// Costs by dispatch.
    pub dispatch: BTreeMap<Dispatch, DispatchCosts>,
    /// Factors on operator times.
    pub scales: OperatorScales,
    /// Parameters the data could not pin.
    pub not_identified: Vec<String>,
    /// Median absolute relative error of the steps fitted on, by dispatch.
    pub step_error: BTreeMap<Dispatch, f64>,
    /// Share of the steps left out because the host was disturbed, 0..1.
    pub disturbed_share: f64,
}

/// A run's steps of one dispatch repeat each other; more than this many say nothing new.
const MOST_INDEPENDENT_STEPS: f64 = 50.0;
/// Which of the two parts of a step is longer depends on the parameters, so the fit is repeated.
const ROUNDS: usize = 8;
/// A parameter whose prior is left this wide was not pinned by the data.
const NOT_PINNED: f64 = 0.7;
const PER_DISPATCH: usize = 5;
const RESIDUAL_QUANTILES: usize = 101;
/// Steps around a step that tell whether its host was disturbed.
const DISTURBANCE_STEPS: usize = 15;
/// Median of real over predicted time from which a stretch is a disturbance.
const DISTURBED: f64 = 1.2;
const DISTURBANCE_ROUNDS: usize = 4;

/// Fits costs by dispatch and operator scales.
///
/// `prior` gives starting values; a dispatch that no observation has keeps its prior costs.
#[must_use]
pub fn fit(
    observations: &[Observation],
    prior: &BTreeMap<Dispatch, DispatchCosts>,
    prior_scales: &OperatorScales,
) -> Fit {
    let dispatches: Vec<Dispatch> =
        Dispatch::ALL.into_iter().filter(|d| observations.iter().any(|o| o.dispatch == *d)).collect();
    let mut kept: Vec<&Observation> = observations.iter().collect();
    let mut problem = Problem::new(&kept, &dispatches, prior, prior_scales);
    let mut solution = problem.best(&kept);
    for _ in 0..DISTURBANCE_ROUNDS {
        let calm = problem.calm(observations, &solution);
        if calm.len() == kept.len() {
            break;
        }
        kept = calm;
        problem = Problem::new(&kept, &dispatches, prior, prior_scales);
        solution = problem.best(&kept);
    }
    let mut fit = problem.assemble(&kept, &solution, prior);
    fit.disturbed_share = 1.0 - kept.len() as f64 / observations.len().max(1) as f64;
    fit
}

/// A step-time fit over given observations.
struct Problem<'a> {
    dispatches: &'a [Dispatch],
    parameters: Vec<Parameter>,
    weights: Vec<f64>,
}

impl<'a> Problem<'a> {
    fn new(
        observations: &[&Observation],
        dispatches: &'a [Dispatch],
        prior: &BTreeMap<Dispatch, DispatchCosts>,
        prior_scales: &OperatorScales,
    ) -> Self {
        Self {
            dispatches,
            parameters: parameters(dispatches, observations, prior, prior_scales),
            weights: weights(observations),
        }
    }

    /// The better of two fits: one that starts where the GPU is the longer part of a step, one where launching is.
    fn best(&self, observations: &[&Observation]) -> Solution {
        let from_prior: Vec<f64> = self.parameters.iter().map(|q| q.prior).collect();
        let launching: Vec<f64> = self
            .parameters
            .iter()
            .map(|q| if q.name.ends_with("launch_ns") { q.max } else { q.prior })
            .collect();
        let (a, b) = (self.from(observations, &from_prior), self.from(observations, &launching));
        if b.objective < a.objective { b } else { a }
    }

    fn from(&self, observations: &[&Observation], start: &[f64]) -> Solution {
        let mut theta = start.to_vec();
        let mut best: Option<Solution> = None;
        for _ in 0..ROUNDS {
            let rows: Vec<Row> = observations
                .iter()
                .zip(&self.weights)
                .map(|(o, &weight)| Row { x: factors(o, self.dispatches, &theta), y: o.time_ns, weight })
                .collect();
            let solution = solve(&self.parameters, &rows, &theta);
            theta.clone_from(&solution.theta);
            best = Some(solution);
        }
        best.unwrap_or_else(|| solve(&self.parameters, &[], start))
    }

    /// Predicted time and the host's part of it on the critical path, ns.
    fn predicted(&self, o: &Observation, theta: &[f64]) -> (f64, f64) {
        let x = factors(o, self.dispatches, theta);
        let sum = |upto: usize| -> f64 { x.iter().zip(theta).take(upto).map(|(x, t)| x * t).sum() };
        (sum(x.len()).max(1.0), sum(self.dispatches.len() * PER_DISPATCH))
    }

    /// Real over predicted time.
    fn ratio(&self, o: &Observation, theta: &[f64]) -> f64 {
        o.time_ns / self.predicted(o, theta).0
    }

    /// Real over predicted host time, the GPU's part being as predicted.
    fn host_ratio(&self, o: &Observation, theta: &[f64]) -> f64 {
        let (predicted, host) = self.predicted(o, theta);
        (1.0 + (o.time_ns - predicted) / host.max(1.0)).max(0.0)
    }

    /// The observations outside of stretches in which the host was disturbed.
    ///
    /// Steps of every kind then run slow for a while, as when another tenant takes the CPU; that says nothing of the
    /// engine, and nothing of the next run. A stretch is disturbed when the median ratio of the steps around is high.
    fn calm<'o>(&self, observations: &'o [Observation], solution: &Solution) -> Vec<&'o Observation> {
        let ratios: Vec<f64> = observations.iter().map(|o| self.ratio(o, &solution.theta)).collect();
        let is_calm = |i: usize| {
            let from = i.saturating_sub(DISTURBANCE_STEPS / 2);
            let to = (i + DISTURBANCE_STEPS / 2 + 1).min(ratios.len());
            let mut around: Vec<f64> = (from..to)
                .filter(|&j| observations[j].run == observations[i].run)
                .map(|j| ratios[j])
                .collect();
            around.sort_by(f64::total_cmp);
            around.len() < DISTURBANCE_STEPS / 2 || percentile_of_sorted(&around, 0.5) < DISTURBED
        };
        (0..observations.len()).filter(|&i| is_calm(i)).map(|i| &observations[i]).collect()
    }
    fn assemble(
        &self,
        observations: &[&Observation],
        solution: &Solution,
        prior: &BTreeMap<Dispatch, DispatchCosts>,
    ) -> Fit {
        let (dispatches, parameters, weights) = (self.dispatches, &self.parameters, &self.weights);
        let theta = &solution.theta;
        let scales = &theta[dispatches.len() * PER_DISPATCH..];
        let mut fitted = prior.clone();
        let mut step_error = BTreeMap::new();
        for (i, dispatch) in dispatches.iter().enumerate() {
            let own = &theta[i * PER_DISPATCH..(i + 1) * PER_DISPATCH];
            let own_steps = || observations.iter().zip(weights).filter(|(o, _)| o.dispatch == *dispatch);
            let mut residuals: Vec<(f64, f64)> =
                own_steps().map(|(o, &w)| (self.host_ratio(o, theta), w)).collect();
            residuals.sort_by(|a, b| a.0.total_cmp(&b.0));
            let mut errors: Vec<f64> =
                own_steps().map(|(o, _)| (1.0 / self.ratio(o, theta) - 1.0).abs()).collect();
            errors.sort_by(f64::total_cmp);
            step_error.insert(*dispatch, percentile_of_sorted(&errors, 0.5));
            let old = prior.get(dispatch).cloned().unwrap_or_default();
            fitted.insert(
                *dispatch,
                DispatchCosts {
                    host_pre: HostCost { constant_ns: own[0], per_seq_ns: own[1], per_token_ns: own[2] },
                    // A synchronous step does not tell work before its kernels from work after them.
                    host_post: HostCost::default(),
                    launch_ns: own[3],
                    after_idle_ns: own[4],
                    residual_quantiles: weighted_quantiles(&residuals, old.residual_quantiles),
                },
            );
        }
        let not_identified = parameters
            .iter()
            .zip(&solution.remaining_width)
            .filter(|(_, left)| **left > NOT_PINNED)
            .map(|(q, _)| q.name.clone())
            .collect();
        let scales = OperatorScales {
            gemm: scales[0],
            prefill_attention: scales[1],
            decode_attention: scales[2],
            other: scales[3],
        };
        Fit { dispatch: fitted, scales, not_identified, step_error, disturbed_share: 0.0 }
    }
}

/// Equal weight to each run and dispatch, up to the number of steps that are independent.
fn weights(observations: &[&Observation]) -> Vec<f64> {
    let mut counts: BTreeMap<(usize, Dispatch), f64> = BTreeMap::new();
    for o in observations {
        *counts.entry((o.run, o.dispatch)).or_default() += 1.0;
    }
    observations
        .iter()
        .map(|o| {
            let n = counts[&(o.run, o.dispatch)];
            n.min(MOST_INDEPENDENT_STEPS) / n
        })
        .collect()
}

fn parameters(
    dispatches: &[Dispatch],
    observations: &[&Observation],
    prior: &BTreeMap<Dispatch, DispatchCosts>,
    scales: &OperatorScales,
) -> Vec<Parameter> {
    let mut all = Vec::new();
    for dispatch in dispatches {
        let costs = prior.get(dispatch).cloned().unwrap_or_default();
        let name = dispatch.name();
        let mut push = |part: &str, prior: f64, width: f64, max: f64| {
            all.push(Parameter { name: format!("{name}.{part}"), prior, width, min: 0.0, max });
        };
        push("host_pre.constant_ns", costs.host_pre.constant_ns, 1e6, 1e9);
        push("host_pre.per_seq_ns", costs.host_pre.per_seq_ns, 2e4, 1e7);
        push("host_pre.per_token_ns", costs.host_pre.per_token_ns, 1e3, 1e6);
        // A full graph is one launch: its cost cannot be told from the constant.
        let launch_width = match dispatch {
            Dispatch::Eager => 4e4,
            Dispatch::PiecewiseGraph => 1e5,
            Dispatch::FullGraph => 1e3,
        };
        let shortest = observations
            .iter()
            .filter(|o| o.dispatch == *dispatch)
            .map(|o| o.time_ns / f64::from(o.num_launches.max(1)))
            .fold(f64::INFINITY, f64::min);
        // No launch takes longer than the shortest step divided by its launches.
        push("launch_ns", costs.launch_ns.min(shortest), launch_width, shortest);
        push("after_idle_ns", costs.after_idle_ns, 5e6, 1e9);
    }
    for (part, prior) in [
        ("gemm", scales.gemm),
        ("prefill_attention", scales.prefill_attention),
        ("decode_attention", scales.decode_attention),
        ("other", scales.other),
    ] {
        all.push(Parameter {
            name: format!("operator_scales.{part}"),
            prior,
            width: 0.15,
            min: 0.5,
            max: 2.0,
        });
    }
    all
}

/// The row of an observation: how much of each parameter its time holds, given which part is longer.
fn factors(o: &Observation, dispatches: &[Dispatch], theta: &[f64]) -> Vec<f64> {
    let mut x = vec![0.0; dispatches.len() * PER_DISPATCH + 4];
    let Some(at) = dispatches.iter().position(|d| *d == o.dispatch).map(|i| i * PER_DISPATCH) else {
        return x;
    };
    x[at] = 1.0;
    x[at + 1] = f64::from(o.batch.num_seqs);
    x[at + 2] = f64::from(o.batch.num_tokens);
    x[at + 4] = f64::from(u8::from(o.after_idle));
    let scales = dispatches.len() * PER_DISPATCH;
    let launches = f64::from(o.num_launches);
    if gpu_time(&o.gpu, &theta[scales..]) >= launches * theta[at + 3] {
        x[scales] = o.gpu.gemm;
        x[scales + 1] = o.gpu.prefill_attention;
        x[scales + 2] = o.gpu.decode_attention;
        x[scales + 3] = o.gpu.other;
    } else {
        x[at + 3] = launches;
    }
    x
}

fn gpu_time(gpu: &ClassTimes, scales: &[f64]) -> f64 {
    gpu.gemm * scales[0]
        + gpu.prefill_attention * scales[1]
        + gpu.decode_attention * scales[2]
        + gpu.other * scales[3]
}

/// Evenly spaced quantiles of ascending weighted ratios; `few` where there are too few to speak of a distribution.
fn weighted_quantiles(ratios: &[(f64, f64)], few: Vec<f64>) -> Vec<f64> {
    if ratios.len() < 20 {
        return few;
    }
    let total: f64 = ratios.iter().map(|(_, w)| w).sum();
    let mut quantiles = Vec::with_capacity(RESIDUAL_QUANTILES);
    let (mut i, mut below) = (0, 0.0);
    for q in 0..RESIDUAL_QUANTILES {
        let target = total * q as f64 / (RESIDUAL_QUANTILES - 1) as f64;
        while i + 1 < ratios.len() && below + ratios[i].1 < target {
            below += ratios[i].1;
            i += 1;
        }
        quantiles.push(ratios[i].0);
    }
    quantiles
}

/// Fits what happens between steps; the prior where the runs do not record it.
#[must_use]
pub fn fit_client(gaps: &[Vec<ObservedGap>], prior: &ClientCosts) -> ClientCosts {
    let parameter = |name: &str, prior: f64, width: f64| Parameter {
        name: name.into(),
        prior,
        width,
        min: 0.0,
        max: 1e9,
    };
    let parameters = [
        parameter("client.admit_ns", prior.admit_ns, 1e6),
        parameter("client.admit_per_token_ns", prior.admit_per_token_ns, 1e3),
        parameter("client.between_steps.constant_ns", prior.between_steps.constant_ns, 1e5),
        parameter("client.between_steps.per_seq_ns", prior.between_steps.per_seq_ns, 1e4),
        parameter("client.between_steps.per_token_ns", prior.between_steps.per_token_ns, 1e2),
    ];
    let mut rows = Vec::new();
    for run in gaps {
        // With and without admissions are told apart, so that the few with them count.
        let with = run.iter().filter(|g| g.num_admitted > 0).count() as f64;
        let without = run.len() as f64 - with;
        for gap in run.iter().filter(|g| g.time_ns > 0.0) {
            let n = if gap.num_admitted > 0 { with } else { without };
            let busy = f64::from(u8::from(gap.seqs_before.is_some()));
            rows.push(Row {
                x: vec![
                    f64::from(gap.num_admitted),
                    gap.admitted_tokens as f64,
                    busy,
                    f64::from(gap.seqs_before.unwrap_or(0)),
                    busy * f64::from(gap.tokens_before),
                ],
                y: gap.time_ns,
                weight: n.min(MOST_INDEPENDENT_STEPS) / n,
            });
        }
    }
    if rows.is_empty() {
        return *prior;
    }
    let start: Vec<f64> = parameters.iter().map(|q| q.prior).collect();
    let theta = solve(&parameters, &rows, &start).theta;
    ClientCosts {
        admit_ns: theta[0],
        admit_per_token_ns: theta[1],
        between_steps: HostCost { constant_ns: theta[2], per_seq_ns: theta[3], per_token_ns: theta[4] },
    }
}

//! From observations to the numbers of an engine profile.

use std::collections::BTreeMap;

use plumbline_bundles::{
    Dispatch, DispatchCosts, HostCost,
    engine_profile::{ClientCosts, OperatorScales},
    stats::percentile_of_sorted,
};
use plumbline_schema::BatchShape;

use super::{
    layout::Layout,
    observe::ObservedGap,
    scheduling::Scheduling,
    solve::{Parameter, Row, Solution, solve},
};

/// GPU time of a step by the classes that have a scale of their own, ns, unscaled.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ClassTimes {
    /// Matrix products of steps with a prefill chunk.
    pub prefill_gemm: f64,
    /// Matrix products of decode-only steps.
    pub decode_gemm: f64,
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
    /// Index of its host; host 0 is the one that costs are stated for.
    pub host: usize,
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
    /// The scheduler's part of it, ns; `None` when not recorded.
    pub schedule_ns: Option<f64>,
}

/// A fitted host part.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// Costs by dispatch.
    pub dispatch: BTreeMap<Dispatch, DispatchCosts>,
    /// Factors on operator times.
    pub scales: OperatorScales,
    /// Every parameter's name and value.
    pub parameters: Vec<(String, f64)>,
    /// Parameters the data could not pin.
    pub not_identified: Vec<String>,
    /// Median absolute relative error of the steps fitted on, by dispatch.
    pub step_error: BTreeMap<Dispatch, f64>,
    /// Share of the steps left out because the host was disturbed, 0..1.
    pub disturbed_share: f64,
    /// Host costs of each host relative to host 0's.
    pub host_factors: Vec<f64>,
    /// The scheduler's cost on host 0; zero when not recorded.
    pub schedule: HostCost,
}

/// A run's steps of one dispatch repeat each other; more than this many say nothing new.
const MOST_INDEPENDENT_STEPS: f64 = 50.0;
/// Which part of a step is longer and how fast each host is depend on the parameters, so the fit is repeated.
const ROUNDS: usize = 10;
/// A parameter whose prior is left this wide was not pinned by the data.
const NOT_PINNED: f64 = 0.7;
const RESIDUAL_QUANTILES: usize = 101;
/// No step takes less than the GPU's time and this share of the host's; below lies what the GPU's prediction missed.
const MIN_RATIO: f64 = 0.05;
/// Fewest steps that make a distribution.
const MIN_RESIDUALS: usize = 20;
/// Steps around a step that tell whether its host was disturbed.
const DISTURBANCE_STEPS: usize = 15;
/// Median of real over predicted time from which a stretch is a disturbance.
const DISTURBED: f64 = 1.2;
const DISTURBANCE_ROUNDS: usize = 4;
/// Hosts further apart than this are not of one kind.
pub(super) const MIN_HOST_FACTOR: f64 = 0.2;
pub(super) const MAX_HOST_FACTOR: f64 = 5.0;

/// Fits costs by dispatch, operator scales and host factors.
///
/// `prior` gives starting values; a dispatch that no observation has keeps its prior costs.
#[must_use]
pub fn fit(
    observations: &[Observation],
    prior: &BTreeMap<Dispatch, DispatchCosts>,
    prior_scales: &OperatorScales,
) -> Fit {
    let all: Vec<&Observation> = observations.iter().collect();
    let mut kept = all.clone();
    let mut problem = Problem::new(&kept, prior, prior_scales);
    let mut best = problem.best(&kept);
    for _ in 0..DISTURBANCE_ROUNDS {
        let calm = problem.calm(observations, &best);
        if calm.len() == kept.len() {
            break;
        }
        // A disturbance is an exception: what most steps have is how the host is.
        let is_exception = 2 * calm.len() >= all.len();
        kept = if is_exception { calm } else { all.clone() };
        problem = Problem::new(&kept, prior, prior_scales);
        best = problem.best(&kept);
        if !is_exception {
            break;
        }
    }
    let mut fit = problem.assemble(&kept, &best, prior);
    let num_left_out = observations.len() - kept.len();
    fit.disturbed_share = num_left_out as f64 / observations.len().max(1) as f64;
    fit
}

/// A step-time fit over given observations.
struct Problem {
    layout: Layout,
    parameters: Vec<Parameter>,
    weights: Vec<f64>,
    num_hosts: usize,
    scheduling: Scheduling,
}

/// A solution with the factors of the hosts under which it holds.
struct Solved {
    solution: Solution,
    host_factors: Vec<f64>,
}

impl Problem {
    fn new(
        observations: &[&Observation],
        prior: &BTreeMap<Dispatch, DispatchCosts>,
        prior_scales: &OperatorScales,
    ) -> Self {
        let layout = Layout::new(observations);
        let weights = weights(observations);
        Self {
            parameters: layout.parameters(observations, prior, prior_scales),
            scheduling: Scheduling::new(observations, &weights),
            weights,
            num_hosts: observations.iter().map(|o| o.host + 1).max().unwrap_or(1),
            layout,
        }
    }

    /// The better of two fits: one that starts where the GPU is the longer part of a step, one where launching is.
    fn best(&self, observations: &[&Observation]) -> Solved {
        let from_prior: Vec<f64> = self.parameters.iter().map(|q| q.prior).collect();
        let launching = self.layout.launch_bound_start(&self.parameters);
        let (a, b) = (self.from(observations, &from_prior), self.from(observations, &launching));
        if b.solution.objective < a.solution.objective { b } else { a }
    }

    fn from(&self, observations: &[&Observation], start: &[f64]) -> Solved {
        let mut host_factors = self.scheduling.host_factors(self.num_hosts);
        let mut solution = self.solve_once(observations, start, &host_factors, |o, _| o.time_ns);
        for _ in 1..ROUNDS {
            self.update_host_factors(observations, &solution.theta, &mut host_factors);
            let expected = |o: &Observation, theta: &[f64]| self.predicted(o, theta, host_factors[o.host]).0;
            solution = self.solve_once(observations, &solution.theta, &host_factors, expected);
        }
        Solved { solution, host_factors }
    }

    fn solve_once(
        &self,
        observations: &[&Observation],
        theta: &[f64],
        host_factors: &[f64],
        scale: impl Fn(&Observation, &[f64]) -> f64,
    ) -> Solution {
        let row = |(o, &weight): (&&Observation, &f64)| Row {
            x: self.layout.factors(o, theta, host_factors[o.host]),
            y: o.time_ns,
            scale: scale(o, theta),
            weight,
        };
        let rows: Vec<Row> = observations.iter().zip(&self.weights).map(row).collect();
        solve(&self.parameters, &rows, theta)
    }

    /// Where scheduling was not recorded, a host's factor is the median of its steps' host time over what it would be
    /// on host 0.
    fn update_host_factors(&self, observations: &[&Observation], theta: &[f64], host_factors: &mut [f64]) {
        for (host, factor) in host_factors.iter_mut().enumerate().skip(1) {
            if self.scheduling.host_factor(host).is_some() {
                continue;
            }
            let mut ratios: Vec<(f64, f64)> = observations
                .iter()
                .zip(&self.weights)
                .filter(|(o, _)| o.host == host)
                .map(|(o, &w)| (self.host_ratio(o, theta, *factor) * *factor, w))
                .collect();
            ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
            if let Some(median) = weighted_quantile(&ratios, 0.5) {
                *factor = median.clamp(MIN_HOST_FACTOR, MAX_HOST_FACTOR);
            }
        }
    }

    /// Predicted time and the host's part of it on the critical path, ns.
    fn predicted(&self, o: &Observation, theta: &[f64], host_factor: f64) -> (f64, f64) {
        let x = self.layout.factors(o, theta, host_factor);
        let sum = |upto: usize| -> f64 { x.iter().zip(theta).take(upto).map(|(x, t)| x * t).sum() };
        (sum(x.len()).max(1.0), sum(self.layout.num_host()))
    }

    /// Real over predicted time.
    fn ratio(&self, o: &Observation, solved: &Solved) -> f64 {
        o.time_ns / self.predicted(o, &solved.solution.theta, solved.host_factors[o.host]).0
    }

    /// Real over predicted host time, the GPU's part being as predicted.
    fn host_ratio(&self, o: &Observation, theta: &[f64], host_factor: f64) -> f64 {
        let (predicted, host) = self.predicted(o, theta, host_factor);
        (1.0 + (o.time_ns - predicted) / host.max(1.0)).max(MIN_RATIO)
    }

    /// A step's residual and how much it counts, of a step that itself counts `weight`.
    ///
    /// What the GPU's prediction missed looks like the host's, the more so the less of a step is the host's: each ratio
    /// counts by the inverse of the variance that a like error of the whole step gives it.
    fn residual(&self, o: &Observation, weight: f64, solved: &Solved) -> (f64, f64) {
        let (theta, factor) = (&solved.solution.theta, solved.host_factors[o.host]);
        let (predicted, host) = self.predicted(o, theta, factor);
        (self.host_ratio(o, theta, factor), weight * (host / predicted).powi(2))
    }

    /// The observations outside of stretches in which the host was disturbed.
    ///
    /// Steps of every kind then run slow for a while, as when another tenant takes the CPU; that says nothing of the
    /// engine, and nothing of the next run. A stretch is disturbed when the median ratio of the steps around is high.
    fn calm<'o>(&self, observations: &'o [Observation], solved: &Solved) -> Vec<&'o Observation> {
        let ratios: Vec<f64> = observations.iter().map(|o| self.ratio(o, solved)).collect();
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
        solved: &Solved,
        prior: &BTreeMap<Dispatch, DispatchCosts>,
    ) -> Fit {
        let theta = &solved.solution.theta;
        let mut fitted = prior.clone();
        let mut step_error = BTreeMap::new();
        for &dispatch in self.layout.dispatches() {
            let own = || observations.iter().zip(&self.weights).filter(|(o, _)| o.dispatch == dispatch);
            let mut residuals: Vec<(f64, f64)> = own().map(|(o, &w)| self.residual(o, w, solved)).collect();
            residuals.sort_by(|a, b| a.0.total_cmp(&b.0));
            let mut errors: Vec<f64> =
                own().map(|(o, _)| (1.0 / self.ratio(o, solved) - 1.0).abs()).collect();
            errors.sort_by(f64::total_cmp);
            step_error.insert(dispatch, percentile_of_sorted(&errors, 0.5));
            let quantiles = if residuals.len() < MIN_RESIDUALS {
                prior.get(&dispatch).map(|costs| costs.residual_quantiles.clone()).unwrap_or_default()
            } else {
                let at = |q| q as f64 / (RESIDUAL_QUANTILES - 1) as f64;
                (0..RESIDUAL_QUANTILES).filter_map(|q| weighted_quantile(&residuals, at(q))).collect()
            };
            fitted.insert(dispatch, self.layout.costs(dispatch, theta, quantiles));
        }
        let not_identified = self
            .parameters
            .iter()
            .zip(&solved.solution.remaining_width)
            .filter(|(_, left)| **left > NOT_PINNED)
            .map(|(q, _)| q.name.clone())
            .collect();
        Fit {
            dispatch: fitted,
            scales: self.layout.scales(theta),
            parameters: self.parameters.iter().map(|q| q.name.clone()).zip(theta.iter().copied()).collect(),
            not_identified,
            step_error,
            disturbed_share: 0.0,
            host_factors: solved.host_factors.clone(),
            schedule: self.scheduling.cost(),
        }
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

/// The value of ascending weighted values at which `q` of the weight is reached; `None` without values.
pub(super) fn weighted_quantile(ascending: &[(f64, f64)], q: f64) -> Option<f64> {
    let total: f64 = ascending.iter().map(|(_, w)| w).sum();
    let mut below = 0.0;
    for (value, weight) in ascending {
        below += weight;
        if below >= q * total {
            return Some(*value);
        }
    }
    ascending.last().map(|(value, _)| *value)
}

/// Fits what happens between steps, from each run's host factor and gaps; the prior where runs do not record it.
#[must_use]
pub fn fit_client(gaps: &[(f64, Vec<ObservedGap>)], prior: &ClientCosts) -> ClientCosts {
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
    for (host_factor, run) in gaps {
        // With and without admissions are told apart, so that the few with them count.
        let with = run.iter().filter(|g| g.num_admitted > 0).count() as f64;
        let without = run.len() as f64 - with;
        for gap in run.iter().filter(|g| g.time_ns > 0.0) {
            let n = if gap.num_admitted > 0 { with } else { without };
            let busy = host_factor * f64::from(u8::from(gap.seqs_before.is_some()));
            rows.push(Row {
                x: vec![
                    host_factor * f64::from(gap.num_admitted),
                    host_factor * gap.admitted_tokens as f64,
                    busy,
                    host_factor * f64::from(gap.seqs_before.unwrap_or(0)),
                    busy * f64::from(gap.tokens_before),
                ],
                y: gap.time_ns,
                scale: gap.time_ns,
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

//! Which part of a run's steps is the GPU's and which the host's, when only their sum was measured.
//!
//! A model of the engine (bundle and profile) says what each operator and the host should take in each step. How far off it
//! is, one factor an operator and one on the host, is fitted to the steps of the run, with priors: kernels repeat within a
//! few percent from machine to machine, hosts do not. Which of the two a run's surplus belongs to then follows from how it
//! goes with the steps' shapes. Where the run recorded its phases they bound the answer, step by step.

use std::collections::BTreeMap;

use plumbline_bundles::Dispatch;
use plumbline_schema::Operator;
use plumbline_simulator::{
    step_time::{StepTimeError, StepTimeModel},
    times::OperatorTimes,
};

use crate::calibrate::{
    observe::ObservedStep,
    solve::{Parameter, Row, solve},
};

/// Widths of the priors on factors that are expected to be 1: kernels of one operator, and all of the host's work.
const OPERATOR_WIDTH: f64 = 0.1;
const HOST_WIDTH: f64 = 0.5;
const MAX_FACTOR: f64 = 20.0;
/// Steps of one dispatch repeat each other; more than this many say nothing new.
const MOST_INDEPENDENT_STEPS: f64 = 200.0;

/// What the model says of a step, ns.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Expected {
    pub dispatch: Dispatch,
    /// GPU time of each operator, in the order of [`Expectations::operators`].
    pub operators_ns: Vec<f64>,
    /// Host work before and after the kernels.
    pub around_ns: f64,
    /// The host's time to launch the kernels; it overlaps with the GPU's.
    pub launch_ns: f64,
}

impl Expected {
    pub(super) fn gpu_ns(&self, factors: &Factors) -> f64 {
        self.operators_ns.iter().zip(&factors.operators).map(|(ns, factor)| ns * factor).sum()
    }

    /// The step's time.
    pub(super) fn step_ns(&self, factors: &Factors) -> f64 {
        factors.host * self.around_ns + self.gpu_ns(factors).max(factors.host * self.launch_ns)
    }
}

/// A model's expectations of a run's steps.
#[derive(Debug)]
pub(super) struct Expectations {
    pub operators: Vec<Operator>,
    /// One a step.
    pub steps: Vec<Expected>,
}

impl Expectations {
    pub(super) fn new<T: OperatorTimes>(
        model: &mut StepTimeModel<T>,
        steps: &[ObservedStep],
    ) -> Result<Self, StepTimeError> {
        let mut operators: Vec<Operator> = Vec::new();
        let mut expected = Vec::with_capacity(steps.len());
        for step in steps {
            let shape = step.batch.shape();
            let time = model.step_time(&shape, step.after_idle)?;
            let mut operators_ns = vec![0.0; operators.len()];
            for operator in model.operator_times(&shape)?.into_iter().flatten() {
                let known = operators.iter().position(|known| *known == operator.operator);
                let at = known.unwrap_or_else(|| {
                    operators.push(operator.operator);
                    operators_ns.push(0.0);
                    operators.len() - 1
                });
                operators_ns[at] += operator.time_ns;
            }
            expected.push(Expected {
                dispatch: time.parts.dispatch,
                operators_ns,
                around_ns: time.host_pre_ns + time.host_post_ns,
                launch_ns: time.launch_ns,
            });
        }
        for step in &mut expected {
            step.operators_ns.resize(operators.len(), 0.0);
        }
        Ok(Self { operators, steps: expected })
    }
}

/// How much longer than expected a run's parts take.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Factors {
    pub operators: Vec<f64>,
    pub host: f64,
}

/// Fits the factors of a run to its steps.
pub(super) fn factors(expected: &Expectations, steps: &[ObservedStep]) -> Factors {
    let parameter = |name: String, width, min| Parameter { name, prior: 1.0, width, min, max: MAX_FACTOR };
    let mut parameters: Vec<_> = expected
        .operators
        .iter()
        .map(|operator| parameter(operator.name().to_owned(), OPERATOR_WIDTH, 0.05))
        .collect();
    parameters.push(parameter("host".to_owned(), HOST_WIDTH, 0.0));
    let mut counts: BTreeMap<Dispatch, f64> = BTreeMap::new();
    for step in &expected.steps {
        *counts.entry(step.dispatch).or_default() += 1.0;
    }
    let mut factors = Factors { operators: vec![1.0; expected.operators.len()], host: 1.0 };
    // Which of the GPU and launching is longer depends on the factors.
    for _ in 0..4 {
        let rows: Vec<_> = expected
            .steps
            .iter()
            .zip(steps)
            .map(|(step, observed)| {
                let is_gpu_bound = step.gpu_ns(&factors) >= factors.host * step.launch_ns;
                let mut x =
                    if is_gpu_bound { step.operators_ns.clone() } else { vec![0.0; step.operators_ns.len()] };
                x.push(step.around_ns + if is_gpu_bound { 0.0 } else { step.launch_ns });
                let n = counts[&step.dispatch];
                let weight = n.min(MOST_INDEPENDENT_STEPS) / n;
                Row { x, y: observed.time_ns, scale: step.step_ns(&factors).max(1.0), weight }
            })
            .collect();
        let mut start = factors.operators.clone();
        start.push(factors.host);
        let mut theta = solve(&parameters, &rows, &start).theta;
        factors.host = theta.pop().unwrap_or(1.0);
        factors.operators = theta;
    }
    factors
}

/// The GPU's part of each step, ns: what the factors say, within what the run recorded.
pub(super) fn gpu_parts(expected: &Expectations, factors: &Factors, steps: &[ObservedStep]) -> Vec<f64> {
    expected
        .steps
        .iter()
        .zip(steps)
        .map(|(step, observed)| {
            let gpu_ns = step.gpu_ns(factors);
            match observed.gpu_bounds_ns {
                Some((least, most)) => gpu_ns.clamp(least, most.max(least)),
                None => gpu_ns.min(observed.time_ns),
            }
        })
        .collect()
}

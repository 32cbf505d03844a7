//! A bundle in place of an older one: does it still answer everything that the old one answered?
//!
//! Both are asked for the same launches: every shape that either measured, shapes between those, and the launches of the
//! steps that an engine can form of the shipped models that either bundle names, also beyond what was measured. Each
//! answer has a [`State`]; what was [`State::Ok`] and no longer is blocks.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use plumbline_schema::{ModelSpec, Operator, OperatorShape, roofline::floor_ns};
use serde::Serialize;

use crate::{
    bundle::Bundle,
    error::BundleError,
    features::batch_columns,
    lint::{LintOptions, launches},
    predictor::{OutOfDomain, Predictors},
};

/// Change of a time, in percent of the old one, above which a point has moved, unless told otherwise.
pub const DEFAULT_TOLERANCE_PCT: f64 = 10.0;

/// A launch with more work that takes less than this share of a smaller one's time is no longer a matter of kernels
/// chosen: real ones drop by a quarter at most where a library changes its algorithm.
const MIN_MONOTONE_RATIO: f64 = 0.5;

/// A measured time may lie this far below the physical floor by rounding alone.
const FLOOR_MARGIN: f64 = 0.999;

/// What a bundle answers for a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum State {
    /// A time, from what was measured at or around it.
    Ok,
    /// None: no predictor, or outside of what was measured.
    DataMiss,
    /// A time that cannot be true: none above 0, below the physical floor, outside of its own interval, or less than half
    /// of what a launch with less work takes.
    Invalid,
}

impl State {
    /// The name in files and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::DataMiss => "DATA_MISS",
            Self::Invalid => "INVALID",
        }
    }
}

/// One launch, asked of both bundles.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SurfacePoint {
    /// The operator.
    pub operator: Operator,
    /// The shape, as `m=1 n=4096 k=1024`.
    pub shape: String,
    /// The old bundle's state.
    pub old: State,
    /// The new bundle's state.
    pub new: State,
    /// The old bundle's time, ns; none when it has none.
    pub old_ns: Option<f64>,
    /// The new bundle's time, ns; none when it has none.
    pub new_ns: Option<f64>,
    /// `100 (new - old) / old`; none unless both are OK.
    pub change_pct: Option<f64>,
    /// Why the new state is not OK; none when it is.
    pub reason: Option<String>,
}

/// The points of one operator in numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct OperatorSurface {
    /// Launches asked for.
    pub num_points: usize,
    /// OK in the old bundle.
    pub num_old_ok: usize,
    /// OK in the new bundle.
    pub num_new_ok: usize,
    /// OK in the old one, and not in the new one.
    pub num_lost: usize,
    /// OK in the new one, and not in the old one.
    pub num_gained: usize,
    /// OK in both, with times further apart than the tolerance.
    pub num_moved: usize,
    /// Largest change of a time in size, percent, signed; none when nothing is OK in both.
    pub worst_change_pct: Option<f64>,
}

/// Two bundles over the whole support surface.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SurfaceDiff {
    /// Name of the old bundle's GPU.
    pub old_gpu: String,
    /// Name of the new bundle's GPU.
    pub new_gpu: String,
    /// Change above which a point has moved, percent.
    pub tolerance_pct: f64,
    /// By operator, in the order of the forward pass.
    pub operators: BTreeMap<Operator, OperatorSurface>,
    /// Points that were OK and no longer are.
    pub lost: Vec<SurfacePoint>,
    /// Points OK in both whose time changed by more than the tolerance, the largest change first.
    pub moved: Vec<SurfacePoint>,
}

impl SurfaceDiff {
    /// Asks both bundles for every launch; `tolerance_pct` says from where on a time has moved.
    ///
    /// # Errors
    /// When the predictors of a bundle cannot be read.
    pub fn between(old: &Bundle, new: &Bundle, tolerance_pct: f64) -> Result<Self, BundleError> {
        let (old_predictors, new_predictors) = (old.predictors()?, new.predictors()?);
        let mut diff = Self {
            old_gpu: old_predictors.gpu().name.clone(),
            new_gpu: new_predictors.gpu().name.clone(),
            tolerance_pct,
            operators: BTreeMap::new(),
            lost: Vec::new(),
            moved: Vec::new(),
        };
        for (operator, shapes) in surface([old, new], [&old_predictors, &new_predictors]) {
            let (before, after) =
                (answers(&old_predictors, operator, &shapes), answers(&new_predictors, operator, &shapes));
            for (shape, (before, after)) in shapes.iter().zip(before.iter().zip(&after)) {
                diff.add(operator, shape, before, after);
            }
        }
        let size = |point: &SurfacePoint| point.change_pct.unwrap_or(0.0).abs();
        diff.moved.sort_by(|a, b| size(b).total_cmp(&size(a)));
        Ok(diff)
    }

    /// Launches asked for.
    #[must_use]
    pub fn num_points(&self) -> usize {
        self.operators.values().map(|operator| operator.num_points).sum()
    }

    /// Whether the old bundle answered anything: where it did not, there is nothing to hold the new one to.
    #[must_use]
    pub fn has_judged(&self) -> bool {
        self.operators.values().any(|operator| operator.num_old_ok > 0)
    }

    fn add(&mut self, operator: Operator, shape: &[u64], before: &Answer, after: &Answer) {
        let counts = self.operators.entry(operator).or_default();
        let (was_ok, is_ok) = (before.state == State::Ok, after.state == State::Ok);
        counts.num_points += 1;
        counts.num_old_ok += usize::from(was_ok);
        counts.num_new_ok += usize::from(is_ok);
        counts.num_lost += usize::from(was_ok && !is_ok);
        counts.num_gained += usize::from(!was_ok && is_ok);
        let change_pct = before
            .time_ns
            .zip(after.time_ns)
            .filter(|_| was_ok && is_ok)
            .map(|(old, new)| 100.0 * (new - old) / old);
        if let Some(change) = change_pct
            && counts.worst_change_pct.is_none_or(|worst| worst.abs() < change.abs())
        {
            counts.worst_change_pct = Some(change);
        }
        let has_moved = change_pct.is_some_and(|change| change.abs() > self.tolerance_pct);
        counts.num_moved += usize::from(has_moved);
        let point = || SurfacePoint {
            operator,
            shape: describe(operator, shape),
            old: before.state,
            new: after.state,
            old_ns: before.time_ns,
            new_ns: after.time_ns,
            change_pct,
            reason: after.reason.clone(),
        };
        if was_ok && !is_ok {
            self.lost.push(point());
        } else if has_moved {
            self.moved.push(point());
        }
    }
}

/// Zeros say that there is none of a kind, and are left out.
fn describe(operator: Operator, values: &[u64]) -> String {
    let named = operator.shape_columns().iter().zip(values).filter(|(_, value)| **value != 0);
    named.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
}

/// Every shape to ask for, by operator, each once: as its numbers, the model's before the batch's in order.
fn surface(bundles: [&Bundle; 2], predictors: [&Predictors; 2]) -> BTreeMap<Operator, BTreeSet<Vec<u64>>> {
    let mut shapes: BTreeMap<Operator, BTreeSet<Vec<u64>>> = BTreeMap::new();
    for predictors in predictors {
        for operator in predictors.operators() {
            let Some(predictor) = predictors.get(operator) else { continue };
            let measured: Vec<_> = predictor.domain.measured().map(|(shape, _)| shape.to_vec()).collect();
            let own = shapes.entry(operator).or_default();
            own.extend(measured.windows(2).filter_map(|pair| between(operator, &pair[0], &pair[1])));
            own.extend(measured);
        }
    }
    for bundle in bundles {
        let options = LintOptions::default();
        let shipped = ModelSpec::shipped_names();
        // A manifest's name must never lead to a file.
        let names = bundle.manifest.models.iter().filter(|name| shipped.contains(&name.as_str()));
        for model in names.filter_map(|name| ModelSpec::load(name).ok()) {
            for (operator, launched) in launches(&model, &bundle.manifest.gpu, &options) {
                shapes.entry(operator).or_default().extend(launched.iter().map(OperatorShape::values));
            }
        }
    }
    shapes
}

/// The shape half way, by ratio, between two of one layout whose batch is one number; none for others.
fn between(operator: Operator, a: &[u64], b: &[u64]) -> Option<Vec<u64>> {
    let batch = batch_columns(operator);
    let is_one_layout = (0..a.len()).filter(|column| !batch.contains(column)).all(|c| a[c] == b[c]);
    if batch.len() != 1 || !is_one_layout {
        return None;
    }
    let middle = (a[batch.start] as f64 * b[batch.start] as f64).sqrt().round() as u64;
    let mut shape = a.to_vec();
    shape[batch.start] = middle;
    Some(shape)
}

/// What one bundle says of one launch.
struct Answer {
    state: State,
    time_ns: Option<f64>,
    reason: Option<String>,
}

impl Answer {
    fn ok(time_ns: f64) -> Self {
        Self { state: State::Ok, time_ns: Some(time_ns), reason: None }
    }

    fn invalid(time_ns: f64, reason: String) -> Self {
        Self { state: State::Invalid, time_ns: Some(time_ns), reason: Some(reason) }
    }
}

/// The answers for all shapes of an operator, in their order.
fn answers(predictors: &Predictors, operator: Operator, shapes: &BTreeSet<Vec<u64>>) -> Vec<Answer> {
    // Predictions never lie below the floor; what was measured may.
    let measured: HashMap<&[u64], f64> =
        predictors.get(operator).map(|p| p.domain.measured().collect()).unwrap_or_default();
    let mut answers: Vec<_> = shapes
        .iter()
        .map(|values| answer(predictors, operator, values, measured.get(values.as_slice()).copied()))
        .collect();
    mark_drops(operator, shapes, &mut answers);
    answers
}

fn answer(predictors: &Predictors, operator: Operator, values: &[u64], measured_ns: Option<f64>) -> Answer {
    let miss = |reason: String| Answer { state: State::DataMiss, time_ns: None, reason: Some(reason) };
    let Some(shape) = OperatorShape::from_values(operator, values) else {
        return miss("it is no shape of the operator".into());
    };
    let (prediction, refusal) = match predictors.predict(operator, &shape, OutOfDomain::Refuse) {
        Ok(prediction) => (prediction, None),
        // An engine that is told to extrapolate gets this time: it must make sense too.
        Err(error) => match predictors.predict(operator, &shape, OutOfDomain::Extrapolate) {
            Ok(prediction) => (prediction, Some(error.to_string())),
            Err(error) => return miss(error.to_string()),
        },
    };
    let floor = floor_ns(&shape, predictors.gpu());
    let time = measured_ns.unwrap_or(prediction.time_ns);
    if !(time.is_finite() && time > 0.0) {
        return Answer::invalid(time, format!("expected a time above 0, found {time} ns"));
    }
    if time < floor * FLOOR_MARGIN {
        let text = format!("expected at least the physical floor of {floor:.0} ns, found {time:.0} ns");
        return Answer::invalid(time, text);
    }
    let (low, high) = (prediction.low_ns, prediction.high_ns);
    if !(low <= prediction.time_ns && prediction.time_ns <= high) {
        let text = format!("expected a time within its interval {low:.0}..{high:.0} ns, found {time:.0} ns");
        return Answer::invalid(time, text);
    }
    match refusal {
        Some(reason) => miss(reason),
        None => Answer::ok(prediction.time_ns),
    }
}

/// Marks what takes less than half of a launch of its layout with less work; of batches that are one number alone.
fn mark_drops(operator: Operator, shapes: &BTreeSet<Vec<u64>>, answers: &mut [Answer]) {
    let batch = batch_columns(operator);
    if batch.len() != 1 {
        return;
    }
    // By layout, what was slowest so far; shapes are sorted by their first number, which is the batch.
    let mut slowest: HashMap<&[u64], (u64, f64)> = HashMap::new();
    for (values, answer) in shapes.iter().zip(answers) {
        let (size, layout) = (values[batch.start], &values[batch.end..]);
        let (Some(time), State::Ok) = (answer.time_ns, answer.state) else { continue };
        match slowest.get(layout) {
            Some(&(smaller, slow)) if time < slow * MIN_MONOTONE_RATIO => {
                let name = operator.shape_columns()[batch.start];
                let text = format!(
                    "expected no less than half of the {slow:.0} ns at {name}={smaller}, found {time:.0} ns"
                );
                *answer = Answer::invalid(time, text);
            }
            Some(&(_, slow)) if time <= slow => {}
            _ => {
                slowest.insert(layout, (size, time));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drop_by_more_than_half_is_invalid_and_a_smaller_one_is_not() {
        let shapes: BTreeSet<Vec<u64>> = [1, 2, 4, 8].map(|m| vec![m, 64, 64]).into();
        let mut answers: Vec<_> = [1000.0, 700.0, 499.0, 2000.0].map(Answer::ok).into();
        mark_drops(Operator::QkvProj, &shapes, &mut answers);
        let states: Vec<_> = answers.iter().map(|answer| answer.state).collect();
        assert_eq!(states, [State::Ok, State::Ok, State::Invalid, State::Ok]);
        assert_eq!(
            answers[2].reason.as_deref(),
            Some("expected no less than half of the 1000 ns at m=1, found 499 ns")
        );
    }

    #[test]
    fn between_two_shapes_of_a_layout_lies_their_geometric_mean() {
        assert_eq!(between(Operator::QkvProj, &[4, 64, 32], &[16, 64, 32]), Some(vec![8, 64, 32]));
        assert_eq!(between(Operator::QkvProj, &[4, 64, 32], &[16, 64, 33]), None);
        assert_eq!(between(Operator::Attention, &[1; 10], &[1; 10]), None);
    }
}

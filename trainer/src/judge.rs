//! Predictors judged by measured points that they were not trained on, such as those of a model that was left out.

use plumbline_bundles::{
    CacheState, OutOfDomain, Predictors, Provenance, diff::PointStats, predictor::ErrorSummary,
    stats::percentile_of_sorted,
};
use plumbline_schema::Operator;
use serde::Serialize;

use crate::evaluate::summarise;

/// How far predictors lie from the samples of one operator.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OperatorJudgement {
    /// The operator.
    pub operator: Operator,
    /// Shapes that the predictors were trained on themselves; not judged.
    pub num_measured: usize,
    /// Shapes that were refused as out of domain, or that have no predictor; not judged.
    pub num_refused: usize,
    /// Errors at the other shapes; `None` when there are none.
    pub error: Option<ErrorSummary>,
    /// Share of them inside the predicted interval, 0..1; `None` when there are none.
    pub coverage: Option<f64>,
}

/// The judgement of all operators.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judgement {
    /// Operators with samples, in the order of the forward pass.
    pub operators: Vec<OperatorJudgement>,
    /// Median over the operators of their median error, 0..1; `None` when none was judged.
    pub median_of_medians: Option<f64>,
    /// 90th percentile over the operators of their median error, 0..1; `None` when none was judged.
    pub p90_of_medians: Option<f64>,
}

/// Compares predictions with the medians of points, each in the state in which a model's launch finds its operands.
///
/// Shapes that the predictors were trained on are counted and left out: they would answer with what was measured.
#[must_use]
pub fn judge(predictors: &Predictors, points: &[PointStats]) -> Judgement {
    let of = |operator: Operator| {
        let is_own = |point: &&PointStats| {
            point.key.operator == operator && point.key.cache == CacheState::in_model(operator)
        };
        let own: Vec<&PointStats> = points.iter().filter(is_own).collect();
        (!own.is_empty()).then(|| judge_operator(predictors, operator, &own))
    };
    let operators: Vec<_> = Operator::ALL.into_iter().filter_map(of).collect();
    let mut medians: Vec<f64> = operators.iter().filter_map(|o| o.error.map(|error| error.p50)).collect();
    medians.sort_by(f64::total_cmp);
    let percentile = |p| (!medians.is_empty()).then(|| percentile_of_sorted(&medians, p));
    Judgement { median_of_medians: percentile(0.5), p90_of_medians: percentile(0.9), operators }
}

fn judge_operator(predictors: &Predictors, operator: Operator, points: &[&PointStats]) -> OperatorJudgement {
    let (mut num_measured, mut num_refused, mut num_inside) = (0, 0, 0usize);
    let (mut predicted, mut measured) = (Vec::new(), Vec::new());
    for point in points {
        let time_ns = point.p50_ns;
        match predictors.predict(operator, &point.key.shape, OutOfDomain::Refuse) {
            Ok(prediction) if prediction.provenance == Provenance::Measured => num_measured += 1,
            Ok(prediction) => {
                num_inside += usize::from((prediction.low_ns..=prediction.high_ns).contains(&time_ns));
                predicted.push(prediction.time_ns);
                measured.push(time_ns);
            }
            Err(_) => num_refused += 1,
        }
    }
    let error = summarise(&predicted, &measured);
    let coverage = error.map(|_| num_inside as f64 / predicted.len() as f64);
    OperatorJudgement { operator, num_measured, num_refused, error, coverage }
}

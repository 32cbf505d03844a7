//! The one table of the report.

use plumbline_bundles::OperatorPredictor;
use plumbline_schema::{GpuSpec, Operator};

use super::points::is_inside;
use crate::{
    evaluate::summarise,
    train::{HeldOutPoint, HeldOutWay, TrainOutcome},
};

/// Fewest shapes whose 99th percentile is more than their largest error.
pub const MIN_FOR_P99: u32 = 100;

/// The held-out shapes of an operator and way.
#[derive(Clone, Debug)]
pub(super) struct Group<'a> {
    pub operator: Operator,
    pub way: HeldOutWay,
    /// At least one.
    pub points: Vec<&'a HeldOutPoint>,
}

/// Groups in the order of the predictors, then of the ways.
pub(super) fn groups(outcome: &TrainOutcome) -> Vec<Group<'_>> {
    let mut groups = Vec::new();
    for predictor in &outcome.predictors {
        for way in [HeldOutWay::Shuffled, HeldOutWay::Blocked, HeldOutWay::Layouts] {
            let operator = predictor.operator;
            let is_own = |point: &&HeldOutPoint| point.operator == operator && point.way == way;
            let points: Vec<_> = outcome.held_out.iter().filter(is_own).collect();
            if !points.is_empty() {
                groups.push(Group { operator, way, points });
            }
        }
    }
    groups
}

/// A row of the table; errors are 0..1 ratios.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub operator: Operator,
    pub way: HeldOutWay,
    /// Held-out shapes.
    pub n: u32,
    /// Mean of `|predicted / measured - 1|`.
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    /// `None` below [`MIN_FOR_P99`] shapes.
    pub p99: Option<f64>,
    /// Mean of `predicted / measured - 1`.
    pub bias: f64,
    /// Share of the shapes whose time lies in the interval.
    pub coverage: f64,
    /// Mean absolute error of the final predictor, which saw them, on the same shapes.
    pub in_sample_mean: f64,
}

/// The row of a group; `predictor` is its operator's final one.
pub(super) fn row(group: &Group<'_>, predictor: &OperatorPredictor, gpu: &GpuSpec) -> Row {
    let measured: Vec<f64> = group.points.iter().map(|point| point.measured_ns).collect();
    let held_out: Vec<f64> = group.points.iter().map(|point| point.predicted_ns).collect();
    let in_sample: Vec<f64> = group.points.iter().map(|point| predictor.predict(&point.shape, gpu)).collect();
    // Groups are not empty.
    let error = summarise(&held_out, &measured).unwrap_or_default();
    let num_inside = group.points.iter().filter(|point| is_inside(point)).count();
    Row {
        operator: group.operator,
        way: group.way,
        n: error.n,
        mean: error.mean,
        p50: error.p50,
        p90: error.p90,
        p99: (error.n >= MIN_FOR_P99).then_some(error.p99),
        bias: error.bias,
        coverage: num_inside as f64 / group.points.len() as f64,
        in_sample_mean: summarise(&in_sample, &measured).unwrap_or_default().mean,
    }
}

/// Columns of the table; `true` for numbers.
pub(super) const COLUMNS: [(&str, bool); 10] = [
    ("Operator", false),
    ("Held out", false),
    ("n", true),
    ("Mean", true),
    ("p50", true),
    ("p90", true),
    ("p99", true),
    ("Bias", true),
    ("In interval", true),
    ("In-sample mean", true),
];

impl Row {
    /// The cells of the columns after the operator's and the way's.
    pub(super) fn cells(&self) -> [String; 8] {
        [
            self.n.to_string(),
            percent(self.mean),
            percent(self.p50),
            percent(self.p90),
            self.p99.map_or_else(|| "n/a".into(), percent),
            signed_percent(self.bias),
            format!("{:.0} %", 100.0 * self.coverage),
            percent(self.in_sample_mean),
        ]
    }
}

pub(super) fn percent(ratio: f64) -> String {
    format!("{:.2} %", 100.0 * ratio)
}

/// With a sign; a zero has none.
pub(super) fn signed_percent(ratio: f64) -> String {
    let text = format!("{:+.2} %", 100.0 * ratio);
    if text[1..] == *"0.00 %" { "0.00 %".into() } else { text }
}

/// A way in one word.
pub(super) fn way_name(way: HeldOutWay) -> &'static str {
    match way {
        HeldOutWay::Shuffled => "shuffled",
        HeldOutWay::Blocked => "blocked",
        HeldOutWay::Layouts => "layouts",
    }
}

/// How to read the table: paragraphs without markup.
pub(super) fn how_to_read(outcome: &TrainOutcome) -> [String; 3] {
    let coverage = outcome.predictors.first().map_or(0.0, |predictor| predictor.interval.coverage);
    [
        "Every shape is predicted by a model that never saw it. Shuffled: some of all shapes are held out at random. \
         Blocked: a range of batch sizes is held out, so the prediction crosses a gap or goes beyond an edge. Layouts: \
         all shapes of a model's layout are held out, and judged where other layouts surround them."
            .to_owned(),
        format!(
            "Mean, p50, p90 and p99 are of |predicted / measured − 1| over n shapes; p99 wants {MIN_FOR_P99} of them. \
             Bias is the mean of predicted / measured − 1. In interval: share of the shapes whose measured time lies in \
             the interval that the errors of the other folds give, {:.0} % being the aim.",
            100.0 * coverage
        ),
        "In-sample mean is the error of the final predictor at the same shapes, all of which it saw. It is no measure of \
         how good it is, and 0 where measured shapes are interpolated exactly; beside the held-out mean it says how much \
         of the samples was learned by heart."
            .to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::testing::{gpu, outcome};

    #[test]
    fn rows_say_what_the_training_report_says_and_more() {
        let outcome = outcome();
        let groups = groups(&outcome);
        let rows: Vec<Row> = groups.iter().map(|group| row(group, &outcome.predictors[0], &gpu())).collect();
        let error = outcome.report.operators[0].error;
        for (row, expected) in rows.iter().zip([error.shuffled, error.blocked]) {
            assert_eq!(
                (row.n, row.mean, row.p90, row.bias),
                (expected.n, expected.mean, expected.p90, expected.bias)
            );
            assert!(row.in_sample_mean < row.mean, "{row:?}");
            assert!((0.5..=1.0).contains(&row.coverage), "{row:?}");
        }
    }

    #[test]
    fn a_99th_percentile_wants_100_shapes() {
        let outcome = outcome();
        let mut group = groups(&outcome).remove(0);
        group.points.truncate(99);
        assert_eq!(row(&group, &outcome.predictors[0], &gpu()).cells()[4], "n/a");
    }

    #[test]
    fn signs() {
        assert_eq!(
            [0.0, -0.00001, 0.0312, -0.5].map(signed_percent),
            ["0.00 %", "0.00 %", "+3.12 %", "-50.00 %"]
        );
    }
}

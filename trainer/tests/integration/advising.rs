//! Does asking where predictors are unsure lead to better predictors?

use plumbline_bundles::{CurvePoint, Sample};
use plumbline_schema::{Operator, OperatorShape};
use plumbline_trainer::advise::{Advice, AdviceOptions};

use crate::{
    law::{gpu, sample, samples},
    replay::{Pool, Strategy, mean, replay},
};

fn norm(num_tokens: u32) -> (Operator, OperatorShape) {
    (Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens, hidden_size: 4096 })
}

fn advice(samples: &[Sample]) -> Advice {
    Advice::new(samples, &gpu(), &AdviceOptions::default())
}

fn ask(samples: &[Sample], candidates: &[(Operator, OperatorShape)]) -> Vec<f64> {
    advice(samples).unsureness(candidates)
}

#[test]
fn what_was_measured_is_sure_and_what_was_not_even_begun_is_unknown() {
    let samples = samples(1);
    let embedding = OperatorShape::Embedding { num_tokens: 64, hidden_size: 4096 };
    let answers = ask(&samples, &[norm(64), norm(70), (Operator::Embedding, embedding)]);
    assert!(answers[0].abs() < 1e-12, "measured: {}", answers[0]);
    assert!(answers[1] > 0.0 && answers[1] < 0.1, "between two measured: {}", answers[1]);
    assert!(answers[2].is_infinite(), "no sample of its operator: {}", answers[2]);
    // Too few shapes to leave some out.
    let few: Vec<Sample> = [1, 8, 64].map(|m| sample(Operator::RmsNorm, norm(m).1, None, 1.0)).to_vec();
    assert!(ask(&few, &[norm(70)])[0].is_infinite());
    assert!(ask(&[], &[norm(70)])[0].is_infinite());
}

#[test]
fn a_shape_measured_for_another_matrix_product_is_sure() {
    // `samples` measures this for `qkv_proj`.
    let shape = OperatorShape::Gemm { m: 64, n: 4096, k: 1024 };
    assert!(ask(&samples(1), &[(Operator::DownProj, shape)])[0].abs() < 1e-12);
}

#[test]
fn beyond_the_edge_is_less_sure_than_between_measured_shapes() {
    let small: Vec<Sample> =
        samples(1).into_iter().filter(|sample| sample.shape.values()[0] <= 512).collect();
    let answers = ask(&small, &[norm(300), norm(1024), norm(8192)]);
    assert!(answers[2] > answers[1] && answers[1] > 2.0 * answers[0], "{answers:?}");
}

#[test]
fn an_irregular_neighbourhood_is_less_sure_than_a_smooth_one() {
    let rough = |m: u32| m > 1000 && m.is_multiple_of(2);
    let time = |m: u32| if rough(m) { 1.4 } else { 1.0 };
    let tokens = (1..40).map(|i| 50 * i + i % 2);
    let samples: Vec<Sample> = tokens.map(|m| sample(Operator::RmsNorm, norm(m).1, None, time(m))).collect();
    let answers = ask(&samples, &[norm(475), norm(1475)]);
    assert!(answers[1] > 3.0 * answers[0], "{answers:?}");
}

#[test]
fn the_same_question_has_the_same_answer_on_any_number_of_threads() {
    let samples = samples(1);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| ask(&samples, &[norm(70), norm(5000)]))
    };
    assert_eq!(on(1), on(2));
}

#[test]
fn held_out_errors_weigh_operators_alike() {
    let all = samples(1);
    let (held_out, known): (Vec<_>, Vec<_>) = all.into_iter().enumerate().partition(|(i, _)| i % 7 == 0);
    let (held_out, known): (Vec<Sample>, Vec<Sample>) =
        (held_out.into_iter().map(|x| x.1).collect(), known.into_iter().map(|x| x.1).collect());
    let advice = advice(&known);
    let per_operator = advice.held_out_errors(&held_out);
    assert_eq!(per_operator.len(), 5);
    let error = advice.held_out_error(&held_out).unwrap();
    assert_eq!(error.num_points, per_operator.iter().map(|(_, errors)| errors.len()).sum::<usize>());
    // Half of each operator's weight lies at or below its own median.
    let share_below: f64 = per_operator
        .iter()
        .map(|(_, errors)| errors.iter().filter(|e| **e <= error.p50).count() as f64 / errors.len() as f64)
        .sum::<f64>()
        / 5.0;
    assert!((0.5..0.6).contains(&share_below), "{share_below}");
    assert!(error.p50 < 0.03 && error.p50 <= error.p90 && error.worst_operator_p50 >= error.p50, "{error:?}");
    // A shape that was measured is no test of predicting.
    assert!(advice.held_out_error(&known).is_none());
}

#[test]
fn operators_take_turns_in_a_replay() {
    let pool = Pool::fake(1);
    let curve = replay(&pool, Strategy::Turns, 0, &[0.05]);
    assert_eq!(curve.len(), 1);
    assert!(curve[0].point.elapsed_s <= 0.05 * pool.total_s(), "{curve:?}");
    let counts = || curve[0].operators.iter().map(|(_, count, _)| *count);
    assert_eq!(counts().count(), 13, "{curve:?}");
    // A dear point that did not fit any more may have been left out.
    assert!(counts().max().unwrap() <= counts().min().unwrap() + 3, "{curve:?}");
}

/// Shares of the whole pool's time, ending where what is left hardly matters.
const LOOKS: [f64; 4] = [0.1, 0.15, 0.2, 0.3];
const SEEDS: u64 = 3;

/// Mean over seeds and looks of a strategy's p50 and p90; and whether both fell from the first look to the last.
fn level(pool: &Pool, strategy: Strategy) -> (f64, f64, bool) {
    let curve = mean(&(0..SEEDS).map(|seed| replay(pool, strategy, seed, &LOOKS)).collect::<Vec<_>>());
    assert_eq!(curve.len(), LOOKS.len());
    let of = |of: fn(&CurvePoint) -> f64| curve.iter().map(of).sum::<f64>() / curve.len() as f64;
    let (first, last) = (curve[0].error, curve[LOOKS.len() - 1].error);
    (of(|point| point.error.p50), of(|point| point.error.p90), last.p50 < first.p50 && last.p90 < first.p90)
}

/// Advised, a profile is better than at random or in the plan's order, and no worse than with operators in turn or by
/// the same choice with every point taken as equally unsure.
fn check_advice(pool: &Pool) {
    let (p50, p90, falls) = level(pool, Strategy::Advised);
    assert!(falls, "more time, smaller error");
    let bounds = [
        (Strategy::Random, 0.95, 0.9),
        (Strategy::InOrder, 1.0, 0.9),
        (Strategy::Turns, 1.1, 1.1),
        (Strategy::Spread, 1.1, 1.1),
    ];
    for (blind, most_p50, most_p90) in bounds {
        let (blind_p50, blind_p90, _) = level(pool, blind);
        let text =
            format!("{p50:.4} and {p90:.4} against {blind_p50:.4} and {blind_p90:.4} {}", blind.name());
        assert!(p50 < most_p50 * blind_p50 && p90 < most_p90 * blind_p90, "{text}");
    }
}

#[test]
fn an_advised_profile_of_the_fake_device_is_better_than_a_blind_one() {
    check_advice(&Pool::fake(1));
}

#[test]
fn an_advised_profile_of_an_h100_is_better_than_a_blind_one() {
    check_advice(&Pool::h100());
}

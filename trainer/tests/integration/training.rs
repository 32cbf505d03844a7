//! What training finds, and what it refuses.

use plumbline_bundles::{
    CacheState, OutOfDomain, Predictors, Provenance, Sample, TimeStats,
    bundle::sha256_hex,
    predictor::{PredictorFile, payloads},
};
use plumbline_schema::{Operator, OperatorShape, StepBatch, operator::Heads};
use plumbline_trainer::{TrainError, TrainOptions, TrainOutcome, train};

use proptest::prelude::*;

use crate::law;

pub fn trained(samples: &[Sample]) -> TrainOutcome {
    train(samples, &law::gpu(), &TrainOptions::default(), |_| ()).unwrap()
}

#[test]
fn the_law_is_recovered_on_shapes_never_sampled() {
    let outcome = trained(&law::samples(1));
    for report in &outcome.report.operators {
        // The noise alone gives a median error of 0.7 %.
        let error = report.error.shuffled;
        assert!(error.p50 < 0.03, "{}: {error:?}", report.operator);
        assert!(error.mean < report.roofline_error.mean / 3.0, "{}: {error:?}", report.operator);
        assert!(error.bias.abs() < 0.03, "{}: {error:?}", report.operator);
        assert_eq!(error.n as usize, report.num_shapes);
    }
    let predictors = Predictors::new(law::gpu(), outcome.predictors).unwrap();
    let mut errors = Vec::new();
    for m in [3, 11, 40, 100, 200, 300, 700, 1400, 2500, 5000] {
        for (operator, shape) in [
            (Operator::QkvProj, OperatorShape::Gemm { m, n: 4096, k: 1024 }),
            (Operator::OProj, OperatorShape::Gemm { m, n: 4096, k: 4096 }),
            (Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens: m, hidden_size: 4096 }),
            (Operator::SiluMul, OperatorShape::SiluMul { num_tokens: m, intermediate_size: 3072 }),
        ] {
            let prediction = predictors.predict(operator, &shape, OutOfDomain::Refuse).unwrap();
            assert_eq!(prediction.provenance, Provenance::Interpolated);
            let error = (prediction.time_ns / law::time_ns(&shape) - 1.0).abs();
            assert!(error < 0.15, "{operator} {shape:?}: {error}");
            errors.push(error);
        }
    }
    errors.sort_by(f64::total_cmp);
    assert!(errors[errors.len() / 2] < 0.02, "{errors:?}");
}

#[test]
fn intervals_hold_about_the_share_they_state() {
    let outcome = trained(&law::samples(2));
    let predictors = Predictors::new(law::gpu(), outcome.predictors).unwrap();
    let (mut inside, mut all) = (0, 0);
    let mut noise = law::normal(99);
    // Evenly spread over the logarithm, as the plan is: errors of neighbours go together.
    let sizes = (0..200).map(|i| (8000.0f64.powf(f64::from(i) / 200.0)) as u32);
    for (num_tokens, hidden_size) in sizes.flat_map(|m| [(m, 1024), (m, 4096)]) {
        let shape = OperatorShape::RmsNorm { num_tokens, hidden_size };
        let prediction = predictors.predict(Operator::RmsNorm, &shape, OutOfDomain::Refuse).unwrap();
        let measured = law::time_ns(&shape) * (1.0 + law::NOISE * noise());
        inside += u32::from((prediction.low_ns..=prediction.high_ns).contains(&measured));
        all += 1;
    }
    let share = f64::from(inside) / f64::from(all);
    assert!((0.75..=1.0).contains(&share), "{share} for a stated 0.9");
}

#[test]
fn the_same_samples_give_the_same_bytes_on_any_number_of_threads() {
    let samples: Vec<_> =
        law::samples(3).into_iter().filter(|sample| sample.operator != Operator::Attention).collect();
    let on_threads = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let outcome = pool.install(|| trained(&samples));
        serde_json::to_vec(&(outcome.predictors, outcome.report)).unwrap()
    };
    assert_eq!(on_threads(1), on_threads(2));
}

#[test]
fn a_changed_cell_changes_the_digest_and_the_model() {
    let mut samples = law::samples(4);
    samples.retain(|sample| sample.operator == Operator::SiluMul);
    let before = trained(&samples).predictors.remove(0);
    samples[20].stats.p50_ns *= 1.3;
    let after = trained(&samples).predictors.remove(0);
    assert_ne!(before.samples_digest, after.samples_digest);
    assert_ne!(before.forest, after.forest);
    assert!(before.samples_digest.starts_with("sha256:") && before.samples_digest.len() == 71);
}

#[test]
fn matrix_products_are_written_once_and_read_as_they_were() {
    let mut samples = law::samples(6);
    samples.retain(|sample| sample.operator.is_gemm());
    let predictors = trained(&samples).predictors;
    let files = payloads(&predictors).unwrap();
    let parsed: Vec<PredictorFile> =
        files.iter().map(|(name, bytes)| PredictorFile::parse(bytes, name.as_ref()).unwrap()).collect();
    let PredictorFile::Whole(whole) = &parsed[0] else { panic!("{:?}", files[0].0) };
    assert!(predictors.len() > 1);
    for (file, predictor) in parsed[1..].iter().zip(&predictors[1..]) {
        let PredictorFile::Shared(shared) = file else { panic!("{}", predictor.operator) };
        assert_eq!(&shared.join(whole), predictor);
    }
    // What was trained apart is written apart.
    let mut other = predictors.clone();
    other[1].overhead_ns *= 1.01;
    assert!(payloads(&other).unwrap()[1].1.len() > 10_000);
}

/// A row-wise kernel that takes no steps from wave to wave, and one that does nothing else.
#[test]
fn steps_and_neighbours_are_taken_where_they_err_less() {
    let way = |time_ns: fn(u32) -> f64| {
        let samples: Vec<Sample> = (1..120u32)
            .map(|i| {
                let num_tokens = 7 * i;
                let shape = OperatorShape::RmsNorm { num_tokens, hidden_size: 16_384 };
                let stats = TimeStats::from_times(&[time_ns(num_tokens)]).unwrap();
                Sample::bare(Operator::RmsNorm, shape, stats)
            })
            .collect();
        let outcome = trained(&samples);
        let report = &outcome.report.operators[0];
        let score =
            |trial: &plumbline_trainer::train::Trial| trial.shuffled_error + 0.25 * trial.blocked_error;
        let lowest = report.tried.iter().min_by(|a, b| score(a).total_cmp(&score(b))).unwrap();
        assert_eq!(report.tried.len(), 8);
        let hyper = report.hyper_parameters;
        assert_eq!(
            (hyper.has_steps, hyper.interpolates_residuals, hyper.forest_share.to_bits()),
            (lowest.has_steps, lowest.interpolates_residuals, lowest.forest_share.to_bits())
        );
        hyper
    };
    let smooth = way(|num_tokens| 5000.0 + 80.0 * f64::from(num_tokens));
    assert!(!smooth.has_steps && smooth.forest_share < 1.0, "{smooth:?}");
    let stepped = way(|num_tokens| 5000.0 + 10_000.0 * f64::from(num_tokens.div_ceil(132)));
    assert!(stepped.has_steps, "{stepped:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any cell: the digest, the file, and the digest of that, which is what engine profiles are fitted under.
    #[test]
    fn any_changed_cell_changes_the_digest_the_model_and_the_key(
        place in any::<prop::sample::Index>(),
        factor in prop_oneof![0.7..0.99, 1.01..1.4],
    ) {
        let mut samples = law::samples(4);
        samples.retain(|sample| sample.operator == Operator::SiluMul);
        let options = TrainOptions { num_trees: 4, num_folds: 2, ..TrainOptions::default() };
        let trained = |samples: &[Sample]| train(samples, &law::gpu(), &options, |_| ());
        let file = |samples: &[Sample]| {
            payloads(&trained(samples).unwrap().predictors).unwrap().remove(0).1
        };
        let key = |file: &[u8]| sha256_hex(file);
        let digest = |file: &[u8]| {
            serde_json::from_slice::<serde_json::Value>(file).unwrap()["samples_digest"].clone()
        };
        let before = file(&samples);
        prop_assert_eq!(&before, &file(&samples));
        let sample = place.index(samples.len());
        let stats = samples[sample].stats;
        samples[sample].stats = stats.scaled(factor);
        // A time that no card of the kind can reach is told as such.
        if let Err(error) = trained(&samples) {
            prop_assert!(factor < 1.0 && matches!(error, TrainError::UnderFloor { .. }), "{error}");
            return Ok(());
        }
        let after = file(&samples);
        prop_assert_ne!(digest(&before), digest(&after));
        prop_assert_ne!(key(&before), key(&after));
        let without_digest = |file: &[u8]| {
            let mut value: serde_json::Value = serde_json::from_slice(file).unwrap();
            value["samples_digest"] = serde_json::Value::Null;
            value
        };
        prop_assert_ne!(without_digest(&before), without_digest(&after));
    }
}

#[test]
fn progress_names_each_operator_once() {
    let mut seen = Vec::new();
    let samples = law::samples(5);
    let options = TrainOptions { num_trees: 2, ..TrainOptions::default() };
    train(&samples, &law::gpu(), &options, |progress| seen.push((progress.operator, progress.done))).unwrap();
    let expected =
        [Operator::RmsNorm, Operator::QkvProj, Operator::Attention, Operator::OProj, Operator::SiluMul];
    assert_eq!(seen, expected.into_iter().zip(0..).collect::<Vec<_>>());
}

fn norms() -> Vec<Sample> {
    law::samples(6).into_iter().filter(|sample| sample.operator == Operator::RmsNorm).collect()
}

fn refused(samples: &[Sample]) -> String {
    train(samples, &law::gpu(), &TrainOptions::default(), |_| ()).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn samples_that_cannot_be_true_are_refused_with_their_row() {
    for bad in [0.0, -4.0, f64::NAN, f64::INFINITY] {
        let mut samples = norms();
        samples[7].stats.p50_ns = bad;
        let message = refused(&samples);
        assert_eq!(
            message,
            format!("operator `rms_norm`, row 8: p50_ns = {bad}, expected a finite time above 0")
        );
    }
    let mut samples = norms();
    samples[3].shape = OperatorShape::Gemm { m: 1, n: 1, k: 1 };
    assert!(refused(&samples).contains("row 4"), "{}", refused(&samples));

    let mut samples = norms();
    let huge = OperatorShape::RmsNorm { num_tokens: 1 << 20, hidden_size: 4096 };
    samples.push(law::sample(Operator::RmsNorm, huge, None, 0.01));
    let message = refused(&samples);
    assert!(message.contains("num_tokens = 1048576, hidden_size = 4096"), "{message}");
    assert!(message.contains("physical floor"), "{message}");
}

#[test]
fn a_shape_measured_twice_is_averaged_unless_it_disagrees() {
    let mut samples = norms();
    let mut again = samples[5].clone();
    again.stats.p50_ns *= 1.5;
    samples.push(again.clone());
    let outcome = trained(&samples);
    assert_eq!(outcome.report.operators[0].num_shapes + 1, outcome.report.operators[0].num_samples);
    let predictors = Predictors::new(law::gpu(), outcome.predictors).unwrap();
    let twice = predictors.predict(Operator::RmsNorm, &again.shape, OutOfDomain::Refuse).unwrap();
    assert!((twice.time_ns / samples[5].stats.p50_ns - 1.25).abs() < 1e-9);
    assert_eq!(twice.provenance, Provenance::Measured);

    samples.last_mut().unwrap().stats.p50_ns *= 1.5;
    let message = refused(&samples);
    let row = samples.len();
    assert!(message.contains(&format!("rows 6 and {row}")), "{message}");
}

#[test]
fn too_little_is_refused() {
    assert!(matches!(train(&[], &law::gpu(), &TrainOptions::default(), |_| ()), Err(TrainError::NoSamples)));
    let message = refused(&norms()[..3]);
    assert_eq!(message, "operator `rms_norm`: expected at least 4 measured shapes, found 3");
    let mut hot: Vec<Sample> = law::samples(6);
    hot.retain(|sample| sample.operator == Operator::QkvProj);
    for sample in &mut hot {
        sample.cache = CacheState::Hot;
    }
    assert!(refused(&hot).contains("no cold samples among 68"), "{}", refused(&hot));
    let options = TrainOptions { num_folds: 1, ..TrainOptions::default() };
    let error = train(&norms(), &law::gpu(), &options, |_| ()).unwrap_err();
    assert_eq!(error.to_string(), "num_folds = 1, expected at least 2");
}

#[test]
fn activations_are_trained_on_hot_samples_unless_these_are_few() {
    let cold = norms();
    // Every second shape is as many as it takes; every third is not.
    for (every, expected) in [(2, CacheState::Hot), (3, CacheState::Cold)] {
        let mut samples = cold.clone();
        samples.extend(cold.iter().step_by(every).cloned().map(|mut sample| {
            sample.cache = CacheState::Hot;
            sample.stats.p50_ns *= 0.9;
            sample
        }));
        let outcome = trained(&samples);
        assert_eq!(outcome.report.operators[0].cache, expected, "every {every}");
        let predictors = Predictors::new(law::gpu(), outcome.predictors).unwrap();
        let both = &cold[6 * every];
        let answer = predictors.predict(Operator::RmsNorm, &both.shape, OutOfDomain::Refuse).unwrap();
        let hot = both.stats.p50_ns * 0.9;
        let wanted = if expected == CacheState::Hot { hot } else { both.stats.p50_ns };
        assert!((answer.time_ns / wanted - 1.0).abs() < 0.01, "{} {wanted}", answer.time_ns);
    }
}

#[test]
fn a_shape_of_one_matrix_product_is_a_measurement_for_all() {
    let samples = law::samples(8);
    let predictors = Predictors::new(law::gpu(), trained(&samples).predictors).unwrap();
    let qkv = qkv_of(&samples);
    let other = predictors.predict(Operator::OProj, &qkv.shape, OutOfDomain::Refuse).unwrap();
    assert_eq!((other.time_ns, other.provenance), (qkv.stats.p50_ns, Provenance::Measured));

    let mut samples = samples;
    let mut apart = qkv;
    apart.operator = Operator::OProj;
    apart.stats.p50_ns *= 3.0;
    samples.push(apart);
    let message = refused(&samples);
    assert!(
        message.starts_with("operators `qkv_proj` and `o_proj`, m = 1, n = 4096, k = 1024:"),
        "{message}"
    );
}

fn qkv_of(samples: &[Sample]) -> Sample {
    samples.iter().find(|sample| sample.operator == Operator::QkvProj).unwrap().clone()
}

#[test]
fn a_model_that_was_not_measured_is_predicted_from_a_grid() {
    let samples = law::grid(9);
    let outcome = trained(&samples);
    for report in &outcome.report.operators {
        let error = report.error.layouts.unwrap();
        // The law's longest decode slows a step in a way that no part of the baseline says: only the forest has it,
        // from eight batches a layout.
        let p90 = if report.operator == Operator::Attention { 0.25 } else { 0.12 };
        assert!(error.p50 < 0.05 && error.p90 < p90, "{}: {error:?}", report.operator);
        assert!(report.interval.unseen_layout.is_some());
    }
    let predictors = Predictors::new(law::gpu(), outcome.predictors).unwrap();
    let heads = Heads { num_q_heads: 32, num_kv_heads: 8, head_dim: 128 };
    let batches = ["", "40", "300;300;2000"].map(|decodes| StepBatch::parse("512:100", decodes).unwrap());
    let mut shapes: Vec<(Operator, OperatorShape)> = batches
        .iter()
        .map(|batch| OperatorShape::Attention { heads, load: batch.shape().attention })
        .map(|shape| (Operator::Attention, shape))
        .collect();
    for m in [3, 20, 130, 1000, 3000] {
        shapes.extend([
            (Operator::QkvProj, OperatorShape::Gemm { m, n: 6144, k: 4096 }),
            (Operator::OProj, OperatorShape::Gemm { m, n: 4096, k: 4096 }),
            (Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens: m, hidden_size: 4096 }),
            (Operator::SiluMul, OperatorShape::SiluMul { num_tokens: m, intermediate_size: 12288 }),
        ]);
    }
    for (operator, shape) in shapes {
        let answer = predictors.predict(operator, &shape, OutOfDomain::Refuse).unwrap();
        assert_eq!(answer.provenance, Provenance::Interpolated);
        let truth = law::time_ns(&shape);
        // As above: of attention's skew the forest alone knows.
        let limit = if operator == Operator::Attention { 0.25 } else { 0.2 };
        assert!((answer.time_ns / truth - 1.0).abs() < limit, "{operator} {shape:?}: {answer:?} {truth}");
    }
    // Beyond the largest layout measured, nothing surrounds it.
    let wide = OperatorShape::RmsNorm { num_tokens: 64, hidden_size: 20_000 };
    let error = predictors.predict(Operator::RmsNorm, &wide, OutOfDomain::Refuse).unwrap_err();
    assert!(error.to_string().contains("hidden_size = 20000 is outside"), "{error}");
}

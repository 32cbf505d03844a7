//! Predictors of one made-up GPU carried over to another.

use std::sync::LazyLock;

use plumbline_bundles::{
    CacheState, OperatorPredictor, OutOfDomain, Predictors, Provenance, Sample, TimeStats,
};
use plumbline_schema::{GpuSpec, Operator, OperatorShape};
use plumbline_trainer::{
    TrainError, TrainOptions, train,
    transfer::{TransferOptions, TransferOutcome, transfer},
};

use crate::law;

/// What a GPU reaches beside its data sheet.
struct Reached {
    /// Cycles that a launch takes, whatever it does.
    overhead_cycles: f64,
    /// Shares of bandwidth and of the tensor cores' rated peak.
    bandwidth: f64,
    tensor: f64,
}

const OF_A100: Reached = Reached { overhead_cycles: 4000.0, bandwidth: 0.85, tensor: 0.8 };
/// A fifth more cycles, 18 % less of bandwidth, a quarter less of the peak.
const OF_H100: Reached = Reached { overhead_cycles: 4800.0, bandwidth: 0.7, tensor: 0.6 };

fn a100() -> GpuSpec {
    GpuSpec::by_name("a100-sxm4-80gb").unwrap()
}

fn h100() -> GpuSpec {
    GpuSpec::by_name("h100-sxm5-80gb").unwrap()
}

fn time_ns(shape: &OperatorShape, gpu: &GpuSpec, reached: &Reached) -> f64 {
    let overhead = reached.overhead_cycles / f64::from(gpu.max_clock_mhz) * 1e3;
    let memory = shape.bytes().0 as f64 / (reached.bandwidth * gpu.hbm_bandwidth_bytes_per_s) * 1e9;
    match shape {
        OperatorShape::Gemm { .. } => {
            let compute = shape.flops().0 as f64 / (reached.tensor * gpu.bf16_flops_per_s) * 1e9;
            overhead + (compute.powi(3) + memory.powi(3)).cbrt()
        }
        _ => overhead + memory,
    }
}

fn samples(gpu: &GpuSpec, reached: &Reached) -> Vec<Sample> {
    let mut noise = law::normal(u64::from(gpu.num_sms));
    let mut samples = Vec::new();
    let mut add = |operator, shape: OperatorShape| {
        let time = time_ns(&shape, gpu, reached) * (1.0 + 0.005 * noise());
        let stats = TimeStats::from_times(&[0.99 * time, time, 1.02 * time]).unwrap();
        samples.push(Sample {
            operator,
            cache: CacheState::in_model(operator),
            stats,
            ..law::sample(operator, shape, None, 1.0)
        });
    };
    // From 1 to 8192, evenly over the logarithm where that gives whole numbers.
    let mut sizes: Vec<u32> = (0..70).map(|i| 8192.0f64.powf(f64::from(i) / 69.0).round() as u32).collect();
    sizes.dedup();
    for num_tokens in sizes {
        for hidden_size in [1024, 4096, 8192] {
            add(Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens, hidden_size });
        }
        for (n, k) in [(6144, 4096), (10240, 8192)] {
            add(Operator::QkvProj, OperatorShape::Gemm { m: num_tokens, n, k });
        }
        for n in [4096, 8192] {
            add(Operator::OProj, OperatorShape::Gemm { m: num_tokens, n, k: n });
        }
    }
    samples
}

static MEASURED: LazyLock<Vec<OperatorPredictor>> = LazyLock::new(|| {
    let samples = samples(&a100(), &OF_A100);
    train(&samples, &a100(), &TrainOptions::default(), |_| ()).unwrap().predictors
});
static TARGET: LazyLock<Vec<Sample>> = LazyLock::new(|| samples(&h100(), &OF_H100));

fn options(few_shot: usize) -> TransferOptions {
    TransferOptions { few_shot, ..TransferOptions::default() }
}

fn transferred(few_shot: usize) -> TransferOutcome {
    transfer(&MEASURED, &a100(), &TARGET, &h100(), &options(few_shot)).unwrap()
}

#[test]
fn data_sheets_err_by_what_they_do_not_tell_and_twenty_samples_make_up_for_it() {
    let outcome = transferred(20);
    for report in &outcome.report.operators {
        let (sheets, adapted) = (report.data_sheets.unwrap(), report.few_shot.unwrap());
        // The H100 takes 1.2 times as long for bytes, 1.33 times for products and 1.2 times as many cycles.
        assert!(sheets.bias < -0.13 && sheets.bias > -0.26, "{}: {sheets:?}", report.operator);
        assert!(adapted.p50 < 0.02, "{}: {adapted:?}", report.operator);
        assert!(adapted.bias.abs() < 0.015, "{}: {adapted:?}", report.operator);
        assert_eq!(report.num_used, 20);
        let is_gemm = report.operator.is_gemm();
        assert_eq!(report.num_pooled, if is_gemm { 40 } else { 20 }, "matrix products are one law");
        let shapes = TARGET.iter().filter(|sample| sample.operator == report.operator).count();
        assert_eq!(adapted.n as usize, shapes - 20, "all others judge");
        assert_eq!((report.num_refused, sheets.n), (0, adapted.n));
    }
    let [norm, ..] = outcome.report.operators.as_slice() else { panic!("no operators") };
    assert_eq!(norm.operator, Operator::RmsNorm);
    let overhead = OF_H100.overhead_cycles / f64::from(h100().max_clock_mhz) * 1e3;
    assert!((norm.overhead_ns / overhead - 1.0).abs() < 0.03, "{} for {overhead}", norm.overhead_ns);
}

#[test]
fn a_sample_moves_a_predictor_by_some_of_its_error() {
    let [none, one, many] = [0, 1, 20].map(|few_shot| {
        let outcome = transferred(few_shot);
        let norm = &outcome.report.operators[0];
        norm.few_shot.or(norm.data_sheets).unwrap().bias
    });
    assert!(none < one - 0.03 && one < many - 0.02, "{none} {one} {many}");
}

#[test]
fn every_answer_is_tagged_and_about_as_many_lie_in_the_interval_as_it_states() {
    for few_shot in [0, 5, 20] {
        let outcome = transferred(few_shot);
        let text = serde_json::to_string(&outcome.predictors).unwrap();
        let predictors = Predictors::new(h100(), serde_json::from_str(&text).unwrap()).unwrap();
        for sample in TARGET.iter() {
            let prediction = predictors.predict(sample.operator, &sample.shape, OutOfDomain::Refuse).unwrap();
            assert_eq!(prediction.provenance, Provenance::Transferred);
            assert!(prediction.low_ns <= prediction.time_ns && prediction.time_ns <= prediction.high_ns);
        }
        for (predictor, report) in outcome.predictors.iter().zip(&outcome.report.operators) {
            let from = predictor.transferred_from.as_ref().unwrap();
            assert_eq!((&from.gpu, from.num_samples as usize), (&a100(), report.num_pooled));
            assert_eq!(
                predictor.domain,
                MEASURED.iter().find(|p| p.operator == report.operator).unwrap().domain
            );
            assert!(report.coverage.unwrap() > 0.8, "{few_shot} {report:?}");
        }
        // Outside what was measured on the first GPU is refused here, too.
        let long = OperatorShape::RmsNorm { num_tokens: 20_000, hidden_size: 4096 };
        assert!(predictors.predict(Operator::RmsNorm, &long, OutOfDomain::Refuse).is_err());
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_the_digest_names_the_samples() {
    let bytes = |outcome: &TransferOutcome| serde_json::to_string(&outcome.predictors).unwrap();
    let digests = |outcome: &TransferOutcome| {
        outcome.predictors.iter().map(|p| p.samples_digest.clone()).collect::<Vec<_>>()
    };
    let first = transferred(20);
    assert_eq!(bytes(&first), bytes(&transferred(20)));
    let options = TransferOptions { seed: 1, ..options(20) };
    let other = transfer(&MEASURED, &a100(), &TARGET, &h100(), &options).unwrap();
    assert_ne!(digests(&first), digests(&other), "other samples were chosen");
    let of_measured: Vec<_> = MEASURED.iter().map(|p| p.samples_digest.clone()).collect();
    assert_eq!(digests(&transferred(0)), of_measured);
    for (predictor, digest) in first.predictors.iter().zip(&of_measured) {
        assert_eq!(&predictor.transferred_from.as_ref().unwrap().samples_digest, digest);
    }
}

#[test]
fn carried_over_to_the_same_gpu_nothing_but_the_tag_changes() {
    let outcome = transfer(&MEASURED, &a100(), &[], &a100(), &options(0)).unwrap();
    for (carried, measured) in outcome.predictors.iter().zip(MEASURED.iter()) {
        for sample in TARGET.iter().filter(|sample| sample.operator == measured.operator) {
            let times =
                [carried, measured].map(|predictor| predictor.predict(&sample.shape, &a100()).to_bits());
            assert_eq!(times[0], times[1]);
        }
    }
    assert!(outcome.report.operators.iter().all(|report| report.data_sheets.is_none()));
}

#[test]
fn all_samples_may_be_used_and_operators_without_any_stay_with_the_data_sheets() {
    let norms: Vec<Sample> =
        TARGET.iter().filter(|sample| sample.operator == Operator::RmsNorm).take(12).cloned().collect();
    let outcome = transfer(&MEASURED, &a100(), &norms, &h100(), &options(50)).unwrap();
    let [norm, qkv, _] = outcome.report.operators.as_slice() else { panic!("{:?}", outcome.report) };
    assert_eq!((norm.num_used, norm.few_shot), (12, None), "none is left to judge");
    assert_eq!((qkv.num_used, qkv.num_pooled), (0, 0));
    assert_eq!(outcome.predictors[1], transferred(0).predictors[1]);
}

#[test]
fn what_cannot_be_carried_over_is_refused() {
    let refused = |predictors: &[OperatorPredictor], samples: &[Sample]| {
        transfer(predictors, &a100(), samples, &h100(), &options(20)).unwrap_err()
    };
    assert!(matches!(refused(&[], &TARGET), TrainError::NoPredictors));
    assert!(matches!(refused(&MEASURED, &[]), TrainError::NoSamples));
    let error = refused(&transferred(0).predictors, &TARGET);
    assert!(error.to_string().contains("itself carried over, from `a100-sxm4-80gb`"), "{error}");
    let mut fast = TARGET[TARGET.len() - 1].clone();
    fast.stats = TimeStats::from_times(&[10.0]).unwrap();
    assert!(matches!(refused(&MEASURED, &[fast]), TrainError::UnderFloor { .. }));
}

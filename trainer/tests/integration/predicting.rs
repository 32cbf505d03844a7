//! What trained predictors promise, whatever is asked.

use std::sync::LazyLock;

use plumbline_bundles::{OutOfDomain, PredictError, Predictors, Provenance};
use plumbline_schema::{
    AttentionLoad, GpuSpec, Operator, OperatorShape, PrefillChunk, StepBatch, operator::Heads,
    roofline::floor_ns,
};
use proptest::prelude::*;

use crate::{law, training::trained};

static PREDICTORS: LazyLock<Predictors> =
    LazyLock::new(|| Predictors::new(law::gpu(), trained(&law::samples(7)).predictors).unwrap());

fn attention(chunks: &str, decodes: &str) -> OperatorShape {
    let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
    OperatorShape::Attention { heads, load: StepBatch::parse(chunks, decodes).unwrap().shape().attention }
}

#[test]
fn predictors_written_and_read_back_predict_the_same_bits() {
    let outcome = trained(&law::samples(7));
    let text = serde_json::to_string(&outcome.predictors).unwrap();
    let read = Predictors::new(law::gpu(), serde_json::from_str(&text).unwrap()).unwrap();
    for m in [3, 77, 1300] {
        let shape = OperatorShape::Gemm { m, n: 4096, k: 1024 };
        assert_eq!(
            read.predict(Operator::QkvProj, &shape, OutOfDomain::Refuse),
            PREDICTORS.predict(Operator::QkvProj, &shape, OutOfDomain::Refuse)
        );
    }
}

#[test]
fn outside_the_domain_is_refused_or_tagged() {
    let long = OperatorShape::RmsNorm { num_tokens: 20_000, hidden_size: 4096 };
    let refused = PREDICTORS.predict(Operator::RmsNorm, &long, OutOfDomain::Refuse).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "operator `rms_norm`: num_tokens = 20000 is outside the measured 1..=8192"
    );
    let tagged = PREDICTORS.predict(Operator::RmsNorm, &long, OutOfDomain::Extrapolate).unwrap();
    assert_eq!(tagged.provenance, Provenance::Extrapolated);
    // The ratio of the edge holds beyond it.
    assert!((tagged.time_ns / law::time_ns(&long) - 1.0).abs() < 0.05, "{tagged:?}");

    let other_model = OperatorShape::RmsNorm { num_tokens: 64, hidden_size: 2560 };
    let refused = PREDICTORS.predict(Operator::RmsNorm, &other_model, OutOfDomain::Refuse).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "operator `rms_norm`: hidden_size = 2560 was not measured; \
         measured: hidden_size = 1024; hidden_size = 4096"
    );
    let tagged = PREDICTORS.predict(Operator::RmsNorm, &other_model, OutOfDomain::Extrapolate).unwrap();
    assert_eq!(tagged.provenance, Provenance::Extrapolated);
}

#[test]
fn a_missing_operator_names_what_there_is() {
    let shape = OperatorShape::Embedding { num_tokens: 1, hidden_size: 1024 };
    let error = PREDICTORS.predict(Operator::Embedding, &shape, OutOfDomain::Extrapolate).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no predictor for operator `embedding`; available: rms_norm, qkv_proj, attention, o_proj, silu_mul; \
         profile `embedding` on this GPU and train the bundle again"
    );
}

#[test]
fn nothing_to_do_and_hostile_numbers_are_errors_not_zero() {
    let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
    let endless =
        AttentionLoad { prefill_pairs: u64::MAX, prefill_kv_tokens: u64::MAX, ..AttentionLoad::default() };
    let shapes = [
        (Operator::Attention, attention("", "")),
        (Operator::Attention, OperatorShape::Attention { heads, load: endless }),
        (Operator::Attention, OperatorShape::Gemm { m: 1, n: 1, k: 1 }),
        (Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens: 0, hidden_size: 1024 }),
        (Operator::QkvProj, OperatorShape::Gemm { m: u32::MAX, n: u32::MAX, k: u32::MAX }),
    ];
    for (operator, shape) in shapes {
        let error = PREDICTORS.predict(operator, &shape, OutOfDomain::Extrapolate).unwrap_err();
        assert!(matches!(error, PredictError::WrongShape { .. }), "{error}");
    }
}

#[test]
fn a_transferred_time_follows_the_hardware_and_is_tagged() {
    let transferred = |gpu: GpuSpec| PREDICTORS.clone().transferred_to(gpu);
    let shape = OperatorShape::Gemm { m: 4096, n: 6144, k: 4096 };
    let time = |predictors: &Predictors| {
        let prediction = predictors.predict(Operator::QkvProj, &shape, OutOfDomain::Refuse).unwrap();
        assert_eq!(prediction.provenance, Provenance::Transferred);
        assert!(prediction.low_ns <= prediction.time_ns && prediction.time_ns <= prediction.high_ns);
        prediction.time_ns
    };
    let same = time(&transferred(law::gpu()));
    assert!((same / law::time_ns(&shape) - 1.0).abs() < 0.05, "{same}");
    // Hardware k times slower: all but the overhead takes k times as long.
    let predictor = PREDICTORS.get(Operator::QkvProj).unwrap();
    let ratio = same / predictor.baseline_ns(&shape, &law::gpu());
    for k in [0.5, 2.0, 10.0] {
        let mut slower = law::gpu();
        slower.bf16_flops_per_s /= k;
        slower.fp32_flops_per_s /= k;
        slower.hbm_bandwidth_bytes_per_s /= k;
        let overhead = ratio * predictor.overhead_ns;
        let expected = overhead + k * (same - overhead);
        let scaled = time(&transferred(slower));
        // A wave's fixed cost and a step along k are no data sheet's and stay, but hardly show in this shape.
        assert!((scaled / expected - 1.0).abs() < 0.02, "{scaled} {expected}");
    }
    let a100 = transferred(GpuSpec::by_name("a100-sxm4-80gb").unwrap());
    let from = a100.get(Operator::QkvProj).and_then(|predictor| predictor.transferred_from.as_ref()).unwrap();
    assert_eq!((a100.gpu().name.as_str(), &from.gpu), ("a100-sxm4-80gb", &law::gpu()));
    assert!(time(&a100) > 2.0 * same, "compute-bound on a GPU with a third of the peak");
}

fn shapes() -> impl Strategy<Value = (Operator, OperatorShape)> {
    let gemm = (1u32..20_000, 1u32..20_000, 1u32..20_000)
        .prop_map(|(m, n, k)| (Operator::OProj, OperatorShape::Gemm { m, n, k }));
    let norm = (1u32..100_000, 1u32..20_000).prop_map(|(num_tokens, hidden_size)| {
        (Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens, hidden_size })
    });
    let chunk = (1u32..10_000, 0u32..40_000)
        .prop_map(|(num_tokens, context_len)| PrefillChunk { num_tokens, context_len });
    let batch = (prop::collection::vec(chunk, 0..4), prop::collection::vec(0u32..40_000, 0..40));
    let attention =
        (batch, 0usize..2).prop_filter_map("nothing to do", |((prefill_chunks, decode_contexts), i)| {
            let batch = StepBatch { prefill_chunks, decode_contexts };
            let heads = Heads { num_q_heads: [16, 32][i], num_kv_heads: 8, head_dim: 128 };
            let shape = OperatorShape::Attention { heads, load: batch.shape().attention };
            (!batch.is_empty()).then_some((Operator::Attention, shape))
        });
    prop_oneof![gemm, norm, attention]
}

proptest! {
    #[test]
    fn no_time_is_zero_or_under_the_floor((operator, shape) in shapes(), to_a100: bool) {
        let a100 = || PREDICTORS.clone().transferred_to(GpuSpec::by_name("a100-sxm4-80gb").unwrap());
        let predictors = if to_a100 { &a100() } else { &*PREDICTORS };
        let prediction = predictors.predict(operator, &shape, OutOfDomain::Extrapolate).unwrap();
        prop_assert!(prediction.time_ns > 0.0 && prediction.time_ns.is_finite());
        prop_assert!(prediction.low_ns >= floor_ns(&shape, predictors.gpu()));
        prop_assert!(prediction.low_ns <= prediction.time_ns && prediction.time_ns <= prediction.high_ns);
    }
}

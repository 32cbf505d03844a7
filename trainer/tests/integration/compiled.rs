//! Predictors that remember answer as those that do not, whatever is asked in whatever order.

use std::sync::{Arc, LazyLock};

use plumbline_bundles::{CompiledPredictors, OutOfDomain, Predictors};
use plumbline_schema::{
    GpuSpec, Heads, Operator, OperatorShape, PrefillChunk, StepBatch, operator::MAX_SHAPE_COLUMNS,
};
use proptest::prelude::*;

use crate::{law, training::trained};

static PREDICTORS: LazyLock<Predictors> =
    LazyLock::new(|| Predictors::new(law::gpu(), trained(&law::samples(7)).predictors).unwrap());

/// Batches that engines form, on two layouts of heads.
fn attention() -> impl Strategy<Value = OperatorShape> {
    let chunk = (1..4000u32, 0..9000u32)
        .prop_map(|(num_tokens, context_len)| PrefillChunk { num_tokens, context_len });
    let batch = (prop::collection::vec(chunk, 0..3), prop::collection::vec(1..9000u32, 0..40));
    (batch, any::<bool>()).prop_map(|((prefill_chunks, decode_contexts), is_wide)| {
        let (num_q_heads, num_kv_heads) = if is_wide { (32, 8) } else { (16, 8) };
        let load = StepBatch { prefill_chunks, decode_contexts }.shape().attention;
        OperatorShape::Attention { heads: Heads { num_q_heads, num_kv_heads, head_dim: 128 }, load }
    })
}

/// A shape of an operator that was trained, measured or not, within what was measured or not, or of nothing at all.
fn shape() -> impl Strategy<Value = OperatorShape> {
    let tokens = || prop_oneof![0..300u32, 0..20_000u32, Just(u32::MAX)];
    let width = || prop_oneof![Just(1024u32), Just(4096), 0..20_000u32];
    let norm = (tokens(), width())
        .prop_map(|(num_tokens, hidden_size)| OperatorShape::RmsNorm { num_tokens, hidden_size });
    let gemm = (tokens(), width(), width()).prop_map(|(m, n, k)| OperatorShape::Gemm { m, n, k });
    let silu = (tokens(), prop_oneof![Just(3072u32), Just(14_336), 0..20_000u32])
        .prop_map(|(num_tokens, intermediate_size)| OperatorShape::SiluMul { num_tokens, intermediate_size });
    let hostile = prop::collection::vec(0..=u64::from(u32::MAX), MAX_SHAPE_COLUMNS)
        .prop_map(|numbers| OperatorShape::from_values(Operator::Attention, &numbers).unwrap());
    prop_oneof![3 => norm, 4 => gemm, 2 => silu, 4 => attention(), 1 => hostile]
}

fn operator() -> impl Strategy<Value = Operator> {
    let trained =
        [Operator::RmsNorm, Operator::QkvProj, Operator::OProj, Operator::SiluMul, Operator::Attention];
    prop_oneof![9 => prop::sample::select(trained.to_vec()), 1 => prop::sample::select(&Operator::ALL[..])]
}

/// Which operator's shape to ask, in a burst or in a step, refusing or not; mostly of the shape's own operator.
fn question() -> impl Strategy<Value = (Operator, OperatorShape, bool)> {
    (operator(), shape(), any::<bool>(), 0..10u8).prop_map(|(operator, shape, refuses, i)| {
        let own = match shape {
            OperatorShape::RmsNorm { .. } => Operator::RmsNorm,
            OperatorShape::SiluMul { .. } => Operator::SiluMul,
            OperatorShape::Attention { .. } => Operator::Attention,
            _ if operator.is_gemm() => operator,
            _ => Operator::QkvProj,
        };
        (if i == 0 { operator } else { own }, shape, refuses)
    })
}

fn check(
    predictors: &Arc<Predictors>,
    asked: &[(Operator, OperatorShape, bool)],
) -> Result<(), TestCaseError> {
    let compiled = CompiledPredictors::new(Arc::clone(predictors));
    // Each asked anew, again at once, and again after all others.
    for (operator, shape, refuses) in asked.iter().flat_map(|question| [question; 2]).chain(asked) {
        let rule = if *refuses { OutOfDomain::Refuse } else { OutOfDomain::Extrapolate };
        let expected = predictors.predict_in_step(*operator, shape, rule);
        let found = compiled.predict_in_step(*operator, shape, rule);
        let bits = |p: &plumbline_bundles::Prediction| {
            ([p.time_ns, p.low_ns, p.high_ns].map(f64::to_bits), p.provenance)
        };
        prop_assert_eq!(expected.as_ref().map(bits), found.as_ref().map(bits), "{} {:?}", operator, shape);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn answers_are_those_of_the_predictors(asked in prop::collection::vec(question(), 1..100)) {
        check(&Arc::new(PREDICTORS.clone()), &asked)?;
    }

    #[test]
    fn answers_for_another_gpu_are_those_of_the_predictors(asked in prop::collection::vec(question(), 1..30)) {
        let a100 = GpuSpec::by_name("a100-sxm4-80gb").unwrap();
        check(&Arc::new(PREDICTORS.clone().transferred_to(a100)), &asked)?;
    }
}

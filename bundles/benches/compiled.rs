//! What a prediction costs: asked for the first time, asked before, and each part of a first one.
//!
//! `cargo bench -p plumbline-bundles`; on the shipped H100 bundle, whose forests have 32 trees of depth 12.

use std::{
    cell::Cell,
    path::Path,
    sync::{Arc, LazyLock},
};

use divan::{Bencher, black_box};
use plumbline_bundles::{
    Bundle, CompiledPredictors, OutOfDomain, Predictors,
    features::{features, parts_ns},
};
use plumbline_schema::{
    AttentionLoad, Heads, Operator, OperatorShape, PrefillChunk,
    roofline::{floor_ns, roofline_ns},
};

fn main() {
    divan::main();
}

static PREDICTORS: LazyLock<Arc<Predictors>> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/h100-sxm5-80gb");
    Bundle::open(&folder).and_then(|bundle| bundle.predictors()).map(Arc::new).expect("a shipped bundle")
});

const HEADS: Heads = Heads { num_q_heads: 32, num_kv_heads: 8, head_dim: 128 };

/// One operator of each kind: rows, a matrix product, decodes, and chunks with decodes.
#[derive(Clone, Copy, Debug)]
enum Kind {
    RmsNorm,
    Rope,
    DownProj,
    Decodes,
    Mixed,
}

impl Kind {
    const ALL: [Self; 5] = [Self::RmsNorm, Self::Rope, Self::DownProj, Self::Decodes, Self::Mixed];

    fn operator(self) -> Operator {
        match self {
            Self::RmsNorm => Operator::RmsNorm,
            Self::Rope => Operator::Rope,
            Self::DownProj => Operator::DownProj,
            Self::Decodes | Self::Mixed => Operator::Attention,
        }
    }

    /// The `i`th shape of Llama-3-8B, none of them measured.
    fn shape(self, i: u32) -> OperatorShape {
        let num_tokens = 9 + 2 * (i % 3900);
        match self {
            Self::RmsNorm => OperatorShape::RmsNorm { num_tokens, hidden_size: 4096 },
            Self::Rope => OperatorShape::Rope { num_tokens, heads: HEADS },
            Self::DownProj => OperatorShape::Gemm { m: num_tokens, n: 4096, k: 14_336 },
            Self::Decodes | Self::Mixed => {
                let mut load = AttentionLoad::default();
                (0..=i % 61).for_each(|seq| load.add_decode(300 + 7 * seq + i));
                if matches!(self, Self::Mixed) {
                    load.add_prefill(PrefillChunk { num_tokens: 1 + i % 2000, context_len: i % 300 });
                }
                OperatorShape::Attention { heads: HEADS, load }
            }
        }
    }
}

/// A different shape each time.
fn shapes(kind: Kind) -> impl FnMut() -> OperatorShape {
    let next = Cell::new(0);
    move || {
        next.set(next.get() + 1);
        kind.shape(next.get())
    }
}

/// Without any memory.
#[divan::bench(args = Kind::ALL, sample_size = 64)]
fn uncompiled(bencher: Bencher, kind: Kind) {
    bencher.with_inputs(shapes(kind)).bench_local_values(|shape| {
        PREDICTORS.predict_in_step(kind.operator(), &shape, OutOfDomain::Extrapolate)
    });
}

/// Shapes that were never asked before.
#[divan::bench(args = Kind::ALL, sample_count = 50, sample_size = 64)]
fn first(bencher: Bencher, kind: Kind) {
    let compiled = CompiledPredictors::new(Arc::clone(&PREDICTORS));
    bencher.with_inputs(shapes(kind)).bench_local_values(|shape| {
        compiled.predict_in_step(kind.operator(), &shape, OutOfDomain::Extrapolate)
    });
}

/// One of 500 shapes that were all asked before.
#[divan::bench(args = Kind::ALL, sample_size = 500)]
fn again(bencher: Bencher, kind: Kind) {
    let compiled = CompiledPredictors::new(Arc::clone(&PREDICTORS));
    let ask = |shape| compiled.predict_in_step(kind.operator(), &shape, OutOfDomain::Extrapolate);
    (0..500).for_each(|i| drop(ask(kind.shape(i))));
    let mut next = (0..500).cycle();
    bencher.with_inputs(|| kind.shape(next.next().unwrap_or(0))).bench_local_values(ask);
}

/// Decodes of a batch that stays as it is for 500 steps: each step every context grows by a token, so no load comes twice.
#[divan::bench(args = [4, 16, 128], sample_count = 100, sample_size = 1000)]
fn decode_stretch(bencher: Bencher, num_seqs: u32) {
    let compiled = CompiledPredictors::new(Arc::clone(&PREDICTORS));
    let (mut step, mut load, mut state) = (0, AttentionLoad::default(), 1u32);
    bencher
        .with_inputs(|| {
            if step % 500 == 0 {
                load = AttentionLoad::default();
                for _ in 0..num_seqs {
                    // Numerical Recipes' generator: contexts without a pattern.
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    load.add_decode(100 + (state >> 16) % 3000);
                }
            }
            step += 1;
            load.decode_kv_tokens += u64::from(num_seqs);
            load.max_decode_kv_tokens += 1;
            OperatorShape::Attention { heads: HEADS, load }
        })
        .bench_local_values(|shape| {
            compiled.predict_in_step(Operator::Attention, &shape, OutOfDomain::Extrapolate)
        });
}

/// The parts of a first prediction.
mod cold {
    use super::{Bencher, Kind, PREDICTORS, black_box, features, floor_ns, parts_ns, roofline_ns, shapes};

    #[divan::bench(args = Kind::ALL, sample_size = 64)]
    fn features_row(bencher: Bencher, kind: Kind) {
        let gpu = PREDICTORS.gpu();
        bencher.with_inputs(shapes(kind)).bench_local_values(|shape| features(&shape, gpu, 2000.0));
    }

    #[divan::bench(args = Kind::ALL, sample_size = 64)]
    fn parts(bencher: Bencher, kind: Kind) {
        let gpu = PREDICTORS.gpu();
        bencher.with_inputs(shapes(kind)).bench_local_values(|shape| parts_ns(&shape, gpu));
    }

    #[divan::bench(args = Kind::ALL, sample_size = 64)]
    fn baseline(bencher: Bencher, kind: Kind) {
        let predictor = PREDICTORS.get(kind.operator()).expect("an operator of the bundle");
        let gpu = PREDICTORS.gpu();
        bencher.with_inputs(shapes(kind)).bench_local_values(|shape| predictor.baseline_ns(&shape, gpu));
    }

    /// As the file holds it; predictions walk a flat copy in less than half of this.
    #[divan::bench(args = Kind::ALL, sample_size = 64)]
    fn forest(bencher: Bencher, kind: Kind) {
        let predictor = PREDICTORS.get(kind.operator()).expect("an operator of the bundle");
        let mut shape = shapes(kind);
        bencher
            .with_inputs(|| features(&shape(), PREDICTORS.gpu(), predictor.overhead_ns))
            .bench_local_refs(|row| predictor.forest.predict(row.as_slice()));
    }

    #[divan::bench(args = Kind::ALL, sample_size = 64)]
    fn domain(bencher: Bencher, kind: Kind) {
        let predictor = PREDICTORS.get(kind.operator()).expect("an operator of the bundle");
        let mut shape = shapes(kind);
        bencher
            .with_inputs(|| shape().values())
            .bench_local_refs(|values| predictor.domain.answers(kind.operator(), values));
    }

    #[divan::bench(args = Kind::ALL, sample_size = 64)]
    fn floor_and_roofline(bencher: Bencher, kind: Kind) {
        let gpu = PREDICTORS.gpu();
        bencher
            .with_inputs(shapes(kind))
            .bench_local_values(|shape| floor_ns(black_box(&shape), gpu) + roofline_ns(&shape, gpu));
    }
}

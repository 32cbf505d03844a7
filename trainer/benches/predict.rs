//! How long a prediction takes, and how long training does.
//!
//! `cargo bench -p plumbline-trainer`

use plumbline_bundles::{OutOfDomain, Predictors, Sample, TimeStats};
use plumbline_schema::{GpuSpec, Operator, OperatorShape, StepBatch, operator::Heads, roofline::roofline_ns};
use plumbline_trainer::{TrainOptions, train};

fn main() {
    divan::main();
}

fn gpu() -> GpuSpec {
    GpuSpec::shipped().remove(1)
}

/// 60 sizes from 1 to 8192, evenly spread over the logarithm.
fn sizes() -> impl Iterator<Item = u32> {
    (0..60).map(|i| 8192.0f64.powf(f64::from(i) / 59.0).round() as u32)
}

fn attention(chunk: u32, decodes: u32, context: u32) -> OperatorShape {
    let mut batch =
        StepBatch { prefill_chunks: Vec::new(), decode_contexts: vec![context; decodes as usize] };
    batch.prefill_chunks.push(plumbline_schema::PrefillChunk { num_tokens: chunk, context_len: 0 });
    let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
    OperatorShape::Attention { heads, load: batch.shape().attention }
}

fn samples() -> Vec<Sample> {
    let gemms = sizes().map(|m| (Operator::QkvProj, OperatorShape::Gemm { m, n: 4096, k: 1024 }));
    let norms = sizes()
        .map(|num_tokens| (Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens, hidden_size: 1024 }));
    let batches = sizes().flat_map(|chunk| {
        [(1, 100), (16, 900), (64, 3000), (128, 500)].map(|(decodes, context)| (chunk, decodes, context))
    });
    let attentions =
        batches.map(|(chunk, decodes, context)| (Operator::Attention, attention(chunk, decodes, context)));
    let points: std::collections::BTreeSet<_> = gemms.chain(norms).chain(attentions).collect();
    points.into_iter().filter_map(|(operator, shape)| sample(operator, shape)).collect()
}

fn sample(operator: Operator, shape: OperatorShape) -> Option<Sample> {
    let stats = TimeStats::from_times(&[2000.0 + 1.3 * roofline_ns(&shape, &gpu())])?;
    Some(Sample::bare(operator, shape, stats))
}

/// Times three operators at shapes that were not measured.
#[divan::bench]
fn predict(bencher: divan::Bencher) {
    let outcome = train(&samples(), &gpu(), &TrainOptions::default(), |_| ()).expect("samples of a law");
    let predictors = Predictors::new(gpu(), outcome.predictors).expect("just trained");
    let shapes = [
        (Operator::QkvProj, OperatorShape::Gemm { m: 77, n: 4096, k: 1024 }),
        (Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens: 77, hidden_size: 1024 }),
        (Operator::Attention, attention(77, 33, 777)),
    ];
    bencher.counter(divan::counter::ItemsCount::new(shapes.len())).bench(|| {
        shapes.map(|(operator, shape)| predictors.predict(operator, &shape, OutOfDomain::Extrapolate))
    });
}

/// Trains three operators, 360 samples.
#[divan::bench(sample_count = 10)]
fn train_three_operators(bencher: divan::Bencher) {
    let samples = samples();
    bencher.bench(|| train(&samples, &gpu(), &TrainOptions::default(), |_| ()));
}

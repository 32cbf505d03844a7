//! A GPU that obeys a law: what training has to recover.

use plumbline_bundles::{CacheState, Sample, TimeStats};
use plumbline_schema::{GpuSpec, Operator, OperatorShape, StepBatch, operator::Heads};
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;

/// Relative standard deviation of a measured median.
pub const NOISE: f64 = 0.01;

pub fn gpu() -> GpuSpec {
    GpuSpec::by_name("h100-sxm5-80gb").unwrap()
}

const HEADS: [Heads; 2] = [
    Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 },
    Heads { num_q_heads: 32, num_kv_heads: 8, head_dim: 128 },
];

/// True time in ns: a fixed cost and the longer of compute and memory, both below the data sheet's rates.
///
/// Matrix products compute whole waves of 128 x 128 tiles. Attention's chunks and decodes add up, and a decode
/// that is longer than its mates leaves SMs idle.
pub fn time_ns(shape: &OperatorShape) -> f64 {
    let gpu = gpu();
    let peak = gpu.bf16_flops_per_s * f64::from(gpu.max_clock_mhz) / f64::from(gpu.boost_clock_mhz);
    let memory_ns = |bytes: f64| bytes / (0.85 * gpu.hbm_bandwidth_bytes_per_s) * 1e9;
    match *shape {
        OperatorShape::Gemm { m, n, k } => {
            let tiles = f64::from(m.div_ceil(128)) * f64::from(n.div_ceil(128));
            let waves = (tiles / f64::from(gpu.num_sms)).ceil() * f64::from(gpu.num_sms);
            let compute = 2.0 * 128.0 * 128.0 * f64::from(k) * waves / (0.7 * peak) * 1e9;
            3000.0 + compute.max(memory_ns(shape.bytes().0 as f64))
        }
        OperatorShape::Attention { heads, load } => {
            let prefill = 4.0 * heads.q_width() as f64 * load.prefill_pairs as f64 / (0.5 * peak) * 1e9;
            let kv_bytes = 4.0 * heads.kv_width() as f64;
            let decode = memory_ns(kv_bytes * load.decode_kv_tokens as f64);
            let longest = memory_ns(kv_bytes * f64::from(load.max_decode_kv_tokens)) * 4.0;
            5000.0 + prefill + decode.max(longest)
        }
        _ => 1500.0 + memory_ns(shape.bytes().0 as f64),
    }
}

/// One cold sample of a shape, with the law's time times noise.
pub fn sample(operator: Operator, shape: OperatorShape, batch: Option<StepBatch>, noise: f64) -> Sample {
    let time = time_ns(&shape) * noise;
    let stats = TimeStats::from_times(&[0.99 * time, time, 1.02 * time]).unwrap();
    Sample {
        batch,
        cache: CacheState::Cold,
        sm_clock_mhz: Some(1980),
        kernel: "law".into(),
        ..Sample::bare(operator, shape, stats)
    }
}

/// Samples of five operators as a plan would take them, with normal noise of [`NOISE`].
pub fn samples(seed: u64) -> Vec<Sample> {
    let mut noise = normal(seed);
    let mut samples = Vec::new();
    for &m in &TOKENS {
        for (n, k) in [(4096, 1024), (6144, 4096)] {
            samples.push((Operator::QkvProj, OperatorShape::Gemm { m, n, k }, None));
        }
        for (n, k) in [(1024, 2048), (4096, 4096)] {
            samples.push((Operator::OProj, OperatorShape::Gemm { m, n, k }, None));
        }
        for hidden_size in [1024, 4096] {
            samples.push((Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens: m, hidden_size }, None));
        }
        for intermediate_size in [3072, 14336] {
            let shape = OperatorShape::SiluMul { num_tokens: m, intermediate_size };
            samples.push((Operator::SiluMul, shape, None));
        }
    }
    for heads in HEADS {
        for batch in batches() {
            let shape = OperatorShape::Attention { heads, load: batch.shape().attention };
            samples.push((Operator::Attention, shape, Some(batch)));
        }
    }
    let noisy = |(operator, shape, batch)| sample(operator, shape, batch, 1.0 + NOISE * noise());
    samples.into_iter().map(noisy).collect()
}

/// Samples of a grid of made-up models, as a plan takes them to predict models that it does not know: 32 layouts an
/// operator, each at ten random numbers of tokens, attention at eight random batches.
pub fn grid(seed: u64) -> Vec<Sample> {
    let mut noise = normal(seed);
    let mut rng = Pcg64::seed_from_u64(seed + 1);
    let mut log_uniform = |low: f64, high: f64, step: u32| {
        let u = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        ((low * (high / low).powf(u)) as u32).div_ceil(step) * step
    };
    let batches = batches();
    let mut samples = Vec::new();
    for i in 0..32u32 {
        let hidden_size = log_uniform(768.0, 8192.0, 128);
        let intermediate_size = log_uniform(2048.0, 28672.0, 256);
        let num_kv_heads = [2, 4, 8, 16][(i % 4) as usize];
        let num_q_heads = num_kv_heads * log_uniform(1.0, 8.0, 1).min(64 / num_kv_heads);
        let n = log_uniform(1024.0, 8192.0, 128);
        for j in 0..10 {
            let num_tokens = match j {
                0 => 1,
                1 => 8192,
                _ => log_uniform(1.0, 8192.0, 1),
            };
            samples.extend([
                (Operator::QkvProj, OperatorShape::Gemm { m: num_tokens, n, k: hidden_size }, None),
                (Operator::OProj, OperatorShape::Gemm { m: num_tokens, n: hidden_size, k: n }, None),
                (Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens, hidden_size }, None),
                (Operator::SiluMul, OperatorShape::SiluMul { num_tokens, intermediate_size }, None),
            ]);
        }
        let heads = Heads { num_q_heads, num_kv_heads, head_dim: 128 };
        for _ in 0..8 {
            let batch = &batches[log_uniform(1.0, 1e6, 1) as usize % batches.len()];
            let shape = OperatorShape::Attention { heads, load: batch.shape().attention };
            samples.push((Operator::Attention, shape, Some(batch.clone())));
        }
    }
    let noisy = |(operator, shape, batch)| sample(operator, shape, batch, 1.0 + NOISE * noise());
    samples.into_iter().map(noisy).collect()
}

const TOKENS: [u32; 34] = [
    1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 136, 160, 192, 224, 256, 264, 320, 384, 448, 512, 520, 640,
    768, 896, 1024, 1152, 1536, 2048, 3072, 4096, 6144, 8192,
];

fn batches() -> Vec<StepBatch> {
    let mut texts = Vec::new();
    for decodes in [1, 4, 16, 64, 128, 256] {
        for context in [15, 127, 511, 1023, 2047, 4095] {
            texts.push((String::new(), vec![context.to_string(); decodes].join(";")));
        }
        texts.push((String::new(), format!("{};6000", vec!["300"; decodes].join(";"))));
    }
    for tokens in [16, 64, 128, 256, 512, 1024, 2048, 4096] {
        for context in [0, 512, 2048, 8192] {
            texts.push((format!("{tokens}:{context}"), String::new()));
        }
        for decodes in [4, 40, 128] {
            texts.push((format!("{tokens}:256"), vec!["700"; decodes].join(";")));
        }
    }
    texts.iter().map(|(chunks, decodes)| StepBatch::parse(chunks, decodes).unwrap()).collect()
}

/// A stream of numbers with mean 0 and standard deviation 1, by the sum of twelve uniform ones.
pub fn normal(seed: u64) -> impl FnMut() -> f64 {
    let mut rng = Pcg64::seed_from_u64(seed);
    let mut uniform = move || (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    move || (0..12).map(|_| uniform()).sum::<f64>() - 6.0
}

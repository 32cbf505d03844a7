//! Checks every operator on the first GPU and times them at the shapes of two models.
//!
//! `cargo run --release -p plumbline-profiler --example ops`, with `check` for the numeric checks alone,
//! `attention` for attention alone, and `hot` to time with the same buffers each time.

use std::process::ExitCode;

use plumbline_bundles::CacheState;
use plumbline_profiler::{CudaDevice, Device, Point, ProfileError, StoppingRule};
use plumbline_schema::{Heads, ModelSpec, Operator, OperatorShape, StepBatch, forward_pass};

const RULE: StoppingRule = StoppingRule {
    min_samples: 10,
    max_samples: 40,
    max_relative_error: 0.01,
    time_limit_ns: 50_000_000,
    warm_up_ns: 0,
    pause_ns: 0,
};

fn attention(chunks: &str, decodes: &str, heads: Heads) -> Result<Point, Box<dyn std::error::Error>> {
    let batch = StepBatch::parse(chunks, decodes)?;
    let shape = OperatorShape::Attention { heads, load: batch.shape().attention };
    Ok(Point { operator: Operator::Attention, shape, batch: Some(batch) })
}

fn decodes(num_seqs: usize, context: u32) -> String {
    vec![context.to_string(); num_seqs].join(";")
}

/// One shape of every operator, and attention in all its forms.
fn check_points() -> Result<Vec<Point>, Box<dyn std::error::Error>> {
    let heads = |num_q_heads, num_kv_heads, head_dim| Heads { num_q_heads, num_kv_heads, head_dim };
    let plain = |operator, values: &[u64]| {
        let shape =
            OperatorShape::from_values(operator, values).ok_or("a shape does not fit its operator")?;
        Ok::<_, Box<dyn std::error::Error>>(Point { operator, shape, batch: None })
    };
    let mut points = vec![
        plain(Operator::Embedding, &[37, 1024])?,
        plain(Operator::RmsNorm, &[37, 1024])?,
        plain(Operator::RmsNorm, &[5, 5120])?,
        plain(Operator::QkNorm, &[37, 16, 8, 128])?,
        plain(Operator::QkNorm, &[3, 14, 2, 64])?,
        plain(Operator::Rope, &[37, 16, 8, 128])?,
        plain(Operator::Rope, &[3, 14, 2, 64])?,
        plain(Operator::KvCacheWrite, &[37, 8, 128])?,
        plain(Operator::SiluMul, &[37, 3072])?,
        plain(Operator::Sample, &[5, 151_936])?,
        plain(Operator::Sample, &[300, 32_000])?,
        plain(Operator::QkvProj, &[8, 768, 512])?,
        plain(Operator::DownProj, &[130, 256, 384])?,
    ];
    for (q_heads, kv_heads, head_dim) in [(4, 4, 128), (4, 2, 64), (8, 2, 128), (8, 1, 128), (12, 1, 64)] {
        let heads = heads(q_heads, kv_heads, head_dim);
        points.push(attention("100:0", "", heads)?);
        points.push(attention("67:133;129:0;1:64", "", heads)?);
        points.push(attention("", "0;15;16;700", heads)?);
        points.push(attention("33:20", "5;1200", heads)?);
        points.push(attention("20:2000;70:1300", "", heads)?);
    }
    // Enough tiles and sequences for the large tiles and for unsplit decodes.
    points.push(attention("200:37;200:0;200:5;200:0;200:0;200:1;200:0", "", heads(16, 8, 128))?);
    points.push(attention("", &decodes(60, 70), heads(16, 8, 128))?);
    Ok(points)
}

/// The forward pass of steps that matter, operators in order.
fn timed_points(only_attention: bool) -> Result<Vec<(String, Point)>, Box<dyn std::error::Error>> {
    let mut points = Vec::new();
    for name in ["qwen3-0.6b", "llama3-8b"] {
        let model = ModelSpec::load(name)?;
        let heads = Heads {
            num_q_heads: model.num_q_heads,
            num_kv_heads: model.num_kv_heads,
            head_dim: model.head_dim,
        };
        let mut steps: Vec<(String, String)> =
            [1, 8, 64, 256].iter().map(|&n| (String::new(), decodes(n, 520))).collect();
        steps.extend([512, 2048, 8192].iter().map(|n| (format!("{n}:0"), String::new())));
        for (chunks, decodes) in steps.iter().filter(|_| !only_attention) {
            let batch = StepBatch::parse(chunks, decodes)?;
            for call in forward_pass(&model, &batch.shape(), 1)? {
                if call.operator != Operator::Attention {
                    let point = Point { operator: call.operator, shape: call.shape, batch: None };
                    points.push((name.to_owned(), point));
                }
            }
        }
        steps.extend([
            (String::new(), decodes(8, 519)),
            (String::new(), decodes(128, 1023)),
            (String::new(), decodes(64, 16_383)),
            (String::new(), decodes(1, 32_767)),
            ("2048:2048".to_owned(), String::new()),
            ("64:8192".to_owned(), String::new()),
            ("512:512".to_owned(), decodes(32, 1023)),
        ]);
        for (chunks, decodes) in &steps {
            points.push((name.to_owned(), attention(chunks, decodes, heads)?));
        }
    }
    Ok(points)
}

fn describe(point: &Point) -> String {
    match &point.batch {
        Some(batch) => {
            let chunks = batch.format_prefill_chunks();
            let decode = match batch.decode_contexts.first() {
                Some(context) => format!(" {}x{}", batch.decode_contexts.len(), context + 1),
                None => String::new(),
            };
            format!("{chunks}{decode}")
        }
        None => format!("{:?}", point.shape.values()),
    }
}

fn run() -> Result<bool, Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| words.iter().any(|w| w == word);
    let mut device = CudaDevice::open(0)?;
    println!("{:#?}", device.identity());

    let mut all_right = true;
    for point in check_points()? {
        let began = std::time::Instant::now();
        let report = device.check(&point)?;
        all_right &= report.passed();
        println!(
            "{} {:<15} {:<40} error {:.2e} of {:.0e}  {:?}",
            if report.passed() { "ok   " } else { "WRONG" },
            point.operator.name(),
            describe(&point),
            report.relative_error,
            report.tolerance,
            began.elapsed()
        );
    }
    if has("check") || !all_right {
        return Ok(all_right);
    }

    let ceilings = device.ceilings()?;
    println!(
        "copy {:.0} GB/s, matmul {:.0} TFLOP/s",
        ceilings.copy_bandwidth_bytes_per_s / 1e9,
        ceilings.matmul_flops_per_s / 1e12
    );
    println!("{:#?}", device.host_costs()?);
    println!("{:?}", device.state());
    let cache = if has("hot") { CacheState::Hot } else { CacheState::Cold };
    for (model, point) in timed_points(has("attention"))? {
        let began = std::time::Instant::now();
        let measured = match device.measure(&point, cache, &RULE) {
            Ok(measured) => measured,
            Err(ProfileError::Operator { reason, fatal: false, .. }) => {
                println!(
                    "{model:<10} {:<14} {:<24} failed: {reason}",
                    point.operator.name(),
                    describe(&point)
                );
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let ns = measured.stats.p50_ns;
        let bytes = point.shape.bytes().0 as f64 / ns * 1e9;
        let flops = point.shape.flops().0 as f64 / ns * 1e9;
        println!(
            "{model:<10} {:<14} {:<24} {:>9.2} us +-{:>4.1}% n={:<3} {:>6.0} GB/s {:>3.0}% {:>6.1} TFLOP/s {:>3.0}%  {:>4} ms  {}",
            point.operator.name(),
            describe(&point),
            ns / 1e3,
            100.0 * measured.stats.std_ns / measured.stats.mean_ns,
            measured.stats.n,
            bytes / 1e9,
            100.0 * bytes / ceilings.copy_bandwidth_bytes_per_s,
            flops / 1e12,
            100.0 * flops / ceilings.matmul_flops_per_s,
            began.elapsed().as_millis(),
            measured.kernel
        );
    }
    println!("{:?}", device.state());
    Ok(true)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

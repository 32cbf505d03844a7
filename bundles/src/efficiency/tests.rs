//! Shares of made-up samples that follow a known law, and the shipped peers.

use std::path::Path;

use plumbline_schema::{GpuSpec, Heads, Operator, OperatorShape, StepBatch, roofline::floor_ns};

use super::{
    Bound, Ceilings, Class, judge,
    peers::{self, Peer, Verdict, compare},
};
use crate::{
    predictor::Provenance,
    samples::{CacheState, Sample},
    stats::TimeStats,
};

const CEILINGS: Ceilings =
    Ceilings { copy_bandwidth_bytes_per_s: 2e12, matmul_flops_per_s: 500e12, l2_bytes: 40 << 20 };
const HEADS: Heads = Heads { num_q_heads: 32, num_kv_heads: 8, head_dim: 128 };
/// Shares of the ceilings that the made-up kernels reach.
const COMPUTE_EFFICIENCY: f64 = 0.75;
const MEMORY_EFFICIENCY: f64 = 0.85;

fn sample(operator: Operator, shape: OperatorShape, cache: CacheState, time_ns: f64) -> Sample {
    let stats = TimeStats::from_times(&[time_ns, time_ns, time_ns]).unwrap();
    Sample { cache, sm_clock_mhz: Some(1980), ..Sample::bare(operator, shape, stats) }
}

/// A sample whose time is its work at the efficiencies above.
fn by_law(operator: Operator, shape: OperatorShape, cache: CacheState) -> Sample {
    let memory_ns = shape.bytes().0 as f64 / (CEILINGS.copy_bandwidth_bytes_per_s * MEMORY_EFFICIENCY) * 1e9;
    let is_tensor = operator.is_gemm() || operator == Operator::Attention;
    let flops = if is_tensor { shape.flops().0 as f64 } else { 0.0 };
    let compute_ns = flops / (CEILINGS.matmul_flops_per_s * COMPUTE_EFFICIENCY) * 1e9;
    sample(operator, shape, cache, memory_ns.max(compute_ns))
}

fn attention(chunks: &str, contexts: &str) -> Sample {
    attention_of(HEADS, chunks, contexts)
}

fn attention_of(heads: Heads, chunks: &str, contexts: &str) -> Sample {
    let batch = StepBatch::parse(chunks, contexts).unwrap();
    let shape = OperatorShape::Attention { heads, load: batch.shape().attention };
    Sample { batch: Some(batch), ..by_law(Operator::Attention, shape, CacheState::Cold) }
}

fn norm(num_tokens: u32) -> OperatorShape {
    OperatorShape::RmsNorm { num_tokens, hidden_size: 4096 }
}

fn close(a: f64, b: f64) -> bool {
    (a / b - 1.0).abs() < 1e-9
}

#[test]
fn shares_are_those_of_the_law() {
    let samples = [
        attention("8192:0", ""),
        attention("2048:8192", ""),
        attention("", &vec!["32767"; 16].join(";")),
        by_law(Operator::RmsNorm, norm(8192), CacheState::Cold),
        by_law(Operator::QkvProj, OperatorShape::Gemm { m: 4096, n: 6144, k: 4096 }, CacheState::Cold),
    ];
    let judged = judge(&samples, &CEILINGS);
    let found: Vec<_> = judged.iter().map(|j| (j.operator, j.class, j.bound, j.is_met)).collect();
    assert_eq!(
        found,
        [
            (Operator::RmsNorm, Class::Elementwise, Bound::Copy, Some(false)),
            (Operator::QkvProj, Class::Gemm, Bound::Matmul, None),
            (Operator::Attention, Class::Prefill, Bound::Matmul, Some(true)),
            (Operator::Attention, Class::Decode, Bound::Copy, Some(false)),
        ]
    );
    for row in judged {
        let law = if row.bound == Bound::Copy { MEMORY_EFFICIENCY } else { COMPUTE_EFFICIENCY };
        let shares = [&row.best, &row.median, &row.worst].map(|rate| rate.share.unwrap());
        assert!(shares.iter().all(|&share| close(share, law)), "{}: {shares:?}", row.operator);
        assert_eq!(row.num_met, if row.is_met == Some(true) { row.num_large } else { 0 });
    }
}

#[test]
fn best_median_and_worst_are_told_apart() {
    let times = [400_000.0, 300_000.0, 200_000.0];
    let mut samples: Vec<_> =
        times.iter().map(|&t| sample(Operator::RmsNorm, norm(8192), CacheState::Cold, t)).collect();
    samples[0].flags = "noisy|throttled".into();
    let row = &judge(&samples, &CEILINGS)[0];
    for (rate, time_ns) in [&row.best, &row.median, &row.worst].into_iter().zip(times.iter().rev()) {
        assert!(close(rate.time_ns, *time_ns), "{rate:?}");
    }
    assert_eq!((row.num_large, row.num_throttled), (3, 1));
    // 8,192 x 4,096 x 8 bytes and the weight at 2 TB/s: 134,222 ns.
    assert!(close(row.best.share.unwrap(), norm(8192).bytes().0 as f64 / 2e12 * 1e9 / 200_000.0));
}

#[test]
fn what_lives_in_the_l2_cache_has_no_share_of_copy_bandwidth() {
    let hot = by_law(Operator::RmsNorm, norm(512), CacheState::Hot);
    assert_eq!(CEILINGS.rate(&hot).share, None);
    let cold = by_law(Operator::RmsNorm, norm(512), CacheState::Cold);
    assert!(close(CEILINGS.rate(&cold).share.unwrap(), MEMORY_EFFICIENCY));
    assert_eq!(CEILINGS.class(&cold), None, "16.8 MB is not large");
    // A hot product that is bound by compute still has its share of that.
    let product = by_law(Operator::OProj, OperatorShape::Gemm { m: 2048, n: 2048, k: 2048 }, CacheState::Hot);
    assert!(close(CEILINGS.rate(&product).share.unwrap(), COMPUTE_EFFICIENCY));
}

#[test]
fn only_large_inputs_are_judged() {
    let class = |sample: &Sample| CEILINGS.class(sample);
    assert_eq!(class(&attention("2048:0", "")), None);
    assert_eq!(class(&attention("32:16384", "")), None, "bound by memory");
    assert_eq!(class(&attention("256:16384", "")), None, "too few tokens to fill a GPU");
    assert_eq!(class(&attention("8192:0", "5")), None, "mixed");
    assert_eq!(class(&attention("4096:0;4096:0", "")), None, "no long prompt");
    assert_eq!(class(&attention("8192:0;64:0", "")), None, "one short prompt");
    assert_eq!(class(&attention("8192:8193", "")), None, "longer than what is judged");
    assert_eq!(class(&attention("8192:0;2048:6144", "")), Some(Class::Prefill));
    // 17.2 GFLOP are 34 us at the ceiling.
    let one_head = Heads { num_q_heads: 1, num_kv_heads: 1, head_dim: 128 };
    assert_eq!(class(&attention_of(one_head, "8192:0", "")), None, "too little to fill a GPU");
    // 244,141 keys of 4,096 bytes are 1 GB.
    assert_eq!(class(&attention("", "244139")), None);
    assert_eq!(class(&attention("", "244140")), Some(Class::Decode));
    let mut impossible = by_law(Operator::RmsNorm, norm(65_536), CacheState::Cold);
    assert_eq!(class(&impossible), Some(Class::Elementwise));
    impossible.flags = "below_floor".into();
    assert_eq!(class(&impossible), None);
}

#[test]
fn shipped_peers_are_plausible() {
    let gpu = GpuSpec::by_name("h100-sxm5-80gb").unwrap();
    let peers = Peer::shipped(&gpu.name).unwrap();
    assert!(peers.len() > 20);
    assert!(Peer::shipped("a100-sxm4-80gb").unwrap().is_empty());
    for peer in &peers {
        let what = format!("{} {:?}", peer.phase, peer.parts);
        let floor: f64 = peer.parts.iter().map(|part| floor_ns(&part.shape, &gpu)).fold(0.0, f64::max);
        assert!(peer.median_ns > floor, "{what}: {} under {floor}", peer.median_ns);
        assert!(peer.p90_ns < 1.5 * peer.p10_ns, "{what}: launches of one shape differ");
        assert!(peer.median_period_ns.is_none_or(|period| period > peer.median_ns), "{what}");
        assert_eq!(peer.kernels.split('+').count(), peer.num_kernels as usize, "{what}");
    }
    let phases = |phase: &str| peers.iter().filter(|peer| peer.phase == phase).count();
    assert_eq!((phases("prefill_2048"), phases("decode_8")), (12, 13));
}

#[test]
fn bad_peers_are_refused_with_their_place() {
    let good = include_str!("../../data/peers/vllm-0.24-h100.csv");
    let error = |text: &str| peers::parse(text.as_bytes(), Path::new("p.csv")).unwrap_err().to_string();
    let bad = error(&good.replacen("qkv_proj", "qkv_prof", 1));
    assert!(bad.contains("line 3") && bad.contains("operators") && bad.contains("qkv_prof"), "{bad}");
    let bad = error(&good.replacen("512:0;512:0;512:0;512:0", "512:0;512:0;512:0;511:0", 1));
    assert!(bad.contains("line 6") && bad.contains("as the shape says"), "{bad}");
    let bad = error(&good.replacen("24800", "-1", 1));
    assert!(bad.contains("median_ns") && bad.contains("above 0"), "{bad}");
    assert!(error(&good.replacen("2048x4096x1024", "2048x4096", 1)).contains("m, n, k"));
    assert!(error("a,b\n").contains("expected engine,gpu"));
}

fn peer(operators: &str, shapes: &str, median_ns: f64) -> Vec<Peer> {
    let header = peers::COLUMNS.join(",");
    let text = format!(
        "{header}\nvLLM 0,g,m,p,{operators},{shapes},,,{median_ns},{median_ns},{median_ns},,1,k,9,x,\n"
    );
    peers::parse(text.as_bytes(), Path::new("p.csv")).unwrap()
}

#[test]
fn verdicts_compare_times_beyond_what_is_level() {
    let verdict = |time_ns: f64, theirs_ns: f64| {
        let samples = [sample(Operator::RmsNorm, norm(64), CacheState::Hot, time_ns)];
        compare(peer("rms_norm", "64x4096", theirs_ns), &samples, None)[0].verdict
    };
    assert_eq!(verdict(10_000.0, 20_000.0), Verdict::Faster { percent: 50.0 });
    assert_eq!(verdict(20_500.0, 20_000.0), Verdict::Level, "2.5 %");
    assert_eq!(verdict(22_000.0, 20_000.0), Verdict::Slower { percent: 10.0 });
    assert_eq!(verdict(1_250.0, 1_000.0), Verdict::Level, "25 %, but 0.25 us");
    assert_eq!(verdict(1_500.0, 1_000.0), Verdict::Slower { percent: 50.0 });
    assert_eq!(compare(peer("rms_norm", "64x4096", 9.0), &[], None)[0].verdict, Verdict::NotMeasured);
}

#[test]
fn fused_operators_are_summed_and_the_state_of_a_model_is_preferred() {
    let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
    let rope = OperatorShape::Rope { num_tokens: 8, heads };
    let samples = [
        sample(Operator::QkNorm, OperatorShape::QkNorm { num_tokens: 8, heads }, CacheState::Cold, 2000.0),
        sample(Operator::Rope, rope, CacheState::Cold, 9000.0),
        sample(Operator::Rope, rope, CacheState::Hot, 1500.0),
    ];
    let rows = compare(peer("qk_norm+rope", "8x16x8x128+8x16x8x128", 3000.0), &samples, None);
    let ours = rows[0].ours.as_ref().unwrap();
    assert_eq!((ours.time_ns, rows[0].verdict), (3500.0, Verdict::Slower { percent: 100.0 / 6.0 }));
    assert_eq!((ours.cache.as_str(), ours.provenance), ("cold+hot", Provenance::Measured));
    // One of the two alone is no comparison.
    let rows = compare(peer("qk_norm+rope", "8x16x8x128+8x16x8x128", 3000.0), &samples[..1], None);
    assert_eq!((&rows[0].ours, rows[0].verdict), (&None, Verdict::NotMeasured));
}

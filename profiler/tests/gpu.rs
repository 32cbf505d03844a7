//! The operators on a real GPU; without one, each test says why it was skipped.
//!
//! `cargo test -p plumbline-profiler --test gpu -- --nocapture`

use std::sync::{Mutex, MutexGuard, PoisonError};

use plumbline_bundles::CacheState;
use plumbline_profiler::{CudaDevice, Device, Point, ProfileError, StoppingRule};
use plumbline_schema::{Heads, Operator, OperatorShape, StepBatch, roofline::floor_ns};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

const RULE: StoppingRule = StoppingRule {
    min_samples: 10,
    max_samples: 50,
    max_relative_error: 0.005,
    time_limit_ns: 500_000_000,
    warm_up_ns: 0,
    pause_ns: 0,
};

/// One test at a time: timings must not disturb each other, and the device's memory is taken whole.
static GPU: Mutex<()> = Mutex::new(());

fn open(test: &str) -> Option<(MutexGuard<'static, ()>, CudaDevice)> {
    open_as(test, u32::MAX)
}

fn open_as(test: &str, max_compute_capability: u32) -> Option<(MutexGuard<'static, ()>, CudaDevice)> {
    let guard = GPU.lock().unwrap_or_else(PoisonError::into_inner);
    match CudaDevice::open_as(0, max_compute_capability) {
        Ok(device) => Some((guard, device)),
        Err(ProfileError::NoDevice { reason }) => {
            println!("SKIPPED: {test}: {reason}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn plain(operator: Operator, values: &[u64]) -> Point {
    Point { operator, shape: OperatorShape::from_values(operator, values).unwrap(), batch: None }
}

fn attention(chunks: &str, decodes: &str, heads: Heads) -> Point {
    let batch = StepBatch::parse(chunks, decodes).unwrap();
    let shape = OperatorShape::Attention { heads, load: batch.shape().attention };
    Point { operator: Operator::Attention, shape, batch: Some(batch) }
}

fn check(device: &mut CudaDevice, point: &Point) {
    let report = device.check(point).unwrap();
    assert!(report.passed(), "{point:?}: {report:?}");
}

/// The code that an 8.0 GPU would run, compiled for 8.0 and run on whatever is there.
#[test]
fn the_code_path_of_8_0_matches_the_reference_too() {
    let Some((_guard, mut device)) = open_as("the code path of 8.0", 80) else { return };
    check_elementwise_and_products(&mut device);
    check_attention(&mut device);
    let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
    for (point, kernel) in [
        (attention("64:0", "", heads), "attention_prefill rows=64"),
        (attention("2048:0", "", heads), "attention_prefill rows=128"),
        (attention("", "500;600", heads), "attention_decode"),
    ] {
        let measured = device.measure(&point, CacheState::Cold, &RULE).unwrap();
        assert!(measured.kernel.starts_with(kernel), "{}", measured.kernel);
    }
}

#[test]
fn elementwise_operators_and_products_match_the_reference() {
    let Some((_guard, mut device)) = open("elementwise operators and products") else { return };
    check_elementwise_and_products(&mut device);
}

fn check_elementwise_and_products(device: &mut CudaDevice) {
    let mut random = Pcg64Mcg::seed_from_u64(1);
    for _ in 0..8 {
        let tokens = random.random_range(1..200u64);
        let width = 8 * random.random_range(1..700u64);
        let kv_heads = random.random_range(1..5u64);
        let q_heads = kv_heads * random.random_range(1..5u64);
        let head_dim = if random.random() { 64 } else { 128 };
        let aligned = [8, 16, 64][random.random_range(0..3)];
        for point in [
            plain(Operator::Embedding, &[tokens, width]),
            plain(Operator::RmsNorm, &[tokens, width]),
            plain(Operator::SiluMul, &[tokens, width]),
            plain(Operator::QkNorm, &[tokens, q_heads, kv_heads, head_dim]),
            plain(Operator::Rope, &[tokens, q_heads, kv_heads, head_dim]),
            plain(Operator::KvCacheWrite, &[tokens, kv_heads, head_dim]),
            plain(Operator::Sample, &[tokens, 10 * width]),
            plain(Operator::OProj, &[tokens, 24 * aligned, 40 * aligned]),
        ] {
            check(device, &point);
        }
    }
    // Every number of vectors that a thread may have.
    for width in [4104, 8200, 16_384] {
        check(device, &plain(Operator::RmsNorm, &[2, width]));
    }
    check(device, &plain(Operator::Rope, &[3, 128, 128, 128]));
    for head_dim in [64, 128] {
        check(device, &plain(Operator::QkNorm, &[2900, 18, 6, head_dim]));
    }
    check(device, &plain(Operator::Sample, &[1, 151_936]));
}

#[test]
fn attention_matches_the_reference_in_every_form() {
    let Some((_guard, mut device)) = open("attention") else { return };
    check_attention(&mut device);
}

fn check_attention(device: &mut CudaDevice) {
    let mut random = Pcg64Mcg::seed_from_u64(2);
    for head_dim in [64, 128] {
        for (num_q_heads, num_kv_heads) in [(3, 3), (4, 2), (8, 2), (8, 1), (24, 2)] {
            let heads = Heads { num_q_heads, num_kv_heads, head_dim };
            let mut list = |n: u32, below: u32| -> Vec<String> {
                (0..n).map(|_| random.random_range(0..below).to_string()).collect()
            };
            let decodes = list(6, 900).join(";");
            let contexts = list(3, 300);
            let chunks = format!("1:{};127:{};200:{}", contexts[0], contexts[1], contexts[2]);
            check(device, &attention(&chunks, "", heads));
            check(device, &attention("", &decodes, heads));
            check(device, &attention(&chunks, &decodes, heads));
            // Few queries over so many keys that the keys are split.
            check(device, &attention("3:1500;40:1100", "", heads));
            // Lengths at the edges of KV blocks and tiles.
            check(device, &attention("64:0;128:128;65:63", "0;14;15;16;63;64", heads));
        }
    }
    // Enough queries for large tiles, and enough decodes that none is split.
    let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
    let chunks = ["150:9"; 9].join(";");
    check(device, &attention(&chunks, "", heads));
    check(device, &attention("", &vec!["50"; 100].join(";"), heads));
}

#[test]
fn times_repeat_grow_with_work_and_respect_the_floor() {
    let Some((_guard, mut device)) = open("times") else { return };
    let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
    let decodes = |n: usize| vec!["4095"; n].join(";");
    // Twice the work in the second of each pair.
    let pairs = [
        [plain(Operator::GateUpProj, &[2048, 8192, 4096]), plain(Operator::GateUpProj, &[4096, 8192, 4096])],
        [plain(Operator::SiluMul, &[8192, 8192]), plain(Operator::SiluMul, &[16_384, 8192])],
        [attention("", &decodes(64), heads), attention("", &decodes(128), heads)],
    ];
    for pair in &pairs {
        let mut times = Vec::new();
        for point in pair {
            let mut time = || device.measure(point, CacheState::Cold, &RULE).unwrap();
            let (first, second) = (time(), time());
            assert!(!first.kernel.is_empty());
            let (a, b) = (first.stats.p50_ns, second.stats.p50_ns);
            assert!((a / b - 1.0).abs() < 0.1, "{point:?}: {a} and then {b} ns");
            let floor = floor_ns(&point.shape, device.spec());
            assert!(a.min(b) >= floor, "{point:?}: {a} and {b} ns, at least {floor} are needed");
            times.push(a);
        }
        let ratio = times[1] / times[0];
        assert!((1.6..2.4).contains(&ratio), "{:?} takes {ratio} times as long", pair[1]);
    }
}

#[test]
fn cold_weights_take_longer_than_hot_ones() {
    let Some((_guard, mut device)) = open("cold and hot") else { return };
    // 8 MiB of weights: in the L2 cache when hot, from memory when cold.
    let point = plain(Operator::QkvProj, &[8, 4096, 1024]);
    let mut time = |cache| device.measure(&point, cache, &RULE).unwrap().stats.p50_ns;
    let (cold, hot) = (time(CacheState::Cold), time(CacheState::Hot));
    assert!(cold > hot, "{cold} ns cold, {hot} ns hot");
}

#[test]
fn what_cannot_run_is_an_error_and_the_device_goes_on() {
    let Some((_guard, mut device)) = open("errors") else { return };
    let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
    let good = plain(Operator::SiluMul, &[64, 1024]);
    for bad in [
        plain(Operator::SiluMul, &[2_000_000, 65_536]),
        plain(Operator::SiluMul, &[64, 1023]),
        plain(Operator::Rope, &[8, 16, 8, 96]),
        plain(Operator::AllReduce, &[1024, 2]),
        Point { batch: None, ..attention("8:0", "", heads) },
        attention("", "", heads),
    ] {
        match device.measure(&bad, CacheState::Cold, &RULE) {
            Err(ProfileError::Operator { operator, reason, fatal, .. }) => {
                assert_eq!(operator, bad.operator);
                assert!(!fatal && !reason.is_empty(), "{reason}");
            }
            other => panic!("{bad:?}: {other:?}"),
        }
        assert!(device.measure(&good, CacheState::Cold, &RULE).is_ok());
    }
}

#[test]
fn host_costs_and_ceilings_are_of_a_possible_size() {
    let Some((_guard, mut device)) = open("host costs") else { return };
    let ceilings = device.ceilings().unwrap();
    let spec = device.spec().clone();
    assert!(ceilings.copy_bandwidth_bytes_per_s > 0.5 * spec.hbm_bandwidth_bytes_per_s, "{ceilings:?}");
    assert!(ceilings.copy_bandwidth_bytes_per_s < spec.hbm_bandwidth_bytes_per_s, "{ceilings:?}");
    assert!(ceilings.matmul_flops_per_s > 0.4 * spec.bf16_flops_per_s, "{ceilings:?}");

    let began = std::time::Instant::now();
    let costs = device.host_costs().unwrap();
    println!("host costs took {:?}: {costs:#?}", began.elapsed());
    assert!(began.elapsed() < std::time::Duration::from_secs(10));
    costs.check().unwrap();
    let micros = 200.0..100_000.0;
    assert!(micros.contains(&costs.kernel_launch_ns.p50_ns), "{costs:?}");
    assert!(micros.contains(&costs.kernel_gap_ns.p50_ns), "{costs:?}");
    assert!(costs.graph_launch.windows(2).all(|pair| pair[0].num_nodes < pair[1].num_nodes));
    assert!(costs.single_thread_score > 1.0 && costs.num_cores > 0, "{costs:?}");
    let rows: Vec<_> = costs.launch_rows.iter().map(|row| row.num_launches).collect();
    assert_eq!(rows, [1, 4, 16, 64, 256, 1000]);
    let arguments: Vec<_> = costs.launch_arguments.iter().map(|cost| cost.num_arguments).collect();
    assert_eq!(arguments, [1, 4, 8, 16]);
    assert!(costs.launch_rows.iter().all(|row| micros.contains(&row.launch_ns.p50_ns)), "{costs:?}");
    assert!(costs.launch_arguments.iter().all(|cost| micros.contains(&cost.launch_ns.p50_ns)), "{costs:?}");
    assert!(costs.events.is_some() && costs.synchronize_after_work_ns.is_some());
    for cost in &costs.input_copies {
        for times in [cost.pinned, cost.pageable] {
            assert!(times.call_ns.p50_ns < times.done_ns.p50_ns, "{cost:?}");
        }
    }
    let product_flops = 2.0 * 4096f64.powi(3);
    assert_eq!(costs.after_idle.len(), 5);
    for cost in &costs.after_idle {
        assert!(cost.compute_ns.min_ns > product_flops / spec.bf16_flops_per_s * 1e9, "{cost:?}");
        assert!(micros.contains(&cost.launch_and_wait_ns.min_ns), "{cost:?}");
    }
    let (small, large) = (&costs.copies[0], &costs.copies[costs.copies.len() - 1]);
    assert!(large.to_device_ns.p50_ns > small.to_device_ns.p50_ns, "{costs:?}");
}

use plumbline_schema::{Heads, StepBatch};
use proptest::prelude::*;

use super::*;

fn gpu() -> GpuSpec {
    GpuSpec::by_name("h100-sxm5-80gb").unwrap()
}

fn named(operator: Operator, shape: &OperatorShape, name: &str) -> f32 {
    let place = feature_names(operator).iter().position(|&other| other == name).unwrap();
    features(shape, &gpu(), 2000.0).as_slice()[place]
}

#[test]
fn every_operator_has_as_many_numbers_as_names_all_finite() {
    for operator in Operator::ALL {
        let values: Vec<u64> = (1..=operator.shape_columns().len() as u64).collect();
        let shape = OperatorShape::from_values(operator, &values).unwrap();
        assert_eq!(shape_values(operator, &shape).unwrap().as_slice(), shape.values(), "{operator}");
        let row = features(&shape, &gpu(), 2000.0);
        assert_eq!(row.as_slice().len(), feature_names(operator).len(), "{operator}");
        assert!(row.as_slice().iter().all(|x| x.is_finite()), "{operator}: {row:?}");
        let parts = parts_ns(&shape, &gpu());
        assert_eq!(parts.as_slice().len(), part_names(operator).len(), "{operator}");
        assert!(parts.as_slice().iter().all(|ns| ns.is_finite() && *ns >= 0.0), "{operator}: {parts:?}");
        let place = |name| part_names(operator).iter().position(|&other| other == name);
        let longest = match place("roofline") {
            Some(place) => parts.as_slice()[place],
            // Joined by the longest, so the roofline is there as its two sides.
            None => parts.as_slice()[0].max(parts.as_slice()[1]),
        };
        assert!((longest - roofline_ns(&shape, &gpu())).abs() < 1e-9, "{operator}");
    }
}

#[test]
fn another_operators_shape_has_no_values() {
    let gemm = OperatorShape::Gemm { m: 1, n: 2, k: 3 };
    assert!(shape_values(Operator::LmHead, &gemm).is_some());
    assert!(shape_values(Operator::Rope, &gemm).is_none());
    let norm = OperatorShape::RmsNorm { num_tokens: 1, hidden_size: 2 };
    assert!(shape_values(Operator::Embedding, &norm).is_none());
}

#[test]
fn tiles_and_waves_match_hand_worked_figures() {
    // 129 rows are 2 tiles of 128 and 3 of 64; 4096 columns are 32 tiles of 128: 64 tiles on 132 SMs.
    let gemm = OperatorShape::Gemm { m: 129, n: 4096, k: 1024 };
    let feature = |name| named(Operator::QkvProj, &gemm, name);
    assert!((feature("m_fill_64") - 129.0 / 192.0).abs() < 1e-6);
    assert!((feature("m_fill_128") - 129.0 / 256.0).abs() < 1e-6);
    assert!((feature("wave_fill_128x128") - 64.0 / 132.0).abs() < 1e-6);
    // 3 x 64 tiles of 64 x 64 are 192: two waves of 132.
    assert!((feature("wave_fill_64x64") - 192.0 / 264.0).abs() < 1e-6);
    let part = |m: u32, n: u32, k: u32, name: &str| {
        let place = part_names(Operator::QkvProj).iter().position(|&other| other == name).unwrap();
        parts_ns(&OperatorShape::Gemm { m, n, k }, &gpu()).as_slice()[place]
    };
    // 128 tiles of 64 x 128 at 0.7 of an SM's 1070.5 / 132 TFLOP/s beat 64 of 128 x 128 and two waves of 64 x 64.
    let sm_flops_per_ns = 1070.5e3 / 132.0;
    let one_wave = 2.0 * 64.0 * 128.0 * 512.0 / sm_flops_per_ns / 0.7 + 500.0;
    assert!((part(256, 4096, 512, "waves") / one_wave - 1.0).abs() < 1e-3);
    // 32 tiles of 64 x 32 leave SMs idle: k is split in four, which are then joined.
    let split = 2.0 * 64.0 * 32.0 * 2048.0 / sm_flops_per_ns / 0.4 + 500.0 + 1000.0;
    assert!((part(1, 1024, 8192, "waves") / split - 1.0).abs() < 1e-3);
    assert!((part(1, 1024, 2048, "k_steps") - 2.0 * NOMINAL_NS).abs() < 1e-9);
}

#[test]
fn the_longest_part_decides_where_parts_overlap() {
    let norm = part_norm(Operator::OProj);
    assert!((joined([10.0, 1.0].into_iter(), norm) / 10.0 - 1.0).abs() < 0.001);
    // A tie delays both: 2^(1/3).
    assert!((joined([10.0, 10.0].into_iter(), norm) / 12.599 - 1.0).abs() < 1e-4);
    assert!((joined([10.0, 1.0].into_iter(), part_norm(Operator::Attention)) - 11.0).abs() < 1e-12);
}

#[test]
fn attention_tells_skew_and_mixtures() {
    let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
    let feature = |chunks: &str, decodes: &str, name: &str| {
        let load = StepBatch::parse(chunks, decodes).unwrap().shape().attention;
        named(Operator::Attention, &OperatorShape::Attention { heads, load }, name)
    };
    assert!(feature("", "99;99;99", "ln_decode_skew").abs() < 1e-6);
    // Longest 400 of mean 200.
    assert!((feature("", "99;99;399", "ln_decode_skew") - 2.0f32.ln()).abs() < 1e-5);
    assert!(feature("", "99", "prefill_share").abs() < 1e-6);
    assert!((feature("64:0", "", "prefill_share") - 1.0).abs() < 1e-6);
    let mixed = feature("64:0", "2000;2000", "prefill_share");
    assert!(mixed > 0.0 && mixed < 1.0);
    // A 16-token chunk computes a whole tile, as one of 64 does, over 1016 keys and not 1064.
    let products = |chunks: &str| attention_part(heads, chunks, "", "prefill_products", &gpu());
    assert!((products("16:1000") / products("64:1000") - 1016.0 / 1064.0).abs() < 1e-9);
}

fn attention_part(heads: Heads, chunks: &str, decodes: &str, name: &str, gpu: &GpuSpec) -> f64 {
    let load = StepBatch::parse(chunks, decodes).unwrap().shape().attention;
    let place = part_names(Operator::Attention).iter().position(|&other| other == name).unwrap();
    parts_ns(&OperatorShape::Attention { heads, load }, gpu).as_slice()[place]
}

#[test]
fn the_longest_tile_decides_where_keys_are_not_split() {
    let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
    let path = |gpu: &GpuSpec, rows: f64| {
        let step_ns = compute_ns(4.0 * 128.0 * rows * 128.0, gpu) * f64::from(gpu.num_sms);
        attention_part(heads, "64:8192", "", "path_products", gpu) / step_ns
    };
    // 16 blocks on 132 SMs leave room for eight each: 65 steps become eight parts of at most nine.
    assert!((path(&gpu(), 128.0) - 9.0).abs() < 1e-9);
    assert!(
        (attention_part(heads, "64:8192", "", "prefill_joins", &gpu()) - 8.0 * 0.5 * NOMINAL_NS).abs() < 1e-9
    );
    let a100 = GpuSpec::by_name("a100-sxm4-80gb").unwrap();
    assert!((path(&a100, 64.0) - 65.0).abs() < 1e-9);
}

#[test]
fn decodes_are_split_as_the_gpu_has_room() {
    let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
    let part = |decodes: &str, name: &str| attention_part(heads, "", decodes, name, &gpu());
    // 64 KV blocks for 8 KV heads over 132 SMs with three thread blocks each are 2, and one for each of four warps is
    // 4: 16 parts. Two heads of 128 are joined by half of the threads, so each goes through half of the parts.
    assert!((part("1023", "decode_joins") - 8.0 * NOMINAL_NS).abs() < 1e-9);
    assert!((part("1023", "decode_steps") - NOMINAL_NS).abs() < 1e-9);
    // 64 such decodes fill the GPU unsplit: 16 KV blocks a warp.
    let many = vec!["1023"; 64].join(";");
    assert!(part(&many, "decode_joins").abs() < 1e-9 && part(&many, "is_split").abs() < 1e-9);
    assert!((part(&many, "decode_steps") - 16.0 * NOMINAL_NS).abs() < 1e-9);
    // Sixteen q heads of a KV head are two thread blocks' work, and both read the keys.
    let wide = Heads { num_q_heads: 128, ..heads };
    let keys_ns = attention_part(wide, "", &many, "decode_memory", &gpu());
    let both_ns = attention_part(wide, "", &many, "decode_reads", &gpu());
    assert!(both_ns > 1.9 * keys_ns && both_ns < 2.0 * keys_ns);
    assert!((part(&many, "decode_reads") - part(&many, "decode_memory")).abs() < 1e-9);
}

#[test]
fn split_rows_load_the_busiest_sm() {
    let part = |num_seqs: u32| {
        let shape = OperatorShape::Sample { num_seqs, vocab_size: 128_256 };
        let place = part_names(Operator::Sample).iter().position(|&name| name == "busiest_sm").unwrap();
        let row_ns = memory_ns(&shape, &gpu()) / f64::from(num_seqs) * 132.0;
        parts_ns(&shape, &gpu()).as_slice()[place] / row_ns
    };
    // 24 rows of 11 blocks are 264, two an SM; 32 of 9 are 288, three on some; 320 of one, three on some.
    assert!((part(24) - 2.0 / 11.0).abs() < 1e-9);
    assert!((part(32) - 3.0 / 9.0).abs() < 1e-9);
    assert!((part(320) - 3.0).abs() < 1e-9);
}

/// Tiles of 128 rows, 32 heads and 132 SMs: four tiles fill 128 SMs, five do not all find one.
#[test]
fn keys_are_split_where_tiles_leave_sms_idle() {
    let heads = Heads { num_q_heads: 32, num_kv_heads: 8, head_dim: 128 };
    let part = |chunk: &str, name: &str| {
        let load = StepBatch::parse(chunk, "").unwrap().shape().attention;
        let parts = parts_ns(&OperatorShape::Attention { heads, load }, &gpu());
        parts.as_slice()[part_names(Operator::Attention).iter().position(|&other| other == name).unwrap()]
    };
    let close = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    close(part("512:2000", "room_split"), NOMINAL_NS);
    close(part("512:2000", "room_tiles"), 4.0 * NOMINAL_NS);
    close(part("512:2000", "busiest_products"), 0.0);
    close(part("640:2000", "room_split"), 0.0);
    close(part("640:2000", "room_products"), 0.0);
    // A single step of keys is not worth splitting.
    close(part("64:0", "room_split"), 0.0);
    // 160 tiles: some SM has two, which take twice what the mean of 1.21 says over it.
    let mean = part("640:2000", "prefill_products");
    close(part("640:2000", "busiest_products") / mean, 2.0 * 132.0 / 160.0);
    // 32 of 132 SMs by tiles of 64 rows.
    close(part("64:0", "small_tile_fill"), 32.0 / 132.0 * NOMINAL_NS);
    close(part("512:0", "small_tile_fill"), NOMINAL_NS);
}

proptest! {
    #[test]
    fn decodes_alone_differ_in_their_features_and_parts(
        contexts in prop::collection::vec(0..9000u32, 1..60),
        heads in (1..80u32, 1..20u32, prop::sample::select(vec![64u32, 128])),
    ) {
        let heads = Heads { num_q_heads: heads.0, num_kv_heads: heads.1, head_dim: heads.2 };
        let load_of = |contexts: Vec<u32>| StepBatch { decode_contexts: contexts, ..StepBatch::default() }.shape().attention;
        let (one, load) = (load_of(vec![0]), load_of(contexts));
        let row = |load| features(&OperatorShape::Attention { heads, load }, &gpu(), 2000.0);
        let (row_of_one, row) = (row(one), row(load));
        let parts = parts_ns(&OperatorShape::Attention { heads, load }, &gpu());
        let launches = Launches::new(heads, std::borrow::Cow::Owned(gpu()));
        let (cut, sides) = (launches.cut(load), launches.sides(load));
        let (arguments, decode_parts) = (launches.arguments(load, &cut, sides, 2000.0), launches.parts_ns(load, &cut, sides));
        for (i, (&x, &of_one)) in row.as_slice().iter().zip(row_of_one.as_slice()).enumerate() {
            let expected = match DECODE_FEATURES.iter().position(|&place| place == i) {
                Some(place) => SCALES[i].of(arguments[place]),
                None => of_one,
            };
            prop_assert_eq!(x.to_bits(), expected.to_bits(), "{}", feature_names(Operator::Attention)[i]);
        }
        for (i, &ns) in parts.as_slice().iter().enumerate() {
            let expected = DECODE_PARTS.iter().position(|&place| place == i).map_or(0.0, |place| decode_parts[place]);
            prop_assert_eq!(ns.to_bits(), expected.to_bits(), "{}", part_names(Operator::Attention)[i]);
        }
        prop_assert_eq!(sides, plumbline_schema::roofline::Sides::of(&OperatorShape::Attention { heads, load }, &gpu()));
    }

    #[test]
    fn whole_numbers_are_found_as_the_library_does(x in prop_oneof![0.0..10.0, 0.0..1e9, 0.0..1e18f64], n in 0..1_000_000u32) {
        let n = f64::from(n);
        for x in [x, n, n.next_up(), n.next_down().max(0.0), 0.5 * n] {
            prop_assert_eq!(ceil(x).to_bits(), x.ceil().to_bits(), "{}", x);
        }
    }
}

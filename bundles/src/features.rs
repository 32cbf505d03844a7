//! What a predictor sees of a launch: roofline parts that make its baseline, and features of its ratio to that.
//!
//! Both are computed on the stack, as they are asked for once per operator and simulated step. Their names
//! are written into every predictor file, and a file that names others is refused: a forest fitted on one
//! meaning of a column must never be read with another.

use plumbline_schema::{AttentionLoad, GpuSpec, Heads, Operator, OperatorShape, roofline::roofline_ns};

/// Most features or parts that any operator has.
pub const MAX_COLUMNS: usize = 20;

/// Most numbers in any operator's shape.
pub const MAX_SHAPE_COLUMNS: usize = 10;

/// Bytes of one bf16 element.
const BF16_BYTES: f64 = 2.0;

/// Up to [`MAX_COLUMNS`] numbers without an allocation.
#[derive(Clone, Copy, Debug)]
pub struct Row<T, const N: usize = MAX_COLUMNS> {
    values: [T; N],
    len: usize,
}

impl<T: Copy + Default, const N: usize> Row<T, N> {
    fn from_slice(slice: &[T]) -> Self {
        let mut values = [T::default(); N];
        values[..slice.len()].copy_from_slice(slice);
        Self { values, len: slice.len() }
    }

    /// The numbers, in the order of their names.
    #[must_use]
    pub fn as_slice(&self) -> &[T] {
        &self.values[..self.len]
    }
}

/// Names of an operator's features, in the order of [`features`].
#[must_use]
pub const fn feature_names(operator: Operator) -> &'static [&'static str] {
    match operator {
        Operator::QkvProj
        | Operator::OProj
        | Operator::GateUpProj
        | Operator::DownProj
        | Operator::LmHead => &GEMM_FEATURES,
        Operator::Attention => &ATTENTION_FEATURES,
        _ => &ROW_FEATURES,
    }
}

/// Names of the roofline parts of an operator's baseline, in the order of [`parts_ns`].
#[must_use]
pub const fn part_names(operator: Operator) -> &'static [&'static str] {
    match operator {
        Operator::QkvProj
        | Operator::OProj
        | Operator::GateUpProj
        | Operator::DownProj
        | Operator::LmHead => {
            &["roofline", "compute", "memory", "waves_64x128", "waves_128x128", "waves_128x256"]
        }
        Operator::Attention => &[
            "roofline",
            "prefill_compute",
            "prefill_memory",
            "longest_tile",
            "decode_memory",
            "longest_decode",
            "prefill_waves",
            "decode_waves",
            "both_kinds",
        ],
        _ => &["roofline", "row_waves"],
    }
}

/// The shape's numbers as [`Operator::shape_columns`] orders them; `None` when the shape is another operator's.
#[must_use]
pub fn shape_values(operator: Operator, shape: &OperatorShape) -> Option<Row<u64, MAX_SHAPE_COLUMNS>> {
    let wide = |numbers: &[u32]| {
        let mut values = [0; MAX_SHAPE_COLUMNS];
        for (value, &number) in values.iter_mut().zip(numbers) {
            *value = u64::from(number);
        }
        Row { values, len: numbers.len() }
    };
    Some(match (operator, *shape) {
        (Operator::Embedding, OperatorShape::Embedding { num_tokens, hidden_size })
        | (Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens, hidden_size }) => {
            wide(&[num_tokens, hidden_size])
        }
        (Operator::QkNorm, OperatorShape::QkNorm { num_tokens, heads })
        | (Operator::Rope, OperatorShape::Rope { num_tokens, heads }) => {
            wide(&[num_tokens, heads.num_q_heads, heads.num_kv_heads, heads.head_dim])
        }
        (Operator::KvCacheWrite, OperatorShape::KvCacheWrite { num_tokens, num_kv_heads, head_dim }) => {
            wide(&[num_tokens, num_kv_heads, head_dim])
        }
        (Operator::Attention, OperatorShape::Attention { heads, load }) => Row::from_slice(&[
            heads.num_q_heads.into(),
            heads.num_kv_heads.into(),
            heads.head_dim.into(),
            load.num_prefill_seqs.into(),
            load.num_prefill_tokens.into(),
            load.prefill_kv_tokens,
            load.prefill_pairs,
            load.num_decode_seqs.into(),
            load.decode_kv_tokens,
            load.max_decode_kv_tokens.into(),
        ]),
        (_, OperatorShape::Gemm { m, n, k }) if operator.is_gemm() => wide(&[m, n, k]),
        (Operator::SiluMul, OperatorShape::SiluMul { num_tokens, intermediate_size }) => {
            wide(&[num_tokens, intermediate_size])
        }
        (Operator::Sample, OperatorShape::Sample { num_seqs, vocab_size }) => wide(&[num_seqs, vocab_size]),
        (_, OperatorShape::Collective { message_bytes, num_ranks }) if operator.is_collective() => {
            Row::from_slice(&[message_bytes, num_ranks.into()])
        }
        _ => return None,
    })
}

/// Index of the first shape column that the batch decides, and one past the last; the others are the model's.
#[must_use]
pub const fn batch_columns(operator: Operator) -> std::ops::Range<usize> {
    match operator {
        Operator::Attention => 3..10,
        _ => 0..1,
    }
}

/// Roofline times in ns whose weighted sum, with the overhead, is the baseline; see [`part_names`].
///
/// - `roofline`, `compute`, `memory`: [`roofline_ns`] and its two sides.
/// - `row_waves`: one row's time at one SM's share of bandwidth, times the waves of rows over the SMs; it
///   is what is left of the roofline when too few rows are there to fill the GPU.
/// - `prefill_compute`, `prefill_memory`, `decode_memory`: attention's pieces, since prefill chunks are
///   bound by the tensor cores and decodes by reading keys and values, at very different efficiencies.
///   Chunks compute whole tiles of 64 queries.
/// - `longest_tile`: one tile of 64 queries over the keys of a chunk's last token at one SM's share of the
///   tensor peak: what is left when there are too few tiles to fill the GPU.
/// - `longest_decode`: reading the longest decode's keys and values by as many SMs as there are KV heads.
/// - `prefill_waves`, `decode_waves`: [`NOMINAL_NS`] for each wave of tiles, or of decodes times KV heads, over
///   the SMs: what a thread block costs whatever it reads.
/// - `both_kinds`: [`NOMINAL_NS`] when there are chunks and decodes, which are different kernels.
#[must_use]
pub fn parts_ns(shape: &OperatorShape, gpu: &GpuSpec) -> Row<f64> {
    let roofline = roofline_ns(shape, gpu);
    match *shape {
        OperatorShape::Gemm { m, n, k } => {
            let waves = |tile_m: f64, tile_n: f64| {
                let tiles = (f64::from(m) / tile_m).ceil() * (f64::from(n) / tile_n).ceil();
                let num_sms = f64::from(gpu.num_sms);
                let tile_flops = 2.0 * tile_m * tile_n * f64::from(k);
                compute_ns(tile_flops, gpu) * num_sms * (tiles / num_sms).ceil()
            };
            Row::from_slice(&[
                roofline,
                compute_ns(shape.flops().0 as f64, gpu),
                memory_ns(shape, gpu),
                waves(64.0, 128.0),
                waves(128.0, 128.0),
                waves(128.0, 256.0),
            ])
        }
        OperatorShape::Attention { heads, load } => {
            let parts = attention_parts(heads, load, gpu);
            let is_mixed = load.num_prefill_seqs > 0 && load.num_decode_seqs > 0;
            Row::from_slice(&[
                roofline,
                parts.prefill_compute,
                parts.prefill_memory,
                parts.longest_tile,
                parts.decode_memory,
                parts.longest_decode,
                parts.prefill_waves * NOMINAL_NS,
                parts.decode_waves * NOMINAL_NS,
                if is_mixed { NOMINAL_NS } else { 0.0 },
            ])
        }
        _ => {
            let rows = num_rows(shape);
            let row_ns = memory_ns(shape, gpu) / rows * f64::from(gpu.num_sms);
            Row::from_slice(&[roofline, row_ns * (rows / f64::from(gpu.num_sms)).ceil()])
        }
    }
}

struct AttentionParts {
    prefill_compute: f64,
    prefill_memory: f64,
    longest_tile: f64,
    decode_memory: f64,
    longest_decode: f64,
    prefill_waves: f64,
    decode_waves: f64,
}

fn attention_parts(heads: Heads, load: AttentionLoad, gpu: &GpuSpec) -> AttentionParts {
    let (q_width, kv_width) = (heads.q_width() as f64, heads.kv_width() as f64);
    let bandwidth = gpu.hbm_bandwidth_bytes_per_s;
    let num_sms = f64::from(gpu.num_sms);
    let traffic =
        |queries: f64, keys: f64| 2.0 * BF16_BYTES * (queries * q_width + keys * kv_width) / bandwidth * 1e9;
    let prefill_tokens = f64::from(load.num_prefill_tokens);
    let chunks = f64::from(load.num_prefill_seqs).max(1.0);
    let mean_chunk = (prefill_tokens / chunks).max(1.0);
    let padding = (mean_chunk / QUERY_TILE).ceil() * QUERY_TILE / mean_chunk;
    // Mean keys of a token, and the half of a chunk that its last token sees beyond that.
    let longest_keys = load.prefill_pairs as f64 / prefill_tokens.max(1.0) + mean_chunk / 2.0;
    let num_tiles = (mean_chunk / QUERY_TILE).ceil() * f64::from(load.num_prefill_seqs);
    let kv_heads_used = f64::from(heads.num_kv_heads.min(gpu.num_sms)).max(1.0);
    AttentionParts {
        prefill_compute: compute_ns(4.0 * q_width * load.prefill_pairs as f64 * padding, gpu),
        prefill_memory: traffic(prefill_tokens, load.prefill_kv_tokens as f64),
        longest_tile: compute_ns(4.0 * f64::from(heads.head_dim) * QUERY_TILE * longest_keys, gpu)
            * num_sms
            * f64::from(u8::from(load.num_prefill_seqs > 0)),
        decode_memory: traffic(f64::from(load.num_decode_seqs), load.decode_kv_tokens as f64),
        longest_decode: traffic(0.0, f64::from(load.max_decode_kv_tokens)) * num_sms / kv_heads_used,
        prefill_waves: (num_tiles * f64::from(heads.num_q_heads) / num_sms).ceil(),
        decode_waves: f64::from(load.num_decode_seqs) * f64::from(heads.num_kv_heads) / num_sms,
    }
}

/// Features of the ratio of a launch's time to its baseline; see [`feature_names`].
///
/// All are logarithms or fractions, so that their spacing resembles that of their effect, and none holds a
/// time by itself: times enter as ratios to each other or to the fixed overhead.
#[must_use]
pub fn features(shape: &OperatorShape, gpu: &GpuSpec, overhead_ns: f64) -> Row<f32> {
    let over_overhead = ln(roofline_ns(shape, gpu) / overhead_ns);
    match *shape {
        OperatorShape::Gemm { m, n, k } => gemm_features(m, n, k, shape, gpu, over_overhead),
        OperatorShape::Attention { heads, load } => {
            attention_features(heads, load, shape, gpu, over_overhead)
        }
        _ => row_features(shape, gpu, over_overhead),
    }
}

/// Features of operators that work row by row, and of collectives with their ranks as rows.
const ROW_FEATURES: [&str; 6] = [
    "ln_rows",          // ln of the tokens or sequences
    "ln_row_bytes",     // ln of the bytes that a row moves
    "ln_bytes_over_l2", // ln of all bytes over the L2 cache: beyond it nothing is found there
    "ln_roofline_over_overhead",
    "ln_rows_per_sm", // ln of the rows each SM gets
    "wave_fill",      // 0..=1, rows over the rows of full waves of one row an SM
];

fn row_features(shape: &OperatorShape, gpu: &GpuSpec, over_overhead: f32) -> Row<f32> {
    let (rows, bytes) = (num_rows(shape), shape.bytes().0 as f64);
    let per_sm = rows / f64::from(gpu.num_sms);
    Row::from_slice(&[
        ln(rows),
        ln(bytes / rows),
        ln(bytes / gpu.l2_bytes.0 as f64),
        over_overhead,
        ln(per_sm),
        wave_fill(per_sm),
    ])
}

/// Features of matrix products.
const GEMM_FEATURES: [&str; 12] = [
    "ln_m",
    "ln_n",
    "ln_k",
    "ln_compute_over_memory", // above 0: bound by the tensor cores; arithmetic intensity over the ridge point
    "ln_roofline_over_overhead",
    "ln_bytes_over_l2",
    "m_fill_64", // 0..=1, m over m rounded up to tiles of 64 rows: the share that is not padding
    "m_fill_128",
    "ln_tiles_per_sm", // ln of 128 x 128 output tiles over SMs; below 0 some SMs idle
    "wave_fill_64x64", // 0..=1, output tiles over the tiles of full waves of one tile an SM
    "wave_fill_128x128",
    "wave_fill_128x256",
];

fn gemm_features(
    m: u32,
    n: u32,
    k: u32,
    shape: &OperatorShape,
    gpu: &GpuSpec,
    over_overhead: f32,
) -> Row<f32> {
    let (rows, columns) = (f64::from(m), f64::from(n));
    let num_sms = f64::from(gpu.num_sms);
    let fill = |tile: f64| (rows / tile / (rows / tile).ceil()) as f32;
    let tiles_per_sm =
        |tile_m: f64, tile_n: f64| (rows / tile_m).ceil() * (columns / tile_n).ceil() / num_sms;
    Row::from_slice(&[
        ln(rows),
        ln(columns),
        ln(f64::from(k)),
        ln(compute_ns(shape.flops().0 as f64, gpu) / memory_ns(shape, gpu)),
        over_overhead,
        ln(shape.bytes().0 as f64 / gpu.l2_bytes.0 as f64),
        fill(64.0),
        fill(128.0),
        ln(tiles_per_sm(128.0, 128.0)),
        wave_fill(tiles_per_sm(64.0, 64.0)),
        wave_fill(tiles_per_sm(128.0, 128.0)),
        wave_fill(tiles_per_sm(128.0, 256.0)),
    ])
}

/// Features of attention; counts that may be 0 enter as `ln(1 + count)`.
const ATTENTION_FEATURES: [&str; 18] = [
    "ln_q_heads",
    "ln_kv_heads",
    "ln_prefill_seqs",
    "ln_prefill_tokens",
    "ln_prefill_kv_tokens",
    "ln_prefill_pairs",
    "ln_keys_per_prefill_token", // ln of mean keys that a prefill token attends to
    "ln_decode_seqs",
    "ln_decode_kv_tokens",
    "ln_mean_decode_kv_tokens",
    "ln_max_decode_kv_tokens",
    "ln_decode_skew", // ln of longest over mean context: 0 when all are alike
    "prefill_share",  // 0..=1, prefill's share of the parts' roofline time: 0 decodes only, 1 chunks only
    "ln_compute_over_memory",
    "ln_roofline_over_overhead",
    "ln_queries_per_sm", // ln of query tokens times query heads over SMs: parallelism without splitting keys
    "ln_decode_heads_per_sm", // ln of decodes times KV heads over SMs; below 0 keys must be split to fill the GPU
    "query_wave_fill",        // 0..=1, 64-query tiles over the tiles of full waves
];

fn attention_features(
    heads: Heads,
    load: AttentionLoad,
    shape: &OperatorShape,
    gpu: &GpuSpec,
    over_overhead: f32,
) -> Row<f32> {
    let parts = attention_parts(heads, load, gpu);
    let num_sms = f64::from(gpu.num_sms);
    let ln1p = |count: f64| count.ln_1p() as f32;
    let (prefill_tokens, decodes) = (f64::from(load.num_prefill_tokens), f64::from(load.num_decode_seqs));
    let (decode_kv, longest) = (load.decode_kv_tokens as f64, f64::from(load.max_decode_kv_tokens));
    let mean_decode_kv = decode_kv / decodes.max(1.0);
    let prefill_ns = parts.prefill_compute.max(parts.prefill_memory);
    let q_heads = f64::from(heads.num_q_heads);
    let tiles = (prefill_tokens / QUERY_TILE).ceil() * q_heads;
    Row::from_slice(&[
        ln(q_heads),
        ln(f64::from(heads.num_kv_heads)),
        ln1p(f64::from(load.num_prefill_seqs)),
        ln1p(prefill_tokens),
        ln1p(load.prefill_kv_tokens as f64),
        ln1p(load.prefill_pairs as f64),
        ln1p(load.prefill_pairs as f64 / prefill_tokens.max(1.0)),
        ln1p(decodes),
        ln1p(decode_kv),
        ln1p(mean_decode_kv),
        ln1p(longest),
        ln(longest.max(1.0) / mean_decode_kv.max(1.0)),
        (prefill_ns / (prefill_ns + parts.decode_memory).max(f64::MIN_POSITIVE)) as f32,
        ln(compute_ns(shape.flops().0 as f64, gpu) / memory_ns(shape, gpu)),
        over_overhead,
        ln((prefill_tokens + decodes) * q_heads / num_sms),
        ln1p(decodes * f64::from(heads.num_kv_heads) / num_sms),
        wave_fill(tiles / num_sms),
    ])
}

/// Nominal cost of what no data sheet tells, ns; its coefficient says what it is.
pub const NOMINAL_NS: f64 = 1000.0;

/// Queries that one thread block of a prefill kernel usually takes together.
const QUERY_TILE: f64 = 64.0;

/// Natural logarithm, kept finite so that an empty count cannot poison a sum.
fn ln(x: f64) -> f32 {
    x.max(1e-30).ln() as f32
}

/// `x / ceil(x)`: how full the last wave leaves the GPU; 1 for nothing.
fn wave_fill(waves: f64) -> f32 {
    if waves > 0.0 { (waves / waves.ceil()) as f32 } else { 1.0 }
}

fn memory_ns(shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
    shape.bytes().0 as f64 / gpu.hbm_bandwidth_bytes_per_s * 1e9
}

/// Time at the tensor cores' peak at the highest clock, as in [`roofline_ns`].
fn compute_ns(flops: f64, gpu: &GpuSpec) -> f64 {
    let clock_headroom = f64::from(gpu.max_clock_mhz) / f64::from(gpu.boost_clock_mhz);
    flops / (gpu.bf16_flops_per_s * clock_headroom) * 1e9
}

/// Rows that a row-wise operator works on, at least 1.
fn num_rows(shape: &OperatorShape) -> f64 {
    f64::from(match *shape {
        OperatorShape::Embedding { num_tokens, .. }
        | OperatorShape::RmsNorm { num_tokens, .. }
        | OperatorShape::QkNorm { num_tokens, .. }
        | OperatorShape::Rope { num_tokens, .. }
        | OperatorShape::KvCacheWrite { num_tokens, .. }
        | OperatorShape::SiluMul { num_tokens, .. } => num_tokens,
        OperatorShape::Gemm { m, .. } => m,
        OperatorShape::Sample { num_seqs, .. } => num_seqs,
        OperatorShape::Collective { num_ranks, .. } => num_ranks,
        OperatorShape::Attention { load, .. } => load.num_tokens(),
    })
    .max(1.0)
}

#[cfg(test)]
mod tests {
    use plumbline_schema::StepBatch;

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
            assert_eq!(part_names(operator)[0], "roofline");
            assert!((parts.as_slice()[0] - roofline_ns(&shape, &gpu())).abs() < 1e-9);
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
        // One wave of 132 tiles, each 2 * 128 * 128 * 1024 FLOP: 4.43e9 FLOP at 1070.5 TFLOP/s.
        let place = part_names(Operator::QkvProj).iter().position(|&name| name == "waves_128x128").unwrap();
        assert!((parts_ns(&gemm, &gpu()).as_slice()[place] - 4137.6).abs() < 1.0);
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
        // A 16-token chunk computes a whole tile of 64 queries.
        let parts = |chunks: &str| {
            let load = StepBatch::parse(chunks, "").unwrap().shape().attention;
            parts_ns(&OperatorShape::Attention { heads, load }, &gpu()).as_slice()[1]
        };
        let pairs = |tokens: f64, context: f64| tokens * context + tokens * (tokens + 1.0) / 2.0;
        assert!(
            (parts("16:1000") / parts("64:1000") - 4.0 * pairs(16.0, 1000.0) / pairs(64.0, 1000.0)).abs()
                < 1e-9
        );
    }
}

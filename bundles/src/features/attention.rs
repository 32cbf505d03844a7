//! Attention of chunks and decodes over the paged cache.

use plumbline_schema::{AttentionLoad, GpuSpec, Heads, OperatorShape, roofline::roofline_ns};

use super::{BF16_BYTES, NOMINAL_NS, Row, compute_ns, ln, memory_ns, wave_fill};

/// Queries that one thread block of a prefill kernel usually takes together.
const QUERY_TILE: f64 = 64.0;
/// Keys of a KV block.
const KV_BLOCK: f64 = 16.0;
/// Thread blocks of a decode kernel that share an SM.
const DECODE_BLOCKS_PER_SM: f64 = 3.0;
/// Most keys that one thread block of a decode kernel takes.
const MAX_SPLIT_KEYS: f64 = 1024.0;
/// Keys that a thread block of a decode kernel takes together: a KV block a warp.
const KEYS_AT_ONCE: f64 = 64.0;

/// Parts of the baseline.
///
/// Chunks are bound by the tensor cores and decodes by reading keys and values, at very different efficiencies;
/// and either may be bound by its longest thread block, when there are too few to fill the GPU.
/// - `prefill_compute`: compute time of the chunks in whole tiles of 64 queries; `prefill_memory`: memory time.
/// - `longest_tile`: one tile over the keys of a chunk's last token at one SM's share of the tensor peak.
/// - `prefill_path`: the longer of `prefill_compute` and twice `longest_tile`: a lone block on an SM reaches about half
///   of what several reach together.
/// - `decode_memory`: memory time of the decodes.
/// - `longest_decode`: reading the longest decode's keys and values by as many SMs as there are KV heads.
/// - `prefill_waves`, `decode_waves`: [`NOMINAL_NS`] for each wave of tiles, or of decodes times KV heads, over the
///   SMs: what a thread block costs whatever it reads.
/// - `decode_steps`: [`NOMINAL_NS`] for each 64 keys that the longest thread block of the decodes takes.
/// - `is_split`, `joins`: [`NOMINAL_NS`] when decodes are split along their keys, and for each part of the longest,
///   as the parts must be joined.
/// - `both_kinds`: [`NOMINAL_NS`] when there are chunks and decodes, which are different kernels.
pub(super) const PARTS: [&str; 13] = [
    "roofline",
    "prefill_compute",
    "prefill_memory",
    "longest_tile",
    "prefill_path",
    "decode_memory",
    "longest_decode",
    "prefill_waves",
    "decode_waves",
    "decode_steps",
    "is_split",
    "joins",
    "both_kinds",
];

pub(super) fn parts_ns(heads: Heads, load: AttentionLoad, shape: &OperatorShape, gpu: &GpuSpec) -> Row<f64> {
    let (prefill, decode) = (Prefill::new(heads, load, gpu), Decode::new(heads, load, gpu));
    let is_mixed = load.num_prefill_seqs > 0 && load.num_decode_seqs > 0;
    let nominal = |condition: bool| if condition { NOMINAL_NS } else { 0.0 };
    Row::from_slice(&[
        roofline_ns(shape, gpu),
        prefill.compute_ns,
        prefill.memory_ns,
        prefill.longest_tile_ns,
        prefill.compute_ns.max(2.0 * prefill.longest_tile_ns),
        decode.memory_ns,
        decode.longest_ns,
        prefill.tiles_per_sm.ceil() * NOMINAL_NS,
        decode.heads_per_sm * NOMINAL_NS,
        decode.steps * NOMINAL_NS,
        nominal(decode.splits > 1.0),
        if decode.splits > 1.0 { decode.splits * NOMINAL_NS } else { 0.0 },
        nominal(is_mixed),
    ])
}

/// The chunks of a step; all 0 when there are none.
struct Prefill {
    compute_ns: f64,
    memory_ns: f64,
    longest_tile_ns: f64,
    /// Tiles of 64 queries times query heads over SMs.
    tiles_per_sm: f64,
    /// The same with tiles of 128.
    large_tiles_per_sm: f64,
}

impl Prefill {
    fn new(heads: Heads, load: AttentionLoad, gpu: &GpuSpec) -> Self {
        let num_sms = f64::from(gpu.num_sms);
        let (tokens, chunks) = (f64::from(load.num_prefill_tokens), f64::from(load.num_prefill_seqs));
        let mean_chunk = (tokens / chunks.max(1.0)).max(1.0);
        let padded = |tile: f64| (mean_chunk / tile).ceil() * tile;
        // Mean keys of a token, and the half of a chunk that its last token sees beyond that.
        let longest_keys = load.prefill_pairs as f64 / tokens.max(1.0) + mean_chunk / 2.0;
        let tile_flops = 4.0 * f64::from(heads.head_dim) * QUERY_TILE * longest_keys * chunks.min(1.0);
        let pairs = load.prefill_pairs as f64 * padded(QUERY_TILE) / mean_chunk;
        let tiles_per_sm = |tile: f64| padded(tile) / tile * chunks * f64::from(heads.num_q_heads) / num_sms;
        Self {
            compute_ns: compute_ns(4.0 * heads.q_width() as f64 * pairs, gpu),
            memory_ns: traffic_ns(heads, tokens, load.prefill_kv_tokens as f64, gpu),
            longest_tile_ns: compute_ns(tile_flops, gpu) * num_sms,
            tiles_per_sm: tiles_per_sm(QUERY_TILE),
            large_tiles_per_sm: tiles_per_sm(2.0 * QUERY_TILE),
        }
    }
}

/// The decodes of a step; all 0 when there are none.
struct Decode {
    memory_ns: f64,
    longest_ns: f64,
    mean_keys: f64,
    /// Decodes times KV heads over SMs.
    heads_per_sm: f64,
    /// Parts of the longest decode when keys are split so that every SM has its blocks.
    splits: f64,
    /// Thread blocks over those that the GPU holds.
    waves: f64,
    /// Keys of the longest part, in steps of 64.
    steps: f64,
}

impl Decode {
    fn new(heads: Heads, load: AttentionLoad, gpu: &GpuSpec) -> Self {
        let (num_sms, kv_heads) = (f64::from(gpu.num_sms), f64::from(heads.num_kv_heads));
        let (seqs, keys) = (f64::from(load.num_decode_seqs), load.decode_kv_tokens as f64);
        let longest = f64::from(load.max_decode_kv_tokens);
        let capacity = num_sms * DECODE_BLOCKS_PER_SM;
        let mean_keys = keys / seqs.max(1.0);
        let blocks = seqs * (mean_keys / KV_BLOCK).ceil();
        // A fair share of all keys, in whole steps.
        let fair = ((blocks * KV_BLOCK * kv_heads / capacity).min(MAX_SPLIT_KEYS) / KEYS_AT_ONCE).ceil();
        let splits_of = |keys: f64| (keys / (fair * KEYS_AT_ONCE).max(KEYS_AT_ONCE)).ceil();
        let splits = splits_of(longest);
        Self {
            memory_ns: traffic_ns(heads, seqs, keys, gpu),
            longest_ns: traffic_ns(heads, 0.0, longest, gpu) * num_sms / kv_heads.min(num_sms).max(1.0),
            mean_keys,
            heads_per_sm: seqs * kv_heads / num_sms,
            splits,
            waves: seqs * splits_of(mean_keys) * kv_heads / capacity,
            steps: (longest / splits.max(1.0) / KEYS_AT_ONCE).ceil(),
        }
    }
}

/// Memory time of queries, their outputs, keys and values.
fn traffic_ns(heads: Heads, queries: f64, keys: f64, gpu: &GpuSpec) -> f64 {
    let elements = queries * heads.q_width() as f64 + keys * heads.kv_width() as f64;
    2.0 * BF16_BYTES * elements / gpu.hbm_bandwidth_bytes_per_s * 1e9
}

/// Features of the ratio; counts that may be 0 enter as `ln(1 + count)`.
pub(super) const FEATURES: [&str; 24] = [
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
    "ln_tile_over_prefill", // ln of the longest tile's time over all tiles': above 0 it decides
    "ln_tiles_per_sm", // ln of 64-query tiles times query heads over SMs: parallelism without splitting keys
    "query_wave_fill", // 0..=1, tiles over the tiles of full waves
    "query_wave_fill_128", // the same with tiles of 128 queries
    "ln_decode_heads_per_sm", // ln of decodes times KV heads over SMs; below 0 keys must be split to fill the GPU
    "ln_longest_over_decode", // ln of the longest decode's time over all decodes': above 0 it decides
    "ln_decode_splits",       // ln of the parts that the longest decode is split into
    "decode_wave_fill",       // 0..=1, decode blocks over the blocks of full waves
    "ln_decode_steps",        // ln of the longest part's steps of 64 keys
];

pub(super) fn features(
    heads: Heads,
    load: AttentionLoad,
    shape: &OperatorShape,
    gpu: &GpuSpec,
    over_overhead: f32,
) -> Row<f32> {
    let (prefill, decode) = (Prefill::new(heads, load, gpu), Decode::new(heads, load, gpu));
    let ln1p = |count: f64| count.ln_1p() as f32;
    let ratio = |over: f64, under: f64| ln((over + 1.0) / (under + 1.0));
    let tokens = f64::from(load.num_prefill_tokens);
    let longest = f64::from(load.max_decode_kv_tokens);
    let prefill_ns = prefill.compute_ns.max(prefill.memory_ns);
    Row::from_slice(&[
        ln(f64::from(heads.num_q_heads)),
        ln(f64::from(heads.num_kv_heads)),
        ln1p(f64::from(load.num_prefill_seqs)),
        ln1p(tokens),
        ln1p(load.prefill_kv_tokens as f64),
        ln1p(load.prefill_pairs as f64),
        ln1p(load.prefill_pairs as f64 / tokens.max(1.0)),
        ln1p(f64::from(load.num_decode_seqs)),
        ln1p(load.decode_kv_tokens as f64),
        ln1p(decode.mean_keys),
        ln1p(longest),
        ln(longest.max(1.0) / decode.mean_keys.max(1.0)),
        (prefill_ns / (prefill_ns + decode.memory_ns).max(f64::MIN_POSITIVE)) as f32,
        ln(compute_ns(shape.flops().0 as f64, gpu) / memory_ns(shape, gpu)),
        over_overhead,
        ratio(prefill.longest_tile_ns, prefill_ns),
        ln1p(prefill.tiles_per_sm),
        wave_fill(prefill.tiles_per_sm),
        wave_fill(prefill.large_tiles_per_sm),
        ln1p(decode.heads_per_sm),
        ratio(decode.longest_ns, decode.memory_ns),
        ln1p(decode.splits),
        wave_fill(decode.waves),
        ln1p(decode.steps),
    ])
}

//! Attention of chunks and decodes over the paged cache.
//!
//! A load tells sums over its sequences, so chunks are taken to be alike, and so are all decodes but the longest.

use plumbline_schema::{AttentionLoad, GpuSpec, Heads, OperatorShape, roofline::roofline_ns};

use super::{BF16_BYTES, NOMINAL_NS, Row, compute_ns, ln, memory_ns, wave_fill};

/// Keys that a thread block of a prefill kernel takes at a time: a step.
const STEP_KEYS: f64 = 128.0;
/// Queries of a tile of a prefill kernel; half as many where large tiles would leave SMs idle and keys are not split.
const TILE_QUERIES: f64 = 128.0;
/// Fewest steps of a part of a prefill tile, and most parts, where keys are split: on Hopper.
const MIN_PART_STEPS: f64 = 6.0;
const MAX_PARTS: f64 = 16.0;
/// Exponentials cost as much as this many fp32 FLOP: an SM computes 16 in the time of 256 (CUDA C++ Programming Guide,
/// throughput of native arithmetic instructions).
const FLOPS_PER_EXP: f64 = 16.0;
/// Keys of a KV block.
const KV_BLOCK: f64 = 16.0;
/// Thread blocks of a decode kernel that share an SM.
const DECODE_BLOCKS_PER_SM: f64 = 3.0;
/// Warps of such a block, which take KV blocks in turn.
const DECODE_WARPS: f64 = 4.0;
/// Q heads of one KV head that such a block takes together; with more the keys are read again.
const DECODE_GROUP: f64 = 8.0;
/// Most KV blocks that such a block takes.
const MAX_PART_BLOCKS: f64 = 64.0;
/// Output elements of a decode that its last block joins at once, four a thread.
const JOINED_AT_ONCE: f64 = 512.0;

/// Parts of the baseline.
///
/// Chunks are bound by the tensor cores and by exponentials, and decodes by reading keys and values; either may be bound
/// by its longest thread block, when there are too few to fill the GPU.
/// - `prefill_products`, `prefill_exps`: matrix products and exponentials of all steps of all tiles over the SMs.
/// - `path_products`, `path_exps`: the same of the longest thread block, where that is more.
/// - `prefill_memory`: memory time of the chunks.
/// - `prefill_waves`, `decode_waves`: [`NOMINAL_NS`] for each wave of thread blocks: what one costs whatever it reads.
/// - `prefill_joins`: [`NOMINAL_NS`] for each part of a tile whose keys are split, by the share of its rows in use.
/// - `decode_memory`, `decode_reads`: memory time of the decodes, reading keys once, and once for each eight q heads.
/// - `decode_steps`: [`NOMINAL_NS`] for each KV block that a warp of the longest thread block of the decodes takes.
/// - `is_split`, `decode_joins`: [`NOMINAL_NS`] when decodes are split along their keys, and for each part of the
///   longest that the threads which join them go through.
/// - `both_kinds`: [`NOMINAL_NS`] when there are chunks and decodes, which are different kernels.
///
/// Where all tiles of a head's chunks find an SM each, libraries split the keys among the idle ones, on any GPU; where
/// not, the SM with most tiles decides:
/// - `room_products`, `busiest_products`: matrix products of an SM's mean share, and of the most tiles on an SM.
/// - `room_split`, `room_tiles`: [`NOMINAL_NS`] when keys are split, and for each tile whose parts are joined then.
/// - `small_tile_fill`: [`NOMINAL_NS`] by the share of SMs that tiles of 64 rows would fill, at most 1.
pub(super) const PARTS: [&str; 20] = [
    "roofline",
    "prefill_products",
    "prefill_exps",
    "path_products",
    "path_exps",
    "prefill_memory",
    "prefill_waves",
    "prefill_joins",
    "decode_memory",
    "decode_reads",
    "decode_waves",
    "decode_steps",
    "is_split",
    "decode_joins",
    "both_kinds",
    "room_products",
    "room_split",
    "room_tiles",
    "busiest_products",
    "small_tile_fill",
];

pub(super) fn parts_ns(heads: Heads, load: AttentionLoad, shape: &OperatorShape, gpu: &GpuSpec) -> Row<f64> {
    let (prefill, decode) = (Prefill::new(heads, load, gpu), Decode::new(heads, load, gpu));
    let is_mixed = load.num_prefill_seqs > 0 && load.num_decode_seqs > 0;
    let nominal = |condition: bool| if condition { NOMINAL_NS } else { 0.0 };
    let path = prefill.steps_per_sm.max(prefill.longest_steps);
    Row::from_slice(&[
        roofline_ns(shape, gpu),
        prefill.steps_per_sm * prefill.step_products_ns,
        prefill.steps_per_sm * prefill.step_exps_ns,
        path * prefill.step_products_ns,
        path * prefill.step_exps_ns,
        prefill.memory_ns,
        prefill.blocks_per_sm.ceil() * NOMINAL_NS,
        if prefill.parts > 1.0 { prefill.parts * prefill.tile_fill * NOMINAL_NS } else { 0.0 },
        decode.memory_ns,
        decode.reads_ns,
        decode.waves.ceil() * NOMINAL_NS,
        decode.steps * NOMINAL_NS,
        nominal(decode.parts > 1.0),
        if decode.parts > 1.0 { decode.parts * decode.join_passes * NOMINAL_NS } else { 0.0 },
        nominal(is_mixed),
        if prefill.has_room { prefill.steps_per_sm * prefill.step_products_ns } else { 0.0 },
        nominal(prefill.joined_tiles > 0.0),
        prefill.joined_tiles * NOMINAL_NS,
        if prefill.has_room { 0.0 } else { prefill.busiest_steps * prefill.step_products_ns },
        prefill.small_tile_fill * NOMINAL_NS,
    ])
}

/// The chunks of a step; without any, no steps, blocks and bytes.
struct Prefill {
    memory_ns: f64,
    /// Steps of all tiles and heads over SMs.
    steps_per_sm: f64,
    /// Steps of the longest thread block.
    longest_steps: f64,
    /// Whether every large tile of every head finds an SM for itself.
    has_room: bool,
    /// Large tiles of all chunks, where their keys are worth splitting among idle SMs; otherwise 0.
    joined_tiles: f64,
    /// Large tiles of all chunks.
    tiles: f64,
    /// Steps of the SM with most large tiles.
    busiest_steps: f64,
    /// 0..=1, tiles of 64 rows over SMs.
    small_tile_fill: f64,
    /// Thread blocks over SMs.
    blocks_per_sm: f64,
    /// Thread blocks that the keys of a tile are split among.
    parts: f64,
    /// 0..=1, tokens over the rows of all tiles.
    tile_fill: f64,
    /// Tokens of a chunk.
    chunk: f64,
    /// Keys of a chunk by the mean over chunks, over those by the mean over tokens: 1 when all are alike.
    skew: f64,
    /// A step's matrix products at one SM's share of the tensor peak, and its exponentials.
    step_products_ns: f64,
    step_exps_ns: f64,
}

impl Prefill {
    fn new(heads: Heads, load: AttentionLoad, gpu: &GpuSpec) -> Self {
        let (num_sms, q_heads) = (f64::from(gpu.num_sms), f64::from(heads.num_q_heads));
        let (tokens, chunks) = (f64::from(load.num_prefill_tokens), f64::from(load.num_prefill_seqs));
        let chunk = (tokens / chunks.max(1.0)).max(1.0);
        let splits_keys = gpu.compute_capability == 90;
        let tiles = chunks * (chunk / TILE_QUERIES).ceil();
        let large_blocks = tiles * q_heads;
        let has_room = chunks > 0.0 && large_blocks <= num_sms;
        let is_large = splits_keys || large_blocks >= num_sms;
        let rows = if is_large { TILE_QUERIES } else { TILE_QUERIES / 2.0 };
        let tiles_per_chunk = (chunk / rows).ceil();
        let blocks = chunks * tiles_per_chunk * q_heads;
        // Long chunks have most tiles, short ones a tile each: tokens and chunks count by that.
        let of_tokens = (load.prefill_pairs as f64 / tokens.max(1.0) - f64::midpoint(chunk, 1.0)).max(0.0);
        let of_chunks = (load.prefill_kv_tokens as f64 - tokens).max(0.0) / chunks.max(1.0);
        let context = of_tokens + (of_chunks - of_tokens) / tiles_per_chunk;
        // Tiles see from their own rows to the whole chunk.
        let mean_steps = ((context + f64::midpoint(chunk, rows.min(chunk))) / STEP_KEYS).max(1.0);
        let longest = chunks.min(1.0) * ((of_tokens.max(of_chunks) + chunk) / STEP_KEYS).ceil();
        let room = (num_sms / blocks.max(1.0)).floor().clamp(1.0, MAX_PARTS);
        let part_steps = (longest / room).ceil().max(MIN_PART_STEPS);
        let parts = if splits_keys { (longest / part_steps).ceil().max(1.0) } else { 1.0 };
        let step_flops = 4.0 * f64::from(heads.head_dim) * rows * STEP_KEYS;
        let exp_flops = rows * STEP_KEYS * FLOPS_PER_EXP;
        Self {
            memory_ns: traffic_ns(heads, tokens, load.prefill_kv_tokens as f64, gpu),
            steps_per_sm: mean_steps * blocks / num_sms,
            longest_steps: (longest / parts).ceil(),
            has_room,
            joined_tiles: if has_room && longest > 1.0 { tiles } else { 0.0 },
            tiles,
            busiest_steps: (large_blocks / num_sms).ceil() * mean_steps,
            small_tile_fill: (chunks * (chunk / (TILE_QUERIES / 2.0)).ceil() * q_heads / num_sms).min(1.0),
            blocks_per_sm: blocks * parts / num_sms,
            parts,
            tile_fill: chunk / (tiles_per_chunk * rows),
            chunk: tokens / chunks.max(1.0),
            skew: (of_chunks + chunk) / (of_tokens + chunk),
            step_products_ns: compute_ns(step_flops, gpu) * num_sms,
            step_exps_ns: exp_flops / gpu.fp32_flops_per_s * num_sms * 1e9,
        }
    }
}

/// The decodes of a step; without any, no steps, blocks and bytes.
struct Decode {
    memory_ns: f64,
    /// Memory time when each eight q heads of a KV head read its keys.
    reads_ns: f64,
    /// Reading the longest decode's keys and values by as many SMs as its thread blocks are.
    longest_ns: f64,
    mean_keys: f64,
    /// Decodes times thread blocks side by side for one, over SMs.
    columns_per_sm: f64,
    /// Parts that the longest decode is split into, so that all SMs have blocks.
    parts: f64,
    /// Passes over the parts, or their share, of the thread that joins them: fewer elements leave threads to divide them.
    join_passes: f64,
    /// Thread blocks over those that the GPU holds.
    waves: f64,
    /// KV blocks that a warp of the longest part takes.
    steps: f64,
}

impl Decode {
    fn new(heads: Heads, load: AttentionLoad, gpu: &GpuSpec) -> Self {
        let num_sms = f64::from(gpu.num_sms);
        let heads_per_kv = f64::from(heads.num_q_heads / heads.num_kv_heads.max(1));
        let groups = (heads_per_kv / DECODE_GROUP).ceil().max(1.0);
        let columns = f64::from(heads.num_kv_heads) * groups;
        let (seqs, keys) = (f64::from(load.num_decode_seqs), load.decode_kv_tokens as f64);
        let longest = f64::from(load.max_decode_kv_tokens);
        let capacity = num_sms * DECODE_BLOCKS_PER_SM;
        let kv_blocks = |keys: f64| (keys / KV_BLOCK).ceil();
        let mean_keys = keys / seqs.max(1.0);
        // A fair share of all KV blocks, the same number for each warp.
        let fair = (seqs * kv_blocks(mean_keys) * columns / capacity).ceil().min(MAX_PART_BLOCKS);
        let part_blocks = (fair / DECODE_WARPS).ceil().max(1.0) * DECODE_WARPS;
        let parts_of = |keys: f64| (kv_blocks(keys) / part_blocks).ceil();
        let parts = parts_of(longest);
        let others = (seqs - 1.0).max(0.0);
        let all_parts = parts + others * parts_of((keys - longest).max(0.0) / others.max(1.0));
        let elements = heads_per_kv.min(DECODE_GROUP) * f64::from(heads.head_dim);
        Self {
            memory_ns: traffic_ns(heads, seqs, keys, gpu),
            reads_ns: traffic_ns(heads, seqs, keys * groups, gpu),
            longest_ns: traffic_ns(heads, 0.0, longest, gpu) * num_sms
                / (columns * parts).clamp(1.0, num_sms),
            mean_keys,
            columns_per_sm: seqs * columns / num_sms,
            parts,
            join_passes: (elements / JOINED_AT_ONCE).ceil()
                / (JOINED_AT_ONCE / elements.max(1.0)).floor().max(1.0),
            waves: all_parts * columns / capacity,
            steps: ((kv_blocks(longest) / parts.max(1.0)).ceil() / DECODE_WARPS).ceil(),
        }
    }
}

/// Memory time of queries, their outputs, keys and values.
fn traffic_ns(heads: Heads, queries: f64, keys: f64, gpu: &GpuSpec) -> f64 {
    let elements = queries * heads.q_width() as f64 + keys * heads.kv_width() as f64;
    2.0 * BF16_BYTES * elements / gpu.hbm_bandwidth_bytes_per_s * 1e9
}

/// Features of the ratio; counts that may be 0 enter as `ln(1 + count)`.
pub(super) const FEATURES: [&str; 32] = [
    "ln_q_heads",
    "ln_kv_heads",
    "ln_head_dim",
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
    "ln_longest_over_prefill", // ln of the longest thread block's steps over an SM's: above 0 it decides
    "ln_prefill_longest_steps", // ln of the longest thread block's steps
    "ln_prefill_parts",        // ln of the parts that a tile's keys are split into
    "ln_prefill_blocks_per_sm", // ln of thread blocks over SMs
    "prefill_wave_fill",       // 0..=1, thread blocks over those of full waves of one an SM
    "prefill_tile_fill",       // 0..=1, tokens over the rows of all tiles
    "ln_prefill_skew",         // 0 when all chunks are alike
    "ln_chunk_tokens",         // ln of a chunk's tokens
    "ln_decode_columns_per_sm", // ln of decodes times their thread blocks side by side over SMs
    "ln_longest_over_decode",  // ln of the longest decode's time over all decodes': above 0 it decides
    "ln_decode_parts",         // ln of the parts that the longest decode is split into
    "ln_decode_join_passes",   // ln of the parts that a joining thread goes through
    "ln_decode_waves",         // ln of decode blocks over those that the GPU holds
    "decode_wave_fill",        // 0..=1, decode blocks over the blocks of full waves
    "signed_tiles",            // large tiles of all chunks, negative where their keys are split and joined
    "ln_decode_steps",         // ln of the KV blocks that a warp of the longest part takes
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
    let tokens = f64::from(load.num_prefill_tokens);
    let longest = f64::from(load.max_decode_kv_tokens);
    let prefill_ns = (prefill.steps_per_sm * prefill.step_products_ns).max(prefill.memory_ns);
    Row::from_slice(&[
        ln(f64::from(heads.num_q_heads)),
        ln(f64::from(heads.num_kv_heads)),
        ln(f64::from(heads.head_dim)),
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
        ln((prefill.longest_steps + 1.0) / (prefill.steps_per_sm + 1.0)),
        ln1p(prefill.longest_steps),
        ln(prefill.parts),
        ln1p(prefill.blocks_per_sm),
        wave_fill(prefill.blocks_per_sm),
        prefill.tile_fill as f32,
        ln(prefill.skew),
        ln1p(prefill.chunk),
        ln1p(decode.columns_per_sm),
        ln((decode.longest_ns + 1.0) / (decode.memory_ns + 1.0)),
        ln1p(decode.parts),
        ln1p(decode.parts * decode.join_passes),
        ln1p(decode.waves),
        wave_fill(decode.waves),
        (if prefill.joined_tiles > 0.0 { -prefill.tiles } else { prefill.tiles }) as f32,
        ln1p(decode.steps),
    ])
}

//! Attention of chunks and decodes over the paged cache.
//!
//! A load tells sums over its sequences, so chunks are taken to be alike, and so are all decodes but the longest.

use std::borrow::Cow;

use plumbline_schema::{
    AttentionLoad, GpuSpec, Heads,
    roofline::{Sides, tensor_flops_per_s},
};

use super::{BF16_BYTES, NOMINAL_NS, Row, Scale, ceil, logarithm, wave_fill};

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

pub(super) fn parts_ns(heads: Heads, load: AttentionLoad, gpu: &GpuSpec) -> Row<f64> {
    Row::from_slice(&Launches::new(heads, Cow::Borrowed(gpu)).launch(load).parts_ns())
}

/// A launch as a GPU cuts it into thread blocks: what parts and features are made of.
pub(crate) struct Launch<'a> {
    launches: &'a Launches<'a>,
    load: AttentionLoad,
    sides: Sides,
    prefill: Prefill,
    decode: Decode,
}

impl Launch<'_> {
    pub(crate) fn sides(&self) -> Sides {
        self.sides
    }

    /// In the order of [`PARTS`].
    pub(crate) fn parts_ns(&self) -> [f64; PARTS.len()] {
        let Self { launches: Launches { blocks, memory, .. }, load, sides, prefill, decode } = self;
        let is_mixed = load.num_prefill_seqs > 0 && load.num_decode_seqs > 0;
        let path = prefill.steps_per_sm.max(prefill.longest_steps);
        let [roofline, decode_memory, decode_reads, decode_waves, decode_steps, is_split, decode_joins] =
            decode.parts_ns(blocks, *load, *sides, memory);
        [
            roofline,
            prefill.steps_per_sm * prefill.step_products_ns,
            prefill.steps_per_sm * prefill.step_exps_ns,
            path * prefill.step_products_ns,
            path * prefill.step_exps_ns,
            prefill.memory_ns,
            ceil(prefill.blocks_per_sm) * NOMINAL_NS,
            if prefill.parts > 1.0 { prefill.parts * prefill.tile_fill * NOMINAL_NS } else { 0.0 },
            decode_memory,
            decode_reads,
            decode_waves,
            decode_steps,
            is_split,
            decode_joins,
            nominal_ns(is_mixed),
            if prefill.has_room { prefill.steps_per_sm * prefill.step_products_ns } else { 0.0 },
            nominal_ns(prefill.joined_tiles > 0.0),
            prefill.joined_tiles * NOMINAL_NS,
            if prefill.has_room { 0.0 } else { prefill.busiest_steps * prefill.step_products_ns },
            prefill.small_tile_fill * NOMINAL_NS,
        ]
    }

    /// In the order of [`FEATURES`].
    pub(crate) fn features(&self, overhead_ns: f64) -> [f32; FEATURES.len()] {
        logarithm::all(&SCALES, &self.arguments(overhead_ns))
    }

    /// The numbers that [`FEATURES`] tell, each in the way of [`SCALES`].
    fn arguments(&self, overhead_ns: f64) -> [f64; FEATURES.len()] {
        let Self { launches: Launches { heads, blocks, memory, .. }, load, sides, prefill, decode } = self;
        let tokens = f64::from(load.num_prefill_tokens);
        let prefill_ns = (prefill.steps_per_sm * prefill.step_products_ns).max(prefill.memory_ns);
        let decode_ns = memory.ns(f64::from(load.num_decode_seqs), load.decode_kv_tokens as f64);
        let [
            decode_seqs,
            decode_keys,
            mean_keys,
            longest_keys,
            decode_skew,
            compute_over_memory,
            roofline_over_overhead,
            columns_per_sm,
            longest_over_decode,
            decode_parts,
            join_passes,
            decode_waves,
            decode_fill,
            decode_steps,
        ] = decode.arguments(blocks, *load, *sides, memory, overhead_ns);
        [
            f64::from(heads.num_q_heads),
            f64::from(heads.num_kv_heads),
            f64::from(heads.head_dim),
            f64::from(load.num_prefill_seqs),
            tokens,
            load.prefill_kv_tokens as f64,
            load.prefill_pairs as f64,
            load.prefill_pairs as f64 / tokens.max(1.0),
            decode_seqs,
            decode_keys,
            mean_keys,
            longest_keys,
            decode_skew,
            prefill_ns / (prefill_ns + decode_ns).max(f64::MIN_POSITIVE),
            compute_over_memory,
            roofline_over_overhead,
            (prefill.longest_steps + 1.0) / (prefill.steps_per_sm + 1.0),
            prefill.longest_steps,
            prefill.parts,
            prefill.blocks_per_sm,
            wave_fill(prefill.blocks_per_sm),
            prefill.tile_fill,
            prefill.skew,
            prefill.chunk,
            columns_per_sm,
            longest_over_decode,
            decode_parts,
            join_passes,
            decode_waves,
            decode_fill,
            if prefill.joined_tiles > 0.0 { -prefill.tiles } else { prefill.tiles },
            decode_steps,
        ]
    }
}

/// [`NOMINAL_NS`] where a condition holds.
fn nominal_ns(condition: bool) -> f64 {
    if condition { NOMINAL_NS } else { 0.0 }
}

/// The chunks of a step; without any, no steps, blocks and bytes.
#[derive(Clone, Copy, Debug)]
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
    fn new(launches: &Launches<'_>, load: AttentionLoad) -> Self {
        let (Launches { heads, memory, flops_per_s, .. }, gpu) = (launches, &*launches.gpu);
        let (num_sms, q_heads) = (f64::from(gpu.num_sms), f64::from(heads.num_q_heads));
        let (tokens, chunks) = (f64::from(load.num_prefill_tokens), f64::from(load.num_prefill_seqs));
        let chunk = (tokens / chunks.max(1.0)).max(1.0);
        let splits_keys = gpu.compute_capability == 90;
        let tiles = chunks * ceil(chunk / TILE_QUERIES);
        let large_blocks = tiles * q_heads;
        let has_room = chunks > 0.0 && large_blocks <= num_sms;
        let is_large = splits_keys || large_blocks >= num_sms;
        let rows = if is_large { TILE_QUERIES } else { TILE_QUERIES / 2.0 };
        let tiles_per_chunk = ceil(chunk / rows);
        let blocks = chunks * tiles_per_chunk * q_heads;
        // Long chunks have most tiles, short ones a tile each: tokens and chunks count by that.
        let of_tokens = (load.prefill_pairs as f64 / tokens.max(1.0) - f64::midpoint(chunk, 1.0)).max(0.0);
        let of_chunks = (load.prefill_kv_tokens as f64 - tokens).max(0.0) / chunks.max(1.0);
        let context = of_tokens + (of_chunks - of_tokens) / tiles_per_chunk;
        // Tiles see from their own rows to the whole chunk.
        let mean_steps = ((context + f64::midpoint(chunk, rows.min(chunk))) / STEP_KEYS).max(1.0);
        let longest = chunks.min(1.0) * ceil((of_tokens.max(of_chunks) + chunk) / STEP_KEYS);
        let room = (num_sms / blocks.max(1.0)).floor().clamp(1.0, MAX_PARTS);
        let part_steps = ceil(longest / room).max(MIN_PART_STEPS);
        let parts = if splits_keys { ceil(longest / part_steps).max(1.0) } else { 1.0 };
        let step_flops = 4.0 * f64::from(heads.head_dim) * rows * STEP_KEYS;
        let exp_flops = rows * STEP_KEYS * FLOPS_PER_EXP;
        Self {
            memory_ns: memory.ns(tokens, load.prefill_kv_tokens as f64),
            steps_per_sm: mean_steps * blocks / num_sms,
            longest_steps: ceil(longest / parts),
            has_room,
            joined_tiles: if has_room && longest > 1.0 { tiles } else { 0.0 },
            tiles,
            busiest_steps: ceil(large_blocks / num_sms) * mean_steps,
            small_tile_fill: (chunks * ceil(chunk / (TILE_QUERIES / 2.0)) * q_heads / num_sms).min(1.0),
            blocks_per_sm: blocks * parts / num_sms,
            parts,
            tile_fill: chunk / (tiles_per_chunk * rows),
            chunk: tokens / chunks.max(1.0),
            skew: (of_chunks + chunk) / (of_tokens + chunk),
            step_products_ns: step_flops / flops_per_s * 1e9 * num_sms,
            step_exps_ns: exp_flops / gpu.fp32_flops_per_s * num_sms * 1e9,
        }
    }
}

/// What heads and a GPU decide of decodes, whatever the load.
#[derive(Clone, Copy, Debug)]
struct DecodeBlocks {
    num_sms: f64,
    /// Times that the keys of a KV head are read.
    groups: f64,
    /// Thread blocks side by side for one decode.
    columns: f64,
    /// Thread blocks that the GPU holds.
    capacity: f64,
    /// Passes over the parts, or their share, of the thread that joins them: fewer elements leave threads to divide them.
    join_passes: f64,
}

impl DecodeBlocks {
    fn new(heads: Heads, gpu: &GpuSpec) -> Self {
        let num_sms = f64::from(gpu.num_sms);
        let heads_per_kv = f64::from(heads.num_q_heads / heads.num_kv_heads.max(1));
        let groups = ceil(heads_per_kv / DECODE_GROUP).max(1.0);
        let elements = heads_per_kv.min(DECODE_GROUP) * f64::from(heads.head_dim);
        Self {
            num_sms,
            groups,
            columns: f64::from(heads.num_kv_heads) * groups,
            capacity: num_sms * DECODE_BLOCKS_PER_SM,
            join_passes: ceil(elements / JOINED_AT_ONCE)
                / (JOINED_AT_ONCE / elements.max(1.0)).floor().max(1.0),
        }
    }
}

/// How the decodes of a step are cut into thread blocks; without any, into none. While contexts grow it stays the same
/// for many steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Decode {
    /// KV blocks of a part.
    part_blocks: f64,
    /// Parts that the longest decode is split into, so that all SMs have blocks.
    parts: f64,
    /// Parts of each of the others.
    other_parts: f64,
    /// Thread blocks over those that the GPU holds.
    waves: f64,
    /// KV blocks that a warp of the longest part takes.
    steps: f64,
}

/// The load's decodes and their keys, and the keys of the longest.
fn decode_counts(load: AttentionLoad) -> (f64, f64, f64) {
    let longest = f64::from(load.max_decode_kv_tokens);
    (f64::from(load.num_decode_seqs), load.decode_kv_tokens as f64, longest)
}

impl Decode {
    fn new(blocks: &DecodeBlocks, load: AttentionLoad) -> Self {
        let DecodeBlocks { columns, capacity, .. } = *blocks;
        let (seqs, keys, longest) = decode_counts(load);
        let kv_blocks = |keys: f64| ceil(keys / KV_BLOCK);
        // A fair share of all KV blocks, the same number for each warp.
        let fair = ceil(seqs * kv_blocks(keys / seqs.max(1.0)) * columns / capacity).min(MAX_PART_BLOCKS);
        let part_blocks = ceil(fair / DECODE_WARPS).max(1.0) * DECODE_WARPS;
        let parts_of = |keys: f64| ceil(kv_blocks(keys) / part_blocks);
        let parts = parts_of(longest);
        let others = (seqs - 1.0).max(0.0);
        let other_parts = parts_of((keys - longest).max(0.0) / others.max(1.0));
        Self {
            part_blocks,
            parts,
            other_parts,
            waves: (parts + others * other_parts) * columns / capacity,
            steps: ceil(ceil(kv_blocks(longest) / parts.max(1.0)) / DECODE_WARPS),
        }
    }

    /// Numbers of [`DECODE_FEATURES`].
    #[inline]
    fn arguments(
        &self,
        blocks: &DecodeBlocks,
        load: AttentionLoad,
        sides: Sides,
        memory: &Memory,
        overhead_ns: f64,
    ) -> [f64; DECODE_FEATURES.len()] {
        let (seqs, keys, longest) = decode_counts(load);
        let mean_keys = keys / seqs.max(1.0);
        // Reading the longest decode's keys and values by as many SMs as its thread blocks are.
        let sms = (blocks.columns * self.parts).clamp(1.0, blocks.num_sms);
        let longest_ns = memory.ns(0.0, longest) * blocks.num_sms / sms;
        [
            seqs,
            keys,
            mean_keys,
            longest,
            longest.max(1.0) / mean_keys.max(1.0),
            sides.compute_ns / sides.memory_ns,
            sides.roofline_ns() / overhead_ns,
            seqs * blocks.columns / blocks.num_sms,
            (longest_ns + 1.0) / (memory.ns(seqs, keys) + 1.0),
            self.parts,
            self.parts * blocks.join_passes,
            self.waves,
            wave_fill(self.waves),
            self.steps,
        ]
    }

    /// [`DECODE_PARTS`] in ns.
    #[inline]
    fn parts_ns(
        &self,
        blocks: &DecodeBlocks,
        load: AttentionLoad,
        sides: Sides,
        memory: &Memory,
    ) -> [f64; DECODE_PARTS.len()] {
        let (seqs, keys, _) = decode_counts(load);
        [
            sides.roofline_ns(),
            memory.ns(seqs, keys),
            // Each eight q heads of a KV head read its keys.
            memory.ns(seqs, keys * blocks.groups),
            ceil(self.waves) * NOMINAL_NS,
            self.steps * NOMINAL_NS,
            nominal_ns(self.parts > 1.0),
            if self.parts > 1.0 { self.parts * blocks.join_passes * NOMINAL_NS } else { 0.0 },
        ]
    }
}

/// Memory time of queries, their outputs, keys and values.
#[derive(Clone, Copy, Debug)]
struct Memory {
    q_width: f64,
    kv_width: f64,
    bytes_per_s: f64,
}

impl Memory {
    fn new(heads: Heads, gpu: &GpuSpec) -> Self {
        let (q_width, kv_width) = (heads.q_width() as f64, heads.kv_width() as f64);
        Self { q_width, kv_width, bytes_per_s: gpu.hbm_bandwidth_bytes_per_s }
    }

    #[inline]
    fn ns(&self, queries: f64, keys: f64) -> f64 {
        let elements = queries * self.q_width + keys * self.kv_width;
        2.0 * BF16_BYTES * elements / self.bytes_per_s * 1e9
    }
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

/// How [`FEATURES`] tell their numbers.
#[rustfmt::skip]
pub(crate) const SCALES: [Scale; FEATURES.len()] = {
    use Scale::{Ln, Ln1p, Plain};
    [
        Ln, Ln, Ln, Ln1p, Ln1p, Ln1p, Ln1p, Ln1p, Ln1p, Ln1p, Ln1p, Ln1p, Ln, Plain, Ln, Ln,
        Ln, Ln1p, Ln, Ln1p, Plain, Plain, Ln, Ln1p, Ln1p, Ln, Ln1p, Ln1p, Ln1p, Plain, Plain, Ln1p,
    ]
};

pub(super) fn features(heads: Heads, load: AttentionLoad, gpu: &GpuSpec, overhead_ns: f64) -> Row<f32> {
    Row::from_slice(&Launches::new(heads, Cow::Borrowed(gpu)).launch(load).features(overhead_ns))
}

pub(super) fn features_and_parts(
    heads: Heads,
    load: AttentionLoad,
    gpu: &GpuSpec,
    overhead_ns: f64,
) -> (Row<f32>, Row<f64>) {
    let launches = Launches::new(heads, Cow::Borrowed(gpu));
    let launch = launches.launch(load);
    (Row::from_slice(&launch.features(overhead_ns)), Row::from_slice(&launch.parts_ns()))
}

/// The [`FEATURES`] that the heads decide, by their places: they come first.
pub(crate) const HEADS_FEATURES: std::ops::Range<usize> = 0..3;
/// The [`FEATURES`] in which launches of decodes alone differ when heads and GPU are the same, by their places.
pub(crate) const DECODE_FEATURES: [usize; 14] = [8, 9, 10, 11, 12, 14, 15, 24, 25, 26, 27, 28, 29, 31];
/// The [`PARTS`] that launches of decodes alone have, by their places; all others are 0.
pub(crate) const DECODE_PARTS: [usize; 7] = [0, 8, 9, 10, 11, 12, 13];

/// Launches of the same heads on the same GPU: asked for step after step, so what they share is computed once.
#[derive(Clone, Debug)]
pub(crate) struct Launches<'a> {
    heads: Heads,
    gpu: Cow<'a, GpuSpec>,
    /// [`tensor_flops_per_s`].
    flops_per_s: f64,
    blocks: DecodeBlocks,
    memory: Memory,
}

impl<'a> Launches<'a> {
    pub(crate) fn new(heads: Heads, gpu: Cow<'a, GpuSpec>) -> Self {
        let (blocks, memory) = (DecodeBlocks::new(heads, &gpu), Memory::new(heads, &gpu));
        Self { heads, flops_per_s: tensor_flops_per_s(&gpu), gpu, blocks, memory }
    }

    pub(crate) fn launch(&'a self, load: AttentionLoad) -> Launch<'a> {
        let (sides, prefill, decode) = (self.sides(load), Prefill::new(self, load), self.cut(load));
        Launch { launches: self, load, sides, prefill, decode }
    }

    /// The roofline's sides.
    #[inline]
    pub(crate) fn sides(&self, load: AttentionLoad) -> Sides {
        let Self { heads, gpu, flops_per_s, .. } = self;
        Sides::new(heads.attention_flops(load), heads.attention_bytes(load), *flops_per_s, gpu)
    }

    /// How decodes are cut.
    #[inline]
    pub(crate) fn cut(&self, load: AttentionLoad) -> Decode {
        Decode::new(&self.blocks, load)
    }

    /// Steps for which decodes stay cut as they are while each context grows by a token a step, or about as many.
    pub(crate) fn steps_of_cut(&self, load: AttentionLoad, cut: &Decode) -> f64 {
        let (seqs, keys, longest) = decode_counts(load);
        let Decode { part_blocks, parts, other_parts, steps, .. } = *cut;
        let others = (seqs - 1.0).max(1.0);
        let longest_blocks = (parts * part_blocks).min(steps * DECODE_WARPS * parts.max(1.0));
        let fair_blocks = part_blocks * self.blocks.capacity / (seqs * self.blocks.columns);
        let of_longest = longest_blocks * KV_BLOCK - longest;
        let of_others = other_parts * part_blocks * KV_BLOCK - (keys - longest) / others;
        let of_mean = fair_blocks.floor() * KV_BLOCK - keys / seqs;
        let of_others = if seqs > 1.0 { of_others } else { f64::INFINITY };
        let of_mean = if part_blocks < MAX_PART_BLOCKS { of_mean } else { f64::INFINITY };
        of_longest.min(of_others).min(of_mean).floor()
    }

    /// Numbers of [`DECODE_FEATURES`] of decodes alone.
    #[inline]
    pub(crate) fn arguments(
        &self,
        load: AttentionLoad,
        cut: &Decode,
        sides: Sides,
        overhead_ns: f64,
    ) -> [f64; DECODE_FEATURES.len()] {
        cut.arguments(&self.blocks, load, sides, &self.memory, overhead_ns)
    }

    /// [`DECODE_PARTS`] of decodes alone, in ns.
    #[inline]
    pub(crate) fn parts_ns(
        &self,
        load: AttentionLoad,
        cut: &Decode,
        sides: Sides,
    ) -> [f64; DECODE_PARTS.len()] {
        cut.parts_ns(&self.blocks, load, sides, &self.memory)
    }
}

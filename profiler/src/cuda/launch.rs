//! Operators with their operands, as launches.
//!
//! Operands are device addresses; shapes and layouts stand in each kernel's source. Every function fails where a kernel
//! does not cover the shape, does not compile or does not load.
#![expect(clippy::missing_errors_doc, reason = "they all fail for the same reasons, told above")]

use std::rc::Rc;

use plumbline_schema::Heads;

use super::{
    attention::{
        AttentionPlan, BLOCK_SIZE, DECODE_GROUP, DecodePlan, PrefillKernel, PrefillPlan, decode_columns,
    },
    driver::{Args, CudaError, CudaResult, KernelLaunch, Stream, tensor_map},
    gemm::GemmLaunch,
    kernels::Kernels,
};

/// Added to the mean square before its root where no model says otherwise: Qwen3's, and Llama's within a factor of ten.
pub const RMS_EPSILON: f32 = 1e-6;
/// Elements of a vector access.
const VECTOR: u32 = 8;

/// One piece of device work.
#[derive(Clone)]
pub enum Launch {
    /// One of this project's kernels.
    Kernel(KernelLaunch),
    /// A product by cuBLASLt.
    Gemm(Rc<GemmLaunch>),
}

impl Launch {
    /// Puts it on a stream.
    pub fn enqueue(&self, stream: &Stream) -> CudaResult<()> {
        match self {
            Self::Kernel(kernel) => kernel.enqueue(stream),
            Self::Gemm(gemm) => gemm.enqueue(stream),
        }
    }
}

/// Where an attention launch's operands lie.
#[derive(Clone, Copy, Debug)]
pub struct AttentionOperands {
    /// Queries, at the front of each token's row.
    pub q: u64,
    /// Elements from one token's queries to the next's.
    pub q_stride: u32,
    /// `[num_blocks, 16, num_kv_heads, head_dim]`.
    pub k_cache: u64,
    /// `[num_blocks, 16, num_kv_heads, head_dim]`.
    pub v_cache: u64,
    /// `[num_tokens, num_q_heads * head_dim]`.
    pub out: u64,
    /// What the kernels are told about the sequences.
    pub tables: AttentionTables,
}

/// Where an attention launch's tables and workspaces lie; 0 where the plan has no such part.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttentionTables {
    /// [`AttentionPlan::block_table`].
    pub block_table: u64,
    /// [`PrefillPlan::seqs`].
    pub prefill_seqs: u64,
    /// [`PrefillPlan::tiles`].
    pub prefill_tiles: u64,
    /// [`DecodePlan::seqs`].
    pub decode_seqs: u64,
    /// [`DecodePlan::items`].
    pub decode_items: u64,
    /// Of [`Workspace::of_prefill`].
    pub prefill_joins: Joins,
    /// Of [`Workspace::of_decode`].
    pub decode_joins: Joins,
}

/// Where the results of splits wait to be joined.
#[derive(Clone, Copy, Debug, Default)]
pub struct Joins {
    /// Unnormalised outputs, fp32.
    pub partial_out: u64,
    /// Maxima and sums.
    pub partial_stats: u64,
    /// Zero before the launch, and after it.
    pub arrived: u64,
}

/// What the splits of an attention kernel need to join their results; zeros where there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Workspace {
    /// Bytes of the partial outputs.
    pub out_bytes: u64,
    /// Bytes of their maxima and sums.
    pub stats_bytes: u64,
    /// Number of counters.
    pub num_counters: u64,
}

impl Workspace {
    fn new(num_rows: u64, num_counters: u64, heads: Heads) -> Self {
        Self { out_bytes: num_rows * u64::from(heads.head_dim) * 4, stats_bytes: num_rows * 8, num_counters }
    }

    /// The prefill kernel's.
    #[must_use]
    pub fn of_prefill(plan: &PrefillPlan, heads: Heads) -> Self {
        let q_heads = u64::from(heads.num_q_heads);
        let rows = u64::from(plan.num_slots) * q_heads * u64::from(plan.kernel.tile_rows());
        Self::new(rows, u64::from(plan.num_groups) * q_heads, heads)
    }

    /// The decode kernel's.
    #[must_use]
    pub fn of_decode(plan: &DecodePlan, heads: Heads) -> Self {
        let columns = u64::from(decode_columns(heads));
        let rows = plan.items.len() as u64 * columns * u64::from(DECODE_GROUP);
        Self::new(rows, plan.seqs.len() as u64 * columns, heads)
    }
}

fn kernel(
    kernels: &mut Kernels,
    name: &'static str,
    definitions: &[&str],
    grid: (u32, u32),
    num_threads: u32,
    args: Args,
) -> CudaResult<Launch> {
    let function = kernels.get(name, definitions, 0)?;
    Ok(Launch::Kernel(KernelLaunch { function, grid, num_threads, shared_bytes: 0, args }))
}

fn vectors(what: &str, width: u32) -> CudaResult<u32> {
    if width == 0 || !width.is_multiple_of(VECTOR) {
        return Err(CudaError::Unsupported(format!(
            "expected a {what} that is a multiple of {VECTOR}, found {width}"
        )));
    }
    Ok(width / VECTOR)
}

fn head_dim_definition(heads: Heads) -> CudaResult<&'static str> {
    if heads.num_kv_heads == 0 || !heads.num_q_heads.is_multiple_of(heads.num_kv_heads) {
        return Err(CudaError::Unsupported(format!(
            "expected num_kv_heads that divides num_q_heads, found {} and {}",
            heads.num_kv_heads, heads.num_q_heads
        )));
    }
    match heads.head_dim {
        64 => Ok("HEAD_DIM=64"),
        128 => Ok("HEAD_DIM=128"),
        other => Err(CudaError::Unsupported(format!("expected a head_dim of 64 or 128, found {other}"))),
    }
}

fn warps(threads: u32, most: u32) -> u32 {
    threads.next_multiple_of(32).clamp(32, most)
}

/// Fills memory with random numbers, uniform in `[-scale, scale)`.
pub fn fill(
    kernels: &mut Kernels,
    address: u64,
    num_bytes: u64,
    seed: u64,
    scale: f32,
) -> CudaResult<Launch> {
    let num_vectors = num_bytes / 16;
    let blocks = num_vectors.div_ceil(256).clamp(1, 4096) as u32;
    let args = Args::default().u64(address).u64(num_vectors).u64(seed).f32(scale);
    kernel(kernels, "fill", &[], (blocks, 1), 256, args)
}

/// Gathers rows of a table: `[ids, table, out]`.
pub fn embedding(
    kernels: &mut Kernels,
    [ids, table, out]: [u64; 3],
    num_tokens: u32,
    hidden_size: u32,
) -> CudaResult<Launch> {
    let row = vectors("hidden_size", hidden_size)?;
    let args = Args::default().u64(ids).u64(table).u64(out).u32(row);
    kernel(kernels, "embedding", &[], (num_tokens, 1), warps(row.div_ceil(2), 512), args)
}

/// Adds `x` to the residual and normalises it into `out`.
pub fn rms_norm(
    kernels: &mut Kernels,
    [x, residual, weight, out]: [u64; 4],
    num_tokens: u32,
    hidden_size: u32,
    epsilon: f32,
) -> CudaResult<Launch> {
    let row = vectors("hidden_size", hidden_size)?;
    // As few vectors a thread as blocks of 512 allow: more threads are then under way.
    let (vectors, definition) = match row.div_ceil(512) {
        0 | 1 => (1, "VECTORS=1"),
        2 => (2, "VECTORS=2"),
        _ => (4, "VECTORS=4"),
    };
    let threads = warps(row.div_ceil(vectors), 1024);
    if row > vectors * threads {
        return Err(CudaError::Unsupported(format!(
            "expected a hidden_size up to 32768, found {hidden_size}"
        )));
    }
    let args = Args::default().u64(x).u64(residual).u64(weight).u64(out).u32(row).f32(epsilon);
    kernel(kernels, "rms_norm", &[definition], (num_tokens, 1), threads, args)
}

/// Normalises queries and keys in place.
pub fn qk_norm(
    kernels: &mut Kernels,
    [qkv, q_weight, k_weight]: [u64; 3],
    num_tokens: u32,
    heads: Heads,
    epsilon: f32,
) -> CudaResult<Launch> {
    let definition = head_dim_definition(heads)?;
    let lanes = u64::from(num_tokens) * heads.qk_width() / u64::from(VECTOR);
    let args = Args::default()
        .u64(qkv)
        .u64(q_weight)
        .u64(k_weight)
        .u32(num_tokens)
        .u32(heads.num_q_heads)
        .u32(heads.num_kv_heads)
        .f32(epsilon);
    kernel(kernels, "qk_norm", &[definition], (lanes.div_ceil(256) as u32, 1), 256, args)
}

/// Rotates queries and keys in place.
pub fn rope(
    kernels: &mut Kernels,
    [qkv, positions, cos_sin]: [u64; 3],
    num_tokens: u32,
    heads: Heads,
) -> CudaResult<Launch> {
    let definition = head_dim_definition(heads)?;
    let threads = warps((heads.num_q_heads + heads.num_kv_heads) * heads.head_dim / 16, 512);
    let args =
        Args::default().u64(qkv).u64(positions).u64(cos_sin).u32(heads.num_q_heads).u32(heads.num_kv_heads);
    kernel(kernels, "rope", &[definition], (num_tokens, 1), threads, args)
}

/// What [`rope`] reads: cosines, then sines, of each position's angles, one a frequency (radians a token).
#[must_use]
pub fn rotation_table(num_positions: u32, frequencies: &[f64]) -> Vec<f32> {
    let mut table = Vec::with_capacity(num_positions as usize * 2 * frequencies.len());
    for position in 0..num_positions {
        let angles = frequencies.iter().map(|frequency| f64::from(position) * frequency);
        table.extend(angles.clone().map(|angle| angle.cos() as f32));
        table.extend(angles.map(|angle| angle.sin() as f32));
    }
    table
}

/// Writes keys and values to their slots of the cache.
///
/// Keys start at element `q_width` of each token's `q_width + 2 * kv_width`.
pub fn kv_cache_write(
    kernels: &mut Kernels,
    [qkv, slots, k_cache, v_cache]: [u64; 4],
    num_tokens: u32,
    q_width: u32,
    kv_width: u32,
) -> CudaResult<Launch> {
    let kv = vectors("num_kv_heads * head_dim", kv_width)?;
    let q = q_width / VECTOR;
    let args = Args::default().u64(qkv).u64(slots).u64(k_cache).u64(v_cache).u32(q + 2 * kv).u32(q).u32(kv);
    kernel(kernels, "kv_cache_write", &[], (num_tokens, 1), warps(kv, 512), args)
}

/// `silu(gate) * up`.
pub fn silu_mul(
    kernels: &mut Kernels,
    [gate_up, out]: [u64; 2],
    num_tokens: u32,
    intermediate_size: u32,
) -> CudaResult<Launch> {
    let row = vectors("intermediate_size", intermediate_size)?;
    let threads = warps(row, 256);
    let args = Args::default().u64(gate_up).u64(out).u32(row);
    kernel(kernels, "silu_mul", &[], (num_tokens, row.div_ceil(threads)), threads, args)
}

/// Parts that a row of logits is cut into: enough blocks to fill the chip, at least 2,048 logits each.
#[must_use]
pub fn sample_parts(num_seqs: u32, vocab_size: u32, num_sms: u32) -> u32 {
    (2 * num_sms).div_ceil(num_seqs.max(1)).min(vocab_size / 2048).clamp(1, 64)
}

/// The index of each row's largest logit.
pub fn sample(
    kernels: &mut Kernels,
    [logits, ids, partials, arrived]: [u64; 4],
    num_seqs: u32,
    vocab_size: u32,
    num_parts: u32,
) -> CudaResult<Launch> {
    let row = vectors("vocab_size", vocab_size)?;
    let threads = warps(row.div_ceil(num_parts), 512);
    let args = Args::default().u64(logits).u64(ids).u64(partials).u64(arrived).u32(row);
    kernel(kernels, "sample", &[], (num_seqs, num_parts), threads, args)
}

/// Draws an index of each row: `[logits, seqs, ids]`, see `sample_random.cu`.
pub fn sample_random(
    kernels: &mut Kernels,
    [logits, seqs, ids]: [u64; 3],
    num_seqs: u32,
    vocab_size: u32,
) -> CudaResult<Launch> {
    let row = vectors("vocab_size", vocab_size)?;
    let args = Args::default().u64(logits).u64(seqs).u64(ids).u32(row);
    kernel(kernels, "sample_random", &[], (num_seqs, 1), 1024, args)
}

/// The prefill kernel, the decode kernel, or one after the other.
pub fn attention(
    kernels: &mut Kernels,
    plan: &AttentionPlan,
    heads: Heads,
    operands: &AttentionOperands,
) -> CudaResult<Vec<Launch>> {
    let definition = head_dim_definition(heads)?;
    let scale_log2 = std::f32::consts::LOG2_E / (heads.head_dim as f32).sqrt();
    let tables = &operands.tables;
    let mut launches = Vec::with_capacity(2);
    if let Some(prefill) = &plan.prefill {
        launches.push(attention_prefill(kernels, plan, prefill, heads, operands, definition, scale_log2)?);
    }
    if let Some(decode) = &plan.decode {
        let first_row = plan.prefill.as_ref().map_or(0, |prefill| prefill.seqs.len() as u64);
        let args = Args::default()
            .u64(operands.q)
            .u64(operands.k_cache)
            .u64(operands.v_cache)
            .u64(operands.out)
            .u64(tables.block_table + 4 * first_row * u64::from(plan.table_stride))
            .u64(tables.decode_seqs)
            .u64(tables.decode_items)
            .u64(tables.decode_joins.partial_out)
            .u64(tables.decode_joins.partial_stats)
            .u64(tables.decode_joins.arrived)
            .u32(plan.table_stride)
            .u32(operands.q_stride)
            .u32(heads.num_q_heads)
            .u32(heads.num_kv_heads)
            .f32(scale_log2);
        let grid = (decode_columns(heads), grid_rows(decode.items.len())?);
        launches.push(kernel(kernels, "attention_decode", &[definition], grid, 128, args)?);
    }
    Ok(launches)
}

fn attention_prefill(
    kernels: &mut Kernels,
    plan: &AttentionPlan,
    prefill: &PrefillPlan,
    heads: Heads,
    operands: &AttentionOperands,
    head_dim: &str,
    scale_log2: f32,
) -> CudaResult<Launch> {
    let tables = &operands.tables;
    let grid = (heads.num_q_heads, grid_rows(prefill.tiles.len())?);
    if prefill.kernel == PrefillKernel::Hopper {
        // Queries and two stages of keys and values, 128 rows each, from a multiple of 1,024 bytes on.
        let shared_bytes = 5 * 128 * heads.head_dim * 2 + 1024;
        let function = kernels.get("attention_prefill_sm90", &[head_dim], shared_bytes)?;
        let args = hopper_maps(plan, heads, operands)?
            .u64(operands.out)
            .u64(tables.block_table)
            .u64(tables.prefill_seqs)
            .u64(tables.prefill_tiles)
            .u64(tables.prefill_joins.partial_out)
            .u64(tables.prefill_joins.partial_stats)
            .u64(tables.prefill_joins.arrived)
            .u32(plan.table_stride)
            .u32(heads.num_kv_heads)
            .f32(scale_log2);
        return Ok(Launch::Kernel(KernelLaunch { function, grid, num_threads: 384, shared_bytes, args }));
    }
    let warp_tiles = if prefill.kernel == PrefillKernel::Large { "WARP_TILES=2" } else { "WARP_TILES=1" };
    // Queries, keys and values of a block.
    let shared_bytes = (prefill.kernel.tile_rows() + 64 + 64) * heads.head_dim * 2;
    let args = Args::default()
        .u64(operands.q)
        .u64(operands.k_cache)
        .u64(operands.v_cache)
        .u64(operands.out)
        .u64(tables.block_table)
        .u64(tables.prefill_seqs)
        .u64(tables.prefill_tiles)
        .u32(plan.table_stride)
        .u32(operands.q_stride)
        .u32(heads.num_kv_heads)
        .f32(scale_log2);
    let function = kernels.get("attention_prefill", &[head_dim, warp_tiles], shared_bytes)?;
    Ok(Launch::Kernel(KernelLaunch { function, grid, num_threads: 128, shared_bytes, args }))
}

/// The tensors of an attention launch as the copy engine sees them.
fn hopper_maps(plan: &AttentionPlan, heads: Heads, operands: &AttentionOperands) -> CudaResult<Args> {
    let (q_stride, kv_width) = (u64::from(operands.q_stride), heads.kv_width());
    let (head_dim, num_tokens) = (u64::from(heads.head_dim), u64::from(plan.num_tokens));
    let q = tensor_map(operands.q, [q_stride, num_tokens], &[2 * q_stride], [64, 128])?;
    let num_slots = u64::from(plan.num_blocks) * u64::from(BLOCK_SIZE);
    let cache = |address| {
        let dimensions = [head_dim, u64::from(heads.num_kv_heads), num_slots];
        tensor_map(address, dimensions, &[2 * head_dim, 2 * kv_width], [64, 1, BLOCK_SIZE])
    };
    Ok(Args::default().map(q).map(cache(operands.k_cache)?).map(cache(operands.v_cache)?))
}

fn grid_rows(count: usize) -> CudaResult<u32> {
    u32::try_from(count).ok().filter(|&rows| rows <= 65_535).ok_or_else(|| {
        CudaError::Unsupported(format!("expected at most 65535 tiles or splits in a launch, found {count}"))
    })
}

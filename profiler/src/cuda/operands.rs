//! What a timed launch works on: buffers carved out of the pool, as many sets as the cache state asks for.
//!
//! Cold operands rotate among sets that together exceed the L2 cache three times, as the weights and KV caches of a
//! model with many layers do; activations of a matrix product or of attention stay where they are. Hot operands stay
//! in the L2 cache as far as they fit: the operator before has just written them. How fast a small buffer is depends
//! on where in memory it lies, so small sets are spread over as many places as the state allows, and a time is the
//! mean over them.

use std::{collections::HashMap, rc::Rc, sync::Arc};

use cudarc::driver::CudaContext;
use half::bf16;
use plumbline_bundles::CacheState;
use plumbline_schema::{Heads, Operator, OperatorShape, StepBatch};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::{
    attention::{AttentionPlan, BLOCK_SIZE, Chip, PrefillKernel},
    driver::{CudaError, CudaResult, DeviceMemory, Stream},
    gemm::{CublasLt, GemmLaunch, GemmPlan},
    kernels::Kernels,
    launch::{self, AttentionOperands, AttentionTables, Joins, Launch, Workspace},
    memory::{PLACE_BYTES, Pool},
    timing,
};
use crate::device::Point;

/// Rotating sets exceed the L2 cache this many times.
const L2_MULTIPLE: u64 = 3;
/// Most sets of cold operands; fewer bytes than that many sets need to exceed the cache are not wholly cold.
const MAX_SETS: u64 = 384;
/// Hot sets together take at most this share of the L2 cache, and are at most so many.
const HOT_SHARE_OF_L2: u64 = 4;
const MAX_HOT_SETS: u64 = 16;
/// Hot sets that fit the L2 cache one at a time: so many places, and so many launches at each before the next, of which the
/// first finds its operands cold.
const PLACES_IN_ROWS: u64 = 4;
const LAUNCHES_IN_A_ROW: usize = 24;
/// Rows of the embedding that ids are drawn from, memory permitting.
const EMBEDDING_ROWS: u64 = 131_072;
/// Positions of the rotation table.
pub const MAX_POSITIONS: u32 = 32_768;
/// The tables and block orders are the same in every run.
const SEED: u64 = 0x706c_756d;

/// Launches ready to be timed.
pub struct Prepared {
    /// One launch of the operator on each set of operands.
    pub sets: Vec<Vec<Launch>>,
    /// What runs, for the record.
    pub kernel: String,
}

/// A device's resources.
pub struct Gpu {
    pub context: Arc<CudaContext>,
    pub stream: Stream,
    pub kernels: Kernels,
    pub pool: Pool,
    pub library: Rc<CublasLt>,
    pub chip: Chip,
    pub l2_bytes: u64,
    gemms: HashMap<(u32, u32, u32), (Rc<GemmPlan>, usize)>,
    rotations: HashMap<u32, DeviceMemory>,
}

impl Gpu {
    pub fn new(context: &Arc<CudaContext>, chip: Chip, l2_bytes: u64) -> CudaResult<Self> {
        let stream = Stream::new(context)?;
        let library = CublasLt::new()?;
        let (free, _) = context
            .mem_get_info()
            .map_err(|error| CudaError::Call { call: "cuMemGetInfo", reason: error.to_string() })?;
        let mut gpu = Self {
            context: context.clone(),
            stream,
            kernels: Kernels::new(context, chip.compute_capability)?,
            pool: Pool::new(context, free as u64)?,
            library,
            chip,
            l2_bytes,
            gemms: HashMap::new(),
            rotations: HashMap::new(),
        };
        let range = gpu.pool.filled_range();
        gpu.fill(range.start, range.end - range.start)?;
        gpu.stream.synchronize()?;
        tracing::debug!(pool_bytes = gpu.pool.num_bytes(), "device memory taken and filled");
        Ok(gpu)
    }

    fn fill(&mut self, address: u64, num_bytes: u64) -> CudaResult<()> {
        launch::fill(&mut self.kernels, address, num_bytes, SEED, 1.0)?.enqueue(&self.stream)
    }

    /// Output memory that holds random numbers, for operands that are both read and written.
    fn random_scratch(&mut self, num_bytes: u64) -> CudaResult<u64> {
        let address = self.pool.scratch(num_bytes)?;
        self.fill(address, num_bytes.next_multiple_of(16))?;
        Ok(address)
    }

    /// Sets of operands that rotate, at most as many as memory holds.
    fn num_rotating(&self, cache: CacheState, set_bytes: u64, available: u64) -> u64 {
        let set_bytes = set_bytes.max(1);
        if self.num_in_a_row(cache, set_bytes) > 1 {
            return PLACES_IN_ROWS.min(available / set_bytes.next_multiple_of(PLACE_BYTES)).max(1);
        }
        let (bytes, most) = match cache {
            CacheState::Hot => (self.l2_bytes / HOT_SHARE_OF_L2 / set_bytes * set_bytes, MAX_HOT_SETS),
            CacheState::Cold => (L2_MULTIPLE * self.l2_bytes, MAX_SETS),
        };
        // A small set takes a place of its own.
        let place = set_bytes.next_multiple_of(PLACE_BYTES);
        bytes.div_ceil(set_bytes).min(most).min(available / place).max(1)
    }

    /// How often a set is used before the next one: more than once where two sets do not fit a share of the L2 cache.
    fn num_in_a_row(&self, cache: CacheState, set_bytes: u64) -> usize {
        let is_alone = set_bytes > self.l2_bytes / HOT_SHARE_OF_L2 / 2 && set_bytes <= self.l2_bytes;
        if cache == CacheState::Hot && is_alone { LAUNCHES_IN_A_ROW } else { 1 }
    }

    /// The sets in the order in which they are launched.
    fn in_rows(&self, cache: CacheState, set_bytes: u64, sets: &[Vec<Launch>]) -> Vec<Vec<Launch>> {
        let count = self.num_in_a_row(cache, set_bytes);
        sets.iter().flat_map(|set| std::iter::repeat_n(set, count).cloned()).collect()
    }

    /// Sets of an operator that works on activations alone.
    fn num_activation_sets(&self, cache: CacheState, set_bytes: u64) -> u64 {
        let available = self.pool.inputs_left().min(self.pool.scratch_left());
        self.num_rotating(cache, set_bytes, available)
    }

    /// Carves out the operands of a point.
    pub fn prepare(&mut self, point: &Point, cache: CacheState) -> CudaResult<Prepared> {
        self.pool.reset();
        match (point.operator, point.shape) {
            (Operator::Embedding, OperatorShape::Embedding { num_tokens, hidden_size }) => {
                self.embedding(cache, num_tokens, hidden_size)
            }
            (Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens, hidden_size }) => {
                self.rms_norm(cache, num_tokens, hidden_size)
            }
            (Operator::QkNorm, OperatorShape::QkNorm { num_tokens, heads }) => {
                self.qk_norm(cache, num_tokens, heads)
            }
            (Operator::Rope, OperatorShape::Rope { num_tokens, heads }) => {
                self.rope(cache, num_tokens, heads)
            }
            (Operator::KvCacheWrite, OperatorShape::KvCacheWrite { num_tokens, num_kv_heads, head_dim }) => {
                self.kv_cache_write(cache, num_tokens, num_kv_heads * head_dim)
            }
            (Operator::Attention, OperatorShape::Attention { heads, .. }) => {
                let batch = point.batch.as_ref().ok_or_else(|| {
                    CudaError::Unsupported("attention needs the step's sequences, found none".to_owned())
                })?;
                self.attention(cache, batch, heads)
            }
            (Operator::SiluMul, OperatorShape::SiluMul { num_tokens, intermediate_size }) => {
                self.silu_mul(cache, num_tokens, intermediate_size)
            }
            (Operator::Sample, OperatorShape::Sample { num_seqs, vocab_size }) => {
                self.sample(cache, num_seqs, vocab_size)
            }
            (operator, OperatorShape::Gemm { m, n, k }) if operator.is_gemm() => self.gemm(cache, m, n, k),
            (operator, _) => {
                Err(CudaError::Unsupported(format!("one GPU cannot run {operator} at this shape")))
            }
        }
    }

    fn embedding(&mut self, cache: CacheState, num_tokens: u32, hidden_size: u32) -> CudaResult<Prepared> {
        let row_bytes = 2 * u64::from(hidden_size);
        let rows = EMBEDDING_ROWS.min(self.pool.inputs_left() / 2 / row_bytes.max(1)).max(1);
        let table = self.pool.input(rows * row_bytes)?;
        let mut random = Pcg64Mcg::seed_from_u64(SEED);
        let mut sets = Vec::new();
        // Every set gathers rows of its own; the ids and rows of many sets go round before one comes again.
        for _ in 0..self.num_rotating(cache, u64::from(num_tokens) * row_bytes, self.pool.scratch_left()) {
            self.pool.next_place();
            let ids: Vec<u32> = (0..num_tokens).map(|_| random.random_range(0..rows) as u32).collect();
            let ids = self.pool.table(&ids, &self.stream)?;
            let out = self.pool.scratch(u64::from(num_tokens) * row_bytes)?;
            let operands = [ids, table, out];
            sets.push(vec![launch::embedding(&mut self.kernels, operands, num_tokens, hidden_size)?]);
        }
        Ok(Prepared { sets, kernel: "embedding".to_owned() })
    }

    fn rms_norm(&mut self, cache: CacheState, num_tokens: u32, hidden_size: u32) -> CudaResult<Prepared> {
        let bytes = 2 * u64::from(num_tokens) * u64::from(hidden_size);
        let weight = self.pool.input(2 * u64::from(hidden_size))?;
        let mut sets = Vec::new();
        for _ in 0..self.num_activation_sets(cache, 3 * bytes) {
            self.pool.next_place();
            let x = self.pool.input(bytes)?;
            let residual = self.random_scratch(bytes)?;
            let out = self.pool.scratch(bytes)?;
            let operands = [x, residual, weight, out];
            sets.push(vec![launch::rms_norm(
                &mut self.kernels,
                operands,
                num_tokens,
                hidden_size,
                launch::RMS_EPSILON,
            )?]);
        }
        let sets = self.in_rows(cache, 3 * bytes, &sets);
        Ok(Prepared { sets, kernel: "rms_norm".to_owned() })
    }

    fn qk_norm(&mut self, cache: CacheState, num_tokens: u32, heads: Heads) -> CudaResult<Prepared> {
        let bytes = qkv_bytes(num_tokens, heads);
        // With ones the operator may run again and again in place without its values dying out.
        let weight = self.pool.table(&vec![bf16::ONE; heads.head_dim as usize], &self.stream)?;
        let mut sets = Vec::new();
        for _ in 0..self.num_activation_sets(cache, bytes) {
            self.pool.next_place();
            let qkv = self.random_scratch(bytes)?;
            sets.push(vec![launch::qk_norm(
                &mut self.kernels,
                [qkv, weight, weight],
                num_tokens,
                heads,
                launch::RMS_EPSILON,
            )?]);
        }
        let sets = self.in_rows(cache, bytes, &sets);
        Ok(Prepared { sets, kernel: "qk_norm".to_owned() })
    }

    fn rope(&mut self, cache: CacheState, num_tokens: u32, heads: Heads) -> CudaResult<Prepared> {
        let bytes = qkv_bytes(num_tokens, heads);
        let cos_sin = self.rotation_table(heads.head_dim)?;
        let first = Pcg64Mcg::seed_from_u64(SEED).random_range(0..MAX_POSITIONS);
        let positions: Vec<u32> = (0..num_tokens).map(|i| (first + i) % MAX_POSITIONS).collect();
        let positions = self.pool.table(&positions, &self.stream)?;
        let mut sets = Vec::new();
        for _ in 0..self.num_activation_sets(cache, bytes) {
            self.pool.next_place();
            let qkv = self.random_scratch(bytes)?;
            sets.push(vec![launch::rope(&mut self.kernels, [qkv, positions, cos_sin], num_tokens, heads)?]);
        }
        let sets = self.in_rows(cache, bytes, &sets);
        Ok(Prepared { sets, kernel: "rope".to_owned() })
    }

    /// True rotations, as repeated rotation in place must keep the values' size; made once per head size.
    fn rotation_table(&mut self, head_dim: u32) -> CudaResult<u64> {
        if let Some(memory) = self.rotations.get(&head_dim) {
            return Ok(memory.address());
        }
        let table = rotation_table(MAX_POSITIONS, head_dim);
        let memory = DeviceMemory::new(&self.context, size_of_val(table.as_slice()) as u64)?;
        self.stream.upload(memory.address(), &table)?;
        let address = memory.address();
        self.rotations.insert(head_dim, memory);
        Ok(address)
    }

    fn kv_cache_write(&mut self, cache: CacheState, num_tokens: u32, kv_width: u32) -> CudaResult<Prepared> {
        // Twice as many query heads as KV heads; only the distance of the rows depends on it.
        let q_width = 2 * kv_width;
        let qkv = self.pool.input(2 * u64::from(num_tokens) * u64::from(q_width + 2 * kv_width))?;
        let num_blocks = num_tokens.div_ceil(BLOCK_SIZE);
        let mut blocks: Vec<i64> = (0..i64::from(num_blocks)).collect();
        let mut random = Pcg64Mcg::seed_from_u64(SEED);
        for i in (1..blocks.len()).rev() {
            blocks.swap(i, random.random_range(0..=i));
        }
        let slot = |token: u32| {
            blocks[(token / BLOCK_SIZE) as usize] * i64::from(BLOCK_SIZE) + i64::from(token % BLOCK_SIZE)
        };
        let slots = self.pool.table(&(0..num_tokens).map(slot).collect::<Vec<_>>(), &self.stream)?;
        let cache_bytes = 2 * u64::from(num_blocks * BLOCK_SIZE) * u64::from(kv_width);
        let mut sets = Vec::new();
        for _ in 0..self.num_rotating(cache, 2 * cache_bytes, self.pool.scratch_left()) {
            self.pool.next_place();
            let caches = [self.pool.scratch(cache_bytes)?, self.pool.scratch(cache_bytes)?];
            let operands = [qkv, slots, caches[0], caches[1]];
            sets.push(vec![launch::kv_cache_write(
                &mut self.kernels,
                operands,
                num_tokens,
                q_width,
                kv_width,
            )?]);
        }
        Ok(Prepared { sets, kernel: "kv_cache_write".to_owned() })
    }

    fn attention(&mut self, cache: CacheState, batch: &StepBatch, heads: Heads) -> CudaResult<Prepared> {
        let plan = AttentionPlan::new(batch, heads, self.chip, SEED);
        if plan.num_tokens == 0 {
            return Err(CudaError::Unsupported("attention needs at least one token, found none".to_owned()));
        }
        let q_stride = (heads.num_q_heads + 2 * heads.num_kv_heads) * heads.head_dim;
        let q = self.pool.input(2 * u64::from(plan.num_tokens) * u64::from(q_stride))?;
        let out = self.pool.scratch(2 * u64::from(plan.num_tokens) * heads.q_width())?;
        let tables = self.attention_tables(&plan, heads)?;
        let cache_bytes = 2 * u64::from(plan.num_blocks * BLOCK_SIZE) * heads.kv_width();
        let mut sets = Vec::new();
        for _ in 0..self.num_rotating(cache, 2 * cache_bytes, self.pool.inputs_left()) {
            self.pool.next_place();
            let (k_cache, v_cache) = (self.pool.input(cache_bytes)?, self.pool.input(cache_bytes)?);
            let operands = AttentionOperands { q, q_stride, k_cache, v_cache, out, tables };
            sets.push(launch::attention(&mut self.kernels, &plan, heads, &operands)?);
        }
        let prefill = plan.prefill.as_ref().map(|prefill| {
            let name = match prefill.kernel {
                PrefillKernel::Small => "attention_prefill rows=64",
                PrefillKernel::Large => "attention_prefill rows=128",
                PrefillKernel::Hopper => "attention_prefill_sm90",
            };
            format!("{name} tiles={}", prefill.tiles.len())
        });
        let decode =
            plan.decode.as_ref().map(|decode| format!("attention_decode splits={}", decode.items.len()));
        let kernel = prefill.into_iter().chain(decode).collect::<Vec<_>>().join(" + ");
        Ok(Prepared { sets, kernel })
    }

    fn attention_tables(&mut self, plan: &AttentionPlan, heads: Heads) -> CudaResult<AttentionTables> {
        let block_table = self.pool.table(&plan.block_table, &self.stream)?;
        let mut tables = AttentionTables { block_table, ..Default::default() };
        if let Some(prefill) = &plan.prefill {
            tables.prefill_seqs = self.pool.table(&prefill.seqs, &self.stream)?;
            tables.prefill_tiles = self.pool.table(&prefill.tiles, &self.stream)?;
            tables.prefill_joins = self.joins(Workspace::of_prefill(prefill, heads))?;
        }
        if let Some(decode) = &plan.decode {
            tables.decode_seqs = self.pool.table(&decode.seqs, &self.stream)?;
            tables.decode_items = self.pool.table(&decode.items, &self.stream)?;
            tables.decode_joins = self.joins(Workspace::of_decode(decode, heads))?;
        }
        Ok(tables)
    }

    fn joins(&mut self, workspace: Workspace) -> CudaResult<Joins> {
        Ok(Joins {
            partial_out: self.pool.scratch(workspace.out_bytes)?,
            partial_stats: self.pool.scratch(workspace.stats_bytes)?,
            arrived: self.pool.counters(workspace.num_counters, &self.stream)?,
        })
    }

    fn silu_mul(
        &mut self,
        cache: CacheState,
        num_tokens: u32,
        intermediate_size: u32,
    ) -> CudaResult<Prepared> {
        let bytes = 2 * u64::from(num_tokens) * u64::from(intermediate_size);
        let mut sets = Vec::new();
        for _ in 0..self.num_activation_sets(cache, 3 * bytes) {
            self.pool.next_place();
            let operands = [self.pool.input(2 * bytes)?, self.pool.scratch(bytes)?];
            sets.push(vec![launch::silu_mul(&mut self.kernels, operands, num_tokens, intermediate_size)?]);
        }
        let sets = self.in_rows(cache, 3 * bytes, &sets);
        Ok(Prepared { sets, kernel: "silu_mul".to_owned() })
    }

    fn sample(&mut self, cache: CacheState, num_seqs: u32, vocab_size: u32) -> CudaResult<Prepared> {
        let bytes = 2 * u64::from(num_seqs) * u64::from(vocab_size);
        let num_parts = launch::sample_parts(num_seqs, vocab_size, self.chip.num_sms);
        let ids = self.pool.scratch(4 * u64::from(num_seqs))?;
        let partials = self.pool.scratch(8 * u64::from(num_seqs * num_parts))?;
        let arrived = self.pool.counters(u64::from(num_seqs), &self.stream)?;
        let mut sets = Vec::new();
        for _ in 0..self.num_activation_sets(cache, bytes) {
            self.pool.next_place();
            let operands = [self.pool.input(bytes)?, ids, partials, arrived];
            sets.push(vec![launch::sample(&mut self.kernels, operands, num_seqs, vocab_size, num_parts)?]);
        }
        let sets = self.in_rows(cache, bytes, &sets);
        Ok(Prepared { sets, kernel: format!("sample parts={num_parts}") })
    }

    fn gemm(&mut self, cache: CacheState, m: u32, n: u32, k: u32) -> CudaResult<Prepared> {
        let (m64, n64, k64) = (u64::from(m), u64::from(n), u64::from(k));
        let x = self.pool.input(2 * m64 * k64)?;
        let out = self.pool.scratch(2 * m64 * n64)?;
        let weight_bytes = 2 * n64 * k64;
        let count = self.num_rotating(cache, weight_bytes, self.pool.inputs_left());
        let mut weight = || {
            self.pool.next_place();
            self.pool.input(weight_bytes)
        };
        let weights = (0..count).map(|_| weight()).collect::<CudaResult<Vec<_>>>()?;
        let workspace = self.pool.workspace();
        let sets = |plan: &Rc<GemmPlan>, algorithm: usize| -> Vec<Vec<Launch>> {
            let launch = |&weight| {
                let plan = plan.clone();
                vec![Launch::Gemm(Rc::new(GemmLaunch { plan, algorithm, x, weight, out, workspace }))]
            };
            weights.iter().map(launch).collect()
        };
        let (plan, algorithm) = if let Some(known) = self.gemms.get(&(m, n, k)) {
            known.clone()
        } else {
            let plan = Rc::new(GemmPlan::new(&self.library, m, n, k)?);
            let best = timing::fastest(self, plan.num_algorithms(), |algorithm| sets(&plan, algorithm))?;
            self.gemms.insert((m, n, k), (plan.clone(), best));
            (plan, best)
        };
        Ok(Prepared { sets: sets(&plan, algorithm), kernel: plan.describe(algorithm) })
    }
}

fn qkv_bytes(num_tokens: u32, heads: Heads) -> u64 {
    2 * u64::from(num_tokens) * (heads.qk_width() + heads.kv_width())
}

/// The table of angles `position * 10000^(-2 i / head_dim)`.
pub fn rotation_table(num_positions: u32, head_dim: u32) -> Vec<f32> {
    let frequencies: Vec<f64> =
        (0..head_dim / 2).map(|i| 10_000f64.powf(-2.0 * f64::from(i) / f64::from(head_dim))).collect();
    launch::rotation_table(num_positions, &frequencies)
}

//! Numeric checks: each operator on fresh random inputs against the f64 reference.
//!
//! Every buffer is an allocation of its own and exact size, so that a memory checker sees an access past
//! its end; outputs, and everything in a buffer that must not be read, start as NaN.

use std::rc::Rc;

use half::bf16;
use plumbline_schema::{Heads, Operator, OperatorShape, StepBatch};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::{
    attention::{AttentionPlan, BLOCK_SIZE, Chip},
    driver::{CudaError, CudaResult, DeviceMemory, download},
    gemm::{GemmLaunch, GemmPlan},
    launch::{self, AttentionOperands, AttentionTables, Joins, Launch, RMS_EPSILON, Workspace},
    operands::{Gpu, rotation_table},
};
use crate::{
    device::{CheckReport, Point},
    reference,
};

/// A copy must be exact.
const EXACT: f64 = 0.0;
/// One rounding to bf16 makes 1.7e-3 on average; a second one, of the residual, adds a little.
const ROUNDED: f64 = 4e-3;
/// Attention also rounds its softmax weights to bf16.
const ATTENTION: f64 = 6e-3;
const ROPE_POSITIONS: u32 = 4_096;
const EMBEDDING_ROWS: u32 = 1_000;

/// Inputs and outputs of one check.
struct Bench<'a> {
    gpu: &'a mut Gpu,
    random: Pcg64Mcg,
    memory: Vec<DeviceMemory>,
}

impl Bench<'_> {
    /// Uniform numbers in `[-size, size]`.
    fn numbers(&mut self, count: usize, size: f32) -> Vec<bf16> {
        (0..count).map(|_| bf16::from_f32(self.random.random_range(-size..=size))).collect()
    }

    fn place<T: Copy>(&mut self, values: &[T]) -> CudaResult<u64> {
        let memory = DeviceMemory::new(&self.gpu.context, size_of_val(values) as u64)?;
        self.gpu.stream.upload(memory.address(), values)?;
        let address = memory.address();
        self.memory.push(memory);
        Ok(address)
    }

    /// Room for bf16 numbers, all NaN.
    fn poisoned(&mut self, count: usize) -> CudaResult<u64> {
        self.place(&vec![bf16::NAN; count])
    }

    fn run(&mut self, launches: &[Launch]) -> CudaResult<()> {
        launches.iter().try_for_each(|launch| launch.enqueue(&self.gpu.stream))?;
        self.gpu.stream.synchronize()
    }
}

fn read(address: u64, count: usize) -> CudaResult<Vec<f64>> {
    let mut values = vec![bf16::ZERO; count];
    download(&mut values, address)?;
    Ok(wide(&values))
}

/// Whether counters are back at zero, as the next launch needs them.
fn counters_are_zero(address: u64, count: usize) -> CudaResult<bool> {
    let mut values = vec![u32::MAX; count];
    if count > 0 {
        download(&mut values, address)?;
    }
    Ok(values.iter().all(|&value| value == 0))
}

fn wide(values: &[bf16]) -> Vec<f64> {
    values.iter().map(|value| value.to_f64()).collect()
}

fn report(relative_error: f64, tolerance: f64) -> CheckReport {
    CheckReport { relative_error, tolerance }
}

/// Runs the operator once and compares; `seed` draws the inputs.
pub fn check(gpu: &mut Gpu, point: &Point, seed: u64) -> CudaResult<CheckReport> {
    let mut bench = Bench { gpu, random: Pcg64Mcg::seed_from_u64(seed), memory: Vec::new() };
    match (point.operator, point.shape) {
        (Operator::Embedding, OperatorShape::Embedding { num_tokens, hidden_size }) => {
            bench.embedding(num_tokens, hidden_size)
        }
        (Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens, hidden_size }) => {
            bench.rms_norm(num_tokens, hidden_size)
        }
        (Operator::QkNorm, OperatorShape::QkNorm { num_tokens, heads }) => bench.qk_norm(num_tokens, heads),
        (Operator::Rope, OperatorShape::Rope { num_tokens, heads }) => bench.rope(num_tokens, heads),
        (Operator::KvCacheWrite, OperatorShape::KvCacheWrite { num_tokens, num_kv_heads, head_dim }) => {
            bench.kv_cache_write(num_tokens, (num_kv_heads * head_dim) as usize)
        }
        (Operator::Attention, OperatorShape::Attention { heads, .. }) => {
            let batch = point.batch.as_ref().ok_or_else(|| {
                CudaError::Unsupported("attention needs the step's sequences, found none".to_owned())
            })?;
            bench.attention(batch, heads)
        }
        (Operator::SiluMul, OperatorShape::SiluMul { num_tokens, intermediate_size }) => {
            bench.silu_mul(num_tokens, intermediate_size)
        }
        (Operator::Sample, OperatorShape::Sample { num_seqs, vocab_size }) => {
            bench.sample(num_seqs, vocab_size)
        }
        (operator, OperatorShape::Gemm { m, n, k }) if operator.is_gemm() => bench.gemm(m, n, k),
        (operator, _) => Err(CudaError::Unsupported(format!("one GPU cannot run {operator} at this shape"))),
    }
}

impl Bench<'_> {
    fn embedding(&mut self, num_tokens: u32, hidden_size: u32) -> CudaResult<CheckReport> {
        let hidden = hidden_size as usize;
        let table = self.numbers(EMBEDDING_ROWS as usize * hidden, 1.0);
        let ids: Vec<u32> = (0..num_tokens).map(|_| self.random.random_range(0..EMBEDDING_ROWS)).collect();
        let count = ids.len() * hidden;
        let operands = [self.place(&ids)?, self.place(&table)?, self.poisoned(count)?];
        let launch = launch::embedding(&mut self.gpu.kernels, operands, num_tokens, hidden_size)?;
        self.run(&[launch])?;
        let expected = reference::embedding(&ids, &wide(&table), hidden);
        Ok(report(reference::relative_error(&read(operands[2], count)?, &expected), EXACT))
    }

    fn rms_norm(&mut self, num_tokens: u32, hidden_size: u32) -> CudaResult<CheckReport> {
        let count = num_tokens as usize * hidden_size as usize;
        let (x, residual) = (self.numbers(count, 1.0), self.numbers(count, 4.0));
        let weight = self.numbers(hidden_size as usize, 2.0);
        let operands = [self.place(&x)?, self.place(&residual)?, self.place(&weight)?, self.poisoned(count)?];
        let launch =
            launch::rms_norm(&mut self.gpu.kernels, operands, num_tokens, hidden_size, launch::RMS_EPSILON)?;
        self.run(&[launch])?;
        let (out, sum) =
            reference::rms_norm(&wide(&x), &wide(&residual), &wide(&weight), f64::from(RMS_EPSILON));
        let out_error = reference::relative_error(&read(operands[3], count)?, &out);
        let sum_error = reference::relative_error(&read(operands[1], count)?, &sum);
        Ok(report(worst(out_error, sum_error), ROUNDED))
    }

    fn qk_norm(&mut self, num_tokens: u32, heads: Heads) -> CudaResult<CheckReport> {
        let qkv = self.numbers(qkv_len(num_tokens, heads), 3.0);
        let weights = [(); 2].map(|()| self.numbers(heads.head_dim as usize, 2.0));
        let operands = [self.place(&qkv)?, self.place(&weights[0])?, self.place(&weights[1])?];
        let launch =
            launch::qk_norm(&mut self.gpu.kernels, operands, num_tokens, heads, launch::RMS_EPSILON)?;
        self.run(&[launch])?;
        let epsilon = f64::from(RMS_EPSILON);
        let expected =
            reference::qk_norm(&wide(&qkv), &wide(&weights[0]), &wide(&weights[1]), heads, epsilon);
        Ok(report(reference::relative_error(&read(operands[0], qkv.len())?, &expected), ROUNDED))
    }

    fn rope(&mut self, num_tokens: u32, heads: Heads) -> CudaResult<CheckReport> {
        let qkv = self.numbers(qkv_len(num_tokens, heads), 1.0);
        let positions: Vec<u32> =
            (0..num_tokens).map(|_| self.random.random_range(0..ROPE_POSITIONS)).collect();
        let table = rotation_table(ROPE_POSITIONS, heads.head_dim);
        let operands = [self.place(&qkv)?, self.place(&positions)?, self.place(&table)?];
        let launch = launch::rope(&mut self.gpu.kernels, operands, num_tokens, heads)?;
        self.run(&[launch])?;
        let table: Vec<f64> = table.into_iter().map(f64::from).collect();
        let expected = reference::rope(&wide(&qkv), &positions, &table, heads);
        Ok(report(reference::relative_error(&read(operands[0], qkv.len())?, &expected), ROUNDED))
    }

    /// Checks the whole caches: what no slot names must stay as it was.
    fn kv_cache_write(&mut self, num_tokens: u32, kv_width: usize) -> CudaResult<CheckReport> {
        let (tokens, q_width) = (num_tokens as usize, 2 * kv_width);
        let qkv = self.numbers(tokens * (q_width + 2 * kv_width), 1.0);
        let num_slots = (num_tokens.div_ceil(BLOCK_SIZE) * BLOCK_SIZE) as usize + 5 * BLOCK_SIZE as usize;
        let mut caches = [(); 2].map(|()| self.numbers(num_slots * kv_width, 1.0));
        let mut slots: Vec<i64> = (0i64..).take(num_slots).collect();
        for i in (1..slots.len()).rev() {
            slots.swap(i, self.random.random_range(0..=i));
        }
        slots.truncate(tokens);
        // One token is padding and goes nowhere.
        if let Some(slot) = slots.get_mut(1) {
            *slot = -1;
        }
        let operands =
            [self.place(&qkv)?, self.place(&slots)?, self.place(&caches[0])?, self.place(&caches[1])?];
        let kernels = &mut self.gpu.kernels;
        let launch = launch::kv_cache_write(kernels, operands, num_tokens, q_width as u32, kv_width as u32)?;
        self.run(&[launch])?;
        let mut error = 0.0;
        for (part, cache) in caches.iter_mut().enumerate() {
            for (row, &slot) in qkv.chunks(q_width + 2 * kv_width).zip(&slots) {
                if let Ok(slot) = usize::try_from(slot) {
                    let new = &row[q_width + part * kv_width..][..kv_width];
                    cache[slot * kv_width..][..kv_width].copy_from_slice(new);
                }
            }
            let found = read(operands[2 + part], cache.len())?;
            error = worst(error, reference::relative_error(&found, &wide(cache)));
        }
        Ok(report(error, EXACT))
    }

    fn silu_mul(&mut self, num_tokens: u32, intermediate_size: u32) -> CudaResult<CheckReport> {
        let count = num_tokens as usize * intermediate_size as usize;
        let gate_up = self.numbers(2 * count, 6.0);
        let operands = [self.place(&gate_up)?, self.poisoned(count)?];
        let launch = launch::silu_mul(&mut self.gpu.kernels, operands, num_tokens, intermediate_size)?;
        self.run(&[launch])?;
        let expected = reference::silu_mul(&wide(&gate_up), intermediate_size as usize);
        Ok(report(reference::relative_error(&read(operands[1], count)?, &expected), ROUNDED))
    }

    /// The share of wrong indices; bf16 numbers repeat, so rows have ties too.
    fn sample(&mut self, num_seqs: u32, vocab_size: u32) -> CudaResult<CheckReport> {
        let logits = self.numbers(num_seqs as usize * vocab_size as usize, 20.0);
        let num_parts = launch::sample_parts(num_seqs, vocab_size, self.gpu.chip.num_sms);
        let ids = self.place(&vec![u32::MAX; num_seqs as usize])?;
        let partials = self.place(&vec![u64::MAX; (num_seqs * num_parts) as usize])?;
        let arrived = self.place(&vec![0u32; num_seqs as usize])?;
        let operands = [self.place(&logits)?, ids, partials, arrived];
        let launch = launch::sample(&mut self.gpu.kernels, operands, num_seqs, vocab_size, num_parts)?;
        self.run(&[launch.clone(), launch])?;
        let mut found = vec![0u32; num_seqs as usize];
        download(&mut found, ids)?;
        let expected = reference::sample(&wide(&logits), vocab_size as usize);
        let wrong = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
        let is_reusable = counters_are_zero(arrived, num_seqs as usize)?;
        let share = wrong as f64 / f64::from(num_seqs);
        Ok(report(if is_reusable { share } else { f64::INFINITY }, EXACT))
    }

    fn gemm(&mut self, m: u32, n: u32, k: u32) -> CudaResult<CheckReport> {
        let x = self.numbers(m as usize * k as usize, 1.0);
        let weight = self.numbers(n as usize * k as usize, 1.0);
        let count = m as usize * n as usize;
        let (x_address, weight_address) = (self.place(&x)?, self.place(&weight)?);
        let expected = reference::gemm(&wide(&x), &wide(&weight), k as usize);
        let plan = Rc::new(GemmPlan::new(&self.gpu.library, m, n, k)?);
        let workspace = self.gpu.pool.workspace();
        // Any of the algorithms may be the one that is timed.
        let mut error = 0.0;
        for algorithm in 0..plan.num_algorithms() {
            let out = self.poisoned(count)?;
            let launch = GemmLaunch {
                plan: plan.clone(),
                algorithm,
                x: x_address,
                weight: weight_address,
                out,
                workspace,
            };
            self.run(&[Launch::Gemm(Rc::new(launch))])?;
            error = worst(error, reference::relative_error(&read(out, count)?, &expected));
        }
        Ok(report(error, ROUNDED))
    }

    /// Checks the kernels that this GPU uses, and on Hopper those of older GPUs too.
    fn attention(&mut self, batch: &StepBatch, heads: Heads) -> CudaResult<CheckReport> {
        let chip = self.gpu.chip;
        let own = self.attention_on(chip, batch, heads)?;
        if chip.compute_capability != 90 || batch.prefill_chunks.is_empty() {
            return Ok(own);
        }
        let older = self.attention_on(Chip { compute_capability: 80, ..chip }, batch, heads)?;
        Ok(report(worst(own.relative_error, older.relative_error), ATTENTION))
    }

    fn attention_on(&mut self, chip: Chip, batch: &StepBatch, heads: Heads) -> CudaResult<CheckReport> {
        let plan = AttentionPlan::new(batch, heads, chip, self.random.random());
        let (q_width, kv_width) = (heads.q_width() as usize, heads.kv_width() as usize);
        let q_stride = q_width + 2 * kv_width;
        // Queries large enough that the softmax prefers some keys, in rows whose other parts must not be read.
        let mut qkv = vec![bf16::NAN; plan.num_tokens as usize * q_stride];
        for row in qkv.chunks_mut(q_stride) {
            let q = self.numbers(q_width, 8.0);
            row[..q_width].copy_from_slice(&q);
        }
        let lengths: Vec<(u32, u32)> = sequences(batch);
        let mut caches =
            [(); 2].map(|()| vec![bf16::NAN; (plan.num_blocks * BLOCK_SIZE) as usize * kv_width]);
        let mut expected = Vec::with_capacity(plan.num_tokens as usize * q_width);
        let mut token = 0;
        for (&(num_queries, kv_len), row) in
            lengths.iter().zip(plan.block_table.chunks(plan.table_stride as usize))
        {
            let kv: [Vec<bf16>; 2] = [(); 2].map(|()| self.numbers(kv_len as usize * kv_width, 1.0));
            for (cache, values) in caches.iter_mut().zip(&kv) {
                for (position, value) in values.chunks(kv_width).enumerate() {
                    let block = row[position / BLOCK_SIZE as usize] as usize;
                    let slot = block * BLOCK_SIZE as usize + position % BLOCK_SIZE as usize;
                    cache[slot * kv_width..][..kv_width].copy_from_slice(value);
                }
            }
            let queries = &qkv[token * q_stride..][..num_queries as usize * q_stride];
            let q: Vec<f64> = queries.chunks(q_stride).flat_map(|row| wide(&row[..q_width])).collect();
            expected.extend(reference::attention(&q, &wide(&kv[0]), &wide(&kv[1]), heads));
            token += num_queries as usize;
        }
        let tables = self.attention_tables(&plan, heads)?;
        let operands = AttentionOperands {
            q: self.place(&qkv)?,
            q_stride: q_stride as u32,
            k_cache: self.place(&caches[0])?,
            v_cache: self.place(&caches[1])?,
            out: self.poisoned(expected.len())?,
            tables,
        };
        let launches = launch::attention(&mut self.gpu.kernels, &plan, heads, &operands)?;
        self.run(&launches)?;
        self.run(&launches)?;
        let of_prefill = plan.prefill.as_ref().map(|prefill| Workspace::of_prefill(prefill, heads));
        let of_decode = plan.decode.as_ref().map(|decode| Workspace::of_decode(decode, heads));
        for (workspace, joins) in [(of_prefill, tables.prefill_joins), (of_decode, tables.decode_joins)] {
            let num_counters = workspace.unwrap_or_default().num_counters as usize;
            if !counters_are_zero(joins.arrived, num_counters)? {
                return Ok(report(f64::INFINITY, ATTENTION));
            }
        }
        let found = read(operands.out, expected.len())?;
        Ok(report(reference::relative_error(&found, &expected), ATTENTION))
    }

    fn attention_tables(&mut self, plan: &AttentionPlan, heads: Heads) -> CudaResult<AttentionTables> {
        let mut tables =
            AttentionTables { block_table: self.place(&plan.block_table)?, ..Default::default() };
        if let Some(prefill) = &plan.prefill {
            tables.prefill_seqs = self.place(&prefill.seqs)?;
            tables.prefill_tiles = self.place(&prefill.tiles)?;
            tables.prefill_joins = self.joins(Workspace::of_prefill(prefill, heads))?;
        }
        if let Some(decode) = &plan.decode {
            tables.decode_seqs = self.place(&decode.seqs)?;
            tables.decode_items = self.place(&decode.items)?;
            tables.decode_joins = self.joins(Workspace::of_decode(decode, heads))?;
        }
        Ok(tables)
    }

    fn joins(&mut self, workspace: Workspace) -> CudaResult<Joins> {
        Ok(Joins {
            partial_out: self.poisoned(workspace.out_bytes as usize / 2)?,
            partial_stats: self.poisoned(workspace.stats_bytes as usize / 2)?,
            arrived: self.place(&vec![0u32; workspace.num_counters as usize])?,
        })
    }
}

/// Queries and keys of each sequence, in the plan's order.
fn sequences(batch: &StepBatch) -> Vec<(u32, u32)> {
    let chunks = batch.prefill_chunks.iter().filter(|chunk| chunk.num_tokens > 0);
    let prefills = chunks.map(|chunk| (chunk.num_tokens, chunk.context_len + chunk.num_tokens));
    prefills.chain(batch.decode_contexts.iter().map(|context| (1, context + 1))).collect()
}

fn qkv_len(num_tokens: u32, heads: Heads) -> usize {
    num_tokens as usize * (heads.qk_width() + heads.kv_width()) as usize
}

/// The larger error; NaN wins.
fn worst(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

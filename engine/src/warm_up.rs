//! Running an engine in until its step times no longer change.

use std::time::{Duration, Instant};

use plumbline_schema::WarmUp;
use plumbline_simulator::kv_cache::BlockId;

use crate::{
    engine::Engine,
    error::EngineError,
    inputs::{Draw, Part},
};

/// Steps of each kind whose median is compared with that of the ones before.
const DECODES: usize = 30;
const CHUNKS: usize = 6;
/// Medians that differ by less than this have stopped to change.
const STEADY: f64 = 0.02;
/// Rounds in a row that have to be steady, and the longest time that is waited for them.
const STEADY_ROUNDS: u32 = 3;
const MAX_TIME: Duration = Duration::from_secs(20);
/// Sequences of the decodes, their contexts, and tokens of the chunk.
const NUM_SEQS: usize = 8;
const CONTEXT: u32 = 256;
const CHUNK: u32 = 512;

impl Engine {
    /// Runs decodes and prefill chunks until neither's times change any more, three rounds in a row.
    ///
    /// What is left in the KV cache belongs to nobody.
    ///
    /// # Errors
    /// When a step fails.
    pub fn warm_up(&mut self) -> Result<WarmUp, EngineError> {
        let began = Instant::now();
        let limits = self.deployment();
        let num_blocks = limits.num_gpu_blocks;
        let num_seqs = NUM_SEQS.min(limits.max_num_seqs as usize);
        // All read the same blocks; few engines have less than that.
        let most = (num_blocks - 1) * limits.block_size;
        let context = CONTEXT.min(limits.max_model_len - 1).min(most - 1);
        let chunk = CHUNK.min(limits.max_num_batched_tokens).min(limits.max_model_len).min(most);
        let blocks: Vec<BlockId> =
            (1..num_blocks.min(1 + limits.max_model_len.div_ceil(16))).map(BlockId).collect();
        let tokens = vec![1; chunk as usize];
        let decode = Part {
            tokens: &tokens[..1],
            context_len: context,
            blocks: &blocks[..=context as usize / 16],
            is_decode: true,
            draw: Some(Draw::GREEDY),
        };
        let decodes = vec![decode; num_seqs];
        let chunks = [Part {
            tokens: &tokens,
            context_len: 0,
            blocks: &blocks[..chunk.div_ceil(16) as usize],
            is_decode: false,
            draw: Some(Draw::GREEDY),
        }];
        let mut warm_up = WarmUp { last_change: f64::INFINITY, ..WarmUp::default() };
        let (mut last, mut steady_rounds) = ([f64::NAN; 2], 0);
        while began.elapsed() < MAX_TIME && steady_rounds < STEADY_ROUNDS {
            let medians = [self.median(&decodes, DECODES)?, self.median(&chunks, CHUNKS)?];
            warm_up.steps += (DECODES + CHUNKS) as u64;
            let changes = medians.iter().zip(last).map(|(now, last)| (now / last - 1.0).abs());
            let change = changes.fold(0.0, |most: f64, change| if change <= most { most } else { change });
            last = medians;
            steady_rounds = if change < STEADY { steady_rounds + 1 } else { 0 };
            warm_up.last_change = change;
        }
        warm_up.is_steady = steady_rounds >= STEADY_ROUNDS;
        warm_up.duration_ns = began.elapsed().as_nanos() as u64;
        Ok(warm_up)
    }

    fn median(&mut self, parts: &[Part<'_>], count: usize) -> Result<f64, EngineError> {
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let began = Instant::now();
            let step = self.launch(parts)?;
            self.wait(&step)?.for_each(drop);
            times.push(began.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        Ok(times[count / 2])
    }
}

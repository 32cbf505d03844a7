//! A text's completion, so that a user sees that the engine is real.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use plumbline_schema::{InputError, Location};
use plumbline_simulator::kv_cache::BlockId;
use tokenizers::Tokenizer;

use crate::{engine::Engine, error::EngineError, executor::Sampling, inputs::Part};

/// Reads the `tokenizer.json` of a model's folder.
///
/// # Errors
/// When it is missing or no tokenizer.
pub fn read_tokenizer(folder: &Path) -> Result<Tokenizer, EngineError> {
    let path = folder.join("tokenizer.json");
    Tokenizer::from_file(&path).map_err(|error| {
        InputError::invalid(path, Location::File, "a tokenizer.json", error.to_string()).into()
    })
}

/// A prompt's tokens, with those that the model puts around a text.
///
/// # Errors
/// When the text cannot be split, or is empty.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, EngineError> {
    let refuse =
        |expected: &str, found: String| EngineError::Unsupported { expected: expected.into(), found };
    let encoding =
        tokenizer.encode(text, true).map_err(|error| refuse("a text with tokens", error.to_string()))?;
    match encoding.get_ids() {
        [] => Err(refuse("a prompt of at least one token", "none".to_owned())),
        ids => Ok(ids.to_vec()),
    }
}

/// A completion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Its tokens, the one that ended it included.
    pub tokens: Vec<u32>,
    /// From the start to its first token.
    pub first_token: Duration,
    /// From its first token to its last.
    pub rest: Duration,
    /// Whether the model ended it.
    pub has_ended: bool,
}

impl Engine {
    /// Completes a prompt of at least one token by at most `max_tokens`, at least 1; `told` hears of every token at once.
    ///
    /// # Errors
    /// When the tokens do not fit the deployment, a step fails, or `stop` is set.
    pub fn complete(
        &mut self,
        prompt: &[u32],
        max_tokens: usize,
        sampling: Sampling,
        stop: &AtomicBool,
        mut told: impl FnMut(u32),
    ) -> Result<Completion, EngineError> {
        let limits = self.deployment();
        let most = limits.max_model_len.min((limits.num_gpu_blocks - 1) * limits.block_size) as usize;
        if prompt.is_empty() || max_tokens == 0 || prompt.len() + max_tokens > most {
            return Err(EngineError::Unsupported {
                expected: format!("a prompt and an output, of {most} tokens together at most"),
                found: format!("{} and {max_tokens}", prompt.len()),
            });
        }
        let chunk = limits.max_num_batched_tokens as usize;
        let blocks: Vec<BlockId> =
            (1..=(prompt.len() + max_tokens).div_ceil(16) as u32).map(BlockId).collect();
        let mut tokens = prompt.to_vec();
        let mut computed = 0;
        let began = Instant::now();
        let mut completion = Completion {
            tokens: Vec::new(),
            first_token: Duration::ZERO,
            rest: Duration::ZERO,
            has_ended: false,
        };
        while completion.tokens.len() < max_tokens && !completion.has_ended {
            if stop.load(Ordering::Relaxed) {
                return Err(EngineError::Interrupted);
            }
            let end = tokens.len().min(computed + chunk);
            let is_last = end == tokens.len();
            let part = Part {
                tokens: &tokens[computed..end],
                context_len: computed as u32,
                blocks: &blocks[..end.div_ceil(16)],
                is_decode: !completion.tokens.is_empty(),
                draw: is_last.then(|| sampling.draw(0, completion.tokens.len())),
            };
            let step = self.launch(&[part])?;
            let token = self.wait(&step)?.next();
            computed = end;
            let Some(token) = token else { continue };
            if completion.tokens.is_empty() {
                completion.first_token = began.elapsed();
            }
            completion.rest = began.elapsed().saturating_sub(completion.first_token);
            completion.has_ended = self.numerics().eos_token_ids.contains(&token);
            completion.tokens.push(token);
            tokens.push(token);
            told(token);
        }
        Ok(completion)
    }
}

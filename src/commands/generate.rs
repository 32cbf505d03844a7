//! `plumb generate`: a text's completion, so that a user sees that the engine is real.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use plumbline_engine::generate::{encode, read_tokenizer};
use serde::Serialize;

use super::real::{NativeArgs, SamplingArgs, stop_flag};
use crate::{exit::Exit, failure::Failure, output::Output};

/// Complete a prompt with the native engine, which shows that its model is real
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: NativeArgs,

    /// Text to complete
    #[arg(long)]
    prompt: String,

    /// Most tokens of the completion
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_tokens: u32,

    /// Folder with tokenizer.json, where the model's has none
    #[arg(long, value_name = "FOLDER")]
    tokenizer: Option<PathBuf>,

    #[command(flatten)]
    sampling: SamplingArgs,
}

#[derive(Serialize)]
struct Report<'a> {
    prompt: &'a str,
    completion: String,
    prompt_token_ids: Vec<u32>,
    completion_token_ids: Vec<u32>,
    has_ended: bool,
    first_token_ms: f64,
    tokens_per_s: Option<f64>,
}

/// Runs the verb.
///
/// # Errors
/// When an input cannot be used, or the engine does not start.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let sampling = args.sampling.sampling()?;
    let folder = args.tokenizer.as_deref().unwrap_or(Path::new(&args.engine.model));
    let tokenizer = read_tokenizer(folder)?;
    let prompt = encode(&tokenizer, &args.prompt)?;
    let stop = stop_flag()?;
    let mut engine = args.engine.start(args.sampling.seed, output)?;
    // A text appears word by word; a document at once.
    let shows = !output.json;
    let mut stream = tokenizer.decode_stream(true);
    let mut completion = String::new();
    let shown = |text: &str| {
        if shows {
            let mut stdout = io::stdout().lock();
            let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
        }
    };
    shown(&args.prompt);
    let max_tokens = args.max_tokens as usize;
    let result = engine.complete(&prompt, max_tokens, sampling, &stop, |token| {
        if let Ok(Some(text)) = stream.step(token) {
            shown(&text);
            completion.push_str(&text);
        }
    });
    shown("\n");
    let done = result?;
    let rest = done.rest.as_secs_f64();
    let tokens_per_s = (done.tokens.len() > 1).then(|| (done.tokens.len() - 1) as f64 / rest);
    let first_token_ms = 1e3 * done.first_token.as_secs_f64();
    if output.json {
        let report = Report {
            prompt: &args.prompt,
            completion,
            prompt_token_ids: prompt,
            completion_token_ids: done.tokens,
            has_ended: done.has_ended,
            first_token_ms,
            tokens_per_s,
        };
        output.print(&report, String::new)?;
    } else {
        let rate = tokens_per_s.map_or_else(String::new, |rate| format!(", then {rate:.1} tokens/s"));
        output.note(format!("{} tokens, the first after {first_token_ms:.2} ms{rate}", done.tokens.len()));
    }
    Ok(Exit::Fine)
}

//! Predicted times as Vidur's tables: `compute/GPU/MODEL/mlp.csv` and `attention.csv`.
//!
//! Columns, grid and unit (ms) are Vidur's own, so that its simulator runs on this bundle's predictions. What each column
//! is made of, and what Vidur has no column for, is in `docs/importing.md`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use plumbline_schema::{
    Heads, InputError, Location, ModelSpec, Operator, OperatorShape, PrefillChunk, StepBatch,
    files::write_atomically,
    forward::{ParallelismError, heads_per_gpu},
};
use serde::Serialize;

use crate::{
    import::{NS_PER_MS, mlp::SOURCES, short_gpu_name, tables::time_column},
    predictor::{OutOfDomain, PredictError, Prediction, Predictors, Provenance},
};

/// Tokens of a KV block that the tables state; Vidur looks rows up by it.
const BLOCK_SIZE: u32 = 16;

/// What the tables state as the kernels' origin, where Vidur's name a backend.
const ATTENTION_BACKEND: &str = "plumbline";

/// The statistics of each time, in the order of Vidur's columns.
const STATISTICS: [&str; 5] = ["min", "max", "mean", "median", "std"];

/// Standard deviations of a normal distribution between its mean and the ends of the middle 90 %, as intervals are.
const Z_INTERVAL: f64 = 1.645;

/// Share of a layer's two norms with residuals that goes to each norm, and to the one `add` that Vidur counts.
///
/// Two of ours are `input_layernorm + post_attention_layernorm + add`. A norm reads and writes a row, an add reads two and
/// writes one, so that traffic is as 2 : 2 : 3.
const NORM_SHARE: f64 = 2.0 / 7.0;
const ADD_SHARE: f64 = 3.0 / 7.0;

/// How to export.
#[derive(Clone, Debug, PartialEq)]
pub struct VidurOptions {
    /// Tensor-parallel sizes, each with rows of its own.
    pub tensor_parallel_sizes: Vec<u32>,
    /// Most tokens of a batch, and the longest sequence.
    pub max_tokens: u32,
    /// Most decodes of a batch.
    pub max_batch_size: u32,
    /// What to do about shapes outside what was measured.
    pub out_of_domain: OutOfDomain,
}

impl Default for VidurOptions {
    fn default() -> Self {
        Self {
            tensor_parallel_sizes: vec![1],
            max_tokens: 4096,
            max_batch_size: 128,
            out_of_domain: OutOfDomain::Refuse,
        }
    }
}

/// Why nothing can be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// A shape that cannot be predicted.
    #[error(transparent)]
    Predict(#[from] PredictError),
    /// A tensor-parallel size that does not divide the model.
    #[error(transparent)]
    Parallelism(#[from] ParallelismError),
    /// A file that cannot be written, or stands there already.
    #[error(transparent)]
    Input(#[from] InputError),
    /// Neither table can be made.
    #[error("no table can be made: {reason}")]
    Nothing {
        /// What is missing.
        reason: String,
    },
}

/// The tables, in memory.
#[derive(Clone, Debug)]
pub struct Exported {
    /// The folder below the one asked for: `compute/a100/MODEL`.
    pub folder: PathBuf,
    /// Name and content of each table.
    pub files: Vec<(&'static str, Vec<u8>)>,
    /// What was made and what was not.
    pub report: ExportReport,
}

/// What an export made.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ExportReport {
    /// GPU whose times were predicted.
    pub gpu: String,
    /// The model.
    pub model: String,
    /// Rows of each table made, by its name.
    pub num_rows: BTreeMap<&'static str, usize>,
    /// Predictions behind them, by provenance.
    pub num_predictions: BTreeMap<Provenance, usize>,
    /// What Vidur cannot hold or the bundle cannot tell, in words.
    pub notes: Vec<String>,
}

/// A predicted time with its interval, ns.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Time {
    ns: f64,
    low_ns: f64,
    high_ns: f64,
}

impl Time {
    fn scaled(self, factor: f64) -> Self {
        Self { ns: self.ns * factor, low_ns: self.low_ns * factor, high_ns: self.high_ns * factor }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            ns: self.ns + other.ns,
            low_ns: self.low_ns + other.low_ns,
            high_ns: self.high_ns + other.high_ns,
        }
    }

    /// The five cells in ms: minimum and maximum are the ends of the interval, mean and median the prediction.
    fn cells(self) -> [String; 5] {
        let std_ns = (self.high_ns - self.low_ns) / (2.0 * Z_INTERVAL);
        [self.low_ns, self.high_ns, self.ns, self.ns, std_ns].map(|ns| (ns / NS_PER_MS).to_string())
    }
}

/// Predicts, and counts by provenance.
struct Asker<'a> {
    predictors: &'a Predictors,
    out_of_domain: OutOfDomain,
    counts: BTreeMap<Provenance, usize>,
}

impl Asker<'_> {
    fn ask(&mut self, operator: Operator, shape: OperatorShape) -> Result<Time, PredictError> {
        let prediction = self.predictors.predict(operator, &shape, self.out_of_domain)?;
        let Prediction { time_ns, low_ns, high_ns, provenance } = prediction;
        *self.counts.entry(provenance).or_default() += 1;
        Ok(Time { ns: time_ns, low_ns: low_ns.min(time_ns), high_ns: high_ns.max(time_ns) })
    }
}

/// Makes the tables of a model from a bundle's predictors.
///
/// A table of which the bundle lacks an operator is left out, and the report says so.
///
/// # Errors
/// When a size does not divide the model, a shape lies outside what was measured and extrapolating was not asked for, or
/// neither table can be made.
pub fn export(
    predictors: &Predictors,
    model: &ModelSpec,
    options: &VidurOptions,
) -> Result<Exported, ExportError> {
    let gpu = predictors.gpu().name.clone();
    let mut report = ExportReport { gpu: gpu.clone(), model: model.name.clone(), ..ExportReport::default() };
    let mut asker = Asker { predictors, out_of_domain: options.out_of_domain, counts: BTreeMap::new() };
    let mut files = Vec::new();
    let mut missing = Vec::new();
    for table in [TableKind::Mlp, TableKind::Attention] {
        let lacks: Vec<_> = table
            .operators(model)
            .into_iter()
            .filter(|&operator| predictors.get(operator).is_none())
            .collect();
        if lacks.is_empty() {
            let rows = table.rows(&mut asker, model, options)?;
            report.num_rows.insert(table.name(), rows.len());
            files.push((table.name(), to_csv(&table.columns(), &rows)));
        } else {
            let names: Vec<_> = lacks.into_iter().map(Operator::name).collect();
            missing.push(format!("{}: no predictor of {}", table.name(), names.join(", ")));
        }
    }
    if files.is_empty() {
        return Err(ExportError::Nothing { reason: missing.join("; ") });
    }
    report.num_predictions = asker.counts;
    report.notes = missing.into_iter().map(|what| format!("not made, {what}")).chain(notes(model)).collect();
    let folder = Path::new("compute").join(short_gpu_name(&gpu)).join(&model.name);
    Ok(Exported { folder, files, report })
}

impl Exported {
    /// Writes the tables below `dir` and returns their paths; each is written in one step.
    ///
    /// # Errors
    /// When one stands there already (then nothing is written), or any I/O error.
    pub fn write(&self, dir: &Path) -> Result<Vec<PathBuf>, ExportError> {
        let folder = dir.join(&self.folder);
        let paths: Vec<_> = self.files.iter().map(|(name, _)| folder.join(name)).collect();
        if let Some(path) = paths.iter().find(|path| path.exists()) {
            let expected = "a path where nothing exists yet";
            return Err(InputError::invalid(path, Location::File, expected, "a file or folder").into());
        }
        for (path, (_, bytes)) in paths.iter().zip(&self.files) {
            write_atomically(path, |out| out.write_all(bytes))?;
        }
        Ok(paths)
    }
}

/// What Vidur cannot hold.
fn notes(model: &ModelSpec) -> Vec<String> {
    let mut notes = vec![
        "lm_head and sample: Vidur has no column for them and leaves their time out".to_owned(),
        "Vidur adds every column up once a layer, with one add where a layer has two residuals".to_owned(),
    ];
    if model.qk_norm {
        notes.push("qk_norm is part of attn_rope, as Vidur has no column for it".to_owned());
    }
    if model.num_q_heads * model.head_dim != model.hidden_size {
        notes.push(format!(
            "head_dim is {}, where Vidur takes n_embd / n_head = {}: its KV cache is of another size",
            model.head_dim,
            model.hidden_size / model.num_q_heads
        ));
    }
    notes
}

/// One of the two tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TableKind {
    Mlp,
    Attention,
}

impl TableKind {
    fn name(self) -> &'static str {
        match self {
            Self::Mlp => "mlp.csv",
            Self::Attention => "attention.csv",
        }
    }

    /// The operators that the table is made of.
    fn operators(self, model: &ModelSpec) -> Vec<Operator> {
        match self {
            Self::Mlp => {
                let mut operators = vec![
                    Operator::Embedding,
                    Operator::RmsNorm,
                    Operator::QkvProj,
                    Operator::Rope,
                    Operator::OProj,
                    Operator::GateUpProj,
                    Operator::SiluMul,
                    Operator::DownProj,
                ];
                operators.extend(model.qk_norm.then_some(Operator::QkNorm));
                operators
            }
            Self::Attention => vec![Operator::KvCacheWrite, Operator::Attention],
        }
    }

    fn columns(self) -> Vec<String> {
        let (sources, keys): (&[&str], &[&str]) = match self {
            Self::Mlp => (&SOURCES, &MLP_KEYS),
            Self::Attention => (&ATTENTION_SOURCES, &ATTENTION_KEYS),
        };
        let times =
            sources.iter().flat_map(|source| STATISTICS.map(|statistic| time_column(source, statistic)));
        times.chain(keys.iter().map(|&key| key.to_owned())).collect()
    }

    fn rows(
        self,
        asker: &mut Asker,
        model: &ModelSpec,
        options: &VidurOptions,
    ) -> Result<Vec<Vec<String>>, ExportError> {
        let mut rows = Vec::new();
        for &tp in &options.tensor_parallel_sizes {
            let part = Part { model, heads: heads_per_gpu(model, tp)?, tensor_parallel_size: tp };
            match self {
                Self::Mlp => {
                    for num_tokens in token_grid(options.max_tokens) {
                        rows.push(part.mlp_row(asker, num_tokens)?);
                    }
                }
                Self::Attention => {
                    for batch in attention_grid(options.max_tokens, options.max_batch_size) {
                        rows.push(part.attention_row(asker, batch, options.max_tokens)?);
                    }
                }
            }
        }
        Ok(rows)
    }
}

const MLP_KEYS: [&str; 8] = [
    "n_head",
    "n_kv_head",
    "n_embd",
    "n_expanded_embd",
    "vocab_size",
    "use_gated_mlp",
    "num_tokens",
    "num_tensor_parallel_workers",
];

const ATTENTION_SOURCES: [&str; 5] =
    ["attn_input_reshape", "attn_kv_cache_save", "attn_prefill", "attn_decode", "attn_output_reshape"];

const ATTENTION_KEYS: [&str; 11] = [
    "n_embd",
    "n_q_head",
    "n_kv_head",
    "block_size",
    "num_tensor_parallel_workers",
    "max_model_len",
    "batch_size",
    "prefill_chunk_size",
    "kv_cache_size",
    "is_prefill",
    "attention_backend",
];

/// One GPU's part of a model.
struct Part<'a> {
    model: &'a ModelSpec,
    heads: Heads,
    tensor_parallel_size: u32,
}

impl Part<'_> {
    /// Times in the order of [`SOURCES`], then the keys.
    fn mlp_row(&self, asker: &mut Asker, num_tokens: u32) -> Result<Vec<String>, PredictError> {
        let ModelSpec { hidden_size, num_q_heads, num_kv_heads, vocab_size, .. } = *self.model;
        let heads = self.heads;
        let intermediate_size = self.model.intermediate_size / self.tensor_parallel_size;
        let q_width = heads.num_q_heads * heads.head_dim;
        let qkv_width = q_width + 2 * heads.num_kv_heads * heads.head_dim;
        let mut gemm = |operator, n, k| asker.ask(operator, OperatorShape::Gemm { m: num_tokens, n, k });
        let qkv = gemm(Operator::QkvProj, qkv_width, hidden_size)?;
        let o = gemm(Operator::OProj, hidden_size, q_width)?;
        let gate_up = gemm(Operator::GateUpProj, 2 * intermediate_size, hidden_size)?;
        let down = gemm(Operator::DownProj, hidden_size, intermediate_size)?;
        let embedding =
            asker.ask(Operator::Embedding, OperatorShape::Embedding { num_tokens, hidden_size })?;
        let norms =
            asker.ask(Operator::RmsNorm, OperatorShape::RmsNorm { num_tokens, hidden_size })?.scaled(2.0);
        let mut rope = asker.ask(Operator::Rope, OperatorShape::Rope { num_tokens, heads })?;
        if self.model.qk_norm {
            rope = rope.plus(asker.ask(Operator::QkNorm, OperatorShape::QkNorm { num_tokens, heads })?);
        }
        let act = asker.ask(Operator::SiluMul, OperatorShape::SiluMul { num_tokens, intermediate_size })?;
        let (norm, add) = (norms.scaled(NORM_SHARE), norms.scaled(ADD_SHARE));
        let times = [embedding, norm, qkv, rope, o, norm, gate_up, act, down, add];
        let mut row: Vec<String> = times.into_iter().flat_map(Time::cells).collect();
        let keys = [num_q_heads, num_kv_heads, hidden_size, self.model.intermediate_size, vocab_size];
        row.extend(keys.map(|key| key.to_string()));
        row.extend(["True".to_owned(), num_tokens.to_string(), self.tensor_parallel_size.to_string()]);
        Ok(row)
    }

    /// Times in the order of [`ATTENTION_SOURCES`], then the keys.
    fn attention_row(
        &self,
        asker: &mut Asker,
        batch: AttentionBatch,
        max_model_len: u32,
    ) -> Result<Vec<String>, PredictError> {
        let heads = self.heads;
        let shape = batch.step().shape();
        let Heads { num_kv_heads, head_dim, .. } = heads;
        let num_tokens = shape.num_tokens;
        let write = OperatorShape::KvCacheWrite { num_tokens, num_kv_heads, head_dim };
        let write = asker.ask(Operator::KvCacheWrite, write)?;
        let attention = OperatorShape::Attention { heads, load: shape.attention };
        let attention = asker.ask(Operator::Attention, attention)?;
        // Our kernels need no reshapes, and of prefill and decode only one runs: 0, as Vidur's own tables say it.
        let none = Time::default();
        let is_prefill = batch.chunk > 0;
        let (prefill, decode) = if is_prefill { (attention, none) } else { (none, attention) };
        let mut row: Vec<String> =
            [none, write, prefill, decode, none].into_iter().flat_map(Time::cells).collect();
        let ModelSpec { hidden_size, num_q_heads, num_kv_heads, .. } = *self.model;
        let AttentionBatch { batch_size, chunk, context_len } = batch;
        let keys = [
            hidden_size,
            num_q_heads,
            num_kv_heads,
            BLOCK_SIZE,
            self.tensor_parallel_size,
            max_model_len,
            batch_size,
            chunk,
            context_len,
        ];
        row.extend(keys.map(|key| key.to_string()));
        row.extend([if is_prefill { "True" } else { "False" }.to_owned(), ATTENTION_BACKEND.to_owned()]);
        Ok(row)
    }
}

/// A row of `attention.csv`: one chunk, or decodes of equal contexts (`chunk` 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct AttentionBatch {
    batch_size: u32,
    chunk: u32,
    context_len: u32,
}

impl AttentionBatch {
    fn step(self) -> StepBatch {
        let Self { batch_size, chunk, context_len } = self;
        let num = batch_size as usize;
        if chunk > 0 {
            let prefill_chunks = vec![PrefillChunk { num_tokens: chunk, context_len }; num];
            StepBatch { prefill_chunks, decode_contexts: Vec::new() }
        } else {
            StepBatch { prefill_chunks: Vec::new(), decode_contexts: vec![context_len; num] }
        }
    }
}

/// Numbers from `first` on, each range `(step, last)` in turn, up to `max`.
fn steps(first: u32, ranges: &[(u32, u32)], max: u32) -> Vec<u32> {
    let mut numbers = vec![first];
    for &(step, last) in ranges {
        while let Some(&number) = numbers.last().filter(|&&number| number < last) {
            numbers.push(number + step);
        }
    }
    numbers.retain(|&number| number <= max);
    numbers
}

/// The token counts that Vidur profiles, up to `max`: 1, 2, 4, then 8 apart to 1024, and twice as far apart with each
/// doubling.
#[must_use]
pub fn token_grid(max: u32) -> Vec<u32> {
    let doubling: Vec<_> = (0..8).map(|i| (8 << i, 1024 << i)).collect();
    let mut tokens = vec![1, 2, 4];
    tokens.retain(|&n| n <= max);
    tokens.extend(steps(8, &doubling, max));
    tokens
}

/// The batches that Vidur profiles for sequences of up to `max_len` tokens and `max_batch_size` decodes.
///
/// Chunks from 64, each after every number of whole chunks; decodes of contexts from 32.
fn attention_grid(max_len: u32, max_batch_size: u32) -> Vec<AttentionBatch> {
    let chunks = steps(64, &[(16, 128), (32, 1024), (64, 4096), (128, 16_384), (256, 65_536)], max_len);
    let contexts = steps(32, &[(32, 1024), (64, 4096), (256, 65_536)], max_len.saturating_sub(1));
    let batch_sizes = steps(1, &[(1, 128), (8, 1024)], max_batch_size);
    let prefills = chunks.into_iter().flat_map(|chunk| {
        (0..max_len / chunk).map(move |i| AttentionBatch { batch_size: 1, chunk, context_len: i * chunk })
    });
    let decodes = contexts.into_iter().flat_map(|context_len| {
        batch_sizes.iter().map(move |&batch_size| AttentionBatch { batch_size, chunk: 0, context_len })
    });
    prefills.chain(decodes).collect()
}

fn to_csv(columns: &[String], rows: &[Vec<String>]) -> Vec<u8> {
    // Numbers and names without commas or quotes.
    let mut text = columns.join(",");
    text.push('\n');
    for row in rows {
        text.push_str(&row.join(","));
        text.push('\n');
    }
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_is_vidurs() {
        let grid = token_grid(4096);
        // 3 + 128 up to 1024, 64 more to 2048, 64 more to 4096.
        assert_eq!(grid.len(), 3 + 128 + 64 + 64);
        assert_eq!(grid[..6], [1, 2, 4, 8, 16, 24]);
        assert_eq!(grid[grid.len() - 3..], [4032, 4064, 4096]);
        assert_eq!(token_grid(3), [1, 2]);
        assert_eq!(token_grid(u32::MAX).last(), Some(&131_072));
        let batches = attention_grid(4096, 128);
        let decodes: Vec<_> = batches.iter().filter(|b| b.chunk == 0).collect();
        // 32 contexts to 1024 and 47 more to 4032.
        assert_eq!(decodes.len(), (32 + 47) * 128);
        assert!(batches.iter().all(|b| b.chunk + b.context_len <= 4096));
        assert!(batches.contains(&AttentionBatch { batch_size: 1, chunk: 64, context_len: 4032 }));
        assert!(batches.contains(&AttentionBatch { batch_size: 1, chunk: 4096, context_len: 0 }));
    }

    #[test]
    fn norms_and_add_share_two_of_ours() {
        let norms = Time { ns: 14.0, low_ns: 7.0, high_ns: 21.0 };
        let (norm, add) = (norms.scaled(NORM_SHARE), norms.scaled(ADD_SHARE));
        assert_eq!((norm.ns, add.ns), (4.0, 6.0));
        let sum = norm.plus(norm).plus(add);
        assert!((sum.high_ns - norms.high_ns).abs() < 1e-12);
        assert_eq!(Time { ns: 2e6, low_ns: 1e6, high_ns: 4.29e6 }.cells()[..4], ["1", "4.29", "2", "2"]);
    }
}

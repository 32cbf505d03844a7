//! Dense decoder-only models, read from a Hugging Face `config.json`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    error::{InputError, Location},
    files::read_text,
    units::Bytes,
};

/// Bytes of one bf16 element, the only dtype of this version.
pub const BF16_BYTES: u64 = 2;

/// The shape of a dense decoder-only transformer of the Llama and Qwen3 families.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// Plumbline's name: the shipped name or the folder or file name of the config.
    pub name: String,
    /// `hidden_size`.
    pub hidden_size: u32,
    /// `num_hidden_layers`.
    pub num_layers: u32,
    /// `num_attention_heads`.
    pub num_q_heads: u32,
    /// `num_key_value_heads`; divides `num_q_heads`.
    pub num_kv_heads: u32,
    /// `head_dim`, or `hidden_size / num_attention_heads` where the config has none.
    pub head_dim: u32,
    /// `intermediate_size` of the gated MLP.
    pub intermediate_size: u32,
    /// `vocab_size`.
    pub vocab_size: u32,
    /// `max_position_embeddings`: longest sequence in tokens.
    pub max_positions: u32,
    /// Whether the LM head shares the embedding's weights.
    pub tied_embeddings: bool,
    /// Whether queries and keys are RMS-normalised per head (Qwen3).
    pub qk_norm: bool,
}

/// The keys of `config.json` that matter here; others are ignored, as every loader does.
#[derive(Deserialize)]
struct HfConfig {
    model_type: Option<String>,
    hidden_size: Option<u64>,
    num_hidden_layers: Option<u64>,
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    intermediate_size: Option<u64>,
    vocab_size: Option<u64>,
    max_position_embeddings: Option<u64>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    hidden_act: Option<String>,
    use_sliding_window: Option<bool>,
}

/// Names and texts of the shipped configs.
const SHIPPED: [(&str, &str); 2] = [
    ("qwen3-0.6b", include_str!("../models/qwen3-0.6b.json")),
    ("llama3-8b", include_str!("../models/llama3-8b.json")),
];

/// A model's `config.json`, wherever it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelConfig {
    /// Plumbline's name of the model.
    pub name: String,
    /// The document.
    pub text: String,
    /// What errors call it: the file, or the shipped name.
    pub path: PathBuf,
}

impl ModelConfig {
    /// That of a shipped model by name, or a `config.json` (or the folder that holds one) by path.
    ///
    /// # Errors
    /// When there is neither, or the file cannot be read.
    pub fn find(name_or_path: &str) -> Result<Self, InputError> {
        if let Some((name, text)) = SHIPPED.iter().find(|(name, _)| *name == name_or_path) {
            return Ok(Self {
                name: (*name).to_owned(),
                text: (*text).to_owned(),
                path: PathBuf::from(name),
            });
        }
        let mut path = Path::new(name_or_path).to_path_buf();
        if path.is_dir() {
            path.push("config.json");
        }
        if !path.exists() {
            return Err(InputError::invalid(
                path,
                Location::File,
                format!(
                    "a shipped model ({}) or a Hugging Face config.json",
                    ModelSpec::shipped_names().join(", ")
                ),
                "neither",
            ));
        }
        let stem = if path.file_name().is_some_and(|n| n == "config.json") { path.parent() } else { None };
        let name = stem
            .and_then(Path::file_name)
            .or_else(|| path.file_stem())
            .map_or_else(|| "model".to_owned(), |n| n.to_string_lossy().into_owned());
        Ok(Self { name, text: read_text(&path)?, path })
    }
}

/// No dimension of a real model is larger; it also keeps every product below 2^63.
const MAX_DIMENSION: u64 = 1 << 22;

impl ModelSpec {
    /// Names of the shipped models.
    #[must_use]
    pub fn shipped_names() -> Vec<&'static str> {
        SHIPPED.iter().map(|(name, _)| *name).collect()
    }

    /// A shipped model by name, or a `config.json` (or the folder that holds one) by path.
    ///
    /// # Errors
    /// Names the file, the key, what was expected and what was found.
    pub fn load(name_or_path: &str) -> Result<Self, InputError> {
        let ModelConfig { name, text, path } = ModelConfig::find(name_or_path)?;
        Self::from_hf_config(&name, &text, &path)
    }

    /// Parses the text of a `config.json`; `path` is what errors name.
    ///
    /// # Errors
    /// Names the key, what was expected and what was found.
    pub fn from_hf_config(name: &str, text: &str, path: &Path) -> Result<Self, InputError> {
        let config: HfConfig = serde_json::from_str(text)
            .map_err(|e| InputError::json(path, "a Hugging Face config.json", &e))?;
        let key_error = |key: &str, expected: &str, found: String| {
            InputError::invalid(path, Location::Key(key.into()), expected, found)
        };
        let qk_norm = match config.model_type.as_deref() {
            Some("llama") => false,
            Some("qwen3") => true,
            other => {
                return Err(key_error(
                    "model_type",
                    "`llama` or `qwen3` (dense)",
                    other.map_or("nothing".into(), |o| format!("`{o}`")),
                ));
            }
        };
        let number = |key: &str, value: Option<u64>| match value {
            Some(v) if (1..=MAX_DIMENSION).contains(&v) => Ok(v as u32),
            Some(v) => Err(key_error(key, &format!("1 to {MAX_DIMENSION}"), v.to_string())),
            None => Err(key_error(key, "a whole number", "nothing".into())),
        };
        let hidden_size = number("hidden_size", config.hidden_size)?;
        let num_q_heads = number("num_attention_heads", config.num_attention_heads)?;
        let num_kv_heads =
            number("num_key_value_heads", config.num_key_value_heads.or(config.num_attention_heads))?;
        let head_dim = match config.head_dim {
            Some(_) => number("head_dim", config.head_dim)?,
            None if hidden_size.is_multiple_of(num_q_heads) => hidden_size / num_q_heads,
            None => {
                return Err(key_error(
                    "head_dim",
                    "a value, since num_attention_heads does not divide hidden_size",
                    "nothing".into(),
                ));
            }
        };
        if !num_q_heads.is_multiple_of(num_kv_heads) {
            return Err(key_error(
                "num_key_value_heads",
                &format!("a divisor of num_attention_heads = {num_q_heads}"),
                num_kv_heads.to_string(),
            ));
        }
        if let Some(act) = config.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(key_error("hidden_act", "`silu`", format!("`{act}`")));
        }
        if config.attention_bias == Some(true) {
            return Err(key_error("attention_bias", "false", "true".into()));
        }
        if config.use_sliding_window == Some(true) {
            return Err(key_error("use_sliding_window", "false", "true".into()));
        }
        Ok(Self {
            name: name.to_owned(),
            hidden_size,
            num_layers: number("num_hidden_layers", config.num_hidden_layers)?,
            num_q_heads,
            num_kv_heads,
            head_dim,
            intermediate_size: number("intermediate_size", config.intermediate_size)?,
            vocab_size: number("vocab_size", config.vocab_size)?,
            max_positions: number("max_position_embeddings", config.max_position_embeddings)?,
            tied_embeddings: config.tie_word_embeddings.unwrap_or(false),
            qk_norm,
        })
    }

    /// Number of parameters: the embedding, the layers, the final norm and an untied LM head.
    #[must_use]
    pub fn num_parameters(&self) -> u64 {
        let (hidden, head_dim) = (u64::from(self.hidden_size), u64::from(self.head_dim));
        let q_width = u64::from(self.num_q_heads) * head_dim;
        let kv_width = u64::from(self.num_kv_heads) * head_dim;
        let attention = hidden * (q_width + 2 * kv_width) + q_width * hidden;
        let mlp = 3 * hidden * u64::from(self.intermediate_size);
        let norms = 2 * hidden + if self.qk_norm { 2 * head_dim } else { 0 };
        let embedding = u64::from(self.vocab_size) * hidden;
        let embeddings = if self.tied_embeddings { embedding } else { 2 * embedding };
        u64::from(self.num_layers) * (attention + mlp + norms) + hidden + embeddings
    }

    /// Size of the bf16 weights.
    #[must_use]
    pub fn weight_bytes(&self) -> Bytes {
        Bytes(self.num_parameters() * BF16_BYTES)
    }

    /// Size of one token's keys and values over all layers, bf16.
    #[must_use]
    pub fn kv_bytes_per_token(&self) -> Bytes {
        let width = u64::from(self.num_kv_heads) * u64::from(self.head_dim);
        Bytes(2 * width * u64::from(self.num_layers) * BF16_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_models_have_their_published_sizes() {
        let qwen = ModelSpec::load("qwen3-0.6b").unwrap();
        // Qwen3-0.6B: 0.6 B in all, 0.44 B without the embedding (model card).
        assert_eq!(qwen.num_parameters(), 596_049_920);
        assert!(qwen.qk_norm && qwen.tied_embeddings);
        // 2 (K, V) x 8 heads x 128 x 28 layers x 2 bytes.
        assert_eq!(qwen.kv_bytes_per_token(), Bytes(114_688));
        let llama = ModelSpec::load("llama3-8b").unwrap();
        // Llama-3-8B: 8.03 B (model card).
        assert_eq!(llama.num_parameters(), 8_030_261_248);
        assert_eq!((llama.head_dim, llama.qk_norm), (128, false));
    }

    fn error_of(text: &str) -> String {
        ModelSpec::from_hf_config("m", text, Path::new("config.json")).unwrap_err().to_string()
    }

    #[test]
    fn bad_configs_name_the_key() {
        assert_eq!(
            error_of(r#"{"model_type":"mixtral"}"#),
            "config.json, key `model_type`: expected `llama` or `qwen3` (dense), found `mixtral`"
        );
        assert_eq!(
            error_of(r#"{"model_type":"llama","hidden_size":0}"#),
            "config.json, key `hidden_size`: expected 1 to 4194304, found 0"
        );
        assert!(error_of("{\n\"hidden_size\": -3}").starts_with("config.json, line 2: expected"));
        assert!(
            error_of(r#"{"model_type":"llama","hidden_size":10,"num_attention_heads":3}"#)
                .contains("head_dim")
        );
    }
}

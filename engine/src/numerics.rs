//! What of a model's `config.json` changes its numbers and not its shape.

use std::f64::consts::TAU;

use plumbline_schema::{InputError, Location, ModelConfig};
use serde::Deserialize;

/// The constants of a model's forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Numerics {
    /// Added to a mean square before its root.
    pub rms_norm_eps: f32,
    /// Base of the rotation's frequencies.
    pub rope_theta: f64,
    /// How the frequencies are stretched for long contexts.
    pub rope_scaling: Option<Llama3Scaling>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
}

/// Llama 3.1's stretching of slow rotations (transformers 4.57, `modeling_rope_utils.py`,
/// `_compute_llama3_parameters`).
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Llama3Scaling {
    /// How much slower the slow ones get.
    pub factor: f64,
    /// Turns within the original context below which a frequency is slow.
    pub low_freq_factor: f64,
    /// Turns above which it stays as it is.
    pub high_freq_factor: f64,
    /// The context the frequencies were made for, tokens.
    pub original_max_position_embeddings: f64,
}

/// The keys of `config.json` that matter here. Transformers 5 writes the rotation's into `rope_parameters`, older
/// versions `rope_theta` and `rope_scaling`.
#[derive(Deserialize)]
struct Keys {
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<serde_json::Value>,
    rope_parameters: Option<serde_json::Value>,
    eos_token_id: Option<OneOrMany>,
    bos_token_id: Option<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl Numerics {
    /// Reads a model's constants.
    ///
    /// # Errors
    /// Names the key, what was expected and what was found.
    pub fn of(config: &ModelConfig) -> Result<Self, InputError> {
        let keys: Keys = serde_json::from_str(&config.text)
            .map_err(|error| InputError::json(&config.path, "a Hugging Face config.json", &error))?;
        let bad = |key: &str, expected: &str, found: String| {
            InputError::invalid(&config.path, Location::Key(key.into()), expected, found)
        };
        let positive = |key: &str, value: Option<f64>, default: f64| match value.unwrap_or(default) {
            value if value.is_finite() && value > 0.0 => Ok(value),
            value => Err(bad(key, "a number above 0", value.to_string())),
        };
        let rope = keys.rope_parameters.as_ref().or(keys.rope_scaling.as_ref());
        let theta = keys.rope_parameters.as_ref().and_then(|rope| rope.get("rope_theta")?.as_f64());
        Ok(Self {
            // Both defaults are those of transformers' `LlamaConfig`.
            rms_norm_eps: positive("rms_norm_eps", keys.rms_norm_eps, 1e-6)? as f32,
            rope_theta: positive("rope_theta", theta.or(keys.rope_theta), 10_000.0)?,
            rope_scaling: scaling(rope).map_err(|found| {
                bad("rope_scaling", "none, `default` or `llama3` with its four numbers", found)
            })?,
            eos_token_ids: match keys.eos_token_id {
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
                None => Vec::new(),
            },
            bos_token_id: keys.bos_token_id,
        })
    }

    /// The rotation's frequencies of a head, radians a token: `theta^(-2 i / head_dim)`, stretched.
    #[must_use]
    pub fn rope_frequencies(&self, head_dim: u32) -> Vec<f64> {
        let frequency = |i: u32| self.rope_theta.powf(-2.0 * f64::from(i) / f64::from(head_dim));
        let stretch = |frequency: f64| {
            self.rope_scaling.as_ref().map_or(frequency, |scaling| scaling.stretch(frequency))
        };
        (0..head_dim / 2).map(|i| stretch(frequency(i))).collect()
    }
}

impl Llama3Scaling {
    fn stretch(&self, frequency: f64) -> f64 {
        let turns = self.original_max_position_embeddings * frequency / TAU;
        if turns > self.high_freq_factor {
            return frequency;
        }
        let slow = frequency / self.factor;
        if turns < self.low_freq_factor {
            return slow;
        }
        let share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
        (1.0 - share) * slow + share * frequency
    }
}

/// The scaling, or what was found in its place.
fn scaling(rope: Option<&serde_json::Value>) -> Result<Option<Llama3Scaling>, String> {
    let Some(rope) = rope.filter(|rope| !rope.is_null()) else { return Ok(None) };
    let kind = rope.get("rope_type").or_else(|| rope.get("type")).and_then(|kind| kind.as_str());
    match kind {
        None | Some("default") => Ok(None),
        Some("llama3") => serde_json::from_value(rope.clone()).map(Some).map_err(|error| error.to_string()),
        Some(other) => Err(format!("`{other}`")),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn of(text: &str) -> Result<Numerics, InputError> {
        let (name, path) = ("m".to_owned(), PathBuf::from("config.json"));
        Numerics::of(&ModelConfig { name, text: text.to_owned(), path })
    }

    #[test]
    fn shipped_models_have_their_constants() {
        let llama = Numerics::of(&ModelConfig::find("llama3-8b").unwrap()).unwrap();
        assert_eq!((llama.rms_norm_eps, llama.rope_theta), (1e-5, 500_000.0));
        let qwen = Numerics::of(&ModelConfig::find("qwen3-0.6b").unwrap()).unwrap();
        assert_eq!((qwen.rms_norm_eps, qwen.rope_theta), (1e-6, 1_000_000.0));
        assert_eq!(qwen.eos_token_ids, [151_645]);
        let frequencies = qwen.rope_frequencies(128);
        assert_eq!((frequencies.len(), frequencies[0]), (64, 1.0));
        assert!((frequencies[63] - 1e6f64.powf(-126.0 / 128.0)).abs() < 1e-12);
    }

    /// Both spellings of the same model.
    #[test]
    fn rope_parameters_of_either_spelling_are_read() {
        let old = of(r#"{"rope_theta":5e5,"rope_scaling":{"rope_type":"llama3","factor":8.0,
            "low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192}}"#)
        .unwrap();
        let new = of(r#"{"rope_parameters":{"rope_theta":5e5,"rope_type":"llama3","factor":8.0,
            "low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192}}"#)
        .unwrap();
        assert_eq!(old, new);
        let frequencies = old.rope_frequencies(128);
        let plain = Numerics { rope_scaling: None, ..old }.rope_frequencies(128);
        assert_eq!(frequencies[0].to_bits(), plain[0].to_bits());
        assert!((frequencies[63] * 8.0 - plain[63]).abs() < 1e-15);
        assert!(frequencies.iter().zip(&plain).all(|(f, p)| f <= p && *f >= p / 8.0));
    }

    #[test]
    fn what_is_not_understood_is_refused_by_key() {
        let error = of(r#"{"rope_scaling":{"rope_type":"yarn","factor":4.0}}"#).unwrap_err().to_string();
        assert!(error.contains("rope_scaling") && error.contains("yarn"), "{error}");
        let error = of(r#"{"rms_norm_eps":-1.0}"#).unwrap_err().to_string();
        assert!(error.contains("rms_norm_eps"), "{error}");
        assert!(of("{").is_err());
    }
}

//! What a run was made with besides its deployment.

use serde::{Deserialize, Serialize};

use crate::model::ModelSpec;

/// The dtype of this version's models, as Hugging Face names it.
pub const BF16_NAME: &str = "bfloat16";

/// Model, dtype and versions of a run, as far as they are recorded.
///
/// They change step times, so a real run and a simulation that stands for it must agree in them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// The model's shape; `None` when only its name is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelSpec>,
    /// Of weights and activations, as Hugging Face names it: `bfloat16`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// The engine and its version, `vllm-0.24.0`; of a simulation, those that its engine profile stands for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_version: Option<String>,
    /// The GPU's driver, `580.159.04`; of a simulation, the one under which its bundle was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver_version: Option<String>,
}

impl Environment {
    /// None where nothing is recorded, so that the key is left out.
    #[must_use]
    pub fn if_known(self) -> Option<Self> {
        (self != Self::default()).then_some(self)
    }
}

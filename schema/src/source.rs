//! Where a run came from that another tool recorded.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What the arrivals of an imported run are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArrivalBasis {
    /// As scheduled: waiting in the client counts.
    Scheduled,
    /// When the client sent the request: waiting in the client is left out.
    Sent,
    /// All at the start, since the client was told to send all at once and no times were recorded.
    AtOnce,
}

impl ArrivalBasis {
    /// What times count from, in words.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled arrivals",
            Self::Sent => "when the client sent",
            Self::AtOnce => "all requests sent at once",
        }
    }
}

/// `source` of a `run.json`: the file of another tool that the run was made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSource {
    /// The tool, by the name of its format: `vllm-bench`.
    pub tool: String,
    /// The tool's version; absent where its file does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The file's name, without its folder.
    pub file: String,
    /// The model as the file or the user names it; absent where neither does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// What the arrivals are.
    pub arrivals: ArrivalBasis,
    /// The figures that the tool itself computed, ms, by its own names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub published: BTreeMap<String, f64>,
    /// What a reader should know before trusting a number.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

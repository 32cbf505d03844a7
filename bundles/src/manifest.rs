//! `manifest.json`: what a bundle is, and the digest of each of its files.

use std::{collections::BTreeMap, fmt};

use plumbline_schema::GpuSpec;
use serde::{Deserialize, Serialize};

use crate::evidence::{DeviceIdentity, Evidence};

/// Version of the bundle format, `major.minor`.
///
/// A reader refuses another major version and a newer minor one. Changelog: 1.0 first version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormatVersion {
    /// Raised when old readers would misread a file.
    pub major: u32,
    /// Raised when something is added.
    pub minor: u32,
}

impl FormatVersion {
    /// What this build writes.
    pub const CURRENT: Self = Self { major: 1, minor: 0 };

    /// Says which side to upgrade when a file of this version cannot be read by `reader`.
    #[must_use]
    pub fn check_readable_by(self, reader: Self) -> Option<&'static str> {
        if self.major > reader.major || (self.major == reader.major && self.minor > reader.minor) {
            Some("upgrade plumb")
        } else if self.major < reader.major {
            Some("make the bundle anew")
        } else {
            None
        }
    }
}

impl fmt::Display for FormatVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Size and digest of one file of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Length in bytes.
    pub num_bytes: u64,
    /// SHA-256, hex.
    pub sha256: String,
}

/// `manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the format.
    pub format_version: FormatVersion,
    /// Plumbline version that measured it.
    pub plumbline_version: String,
    /// When measuring began, RFC 3339 in UTC.
    pub created: String,
    /// The GPU's data sheet, the base of every roofline in the bundle.
    pub gpu: GpuSpec,
    /// The device as found; `None` for tables imported without it.
    pub device: Option<DeviceIdentity>,
    /// GPU states and ceilings; `None` for imported tables.
    pub evidence: Option<Evidence>,
    /// Names of the models whose shapes were planned.
    pub models: Vec<String>,
    /// Points that were planned but not measured, in words; empty when complete.
    pub incomplete: Vec<String>,
    /// Every file of the bundle but this one, by path with `/`.
    pub files: BTreeMap<String, FileEntry>,
}

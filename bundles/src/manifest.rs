//! `manifest.json`: what a bundle is, and the digest of each of its files.

use std::{collections::BTreeMap, fmt};

use plumbline_schema::GpuSpec;
use serde::{Deserialize, Serialize};

use crate::{
    error::{CheckError, check_positive},
    evidence::{DeviceIdentity, Evidence},
};

/// Version of the bundle format, `major.minor`.
///
/// A reader refuses another major version and a newer minor one. Changelog: 1.0 first version; 1.1 samples
/// say why they stopped and after how many attempts, host costs are told in more detail; 1.2 a predictor's file may name
/// another's, predictors may be another GPU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormatVersion {
    /// Raised when old readers would misread a file.
    pub major: u32,
    /// Raised when something is added.
    pub minor: u32,
}

impl FormatVersion {
    /// What this build writes.
    pub const CURRENT: Self = Self { major: 1, minor: 2 };

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

/// The name of the manifest, the one file that it does not list.
pub const MANIFEST: &str = "manifest.json";

impl Manifest {
    /// Checks the data sheet, the file names and the digests.
    ///
    /// # Errors
    /// Names the key.
    pub fn check(&self) -> Result<(), CheckError> {
        check_gpu(&self.gpu).map_err(|e| e.under("gpu"))?;
        for (name, entry) in &self.files {
            if !is_safe_name(name) {
                let expected = "relative paths with `/`, without `..`";
                return Err(CheckError::new("files", expected, format!("`{name}`")));
            }
            let is_hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
            if entry.sha256.len() != 64 || !entry.sha256.chars().all(is_hex) {
                let key = format!("files.{name}.sha256");
                return Err(CheckError::new(key, "64 lower-case hex digits", format!("`{}`", entry.sha256)));
            }
        }
        Ok(())
    }
}

/// Whether a payload's name stays inside the bundle on every system.
#[must_use]
pub fn is_safe_name(name: &str) -> bool {
    let part_fits = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
    };
    name != MANIFEST && name.len() <= 255 && name.split('/').all(part_fits)
}

fn check_gpu(gpu: &GpuSpec) -> Result<(), CheckError> {
    check_positive("bf16_flops_per_s", gpu.bf16_flops_per_s)?;
    check_positive("fp32_flops_per_s", gpu.fp32_flops_per_s)?;
    check_positive("hbm_bandwidth_bytes_per_s", gpu.hbm_bandwidth_bytes_per_s)?;
    for (key, value) in [
        ("num_sms", gpu.num_sms),
        ("boost_clock_mhz", gpu.boost_clock_mhz),
        ("max_clock_mhz", gpu.max_clock_mhz),
    ] {
        check_positive(key, value.into())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_the_bundle() {
        for name in ["host.json", "samples/rope.csv", "engines/vllm-0.24-graph.json"] {
            assert!(is_safe_name(name), "{name}");
        }
        for name in [
            "",
            "/etc/passwd",
            "../x",
            "samples/../../x",
            "samples//x",
            "samples/",
            ".hidden",
            "a/.plumb-x",
            "c:\\x",
            "a\\b",
            "a\0b",
            "manifest.json",
        ] {
            assert!(!is_safe_name(name), "{name}");
        }
    }

    #[test]
    fn versions_say_which_side_to_upgrade() {
        let version = |major, minor| FormatVersion { major, minor };
        let reader = version(2, 1);
        for (found, action) in [
            (version(2, 0), None),
            (version(2, 1), None),
            (version(2, 2), Some("upgrade plumb")),
            (version(3, 0), Some("upgrade plumb")),
            (version(1, 9), Some("make the bundle anew")),
        ] {
            assert_eq!(found.check_readable_by(reader), action, "{found}");
        }
    }
}

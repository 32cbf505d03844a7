//! A host by its speed: what travels with real runs and engine profiles, so that host costs can be told for another.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{
    error::{InputError, Location},
    files::read_json,
};

/// A host by what its speed is told by.
///
/// The keys are those of a bundle's `host.json` and of what `plumb host --json` prints, so either can be read as one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostInfo {
    /// CPU model as the system names it; `None` when not recorded.
    #[serde(default)]
    pub cpu_model: Option<String>,
    /// Single-thread score, million iterations a second, above 0: twice the score is twice the speed.
    pub single_thread_score: f64,
}

impl HostInfo {
    /// A host of which only the score is known.
    #[must_use]
    pub fn of_score(single_thread_score: f64) -> Self {
        Self { cpu_model: None, single_thread_score }
    }

    /// Reads `cpu_model` and `single_thread_score` from a JSON file; other keys are ignored.
    ///
    /// # Errors
    /// `Io`, or `Invalid` with the line or key.
    pub fn read(path: &Path) -> Result<Self, InputError> {
        let host: Self = read_json(path, "a host with its `single_thread_score`")?;
        host.check_at(path, "single_thread_score")?;
        Ok(host)
    }

    /// Whether the score can be one: finite and above 0.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.single_thread_score.is_finite() && self.single_thread_score > 0.0
    }

    /// Refuses an impossible score that stands at `key` of a file.
    pub(crate) fn check_at(&self, path: &Path, key: &str) -> Result<(), InputError> {
        if self.is_sound() {
            return Ok(());
        }
        let found = self.single_thread_score.to_string();
        Err(InputError::invalid(path, Location::Key(key.into()), "a finite number above 0", found))
    }
}

/// What a simulation's host factor rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostFactorBasis {
    /// The profile's own factor times the score of the host it was fitted on over the target's.
    Scores,
    /// The profile's own factor: the profile does not say which host it was fitted on, so scores cannot be compared.
    FittedHostUnknown,
    /// Steps of real runs on the target host.
    Runs,
}

/// The factor that a simulation multiplied all host costs by, and why, when it was asked for another host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostFactorUsed {
    /// The factor on every host cost; above 1 is slower than the host that the costs are stated for.
    pub factor: f64,
    /// What it rests on.
    pub basis: HostFactorBasis,
    /// Score of the host that the profile was fitted on; `None` when not known or not used.
    #[serde(default)]
    pub fitted_score: Option<f64>,
    /// Steps it was read off; `None` unless it rests on runs.
    #[serde(default)]
    pub num_steps: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::Run;

    #[test]
    fn hosts_are_read_from_any_file_with_a_score() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host.json");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            HostInfo::read(&path).map_err(|error| error.to_string())
        };
        let host = read(r#"{"cpu_model": "a CPU", "num_cores": 4, "single_thread_score": 87.5}"#).unwrap();
        assert_eq!(host, HostInfo { cpu_model: Some("a CPU".into()), single_thread_score: 87.5 });
        assert_eq!(read(r#"{"single_thread_score": 87.5}"#).unwrap(), HostInfo::of_score(87.5));
        let error = read(r#"{"single_thread_score": 0.0}"#).unwrap_err();
        assert!(
            error.contains("key `single_thread_score`: expected a finite number above 0, found 0"),
            "{error}"
        );
        let error = read(r#"{"cpu_model": "a CPU"}"#).unwrap_err();
        assert!(error.contains("single_thread_score"), "{error}");
    }

    #[test]
    fn a_run_records_its_host_beside_its_deployment_or_in_run_json() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let host = || Run::read(folder.path()).map(|run| run.info.host).map_err(|error| error.to_string());
        write(
            "request_metrics.csv",
            "request_id,arrival_time_ns,first_token_time_ns,ttft_ns,completion_time_ns,num_prefill_tokens,\
             num_decode_tokens,num_decode_tokens_actual,status,backend\n0,0,5,5,5,8,1,1,ok,test\n",
        );
        assert_eq!(host(), Ok(None));
        let deployment = r#""mode": "eager", "model": "m", "max_num_batched_tokens": 64, "max_num_seqs": 4,
            "max_model_len": 64, "num_gpu_blocks": 16, "block_size": 16"#;
        write("engine.json", &format!("{{{deployment}}}"));
        assert_eq!(host(), Ok(None));
        let scored = format!(r#"{{{deployment}, "host": {{"single_thread_score": 50.0}}}}"#);
        write("engine.json", &scored);
        assert_eq!(host(), Ok(Some(HostInfo::of_score(50.0))));
        write("engine.json", &scored.replace("50.0", "-1.0"));
        let error = host().unwrap_err();
        assert!(error.contains("engine.json, key `host.single_thread_score`"), "{error}");
        write("run.json", r#"{"kind": "real", "engine": "e", "host": {"single_thread_score": 75.0}}"#);
        assert_eq!(host(), Ok(Some(HostInfo::of_score(75.0))));
        write("run.json", r#"{"kind": "real", "engine": "e", "host": {"single_thread_score": 0.0}}"#);
        let error = host().unwrap_err();
        assert!(error.contains("run.json, key `host.single_thread_score`"), "{error}");
    }
}

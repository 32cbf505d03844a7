//! What the numbers of a case rest on.

use std::path::Path;

use plumbline_bundles::EngineProfile;
use plumbline_schema::Run;
use serde::{Deserialize, Serialize};

/// The runs, the bundle and the engine profile of a case.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// Folders of the real repeats.
    pub real_runs: Vec<String>,
    /// Folder of the simulated run; none where it was simulated for the comparison.
    #[serde(default)]
    pub sim_run: Option<String>,
    /// Name of the bundle's folder.
    #[serde(default)]
    pub bundle: Option<String>,
    /// SHA-256 of the bundle's manifest, hex.
    #[serde(default)]
    pub bundle_digest: Option<String>,
    /// The GPU that is predicted.
    #[serde(default)]
    pub gpu: Option<String>,
    /// Name of the engine profile.
    #[serde(default)]
    pub engine_profile: Option<String>,
    /// The GPU whose runs the engine profile was fitted on.
    #[serde(default)]
    pub fitted_gpu: Option<String>,
    /// The runs the engine profile was fitted on.
    #[serde(default)]
    pub fitted_runs: Vec<String>,
    /// The factor on host costs; 1 for the host that the profile was fitted on.
    #[serde(default)]
    pub host_factor: Option<f64>,
    /// Simulations whose median is compared.
    pub num_simulations: u32,
    /// Seed of the first of them.
    #[serde(default)]
    pub seed: Option<u64>,
}

impl Evidence {
    /// Of a comparison of runs that lie in folders.
    #[must_use]
    pub fn of_runs(real_runs: Vec<String>, sim_run: String, sim: &Run) -> Self {
        Self {
            real_runs,
            sim_run: Some(sim_run),
            bundle_digest: sim.info.bundle_digest.clone(),
            gpu: sim.info.gpu.clone(),
            engine_profile: Some(sim.info.engine.clone()),
            num_simulations: 1,
            seed: sim.info.seed,
            ..Self::default()
        }
    }

    /// With folders told from `base` on, where they lie below it.
    #[must_use]
    pub fn below(mut self, base: &Path) -> Self {
        for folder in &mut self.real_runs {
            if let Ok(below) = Path::new(&*folder).strip_prefix(base) {
                *folder = below.display().to_string();
            }
        }
        self
    }

    /// With an engine profile and what it was fitted on.
    #[must_use]
    pub fn with_profile(mut self, profile: &EngineProfile) -> Self {
        self.engine_profile = Some(profile.name.clone());
        self.fitted_gpu = Some(profile.fitted_on.gpu.clone()).filter(|gpu| !gpu.is_empty());
        self.fitted_runs.clone_from(&profile.fitted_on.runs);
        self.host_factor = Some(profile.host_factor);
        self
    }
}

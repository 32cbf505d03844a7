//! A bundle of the fake device, made once by the command itself and shared by the tests that read it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use plumbline_bundles::{
    Dispatch, DispatchCosts, EngineProfile, HostCost,
    engine_profile::{ClientCosts, FittedOn, OperatorScales},
};
use tempfile::TempDir;

use crate::support::{DEPLOYMENT, WORKLOAD, arg, stdout_of, write};

/// Files that make a simulation.
pub struct Fixture {
    folder: TempDir,
    /// What `plumb profile --json` printed.
    pub profiled: serde_json::Value,
    /// What `plumb train --json` printed.
    pub training: serde_json::Value,
}

static FIXTURE: LazyLock<Fixture> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("folder");
    let bundle = folder.path().join("bundle");
    let profile = ["profile", "--model", "qwen3-0.6b", "--device", "fake", "--out", arg(&bundle), "--json"];
    let profiled: serde_json::Value = serde_json::from_str(&stdout_of(profile)).expect("JSON");
    assert_eq!(profiled["num_planned"], profiled["num_measured"]);
    let training = serde_json::from_str(&stdout_of(["train", arg(&bundle), "--json"])).expect("JSON");
    write(&folder.path().join("workload.csv"), WORKLOAD);
    write(&folder.path().join("deployment.json"), DEPLOYMENT);
    engine_profile().write(&folder.path().join("engine.json")).expect("engine profile");
    Fixture { folder, profiled, training }
});

/// The shared files; copy what is to be changed.
pub fn fixture() -> &'static Fixture {
    &FIXTURE
}

impl Fixture {
    /// The bundle, profiled and trained.
    pub fn bundle(&self) -> PathBuf {
        self.folder.path().join("bundle")
    }

    /// A file of the fixture: `workload.csv`, `deployment.json` or `engine.json`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The bundle's own copy for a test that changes it.
    pub fn copy_bundle(&self, to: &Path) {
        copy_folder(&self.bundle(), to);
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("folder");
    for entry in fs::read_dir(from).expect("folder") {
        let entry = entry.expect("entry");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copy");
        }
    }
}

/// An engine that spends a millisecond or two of host time a step, and scatters.
pub fn engine_profile() -> EngineProfile {
    let costs = |constant_ns: f64| DispatchCosts {
        host_pre: HostCost { constant_ns, per_seq_ns: 2_000.0, per_token_ns: 10.0 },
        host_post: HostCost { constant_ns: 200_000.0, per_seq_ns: 1_000.0, per_token_ns: 0.0 },
        launch_ns: 5_000.0,
        launch_per_seq_ns: 0.0,
        after_idle_ns: 3e6,
        residual_quantiles: vec![0.9, 0.97, 1.0, 1.03, 1.3],
    };
    EngineProfile {
        name: "fake-engine".into(),
        engine: "fake 1.0".into(),
        scheduler: "vllm-v1".into(),
        dispatch: BTreeMap::from([
            (Dispatch::Eager, costs(1.5e6)),
            (Dispatch::PiecewiseGraph, costs(1e6)),
            (Dispatch::FullGraph, costs(0.5e6)),
        ]),
        schedule: HostCost::default(),
        client: ClientCosts { admit_ns: 300_000.0, ..ClientCosts::default() },
        operator_scales: OperatorScales::default(),
        idle_threshold_ns: 2e7,
        host_factor: 1.0,
        fitted_on: FittedOn::default(),
    }
}

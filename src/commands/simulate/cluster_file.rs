//! The TOML file that describes a cluster.

use std::path::{Path, PathBuf};

use plumbline_schema::{InputError, Location, files::read_toml};
use plumbline_simulator::{
    BundleTimes,
    cluster::{Engines, KvTransfer, Role, RouterKind, Routing},
};
use serde::Deserialize;

use crate::{
    engines::{EngineArgs, Opened},
    exit::Exit,
    failure::Failure,
    output::Output,
};

/// A cluster: kinds of engines, each like the one of the command line but for what it says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    #[serde(default)]
    router: Option<String>,
    #[serde(default)]
    kv_transfer: Option<Transfer>,
    group: Vec<Group>,
}

/// What it takes to send a prompt's keys and values from a prefill to a decode replica.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Transfer {
    latency_us: f64,
    gigabytes_per_s: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    replicas: u32,
    #[serde(default)]
    role: RoleName,
    bundle: Option<String>,
    engine: Option<String>,
    model: Option<String>,
    deployment: Option<PathBuf>,
    scheduler: Option<String>,
    gpu: Option<String>,
    /// Like `--set`, after it.
    #[serde(default)]
    set: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RoleName {
    #[default]
    Whole,
    Prefill,
    Decode,
}

/// A cluster file and where it lies.
#[derive(Debug)]
pub struct ClusterFile {
    path: PathBuf,
    content: Content,
}

impl ClusterFile {
    /// Reads the file.
    ///
    /// # Errors
    /// When it is no cluster, or has no group.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let content: Content = read_toml(path, "a cluster")?;
        if content.group.is_empty() {
            let at = Location::Key("group".into());
            return Err(InputError::invalid(path, at, "at least one group of replicas", "none").into());
        }
        Ok(Self { path: path.to_path_buf(), content })
    }

    /// Opens the engines of each group.
    ///
    /// # Errors
    /// When one of their inputs cannot be used.
    pub fn groups(&self, base: &EngineArgs, output: Output) -> Result<Vec<Opened>, Failure> {
        let open = |group: &Group| {
            let mut args = base.clone();
            // Paths are relative to the file.
            let beside = |path: &PathBuf| self.path.parent().map_or_else(|| path.clone(), |at| at.join(path));
            args.bundle = group.bundle.clone().unwrap_or(args.bundle);
            args.engine = group.engine.clone().unwrap_or(args.engine);
            args.model = group.model.clone().unwrap_or(args.model);
            args.deployment = group.deployment.as_ref().map(beside).or(args.deployment);
            args.scheduler = group.scheduler.clone().or(args.scheduler);
            args.gpu = group.gpu.clone().or(args.gpu);
            args.set.extend(group.set.iter().cloned());
            let mut opened = args.open(output)?;
            opened.engines.num_replicas = group.replicas;
            opened.engines.role = match group.role {
                RoleName::Whole => Role::Whole,
                RoleName::Prefill => Role::Prefill,
                RoleName::Decode => Role::Decode,
            };
            Ok(opened)
        };
        self.content.group.iter().map(open).collect()
    }

    /// How requests reach the replicas; the command line's router goes before the file's.
    ///
    /// # Errors
    /// When the file names no router that there is.
    pub fn routing(
        &self,
        router: Option<RouterKind>,
        engines: &Engines<BundleTimes>,
    ) -> Result<Routing, Failure> {
        let named = self.content.router.as_deref().map(str::parse).transpose();
        let named = named.map_err(|error| Failure::new(Exit::BadInput, error))?;
        let kv_transfer = self.content.kv_transfer.map(|transfer| KvTransfer {
            latency_ns: transfer.latency_us * 1e3,
            bytes_per_s: transfer.gigabytes_per_s * 1e9,
            bytes_per_token: engines.model.kv_bytes_per_token().0 as f64,
        });
        Ok(Routing { router: router.or(named).unwrap_or_default(), kv_transfer })
    }
}

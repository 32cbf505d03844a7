//! A grid of deployments: every combination of the values that a TOML file lists.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
};

use plumbline_bundles::bundle::sha256_hex;
use plumbline_schema::{Deployment, GpuSpec, InputError, Location, MemoryOptions, files::read_toml};
use serde::{Deserialize, Serialize};

use super::Scenario;
use crate::{cluster::Engines, cluster::RouterKind, residual::Residuals, scheduler::SchedulerKind};

/// Most combinations of a grid.
const MAX_POINTS: usize = 100_000;

/// Version of what a key is made of; with it, or the simulator's, results of before are not used again.
const KEY_VERSION: u32 = 1;

/// A grid; a list that is left out has the one value that the base deployment or engine profile has.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grid {
    /// Schedulers by name.
    #[serde(default)]
    pub scheduler: Vec<String>,
    /// Token budgets of a step.
    #[serde(default)]
    pub max_num_batched_tokens: Vec<u32>,
    /// Most sequences running at once.
    #[serde(default)]
    pub max_num_seqs: Vec<u32>,
    /// GPUs that share a layer.
    #[serde(default)]
    pub tensor_parallel_size: Vec<u32>,
    /// Stages of layers.
    #[serde(default)]
    pub pipeline_parallel_size: Vec<u32>,
    /// Replicas.
    #[serde(default)]
    pub replicas: Vec<u32>,
    /// Routers by name.
    #[serde(default)]
    pub router: Vec<String>,
    /// GPUs and what they cost; at least one.
    pub gpu: Vec<GpuKind>,
}

/// A GPU, what is known of it and what it costs.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuKind {
    /// Bundle folder (from the grid file's), or the name of a shipped bundle.
    pub bundle: String,
    /// Engine profile: its name in the bundle, or a JSON file (from the grid file's folder).
    pub engine: String,
    /// GPU to predict, where it is not the bundle's own.
    pub gpu: Option<String>,
    /// One GPU for an hour, in any unit, above 0.
    pub price_per_hour: f64,
}

/// A kind of GPU that was read: the base of its deployments.
#[derive(Clone, Debug)]
pub struct Kind<T> {
    /// Model, deployment, engine profile and times.
    pub base: Engines<T>,
    /// The GPU that is predicted.
    pub gpu: GpuSpec,
    /// SHA-256 of the bundle's manifest, hex.
    pub bundle_digest: String,
    /// What else decides its times.
    pub out_of_domain: String,
    /// Whether each deployment gets the KV blocks of its memory plan, and not the base's.
    pub plans_memory: bool,
}

/// A deployment of a grid, in words.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Point {
    /// The bundle as the grid names it.
    pub bundle: String,
    /// The engine profile's name.
    pub engine: String,
    /// The GPU.
    pub gpu: String,
    /// The policy.
    pub scheduler: String,
    /// Token budget of a step.
    pub max_num_batched_tokens: u32,
    /// Most sequences running at once.
    pub max_num_seqs: u32,
    /// GPUs that share a layer.
    pub tensor_parallel_size: u32,
    /// Stages of layers.
    pub pipeline_parallel_size: u32,
    /// Replicas.
    pub replicas: u32,
    /// The router.
    pub router: String,
    /// GPUs of all replicas.
    pub num_gpus: u32,
    /// All its GPUs for an hour, in the unit of the prices.
    pub cost_per_hour: f64,
}

/// A deployment of a grid, to be simulated.
#[derive(Clone, Debug)]
pub struct Candidate<T> {
    /// In words.
    pub point: Point,
    /// Its router.
    pub router: RouterKind,
    /// Its engines and the key of everything that decides its result besides the scenario; or why there are none.
    pub engines: Result<(Engines<T>, String), String>,
}

impl Grid {
    /// Reads a grid. Paths in it start from its folder.
    ///
    /// # Errors
    /// Names the file, the line or key, what was expected and what was found.
    pub fn read(path: &Path) -> Result<Self, InputError> {
        let mut grid: Self = read_toml(path, "a grid of deployments")?;
        grid.check().map_err(|(key, expected, found)| {
            InputError::invalid(path, Location::Key(key), expected, found)
        })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let rebase = |name: &mut String| {
            let rebased: PathBuf = folder.join(&*name);
            if rebased.exists() {
                *name = rebased.to_string_lossy().into_owned();
            }
        };
        for kind in &mut grid.gpu {
            rebase(&mut kind.bundle);
            rebase(&mut kind.engine);
        }
        Ok(grid)
    }

    fn check(&self) -> Result<(), (String, String, String)> {
        parsed::<SchedulerKind>("scheduler", &self.scheduler)?;
        parsed::<RouterKind>("router", &self.router)?;
        for (key, list) in [
            ("max_num_batched_tokens", &self.max_num_batched_tokens),
            ("max_num_seqs", &self.max_num_seqs),
            ("tensor_parallel_size", &self.tensor_parallel_size),
            ("pipeline_parallel_size", &self.pipeline_parallel_size),
            ("replicas", &self.replicas),
        ] {
            if let Some(found) = list.iter().find(|value| !(1..=1_000_000).contains(*value)) {
                return Err((key.into(), "numbers from 1 to 1000000".into(), found.to_string()));
            }
            check_distinct(key, list)?;
        }
        if self.gpu.is_empty() {
            return Err(("gpu".into(), "at least one [[gpu]]".into(), "none".into()));
        }
        for (i, kind) in self.gpu.iter().enumerate() {
            let price = kind.price_per_hour;
            if !(price.is_finite() && price > 0.0) {
                let key = format!("gpu[{i}].price_per_hour");
                return Err((key, "a price above 0".into(), price.to_string()));
            }
        }
        let num_points = self.num_points();
        if num_points > MAX_POINTS {
            let found = format!("{num_points} combinations");
            return Err(("gpu".into(), format!("at most {MAX_POINTS} combinations of all lists"), found));
        }
        Ok(())
    }

    /// Combinations.
    #[must_use]
    pub fn num_points(&self) -> usize {
        let lists = [
            self.scheduler.len(),
            self.max_num_batched_tokens.len(),
            self.max_num_seqs.len(),
            self.tensor_parallel_size.len(),
            self.pipeline_parallel_size.len(),
            self.replicas.len(),
            self.router.len(),
        ];
        lists.iter().fold(self.gpu.len(), |product, &len| product.saturating_mul(len.max(1)))
    }

    /// Every combination, in the order of the lists; `kinds` are those of `gpu`.
    #[must_use]
    pub fn candidates<T: Clone>(&self, kinds: &[Kind<T>]) -> Vec<Candidate<T>> {
        let mut all = Vec::with_capacity(self.num_points());
        for (named, kind) in self.gpu.iter().zip(kinds) {
            let base = &kind.base.deployment;
            // Names were checked when the grid was read.
            let routers = parsed("router", &self.router).unwrap_or_default();
            let routers = if routers.is_empty() { vec![RouterKind::default()] } else { routers };
            for scheduler in or_base(&self.scheduler, &kind.base.profile.scheduler) {
                for deployment in self.deployments(base) {
                    for &replicas in &or_base(&self.replicas, &1) {
                        for &router in &routers {
                            let shape = (scheduler.as_str(), &deployment, replicas, router);
                            all.push(candidate(named, kind, shape));
                        }
                    }
                }
            }
        }
        all
    }

    fn deployments(&self, base: &Deployment) -> Vec<Deployment> {
        let mut all = Vec::new();
        for &max_num_batched_tokens in &or_base(&self.max_num_batched_tokens, &base.max_num_batched_tokens) {
            for &max_num_seqs in &or_base(&self.max_num_seqs, &base.max_num_seqs) {
                for &tensor_parallel_size in &or_base(&self.tensor_parallel_size, &base.tensor_parallel_size)
                {
                    for &pipeline_parallel_size in
                        &or_base(&self.pipeline_parallel_size, &base.pipeline_parallel_size)
                    {
                        all.push(Deployment {
                            max_num_batched_tokens,
                            max_num_seqs,
                            tensor_parallel_size,
                            pipeline_parallel_size,
                            ..base.clone()
                        });
                    }
                }
            }
        }
        all
    }
}

fn or_base<V: Clone>(list: &[V], base: &V) -> Vec<V> {
    if list.is_empty() { vec![base.clone()] } else { list.to_vec() }
}

fn parsed<K: std::str::FromStr<Err: Display>>(
    key: &str,
    names: &[String],
) -> Result<Vec<K>, (String, String, String)> {
    check_distinct(key, names)?;
    let parse =
        |name: &String| name.parse().map_err(|e: K::Err| (key.into(), "known names".into(), e.to_string()));
    names.iter().map(parse).collect()
}

fn check_distinct<V: PartialEq + Display>(key: &str, list: &[V]) -> Result<(), (String, String, String)> {
    match list.iter().enumerate().find(|(i, value)| list[..*i].contains(value)) {
        Some((_, value)) => Err((key.into(), "each value once".into(), format!("{value} twice"))),
        None => Ok(()),
    }
}

fn candidate<T: Clone>(
    named: &GpuKind,
    kind: &Kind<T>,
    (scheduler, deployment, num_replicas, router): (&str, &Deployment, u32, RouterKind),
) -> Candidate<T> {
    let Kind { base, gpu, plans_memory, .. } = kind;
    let mut engines = Engines { num_replicas, deployment: deployment.clone(), ..base.clone() };
    scheduler.clone_into(&mut engines.profile.scheduler);
    // Numbers of GPUs are at most 10^18 in 64 bits; more than 32 hold are no deployment.
    let gpus = u64::from(num_replicas)
        * u64::from(deployment.tensor_parallel_size)
        * u64::from(deployment.pipeline_parallel_size);
    let point = Point {
        bundle: named.bundle.clone(),
        engine: base.profile.name.clone(),
        gpu: gpu.name.clone(),
        scheduler: scheduler.to_owned(),
        max_num_batched_tokens: deployment.max_num_batched_tokens,
        max_num_seqs: deployment.max_num_seqs,
        tensor_parallel_size: deployment.tensor_parallel_size,
        pipeline_parallel_size: deployment.pipeline_parallel_size,
        replicas: num_replicas,
        router: router.to_string(),
        num_gpus: u32::try_from(gpus).unwrap_or(u32::MAX),
        cost_per_hour: gpus as f64 * named.price_per_hour,
    };
    let planned = if *plans_memory {
        let planned = deployment.clone().planned(&base.model, gpu, &MemoryOptions::default());
        planned.map_err(|error| error.to_string())
    } else {
        Ok(deployment.clone())
    };
    let engines = planned.map(|deployment| {
        engines.deployment = deployment;
        let key = key(kind, &engines, router);
        (engines, key)
    });
    Candidate { point, router, engines }
}

#[derive(Serialize)]
struct KeyParts<'a> {
    key_version: u32,
    simulator_version: &'static str,
    bundle_digest: &'a str,
    gpu: &'a GpuSpec,
    out_of_domain: &'a str,
    model: &'a plumbline_schema::ModelSpec,
    profile: &'a plumbline_bundles::EngineProfile,
    deployment: &'a Deployment,
    num_replicas: u32,
    router: &'static str,
}

/// All that decides what the engines do; prices do not.
fn key<T>(kind: &Kind<T>, engines: &Engines<T>, router: RouterKind) -> String {
    let parts = KeyParts {
        key_version: KEY_VERSION,
        simulator_version: env!("CARGO_PKG_VERSION"),
        bundle_digest: &kind.bundle_digest,
        gpu: &kind.gpu,
        out_of_domain: &kind.out_of_domain,
        model: &engines.model,
        profile: &engines.profile,
        deployment: &engines.deployment,
        num_replicas: engines.num_replicas,
        router: router.name(),
    };
    digest(&parts)
}

#[derive(Serialize)]
struct ScenarioParts<'a> {
    engines: &'a str,
    load: &'a str,
    limits: &'a [super::Limit],
    bracket: &'a super::BracketOptions,
    seed: u64,
    scatters: bool,
}

/// The key of all that decides a result: engines by their key, and the scenario.
pub(super) fn full_key(engines: &str, scenario: &Scenario<'_>) -> String {
    digest(&ScenarioParts {
        engines,
        load: scenario.load.digest(),
        limits: scenario.limits,
        bracket: scenario.bracket,
        seed: scenario.seed,
        scatters: scenario.residuals == Residuals::Drawn,
    })
}

fn digest(parts: &impl Serialize) -> String {
    // Structs, numbers and text: JSON holds them all.
    sha256_hex(&serde_json::to_vec(parts).unwrap_or_else(|error| unreachable!("{error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: &str = "scheduler = [\"vllm-v1\", \"orca\"]\nmax_num_seqs = [8, 16, 32]\nreplicas = [1, 2]\n\
        [[gpu]]\nbundle = \"a\"\nengine = \"e\"\nprice_per_hour = 2.5\n";

    fn read(text: &str) -> Result<Grid, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("grid.toml");
        std::fs::write(&path, text).unwrap();
        Grid::read(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn a_grid_is_the_product_of_its_lists() {
        assert_eq!(read(GRID).unwrap().num_points(), 12);
        assert_eq!(
            read("[[gpu]]\nbundle = \"a\"\nengine = \"e\"\nprice_per_hour = 1\n").unwrap().num_points(),
            1
        );
    }

    #[test]
    fn what_makes_no_grid_is_refused_by_its_key() {
        for (from, to, says) in [
            ("replicas", "replica", "unknown field `replica`"),
            ("[1, 2]", "[1, 0]", "key `replicas`"),
            ("[1, 2]", "[2, 2]", "2 twice"),
            ("orca", "orcas", "found `orcas`"),
            ("2.5", "-1", "key `gpu[0].price_per_hour`"),
            ("2.5", "nan", "found NaN"),
            ("[8, 16, 32]", "[8.5]", "line 2: expected a grid of deployments"),
        ] {
            let error = read(&GRID.replace(from, to)).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        assert!(read("gpu = []\n").unwrap_err().contains("at least one [[gpu]]"));
    }
}

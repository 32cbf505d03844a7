//! A suite: the cases that `validate` runs, as a TOML file.
//!
//! ```toml
//! [[case]]
//! name = "qwen3-0.6b-graph/conv-q8"
//! real = ["runs/a/conv-q8", "runs/b/conv-q8"]   # repeats of one workload, relative to this file
//! bundle = "h100-sxm5-80gb"                      # a shipped name, or a path
//! model = "qwen3-0.6b"                           # a shipped name, or a config.json
//! engine = "vllm-0.24-graph"                     # a name in the bundle, or a path
//! deployment = { max_num_seqs = 128 }            # overrides what the real run says; optional
//! role = "held_out"                              # or "fit": the engine profile was fitted on it
//! gpu = "a100-sxm4-80gb"                         # predict this GPU from the bundle's; optional
//! host_runs = ["runs/a/short"]                    # runs that pin the speed of the host; optional
//! requests = [4, 5, 6, 7]                        # judge only these; optional
//!
//! [case.tolerance]                                # what `check` allows, over the suite's own [tolerance]; optional
//! ttft.p50 = 8.0                                  # at most 8 % in size
//! itl = { p50 = "band", p99 = { pct = 10.0, or_band = true } }
//! ```

use std::{
    collections::{BTreeSet, HashSet},
    path::{Path, PathBuf},
};

use plumbline_schema::{Deployment, EngineMode, GpuSpec, InputError, Location, ModelSpec, files::read_text};
use serde::{Deserialize, Serialize};

use crate::check::tolerance::{ToleranceMap, Tolerances};

/// Whether a case says anything about cases not seen before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The engine profile has not seen it.
    #[default]
    HeldOut,
    /// The engine profile was fitted on it.
    Fit,
}

impl Role {
    /// Every role, the one that counts first.
    pub const ALL: [Self; 2] = [Self::HeldOut, Self::Fit];

    /// The name in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::HeldOut => "held_out",
            Self::Fit => "fit",
        }
    }

    /// The name in tables.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::HeldOut => "held out",
            Self::Fit => "fitted on",
        }
    }
}

/// Where a case's engine profile is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineRef {
    /// By name in the case's bundle.
    InBundle(String),
    /// A JSON file.
    File(PathBuf),
}

/// Keys of a deployment and the values that replace the real run's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overrides(serde_json::Map<String, serde_json::Value>);

/// One case: real runs, and what to simulate them with.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Unique in the suite.
    pub name: String,
    /// Run folders, repeats of one workload; at least one.
    pub real: Vec<PathBuf>,
    /// The bundle's folder.
    pub bundle: PathBuf,
    /// A shipped model's name or a path, as [`ModelSpec::load`] takes it.
    pub model: String,
    /// The engine profile.
    pub engine: EngineRef,
    /// What replaces the real run's own deployment.
    pub deployment: Overrides,
    /// Fitted on or held out.
    pub role: Role,
    /// The GPU to predict, when not the bundle's own.
    pub gpu: Option<GpuSpec>,
    /// The requests to judge; all when none are named.
    pub requests: Option<BTreeSet<u64>>,
    /// Real runs that say how fast the host is on which the case's real runs were made; empty to take the profile's.
    pub host_runs: Vec<PathBuf>,
    /// How large its errors may be; for `check` alone.
    pub tolerances: Tolerances,
}

/// Cases in the order of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Suite {
    /// The file.
    pub path: PathBuf,
    /// At least one case.
    pub cases: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SuiteFile {
    case: Vec<CaseFile>,
    #[serde(default)]
    tolerance: ToleranceMap,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CaseFile {
    name: String,
    real: Vec<String>,
    bundle: String,
    model: String,
    engine: String,
    #[serde(default)]
    deployment: toml::Table,
    #[serde(default)]
    role: Role,
    gpu: Option<String>,
    requests: Option<BTreeSet<u64>>,
    #[serde(default)]
    host_runs: Vec<String>,
    #[serde(default)]
    tolerance: ToleranceMap,
}

impl Suite {
    /// Reads a suite; bundles given by name are looked for in `data_dir`.
    ///
    /// # Errors
    /// Names the file, the line or key, what was expected and what was found.
    pub fn load(path: &Path, data_dir: &Path) -> Result<Self, InputError> {
        Self::parse(&read_text(path)?, path, data_dir)
    }

    /// Parses the text of a suite; `path` is what errors name and what relative paths start from.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn parse(text: &str, path: &Path, data_dir: &Path) -> Result<Self, InputError> {
        let file: SuiteFile = toml::from_str(text)
            .map_err(|e| InputError::toml(path, "a suite of [[case]] tables", text, &e))?;
        if file.case.is_empty() {
            return Err(InputError::invalid(path, Location::Key("case".into()), "at least one case", "none"));
        }
        let mut names = HashSet::new();
        let mut cases = Vec::with_capacity(file.case.len());
        for (i, case) in file.case.into_iter().enumerate() {
            if case.name.trim().is_empty() {
                let key = Location::Key(format!("case[{i}].name"));
                return Err(InputError::invalid(path, key, "a name", format!("{:?}", case.name)));
            }
            if !names.insert(case.name.clone()) {
                let key = Location::Key(format!("case[{i}].name"));
                let found = format!("{:?} again", case.name);
                return Err(InputError::invalid(path, key, "a name of its own", found));
            }
            cases.push(case.resolve(path, data_dir, &file.tolerance)?);
        }
        Ok(Self { path: path.into(), cases })
    }
}

impl CaseFile {
    fn resolve(self, suite: &Path, data_dir: &Path, tolerance: &ToleranceMap) -> Result<Case, InputError> {
        let name = self.name;
        let invalid = |key: &str, expected: &str, found: String| {
            let location = Location::Key(format!("case {name:?}.{key}"));
            InputError::invalid(suite, location, expected, found)
        };
        if self.real.is_empty() {
            return Err(invalid("real", "at least one run folder", "none".into()));
        }
        if self.requests.as_ref().is_some_and(BTreeSet::is_empty) {
            return Err(invalid("requests", "at least one request id", "none".into()));
        }
        let folder = suite.parent().unwrap_or(Path::new(""));
        let bundle =
            if is_path(&self.bundle) { folder.join(&self.bundle) } else { data_dir.join(&self.bundle) };
        let model = if ModelSpec::shipped_names().contains(&self.model.as_str()) {
            self.model
        } else {
            folder.join(&self.model).to_string_lossy().into_owned()
        };
        let engine = if is_path(&self.engine) || has_json_extension(&self.engine) {
            EngineRef::File(folder.join(&self.engine))
        } else {
            EngineRef::InBundle(self.engine)
        };
        let gpu = match self.gpu {
            None => None,
            Some(gpu) => Some(GpuSpec::by_name(&gpu).ok_or_else(|| {
                let known: Vec<_> = GpuSpec::shipped().into_iter().map(|g| g.name).collect();
                invalid("gpu", &format!("one of {}", known.join(", ")), format!("{gpu:?}"))
            })?),
        };
        let deployment = Overrides::new(self.deployment).map_err(|e| {
            let (key, expected, found) = e;
            invalid(&format!("deployment.{key}"), &expected, found)
        })?;
        let runs = |names: &[String]| names.iter().map(|run| folder.join(run)).collect();
        let (real, host_runs) = (runs(&self.real), runs(&self.host_runs));
        Ok(Case {
            real,
            bundle,
            model,
            engine,
            deployment,
            role: self.role,
            gpu,
            requests: self.requests,
            host_runs,
            // How well a profile fits what it was fitted on says nothing of what it predicts.
            tolerances: Tolerances::new(
                self.tolerance,
                if self.role == Role::Fit { ToleranceMap::new() } else { tolerance.clone() },
            ),
            name,
        })
    }
}

/// A bare word is a name; anything with a separator is a path.
fn is_path(text: &str) -> bool {
    text.contains(['/', '\\'])
}

fn has_json_extension(text: &str) -> bool {
    Path::new(text).extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"))
}

/// `(key, expected, found)`.
pub type KeyError = (String, String, String);

impl Overrides {
    fn new(table: toml::Table) -> Result<Self, KeyError> {
        let mut map = serde_json::Map::new();
        for (key, value) in table {
            let json = serde_json::to_value(value)
                .map_err(|e| (key.clone(), "a value JSON can hold".to_owned(), e.to_string()))?;
            map.insert(key, json);
        }
        let overrides = Self(map);
        // Laid over a valid deployment, whatever is wrong now is the overrides' own doing.
        overrides.apply(&any_deployment())?;
        Ok(overrides)
    }

    /// Reads `KEY=VALUE` assignments, each as a line of TOML; a bare word is taken as text.
    ///
    /// # Errors
    /// `(key, expected, found)` of an assignment that is none, or that no deployment can take.
    pub fn from_assignments<S: AsRef<str>>(assignments: &[S]) -> Result<Self, KeyError> {
        let mut table = toml::Table::new();
        for assignment in assignments.iter().map(AsRef::as_ref) {
            let Some((key, value)) = assignment.split_once('=') else {
                return Err((assignment.to_owned(), "KEY=VALUE".into(), "no `=`".into()));
            };
            let (key, value) = (key.trim(), value.trim());
            let parsed = format!("value = {value}").parse::<toml::Table>();
            let value = parsed.ok().and_then(|mut one| one.remove("value")).unwrap_or_else(|| value.into());
            table.insert(key.to_owned(), value);
        }
        Self::new(table)
    }

    /// Whether nothing is overridden.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The deployment with these keys replaced.
    ///
    /// # Errors
    /// `(key, expected, found)` of a key that no deployment has, or a value it cannot take.
    pub fn apply(&self, base: &Deployment) -> Result<Deployment, (String, String, String)> {
        let bad =
            |key: &str, expected: &str, found: String| Err((key.to_owned(), expected.to_owned(), found));
        let Ok(serde_json::Value::Object(mut whole)) = serde_json::to_value(base) else {
            return bad("", "a deployment", "something else".into());
        };
        for (key, value) in &self.0 {
            if !whole.contains_key(key) {
                let known: Vec<_> = whole.keys().map(String::as_str).collect();
                return bad(key, &format!("one of {}", known.join(", ")), format!("{key:?}"));
            }
            let before = whole.insert(key.clone(), value.clone());
            // Key by key, so that the error is this key's.
            if let Err(e) = serde_json::from_value::<Deployment>(whole.clone().into()) {
                let expected = format!("a value like {}", before.unwrap_or_default());
                return bad(key, &expected, e.to_string());
            }
        }
        let deployment: Deployment = match serde_json::from_value(whole.into()) {
            Ok(deployment) => deployment,
            Err(e) => return bad("", "a deployment", e.to_string()),
        };
        deployment.check().map_err(|(key, expected, found)| (key.to_owned(), expected, found))?;
        Ok(deployment)
    }
}

/// A valid deployment to try overrides on.
fn any_deployment() -> Deployment {
    Deployment {
        mode: EngineMode::Graph,
        model: "model".into(),
        max_num_batched_tokens: 8192,
        max_num_seqs: 256,
        max_model_len: 8192,
        num_gpu_blocks: 8192,
        block_size: 16,
        tensor_parallel_size: 1,
        pipeline_parallel_size: 1,
        enable_prefix_caching: false,
        scheduling_policy: "fcfs".into(),
        long_prefill_token_threshold: 0,
        async_scheduling: false,
        cudagraph_sizes: vec![1, 2, 4, 8],
        cudagraph_mode: plumbline_schema::CudagraphMode::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASE: &str = r#"
[[case]]
name = "one/conv"
real = ["runs/a", "/runs/b"]
bundle = "h100-sxm5-80gb"
model = "qwen3-0.6b"
engine = "vllm-0.24-graph"
"#;

    fn parse(text: &str) -> Result<Suite, String> {
        Suite::parse(text, Path::new("/suites/s.toml"), Path::new("/data")).map_err(|e| e.to_string())
    }

    fn with(lines: &str) -> Result<Suite, String> {
        parse(&format!("{CASE}{lines}\n"))
    }

    #[test]
    fn names_resolve_to_data_and_paths_to_the_suites_folder() {
        let suite = parse(CASE).unwrap();
        let case = &suite.cases[0];
        assert_eq!(case.real, [PathBuf::from("/suites/runs/a"), PathBuf::from("/runs/b")]);
        assert_eq!(case.bundle, PathBuf::from("/data/h100-sxm5-80gb"));
        assert_eq!(case.model, "qwen3-0.6b");
        assert_eq!(case.engine, EngineRef::InBundle("vllm-0.24-graph".into()));
        assert_eq!(case.role, Role::HeldOut);
        assert!(case.deployment.is_empty() && case.gpu.is_none() && case.requests.is_none());

        let text = CASE
            .replace("\"h100-sxm5-80gb\"", "\"../mine\"")
            .replace("\"qwen3-0.6b\"", "\"config.json\"")
            .replace("\"vllm-0.24-graph\"", "\"fitted.json\"");
        let suite = parse(&format!("{text}role = \"fit\"\ngpu = \"a100-sxm4-80gb\"\nrequests = [5, 4]\n"));
        let case = &suite.unwrap().cases[0];
        assert_eq!(case.bundle, PathBuf::from("/suites/../mine"));
        assert_eq!(case.model, "/suites/config.json");
        assert_eq!(case.engine, EngineRef::File("/suites/fitted.json".into()));
        assert_eq!(case.role, Role::Fit);
        assert_eq!(case.gpu.as_ref().unwrap().name, "a100-sxm4-80gb");
        assert_eq!(case.requests, Some(BTreeSet::from([4, 5])));
    }

    #[test]
    fn errors_name_file_line_and_what_was_found() {
        let cases = [
            (with("engin = 1"), "/suites/s.toml, line 8: ", "unknown field `engin`"),
            (with("role = \"fitted\""), "/suites/s.toml, line 8: ", "unknown variant `fitted`"),
            (with("requests = [-1]"), "/suites/s.toml, line 8: ", "-1"),
            (parse(&CASE.replace("model = ", "model ")), "/suites/s.toml, line 6: ", "found"),
            (
                parse(&CASE.replace("real = [\"runs/a\", \"/runs/b\"]", "real = 3")),
                "/suites/s.toml, line 4: ",
                "integer",
            ),
            (
                parse(&CASE.replace("model = \"qwen3-0.6b\"", "")),
                "/suites/s.toml, line 2: ",
                "missing field `model`",
            ),
            (parse(""), "/suites/s.toml", "missing field `case`"),
            (parse("case = []"), "/suites/s.toml, key `case`: ", "found none"),
        ];
        for (result, start, contains) in cases {
            let text = result.unwrap_err();
            assert!(text.starts_with(start) && text.contains(contains), "{text}");
            assert_eq!(text.lines().count(), 1, "{text}");
        }
    }

    #[test]
    fn errors_of_meaning_name_case_and_key() {
        let cases = [
            (
                parse(&CASE.replace("[\"runs/a\", \"/runs/b\"]", "[]")),
                "/suites/s.toml, key `case \"one/conv\".real`: expected at least one run folder, found none",
            ),
            (
                with("gpu = \"v100\""),
                "/suites/s.toml, key `case \"one/conv\".gpu`: expected one of a100-sxm4-80gb, h100-sxm5-80gb, ",
            ),
            (
                parse(&format!("{CASE}{CASE}")),
                "/suites/s.toml, key `case[1].name`: expected a name of its own, found \"one/conv\" again",
            ),
            (
                with("deployment = { max_num_seq = 4 }"),
                "/suites/s.toml, key `case \"one/conv\".deployment.max_num_seq`: expected one of ",
            ),
            (
                with("deployment = { max_num_seqs = \"4\" }"),
                "/suites/s.toml, key `case \"one/conv\".deployment.max_num_seqs`: expected a value like 256, \
                 found invalid type: string \"4\", expected u32",
            ),
            (
                with("deployment = { block_size = 0 }"),
                "/suites/s.toml, key `case \"one/conv\".deployment.block_size`: expected at least 1, found 0",
            ),
            (
                with("requests = []"),
                "/suites/s.toml, key `case \"one/conv\".requests`: expected at least one request id, found none",
            ),
        ];
        for (result, start) in cases {
            let text = result.unwrap_err();
            assert!(text.starts_with(start), "{text}\n{start}");
        }
    }

    #[test]
    fn assignments_are_overrides() {
        let overrides =
            Overrides::from_assignments(&["max_num_seqs=7", "mode = eager", "cudagraph_sizes=[]"]);
        let deployment = overrides.unwrap().apply(&any_deployment()).unwrap();
        assert_eq!((deployment.max_num_seqs, deployment.mode), (7, EngineMode::Eager));
        assert!(deployment.cudagraph_sizes.is_empty());
        let error = |text: &str| Overrides::from_assignments(&[text]).unwrap_err();
        assert_eq!(error("max_num_seqs").1, "KEY=VALUE");
        assert_eq!(error("max_num_seqs=many").0, "max_num_seqs");
        assert_eq!(error("max_num_seqs=0").2, "0");
        assert_eq!(error("seqs=1").0, "seqs");
        assert!(Overrides::from_assignments::<&str>(&[]).unwrap().is_empty());
    }

    #[test]
    fn overrides_replace_only_their_keys() {
        let suite =
            with("deployment = { max_num_seqs = 7, mode = \"eager\", cudagraph_sizes = [] }").unwrap();
        let base = Deployment { num_gpu_blocks: 99, ..any_deployment() };
        let expected =
            Deployment { max_num_seqs: 7, mode: EngineMode::Eager, cudagraph_sizes: vec![], ..base.clone() };
        assert_eq!(suite.cases[0].deployment.apply(&base), Ok(expected));
    }
}

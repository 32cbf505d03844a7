//! What must be the same in a real run and in the simulation that stands for it, setting by setting.
//!
//! A simulation of another model, of half the KV blocks or of another workload can come near a real run by chance;
//! [`settings`] says where it does not even claim to be of the same thing, and where nobody recorded whether it is.

use std::{collections::BTreeSet, fmt::Write as _};

use plumbline_bundles::{Bundle, EngineProfile, bundle::sha256_hex};
use plumbline_schema::{BF16_NAME, Deployment, EngineMode, Environment, ModelSpec, Run, Workload};
use plumbline_simulator::replay::as_served;
use serde::{Deserialize, Serialize};

/// Whether a setting is the same on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Verdict {
    /// Both sides say so.
    #[serde(rename = "match")]
    Match,
    /// Both sides say something, and not the same.
    #[serde(rename = "MISMATCH")]
    Mismatch,
    /// A side does not say.
    #[serde(rename = "unknown")]
    Unknown,
}

impl Verdict {
    /// The name in files and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Match => "match",
            Self::Mismatch => "MISMATCH",
            Self::Unknown => "unknown",
        }
    }
}

/// One setting of both sides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Its name; of a deployment's settings the key in `engine.json`.
    pub setting: String,
    /// Of the real runs, each different value once; none when one of them does not say.
    pub real: Option<String>,
    /// Of the simulation; none when it does not say.
    pub sim: Option<String>,
    /// Whether they agree.
    pub verdict: Verdict,
}

impl Setting {
    /// `num_gpu_blocks: real 38419, simulated 19209`.
    #[must_use]
    pub fn describe(&self) -> String {
        let or_unknown = |value: &Option<String>| value.clone().unwrap_or_else(|| "does not say".into());
        format!("{}: real {}, simulated {}", self.setting, or_unknown(&self.real), or_unknown(&self.sim))
    }
}

/// How many settings have a verdict.
#[must_use]
pub fn count(settings: &[Setting], verdict: Verdict) -> usize {
    settings.iter().filter(|setting| setting.verdict == verdict).count()
}

/// What is known of a simulation that is made of these.
///
/// The driver is that under which the bundle was measured, unless its times are carried over to another GPU.
#[must_use]
pub fn simulated_environment(
    model: &ModelSpec,
    profile: &EngineProfile,
    bundle: &Bundle,
    gpu: &str,
) -> Environment {
    let device = bundle.manifest.device.as_ref().filter(|_| bundle.manifest.gpu.name == gpu);
    Environment {
        model: Some(model.clone()),
        dtype: Some(BF16_NAME.to_owned()),
        engine_version: Some(profile.engine.clone()),
        driver_version: device.and_then(|device| device.driver_version.clone()),
    }
}

/// What runs of this project's own engine call it.
const NATIVE: &str = "native";

/// Compares what the real repeats and the simulated run say of themselves; real repeats that differ from one another
/// match nothing.
///
/// The driver's version is a setting only where a real run records it.
#[must_use]
pub fn settings(real: &[Run], sim: &Run) -> Vec<Setting> {
    let table = Table { real, sim };
    let mut settings = vec![table.model()];
    settings.push(table.text("dtype", dtype));
    for (name, value) in DEPLOYMENT {
        settings.push(table.text(name, |run| run.info.deployment.as_ref().map(value)));
    }
    settings.push(table.row("engine", engine, engines_agree));
    settings.push(table.text("gpu", |run| run.info.gpu.clone()));
    let driver = |run: &Run| run.info.environment.as_ref()?.driver_version.clone();
    if real.iter().any(|run| driver(run).is_some()) {
        settings.push(table.text("driver_version", driver));
    }
    settings.push(table.workload());
    settings
}

/// How a setting of a deployment is told.
type Told = fn(&Deployment) -> String;

/// Settings of a deployment, by their keys there.
const DEPLOYMENT: [(&str, Told); 12] = [
    ("num_gpu_blocks", |d| d.num_gpu_blocks.to_string()),
    ("block_size", |d| d.block_size.to_string()),
    ("max_num_batched_tokens", |d| d.max_num_batched_tokens.to_string()),
    ("max_num_seqs", |d| d.max_num_seqs.to_string()),
    ("max_model_len", |d| d.max_model_len.to_string()),
    ("scheduling_policy", |d| d.scheduling_policy.clone()),
    ("long_prefill_token_threshold", |d| d.long_prefill_token_threshold.to_string()),
    ("parallelism", |d| format!("{} tensor, {} pipeline", d.tensor_parallel_size, d.pipeline_parallel_size)),
    ("mode", mode),
    ("cudagraph_sizes", |d| sizes(&d.cudagraph_sizes)),
    ("enable_prefix_caching", |d| d.enable_prefix_caching.to_string()),
    ("async_scheduling", |d| d.async_scheduling.to_string()),
];

fn dtype(run: &Run) -> Option<String> {
    let recorded = run.info.environment.as_ref().and_then(|environment| environment.dtype.clone());
    // This project's own engine has no other.
    recorded.or_else(|| (run.info.engine == NATIVE).then(|| BF16_NAME.to_owned()))
}

/// In eager mode no graph mode counts, whatever is recorded.
fn mode(deployment: &Deployment) -> String {
    match deployment.mode {
        EngineMode::Eager => "eager".into(),
        EngineMode::Graph => {
            let mode = serde_json::to_value(deployment.cudagraph_mode).unwrap_or_default();
            format!("graph, {}", mode.as_str().unwrap_or_default())
        }
    }
}

/// `1, 2, 4, 8..256 by 8`: steps of equal width in one, so that 51 sizes can be read.
fn sizes(sizes: &[u32]) -> String {
    let mut text = String::new();
    let mut rest = sizes;
    while let [first, tail @ ..] = rest {
        let width = tail.first().map_or(0, |next| next.saturating_sub(*first));
        let run = 1 + rest.windows(2).take_while(|pair| pair[1].saturating_sub(pair[0]) == width).count();
        if !text.is_empty() {
            text.push_str(", ");
        }
        // Fewer than four are shorter one by one; of three, the last may begin the next run.
        let taken = if run >= 4 {
            let _ = write!(text, "{first}..{} by {width}", rest[run - 1]);
            run
        } else {
            let _ = write!(text, "{first}");
            1
        };
        rest = &rest[taken..];
    }
    if text.is_empty() { "none".into() } else { text }
}

fn engine(run: &Run) -> Option<String> {
    let recorded = run.info.environment.as_ref().and_then(|e| e.engine_version.clone());
    recorded.or_else(|| Some(run.info.engine.clone()).filter(|engine| !engine.is_empty()))
}

/// Whether two engines are the same: `vllm-0.24.0-graph` is a `vllm-0.24`; whether a `vllm` is, is not known.
fn engines_agree(a: &str, b: &str) -> Option<bool> {
    if a == b {
        return Some(true);
    }
    let parts = |text: &str| {
        let text = text.to_ascii_lowercase();
        let family: String = text.chars().take_while(char::is_ascii_alphabetic).collect();
        let version: String = text[family.len()..]
            .chars()
            .skip_while(|c| !c.is_ascii_digit())
            .take_while(|c| c.is_ascii_digit() || *c == '.')
            .collect();
        let version: Vec<String> =
            version.split('.').filter(|part| !part.is_empty()).map(str::to_owned).collect();
        (family, version)
    };
    let ((family_a, version_a), (family_b, version_b)) = (parts(a), parts(b));
    if family_a != family_b {
        return Some(false);
    }
    if version_a.is_empty() || version_b.is_empty() {
        return None;
    }
    Some(version_a.iter().zip(&version_b).all(|(x, y)| x == y))
}

/// Both sides.
struct Table<'a> {
    real: &'a [Run],
    sim: &'a Run,
}

impl Table<'_> {
    /// A setting that is the same where its texts are.
    fn text(&self, setting: &str, value: impl Fn(&Run) -> Option<String>) -> Setting {
        self.row(setting, value, |a, b| Some(a == b))
    }

    /// A setting whose values `agree` compares; it says `None` where they do not tell.
    fn row(
        &self,
        setting: &str,
        value: impl Fn(&Run) -> Option<String>,
        agree: impl Fn(&str, &str) -> Option<bool>,
    ) -> Setting {
        let real: Option<Vec<String>> = self.real.iter().map(&value).collect();
        let sim = value(self.sim);
        let verdict = match (&real, &sim) {
            (Some(real), Some(sim)) => all_agree(real.iter().map(|real| agree(real, sim))),
            _ => Verdict::Unknown,
        };
        Setting { setting: setting.into(), real: real.map(distinct), sim, verdict }
    }

    fn model(&self) -> Setting {
        let models: Vec<Model> = self.real.iter().map(Model::of).collect();
        let sim = Model::of(self.sim);
        let verdict = all_agree(models.iter().map(|real| real.agrees(&sim)));
        let real: Option<Vec<String>> = models.iter().map(Model::text).collect();
        Setting { setting: "model".into(), real: real.map(distinct), sim: sim.text(), verdict }
    }

    fn workload(&self) -> Setting {
        let served: Vec<Served> = self.real.iter().map(Served::of).collect();
        let sim = Served::of(self.sim);
        let verdict = all_agree(served.iter().map(|real| real.agrees(&sim)));
        Setting {
            setting: "workload_digest".into(),
            real: Some(distinct(served.into_iter().map(|s| s.digest).collect())),
            sim: Some(sim.digest),
            verdict,
        }
    }
}

/// One that differs decides; else one that does not tell.
fn all_agree(agreements: impl Iterator<Item = Option<bool>>) -> Verdict {
    let mut verdict = Verdict::Match;
    for agrees in agreements {
        match agrees {
            Some(false) => return Verdict::Mismatch,
            None => verdict = Verdict::Unknown,
            Some(true) => {}
        }
    }
    verdict
}

/// Each value once, in order.
fn distinct(values: Vec<String>) -> String {
    let mut seen = BTreeSet::new();
    let values: Vec<String> = values.into_iter().filter(|value| seen.insert(value.clone())).collect();
    values.join(" / ")
}

/// What a run says of its model.
struct Model {
    /// `Qwen/Qwen3-0.6B` is a `qwen3-0.6b`.
    name: Option<String>,
    /// As recorded, or of the shipped model of this name.
    spec: Option<ModelSpec>,
}

impl Model {
    fn of(run: &Run) -> Self {
        let recorded = run.info.environment.as_ref().and_then(|e| e.model.clone());
        let given = recorded.as_ref().map(|spec| &spec.name);
        let given = given.or_else(|| run.info.deployment.as_ref().map(|d| &d.model));
        let name = given.map(|name| name.rsplit('/').next().unwrap_or_default().to_ascii_lowercase());
        let shipped = || {
            let name = name.as_deref().filter(|name| ModelSpec::shipped_names().contains(name))?;
            ModelSpec::load(name).ok()
        };
        let spec = recorded.or_else(shipped);
        Self { name, spec }
    }

    /// By shape where both are known, else by name; another name may be another name of the same.
    fn agrees(&self, other: &Self) -> Option<bool> {
        if let (Some(a), Some(b)) = (&self.spec, &other.spec) {
            // Positions are what a config allows, not what a step computes; names are free.
            let shape =
                |spec: &ModelSpec| ModelSpec { name: String::new(), max_positions: 0, ..spec.clone() };
            return Some(shape(a) == shape(b));
        }
        (self.name.is_some() && self.name == other.name).then_some(true)
    }

    fn text(&self) -> Option<String> {
        let name = self.name.clone()?;
        let Some(spec) = &self.spec else { return Some(name) };
        Some(format!(
            "{name} ({} layers, hidden {}, heads {}/{} of {}, intermediate {}, vocabulary {})",
            spec.num_layers,
            spec.hidden_size,
            spec.num_q_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.intermediate_size,
            spec.vocab_size
        ))
    }
}

/// The workload of a run: what its files show, and what only a digest tells.
struct Served {
    /// SHA-256, hex, of the requests as served.
    digest: String,
    /// The recorded digest.
    recorded: Option<String>,
    /// Whether the recorded digest is of more than the run's files show: priorities, shared prompts.
    hides_content: bool,
}

impl Served {
    fn of(run: &Run) -> Self {
        let digest_of = |workload: &Workload| sha256_hex(workload.canonical_text().as_bytes());
        let mut served = as_served(run, run.workload());
        let recorded = run.info.workload_digest.clone();
        let hides_content = recorded
            .as_ref()
            .is_some_and(|of| *of != digest_of(&served) && *of != digest_of(&run.workload()));
        // Files may order requests that arrive together as they like.
        served.requests.sort_by_key(|r| (r.arrival_time_ns, r.request_id));
        Self { digest: digest_of(&served), recorded, hides_content }
    }

    fn agrees(&self, other: &Self) -> Option<bool> {
        if self.digest != other.digest {
            return Some(false);
        }
        let is_recorded = self.recorded.is_some() && self.recorded == other.recorded;
        (is_recorded || !(self.hides_content || other.hides_content)).then_some(true)
    }
}

#[cfg(test)]
mod tests;

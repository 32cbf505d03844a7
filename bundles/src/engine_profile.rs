//! `engines/<name>.json`: how one engine spends what a machine can do.

use std::{collections::BTreeMap, path::Path};

use plumbline_schema::{
    HostFactorBasis, HostFactorUsed, HostInfo, InputError,
    files::{read_text, write_json},
};
use serde::{Deserialize, Serialize};

use crate::error::{CheckError, check_non_negative, check_positive};

/// Most quantiles of a residual distribution: one per mille.
pub const MAX_RESIDUAL_QUANTILES: usize = 1001;

/// Factors on operator times stay inside this range; further off, the operator is not the one measured.
pub const OPERATOR_SCALE_RANGE: std::ops::RangeInclusive<f64> = 0.2..=5.0;

/// How a step's kernels reach the GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dispatch {
    /// A call per kernel.
    Eager,
    /// Captured pieces between the attention launches.
    PiecewiseGraph,
    /// One captured graph.
    FullGraph,
}

impl Dispatch {
    /// Every dispatch.
    pub const ALL: [Self; 3] = [Self::Eager, Self::PiecewiseGraph, Self::FullGraph];

    /// The name in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Eager => "eager",
            Self::PiecewiseGraph => "piecewise_graph",
            Self::FullGraph => "full_graph",
        }
    }
}

/// A host cost that grows with the batch: `constant + per_seq * num_seqs + per_token * num_tokens`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostCost {
    /// Per step, ns.
    pub constant_ns: f64,
    /// Per sequence of the batch, ns.
    pub per_seq_ns: f64,
    /// Per token of the batch (unpadded), ns.
    pub per_token_ns: f64,
}

impl HostCost {
    fn check(&self) -> Result<(), CheckError> {
        check_non_negative("constant_ns", self.constant_ns)?;
        check_non_negative("per_seq_ns", self.per_seq_ns)?;
        check_non_negative("per_token_ns", self.per_token_ns)
    }

    /// The cost of a batch, ns.
    #[must_use]
    #[inline]
    pub fn at(&self, num_seqs: u32, num_tokens: u32) -> f64 {
        self.constant_ns + self.per_seq_ns * f64::from(num_seqs) + self.per_token_ns * f64::from(num_tokens)
    }
}

/// Costs of a step under one dispatch, at host factor 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DispatchCosts {
    /// Host work before the first kernel: scheduling, preparing inputs.
    pub host_pre: HostCost,
    /// Host work after the last kernel: reading tokens, updating requests.
    pub host_post: HostCost,
    /// Host time per launch, ns; the launches are the forward pass's kernels (eager), two per layer
    /// (piecewise: a captured piece and attention) or one (full graph).
    pub launch_ns: f64,
    /// Added to launching per sequence of the batch, ns.
    pub launch_per_seq_ns: f64,
    /// Added to launching in the first step after an idle gap, ns: the host wakes up while the GPU may be at work.
    pub after_idle_ns: f64,
    /// Quantiles, evenly spaced from 0 to 1, of real over predicted host time on the critical path (what is not the
    /// GPU's); empty for none. The host is what varies, so a step that waits for the GPU scatters little.
    pub residual_quantiles: Vec<f64>,
}

impl DispatchCosts {
    fn check(&self) -> Result<(), CheckError> {
        self.host_pre.check().map_err(|e| e.under("host_pre"))?;
        self.host_post.check().map_err(|e| e.under("host_post"))?;
        check_non_negative("launch_ns", self.launch_ns)?;
        check_non_negative("launch_per_seq_ns", self.launch_per_seq_ns)?;
        check_non_negative("after_idle_ns", self.after_idle_ns)?;
        let quantiles = &self.residual_quantiles;
        // A single quantile spans no distribution.
        if quantiles.len() == 1 || quantiles.len() > MAX_RESIDUAL_QUANTILES {
            let expected = format!("none, or 2 to {MAX_RESIDUAL_QUANTILES} quantiles");
            return Err(CheckError::new("residual_quantiles", expected, quantiles.len()));
        }
        for (i, &value) in quantiles.iter().enumerate() {
            let key = format!("residual_quantiles[{i}]");
            check_positive(&key, value)?;
            if i > 0 && value < quantiles[i - 1] {
                return Err(CheckError::new(
                    key,
                    format!("at least {}, the one before", quantiles[i - 1]),
                    value,
                ));
            }
        }
        Ok(())
    }
}

/// What the client and the engine's front do outside of steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientCosts {
    /// Taking in one request, ns.
    pub admit_ns: f64,
    /// Taking in one prompt token, ns.
    pub admit_per_token_ns: f64,
    /// Between the end of a step and the start of the next.
    pub between_steps: HostCost,
}

impl ClientCosts {
    fn check(&self) -> Result<(), CheckError> {
        check_non_negative("admit_ns", self.admit_ns)?;
        check_non_negative("admit_per_token_ns", self.admit_per_token_ns)?;
        self.between_steps.check().map_err(|e| e.under("between_steps"))
    }
}

/// Factors on predicted operator times: an engine's kernels are not the profiler's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatorScales {
    /// Matrix products of batches with a prefill chunk.
    pub prefill_gemm: f64,
    /// Matrix products of decode-only batches, which read weights and compute little.
    pub decode_gemm: f64,
    /// Attention of prefill chunks (and of mixed batches).
    pub prefill_attention: f64,
    /// Attention of decode-only batches.
    pub decode_attention: f64,
    /// Everything else.
    pub other: f64,
}

impl Default for OperatorScales {
    fn default() -> Self {
        Self {
            prefill_gemm: 1.0,
            decode_gemm: 1.0,
            prefill_attention: 1.0,
            decode_attention: 1.0,
            other: 1.0,
        }
    }
}

impl OperatorScales {
    fn check(&self) -> Result<(), CheckError> {
        for (key, value) in [
            ("prefill_gemm", self.prefill_gemm),
            ("decode_gemm", self.decode_gemm),
            ("prefill_attention", self.prefill_attention),
            ("decode_attention", self.decode_attention),
            ("other", self.other),
        ] {
            if !OPERATOR_SCALE_RANGE.contains(&value) {
                let (low, high) = (OPERATOR_SCALE_RANGE.start(), OPERATOR_SCALE_RANGE.end());
                return Err(CheckError::new(key, format!("a factor from {low} to {high}"), value));
            }
        }
        Ok(())
    }
}

/// What a profile was fitted on, so that it can tell when it does not apply.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FittedOn {
    /// GPU of the real runs.
    pub gpu: String,
    /// GPU of the bundle whose operator times were used; differs from `gpu` when transferred.
    pub bundle_gpu: String,
    /// SHA-256 over the digests of the bundle's predictors, hex: with other predictors, calibrate anew.
    pub predictors_digest: String,
    /// Names of the runs fitted on.
    pub runs: Vec<String>,
    /// Number of steps fitted on, by dispatch name.
    pub num_steps: BTreeMap<String, u64>,
    /// Median absolute error of the steps fitted on, 0..1, by dispatch name.
    pub step_error: BTreeMap<String, f64>,
    /// Parameters the runs could not pin, left at their prior.
    pub not_identified: Vec<String>,
    /// 90 % intervals of the fitted parameters, by bootstrap over the runs and stretches of their steps; empty in profiles
    /// that were fitted without.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub intervals: BTreeMap<String, [f64; 2]>,
    /// The engine and its version that the runs record; `None` when none does. Another version may spend its host otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_version: Option<String>,
    /// The driver's version that the runs record; `None` when none does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver_version: Option<String>,
    /// Runs on another machine that `host_factor` alone was fitted on afterwards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_factor_runs: Vec<String>,
    /// Share of the runs' steps left out because the host was disturbed, 0..1.
    pub disturbed_share: f64,
    /// Host factors of the hosts fitted on, by name; the costs are stated for the one at 1.
    pub host_factors: BTreeMap<String, f64>,
    /// The host that the costs are stated for; `None` when the runs did not record it and no one named it, and the
    /// profile can then not be told for another host by scores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostInfo>,
}

/// How one engine spends a machine: scheduler, dispatch and host costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineProfile {
    /// The profile's name: `vllm-0.24-graph`.
    pub name: String,
    /// The engine and its version: `vllm 0.24.0`.
    pub engine: String,
    /// The scheduler's name: `vllm-v1`.
    pub scheduler: String,
    /// Costs by dispatch; a step of a dispatch that is missing is an error.
    pub dispatch: BTreeMap<Dispatch, DispatchCosts>,
    /// The scheduler's part of `host_pre`, the same in every dispatch: the yardstick by which another host's speed is
    /// told. Zero when the runs fitted on do not record it.
    pub schedule: HostCost,
    /// Outside of steps.
    pub client: ClientCosts,
    /// Factors on operator times.
    pub operator_scales: OperatorScales,
    /// An idle gap at least this long makes the next step an after-idle one, ns.
    pub idle_threshold_ns: f64,
    /// This host's speed against the one fitted on: host costs are multiplied by it.
    pub host_factor: f64,
    /// What it was fitted on.
    pub fitted_on: FittedOn,
}

impl EngineProfile {
    /// Reads a profile from a JSON file.
    ///
    /// # Errors
    /// `Io`, or `Invalid` with the line or key.
    pub fn read(path: &Path) -> Result<Self, InputError> {
        Self::parse(&read_text(path)?, path)
    }

    /// Parses the text of a profile; `path` is what errors name.
    ///
    /// # Errors
    /// `Invalid` with the line or key.
    pub fn parse(text: &str, path: &Path) -> Result<Self, InputError> {
        let profile: Self =
            serde_json::from_str(text).map_err(|e| InputError::json(path, "an engine profile", &e))?;
        profile.check().map_err(|e| e.at(path))?;
        Ok(profile)
    }

    /// Writes the profile as JSON, atomically.
    ///
    /// # Errors
    /// `Invalid` when the profile does not pass its own check, or `Io`.
    pub fn write(&self, path: &Path) -> Result<(), InputError> {
        self.check().map_err(|e| e.at(path))?;
        write_json(path, self)
    }

    /// Checks that a simulation can rely on every number.
    ///
    /// # Errors
    /// Names the key.
    pub fn check(&self) -> Result<(), CheckError> {
        let name_fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if self.name.is_empty() || self.name.starts_with('.') || !self.name.chars().all(name_fits) {
            let expected = "letters, digits, `.`, `_` and `-`, as it names a file";
            return Err(CheckError::new("name", expected, format!("`{}`", self.name)));
        }
        if self.dispatch.is_empty() {
            let names: Vec<_> = Dispatch::ALL.iter().map(|d| d.name()).collect();
            return Err(CheckError::new("dispatch", format!("one of {} at least", names.join(", ")), "none"));
        }
        for (dispatch, costs) in &self.dispatch {
            costs.check().map_err(|e| e.under(&format!("dispatch.{}", dispatch.name())))?;
        }
        self.schedule.check().map_err(|e| e.under("schedule"))?;
        self.client.check().map_err(|e| e.under("client"))?;
        self.operator_scales.check().map_err(|e| e.under("operator_scales"))?;
        check_non_negative("idle_threshold_ns", self.idle_threshold_ns)?;
        check_positive("host_factor", self.host_factor)?;
        for (name, &error) in &self.fitted_on.step_error {
            check_non_negative(&format!("fitted_on.step_error.{name}"), error)?;
        }
        match &self.fitted_on.host {
            Some(host) => check_positive("fitted_on.host.single_thread_score", host.single_thread_score),
            None => Ok(()),
        }
    }

    /// The profile as it would be on another host, by the two hosts' scores, and what was done.
    ///
    /// Every host cost is multiplied by `host_factor`, which becomes `host_factor x fitted score / target score`: a
    /// host with half the score takes twice the time. That a host's work scales with its single-thread score is an
    /// assumption, as an engine's host part is one thread's work in the main. A profile that does not know its host
    /// is returned as it is.
    #[must_use]
    pub fn on_host(&self, target: &HostInfo) -> (Self, HostFactorUsed) {
        let fitted_score = self.fitted_on.host.as_ref().map(|host| host.single_thread_score);
        let (factor, basis) = match fitted_score {
            Some(score) => (self.host_factor * (score / target.single_thread_score), HostFactorBasis::Scores),
            None => (self.host_factor, HostFactorBasis::FittedHostUnknown),
        };
        let used = HostFactorUsed { factor, basis, fitted_score, num_steps: None };
        (Self { host_factor: factor, ..self.clone() }, used)
    }
}

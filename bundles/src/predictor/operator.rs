//! What was learned about one operator: a file of a bundle.

use std::path::Path;

use plumbline_schema::{GpuSpec, InputError, Operator, OperatorShape, roofline::floor_ns};
use serde::{Deserialize, Serialize};

use super::{Domain, Provenance, TransferredFrom, domain::Place};
use crate::{
    bundle::predictor_name,
    error::BundleError,
    features::{
        Row, feature_names, features, features_and_parts, joined, part_names, part_norm, parts_ns,
        shape_values,
    },
    forest::Forest,
};

/// Absolute percentage errors on held-out shapes, as 0..1 ratios.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ErrorSummary {
    /// Held-out samples.
    pub n: u32,
    /// Mean of `|predicted / measured - 1|`.
    pub mean: f64,
    /// Its median.
    pub p50: f64,
    /// Its 90th percentile.
    pub p90: f64,
    /// Its 99th percentile; 0 in files from before it was told.
    #[serde(default)]
    pub p99: f64,
    /// Its largest.
    pub max: f64,
    /// Mean of `predicted / measured - 1`, signed.
    pub bias: f64,
}

/// Errors on held-out shapes under three ways of holding out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeldOutError {
    /// Shapes dealt at random into folds; all samples of a shape lie in one fold.
    pub shuffled: ErrorSummary,
    /// Folds are runs of neighbouring shapes, so each is predicted across a gap or beyond an edge.
    pub blocked: ErrorSummary,
    /// Whole layouts held out, of which only shapes that the remaining layouts surround are judged: what a model gets
    /// that was not measured. `None` when there are too few layouts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layouts: Option<ErrorSummary>,
}

/// A range of `measured / predicted`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RatioRange {
    /// Lower end, above 0 and at most 1.
    pub low: f64,
    /// Upper end, at least 1.
    pub high: f64,
}

/// Quantiles of `measured / predicted` on held-out shapes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Share of held-out samples inside the range, 0..1.
    pub coverage: f64,
    /// For interpolated times: from the shuffled folds.
    pub interpolated: RatioRange,
    /// For extrapolated and transferred times: from the blocked folds and all layouts held out.
    pub extrapolated: RatioRange,
    /// For interpolated times of a layout that was not measured; `None` when there are too few layouts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unseen_layout: Option<RatioRange>,
}

/// One roofline part of the baseline with its coefficient.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaselinePart {
    /// Name, one of the operator's [`part_names`].
    pub name: String,
    /// Factor on the part's roofline time, at least 0; its inverse is the efficiency reached.
    pub coefficient: f64,
}

/// How a forest was grown.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HyperParameters {
    /// Trees of the forest.
    pub num_trees: u32,
    /// Deepest level of a tree.
    pub max_depth: u32,
    /// Fewest samples of a leaf.
    pub min_samples_leaf: u32,
    /// Features tried at each split.
    pub max_features: u32,
    /// Whether samples of all matrix products were used; they are the same library call, so always for these.
    pub pooled: bool,
    /// Whether what the forest leaves is interpolated between measured neighbours of a layout.
    pub interpolates_residuals: bool,
    /// Share of the forest's answer where neighbours of the layout were measured, 0..=1: the neighbours' interpolated
    /// ratio makes up for the rest, so at 0 they alone count. 1 where residuals are not interpolated, and in files of
    /// formats before 1.2.
    #[serde(default = "whole")]
    pub forest_share: f64,
    /// Whether the baseline has parts that step from wave to wave of thread blocks; those of formats before 1.2 have.
    #[serde(default = "yes")]
    pub has_steps: bool,
}

const fn whole() -> f64 {
    1.0
}

const fn yes() -> bool {
    true
}

/// What was learned about one operator: a file `predictors/<operator>.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatorPredictor {
    /// Which operator.
    pub operator: Operator,
    /// Names of the forest's features; must be [`feature_names`] of the operator.
    pub features: Vec<String>,
    /// Fixed cost of a launch, ns, above 0.
    pub overhead_ns: f64,
    /// Roofline parts of the baseline, in the order of [`part_names`].
    pub parts: Vec<BaselinePart>,
    /// Predicts `ln(time / baseline)`.
    pub forest: Forest,
    /// What was measured.
    pub domain: Domain,
    /// Errors on held-out shapes.
    pub error: HeldOutError,
    /// Spread of held-out shapes around their predictions.
    pub interval: Interval,
    /// Digest of the samples trained on: `sha256:` and 64 hexadecimal digits.
    pub samples_digest: String,
    /// Seed of the forest.
    pub seed: u64,
    /// How the forest was grown.
    pub hyper_parameters: HyperParameters,
    /// Set when it was not this bundle's GPU that was measured: all answers are tagged as transferred then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transferred_from: Option<TransferredFrom>,
}

impl OperatorPredictor {
    /// Checks everything a prediction relies on; call it on anything read from a file.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self) -> Result<(), String> {
        if self.features != feature_names(self.operator) {
            return Err(format!(
                "features {:?}, expected {:?}: train again with this version",
                self.features,
                feature_names(self.operator)
            ));
        }
        if !self.parts.iter().map(|part| part.name.as_str()).eq(part_names(self.operator).iter().copied()) {
            let names: Vec<_> = self.parts.iter().map(|part| part.name.as_str()).collect();
            return Err(format!("baseline parts {names:?}, expected {:?}", part_names(self.operator)));
        }
        let positive = |x: f64| x.is_finite() && x > 0.0;
        if !positive(self.overhead_ns) {
            return Err(format!("overhead_ns = {}, expected above 0", self.overhead_ns));
        }
        if let Some(part) =
            self.parts.iter().find(|part| !(part.coefficient >= 0.0 && part.coefficient < 1e9))
        {
            return Err(format!("coefficient {} of baseline part {}", part.coefficient, part.name));
        }
        if self.forest.num_features != self.features.len() {
            return Err(format!("a forest of {} features", self.forest.num_features));
        }
        self.forest.check()?;
        self.domain.check(self.operator)?;
        let share = self.hyper_parameters.forest_share;
        if !(0.0..=1.0).contains(&share) {
            return Err(format!("forest_share = {share}, expected 0 to 1"));
        }
        self.transferred_from.as_ref().map_or(Ok(()), TransferredFrom::check)?;
        let Interval { interpolated, extrapolated, unseen_layout, .. } = self.interval;
        for range in [interpolated, extrapolated].into_iter().chain(unseen_layout) {
            if !(range.low > 0.0 && range.low <= 1.0 && range.high >= 1.0 && range.high.is_finite()) {
                return Err(format!("interval {}..{}, expected one around 1", range.low, range.high));
            }
        }
        Ok(())
    }

    /// The predictor as its file holds it: on one line, as indenting trees would triple their size.
    ///
    /// # Errors
    /// `Input` when JSON cannot hold it.
    pub fn to_json(&self) -> Result<Vec<u8>, BundleError> {
        let name = predictor_name(self.operator);
        let mut bytes = serde_json::to_vec(self)
            .map_err(|e| InputError::json(Path::new(&name), "a value that JSON can hold", &e))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Overhead and roofline parts of a shape on a GPU, ns; the forest's ratio is to this.
    #[must_use]
    pub fn baseline_ns(&self, shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
        self.joined_ns(&parts_ns(shape, gpu))
    }

    /// The baseline of roofline parts.
    fn joined_ns(&self, parts_ns: &Row<f64>) -> f64 {
        let weighted = self.parts.iter().zip(parts_ns.as_slice()).map(|(part, ns)| part.coefficient * ns);
        self.overhead_ns + joined(weighted, part_norm(self.operator))
    }

    /// Modelled time in ns of a shape on the GPU whose samples were trained on, whatever its domain.
    ///
    /// Not under the physical floor. The shape must be this operator's and not empty; see [`Predictors::predict`](super::Predictors::predict).
    #[must_use]
    pub fn predict(&self, shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
        self.predict_by(shape, gpu, floor_ns(shape, gpu), |row| self.forest.predict(row))
    }

    /// Where the time of a shape comes from that lies at a place of the domain, and its interval.
    pub(super) fn interval_at(&self, place: Place) -> (Provenance, RatioRange) {
        let Interval { interpolated, extrapolated, unseen_layout, .. } = self.interval;
        match place {
            _ if self.transferred_from.is_some() => (Provenance::Transferred, extrapolated),
            Place::Outside => (Provenance::Extrapolated, extrapolated),
            Place::SurroundedLayout => (Provenance::Interpolated, unseen_layout.unwrap_or(extrapolated)),
            Place::Measured(_) | Place::MeasuredLayout => (Provenance::Interpolated, interpolated),
        }
    }

    /// [`Self::predict`] with a forest that answers as this one does.
    ///
    /// The ratio comes from the GPU that was measured, the baseline and [`floor_ns`] are of `gpu`.
    pub(super) fn predict_by(
        &self,
        shape: &OperatorShape,
        gpu: &GpuSpec,
        floor_ns: f64,
        forest: impl Fn(&[f32]) -> f64,
    ) -> f64 {
        let (ln_ratio, baseline_ns) = match &self.transferred_from {
            Some(from) => (self.ln_ratio_by(shape, &from.gpu, forest), self.baseline_ns(shape, gpu)),
            None => match features_and_parts(shape, gpu, self.overhead_ns) {
                Some((row, parts_ns)) => {
                    (self.ln_ratio_of(shape, || forest(row.as_slice())), self.joined_ns(&parts_ns))
                }
                None => (self.ln_ratio_by(shape, gpu, forest), self.baseline_ns(shape, gpu)),
            },
        };
        (baseline_ns * self.ratio(ln_ratio)).max(floor_ns)
    }

    /// Time over baseline, by what [`Self::ln_ratio`] is on the GPU that was measured.
    pub(super) fn ratio(&self, ln_ratio: f64) -> f64 {
        self.transferred_from.as_ref().map_or(ln_ratio, |from| from.ratio_share * ln_ratio).exp()
    }

    /// What is left of a ratio at a batch that may lie beyond all that was measured.
    pub(super) fn faded(&self, ln_ratio: f64, values: &[u64]) -> f64 {
        ln_ratio / (1.0 + self.domain.ln_beyond(self.operator, values) / FADE_LN)
    }

    /// The launch overhead that the forest's features are relative to.
    pub(super) fn measured_overhead_ns(&self) -> f64 {
        self.transferred_from.as_ref().map_or(self.overhead_ns, |from| from.overhead_ns)
    }

    /// `ln(time / baseline)` on the GPU that was measured.
    ///
    /// What neighbours of the layout say fades beyond its edge, where the forest knows of other layouts; and beyond all
    /// that was measured the whole ratio fades, as there the baseline's law is the better guess.
    #[must_use]
    pub fn ln_ratio(&self, shape: &OperatorShape, measured: &GpuSpec) -> f64 {
        self.ln_ratio_by(shape, measured, |row| self.forest.predict(row))
    }

    fn ln_ratio_by(&self, shape: &OperatorShape, measured: &GpuSpec, forest: impl Fn(&[f32]) -> f64) -> f64 {
        let overhead_ns = self.measured_overhead_ns();
        self.ln_ratio_of(shape, || forest(features(shape, measured, overhead_ns).as_slice()))
    }

    /// [`Self::ln_ratio`] by the forest's answer, which not every shape needs.
    fn ln_ratio_of(&self, shape: &OperatorShape, of_forest: impl Fn() -> f64) -> f64 {
        let Some(values) = shape_values(self.operator, shape) else { return of_forest() };
        let values = values.as_slice();
        let share = self.hyper_parameters.forest_share;
        let ln_ratio = match self.domain.residual_near(self.operator, values) {
            Some((residual, ln_beyond)) if ln_beyond > 0.0 => {
                let (of_forest, near) = (of_forest(), 1.0 / (1.0 + ln_beyond / FADE_LN));
                near * (share * of_forest + residual) + (1.0 - near) * of_forest
            }
            Some((residual, _)) if share > 0.0 => share * of_forest() + residual,
            Some((residual, _)) => residual,
            None => of_forest(),
        };
        self.faded(ln_ratio, values)
    }
}

/// Beyond what was measured a ratio halves within this logarithm: a factor of 1.8 in a number of the batch.
///
/// Of 0.5, 0.7, 1 and 2 it errs least on blocks held out of A100 tables at their edges.
const FADE_LN: f64 = 0.6;

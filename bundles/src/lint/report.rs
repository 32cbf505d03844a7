//! What a lint finds.

use std::collections::BTreeMap;

use plumbline_schema::Operator;
use serde::Serialize;

use super::{Grade, ModelCoverage, Reason};

/// How much a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Worth knowing; costs no grade.
    Info,
    /// Doubtful or missing; costs a grade as the rule says.
    Warning,
    /// Cannot be true; the grade is F.
    Error,
}

impl Severity {
    /// The name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// A time under the physical floor.
    BelowFloor,
    /// A rate above the ceiling that the same run measured.
    AboveCeiling,
    /// A point far off its neighbours along the batch.
    Spike,
    /// More work in less time.
    NonMonotone,
    /// One shape measured several times with different results.
    RepeatsDisagree,
    /// A clock or power that the stated GPU cannot have.
    ImpossibleReading,
    /// Readings of two machines or two runs in one bundle.
    MixedReadings,
    /// A point whose time by events is not that of the GPU's own records.
    CrossCheck,
    /// A kernel that does not run on the stated GPU.
    ForeignKernel,
    /// The device is not the GPU whose data sheet is used.
    DeviceMismatch,
    /// The data sheet is not the shipped one of its name.
    AlteredDataSheet,
    /// No samples.
    NoSamples,
    /// No predictors.
    NoPredictors,
    /// No device, no evidence, no readings in it, or no digest of what was trained on.
    MissingEvidence,
    /// No rates that the run itself measured.
    MissingCeilings,
    /// No host costs.
    MissingHostCosts,
    /// Predictors of other samples than the bundle's.
    OtherSamples,
    /// Predictors of samples whose cache state is not a model's.
    OtherCacheState,
    /// Samples that the predictors have not seen.
    UnseenSamples,
    /// An engine profile fitted with other predictors.
    OtherPredictors,
    /// An engine profile of another GPU's runs.
    OtherGpu,
    /// Layouts of an operator measured over different ranges or numbers of points.
    RaggedGrid,
    /// A wide gap between neighbouring sizes.
    Hole,
    /// Layouts measured at one size only.
    SinglePoint,
    /// Repeated measurements without any scatter.
    ZeroSpread,
    /// The same statistics in several rows.
    RepeatedStatistics,
    /// One time for every size.
    ConstantTimes,
    /// One clock or power throughout.
    ConstantReading,
    /// Points measured at clocks held down by the power cap.
    Throttled,
    /// Points that something disturbed: heat, clocks that moved, two modes, noise, too little time.
    Disturbed,
    /// Points of too few samples.
    FewSamples,
    /// Points planned but not measured.
    Incomplete,
    /// Shapes that a model's steps ask for and that would be refused.
    Refused,
    /// A model whose coverage could not be judged.
    UnjudgedModel,
}

impl Rule {
    /// The name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::BelowFloor => "below_floor",
            Self::AboveCeiling => "above_ceiling",
            Self::Spike => "spike",
            Self::NonMonotone => "non_monotone",
            Self::RepeatsDisagree => "repeats_disagree",
            Self::ImpossibleReading => "impossible_reading",
            Self::MixedReadings => "mixed_readings",
            Self::CrossCheck => "cross_check",
            Self::ForeignKernel => "foreign_kernel",
            Self::DeviceMismatch => "device_mismatch",
            Self::AlteredDataSheet => "altered_data_sheet",
            Self::NoSamples => "no_samples",
            Self::NoPredictors => "no_predictors",
            Self::MissingEvidence => "missing_evidence",
            Self::MissingCeilings => "missing_ceilings",
            Self::MissingHostCosts => "missing_host_costs",
            Self::OtherSamples => "other_samples",
            Self::OtherCacheState => "other_cache_state",
            Self::UnseenSamples => "unseen_samples",
            Self::OtherPredictors => "other_predictors",
            Self::OtherGpu => "other_gpu",
            Self::RaggedGrid => "ragged_grid",
            Self::Hole => "hole",
            Self::SinglePoint => "single_point",
            Self::ZeroSpread => "zero_spread",
            Self::RepeatedStatistics => "repeated_statistics",
            Self::ConstantTimes => "constant_times",
            Self::ConstantReading => "constant_reading",
            Self::Throttled => "throttled",
            Self::Disturbed => "disturbed",
            Self::FewSamples => "few_samples",
            Self::Incomplete => "incomplete",
            Self::Refused => "refused",
            Self::UnjudgedModel => "unjudged_model",
        }
    }

    /// Whether a finding is about one measured point, so that the share of such points decides the grade.
    #[must_use]
    pub const fn is_of_points(self) -> bool {
        matches!(
            self,
            Self::BelowFloor | Self::AboveCeiling | Self::Spike | Self::NonMonotone | Self::RepeatsDisagree
        )
    }
}

/// One thing that speaks against a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub rule: Rule,
    /// How much it weighs.
    pub severity: Severity,
    /// The operator; `None` when it is about the whole bundle.
    pub operator: Option<Operator>,
    /// The payload, or `manifest.json`.
    pub file: Option<String>,
    /// Line of the file, from 1; for a point.
    pub line: Option<usize>,
    /// Shape or layout, as `column = value`.
    pub shape: Option<String>,
    /// What was expected.
    pub expected: String,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub hint: String,
}

impl Finding {
    pub(super) fn new(
        rule: Rule,
        severity: Severity,
        expected: impl Into<String>,
        found: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self {
            rule,
            severity,
            operator: None,
            file: None,
            line: None,
            shape: None,
            expected: expected.into(),
            found: found.into(),
            hint: hint.into(),
        }
    }

    pub(super) fn of(mut self, operator: Operator) -> Self {
        self.operator = Some(operator);
        self
    }

    pub(super) fn at(mut self, file: impl Into<String>) -> Self {
        self.file = Some(file.into());
        self
    }

    pub(super) fn on(mut self, shape: impl Into<String>) -> Self {
        self.shape = Some(shape.into());
        self
    }
}

/// A bundle's findings in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Measured points: rows of samples.
    pub num_points: usize,
    /// Points with a warning or an error of their own.
    pub num_doubtful_points: usize,
    /// Points that something disturbed while they were measured.
    pub num_disturbed_points: usize,
    /// Findings that cannot be true.
    pub num_errors: usize,
    /// Findings that are doubtful or missing.
    pub num_warnings: usize,
    /// Findings worth knowing.
    pub num_infos: usize,
    /// Findings by rule.
    pub by_rule: BTreeMap<Rule, usize>,
}

/// What [`lint`](super::lint()) found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LintReport {
    /// The grade.
    pub grade: Grade,
    /// Why it is not better, worst first; empty for an A.
    pub reasons: Vec<Reason>,
    /// Everything found: errors first, then by rule, operator and place.
    pub findings: Vec<Finding>,
    /// The findings in numbers.
    pub counts: Counts,
    /// What of the models' steps is known, by model.
    pub coverage: Vec<ModelCoverage>,
}

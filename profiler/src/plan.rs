//! The plan: which operators are measured at which shapes, in which order, and what that covers.
//!
//! Points of the stated models come from the forward pass itself, for batches that an engine forms (`models`,
//! `batches`). A grid of synthetic architectures (`architectures`, `grid`, `loads`) adds what models that nobody has stated
//! would ask for. All are ordered so that every prefix is a good plan of its size (`order`), and what models can ask for
//! beyond the plan is listed (`coverage`). The same models and envelope give the same plan.

mod architectures;
mod batches;
mod coverage;
mod grid;
mod layout;
mod loads;
mod models;
mod order;
mod sequence;
#[cfg(test)]
mod tests;

use std::{collections::HashSet, fmt};

use plumbline_bundles::CacheState;
use plumbline_schema::{ModelSpec, Operator, OperatorShape, forward::ParallelismError};
use serde::{Deserialize, Serialize};

pub use self::coverage::{Gap, Uncovered};
use crate::device::Point;

/// What the engines whose steps are to be predicted will ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// Largest number of tokens of a step, at least 1.
    pub max_num_tokens: u32,
    /// Largest number of sequences of a step, at least 1.
    pub max_num_seqs: u32,
    /// Longest sequence, prompt and output; a model's own limit applies too.
    pub max_model_len: u32,
    /// Most keys of one batch, at least 1: what a KV cache holds.
    pub max_kv_tokens: u64,
    /// Tensor-parallel sizes whose shapes are planned; operators between GPUs are left out.
    pub tensor_parallel_sizes: Vec<u32>,
}

impl Default for Envelope {
    fn default() -> Self {
        Self {
            max_num_tokens: 8192,
            max_num_seqs: 512,
            max_model_len: 32768,
            max_kv_tokens: 524_288,
            tensor_parallel_sizes: vec![1],
        }
    }
}

/// Why a point is planned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PointSource {
    /// A stated model asks for it.
    #[default]
    Model,
    /// It belongs to the grid.
    Grid,
}

/// A point to time, and how its operands lie in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PlannedPoint {
    /// The point.
    pub point: Point,
    /// Cold or hot.
    pub cache: CacheState,
    /// Why it is planned; plans of version 0.1 have points of models alone.
    #[serde(default)]
    pub source: PointSource,
    /// Whether it is only for judging predictions while the plan is being measured; afterwards it is a sample like others.
    #[serde(default)]
    pub is_held_out: bool,
}

/// What a profile measures, stored in the bundle as `plan.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Names of the models.
    pub models: Vec<String>,
    /// What was planned for.
    pub envelope: Envelope,
    /// What the models can ask for within the envelope and the plan does not cover.
    #[serde(default)]
    pub uncovered: Vec<Uncovered>,
    /// Small points whose results are compared with a reference before anything is timed.
    pub checks: Vec<Point>,
    /// Points to time, most important first.
    pub points: Vec<PlannedPoint>,
}

/// Bytes up to which operands may also be measured hot: a launch this small finds what the one before it wrote.
const MAX_HOT_BYTES: u64 = 16 << 20;

impl Plan {
    /// Plans the points of the models within the envelope.
    ///
    /// # Errors
    /// When a tensor-parallel size does not divide a model.
    pub fn new(models: &[ModelSpec], envelope: &Envelope) -> Result<Self, ParallelismError> {
        Self::build(models, envelope, &[])
    }

    /// Plans the points of the models, and a grid for models that are not stated: dense ones from 0.5 to 70 billion
    /// parameters, whole or split over up to eight GPUs.
    ///
    /// # Errors
    /// When a tensor-parallel size does not divide a model.
    pub fn with_grid(models: &[ModelSpec], envelope: &Envelope) -> Result<Self, ParallelismError> {
        Self::build(models, envelope, &grid::points(envelope)?)
    }

    fn build(models: &[ModelSpec], envelope: &Envelope, grid: &[Point]) -> Result<Self, ParallelismError> {
        let mut seen = HashSet::new();
        let mut seen_checks = HashSet::new();
        let mut points = Vec::new();
        let mut checks = Vec::new();
        let mut add_checks = |new: Vec<Point>| {
            checks.extend(new.into_iter().filter(|check| seen_checks.insert(check.clone())));
        };
        for model in models {
            for &tp in &envelope.tensor_parallel_sizes {
                for point in models::points_of(model, envelope, tp)? {
                    if seen.insert(point.clone()) {
                        points.extend(in_cache_states(point));
                    }
                }
                add_checks(models::checks_of(model, tp)?);
            }
        }
        if !grid.is_empty() {
            for model in grid::checked() {
                add_checks(models::checks_of(&model, 1)?);
            }
        }
        let new = grid.iter().filter(|point| seen.insert((*point).clone()));
        points.extend(new.map(|point| planned(point.clone(), PointSource::Grid)));
        order::hold_out(&mut points);
        checks.sort_by_key(|check| check.operator);
        let mut plan = Self {
            models: models.iter().map(|m| m.name.clone()).collect(),
            envelope: envelope.clone(),
            uncovered: Vec::new(),
            checks,
            points: order::by_importance(points),
        };
        plan.uncovered = plan.uncovered(models, envelope)?;
        Ok(plan)
    }

    /// The planned operators, in the order of the forward pass.
    pub fn operators(&self) -> impl Iterator<Item = Operator> {
        Operator::ALL.into_iter().filter(|op| self.points.iter().any(|p| p.point.operator == *op))
    }

    /// How many points of each operator are planned, and why.
    #[must_use]
    pub fn summary(&self) -> PlanSummary {
        let of = |operator: Operator| {
            let own = || self.points.iter().filter(move |planned| planned.point.operator == operator);
            OperatorPoints {
                operator,
                num_model: own().filter(|planned| planned.source == PointSource::Model).count(),
                num_grid: own().filter(|planned| planned.source == PointSource::Grid).count(),
                num_held_out: own().filter(|planned| planned.is_held_out).count(),
            }
        };
        PlanSummary { operators: self.operators().map(of).collect(), num_uncovered: self.uncovered.len() }
    }
}

/// Points of a plan, counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlanSummary {
    /// One for each planned operator, in the order of the forward pass.
    pub operators: Vec<OperatorPoints>,
    /// Entries of [`Plan::uncovered`].
    pub num_uncovered: usize,
}

/// Points of an operator, counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct OperatorPoints {
    /// Which operator.
    pub operator: Operator,
    /// Points of the stated models, in either cache state.
    pub num_model: usize,
    /// Points of the grid.
    pub num_grid: usize,
    /// Points among both that are held out.
    pub num_held_out: usize,
}

impl fmt::Display for PlanSummary {
    /// A line an operator, and one for all.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = |count: fn(&OperatorPoints) -> usize| self.operators.iter().map(count).sum::<usize>();
        let total = [sum(|o| o.num_model), sum(|o| o.num_grid), sum(|o| o.num_held_out)];
        let rows = self.operators.iter();
        let rows = rows.map(|o| (o.operator.name(), [o.num_model, o.num_grid, o.num_held_out]));
        for (name, [models, grid, held_out]) in rows.chain([("all", total)]) {
            writeln!(f, "{name:<14} {models:>5} of models {grid:>5} of the grid {held_out:>4} held out")?;
        }
        Ok(())
    }
}

/// A point in the state in which a model's own launch finds its operands.
fn planned(point: Point, source: PointSource) -> PlannedPoint {
    PlannedPoint { cache: CacheState::in_model(point.operator), point, source, is_held_out: false }
}

/// A point of a model in its own cache state, and at a few sizes in the other one, to show the difference.
fn in_cache_states(point: Point) -> impl Iterator<Item = PlannedPoint> {
    const SIZES: [u64; 4] = [1, 64, 256, 2048];
    let is_of_size = match point.shape {
        OperatorShape::Attention { load, .. } => {
            let keys = load.prefill_kv_tokens + load.decode_kv_tokens;
            load.num_prefill_seqs + load.num_decode_seqs == 1 && SIZES.contains(&keys)
        }
        _ => SIZES.contains(&point.shape.values()[0]),
    };
    let own = planned(point, PointSource::Model);
    let other = match own.cache {
        CacheState::Cold if own.point.shape.bytes().0 <= MAX_HOT_BYTES => Some(CacheState::Hot),
        CacheState::Cold => None,
        CacheState::Hot => Some(CacheState::Cold),
    };
    let other = other.filter(|_| is_of_size).map(|cache| PlannedPoint { cache, ..own.clone() });
    [Some(own), other].into_iter().flatten()
}

/// Rough work of a launch, for ordering: bytes, and FLOPs at a GPU's usual ratio of compute to bandwidth.
fn cost(shape: &OperatorShape) -> u64 {
    const FLOPS_PER_BYTE: u64 = 300;
    shape.bytes().0.max(shape.flops().0 / FLOPS_PER_BYTE)
}

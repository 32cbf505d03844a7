//! What a plan covers: whether a predictor trained on its points could answer all that models ask for.

use std::{collections::BTreeMap, fmt};

use plumbline_bundles::{CacheState, features::batch_columns};
use plumbline_schema::{
    AttentionLoad, BatchShape, ModelSpec, Operator, OperatorShape, Workload, forward::ParallelismError,
    forward_pass,
};
use serde::{Deserialize, Serialize};

use super::{
    Envelope, Plan, batches,
    layout::{is_surrounded, layout_columns, layout_of},
};

/// Something that models may ask of an operator and that no predictor trained on the plan's points may answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Uncovered {
    /// Which operator.
    pub operator: Operator,
    /// What is missing.
    pub gap: Gap,
    /// Models that ask for it, with the number of GPUs where it is more than one.
    pub asked_by: Vec<String>,
}

/// What is missing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Gap {
    /// The plan has no point of the operator.
    NotPlanned,
    /// A number of the shape goes beyond the planned ones.
    Number {
        /// The number's name, as in [`Operator::shape_columns`].
        column: String,
        /// Least and most that is asked for.
        asked: [u64; 2],
        /// Least and most that is planned.
        planned: [u64; 2],
    },
    /// The model's numbers were not planned together, nor do planned ones lie around them.
    Layout {
        /// The numbers, like `n = 4096, k = 1024`.
        layout: String,
    },
}

impl fmt::Display for Uncovered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operator = self.operator;
        match &self.gap {
            Gap::NotPlanned => write!(f, "{operator}: not planned")?,
            Gap::Number { column, asked: [low, high], planned: [min, max] } => {
                write!(f, "{operator}: {column} asked for {low}..={high}, planned {min}..={max}")?;
            }
            Gap::Layout { layout } => write!(f, "{operator}: nothing planned near {layout}")?,
        }
        write!(f, " ({})", self.asked_by.join("; "))
    }
}

impl Envelope {
    /// What a workload can ask of an engine with the step limits of this envelope: its longest request, and no more
    /// tokens, sequences and keys than its requests have together.
    ///
    /// Longer requests than `max_model_len` are asked for all the same.
    #[must_use]
    pub fn of_workload(&self, workload: &Workload) -> Self {
        let lengths = || {
            workload.requests.iter().map(|r| u64::from(r.num_prefill_tokens) + u64::from(r.num_decode_tokens))
        };
        let all_tokens: u64 = lengths().sum::<u64>().max(1);
        let at_most = |limit: u32, asked: u64| u32::try_from(asked).map_or(limit, |asked| limit.min(asked));
        Self {
            max_num_tokens: at_most(self.max_num_tokens, all_tokens),
            max_num_seqs: at_most(self.max_num_seqs, (workload.requests.len() as u64).max(1)),
            max_model_len: at_most(u32::MAX, lengths().max().unwrap_or(1)),
            max_kv_tokens: self.max_kv_tokens.min(all_tokens),
            tensor_parallel_sizes: self.tensor_parallel_sizes.clone(),
        }
    }
}

impl Plan {
    /// What of all that models can ask for within an envelope lies outside the plan, by the rule of the predictors: each
    /// number within the planned ones; the model's numbers planned together, or near planned ones and within them.
    ///
    /// # Errors
    /// When a tensor-parallel size does not divide a model.
    pub fn uncovered(
        &self,
        models: &[ModelSpec],
        envelope: &Envelope,
    ) -> Result<Vec<Uncovered>, ParallelismError> {
        let domains = self.domains();
        let mut gaps: BTreeMap<(Operator, Gap), Vec<String>> = BTreeMap::new();
        for model in models {
            for &tp in &envelope.tensor_parallel_sizes {
                let asker = if tp > 1 { format!("{} on {tp} GPUs", model.name) } else { model.name.clone() };
                for (operator, [low, high]) in asked(model, envelope, tp)? {
                    let found = domains
                        .get(&operator)
                        .map_or_else(|| vec![Gap::NotPlanned], |d| d.gaps(operator, &low, &high));
                    for gap in found {
                        gaps.entry((operator, gap)).or_default().push(asker.clone());
                    }
                }
            }
        }
        Ok(gaps
            .into_iter()
            .map(|((operator, gap), asked_by)| Uncovered { operator, gap, asked_by })
            .collect())
    }

    /// What the plan's points span, in the cache state that predictors are trained on.
    fn domains(&self) -> BTreeMap<Operator, Domain> {
        let mut domains: BTreeMap<Operator, Domain> = BTreeMap::new();
        for planned in &self.points {
            let operator = planned.point.operator;
            if planned.cache == CacheState::in_model(operator) {
                domains.entry(operator).or_default().add(operator, &planned.point.shape);
            }
        }
        domains
    }
}

/// Planned points of an operator.
#[derive(Default)]
struct Domain {
    min: Vec<u64>,
    max: Vec<u64>,
    layouts: Vec<Vec<u64>>,
}

impl Domain {
    fn add(&mut self, operator: Operator, shape: &OperatorShape) {
        let values = shape.values();
        if self.min.is_empty() {
            self.min.clone_from(&values);
            self.max.clone_from(&values);
        }
        self.min.iter_mut().zip(&values).for_each(|(min, value)| *min = (*min).min(*value));
        self.max.iter_mut().zip(&values).for_each(|(max, value)| *max = (*max).max(*value));
        let layout = layout_of(operator, shape);
        if !self.layouts.contains(&layout) {
            self.layouts.push(layout);
        }
    }

    /// What lies outside, of the shapes of one layout between the least and the largest of each number.
    fn gaps(&self, operator: Operator, low: &OperatorShape, high: &OperatorShape) -> Vec<Gap> {
        let (lows, highs) = (low.values(), high.values());
        let layout = layout_of(operator, low);
        let batch = batch_columns(operator);
        let is_planned = self.layouts.contains(&layout);
        let mut gaps = Vec::new();
        let mut is_inside = true;
        for (c, &column) in operator.shape_columns().iter().enumerate() {
            let (asked, planned) = ([lows[c], highs[c]], [self.min[c], self.max[c]]);
            if asked[0] < planned[0] || asked[1] > planned[1] {
                is_inside &= batch.contains(&c);
                gaps.push(Gap::Number { column: column.to_owned(), asked, planned });
            }
        }
        if is_inside && !is_planned && !is_surrounded(operator, &self.layouts, &layout) {
            let names = layout_columns(operator);
            let numbers = names.iter().zip(&layout).map(|(name, value)| format!("{name} = {value}"));
            gaps.push(Gap::Layout { layout: numbers.collect::<Vec<_>>().join(", ") });
        }
        gaps
    }
}

/// Each operator of a model with its shapes that have the least and the most of every number.
fn asked(
    model: &ModelSpec,
    envelope: &Envelope,
    tp: u32,
) -> Result<Vec<(Operator, [OperatorShape; 2])>, ParallelismError> {
    let max_len = envelope.max_model_len.min(model.max_positions);
    let least = BatchShape { num_tokens: 1, num_seqs: 1, attention: AttentionLoad::default() };
    let mut most = BatchShape {
        num_tokens: envelope.max_num_tokens,
        // Each sequence of a step has a token in it.
        num_seqs: envelope.max_num_seqs.min(envelope.max_num_tokens),
        attention: AttentionLoad::default(),
    };
    for batch in batches::extremes(envelope, max_len) {
        most.attention = largest(most.attention, batch.shape().attention);
    }
    let (low, high) = (forward_pass(model, &least, tp)?, forward_pass(model, &most, tp)?);
    Ok(low.iter().zip(&high).map(|(low, high)| (low.operator, [low.shape, high.shape])).collect())
}

/// The larger of each number of two loads.
pub(super) fn largest(a: AttentionLoad, b: AttentionLoad) -> AttentionLoad {
    AttentionLoad {
        num_prefill_seqs: a.num_prefill_seqs.max(b.num_prefill_seqs),
        num_prefill_tokens: a.num_prefill_tokens.max(b.num_prefill_tokens),
        prefill_kv_tokens: a.prefill_kv_tokens.max(b.prefill_kv_tokens),
        prefill_pairs: a.prefill_pairs.max(b.prefill_pairs),
        num_decode_seqs: a.num_decode_seqs.max(b.num_decode_seqs),
        decode_kv_tokens: a.decode_kv_tokens.max(b.decode_kv_tokens),
        max_decode_kv_tokens: a.max_decode_kv_tokens.max(b.max_decode_kv_tokens),
    }
}

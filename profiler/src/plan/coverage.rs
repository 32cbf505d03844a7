//! What a plan covers: whether a predictor trained on its points could answer all that models ask for.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use plumbline_bundles::{
    CacheState,
    features::batch_columns,
    predictor::{Domain, layout_columns},
};
use plumbline_schema::{
    AttentionLoad, BatchShape, ModelSpec, Operator, OperatorShape, Workload, forward::ParallelismError,
    forward_pass,
};
use serde::{Deserialize, Serialize};

use super::{Envelope, Plan, batches};

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
    /// The model's numbers were not planned together, nor do enough planned ones lie around them.
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
    /// What of all that models can ask for within an envelope lies outside the plan, by the rule of the predictors
    /// ([`Domain::answers`]).
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
                    let found = domains.get(&operator).map_or_else(
                        || vec![Gap::NotPlanned],
                        |domain| gaps_of(domain, operator, &low, &high),
                    );
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

    /// What predictors will have been trained on, by operator: points in the cache state of a model. Matrix products are
    /// one library call and share theirs.
    fn domains(&self) -> BTreeMap<Operator, Domain> {
        let mut shapes: BTreeMap<Operator, BTreeSet<Vec<u64>>> = BTreeMap::new();
        for planned in &self.points {
            let operator = planned.point.operator;
            if planned.cache == CacheState::in_model(operator) {
                shapes.entry(operator).or_default().insert(planned.point.shape.values());
            }
        }
        let of_gemms: BTreeSet<_> =
            shapes.iter().filter(|(op, _)| op.is_gemm()).flat_map(|(_, shapes)| shapes.clone()).collect();
        // Times do not matter to where a shape lies.
        let domain = |operator: Operator, shapes: &BTreeSet<Vec<u64>>| {
            Domain::from_rows(operator, shapes.iter().map(|values| (values.clone(), 1.0, 1.0, 1.0)).collect())
        };
        let all = shapes.iter().map(|(&operator, own)| {
            (operator, domain(operator, if operator.is_gemm() { &of_gemms } else { own }))
        });
        all.collect()
    }
}

/// What lies outside a domain, of the shapes of one layout between the least and the largest of each number.
fn gaps_of(domain: &Domain, operator: Operator, low: &OperatorShape, high: &OperatorShape) -> Vec<Gap> {
    let (low, high) = (low.values(), high.values());
    let number = |c: usize, planned| {
        let column = operator.shape_columns()[c].to_owned();
        Gap::Number { column, asked: [low[c], high[c]], planned }
    };
    let is_outside = |&c: &usize| low[c] < domain.min[c] || high[c] > domain.max[c];
    let mut gaps: Vec<Gap> =
        (0..low.len()).filter(is_outside).map(|c| number(c, [domain.min[c], domain.max[c]])).collect();
    let layout = layout_columns(operator);
    if layout.clone().any(|c| is_outside(&c)) {
        return gaps;
    }
    // The layout lies within the span of those planned; which batches are answered, of those within the span of batches?
    let most: Vec<u64> = high.iter().zip(&domain.max).map(|(high, max)| *high.min(max)).collect();
    let along = batch_columns(operator).start;
    let sizes = sizes_between(low[along].max(domain.min[along]), most[along]);
    let is_answered = |&size: &u64| {
        let mut values = most.clone();
        values[along] = size;
        domain.answers(operator, &values)
    };
    let num_asked = sizes.clone().count();
    let answered: Vec<u64> = sizes.filter(is_answered).collect();
    match (answered.first(), answered.last()) {
        (Some(&first), Some(&last)) if answered.len() < num_asked => {
            gaps.push(number(along, [first, last]));
        }
        (Some(_), Some(_)) => {}
        _ => {
            let numbers = operator.shape_columns()[layout.clone()].iter().zip(&low[layout]);
            let named = numbers.map(|(name, value)| format!("{name} = {value}")).collect::<Vec<_>>();
            gaps.push(Gap::Layout { layout: named.join(", ") });
        }
    }
    gaps
}

/// Both ends, and each doubling of the lower one between them.
fn sizes_between(low: u64, high: u64) -> impl Iterator<Item = u64> + Clone {
    let doubled = std::iter::successors(Some(low), |&size| size.max(1).checked_mul(2));
    doubled.take_while(move |&size| size < high).chain([high])
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

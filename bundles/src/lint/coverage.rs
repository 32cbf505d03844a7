//! What of the steps that models and a workload can ask for is known.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use plumbline_schema::{
    Deployment, EngineMode, GpuSpec, ModelSpec, Operator, OperatorCall, OperatorShape, PrefillChunk,
    StepBatch, forward_pass,
};
use serde::Serialize;

use super::{Finding, LintOptions, Rule, Severity, Subject, table::Table};
use crate::{
    features::batch_columns,
    manifest::MANIFEST,
    predictor::{OutOfDomain, PredictError, Provenance},
    samples::CacheState,
};

/// Longest sequence and prompt where no workload says: the profiler's own envelope.
const DEFAULT_MAX_MODEL_LEN: u32 = 32_768;

/// Longest reason of a refusal in a finding, in characters; it may list every measured layout.
const MAX_REASON_CHARS: usize = 240;

/// What is known of one model's steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelCoverage {
    /// The model.
    pub model: String,
    /// Different launches that the steps ask for.
    pub num_shapes: usize,
    /// Of these, measured ones.
    pub num_measured: usize,
    /// Of these, ones that would be refused as outside of what was measured.
    pub num_refused: usize,
    /// By operator, in the order of the forward pass.
    pub operators: Vec<OperatorCoverage>,
}

/// What is known of one operator in a model's steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OperatorCoverage {
    /// The operator.
    pub operator: Operator,
    /// Different launches that the steps ask for.
    pub num_shapes: usize,
    /// Of these, measured ones.
    pub num_measured: usize,
    /// Of these, refused ones.
    pub num_refused: usize,
    /// Whether the first refused shape is too large or too small, and not of a layout that was not measured.
    pub is_beyond_range: bool,
    /// The first refused shape and why; `None` when none is.
    pub example: Option<(OperatorShape, String)>,
}

/// Asks for every step's operators, with the predictors or, without them, the samples.
pub(super) fn check(
    subject: &Subject,
    models: &[ModelSpec],
    options: &LintOptions,
    findings: &mut Vec<Finding>,
) -> Vec<ModelCoverage> {
    let mut coverage = Vec::new();
    let ranges = Ranges::of(&subject.tables);
    for model in models {
        let asked = launches(model, &subject.bundle.manifest.gpu, options);
        let of_operator = |(operator, shapes): (Operator, Vec<OperatorShape>)| {
            let mut found = OperatorCoverage {
                operator,
                num_shapes: shapes.len(),
                num_measured: 0,
                num_refused: 0,
                is_beyond_range: false,
                example: None,
            };
            for shape in shapes {
                match ask(subject, &ranges, operator, &shape) {
                    Ok(is_measured) => found.num_measured += usize::from(is_measured),
                    Err(refusal) => {
                        found.num_refused += 1;
                        if found.example.is_none() {
                            found.is_beyond_range = refusal.is_beyond_range;
                            found.example = Some((shape, refusal.reason));
                        }
                    }
                }
            }
            found
        };
        let operators: Vec<_> = asked.into_iter().map(of_operator).collect();
        refusals(model, &operators, findings);
        coverage.push(ModelCoverage {
            model: model.name.clone(),
            num_shapes: operators.iter().map(|o| o.num_shapes).sum(),
            num_measured: operators.iter().map(|o| o.num_measured).sum(),
            num_refused: operators.iter().map(|o| o.num_refused).sum(),
            operators,
        });
    }
    coverage
}

/// The different launches of the steps that an engine can form of a model on a GPU, by operator.
pub(crate) fn launches(
    model: &ModelSpec,
    gpu: &GpuSpec,
    options: &LintOptions,
) -> BTreeMap<Operator, Vec<OperatorShape>> {
    let mut asked: BTreeMap<Operator, Vec<OperatorShape>> = BTreeMap::new();
    let mut seen = HashSet::new();
    for step in steps(model, gpu, options) {
        // One GPU divides every model.
        for OperatorCall { operator, shape, .. } in forward_pass(model, &step.shape(), 1).unwrap_or_default()
        {
            if seen.insert((operator, shape)) {
                asked.entry(operator).or_default().push(shape);
            }
        }
    }
    asked
}

/// The models that are asked about; a remark for each that the bundle names and that is not known here.
pub(super) fn models(
    subject: &Subject,
    options: &LintOptions,
    findings: &mut Vec<Finding>,
) -> Vec<ModelSpec> {
    if !options.models.is_empty() {
        return options.models.clone();
    }
    let shipped = ModelSpec::shipped_names();
    let mut models = Vec::new();
    for name in &subject.bundle.manifest.models {
        // A manifest's name must never lead to a file.
        if let Some(Ok(model)) = shipped.contains(&name.as_str()).then(|| ModelSpec::load(name)) {
            models.push(model);
        } else {
            let found = format!("`{name}`, whose config is not known here");
            let hint = "give its config.json with --model to judge coverage";
            let expected = format!("models that plumb ships ({})", shipped.join(", "));
            let finding = Finding::new(Rule::UnjudgedModel, Severity::Info, expected, found, hint);
            findings.push(finding.at(MANIFEST));
        }
    }
    models
}

/// Lengths that sequences reach, in tokens.
struct Lengths {
    shortest_prompt: u32,
    longest_prompt: u32,
    /// Prompt and output.
    longest: u32,
}

impl Lengths {
    fn of(model: &ModelSpec, options: &LintOptions) -> Self {
        let limit = model.max_positions.max(2);
        let (shortest, prompt, longest) = match &options.workload {
            None => (1, DEFAULT_MAX_MODEL_LEN - 1, DEFAULT_MAX_MODEL_LEN),
            Some(workload) => {
                let lengths = workload.summary().num_prefill_tokens;
                let total = |r: &plumbline_schema::WorkloadRequest| {
                    r.num_prefill_tokens.saturating_add(r.num_decode_tokens)
                };
                // Longer requests are cut or rejected by an engine.
                (lengths.min, lengths.max, workload.requests.iter().map(total).max().unwrap_or(2))
            }
        };
        let longest = longest.clamp(2, limit);
        let longest_prompt = prompt.clamp(1, longest - 1);
        Self { shortest_prompt: shortest.clamp(1, longest_prompt), longest_prompt, longest }
    }
}

/// Steps at and between the extremes of what an engine forms: prompts alone, decodes alone, both.
fn steps(model: &ModelSpec, gpu: &GpuSpec, options: &LintOptions) -> Vec<StepBatch> {
    let lengths = Lengths::of(model, options);
    let (max_tokens, max_seqs) = (options.max_num_tokens.max(1), options.max_num_seqs.max(1));
    // A model that does not fit is asked for its shortest contexts alone.
    let capacity = Deployment::defaults(model, gpu, EngineMode::Eager)
        .map_or(0, |deployment| u64::from(deployment.num_gpu_blocks) * u64::from(deployment.block_size));
    let mut steps = BTreeSet::new();
    let mut push = |chunks: Vec<(u32, u32)>, decodes: Vec<u32>| {
        steps.insert((chunks, decodes));
    };
    let longest_chunk = lengths.longest_prompt.min(max_tokens);
    for tokens in ladder(lengths.shortest_prompt.min(longest_chunk), longest_chunk) {
        push(vec![(tokens, 0)], vec![]);
        push(vec![(tokens, lengths.longest_prompt - tokens)], vec![]);
        push(vec![(tokens, 0); ((max_tokens / tokens).clamp(1, max_seqs)) as usize], vec![]);
    }
    for num in ladder(1, max_seqs) {
        let share = (capacity / u64::from(num)).clamp(2, lengths.longest.into()) as u32;
        // A decode finds all of its sequence but the token it computes.
        push(vec![], vec![lengths.shortest_prompt; num as usize]);
        push(vec![], vec![share - 1; num as usize]);
        let uneven = std::iter::once(lengths.longest - 1)
            .chain(std::iter::repeat_n(lengths.shortest_prompt, num as usize - 1));
        push(vec![], uneven.collect());
        let room = max_tokens.saturating_sub(num).min(longest_chunk);
        if num < max_seqs && room > 0 {
            let share = (share / 2).max(2);
            push(vec![(room, 0)], vec![share - 1; num as usize]);
            push(vec![(room, lengths.longest_prompt - room)], vec![lengths.shortest_prompt; num as usize]);
        }
    }
    let batch = |(chunks, decode_contexts): (Vec<(u32, u32)>, Vec<u32>)| {
        let chunk = |(num_tokens, context_len)| PrefillChunk { num_tokens, context_len };
        StepBatch { prefill_chunks: chunks.into_iter().map(chunk).collect(), decode_contexts }
    };
    steps.into_iter().map(batch).collect()
}

/// `low`, then doublings of it, then `high`.
fn ladder(low: u32, high: u32) -> Vec<u32> {
    let mut rungs: Vec<u32> = std::iter::successors(Some(low), |rung| rung.checked_mul(2))
        .take_while(|rung| *rung < high)
        .collect();
    rungs.push(high);
    rungs
}

/// Why a shape has no time.
struct Refusal {
    is_beyond_range: bool,
    reason: String,
}

/// Whether a shape was measured, or why it is refused.
fn ask(
    subject: &Subject,
    ranges: &Ranges,
    operator: Operator,
    shape: &OperatorShape,
) -> Result<bool, Refusal> {
    match &subject.predictors {
        Some(predictors) => match predictors.predict(operator, shape, OutOfDomain::Refuse) {
            Ok(prediction) => Ok(prediction.provenance == Provenance::Measured),
            Err(error) => {
                let batch = &operator.shape_columns()[batch_columns(operator)];
                let is_beyond_range =
                    matches!(error, PredictError::OutOfDomain { column, .. } if batch.contains(&column));
                Err(Refusal { is_beyond_range, reason: error.to_string() })
            }
        },
        None => ranges.ask(operator, shape),
    }
}

/// What samples span, for bundles that were not trained yet.
struct Ranges(BTreeMap<Operator, Range>);

#[derive(Default)]
struct Range {
    layouts: HashSet<Vec<u64>>,
    shapes: HashSet<Vec<u64>>,
    /// Least and largest of each column.
    bounds: Vec<(u64, u64)>,
}

impl Ranges {
    fn of(tables: &[Table]) -> Self {
        let mut ranges: BTreeMap<Operator, Range> = BTreeMap::new();
        for table in tables {
            let own = CacheState::in_model(table.operator);
            for sample in table.samples.iter().filter(|sample| sample.cache == own) {
                let range = ranges.entry(table.operator).or_default();
                let values = sample.shape.values();
                range.layouts.insert(table.layout(sample));
                range.bounds.resize(values.len(), (u64::MAX, 0));
                for ((low, high), &value) in range.bounds.iter_mut().zip(&values) {
                    (*low, *high) = ((*low).min(value), (*high).max(value));
                }
                range.shapes.insert(values);
            }
        }
        Self(ranges)
    }

    fn ask(&self, operator: Operator, shape: &OperatorShape) -> Result<bool, Refusal> {
        let refuse = |is_beyond_range, reason| Err(Refusal { is_beyond_range, reason });
        let own = CacheState::in_model(operator);
        let Some(range) = self.0.get(&operator) else {
            return refuse(false, format!("no {} samples of operator `{operator}`", own.name()));
        };
        let values = shape.values();
        if range.shapes.contains(&values) {
            return Ok(true);
        }
        let batch = batch_columns(operator);
        for (c, (&value, (low, high))) in values.iter().zip(&range.bounds).enumerate() {
            if batch.contains(&c) && !(low..=high).contains(&&value) {
                let column = operator.shape_columns()[c];
                return refuse(true, format!("{column} = {value} is outside the measured {low}..={high}"));
            }
        }
        let layout: Vec<u64> =
            values.iter().enumerate().filter(|(c, _)| !batch.contains(c)).map(|(_, &v)| v).collect();
        if range.layouts.contains(&layout) {
            Ok(false)
        } else {
            refuse(false, format!("layout {layout:?} was not measured"))
        }
    }
}

fn refusals(model: &ModelSpec, operators: &[OperatorCoverage], findings: &mut Vec<Finding>) {
    for found in operators.iter().filter(|found| found.num_refused > 0) {
        let Some((_, reason)) = &found.example else { continue };
        let mut short: String = reason.chars().take(MAX_REASON_CHARS).collect();
        if short.len() < reason.len() {
            short.push_str("...");
        }
        let expected = format!("times for every launch that steps of {} ask for", model.name);
        let text = format!("{} of {} refused: {short}", found.num_refused, found.num_shapes);
        let hint = if found.is_beyond_range {
            "nothing that large was measured: give the workload that matters (--workload), fewer sequences \
             (--max-num-seqs), or measure further"
                .to_owned()
        } else {
            format!("profile with `--model {}` and train again", model.name)
        };
        let finding = Finding::new(Rule::Refused, Severity::Warning, expected, text, hint);
        findings.push(finding.of(found.operator));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ladder_ends_where_it_should() {
        assert_eq!(ladder(1, 8), [1, 2, 4, 8]);
        assert_eq!(ladder(3, 20), [3, 6, 12, 20]);
        assert_eq!(ladder(5, 5), [5]);
        assert_eq!(ladder(1 << 31, u32::MAX), [1 << 31, u32::MAX]);
    }
}

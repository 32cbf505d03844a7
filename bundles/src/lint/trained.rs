//! Whether predictors and engine profiles rest on what the bundle holds.

use std::collections::{HashMap, HashSet};

use plumbline_schema::Operator;

use super::{
    Finding, Rule, Severity, Subject,
    table::{Table, share},
};
use crate::{
    bundle::{engine_name, predictor_name},
    error::BundleError,
    predictor::OperatorPredictor,
    samples::CacheState,
};

/// A mean of equal times may differ from them in the last bits.
const ROUNDING: f64 = 1e-9;

/// Share of shapes that training may leave out: a few per cent are held back to judge it by.
const MAX_UNSEEN_SHARE: f64 = 0.10;

pub(super) fn check(subject: &Subject, findings: &mut Vec<Finding>) -> Result<(), BundleError> {
    for operator in subject.bundle.predicted_operators() {
        let Some(predictor) = subject.predictors.as_ref().and_then(|p| p.get(operator)) else { continue };
        let file = predictor_name(operator);
        if !is_digest(&predictor.samples_digest) {
            let hint = "train the bundle again";
            let found = format!("`{}`", predictor.samples_digest);
            let expected = "samples_digest: `sha256:` and 64 hex digits";
            let finding = Finding::new(Rule::MissingEvidence, Severity::Warning, expected, found, hint);
            findings.push(finding.of(operator).at(&file));
        }
        if let Some(from) = &predictor.transferred_from {
            let gpu = &subject.bundle.manifest.gpu.name;
            let found =
                format!("one of `{}`, adapted to {} samples of `{gpu}`", from.gpu.name, from.num_samples);
            let expected = format!("a predictor of samples of `{gpu}`");
            let hint =
                "its times are tagged as transferred; profile this GPU and run `plumb train` for better ones";
            let finding = Finding::new(Rule::OtherGpu, Severity::Info, expected, found, hint);
            findings.push(finding.of(operator).at(&file));
            continue;
        }
        match subject.tables.iter().find(|table| table.operator == operator) {
            Some(table) => rests_on(subject, table, predictor, &file, findings),
            None if subject.tables.is_empty() => {} // Said once for the whole bundle.
            None => {
                let hint = "put the samples back, or train again";
                let finding =
                    Finding::new(Rule::OtherSamples, Severity::Error, "the samples trained on", "none", hint);
                findings.push(finding.of(operator).at(&file));
            }
        }
    }
    engines(subject, findings)
}

fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.chars().all(|c| c.is_ascii_hexdigit()))
}

/// Shapes of a state with the range of their medians, ns.
///
/// Matrix products of all operators run the same kernels and may be trained as one, a shape being the mean over them.
fn medians(subject: &Subject, operator: Operator, state: CacheState) -> HashMap<Vec<u64>, (f64, f64)> {
    let mut medians: HashMap<Vec<u64>, (f64, f64)> = HashMap::new();
    let is_pooled =
        |table: &&Table| table.operator == operator || (operator.is_gemm() && table.operator.is_gemm());
    let samples = subject.tables.iter().filter(is_pooled).flat_map(|table| &table.samples);
    for sample in samples.filter(|sample| sample.cache == state) {
        let time = sample.stats.p50_ns;
        let (low, high) = medians.entry(sample.shape.values()).or_insert((time, time));
        (*low, *high) = (low.min(time), high.max(time));
    }
    medians
}

/// Compares the shapes and times that a predictor says it was trained on with the bundle's samples.
///
/// A digest could only tell that something differs; the times tell what, and from which cache state they are.
fn rests_on(
    subject: &Subject,
    table: &Table,
    predictor: &OperatorPredictor,
    file: &str,
    findings: &mut Vec<Finding>,
) {
    let operator = table.operator;
    let own = CacheState::in_model(operator);
    let other = if own == CacheState::Cold { CacheState::Hot } else { CacheState::Cold };
    let (of_own, of_other) = (medians(subject, operator, own), medians(subject, operator, other));
    let holds = |medians: &HashMap<Vec<u64>, (f64, f64)>, shape: &[u64], time: f64| {
        medians
            .get(shape)
            .is_some_and(|(low, high)| (low * (1.0 - ROUNDING)..=high * (1.0 + ROUNDING)).contains(&time))
    };
    let domain = &predictor.domain;
    let width = domain.columns.len().max(1);
    let shapes: Vec<(&[u64], f64)> =
        domain.shapes.chunks(width).zip(domain.time_ns.iter().copied()).collect();
    let num_shapes = shapes.len();
    let foreign: Vec<_> =
        shapes.iter().filter(|(s, t)| !holds(&of_own, s, *t) && !holds(&of_other, s, *t)).collect();
    if let Some((shape, time)) = foreign.first() {
        let columns = operator.shape_columns().iter().zip(*shape);
        let named: Vec<_> = columns.map(|(name, value)| format!("{name} = {value}")).collect();
        let found = format!("{} shapes are not, first {time} ns", share(foreign.len(), num_shapes));
        let expected = format!("every trained time among the medians of {}", table.file);
        let hint = "samples or predictors were replaced alone: run `plumb train` on the bundle";
        let finding = Finding::new(Rule::OtherSamples, Severity::Error, expected, found, hint);
        findings.push(finding.of(operator).at(file).on(named.join(", ")));
        return;
    }
    let num_other = shapes.iter().filter(|(shape, time)| !holds(&of_own, shape, *time)).count();
    if num_other > 0 {
        let expected =
            format!("{} samples, as a model's own launch of {operator} finds its operands", own.name());
        let found = format!("{} shapes are of {} ones", share(num_other, num_shapes), other.name());
        let hint = "profile and train with this version, which measures each operator as a model runs it";
        findings.push(
            Finding::new(Rule::OtherCacheState, Severity::Warning, expected, found, hint)
                .of(operator)
                .at(file),
        );
    }
    let trained: HashSet<&[u64]> = shapes.iter().map(|(shape, _)| *shape).collect();
    let clean = table.samples.iter().filter(|sample| sample.cache == own && sample.flags.is_empty());
    let measured: HashSet<Vec<u64>> = clean.map(|sample| sample.shape.values()).collect();
    let num_unseen = measured.iter().filter(|shape| !trained.contains(shape.as_slice())).count();
    if num_unseen as f64 > MAX_UNSEEN_SHARE * measured.len() as f64 {
        let found = format!("{} measured shapes were not trained on", share(num_unseen, measured.len()));
        let expected = format!("at most {:.0} % of shapes held back", 100.0 * MAX_UNSEEN_SHARE);
        let hint = "`plumb train` takes them in";
        findings.push(
            Finding::new(Rule::UnseenSamples, Severity::Warning, expected, found, hint).of(operator).at(file),
        );
    }
}

fn engines(subject: &Subject, findings: &mut Vec<Finding>) -> Result<(), BundleError> {
    let bundle = subject.bundle;
    let gpu = &bundle.manifest.gpu.name;
    let digest = bundle.predictors_digest();
    for name in bundle.engine_names() {
        let fitted_on = bundle.engine(name)?.fitted_on;
        let mut differs = |rule, severity, expected: String, found: String, hint: &str| {
            findings.push(Finding::new(rule, severity, expected, found, hint).at(engine_name(name)));
        };
        let anew =
            "operator times it was fitted with are not the bundle's: run `plumb calibrate` on the same runs";
        if subject.predictors.is_some() && fitted_on.predictors_digest != digest {
            let found =
                if fitted_on.predictors_digest.is_empty() { "none" } else { &fitted_on.predictors_digest };
            differs(
                Rule::OtherPredictors,
                Severity::Warning,
                format!("predictors_digest {digest}, the bundle's"),
                found.into(),
                anew,
            );
        }
        if !fitted_on.bundle_gpu.is_empty() && fitted_on.bundle_gpu != *gpu {
            let found = format!("`{}`", fitted_on.bundle_gpu);
            let expected = format!("bundle_gpu `{gpu}`, the bundle's");
            differs(Rule::OtherPredictors, Severity::Warning, expected, found, anew);
        }
        if !fitted_on.gpu.is_empty() && fitted_on.gpu != *gpu {
            differs(
                Rule::OtherGpu,
                Severity::Info,
                format!("runs of `{gpu}`"),
                format!("runs of `{}`, with times carried over by data sheets", fitted_on.gpu),
                "fine for that GPU (`simulate --gpu`); host costs are those of its machine",
            );
        }
    }
    Ok(())
}

//! Each rule is found on a bundle that breaks it and on no sound one.

#[expect(dead_code, reason = "the tests of the format use the rest")]
mod common;

use std::collections::BTreeSet;

use plumbline_bundles::{
    Bundle, BundleWriter, CacheState, CrossCheck, DeviceIdentity, EngineProfile, Evidence, Forest, GpuState,
    HostCosts, LintOptions, LintReport, Manifest, OperatorPredictor, Sample, TimeStats, Tree, bundle,
    features::{feature_names, part_names},
    forest::Node,
    lint,
    lint::{Grade, Rule, Severity},
    predictor::{BaselinePart, Domain, HeldOutError, HyperParameters, Interval, RatioRange},
};
use plumbline_schema::{
    BatchShape, GpuSpec, ModelSpec, Operator, OperatorShape, StepBatch, Workload, WorkloadRequest,
    forward_pass,
};

const TOKENS: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];

/// A model of up to 64 positions; two sizes make two layouts of each operator.
fn model(name: &str, size: u32) -> ModelSpec {
    ModelSpec {
        name: name.into(),
        hidden_size: 1024 * size,
        num_layers: 2,
        num_q_heads: 8 * size,
        num_kv_heads: 8,
        head_dim: 128,
        intermediate_size: 3072 * size,
        vocab_size: 32_768,
        max_positions: 64,
        tied_embeddings: false,
        qk_norm: true,
    }
}

fn options() -> LintOptions {
    LintOptions { models: vec![model("small", 1)], workload: None, max_num_tokens: 64, max_num_seqs: 8 }
}

/// Batches of prompts, of decodes and of both, up to 64 tokens, 8 sequences and 64 positions.
fn batches() -> Vec<StepBatch> {
    let join = |items: Vec<String>| items.join(";");
    let mut texts = Vec::new();
    for tokens in TOKENS {
        texts.push((format!("{tokens}:0"), String::new()));
        texts.push((format!("{tokens}:{}", 64 - tokens), String::new()));
        let num = (64 / tokens).min(8) as usize;
        texts.push((join(vec![format!("{tokens}:0"); num]), String::new()));
    }
    for num in [1, 2, 4, 8] {
        for context in [1, 3, 7, 15, 31, 63] {
            texts.push((String::new(), join(vec![context.to_string(); num])));
            texts.push(("16:48".into(), join(vec![context.to_string(); num])));
        }
    }
    texts.push((String::new(), "63;5;3".into()));
    texts.push((String::new(), "63;5;3;3".into()));
    let mut batches: Vec<_> =
        texts.iter().map(|(chunks, decodes)| StepBatch::parse(chunks, decodes).unwrap()).collect();
    let mut seen = std::collections::HashSet::new();
    batches.retain(|batch| seen.insert(batch.shape()));
    batches
}

/// A smooth law, far above every floor, with a scatter of 0.3 % that differs from point to point.
fn times(shape: &OperatorShape, seed: usize) -> TimeStats {
    let keys = match shape {
        OperatorShape::Attention { load, .. } => (load.prefill_kv_tokens + load.decode_kv_tokens) as f64,
        _ => 0.0,
    };
    let ns = 2000.0 + keys + shape.flops().0 as f64 / 4e5 + shape.bytes().0 as f64 / 2e3;
    let time = |i: usize| {
        let hash = (seed * 31 + i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15_u64 as usize) >> 40;
        ns * (1.0 + 0.003 * (hash as f64 / (1u64 << 24) as f64 - 0.5))
    };
    TimeStats::from_times(&(0..10).map(time).collect::<Vec<_>>()).unwrap()
}

fn samples() -> Vec<Sample> {
    let mut points: Vec<(Operator, OperatorShape, Option<StepBatch>)> = Vec::new();
    for model in [model("small", 1), model("wide", 2)] {
        for batch in batches() {
            for call in forward_pass(&model, &batch.shape(), 1).unwrap() {
                if call.operator == Operator::Attention {
                    points.push((call.operator, call.shape, Some(batch.clone())));
                }
            }
        }
        for tokens in TOKENS {
            let shape = BatchShape { num_tokens: tokens, num_seqs: tokens.min(8), ..BatchShape::default() };
            for call in forward_pass(&model, &shape, 1).unwrap() {
                if call.operator != Operator::Attention
                    && points.iter().all(|p| (p.0, p.1) != (call.operator, call.shape))
                {
                    points.push((call.operator, call.shape, None));
                }
            }
        }
    }
    let sample =
        |(i, (operator, shape, batch)): (usize, (Operator, OperatorShape, Option<StepBatch>))| Sample {
            cache: CacheState::in_model(operator),
            stats: times(&shape, i),
            sm_clock_mhz: Some(if i % 3 == 0 { 1965 } else { 1980 }),
            memory_clock_mhz: Some(2619),
            power_w: Some(300.0 + i as f64),
            ..common::sample(operator, shape, batch, 1.0)
        };
    points.into_iter().enumerate().map(sample).collect()
}

/// The parts of a bundle, to be broken.
struct Parts {
    manifest: Manifest,
    samples: Vec<Sample>,
    predictors: Vec<OperatorPredictor>,
    host: Option<HostCosts>,
    engine: Option<EngineProfile>,
}

impl Parts {
    fn sound() -> Self {
        let state = |at_ms: u64| GpuState {
            at_ms,
            sm_clock_mhz: Some(1980),
            memory_clock_mhz: Some(2619),
            power_w: Some(400.0),
            energy_j: Some(at_ms as f64),
            ..GpuState::default()
        };
        let gpu = common::manifest().gpu;
        let device = DeviceIdentity {
            device_name: "NVIDIA H100 80GB HBM3".into(),
            compute_capability: 90,
            num_sms: 132,
            l2_bytes: gpu.l2_bytes.0,
            memory_bytes: 85_017_493_504,
            driver_version: Some("580.1".into()),
            cuda_driver_version: 13_000,
            nvrtc_version: "13.0".into(),
            cublaslt_version: 130_100,
            ecc: Some(true),
            mig: Some(false),
            kernel_hash: "0".repeat(64),
        };
        let evidence = Evidence {
            before: state(0),
            during: vec![state(1000), state(2000)],
            after: state(3000),
            copy_bandwidth_bytes_per_s: Some(3e12),
            matmul_flops_per_s: Some(8e14),
            ..Evidence::default()
        };
        let manifest = Manifest {
            device: Some(device),
            evidence: Some(evidence),
            models: vec!["small".into()],
            ..common::manifest()
        };
        let (samples, host) = (samples(), Some(common::host()));
        let mut parts =
            Self { manifest, samples, predictors: vec![], host, engine: Some(common::engine("made-up")) };
        parts.train();
        parts
    }

    /// Predictors whose domains hold the samples as they are now.
    fn train(&mut self) {
        self.predictors = Operator::ALL.into_iter().filter_map(|o| predictor(o, &self.samples)).collect();
    }

    /// The samples of an operator and size, all layouts.
    fn at(&mut self, operator: Operator, size: u64) -> impl Iterator<Item = &mut Sample> {
        self.samples.iter_mut().filter(move |s| s.operator == operator && s.shape.values()[0] == size)
    }

    fn write(self, folder: &std::path::Path) -> Bundle {
        let mut writer = BundleWriter::new(&folder.join("bundle")).unwrap();
        writer.add_samples(&self.samples).unwrap();
        for predictor in &self.predictors {
            writer.add(&bundle::predictor_name(predictor.operator), &predictor.to_json().unwrap()).unwrap();
        }
        if let Some(host) = &self.host {
            writer.add_json(bundle::HOST, host).unwrap();
        }
        let mut bundle = writer.finish(self.manifest).unwrap();
        if let Some(mut engine) = self.engine {
            if engine.fitted_on.predictors_digest.is_empty() {
                engine.fitted_on.predictors_digest = bundle.predictors_digest();
            }
            let bytes = bundle::to_json("engine", &engine).unwrap();
            bundle.update(vec![(bundle::engine_name(&engine.name), bytes)]).unwrap();
        }
        bundle
    }

    fn lint_with(self, options: &LintOptions) -> LintReport {
        let folder = tempfile::tempdir().unwrap();
        lint(&self.write(folder.path()), options).unwrap()
    }

    fn lint(self) -> LintReport {
        self.lint_with(&options())
    }
}

fn scale(sample: &mut Sample, factor: f64) {
    sample.stats = sample.stats.scaled(factor);
}

fn predictor(operator: Operator, samples: &[Sample]) -> Option<OperatorPredictor> {
    let own = samples.iter().filter(|s| s.operator == operator);
    let mut rows: Vec<_> =
        own.map(|s| (s.shape.values(), s.stats.p50_ns, s.stats.min_ns, s.stats.p95_ns)).collect();
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    rows.dedup_by(|a, b| a.0 == b.0);
    if rows.is_empty() {
        return None;
    }
    let range = RatioRange { low: 0.9, high: 1.1 };
    let part = |&name: &&str| BaselinePart { name: name.to_owned(), coefficient: 1.0 };
    Some(OperatorPredictor {
        operator,
        features: feature_names(operator).iter().map(|&name| name.to_owned()).collect(),
        overhead_ns: 2000.0,
        parts: part_names(operator).iter().map(part).collect(),
        forest: Forest {
            num_features: feature_names(operator).len(),
            trees: vec![Tree { nodes: vec![Node::default()] }],
        },
        domain: Domain::from_rows(operator, rows),
        error: HeldOutError::default(),
        interval: Interval { coverage: 0.9, interpolated: range, extrapolated: range, unseen_layout: None },
        samples_digest: format!("sha256:{}", "0".repeat(64)),
        seed: 0,
        hyper_parameters: HyperParameters {
            num_trees: 1,
            max_depth: 0,
            min_samples_leaf: 1,
            max_features: 1,
            pooled: false,
            interpolates_residuals: false,
            forest_share: 1.0,
            has_steps: true,
        },
        transferred_from: None,
    })
}

/// Rules of warnings and errors.
fn rules(report: &LintReport) -> BTreeSet<Rule> {
    report.findings.iter().filter(|f| f.severity > Severity::Info).map(|f| f.rule).collect()
}

/// Breaks the samples of a sound bundle, trains on them, and expects one rule and a grade.
#[track_caller]
fn broken_samples(rule: Rule, grade: Grade, change: impl FnOnce(&mut Parts)) -> LintReport {
    let mut parts = Parts::sound();
    change(&mut parts);
    parts.train();
    expect(parts, rule, grade)
}

/// Breaks other parts of a sound bundle.
#[track_caller]
fn broken(rule: Rule, grade: Grade, change: impl FnOnce(&mut Parts)) -> LintReport {
    let mut parts = Parts::sound();
    change(&mut parts);
    expect(parts, rule, grade)
}

#[track_caller]
fn expect(parts: Parts, rule: Rule, grade: Grade) -> LintReport {
    let report = parts.lint();
    assert_eq!(rules(&report), BTreeSet::from([rule]), "{:#?}", report.findings);
    assert_eq!(report.grade, grade, "{:#?}", report.reasons);
    assert_eq!(report.reasons.is_empty(), grade == Grade::A);
    assert!(report.reasons.iter().all(|r| r.cap <= grade && !r.raise.is_empty() && !r.text.is_empty()));
    report
}

#[test]
fn nothing_speaks_against_a_sound_bundle() {
    let report = Parts::sound().lint();
    assert_eq!(report.findings, [], "{:#?}", report.findings);
    assert_eq!((report.grade, report.reasons.len()), (Grade::A, 0));
    assert_eq!(report.counts.num_points, samples().len());
    let [coverage] = report.coverage.as_slice() else { panic!("{:?}", report.coverage) };
    assert_eq!((coverage.model.as_str(), coverage.num_refused), ("small", 0));
    assert!(coverage.num_measured > 0 && coverage.num_shapes > coverage.num_measured);
    assert_eq!(coverage.operators.len(), 13);
    assert_eq!(Parts::sound().lint(), report, "the same bundle gives the same report");
}

#[test]
fn times_that_cannot_be_true() {
    let report = broken_samples(Rule::BelowFloor, Grade::F, |parts| {
        let sample = parts.at(Operator::DownProj, 64).next().unwrap();
        sample.stats.min_ns = 0.1;
    });
    let finding = &report.findings[0];
    assert_eq!((finding.severity, finding.operator), (Severity::Error, Some(Operator::DownProj)));
    assert_eq!(finding.file.as_deref(), Some("samples/down_proj.csv"));
    // Line 1 is the header, and 64 tokens are the last of seven sizes.
    assert_eq!(finding.line, Some(8));
    assert_eq!(finding.shape.as_deref(), Some("m = 64, n = 1024, k = 3072, cold"));

    broken(Rule::AboveCeiling, Grade::D, |p| {
        p.manifest.evidence.as_mut().unwrap().matmul_flops_per_s = Some(1e9);
    });
    let report = broken(Rule::AboveCeiling, Grade::B, |p| {
        p.manifest.evidence.as_mut().unwrap().copy_bandwidth_bytes_per_s = Some(1e9);
    });
    assert!(
        report.findings.iter().all(|f| f.operator == Some(Operator::LmHead)),
        "only it exceeds the L2 cache"
    );
}

#[test]
fn times_that_their_neighbours_contradict() {
    let slow = |parts: &mut Parts, sizes: &[u64], factor: f64| {
        for &size in sizes {
            scale(parts.at(Operator::RmsNorm, size).next().unwrap(), factor);
        }
    };
    let report = broken_samples(Rule::Spike, Grade::A, |parts| slow(parts, &[8], 1.6));
    assert_eq!(report.findings[0].shape.as_deref(), Some("num_tokens = 8, hidden_size = 1024, hot"));
    broken_samples(Rule::Spike, Grade::A, |parts| slow(parts, &[8], 0.5));
    // A plateau is no spike, but its end is a drop.
    let report = broken_samples(Rule::NonMonotone, Grade::A, |parts| slow(parts, &[2, 4, 8], 1.6));
    assert_eq!(report.findings.len(), 1);
    // Steps up, and differences within the tolerance, are what hardware does.
    let mut parts = Parts::sound();
    slow(&mut parts, &[16, 32, 64], 1.6);
    slow(&mut parts, &[4], 1.12);
    parts.train();
    assert_eq!(parts.lint().grade, Grade::A);

    // `63;5;3` is all in `63;5;3;3`.
    let report = broken_samples(Rule::NonMonotone, Grade::A, |parts| {
        let uneven = |s: &&mut Sample| s.batch.as_ref().is_some_and(|b| b.decode_contexts == [63, 5, 3]);
        scale(parts.samples.iter_mut().find(uneven).unwrap(), 1.6);
    });
    assert!(report.findings[0].found.contains("decodes 63;5;3;3"), "{:?}", report.findings);

    broken_samples(Rule::RepeatsDisagree, Grade::A, |parts| {
        let mut again = parts.at(Operator::Rope, 8).next().unwrap().clone();
        scale(&mut again, 1.4);
        parts.samples.push(again);
    });
}

#[test]
fn many_doubtful_points_cost_more() {
    for (share, grade) in [(0.008, Grade::A), (0.02, Grade::B), (0.07, Grade::C), (0.2, Grade::D)] {
        let report = broken_samples(Rule::RepeatsDisagree, grade, |parts| {
            let num = (share * parts.samples.len() as f64) as usize;
            let rows = parts.samples.iter().filter(|s| s.operator != Operator::Attention);
            let mut again: Vec<_> = rows.take(num).cloned().collect();
            for sample in &mut again {
                scale(sample, 1.4);
            }
            parts.samples.extend(again);
        });
        assert_eq!(report.counts.by_rule[&Rule::RepeatsDisagree], report.counts.num_doubtful_points);
    }
}

#[test]
fn borrowed_and_mixed_machines() {
    broken(Rule::ImpossibleReading, Grade::F, |p| p.samples[0].sm_clock_mhz = Some(2500));
    broken(Rule::ImpossibleReading, Grade::F, |p| p.samples[0].power_w = Some(900.0));
    let evidence = |p: &mut Parts| p.manifest.evidence.take().unwrap();
    broken(Rule::ImpossibleReading, Grade::F, |p| {
        let mut changed = evidence(p);
        changed.during[0].sm_clock_mhz = Some(2500);
        p.manifest.evidence = Some(changed);
    });
    broken(Rule::MixedReadings, Grade::C, |p| p.samples[3].memory_clock_mhz = Some(1593));
    broken(Rule::MixedReadings, Grade::C, |p| {
        p.samples.iter_mut().for_each(|sample| sample.memory_clock_mhz = Some(1593));
    });
    broken(Rule::MixedReadings, Grade::C, |p| {
        let mut changed = evidence(p);
        changed.during[1].energy_j = Some(10.0);
        p.manifest.evidence = Some(changed);
    });
    broken(Rule::CrossCheck, Grade::C, |p| {
        let shape = OperatorShape::RmsNorm { num_tokens: 8, hidden_size: 1024 };
        let point = (Operator::RmsNorm, &shape, CacheState::Hot);
        let check = |period_ns| CrossCheck::new(point, 3000.0, 2000.0, Some(period_ns), None, 900.0);
        p.manifest.evidence.as_mut().unwrap().cross_checks = vec![check(3010.0), check(4000.0)];
    });
    broken(Rule::ForeignKernel, Grade::F, |p| p.samples[0].kernel = "embedding_sm100 wide".into());
    let device =
        |change: fn(&mut DeviceIdentity)| move |p: &mut Parts| p.manifest.device.iter_mut().for_each(change);
    for (grade, change) in [
        (Grade::F, (|d| d.device_name = "NVIDIA H200".into()) as fn(&mut DeviceIdentity)),
        (Grade::F, |d| d.num_sms = 108),
        (Grade::F, |d| d.compute_capability = 80),
        (Grade::C, |d| d.device_name = "NVIDIA GeForce RTX 4090".into()),
        (Grade::C, |d| d.l2_bytes /= 2),
        (Grade::C, |d| d.memory_bytes /= 2),
        (Grade::C, |d| d.mig = Some(true)),
    ] {
        broken(Rule::DeviceMismatch, grade, device(change));
    }
    broken(Rule::AlteredDataSheet, Grade::C, |p| p.manifest.gpu.fp32_flops_per_s *= 1.5);
}

#[test]
fn missing_parts() {
    broken(Rule::MissingEvidence, Grade::C, |p| p.manifest.device = None);
    broken(Rule::MissingEvidence, Grade::C, |p| p.manifest.evidence = None);
    broken(Rule::MissingEvidence, Grade::C, |p| p.manifest.evidence.as_mut().unwrap().during.clear());
    broken(Rule::MissingCeilings, Grade::B, |p| {
        p.manifest.evidence.as_mut().unwrap().matmul_flops_per_s = None;
    });
    broken(Rule::MissingHostCosts, Grade::B, |p| p.host = None);
    broken(Rule::NoPredictors, Grade::C, |p| p.predictors.clear());
    broken(Rule::NoSamples, Grade::D, |p| p.samples.clear());
    broken(Rule::Incomplete, Grade::B, |p| p.manifest.incomplete.push("rope: 3 points not measured".into()));
    broken(Rule::Incomplete, Grade::C, |p| p.manifest.incomplete = vec!["rope: one".into(); 11]);
    let mut parts = Parts::sound();
    parts.manifest.device.as_mut().unwrap().driver_version = None;
    let report = parts.lint();
    assert_eq!((report.grade, report.findings[0].severity), (Grade::A, Severity::Info));
}

#[test]
fn predictors_and_profiles_of_something_else() {
    let report =
        broken(Rule::OtherSamples, Grade::F, |p| scale(p.at(Operator::Rope, 4).next().unwrap(), 1.01));
    assert!(report.findings[0].found.starts_with("1 of 14"), "{:?}", report.findings);
    broken(Rule::OtherSamples, Grade::F, |p| p.samples.retain(|s| s.operator != Operator::Rope));
    broken(Rule::OtherCacheState, Grade::C, |p| {
        let norms = p.samples.iter_mut().filter(|s| s.operator == Operator::RmsNorm);
        norms.for_each(|sample| sample.cache = CacheState::Cold);
    });
    broken(Rule::UnseenSamples, Grade::B, |p| {
        let seen: Vec<_> = p.samples.iter().filter(|s| s.shape.values()[0] != 4).cloned().collect();
        let norms = predictor(Operator::RmsNorm, &seen).unwrap();
        *p.predictors.iter_mut().find(|o| o.operator == Operator::RmsNorm).unwrap() = norms;
    });
    broken(Rule::MissingEvidence, Grade::C, |p| p.predictors[0].samples_digest.clear());
    let engine = |change: fn(&mut EngineProfile)| move |p: &mut Parts| p.engine.iter_mut().for_each(change);
    broken(Rule::OtherPredictors, Grade::C, engine(|e| e.fitted_on.predictors_digest = "0".repeat(64)));
    broken(Rule::OtherPredictors, Grade::C, engine(|e| e.fitted_on.bundle_gpu = "a100-sxm4-80gb".into()));
    let mut parts = Parts::sound();
    parts.engine.as_mut().unwrap().fitted_on.gpu = "a100-sxm4-80gb".into();
    let report = parts.lint();
    assert_eq!((report.grade, report.findings[0].rule), (Grade::A, Rule::OtherGpu));
}

#[test]
fn a_predictor_of_another_gpu_is_told_and_not_held_against_the_samples() {
    let mut parts = Parts::sound();
    let [a100, h100] = ["a100-sxm4-80gb", "h100-sxm5-80gb"].map(|name| GpuSpec::by_name(name).unwrap());
    // Times of its own, as another GPU's are.
    scale(parts.at(Operator::Rope, 4).next().unwrap(), 1.01);
    let rope = parts.predictors.iter_mut().find(|p| p.operator == Operator::Rope).unwrap();
    *rope = rope.carried_to(&a100, &h100);
    let report = parts.lint();
    let [finding] = report.findings.as_slice() else { panic!("{:?}", report.findings) };
    assert_eq!((report.grade, finding.rule, finding.severity), (Grade::A, Rule::OtherGpu, Severity::Info));
    assert!(finding.found.contains("a100-sxm4-80gb"), "{finding:?}");
}

#[test]
fn uneven_grids() {
    let folder = tempfile::tempdir().unwrap();
    let keep = |fits: fn(u64) -> bool| {
        move |p: &mut Parts| {
            p.samples.retain(|s| {
                let values = s.shape.values();
                s.operator != Operator::RmsNorm || values[1] == 1024 || fits(values[0])
            });
        }
    };
    let report = broken_samples(Rule::RaggedGrid, Grade::B, keep(|tokens| tokens <= 16));
    assert_eq!(report.findings[0].shape.as_deref(), Some("hidden_size = 2048"));
    let report = broken_samples(Rule::Hole, Grade::B, keep(|tokens| !(4..=16).contains(&tokens)));
    assert!(report.findings[0].found.starts_with("2 and 32, 16.0 times"), "{:?}", report.findings);
    // A sparse layout tells how times depend on the layout; one that a model has is to be a curve.
    let mut single = Parts::sound();
    keep(|tokens| tokens == 64)(&mut single);
    single.train();
    let wide = LintOptions { models: vec![model("small", 1), model("wide", 2)], ..options() };
    let report = lint(&single.write(folder.path()), &options()).unwrap();
    assert_eq!((report.grade, report.findings.len()), (Grade::A, 1), "{:#?}", report.findings);
    assert_eq!((report.findings[0].rule, report.findings[0].severity), (Rule::RaggedGrid, Severity::Info));
    let report = lint(&Bundle::open(&folder.path().join("bundle")).unwrap(), &wide).unwrap();
    let found = rules(&report);
    assert!(found.is_superset(&BTreeSet::from([Rule::RaggedGrid, Rule::SinglePoint])), "{found:?}");
    assert!(report.grade >= Grade::B, "{:?}", report.reasons);
    // The state that no model runs is measured sparsely on purpose.
    let mut parts = Parts::sound();
    let mut other = parts.at(Operator::RmsNorm, 64).next().unwrap().clone();
    other.cache = CacheState::Cold;
    parts.samples.push(other);
    assert_eq!(parts.lint().findings.iter().map(|f| f.rule).collect::<Vec<_>>(), [Rule::RepeatedStatistics]);
}

#[test]
fn numbers_that_were_not_measured() {
    let rows = |p: &mut Parts, num: usize, change: fn(&mut Sample)| {
        p.samples.iter_mut().filter(|s| s.operator == Operator::RmsNorm).take(num).for_each(change);
    };
    broken_samples(Rule::ZeroSpread, Grade::F, |p| rows(p, 9, |s| s.stats.std_ns = 0.0));
    broken_samples(Rule::ZeroSpread, Grade::C, |p| rows(p, 2, |s| s.stats.std_ns = 0.0));
    // One row for another.
    let copy = |num: usize| {
        move |p: &mut Parts| {
            let stats = p.at(Operator::RmsNorm, 4).next().unwrap().stats;
            for size in [2, 8].into_iter().take(num) {
                p.at(Operator::RmsNorm, size).next().unwrap().stats = stats;
            }
        }
    };
    broken_samples(Rule::RepeatedStatistics, Grade::C, copy(1));
    broken_samples(Rule::RepeatedStatistics, Grade::F, copy(2));
    let report = broken_samples(Rule::ConstantTimes, Grade::F, |p| {
        rows(p, usize::MAX, |s| s.stats = TimeStats::from_times(&[3000.0]).unwrap());
        // Of one time each, or the copies would be found too.
        let norms = p.samples.iter_mut().filter(|s| s.operator == Operator::RmsNorm).enumerate();
        norms.for_each(|(i, s)| s.stats = TimeStats { n: 10, std_ns: 1.0 + i as f64, ..s.stats });
    });
    assert_eq!(report.findings.len(), 1);
    broken(Rule::ConstantReading, Grade::C, |p| p.samples.iter_mut().for_each(|s| s.power_w = Some(312.5)));
    broken(Rule::ConstantReading, Grade::C, |p| {
        p.samples.iter_mut().for_each(|s| s.sm_clock_mhz = Some(1980));
        p.samples[0].flags = "throttled".into();
    });
    let mut locked = Parts::sound();
    locked.samples.iter_mut().for_each(|s| s.sm_clock_mhz = Some(1980));
    let report = locked.lint();
    assert_eq!((report.grade, report.findings[0].severity), (Grade::A, Severity::Info));
}

#[test]
fn points_measured_badly() {
    let mark = |share: usize, flag: &'static str| {
        move |p: &mut Parts| {
            p.samples
                .iter_mut()
                .enumerate()
                .filter(|(i, _)| i % 100 < share)
                .for_each(|(_, s)| s.flags = flag.into());
        }
    };
    for flag in ["noisy", "bimodal", "clock_shifted", "throttled|time_limit"] {
        broken(Rule::Disturbed, Grade::B, mark(10, flag));
    }
    broken(Rule::Disturbed, Grade::D, mark(60, "noisy"));
    broken(Rule::Disturbed, Grade::C, |p| {
        p.samples.iter_mut().step_by(5).for_each(|s| s.throttle = "sw_power_cap|hw_thermal_slowdown".into());
    });
    // The power cap is what a GPU sustains.
    let mut capped = Parts::sound();
    mark(50, "throttled")(&mut capped);
    let report = capped.lint();
    assert_eq!(report.grade, Grade::A, "{:?}", report.reasons);
    assert!(report.findings.iter().all(|f| f.rule == Rule::Throttled), "{:?}", report.findings);
    broken(Rule::FewSamples, Grade::C, |p| p.samples.iter_mut().for_each(|s| s.stats.n = 3));
}

#[test]
fn launches_that_would_be_refused() {
    let request = |id: u64, num_prefill_tokens: u32, num_decode_tokens: u32| {
        WorkloadRequest::new(id, plumbline_schema::Nanos(id), num_prefill_tokens, num_decode_tokens)
    };
    let short = Workload { requests: vec![request(0, 8, 8), request(1, 16, 16)] };
    let long =
        LintOptions { models: vec![ModelSpec { max_positions: 4096, ..model("small", 1) }], ..options() };
    // Longer than anything measured; not so when the workload stays short.
    let report = Parts::sound().lint_with(&long);
    assert_eq!(rules(&report), BTreeSet::from([Rule::Refused]));
    assert!(report.findings.iter().all(|f| f.operator == Some(Operator::Attention)), "{:?}", report.findings);
    assert!(report.coverage[0].operators.iter().all(|o| (o.num_refused > 0) == o.is_beyond_range));
    let report = Parts::sound().lint_with(&LintOptions { workload: Some(short), ..long });
    assert_eq!(report.grade, Grade::A, "{:#?}", report.findings);

    // More tokens a step: everything is refused there, with or without predictors.
    let wide = LintOptions { max_num_seqs: 64, ..options() };
    let trained = Parts::sound().lint_with(&wide);
    let mut untrained = Parts::sound();
    untrained.predictors.clear();
    let untrained = untrained.lint_with(&wide);
    assert!(trained.coverage[0].num_refused > 0);
    assert_eq!(trained.coverage[0].num_refused, untrained.coverage[0].num_refused);

    // A model of other sizes.
    let other = LintOptions { models: vec![model("other", 3)], ..options() };
    let report = Parts::sound().lint_with(&other);
    assert_eq!(report.grade, Grade::D, "{:?}", report.reasons);
    let norm = report.findings.iter().find(|f| f.operator == Some(Operator::RmsNorm)).unwrap();
    assert!(norm.found.contains("hidden_size = 3072"), "{norm:?}");
    assert!(norm.hint.contains("--model other"), "{norm:?}");

    // A name alone says nothing, and never leads to a file.
    let mut parts = Parts::sound();
    parts.manifest.models = vec!["../../../etc/passwd".into()];
    let report = parts.lint_with(&LintOptions { models: vec![], ..options() });
    assert_eq!((report.findings[0].rule, report.coverage.len()), (Rule::UnjudgedModel, 0));
}

#[test]
fn a_part_that_cannot_be_read_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = Parts::sound().write(folder.path());
    std::fs::write(bundle.root.join("samples/rope.csv"), "x").unwrap();
    let error = lint(&bundle, &options()).unwrap_err().to_string();
    assert!(error.contains("samples/rope.csv"), "{error}");
}

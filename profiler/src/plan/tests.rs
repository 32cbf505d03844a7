use std::collections::{BTreeMap, HashMap};

use plumbline_schema::{PrefillChunk, units::Nanos};
use plumbline_schema::{StepBatch, Workload, WorkloadRequest};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use super::{layout::layout_of, *};

fn shipped() -> Vec<ModelSpec> {
    ModelSpec::shipped_names().into_iter().map(|name| ModelSpec::load(name).unwrap()).collect()
}

fn model(name: &str, [hidden, q, kv, head_dim, intermediate, vocab]: [u32; 6]) -> ModelSpec {
    ModelSpec {
        name: name.into(),
        hidden_size: hidden,
        num_layers: 32,
        num_q_heads: q,
        num_kv_heads: kv,
        head_dim,
        intermediate_size: intermediate,
        vocab_size: vocab,
        max_positions: 131_072,
        tied_embeddings: false,
        qk_norm: true,
    }
}

/// Published configurations: hidden size, query heads, key and value heads, size of a head, MLP width, vocabulary.
const REAL: [(&str, [u32; 6]); 33] = [
    ("Qwen2.5-0.5B", [896, 14, 2, 64, 4864, 151_936]),
    ("Qwen2.5-1.5B", [1536, 12, 2, 128, 8960, 151_936]),
    ("Qwen2.5-3B", [2048, 16, 2, 128, 11_008, 151_936]),
    ("Qwen2.5-7B", [3584, 28, 4, 128, 18_944, 152_064]),
    ("Qwen2.5-14B", [5120, 40, 8, 128, 13_824, 152_064]),
    ("Qwen2.5-32B", [5120, 40, 8, 128, 27_648, 152_064]),
    ("Qwen2.5-72B", [8192, 64, 8, 128, 29_568, 152_064]),
    ("Qwen3-0.6B", [1024, 16, 8, 128, 3072, 151_936]),
    ("Qwen3-1.7B", [2048, 16, 8, 128, 6144, 151_936]),
    ("Qwen3-4B", [2560, 32, 8, 128, 9728, 151_936]),
    ("Qwen3-8B", [4096, 32, 8, 128, 12_288, 151_936]),
    ("Qwen3-14B", [5120, 40, 8, 128, 17_408, 151_936]),
    ("Qwen3-32B", [5120, 64, 8, 128, 25_600, 151_936]),
    ("Llama-2-7B", [4096, 32, 32, 128, 11_008, 32_000]),
    ("Llama-2-13B", [5120, 40, 40, 128, 13_824, 32_000]),
    ("Llama-2-70B", [8192, 64, 8, 128, 28_672, 32_000]),
    ("Llama-3-8B", [4096, 32, 8, 128, 14_336, 128_256]),
    ("Llama-3-70B", [8192, 64, 8, 128, 28_672, 128_256]),
    ("Llama-3.2-1B", [2048, 32, 8, 64, 8192, 128_256]),
    ("Llama-3.2-3B", [3072, 24, 8, 128, 8192, 128_256]),
    ("TinyLlama-1.1B", [2048, 32, 4, 64, 5632, 32_000]),
    ("SmolLM2-1.7B", [2048, 32, 32, 64, 8192, 49_152]),
    ("Mistral-7B", [4096, 32, 8, 128, 14_336, 32_768]),
    ("Mistral-Nemo-12B", [5120, 32, 8, 128, 14_336, 131_072]),
    ("Mistral-Small-24B", [5120, 32, 8, 128, 32_768, 131_072]),
    ("Yi-34B", [7168, 56, 8, 128, 20_480, 64_000]),
    ("Gemma-2-27B", [4608, 32, 16, 128, 36_864, 256_128]),
    // Its MLP and vocabulary; heads half as large and twice as many.
    ("Gemma-7B's widths", [3072, 32, 32, 128, 24_576, 256_000]),
    ("Phi-3-mini", [3072, 32, 32, 96, 8192, 32_064]),
    ("OPT-1.3B", [2048, 32, 32, 64, 8192, 50_272]),
    ("OPT-6.7B", [4096, 32, 32, 128, 16_384, 50_272]),
    ("OPT-30B", [7168, 56, 56, 128, 28_672, 50_272]),
    ("OPT-66B", [9216, 72, 72, 128, 36_864, 50_272]),
];

fn with_grid() -> Plan {
    Plan::with_grid(&shipped(), &Envelope::default()).unwrap()
}

fn layout_key(planned: &PlannedPoint) -> (Operator, PointSource, Vec<u64>) {
    let operator = planned.point.operator;
    (operator, planned.source, layout_of(operator, &planned.point.shape))
}

fn is_main(planned: &PlannedPoint) -> bool {
    planned.cache == CacheState::in_model(planned.point.operator)
}

#[test]
fn the_plan_of_the_shipped_models_has_its_size_and_no_point_twice() {
    let plan = Plan::new(&shipped(), &Envelope::default()).unwrap();
    let unique: HashSet<_> = plan.points.iter().map(|planned| (&planned.point, planned.cache)).collect();
    assert_eq!(unique.len(), plan.points.len());
    assert!((1200..2000).contains(&plan.points.len()), "{}", plan.points.len());
    assert_eq!(plan.operators().collect::<Vec<_>>(), Operator::ALL[..13]);
    assert!(plan.checks.len() < 120, "{}", plan.checks.len());
    assert_eq!(plan, Plan::new(&shipped(), &Envelope::default()).unwrap());
    // Every operator is checked before it is timed.
    assert!(plan.operators().all(|op| plan.checks.iter().filter(|c| c.operator == op).count() >= 3));
    // Each point in the state that predictors are trained on, few in the other.
    let others = plan.points.iter().filter(|planned| !is_main(planned)).count();
    assert!((40..160).contains(&others), "{others}");
}

#[test]
fn the_grid_adds_its_points_to_those_of_the_models() {
    let (plan, models) = (with_grid(), Plan::new(&shipped(), &Envelope::default()).unwrap());
    assert_eq!(plan, with_grid());
    let unique: HashSet<_> = plan.points.iter().map(|planned| (&planned.point, planned.cache)).collect();
    assert_eq!(unique.len(), plan.points.len());
    let summary = plan.summary();
    let num_grid: usize = summary.operators.iter().map(|o| o.num_grid).sum();
    let num_model: usize = summary.operators.iter().map(|o| o.num_model).sum();
    assert_eq!((num_model, num_model + num_grid), (models.points.len(), plan.points.len()));
    assert!((1400..=1800).contains(&num_grid), "{summary}");
    for of in &summary.operators {
        let (least, most) = match of.operator {
            op if op.is_gemm() && op != Operator::LmHead => (150, 270),
            Operator::Attention => (180, 280),
            _ => (30, 170),
        };
        assert!((least..=most).contains(&of.num_grid), "{summary}");
    }
    assert!(plan.checks.len() < 210, "{}", plan.checks.len());
    let grid = || plan.points.iter().filter(|planned| planned.source == PointSource::Grid);
    assert!(grid().all(is_main));
    assert!(grid().all(|planned| planned.point.shape.bytes().0 <= 8 << 30));
    // The longest would run 20 ms at the bandwidth and the ratio of an H100.
    assert!(grid().all(|planned| cost(&planned.point.shape) <= 67_000_000_000));
    // No two architectures share their sizes.
    let mut sizes: BTreeMap<Vec<u64>, Vec<u64>> = BTreeMap::new();
    for planned in grid().filter(|planned| planned.point.operator == Operator::QkvProj) {
        sizes.entry(layout_key(planned).2).or_default().push(planned.point.shape.values()[0]);
    }
    let mut all: Vec<_> = sizes.values_mut().map(|sizes| (sizes.sort_unstable(), sizes.clone()).1).collect();
    let count = all.len();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), count);
    // A grid needs no models.
    let alone = Plan::with_grid(&[], &Envelope::default()).unwrap();
    assert_eq!(alone.points.len(), alone.summary().operators.iter().map(|o| o.num_grid).sum::<usize>());
    assert!(alone.points.len() >= num_grid && alone.operators().count() == 13);
}

#[test]
fn every_real_model_and_its_shards_lie_within_the_grid() {
    let grid = Plan::with_grid(&[], &Envelope::default()).unwrap();
    for (name, numbers) in REAL {
        let real = model(name, numbers);
        for tp in [1, 2, 4, 8].into_iter().filter(|&tp| real.num_kv_heads.is_multiple_of(tp)) {
            let envelope = Envelope { tensor_parallel_sizes: vec![tp], ..Envelope::default() };
            for gap in grid.uncovered(std::slice::from_ref(&real), &envelope).unwrap() {
                let is_known = match gap.gap {
                    // Between GPUs nothing is measured.
                    Gap::NotPlanned => gap.operator == Operator::AllReduce,
                    // There are kernels for heads of 64 and 128.
                    Gap::Layout { .. } => real.head_dim == 96,
                    Gap::Number { .. } => false,
                };
                assert!(is_known, "{gap}");
            }
        }
    }
}

#[test]
fn a_tenth_of_the_plan_is_a_plan() {
    let plan = with_grid();
    let tenth = &plan.points[..plan.points.len() / 10];
    assert_eq!(tenth.iter().map(|p| p.point.operator).collect::<HashSet<_>>().len(), 13);
    let mut ends: HashMap<_, [u64; 2]> = HashMap::new();
    for planned in plan.points.iter().filter(|p| p.source == PointSource::Model && is_main(p)) {
        let work = cost(&planned.point.shape);
        let [least, most] = ends.entry(layout_key(planned)).or_insert([work; 2]);
        (*least, *most) = ((*least).min(work), (*most).max(work));
    }
    assert!(ends.len() > 20);
    for (layout, ends) in ends {
        for end in ends {
            let has = |p: &PlannedPoint| layout_key(p) == layout && cost(&p.point.shape) == end;
            assert!(tenth.iter().any(has), "{layout:?}");
        }
    }
    // Of the grid it has layouts that span as much as all of them, or nearly.
    for operator in plan.operators() {
        let span = |points: &[PlannedPoint]| {
            let grid =
                points.iter().filter(|p| p.source == PointSource::Grid && p.point.operator == operator);
            let widths = grid.map(|p| layout_key(p).2.iter().map(|&x| (x as f64).ln()).sum::<f64>());
            let (low, high) =
                widths.fold((f64::MAX, f64::MIN), |(low, high), width| (low.min(width), high.max(width)));
            high - low
        };
        let share = span(tenth) / span(&plan.points);
        assert!(share > 0.5, "{operator} {share}");
    }
    // And about a tenth of the layouts' points are in it, whatever the operator.
    for operator in plan.operators() {
        let of =
            |points: &[PlannedPoint]| points.iter().filter(|p| p.point.operator == operator).count() as f64;
        let share = of(tenth) / of(&plan.points);
        assert!((0.05..0.2).contains(&share), "{operator} {share}");
    }
}

#[test]
fn held_out_points_are_few_inner_and_early() {
    let plan = with_grid();
    for of in plan.summary().operators {
        let share = of.num_held_out as f64 / (of.num_model + of.num_grid) as f64;
        assert!((0.03..=0.07).contains(&share), "{of:?}");
    }
    let held_out = || plan.points.iter().enumerate().filter(|(_, planned)| planned.is_held_out);
    assert!(held_out().all(|(i, planned)| is_main(planned) && i < plan.points.len() / 3));
    let mut layouts: HashMap<_, Vec<&PlannedPoint>> = HashMap::new();
    for planned in plan.points.iter().filter(|planned| is_main(planned)) {
        layouts.entry(layout_key(planned)).or_default().push(planned);
    }
    for group in layouts.values() {
        let work = |planned: &&PlannedPoint| cost(&planned.point.shape);
        let rest = || group.iter().copied().filter(|planned| !planned.is_held_out);
        assert_eq!(rest().map(|p| work(&p)).min(), group.iter().map(work).min());
        assert_eq!(rest().map(|p| work(&p)).max(), group.iter().map(work).max());
    }
    // Both sources are judged.
    for source in [PointSource::Model, PointSource::Grid] {
        assert!(held_out().filter(|(_, planned)| planned.source == source).count() > 40);
    }
}

#[test]
fn the_stated_models_are_covered_and_what_is_not_is_listed() {
    let plan = with_grid();
    assert_eq!(plan.uncovered, []);
    assert_eq!(Plan::new(&shipped(), &Envelope::default()).unwrap().uncovered, []);

    // Beyond the envelope: each number that goes beyond, once, with those who ask for it.
    let wider = Envelope { max_num_tokens: 16_384, max_model_len: 65_536, ..Envelope::default() };
    let texts: Vec<String> =
        plan.uncovered(&shipped(), &wider).unwrap().iter().map(ToString::to_string).collect();
    let expected = "qkv_proj: m asked for 1..=16384, planned 1..=8192 (qwen3-0.6b; llama3-8b)";
    assert!(texts.iter().any(|text| text == expected), "{texts:?}");
    assert!(
        texts.iter().any(|text| text.starts_with("attention: prefill_pairs asked for 0..=")),
        "{texts:?}"
    );

    // A model that was not stated, without a grid and with one.
    let other = [model("Qwen2.5-7B", [3584, 28, 4, 128, 18_944, 152_064])];
    let alone = Plan::new(&shipped(), &Envelope::default()).unwrap();
    let gaps = alone.uncovered(&other, &Envelope::default()).unwrap();
    let expected = "silu_mul: intermediate_size asked for 18944..=18944, planned 3072..=14336 (Qwen2.5-7B)";
    assert!(gaps.iter().any(|gap| gap.to_string() == expected), "{gaps:?}");
    assert_eq!(plan.uncovered(&other, &Envelope::default()).unwrap(), []);

    // A layout that nothing lies near, and an operator that is not measured.
    let odd = [model("odd", [4096, 32, 32, 96, 14_336, 128_256])];
    let two = Envelope { tensor_parallel_sizes: vec![1, 2], ..Envelope::default() };
    let texts: Vec<String> = plan.uncovered(&odd, &two).unwrap().iter().map(ToString::to_string).collect();
    let expected = "rope: nothing planned near num_q_heads = 32, num_kv_heads = 32, head_dim = 96 (odd)";
    assert!(texts.iter().any(|text| text == expected), "{texts:?}");
    assert!(texts.iter().any(|text| text == "all_reduce: not planned (odd on 2 GPUs)"), "{texts:?}");
    let three = Envelope { tensor_parallel_sizes: vec![3], ..Envelope::default() };
    assert!(plan.uncovered(&odd, &three).is_err());
}

#[test]
fn a_workload_narrows_the_envelope_but_not_its_lengths() {
    let request = |request_id, num_prefill_tokens, num_decode_tokens| {
        WorkloadRequest::new(request_id, Nanos(request_id), num_prefill_tokens, num_decode_tokens)
    };
    let limits = Envelope::default();
    let few = Workload { requests: vec![request(0, 1000, 100), request(1, 40_000, 7)] };
    let asked = limits.of_workload(&few);
    let expected =
        Envelope { max_num_seqs: 2, max_model_len: 40_007, max_kv_tokens: 41_107, ..limits.clone() };
    assert_eq!(asked, expected);
    let many = Workload { requests: (0..1000).map(|id| request(id, 2000, 48)).collect() };
    assert_eq!(limits.of_workload(&many), Envelope { max_model_len: 2048, ..limits });
    // One request of 40,007 tokens is longer than planned, for the model that takes it.
    let plan = Plan::new(&shipped(), &Envelope::default()).unwrap();
    let long = [model("Llama-3-8B", [4096, 32, 8, 128, 14_336, 128_256])];
    let gaps: Vec<String> = plan.uncovered(&long, &asked).unwrap().iter().map(ToString::to_string).collect();
    let expected = "attention: max_decode_kv_tokens asked for 0..=40007, planned 0..=32768 (Llama-3-8B)";
    assert!(gaps.iter().any(|gap| gap == expected), "{gaps:?}");
}

/// No batch within an envelope goes beyond its extremes, and each number's extreme is reached.
#[test]
fn nothing_goes_beyond_the_extremes() {
    let mut random = Pcg64::seed_from_u64(1);
    for _ in 0..300 {
        let max_len = random.random_range(1..400);
        let envelope = Envelope {
            max_num_tokens: random.random_range(1..300),
            max_num_seqs: random.random_range(1..12),
            max_model_len: max_len,
            max_kv_tokens: random.random_range(1..2000),
            tensor_parallel_sizes: vec![1],
        };
        let extremes = batches::extremes(&envelope, max_len);
        assert!(extremes.iter().all(|batch| batches::fits(batch, &envelope, max_len)), "{envelope:?}");
        let loads = extremes.iter().map(|batch| batch.shape().attention);
        let most = loads.reduce(coverage::largest).unwrap();
        for _ in 0..300 {
            let mut batch = StepBatch::default();
            for _ in 0..random.random_range(0..=envelope.max_num_seqs) {
                let keys = if random.random() { max_len } else { random.random_range(1..=max_len) };
                if random.random() {
                    let num_tokens = random.random_range(1..=keys.min(envelope.max_num_tokens));
                    batch.prefill_chunks.push(PrefillChunk { num_tokens, context_len: keys - num_tokens });
                } else {
                    batch.decode_contexts.push(keys - 1);
                }
            }
            if batches::fits(&batch, &envelope, max_len) {
                let load = batch.shape().attention;
                assert_eq!(coverage::largest(most, load), most, "{envelope:?} {batch:?}");
            }
        }
    }
}

#[test]
fn points_stay_inside_the_envelope() {
    let envelope = Envelope {
        max_num_tokens: 500,
        max_num_seqs: 20,
        max_model_len: 3000,
        max_kv_tokens: 20_000,
        tensor_parallel_sizes: vec![1, 2],
    };
    let plan = Plan::with_grid(&shipped(), &envelope).unwrap();
    assert_eq!(plan.uncovered.iter().map(|gap| gap.operator).collect::<Vec<_>>(), [Operator::AllReduce]);
    let mut largest = 0;
    for planned in &plan.points {
        match (&planned.point.shape, &planned.point.batch) {
            (OperatorShape::Attention { load, .. }, Some(batch)) => {
                assert_eq!(*load, batch.shape().attention);
                assert!(load.num_tokens() <= 500 && batch.shape().num_seqs <= 20, "{batch:?}");
                assert!(load.prefill_kv_tokens + load.decode_kv_tokens <= 20_000);
                assert!(batch.prefill_chunks.iter().all(|c| c.num_tokens + c.context_len <= 3000));
                assert!(batch.decode_contexts.iter().all(|&c| c < 3000));
            }
            (OperatorShape::Collective { .. }, _) => panic!("a collective needs several GPUs"),
            (shape, None) => largest = largest.max(shape.values()[0]),
            (shape, Some(_)) => panic!("{shape:?} with sequences"),
        }
    }
    assert_eq!(largest, 500);
    let bad = Envelope { tensor_parallel_sizes: vec![3], ..envelope };
    assert!(Plan::with_grid(&shipped(), &bad).is_err());
    // Hardly anything fits, and that is planned.
    let tiny = Envelope {
        max_num_tokens: 1,
        max_num_seqs: 1,
        max_model_len: 1,
        max_kv_tokens: 1,
        tensor_parallel_sizes: vec![1],
    };
    let plan = Plan::with_grid(&shipped(), &tiny).unwrap();
    assert_eq!((plan.operators().count(), plan.uncovered.len()), (13, 0));
}

#[test]
fn plans_of_earlier_bundles_can_be_read() {
    let point =
        r#"{"operator":"rms_norm","shape":{"rms_norm":{"num_tokens":1,"hidden_size":8}},"batch":null}"#;
    let envelope = serde_json::to_string(&Envelope::default()).unwrap();
    let text = format!(
        r#"{{"models":["m"],"envelope":{envelope},"checks":[],"points":[{{"point":{point},"cache":"cold"}}]}}"#
    );
    let plan: Plan = serde_json::from_str(&text).unwrap();
    assert_eq!((plan.points[0].source, plan.points[0].is_held_out), (PointSource::Model, false));
    let plan = with_grid();
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
}

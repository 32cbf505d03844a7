use std::{
    path::Path,
    sync::{Arc, LazyLock},
};

use plumbline_schema::{GpuSpec, PrefillChunk};
use proptest::prelude::*;

use super::*;
use crate::{Bundle, predictor::CompiledPredictors};

/// The shipped predictors, and those of the H100 slowed down under a lasting load and carried to another GPU.
static PREDICTORS: LazyLock<[Arc<Predictors>; 4]> = LazyLock::new(|| {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
    let read = |name: &str| Bundle::open(&data.join(name)).unwrap().predictors().unwrap();
    let (shipped, other) = (read("h100-sxm5-80gb"), read("h200-sxm-141gb"));
    let mut sustained = shipped.sustained();
    sustained.attention = 1.07;
    let a100 = GpuSpec::by_name("a100-sxm4-80gb").unwrap();
    let (slowed, transferred) =
        (shipped.clone().with_sustained(sustained), shipped.clone().transferred_to(a100));
    [shipped, slowed, transferred, other].map(Arc::new)
});

/// What happens to a batch between two questions.
#[derive(Clone, Debug)]
enum Event {
    /// Every sequence gets this many tokens, a question each.
    Grow(u32),
    Arrive(u32),
    Finish(usize),
    /// Chunks join for one step, or come alone.
    Chunks(Vec<PrefillChunk>, bool),
    /// Another batch.
    Start(Vec<u32>),
    /// Numbers of no batch.
    Ask(AttentionLoad),
}

fn context() -> impl Strategy<Value = u32> {
    prop_oneof![8 => 0..4000u32, 2 => 0..40_000u32, 1 => 0..=u32::MAX]
}

fn batch() -> impl Strategy<Value = Vec<u32>> {
    let alike = (context(), 1..700usize).prop_map(|(context, len)| vec![context; len]);
    prop_oneof![
        4 => prop::collection::vec(context(), 1..40),
        2 => prop::collection::vec(0..3000u32, 1..700),
        1 => alike,
    ]
}

/// Any numbers, with chunks or without, many of them those of a load of decodes.
fn numbers() -> impl Strategy<Value = AttentionLoad> {
    let number =
        || prop_oneof![3 => Just(0u64), 3 => 0..3000u64, 1 => 0..=u64::from(u32::MAX), 1 => any::<u64>()];
    (prop::collection::vec(number(), 7), any::<bool>()).prop_map(|(n, has_chunks)| {
        let mut load = AttentionLoad {
            num_prefill_seqs: n[0] as u32 & 1,
            // Sums beyond 64 bits are no load's.
            prefill_kv_tokens: n[1] >> 8,
            num_decode_seqs: n[2] as u32,
            decode_kv_tokens: n[3] >> 8,
            max_decode_kv_tokens: n[4] as u32,
            ..AttentionLoad::default()
        };
        if has_chunks {
            load.num_prefill_seqs = n[0] as u32;
            (load.num_prefill_tokens, load.prefill_pairs) = (n[5] as u32, n[6] >> 8);
        }
        load
    })
}

fn event() -> impl Strategy<Value = Event> {
    let chunk = (1..3000u32, context())
        .prop_map(|(num_tokens, context_len)| PrefillChunk { num_tokens, context_len });
    let chunks = (prop::collection::vec(chunk, 1..4), any::<bool>())
        .prop_map(|(chunks, is_alone)| Event::Chunks(chunks, is_alone));
    prop_oneof![
        4 => (1..12u32).prop_map(Event::Grow),
        2 => (1..300u32).prop_map(Event::Grow),
        3 => context().prop_map(Event::Arrive),
        3 => any::<usize>().prop_map(Event::Finish),
        4 => chunks,
        1 => batch().prop_map(Event::Start),
        1 => numbers().prop_map(Event::Ask),
    ]
}

/// The loads that events ask for, one after another.
fn loads(events: &[Event]) -> Vec<AttentionLoad> {
    let (mut contexts, mut loads) = (vec![100u32, 900], Vec::new());
    let load_of = |contexts: &[u32]| {
        let mut load = AttentionLoad::default();
        for &context in contexts {
            load.add_decode(context);
        }
        load
    };
    for event in events {
        match event {
            Event::Grow(steps) => {
                for _ in 0..*steps {
                    for context in &mut contexts {
                        *context = context.saturating_add(1);
                    }
                    loads.push(load_of(&contexts));
                }
            }
            Event::Arrive(context) => contexts.push(*context),
            Event::Finish(i) if !contexts.is_empty() => drop(contexts.swap_remove(i % contexts.len())),
            Event::Finish(_) => {}
            Event::Start(batch) => contexts.clone_from(batch),
            Event::Chunks(chunks, is_alone) => {
                let mut load = load_of(if *is_alone { &[] } else { &contexts });
                for &chunk in chunks {
                    load.add_prefill(chunk);
                }
                loads.push(load);
            }
            Event::Ask(load) => loads.push(*load),
        }
        loads.extend((!matches!(event, Event::Ask(_))).then(|| load_of(&contexts)));
    }
    loads
}

fn heads() -> impl Strategy<Value = Heads> {
    let measured = [(32, 8), (16, 8), (8, 1), (64, 8), (28, 4)].map(|(num_q_heads, num_kv_heads)| Heads {
        num_q_heads,
        num_kv_heads,
        head_dim: 128,
    });
    let unmeasured = (1..200u32, 1..20u32, prop::sample::select(vec![64u32, 96, 128, 256]))
        .prop_map(|(num_q_heads, num_kv_heads, head_dim)| Heads { num_q_heads, num_kv_heads, head_dim });
    let hostile = (any::<u32>(), 0..3u32, 0..4000u32)
        .prop_map(|(num_q_heads, num_kv_heads, head_dim)| Heads { num_q_heads, num_kv_heads, head_dim });
    prop_oneof![8 => prop::sample::select(measured.to_vec()), 2 => unmeasured, 1 => hostile]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn answers_are_those_of_the_predictors(
        which in 0..4usize,
        sessions in prop::collection::vec((heads(), prop::collection::vec(event(), 1..20), any::<bool>()), 1..4),
    ) {
        let predictors = &PREDICTORS[which];
        let compiled = CompiledPredictors::new(Arc::clone(predictors));
        for (heads, events, refuses) in sessions {
            let rule = if refuses { OutOfDomain::Refuse } else { OutOfDomain::Extrapolate };
            for load in loads(&events) {
                let shape = OperatorShape::Attention { heads, load };
                let bits = |p: Prediction| ([p.time_ns, p.low_ns, p.high_ns].map(f64::to_bits), p.provenance);
                let expected = predictors.predict_in_step(ATTENTION, &shape, rule).map(bits);
                let found = compiled.predict_in_step(ATTENTION, &shape, rule).map(bits);
                prop_assert_eq!(expected, found, "{:?}", shape);
            }
        }
    }
}

#[test]
fn a_stretch_of_decodes_is_learned_a_few_times_only() {
    let predictors = &PREDICTORS[0];
    let heads = Heads { num_q_heads: 32, num_kv_heads: 8, head_dim: 128 };
    let mut first = AttentionLoad::default();
    (0..16).for_each(|seq| first.add_decode(301 + 77 * seq));
    let mut decodes = Decodes::new(predictors, heads).unwrap();
    let (mut num_left, mut num_runs, mut regions) = (0, 0, Vec::new());
    for step in 0..1000 {
        let load = grown(first, step);
        num_left += u32::from(decodes.predict(predictors, load, OutOfDomain::Extrapolate).is_none());
        num_runs += u32::from(decodes.last.is_some_and(|run| run.first == load));
        let region = decodes.regions[0].0;
        if regions.last() != Some(&region) {
            regions.push(region);
        }
    }
    assert!(regions.len() < 60 && num_runs < 250, "{} of {num_runs}", regions.len());
    // With as many keys as a load that was measured.
    assert!(num_left < 10, "{num_left}");
    assert_eq!(decodes.regions.len(), MAX_REGIONS);
}

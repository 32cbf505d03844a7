use std::collections::HashMap;

use plumbline_schema::AttentionLoad;
use proptest::prelude::*;

use super::*;
use crate::predictor::Provenance;

fn question(operator: Operator) -> Question {
    Question { operator, out_of_domain: OutOfDomain::Extrapolate }
}

fn prediction(time_ns: f64) -> Prediction {
    Prediction {
        time_ns,
        low_ns: 0.9 * time_ns,
        high_ns: 1.1 * time_ns,
        provenance: Provenance::Interpolated,
    }
}

fn norm(num_tokens: u32, hidden_size: u32) -> OperatorShape {
    OperatorShape::RmsNorm { num_tokens, hidden_size }
}

fn decodes(num_decode_seqs: u32, decode_kv_tokens: u64) -> OperatorShape {
    let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
    let load = AttentionLoad { num_decode_seqs, decode_kv_tokens, ..AttentionLoad::default() };
    OperatorShape::Attention { heads, load }
}

/// Any question, and a shape of its operator with few distinct numbers, some of them beyond the tables.
fn asked() -> impl Strategy<Value = (Question, OperatorShape)> {
    let numbers =
        prop_oneof![1..40u64, Just(u64::from(MAX_NUMBER) - 1), Just(u64::from(MAX_NUMBER)), Just(1 << 31)];
    (0..Operator::ALL.len(), any::<bool>(), prop::collection::vec(numbers, 10)).prop_map(
        |(operator, refuses, numbers)| {
            let operator = Operator::ALL[operator];
            let out_of_domain = if refuses { OutOfDomain::Refuse } else { OutOfDomain::Extrapolate };
            let shape =
                OperatorShape::from_values(operator, &numbers[..operator.shape_columns().len()]).unwrap();
            (Question { operator, out_of_domain }, shape)
        },
    )
}

proptest! {
    #[test]
    fn an_answer_is_the_last_one_put_or_none(all in prop::collection::vec(asked(), 1..600)) {
        let mut memory = Memory::default();
        let mut put = HashMap::new();
        for (i, (question, shape)) in all.iter().enumerate() {
            let time_ns = i as f64 + 1.0;
            memory.put(*question, shape, prediction(time_ns));
            prop_assert_eq!(memory.get(*question, shape), Some(prediction(time_ns)));
            put.insert((question.place(), *shape), time_ns);
        }
        let mut num_forgotten = 0;
        for (question, shape) in &all {
            match memory.get(*question, shape) {
                Some(answer) => prop_assert_eq!(answer, prediction(put[&(question.place(), *shape)])),
                None => num_forgotten += 1,
            }
        }
        prop_assert!(10 * num_forgotten <= all.len(), "{} of {}", num_forgotten, all.len());
    }
}

#[test]
fn each_question_has_a_place_of_its_own() {
    let mut places: Vec<usize> = Vec::new();
    for operator in Operator::ALL {
        for out_of_domain in [OutOfDomain::Refuse, OutOfDomain::Extrapolate] {
            places.push(Question { operator, out_of_domain }.place());
        }
    }
    places.sort_unstable();
    assert_eq!(places, (0..NUM_QUESTIONS).collect::<Vec<_>>());
}

#[test]
fn tables_forget_nothing_within_their_bounds() {
    let (norms, mut memory) = (question(Operator::RmsNorm), Memory::default());
    for number in 1..3000 {
        memory.put(norms, &norm(number, 1024), prediction(f64::from(number)));
    }
    assert_eq!(memory.get(norms, &norm(2999, 1024)), Some(prediction(2999.0)));
    assert_eq!(memory.get(norms, &norm(1, 1024)), Some(prediction(1.0)));
    assert_eq!(memory.get(norms, &norm(3000, 1024)), None);
    assert_eq!(memory.get(norms, &norm(1, 2048)), None);
    // Another operator has answers of its own for the same numbers, and none for a shape that it does not have.
    assert_eq!(memory.get(question(Operator::Embedding), &norm(1, 1024)), None);
    let embedding = OperatorShape::Embedding { num_tokens: 1, hidden_size: 1024 };
    assert_eq!(memory.get(question(Operator::Embedding), &embedding), None);
}

#[test]
fn layouts_beyond_the_tables_go_to_the_cache() {
    let (norms, mut memory) = (question(Operator::RmsNorm), Memory::default());
    for width in 1..=2 * MAX_TABLES as u32 {
        memory.put(norms, &norm(7, width), prediction(f64::from(width)));
    }
    assert_eq!(memory.tables.by_question[norms.place()].len(), MAX_TABLES);
    let num_known =
        (1..=2 * MAX_TABLES as u32).filter(|&width| memory.get(norms, &norm(7, width)).is_some()).count();
    assert!(num_known > MAX_TABLES && memory.cache.num_used > 0, "{num_known}");
}

#[test]
fn pages_are_bounded() {
    let mut memory = Memory::default();
    let operators = Operator::ALL.into_iter().filter(|operator| operator.is_gemm());
    for (operator, number) in operators.flat_map(|o| (0..MAX_NUMBER).step_by(PAGE).map(move |n| (o, n))) {
        let shape = OperatorShape::Gemm { m: number + 1, n: 1, k: 1 };
        memory.put(question(operator), &shape, prediction(1.0));
        assert!(memory.tables.num_pages <= MAX_PAGES);
        assert_eq!(memory.get(question(operator), &shape), Some(prediction(1.0)));
    }
    let num_pages = memory
        .tables
        .by_question
        .iter()
        .flatten()
        .flat_map(|table| &table.pages)
        .filter(|page| page.is_some())
        .count();
    assert_eq!(num_pages, memory.tables.num_pages);
    assert!(num_pages < 5 * MAX_NUMBER as usize / PAGE);
}

#[test]
fn the_cache_grows_with_what_it_holds_and_keeps_most_of_it() {
    let (attention, mut memory) = (question(Operator::Attention), Memory::default());
    assert_eq!(memory.get(attention, &decodes(1, 1)), None);
    assert!(memory.cache.slots.is_empty());
    let shapes: Vec<_> = (1..=2000).map(|i| decodes(1 + i % 7, u64::from(100 * i))).collect();
    for (i, shape) in shapes.iter().enumerate() {
        memory.put(attention, shape, prediction(i as f64));
    }
    assert_eq!(memory.cache.slots.len(), 8192);
    let num_known = shapes.iter().filter(|shape| memory.get(attention, shape).is_some()).count();
    assert_eq!(num_known, memory.cache.num_used);
    assert!(num_known > 1990, "{num_known}");
    for i in 0..100_000 {
        memory.put(attention, &decodes(3, i), prediction(1.0));
    }
    assert_eq!(memory.cache.slots.len(), MAX_SLOTS);
}

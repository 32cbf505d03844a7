//! Does the search for hyper-parameters find what a law needs?

use plumbline_bundles::Sample;
use plumbline_schema::{Operator, OperatorShape};
use plumbline_trainer::{
    TrainError, TrainOptions,
    select::{Grid, SelectProgress, Selection, select},
};

use crate::law::{gpu, sample, samples};

/// Batches of attention whose times swing with what they read and with their heads: no roofline says that, and one
/// split cannot.
fn swinging() -> Vec<Sample> {
    let attention = samples(1).into_iter().filter(|sample| sample.operator == Operator::Attention);
    attention
        .map(|old| {
            let OperatorShape::Attention { heads, load } = old.shape else { unreachable!("attention only") };
            let read = (load.prefill_kv_tokens + load.decode_kv_tokens) as f64;
            let swing = 1.0 + 0.25 * (1.5 * read.ln()).sin() + 0.005 * f64::from(heads.num_q_heads);
            sample(old.operator, old.shape, old.batch, swing)
        })
        .collect()
}

fn only_depths(depths: &[usize]) -> Grid {
    Grid {
        features_share: Vec::new(),
        min_samples_leaf: Vec::new(),
        max_depth: depths.to_vec(),
        num_trees: Vec::new(),
    }
}

fn search(grid: &Grid) -> (Selection, Vec<SelectProgress>) {
    let options = TrainOptions { num_trees: 8, max_depth: 1, ..TrainOptions::default() };
    let mut told = Vec::new();
    let selection = select(&swinging(), &gpu(), &options, grid, |progress| told.push(progress)).unwrap();
    (selection, told)
}

#[test]
fn a_depth_of_1_loses_where_a_law_has_more_than_one_step() {
    let (selection, _) = search(&only_depths(&[1, 2, 10]));
    let depths: Vec<usize> = selection.trials.iter().map(|trial| trial.setting.max_depth).collect();
    assert_eq!(depths, [1, 2, 10]);
    assert_eq!(selection.setting().max_depth, 10, "{selection:#?}");
    let shallow = &selection.trials[0];
    assert!(!shallow.is_tied && shallow.above_lowest > 3.0 * shallow.standard_error, "{selection:#?}");
    assert!(shallow.num_nodes < selection.trials[2].num_nodes);
}

#[test]
fn of_forests_that_do_the_same_the_smaller_is_taken() {
    // No tree of so few shapes is ten splits deep, so that the last two are the same forests.
    let (selection, _) = search(&only_depths(&[30, 40]));
    assert_eq!(selection.setting().max_depth, 30);
    let [_, a, b] = &selection.trials[..] else { panic!("{selection:#?}") };
    assert_eq!((a.num_nodes, a.score()), (b.num_nodes, b.score()));
}

#[test]
fn the_same_search_has_the_same_result_on_any_number_of_threads() {
    let grid = Grid { num_trees: vec![4, 8], ..only_depths(&[2, 6]) };
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| search(&grid).0)
    };
    let selection = on(1);
    assert_eq!(selection, on(2));
    let text = serde_json::to_string(&selection).unwrap();
    assert_eq!(serde_json::from_str::<Selection>(&text).unwrap(), selection);
}

#[test]
fn progress_counts_every_training_once() {
    let (selection, told) = search(&Grid { num_trees: vec![4, 8, 2], ..only_depths(&[1, 2]) });
    // The start, another depth, two other numbers of trees; one operator each.
    assert_eq!(selection.trials.len(), 4);
    let counts: Vec<_> = told.iter().map(|p| (p.trial, p.num_trials, p.done, p.total)).collect();
    assert_eq!(counts, [(1, 4, 0, 4), (2, 4, 1, 4), (3, 4, 2, 4), (4, 4, 3, 4)]);
    assert!(told.iter().all(|progress| progress.operator == Operator::Attention));
}

#[test]
fn a_value_that_training_refuses_is_an_error() {
    let options = TrainOptions::default();
    let error = select(&swinging(), &gpu(), &options, &only_depths(&[100]), |_| {}).unwrap_err();
    assert!(matches!(error, TrainError::InvalidOption { name: "max_depth", value: 100, .. }), "{error}");
}

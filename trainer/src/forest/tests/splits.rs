//! Splits are the best there are, however they are found.

use proptest::prelude::*;

use super::{
    super::{
        grow::{Grower, Grown},
        lists::Entry,
        split::{Content, Counted, Weighted},
        table::Table,
    },
    *,
};

/// Rows of three features, two of them with few values, a target and a weight.
type Row = (u8, u8, f32, f32, f32);

fn rows(most: usize) -> impl Strategy<Value = Vec<Row>> {
    prop::collection::vec((0u8..5, 0u8..4, -30.0f32..30.0, -50.0f32..50.0, 0.0f32..3.0), 2..most)
}

fn arrays(rows: &[Row]) -> (Array2<f64>, Array1<f64>) {
    let feature = |(i, c): (usize, usize)| match c {
        0 => f64::from(rows[i].0),
        1 => f64::from(rows[i].1),
        _ => f64::from(rows[i].2.round()),
    };
    (Array2::from_shape_fn((rows.len(), 3), feature), rows.iter().map(|row| f64::from(row.3)).collect())
}

fn grow<C: Content, E: Entry>(
    params: &RandomForestRegressorValidParams,
    table: &Table,
    entries_per_bin: usize,
) -> (Grown, Vec<u32>) {
    let mut grower = Grower::<C, E>::new(table, params);
    grower.bins().set_entries_per_bin(entries_per_bin);
    // What a grower has grown before must not matter.
    grower.grow(1);
    let grown = grower.grow(0);
    (grown, grower.drawn().to_vec())
}

/// A row drawn: its features, target, weight times draws, and draws.
struct Drawn {
    features: [f64; 3],
    target: f64,
    weight: f64,
    count: u32,
}

fn mean(rows: &[&Drawn]) -> f64 {
    let (sum, weight) =
        rows.iter().fold((0.0, 0.0), |(sum, weight), r| (sum + r.target * r.weight, weight + r.weight));
    sum / weight
}

fn squared_error(rows: &[&Drawn]) -> f64 {
    let mean = mean(rows);
    rows.iter().map(|row| row.weight * (row.target - mean).powi(2)).sum()
}

fn count(rows: &[&Drawn]) -> usize {
    rows.iter().map(|row| row.count as usize).sum()
}

/// By how much a split reduces the squared error; `None` when a side has too few samples.
fn gain(rows: &[&Drawn], feature: usize, threshold: f64, min_leaf: usize) -> Option<f64> {
    let (left, right): (Vec<&Drawn>, Vec<&Drawn>) =
        rows.iter().partition(|row| row.features[feature] <= threshold);
    let is_allowed = count(&left) >= min_leaf && count(&right) >= min_leaf;
    is_allowed.then(|| squared_error(rows) - squared_error(&left) - squared_error(&right))
}

fn best_gain(rows: &[&Drawn], feature: usize, min_leaf: usize) -> f64 {
    let gains = rows.iter().filter_map(|row| gain(rows, feature, row.features[feature], min_leaf));
    gains.fold(0.0, f64::max)
}

/// Checks a node and all below it.
fn check(
    tree: &plumbline_bundles::Tree,
    (index, depth): (usize, usize),
    rows: &[&Drawn],
    params: &RandomForestRegressorValidParams,
) -> Result<(), TestCaseError> {
    let node = &tree.nodes[index];
    let tolerance = 1e-9 * (1.0 + squared_error(rows));
    let best = |features: std::ops::Range<usize>| {
        features.map(|feature| best_gain(rows, feature, params.min_samples_leaf())).fold(0.0, f64::max)
    };
    let tries_all = params.max_features().of(3) == 3;
    if node.left == 0 {
        prop_assert!((mean(rows) - f64::from(node.threshold)).abs() < 1e-5);
        let is_final = depth == params.max_depth() || count(rows) < params.min_samples_split() || !tries_all;
        prop_assert!(is_final || best(0..3) < tolerance, "a leaf that {} would split", best(0..3));
        return Ok(());
    }
    prop_assert!(depth < params.max_depth() && count(rows) >= params.min_samples_split());
    let feature = usize::from(node.feature);
    let rivals = if tries_all { 0..3 } else { feature..feature + 1 };
    let threshold = f64::from(node.threshold);
    let gain = gain(rows, feature, threshold, params.min_samples_leaf());
    prop_assert!(
        gain.is_some_and(|gain| gain > best(rivals.clone()) - tolerance),
        "{gain:?} of {}",
        best(rivals)
    );
    let (left, right): (Vec<&Drawn>, Vec<&Drawn>) =
        rows.iter().partition(|row| row.features[feature] <= threshold);
    check(tree, (node.left as usize, depth + 1), &left, params)?;
    check(tree, (node.left as usize + 1, depth + 1), &right, params)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn every_split_reduces_the_squared_error_most(
        rows in rows(90),
        (bootstrap, weighted, tried) in (any::<bool>(), any::<bool>(), 1usize..4),
        (depth, split, leaf) in (0usize..12, 2usize..6, 1usize..5),
        seed in any::<u64>(),
    ) {
        let (x, y) = arrays(&rows);
        let params = RandomForestRegressorParams::new().max_depth(depth).min_samples_split(split).seed(seed);
        let params = params.min_samples_leaf(leaf).max_features(tried).bootstrap(bootstrap).check().unwrap();
        let weights: Vec<f32> = rows.iter().map(|row| if weighted { row.4 + 1e-3 } else { 1.0 }).collect();
        let table = Table::new(&x, y.view(), Some(&weights), |rows| params.num_draws(rows)).unwrap();
        let (grown, drawn) = if params.needs_counts(&table) {
            grow::<Counted, u32>(&params, &table, 4)
        } else {
            grow::<Weighted, u32>(&params, &table, 4)
        };
        let drawn: Vec<Drawn> = table.rows.iter().zip(drawn).filter(|(_, count)| *count > 0).map(|(row, count)| {
            let i = row.index as usize;
            let weight = f64::from(weights[i]) * f64::from(count);
            Drawn { features: [x[[i, 0]], x[[i, 1]], x[[i, 2]]], target: y[i], weight, count }
        }).collect();
        check(&grown.tree, (0, 0), &drawn.iter().collect::<Vec<_>>(), &params)?;
        let importance: f64 = grown.importances.iter().sum();
        prop_assert!((importance - f64::from(u8::from(grown.tree.nodes.len() > 1))).abs() < 1e-9);
    }

    #[test]
    fn the_tree_is_the_same_however_its_splits_are_found(
        rows in rows(120), tried in 1usize..4, leaf in 1usize..3, seed in any::<u64>(),
    ) {
        let (x, y) = arrays(&rows);
        let params = RandomForestRegressorParams::new().max_features(tried).min_samples_leaf(leaf).seed(seed);
        let params = params.check().unwrap();
        let table = Table::new(&x, y.view(), None, |rows| params.num_draws(rows)).unwrap();
        let trees = [
            grow::<Weighted, u32>(&params, &table, 4),
            grow::<Weighted, u32>(&params, &table, 0),
            grow::<Weighted, u32>(&params, &table, 1),
            grow::<Weighted, u64>(&params, &table, usize::MAX / (1 << 32)),
            grow::<Counted, u64>(&params, &table, 4),
        ];
        let canonical = trees.each_ref().map(|(grown, _)| depth_first(&grown.tree));
        for other in &canonical[1..] {
            prop_assert_eq!(&canonical[0], other);
        }
    }
}

/// Nodes in an order that does not depend on which was grown first.
fn depth_first(tree: &plumbline_bundles::Tree) -> Vec<(u32, u16, bool)> {
    let mut nodes = Vec::new();
    let mut pending = vec![0];
    while let Some(index) = pending.pop() {
        let node = &tree.nodes[index];
        nodes.push((node.threshold.to_bits(), node.feature, node.left == 0));
        if node.left != 0 {
            pending.extend([node.left as usize, node.left as usize + 1]);
        }
    }
    nodes
}

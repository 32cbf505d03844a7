use linfa::{
    Dataset, DatasetBase, ParamGuard,
    prelude::SingleTargetRegression,
    traits::{Fit, Predict},
};
use ndarray::{Array1, Array2, array};
use plumbline_bundles::Forest;

use super::*;

mod laws;
mod splits;
mod weights;

fn data(rows: usize, law: impl Fn(f64, f64) -> f64) -> (Array2<f64>, Array1<f64>) {
    let x = Array2::from_shape_fn((rows, 2), |(i, c)| ((i * (7 + 6 * c)) % rows) as f64 / rows as f64);
    let y = x.rows().into_iter().map(|row| law(row[0], row[1])).collect();
    (x, y)
}

fn fit(params: &RandomForestRegressorParams, x: &Array2<f64>, y: &Array1<f64>) -> RandomForestRegressor {
    params.fit(&Dataset::new(x.clone(), y.clone())).unwrap()
}

#[test]
fn a_constant_target_is_answered_exactly() {
    let (x, y) = data(50, |_, _| 2.5);
    let model = fit(&RandomForestRegressorParams::new(), &x, &y);
    assert!(model.predict(&x).iter().all(|&answer| (answer - 2.5).abs() < 1e-15));
    assert!(model.forest().trees.iter().all(|tree| tree.nodes.len() == 1), "nothing to split");
    assert_eq!(model.out_of_bag_error(), Some(0.0));
}

#[test]
fn a_step_is_recovered_between_the_points_beside_it() {
    let (x, y) = data(200, |a, _| if a < 0.3 { -1.0 } else { 4.0 });
    let model = fit(&RandomForestRegressorParams::new().max_features(2), &x, &y);
    let answers: Array1<f64> = model.predict(&array![[0.1, 0.9], [0.28, 0.1], [0.32, 0.5], [0.9, 0.0]]);
    for (answer, expected) in answers.iter().zip([-1.0, -1.0, 4.0, 4.0]) {
        assert!((answer - expected).abs() < 0.2, "{answer} for {expected}");
    }
    let single = RandomForestRegressorParams::new().num_trees(1).bootstrap(false).max_features(2);
    let model = fit(&single, &x, &y);
    let tree = &model.forest().trees[0];
    assert_eq!((tree.nodes.len(), tree.nodes[0].feature), (3, 0));
    assert!(
        tree.nodes[0].threshold > 0.295 && tree.nodes[0].threshold < 0.3,
        "halfway between 0.295 and 0.3"
    );
}

#[test]
fn a_smooth_law_is_learned_and_the_out_of_bag_error_tells_the_held_out_one() {
    let (x, y) = data(401, |a, b| 3.0 * a + (6.0 * b).sin());
    let is_training = |i: usize| !i.is_multiple_of(4);
    let pick = |wanted: bool| -> Vec<usize> { (0..401).filter(|&i| is_training(i) == wanted).collect() };
    let (training, held_out) = (pick(true), pick(false));
    let rows = |indices: &[usize]| (x.select(ndarray::Axis(0), indices), y.select(ndarray::Axis(0), indices));
    let (train_x, train_y) = rows(&training);
    let (test_x, test_y) = rows(&held_out);
    let model = fit(&RandomForestRegressorParams::new().max_features(2), &train_x, &train_y);
    let held_out_error = model.predict(&test_x).mean_absolute_error(&test_y).unwrap();
    let out_of_bag_error = model.out_of_bag_error().unwrap();
    assert!(held_out_error < 0.12, "{held_out_error}");
    assert!((out_of_bag_error / held_out_error - 1.0).abs() < 0.5, "{out_of_bag_error} {held_out_error}");
}

#[test]
fn seeds_decide_and_threads_do_not() {
    let (x, y) = data(120, |a, b| a * b);
    let on_threads = |threads: usize, seed: u64| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let model = fit(&RandomForestRegressorParams::new().num_trees(16).seed(seed), &x, &y);
            serde_json::to_vec(model.forest()).unwrap()
        })
    };
    assert_eq!(on_threads(1, 3), on_threads(2, 3));
    assert_ne!(on_threads(1, 3), on_threads(1, 4));
}

#[test]
fn a_saved_forest_predicts_the_same_bits() {
    let (x, y) = data(90, |a, b| (a - b).exp());
    let model = fit(&RandomForestRegressorParams::new().num_trees(10), &x, &y);
    let text = serde_json::to_string(model.forest()).unwrap();
    let reloaded: Forest = serde_json::from_str(&text).unwrap();
    reloaded.check().unwrap();
    for (row, predicted) in x.rows().into_iter().zip(model.predict(&x)) {
        let row: Vec<f32> = row.iter().map(|&value| value as f32).collect();
        assert_eq!(reloaded.predict(&row).to_bits(), predicted.to_bits());
    }
}

#[test]
fn depth_and_leaf_size_are_kept() {
    let (x, y) = data(64, |a, _| a);
    let params = RandomForestRegressorParams::new().bootstrap(false).max_features(2).num_trees(1);
    let stump = fit(&params.clone().max_depth(1), &x, &y);
    assert_eq!(stump.forest().trees[0].nodes.len(), 3);
    let mean = fit(&params.clone().max_depth(0), &x, &y);
    let expected = y.mean().unwrap();
    assert!((mean.predict(&x)[0] - expected).abs() < 1e-6);
    let coarse = fit(&params.min_samples_leaf(16), &x, &y);
    let answers = coarse.predict(&x);
    for answer in &answers {
        assert!(answers.iter().filter(|other| (*other - answer).abs() < 1e-12).count() >= 16);
    }
}

#[test]
fn features_tried_are_counted_in_every_way() {
    let of = |max_features: MaxFeatures| [1, 2, 9, 15].map(|num_features| max_features.of(num_features));
    assert_eq!(of(MaxFeatures::All), [1, 2, 9, 15]);
    assert_eq!(of(MaxFeatures::Sqrt), [1, 2, 3, 4]);
    assert_eq!(of(MaxFeatures::Third), [1, 1, 3, 5]);
    assert_eq!(of(MaxFeatures::from(4)), [1, 2, 4, 4]);
    assert_eq!(of(MaxFeatures::Fraction(0.34)), [1, 1, 4, 6]);
}

#[test]
fn importance_goes_to_the_feature_that_matters() {
    let (x, y) = data(300, |a, b| 10.0 * a + b);
    let model = fit(&RandomForestRegressorParams::new().max_features(MaxFeatures::All), &x, &y);
    let importances = model.feature_importances();
    assert!((importances.iter().sum::<f64>() - 1.0).abs() < 1e-12, "{importances:?}");
    // Variances of 10 a and b are as 100 to 1.
    assert!((importances[0] - 100.0 / 101.0).abs() < 0.01, "{importances:?}");
    let (x, y) = data(50, |_, _| 2.5);
    let leaves = fit(&RandomForestRegressorParams::new(), &x, &y);
    assert_eq!(leaves.feature_importances(), [0.0, 0.0]);
}

#[test]
fn out_of_bag_answers_are_those_of_the_trees_that_did_not_draw_the_row() {
    let (x, y) = data(60, |a, b| a + b * b);
    let params = RandomForestRegressorParams::new().num_trees(9).bootstrap_fraction(0.7);
    let model = fit(&params, &x, &y);
    let mut answered = 0;
    for (row, predicted) in model.out_of_bag_predictions().iter().enumerate() {
        let features: Vec<f32> = x.row(row).iter().map(|&value| value as f32).collect();
        let trees = (0..9).filter(|&tree| {
            let mut drawn = vec![0; 60];
            draw::bootstrap(0, tree, 42, &mut drawn);
            // Rows are drawn by their place among the sorted ones.
            drawn[place_of(&x, row)] == 0
        });
        let answers: Vec<f64> =
            trees.map(|tree| f64::from(model.forest().trees[tree].predict(&features))).collect();
        let mean = (!answers.is_empty()).then(|| answers.iter().sum::<f64>() / answers.len() as f64);
        assert!(mean.is_some() == predicted.is_some(), "row {row}");
        if let (Some(mean), Some(predicted)) = (mean, predicted) {
            assert!((mean - predicted).abs() < 1e-9, "row {row}: {mean} {predicted}");
            answered += 1;
        }
    }
    assert!(answered > 50);
    let off = fit(&params.out_of_bag(false), &x, &y);
    assert_eq!(off.forest(), model.forest());
    assert_eq!((off.out_of_bag_error(), off.out_of_bag_r2()), (None, None));
}

/// Place of a row among all rows, sorted by their features.
fn place_of(x: &Array2<f64>, row: usize) -> usize {
    let key = |i: usize| (x[[i, 0]], x[[i, 1]], i);
    (0..x.nrows()).filter(|&other| key(other) < key(row)).count()
}

#[test]
fn the_out_of_bag_r2_is_near_one_for_a_law_and_near_zero_for_noise() {
    let (x, y) = data(300, |a, b| 3.0 * a + b);
    let r2 = |y: &Array1<f64>| fit(&RandomForestRegressorParams::new(), &x, y).out_of_bag_r2().unwrap();
    assert!(r2(&y) > 0.97, "{}", r2(&y));
    let noise = Array1::from_shape_fn(300, |i| ((i * i * 7919) % 1009) as f64);
    assert!(r2(&noise) < 0.2, "{}", r2(&noise));
    let (x, y) = data(50, |_, _| 2.5);
    assert_eq!(fit(&RandomForestRegressorParams::new(), &x, &y).out_of_bag_r2(), None);
}

#[test]
fn single_precision_is_as_good() {
    let (x, y) = data(80, |a, b| a * a + b);
    let (narrow_x, narrow_y) = (x.mapv(|value| value as f32), y.mapv(|value| value as f32));
    let params = RandomForestRegressorParams::new().num_trees(8);
    let model = params.fit(&Dataset::new(narrow_x.clone(), narrow_y.clone())).unwrap();
    let wide = fit(&params, &narrow_x.mapv(f64::from), &narrow_y.mapv(f64::from));
    assert_eq!(model.forest(), wide.forest());
    let predicted: Array1<f32> = model.predict(&narrow_x);
    assert!((predicted[7] - wide.predict(&narrow_x.mapv(f64::from))[7] as f32).abs() < 1e-6);
}

#[test]
fn linfas_cross_validation_prefers_the_forest_that_can_split() {
    let (x, y) = data(100, |a, _| if a < 0.5 { 0.0 } else { 1.0 });
    let params = [
        RandomForestRegressorParams::new().num_trees(10).max_depth(0),
        RandomForestRegressorParams::new().num_trees(10).max_features(2),
    ];
    let checked = params.map(|params| params.check().unwrap());
    let mut dataset = Dataset::new(x, y);
    let errors = dataset
        .cross_validate_single::<_, ForestError, _, _, _>(5, &checked, |predicted, truth| {
            predicted.mean_absolute_error(truth)
        })
        .unwrap();
    assert!(errors[0] > 0.4 && errors[1] < 0.1, "{errors}");
}

#[test]
fn bad_parameters_and_data_are_refused() {
    let (x, y) = data(10, |a, _| a);
    let refused = |params: RandomForestRegressorParams| params.check().unwrap_err().to_string();
    assert_eq!(
        refused(RandomForestRegressorParams::new().num_trees(0)),
        "forest parameter num_trees = 0, expected at least 1"
    );
    assert!(refused(RandomForestRegressorParams::new().max_features(0)).contains("max_features"));
    assert!(refused(RandomForestRegressorParams::new().min_samples_leaf(0)).contains("min_samples_leaf"));
    assert!(refused(RandomForestRegressorParams::new().max_depth(65)).contains("0 to 64"));
    assert!(refused(RandomForestRegressorParams::new().min_samples_split(1)).contains("at least 2"));
    for fraction in [0.0, 1.5, -1.0, f64::NAN] {
        let features = RandomForestRegressorParams::new().max_features(MaxFeatures::Fraction(fraction));
        assert!(refused(features).contains("more than 0 and at most 1"));
        let rows = RandomForestRegressorParams::new().bootstrap_fraction(fraction);
        assert!(refused(rows).starts_with("forest parameter bootstrap_fraction"));
    }
    let unused = RandomForestRegressorParams::new().bootstrap(false).bootstrap_fraction(0.5);
    assert!(refused(unused).contains("1 without bootstrap"));

    let fails = |x: Array2<f64>, y: Array1<f64>| {
        RandomForestRegressorParams::new().fit(&DatasetBase::new(x, y)).unwrap_err().to_string()
    };
    let mut holed = x.clone();
    holed[[4, 1]] = f64::NAN;
    assert!(fails(holed, y.clone()).starts_with("row 4"));
    let mut endless = y.clone();
    endless[2] = 1e300;
    assert!(fails(x.clone(), endless).starts_with("row 2"));
    assert!(fails(Array2::zeros((0, 2)), Array1::zeros(0)).contains("without rows"));
    assert!(fails(x, Array1::zeros(3)).contains("10 rows with 3 targets"));
}

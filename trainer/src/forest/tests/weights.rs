//! What weights do.

use proptest::prelude::*;

use super::*;

fn weighted(
    params: &RandomForestRegressorParams,
    x: &Array2<f64>,
    y: &Array1<f64>,
    weights: Vec<f32>,
) -> RandomForestRegressor {
    params.fit(&Dataset::new(x.clone(), y.clone()).with_weights(weights.into())).unwrap()
}

fn arrays(rows: &[(i8, i8, f32)]) -> (Array2<f64>, Array1<f64>) {
    let x = Array2::from_shape_fn((rows.len(), 2), |(i, c)| {
        f64::from(if c == 0 { rows[i].0 } else { rows[i].1 })
    });
    (x, rows.iter().map(|row| f64::from(row.2)).collect())
}

fn rows() -> impl Strategy<Value = Vec<(i8, i8, f32)>> {
    prop::collection::vec((-9i8..9, -40i8..40, -1e3f32..1e3), 2..70)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_weight_of_two_is_the_row_twice(
        rows in rows(), doubled in any::<prop::sample::Index>(), seed in any::<u64>(),
    ) {
        let params = RandomForestRegressorParams::new().num_trees(3).bootstrap(false).seed(seed);
        let doubled = doubled.index(rows.len());
        let (x, y) = arrays(&rows);
        let mut weights = vec![1.0; rows.len()];
        weights[doubled] = 2.0;
        let mut twice = rows.clone();
        twice.push(rows[doubled]);
        let (twice_x, twice_y) = arrays(&twice);
        let (by_weight, by_row) = (weighted(&params, &x, &y, weights), fit(&params, &twice_x, &twice_y));
        prop_assert_eq!(by_weight.forest(), by_row.forest());
        prop_assert_eq!(by_weight.feature_importances(), by_row.feature_importances());
    }

    #[test]
    fn equal_weights_are_no_weights(
        rows in rows(), weight in 1e-3f32..1e3, leaf in 1usize..4, bootstrap in any::<bool>(),
    ) {
        let params = RandomForestRegressorParams::new().num_trees(3).min_samples_leaf(leaf).bootstrap(bootstrap);
        let (x, y) = arrays(&rows);
        prop_assert_eq!(weighted(&params, &x, &y, vec![weight; rows.len()]), fit(&params, &x, &y));
    }

    #[test]
    fn rows_of_no_weight_are_as_good_as_absent(
        rows in rows(), present in prop::collection::vec(any::<bool>(), 70), leaf in 1usize..4, seed in any::<u64>(),
    ) {
        let params = RandomForestRegressorParams::new().num_trees(3).min_samples_leaf(leaf).seed(seed);
        let is_present = |i: usize| i == 0 || present[i];
        let (x, y) = arrays(&rows);
        let weights = (0..rows.len()).map(|i| if is_present(i) { 1.0 } else { 0.0 }).collect();
        let kept: Vec<_> = (0..rows.len()).filter(|&i| is_present(i)).map(|i| rows[i]).collect();
        let (kept_x, kept_y) = arrays(&kept);
        let (model, smaller) = (weighted(&params, &x, &y, weights), fit(&params, &kept_x, &kept_y));
        prop_assert_eq!(model.forest(), smaller.forest());
        prop_assert_eq!(model.out_of_bag_error(), smaller.out_of_bag_error());
        prop_assert!((0..rows.len()).all(|i| is_present(i) || model.out_of_bag_predictions()[i].is_none()));
    }
}

#[test]
fn samples_are_counted_whatever_they_weigh() {
    let (x, y) = data(64, |a, _| a);
    let weights = (0..64).map(|i| if i % 2 == 0 { 0.01 } else { 50.0 }).collect();
    let params = RandomForestRegressorParams::new().num_trees(1).bootstrap(false).min_samples_leaf(8);
    let model = weighted(&params.max_features(MaxFeatures::All), &x, &y, weights);
    let answers = model.predict(&x);
    assert!(model.forest().trees[0].nodes.len() > 8);
    for answer in &answers {
        assert!(answers.iter().filter(|other| (*other - answer).abs() < 1e-12).count() >= 8);
    }
}

#[test]
fn weights_draw_the_answer_to_the_heavy_rows() {
    let x = array![[0.0], [0.0]];
    let params = RandomForestRegressorParams::new().num_trees(1).bootstrap(false);
    let model = weighted(&params, &x, &array![1.0, 5.0], vec![3.0, 1.0]);
    assert!((model.predict(&x)[0] - 2.0).abs() < 1e-12);
    // Little beside the other, but enough for a leaf of its own.
    let model = weighted(&params, &array![[0.0], [1.0]], &array![1.0, 5.0], vec![1e-6, 1.0]);
    let answers = model.predict(&array![[0.0], [1.0]]);
    assert!((answers[0] - 1.0f64).abs() < 1e-6 && (answers[1] - 5.0).abs() < 1e-6, "{answers}");
    // So little that it is lost in rounding; the answer is still one between the targets.
    let model = weighted(&params, &array![[0.0], [1.0]], &array![1.0, 5.0], vec![1e-30, 1e30]);
    assert!(model.predict(&array![[0.0], [1.0]]).iter().all(|&answer| (1.0..=5.0).contains(&answer)));
}

#[test]
fn bad_weights_are_refused_with_their_row() {
    let (x, y) = data(6, |a, _| a);
    let fails = |weights: Vec<f32>| {
        let data = Dataset::new(x.clone(), y.clone()).with_weights(weights.into());
        RandomForestRegressorParams::new().fit(&data).unwrap_err().to_string()
    };
    let with = |weight: f32| vec![1.0, 1.0, 1.0, weight, 1.0, 1.0];
    assert_eq!(fails(with(-0.5)), "row 3: weight -0.5, expected a finite number of at least 0");
    assert!(fails(with(f32::NAN)).starts_with("row 3: weight NaN"));
    assert!(fails(with(f32::INFINITY)).starts_with("row 3: weight inf"));
    assert!(fails(vec![0.0; 6]).contains("all have weight 0"));
    assert_eq!(fails(vec![1.0; 5]), "6 rows with 5 weights, expected one for each row or none at all");
}

//! What holds for any data.

use proptest::prelude::*;

use super::*;

type Rows = Vec<(f32, f32, f32)>;

fn rows(most: usize) -> impl Strategy<Value = Rows> {
    prop::collection::vec((-1e6f32..1e6, -1.0f32..1.0, -1e3f32..1e3), 2..most)
}

fn arrays(rows: &Rows) -> (Array2<f64>, Array1<f64>) {
    let x = Array2::from_shape_fn((rows.len(), 2), |(i, c)| {
        f64::from(if c == 0 { rows[i].0 } else { rows[i].1 })
    });
    (x, rows.iter().map(|row| f64::from(row.2)).collect())
}

/// A tree of all rows, grown out.
fn whole() -> RandomForestRegressorParams {
    RandomForestRegressorParams::new().num_trees(2).bootstrap(false).max_features(MaxFeatures::All)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn answers_stay_within_the_range_of_targets(
        rows in rows(60),
        queries in prop::collection::vec((-1e9f64..1e9, -2.0f64..2.0), 1..20),
        (leaf, fraction) in (1usize..4, 0.1f64..1.0),
        seed in any::<u64>(),
    ) {
        let (x, y) = arrays(&rows);
        let params = RandomForestRegressorParams::new().num_trees(5).min_samples_leaf(leaf).seed(seed);
        let model = fit(&params.bootstrap_fraction(fraction), &x, &y);
        model.forest().check().unwrap();
        let (low, high) = y.iter().fold((f64::MAX, f64::MIN), |(l, h), &t| (l.min(t), h.max(t)));
        let queries = Array2::from_shape_fn((queries.len(), 2), |(i, c)| if c == 0 { queries[i].0 } else { queries[i].1 });
        let out_of_bag = model.out_of_bag_predictions().iter().flatten().copied();
        for answer in model.predict(&queries).into_iter().chain(out_of_bag) {
            prop_assert!(answer >= low - 1e-9 && answer <= high + 1e-9, "{answer} outside {low}..{high}");
        }
    }

    #[test]
    fn a_tree_grown_out_answers_training_rows_exactly(rows in rows(80), seed in any::<u64>()) {
        let (x, y) = arrays(&rows);
        let answers = fit(&whole().seed(seed), &x, &y).predict(&x);
        for (i, answer) in answers.iter().enumerate() {
            // Rows that no feature tells apart share their mean.
            let alike: Vec<f64> = (0..rows.len()).filter(|&j| x.row(j) == x.row(i)).map(|j| y[j]).collect();
            let mean = alike.iter().sum::<f64>() / alike.len() as f64;
            prop_assert!((answer - mean).abs() <= 1e-4, "{answer} for {mean}");
        }
    }

    #[test]
    fn a_changed_target_changes_the_model(
        rows in rows(60), cell in any::<prop::sample::Index>(), step in 1.0f64..100.0,
    ) {
        let (x, mut y) = arrays(&rows);
        let before = fit(&whole(), &x, &y);
        y[cell.index(rows.len())] += step;
        prop_assert!(fit(&whole(), &x, &y).forest() != before.forest());
    }

    #[test]
    fn a_growing_function_of_a_feature_leaves_the_answers_alone(rows in rows(80), seed in any::<u64>()) {
        let (x, y) = arrays(&rows);
        let mut bent = x.clone();
        // Both are exact in f32, so that equal stays equal and less stays less.
        bent.column_mut(0).mapv_inplace(|value| value * 0.25);
        bent.column_mut(1).mapv_inplace(|value| if value < 0.0 { value * 16.0 } else { value * 2.0 });
        let params = whole().seed(seed);
        prop_assert_eq!(fit(&params, &x, &y).predict(&x), fit(&params, &bent, &y).predict(&bent));
    }

    #[test]
    fn the_order_of_rows_does_not_matter_without_bootstrap(rows in rows(60), turn in 1usize..59) {
        let (x, y) = arrays(&rows);
        let turned: Rows = (0..rows.len()).map(|i| rows[(i + turn) % rows.len()]).collect();
        let (turned_x, turned_y) = arrays(&turned);
        let params = RandomForestRegressorParams::new().num_trees(3).bootstrap(false);
        let (model, turned) = (fit(&params, &x, &y), fit(&params, &turned_x, &turned_y));
        prop_assert_eq!(model.forest(), turned.forest());
    }

    #[test]
    #[cfg(feature = "serde")]
    fn models_and_parameters_are_read_as_they_were_written(rows in rows(40), seed in any::<u64>()) {
        let (x, y) = arrays(&rows);
        let params = RandomForestRegressorParams::new().num_trees(4).max_features(MaxFeatures::Sqrt).seed(seed);
        let model = fit(&params, &x, &y);
        let text = serde_json::to_string(&model).unwrap();
        prop_assert_eq!(serde_json::from_str::<RandomForestRegressor>(&text).unwrap(), model);
        let text = serde_json::to_string(&params).unwrap();
        prop_assert_eq!(&serde_json::from_str::<RandomForestRegressorParams>(&text).unwrap(), &params);
        let checked: RandomForestRegressorValidParams = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(&serde_json::to_string(&checked).unwrap(), &text);
        let spoiled = text.replace("\"num_trees\":4", "\"num_trees\":0");
        let refusal = serde_json::from_str::<RandomForestRegressorValidParams>(&spoiled).unwrap_err();
        prop_assert!(refusal.to_string().contains("num_trees = 0"));
    }
}

#[test]
#[cfg(feature = "serde")]
fn a_model_that_leads_astray_is_refused() {
    let (x, y) = data(20, |a, _| a);
    let text = serde_json::to_string(&fit(&whole(), &x, &y)).unwrap();
    let spoiled = text.replacen("\"left\":[1,", "\"left\":[999,", 1);
    assert_ne!(spoiled, text);
    let refusal = serde_json::from_str::<RandomForestRegressor>(&spoiled).unwrap_err();
    assert!(refusal.to_string().contains("node 0 with child 999"), "{refusal}");
}

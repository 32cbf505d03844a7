//! Times fitting and predicting of a regression forest on tables; `benches/sklearn_forest.py` runs it beside
//! scikit-learn.
//!
//! `cargo run --release -p plumbline-trainer --example forest_speed -- TREES FEATURES_TRIED TABLE.csv...` prints a
//! line of JSON for each table, times in nanoseconds as lowest, median and highest; `FEATURES_TRIED` is a share of the
//! features in (0, 1]. A table has a head line and numbers, the last column being the target.

use std::{
    hint::black_box,
    path::Path,
    time::{Duration, Instant},
};

use linfa::traits::{Fit, Predict};
use ndarray::{Array1, s};
use plumbline_trainer::forest::{MaxFeatures, RandomForestRegressorParams};

#[path = "../benches/support/tables.rs"]
mod tables;

/// Lowest, median and highest time of repetitions, at least `least` of them and at least for half a second.
///
/// What a repetition returns is dropped after its time is taken, as scikit-learn's models are.
fn times_ns<T>(least: usize, mut run: impl FnMut() -> T) -> [u128; 3] {
    let start = Instant::now();
    let mut times = Vec::new();
    while times.len() < least || start.elapsed() < Duration::from_millis(500) {
        let start = Instant::now();
        let result = black_box(run());
        times.push(start.elapsed().as_nanos());
        drop(result);
    }
    times.sort_unstable();
    [times[0], times[times.len() / 2], times[times.len() - 1]]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [trees, share, paths @ ..] = arguments.as_slice() else {
        return Err("expected TREES FEATURES_TRIED TABLE.csv...".into());
    };
    let params = RandomForestRegressorParams::new()
        .num_trees(trees.parse()?)
        .max_features(MaxFeatures::Fraction(share.parse()?))
        .out_of_bag(false)
        .seed(1);
    for path in paths {
        let table = tables::read(Path::new(path))?;
        let model = params.fit(&table)?;
        let fit = times_ns(7, || params.fit(&table));
        let all_rows = &table.records;
        let row = all_rows.slice(s![all_rows.nrows() / 2..=all_rows.nrows() / 2, ..]).to_owned();
        let one = times_ns(50, || -> Array1<f64> { model.predict(black_box(&row)) });
        let all = times_ns(7, || -> Array1<f64> { model.predict(black_box(all_rows)) });
        let nodes: usize = model.forest().trees.iter().map(|tree| tree.nodes.len()).sum();
        println!(
            "{{\"rows\":{},\"features\":{},\"nodes\":{nodes},\"fit_ns\":{fit:?},\"predict_one_ns\":{one:?},\"predict_all_ns\":{all:?}}}",
            all_rows.nrows(),
            all_rows.ncols(),
        );
    }
    Ok(())
}

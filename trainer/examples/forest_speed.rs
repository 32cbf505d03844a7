//! Times fitting and predicting of a regression forest on tables; `benches/vidur_tables.py` runs it beside
//! scikit-learn.
//!
//! `cargo run --release -p plumbline-trainer --example forest_speed -- TREES FEATURES_TRIED TABLE.csv...` prints a
//! line of JSON for each table; `FEATURES_TRIED` is a share of the features in (0, 1]. A table has a head line and
//! numbers, the last column being the target.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use linfa::{
    Dataset,
    traits::{Fit, Predict},
};
use ndarray::{Array1, Array2, s};
use plumbline_trainer::forest::RandomForestRegressorParams;

type Failure = Box<dyn std::error::Error>;

fn read(path: &Path) -> Result<(Array2<f64>, Array1<f64>), Failure> {
    let text = std::fs::read_to_string(path)?;
    let mut cells = Vec::new();
    let mut num_rows = 0;
    for (i, line) in text.lines().enumerate().skip(1) {
        for cell in line.split(',') {
            let cell = cell.trim().parse::<f64>();
            cells.push(cell.map_err(|e| format!("{}, line {}: {e}", path.display(), i + 1))?);
        }
        num_rows += 1;
    }
    let width = cells.len().checked_div(num_rows).unwrap_or(0);
    let table = Array2::from_shape_vec((num_rows, width), cells)?;
    if width < 2 {
        return Err(
            format!("{}: expected features and a target, found {width} columns", path.display()).into()
        );
    }
    Ok((table.slice(s![.., ..width - 1]).to_owned(), table.column(width - 1).to_owned()))
}

/// Times of repetitions, sorted, at least `least` of them and at least for half a second.
fn times(least: usize, mut run: impl FnMut()) -> Vec<Duration> {
    let start = Instant::now();
    let mut times = Vec::new();
    while times.len() < least || start.elapsed() < Duration::from_millis(500) {
        let start = Instant::now();
        run();
        times.push(start.elapsed());
    }
    times.sort();
    times
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [trees, share, tables @ ..] = arguments.as_slice() else {
        return Err("expected TREES FEATURES_TRIED TABLE.csv...".into());
    };
    let (trees, share): (usize, f64) = (trees.parse()?, share.parse()?);
    for table in tables {
        let (x, y) = read(Path::new(table))?;
        let tried = ((share * x.ncols() as f64) as usize).max(1);
        let params =
            RandomForestRegressorParams::new().num_trees(trees).max_features(tried).out_of_bag(false).seed(1);
        let data = Dataset::new(x.clone(), y);
        let model = params.fit(&data)?;
        let fit = times(7, || {
            std::hint::black_box(params.fit(&data).map(|model| model.forest().trees.len())).ok();
        });
        let row = x.slice(s![x.nrows() / 2..=x.nrows() / 2, ..]).to_owned();
        let one = times(50, || {
            std::hint::black_box::<Array1<f64>>(model.predict(std::hint::black_box(&row)));
        });
        let all = times(7, || {
            std::hint::black_box::<Array1<f64>>(model.predict(std::hint::black_box(&x)));
        });
        let ns = |times: &[Duration]| {
            [times[0], times[times.len() / 2], times[times.len() - 1]].map(|t| t.as_nanos())
        };
        let nodes: usize = model.forest().trees.iter().map(|tree| tree.nodes.len()).sum();
        println!(
            "{{\"rows\":{},\"features\":{},\"nodes\":{nodes},\"fit_ns\":{:?},\"predict_one_ns\":{:?},\"predict_all_ns\":{:?}}}",
            x.nrows(),
            x.ncols(),
            ns(&fit),
            ns(&one),
            ns(&all)
        );
    }
    Ok(())
}

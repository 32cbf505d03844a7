//! How long a forest takes to fit and to predict.
//!
//! `cargo bench -p plumbline-trainer --bench forest`; `FOREST_TABLES=A.csv:B.csv` in the environment measures tables of
//! one's own, with a head line and the target last. Without it tables are made up, of the sizes of Vidur's: tokens by
//! tensor-parallel ranks, batch by cache size, and one of many features that have no value twice.
//! `benches/sklearn_forest.py` sets the forest beside scikit-learn's.

use divan::{Bencher, counter::ItemsCount};
use linfa::{
    Dataset,
    traits::{Fit, Predict},
};
use ndarray::{Array1, Array2, s};
use plumbline_trainer::forest::{MaxFeatures, RandomForestRegressor, RandomForestRegressorParams};
use rand::Rng;
use rand_pcg::Pcg64;

#[path = "support/tables.rs"]
mod tables;

use tables::Table;

fn main() {
    divan::main();
}

struct Named {
    name: String,
    table: Table,
}

impl std::fmt::Display for Named {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

fn all() -> Vec<Named> {
    let Ok(paths) = std::env::var("FOREST_TABLES") else {
        return vec![
            made_up("tokens_ranks_1804x2", 1804, |row| {
                vec![(row / 4) as f64 * 9.0, f64::from(1 << (row % 4))]
            }),
            made_up("batch_cache_10112x2", 10_112, |row| vec![(row / 79) as f64, (row % 79) as f64 * 52.0]),
            made_up("distinct_2000x15", 2000, |row| {
                (1..16).map(|f| (row * (2 * f + 71) % 2003) as f64).collect()
            }),
        ];
    };
    let named = |path: &str| Named {
        name: path.to_owned(),
        table: tables::read(path.as_ref()).expect("FOREST_TABLES names tables"),
    };
    paths.split(':').map(named).collect()
}

/// Times that grow with all features, with noise of 2 %.
fn made_up(name: &str, num_rows: usize, features: impl Fn(usize) -> Vec<f64>) -> Named {
    let mut rng = Pcg64::new(1, 2);
    let width = features(0).len();
    let x = Array2::from_shape_fn((num_rows, width), |(row, f)| features(row)[f]);
    let target = |row: ndarray::ArrayView1<f64>| {
        let noise = 0.02 * (f64::from(rng.next_u32()) / f64::from(u32::MAX) - 0.5);
        (5.0 + row.iter().map(|x| (1.0 + x).sqrt()).product::<f64>().powf(1.5 / width as f64)) * (1.0 + noise)
    };
    let y: Array1<f64> = x.rows().into_iter().map(target).collect();
    Named { name: name.to_owned(), table: Dataset::new(x, y) }
}

/// As scikit-learn grows them by default.
fn params() -> RandomForestRegressorParams {
    RandomForestRegressor::params().max_features(MaxFeatures::All).out_of_bag(false)
}

fn fitted(table: &Table) -> RandomForestRegressor {
    params().fit(table).expect("a table of finite numbers")
}

/// 100 trees grown out.
#[divan::bench(args = all(), sample_count = 10)]
fn fit(bencher: Bencher, table: &Named) {
    bencher.counter(ItemsCount::new(table.table.targets.len())).bench(|| fitted(&table.table));
}

/// The same, and what they say about the rows that they did not draw.
#[divan::bench(args = all(), sample_count = 10)]
fn fit_with_out_of_bag(bencher: Bencher, table: &Named) {
    bencher.bench(|| params().out_of_bag(true).fit(&table.table));
}

#[divan::bench(args = all())]
fn predict_one_row(bencher: Bencher, table: &Named) {
    let model = fitted(&table.table);
    let row = table.table.records.slice(s![..1, ..]).to_owned();
    bencher.bench(|| -> Array1<f64> { model.predict(&row) });
}

#[divan::bench(args = all(), sample_count = 20)]
fn predict_all_rows(bencher: Bencher, table: &Named) {
    let model = fitted(&table.table);
    let rows = &table.table.records;
    bencher.counter(ItemsCount::new(rows.nrows())).bench(|| -> Array1<f64> { model.predict(rows) });
}

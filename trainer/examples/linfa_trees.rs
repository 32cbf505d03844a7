//! Compares linfa-trees' classification tree, on targets cut into classes, with our regression forest.
//!
//! Both learn `ln(time / baseline)` of a made-up law of matrix products from the same rows and are judged on
//! the same held-out rows, over several seeds. Run it with
//! `cargo run --release -p plumbline-trainer --example linfa_trees`.

use std::time::Instant;

use linfa::{
    Dataset,
    prelude::SingleTargetRegression,
    traits::{Fit, Predict},
};
use linfa_trees::DecisionTree;
use ndarray::{Array1, Array2, Axis};
use plumbline_bundles::features::features;
use plumbline_schema::{GpuSpec, OperatorShape, roofline::roofline_ns};
use plumbline_trainer::forest::RandomForestRegressorParams;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;

const SEEDS: u64 = 10;
const OVERHEAD_NS: f64 = 3000.0;

/// Time of a matrix product that computes whole waves of 128 x 128 tiles at 70 % of the peak.
fn law_ns(m: u32, n: u32, k: u32, gpu: &GpuSpec) -> f64 {
    let tiles = f64::from(m.div_ceil(128)) * f64::from(n.div_ceil(128));
    let waves = (tiles / f64::from(gpu.num_sms)).ceil() * f64::from(gpu.num_sms);
    let compute_ns = 2.0 * 128.0 * 128.0 * f64::from(k) * waves / (0.7 * gpu.bf16_flops_per_s) * 1e9;
    let bytes =
        2.0 * (f64::from(m) * f64::from(k) + f64::from(n) * f64::from(k) + f64::from(m) * f64::from(n));
    OVERHEAD_NS + compute_ns.max(bytes / (0.85 * gpu.hbm_bandwidth_bytes_per_s) * 1e9)
}

/// 600 rows: features and `ln(time / baseline)` of random sizes for five weights, with noise of up to 1 %.
fn rows(seed: u64, gpu: &GpuSpec) -> (Array2<f64>, Array1<f64>) {
    let mut rng = Pcg64::seed_from_u64(seed);
    let mut uniform = move || (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let weights = [(4096, 1024), (6144, 4096), (1024, 2048), (28672, 4096), (4096, 14336)];
    let (mut records, mut targets) = (Vec::new(), Vec::new());
    for i in 0..600 {
        let (n, k) = weights[i % weights.len()];
        let m = 8192.0f64.powf(uniform()) as u32;
        let shape = OperatorShape::Gemm { m, n, k };
        let time = law_ns(m, n, k, gpu) * (1.0 + 0.02 * (uniform() - 0.5));
        targets.push((time / (OVERHEAD_NS + roofline_ns(&shape, gpu))).ln());
        records.extend(features(&shape, gpu, OVERHEAD_NS).as_slice().iter().map(|&x| f64::from(x)));
    }
    let width = records.len() / targets.len();
    let records =
        Array2::from_shape_fn((targets.len(), width), |(row, column)| records[row * width + column]);
    (records, Array1::from(targets))
}

/// Cuts targets into classes of equal counts: each row's class, and each class's mean target.
fn classes(targets: &Array1<f64>, count: usize) -> (Array1<usize>, Vec<f64>) {
    let mut order: Vec<usize> = (0..targets.len()).collect();
    order.sort_by(|&a, &b| targets[a].total_cmp(&targets[b]));
    let mut class_of = Array1::zeros(targets.len());
    let (mut sums, mut counts) = (vec![0.0; count], vec![0.0; count]);
    for (rank, &row) in order.iter().enumerate() {
        let class = rank * count / targets.len();
        class_of[row] = class;
        sums[class] += targets[row];
        counts[class] += 1.0;
    }
    (class_of, sums.iter().zip(&counts).map(|(sum, count)| sum / count).collect())
}

/// Mean absolute percentage error of times and the milliseconds that fitting took, for one seed.
type Outcome = (f64, f64);

/// Mean of `|exp(predicted - target) - 1|`, by linfa's metric on the ratios.
fn time_error(predicted: &Array1<f64>, targets: &Array1<f64>) -> Result<f64, linfa::Error> {
    let ratio = (predicted - targets).mapv(f64::exp);
    Array1::ones(targets.len()).mean_absolute_percentage_error(&ratio)
}

fn run(seed: u64, num_classes: usize, gpu: &GpuSpec) -> Result<Outcome, Box<dyn std::error::Error>> {
    let (records, targets) = rows(seed, gpu);
    let ((train_x, test_x), (train_y, test_y)) =
        (records.view().split_at(Axis(0), 450), targets.view().split_at(Axis(0), 450));
    let (train_y, test_y) = (train_y.to_owned(), test_y.to_owned());
    let start = Instant::now();
    let predicted = if num_classes == 0 {
        let params = RandomForestRegressorParams::new().num_trees(64).max_features(6).min_samples_leaf(2);
        let model = params.seed(seed).fit(&Dataset::new(train_x.to_owned(), train_y))?;
        let took = start.elapsed();
        (model.predict(&test_x.to_owned()), took)
    } else {
        let (labels, means) = classes(&train_y, num_classes);
        let model =
            DecisionTree::params().max_depth(Some(12)).fit(&Dataset::new(train_x.to_owned(), labels))?;
        let took = start.elapsed();
        let labels: Array1<usize> = model.predict(&test_x.to_owned());
        (labels.mapv(|label| means[label]), took)
    };
    Ok((time_error(&predicted.0, &test_y)?, predicted.1.as_secs_f64() * 1e3))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let gpu = GpuSpec::by_name("h100-sxm5-80gb").ok_or("a shipped GPU")?;
    println!("{:34} {:>21} {:>21}", "model", "error % median (range)", "fit ms median (range)");
    for num_classes in [0, 8, 16, 32, 64, 128] {
        let outcomes = (0..SEEDS).map(|seed| run(seed, num_classes, &gpu)).collect::<Result<Vec<_>, _>>()?;
        let name = match num_classes {
            0 => "regression forest, 64 trees".to_owned(),
            classes => format!("linfa-trees, {classes} classes"),
        };
        let column = |pick: fn(&Outcome) -> f64| {
            let mut values: Vec<f64> = outcomes.iter().map(pick).collect();
            values.sort_by(f64::total_cmp);
            format!("{:.2} ({:.2}-{:.2})", values[values.len() / 2], values[0], values[values.len() - 1])
        };
        println!("{name:34} {:>21} {:>21}", column(|o| 100.0 * o.0), column(|o| o.1));
    }
    Ok(())
}

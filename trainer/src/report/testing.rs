//! A training and points for the tests of the report.

use plumbline_bundles::{Sample, TimeStats};
use plumbline_schema::{GpuSpec, Operator, OperatorShape, roofline::roofline_ns};

use crate::train::{HeldOutPoint, HeldOutWay, TrainOptions, TrainOutcome, train};

pub(super) fn gpu() -> GpuSpec {
    GpuSpec::shipped().remove(1)
}

/// `n` points over three decades with errors of up to 6 %, intervals of 5 % and, of more than two, one error of 60 %.
pub(super) fn points(n: u32) -> Vec<HeldOutPoint> {
    let point = |i: u32| {
        let measured_ns = 3e3 * 1e3f64.powf(f64::from(i) / f64::from(n.max(2) - 1));
        let error = if n > 2 && i == n / 2 { 0.6 } else { 0.06 * (12.9898 * f64::from(i)).sin() };
        let predicted_ns = measured_ns * (1.0 + error);
        HeldOutPoint {
            operator: Operator::RmsNorm,
            way: HeldOutWay::Shuffled,
            fold: 0,
            shape: OperatorShape::RmsNorm { num_tokens: i + 1, hidden_size: 4096 },
            measured_ns,
            predicted_ns,
            low_ns: 0.95 * predicted_ns,
            high_ns: 1.05 * predicted_ns,
        }
    };
    (0..n).map(point).collect()
}

/// A predictor of `rms_norm` on a made-up law that scatters by 2 %.
pub(super) fn outcome() -> TrainOutcome {
    let gpu = gpu();
    let samples: Vec<Sample> = (1..=120u32)
        .map(|i| {
            let shape = OperatorShape::RmsNorm { num_tokens: i * i, hidden_size: 4096 };
            let noise = 1.0 + 0.02 * (12.9898 * f64::from(i)).sin();
            let time_ns = (1500.0 + 1.3 * roofline_ns(&shape, &gpu)) * noise;
            Sample::bare(Operator::RmsNorm, shape, TimeStats::from_times(&[time_ns]).unwrap())
        })
        .collect();
    let options = TrainOptions { num_trees: 8, ..TrainOptions::default() };
    train(&samples, &gpu, &options, |_| {}).unwrap()
}

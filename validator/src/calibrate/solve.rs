//! A robust, bounded linear fit with priors: the one solver of calibration.
//!
//! Minimises `sum_i w_i |y_i - x_i theta| / (sigma scale_i) + sum_j ((theta_j - prior_j) / width_j)^2 / 2` within bounds, the
//! first term by iteratively reweighted least squares (Holland and Welsch 1977), the bounds by projected
//! coordinate descent on the normal equations. Relative residuals: a step of 2 ms and one of 50 ms count alike.

/// A parameter's prior and bounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// What it is, for reports: `eager.host_pre.constant_ns`.
    pub name: String,
    /// Value without data.
    pub prior: f64,
    /// Width of the prior (a standard deviation).
    pub width: f64,
    /// Smallest value allowed.
    pub min: f64,
    /// Largest value allowed.
    pub max: f64,
}

/// One observation: `y = x . theta`, with `x` one number a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Factors of the parameters.
    pub x: Vec<f64>,
    /// Observed value.
    pub y: f64,
    /// What the value is expected to be, positive: residuals count relative to it. Not the observed value itself, which
    /// would let what came out long by chance count less, and draw the fit below the median.
    pub scale: f64,
    /// Weight; 1 is one independent observation.
    pub weight: f64,
}

/// A fitted parameter vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// One value a parameter.
    pub theta: Vec<f64>,
    /// One a parameter: the share of the prior's width that is left; near 1 means the data said nothing.
    pub remaining_width: Vec<f64>,
    /// What was minimised, at `theta`: small is good.
    pub objective: f64,
}

/// Relative noise of one observation: a step time repeats within about 5 %.
const SIGMA: f64 = 0.05;
/// Residuals below this many sigmas count as squares; above, as absolute values.
const HUBER: f64 = 0.5;
const REWEIGHTINGS: usize = 12;
const SWEEPS: usize = 400;

/// Fits `theta`, starting from `start`.
///
/// # Panics
/// When rows, parameters and `start` differ in length.
#[must_use]
pub fn solve(parameters: &[Parameter], rows: &[Row], start: &[f64]) -> Solution {
    let p = parameters.len();
    assert_eq!(start.len(), p, "one start value a parameter");
    // In units of the prior's width every parameter is of order one.
    let scale: Vec<f64> = parameters.iter().map(|q| q.width).collect();
    let mut theta: Vec<f64> =
        start.iter().zip(parameters).map(|(t, q)| t.clamp(q.min, q.max) / q.width).collect();
    let mut hessian = vec![0.0; p * p];
    for _ in 0..REWEIGHTINGS {
        let mut gradient = vec![0.0; p];
        hessian.fill(0.0);
        for row in rows {
            assert_eq!(row.x.len(), p, "one factor a parameter");
            let inverse = 1.0 / (SIGMA * row.scale);
            let predicted: f64 = row.x.iter().zip(&theta).zip(&scale).map(|((x, t), s)| x * t * s).sum();
            let residual = ((row.y - predicted) * inverse).abs();
            let weight = row.weight / residual.max(HUBER);
            for j in 0..p {
                if row.x[j] == 0.0 {
                    continue;
                }
                let xj = row.x[j] * scale[j] * inverse;
                gradient[j] += weight * xj * row.y * inverse;
                for k in j..p {
                    hessian[j * p + k] += weight * xj * row.x[k] * scale[k] * inverse;
                }
            }
        }
        for j in 0..p {
            for k in 0..j {
                hessian[j * p + k] = hessian[k * p + j];
            }
            hessian[j * p + j] += 1.0;
            gradient[j] += parameters[j].prior / scale[j];
        }
        descend(&hessian, &gradient, parameters, &scale, &mut theta);
    }
    let remaining_width = diagonal_of_inverse(&hessian, p).iter().map(|v| v.max(0.0).sqrt()).collect();
    let theta: Vec<f64> = theta.iter().zip(&scale).map(|(t, s)| t * s).collect();
    Solution { objective: objective(parameters, rows, &theta), theta, remaining_width }
}

/// Huber's loss of the relative residuals, in the scaling of the reweighting above, plus the priors.
fn objective(parameters: &[Parameter], rows: &[Row], theta: &[f64]) -> f64 {
    let data = rows.iter().map(|row| {
        let predicted: f64 = row.x.iter().zip(theta).map(|(x, t)| x * t).sum();
        let residual = ((row.y - predicted) / (SIGMA * row.scale)).abs();
        let loss =
            if residual < HUBER { residual * residual / (2.0 * HUBER) } else { residual - HUBER / 2.0 };
        row.weight * loss
    });
    let priors = parameters.iter().zip(theta).map(|(q, t)| ((t - q.prior) / q.width).powi(2) / 2.0);
    data.sum::<f64>() + priors.sum::<f64>()
}

/// Minimises `theta H theta / 2 - g theta` within bounds.
fn descend(hessian: &[f64], gradient: &[f64], parameters: &[Parameter], scale: &[f64], theta: &mut [f64]) {
    let p = theta.len();
    for _ in 0..SWEEPS {
        let mut moved = 0.0f64;
        for j in 0..p {
            let others: f64 = (0..p).filter(|&k| k != j).map(|k| hessian[j * p + k] * theta[k]).sum();
            let best = (gradient[j] - others) / hessian[j * p + j];
            let bounded = best.clamp(parameters[j].min / scale[j], parameters[j].max / scale[j]);
            moved = moved.max((bounded - theta[j]).abs());
            theta[j] = bounded;
        }
        if moved < 1e-9 {
            break;
        }
    }
}

/// Diagonal of the inverse of a symmetric positive definite matrix, by Gauss-Jordan elimination.
fn diagonal_of_inverse(matrix: &[f64], p: usize) -> Vec<f64> {
    let width = 2 * p;
    let mut a = vec![0.0; p * width];
    for j in 0..p {
        a[j * width..j * width + p].copy_from_slice(&matrix[j * p..(j + 1) * p]);
        a[j * width + p + j] = 1.0;
    }
    for pivot in 0..p {
        let d = a[pivot * width + pivot];
        for k in 0..width {
            a[pivot * width + k] /= d;
        }
        for j in (0..p).filter(|&j| j != pivot) {
            let factor = a[j * width + pivot];
            for k in 0..width {
                a[j * width + k] -= factor * a[pivot * width + k];
            }
        }
    }
    (0..p).map(|j| a[j * width + p + j]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameter(name: &str, prior: f64, width: f64) -> Parameter {
        Parameter { name: name.into(), prior, width, min: 0.0, max: 1e12 }
    }

    #[test]
    fn recovers_a_line_despite_gross_outliers() {
        let parameters = [parameter("a", 1.0, 100.0), parameter("b", 1.0, 10.0)];
        let rows: Vec<Row> = (1..=100)
            .map(|i| {
                let x = f64::from(i);
                let y = 50.0 + 3.0 * x;
                Row { x: vec![1.0, x], y: if i % 10 == 0 { 4.0 * y } else { y }, scale: y, weight: 1.0 }
            })
            .collect();
        let solution = solve(&parameters, &rows, &[1.0, 1.0]);
        assert!((solution.theta[0] - 50.0).abs() < 3.0, "{:?}", solution.theta);
        assert!((solution.theta[1] - 3.0).abs() < 0.1, "{:?}", solution.theta);
        assert!(solution.remaining_width.iter().all(|w| *w < 0.2));
    }

    #[test]
    fn what_the_data_cannot_see_stays_at_its_prior() {
        let parameters = [parameter("seen", 1.0, 10.0), parameter("unseen", 7.0, 2.0)];
        let rows = vec![Row { x: vec![1.0, 0.0], y: 5.0, scale: 5.0, weight: 50.0 }];
        let solution = solve(&parameters, &rows, &[1.0, 1.0]);
        assert!((solution.theta[0] - 5.0).abs() < 0.1);
        assert!((solution.theta[1] - 7.0).abs() < 1e-6);
        assert!((solution.remaining_width[1] - 1.0).abs() < 1e-9);
    }

    #[test]
    fn bounds_hold() {
        let mut p = parameter("a", 1.0, 10.0);
        p.max = 2.0;
        let rows = vec![Row { x: vec![1.0], y: 5.0, scale: 5.0, weight: 50.0 }];
        assert!((solve(&[p], &rows, &[1.0]).theta[0] - 2.0).abs() < 1e-12);
    }
}

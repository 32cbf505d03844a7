//! How the error of a profile's predictors fell while it measured: the payload `curve.json`.

use serde::{Deserialize, Serialize};

use crate::error::CheckError;

/// Absolute relative errors, `|predicted / measured - 1|` as 0..1 ratios, of points that were held out.
///
/// Percentiles are taken over all operators together, with the same total weight for each operator, however many of
/// its points were held out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CurveError {
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// Median of the operator whose median is largest.
    pub worst_operator_p50: f64,
    /// Points that were predicted, at least 1.
    pub num_points: usize,
}

/// The error after some time of measuring.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Since the run began, ceilings, host costs and checks included, s.
    pub elapsed_s: f64,
    /// Samples that the predictors were fitted on.
    pub num_samples: usize,
    /// Their errors.
    pub error: CurveError,
}

/// Checks a curve read from a file: times that do not go back, and errors that are errors.
///
/// # Errors
/// Names the first entry and field that cannot be true.
pub fn check(curve: &[CurvePoint]) -> Result<(), CheckError> {
    let mut last_s = 0.0;
    for (i, point) in curve.iter().enumerate() {
        let key = |name: &str| format!("[{i}].{name}");
        if !(point.elapsed_s.is_finite() && point.elapsed_s >= last_s) {
            return Err(CheckError::new(key("elapsed_s"), format!("a time from {last_s}"), point.elapsed_s));
        }
        last_s = point.elapsed_s;
        let error = &point.error;
        for (name, ratio) in
            [("p50", error.p50), ("p90", error.p90), ("worst_operator_p50", error.worst_operator_p50)]
        {
            if !(ratio.is_finite() && ratio >= 0.0) {
                return Err(CheckError::new(key(&format!("error.{name}")), "a finite ratio from 0", ratio));
            }
        }
        if error.p90 < error.p50 {
            let expected = format!("at least p50 = {}", error.p50);
            return Err(CheckError::new(key("error.p90"), expected, error.p90));
        }
        if error.num_points == 0 {
            return Err(CheckError::new(key("error.num_points"), "at least 1", 0));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(elapsed_s: f64) -> CurvePoint {
        let error = CurveError { p50: 0.02, p90: 0.1, worst_operator_p50: 0.05, num_points: 60 };
        CurvePoint { elapsed_s, num_samples: 200, error }
    }

    #[test]
    fn a_curve_that_cannot_be_true_names_its_place() {
        let key = |curve: &[CurvePoint]| check(curve).unwrap_err().key;
        check(&[]).unwrap();
        check(&[point(0.0), point(3.0), point(3.0)]).unwrap();
        assert_eq!(key(&[point(3.0), point(2.0)]), "[1].elapsed_s");
        assert_eq!(key(&[point(f64::NAN)]), "[0].elapsed_s");
        let with = |change: fn(&mut CurveError)| {
            let mut changed = point(1.0);
            change(&mut changed.error);
            key(&[changed])
        };
        assert_eq!(with(|e| e.p50 = -0.1), "[0].error.p50");
        assert_eq!(with(|e| e.p90 = 0.01), "[0].error.p90");
        assert_eq!(with(|e| e.worst_operator_p50 = f64::INFINITY), "[0].error.worst_operator_p50");
        assert_eq!(with(|e| e.num_points = 0), "[0].error.num_points");
    }

    #[test]
    fn a_curve_is_read_back_as_written() {
        let curve = vec![point(0.25), point(60.0)];
        let text = serde_json::to_string(&curve).unwrap();
        assert_eq!(serde_json::from_str::<Vec<CurvePoint>>(&text).unwrap(), curve);
    }
}

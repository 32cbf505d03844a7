//! How far two shapes of an operator lie apart.

use plumbline_schema::{OperatorShape, operator::MAX_SHAPE_COLUMNS};

/// Distance of two shapes of one operator in the logarithms of their numbers; 0 only for equal shapes, infinite for
/// shapes of different operators.
///
/// Euclidean, of `ln(1 + number)`, as counts of an attention launch may be 0: 0.7 is a factor of two in one number.
#[must_use]
pub fn ln_distance(a: &OperatorShape, b: &OperatorShape) -> f64 {
    let (mut of_a, mut of_b) = ([0; MAX_SHAPE_COLUMNS], [0; MAX_SHAPE_COLUMNS]);
    let (len_a, len_b) = (a.fill_values(&mut of_a), b.fill_values(&mut of_b));
    if std::mem::discriminant(a) != std::mem::discriminant(b) || len_a != len_b {
        return f64::INFINITY;
    }
    let square = |(&a, &b): (&u64, &u64)| ((a as f64).ln_1p() - (b as f64).ln_1p()).powi(2);
    of_a[..len_a].iter().zip(&of_b[..len_b]).map(square).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_factors_of_the_numbers() {
        let gemm = |m, n| OperatorShape::Gemm { m, n, k: 1024 };
        assert!(ln_distance(&gemm(64, 4096), &gemm(64, 4096)).abs() < 1e-12);
        let doubled = ln_distance(&gemm(4000, 4096), &gemm(8000, 4096));
        assert!((doubled - 2.0f64.ln()).abs() < 1e-3, "{doubled}");
        let both = ln_distance(&gemm(4000, 4096), &gemm(8000, 8192));
        assert!((both - doubled * 2.0f64.sqrt()).abs() < 1e-3, "{both}");
        let norm = OperatorShape::RmsNorm { num_tokens: 64, hidden_size: 4096 };
        assert!(ln_distance(&gemm(64, 4096), &norm).is_infinite());
    }
}

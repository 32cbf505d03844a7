//! How far two shapes of an operator lie apart.

use plumbline_schema::{OperatorShape, operator::MAX_SHAPE_COLUMNS};

/// A shape by the logarithms of its numbers, for distances between shapes of one operator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LnShape {
    /// `ln(1 + number)`, as counts of an attention launch may be 0; 0 beyond the last.
    values: [f64; MAX_SHAPE_COLUMNS],
}

impl LnShape {
    /// Takes the logarithms.
    #[must_use]
    pub fn new(shape: &OperatorShape) -> Self {
        let mut numbers = [0; MAX_SHAPE_COLUMNS];
        shape.fill_values(&mut numbers);
        Self { values: numbers.map(|number| (number as f64).ln_1p()) }
    }

    /// Euclidean distance of two shapes of one operator: about 0.7 for a factor of two in one number, 0 only for
    /// equal shapes. Of shapes of different operators it means nothing.
    #[must_use]
    pub fn distance(&self, other: &Self) -> f64 {
        self.values.iter().zip(&other.values).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_factors_of_the_numbers() {
        let gemm = |m, n| LnShape::new(&OperatorShape::Gemm { m, n, k: 1024 });
        assert!(gemm(64, 4096).distance(&gemm(64, 4096)).abs() < 1e-12);
        let doubled = gemm(4000, 4096).distance(&gemm(8000, 4096));
        assert!((doubled - 2.0f64.ln()).abs() < 1e-3, "{doubled}");
        let both = gemm(4000, 4096).distance(&gemm(8000, 8192));
        assert!((both - doubled * 2.0f64.sqrt()).abs() < 1e-3, "{both}");
    }
}

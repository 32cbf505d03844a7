//! Tables that the forest's speed is measured on, read from files or made up.

use std::path::Path;

use linfa::Dataset;
use ndarray::{Array2, Ix1, s};

/// Features and a target of each row.
pub type Table = Dataset<f64, f64, Ix1>;

/// Reads a head line and rows of numbers, the last of which is the target.
pub fn read(path: &Path) -> Result<Table, Box<dyn std::error::Error>> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
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
    let table = Array2::from_shape_vec((num_rows, width), cells)
        .map_err(|e| format!("{}: rows differ in length: {e}", path.display()))?;
    if width < 2 {
        return Err(
            format!("{}: expected features and a target, found {width} columns", path.display()).into()
        );
    }
    let features = table.slice(s![.., ..width - 1]).to_owned();
    Ok(Dataset::new(features, table.column(width - 1).to_owned()))
}

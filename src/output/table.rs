//! Plain tables, the same width rules and characters everywhere.

use std::fmt;

use comfy_table::{CellAlignment, Table as Inner, presets};

/// A table with a header; numbers align right.
#[derive(Debug)]
pub struct Table {
    inner: Inner,
}

impl Table {
    /// A table with these column names; those that start with `>` are aligned right and shown without it.
    #[must_use]
    pub fn new(columns: &[&str]) -> Self {
        let mut inner = Inner::new();
        inner.load_style(presets::NOTHING);
        inner.set_header(columns.iter().map(|name| name.trim_start_matches('>')));
        for (index, name) in columns.iter().enumerate() {
            if let (true, Some(column)) = (name.starts_with('>'), inner.column_mut(index)) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        Self { inner }
    }

    /// A table of two columns without a header: names and values.
    #[must_use]
    pub fn plain() -> Self {
        let mut inner = Inner::new();
        inner.load_style(presets::NOTHING);
        Self { inner }
    }

    /// Adds a row.
    pub fn row<I: IntoIterator<Item = String>>(&mut self, cells: I) {
        self.inner.add_row(cells.into_iter().collect::<Vec<_>>());
        for column in self.inner.column_iter_mut() {
            column.set_padding((0, 2));
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in self.inner.lines() {
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_end_without_blanks() {
        let mut table = Table::new(&["operator", ">points"]);
        table.row(["attention".to_owned(), "7".to_owned()]);
        table.row(["rope".to_owned(), "1234".to_owned()]);
        assert_eq!(table.to_string(), "operator   points\nattention       7\nrope         1234\n");
    }
}

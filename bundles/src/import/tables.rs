//! One profiling table of another tool: rows with named cells, read with a size limit.
//!
//! The columns that hold times are `time_stats.OPERATOR.STATISTIC` in milliseconds; see [`time_column`]. Nothing is
//! judged here: a cell is text until somebody asks for a number.

use std::{
    collections::HashMap,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use csv::StringRecord;
use plumbline_schema::{InputError, Location, files::MAX_DOCUMENT_BYTES};

/// Largest whole number of a key column; more is no dimension, count of tokens or message of a real model.
pub const MAX_KEY: u64 = 1 << 40;

/// Extensions of tables that are read.
pub const EXTENSIONS: [&str; 3] = [".csv", ".csv.gz", ".csv.zst"];

/// The column of one statistic (`min`, `max`, `mean`, `median`, `std`, `count`) of another tool's operator.
#[must_use]
pub fn time_column(source: &str, statistic: &str) -> String {
    format!("time_stats.{source}.{statistic}")
}

/// A table, read whole.
#[derive(Clone, Debug)]
pub struct Table {
    /// Where it was read from; errors name it.
    pub path: PathBuf,
    columns: Vec<String>,
    positions: HashMap<String, usize>,
    records: Vec<(u64, StringRecord)>,
}

impl Table {
    /// Reads `.csv`, `.csv.gz` or `.csv.zst`; the ending decides.
    ///
    /// # Errors
    /// `Io`; `Invalid` for more than 64 MiB unpacked, text that is not UTF-8, rows of unequal length, a column named
    /// twice, or no row.
    pub fn read(path: &Path) -> Result<Self, InputError> {
        Self::parse(&unpacked(path)?, path)
    }

    /// Parses the bytes of a CSV file; `path` is what errors name.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, InputError> {
        let mut reader = csv::ReaderBuilder::new().from_reader(bytes);
        let header = reader.headers().map_err(|e| InputError::csv(path, "a header", e))?.clone();
        let columns: Vec<String> = header.iter().map(|name| name.trim().to_owned()).collect();
        let mut positions = HashMap::new();
        for (at, name) in columns.iter().enumerate() {
            if positions.insert(name.clone(), at).is_some() {
                let found = format!("`{name}` twice");
                return Err(InputError::invalid(path, Location::Line(1), "each column once", found));
            }
        }
        let mut records = Vec::new();
        for record in reader.into_records() {
            let record = record.map_err(|e| InputError::csv(path, "a row of a table", e))?;
            records.push((record.position().map_or(0, csv::Position::line), record));
        }
        if records.is_empty() {
            return Err(InputError::invalid(path, Location::File, "at least one row", "none"));
        }
        Ok(Self { path: path.into(), columns, positions, records })
    }

    /// Names of the columns, in the file's order; the first of an unnamed index is empty.
    #[must_use]
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// Whether there is a column of this name.
    #[must_use]
    pub fn has(&self, column: &str) -> bool {
        self.positions.contains_key(column)
    }

    /// Whether the table times an operator of its tool: there is a median of it.
    #[must_use]
    pub fn times(&self, source: &str) -> bool {
        self.has(&time_column(source, "median"))
    }

    /// Number of rows, at least 1.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.records.len()
    }

    /// The rows, in the file's order.
    pub fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.records.iter().map(|(line, record)| Row { table: self, line: *line, record })
    }
}

/// One row of a [`Table`].
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    table: &'a Table,
    /// Line in the file, from 1; the header is line 1.
    pub line: u64,
    record: &'a StringRecord,
}

impl<'a> Row<'a> {
    /// The table's path.
    #[must_use]
    pub fn path(&self) -> &'a Path {
        &self.table.path
    }

    /// The text of a cell without blanks around it; `None` when the table has no such column.
    #[must_use]
    pub fn text(&self, column: &str) -> Option<&'a str> {
        self.table.positions.get(column).and_then(|&at| self.record.get(at)).map(str::trim)
    }

    /// A whole number of a key column, from `least` to [`MAX_KEY`]; `128.0`, as pandas may write it, is one.
    ///
    /// # Errors
    /// `Invalid` with line and column.
    pub fn whole(&self, column: &str, least: u64) -> Result<u64, InputError> {
        let text = self.key(column)?;
        let number = text.parse::<u64>().ok().or_else(|| {
            let float = text.parse::<f64>().ok()?;
            (float.fract() == 0.0 && (0.0..=MAX_KEY as f64).contains(&float)).then_some(float as u64)
        });
        number.filter(|n| (least..=MAX_KEY).contains(n)).ok_or_else(|| {
            self.invalid(column, format!("a whole number from {least} to {MAX_KEY}"), quoted(text))
        })
    }

    /// `True` or `False` of a key column, in any case.
    ///
    /// # Errors
    /// `Invalid` with line and column.
    pub fn flag(&self, column: &str) -> Result<bool, InputError> {
        let text = self.key(column)?;
        match text.to_ascii_lowercase().as_str() {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(self.invalid(column, "True or False", quoted(text))),
        }
    }

    /// An error at a cell of this row.
    #[must_use]
    pub fn invalid(&self, column: &str, expected: impl Into<String>, found: impl Into<String>) -> InputError {
        let location = Location::Cell { line: self.line, column: column.into() };
        InputError::invalid(self.path(), location, expected, found)
    }

    fn key(&self, column: &str) -> Result<&'a str, InputError> {
        self.text(column).ok_or_else(|| {
            let expected = format!("a column `{column}`");
            let names = self.table.columns.iter().filter(|name| !name.starts_with("time_stats."));
            let names = names.map(String::as_str).collect::<Vec<_>>().join(",");
            InputError::invalid(self.path(), Location::Line(1), expected, format!("`{names}`"))
        })
    }
}

/// The text of a cell for an error.
pub(super) fn quoted(text: &str) -> String {
    if text.is_empty() { "nothing".to_owned() } else { format!("`{text}`") }
}

fn unpacked(path: &Path) -> Result<Vec<u8>, InputError> {
    let wrap = |e| InputError::io(path, e);
    let file = File::open(path).map_err(wrap)?;
    let reader: Box<dyn Read> = match path.extension().and_then(|e| e.to_str()) {
        // A file may be of several gzip members, one after another.
        Some("gz") => Box::new(flate2::read::MultiGzDecoder::new(file)),
        Some("zst") => Box::new(zstd::Decoder::new(file).map_err(wrap)?),
        _ => Box::new(file),
    };
    let mut bytes = Vec::new();
    reader.take(MAX_DOCUMENT_BYTES + 1).read_to_end(&mut bytes).map_err(wrap)?;
    if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
        let expected = format!("at most {MAX_DOCUMENT_BYTES} bytes, unpacked");
        return Err(InputError::invalid(path, Location::File, expected, "more"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const TEXT: &str =
        ",time_stats.emb.median,num_tokens,use_gated_mlp\n0,0.5,128.0,True\n1, 0.25 ,7,maybe\n";

    #[test]
    fn packed_tables_hold_the_same_rows() {
        let folder = tempfile::tempdir().unwrap();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(TEXT.as_bytes()).unwrap();
        let zst = zstd::encode_all(TEXT.as_bytes(), 3).unwrap();
        for (name, bytes) in
            [("t.csv", TEXT.as_bytes().to_vec()), ("t.csv.gz", gz.finish().unwrap()), ("t.csv.zst", zst)]
        {
            let path = folder.path().join(name);
            std::fs::write(&path, &bytes).unwrap();
            let table = Table::read(&path).unwrap();
            assert!(table.times("emb") && !table.times("add"), "{name}");
            let rows: Vec<_> = table.rows().collect();
            assert_eq!((rows.len(), rows[1].line), (2, 3), "{name}");
            assert_eq!(rows[1].text("time_stats.emb.median"), Some("0.25"), "{name}");
            assert_eq!(rows[0].whole("num_tokens", 1).unwrap(), 128, "{name}");
            assert!(rows[0].flag("use_gated_mlp").unwrap(), "{name}");
            // Half a file is no table of fewer rows.
            std::fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
            assert!(Table::read(&path).is_err(), "{name}");
        }
    }

    #[test]
    fn bad_keys_name_the_cell() {
        let table = Table::parse(TEXT.as_bytes(), Path::new("mlp.csv")).unwrap();
        let row = table.rows().nth(1).unwrap();
        assert_eq!(
            row.flag("use_gated_mlp").unwrap_err().to_string(),
            "mlp.csv, line 3, column `use_gated_mlp`: expected True or False, found `maybe`"
        );
        assert_eq!(
            row.whole("num_tokens", 8).unwrap_err().to_string(),
            "mlp.csv, line 3, column `num_tokens`: expected a whole number from 8 to 1099511627776, found `7`"
        );
        assert_eq!(
            row.whole("n_head", 1).unwrap_err().to_string(),
            "mlp.csv, line 1: expected a column `n_head`, found `,num_tokens,use_gated_mlp`"
        );
        let twice = Table::parse(b"a,a\n1,2\n", Path::new("mlp.csv")).unwrap_err().to_string();
        assert_eq!(twice, "mlp.csv, line 1: expected each column once, found `a` twice");
    }
}

//! Reading with a size limit, and writing that never leaves half a file.

use std::{
    fs::File,
    io::{self, BufReader, Read, Write},
    marker::PhantomData,
    path::{Path, PathBuf},
};

use csv::StringRecord;
use serde::{Serialize, de::DeserializeOwned};

use crate::error::{InputError, Location};

/// Largest JSON or TOML document read into memory: 64 MiB, far above any real one.
pub const MAX_DOCUMENT_BYTES: u64 = 64 << 20;

/// A file that appears whole or not at all: written under a temporary name beside its own, renamed by
/// [`Self::finish`]; dropped before that, it leaves nothing and what stood under its name stays.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    out: io::BufWriter<File>,
    temporary: tempfile::TempPath,
}

impl AtomicFile {
    /// Begins the file that is to stand at `path`; makes its folder where there is none.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn create(path: &Path) -> Result<Self, InputError> {
        let wrap = |source| InputError::io(path, source);
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        std::fs::create_dir_all(&folder).map_err(wrap)?;
        let temporary = tempfile::Builder::new().prefix(".plumb-").tempfile_in(&folder).map_err(wrap)?;
        // Apart, since writing through the pair puts the temporary name into every error.
        let (file, temporary) = temporary.into_parts();
        Ok(Self { path: path.to_path_buf(), out: io::BufWriter::new(file), temporary })
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// Any I/O error; what stood at the path is then untouched.
    pub fn finish(self) -> Result<(), InputError> {
        let Self { path, out, temporary } = self;
        let wrap = |source| InputError::io(&path, source);
        let file = out.into_inner().map_err(|e| wrap(e.into_error()))?;
        set_default_permissions(&file).map_err(wrap)?;
        temporary.persist(&path).map_err(|e| wrap(e.error))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Writes `path` in one step: `fill` writes a temporary file beside it, which is then renamed.
///
/// # Errors
/// Any I/O error; `path` is then untouched.
pub fn write_atomically(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), InputError> {
    let mut file = AtomicFile::create(path)?;
    fill(&mut file).map_err(|source| InputError::io(path, source))?;
    file.finish()
}

/// Temporary files are private to their owner; a result is to be read like any other file.
#[cfg(unix)]
fn set_default_permissions(file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn set_default_permissions(_file: &File) -> io::Result<()> {
    Ok(())
}

/// Writes `value` as indented JSON with a final newline, atomically.
///
/// # Errors
/// Any I/O error, or a value JSON cannot hold (a map with keys that are not strings).
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), InputError> {
    write_atomically(path, |out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        out.write_all(b"\n")
    })
}

/// Reads a whole text document, refusing one over [`MAX_DOCUMENT_BYTES`] and anything not UTF-8.
///
/// # Errors
/// `Io`, or `Invalid` for size and encoding.
pub fn read_text(path: &Path) -> Result<String, InputError> {
    read_text_up_to(path, MAX_DOCUMENT_BYTES)
}

/// As [`read_text`], of a document that may have up to `max_bytes`.
///
/// # Errors
/// As [`read_text`].
pub fn read_text_up_to(path: &Path, max_bytes: u64) -> Result<String, InputError> {
    let file = File::open(path).map_err(|e| InputError::io(path, e))?;
    let mut bytes = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(|e| InputError::io(path, e))?;
    if bytes.len() as u64 > max_bytes {
        let expected = format!("at most {max_bytes} bytes");
        return Err(InputError::invalid(path, Location::File, expected, "a larger file"));
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        InputError::invalid(path, Location::File, "UTF-8 text", format!("other bytes at offset {at}"))
    })
}

/// Reads a JSON document; `expected` names what it should be ("a bundle manifest").
///
/// # Errors
/// `Io`, or `Invalid` with the line.
pub fn read_json<T: DeserializeOwned>(path: &Path, expected: &str) -> Result<T, InputError> {
    serde_json::from_str(&read_text(path)?).map_err(|e| InputError::json(path, expected, &e))
}

/// Reads a TOML document; `expected` names what it should be ("a suite").
///
/// # Errors
/// `Io`, or `Invalid` with the line.
pub fn read_toml<T: DeserializeOwned>(path: &Path, expected: &str) -> Result<T, InputError> {
    let text = read_text(path)?;
    toml::from_str(&text).map_err(|e| InputError::toml(path, expected, &text, &e))
}

/// Finds `path` or `path.zst`, the first that exists; `path` itself when neither does.
#[must_use]
pub fn plain_or_zst(path: &Path) -> PathBuf {
    let mut zst = path.as_os_str().to_owned();
    zst.push(".zst");
    let zst = PathBuf::from(zst);
    if !path.exists() && zst.exists() { zst } else { path.to_path_buf() }
}

/// Opens a file to be read in pieces, decompressing it when its name ends in `.zst`.
///
/// # Errors
/// `Io`.
pub fn open_plain_or_zst(path: &Path) -> Result<Box<dyn Read>, InputError> {
    let file = File::open(path).map_err(|e| InputError::io(path, e))?;
    Ok(if path.extension().is_some_and(|e| e == "zst") {
        Box::new(zstd::Decoder::new(file).map_err(|e| InputError::io(path, e))?)
    } else {
        Box::new(BufReader::new(file))
    })
}

/// Opens a CSV file, decompressing it when its name ends in `.zst`.
///
/// # Errors
/// `Io`.
pub fn open_csv(path: &Path) -> Result<csv::Reader<Box<dyn Read>>, InputError> {
    Ok(csv::ReaderBuilder::new().from_reader(open_plain_or_zst(path)?))
}

/// The rows of a CSV file (or its `.zst`), one at a time, each with its line; unknown columns are ignored.
///
/// An error ends it for the caller: what comes after one is not defined.
pub struct CsvRows<T> {
    path: PathBuf,
    expected: String,
    reader: csv::Reader<Box<dyn Read>>,
    header: StringRecord,
    record: StringRecord,
    row: PhantomData<T>,
}

impl<T: DeserializeOwned> CsvRows<T> {
    /// Opens the file and reads its header; `expected` names what a row should be ("a workload row").
    ///
    /// # Errors
    /// `Io`, or `Invalid` for a header that is no text.
    pub fn open(path: &Path, expected: &str) -> Result<Self, InputError> {
        let path = plain_or_zst(path);
        let mut reader = open_csv(&path)?;
        // Asked for here, since the iterators of `csv` take a header that cannot be read for none.
        let header = reader.headers().map_err(|e| InputError::csv(&path, "a header", e))?.clone();
        let (expected, record) = (expected.to_owned(), StringRecord::new());
        Ok(Self { path, expected, reader, header, record, row: PhantomData })
    }

    /// The file that is read.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn read(&mut self) -> Result<Option<(u64, T)>, InputError> {
        let Self { path, expected, reader, header, record, .. } = self;
        if !reader.read_record(record).map_err(|e| InputError::csv(path, expected, e))? {
            return Ok(None);
        }
        let row = record.deserialize(Some(header));
        let row = row.map_err(|e| row_error(path, expected, header, record, e))?;
        Ok(Some((record.position().map_or(0, csv::Position::line), row)))
    }
}

impl<T: DeserializeOwned> Iterator for CsvRows<T> {
    type Item = Result<(u64, T), InputError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

/// Reads every row of a CSV file (or its `.zst`) into `T`; unknown columns are ignored.
///
/// # Errors
/// `Io`, or `Invalid` with the line and what was found.
pub fn read_csv<T: DeserializeOwned>(path: &Path, expected: &str) -> Result<Vec<T>, InputError> {
    CsvRows::open(path, expected)?.map(|row| row.map(|(_, row)| row)).collect()
}

/// Says which cell of a row does not fit, as far as `csv` knows.
fn row_error(
    path: &Path,
    expected: &str,
    header: &StringRecord,
    record: &StringRecord,
    error: csv::Error,
) -> InputError {
    use csv::{DeserializeErrorKind as Kind, ErrorKind};
    let ErrorKind::Deserialize { err, .. } = error.kind() else {
        return InputError::csv(path, expected, error);
    };
    if let Kind::Message(message) = err.kind()
        && let Some(column) = message.strip_prefix("missing field ")
    {
        let found = header.iter().collect::<Vec<_>>().join(",");
        let expected = format!("a column {column}");
        return InputError::invalid(path, Location::Line(1), expected, format!("`{found}`"));
    }
    let cell_expects = match err.kind() {
        Kind::ParseInt(_) => "a whole number in range",
        Kind::ParseFloat(_) => "a number",
        Kind::ParseBool(_) => "true or false",
        _ => return InputError::csv(path, expected, error),
    };
    let line = record.position().map_or(0, csv::Position::line);
    let index = err.field().and_then(|field| usize::try_from(field).ok());
    let (Some(column), Some(text)) = (index.and_then(|i| header.get(i)), index.and_then(|i| record.get(i)))
    else {
        return InputError::csv(path, expected, error);
    };
    let found = if text.is_empty() { "nothing".to_owned() } else { format!("`{text}`") };
    InputError::invalid(path, Location::Cell { line, column: column.into() }, cell_expects, found)
}

/// Writes rows as CSV with a header, atomically; compresses when the name ends in `.zst`.
///
/// # Errors
/// Any I/O error.
pub fn write_csv<T: Serialize>(path: &Path, rows: impl IntoIterator<Item = T>) -> Result<(), InputError> {
    write_plain_or_zst(path, |out| {
        let mut writer = csv::Writer::from_writer(out);
        for row in rows {
            writer.serialize(row).map_err(io::Error::other)?;
        }
        writer.flush()
    })
}

/// Writes text atomically; compressed when the path ends in `.zst`.
///
/// # Errors
/// Any I/O error.
pub fn write_text(path: &Path, text: &str) -> Result<(), InputError> {
    write_plain_or_zst(path, |out| out.write_all(text.as_bytes()))
}

fn write_plain_or_zst(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), InputError> {
    let mut file = OutputFile::create(path, Compression::Smallest)?;
    fill(&mut file).map_err(|source| InputError::io(path, source))?;
    file.finish()
}

/// How hard a `.zst` file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// For files that are shipped: zstd's level 19.
    Smallest,
    /// For files that something else waits for: zstd's level 1, which on rows of tokens is faster than its default (3)
    /// and leaves no more.
    Fast,
}

impl Compression {
    const fn level(self) -> i32 {
        match self {
            Self::Smallest => 19,
            Self::Fast => 1,
        }
    }
}

/// An [`AtomicFile`], compressed where its name ends in `.zst`.
pub struct OutputFile {
    path: PathBuf,
    sink: Sink,
}

enum Sink {
    Plain(AtomicFile),
    Zst(zstd::Encoder<'static, AtomicFile>),
}

impl OutputFile {
    /// Begins the file that is to stand at `path`; `compression` is for a name that ends in `.zst`.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn create(path: &Path, compression: Compression) -> Result<Self, InputError> {
        let file = AtomicFile::create(path)?;
        let sink = if path.extension().is_some_and(|e| e == "zst") {
            let encoder = zstd::Encoder::new(file, compression.level());
            Sink::Zst(encoder.map_err(|source| InputError::io(path, source))?)
        } else {
            Sink::Plain(file)
        };
        Ok(Self { path: path.to_path_buf(), sink })
    }

    /// The path at which the file is to stand.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes what the compressor still holds and gives the file its name.
    ///
    /// # Errors
    /// Any I/O error; what stood at the path is then untouched.
    pub fn finish(self) -> Result<(), InputError> {
        let Self { path, sink } = self;
        match sink {
            Sink::Plain(file) => file.finish(),
            Sink::Zst(encoder) => encoder.finish().map_err(|source| InputError::io(&path, source))?.finish(),
        }
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.sink {
            Sink::Plain(file) => file.write(bytes),
            Sink::Zst(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.sink {
            Sink::Plain(file) => file.flush(),
            Sink::Zst(encoder) => encoder.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only its reading is tested")]
    struct Row {
        id: u32,
        share: f64,
        #[serde(default)]
        end_ns: Option<u64>,
    }

    fn error_of(text: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.csv");
        std::fs::write(&path, text).unwrap();
        let error = read_csv::<Row>(&path, "a row").unwrap_err().to_string();
        error.strip_prefix(folder.path().to_str().unwrap()).unwrap().to_owned()
    }

    #[test]
    fn a_bad_cell_is_named_with_what_it_holds() {
        let cases = [
            (
                "id,share\n1,0.5\nsoon,1\n",
                "/rows.csv, line 3, column `id`: expected a whole number in range, found `soon`",
            ),
            (
                "share,id\n1,-5\n",
                "/rows.csv, line 2, column `id`: expected a whole number in range, found `-5`",
            ),
            ("id,share\n1,\n", "/rows.csv, line 2, column `share`: expected a number, found nothing"),
            ("id,shares\n1,2\n", "/rows.csv, line 1: expected a column `share`, found `id,shares`"),
            ("id,share\n1\n", "/rows.csv, line 2: expected 2 columns, found 1"),
            ("id,share\n1,2,3\n", "/rows.csv, line 2: expected 2 columns, found 3"),
        ];
        for (text, expected) in cases {
            assert_eq!(error_of(text), expected);
        }
        let error = error_of("id,share,end_ns\n1,2,\n3,4,x\n");
        assert!(error.starts_with("/rows.csv, line 3"), "{error}");
    }

    #[test]
    fn what_cannot_be_read_is_not_an_empty_file() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read_csv::<Row>(folder.path(), "a row").is_err());
        let truncated = folder.path().join("rows.csv.zst");
        let mut whole = Vec::new();
        zstd::stream::copy_encode(&b"id,share\n1,2\n"[..], &mut whole, 3).unwrap();
        std::fs::write(&truncated, &whole).unwrap();
        assert_eq!(read_csv::<Row>(&truncated, "a row").unwrap().len(), 1);
        std::fs::write(&truncated, &whole[..whole.len() - 6]).unwrap();
        assert!(read_csv::<Row>(&truncated, "a row").is_err());
    }
}

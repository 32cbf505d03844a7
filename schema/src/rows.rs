//! Writing the rows of a run's files as they come: the one writer of each format.
//!
//! The bytes are those of `csv` with serde: a header before the first row, columns in the order of the struct's
//! fields, nothing where there is none, quotes only where text needs them. Formatting one number costs a few ns here;
//! a simulation writes hundreds of millions.

use std::{
    io::{self, Write},
    marker::PhantomData,
    path::Path,
};

use crate::{
    error::InputError,
    files::{Compression, OutputFile},
    run::{RequestMetrics, StepMetrics, StepPhases, TokenMetrics},
    units::Nanos,
};

/// Text is handed on in pieces of about this size: few calls, and small enough to stay in a core's cache.
const CHUNK_BYTES: usize = 64 << 10;

/// Rows of `request_metrics.csv`.
pub type RequestRows<W> = Rows<RequestMetrics, W>;
/// Rows of `token_metrics.csv`.
pub type TokenRows<W> = Rows<TokenMetrics, W>;
/// Rows of `step_metrics.csv`.
pub type StepRows<W> = Rows<StepMetrics, W>;

/// A row of one of a run's files.
pub trait Row {
    /// The file's first line, without its end.
    const HEADER: &'static str;

    /// Appends the row's cells, without the line's end.
    fn append_to(&self, line: &mut Line);
}

/// Text being written, cell by cell.
#[derive(Debug, Default)]
pub struct Line {
    text: Vec<u8>,
}

impl Line {
    #[inline]
    fn number(&mut self, number: impl itoa::Integer) {
        self.text.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    }

    #[inline]
    fn comma(&mut self) {
        self.text.push(b',');
    }

    /// A number and the comma after it.
    #[inline]
    fn cell(&mut self, number: impl itoa::Integer) {
        self.number(number);
        self.comma();
    }

    /// A time, or nothing, and the comma after it.
    #[inline]
    fn optional_cell(&mut self, time: Option<Nanos>) {
        if let Some(time) = time {
            self.number(time.0);
        }
        self.comma();
    }

    /// Items joined by `;`.
    #[inline]
    fn list<T>(&mut self, items: &[T], mut append: impl FnMut(&mut Self, &T)) {
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.text.push(b';');
            }
            append(self, item);
        }
    }

    /// Text, quoted where a reader would take it for more than one cell (RFC 4180, section 2, rules 6 and 7).
    fn text(&mut self, text: &str) {
        if !text.bytes().any(|byte| matches!(byte, b',' | b'"' | b'\r' | b'\n')) {
            self.text.extend_from_slice(text.as_bytes());
            return;
        }
        self.text.push(b'"');
        for byte in text.bytes() {
            self.text.push(byte);
            if byte == b'"' {
                self.text.push(b'"');
            }
        }
        self.text.push(b'"');
    }
}

impl Row for RequestMetrics {
    const HEADER: &'static str = "request_id,arrival_time_ns,admitted_time_ns,first_token_time_ns,ttft_ns,\
                                  completion_time_ns,num_prefill_tokens,num_decode_tokens,\
                                  num_decode_tokens_actual,status,backend";

    #[inline]
    fn append_to(&self, line: &mut Line) {
        line.cell(self.request_id);
        line.cell(self.arrival_time_ns.0);
        line.optional_cell(self.admitted_time_ns);
        line.optional_cell(self.first_token_time_ns);
        line.optional_cell(self.ttft_ns);
        line.optional_cell(self.completion_time_ns);
        line.cell(self.num_prefill_tokens);
        line.cell(self.num_decode_tokens);
        line.cell(self.num_decode_tokens_actual);
        line.text(self.status.name());
        line.comma();
        line.text(&self.backend);
    }
}

impl Row for TokenMetrics {
    const HEADER: &'static str = "request_id,token_index,token_time_ns,token_latency_ns";

    #[inline]
    fn append_to(&self, line: &mut Line) {
        line.cell(self.request_id);
        line.cell(self.token_index);
        line.cell(self.token_time_ns.0);
        line.number(self.token_latency_ns.0);
    }
}

/// The header of a step, and more columns.
macro_rules! step_header {
    ($more:literal) => {
        concat!(
            "step_start_ns,step_duration_ns,schedule_ns,num_prefill_seqs,num_prefill_tokens,num_decode_seqs,",
            "prefill_chunks_tokens_context,decode_contexts,prefill_request_ids,decode_request_ids,",
            "preempted_request_ids,free_blocks",
            $more
        )
    };
}

/// A step with what its engine's host did.
#[derive(Clone, Copy, Debug)]
pub struct PhasedStep<'a>(pub &'a StepMetrics, pub StepPhases);

impl Row for PhasedStep<'_> {
    const HEADER: &'static str = step_header!(",prepare_ns,launch_ns,wait_ns,sample_ns,finish_ns");

    fn append_to(&self, line: &mut Line) {
        let Self(step, StepPhases { prepare_ns, launch_ns, wait_ns, sample_ns, finish_ns }) = self;
        step.append_to(line);
        for time in [prepare_ns, launch_ns, wait_ns, sample_ns, finish_ns] {
            line.comma();
            line.number(time.0);
        }
    }
}

/// The last four columns are empty where it is not recorded whose tokens a step computed.
impl Row for StepMetrics {
    const HEADER: &'static str = step_header!("");

    #[inline]
    fn append_to(&self, line: &mut Line) {
        let load = self.batch.shape().attention;
        line.cell(self.step_start_ns.0);
        line.cell(self.step_duration_ns.0);
        line.cell(self.schedule_ns.0);
        line.cell(load.num_prefill_seqs);
        line.cell(load.num_prefill_tokens);
        line.cell(load.num_decode_seqs);
        line.list(&self.batch.prefill_chunks, |line, chunk| {
            line.number(chunk.num_tokens);
            line.text.push(b':');
            line.number(chunk.context_len);
        });
        line.comma();
        line.list(&self.batch.decode_contexts, |line, &context| line.number(context));
        line.comma();
        let Some(requests) = &self.requests else {
            line.text.extend_from_slice(b",,,");
            return;
        };
        for ids in
            [&requests.prefill_request_ids, &requests.decode_request_ids, &requests.preempted_request_ids]
        {
            line.list(ids, |line, &id| line.number(id));
            line.comma();
        }
        if let Some(free_blocks) = requests.free_blocks {
            line.number(free_blocks);
        }
    }
}

/// Writes rows of one format to `W` in large pieces; a row that is changed and pushed again allocates nothing.
///
/// [`RowFile`] is the same for a file that appears whole or not at all.
#[derive(Debug)]
pub struct Rows<R, W: Write> {
    out: W,
    line: Line,
    pushed: u64,
    has_failed: bool,
    row: PhantomData<fn(&R)>,
}

impl<R: Row, W: Write> Rows<R, W> {
    /// Begins without a byte: the header comes with the first row.
    #[must_use]
    pub fn new(out: W) -> Self {
        Self { out, line: Line::default(), pushed: 0, has_failed: false, row: PhantomData }
    }

    /// Rows pushed so far.
    #[must_use]
    pub const fn num_rows(&self) -> u64 {
        self.pushed
    }

    /// Appends a row.
    ///
    /// # Errors
    /// Any I/O error of the rows gathered so far; every later call then fails too.
    #[inline]
    pub fn push(&mut self, row: &R) -> io::Result<()> {
        if self.pushed == 0 {
            self.line.text.reserve(CHUNK_BYTES + (CHUNK_BYTES >> 2));
            self.line.text.extend_from_slice(R::HEADER.as_bytes());
            self.line.text.push(b'\n');
        }
        self.pushed += 1;
        row.append_to(&mut self.line);
        self.line.text.push(b'\n');
        if self.line.text.len() < CHUNK_BYTES { Ok(()) } else { self.hand_on() }
    }

    #[cold]
    fn hand_on(&mut self) -> io::Result<()> {
        // How many of the bytes arrived is not known after an error: the rows cannot be taken up again.
        let written = if self.has_failed {
            Err(io::Error::other("rows written before were lost"))
        } else {
            self.out.write_all(&self.line.text)
        };
        self.has_failed = written.is_err();
        self.line.text.clear();
        written
    }

    /// Hands on the last rows and gives `W` back.
    ///
    /// # Errors
    /// Any I/O error, one reported before included.
    pub fn finish(mut self) -> io::Result<W> {
        self.hand_on()?;
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Rows of one format in a file that appears whole or not at all; compressed where its name ends in `.zst`.
///
/// Dropped before [`Self::finish`] it leaves nothing, as for a file of which a run without rows has none.
pub struct RowFile<R> {
    rows: Rows<R, OutputFile>,
}

impl<R: Row> RowFile<R> {
    /// Begins the file that is to stand at `path`.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn create(path: &Path) -> Result<Self, InputError> {
        Ok(Self { rows: Rows::new(OutputFile::create(path, Compression::Fast)?) })
    }

    /// Rows pushed so far.
    #[must_use]
    pub const fn num_rows(&self) -> u64 {
        self.rows.num_rows()
    }

    /// Appends a row.
    ///
    /// # Errors
    /// Any I/O error of the rows gathered so far; every later call then fails too.
    #[inline]
    pub fn push(&mut self, row: &R) -> Result<(), InputError> {
        self.rows.push(row).map_err(|source| InputError::io(self.rows.out.path(), source))
    }

    /// Writes the last rows and gives the file its name; without any row it is empty.
    ///
    /// # Errors
    /// Any I/O error, one reported before included; what stood at the path is then untouched.
    pub fn finish(self) -> Result<(), InputError> {
        let path = self.rows.out.path().to_path_buf();
        self.rows.finish().map_err(|source| InputError::io(path, source))?.finish()
    }
}

/// Writes rows that are at hand, as [`RowFile`] does.
///
/// # Errors
/// Any I/O error; what stood at `path` is then untouched.
pub fn write_rows<'a, R: Row + 'a>(
    path: &Path,
    rows: impl IntoIterator<Item = &'a R>,
) -> Result<(), InputError> {
    let mut file = RowFile::create(path)?;
    rows.into_iter().try_for_each(|row| file.push(row))?;
    file.finish()
}

#[cfg(test)]
mod tests;

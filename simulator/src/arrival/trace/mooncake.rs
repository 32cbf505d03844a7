//! Mooncake's traces: a JSON object a line, with hashes of the prompt's blocks.
//!
//! <https://github.com/kvcache-ai/Mooncake>, `FAST25-release`: a hash stands for 512 tokens and all before them, the
//! last of a prompt for what is left.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    sync::Arc,
};

use plumbline_schema::{
    InputError, Location, PromptContent,
    files::{open_plain_or_zst, plain_or_zst},
    workload::DEFAULT_PREFIX_HASH_TOKENS,
};
use serde::Deserialize;

use super::{CellError, Take, TraceRow, time_of};

/// Longest line read, in bytes: a prompt of a million tokens has 2,000 hashes.
const MAX_LINE_BYTES: u64 = 16 << 20;

#[derive(Deserialize)]
struct Row {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

pub(super) fn read(path: &Path, take: &mut Take) -> Result<(), InputError> {
    let path = plain_or_zst(path);
    let mut reader = BufReader::new(open_plain_or_zst(&path)?);
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let mut limited = std::io::Read::take(&mut reader, MAX_LINE_BYTES);
        let length = limited.read_until(b'\n', &mut bytes).map_err(|e| InputError::io(&path, e))?;
        if length == 0 {
            break;
        }
        if length as u64 == MAX_LINE_BYTES && bytes.last() != Some(&b'\n') {
            let expected = format!("a line of at most {MAX_LINE_BYTES} bytes");
            return Err(InputError::invalid(&path, Location::Line(line), expected, "a longer one"));
        }
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        let row: Row = serde_json::from_slice(&bytes).map_err(|e| {
            let text = e.to_string();
            // The error counts lines in this one line.
            let found = text.rfind(" at line ").map_or(&*text, |at| &text[..at]);
            let expected = "an object with `timestamp`, `input_length` and `output_length`";
            InputError::invalid(&path, Location::Line(line), expected, found)
        })?;
        let row = request(row, line).map_err(|(column, expected, found)| {
            InputError::invalid(&path, Location::Cell { line, column: column.into() }, expected, found)
        })?;
        if take(row)?.is_break() {
            break;
        }
    }
    Ok(())
}

fn request(row: Row, line: u64) -> Result<TraceRow, CellError> {
    let time = time_of("timestamp", row.timestamp, 1e6)?;
    let blocks = row.input_length.div_ceil(DEFAULT_PREFIX_HASH_TOKENS) as usize;
    if row.hash_ids.len() > blocks {
        let expected = format!("at most {blocks}, one for each {DEFAULT_PREFIX_HASH_TOKENS} prompt tokens");
        return Err(("hash_ids", expected, row.hash_ids.len().to_string()));
    }
    let mut request = TraceRow::new(line, Some(time), row.input_length, row.output_length);
    if !row.hash_ids.is_empty() {
        request.content = Some(Arc::new(PromptContent {
            prefix_hashes: row.hash_ids,
            prefix_hash_tokens: DEFAULT_PREFIX_HASH_TOKENS,
            ..PromptContent::default()
        }));
    }
    Ok(request)
}

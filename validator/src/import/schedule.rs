//! When requests were due, from a file apart.

use std::{collections::HashMap, path::Path};

use plumbline_schema::{
    InputError, Location, Nanos,
    files::{plain_or_zst, read_csv},
};
use serde::Deserialize;

use super::record::{At, Record, between, nanoseconds};

/// A row of a workload, or of any table with ids and arrivals.
#[derive(Deserialize)]
struct Row {
    request_id: u64,
    arrival_time_ns: u64,
    #[serde(default)]
    num_prefill_tokens: Option<u32>,
    #[serde(default)]
    num_decode_tokens: Option<u32>,
}

/// What a schedule says of each record, in the records' order.
pub(super) struct Scheduled {
    /// The request's id in the schedule.
    pub request_id: u64,
    /// When it was due.
    pub arrival: Nanos,
    /// The prompt length, where it says one.
    pub num_prefill_tokens: Option<u32>,
    /// The output length asked for.
    pub num_decode_tokens: Option<u32>,
}

/// Finds each record's row: by its own number, or else by its place among them.
pub(super) fn read(path: &Path, records: &[Record]) -> Result<Vec<Scheduled>, InputError> {
    let rows: Vec<Row> = read_csv(path, "a row with request_id and arrival_time_ns")?;
    let path = &*plain_or_zst(path);
    let mut lines = HashMap::with_capacity(rows.len());
    for (i, row) in rows.iter().enumerate() {
        let cell = |column: &str| Location::Cell { line: i as u64 + 2, column: column.into() };
        if lines.insert(row.request_id, i).is_some() {
            let found = format!("{} again", row.request_id);
            return Err(InputError::invalid(path, cell("request_id"), "an id of its own", found));
        }
        let at = nanoseconds(row.arrival_time_ns).at(path, || cell("arrival_time_ns"))?;
        if i > 0 {
            between(Nanos(rows[i - 1].arrival_time_ns), at, "the row above")
                .at(path, || cell("arrival_time_ns"))?;
        }
    }
    if rows.len() != records.len() {
        let expected = format!("{} requests, as many as the result has", records.len());
        return Err(InputError::invalid(path, Location::File, expected, rows.len().to_string()));
    }
    records.iter().enumerate().map(|(i, record)| find(path, &rows, &lines, i, record)).collect()
}

fn find(
    path: &Path,
    rows: &[Row],
    lines: &HashMap<u64, usize>,
    place: usize,
    record: &Record,
) -> Result<Scheduled, InputError> {
    let index = match record.request_id {
        None => place,
        Some(id) => *lines.get(&id).ok_or_else(|| {
            InputError::invalid(
                path,
                Location::File,
                format!("request {id}, which the result has"),
                "no such id",
            )
        })?,
    };
    let row = &rows[index];
    let differs = |column: &str, expected: u32, found: u32| {
        let cell = Location::Cell { line: index as u64 + 2, column: column.into() };
        let expected = format!(
            "{expected}, as in the result{}: is this its workload? without the columns of lengths only arrivals are taken",
            record.place
        );
        Err(InputError::invalid(path, cell, expected, found.to_string()))
    };
    let is_known = record.num_prefill_tokens > 0;
    if let Some(stated) = row.num_prefill_tokens.filter(|&n| is_known && n != record.num_prefill_tokens) {
        return differs("num_prefill_tokens", record.num_prefill_tokens, stated);
    }
    if let Some(stated) = row.num_decode_tokens.filter(|&stated| stated < record.num_decode_tokens_actual) {
        return differs("num_decode_tokens", record.num_decode_tokens_actual, stated);
    }
    Ok(Scheduled {
        request_id: row.request_id,
        arrival: Nanos(row.arrival_time_ns),
        num_prefill_tokens: row.num_prefill_tokens,
        num_decode_tokens: row.num_decode_tokens.or(record.num_decode_tokens),
    })
}

//! `request_metrics.csv` of Vidur and `sequence_metrics.csv` of Sarathi-Serve, whose columns have the same names.
//!
//! Times are seconds from the arrival (Vidur `vidur/metrics/metrics_store.py`, `_on_request_end`; Sarathi-Serve
//! `sarathi/metrics/metrics_store.py`, `on_request_end`). Arrivals are in `request_inter_arrival_delay`, empty for the
//! first. Columns may end in `_s` and lack `request_`, as in published excerpts.

use std::path::Path;

use plumbline_schema::{ArrivalBasis, InputError, Location, Nanos, RequestStatus, files::CsvRows};
use serde::{Deserialize, Deserializer};

use super::record::{At, Bad, Parsed, Record, between, seconds, tokens};

#[derive(Deserialize)]
struct Row {
    #[serde(rename = "request_id", alias = "Request Id")]
    request_id: u64,
    #[serde(default)]
    request_inter_arrival_delay: Option<f64>,
    #[serde(
        rename = "request_e2e_time",
        alias = "request_e2e_time_s",
        alias = "e2e_time_s",
        deserialize_with = "cell_or_nothing"
    )]
    e2e: Option<f64>,
    #[serde(
        rename = "prefill_e2e_time",
        alias = "prefill_e2e_time_s",
        alias = "first_token_time_s",
        deserialize_with = "cell_or_nothing"
    )]
    first_token: Option<f64>,
    #[serde(rename = "request_num_prefill_tokens", alias = "num_prefill_tokens")]
    num_prefill_tokens: f64,
    #[serde(rename = "request_num_decode_tokens", alias = "num_decode_tokens")]
    num_decode_tokens: f64,
    /// Sarathi-Serve's: the prompt was longer than the engine takes.
    #[serde(default)]
    request_num_ignored: Option<f64>,
}

/// A cell that may be empty, in a column that must be there.
fn cell_or_nothing<'de, D: Deserializer<'de>>(cell: D) -> Result<Option<f64>, D::Error> {
    Option::deserialize(cell)
}

/// Reads either.
pub(super) fn read(path: &Path) -> Result<Parsed, InputError> {
    let rows = CsvRows::<Row>::open(path, "a row of request metrics")?;
    let path = rows.path().to_path_buf();
    let mut rows: Vec<(u64, Row)> = rows.collect::<Result<_, _>>()?;
    // Joined tables are in the order of ids, which of texts is not the order of numbers; delays go by the latter.
    rows.sort_by_key(|(_, row)| row.request_id);
    let has_delays = rows.iter().any(|(_, row)| row.request_inter_arrival_delay.is_some());
    let mut arrival = Nanos::ZERO;
    let mut records = Vec::with_capacity(rows.len());
    for (i, (line, row)) in rows.iter().enumerate() {
        let cell = |column: &str| Location::Cell { line: *line, column: column.into() };
        if has_delays && i > 0 {
            let delay = row.request_inter_arrival_delay.unwrap_or(f64::NAN);
            arrival += seconds(delay).at(&path, || cell("request_inter_arrival_delay"))?;
        }
        let mut record = record(row).map_err(|(column, (expected, found))| {
            InputError::invalid(&path, cell(column), expected, found)
        })?;
        record.place = Location::Line(*line);
        record.sent = has_delays.then_some(arrival);
        records.push(record);
    }
    Ok(Parsed {
        version: None,
        backend: None,
        model: None,
        arrivals: has_delays.then_some(ArrivalBasis::Scheduled),
        by_arrival: false,
        records,
        published: Vec::new(),
        unchecked: None,
        notes: Vec::new(),
    })
}

fn record(row: &Row) -> Result<Record, (&'static str, Bad)> {
    let span = |column, value: Option<f64>| value.map(seconds).transpose().map_err(|bad| (column, bad));
    let first = span("prefill_e2e_time", row.first_token)?;
    let last = span("request_e2e_time", row.e2e)?;
    let count = |column, value| tokens(value).map_err(|bad| (column, bad));
    let num_decode_tokens = count("request_num_decode_tokens", row.num_decode_tokens)?;
    let status = match (first, last) {
        _ if row.request_num_ignored.is_some_and(|ignored| ignored > 0.0) => RequestStatus::Rejected,
        (Some(first), Some(last)) => {
            between(first, last, "the first token").map_err(|bad| ("request_e2e_time", bad))?;
            RequestStatus::Ok
        }
        _ => RequestStatus::Incomplete,
    };
    let is_ok = status == RequestStatus::Ok;
    if is_ok && num_decode_tokens == 0 {
        let bad = ("at least 1 token, as the request ended".to_owned(), "0".to_owned());
        return Err(("request_num_decode_tokens", bad));
    }
    Ok(Record {
        place: Location::File,
        request_id: Some(row.request_id),
        scheduled: None,
        sent: None,
        first_token: first.filter(|_| status != RequestStatus::Rejected),
        last_token: last.filter(|_| is_ok),
        gaps: None,
        num_prefill_tokens: count("request_num_prefill_tokens", row.num_prefill_tokens)?,
        num_decode_tokens: Some(num_decode_tokens),
        num_decode_tokens_actual: if is_ok { num_decode_tokens } else { 0 },
        status,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Parsed, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.csv");
        std::fs::write(&path, text).unwrap();
        read(&path).map_err(|e| e.to_string().replace(folder.path().to_str().unwrap(), ""))
    }

    const GOOD: &str = "Request Id,request_e2e_time,prefill_e2e_time,request_inter_arrival_delay,\
        request_num_prefill_tokens,request_num_decode_tokens,request_num_ignored\n\
        10,0.5,0.25,1.5,7.0,4.0,0\n2,0.25,0.125,,9.0,2.0,0\n11,,,0.5,9999.0,3.0,1\n";

    #[test]
    fn rows_go_by_number_and_delays_add_up() {
        let parsed = read_text(GOOD).unwrap();
        let found: Vec<_> = parsed.records.iter().map(|r| (r.request_id, r.sent, r.status)).collect();
        let at = |ns| Some(Nanos(ns));
        assert_eq!(
            found,
            [
                (Some(2), at(0), RequestStatus::Ok),
                (Some(10), at(1_500_000_000), RequestStatus::Ok),
                (Some(11), at(2_000_000_000), RequestStatus::Rejected)
            ]
        );
        assert_eq!(parsed.records[1].last_token, at(500_000_000));
    }

    #[test]
    fn an_excerpt_without_delays_has_no_arrivals() {
        let text = "request_id,request_e2e_time_s,prefill_e2e_time_s,num_prefill_tokens,num_decode_tokens\n0,0.5,0.25,9,64\n";
        let parsed = read_text(text).unwrap();
        assert_eq!((parsed.arrivals, parsed.records[0].sent), (None, None));
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (from, to, expected) in [
            (
                "0.5,0.25",
                "0.125,0.25",
                "/r.csv, line 2, column `request_e2e_time`: expected no time before the first",
            ),
            ("1.5,7", "-1,7", "/r.csv, line 2, column `request_inter_arrival_delay`: expected seconds"),
            (
                ",1.5,",
                ",,",
                "/r.csv, line 2, column `request_inter_arrival_delay`: expected seconds, 0 to 9e9, found NaN",
            ),
            (
                "9.0,2.0",
                "9.0,2.5",
                "/r.csv, line 3, column `request_num_decode_tokens`: expected a whole number",
            ),
            (",prefill_e2e_time,", ",prefill,", "/r.csv, line 1: expected a column `prefill_e2e_time`"),
            ("9.0,2.0", "9.0,0", "/r.csv, line 3, column `request_num_decode_tokens`: expected at least 1"),
            (
                "0.5,0.25",
                "nan,0.25",
                "/r.csv, line 2, column `request_e2e_time`: expected seconds, 0 to 9e9, found NaN",
            ),
        ] {
            let error = read_text(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}

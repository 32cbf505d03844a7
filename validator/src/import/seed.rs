//! The tables of the case in `docs/seed-case.md`: `request_metrics.csv` with `token_metrics`, `trace_intervals`,
//! `trace_lengths` and percentiles beside it.
//!
//! File names may have a beginning in common: beside `NAME_real_request_metrics.csv` the tokens are in
//! `NAME_real_token_metrics*.csv` and the rest in `NAME_*.csv`. Times are ns of one clock, arrivals as scheduled.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use plumbline_schema::{ArrivalBasis, InputError, Location, Nanos, RequestStatus, files::CsvRows};
use serde::{Deserialize, de::DeserializeOwned};

use super::record::{At, Parsed, Record, between, nanoseconds, seconds};

const REQUESTS: &str = "request_metrics.csv";

#[derive(Deserialize)]
struct RequestRow {
    request_id: u64,
    arrival_time_ns: u64,
    first_token_time_ns: Option<u64>,
    ttft_ns: Option<u64>,
    completion_time_ns: Option<u64>,
    num_prefill_tokens: u32,
    num_decode_tokens: u32,
    num_decode_tokens_actual: u32,
    status: RequestStatus,
    #[serde(default)]
    backend: Option<String>,
}

#[derive(Deserialize)]
struct TokenRow {
    request_id: u64,
    token_index: u32,
    token_time_ns: u64,
    token_latency_ns: u64,
}

#[derive(Deserialize)]
struct IntervalRow {
    request_id: u64,
    arrival_time_ns: u64,
}

#[derive(Deserialize)]
struct LengthRow {
    request_id: u64,
    num_prefill_tokens: u32,
    num_decode_tokens: u32,
}

#[derive(Deserialize)]
struct PercentileRow {
    metric: String,
    real_ns: f64,
    sim_ns: f64,
}

/// Reads the table at `path`, or in the folder `path`, and those beside it; `simulated` says whose percentiles are its.
pub(super) fn read(path: &Path, simulated: bool) -> Result<Parsed, InputError> {
    let path = if path.is_dir() { path.join(REQUESTS) } else { path.to_path_buf() };
    let rows = read_rows::<RequestRow>(&path, "a request_metrics row")?;
    let mut records = Vec::with_capacity(rows.len());
    for (line, row) in &rows {
        records.push(record(&path, *line, row)?);
    }
    let beside = Beside::of(&path);
    let mut notes = Vec::new();
    if let Some(tokens) = beside.tokens() {
        add_tokens(&tokens, &mut records, &mut notes)?;
    }
    check_traces(&beside, &rows)?;
    let mut published = Vec::new();
    for (name, file) in [("ttft", "ttft_percentiles.csv"), ("token_latency", "token_latency_percentiles.csv")]
    {
        let Some(path) = beside.case_file(file) else { continue };
        for (line, row) in read_rows::<PercentileRow>(&path, "a percentile")? {
            let (column, ns) = if simulated { ("sim_ns", row.sim_ns) } else { ("real_ns", row.real_ns) };
            // Only to check it: the figure itself keeps the digits that it was published with.
            let cell = || Location::Cell { line, column: column.into() };
            seconds(ns / 1e9).at(&path, cell)?;
            published.push((format!("{name}_{}", row.metric), ns / 1e6));
        }
    }
    Ok(Parsed {
        version: None,
        backend: rows.first().and_then(|(_, row)| row.backend.clone()),
        model: None,
        arrivals: Some(ArrivalBasis::Scheduled),
        by_arrival: false,
        records,
        published,
        unchecked: None,
        notes,
    })
}

fn read_rows<T: DeserializeOwned>(path: &Path, expected: &str) -> Result<Vec<(u64, T)>, InputError> {
    CsvRows::open(path, expected)?.collect()
}

/// The files beside a table of requests.
struct Beside {
    folder: PathBuf,
    /// What the names of its own files begin with: `NAME_real_`.
    own: String,
    /// What the names of files of the whole case begin with: `NAME_`.
    case: String,
}

impl Beside {
    fn of(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let own = name.strip_suffix(REQUESTS).unwrap_or_default().to_owned();
        let kind = own.trim_end_matches('_');
        let case = kind.rfind('_').map_or("", |at| &own[..=at]).to_owned();
        Self { folder: path.parent().unwrap_or(Path::new("")).to_path_buf(), own, case }
    }

    fn tokens(&self) -> Option<PathBuf> {
        ["", "_all", "_req0_first8"]
            .map(|end| self.folder.join(format!("{}token_metrics{end}.csv", self.own)))
            .into_iter()
            .find(|path| path.is_file())
    }

    fn case_file(&self, name: &str) -> Option<PathBuf> {
        let path = self.folder.join(format!("{}{name}", self.case));
        path.is_file().then_some(path)
    }
}

fn record(path: &Path, line: u64, row: &RequestRow) -> Result<Record, InputError> {
    let cell = |column: &str| Location::Cell { line, column: column.into() };
    let arrival = nanoseconds(row.arrival_time_ns).at(path, || cell("arrival_time_ns"))?;
    let since_arrival = |column: &str, time: Option<u64>| {
        let time = time.map(nanoseconds).transpose().at(path, || cell(column))?;
        time.map(|time| between(arrival, time, "the arrival")).transpose().at(path, || cell(column))
    };
    let first = since_arrival("first_token_time_ns", row.first_token_time_ns)?;
    let last = since_arrival("completion_time_ns", row.completion_time_ns)?;
    let bad = |column: &str, expected: String, found: String| {
        Err(InputError::invalid(path, cell(column), expected, found))
    };
    if let (Some(first), Some(ttft)) = (first, row.ttft_ns)
        && first.0 != ttft
    {
        return bad("ttft_ns", format!("{}, first token minus arrival", first.0), ttft.to_string());
    }
    if row.status == RequestStatus::Ok {
        let (Some(first), Some(last)) = (first, last) else {
            let column = if first.is_none() { "first_token_time_ns" } else { "completion_time_ns" };
            return bad(column, "a time, as status is ok".into(), "nothing".into());
        };
        between(first, last, "the first token").at(path, || cell("completion_time_ns"))?;
        if row.num_decode_tokens_actual == 0 {
            return bad("num_decode_tokens_actual", "at least 1, as status is ok".into(), "0".into());
        }
    }
    Ok(Record {
        place: Location::Line(line),
        request_id: Some(row.request_id),
        scheduled: Some(arrival),
        sent: Some(arrival),
        first_token: first,
        last_token: last,
        gaps: None,
        num_prefill_tokens: row.num_prefill_tokens,
        num_decode_tokens: Some(row.num_decode_tokens),
        num_decode_tokens_actual: row.num_decode_tokens_actual,
        status: row.status,
    })
}

/// Takes the token times when they are of all tokens: an excerpt would be measured as if it were the whole.
fn add_tokens(path: &Path, records: &mut [Record], notes: &mut Vec<String>) -> Result<(), InputError> {
    let rows = read_rows::<TokenRow>(path, "a token_metrics row")?;
    let mut times: HashMap<u64, Vec<Nanos>> = HashMap::new();
    for (line, row) in &rows {
        let cell = |column: &str| Location::Cell { line: *line, column: column.into() };
        let bad = |column: &str, expected: String, found: String| {
            Err(InputError::invalid(path, cell(column), expected, found))
        };
        let time = nanoseconds(row.token_time_ns).at(path, || cell("token_time_ns"))?;
        let times = times.entry(row.request_id).or_default();
        if row.token_index as usize != times.len() {
            return bad("token_index", times.len().to_string(), row.token_index.to_string());
        }
        let gap = match times.last() {
            Some(&before) => between(before, time, "the token before").at(path, || cell("token_time_ns"))?,
            None => Nanos::ZERO,
        };
        if row.token_latency_ns != gap.0 {
            let expected = format!("{}, the time since the token before", gap.0);
            return bad("token_latency_ns", expected, row.token_latency_ns.to_string());
        }
        times.push(time);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let finished = || records.iter().filter(|record| record.status == RequestStatus::Ok);
    let num_tokens: u64 = finished().map(|record| u64::from(record.num_decode_tokens_actual)).sum();
    if num_tokens != rows.len() as u64 {
        notes.push(format!("no token times: {name} has {} of {num_tokens} tokens", rows.len()));
        return Ok(());
    }
    for record in records.iter_mut().filter(|record| record.status == RequestStatus::Ok) {
        let (Some(id), Some(arrival)) = (record.request_id, record.sent) else { continue };
        let times = times.remove(&id).unwrap_or_default();
        let ends = [times.first(), times.last()].map(|time| time.map(|&time| time.saturating_since(arrival)));
        if ends != [record.first_token, record.last_token] {
            let expected = format!("first and last token of request {id} when request_metrics has them");
            return Err(InputError::invalid(path, Location::File, expected, "other times, or none"));
        }
        record.gaps = Some(times.windows(2).map(|pair| pair[1].saturating_since(pair[0])).collect());
    }
    Ok(())
}

/// A column of a trace, its value, and what the run has.
type Stated = (&'static str, u64, fn(&RequestRow) -> u64);

/// Arrivals and lengths of the trace must be those of the run.
fn check_traces(beside: &Beside, rows: &[(u64, RequestRow)]) -> Result<(), InputError> {
    let by_id: HashMap<u64, &RequestRow> = rows.iter().map(|(_, row)| (row.request_id, row)).collect();
    let check = |path: &Path, line: u64, id: u64, pairs: &[Stated]| {
        let cell = |column: &str| Location::Cell { line, column: column.into() };
        let Some(row) = by_id.get(&id) else {
            return Err(InputError::invalid(
                path,
                cell("request_id"),
                "a request of the run",
                id.to_string(),
            ));
        };
        match pairs.iter().find(|(_, stated, of)| *stated != of(row)) {
            None => Ok(()),
            Some((column, stated, of)) => {
                let expected = format!("{}, as in the run's request {id}", of(row));
                Err(InputError::invalid(path, cell(column), expected, stated.to_string()))
            }
        }
    };
    if let Some(path) = beside.case_file("trace_intervals.csv") {
        for (line, row) in read_rows::<IntervalRow>(&path, "a trace_intervals row")? {
            let pairs: [Stated; 1] = [("arrival_time_ns", row.arrival_time_ns, |row| row.arrival_time_ns)];
            check(&path, line, row.request_id, &pairs)?;
        }
    }
    if let Some(path) = beside.case_file("trace_lengths.csv") {
        for (line, row) in read_rows::<LengthRow>(&path, "a trace_lengths row")? {
            let pairs: [Stated; 2] = [
                ("num_prefill_tokens", row.num_prefill_tokens.into(), |row| row.num_prefill_tokens.into()),
                ("num_decode_tokens", row.num_decode_tokens.into(), |row| row.num_decode_tokens.into()),
            ];
            check(&path, line, row.request_id, &pairs)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: &str = "request_id,arrival_time_ns,first_token_time_ns,ttft_ns,completion_time_ns,num_prefill_tokens,\
        num_decode_tokens,num_decode_tokens_actual,status,backend\n4,1000,1030,30,1080,9,3,3,ok,engine\n";
    const TOKENS: &str =
        "request_id,token_index,token_time_ns,token_latency_ns\n4,0,1030,0\n4,1,1050,20\n4,2,1080,30\n";

    fn read_files(files: &[(&str, &str)]) -> Result<Parsed, String> {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let path = folder.path().join(files[0].0);
        read(&path, false).map_err(|e| e.to_string().replace(folder.path().to_str().unwrap(), ""))
    }

    #[test]
    fn the_tables_beside_it_are_found_by_name() {
        let ttft = "metric,real_ns,sim_ns\np50,30.500,7\n";
        let parsed = read_files(&[
            ("q_real_request_metrics.csv", REQUEST),
            ("q_real_token_metrics_all.csv", TOKENS),
            ("q_ttft_percentiles.csv", ttft),
        ]);
        let parsed = parsed.unwrap();
        assert_eq!(parsed.records[0].gaps.as_deref(), Some([Nanos(20), Nanos(30)].as_slice()));
        assert_eq!(parsed.published, [("ttft_p50".to_owned(), 30.5e-6)]);
        let excerpt = TOKENS.rsplit_once("4,2").unwrap().0;
        let parsed = read_files(&[("request_metrics.csv", REQUEST), ("token_metrics.csv", excerpt)]).unwrap();
        assert_eq!(parsed.records[0].gaps, None);
        assert_eq!(parsed.notes, ["no token times: token_metrics.csv has 2 of 3 tokens"]);
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (from, to, expected) in [
            (
                "1050,20",
                "1050,21",
                "/token_metrics.csv, line 3, column `token_latency_ns`: expected 20, the time since",
            ),
            (
                "1050,20",
                "1020,20",
                "/token_metrics.csv, line 3, column `token_time_ns`: expected no time before",
            ),
            ("4,2,", "4,3,", "/token_metrics.csv, line 4, column `token_index`: expected 2, found 3"),
            ("1080,30\n", "1090,40\n", "/token_metrics.csv: expected first and last token of request 4"),
        ] {
            let tokens = TOKENS.replace(from, to);
            let error =
                read_files(&[("request_metrics.csv", REQUEST), ("token_metrics.csv", &tokens)]).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
        for (from, to, expected) in [
            (
                ",30,",
                ",31,",
                "/request_metrics.csv, line 2, column `ttft_ns`: expected 30, first token minus arrival",
            ),
            (
                "1080",
                "1029",
                "/request_metrics.csv, line 2, column `completion_time_ns`: expected no time before",
            ),
            (
                "4,1000",
                "4,1031",
                "/request_metrics.csv, line 2, column `first_token_time_ns`: expected no time before",
            ),
            (
                "3,3,ok",
                "3,0,ok",
                "/request_metrics.csv, line 2, column `num_decode_tokens_actual`: expected at least 1",
            ),
        ] {
            let error = read_files(&[("request_metrics.csv", &REQUEST.replace(from, to))]).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
        let intervals = "request_id,inter_arrival_ns,arrival_time_ns\n4,0,1001\n";
        let error =
            read_files(&[("request_metrics.csv", REQUEST), ("trace_intervals.csv", intervals)]).unwrap_err();
        let expected = "/trace_intervals.csv, line 2, column `arrival_time_ns`: expected 1000, as in the run's request 4";
        assert!(error.starts_with(expected), "{error}");
    }
}

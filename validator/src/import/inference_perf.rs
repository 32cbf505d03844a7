//! `per_request_lifecycle_metrics.json` of inference-perf.
//!
//! Times are seconds of one clock. `chunk_times` are when pieces of the stream came; the tool's `output_token_times` give
//! every token of a piece its piece's time, so that they are token times only where each piece is one token
//! (`inference_perf/reportgen/base.py`, `summarize_requests`).

use std::{collections::BTreeMap, path::Path};

use plumbline_schema::{ArrivalBasis, InputError, Location, Nanos, RequestStatus};
use serde::{Deserialize, de::IgnoredAny};

use super::{
    json,
    record::{At, Parsed, Record, between, seconds},
};

#[derive(Deserialize)]
struct Request {
    start_time: f64,
    end_time: f64,
    #[serde(default)]
    info: Option<Info>,
    #[serde(default)]
    error: Option<IgnoredAny>,
}

#[derive(Default, Deserialize)]
struct Info {
    #[serde(default)]
    request_metrics: Option<RequestMetrics>,
    #[serde(default)]
    response_metrics: Option<ResponseMetrics>,
    /// Of versions before 0.6, and still written.
    #[serde(default)]
    input_tokens: Option<u32>,
    #[serde(default)]
    output_tokens: Option<u32>,
    #[serde(default)]
    output_token_times: Vec<f64>,
}

#[derive(Deserialize)]
struct RequestMetrics {
    text: Text,
}

#[derive(Deserialize)]
struct Text {
    input_tokens: u32,
}

#[derive(Default, Deserialize)]
struct ResponseMetrics {
    #[serde(default)]
    output_tokens: u32,
    #[serde(default)]
    server_usage: Option<Usage>,
    #[serde(default)]
    chunk_times: Vec<f64>,
    #[serde(default)]
    output_token_times: Vec<f64>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    completion_tokens: Option<u32>,
}

/// `summary_lifecycle_metrics.json` beside it, where it is: the tool's own figures, in seconds.
#[derive(Deserialize)]
struct Summary {
    successes: Successes,
}

#[derive(Deserialize)]
struct Successes {
    #[serde(default)]
    latency: BTreeMap<String, Option<BTreeMap<String, f64>>>,
}

const SUMMARY: &str = "summary_lifecycle_metrics.json";

const UNCHECKED: (&[&str], &str) = (
    &["request_latency", "normalized_time_per_output_token", "time_per_output_token"],
    "inference-perf counts to the end of the stream, and tokens by its own tokenizer; here it counts to the last token, \
     and tokens as the server does",
);

/// Reads all requests.
pub(super) fn read(path: &Path) -> Result<Parsed, InputError> {
    let text = json::read(path)?;
    let requests: Vec<Request> =
        json::parse(path, None, &text, "a per_request_lifecycle_metrics.json of inference-perf")?;
    let mut records = Vec::with_capacity(requests.len());
    for (i, request) in requests.into_iter().enumerate() {
        records.push(record(path, i, request)?);
    }
    Ok(Parsed {
        version: None,
        backend: None,
        model: None,
        arrivals: Some(ArrivalBasis::Sent),
        by_arrival: true,
        records,
        published: summary(&path.with_file_name(SUMMARY))?,
        unchecked: Some(UNCHECKED),
        notes: Vec::new(),
    })
}

fn record(path: &Path, i: usize, request: Request) -> Result<Record, InputError> {
    let place = |name: &str| Location::Key(format!("[{i}].{name}"));
    let at = |name: &str, value: f64| seconds(value).at(path, || place(name));
    let sent = at("start_time", request.start_time)?;
    let ended = at("end_time", request.end_time)?;
    between(sent, ended, "start_time").at(path, || place("end_time"))?;
    let info = request.info.unwrap_or_default();
    let (response, nested) = match info.response_metrics {
        Some(response) => (response, "info.response_metrics."),
        None => (
            ResponseMetrics {
                output_tokens: info.output_tokens.unwrap_or_default(),
                output_token_times: info.output_token_times,
                ..ResponseMetrics::default()
            },
            "info.",
        ),
    };
    let (name, times) = if response.chunk_times.is_empty() {
        ("output_token_times", &response.output_token_times)
    } else {
        ("chunk_times", &response.chunk_times)
    };
    let mut spans: Vec<Nanos> = Vec::with_capacity(times.len());
    for (j, &time) in times.iter().enumerate() {
        let place = || place(&format!("{nested}{name}[{j}]"));
        let time = seconds(time).at(path, place)?;
        let before = spans.last().map_or(sent, |&last| sent + last);
        between(before, time, "the one before").at(path, place)?;
        spans.push(time.saturating_since(sent));
    }
    let counted = response.server_usage.and_then(|usage| usage.completion_tokens);
    let num_tokens = counted.unwrap_or(response.output_tokens);
    let is_ok = request.error.is_none();
    if is_ok && (spans.is_empty() || num_tokens == 0) {
        let expected = "output tokens and the times of their pieces, as there is no error";
        return Err(InputError::invalid(path, place("info"), expected, "none; was it streamed?"));
    }
    Ok(Record {
        place: Location::Key(format!("[{i}]")),
        request_id: None,
        scheduled: None,
        sent: Some(sent),
        first_token: spans.first().copied(),
        last_token: spans.last().copied().filter(|_| is_ok),
        gaps: Some(spans.windows(2).map(|pair| pair[1].saturating_since(pair[0])).collect()),
        num_prefill_tokens: info
            .request_metrics
            .map(|metrics| metrics.text.input_tokens)
            .or(info.input_tokens)
            .unwrap_or_default(),
        num_decode_tokens: None,
        num_decode_tokens_actual: num_tokens,
        status: if is_ok { RequestStatus::Ok } else { RequestStatus::Incomplete },
    })
}

fn summary(path: &Path) -> Result<Vec<(String, f64)>, InputError> {
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let summary: Summary = json::parse(path, None, &json::read(path)?, "a summary of inference-perf")?;
    let figures = summary.successes.latency.into_iter().flat_map(|(name, figures)| {
        let figures = figures.unwrap_or_default().into_iter();
        figures.map(move |(stat, seconds)| (format!("{name}.{stat}"), seconds * 1e3))
    });
    Ok(figures.filter(|(name, _)| crate::variants::figure_of("inference-perf", name).is_some()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Parsed, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.json");
        std::fs::write(&path, text).unwrap();
        read(&path).map_err(|e| e.to_string().replace(folder.path().to_str().unwrap(), ""))
    }

    const GOOD: &str = r#"[{"start_time": 10.0, "end_time": 11.0, "info": {"request_metrics": {"text": {"input_tokens": 4}},
        "response_metrics": {"output_tokens": 4, "server_usage": {"completion_tokens": 3},
        "chunk_times": [10.25, 10.5, 10.75], "output_token_times": [10.25, 10.5, 10.5, 10.75]}}, "error": null},
        {"start_time": 12.0, "end_time": 12.5, "info": {"input_tokens": 6, "output_tokens": 2, "output_token_times": [12.25, 12.5]}},
        {"start_time": 13.0, "end_time": 13.5, "info": {"input_tokens": 0}, "error": {"error_type": "x"}}]"#;

    #[test]
    fn pieces_count_and_the_server_counts_tokens() {
        let parsed = read_text(GOOD).unwrap();
        let [new, old, failed] = parsed.records.as_slice() else { panic!("{parsed:?}") };
        assert_eq!((new.num_decode_tokens_actual, new.num_prefill_tokens), (3, 4));
        assert_eq!(new.gaps.as_deref(), Some([Nanos(250_000_000); 2].as_slice()));
        assert_eq!((new.first_token, new.last_token), (Some(Nanos(250_000_000)), Some(Nanos(750_000_000))));
        assert_eq!((old.num_decode_tokens_actual, old.last_token), (2, Some(Nanos(500_000_000))));
        assert_eq!((failed.status, failed.last_token), (RequestStatus::Incomplete, None));
    }

    #[test]
    fn what_cannot_be_is_named() {
        let response = "/r.json, key `[0].info.response_metrics.chunk_times";
        for (from, to, expected) in [
            (
                "[10.25, 10.5, 10.75]",
                "[10.5, 10.25, 10.75]",
                format!("{response}[1]`: expected no time before"),
            ),
            (
                "[10.25, 10.5, 10.75]",
                "[9.25, 10.5, 10.75]",
                format!("{response}[0]`: expected no time before"),
            ),
            ("11.0", "9.0", "/r.json, key `[0].end_time`: expected no time before start_time".into()),
            (
                "\"completion_tokens\": 3",
                "\"completion_tokens\": 0",
                "/r.json, key `[0].info`: expected output tokens".into(),
            ),
            (
                "\"error\": {",
                "\"err\": {",
                "/r.json, key `[2].info`: expected output tokens and the times".into(),
            ),
        ] {
            let error = read_text(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.starts_with(&expected), "{error}");
        }
    }
}

//! `profile_export.jsonl` of AIPerf: a line a request.
//!
//! Each metric comes with its unit; `request_start_ns` is wall-clock time (`aiperf/common/models/record_models.py`,
//! `MetricRecordInfo`). `inter_chunk_latency` holds the gaps between streamed chunks, while `inter_token_latency` is a
//! request's mean.

use std::{collections::BTreeMap, path::Path};

use plumbline_schema::{ArrivalBasis, InputError, Location, Nanos, RequestStatus};
use serde::{Deserialize, de::IgnoredAny};

use super::{
    json,
    record::{At, Bad, Names, Parsed, Record, nanoseconds, seconds, tokens},
};

#[derive(Deserialize)]
struct Line {
    metadata: Metadata,
    #[serde(default)]
    metrics: Metrics,
    #[serde(default)]
    error: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Metadata {
    request_start_ns: u64,
    #[serde(default)]
    x_request_id: Option<String>,
    #[serde(default)]
    benchmark_phase: Option<String>,
    #[serde(default)]
    was_cancelled: bool,
}

#[derive(Default, Deserialize)]
struct Metrics {
    #[serde(default)]
    time_to_first_token: Option<Measured<f64>>,
    #[serde(default)]
    request_latency: Option<Measured<f64>>,
    #[serde(default)]
    inter_chunk_latency: Option<Measured<Vec<f64>>>,
    #[serde(default)]
    input_sequence_length: Option<Measured<f64>>,
    #[serde(default)]
    error_isl: Option<Measured<f64>>,
    #[serde(default)]
    output_sequence_length: Option<Measured<f64>>,
}

#[derive(Deserialize)]
struct Measured<T> {
    value: T,
    unit: String,
}

/// `profile_export_aiperf.json` beside it, where it is: the tool's own figures.
#[derive(Deserialize)]
struct Summary {
    #[serde(default)]
    aiperf_version: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Figure {
    Statistics(Statistics),
    Other(IgnoredAny),
}

#[derive(Deserialize)]
struct Statistics {
    unit: String,
    #[serde(flatten)]
    values: BTreeMap<String, Option<f64>>,
}

const SUMMARY: &str = "profile_export_aiperf.json";

const FIGURES: [&str; 4] =
    ["time_to_first_token", "inter_token_latency", "inter_chunk_latency", "request_latency"];

/// Reads the lines of the profiling phase.
pub(super) fn read(path: &Path) -> Result<Parsed, InputError> {
    let text = json::read(path)?;
    let mut records = Vec::new();
    let mut names = Names::default();
    let mut num_warm_up = 0_u64;
    for (number, text) in json::lines(&text) {
        let line: Line = json::parse(path, Some(number), text, "a record of profile_export.jsonl")?;
        if line.metadata.benchmark_phase.as_deref().is_some_and(|phase| phase != "profiling") {
            num_warm_up += 1;
            continue;
        }
        names.take(path, line.metadata.x_request_id.as_ref(), Location::Line(number))?;
        records.push(record(path, number, &line)?);
    }
    let (version, published) = summary(&path.with_file_name(SUMMARY))?;
    let notes = match num_warm_up {
        0 => Vec::new(),
        n => vec![format!("{n} requests of the warm-up are left out, as in the tool's own figures")],
    };
    Ok(Parsed {
        version,
        backend: None,
        model: None,
        arrivals: Some(ArrivalBasis::Sent),
        by_arrival: true,
        records,
        published,
        unchecked: None,
        notes,
    })
}

fn in_unit(value: f64, unit: &str) -> Result<Nanos, Bad> {
    let per_second = match unit {
        "ns" => 1e9,
        "us" => 1e6,
        "ms" => 1e3,
        "sec" | "s" => 1.0,
        _ => return Err(("a unit of time: ns, us, ms or sec".into(), format!("{unit:?}"))),
    };
    seconds(value / per_second)
}

fn record(path: &Path, number: u64, line: &Line) -> Result<Record, InputError> {
    let cell = |name: &str| Location::Cell { line: number, column: name.into() };
    let metrics = &line.metrics;
    let span = |name: &str, measured: &Option<Measured<f64>>| {
        let span = measured.as_ref().map(|measured| in_unit(measured.value, &measured.unit));
        span.transpose().at(path, || cell(&format!("metrics.{name}")))
    };
    let count = |name: &str, measured: &Option<Measured<f64>>| {
        let count = measured.as_ref().map(|measured| tokens(measured.value)).transpose();
        count.at(path, || cell(&format!("metrics.{name}")))
    };
    let first = span("time_to_first_token", &metrics.time_to_first_token)?;
    let last = span("request_latency", &metrics.request_latency)?;
    let mut gaps = Vec::new();
    for (value, unit) in
        metrics.inter_chunk_latency.iter().flat_map(|m| m.value.iter().map(|v| (*v, &m.unit)))
    {
        gaps.push(in_unit(value, unit).at(path, || cell("metrics.inter_chunk_latency"))?);
    }
    let num_tokens = count("output_sequence_length", &metrics.output_sequence_length)?.unwrap_or_default();
    let is_ok = line.error.is_none() && !line.metadata.was_cancelled;
    if is_ok && (first.is_none() || last < first || num_tokens == 0) {
        let expected =
            "output tokens, and a time to first token within the request's latency, as there is no error";
        return Err(InputError::invalid(path, cell("metrics"), expected, "other; was it streamed?"));
    }
    let prompt = match count("input_sequence_length", &metrics.input_sequence_length)? {
        Some(prompt) => prompt,
        None => count("error_isl", &metrics.error_isl)?.unwrap_or_default(),
    };
    Ok(Record {
        place: Location::Line(number),
        request_id: None,
        scheduled: None,
        sent: Some(
            nanoseconds(line.metadata.request_start_ns).at(path, || cell("metadata.request_start_ns"))?,
        ),
        first_token: first,
        last_token: last.filter(|_| is_ok),
        gaps: Some(gaps),
        num_prefill_tokens: prompt,
        num_decode_tokens: None,
        num_decode_tokens_actual: num_tokens,
        status: if is_ok { RequestStatus::Ok } else { RequestStatus::Incomplete },
    })
}

/// Names and ms.
type Figures = Vec<(String, f64)>;

/// Version and figures of the summary; nothing where there is none.
fn summary(path: &Path) -> Result<(Option<String>, Figures), InputError> {
    if !path.is_file() {
        return Ok((None, Vec::new()));
    }
    let text = json::read(path)?;
    let summary: Summary = json::parse(path, None, &text, "a summary of aiperf")?;
    let figures: BTreeMap<String, Figure> = json::parse(path, None, &text, "a summary of aiperf")?;
    let mut published = Vec::new();
    for name in FIGURES {
        let Some(Figure::Statistics(figure)) = figures.get(name) else { continue };
        for (stat, value) in figure.values.iter().filter_map(|(stat, value)| Some((stat, (*value)?))) {
            let place = || Location::Key(format!("{name}.{stat}"));
            let span = in_unit(value, &figure.unit).at(path, place)?;
            published.push((format!("{name}.{stat}"), span.0 as f64 / 1e6));
        }
    }
    Ok((summary.aiperf_version, published))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_lines(lines: &str) -> Result<Parsed, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.jsonl");
        std::fs::write(&path, lines).unwrap();
        read(&path).map_err(|e| e.to_string().replace(folder.path().to_str().unwrap(), ""))
    }

    const GOOD: &str = r#"{"metadata": {"request_start_ns": 5, "benchmark_phase": "warmup"}, "metrics": {}}

{"metadata": {"request_start_ns": 1795559745010393196, "x_request_id": "a", "benchmark_phase": "profiling", "was_cancelled": false}, "metrics": {"time_to_first_token": {"value": 40.5, "unit": "ms"}, "inter_chunk_latency": {"value": [10.0, 9.5], "unit": "ms"}, "request_latency": {"value": 0.06, "unit": "sec"}, "input_sequence_length": {"value": 7, "unit": "tokens"}, "output_sequence_length": {"value": 3, "unit": "tokens"}}}
{"metadata": {"request_start_ns": 6, "x_request_id": "b", "benchmark_phase": "profiling"}, "metrics": {"error_isl": {"value": 9, "unit": "tokens"}}, "error": {"code": 500}}
"#;

    #[test]
    fn units_are_heeded_and_failures_stay() {
        let parsed = read_lines(GOOD).unwrap();
        assert_eq!(parsed.notes, ["1 requests of the warm-up are left out, as in the tool's own figures"]);
        let [ok, failed] = parsed.records.as_slice() else { panic!("{parsed:?}") };
        assert_eq!((ok.first_token, ok.last_token), (Some(Nanos(40_500_000)), Some(Nanos(60_000_000))));
        assert_eq!(ok.gaps.as_deref(), Some([Nanos(10_000_000), Nanos(9_500_000)].as_slice()));
        assert_eq!((failed.status, failed.num_prefill_tokens), (RequestStatus::Incomplete, 9));
    }

    #[test]
    fn what_cannot_be_is_named() {
        let metrics = "/p.jsonl, line 3, column `metrics";
        for (from, to, expected) in [
            (
                "40.5, \"unit\": \"ms\"",
                "40.5, \"unit\": \"h\"",
                format!("{metrics}.time_to_first_token`: expected a unit"),
            ),
            (
                "9.5]",
                "-9.5]",
                format!("{metrics}.inter_chunk_latency`: expected seconds, 0 to 9e9, found -0.0095"),
            ),
            ("0.06", "0.01", format!("{metrics}`: expected output tokens, and a time to first token within")),
            (
                "\"value\": 3,",
                "\"value\": 3.5,",
                format!("{metrics}.output_sequence_length`: expected a whole number"),
            ),
            ("[10.0,", "[NaN,", format!("{metrics}.inter_chunk_latency.value[0]`: expected a record")),
            (
                "\"b\"",
                "\"a\"",
                "/p.jsonl, line 4: expected a request id of its own, found \"a\" again (first, line 3)"
                    .into(),
            ),
            (
                "1795559745010393196",
                "17955597450103931960",
                "/p.jsonl, line 3, column `metadata.request_start_ns`: expected ns".into(),
            ),
        ] {
            let error = read_lines(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.starts_with(&expected), "{error}");
        }
    }
}

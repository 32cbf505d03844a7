//! `benchmarks.json` of GuideLLM.
//!
//! Times are seconds since 1970. Of a request's tokens only the first and the last are timed (`guidellm/schemas/base/info.py`,
//! `RequestTimings`; the definitions in `request_stats.py` beside it).

use std::{collections::BTreeMap, path::Path};

use plumbline_schema::{ArrivalBasis, InputError, Location, Nanos, RequestStatus};
use serde::Deserialize;

use super::{
    json,
    record::{At, Names, Parsed, Record, between, seconds, tokens},
};

#[derive(Deserialize)]
struct Report {
    #[serde(default)]
    metadata: Option<Metadata>,
    benchmarks: Vec<Benchmark>,
}

#[derive(Deserialize)]
struct Metadata {
    #[serde(default)]
    guidellm_version: Option<String>,
}

#[derive(Deserialize)]
struct Benchmark {
    #[serde(default)]
    config: Option<Config>,
    #[serde(default)]
    metrics: BTreeMap<String, Metric>,
    requests: Requests,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    strategy: Option<Strategy>,
}

#[derive(Deserialize)]
struct Strategy {
    #[serde(default)]
    type_: Option<String>,
}

/// A distribution, or something else under `metrics`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Metric {
    Distributions { successful: Distribution },
    Other(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
struct Distribution {
    mean: f64,
    median: f64,
    percentiles: BTreeMap<String, f64>,
}

#[derive(Deserialize)]
struct Requests {
    #[serde(default)]
    successful: Option<Vec<Request>>,
    #[serde(default)]
    incomplete: Option<Vec<Request>>,
    #[serde(default)]
    errored: Option<Vec<Request>>,
}

#[derive(Deserialize)]
struct Request {
    #[serde(default, rename = "request_id")]
    id: Option<String>,
    info: Info,
    #[serde(default)]
    prompt_tokens: Option<f64>,
    #[serde(default)]
    output_tokens: Option<f64>,
}

#[derive(Deserialize)]
struct Info {
    timings: Timings,
}

#[derive(Deserialize)]
struct Timings {
    #[serde(default)]
    targeted_start: Option<f64>,
    #[serde(default)]
    resolve_start: Option<f64>,
    #[serde(default)]
    request_start: Option<f64>,
    #[serde(default, alias = "first_iteration")]
    first_token_iteration: Option<f64>,
    #[serde(default, alias = "last_iteration")]
    last_token_iteration: Option<f64>,
}

/// Strategies that set a time for each request; the others send as soon as they may.
const SCHEDULED: [&str; 4] = ["constant", "poisson", "trace", "replay"];

/// Figures that are shown under these names, and the factor that makes them ms.
const FIGURES: [(&str, f64); 4] = [
    ("time_to_first_token_ms", 1.0),
    ("inter_token_latency_ms", 1.0),
    ("time_per_output_token_ms", 1.0),
    ("request_latency", 1e3),
];

const UNCHECKED: (&[&str], &str) =
    (&["request latency"], "guidellm counts to the end of the stream; here it counts to the last token");

/// Reads the benchmark that `part`, from 1, names.
pub(super) fn read(path: &Path, part: Option<usize>) -> Result<Parsed, InputError> {
    let text = json::read(path)?;
    let report: Report = json::parse(path, None, &text, "a benchmarks.json of guidellm")?;
    let numbered: Vec<_> = report.benchmarks.into_iter().enumerate().collect();
    let (index, benchmark) = super::choose(path, numbered, part, "benchmarks")?;
    let strategy = benchmark.config.and_then(|config| config.strategy).and_then(|strategy| strategy.type_);
    let is_scheduled = strategy.as_deref().is_some_and(|name| SCHEDULED.contains(&name));
    let mut records = Vec::new();
    let mut names = Names::default();
    for (name, requests, status) in [
        ("successful", benchmark.requests.successful, RequestStatus::Ok),
        ("incomplete", benchmark.requests.incomplete, RequestStatus::Incomplete),
        ("errored", benchmark.requests.errored, RequestStatus::Incomplete),
    ] {
        for (i, request) in requests.iter().flatten().enumerate() {
            let key = format!("benchmarks[{index}].requests.{name}[{i}]");
            names.take(path, request.id.as_ref(), Location::Key(key.clone()))?;
            records.push(record(path, &key, request, status)?);
        }
    }
    let published = FIGURES.iter().filter_map(|&(name, to_ms)| match benchmark.metrics.get(name)? {
        Metric::Distributions { successful } => Some(figures(name, successful, to_ms)),
        Metric::Other(_) => None,
    });
    Ok(Parsed {
        version: report.metadata.and_then(|metadata| metadata.guidellm_version),
        backend: None,
        model: None,
        arrivals: Some(if is_scheduled { ArrivalBasis::Scheduled } else { ArrivalBasis::Sent }),
        by_arrival: true,
        published: published.flatten().collect(),
        records,
        unchecked: Some(UNCHECKED),
        notes: vec!["no token times: guidellm keeps those of the first and the last token alone".into()],
    })
}

fn figures(name: &str, distribution: &Distribution, to_ms: f64) -> Vec<(String, f64)> {
    let own = [("mean", distribution.mean), ("median", distribution.median)];
    let percentiles = ["p50", "p90", "p95", "p99"].into_iter();
    let percentiles = percentiles.filter_map(|key| Some((key, *distribution.percentiles.get(key)?)));
    own.into_iter()
        .chain(percentiles)
        .map(|(stat, value)| (format!("{name}.{stat}"), value * to_ms))
        .collect()
}

fn record(path: &Path, key: &str, request: &Request, status: RequestStatus) -> Result<Record, InputError> {
    let timings = &request.info.timings;
    let place = |name: &str| Location::Key(format!("{key}.{name}"));
    let time = |name: &str, value: Option<f64>| {
        value.map(seconds).transpose().at(path, || place(&format!("info.timings.{name}")))
    };
    let sent = match time("request_start", timings.request_start)? {
        Some(sent) => Some(sent),
        None => time("resolve_start", timings.resolve_start)?,
    };
    let since = |name: &str, value: Option<f64>, from: Option<Nanos>| {
        let (Some(from), Some(at)) = (from, time(name, value)?) else { return Ok(None) };
        let span = between(from, at, "the time before");
        span.map(Some).at(path, || place(&format!("info.timings.{name}")))
    };
    let first = since("first_token_iteration", timings.first_token_iteration, sent)?;
    let last =
        since("last_token_iteration", timings.last_token_iteration, sent.zip(first).map(|(a, b)| a + b))?;
    let last = first.zip(last).map(|(first, rest)| first + rest);
    let count = |name: &str, value: Option<f64>| {
        value.map(tokens).transpose().at(path, || place(name)).map(Option::unwrap_or_default)
    };
    let num_tokens = count("output_tokens", request.output_tokens)?;
    if status == RequestStatus::Ok && (last.is_none() || num_tokens == 0) {
        let expected = "output tokens and the times of the first and the last, as the request was successful";
        return Err(InputError::invalid(path, Location::Key(key.into()), expected, "less; was it streamed?"));
    }
    Ok(Record {
        place: Location::Key(key.into()),
        request_id: None,
        scheduled: time("targeted_start", timings.targeted_start)?,
        sent,
        first_token: first,
        last_token: last.filter(|_| status == RequestStatus::Ok),
        gaps: None,
        num_prefill_tokens: count("prompt_tokens", request.prompt_tokens)?,
        num_decode_tokens: None,
        num_decode_tokens_actual: num_tokens,
        status,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str, part: Option<usize>) -> Result<Parsed, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.json");
        std::fs::write(&path, text).unwrap();
        read(&path, part).map_err(|e| e.to_string().replace(folder.path().to_str().unwrap(), ""))
    }

    const GOOD: &str = r#"{"metadata": {"guidellm_version": "0.8.1"}, "benchmarks": [{"config": {"strategy": {"type_": "poisson"}},
        "metrics": {"request_latency": {"successful": {"mean": 0.5, "median": 0.5, "percentiles": {"p90": 0.5, "p001": 0.5}}}, "text": {}},
        "requests": {"successful": [{"info": {"timings": {"targeted_start": 9.5, "request_start": 10.0,
            "first_token_iteration": 10.25, "last_token_iteration": 10.5}}, "prompt_tokens": 7, "output_tokens": 3}],
        "errored": [{"info": {"timings": {"targeted_start": 11.0, "resolve_start": 11.0}}}]}}]}"#;

    #[test]
    fn statuses_schedule_and_figures() {
        let parsed = read_text(GOOD, None).unwrap();
        assert_eq!(
            (parsed.version.as_deref(), parsed.arrivals),
            (Some("0.8.1"), Some(ArrivalBasis::Scheduled))
        );
        let [ok, failed] = parsed.records.as_slice() else { panic!("{parsed:?}") };
        assert_eq!((ok.scheduled, ok.sent), (Some(Nanos(9_500_000_000)), Some(Nanos(10_000_000_000))));
        assert_eq!((ok.first_token, ok.last_token), (Some(Nanos(250_000_000)), Some(Nanos(500_000_000))));
        assert_eq!((failed.status, failed.num_prefill_tokens), (RequestStatus::Incomplete, 0));
        let names: Vec<_> = parsed.published.iter().map(|(name, ms)| (name.as_str(), *ms)).collect();
        let figures = [
            ("request_latency.mean", 500.0),
            ("request_latency.median", 500.0),
            ("request_latency.p90", 500.0),
        ];
        assert_eq!(names, figures);
        assert_eq!(
            read_text(&GOOD.replace("poisson", "concurrent"), Some(1)).unwrap().arrivals,
            Some(ArrivalBasis::Sent)
        );
    }

    #[test]
    fn what_cannot_be_is_named() {
        let request = "/b.json, key `benchmarks[0].requests.successful[0]";
        for (from, to, expected) in [
            (
                "10.25",
                "9.75",
                format!("{request}.info.timings.first_token_iteration`: expected no time before"),
            ),
            (
                "10.5}",
                "10.125}",
                format!("{request}.info.timings.last_token_iteration`: expected no time before"),
            ),
            (
                "\"output_tokens\": 3",
                "\"output_tokens\": 0",
                format!("{request}`: expected output tokens and the times"),
            ),
            (
                "10.0,",
                "\"soon\",",
                format!("{request}.info.timings.request_start`: expected a benchmarks.json"),
            ),
        ] {
            let error = read_text(&GOOD.replace(from, to), None).unwrap_err();
            assert!(error.starts_with(&expected), "{error}");
        }
        let error = read_text(GOOD, Some(2)).unwrap_err();
        assert_eq!(error, "/b.json: expected a result number 2, found 1 benchmarks");
        let error = read_text(r#"{"benchmarks": [{"requests": {}}, {"requests": {}}]}"#, None).unwrap_err();
        assert_eq!(error, "/b.json: expected one result, or --part to say which of 2, found 2 benchmarks");
    }
}

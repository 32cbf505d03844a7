//! Results of `vllm bench serve --save-result --save-detailed` and of SGLang's `bench_serving --output-details`, which
//! began as one script and still write the same arrays.
//!
//! Times are seconds from when the client sent; `itls` are gaps between streamed chunks, and in SGLang a chunk's gap
//! stands once (vLLM `vllm/benchmarks/serve.py`, `calculate_metrics` and `benchmark`; SGLang
//! `python/sglang/benchmark/serving.py`, `calculate_metrics`).

use std::{collections::BTreeMap, path::Path};

use plumbline_schema::{ArrivalBasis, InputError, Location, Nanos, RequestStatus};
use serde::Deserialize;

use super::{
    json::{self, Number},
    record::{At, Parsed, Record, seconds},
};
use crate::variants::figure_of;

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    backend: Option<String>,
    #[serde(default)]
    model_id: Option<String>,
    #[serde(default)]
    request_rate: Option<Rate>,
    #[serde(default)]
    max_concurrency: Option<u64>,
    #[serde(default)]
    server_info: Option<ServerInfo>,
    input_lens: Vec<u32>,
    output_lens: Vec<u32>,
    ttfts: Vec<f64>,
    itls: Vec<Vec<f64>>,
    #[serde(default)]
    latencies: Option<Vec<f64>>,
    #[serde(default)]
    start_times: Option<Vec<f64>>,
    #[serde(default)]
    errors: Option<Vec<Option<String>>>,
}

/// Requests per second; `inf`, `Infinity` and `trace` come as text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Rate {
    PerSecond(f64),
    Word(String),
}

/// What an SGLang server says of itself, as far as it is of use.
#[derive(Deserialize)]
struct ServerInfo {
    #[serde(default)]
    version: Option<String>,
    #[serde(default)]
    model_path: Option<String>,
}

/// The figures of SGLang that count to the last message of a stream, of which its details keep no time.
const SGLANG_UNCHECKED: (&[&str], &str) = (
    &["TPOT", "E2E latency"],
    "sglang-bench counts to the stream's last message, which its details do not time; here they count to the last token",
);

/// Reads a result of vLLM: one document.
pub(super) fn read_vllm(path: &Path) -> Result<Parsed, InputError> {
    let text = json::read(path)?;
    let document: Document =
        json::parse(path, None, &text, "a result of vllm bench serve --save-result --save-detailed")?;
    let numbers: BTreeMap<String, Number> = json::parse(path, None, &text, "a result")?;
    parsed("vllm-bench", path, document, numbers)
}

/// Reads a result of SGLang: a document a line, of which `part`, from 1, is taken.
pub(super) fn read_sglang(path: &Path, part: Option<usize>) -> Result<Parsed, InputError> {
    let text = json::read(path)?;
    let (line, text) = super::choose(path, json::lines(&text).collect(), part, "lines")?;
    let document = json::parse(path, Some(line), text, "a result of bench_serving --output-details")?;
    let numbers: BTreeMap<String, Number> = json::parse(path, Some(line), text, "a result")?;
    let mut parsed = parsed("sglang-bench", path, document, numbers)?;
    parsed.unchecked = Some(SGLANG_UNCHECKED);
    Ok(parsed)
}

fn parsed(
    tool: &'static str,
    path: &Path,
    document: Document,
    numbers: BTreeMap<String, Number>,
) -> Result<Parsed, InputError> {
    document.check_lengths(path)?;
    let records = (0..document.ttfts.len()).map(|i| document.record(path, i)).collect::<Result<_, _>>()?;
    let published = numbers
        .into_iter()
        .filter_map(|(name, number)| number.0.map(|value| (name, value)))
        .filter(|(name, _)| figure_of(tool, name).is_some())
        .collect();
    let all_at_once = document.max_concurrency.is_none()
        && match &document.request_rate {
            Some(Rate::PerSecond(rate)) => rate.is_infinite(),
            Some(Rate::Word(word)) => matches!(word.as_str(), "inf" | "Infinity"),
            None => false,
        };
    let arrivals = match document.start_times {
        Some(_) => Some(ArrivalBasis::Sent),
        None => all_at_once.then_some(ArrivalBasis::AtOnce),
    };
    let (version, served_model) =
        document.server_info.map_or((None, None), |info| (info.version, info.model_path));
    Ok(Parsed {
        version,
        backend: document.backend,
        model: document.model_id.or(served_model),
        arrivals,
        by_arrival: false,
        records,
        published,
        unchecked: None,
        notes: Vec::new(),
    })
}

impl Document {
    fn check_lengths(&self, path: &Path) -> Result<(), InputError> {
        let n = self.ttfts.len();
        for (key, len) in [
            ("input_lens", Some(self.input_lens.len())),
            ("output_lens", Some(self.output_lens.len())),
            ("itls", Some(self.itls.len())),
            ("latencies", self.latencies.as_ref().map(Vec::len)),
            ("start_times", self.start_times.as_ref().map(Vec::len)),
            ("errors", self.errors.as_ref().map(Vec::len)),
        ] {
            if let Some(len) = len.filter(|&len| len != n) {
                let expected = format!("{n} items, as many as `ttfts` has");
                return Err(InputError::invalid(path, Location::Key(key.into()), expected, len.to_string()));
            }
        }
        Ok(())
    }

    fn record(&self, path: &Path, i: usize) -> Result<Record, InputError> {
        let key = |name: &str| Location::Key(format!("{name}[{i}]"));
        let at = |name: &str, value: f64| seconds(value).at(path, || key(name));
        let first = at("ttfts", self.ttfts[i])?;
        let mut gaps = Vec::with_capacity(self.itls[i].len());
        for (j, &gap) in self.itls[i].iter().enumerate() {
            gaps.push(seconds(gap).at(path, || Location::Key(format!("itls[{i}][{j}]")))?);
        }
        let summed = first + gaps.iter().copied().sum();
        let last = match &self.latencies {
            Some(latencies) => at("latencies", latencies[i])?,
            None => summed,
        };
        let error = self.errors.as_ref().and_then(|errors| errors[i].as_deref()).unwrap_or_default();
        let num_tokens = self.output_lens[i];
        let is_ok = error.is_empty() && num_tokens > 0;
        // Each gap and the sum were rounded.
        let rounding = Nanos(1 + gaps.len() as u64);
        if is_ok && last + rounding < summed {
            let expected = format!("no time before the last gap's end, {} s", summed.0 as f64 / 1e9);
            let found = (last.0 as f64 / 1e9).to_string();
            return Err(InputError::invalid(path, key("latencies"), expected, found));
        }
        let streamed = first > Nanos::ZERO;
        Ok(Record {
            place: Location::Key(format!("input_lens[{i}]")),
            request_id: None,
            scheduled: None,
            sent: self.start_times.as_ref().map(|times| at("start_times", times[i])).transpose()?,
            first_token: streamed.then_some(first),
            last_token: (is_ok && streamed).then_some(last.max(summed)),
            gaps: Some(gaps),
            num_prefill_tokens: self.input_lens[i],
            num_decode_tokens: None,
            num_decode_tokens_actual: num_tokens,
            status: if is_ok { RequestStatus::Ok } else { RequestStatus::Incomplete },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Parsed, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.json");
        std::fs::write(&path, text).unwrap();
        let text = |e: InputError| e.to_string().replace(folder.path().to_str().unwrap(), "");
        read_vllm(&path).map_err(text)
    }

    const GOOD: &str = r#"{"backend": "vllm", "model_id": "m", "request_rate": "inf", "max_concurrency": null,
        "input_lens": [10, 20], "output_lens": [3, 0], "ttfts": [0.5, 0.0], "itls": [[0.1, 0.2], []],
        "start_times": [7.0, 7.25], "errors": ["", "refused"], "median_ttft_ms": 500.0, "std_ttft_ms": 0.0}"#;

    #[test]
    fn arrays_become_records_and_failures_stay() {
        let parsed = read(GOOD).unwrap();
        assert_eq!((parsed.arrivals, parsed.model.as_deref()), (Some(ArrivalBasis::Sent), Some("m")));
        assert_eq!(parsed.published, [("median_ttft_ms".to_owned(), 500.0)]);
        let [ok, failed] = parsed.records.as_slice() else { panic!("{parsed:?}") };
        assert_eq!((ok.sent, ok.first_token), (Some(Nanos(7_000_000_000)), Some(Nanos(500_000_000))));
        assert_eq!(ok.last_token, Some(Nanos(800_000_000)));
        assert_eq!(ok.gaps.as_deref(), Some([Nanos(100_000_000), Nanos(200_000_000)].as_slice()));
        assert_eq!((failed.status, failed.first_token), (RequestStatus::Incomplete, None));
        let old = read(&GOOD.replace("start_times", "starts")).unwrap();
        assert_eq!(old.arrivals, Some(ArrivalBasis::AtOnce));
        assert_eq!(read(&GOOD.replace("start_times", "starts").replace("null", "4")).unwrap().arrivals, None);
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (from, to, expected) in [
            (
                "[3, 0]",
                "[3]",
                "/r.json, key `output_lens`: expected 2 items, as many as `ttfts` has, found 1",
            ),
            ("0.2]", "-0.2]", "/r.json, key `itls[0][1]`: expected seconds, 0 to 9e9, found -0.2"),
            ("7.25", "1e300", "/r.json, key `start_times[1]`: expected seconds, 0 to 9e9, found 1"),
            ("[0.5,", "[NaN,", "/r.json, key `ttfts[0]`: expected a result of vllm bench"),
            (r#""ttfts""#, r#""tt""#, "/r.json, line 3: expected a result of vllm bench serve"),
            (
                r#""errors""#,
                r#""latencies": [0.7, 0.0], "errors""#,
                "/r.json, key `latencies[0]`: expected no time before",
            ),
        ] {
            let error = read(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}

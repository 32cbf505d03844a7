//! What clients ask for: arrivals and lengths.

use std::{collections::HashSet, path::Path};

use serde::{Deserialize, Serialize};

use crate::{
    error::{InputError, Location},
    files::{plain_or_zst, read_csv, write_csv},
    units::Nanos,
};

/// One request of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadRequest {
    /// Unique in the workload.
    pub request_id: u64,
    /// Scheduled arrival, from the start of the run.
    pub arrival_time_ns: Nanos,
    /// Prompt length, at least 1.
    pub num_prefill_tokens: u32,
    /// Output length, at least 1.
    pub num_decode_tokens: u32,
}

/// Requests in order of arrival.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// The requests; arrivals never step back.
    pub requests: Vec<WorkloadRequest>,
}

impl Workload {
    /// Reads `request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens`, from `.csv` or `.csv.zst`.
    ///
    /// # Errors
    /// `Invalid` with line and column for: no request, a repeated id, an empty prompt or output,
    /// arrivals that step back.
    pub fn read(path: &Path) -> Result<Self, InputError> {
        let requests: Vec<WorkloadRequest> = read_csv(path, "a workload row")?;
        let path = plain_or_zst(path);
        if requests.is_empty() {
            return Err(InputError::invalid(&path, Location::File, "at least one request", "none"));
        }
        let mut seen = HashSet::with_capacity(requests.len());
        let mut last = Nanos::ZERO;
        for (i, request) in requests.iter().enumerate() {
            let line = i as u64 + 2;
            let at = |column: &str| Location::Cell { line, column: column.into() };
            if !seen.insert(request.request_id) {
                let found = format!("{} again", request.request_id);
                return Err(InputError::invalid(&path, at("request_id"), "an id of its own", found));
            }
            if request.num_prefill_tokens == 0 {
                return Err(InputError::invalid(&path, at("num_prefill_tokens"), "at least 1", "0"));
            }
            if request.num_decode_tokens == 0 {
                return Err(InputError::invalid(&path, at("num_decode_tokens"), "at least 1", "0"));
            }
            if request.arrival_time_ns < last {
                let found = request.arrival_time_ns.0.to_string();
                return Err(InputError::invalid(
                    &path,
                    at("arrival_time_ns"),
                    format!("no arrival before the row above ({})", last.0),
                    found,
                ));
            }
            last = request.arrival_time_ns;
        }
        Ok(Self { requests })
    }

    /// Writes the workload as CSV.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn write(&self, path: &Path) -> Result<(), InputError> {
        write_csv(path, &self.requests)
    }

    /// The workload's text in its one canonical form, for digests: the CSV that [`Self::write`] writes.
    #[must_use]
    pub fn canonical_text(&self) -> String {
        use std::fmt::Write;
        let mut text = String::from("request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens\n");
        for r in &self.requests {
            let (id, arrival) = (r.request_id, r.arrival_time_ns.0);
            // Writing to a string does not fail.
            let _ = writeln!(text, "{id},{arrival},{},{}", r.num_prefill_tokens, r.num_decode_tokens);
        }
        text
    }

    /// What the workload asks for, in sums.
    #[must_use]
    pub fn summary(&self) -> WorkloadSummary {
        let first = self.requests.first().map_or(Nanos::ZERO, |r| r.arrival_time_ns);
        let last = self.requests.last().map_or(Nanos::ZERO, |r| r.arrival_time_ns);
        let span_ns = last.saturating_since(first);
        let gaps = self.requests.len().saturating_sub(1) as f64;
        WorkloadSummary {
            num_requests: self.requests.len() as u64,
            span_ns,
            mean_rate_per_s: (span_ns > Nanos::ZERO).then(|| gaps / (span_ns.0 as f64 / 1e9)),
            num_prefill_tokens: LengthSummary::of(self.requests.iter().map(|r| r.num_prefill_tokens)),
            num_decode_tokens: LengthSummary::of(self.requests.iter().map(|r| r.num_decode_tokens)),
        }
    }
}

/// Lengths over the requests of a workload, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LengthSummary {
    /// Shortest; 0 without requests.
    pub min: u32,
    /// Mean; 0 without requests.
    pub mean: f64,
    /// Longest; 0 without requests.
    pub max: u32,
    /// Sum.
    pub total: u64,
}

impl LengthSummary {
    fn of(lengths: impl Iterator<Item = u32> + Clone) -> Self {
        let total = lengths.clone().map(u64::from).sum::<u64>();
        let count = lengths.clone().count().max(1);
        Self {
            min: lengths.clone().min().unwrap_or(0),
            mean: total as f64 / count as f64,
            max: lengths.max().unwrap_or(0),
            total,
        }
    }
}

/// What a workload asks for, in sums.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct WorkloadSummary {
    /// Number of requests.
    pub num_requests: u64,
    /// From the first arrival to the last.
    pub span_ns: Nanos,
    /// Gaps between arrivals per second of the span; none when all arrive at once.
    pub mean_rate_per_s: Option<f64>,
    /// Prompt lengths.
    pub num_prefill_tokens: LengthSummary,
    /// Output lengths.
    pub num_decode_tokens: LengthSummary,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_counts_gaps_not_requests() {
        let request = |id: u64, at: u64, prefill: u32| WorkloadRequest {
            request_id: id,
            arrival_time_ns: Nanos(at),
            num_prefill_tokens: prefill,
            num_decode_tokens: 5,
        };
        let workload = Workload {
            requests: vec![
                request(0, 1_000_000_000, 10),
                request(1, 2_000_000_000, 20),
                request(2, 3_000_000_000, 60),
            ],
        };
        let summary = workload.summary();
        assert_eq!(summary.mean_rate_per_s, Some(1.0));
        assert_eq!(summary.num_prefill_tokens, LengthSummary { min: 10, mean: 30.0, max: 60, total: 90 });
        assert_eq!(Workload::default().summary().mean_rate_per_s, None);
    }

    #[test]
    fn the_canonical_text_is_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.csv");
        let text = "request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens\n3,0,7,1\n4,9,8,2\n";
        std::fs::write(&path, text).unwrap();
        let workload = Workload::read(&path).unwrap();
        assert_eq!(workload.canonical_text(), text);
        workload.write(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
}

//! What clients ask for: arrivals and lengths.

use std::{collections::HashSet, path::Path, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    error::{InputError, Location},
    files::{plain_or_zst, read_csv, write_text},
    units::Nanos,
};

/// One request of a workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkloadRequest {
    /// Unique in the workload.
    pub request_id: u64,
    /// Scheduled arrival, from the start of the run.
    pub arrival_time_ns: Nanos,
    /// Prompt length, at least 1.
    pub num_prefill_tokens: u32,
    /// Output length, at least 1.
    pub num_decode_tokens: u32,
    /// Lower is served first, where the scheduler heeds priorities.
    pub priority: i32,
    /// What the prompt shares with others; `None` when it is all its own.
    pub content: Option<Arc<PromptContent>>,
}

impl WorkloadRequest {
    /// A request of priority 0 whose prompt is all its own.
    #[must_use]
    pub fn new(
        request_id: u64,
        arrival_time_ns: Nanos,
        num_prefill_tokens: u32,
        num_decode_tokens: u32,
    ) -> Self {
        Self {
            request_id,
            arrival_time_ns,
            num_prefill_tokens,
            num_decode_tokens,
            priority: 0,
            content: None,
        }
    }

    /// The run of tokens of one stream that begins at `position` of the request's tokens, prompt and then output.
    ///
    /// Two requests have the same tokens up to a position exactly where their runs are the same up to it.
    #[must_use]
    pub fn content_run(&self, position: u32) -> ContentRun {
        let own = |stream| ContentRun { stream, end: u32::MAX };
        let Some(content) = &self.content else {
            return own(ContentStream::Request(self.request_id));
        };
        let hash_tokens = content.prefix_hash_tokens.max(1);
        let index = position / hash_tokens;
        if let Some(&hash) = content.prefix_hashes.get(index as usize)
            && position < self.num_prefill_tokens
        {
            let end = (index + 1).saturating_mul(hash_tokens).min(self.num_prefill_tokens);
            return ContentRun { stream: ContentStream::Hash(hash), end };
        }
        if let Some(id) = content.prefix_id {
            let end = content.prefix_len.min(self.num_prefill_tokens);
            if position < end {
                return ContentRun { stream: ContentStream::Prefix(id), end };
            }
        }
        content.session_id.map_or_else(
            || own(ContentStream::Request(self.request_id)),
            |id| own(ContentStream::Session(id)),
        )
    }
}

/// What a prompt shares with the prompts of other requests.
///
/// Tokens themselves are not known; this says which of them are equal: those at the same position of the same
/// stream, behind equal tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptContent {
    /// Turns of one conversation: each prompt begins with the prompt and output of the turn before.
    pub session_id: Option<u64>,
    /// The prompt's first `prefix_len` tokens are those of every request with this id.
    pub prefix_id: Option<u64>,
    /// Tokens of the shared prefix; 0 without one.
    pub prefix_len: u32,
    /// Hash of each successive `prefix_hash_tokens` tokens of the prompt, as traces publish them.
    pub prefix_hashes: Vec<u64>,
    /// Tokens for which one of `prefix_hashes` stands.
    pub prefix_hash_tokens: u32,
}

/// Tokens for which a prefix hash stands when a workload does not say: as in Mooncake's traces.
pub const DEFAULT_PREFIX_HASH_TOKENS: u32 = 512;

/// A source of tokens, each with its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ContentStream {
    /// One request's own.
    Request(u64),
    /// A prefix that requests share.
    Prefix(u64),
    /// A conversation.
    Session(u64),
    /// A block of a trace.
    Hash(u64),
}

/// Consecutive tokens of one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentRun {
    /// The stream.
    pub stream: ContentStream,
    /// The position after its last token.
    pub end: u32,
}

/// A row of a workload as it stands in the file; the columns of content and priority are written where used.
#[derive(Debug, Deserialize)]
struct Row {
    request_id: u64,
    arrival_time_ns: Nanos,
    num_prefill_tokens: u32,
    num_decode_tokens: u32,
    #[serde(default)]
    priority: Option<i32>,
    #[serde(default)]
    session_id: Option<u64>,
    #[serde(default)]
    prefix_id: Option<u64>,
    #[serde(default)]
    prefix_len: Option<u32>,
    /// Hashes joined by `;`.
    #[serde(default)]
    prefix_hashes: Option<String>,
    #[serde(default)]
    prefix_hash_tokens: Option<u32>,
}

impl Row {
    /// The request, or what is wrong with `prefix_hashes`.
    fn request(self) -> Result<WorkloadRequest, String> {
        let hashes = self.prefix_hashes.as_deref().unwrap_or_default();
        let prefix_hashes: Vec<u64> = hashes
            .split(';')
            .filter(|hash| !hash.is_empty())
            .map(|hash| hash.parse().map_err(|_| hash.to_owned()))
            .collect::<Result<_, _>>()?;
        let is_shared = self.session_id.is_some() || self.prefix_id.is_some() || !prefix_hashes.is_empty();
        let content = is_shared.then(|| {
            Arc::new(PromptContent {
                session_id: self.session_id,
                prefix_id: self.prefix_id,
                prefix_len: self.prefix_id.and(self.prefix_len).unwrap_or_default(),
                prefix_hashes,
                prefix_hash_tokens: self.prefix_hash_tokens.unwrap_or(DEFAULT_PREFIX_HASH_TOKENS),
            })
        });
        Ok(WorkloadRequest {
            request_id: self.request_id,
            arrival_time_ns: self.arrival_time_ns,
            num_prefill_tokens: self.num_prefill_tokens,
            num_decode_tokens: self.num_decode_tokens,
            priority: self.priority.unwrap_or_default(),
            content,
        })
    }
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
    /// Columns that may follow: `priority`, `session_id`, `prefix_id` with `prefix_len`, and `prefix_hashes` (joined
    /// by `;`) with `prefix_hash_tokens`.
    ///
    /// # Errors
    /// `Invalid` with line and column for: no request, a repeated id, an empty prompt or output,
    /// arrivals that step back, hashes that are no numbers.
    pub fn read(path: &Path) -> Result<Self, InputError> {
        let rows: Vec<Row> = read_csv(path, "a workload row")?;
        let path = plain_or_zst(path);
        if rows.is_empty() {
            return Err(InputError::invalid(&path, Location::File, "at least one request", "none"));
        }
        let mut requests = Vec::with_capacity(rows.len());
        let mut seen = HashSet::with_capacity(rows.len());
        let mut last = Nanos::ZERO;
        for (i, row) in rows.into_iter().enumerate() {
            let line = i as u64 + 2;
            let at = |column: &str| Location::Cell { line, column: column.into() };
            let request = row.request().map_err(|found| {
                InputError::invalid(&path, at("prefix_hashes"), "whole numbers joined by `;`", found)
            })?;
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
            if request.content.as_ref().is_some_and(|content| content.prefix_hash_tokens == 0) {
                return Err(InputError::invalid(&path, at("prefix_hash_tokens"), "at least 1", "0"));
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
            requests.push(request);
        }
        Ok(Self { requests })
    }

    /// Whether arrivals and lengths are all there is: nothing is shared, and all requests have one priority. A run's
    /// `request_metrics` says all of such a workload.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.requests.iter().all(|request| request.content.is_none() && request.priority == 0)
    }

    /// Writes the workload as CSV, in its canonical text.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn write(&self, path: &Path) -> Result<(), InputError> {
        write_text(path, &self.canonical_text())
    }

    /// The workload's text in its one canonical form, for digests and files: the four columns that every workload
    /// has, and of the others those that say anything.
    #[must_use]
    pub fn canonical_text(&self) -> String {
        use std::fmt::Write;
        let contents = || self.requests.iter().filter_map(|r| r.content.as_deref());
        let has_priority = self.requests.iter().any(|r| r.priority != 0);
        let has_session = contents().any(|c| c.session_id.is_some());
        let has_prefix = contents().any(|c| c.prefix_id.is_some());
        let has_hashes = contents().any(|c| !c.prefix_hashes.is_empty());
        let mut text = String::from("request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens");
        for (is_written, columns) in [
            (has_priority, ",priority"),
            (has_session, ",session_id"),
            (has_prefix, ",prefix_id,prefix_len"),
            (has_hashes, ",prefix_hashes,prefix_hash_tokens"),
        ] {
            text.push_str(if is_written { columns } else { "" });
        }
        text.push('\n');
        let none = PromptContent::default();
        let or_nothing = |id: Option<u64>| id.map_or_else(String::new, |id| id.to_string());
        for r in &self.requests {
            let (id, arrival) = (r.request_id, r.arrival_time_ns.0);
            let content = r.content.as_deref().unwrap_or(&none);
            // Writing to a string does not fail.
            let _ = write!(text, "{id},{arrival},{},{}", r.num_prefill_tokens, r.num_decode_tokens);
            if has_priority {
                let _ = write!(text, ",{}", r.priority);
            }
            if has_session {
                let _ = write!(text, ",{}", or_nothing(content.session_id));
            }
            if has_prefix {
                let _ = write!(text, ",{},{}", or_nothing(content.prefix_id), content.prefix_len);
            }
            if has_hashes {
                let hashes: Vec<_> = content.prefix_hashes.iter().map(u64::to_string).collect();
                let tokens =
                    if hashes.is_empty() { DEFAULT_PREFIX_HASH_TOKENS } else { content.prefix_hash_tokens };
                let _ = write!(text, ",{},{tokens}", hashes.join(";"));
            }
            text.push('\n');
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
        let request = |id: u64, at: u64, prefill: u32| WorkloadRequest::new(id, Nanos(at), prefill, 5);
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

        let text = "request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens,priority,session_id,prefix_id,\
                    prefix_len,prefix_hashes,prefix_hash_tokens\n\
                    3,0,700,1,-1,4,,0,,512\n4,9,800,2,0,,5,64,,512\n5,9,800,2,0,,,0,7;8,512\n";
        std::fs::write(&path, text).unwrap();
        let workload = Workload::read(&path).unwrap();
        workload.write(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        let [session, prefix, hashed] = &workload.requests[..] else { panic!("three requests") };
        assert_eq!(session.content_run(699), ContentRun { stream: ContentStream::Session(4), end: u32::MAX });
        assert_eq!(prefix.content_run(63), ContentRun { stream: ContentStream::Prefix(5), end: 64 });
        assert_eq!(prefix.content_run(64), ContentRun { stream: ContentStream::Request(4), end: u32::MAX });
        assert_eq!(hashed.content_run(600), ContentRun { stream: ContentStream::Hash(8), end: 800 });
        assert_eq!(hashed.content_run(800), ContentRun { stream: ContentStream::Request(5), end: u32::MAX });
        std::fs::write(&path, text.replace("7;8", "7;x")).unwrap();
        assert!(Workload::read(&path).unwrap_err().to_string().contains("column `prefix_hashes`"));
    }
}

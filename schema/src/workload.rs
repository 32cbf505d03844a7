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
}

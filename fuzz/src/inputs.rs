//! Bytes as the files that users hand in: workloads, specifications of workloads, traces of others.

use std::path::Path;

use plumbline_schema::{Nanos, Workload, WorkloadRequest};
use plumbline_simulator::{
    RequestSource,
    arrival::{
        Arrival, ImportArrivals, ImportOptions, Lengths, TooLongRow, TraceFormat, WorkloadSpec, import,
    },
};

/// The names of files, of which a first byte chooses one.
pub const NAMES: [&str; 10] = [
    "workload.csv",
    "spec.toml",
    "spec.json",
    "plumbline.csv",
    "azure.csv",
    "mooncake.jsonl",
    "burstgpt.csv",
    "vidur.csv",
    "lengths.csv",
    "workload.csv.zst",
];

/// Requests drawn from a specification.
const MAX_DRAWN: u64 = 64;

/// Reads the bytes behind the first two as the file that those choose, and uses what was read.
///
/// # Panics
/// When what was accepted breaks its own rules, or a temporary file cannot be written.
pub fn read(bytes: &[u8]) {
    let [name, options, content @ ..] = bytes else { return };
    let name = NAMES[usize::from(*name) % NAMES.len()];
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join(name);
    std::fs::write(&path, content).expect("a temporary file");
    read_file(&path, name, *options);
}

/// As [`read()`], of a file that is there.
///
/// # Panics
/// As [`read()`].
pub fn read_file(path: &Path, name: &str, options: u8) {
    if name.starts_with("spec") {
        match WorkloadSpec::read(path) {
            Ok(spec) => check_spec(spec, u64::from(options)),
            Err(error) => check_error(&error, name),
        }
        return;
    }
    let stem = name.split('.').next().unwrap_or_default();
    let Some(format) = TraceFormat::by_name(stem) else {
        match Workload::read(path) {
            Ok(workload) => check_workload(&workload, path),
            Err(error) => check_error(&error, "workload.csv"),
        }
        return;
    };
    let options = ImportOptions {
        limit: (options & 1 == 1).then_some(3),
        max_total_tokens: (options & 2 == 2).then_some(1000),
        too_long: [TooLongRow::Refuse, TooLongRow::Drop, TooLongRow::Clamp][usize::from(options >> 4) % 3],
        arrivals: if options & 4 == 4 {
            ImportArrivals::Process { arrival: Arrival::Poisson { rate_per_s: 2.0 }, seed: 1 }
        } else {
            ImportArrivals::Trace { rate_factor: if options & 8 == 8 { 0.5 } else { 1.0 } }
        },
    };
    match import(path, format, &options) {
        Ok((workload, counts)) => {
            let num_requests = workload.requests.len() as u64;
            assert!(num_requests <= counts.num_rows);
            assert!(options.limit.is_none_or(|limit| num_requests <= limit));
            if let Some(max) = options.max_total_tokens {
                assert!(workload.requests.iter().all(|request| num_tokens(request) <= u64::from(max)));
            }
            check_workload(&workload, path);
        }
        Err(error) => check_error(&error, name),
    }
}

fn num_tokens(request: &WorkloadRequest) -> u64 {
    u64::from(request.num_prefill_tokens) + u64::from(request.num_decode_tokens)
}

/// An error says where, in words that fit a screen.
fn check_error(error: &dyn std::error::Error, name: &str) {
    let text = error.to_string();
    assert!(text.contains(name) || text.contains("expected"), "an error that does not say where: {text}");
}

/// What was accepted can be written and is read as the same.
fn check_workload(workload: &Workload, path: &Path) {
    assert!(workload.requests.iter().all(|r| r.num_prefill_tokens > 0 && r.num_decode_tokens > 0));
    assert!(workload.requests.is_sorted_by_key(|request| request.arrival_time_ns));
    let copy = path.with_file_name("written.csv");
    workload.write(&copy).expect("a temporary file");
    let again = Workload::read(&copy).expect("what was written is read");
    assert_eq!(workload.canonical_text(), again.canonical_text());
}

/// What was accepted makes requests, each in order and within its limits.
fn check_spec(mut spec: WorkloadSpec, seed: u64) {
    let _ = spec.heeds_completions();
    let names_files =
        matches!(spec.arrival, Arrival::Trace { .. }) || matches!(spec.lengths, Lengths::Trace { .. });
    if names_files {
        return;
    }
    spec.num_requests = Some(spec.num_requests.unwrap_or(MAX_DRAWN).min(MAX_DRAWN));
    if let Arrival::ClosedLoop { users, .. } = &mut spec.arrival {
        *users = (*users).min(1000);
    }
    let max = spec.max_total_tokens.map_or(u64::MAX, u64::from);
    let Ok(mut source) = spec.open(seed) else { return };
    let mut last = Nanos::ZERO;
    for _ in 0..MAX_DRAWN {
        let Some(arrival) = source.next_arrival() else { break };
        let request = source.take().expect("a request that was announced");
        assert_eq!(request.arrival_time_ns, arrival);
        assert!(arrival >= last && num_tokens(&request) <= max);
        assert!(request.num_prefill_tokens > 0 && request.num_decode_tokens > 0);
        last = arrival;
        source.completed(request.request_id, arrival + Nanos(1_000_000));
    }
}

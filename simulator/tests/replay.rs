//! The scheduler forms the batches that real engines formed.

use std::path::{Path, PathBuf};

use plumbline_schema::{Nanos, Run, StepBatch};
use plumbline_simulator::replay::{ReplayError, replay};

/// Run folders below `folder`, in order of name.
fn run_folders(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut below: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    below.sort();
    let is_run = |name: &str| below.iter().any(|path| path.file_name().is_some_and(|n| n == name));
    if is_run("request_metrics.csv") || is_run("request_metrics.csv.zst") {
        return vec![folder.to_path_buf()];
    }
    below.iter().filter(|path| path.is_dir()).flat_map(|path| run_folders(path)).collect()
}

fn shipped_vllm_runs() -> Vec<PathBuf> {
    let runs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bundles/data/runs");
    // The second folder's runs preempt, chunk finely and cap long prefills.
    ["h100-vllm-0.24", "h100-vllm-0.24-scheduler"]
        .iter()
        .flat_map(|name| {
            let folders = run_folders(&runs.join(name));
            assert!(!folders.is_empty(), "no run below {name} in {}", runs.display());
            folders
        })
        .collect()
}

#[test]
fn every_batch_of_every_shipped_vllm_run_is_formed_identically() {
    for folder in shipped_vllm_runs() {
        let run = Run::read(&folder).unwrap();
        let report = replay(&run).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        assert!(report.is_identical(), "{}: {report:#?}", folder.display());
        assert_eq!(report.steps, run.steps.len());
    }
}

#[test]
fn a_batch_that_differs_is_found_and_shown() {
    let mut run = Run::read(&shipped_vllm_runs()[0]).unwrap();
    let middle = run.steps.len() / 2;
    run.steps[middle].batch.decode_contexts.push(7);
    let report = replay(&run).unwrap();
    assert_eq!(report.identical, report.steps - 1);
    let difference = report.first_difference.unwrap();
    assert_eq!(difference.step, middle);
    assert_eq!(difference.real, run.steps[middle].batch);
    assert_ne!(difference.real, difference.replayed);
}

#[test]
fn a_run_without_what_a_replay_needs_is_refused_by_name() {
    let whole = Run::read(&shipped_vllm_runs()[0]).unwrap();
    let mut run = whole.clone();
    run.requests[0].admitted_time_ns = None;
    assert!(matches!(replay(&run), Err(ReplayError::NoAdmittedTime { request_id: 0 })));
    let mut run = whole.clone();
    run.steps.clear();
    assert!(matches!(replay(&run), Err(ReplayError::NoSteps)));
    let mut run = whole;
    run.info.deployment = None;
    assert!(matches!(replay(&run), Err(ReplayError::NoDeployment)));
}

/// A request admitted late joins late: times are used, not only the order.
#[test]
fn admitted_times_decide_which_step_a_request_joins() {
    let mut run = Run::read(&shipped_vllm_runs()[0]).unwrap();
    let end = run.steps.last().unwrap().end_ns();
    for request in &mut run.requests {
        request.admitted_time_ns = Some(end + Nanos(1));
    }
    let report = replay(&run).unwrap();
    assert_eq!(report.identical, 0);
    assert_eq!(report.unfinished, run.requests.len());
    assert_eq!(report.first_difference.unwrap().replayed, StepBatch::default());
}

//! The scheduler forms the batches that real engines formed.

use std::path::{Path, PathBuf};

use plumbline_schema::{Nanos, Run, StepBatch, StepMetrics, StepRequests, Workload};
use plumbline_simulator::{
    SchedulerKind,
    replay::{ReplayError, ReplayReport, StepPart, replay, replay_folder, replay_with, workload_file},
};

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
    // The second folder's runs preempt, chunk finely, cap long prefills, share prefixes and heed priorities.
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
fn every_step_of_every_shipped_vllm_run_is_formed_identically() {
    for folder in shipped_vllm_runs() {
        let run = Run::read(&folder).unwrap();
        let report = replay_folder(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
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

/// The run with priorities, shared prefixes and preemptions, whose steps say whose they are.
fn scheduler_run() -> (PathBuf, Run) {
    let runs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bundles/data/runs");
    let folder = runs.join("h100-vllm-0.24-scheduler/priority-prefix-preempt/priority-mix");
    let run = Run::read(&folder).unwrap();
    (folder, run)
}

fn replay_scheduler_run(run: &Run) -> Result<ReplayReport, ReplayError> {
    let workload = Workload::read(&workload_file(&scheduler_run().0).unwrap()).unwrap();
    replay_with(run, &workload, SchedulerKind::VllmV1)
}

type Edit = fn(&mut StepMetrics);

#[test]
fn each_recorded_part_of_a_step_counts() {
    let (_, whole) = scheduler_run();
    let report = replay_scheduler_run(&whole).unwrap();
    assert!(report.is_identical() && report.preemptions > 0, "{report:#?}");
    let recorded =
        |run: &Run| run.steps.iter().all(|step| step.requests.as_ref().unwrap().free_blocks.is_some());
    assert!(recorded(&whole));
    let edits: [(StepPart, Edit); 4] = [
        (StepPart::Batch, |step| step.batch.decode_contexts[0] += 1),
        (StepPart::Requests, |step| step.requests.as_mut().unwrap().decode_request_ids[0] += 1),
        (StepPart::Preempted, |step| step.requests.as_mut().unwrap().preempted_request_ids.push(1)),
        (StepPart::FreeBlocks, |step| *step.requests.as_mut().unwrap().free_blocks.as_mut().unwrap() += 1),
    ];
    for (part, edit) in edits {
        let mut run = whole.clone();
        let middle = run.steps.iter().rposition(|step| !step.batch.decode_contexts.is_empty()).unwrap();
        edit(&mut run.steps[middle]);
        let report = replay_scheduler_run(&run).unwrap();
        assert_eq!(report.identical, report.steps - 1, "{part:?}");
        let difference = report.first_difference.unwrap();
        assert_eq!((difference.step, difference.part), (middle, part));
        assert_eq!(difference.real_requests, run.steps[middle].requests);
        assert_eq!(Some(difference.replayed_requests), whole.steps[middle].requests);
    }
}

/// Prefixes and priorities are what makes that run what it is.
#[test]
fn without_its_workload_a_run_with_prefixes_is_not_formed() {
    let (_, run) = scheduler_run();
    let report = replay(&run).unwrap();
    assert!(report.identical < report.steps / 2, "{} of {}", report.identical, report.steps);
}

#[test]
fn a_workload_is_found_beside_the_run_or_by_name_above_it() {
    let root = tempfile::tempdir().unwrap();
    let run = root.path().join("engine/burst");
    std::fs::create_dir_all(&run).unwrap();
    assert_eq!(workload_file(&run), None);
    std::fs::create_dir(root.path().join("workloads")).unwrap();
    let above = root.path().join("workloads/burst.csv");
    std::fs::write(&above, "").unwrap();
    assert_eq!(workload_file(&run), Some(above));
    let beside = run.join("workload.csv.zst");
    std::fs::write(&beside, "").unwrap();
    assert_eq!(workload_file(&run), Some(beside));
}

#[test]
fn a_workload_of_another_run_is_refused_by_request() {
    let (_, mut run) = scheduler_run();
    run.requests[3].num_prefill_tokens += 1;
    let error = replay_scheduler_run(&run).unwrap_err();
    assert!(matches!(error, ReplayError::OtherWorkload { request_id: 3, .. }), "{error}");
    let (_, mut run) = scheduler_run();
    let last = run.requests.pop().unwrap().request_id;
    let error = replay_scheduler_run(&run).unwrap_err();
    assert!(matches!(error, ReplayError::OtherWorkload { request_id, .. } if request_id == last), "{error}");
}

#[test]
fn steps_formed_while_others_ran_are_refused() {
    let (_, mut run) = scheduler_run();
    run.info.deployment.as_mut().unwrap().async_scheduling = true;
    let error = replay_scheduler_run(&run).unwrap_err().to_string();
    assert!(error.contains("`async_scheduling = true`"), "{error}");
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

/// As when the first of the running has to give its own blocks up: an engine forms a step of nothing, then the next.
#[test]
fn steps_that_only_preempt_are_joined_with_the_next() {
    let (_, mut run) = scheduler_run();
    let preempting = |step: &StepMetrics| !step.requests.as_ref().unwrap().preempted_request_ids.is_empty();
    let number = run.steps.iter().position(preempting).unwrap();
    let mut empty = run.steps[number].clone();
    empty.batch = StepBatch::default();
    let requests = run.steps[number].requests.as_mut().unwrap();
    let preempted_request_ids = std::mem::take(&mut requests.preempted_request_ids);
    empty.requests = Some(StepRequests { preempted_request_ids, ..StepRequests::default() });
    run.steps.insert(number, empty);
    let report = replay_scheduler_run(&run).unwrap();
    assert!(report.is_identical(), "{report:#?}");
}

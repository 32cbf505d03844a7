use super::*;
use crate::testing::{request, run};

fn deployment(model: &str) -> Deployment {
    let model = ModelSpec::load(model).unwrap();
    Deployment { num_gpu_blocks: 1000, ..Deployment::unplanned(&model, EngineMode::Graph) }
}

/// A run that says everything.
fn complete(model: &str) -> Run {
    let mut run = run(vec![request(0, 0, &[10, 20]), request(1, 5, &[30, 40])]).with_tokens();
    run.info.engine = "vllm-0.24.0".into();
    run.info.gpu = Some("h100-sxm5-80gb".into());
    run.info.deployment = Some(deployment(model));
    run.info.environment = Some(Environment {
        model: Some(ModelSpec::load(model).unwrap()),
        dtype: Some("bfloat16".into()),
        engine_version: None,
        driver_version: Some("580.1".into()),
    });
    run
}

fn not_matching(settings: &[Setting]) -> Vec<(&str, Verdict)> {
    let others = settings.iter().filter(|s| s.verdict != Verdict::Match);
    others.map(|s| (s.setting.as_str(), s.verdict)).collect()
}

#[test]
fn a_run_matches_itself_in_every_setting() {
    let run = complete("qwen3-0.6b");
    let found = settings(&[run.clone(), run.clone()], &run);
    assert_eq!(not_matching(&found), []);
    assert_eq!(found.len(), 18);
    assert!(found.iter().all(|s| s.real.is_some() && s.real == s.sim), "{found:?}");
}

#[test]
fn half_the_kv_blocks_are_named() {
    let real = complete("qwen3-0.6b");
    let mut sim = real.clone();
    sim.info.deployment.as_mut().unwrap().num_gpu_blocks /= 2;
    let found = settings(&[real], &sim);
    assert_eq!(not_matching(&found), [("num_gpu_blocks", Verdict::Mismatch)]);
    let texts: Vec<_> = found.iter().map(Setting::describe).collect();
    assert!(texts.contains(&"num_gpu_blocks: real 1000, simulated 500".to_owned()), "{texts:?}");
}

#[test]
fn a_swapped_model_is_named_with_its_shape() {
    let found = settings(&[complete("qwen3-0.6b")], &complete("llama3-8b"));
    let model = &found[0];
    assert_eq!((model.setting.as_str(), model.verdict), ("model", Verdict::Mismatch));
    assert!(model.real.as_ref().unwrap().starts_with("qwen3-0.6b (28 layers, hidden 1024"), "{model:?}");
    assert!(model.sim.as_ref().unwrap().starts_with("llama3-8b (32 layers, hidden 4096"), "{model:?}");
}

#[test]
fn a_model_is_known_by_shape_before_name() {
    let sim = complete("qwen3-0.6b");
    let named = |name: &str| {
        let mut real = sim.clone();
        real.info.environment.as_mut().unwrap().model = None;
        real.info.deployment.as_mut().unwrap().model = name.into();
        settings(&[real], &sim)[0].verdict
    };
    assert_eq!(named("Qwen/Qwen3-0.6B"), Verdict::Match);
    assert_eq!(named("meta/llama3-8b"), Verdict::Mismatch);
    // No shape is known by this name, and the same shape may have another.
    assert_eq!(named("ours"), Verdict::Unknown);
}

#[test]
fn what_a_side_does_not_say_is_unknown() {
    let sim = complete("qwen3-0.6b");
    let mut real = sim.clone();
    real.info.gpu = None;
    real.info.environment = None;
    let found = settings(&[real.clone()], &sim);
    assert_eq!(not_matching(&found), [("dtype", Verdict::Unknown), ("gpu", Verdict::Unknown)]);
    // A driver that no real run records is no setting.
    assert!(found.iter().all(|s| s.setting != "driver_version"));
    real.info.deployment = None;
    let found = settings(&[sim.clone(), real], &sim);
    assert_eq!(count(&found, Verdict::Unknown), 3 + DEPLOYMENT.len() + 1, "{found:?}");
}

#[test]
fn repeats_that_differ_do_not_match() {
    let run = complete("qwen3-0.6b");
    let mut other = run.clone();
    other.info.deployment.as_mut().unwrap().max_num_seqs = 7;
    let found = settings(&[run.clone(), other], &run);
    assert_eq!(not_matching(&found), [("max_num_seqs", Verdict::Mismatch)]);
    let seqs = found.iter().find(|s| s.setting == "max_num_seqs").unwrap();
    assert_eq!(seqs.real.as_deref(), Some("256 / 7"));
}

#[test]
fn another_workload_is_named_and_hidden_content_is_unknown() {
    let real = complete("qwen3-0.6b");
    let mut sim = real.clone();
    sim.requests[1].arrival_time_ns.0 += 1;
    assert_eq!(
        not_matching(&settings(std::slice::from_ref(&real), &sim)),
        [("workload_digest", Verdict::Mismatch)]
    );
    // The digest of a file that also holds priorities is of more than the run shows.
    let mut with_priorities = real.clone();
    with_priorities.info.workload_digest = Some("0".repeat(64));
    let found = settings(&[with_priorities.clone()], &real);
    assert_eq!(not_matching(&found), [("workload_digest", Verdict::Unknown)]);
    assert_eq!(not_matching(&settings(&[with_priorities.clone()], &with_priorities)), []);
    // The order in which a file names requests of one arrival is not the workload's.
    let mut turned = real.clone();
    turned.requests.reverse();
    assert_eq!(not_matching(&settings(&[real], &turned)), []);
}

#[test]
fn engines_agree_as_far_as_their_versions_are_told() {
    assert_eq!(engines_agree("vllm-0.24.0-graph", "vllm-0.24-graph"), Some(true));
    assert_eq!(engines_agree("vllm 0.24.0", "vllm-0.25.0"), Some(false));
    assert_eq!(engines_agree("sglang-0.24.0", "vllm-0.24.0"), Some(false));
    assert_eq!(engines_agree("vllm", "vllm-0.24"), None);
    assert_eq!(engines_agree("native", "native"), Some(true));
}

#[test]
fn sizes_are_told_in_runs() {
    assert_eq!(sizes(&[]), "none");
    assert_eq!(sizes(&[1, 2, 4]), "1, 2, 4");
    assert_eq!(sizes(&[1, 2, 4, 8, 16, 24, 32, 48]), "1, 2, 4, 8..32 by 8, 48");
    let eager = Deployment { mode: EngineMode::Eager, ..deployment("qwen3-0.6b") };
    assert_eq!(
        (mode(&eager), mode(&deployment("qwen3-0.6b"))),
        ("eager".into(), "graph, FULL_AND_PIECEWISE".into())
    );
}

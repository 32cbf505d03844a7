use std::sync::atomic::{AtomicUsize, Ordering};

use plumbline_bundles::{
    Dispatch, DispatchCosts, HostCost,
    engine_profile::{ClientCosts, FittedOn, OperatorScales},
};
use plumbline_schema::{EngineMode, Nanos, Workload, WorkloadRequest};
use plumbline_simulator::{RooflineTimes, simulate};

use super::*;
use crate::{
    metrics::{Metric, Stat},
    results::CaseStatus,
    settings::{Setting, Verdict},
};

fn profile() -> EngineProfile {
    let costs = DispatchCosts {
        host_pre: HostCost { constant_ns: 1e6, per_seq_ns: 1e3, per_token_ns: 10.0 },
        host_post: HostCost { constant_ns: 5e5, ..HostCost::default() },
        launch_ns: 5e3,
        residual_quantiles: vec![0.9, 1.0, 1.2],
        ..DispatchCosts::default()
    };
    EngineProfile {
        name: "test-eager".into(),
        engine: "test".into(),
        scheduler: "vllm-v1".into(),
        dispatch: [(Dispatch::Eager, costs)].into(),
        schedule: HostCost::default(),
        client: ClientCosts::default(),
        operator_scales: OperatorScales::default(),
        idle_threshold_ns: 1e9,
        host_factor: 1.0,
        fitted_on: FittedOn { runs: vec!["engine/a".into()], ..FittedOn::default() },
    }
}

fn deployment() -> Deployment {
    let defaults = Deployment::defaults(&model(), &gpu(), EngineMode::Eager).unwrap();
    Deployment { max_num_batched_tokens: 512, ..defaults }
}

fn model() -> ModelSpec {
    ModelSpec::load("qwen3-0.6b").unwrap()
}

fn gpu() -> GpuSpec {
    GpuSpec::by_name("h100-sxm5-80gb").unwrap()
}

/// Judges `real` by the data sheet's times and [`profile`].
fn judged(case: &Case, real: &[Run], options: &ValidateOptions) -> Result<CaseResult, CaseError> {
    let times = RooflineTimes { gpu: gpu(), overhead_ns: 2e3 };
    let environment = Environment { model: Some(model()), ..Environment::default() };
    let prediction = Prediction {
        model: &model(),
        environment,
        profile: &profile(),
        gpu: &gpu(),
        bundle_digest: "d",
        times,
    };
    judge(case, real, prediction, options)
}

/// A run of the same model that [`judged`] predicts with.
fn simulated(seed: u64, residuals: Residuals) -> Run {
    let requests = (0..120u64).map(|i| {
        WorkloadRequest::new(i, Nanos(i * 40_000_000), 20 + (i as u32 * 37) % 400, 2 + (i as u32 * 13) % 30)
    });
    let workload = Workload { requests: requests.collect() };
    let times = RooflineTimes { gpu: gpu(), overhead_ns: 2e3 };
    let options = SimulateOptions { seed, residuals, ..SimulateOptions::default() };
    simulate(&model(), &workload, &deployment(), &profile(), times, &options).unwrap().run
}

fn case(lines: &str) -> Case {
    let text = format!(
        "[[case]]\nname = \"c\"\nreal = [\"runs/engine/b\"]\nbundle = \"none\"\nmodel = \"qwen3-0.6b\"\n\
         engine = \"test-eager\"\n{lines}\n"
    );
    Suite::parse(&text, Path::new("/s/suite.toml"), Path::new("/data")).unwrap().cases.remove(0)
}

fn quiet() -> ValidateOptions {
    ValidateOptions { residuals: Residuals::None, ..ValidateOptions::default() }
}

#[test]
fn a_run_that_obeys_the_model_is_predicted_without_error() {
    let mut real = simulated(1, Residuals::None);
    real.info.kind = RunKind::Real;
    let result = judged(&case(""), &[real], &quiet()).unwrap();
    assert_eq!((result.status, result.metrics.len()), (CaseStatus::Ok, 16));
    for row in &result.metrics {
        assert_eq!((row.error_pct, row.inside_band), (Some(0.0), Some(true)), "{row:?}");
    }
    assert!(result.paired.iter().all(|row| row.median_abs_error_pct == Some(0.0)));
    assert_eq!(result.coverage.get("roofline"), Some(&1.0));
    assert!(result.simulate_ms.unwrap() > 0.0);
    assert!(result.notes.is_empty(), "{:?}", result.notes);
}

#[test]
fn the_seed_decides_the_draws_and_scatter_shows_as_error() {
    let real = [simulated(1, Residuals::Drawn), simulated(2, Residuals::Drawn)];
    let run = |seed| {
        let options = ValidateOptions { seed, ..ValidateOptions::default() };
        judged(&case(""), &real, &options).unwrap().metrics
    };
    assert_eq!(run(3), run(3));
    assert_ne!(run(3), run(4));
    let row = run(3).into_iter().find(|r| (r.metric, r.stat) == (Metric::Itl, Stat::P50)).unwrap();
    assert_ne!(row.error_pct, Some(0.0));
    assert!(row.error_pct.unwrap().abs() < 20.0, "{row:?}");
}

#[test]
fn overrides_change_what_is_simulated() {
    let real = [simulated(1, Residuals::None)];
    let narrow = judged(&case("deployment = { max_num_seqs = 1 }"), &real, &quiet()).unwrap();
    let error = narrow.row(Metric::E2e, Stat::P50).unwrap().error_pct.unwrap();
    assert!(error > 50.0, "one sequence at a time must queue: {error}");
}

#[test]
fn an_output_that_ended_early_is_simulated_as_long_as_it_got() {
    let mut real = simulated(1, Residuals::None);
    for request in &mut real.requests {
        request.num_decode_tokens = 500;
    }
    let result = judged(&case(""), &[real], &quiet()).unwrap();
    assert_eq!(result.row(Metric::E2e, Stat::P50).unwrap().error_pct, Some(0.0));
}

#[test]
fn what_is_not_like_with_like_is_noted() {
    let first = simulated(1, Residuals::None);
    let mut second = first.clone();
    second.info.gpu = Some("a100-sxm4-80gb".into());
    second.info.deployment.as_mut().unwrap().num_gpu_blocks += 1;
    let mut case = case("");
    case.real = vec!["/s/runs/engine/a".into(), "/s/runs/another-engine/a".into()];
    let notes = judged(&case, &[first, second], &quiet()).unwrap().notes;
    assert_eq!(
        notes,
        [
            "real run 1 is itself simulated",
            "real run 2 is itself simulated",
            "real run 2 is of a100-sxm4-80gb, the prediction of h100-sxm5-80gb",
            "real run 2 was deployed with another num_gpu_blocks",
            "held out, yet `test-eager` was fitted on /s/runs/engine/a",
        ]
    );
    case.role = Role::Fit;
    let notes = judged(&case, &[simulated(1, Residuals::None)], &quiet()).unwrap().notes;
    assert_eq!(notes, ["real run 1 is itself simulated"]);
}

#[test]
fn a_halved_kv_capacity_and_a_swapped_model_are_named_by_the_settings() {
    let not_matching = |case: &Case, real: &Run| -> Vec<String> {
        let settings = judged(case, std::slice::from_ref(real), &quiet()).unwrap().settings;
        settings.iter().filter(|s| s.verdict == Verdict::Mismatch).map(Setting::describe).collect()
    };
    let mut real = simulated(1, Residuals::None);
    let blocks = real.info.deployment.as_ref().unwrap().num_gpu_blocks;
    assert_eq!(not_matching(&case(""), &real), [""; 0]);
    let halved = case(&format!("deployment = {{ num_gpu_blocks = {} }}", blocks / 2));
    assert_eq!(
        not_matching(&halved, &real),
        [format!("num_gpu_blocks: real {blocks}, simulated {}", blocks / 2)]
    );
    real.info.deployment.as_mut().unwrap().model = "llama3-8b".into();
    let named = not_matching(&case(""), &real);
    assert_eq!(named.len(), 1);
    assert!(named[0].starts_with("model: real llama3-8b (32 layers"), "{named:?}");
    assert!(named[0].contains("simulated qwen3-0.6b (28 layers"), "{named:?}");
}

#[test]
fn a_run_without_a_deployment_is_an_error_that_names_it() {
    let mut real = simulated(1, Residuals::None);
    real.info.deployment = None;
    let error = judged(&case(""), &[real], &quiet()).unwrap_err().to_string();
    assert!(error.starts_with("/s/runs/engine/b: expected a deployment in run.json"), "{error}");
}

#[test]
fn one_failing_case_does_not_stop_the_others_and_names_its_file() {
    let text =
        "[[case]]\nname = \"x\"\nreal = [\"r\"]\nbundle = \"none\"\nmodel = \"qwen3-0.6b\"\nengine = \"e\"\n";
    let suite = format!("{text}{}", text.replace("\"x\"", "\"y\"").replace("\"none\"", "\"./gone\""));
    let suite = Suite::parse(&suite, Path::new("/s/suite.toml"), Path::new("/data")).unwrap();
    let heard = AtomicUsize::new(0);
    let result = validate(&suite, &ValidateOptions::default(), &|_| {
        heard.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!((heard.into_inner(), result.summary.num_failed, result.summary.num_cases), (2, 2, 2));
    let errors: Vec<_> = result.failures().map(|c| c.error.clone().unwrap()).collect();
    assert!(errors[0].starts_with("/data/none: no manifest.json"), "{errors:?}");
    assert!(errors[1].starts_with("/s/./gone: no manifest.json"), "{errors:?}");
}

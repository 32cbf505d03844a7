//! The load of the peers' comparison, simulated as a user would: every token's time kept, `request_metrics.csv` written.
//!
//! `cargo bench -p plumbline-simulator --bench load -- WORKLOAD.csv [BUNDLE] [SCHEDULER]`

use std::{cell::RefCell, path::Path, sync::Arc, time::Instant};

use plumbline_bundles::{Bundle, EngineProfile, OutOfDomain};
use plumbline_schema::{Deployment, EngineMode, GpuSpec, ModelSpec, Workload};
use plumbline_simulator::{
    BundleTimes, OperatorTimes, RooflineTimes, SchedulerKind, SimulateOptions, StepTimeModel, WorkloadSource,
    cluster::{Cluster, Group, Role, Routing},
    output::{OutputOptions, Reporter},
};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let Some(workload) = args.first() else {
        println!("skipped: expected a workload (see docs/performance.md)");
        return;
    };
    let workload = Arc::new(Workload::read(Path::new(workload)).expect("a workload"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bundles/data");
    let bundle = Bundle::open(&root.join("h100-sxm5-80gb")).expect("a bundle");
    let profile = bundle.engine("vllm-0.24-graph").expect("an engine profile");
    let scheduler = args.get(1).map_or("vllm-v1", String::as_str).parse().expect("a scheduler");
    let gpu = GpuSpec::by_name("h100-sxm5-80gb").expect("a GPU");
    let predictors = Arc::new(bundle.predictors().expect("predictors"));
    for _ in 0..5 {
        run(
            "roofline",
            RooflineTimes { gpu: gpu.clone(), overhead_ns: 2_000.0 },
            &profile,
            scheduler,
            &workload,
        );
        let times = BundleTimes::new(Arc::clone(&predictors), OutOfDomain::Extrapolate);
        run("bundle", times, &profile, scheduler, &workload);
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    println!("{}", status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default());
}

fn run<T: OperatorTimes>(
    name: &str,
    times: T,
    profile: &EngineProfile,
    scheduler: SchedulerKind,
    workload: &Arc<Workload>,
) {
    let model = ModelSpec::load("llama3-8b").expect("a model");
    let gpu = GpuSpec::by_name("h100-sxm5-80gb").expect("a GPU");
    let deployment = Deployment {
        max_num_batched_tokens: 512,
        max_num_seqs: 128,
        max_model_len: 4096,
        ..Deployment::defaults(&model, &gpu, EngineMode::Graph).expect("a deployment")
    };
    let started = Instant::now();
    let step_time =
        RefCell::new(StepTimeModel::new(&model, times, profile, &deployment).expect("step times"));
    let group = Group { step_time: &step_time, scheduler, num_replicas: 1, role: Role::Whole };
    let options = SimulateOptions::default();
    let mut cluster = Cluster::new(&[group], Routing::default(), &options).expect("a cluster");
    let folder = tempfile::tempdir().expect("a folder");
    let output = OutputOptions {
        requests: true,
        tokens: false,
        backend: profile.name.clone(),
        ..OutputOptions::default()
    };
    let mut reporter = Reporter::new(folder.path(), output).expect("files");
    let mut source = WorkloadSource::new(Arc::clone(workload));
    let reports = cluster.run(&mut source, &mut reporter).expect("a simulation");
    let simulated = started.elapsed();
    let (summaries, _) = reporter.finish().expect("files");
    let took = started.elapsed();
    let counts = reports[0].counts;
    let mean_batch = counts.step_seqs as f64 / counts.steps as f64;
    println!(
        "{name}: {} steps, mean batch {mean_batch:.1}, {:.1} ms simulating, {:.1} ms with files, {:.2} M steps/s; \
         ITL p50 {:.3} ms",
        counts.steps,
        simulated.as_secs_f64() * 1e3,
        took.as_secs_f64() * 1e3,
        counts.steps as f64 / took.as_secs_f64() / 1e6,
        summaries["itl_ns"].p50.unwrap_or_default() / 1e6,
    );
}

//! A GPU that fails in the middle of a run. A process of its own: nothing works on the GPU after it.

use std::{
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use cudarc::driver::{CudaContext, sys};
use plumbline_engine::{
    Engine, EngineError, EngineOptions, RunOptions, Sampling, WeightSource, serve_workload,
};
use plumbline_schema::{
    Deployment, EngineMode, ModelConfig, ModelSpec, Nanos, RequestStatus, Run, Workload, WorkloadRequest,
};
use plumbline_simulator::SchedulerKind;

/// Writes where there is no memory, as PTX.
const FAULT: &std::ffi::CStr = c".version 7.0
.target sm_80
.address_size 64
.visible .entry fault() { .reg .u64 %a; mov.u64 %a, 16; st.global.u64 [%a], %a; ret; }
";

/// Breaks the device's primary context, which the engine works in: every later call fails, as after a lost GPU.
fn break_context() {
    let context = CudaContext::new(0).unwrap();
    context.bind_to_thread().unwrap();
    let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the module and the function live as long as the context; the kernel takes no arguments.
    unsafe {
        sys::cuModuleLoadData(&raw mut module, FAULT.as_ptr().cast()).result().unwrap();
        sys::cuModuleGetFunction(&raw mut function, module, c"fault".as_ptr()).result().unwrap();
        let (stream, none) = (std::ptr::null_mut(), std::ptr::null_mut());
        // The failure may be told here or to whoever asks next.
        let _ = sys::cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, none, none).result();
    }
}

#[test]
fn a_run_that_loses_its_gpu_keeps_what_it_has() {
    let model = ModelSpec::load("qwen3-0.6b").unwrap();
    let config = ModelConfig::find("qwen3-0.6b").unwrap();
    let deployment = Deployment {
        max_num_batched_tokens: 1024,
        max_num_seqs: 16,
        max_model_len: 2048,
        num_gpu_blocks: 1000,
        cudagraph_sizes: vec![1, 2, 4, 8, 16],
        ..Deployment::unplanned(&model, EngineMode::Graph)
    };
    let options = EngineOptions {
        device: 0,
        weights: WeightSource::Random(1),
        deployment,
        gpu_memory_utilization: 0.5,
    };
    let mut engine = match Engine::start(&config, &options) {
        Ok(engine) => engine,
        Err(EngineError::NoDevice(reason)) => {
            println!("SKIPPED: a lost GPU: {reason}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    // One request is done long before the fault, one is decoding then, one has yet to come.
    let request = |id, at_ms: u64, decodes| WorkloadRequest::new(id, Nanos(at_ms * 1_000_000), 64, decodes);
    let workload =
        Workload { requests: vec![request(0, 0, 8), request(1, 200, 1900), request(2, 60_000, 4)] };
    let run_options = RunOptions {
        scheduler: SchedulerKind::VllmV1,
        sampling: Sampling::default(),
        keeps_outputs: false,
        workload_digest: None,
        gpu: None,
        weights: "random weights".to_owned(),
        warm_up: None,
    };
    let began = Instant::now();
    let real = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_secs(1));
            break_context();
        });
        serve_workload(&mut engine, &workload, &run_options, &AtomicBool::new(false)).unwrap()
    });
    assert!(began.elapsed() < Duration::from_secs(20), "it ended {:?} after its start", began.elapsed());
    let error = real.error.as_ref().expect("the failure is told").to_string();
    println!("told as: {error}");
    let statuses: Vec<_> = real.run.requests.iter().map(|r| r.status).collect();
    assert_eq!(statuses, [RequestStatus::Ok, RequestStatus::Incomplete, RequestStatus::Incomplete]);
    let folder = tempfile::tempdir().unwrap();
    real.write(folder.path()).unwrap();
    let read = Run::read(folder.path()).unwrap();
    assert_eq!(read.info.conduct.unwrap().incomplete.as_deref(), Some(error.as_str()));
    assert!(read.steps.len() > 100, "{} steps are kept", read.steps.len());
    assert!(read.tokens.iter().filter(|t| t.request_id == 1).count() > 50);
}

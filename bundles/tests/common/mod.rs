//! A small made-up bundle, so that tests need no GPU.

use std::{collections::BTreeMap, path::Path};

use plumbline_bundles::{
    Bundle, BundleWriter, CacheState, Dispatch, DispatchCosts, EngineProfile, FormatVersion, HostCosts,
    Manifest, Sample, TimeStats, bundle,
    engine_profile::{ClientCosts, FittedOn, OperatorScales},
    host::{CopyCost, CpuState, GraphLaunchCost},
};
use plumbline_schema::{GpuSpec, Heads, Operator, OperatorShape, StepBatch};

/// Heads of a small model.
pub const HEADS: Heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };

/// A sample of plausible times.
pub fn sample(operator: Operator, shape: OperatorShape, batch: Option<StepBatch>, time_ns: f64) -> Sample {
    let stats = TimeStats::from_times(&[time_ns, time_ns * 1.1, time_ns * 1.3]).unwrap();
    Sample {
        batch,
        cache: CacheState::Cold,
        sm_clock_mhz: Some(1980),
        power_w: Some(312.5),
        kernel: "tile, 64x64 \"a\"".into(),
        ..Sample::bare(operator, shape, stats)
    }
}

/// Samples of two operators.
pub fn samples() -> Vec<Sample> {
    let rope = |num_tokens| OperatorShape::Rope { num_tokens, heads: HEADS };
    let batch = StepBatch::parse("32:0;8:64", "9;1024").unwrap();
    let load = batch.shape().attention;
    vec![
        sample(Operator::Rope, rope(1), None, 1500.25),
        sample(Operator::Rope, rope(64), None, 1750.0),
        sample(Operator::Attention, OperatorShape::Attention { heads: HEADS, load }, Some(batch), 9000.0),
    ]
}

/// Host costs of a plausible machine.
pub fn host() -> HostCosts {
    let stats = |ns: f64| TimeStats::from_times(&[ns, ns * 1.2]).unwrap();
    HostCosts {
        cpu_model: "made-up".into(),
        num_cores: 8,
        single_thread_score: 100.0,
        score: None,
        cpu: CpuState::default(),
        launch_rows: vec![],
        launch_arguments: vec![],
        synchronize_after_work_ns: None,
        events: None,
        input_copies: vec![],
        after_idle: vec![],
        kernel_launch_ns: stats(2500.0),
        kernel_gap_ns: stats(900.0),
        graph_launch: vec![GraphLaunchCost { num_nodes: 100, launch_ns: stats(9000.0) }],
        synchronize_ns: stats(4000.0),
        copies: vec![CopyCost { num_bytes: 1024, to_device_ns: stats(5000.0), to_host_ns: stats(6000.0) }],
    }
}

/// An engine profile that passes its check.
pub fn engine(name: &str) -> EngineProfile {
    EngineProfile {
        name: name.into(),
        engine: "made-up 1.0".into(),
        scheduler: "vllm-v1".into(),
        dispatch: BTreeMap::from([(
            Dispatch::Eager,
            DispatchCosts { residual_quantiles: vec![0.9, 1.0, 1.1], ..DispatchCosts::default() },
        )]),
        schedule: plumbline_bundles::HostCost::default(),
        client: ClientCosts::default(),
        operator_scales: OperatorScales::default(),
        idle_threshold_ns: 1e6,
        host_factor: 1.0,
        fitted_on: FittedOn::default(),
    }
}

/// A manifest without files.
pub fn manifest() -> Manifest {
    Manifest {
        format_version: FormatVersion::CURRENT,
        plumbline_version: "0.1.0".into(),
        created: "2026-01-01T00:00:00Z".into(),
        gpu: GpuSpec::by_name("h100-sxm5-80gb").unwrap(),
        device: None,
        evidence: None,
        models: vec!["qwen3-0.6b".into()],
        incomplete: vec![],
        files: BTreeMap::new(),
    }
}

/// Writes a bundle at `path`.
pub fn write_bundle(path: &Path) -> Bundle {
    let mut writer = BundleWriter::new(path).unwrap();
    writer.add_samples(&samples()).unwrap();
    writer.add_json(bundle::HOST, &host()).unwrap();
    writer.add_json(&bundle::engine_name("made-up"), &engine("made-up")).unwrap();
    writer.finish(manifest()).unwrap()
}

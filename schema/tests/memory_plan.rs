//! The memory plan beside engines that recorded their KV blocks, and its laws.

use std::path::{Path, PathBuf};

use plumbline_schema::{
    Bytes, Deployment, EngineMode, GpuSpec, MemoryError, MemoryOptions, MemoryPlan, ModelSpec,
    memory::{PeakMoment, device_memory},
};
use proptest::prelude::*;

/// What the recorded engines were given.
const RECORDED: MemoryOptions =
    MemoryOptions { gpu_memory_utilization: 0.85, device: None, reserves_graph_pools: false };

/// Every recorded engine that was left to find its KV blocks by itself.
const ENGINES: [&str; 6] = [
    "h100-vllm-0.24/qwen3-0.6b-eager",
    "h100-vllm-0.24/qwen3-0.6b-graph",
    "h100-vllm-0.24/qwen3-0.6b-graph-rerun",
    "h100-vllm-0.24/llama3-8b-graph",
    "h100-vllm-0.24-scheduler/long-prefill",
    "h100-vllm-0.24-scheduler/small-budget",
];

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../bundles/data").join(path)
}

fn recorded(engine: &str) -> (ModelSpec, Deployment) {
    let deployment = Deployment::read(&data(&format!("runs/{engine}/engine.json"))).unwrap();
    (model(&deployment.model), deployment)
}

fn h100() -> GpuSpec {
    GpuSpec::by_name("h100-sxm5-80gb").unwrap()
}

fn model(name: &str) -> ModelSpec {
    ModelSpec::load(name).unwrap()
}

fn with_share(gpu_memory_utilization: f64) -> MemoryOptions {
    MemoryOptions { gpu_memory_utilization, ..MemoryOptions::default() }
}

/// Run with `--nocapture`, this prints the table of `docs/memory-planner.md`.
#[test]
fn the_plan_has_the_blocks_of_real_engines_within_a_tenth_of_a_percent() {
    for engine in ENGINES {
        let (model, deployment) = recorded(engine);
        let plan = MemoryPlan::new(&model, &h100(), &deployment, &RECORDED).unwrap();
        let check = plan.check(deployment.num_gpu_blocks);
        println!(
            "{engine}: recorded {}, planned {} ({:+.2} %), {:+.1} MiB; {:?}, {:?}",
            check.recorded,
            check.planned,
            check.error() * 100.0,
            (0.85 - check.implied_utilization) * plan.device.0 as f64 / f64::from(1 << 20),
            plan.peak,
            plan.parts,
        );
        assert!(check.error().abs() < 0.001, "{engine}: {check}");
        assert!((check.implied_utilization - 0.85).abs() < 0.001, "{engine}: {check}");
    }
}

/// What is assumed and what is inferred from these engines is not what brings the plan near them.
#[test]
fn the_rules_alone_are_within_two_percent() {
    for engine in ENGINES {
        let (model, deployment) = recorded(engine);
        // The compiler's own arguments are the inferred part.
        let eager = Deployment { mode: EngineMode::Eager, ..deployment.clone() };
        let plan = MemoryPlan::new(&model, &h100(), &eager, &RECORDED).unwrap();
        let num_blocks = (plan.kv + plan.unused + plan.parts.non_torch).0 / plan.block.0;
        let error = num_blocks as f64 / f64::from(deployment.num_gpu_blocks) - 1.0;
        println!("{engine}: {:+.2} % by the rules alone", error * 100.0);
        assert!((0.0..0.02).contains(&error), "{engine}: {error}");
    }
}

#[test]
fn device_memory_is_what_the_shipped_bundles_recorded() {
    for name in ["h100-sxm5-80gb", "h200-sxm-141gb"] {
        let text = std::fs::read_to_string(data(name).join("manifest.json")).unwrap();
        let manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
        let memory = manifest["device"]["memory_bytes"].as_u64().unwrap();
        assert_eq!(device_memory(&GpuSpec::by_name(name).unwrap()), Bytes(memory), "{name}");
    }
    let own = GpuSpec { name: "another".into(), ..h100() };
    assert_eq!(device_memory(&own), own.hbm_bytes);
}

#[test]
fn weights_are_the_model_and_its_rope_table() {
    for name in ModelSpec::shipped_names() {
        let model = model(name);
        let deployment = Deployment::unplanned(&model, EngineMode::Eager);
        let plan = MemoryPlan::new(&model, &h100(), &deployment, &RECORDED).unwrap();
        let parts = plan.parts;
        assert_eq!(parts.embedding + parts.layers + parts.lm_head, model.weight_bytes(), "{name}");
        assert_eq!(parts.lm_head == Bytes(0), model.tied_embeddings, "{name}");
        assert_eq!(plan.block, Bytes(16 * model.kv_bytes_per_token().0), "{name}");
    }
}

#[test]
fn the_peak_is_where_the_shapes_put_it() {
    let peak = |name: &str, mode| {
        let model = model(name);
        let deployment = Deployment::unplanned(&model, mode);
        MemoryPlan::new(&model, &h100(), &deployment, &RECORDED).unwrap().peak
    };
    assert_eq!(peak("qwen3-0.6b", EngineMode::Eager), PeakMoment::Sampling);
    assert_eq!(peak("llama3-8b", EngineMode::Eager), PeakMoment::Forward);
    assert_eq!(peak("llama3-8b", EngineMode::Graph), PeakMoment::Compilation);
}

#[test]
fn a_tied_head_on_another_stage_is_a_copy() {
    let model = model("qwen3-0.6b");
    let deployment =
        Deployment { pipeline_parallel_size: 3, ..Deployment::unplanned(&model, EngineMode::Eager) };
    let stages =
        [0, 1, 2].map(|stage| MemoryPlan::of_stage(&model, &h100(), &deployment, &RECORDED, stage).unwrap());
    let (none, table) = (Bytes(0), Bytes(151_936 * 1024 * 2));
    assert_eq!(stages.each_ref().map(|plan| plan.parts.embedding), [table, none, none]);
    assert_eq!(stages.each_ref().map(|plan| plan.parts.lm_head), [none, none, table]);
    // 28 layers, each with 16 tokens' keys and values of 8 heads of 128.
    assert_eq!(
        stages.each_ref().map(|plan| plan.block),
        [9, 10, 9].map(|layers| Bytes(layers * 16 * 2 * 1024 * 2))
    );
    let tightest = MemoryPlan::new(&model, &h100(), &deployment, &RECORDED).unwrap();
    let fewest = stages.iter().map(MemoryPlan::num_gpu_blocks).min();
    assert_eq!(Some(tightest.num_gpu_blocks()), fewest);
    let error = MemoryPlan::of_stage(&model, &h100(), &deployment, &RECORDED, 3).unwrap_err().to_string();
    assert_eq!(error, "expected a stage from 0 to 2, found 3");
}

#[test]
fn errors_name_what_does_not_fit() {
    let llama = model("llama3-8b");
    let deployment = Deployment::unplanned(&llama, EngineMode::Eager);
    let error = |share| MemoryPlan::new(&llama, &h100(), &deployment, &with_share(share)).unwrap_err();
    let weights = error(0.1).to_string();
    assert!(
        weights.starts_with(
            "llama3-8b on h100-sxm5-80gb: expected the weights within the budget of 7.92 GiB (0.1 of 79.18 GiB), \
             found 14.97 GiB; give each GPU less by `tensor_parallel_size`"
        ),
        "{weights}"
    );
    let MemoryError::DoesNotFit { what, .. } = error(0.19) else { panic!("a budget of 15.04 GiB") };
    assert_eq!(what, "the weights and activations");
    for share in [0.0, -1.0, 1.5, f64::NAN] {
        assert!(matches!(error(share), MemoryError::Utilization(_)), "{share}");
    }
    // A model that no GPU holds is no deployment of one block.
    let huge = ModelSpec { num_layers: 800, ..llama.clone() };
    let error = Deployment::defaults(&huge, &h100(), EngineMode::Graph).unwrap_err().to_string();
    assert!(error.contains("expected the weights within the budget"), "{error}");
    let staged = Deployment { pipeline_parallel_size: 2, ..deployment };
    let error = MemoryPlan::new(&huge, &h100(), &staged, &with_share(0.9)).unwrap_err().to_string();
    assert!(error.contains("h100-sxm5-80gb, pipeline stage 1 of 2: expected the weights"), "{error}");
}

#[test]
fn errors_name_the_key_that_splits_nothing() {
    let llama = model("llama3-8b");
    let error = |tensor_parallel_size, pipeline_parallel_size, block_size| {
        let deployment = Deployment {
            tensor_parallel_size,
            pipeline_parallel_size,
            block_size,
            ..Deployment::unplanned(&llama, EngineMode::Eager)
        };
        MemoryPlan::new(&llama, &h100(), &deployment, &RECORDED).unwrap_err().to_string()
    };
    assert_eq!(
        error(3, 1, 16),
        "expected a tensor_parallel_size that divides num_kv_heads = 8 and intermediate_size = 14336, found 3"
    );
    assert_eq!(error(1, 33, 16), "expected a pipeline_parallel_size from 1 to num_layers = 32, found 33");
    assert!(error(0, 1, 16).contains("tensor_parallel_size"));
    assert!(error(1, 0, 16).contains("pipeline_parallel_size"));
    assert_eq!(error(1, 1, 0), "expected a block_size of at least 1, found 0");
}

#[test]
fn a_check_says_which_share_gives_the_recorded_blocks() {
    let qwen = model("qwen3-0.6b");
    let deployment = Deployment::unplanned(&qwen, EngineMode::Eager);
    let plan = |share| MemoryPlan::new(&qwen, &h100(), &deployment, &with_share(share)).unwrap();
    let check = plan(0.9).check(plan(0.7).num_gpu_blocks());
    assert!((check.implied_utilization - 0.7).abs() < 1e-4, "{check:?}");
    assert!(check.error() > 0.2, "{check:?}");
    assert!(plan(0.9).check(u32::MAX).implied_utilization > 1.0);
    assert!(plan(0.9).check(0).error() > 1.0);
}

#[test]
fn graph_pools_count_only_where_an_engine_reserves_them() {
    let qwen = model("qwen3-0.6b");
    let deployment = Deployment::unplanned(&qwen, EngineMode::Graph);
    let plan = |reserves_graph_pools| {
        let options = MemoryOptions { reserves_graph_pools, ..MemoryOptions::default() };
        MemoryPlan::new(&qwen, &h100(), &deployment, &options).unwrap()
    };
    let (beside, within) = (plan(false), plan(true));
    // 51 sizes for any step, 35 of them up to 256 for decodes: 50 + 34 graphs after the first ones.
    assert!(beside.graph_pools > Bytes(84 << 20));
    assert_eq!((beside.parts.graph_pools, within.parts.graph_pools), (Bytes(0), beside.graph_pools));
    assert!(within.num_gpu_blocks() < beside.num_gpu_blocks());
}

/// Models, engines and shares, most of which fit an H100.
fn cases() -> impl Strategy<Value = (ModelSpec, Deployment, MemoryOptions)> {
    let model = (1_u32..80, 0_u32..4, 1_u32..9, 1_u32..2000, any::<bool>(), any::<bool>()).prop_map(
        |(num_layers, kv, wide, vocab, tied_embeddings, qk_norm)| ModelSpec {
            name: "any".into(),
            hidden_size: 512 * wide,
            num_layers,
            num_q_heads: 8 * wide,
            num_kv_heads: 1 << kv,
            head_dim: 64,
            intermediate_size: 1536 * wide,
            vocab_size: 101 * vocab,
            max_positions: 8192,
            tied_embeddings,
            qk_norm,
        },
    );
    let keys = (0_u32..4, 1_u32..5, 1_u32..9000, 1_u32..600, 1_u32..65, any::<bool>());
    (model, keys, 0.01_f64..=1.0).prop_map(|(model, (tp, pp, tokens, seqs, block_size, is_graph), share)| {
        let mode = if is_graph { EngineMode::Graph } else { EngineMode::Eager };
        let deployment = Deployment {
            tensor_parallel_size: 1 << tp,
            pipeline_parallel_size: pp.min(model.num_layers),
            max_num_batched_tokens: tokens,
            max_num_seqs: seqs,
            block_size,
            ..Deployment::unplanned(&model, mode)
        };
        (model, deployment, with_share(share))
    })
}

/// A device that holds everything.
fn all_memory() -> MemoryOptions {
    MemoryOptions { device: Some(Bytes(1 << 60)), ..with_share(1.0) }
}

proptest! {
    /// Nothing is lost, less than a block is left, and a plan holds at least a block.
    #[test]
    fn parts_blocks_and_rest_are_the_budget((model, deployment, options) in cases()) {
        if let Ok(plan) = MemoryPlan::new(&model, &h100(), &deployment, &options) {
            prop_assert_eq!(plan.parts.total() + plan.kv + plan.unused, plan.budget);
            prop_assert!(plan.unused < plan.block);
            prop_assert!(plan.num_gpu_blocks() >= 1);
            prop_assert!(plan.budget <= plan.device);
        }
    }

    /// More room or smaller budgets of a step are never fewer blocks.
    #[test]
    fn more_room_is_no_fewer_blocks((model, deployment, options) in cases()) {
        let blocks = |deployment: &Deployment, options: &MemoryOptions| {
            MemoryPlan::new(&model, &h100(), deployment, options).map_or(0, |plan| plan.num_gpu_blocks())
        };
        let base = blocks(&deployment, &options);
        let more = with_share((options.gpu_memory_utilization * 1.1).min(1.0));
        prop_assert!(blocks(&deployment, &more) >= base);
        let mut busier = deployment.clone();
        busier.max_num_seqs *= 2;
        prop_assert!(blocks(&busier, &options) <= base);
        let mut longer = deployment;
        longer.max_num_batched_tokens *= 2;
        prop_assert!(blocks(&longer, &options) <= base);
    }

    /// The GPUs of a layer hold it once, but for the norms, which each repeats.
    #[test]
    fn tensor_parallel_parts_add_up((model, deployment, _) in cases()) {
        let one = Deployment { tensor_parallel_size: 1, pipeline_parallel_size: 1, ..deployment };
        let two = Deployment { tensor_parallel_size: 2, ..one.clone() };
        let parts = |deployment| MemoryPlan::new(&model, &h100(), deployment, &all_memory()).unwrap().parts;
        prop_assume!(model.num_kv_heads >= 2);
        let (whole, half) = (parts(&one), parts(&two));
        // A vocabulary padded to a multiple of 64 splits evenly.
        prop_assert_eq!(half.embedding.0 * 2, whole.embedding.0);
        prop_assert_eq!(half.lm_head.0 * 2, whole.lm_head.0);
        let qk_norms = if model.qk_norm { 2 * model.head_dim } else { 0 };
        let norms = model.num_layers * (2 * model.hidden_size + qk_norms) + model.hidden_size;
        prop_assert_eq!(half.layers.0 * 2 - whole.layers.0, 2 * u64::from(norms));
    }

    /// The stages of a pipeline hold the layers once.
    #[test]
    fn pipeline_stages_add_up((model, deployment, _) in cases()) {
        let whole = Deployment { tensor_parallel_size: 1, pipeline_parallel_size: 1, ..deployment.clone() };
        let staged = Deployment { tensor_parallel_size: 1, ..deployment };
        let whole = MemoryPlan::new(&model, &h100(), &whole, &all_memory()).unwrap();
        let stages = (0..staged.pipeline_parallel_size)
            .map(|stage| MemoryPlan::of_stage(&model, &h100(), &staged, &all_memory(), stage).unwrap());
        let sum = stages.fold((Bytes(0), Bytes(0)), |(layers, block), plan| {
            (layers + plan.parts.layers, block + plan.block)
        });
        prop_assert_eq!(sum, (whole.parts.layers, whole.block));
    }

    /// No number in a file makes a plan panic.
    #[test]
    fn absurd_numbers_are_errors_or_plans(
        dims in prop::collection::vec(1_u32..=1 << 22, 7),
        keys in prop::collection::vec(any::<u32>(), 6),
        device in any::<u64>(),
        share in any::<f64>(),
    ) {
        let model = ModelSpec {
            name: "absurd".into(),
            hidden_size: dims[0],
            num_layers: dims[1],
            num_q_heads: dims[2],
            num_kv_heads: dims[2],
            head_dim: dims[3],
            intermediate_size: dims[4],
            vocab_size: dims[5],
            max_positions: dims[6],
            tied_embeddings: false,
            qk_norm: true,
        };
        let deployment = Deployment {
            max_num_batched_tokens: keys[0],
            max_num_seqs: keys[1],
            block_size: keys[2],
            tensor_parallel_size: keys[3] % 3,
            pipeline_parallel_size: keys[4] % 3,
            cudagraph_sizes: vec![keys[5]],
            ..Deployment::unplanned(&model, EngineMode::Graph)
        };
        for gpu_memory_utilization in [share, 1.0] {
            let device = Some(Bytes(device));
            let options = MemoryOptions { gpu_memory_utilization, device, reserves_graph_pools: true };
            if let Ok(plan) = MemoryPlan::new(&model, &h100(), &deployment, &options) {
                prop_assert_eq!(plan.parts.total() + plan.kv + plan.unused, plan.budget);
            }
        }
    }
}

//! Several GPUs: another simulator's tables of collectives, trained, beside a shipped bundle's operators.

use std::{path::Path, sync::Arc};

use plumbline_bundles::{Bundle, EngineProfile, OutOfDomain, Predictors};
use plumbline_schema::{
    BatchShape, Deployment, EngineMode, ModelSpec, Nanos, Operator, OperatorShape, StepBatch, Workload,
};
use plumbline_simulator::{BundleTimes, SimulateOptions, StepTimeModel, simulate};

use crate::support::{arg, stdout_of, write};

struct Machine {
    predictors: Arc<Predictors>,
    profile: EngineProfile,
    model: ModelSpec,
}

/// An H100 whose links are those of an A100 node: every number is measured, though not on one machine.
fn machine() -> Machine {
    let folder = tempfile::tempdir().expect("folder");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (tables, linked) =
        (root.join("tests/data/vidur/profiling/network/a100_dgx"), folder.path().join("linked"));
    stdout_of(["bundle", "import", "vidur", arg(&tables), "--gpu", "a100", "--out", arg(&linked)]);
    stdout_of(["train", arg(&linked)]);
    let shipped = Bundle::open(&root.join("bundles/data/h100-sxm5-80gb")).expect("a shipped bundle");
    let (within, between) = (
        shipped.predictors().expect("predictors"),
        Bundle::open(&linked).and_then(|bundle| bundle.predictors()).expect("predictors"),
    );
    assert_eq!(between.operators().collect::<Vec<_>>(), [Operator::AllReduce, Operator::SendRecv]);
    let of = |predictors: &Predictors| -> Vec<_> {
        predictors
            .operators()
            .map(|operator| predictors.get(operator).expect("a predictor").clone())
            .collect()
    };
    let all = of(&within).into_iter().chain(of(&between)).collect();
    Machine {
        predictors: Arc::new(Predictors::new(within.gpu().clone(), all).expect("sound predictors")),
        profile: shipped.engine("vllm-0.24-graph").expect("a shipped profile"),
        model: ModelSpec::load("llama3-8b").expect("a shipped model"),
    }
}

impl Machine {
    fn times(&self) -> BundleTimes {
        BundleTimes::new(Arc::clone(&self.predictors), OutOfDomain::Extrapolate)
    }

    fn deployment(&self, tp: u32, pp: u32) -> Deployment {
        Deployment {
            tensor_parallel_size: tp,
            pipeline_parallel_size: pp,
            ..Deployment::defaults(&self.model, self.predictors.gpu(), EngineMode::Graph).expect("it fits")
        }
    }

    fn step_times(&self, tp: u32, pp: u32) -> StepTimeModel<BundleTimes> {
        StepTimeModel::new(&self.model, self.times(), &self.profile, &self.deployment(tp, pp))
            .expect("a model")
    }

    /// What a message of a batch's activations takes.
    fn exchange_ns(&self, operator: Operator, num_tokens: u32) -> f64 {
        let shape =
            OperatorShape::Collective { message_bytes: u64::from(num_tokens) * 4096 * 2, num_ranks: 2 };
        let predicted = self.predictors.predict_in_step(operator, &shape, OutOfDomain::Extrapolate);
        predicted.expect("a prediction").time_ns
    }
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * b.abs()
}

#[test]
fn imported_collectives_make_tensor_and_pipeline_parallel_steps() {
    let machine = machine();
    let shape =
        |chunks, decodes| -> BatchShape { StepBatch::parse(chunks, decodes).expect("a batch").shape() };
    // 1,024 tokens are above the captured sizes, 3 are padded to 4.
    for (batch, num_tokens) in [(shape("1024:0", ""), 1024), (shape("", "900;900;900"), 4)] {
        let all_reduce_ns = machine.exchange_ns(Operator::AllReduce, num_tokens);
        let send_recv_ns = machine.exchange_ns(Operator::SendRecv, num_tokens);
        let scale = machine.profile.operator_scales.other;
        let one = machine.step_times(1, 1).step_time(&batch, false).expect("a time");

        let mut model = machine.step_times(2, 1);
        let two = model.step_time(&batch, false).expect("a time");
        let usage = model.usage();
        assert!(near(usage.operators[&Operator::AllReduce].gpu_time_ns, 64.0 * all_reduce_ns * scale));
        assert!(!usage.operators.contains_key(&Operator::SendRecv));
        assert!(two.parts.gemm_ns < one.parts.gemm_ns, "each GPU has half of every matrix");

        let mut model = machine.step_times(1, 2);
        let staged = model.step_time(&batch, false).expect("a time");
        assert!(near(staged.gpu_ns, one.gpu_ns + 2.0 * send_recv_ns * scale));
        let [first, last] = *model.stage_times(&staged).expect("stages") else { panic!("two stages") };
        assert!(near(first.gpu_ns + last.gpu_ns, staged.gpu_ns));
        // Half the layers each; the first sends and has the embedding, the last the LM head.
        let (low, high) = (0.4 * one.gpu_ns, 0.6 * one.gpu_ns + 2.0 * send_recv_ns * scale);
        assert!(low < first.gpu_ns && first.gpu_ns < high, "{first:?} of {one:?}");
        assert!(low < last.gpu_ns && last.gpu_ns < high, "{last:?} of {one:?}");

        let mut model = machine.step_times(2, 2);
        model.step_time(&batch, false).expect("a time");
        let usage = model.usage();
        assert_eq!(usage.operators[&Operator::AllReduce].num_launches, 64);
        assert_eq!(usage.operators[&Operator::SendRecv].num_launches, 2);
        assert_eq!(usage.num_gpus, 2);
    }
}

#[test]
fn workloads_run_over_several_gpus() {
    let machine = machine();
    let folder = tempfile::tempdir().expect("folder");
    let rows: Vec<String> = (0..40).map(|i| format!("{i},{},600,40\n", i * 20_000_000)).collect();
    let rows = rows.concat();
    let header = "request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens\n";
    let workload = Workload::read(&write(&folder.path().join("workload.csv"), format!("{header}{rows}")));
    let workload = workload.expect("a workload");
    let options = SimulateOptions::default();
    let ends = [(1, 1), (2, 1), (1, 2), (2, 2)].map(|(tp, pp)| {
        let deployment = machine.deployment(tp, pp);
        let simulation =
            simulate(&machine.model, &workload, &deployment, &machine.profile, machine.times(), &options)
                .expect("a simulation");
        assert_eq!(simulation.counts.finished, 40, "tp {tp}, pp {pp}");
        simulation.run.requests.iter().filter_map(|request| request.completion_time_ns).max()
    });
    assert!(ends.iter().all(|end| end.is_some_and(|end| end > Nanos(780_000_000))), "{ends:?}");
}

//! The engine on a real GPU, against Hugging Face transformers; without either, each test says why it was skipped.
//!
//! `tests/transformers_reference.py` and `tests/trained_model.py` say how references are made and where the tests look for
//! them.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
};

use half::bf16;
use plumbline_engine::{
    Engine, EngineError, EngineOptions, RunOptions, Sampling, WeightSource,
    generate::{encode, read_tokenizer},
    inputs::{Draw, Part},
    serve_workload,
};
use plumbline_schema::{
    Deployment, EngineMode, ModelConfig, ModelSpec, Nanos, RequestStatus, Workload, WorkloadRequest,
};
use plumbline_simulator::{SchedulerKind, kv_cache::BlockId};
use safetensors::SafeTensors;
use serde::Deserialize;

const NEW_TOKENS: usize = 64;
/// KV blocks that each sequence of a test owns.
const BLOCKS_EACH: u32 = 40;

/// One test at a time: the device's memory is taken whole.
static GPU: Mutex<()> = Mutex::new(());

fn gpu() -> MutexGuard<'static, ()> {
    GPU.lock().unwrap_or_else(PoisonError::into_inner)
}

fn deployment(model: &ModelSpec, mode: EngineMode) -> Deployment {
    Deployment {
        max_num_batched_tokens: 1024,
        max_num_seqs: 16,
        max_model_len: 1024,
        num_gpu_blocks: 1000,
        cudagraph_sizes: if mode == EngineMode::Graph { vec![1, 2, 4, 8, 16] } else { Vec::new() },
        ..Deployment::unplanned(model, mode)
    }
}

/// An engine, or why the test is skipped.
fn start(test: &str, config: &ModelConfig, weights: WeightSource, mode: EngineMode) -> Option<Engine> {
    let model = ModelSpec::from_hf_config(&config.name, &config.text, &config.path).unwrap();
    let deployment = deployment(&model, mode);
    let options = EngineOptions { device: 0, weights, deployment, gpu_memory_utilization: 0.5 };
    match Engine::start(config, &options) {
        Ok(engine) => Some(engine),
        Err(EngineError::NoDevice(reason)) => {
            println!("SKIPPED: {test}: {reason}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A prompt, what follows it, and the logits at each of the places, by several paths.
struct Reference {
    num_prompt_tokens: usize,
    tokens: Vec<u32>,
    eager: Vec<Vec<f32>>,
    sdpa: Vec<Vec<f32>>,
    fp32: Vec<Vec<f32>>,
}

fn references(folder: &Path) -> Vec<Reference> {
    let bytes = fs::read(folder.join("reference.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let rows = |name: String| -> Vec<Vec<f32>> {
        let view = file.tensor(&name).unwrap();
        let width = view.shape()[1];
        let values: Vec<f32> = match view.dtype() {
            safetensors::Dtype::BF16 => {
                view.data().chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            _ => view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        };
        values.chunks_exact(width).map(<[f32]>::to_vec).collect()
    };
    (0..)
        .map_while(|i| {
            let view = file.tensor(&format!("tokens_{i}")).ok()?;
            let ids = view.data().chunks_exact(8);
            let tokens: Vec<u32> = ids.map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect();
            Some(Reference {
                num_prompt_tokens: tokens.len() - NEW_TOKENS,
                tokens,
                eager: rows(format!("eager_{i}")),
                sdpa: rows(format!("sdpa_{i}")),
                fp32: rows(format!("fp32_{i}")),
            })
        })
        .collect()
}

/// How sequences are put into steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Composition {
    /// One after the other: the prompt at once, then decodes.
    Alone,
    /// All together: prompts in one step, then decodes of all.
    Together,
    /// One after the other, prompts in chunks of 48.
    Chunked,
    /// Each begins three steps after the one before, in chunks of 48, while the others decode.
    Mixed,
    /// Every place anew, as one prompt.
    PrefillOnly,
}

const COMPOSITIONS: [Composition; 5] = [
    Composition::Alone,
    Composition::Together,
    Composition::Chunked,
    Composition::Mixed,
    Composition::PrefillOnly,
];

fn blocks(sequence: usize) -> Vec<BlockId> {
    let first = 1 + sequence as u32 * BLOCKS_EACH;
    (first..first + BLOCKS_EACH).map(BlockId).collect()
}

/// The logits at every place of every sequence, its own tokens fed whatever was drawn.
fn logits(engine: &mut Engine, references: &[Reference], composition: Composition) -> Vec<Vec<Vec<f32>>> {
    let mut all = vec![Vec::new(); references.len()];
    if composition == Composition::PrefillOnly {
        for (i, reference) in references.iter().enumerate() {
            for place in 0..NEW_TOKENS {
                let end = reference.num_prompt_tokens + place;
                let blocks = blocks(i);
                let part = Part {
                    tokens: &reference.tokens[..end],
                    context_len: 0,
                    blocks: &blocks,
                    is_decode: false,
                    draw: Some(Draw::GREEDY),
                };
                let rows = run(engine, &[part]);
                all[i].push(rows.into_iter().next().unwrap());
            }
        }
        return all;
    }
    let groups: Vec<Vec<usize>> = match composition {
        Composition::Together | Composition::Mixed => vec![(0..references.len()).collect()],
        _ => (0..references.len()).map(|i| vec![i]).collect(),
    };
    for group in groups {
        let mut computed = vec![0; references.len()];
        for step in 0.. {
            let is_started = |i: usize| composition != Composition::Mixed || step >= 3 * i;
            let todo: Vec<usize> =
                group.iter().copied().filter(|&i| is_started(i) && all[i].len() < NEW_TOKENS).collect();
            if todo.is_empty() && group.iter().all(|&i| all[i].len() == NEW_TOKENS) {
                break;
            }
            let tables: Vec<_> = todo.iter().map(|&i| blocks(i)).collect();
            let mut parts = Vec::new();
            for (&i, blocks) in todo.iter().zip(&tables) {
                let reference = &references[i];
                let begin = computed[i];
                let is_decode = begin >= reference.num_prompt_tokens;
                let chunk = match composition {
                    Composition::Chunked | Composition::Mixed => 48,
                    _ => usize::MAX,
                };
                let end = if is_decode {
                    begin + 1
                } else {
                    reference.num_prompt_tokens.min(begin.saturating_add(chunk))
                };
                computed[i] = end;
                parts.push(Part {
                    tokens: &reference.tokens[begin..end],
                    context_len: begin as u32,
                    blocks,
                    is_decode,
                    draw: (end >= reference.num_prompt_tokens).then_some(Draw::GREEDY),
                });
            }
            let drawn = |is_decode: bool| {
                let pairs = parts.iter().zip(&todo);
                pairs
                    .filter(move |(part, _)| part.draw.is_some() && part.is_decode == is_decode)
                    .map(|(_, &i)| i)
            };
            let order: Vec<usize> = drawn(false).chain(drawn(true)).collect();
            for (i, row) in order.into_iter().zip(run(engine, &parts)) {
                all[i].push(row);
            }
        }
    }
    all
}

/// The rows of logits of a step.
fn run(engine: &mut Engine, parts: &[Part<'_>]) -> Vec<Vec<f32>> {
    let step = engine.launch(parts).unwrap();
    let ids: Vec<u32> = engine.wait(&step).unwrap().collect();
    let vocab = engine.model().vocab_size as usize;
    let logits = engine.logits(&step).unwrap();
    let rows: Vec<Vec<f32>> = logits
        .chunks_exact(vocab)
        .map(|row| row.iter().map(|&bits| bf16::from_bits(bits).to_f32()).collect())
        .collect();
    for (row, id) in rows.iter().zip(ids) {
        assert_eq!(id as usize, argmax(row), "the token drawn is the lowest index of the largest logit");
    }
    rows
}

fn argmax(row: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = i;
        }
    }
    best
}

fn max_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let rows = a.iter().zip(b);
    rows.flat_map(|(a, b)| a.iter().zip(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn cases() -> Option<Vec<PathBuf>> {
    let Some(folder) = std::env::var_os("PLUMBLINE_REFERENCE") else {
        println!("SKIPPED: logits against transformers: PLUMBLINE_REFERENCE names no folder of references");
        return None;
    };
    let mut cases: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("reference.safetensors").exists())
        .collect();
    cases.sort();
    assert!(!cases.is_empty(), "no case in PLUMBLINE_REFERENCE");
    Some(cases)
}

/// In every composition, logits differ from transformers' eager path by no more than its SDPA path does (with the step
/// of bf16 at that size), and where the likeliest token is another, the two were as good as equal.
#[test]
fn logits_are_those_of_transformers() {
    let _guard = gpu();
    let Some(cases) = cases() else { return };
    for folder in cases {
        let references = references(&folder);
        let config = ModelConfig::find(folder.to_str().unwrap()).unwrap();
        let tolerance = references.iter().map(|r| max_difference(&r.eager, &r.sdpa)).fold(0.0, f32::max);
        let rounding = references.iter().map(|r| max_difference(&r.eager, &r.fp32)).fold(0.0, f32::max);
        let largest =
            references.iter().flat_map(|r| r.fp32.iter().flatten()).fold(0.0f32, |m, v| m.max(v.abs()));
        println!(
            "{}: eager against SDPA {tolerance:.4}, eager against fp32 {rounding:.4}, largest logit {largest:.3}",
            config.name
        );
        for mode in [EngineMode::Eager, EngineMode::Graph] {
            let weights = WeightSource::Folder(folder.clone());
            let Some(mut engine) = start("logits against transformers", &config, weights, mode) else {
                return;
            };
            for composition in COMPOSITIONS {
                let ours = logits(&mut engine, &references, composition);
                let against = |of: fn(&Reference) -> &Vec<Vec<f32>>| {
                    let pairs = ours.iter().zip(&references);
                    pairs.map(|(ours, r)| max_difference(ours, of(r))).fold(0.0, f32::max)
                };
                let (eager, fp32) = (against(|r| &r.eager), against(|r| &r.fp32));
                let mut other_tokens = 0;
                for (ours, reference) in ours.iter().zip(&references) {
                    for (place, row) in ours.iter().enumerate() {
                        let theirs = reference.tokens[reference.num_prompt_tokens + place] as usize;
                        let own = argmax(row);
                        if own != theirs {
                            other_tokens += 1;
                            let row = &reference.fp32[place];
                            let margin = row[theirs] - row[own];
                            assert!(
                                margin.abs() <= 2.0 * rounding,
                                "{composition:?}, place {place}: {margin}"
                            );
                        }
                    }
                }
                println!(
                    "  {mode:?} {composition:?}: against eager {eager:.4}, against fp32 {fp32:.4}, other tokens {other_tokens} of {}",
                    references.len() * NEW_TOKENS
                );
                assert!(eager <= tolerance.max(2.0 * rounding), "{composition:?}: {eager} of {tolerance}");
                assert!(fp32 <= 1.25 * rounding, "{composition:?}: {fp32} of {rounding}");
            }
        }
    }
}

/// A prompt out of a text that the model knows, and transformers' greedy completion of it.
#[derive(Deserialize)]
struct Generated {
    prompt: String,
    prompt_token_ids: Vec<u32>,
    completion_token_ids: Vec<u32>,
    completion: String,
}

/// A model that knows its text gives exactly transformers' tokens and text, from bf16 and fp16 weights.
#[test]
fn completions_are_those_of_transformers() {
    let _guard = gpu();
    let Some(folder) = std::env::var_os("PLUMBLINE_TRAINED") else {
        println!("SKIPPED: completions: PLUMBLINE_TRAINED names no folder of trained models");
        return;
    };
    let mut folders: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert_eq!(folders.len(), 4, "two models in two types each");
    for folder in folders {
        let text = fs::read_to_string(folder.join("generated.json")).unwrap();
        let cases: Vec<Generated> = serde_json::from_str(&text).unwrap();
        let tokenizer = read_tokenizer(&folder).unwrap();
        let config = ModelConfig::find(folder.to_str().unwrap()).unwrap();
        for mode in [EngineMode::Eager, EngineMode::Graph] {
            let weights = WeightSource::Folder(folder.clone());
            let Some(mut engine) = start("completions", &config, weights, mode) else { return };
            let stop = AtomicBool::new(false);
            for case in &cases {
                let prompt = encode(&tokenizer, &case.prompt).unwrap();
                assert_eq!(prompt, case.prompt_token_ids);
                let done = engine.complete(&prompt, NEW_TOKENS, Sampling::default(), &stop, |_| ()).unwrap();
                assert_eq!(done.tokens, case.completion_token_ids, "after {:?}", case.prompt);
                assert_eq!(tokenizer.decode(&done.tokens, false).unwrap(), case.completion);
            }
            println!("{} {mode:?}: {} completions, each as transformers'", folder.display(), cases.len());
        }
    }
}

fn small_model() -> ModelConfig {
    let text = r#"{"model_type":"qwen3","hidden_size":256,"num_hidden_layers":3,"num_attention_heads":4,
        "num_key_value_heads":2,"head_dim":64,"intermediate_size":512,"vocab_size":2048,
        "max_position_embeddings":4096,"tie_word_embeddings":true,"rms_norm_eps":1e-6,"rope_theta":1000000}"#;
    ModelConfig { name: "small".to_owned(), text: text.to_owned(), path: PathBuf::from("small") }
}

fn workload() -> Workload {
    let lengths = [(5, 20), (300, 9), (64, 40), (17, 1), (129, 30), (2, 33)];
    let requests = lengths.iter().zip(0..);
    Workload {
        requests: requests
            .map(|(&(prefill, decode), id)| WorkloadRequest::new(id, Nanos(id * 2_000_000), prefill, decode))
            .collect(),
    }
}

fn options(scheduler: SchedulerKind, sampling: Sampling) -> RunOptions {
    RunOptions {
        scheduler,
        sampling,
        keeps_outputs: true,
        workload_digest: None,
        gpu: None,
        weights: "random weights".to_owned(),
        warm_up: None,
    }
}

/// Requests get their tokens, steps their phases, and phases their sums; in either mode and by any scheduler.
#[test]
fn a_workload_becomes_a_run() {
    let _guard = gpu();
    for mode in [EngineMode::Eager, EngineMode::Graph] {
        let name = "a workload";
        let Some(mut engine) = start(name, &small_model(), WeightSource::Random(3), mode) else { return };
        let stop = AtomicBool::new(false);
        for scheduler in [SchedulerKind::VllmV1, SchedulerKind::Sarathi, SchedulerKind::VllmV0] {
            let options = options(scheduler, Sampling::default());
            let real = serve_workload(&mut engine, &workload(), &options, &stop).unwrap();
            assert!(real.error.is_none(), "{:?}", real.error);
            assert!(real.run.requests.iter().all(|r| r.status == RequestStatus::Ok));
            let lengths: Vec<u32> = real.run.requests.iter().map(|r| r.num_decode_tokens_actual).collect();
            assert_eq!(lengths, [20, 9, 40, 1, 30, 33]);
            assert_eq!(real.run.tokens.len(), 133);
            for step in &real.run.steps {
                let phases = step.phases.unwrap();
                let sum = step.schedule_ns
                    + phases.prepare_ns
                    + phases.launch_ns
                    + phases.wait_ns
                    + phases.sample_ns;
                assert!(sum <= step.step_duration_ns, "{step:?}");
                assert!(step.step_duration_ns.0 - sum.0 < 200_000, "{step:?}");
            }
            let conduct = real.run.info.conduct.unwrap();
            assert_eq!(conduct.graph_steps > 0, mode == EngineMode::Graph);
            assert!(conduct.host_scores.len() >= 2);
        }
    }
}

/// A draw depends on the request and the place alone; greedy draws are those of temperature 0.
#[test]
fn draws_follow_their_seed() {
    let _guard = gpu();
    let name = "draws";
    let Some(mut engine) = start(name, &small_model(), WeightSource::Random(3), EngineMode::Graph) else {
        return;
    };
    let stop = AtomicBool::new(false);
    let mut outputs = |temperature, top_p, seed| {
        let sampling = Sampling { temperature, top_p, seed };
        let options = options(SchedulerKind::VllmV1, sampling);
        let mut outputs = serve_workload(&mut engine, &workload(), &options, &stop).unwrap().outputs;
        outputs.sort();
        outputs
    };
    let first = outputs(1.0, 0.9, 1);
    assert_eq!(first.len(), 6);
    assert_eq!(first, outputs(1.0, 0.9, 1));
    let other = outputs(1.0, 0.9, 2);
    assert_ne!(first, other);
    assert_eq!(outputs(0.0, 1.0, 5), outputs(1e-4, 1e-6, 5), "almost no probability is left to others");
}

/// Of a row of logits the kernel draws as often as the softmax says, and nothing beyond top-p.
#[test]
fn draws_are_distributed_as_the_softmax() {
    let _guard = gpu();
    let name = "the distribution of draws";
    let Some(mut engine) = start(name, &small_model(), WeightSource::Random(3), EngineMode::Eager) else {
        return;
    };
    let tokens = [5u32, 9, 70, 8];
    let table = blocks(0);
    let part =
        |draw| Part { tokens: &tokens, context_len: 0, blocks: &table, is_decode: false, draw: Some(draw) };
    let row = run(&mut engine, &[part(Draw::GREEDY)]).remove(0);
    // The logits of random weights are small: a low temperature makes the distribution uneven.
    let inverse_temperature = 8.0f32;
    let most = row.iter().copied().fold(f32::MIN, f32::max);
    let weights: Vec<f64> = row.iter().map(|v| f64::from((v - most) * inverse_temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
    for top_p in [1.0f32, 0.3] {
        let mut kept = vec![false; row.len()];
        let mut sum = 0.0;
        for &i in &order {
            // Equal logits stay or go together.
            if sum >= f64::from(top_p) * total && row[i] < row[order[kept.iter().filter(|&&k| k).count() - 1]]
            {
                break;
            }
            kept[i] = true;
            sum += weights[i];
        }
        let mut mistakes = 0;
        let count = 500;
        let mut expected = Vec::new();
        for n in 0..count {
            let target = f64::from(n as f32 / count as f32) * sum;
            while expected.len() <= n as usize {
                let mut cumulated = 0.0;
                let chosen = (0..row.len()).filter(|&i| kept[i]).find(|&i| {
                    cumulated += weights[i];
                    cumulated > target
                });
                expected.push(chosen.unwrap());
            }
            let draw = Draw { inverse_temperature, top_p, uniform: n as f32 / count as f32 };
            let step = engine.launch(&[part(draw)]).unwrap();
            let id = engine.wait(&step).unwrap().next().unwrap() as usize;
            assert!(kept[id], "top_p {top_p}: {id} is no candidate");
            mistakes += u32::from(id != expected[n as usize]);
        }
        // Sums in another precision may fall to the neighbour at an edge.
        assert!(mistakes <= count / 50, "{mistakes} of {count}");
    }
}

/// Asked to stop, a run ends at once and keeps what it has.
#[test]
fn an_interrupted_run_is_kept_as_incomplete() {
    let _guard = gpu();
    let name = "an interruption";
    let Some(mut engine) = start(name, &small_model(), WeightSource::Random(3), EngineMode::Graph) else {
        return;
    };
    let stop = AtomicBool::new(false);
    let mut workload = workload();
    workload.requests.push(WorkloadRequest::new(9, Nanos(3_000_000_000), 5, 5));
    let real = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(1500));
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        let options = options(SchedulerKind::VllmV1, Sampling::default());
        serve_workload(&mut engine, &workload, &options, &stop).unwrap()
    });
    assert!(matches!(real.error, Some(EngineError::Interrupted)));
    let statuses: Vec<_> = real.run.requests.iter().map(|r| r.status).collect();
    assert_eq!(statuses.len(), 7);
    assert!(statuses[..6].iter().all(|&status| status == RequestStatus::Ok), "{statuses:?}");
    assert_eq!(statuses[6], RequestStatus::Incomplete);
    let folder = tempfile::tempdir().unwrap();
    real.write(folder.path()).unwrap();
    let read = plumbline_schema::Run::read(folder.path()).unwrap();
    assert_eq!(read.info.conduct.unwrap().incomplete.as_deref(), Some("interrupted"));
    assert_eq!(read.steps, real.run.steps);
}

/// Memory that is not there is told before anything runs.
#[test]
fn too_little_memory_is_told_in_words() {
    let _guard = gpu();
    let config = ModelConfig::find("llama3-8b").unwrap();
    let model = ModelSpec::load("llama3-8b").unwrap();
    let deployment = Deployment { num_gpu_blocks: 1 << 23, ..deployment(&model, EngineMode::Eager) };
    let options = EngineOptions {
        device: 0,
        weights: WeightSource::Random(1),
        deployment,
        gpu_memory_utilization: 0.9,
    };
    match Engine::start(&config, &options) {
        Err(EngineError::NoDevice(reason)) => println!("SKIPPED: too little memory: {reason}"),
        Err(EngineError::OutOfMemory { what, .. }) => assert_eq!(what, "the KV cache"),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("a terabyte of KV cache was found"),
    }
}

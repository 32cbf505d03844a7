//! How well and how fast tables measured for Vidur are learned.
//!
//! Each column of a model's `mlp.csv` and `attention.csv` is trained by itself, as an operator of the same traffic: what
//! reads a row and writes one as an embedding, what reads two and writes one as a gated activation. Run it with
//!
//! ```text
//! cargo run --release -p plumbline-trainer --example vidur_tables -- tables MLP ATTENTION [OUT]
//! cargo run --release -p plumbline-trainer --example vidur_tables -- left-out MLP MLP MLP...
//! ```
//!
//! on files of Vidur's `data/profiling` tree. With OUT the rows and their folds are written there, so that
//! `benches/vidur_tables.py` can give scikit-learn the very same ones.

use std::{collections::BTreeMap, error::Error, fmt::Write as _, path::Path, time::Instant};

use plumbline_bundles::{
    OutOfDomain, Predictors, Sample, TimeStats,
    import::{
        mlp::{Keys, SOURCES, heads},
        tables::{Table, time_column},
    },
    stats::percentile_of_sorted,
};
use plumbline_schema::{GpuSpec, Operator, OperatorShape, PrefillChunk, StepBatch, roofline::floor_ns};
use plumbline_trainer::{HeldOutPoint, HeldOutWay, TrainOptions, train};

/// The GPU of the tables; an A800 is an A100 with another `NVLink`.
const GPU: &str = "a100-sxm4-80gb";

/// A column of a table: one measured launch a row.
struct Column {
    name: String,
    samples: Vec<Sample>,
    /// Numbers that the table itself has for each launch, as Vidur trains on them.
    keys: BTreeMap<Vec<u64>, [u64; 2]>,
}

impl Column {
    fn new(name: &str) -> Self {
        Self { name: name.to_owned(), samples: Vec::new(), keys: BTreeMap::new() }
    }

    fn push(&mut self, operator: Operator, shape: OperatorShape, keys: [u64; 2], median_ms: &str) {
        let Ok(median_ms) = median_ms.parse::<f64>() else { return };
        let Some(stats) = TimeStats::from_times(&[median_ms * 1e6]) else { return };
        self.keys.insert(shape.values(), keys);
        self.samples.push(Sample::bare(operator, shape, stats));
    }
}

/// The columns of an `mlp.csv`.
fn read_mlp(path: &Path) -> Result<Vec<Column>, Box<dyn Error>> {
    let table = Table::read(path)?;
    let mut columns = Vec::new();
    for name in SOURCES {
        let median = time_column(name, "median");
        if !table.has(&median) {
            continue;
        }
        let mut column = Column::new(name);
        for row in table.rows() {
            let keys = Keys::read(&row)?;
            let Keys { num_tokens: m, hidden_size: hidden, heads, intermediate_size: inner, .. } = keys;
            let (is_gated, ranks) = (keys.is_gated, keys.tensor_parallel_size);
            let (q_width, kv_width) = (heads.q_width() as u32, heads.kv_width() as u32);
            let gemm = |n, k| OperatorShape::Gemm { m, n, k };
            let copied = |hidden_size| OperatorShape::Embedding { num_tokens: m, hidden_size };
            let joined = |intermediate_size| OperatorShape::SiluMul { num_tokens: m, intermediate_size };
            let (operator, shape) = match name {
                "attn_pre_proj" => (Operator::QkvProj, gemm(q_width + 2 * kv_width, hidden)),
                "attn_post_proj" => (Operator::OProj, gemm(hidden, q_width)),
                "mlp_up_proj" => (Operator::GateUpProj, gemm(if is_gated { 2 } else { 1 } * inner, hidden)),
                "mlp_down_proj" => (Operator::DownProj, gemm(hidden, inner)),
                "attn_rope" => (Operator::Rope, OperatorShape::Rope { num_tokens: m, heads }),
                "mlp_act" if is_gated => (Operator::SiluMul, joined(inner)),
                "mlp_act" => (Operator::Embedding, copied(inner)),
                "add" => (Operator::SiluMul, joined(hidden)),
                _ => (Operator::Embedding, copied(hidden)),
            };
            column.push(operator, shape, [m.into(), ranks.into()], row.text(&median).unwrap_or_default());
        }
        columns.push(column);
    }
    Ok(columns)
}

/// The columns of an `attention.csv`; writes of the KV cache apart for chunks and decodes, as the table has two laws.
fn read_attention(path: &Path) -> Result<Vec<Column>, Box<dyn Error>> {
    let table = Table::read(path)?;
    let names =
        ["attn_kv_cache_save of chunks", "attn_kv_cache_save of decodes", "attn_prefill", "attn_decode"];
    let [mut of_chunks, mut of_decodes, mut prefill, mut decode] = names.map(Column::new);
    let mut saves: BTreeMap<(bool, u32, u32, u32), Vec<f64>> = BTreeMap::new();
    for row in table.rows() {
        let number = |key: &str| row.whole(key, 0).map(|value| value as u32);
        let (heads, _) = heads(&row, "n_q_head")?;
        let (seqs, chunk, context) =
            (number("batch_size")?, number("prefill_chunk_size")?, number("kv_cache_size")?);
        let is_prefill = row.flag("is_prefill")?;
        let mut batch = StepBatch::default();
        if is_prefill {
            batch.prefill_chunks.push(PrefillChunk { num_tokens: chunk, context_len: context });
        } else {
            batch.decode_contexts = vec![context; seqs as usize];
        }
        let load = batch.shape().attention;
        let (column, name, first) = if is_prefill {
            (&mut prefill, "attn_prefill", chunk)
        } else {
            (&mut decode, "attn_decode", seqs)
        };
        let median = row.text(&time_column(name, "median")).unwrap_or_default();
        let shape = OperatorShape::Attention { heads, load };
        column.push(Operator::Attention, shape, [first.into(), context.into()], median);
        let saved =
            row.text(&time_column("attn_kv_cache_save", "median")).and_then(|text| text.parse::<f64>().ok());
        let key = (is_prefill, load.num_tokens(), heads.num_kv_heads, heads.head_dim);
        saves.entry(key).or_default().extend(saved);
    }
    for ((is_prefill, num_tokens, num_kv_heads, head_dim), mut times) in saves {
        times.sort_by(f64::total_cmp);
        if times.is_empty() {
            continue;
        }
        let column = if is_prefill { &mut of_chunks } else { &mut of_decodes };
        let shape = OperatorShape::KvCacheWrite { num_tokens, num_kv_heads, head_dim };
        let keys = [num_tokens.into(), 0];
        column.push(Operator::KvCacheWrite, shape, keys, &percentile_of_sorted(&times, 0.5).to_string());
    }
    let all = [of_chunks, of_decodes, prefill, decode];
    Ok(all.into_iter().filter(|column| !column.samples.is_empty()).collect())
}

/// Mean absolute error and signed bias in %, and the share of points inside the interval.
fn judge<'a>(points: impl Iterator<Item = &'a HeldOutPoint>) -> (usize, f64, f64, f64) {
    let (mut n, mut sum, mut bias, mut inside) = (0usize, 0.0, 0.0, 0usize);
    for point in points {
        let error = point.predicted_ns / point.measured_ns - 1.0;
        n += 1;
        sum += error.abs();
        bias += error;
        inside += usize::from((point.low_ns..=point.high_ns).contains(&point.measured_ns));
    }
    let count = n.max(1) as f64;
    (n, 100.0 * sum / count, 100.0 * bias / count, 100.0 * inside as f64 / count)
}

/// Mean absolute error in % of all folds but the one that errs most, which an edge of a kernel of its own can be.
fn but_worst<'a>(points: impl Iterator<Item = &'a HeldOutPoint>) -> f64 {
    let mut folds: BTreeMap<u32, Vec<&HeldOutPoint>> = BTreeMap::new();
    points.for_each(|point| folds.entry(point.fold).or_default().push(point));
    let errors = folds.into_values().map(|points| judge(points.into_iter()));
    let mut errors: Vec<(usize, f64)> = errors.map(|(n, error, ..)| (n, error)).collect();
    errors.sort_by(|a, b| a.1.total_cmp(&b.1));
    errors.pop();
    let count: usize = errors.iter().map(|(n, _)| n).sum();
    errors.iter().map(|(n, error)| *n as f64 * error).sum::<f64>() / count.max(1) as f64
}

/// The largest memory this process has held, MB; `None` where the system does not tell.
fn peak_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? * 1024.0 / 1e6)
}

fn tables(mlp: &Path, attention: &Path, out: Option<&Path>) -> Result<(), Box<dyn Error>> {
    let gpu = GpuSpec::by_name(GPU).ok_or("a shipped GPU")?;
    let options = TrainOptions { num_folds: 10, ..TrainOptions::default() };
    let start = Instant::now();
    let columns: Vec<Column> = read_mlp(mlp)?.into_iter().chain(read_attention(attention)?).collect();
    let read_s = start.elapsed().as_secs_f64();
    println!(
        "{:30} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7} {:>10}",
        "table", "shapes", "shuffled%", "bias%", "inside%", "blocked%", "inside%", "s", "but worst%"
    );
    let (mut num_bytes, mut under_floor) = (0, 0);
    let mut all: Vec<HeldOutPoint> = Vec::new();
    let mut blocked_errors = Vec::new();
    for column in &columns {
        let start = Instant::now();
        let outcome = train(&column.samples, &gpu, &options, |_| ())?;
        let seconds = start.elapsed().as_secs_f64();
        let of_way = |way: HeldOutWay| outcome.held_out.iter().filter(move |point| point.way == way);
        let (n, shuffled, bias, inside) = judge(of_way(HeldOutWay::Shuffled));
        let (_, blocked, _, inside_blocked) = judge(of_way(HeldOutWay::Blocked));
        println!(
            "{:30} {n:>6} {shuffled:>9.2} {bias:>9.2} {inside:>9.1} {blocked:>9.2} {inside_blocked:>9.1} {seconds:>7.2} {:>10.2}",
            column.name,
            but_worst(of_way(HeldOutWay::Blocked))
        );
        blocked_errors.push(blocked);
        num_bytes +=
            outcome.predictors.iter().map(|p| p.to_json().map_or(0, |json| json.len())).sum::<usize>();
        let is_under = |point: &&HeldOutPoint| point.predicted_ns < floor_ns(&point.shape, &gpu);
        under_floor += outcome.held_out.iter().filter(is_under).count();
        if let Some(out) = out {
            write_rows(out, column, &outcome.held_out)?;
        }
        all.extend(outcome.held_out);
    }
    let pooled = |is_wanted: fn(&HeldOutPoint) -> bool| {
        judge(all.iter().filter(|point| point.way == HeldOutWay::Shuffled && is_wanted(point))).3
    };
    println!(
        "inside the 90 % interval, shuffled: all {:.1} %, matrix products {:.1} %, attention {:.1} %, others {:.1} %",
        pooled(|_| true),
        pooled(|point| point.operator.is_gemm()),
        pooled(|point| point.operator == Operator::Attention),
        pooled(|point| !point.operator.is_gemm() && point.operator != Operator::Attention),
    );
    println!(
        "blocked, mean of tables: {:.2} %; predictions under the physical floor: {under_floor}",
        blocked_errors.iter().sum::<f64>() / blocked_errors.len() as f64
    );
    println!(
        "read in {read_s:.2} s, all in {:.2} s, peak memory {:.0} MB, predictors {:.2} MB",
        start.elapsed().as_secs_f64(),
        peak_mb().unwrap_or(f64::NAN),
        num_bytes as f64 / 1e6
    );
    Ok(())
}

/// Writes a column's rows: the table's own numbers, the time and both folds.
fn write_rows(out: &Path, column: &Column, points: &[HeldOutPoint]) -> Result<(), Box<dyn Error>> {
    let mut rows: BTreeMap<Vec<u64>, (f64, [u32; 2], [f64; 2])> = BTreeMap::new();
    for point in points.iter().filter(|point| point.way != HeldOutWay::Layouts) {
        let row = rows.entry(point.shape.values()).or_insert((point.measured_ns, [0; 2], [0.0; 2]));
        let which = usize::from(point.way == HeldOutWay::Blocked);
        row.1[which] = point.fold;
        row.2[which] = point.predicted_ns;
    }
    let mut text = String::from(
        "key0,key1,time_ns,shuffled_fold,blocked_fold,shuffled_prediction_ns,blocked_prediction_ns\n",
    );
    for (shape, (time_ns, folds, predicted)) in rows {
        let [first, second] = column.keys[&shape];
        writeln!(
            text,
            "{first},{second},{time_ns},{},{},{},{}",
            folds[0], folds[1], predicted[0], predicted[1]
        )?;
    }
    std::fs::create_dir_all(out)?;
    std::fs::write(out.join(format!("{}.csv", column.name.replace(' ', "_"))), text)?;
    Ok(())
}

/// Trains on all tables but one and predicts that one, each in turn.
fn left_out(paths: &[&Path]) -> Result<(), Box<dyn Error>> {
    let gpu = GpuSpec::by_name(GPU).ok_or("a shipped GPU")?;
    let tables: Vec<Vec<Column>> = paths.iter().map(|path| read_mlp(path)).collect::<Result<_, _>>()?;
    let options = TrainOptions { num_folds: 2, ..TrainOptions::default() };
    let mut all = Vec::new();
    for (i, left_out) in tables.iter().enumerate() {
        let mut of_model = Vec::new();
        for column in left_out {
            let is_like = |other: &&Column| {
                other.name == column.name
                    || (column.samples[0].operator.is_gemm() && other.samples[0].operator.is_gemm())
            };
            let others = tables.iter().enumerate().filter(|(j, _)| *j != i).flat_map(|(_, table)| table);
            let operator = column.samples[0].operator;
            let relabelled = others.filter(is_like).flat_map(|other| other.samples.iter().cloned());
            let like_this = |mut sample: Sample| {
                sample.operator = if sample.operator.is_gemm() { operator } else { sample.operator };
                sample
            };
            let samples: Vec<Sample> =
                relabelled.map(like_this).filter(|sample| sample.operator == operator).collect();
            if samples.is_empty() {
                continue;
            }
            let predictors =
                Predictors::new(gpu.clone(), train(&samples, &gpu, &options, |_| ())?.predictors)?;
            let mut errors = Vec::new();
            for sample in &column.samples {
                let answer = predictors.predict(operator, &sample.shape, OutOfDomain::Extrapolate)?;
                errors.push(100.0 * (answer.time_ns / sample.stats.p50_ns - 1.0).abs());
            }
            println!("{:60} {:26} {}", paths[i].display(), column.name, quantiles(&mut errors));
            of_model.extend(errors);
        }
        println!("{:60} {:26} {}", paths[i].display(), "all operators", quantiles(&mut of_model));
        all.extend(of_model);
    }
    println!("{:60} {:26} {}", "all models", "all operators", quantiles(&mut all));
    Ok(())
}

fn quantiles(errors: &mut [f64]) -> String {
    errors.sort_by(f64::total_cmp);
    let mean = errors.iter().sum::<f64>() / errors.len().max(1) as f64;
    let at = |q| percentile_of_sorted(errors, q);
    format!(
        "n {:6} mean {mean:6.2} p50 {:6.2} p90 {:6.2} p99 {:6.2} %",
        errors.len(),
        at(0.5),
        at(0.9),
        at(0.99)
    )
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let paths: Vec<&Path> = args.iter().skip(1).map(Path::new).collect();
    match (args.first().map(String::as_str), paths.as_slice()) {
        (Some("tables"), [mlp, attention]) => tables(mlp, attention, None),
        (Some("tables"), [mlp, attention, out]) => tables(mlp, attention, Some(out)),
        (Some("left-out"), [_, _, ..]) => left_out(&paths),
        _ => Err("usage: vidur_tables tables MLP ATTENTION [OUT] | left-out MLP MLP MLP...".into()),
    }
}

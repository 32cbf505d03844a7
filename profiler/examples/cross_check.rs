//! Times some twenty points on the first GPU by events, as the profiler does, and by CUPTI's records of their kernels.
//!
//! `cargo run --release -p plumbline-profiler --example cross_check`, with the folder of `libcupti.so.13` or `.12` in
//! `LD_LIBRARY_PATH` where it does not lie beside the other CUDA libraries.
//!
//! All points are timed by events before anything is recorded and once more after; the difference is what CUPTI leaves
//! behind. A point that fails is listed, and the others go on.

use std::process::ExitCode;

use plumbline_bundles::{CacheState, CrossCheck};
use plumbline_profiler::{
    ActivityTimes, CrossCheckOutcome, CudaDevice, Device, Point, ProfileError, StoppingRule,
    cuda::RecordedWay,
};
use plumbline_schema::{ModelSpec, Operator, OperatorShape, StepBatch, forward_pass};

/// Warmed up as long as the recorded launches, so that both run at the same clocks.
const RULE: StoppingRule = StoppingRule {
    min_samples: 20,
    max_samples: 60,
    max_relative_error: 0.002,
    time_limit_ns: 200_000_000,
    warm_up_ns: 150_000_000,
    pause_ns: 0,
};

const WAYS: [(&str, RecordedWay); 2] = [("graph", RecordedWay::Graph), ("stream", RecordedWay::Stream)];

type AnyError = Box<dyn std::error::Error>;

/// A point and what was found of it.
struct Row {
    name: String,
    point: Point,
    cache: CacheState,
    event_ns: Option<f64>,
    event_after_ns: Option<f64>,
    /// As in [`WAYS`].
    recorded: Vec<Option<ActivityTimes>>,
}

impl Row {
    fn new(name: String, point: Point) -> Self {
        let cache = CacheState::in_model(point.operator);
        Self { name, point, cache, event_ns: None, event_after_ns: None, recorded: Vec::new() }
    }

    /// How the time by events compares with what was recorded of the launches in the graph, or else in the stream.
    fn compare(&self, gap_ns: f64) -> Option<CrossCheck> {
        let times = self.recorded.iter().flatten().next()?;
        Some(CrossCheck::new(
            (self.point.operator, &self.point.shape, self.cache),
            self.event_ns?,
            times.duration.p50_ns,
            times.period.map(|period| period.p50_ns),
            times.event.map(|event| event.p50_ns),
            gap_ns,
        ))
    }
}

/// Sequences of an attention launch: chunks as `tokens:context;...`, and decodes as how many at which context.
fn batch(chunks: &str, num_decodes: usize, context: u32) -> Result<StepBatch, String> {
    StepBatch::parse(chunks, &vec![context.to_string(); num_decodes].join(";"))
}

fn points_of(model: &str) -> Result<Vec<Row>, AnyError> {
    let spec = ModelSpec::load(model)?;
    let mut rows = Vec::new();
    let mut add = |label: String, batch: &StepBatch, operator: Operator| -> Result<(), AnyError> {
        let calls = forward_pass(&spec, &batch.shape(), 1)?;
        let Some(call) = calls.iter().find(|call| call.operator == operator) else { return Ok(()) };
        let is_attention = matches!(call.shape, OperatorShape::Attention { .. });
        let point = Point { operator, shape: call.shape, batch: is_attention.then(|| batch.clone()) };
        rows.push(Row::new(format!("{model} {operator} {label}"), point));
        Ok(())
    };
    for (label, batch) in [
        ("decode 1 x 512", batch("", 1, 512)?),
        ("decode 64 x 1024", batch("", 64, 1024)?),
        ("prefill 2048", batch("2048:0", 0, 0)?),
        ("prefill 256 + decode 32 x 512", batch("256:0", 32, 512)?),
    ] {
        add(label.to_owned(), &batch, Operator::Attention)?;
    }
    for m in [1, 8, 256, 2048] {
        let tokens = batch(&format!("{m}:0"), 0, 0)?;
        add(format!("m={m}"), &tokens, Operator::GateUpProj)?;
    }
    add("m=8".to_owned(), &batch("8:0", 0, 0)?, Operator::DownProj)?;
    for m in [1, 2048] {
        let tokens = batch(&format!("{m}:0"), 0, 0)?;
        for operator in [Operator::RmsNorm, Operator::SiluMul, Operator::Embedding] {
            // The elementwise kernels are the same for all models.
            if model == "qwen3-0.6b" {
                add(format!("m={m}"), &tokens, operator)?;
            }
        }
    }
    Ok(rows)
}

/// Times every point by events; failures go to stderr. An error is the device's loss.
fn by_events(
    device: &mut CudaDevice,
    rows: &mut [Row],
    mut keep: impl FnMut(&mut Row, f64),
) -> Result<(), ProfileError> {
    for row in rows {
        match device.measure(&row.point, row.cache, &RULE) {
            Ok(measured) => keep(row, measured.stats.p50_ns),
            Err(error @ ProfileError::Operator { fatal: true, .. }) => return Err(error),
            Err(error) => eprintln!("{}: by events: {error}", row.name),
        }
    }
    Ok(())
}

fn by_records(device: &mut CudaDevice, rows: &mut [Row]) -> Result<(), ProfileError> {
    for row in rows {
        for (name, way) in WAYS {
            row.recorded.push(match device.cross_check_by(&row.point, row.cache, way, 0)? {
                CrossCheckOutcome::Times(times) => Some(times),
                CrossCheckOutcome::Unavailable { reason } => {
                    eprintln!("{}: {name}: not recorded: {reason}", row.name);
                    None
                }
            });
        }
    }
    Ok(())
}

fn micros(ns: Option<f64>) -> String {
    ns.map_or_else(|| "-".to_owned(), |ns| format!("{:.2}", ns / 1e3))
}

fn percent(of: Option<f64>, from: Option<f64>) -> String {
    of.zip(from).map_or_else(|| "-".to_owned(), |(of, from)| format!("{:+.1}", 100.0 * (of / from - 1.0)))
}

fn print_table(rows: &[Row], gap_ns: f64) {
    println!(
        "\nus, medians; duration, period and event of the recorded runs in a graph | in a stream; gap = event - \
         duration\n"
    );
    println!(
        "{:<50} {:4} {:>9} {:>7} | {:>9} {:>9} {:>9} {:>8} | {:>9} {:>9} {:>9} | {:>6} {:>8} {:>7}",
        "point",
        "",
        "event",
        "after %",
        "duration",
        "period",
        "rec.event",
        "per/rec%",
        "duration",
        "period",
        "rec.event",
        "gap",
        "ev/per %",
        "agrees"
    );
    for row in rows {
        let of = |way: usize| {
            let times = row.recorded.get(way).and_then(Option::as_ref);
            let p50 = |stats: Option<plumbline_bundles::TimeStats>| stats.map(|stats| stats.p50_ns);
            [
                p50(times.map(|times| times.duration)),
                p50(times.and_then(|times| times.period)),
                p50(times.and_then(|times| times.event)),
            ]
        };
        let ([duration, period, event], stream) = (of(0), of(1));
        let compared = row.compare(gap_ns);
        println!(
            "{:<50} {:4} {:>9} {:>7} | {:>9} {:>9} {:>9} {:>8} | {:>9} {:>9} {:>9} | {:>6} {:>8} {:>7}",
            row.name,
            row.cache.name(),
            micros(row.event_ns),
            percent(row.event_after_ns, row.event_ns),
            micros(duration),
            micros(period),
            micros(event),
            percent(period, event),
            micros(stream[0]),
            micros(stream[1]),
            micros(stream[2]),
            micros(compared.as_ref().map(|c| c.event_p50_ns - c.activity_duration_p50_ns)),
            percent(row.event_ns, period),
            compared.map_or("-", |c| if c.agrees { "yes" } else { "NO" }),
        );
    }
}

fn print_kernels(rows: &[Row]) {
    println!("\nkernels of a launch");
    for row in rows {
        if let Some(times) = row.recorded.iter().flatten().next() {
            let short: Vec<String> =
                times.kernel_names.iter().map(|name| name.chars().take(100).collect()).collect();
            println!("{:<50} {} {}", row.name, times.num_kernels_per_launch, short.join(" + "));
        }
    }
}

fn print_summary(rows: &[Row], gap_ns: f64) {
    let compared: Vec<_> = rows.iter().filter_map(|row| row.compare(gap_ns)).collect();
    let count = |holds: &dyn Fn(&CrossCheck) -> bool| compared.iter().filter(|c| holds(c)).count();
    let agree = count(&|c| c.agrees);
    let within = count(&|c| {
        // The duration leaves out the gaps and the period has longer ones: what is true lies between, to within 1 %.
        let longest = c.activity_period_p50_ns.unwrap_or(f64::INFINITY);
        c.activity_duration_p50_ns <= 1.01 * c.event_p50_ns && c.event_p50_ns <= 1.01 * longest
    });
    let clocks = count(&|c| {
        c.activity_period_p50_ns
            .zip(c.recorded_event_p50_ns)
            .is_some_and(|(period, event)| CrossCheck::times_agree(event, period))
    });
    println!(
        "\n{} points, {} recorded: {agree} agree; {within} lie between duration and period; in {clocks} the period \
         and the events of the same run agree; gap of empty kernels {:.0} ns",
        rows.len(),
        compared.len(),
        gap_ns
    );
}

fn run() -> Result<(), AnyError> {
    let mut device = CudaDevice::open(0)?;
    let mut rows = points_of("qwen3-0.6b")?;
    rows.extend(points_of("llama3-8b")?);
    println!("{}, driver {:?}", device.identity().device_name, device.identity().driver_version);
    let gap_ns = match device.host_costs() {
        Ok(costs) => costs.kernel_gap_ns.p50_ns,
        Err(error) => {
            eprintln!("no gap: {error}");
            f64::NAN
        }
    };
    eprintln!("{} points by events", rows.len());
    by_events(&mut device, &mut rows, |row, ns| row.event_ns = Some(ns))?;
    eprintln!("by records");
    let recorded = by_records(&mut device, &mut rows);
    if recorded.is_ok() {
        eprintln!("by events again");
        by_events(&mut device, &mut rows, |row, ns| row.event_after_ns = Some(ns))?;
    }
    print_table(&rows, gap_ns);
    print_kernels(&rows);
    print_summary(&rows, gap_ns);
    Ok(recorded?)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

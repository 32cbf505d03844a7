//! Does asking the advisor make a profile better at the same time? Replays measured pools in different orders.
//!
//! `cargo run --release -p plumbline-trainer --example advised -- [h100|fake] [SEEDS]` prints, for each strategy, the
//! mean over seeds of the error-versus-time curve; `-- operators` each operator's error on the H100 at a fifth of the
//! time; `-- speed` how long one look takes on one thread.

#[path = "../tests/integration/replay.rs"]
mod replay;

use std::{collections::BTreeMap, time::Instant};

use plumbline_profiler::{Envelope, Plan};
use plumbline_schema::{ModelSpec, Operator};
use plumbline_trainer::advise::{Advice, AdviceOptions};

use replay::{Pool, Strategy, mean};

/// Shares of the whole pool's time.
const LOOKS: [f64; 7] = [0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65];

const STRATEGIES: [Strategy; 5] =
    [Strategy::InOrder, Strategy::Random, Strategy::Turns, Strategy::Spread, Strategy::Advised];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let pool = arguments.first().map_or("h100", String::as_str);
    let seeds: u64 = arguments.get(1).map_or(Ok(4), |text| text.parse())?;
    match pool {
        "h100" => curves(&Pool::h100(), seeds),
        "fake" => curves(&Pool::fake(1), seeds),
        "operators" => operators(&Pool::h100(), seeds),
        "speed" => speed()?,
        other => return Err(format!("expected h100, fake, operators or speed, found `{other}`").into()),
    }
    Ok(())
}

fn curves(pool: &Pool, seeds: u64) {
    println!(
        "{}: {} points, {:.0} s in all; {seeds} seeds",
        pool.gpu.name,
        pool.samples.len(),
        pool.total_s()
    );
    for strategy in STRATEGIES {
        let curves: Vec<_> = (0..seeds).map(|seed| replay::replay(pool, strategy, seed, &LOOKS)).collect();
        println!("\n{}\n  time s  points   p50 %   p90 %  worst operator's p50 %", strategy.name());
        for point in mean(&curves) {
            let error = point.error;
            println!(
                "{:8.1} {:7} {:7.2} {:7.2} {:7.2}",
                point.elapsed_s,
                point.num_samples,
                100.0 * error.p50,
                100.0 * error.p90,
                100.0 * error.worst_operator_p50
            );
        }
    }
}

/// Points measured and mean error of each operator after a fifth of the pool's time.
fn operators(pool: &Pool, seeds: u64) {
    let strategies = [Strategy::Random, Strategy::Turns, Strategy::Spread, Strategy::Advised];
    let mut table: BTreeMap<Operator, [(f64, f64); 4]> = BTreeMap::new();
    for (column, strategy) in strategies.into_iter().enumerate() {
        for seed in 0..seeds {
            // In rounds, as a profile asks.
            let looks = replay::replay(pool, strategy, seed, &[0.05, 0.1, 0.15, 0.2]);
            for &(operator, count, error) in looks.last().iter().flat_map(|look| &look.operators) {
                let cell = &mut table.entry(operator).or_default()[column];
                cell.0 += count as f64 / seeds as f64;
                cell.1 += 100.0 * error / seeds as f64;
            }
        }
    }
    println!("points and mean error % of {}", strategies.map(Strategy::name).join(" | "));
    for (operator, cells) in table {
        let cells = cells.map(|(count, error)| format!("{count:6.1} {error:6.2}"));
        println!("{:15}{}", operator.name(), cells.join(" |"));
    }
}

/// One look at about 2,500 samples and 2,000 candidates.
fn speed() -> Result<(), Box<dyn std::error::Error>> {
    let models: Vec<ModelSpec> =
        ModelSpec::shipped_names().into_iter().map(ModelSpec::load).collect::<Result<_, _>>()?;
    let pool = Pool::of_plan(&Plan::with_grid(&models, &Envelope::default())?, 1);
    let (known, rest) = pool.samples.split_at(2500.min(pool.samples.len()));
    let candidates: Vec<_> = rest.iter().take(2000).map(|s| (s.operator, s.shape)).collect();
    let options = AdviceOptions::default();
    let threads = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    let (mut times, mut last) = (Vec::new(), Instant::now());
    let mut lap = || times.push(std::mem::replace(&mut last, Instant::now()).elapsed().as_secs_f64());
    threads.install(|| {
        let advice = Advice::new(known, &pool.gpu, &options);
        lap();
        let _ = advice.held_out_error(&rest[..rest.len().min(200)]);
        lap();
        let _ = advice.unsureness(&candidates);
        lap();
    });
    println!(
        "{} samples, {} candidates, one thread: training {:.2} s, held-out error {:.2} s, unsureness {:.2} s",
        known.len(),
        candidates.len(),
        times[0],
        times[1],
        times[2]
    );
    Ok(())
}

//! Timing: launches captured into a graph, replayed back to back between events.

use std::time::{Duration, Instant};

use plumbline_bundles::StopReason;

use super::{
    driver::{CudaError, CudaResult, Event, Graph},
    launch::Launch,
    operands::Gpu,
};
use crate::device::StoppingRule;

/// A replay takes at least about this long, so that its own start-up and the clock's resolution do not count.
const MIN_REPLAY_NS: f64 = 400_000.0;
/// Most launches of one graph, which bounds the time to capture it.
const MAX_LAUNCHES: usize = 512;
/// Replays queued before waiting.
const MAX_QUEUED: u32 = 16;
/// Replays longer than this need no other one to run before them.
const LONG_REPLAY_NS: f64 = 20e6;
/// A rest takes at least this many times as long as the run after it.
const REST_FACTOR: f64 = 10.0;
/// Launches that an algorithm is judged by, and the longest time spent on judging it.
const TRIAL_LAUNCHES: usize = 16;
const MAX_TRIAL_NS: f64 = 1.5e6;
/// Ways within this factor of the best trial are tried again, with so many replays.
const FINALIST_FACTOR: f64 = 1.05;
const FINAL_REPLAYS: u32 = 5;

/// Times of single launches, ns, and why the repetition ended.
pub struct Times {
    pub times_ns: Vec<f64>,
    pub stop: StopReason,
}

/// Runs every set once and returns the time of the slowest part of the loop, ns a launch.
fn warm_up(gpu: &Gpu, sets: &[Vec<Launch>]) -> CudaResult<f64> {
    enqueue(gpu, sets, sets.len())?;
    gpu.stream.synchronize()?;
    let count = sets.len().min(8);
    let (start, end) = (Event::new(&gpu.context)?, Event::new(&gpu.context)?);
    start.record(&gpu.stream)?;
    enqueue(gpu, sets, count)?;
    end.record(&gpu.stream)?;
    gpu.stream.synchronize()?;
    Ok(start.elapsed_ns(&end)? / count as f64)
}

fn enqueue(gpu: &Gpu, sets: &[Vec<Launch>], count: usize) -> CudaResult<()> {
    sets.iter().cycle().take(count).flatten().try_for_each(|launch| launch.enqueue(&gpu.stream))
}

/// Replays a graph for a while: power and clocks take tens of milliseconds to settle under a load.
fn sustain(gpu: &Gpu, graph: &Graph, warm_up_ns: u64) -> CudaResult<()> {
    let began = Instant::now();
    while (began.elapsed().as_nanos() as u64) < warm_up_ns {
        // Two at a time, so that the GPU has work while the host looks at the clock.
        graph.launch(&gpu.stream)?;
        graph.launch(&gpu.stream)?;
        gpu.stream.synchronize()?;
    }
    Ok(())
}

/// Queues `count` replays with an event after each, and returns their times, ns.
fn replay(gpu: &Gpu, graph: &Graph, count: u32, is_long: bool) -> CudaResult<Vec<f64>> {
    let events = (0..=count).map(|_| Event::new(&gpu.context)).collect::<CudaResult<Vec<_>>>()?;
    if !is_long {
        // The first replay after a pause waits for the host; the timed ones then wait for it alone.
        graph.launch(&gpu.stream)?;
    }
    events[0].record(&gpu.stream)?;
    for event in &events[1..] {
        graph.launch(&gpu.stream)?;
        event.record(&gpu.stream)?;
    }
    gpu.stream.synchronize()?;
    events.windows(2).map(|pair| pair[0].elapsed_ns(&pair[1])).collect()
}

/// As [`replay`], each replay after a rest; the one right before it goes untimed.
fn replay_rested(gpu: &Gpu, graph: &Graph, count: u32, pause: Duration) -> CudaResult<Vec<f64>> {
    let mut times = Vec::with_capacity(count as usize);
    for _ in 0..count {
        std::thread::sleep(pause);
        times.extend(replay(gpu, graph, 1, false)?);
    }
    Ok(times)
}

/// How long to rest before a run of `run_ns`: ten times as long as it, and as long as asked; nothing when not asked.
pub fn rest(pause_ns: u64, run_ns: f64) -> Duration {
    if pause_ns == 0 {
        Duration::ZERO
    } else {
        Duration::from_nanos(pause_ns.max((REST_FACTOR * run_ns) as u64))
    }
}

/// Times one launch, the sets taken in turn.
pub fn time(gpu: &Gpu, sets: &[Vec<Launch>], rule: &StoppingRule) -> CudaResult<Times> {
    time_watched(gpu, sets, rule, || {})
}

/// As [`time`]; `at_edges` is called right before and right after the timed replays.
pub fn time_watched(
    gpu: &Gpu,
    sets: &[Vec<Launch>],
    rule: &StoppingRule,
    mut at_edges: impl FnMut(),
) -> CudaResult<Times> {
    let estimate = warm_up(gpu, sets)?;
    // Launched one by one, small kernels wait for the host, so this may be too few by a factor of two or so.
    let wanted = (MIN_REPLAY_NS / estimate.max(500.0)).ceil() as usize;
    let rounds = wanted.min(MAX_LAUNCHES).div_ceil(sets.len()).max(1);
    let launches = rounds * sets.len();
    let graph = gpu.stream.capture(|| enqueue(gpu, sets, launches))?;
    graph.upload(&gpu.stream)?;
    sustain(gpu, &graph, rule.warm_up_ns)?;
    at_edges();

    let run_ns = estimate * launches as f64;
    let is_long = run_ns > LONG_REPLAY_NS;
    let pause = rest(rule.pause_ns, run_ns);
    let began = Instant::now();
    let mut times_ns = Vec::new();
    loop {
        let missing = rule.min_samples.max(1).saturating_sub(times_ns.len() as u32);
        let room = rule.max_samples.max(1) - times_ns.len() as u32;
        let longest = if is_long { 1 } else { MAX_QUEUED };
        let count = missing.max(4).min(room).min(longest);
        let replays = if pause.is_zero() {
            replay(gpu, &graph, count, is_long)?
        } else {
            replay_rested(gpu, &graph, count, pause)?
        };
        times_ns.extend(replays.into_iter().map(|ns| ns / launches as f64));
        let n = times_ns.len() as u32;
        let stop = if n >= rule.min_samples && is_precise(&times_ns, rule.max_relative_error) {
            StopReason::Converged
        } else if n >= rule.max_samples {
            StopReason::MaxSamples
        } else if began.elapsed().as_nanos() as u64 >= rule.time_limit_ns {
            StopReason::TimeLimit
        } else {
            continue;
        };
        at_edges();
        return Ok(Times { times_ns, stop });
    }
}

/// Whether the standard error of the mean is below a share of the mean.
fn is_precise(times: &[f64], max_relative_error: f64) -> bool {
    let n = times.len() as f64;
    let mean = times.iter().sum::<f64>() / n;
    let squares = times.iter().map(|time| (time - mean).powi(2)).sum::<f64>();
    n > 1.0 && (squares / (n - 1.0) / n).sqrt() <= max_relative_error * mean
}

/// Finds the fastest of several ways to launch the same work; one that fails is passed over.
///
/// A short trial of each, then a longer one of those that came near the best, so that the choice is not a matter of
/// luck.
pub fn fastest(gpu: &Gpu, num_ways: usize, sets_of: impl Fn(usize) -> Vec<Vec<Launch>>) -> CudaResult<usize> {
    let mut trials = Vec::new();
    let mut failure = None;
    for way in 0..num_ways {
        match trial(gpu, &sets_of(way), 2) {
            Ok(ns) => trials.push((way, ns)),
            Err(error) => failure = Some(error),
        }
    }
    let best_ns = trials.iter().fold(f64::INFINITY, |best, (_, ns)| best.min(*ns));
    trials.retain(|(_, ns)| *ns <= best_ns * FINALIST_FACTOR);
    if trials.len() > 1 {
        for (way, ns) in &mut trials {
            *ns = trial(gpu, &sets_of(*way), FINAL_REPLAYS)?;
        }
    }
    match (trials.into_iter().min_by(|a, b| a.1.total_cmp(&b.1)), failure) {
        (Some((way, _)), _) => Ok(way),
        (None, Some(error)) => Err(error),
        (None, None) => Err(CudaError::Unsupported("there is no way to launch this".to_owned())),
    }
}

/// A launch's shortest time in a few short replays, ns.
fn trial(gpu: &Gpu, sets: &[Vec<Launch>], num_replays: u32) -> CudaResult<f64> {
    enqueue(gpu, sets, 1)?;
    gpu.stream.synchronize()?;
    let (start, end) = (Event::new(&gpu.context)?, Event::new(&gpu.context)?);
    start.record(&gpu.stream)?;
    enqueue(gpu, sets, 1)?;
    end.record(&gpu.stream)?;
    gpu.stream.synchronize()?;
    let single = start.elapsed_ns(&end)?;
    let launches = ((MAX_TRIAL_NS / single.max(1.0)) as usize).min(TRIAL_LAUNCHES);
    if launches < 2 {
        return Ok(single);
    }
    let graph = gpu.stream.capture(|| enqueue(gpu, sets, launches))?;
    let times = replay(gpu, &graph, num_replays, false)?;
    Ok(times.into_iter().fold(f64::INFINITY, f64::min) / launches as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_is_as_long_as_asked_and_ten_times_the_run() {
        assert_eq!(rest(0, 1e9), Duration::ZERO, "none was asked for");
        assert_eq!(rest(12_000_000, 400_000.0), Duration::from_millis(12));
        assert_eq!(rest(12_000_000, 3e6), Duration::from_millis(30));
    }

    #[test]
    fn precision_is_the_standard_error_of_the_mean() {
        // Mean 100, standard deviation 10, standard error 5 of four.
        let times = [90.0, 110.0, 100.0 - 50f64.sqrt(), 100.0 + 50f64.sqrt()];
        assert!(is_precise(&times, 0.051));
        assert!(!is_precise(&times, 0.049));
        assert!(!is_precise(&[100.0], 1.0), "one sample says nothing about spread");
    }
}

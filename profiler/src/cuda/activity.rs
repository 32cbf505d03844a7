//! The cross-check: the launches of a point timed a second way, by the records of their kernels.
//!
//! `timing` divides the time between two events by the launches in between. Here the same launches run with every
//! kernel's own start and end recorded. The two share neither clock nor arithmetic; what they do not agree on is
//! either recording, which makes the gaps between kernels longer, or a mistake.

use std::{
    ffi::c_void,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use cudarc::driver::result;
use plumbline_bundles::{CacheState, TimeStats};

use super::{
    cupti::{KernelRecord, Recording},
    driver::{CudaError, CudaResult, Event, Graph, Named, Stream},
    launch::Launch,
    operands::Gpu,
    timing::rest,
};
use crate::device::{ActivityTimes, Point};

/// How launches follow one another without the host in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordedWay {
    /// In a graph, as the profiler times them.
    Graph,
    /// From the stream, queued behind a wait that ends once all are there.
    Stream,
}

/// A run takes at least about this long and at most so many launches, as the profiler's own do.
const MIN_RUN_NS: f64 = 400_000.0;
const MAX_LAUNCHES: usize = 512;
/// Fewer launches have no period to speak of.
const MIN_LAUNCHES: usize = 4;
/// Runs that are recorded, and about the longest that they take together.
const MIN_RUNS: usize = 4;
const MAX_RUNS: usize = 12;
const MAX_RECORDED_NS: f64 = 250e6;
/// Kernels that the driver queues before a launch waits are about a thousand, recording may need more room for each.
const MAX_QUEUED: usize = 240;
/// Clocks settle under the launches themselves; as many records as a GPU writes in that time are wanted by no one.
const WARM_UP: Duration = Duration::from_millis(150);
const MAX_WARM_UP_LAUNCHES: usize = 8_192;
/// Longest that queued launches wait for the rest.
const MAX_GATE: Duration = Duration::from_secs(2);

/// Times the launches of a point by the records of their kernels.
pub fn cross_check(
    gpu: &mut Gpu,
    point: &Point,
    cache: CacheState,
    way: RecordedWay,
    pause_ns: u64,
) -> CudaResult<ActivityTimes> {
    let prepared = gpu.prepare(point, cache)?;
    let estimate_ns = estimate(gpu, &prepared.sets)?;
    let recording = Recording::start()?;
    let runs = match way {
        RecordedWay::Graph => in_graph(gpu, &prepared.sets, estimate_ns, pause_ns, &recording),
        RecordedWay::Stream => in_stream(gpu, &prepared.sets, estimate_ns, &recording),
    };
    drop(recording);
    summarise(&runs?)
}

fn enqueue<'a>(gpu: &Gpu, sets: impl Iterator<Item = &'a Vec<Launch>>) -> CudaResult<()> {
    sets.flatten().try_for_each(|launch| launch.enqueue(&gpu.stream))
}

/// Runs every set once and returns about what a launch takes, ns.
fn estimate(gpu: &Gpu, sets: &[Vec<Launch>]) -> CudaResult<f64> {
    enqueue(gpu, sets.iter())?;
    gpu.stream.synchronize()?;
    let count = sets.len().min(8);
    let (start, end) = (Event::new(&gpu.context)?, Event::new(&gpu.context)?);
    start.record(&gpu.stream)?;
    enqueue(gpu, sets.iter().take(count))?;
    end.record(&gpu.stream)?;
    gpu.stream.synchronize()?;
    Ok((start.elapsed_ns(&end)? / count as f64).max(500.0))
}

/// Launches of a run in a graph: whole rounds of the sets, as in `timing`.
fn launches_in_graph(estimate_ns: f64, num_sets: usize) -> usize {
    let wanted = ((MIN_RUN_NS / estimate_ns).ceil() as usize).clamp(MIN_LAUNCHES, MAX_LAUNCHES);
    wanted.div_ceil(num_sets.max(1)) * num_sets
}

fn num_runs(run_ns: f64) -> usize {
    ((MAX_RECORDED_NS / run_ns) as usize).clamp(MIN_RUNS, MAX_RUNS)
}

fn in_graph(
    gpu: &Gpu,
    sets: &[Vec<Launch>],
    estimate_ns: f64,
    pause_ns: u64,
    recording: &Recording,
) -> CudaResult<Vec<Run>> {
    let launches = launches_in_graph(estimate_ns, sets.len());
    // Captured while recording, as nodes captured before may go unrecorded.
    let graph = gpu.stream.capture(|| enqueue(gpu, sets.iter().cycle().take(launches)))?;
    graph.upload(&gpu.stream)?;
    if pause_ns > 0 {
        return in_graph_rested(
            gpu,
            &graph,
            launches,
            rest(pause_ns, estimate_ns * launches as f64),
            recording,
        );
    }
    warm_up(launches, || {
        graph.launch(&gpu.stream)?;
        gpu.stream.synchronize()
    })?;
    recording.discard()?;

    let runs = num_runs(estimate_ns * launches as f64);
    let events = (0..=runs).map(|_| Event::new(&gpu.context)).collect::<CudaResult<Vec<_>>>()?;
    // The first replay after a pause waits for the host; the others then wait for it alone.
    graph.launch(&gpu.stream)?;
    events[0].record(&gpu.stream)?;
    for event in &events[1..] {
        graph.launch(&gpu.stream)?;
        event.record(&gpu.stream)?;
    }
    gpu.stream.synchronize()?;
    let records = recording.take(launches * (runs + 1))?;
    split(&records, runs + 1)?
        .skip(1)
        .zip(events.windows(2))
        .map(|(replay, pair)| Run::of(replay, launches, Some(pair[0].elapsed_ns(&pair[1])?)))
        .collect()
}

fn in_stream(
    gpu: &Gpu,
    sets: &[Vec<Launch>],
    estimate_ns: f64,
    recording: &Recording,
) -> CudaResult<Vec<Run>> {
    // A product may be two kernels.
    let most = (MAX_QUEUED / (2 * sets.first().map_or(1, Vec::len).max(1))).max(MIN_LAUNCHES);
    let launches = ((2.0 * MIN_RUN_NS / estimate_ns).ceil() as usize).clamp(MIN_LAUNCHES, most);
    // Each run goes on with the sets where the one before stopped, so that cold ones stay cold.
    let mut rotation = sets.iter().cycle();
    warm_up(launches, || {
        enqueue(gpu, rotation.by_ref().take(launches))?;
        gpu.stream.synchronize()
    })?;
    recording.discard()?;

    let mut runs = Vec::new();
    for _ in 0..num_runs(estimate_ns * launches as f64) {
        let (start, end) = (Event::new(&gpu.context)?, Event::new(&gpu.context)?);
        let gate = Gate::close(&gpu.stream)?;
        start.record(&gpu.stream)?;
        let enqueued = enqueue(gpu, rotation.by_ref().take(launches)).and_then(|()| end.record(&gpu.stream));
        let was_shut = gate.open();
        gpu.stream.synchronize()?;
        enqueued?;
        if !was_shut {
            return Err(CudaError::Unsupported(format!(
                "{launches} launches were not queued within {} s: the driver holds fewer",
                MAX_GATE.as_secs()
            )));
        }
        let records = recording.take(launches)?;
        runs.push(Run::of(&records, launches, Some(start.elapsed_ns(&end)?))?);
    }
    Ok(runs)
}

/// Runs after rests, as samples of launches that draw much power are taken; the replay before each goes unused.
fn in_graph_rested(
    gpu: &Gpu,
    graph: &Graph,
    launches: usize,
    pause: Duration,
    recording: &Recording,
) -> CudaResult<Vec<Run>> {
    recording.discard()?;
    let mut runs = Vec::with_capacity(MIN_RUNS);
    for _ in 0..MIN_RUNS {
        std::thread::sleep(pause);
        let (start, end) = (Event::new(&gpu.context)?, Event::new(&gpu.context)?);
        graph.launch(&gpu.stream)?;
        start.record(&gpu.stream)?;
        graph.launch(&gpu.stream)?;
        end.record(&gpu.stream)?;
        gpu.stream.synchronize()?;
        let records = recording.take(2 * launches)?;
        let event_ns = start.elapsed_ns(&end)?;
        runs.extend(split(&records, 2)?.skip(1).map(|replay| Run::of(replay, launches, Some(event_ns))));
    }
    runs.into_iter().collect()
}

/// Repeats a run of so many launches until clocks have settled.
fn warm_up(launches: usize, mut run: impl FnMut() -> CudaResult<()>) -> CudaResult<()> {
    let began = Instant::now();
    let mut num_launched = 0;
    while began.elapsed() < WARM_UP && num_launched < MAX_WARM_UP_LAUNCHES {
        run()?;
        num_launched += launches;
    }
    Ok(())
}

/// A wait on a stream that the host ends.
struct Gate(Arc<GateState>);

#[derive(Default)]
struct GateState {
    is_open: AtomicBool,
    has_given_up: AtomicBool,
}

impl Gate {
    /// Lets the stream wait at this place.
    fn close(stream: &Stream) -> CudaResult<Self> {
        let state = Arc::new(GateState::default());
        let handed_over = Arc::into_raw(state.clone());
        // SAFETY: the function takes the pointer as what it is and is called once; if it is not, it is taken below.
        let queued = unsafe {
            result::stream::launch_host_function(stream.raw(), wait_at_gate, handed_over.cast_mut().cast())
        };
        if queued.is_err() {
            // SAFETY: the driver did not take it.
            drop(unsafe { Arc::from_raw(handed_over) });
        }
        queued.named("cuLaunchHostFunc")?;
        Ok(Self(state))
    }

    /// Lets the stream go on; false if it had done so by itself.
    fn open(self) -> bool {
        self.0.is_open.store(true, Ordering::Release);
        !self.0.has_given_up.load(Ordering::Acquire)
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.0.is_open.store(true, Ordering::Release);
    }
}

/// Runs on a thread of the driver.
unsafe extern "C" fn wait_at_gate(state: *mut c_void) {
    // SAFETY: `Gate::close` hands over one count of such a pointer.
    let state = unsafe { Arc::from_raw(state.cast::<GateState>().cast_const()) };
    let began = Instant::now();
    while !state.is_open.load(Ordering::Acquire) {
        // A launch that waits for room in the queue would wait for this forever.
        if began.elapsed() > MAX_GATE {
            state.has_given_up.store(true, Ordering::Release);
            return;
        }
        std::thread::yield_now();
    }
}

/// Launches that followed one another, by the records of their kernels.
#[derive(Clone, Debug, PartialEq)]
struct Run {
    /// Mean over the launches of their kernels' times added up, ns.
    duration_ns: f64,
    /// Mean time from launch to launch, ns; `None` for a single one.
    period_ns: Option<f64>,
    /// Time of a launch by events around the run, ns.
    event_ns: Option<f64>,
    /// The kernels of one launch.
    kernel_names: Vec<Arc<str>>,
}

impl Run {
    /// Matches kernels with launches: all launches are alike, so each has its share of them, of the same names in the
    /// same order.
    fn of(records: &[KernelRecord], launches: usize, event_ns: Option<f64>) -> CudaResult<Self> {
        let unmatched = |what: String| Err(CudaError::Unsupported(what));
        if records.is_empty() || launches == 0 || !records.len().is_multiple_of(launches) {
            return unmatched(format!(
                "expected the records of {launches} launches with as many kernels each, found {} records",
                records.len()
            ));
        }
        let per_launch = records.len() / launches;
        let kernel_names: Vec<_> = records[..per_launch].iter().map(|record| record.name.clone()).collect();
        for (i, record) in records.iter().enumerate() {
            let expected = &kernel_names[i % per_launch];
            if record.name != *expected {
                return unmatched(format!(
                    "expected {expected} as kernel {i} of a run, found {}",
                    record.name
                ));
            }
            if record.start_ns == 0 || record.end_ns < record.start_ns {
                return unmatched(format!(
                    "expected a start and an end of kernel {i} of a run, found {} and {} ns",
                    record.start_ns, record.end_ns
                ));
            }
        }
        let total_ns: u64 = records.iter().map(|record| record.end_ns - record.start_ns).sum();
        let last = records.len() - per_launch;
        let first_to_last_ns = (records[last].start_ns - records[0].start_ns) as f64;
        Ok(Self {
            duration_ns: total_ns as f64 / launches as f64,
            period_ns: (launches > 1).then(|| first_to_last_ns / (launches - 1) as f64),
            event_ns: event_ns.map(|ns| ns / launches as f64),
            kernel_names,
        })
    }
}

/// Cuts the records of equal runs apart.
fn split(records: &[KernelRecord], num_runs: usize) -> CudaResult<std::slice::ChunksExact<'_, KernelRecord>> {
    if records.is_empty() || !records.len().is_multiple_of(num_runs) {
        return Err(CudaError::Unsupported(format!(
            "expected the records of {num_runs} equal runs, found {} records",
            records.len()
        )));
    }
    Ok(records.chunks_exact(records.len() / num_runs))
}

fn summarise(runs: &[Run]) -> CudaResult<ActivityTimes> {
    let of = |times: Option<Vec<f64>>| times.and_then(|times| TimeStats::from_times(&times));
    let names = runs.first().map(|run| run.kernel_names.as_slice()).unwrap_or_default();
    if let Some(other) = runs.iter().find(|run| run.kernel_names != names) {
        return Err(CudaError::Unsupported(format!(
            "expected the kernels {names:?} in every run, found {:?}",
            other.kernel_names
        )));
    }
    let duration = of(Some(runs.iter().map(|run| run.duration_ns).collect()))
        .ok_or_else(|| CudaError::Unsupported("no kernel was recorded".to_owned()))?;
    Ok(ActivityTimes {
        duration,
        period: of(runs.iter().map(|run| run.period_ns).collect()),
        event: of(runs.iter().map(|run| run.event_ns).collect()),
        num_kernels_per_launch: names.len() as f64,
        kernel_names: names.iter().map(ToString::to_string).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kernels that begin `starts` ns after 1000 and take 10 ns times their place in the launch, from 1 on.
    fn records(names: &[&str], starts: &[u64]) -> Vec<KernelRecord> {
        let record = |(i, start): (usize, &u64)| {
            let start_ns = 1000 + start;
            let end_ns = start_ns + 10 * (i % names.len() + 1) as u64;
            KernelRecord { start_ns, end_ns, name: names[i % names.len()].into() }
        };
        starts.iter().enumerate().map(record).collect()
    }

    #[test]
    fn a_launch_is_the_sum_of_its_kernels_and_lasts_until_the_next() {
        // Three launches of two kernels, 10 and 20 ns; they begin at 0, 100 and 220.
        let records = records(&["prefill", "decode"], &[0, 40, 100, 150, 220, 260]);
        let run = Run::of(&records, 3, Some(360.0)).unwrap();
        assert_eq!((run.duration_ns, run.period_ns, run.event_ns), (30.0, Some(110.0), Some(120.0)));
        assert_eq!(run.kernel_names, ["prefill".into(), "decode".into()]);
        let single = Run::of(&records[..2], 1, None).unwrap();
        assert_eq!((single.duration_ns, single.period_ns, single.event_ns), (30.0, None, None));
    }

    #[test]
    fn records_that_do_not_match_the_launches_are_refused() {
        let good = records(&["gemm", "reduce"], &[0, 40, 100, 150]);
        let refused = |records: &[KernelRecord], launches: usize, reason: &str| {
            let error = Run::of(records, launches, None).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        };
        refused(&good[..3], 2, "found 3 records");
        refused(&[], 2, "found 0 records");
        // As four launches of one kernel the names would have to be the same.
        refused(&good, 4, "expected gemm as kernel 1 of a run, found reduce");
        let mut unknown = good.clone();
        unknown[3].start_ns = 0;
        refused(&unknown, 2, "kernel 3 of a run, found 0");
        let mut reversed = good.clone();
        reversed[2].end_ns = reversed[2].start_ns - 1;
        refused(&reversed, 2, "kernel 2 of a run");
    }

    #[test]
    fn runs_are_cut_apart_and_their_means_summarised() {
        let all = records(&["rope"], &[0, 100, 1000, 1120, 2000, 2110]);
        let runs: Vec<_> = split(&all, 3).unwrap().map(|run| Run::of(run, 2, Some(260.0)).unwrap()).collect();
        let times = summarise(&runs).unwrap();
        assert_eq!((times.duration.n, times.duration.p50_ns), (3, 10.0));
        assert_eq!(
            times.period.map(|period| (period.min_ns, period.p50_ns, period.max_ns)),
            Some((100.0, 110.0, 120.0))
        );
        assert_eq!(times.event.map(|event| event.p50_ns), Some(130.0));
        assert_eq!((times.num_kernels_per_launch, times.kernel_names), (1.0, vec!["rope".to_owned()]));
        assert!(split(&all, 4).is_err() && split(&[], 1).is_err() && summarise(&[]).is_err());
        // One run without a period leaves the period out.
        let mut partly = runs.clone();
        partly[1].period_ns = None;
        assert_eq!(summarise(&partly).unwrap().period, None);
        partly[1].kernel_names = vec!["other".into()];
        assert!(summarise(&partly).is_err());
    }

    #[test]
    fn runs_are_long_enough_to_have_a_period_and_short_enough_to_record() {
        assert_eq!(launches_in_graph(500.0, 1), MAX_LAUNCHES);
        assert_eq!(launches_in_graph(1e9, 1), MIN_LAUNCHES);
        // Whole rounds of the sets.
        assert_eq!(launches_in_graph(100_000.0, 3), 6);
        assert_eq!(launches_in_graph(1e6, 384), 384);
        assert_eq!((num_runs(1e3), num_runs(30e6), num_runs(1e9)), (MAX_RUNS, 8, MIN_RUNS));
    }

    #[test]
    fn a_gate_opens_when_told_or_dropped() {
        for is_told in [true, false] {
            let state = Arc::new(GateState::default());
            let handed_over = Arc::into_raw(state.clone()) as usize;
            // SAFETY: the pointer is handed over once.
            let waiting = std::thread::spawn(move || unsafe { wait_at_gate(handed_over as *mut c_void) });
            let gate = Gate(state.clone());
            if is_told {
                assert!(gate.open());
            } else {
                drop(gate);
            }
            waiting.join().unwrap();
            assert!(!state.has_given_up.load(Ordering::Acquire));
            assert_eq!(Arc::strong_count(&state), 1, "the waiting side has given its count back");
        }
    }
}

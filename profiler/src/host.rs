//! The host without its GPU: CPU, how it is set, how busy it is, and how fast one of its threads is.

use std::{
    hint::black_box,
    path::Path,
    time::{Duration, Instant},
};

use plumbline_bundles::host::{CpuState, ScoreSpread};
use serde::Serialize;

/// Iterations of the score's loop in one run, some twenty milliseconds' worth.
const ITERATIONS: u32 = 2_000_000;

/// Runs of the score's loop, and the fewest of them that a slow host is let off with.
const SCORE_RUNS: usize = 11;
const MIN_SCORE_RUNS: usize = 3;

/// No further run is begun after this long.
const SCORE_TIME: Duration = Duration::from_secs(1);

/// What can be told of a host without a GPU; the keys are those of `host.json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HostReport {
    /// CPU model as the system names it.
    pub cpu_model: String,
    /// Logical cores that this process may use.
    pub num_cores: u32,
    /// Single-thread score, million iterations a second: the median of `score`.
    pub single_thread_score: f64,
    /// Spread of the score over its runs.
    pub score: ScoreSpread,
    /// How the CPU was set and how busy it was, before and after.
    pub cpu: CpuState,
}

impl HostReport {
    /// Looks at this host and measures its score; about a quarter of a second.
    #[must_use]
    pub fn measure() -> Self {
        let before = cpu_state();
        let score = single_thread_score();
        Self {
            cpu_model: cpu_model(),
            num_cores: num_cores(),
            single_thread_score: score.median,
            score,
            cpu: CpuState { load_after: load_average(), ..before },
        }
    }
}

/// The CPU's model as Linux names it, or `unknown`.
#[must_use]
pub fn cpu_model() -> String {
    cpu_model_below(Path::new("/")).unwrap_or_else(|| "unknown".to_owned())
}

/// Logical cores that this process may use.
#[must_use]
pub fn num_cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

/// Governor, clocks and load as Linux tells them now; `load_after` is left for when work has been done.
#[must_use]
pub fn cpu_state() -> CpuState {
    cpu_state_below(Path::new("/"))
}

/// One-minute load average; `None` where the system does not tell.
#[must_use]
pub fn load_average() -> Option<f64> {
    load_average_below(Path::new("/"))
}

fn cpu_model_below(root: &Path) -> Option<String> {
    cpuinfo(root, "model name")
}

/// The first core's value of a key of `/proc/cpuinfo`.
fn cpuinfo(root: &Path, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(root.join("proc/cpuinfo")).ok()?;
    let (_, value) =
        text.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| name.trim() == key)?;
    let value = value.trim();
    (!value.is_empty()).then(|| value.to_owned())
}

fn load_average_below(root: &Path) -> Option<f64> {
    let text = std::fs::read_to_string(root.join("proc/loadavg")).ok()?;
    not_negative(text.split_whitespace().next()?)
}

fn cpu_state_below(root: &Path) -> CpuState {
    let of_core = |name: &str| {
        std::fs::read_to_string(root.join("sys/devices/system/cpu/cpu0/cpufreq").join(name)).ok()
    };
    let mhz = |name: &str| not_negative(of_core(name)?.trim()).map(|khz| khz / 1e3);
    let governor = of_core("scaling_governor").map(|text| text.trim().to_owned());
    CpuState {
        governor: governor.filter(|name| !name.is_empty()),
        current_mhz: mhz("scaling_cur_freq").or_else(|| not_negative(&cpuinfo(root, "cpu MHz")?)),
        max_mhz: mhz("cpuinfo_max_freq"),
        load_before: load_average_below(root),
        load_after: None,
    }
}

fn not_negative(text: &str) -> Option<f64> {
    text.parse().ok().filter(|value: &f64| value.is_finite() && *value >= 0.0)
}

/// Million iterations a second of a fixed loop: a multiply-add and a step along a random cycle through 1 MiB.
///
/// The score is the median of short runs. The cycle is the same on every machine (Sattolo 1986), larger than a
/// first-level cache and smaller than a second-level one, as an engine's bookkeeping is. Only builds with
/// optimisation are comparable.
#[must_use]
pub fn single_thread_score() -> ScoreSpread {
    let next = cycle();
    let began = Instant::now();
    let mut scores = Vec::with_capacity(SCORE_RUNS);
    while scores.len() < SCORE_RUNS && (scores.len() < MIN_SCORE_RUNS || began.elapsed() < SCORE_TIME) {
        scores.push(score_of_a_run(&next));
    }
    // There are runs, and their times are positive.
    ScoreSpread::from_scores(&scores).unwrap_or(ScoreSpread { n: 0, min: 0.0, median: 0.0, max: 0.0 })
}

/// The score of one run alone, some twenty milliseconds' worth: for idle moments of something that is timed.
#[must_use]
pub fn short_score() -> f64 {
    score_of_a_run(&cycle())
}

/// For each entry the next one of a random cycle through all of them.
fn cycle() -> Vec<u32> {
    const ENTRIES: usize = (1 << 20) / 4;
    let mut next: Vec<u32> = (0..ENTRIES as u32).collect();
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    for i in (1..ENTRIES).rev() {
        next.swap(i, random() % i);
    }
    next
}

fn score_of_a_run(next: &[u32]) -> f64 {
    let began = Instant::now();
    let (mut at, mut sum) = (0u32, 0u64);
    for _ in 0..ITERATIONS {
        at = next[at as usize];
        sum = sum.wrapping_mul(31).wrapping_add(u64::from(at));
    }
    black_box(sum);
    f64::from(ITERATIONS) / began.elapsed().as_secs_f64() / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cycle_visits_every_entry_once() {
        let next = cycle();
        let mut seen = vec![false; next.len()];
        let mut at = 0u32;
        for _ in 0..next.len() {
            assert!(!std::mem::replace(&mut seen[at as usize], true));
            at = next[at as usize];
        }
        assert_eq!(at, 0);
    }

    #[test]
    fn a_score_is_quick_positive_and_spread_around_its_median() {
        let began = Instant::now();
        let report = HostReport::measure();
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        let score = report.score;
        assert!((MIN_SCORE_RUNS..=SCORE_RUNS).contains(&(score.n as usize)), "{score:?}");
        assert!(0.0 < score.min && score.min <= score.median && score.median <= score.max, "{score:?}");
        assert!(report.single_thread_score.to_bits() == score.median.to_bits() && report.num_cores > 0);
    }

    #[test]
    fn the_system_is_read_where_it_tells_and_missing_things_are_none() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(cpu_state_below(root.path()), CpuState::default());
        assert_eq!(cpu_model_below(root.path()), None);
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let cores = "processor\t: 0\nmodel name\t: A CPU: fast\ncpu MHz\t\t: 2100.500\n\
                     processor\t: 1\nmodel name\t: B\ncpu MHz\t\t: 900.0\n";
        write("proc/cpuinfo", cores);
        write("proc/loadavg", "0.75 0.50 0.25 1/200 4321\n");
        let expected = CpuState { current_mhz: Some(2100.5), load_before: Some(0.75), ..CpuState::default() };
        assert_eq!(cpu_state_below(root.path()), expected);
        assert_eq!(cpu_model_below(root.path()), Some("A CPU: fast".to_owned()));

        write("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave\n");
        write("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "1800000\n");
        write("sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", "3800000\n");
        let state = cpu_state_below(root.path());
        assert_eq!(state.governor.as_deref(), Some("powersave"));
        assert_eq!((state.current_mhz, state.max_mhz), (Some(1800.0), Some(3800.0)));

        write("proc/cpuinfo", "model name\t:\ncpu MHz : soon\n");
        write("proc/loadavg", "");
        write("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "<unknown>\n");
        let state = cpu_state_below(root.path());
        assert_eq!((state.current_mhz, state.load_before), (None, None));
        assert_eq!(cpu_model_below(root.path()), None);
    }
}

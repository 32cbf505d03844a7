//! `host.json`: what it costs this host to drive its GPU.
//!
//! Files of before format 1.1 hold the first half of [`HostCosts`]; what they lack reads as empty.

use plumbline_schema::HostInfo;
use serde::{Deserialize, Serialize};

use crate::{
    error::{CheckError, check_non_negative, check_positive},
    stats::TimeStats,
};

/// Cost of launching a CUDA graph of a given size.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GraphLaunchCost {
    /// Kernel nodes of the graph.
    pub num_nodes: u32,
    /// Host time of the launch call.
    pub launch_ns: TimeStats,
}

/// Cost of copying a small buffer and waiting for it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CopyCost {
    /// Size of the copy.
    pub num_bytes: u64,
    /// Host to device, until done.
    pub to_device_ns: TimeStats,
    /// Device to host, until done.
    pub to_host_ns: TimeStats,
}

/// Cost of launching kernels in a row on an idle stream.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LaunchRowCost {
    /// Launches in the row.
    pub num_launches: u32,
    /// Host time of the whole row over its launches; a sample is a row. Long rows show a queue that fills.
    pub launch_ns: TimeStats,
}

/// Cost of launching a kernel with a given number of arguments.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LaunchArgumentsCost {
    /// Arguments, of 8 bytes each.
    pub num_arguments: u32,
    /// Host time of one launch call, queue not full.
    pub launch_ns: TimeStats,
}

/// Costs of the calls by which a host follows what the GPU has done.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventCosts {
    /// Host time of recording an event on an idle stream.
    pub record_ns: TimeStats,
    /// Host time of asking for an event that has happened.
    pub query_ns: TimeStats,
    /// Host time of waiting for an event that has happened.
    pub synchronize_ns: TimeStats,
}

/// Host time of one copy to the device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CopyTimes {
    /// Until the asynchronous call returned.
    pub call_ns: TimeStats,
    /// Until the copy was done, the call included.
    pub done_ns: TimeStats,
}

/// Cost of handing a step's inputs to the device, by where they lie on the host.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct InputCopyCost {
    /// Size of the copy.
    pub num_bytes: u64,
    /// From page-locked memory.
    pub pinned: CopyTimes,
    /// From ordinary memory, which the driver stages.
    pub pageable: CopyTimes,
}

/// What the first work after an idle gap takes, each gap following the same busy stretch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AfterIdleCost {
    /// How long the host slept and the GPU had nothing to do, ns.
    pub idle_ns: u64,
    /// Host time of launching one small kernel and waiting for it: host and GPU wake up.
    pub launch_and_wait_ns: TimeStats,
    /// GPU time of a fixed matrix product right after: longer while clocks are still low.
    pub compute_ns: TimeStats,
}

/// Spread of the single-thread score over several short runs, million iterations a second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreSpread {
    /// Number of runs.
    pub n: u32,
    /// Slowest run.
    pub min: f64,
    /// Median of the runs: the score.
    pub median: f64,
    /// Fastest run.
    pub max: f64,
}

impl ScoreSpread {
    /// Summarises the scores of several runs; `None` when there are none or one is not finite.
    #[must_use]
    pub fn from_scores(scores: &[f64]) -> Option<Self> {
        // The same order statistics as of times.
        let stats = TimeStats::from_times(scores)?;
        Some(Self { n: stats.n, min: stats.min_ns, median: stats.p50_ns, max: stats.max_ns })
    }

    /// Whether the runs lie so far apart that something else was running beside them: over a tenth.
    #[must_use]
    pub fn is_disturbed(&self) -> bool {
        self.max > 1.1 * self.min
    }

    fn check(&self) -> Result<(), CheckError> {
        if self.n == 0 {
            return Err(CheckError::new("n", "at least 1", 0));
        }
        check_positive("min", self.min)?;
        for (key, value, (below_key, below)) in
            [("median", self.median, ("min", self.min)), ("max", self.max, ("median", self.median))]
        {
            check_positive(key, value)?;
            if value < below {
                return Err(CheckError::new(key, format!("at least {below_key} = {below}"), value));
            }
        }
        Ok(())
    }
}

/// How the CPU was set and how busy it was; `None` where the system does not tell.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CpuState {
    /// Frequency governor of the first core: `performance`, `powersave`, ...
    #[serde(default)]
    pub governor: Option<String>,
    /// Clock of the first core when measuring began, MHz.
    #[serde(default)]
    pub current_mhz: Option<f64>,
    /// Highest clock that the first core may take, MHz.
    #[serde(default)]
    pub max_mhz: Option<f64>,
    /// One-minute load average when measuring began: threads that ran or wanted to.
    #[serde(default)]
    pub load_before: Option<f64>,
    /// One-minute load average when measuring had ended.
    #[serde(default)]
    pub load_after: Option<f64>,
}

impl CpuState {
    fn check(&self) -> Result<(), CheckError> {
        for (key, value) in [
            ("current_mhz", self.current_mhz),
            ("max_mhz", self.max_mhz),
            ("load_before", self.load_before),
            ("load_after", self.load_after),
        ] {
            value.map_or(Ok(()), |value| check_non_negative(key, value))?;
        }
        Ok(())
    }
}

/// Costs of the host's side of a step, measured with the GPU's queue kept empty or full as named.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostCosts {
    /// CPU model as the system names it.
    pub cpu_model: String,
    /// Logical cores.
    pub num_cores: u32,
    /// Single-thread score: million iterations a second of a fixed integer and pointer-chasing loop, median of runs.
    pub single_thread_score: f64,
    /// Spread of the score; `None` when not recorded.
    #[serde(default)]
    pub score: Option<ScoreSpread>,
    /// How the CPU was set and how busy it was.
    #[serde(default)]
    pub cpu: CpuState,
    /// Host time of one kernel launch call, queue not full.
    pub kernel_launch_ns: TimeStats,
    /// Kernel launches by how many stand in a row; empty when not measured.
    #[serde(default)]
    pub launch_rows: Vec<LaunchRowCost>,
    /// Kernel launches by number of arguments; empty when not measured.
    #[serde(default)]
    pub launch_arguments: Vec<LaunchArgumentsCost>,
    /// GPU time from one small kernel's end to the next one's end when both were queued: the floor of any kernel.
    pub kernel_gap_ns: TimeStats,
    /// Host time of one graph launch, by size.
    pub graph_launch: Vec<GraphLaunchCost>,
    /// Host time of synchronising with an idle stream.
    pub synchronize_ns: TimeStats,
    /// Host time of synchronising with a stream whose work has just ended; `None` when not measured.
    #[serde(default)]
    pub synchronize_after_work_ns: Option<TimeStats>,
    /// Events; `None` when not measured.
    #[serde(default)]
    pub events: Option<EventCosts>,
    /// Small copies.
    pub copies: Vec<CopyCost>,
    /// Copies of a step's inputs; empty when not measured.
    #[serde(default)]
    pub input_copies: Vec<InputCopyCost>,
    /// Waking up, by length of the idle gap; empty when not measured.
    #[serde(default)]
    pub after_idle: Vec<AfterIdleCost>,
}

impl HostCosts {
    /// The host by what its speed is told by.
    #[must_use]
    pub fn info(&self) -> HostInfo {
        HostInfo { cpu_model: Some(self.cpu_model.clone()), single_thread_score: self.single_thread_score }
    }

    /// Median host time of launching a graph of `num_nodes` kernels, ns: linear between the sizes measured, and that
    /// of the nearest one outside of them; `None` when none was measured.
    #[must_use]
    pub fn graph_launch_at(&self, num_nodes: u32) -> Option<f64> {
        let at_least = self.graph_launch.iter().filter(|cost| cost.num_nodes >= num_nodes);
        let above = at_least.min_by_key(|cost| cost.num_nodes);
        let at_most = self.graph_launch.iter().filter(|cost| cost.num_nodes <= num_nodes);
        let below = at_most.max_by_key(|cost| cost.num_nodes);
        let (Some(below), Some(above)) = (below, above) else {
            return below.or(above).map(|cost| cost.launch_ns.p50_ns);
        };
        let (low, high) = (below.launch_ns.p50_ns, above.launch_ns.p50_ns);
        let span = f64::from(above.num_nodes - below.num_nodes);
        let share = if span > 0.0 { f64::from(num_nodes - below.num_nodes) / span } else { 0.0 };
        Some(low + share * (high - low))
    }

    /// Every measured time with its key.
    fn times(&self) -> Vec<(String, &TimeStats)> {
        let mut all = vec![
            ("kernel_launch_ns".to_owned(), &self.kernel_launch_ns),
            ("kernel_gap_ns".to_owned(), &self.kernel_gap_ns),
            ("synchronize_ns".to_owned(), &self.synchronize_ns),
        ];
        all.extend(
            self.synchronize_after_work_ns.iter().map(|t| ("synchronize_after_work_ns".to_owned(), t)),
        );
        if let Some(events) = &self.events {
            all.push(("events.record_ns".to_owned(), &events.record_ns));
            all.push(("events.query_ns".to_owned(), &events.query_ns));
            all.push(("events.synchronize_ns".to_owned(), &events.synchronize_ns));
        }
        for (i, cost) in self.launch_rows.iter().enumerate() {
            all.push((format!("launch_rows[{i}].launch_ns"), &cost.launch_ns));
        }
        for (i, cost) in self.launch_arguments.iter().enumerate() {
            all.push((format!("launch_arguments[{i}].launch_ns"), &cost.launch_ns));
        }
        for (i, cost) in self.graph_launch.iter().enumerate() {
            all.push((format!("graph_launch[{i}].launch_ns"), &cost.launch_ns));
        }
        for (i, cost) in self.copies.iter().enumerate() {
            all.push((format!("copies[{i}].to_device_ns"), &cost.to_device_ns));
            all.push((format!("copies[{i}].to_host_ns"), &cost.to_host_ns));
        }
        for (i, cost) in self.input_copies.iter().enumerate() {
            for (kind, times) in [("pinned", &cost.pinned), ("pageable", &cost.pageable)] {
                all.push((format!("input_copies[{i}].{kind}.call_ns"), &times.call_ns));
                all.push((format!("input_copies[{i}].{kind}.done_ns"), &times.done_ns));
            }
        }
        for (i, cost) in self.after_idle.iter().enumerate() {
            all.push((format!("after_idle[{i}].launch_and_wait_ns"), &cost.launch_and_wait_ns));
            all.push((format!("after_idle[{i}].compute_ns"), &cost.compute_ns));
        }
        all
    }

    /// Checks that every number can be a measured time.
    ///
    /// # Errors
    /// Names the key.
    pub fn check(&self) -> Result<(), CheckError> {
        check_positive("single_thread_score", self.single_thread_score)?;
        self.score.map_or(Ok(()), |spread| spread.check().map_err(|e| e.under("score")))?;
        self.cpu.check().map_err(|e| e.under("cpu"))?;
        for (key, stats) in self.times() {
            stats.check().map_err(|e| e.under(&key))?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn some(ns: f64) -> TimeStats {
        TimeStats::from_times(&[ns, 1.5 * ns]).unwrap()
    }

    fn copy(ns: f64) -> CopyTimes {
        CopyTimes { call_ns: some(ns), done_ns: some(3.0 * ns) }
    }

    /// Costs with every part.
    pub(crate) fn full() -> HostCosts {
        HostCosts {
            cpu_model: "made-up".into(),
            num_cores: 4,
            single_thread_score: 100.0,
            score: ScoreSpread::from_scores(&[101.0, 98.0, 100.0]),
            cpu: CpuState {
                governor: Some("performance".into()),
                load_before: Some(0.0),
                ..CpuState::default()
            },
            kernel_launch_ns: some(2_500.0),
            launch_rows: vec![LaunchRowCost { num_launches: 64, launch_ns: some(2_400.0) }],
            launch_arguments: vec![LaunchArgumentsCost { num_arguments: 8, launch_ns: some(2_600.0) }],
            kernel_gap_ns: some(900.0),
            graph_launch: [(8, 1_000.0), (64, 2_000.0), (512, 9_000.0)]
                .map(|(num_nodes, ns)| GraphLaunchCost {
                    num_nodes,
                    launch_ns: TimeStats::from_times(&[ns]).unwrap(),
                })
                .to_vec(),
            synchronize_ns: some(2_000.0),
            synchronize_after_work_ns: Some(some(3_000.0)),
            events: Some(EventCosts {
                record_ns: some(700.0),
                query_ns: some(300.0),
                synchronize_ns: some(500.0),
            }),
            copies: vec![CopyCost { num_bytes: 64, to_device_ns: some(8_000.0), to_host_ns: some(9_000.0) }],
            input_copies: vec![InputCopyCost {
                num_bytes: 64,
                pinned: copy(2_000.0),
                pageable: copy(3_000.0),
            }],
            after_idle: vec![AfterIdleCost {
                idle_ns: 1_000_000,
                launch_and_wait_ns: some(20_000.0),
                compute_ns: some(200_000.0),
            }],
        }
    }

    #[test]
    fn host_costs_round_trip_and_those_of_before_read_without_the_new_keys() {
        let costs = full();
        costs.check().unwrap();
        let mut value = serde_json::to_value(&costs).unwrap();
        assert_eq!(serde_json::from_value::<HostCosts>(value.clone()).unwrap(), costs);
        let new = [
            "score",
            "cpu",
            "launch_rows",
            "launch_arguments",
            "synchronize_after_work_ns",
            "events",
            "input_copies",
            "after_idle",
        ];
        for key in new {
            value.as_object_mut().unwrap().remove(key).unwrap();
        }
        let old: HostCosts = serde_json::from_value(value).unwrap();
        old.check().unwrap();
        assert_eq!((old.copies.len(), old.graph_launch.len()), (1, 3));
        assert_eq!((old.score, old.events, old.cpu.clone()), (None, None, CpuState::default()));
        assert!(old.launch_rows.is_empty() && old.after_idle.is_empty());
        assert_eq!(old.info(), costs.info());
    }

    #[test]
    fn impossible_host_costs_name_the_key() {
        type Spoil = fn(&mut HostCosts);
        let cases: [(Spoil, &str); 9] = [
            (|c| c.single_thread_score = 0.0, "single_thread_score"),
            (|c| c.score.as_mut().unwrap().median = 200.0, "score.max"),
            (|c| c.cpu.load_before = Some(-1.0), "cpu.load_before"),
            (|c| c.launch_rows[0].launch_ns.min_ns = 0.0, "launch_rows[0].launch_ns.min_ns"),
            (|c| c.launch_arguments[0].launch_ns.n = 0, "launch_arguments[0].launch_ns.n"),
            (|c| c.events.as_mut().unwrap().query_ns.std_ns = f64::NAN, "events.query_ns.std_ns"),
            (|c| c.input_copies[0].pageable.done_ns.max_ns = 1.0, "input_copies[0].pageable.done_ns.max_ns"),
            (|c| c.after_idle[0].compute_ns.p50_ns = 1.0, "after_idle[0].compute_ns.p50_ns"),
            (|c| c.synchronize_after_work_ns.as_mut().unwrap().n = 0, "synchronize_after_work_ns.n"),
        ];
        for (spoil, key) in cases {
            let mut costs = full();
            spoil(&mut costs);
            assert_eq!(costs.check().unwrap_err().key, key);
        }
    }

    #[test]
    fn graph_launches_are_linear_between_sizes_and_constant_outside() {
        let costs = full();
        for (num_nodes, expected) in
            [(1, 1_000.0), (8, 1_000.0), (36, 1_500.0), (512, 9_000.0), (2_048, 9_000.0)]
        {
            assert_eq!(costs.graph_launch_at(num_nodes), Some(expected), "{num_nodes}");
        }
        assert_eq!(HostCosts { graph_launch: vec![], ..costs }.graph_launch_at(8), None);
    }

    #[test]
    fn a_score_is_the_median_of_its_runs() {
        let spread = ScoreSpread::from_scores(&[120.0, 80.0, 100.0]).unwrap();
        assert_eq!(spread, ScoreSpread { n: 3, min: 80.0, median: 100.0, max: 120.0 });
        assert!(spread.is_disturbed());
        assert!(!ScoreSpread::from_scores(&[100.0, 104.0, 109.0]).unwrap().is_disturbed());
        assert_eq!(ScoreSpread::from_scores(&[]), None);
        assert_eq!(ScoreSpread::from_scores(&[1.0, f64::INFINITY]), None);
    }
}

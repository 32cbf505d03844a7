//! What is printed about a simulation, and written into `summary.json`.

use std::{collections::BTreeMap, path::Path};

use plumbline_schema::{GpuSpec, HostFactorBasis, HostFactorUsed, HostInfo, Nanos, Operator, RunInfo};
use plumbline_simulator::{
    Coverage, Rejection, SimulationCounts,
    cluster::{ClusterRun, ReplicaSummary},
    output::{DistributionSummary, Summaries},
    step_time::usage::Usage,
};
use plumbline_validator::{Metric, Stat, Unavailable};
use serde::Serialize;

use crate::output::{Table, Text, ns_to_ms, percent};

/// What is printed about a simulation.
#[derive(Serialize)]
pub struct Report<'a> {
    out: &'a Path,
    counts: SimulationCounts,
    coverage: Coverage,
    metrics: Vec<MetricLine>,
    /// Every distribution by name, in the unit of the name.
    distributions: &'a Summaries,
    rejected: Vec<Rejected>,
    /// The last step's end.
    end_ns: Nanos,
    output_tokens_per_s: f64,
    gpus: Vec<GpuUse>,
    replicas: Vec<ReplicaSummary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<&'a HostInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_factor: Option<&'a HostFactorUsed>,
}

#[derive(Serialize)]
struct MetricLine {
    metric: Metric,
    stat: Stat,
    sim_ms: Option<f64>,
    /// With every operator at the low end of its interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    low_ms: Option<f64>,
    /// With every operator at the high end of its interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    high_ms: Option<f64>,
    na_reason: Option<String>,
}

#[derive(Serialize)]
struct Rejected {
    request_id: u64,
    reason: String,
}

/// What the GPUs of one kind of engine did.
#[derive(Serialize)]
struct GpuUse {
    gpu: String,
    /// Model FLOPs utilisation over the run.
    mfu: Option<f64>,
    /// Memory bandwidth utilisation over the run.
    mbu: Option<f64>,
    /// GPU time of all operators, ns.
    gpu_time_ns: f64,
    /// Shares of that time, by operator.
    time_shares: BTreeMap<Operator, f64>,
}

impl GpuUse {
    fn new(gpu: &GpuSpec, usage: &Usage, end: Nanos) -> Self {
        let shares = usage.operators.keys().map(|&operator| (operator, usage.time_share(operator)));
        Self {
            gpu: gpu.name.clone(),
            mfu: usage.mfu(gpu, end),
            mbu: usage.mbu(gpu, end),
            gpu_time_ns: usage.gpu_time_ns(),
            time_shares: shares.collect(),
        }
    }
}

/// A statistic of a metric, ms, where there are samples enough.
fn stat_ms(summaries: &Summaries, metric: Metric, stat: Stat) -> Result<f64, Unavailable> {
    let none = DistributionSummary::default();
    let summary = summaries.get(format!("{metric}_ns").as_str()).unwrap_or(&none);
    let too_few = Unavailable::TooFew { stat, has: summary.n as usize };
    if (summary.n as usize) < stat.min_samples() {
        return Err(too_few);
    }
    let value = match stat {
        Stat::Mean => summary.mean,
        Stat::P50 => summary.p50,
        Stat::P90 => summary.p90,
        Stat::P99 => summary.p99,
    };
    value.map(ns_to_ms).ok_or(too_few)
}

impl<'a> Report<'a> {
    /// Of a run on `gpus`, one a kind; `edges` are the distributions at the low and high end of the intervals.
    pub fn new(
        out: &'a Path,
        info: &'a RunInfo,
        gpus: &[GpuSpec],
        run: &ClusterRun,
        distributions: &'a Summaries,
        edges: Option<&[Summaries; 2]>,
        rejections: &[(u64, Rejection)],
    ) -> Self {
        let pairs = Metric::ALL.into_iter().flat_map(|metric| Stat::ALL.map(|stat| (metric, stat)));
        let line = |(metric, stat)| {
            let at = |edge: usize| edges.and_then(|edges| stat_ms(&edges[edge], metric, stat).ok());
            let value = stat_ms(distributions, metric, stat);
            MetricLine {
                metric,
                stat,
                sim_ms: value.as_ref().ok().copied(),
                low_ms: at(0),
                high_ms: at(1),
                na_reason: value.err().map(|reason| reason.to_string()),
            }
        };
        let rejected = rejections.iter();
        let uses = gpus.iter().zip(&run.usage).map(|(gpu, usage)| GpuUse::new(gpu, usage, run.end));
        let seconds = run.end.0 as f64 / 1e9;
        Self {
            out,
            counts: run.counts,
            coverage: run.coverage,
            metrics: pairs.map(line).collect(),
            distributions,
            rejected: rejected
                .map(|(id, reason)| Rejected { request_id: *id, reason: reason.to_string() })
                .collect(),
            end_ns: run.end,
            output_tokens_per_s: if seconds > 0.0 { run.output_tokens as f64 / seconds } else { 0.0 },
            gpus: uses.collect(),
            replicas: run.replica_summaries(),
            host: info.host.as_ref(),
            host_factor: info.host_factor.as_ref(),
        }
    }

    /// What a host factor rests on, in words.
    fn why(&self, used: &HostFactorUsed) -> String {
        match (used.basis, used.fitted_score, self.host) {
            (HostFactorBasis::Scores, Some(fitted), Some(host)) => format!(
                "the host fitted on scores {fitted:.1}, the one asked for {:.1}",
                host.single_thread_score
            ),
            (HostFactorBasis::Runs, ..) => {
                format!("read off {} steps of real runs", used.num_steps.unwrap_or_default())
            }
            _ => "as in the engine profile, which does not say which host it was fitted on".to_owned(),
        }
    }

    /// The report as people read it.
    pub fn text(&self) -> String {
        let mut text = Text::default();
        self.overview(&mut text);
        text.line("");
        text.line(self.table());
        for rejected in self.rejected.iter().take(MAX_REJECTED_LINES) {
            text.line(format_args!("rejected request {}: {}", rejected.request_id, rejected.reason));
        }
        let more = self.counts.rejected.saturating_sub(MAX_REJECTED_LINES);
        if more > 0 {
            text.line(format_args!("and {more} more rejected"));
        }
        text.finish()
    }

    fn overview(&self, text: &mut Text) {
        let counts = &self.counts;
        let coverage = [
            ("measured", self.coverage.measured),
            ("interpolated", self.coverage.interpolated),
            ("extrapolated", self.coverage.extrapolated),
            ("transferred", self.coverage.transferred),
            ("roofline", self.coverage.roofline),
        ];
        let shares: Vec<_> = coverage
            .iter()
            .filter(|(_, share)| *share > 0.0)
            .map(|(name, share)| format!("{} {name}", percent(*share)))
            .collect();
        text.line(format_args!(
            "{} requests: {} finished, {} rejected; {} preemptions",
            counts.requests, counts.finished, counts.rejected, counts.preemptions
        ));
        text.line(format_args!(
            "steps: {} eager, {} piecewise graph, {} full graph",
            counts.eager_steps, counts.piecewise_graph_steps, counts.full_graph_steps
        ));
        text.line(format_args!("GPU time: {}", shares.join(", ")));
        for gpu in &self.gpus {
            let of = |share: Option<f64>| share.map_or_else(|| "n/a".to_owned(), percent);
            let (mfu, mbu) = (of(gpu.mfu), of(gpu.mbu));
            text.line(format_args!("{}: MFU {mfu}, memory bandwidth {mbu}", gpu.gpu));
        }
        if let [only] = &self.replicas[..] {
            text.line(format_args!(
                "KV cache: {} used on average, {} at most; {:.1} output tokens/s",
                percent(only.kv_use_mean),
                percent(only.kv_use_max),
                self.output_tokens_per_s
            ));
        } else {
            let busy = self.replicas.iter().map(|replica| replica.gpu_busy_share);
            let (least, most) =
                busy.fold((1.0_f64, 0.0_f64), |(least, most), busy| (least.min(busy), most.max(busy)));
            text.line(format_args!(
                "{} replicas: GPUs busy {} to {} of the time; {:.1} output tokens/s",
                self.replicas.len(),
                percent(least),
                percent(most),
                self.output_tokens_per_s
            ));
        }
        if let Some(used) = self.host_factor {
            text.line(format_args!("host factor {:.3}: {}", used.factor, self.why(used)));
        }
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&["metric", ">mean ms", ">p50 ms", ">p90 ms", ">p99 ms"]);
        for rows in self.metrics.chunks(Stat::ALL.len()) {
            let cell = |row: &MetricLine| match (row.sim_ms, row.low_ms, row.high_ms) {
                (Some(ms), Some(low), Some(high)) => format!("{ms:.3} [{low:.3}, {high:.3}]"),
                (Some(ms), ..) => format!("{ms:.3}"),
                _ => "n/a".to_owned(),
            };
            table.row([rows[0].metric.title().to_owned()].into_iter().chain(rows.iter().map(cell)));
        }
        table
    }
}

/// Rejections that are listed one by one.
const MAX_REJECTED_LINES: usize = 10;

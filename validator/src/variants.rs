//! What other tools mean by their names: each tool's metrics as functions over a run.
//!
//! A figure that a tool published can be held only against a figure of the same definition. `docs/metrics.md` has the
//! same definitions in words, with where each tool states them.

use std::collections::HashMap;

use plumbline_bundles::stats::percentile_of_sorted;
use plumbline_schema::{Nanos, RequestMetrics, RequestStatus, Run, RunKind};
use serde::{Deserialize, Serialize};

use crate::{
    compare::error_pct,
    metrics::{Metric, RunMetrics, Unavailable},
};

/// A formula over a finished request: *a* its arrival, *t0* its first token, *c* its last one, *n* tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Definition {
    /// *t0 - a*.
    FirstToken,
    /// *c - a*.
    EndToEnd,
    /// *(c - a) / n*: the prefill weighs in.
    EndToEndPerToken,
    /// *(c - t0) / (n - 1)*, none where *n = 1*.
    MeanGap,
    /// *(c - t0) / n*.
    DecodePerToken,
    /// Every gap between tokens, pooled.
    Gaps,
    /// As [`Self::Gaps`], and a 0 for each request's first token. A simulated run without token times counts as if its
    /// tokens after the first came evenly, at whole nanoseconds: such were the simulated tables published so.
    GapsAndZeros,
}

impl Definition {
    /// The formula, as tables show it.
    #[must_use]
    pub const fn formula(self) -> &'static str {
        match self {
            Self::FirstToken => "t0 - a",
            Self::EndToEnd => "c - a",
            Self::EndToEndPerToken => "(c - a) / n",
            Self::MeanGap => "(c - t0) / (n - 1)",
            Self::DecodePerToken => "(c - t0) / n",
            Self::Gaps => "all gaps",
            Self::GapsAndZeros => "all gaps and a 0 a request",
        }
    }

    /// Its samples over the finished requests of a run, ns, ascending.
    ///
    /// # Errors
    /// The definition wants token times and the run has none.
    pub fn sorted_ns(self, run: &Run) -> Result<Vec<f64>, Unavailable> {
        let mut samples: Vec<f64> = match self {
            Self::Gaps => {
                wants_tokens(run)?;
                return Ok(RunMetrics::of(run).sorted_ns(Metric::Itl));
            }
            Self::GapsAndZeros if run.tokens.is_empty() && run.info.kind == RunKind::Simulated => {
                finished(run).flat_map(Times::even_gaps_and_zero).collect()
            }
            Self::GapsAndZeros => {
                wants_tokens(run)?;
                let gaps = RunMetrics::of(run).sorted_ns(Metric::Itl);
                gaps.into_iter().chain(finished(run).map(|_| 0.0)).collect()
            }
            _ => finished(run).filter_map(|times| times.value(self)).collect(),
        };
        samples.sort_by(f64::total_cmp);
        Ok(samples)
    }
}

fn wants_tokens(run: &Run) -> Result<(), Unavailable> {
    if run.tokens.is_empty() { Err(Unavailable::NoTokenTimes { run: "the run".into() }) } else { Ok(()) }
}

/// What a definition needs of one finished request.
#[derive(Clone, Copy)]
struct Times {
    arrival: Nanos,
    first: Nanos,
    last: Nanos,
    num_tokens: u32,
}

fn finished(run: &Run) -> impl Iterator<Item = Times> {
    let times = |r: &RequestMetrics| {
        Some(Times {
            arrival: r.arrival_time_ns,
            first: r.first_token_time_ns?,
            last: r.completion_time_ns?,
            num_tokens: r.num_decode_tokens_actual,
        })
    };
    run.requests.iter().filter(|r| r.status == RequestStatus::Ok).filter_map(times)
}

impl Times {
    fn value(self, definition: Definition) -> Option<f64> {
        let span = |from: Nanos, to: Nanos| to.saturating_since(from).0 as f64;
        let n = self.num_tokens;
        match definition {
            Definition::FirstToken => Some(span(self.arrival, self.first)),
            Definition::EndToEnd => Some(span(self.arrival, self.last)),
            Definition::EndToEndPerToken => (n > 0).then(|| span(self.arrival, self.last) / f64::from(n)),
            Definition::MeanGap => (n > 1).then(|| span(self.first, self.last) / f64::from(n - 1)),
            Definition::DecodePerToken => (n > 0).then(|| span(self.first, self.last) / f64::from(n)),
            Definition::Gaps | Definition::GapsAndZeros => None,
        }
    }

    fn even_gaps_and_zero(self) -> impl Iterator<Item = f64> {
        let num_gaps = self.num_tokens.saturating_sub(1);
        let span = self.last.saturating_since(self.first).0 as f64;
        let time = move |index: u32| (span * f64::from(index) / f64::from(num_gaps)).round();
        std::iter::once(0.0).chain((1..=num_gaps).map(move |index| time(index) - time(index - 1)))
    }
}

/// A metric as one tool names and defines it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// The tool's own name.
    pub name: &'static str,
    /// The part of the names of its figures that stands for it: `ttft_ms` of `median_ttft_ms`.
    pub key: &'static str,
    /// What it is.
    pub definition: Definition,
    /// What comes closest here.
    pub ours: Metric,
}

const fn variant(name: &'static str, key: &'static str, definition: Definition, ours: Metric) -> Variant {
    Variant { name, key, definition, ours }
}

const VLLM: [Variant; 4] = [
    variant("TTFT", "ttft_ms", Definition::FirstToken, Metric::Ttft),
    variant("TPOT", "tpot_ms", Definition::MeanGap, Metric::Tpot),
    variant("ITL", "itl_ms", Definition::Gaps, Metric::Itl),
    variant("E2EL", "e2el_ms", Definition::EndToEnd, Metric::E2e),
];
const SGLANG: [Variant; 4] = [
    variant("TTFT", "ttft_ms", Definition::FirstToken, Metric::Ttft),
    variant("TPOT", "tpot_ms", Definition::MeanGap, Metric::Tpot),
    variant("ITL", "itl_ms", Definition::Gaps, Metric::Itl),
    variant("E2E latency", "e2e_latency_ms", Definition::EndToEnd, Metric::E2e),
];
const GUIDELLM: [Variant; 4] = [
    variant("time to first token", "time_to_first_token_ms", Definition::FirstToken, Metric::Ttft),
    variant("inter token latency", "inter_token_latency_ms", Definition::MeanGap, Metric::Tpot),
    variant("time per output token", "time_per_output_token_ms", Definition::EndToEndPerToken, Metric::Tpot),
    variant("request latency", "request_latency", Definition::EndToEnd, Metric::E2e),
];
const AIPERF: [Variant; 4] = [
    variant("time_to_first_token", "time_to_first_token", Definition::FirstToken, Metric::Ttft),
    variant("inter_token_latency", "inter_token_latency", Definition::MeanGap, Metric::Tpot),
    variant("inter_chunk_latency", "inter_chunk_latency", Definition::Gaps, Metric::Itl),
    variant("request_latency", "request_latency", Definition::EndToEnd, Metric::E2e),
];
const INFERENCE_PERF: [Variant; 5] = [
    variant("time_to_first_token", "time_to_first_token", Definition::FirstToken, Metric::Ttft),
    variant("time_per_output_token", "time_per_output_token", Definition::MeanGap, Metric::Tpot),
    variant("inter_token_latency", "inter_token_latency", Definition::Gaps, Metric::Itl),
    variant("request_latency", "request_latency", Definition::EndToEnd, Metric::E2e),
    variant(
        "normalized_time_per_output_token",
        "normalized_time_per_output_token",
        Definition::EndToEndPerToken,
        Metric::Tpot,
    ),
];
/// Vidur's and Sarathi-Serve's: the same names and formulas, simulated and measured.
const VIDUR: [Variant; 4] = [
    variant("prefill_e2e_time", "prefill_e2e_time", Definition::FirstToken, Metric::Ttft),
    variant("request_e2e_time", "request_e2e_time", Definition::EndToEnd, Metric::E2e),
    variant(
        "request_e2e_time_normalized",
        "request_e2e_time_normalized",
        Definition::EndToEndPerToken,
        Metric::Tpot,
    ),
    variant(
        "decode_time_execution_plus_preemption_normalized",
        "decode_time_execution_plus_preemption_normalized",
        Definition::DecodePerToken,
        Metric::Tpot,
    ),
];
const SEED: [Variant; 2] = [
    variant("ttft", "ttft", Definition::FirstToken, Metric::Ttft),
    variant("token_latency", "token_latency", Definition::GapsAndZeros, Metric::Itl),
];

/// The metrics of the tool with this name ([`RunSource::tool`](plumbline_schema::RunSource::tool)); none when it is not
/// known.
#[must_use]
pub fn of_tool(tool: &str) -> &'static [Variant] {
    match tool {
        "vllm-bench" => &VLLM,
        "sglang-bench" => &SGLANG,
        "guidellm" => &GUIDELLM,
        "aiperf" => &AIPERF,
        "inference-perf" => &INFERENCE_PERF,
        "vidur" | "sarathi" => &VIDUR,
        "seed" => &SEED,
        _ => &[],
    }
}

/// How a tool takes a percentile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PercentileRule {
    /// Linear interpolation between order statistics: NumPy's and pandas' default, and this project's.
    Linear,
    /// The least value whose cumulated share reaches the percentile: GuideLLM's, `Percentiles.from_pdf` in
    /// `guidellm/schemas/base/statistics.py`.
    Reached,
}

impl PercentileRule {
    /// The rule of a tool.
    #[must_use]
    pub fn of_tool(tool: &str) -> Self {
        if tool == "guidellm" { Self::Reached } else { Self::Linear }
    }

    fn of_sorted(self, sorted: &[f64], share: f64) -> f64 {
        match self {
            Self::Linear => percentile_of_sorted(sorted, share),
            Self::Reached => {
                // Cumulated value by value, as the tool does: the rounding of the sum decides at whole shares.
                let each = 1.0 / sorted.len() as f64;
                let mut cumulated = 0.0;
                let reached = sorted.iter().find(|_| {
                    cumulated += each;
                    cumulated >= share
                });
                reached.or(sorted.last()).copied().unwrap_or_default()
            }
        }
    }
}

/// A statistic of a published figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Statistic {
    /// Arithmetic mean.
    Mean,
    /// The percentile, 0 to 100.
    Percentile(f64),
}

impl Statistic {
    /// Takes `mean`, `avg`, `median` or `p90`.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        match name {
            "mean" | "avg" => Some(Self::Mean),
            "median" => Some(Self::Percentile(50.0)),
            _ => {
                let percent: f64 = name.strip_prefix('p')?.parse().ok()?;
                (0.0..=100.0).contains(&percent).then_some(Self::Percentile(percent))
            }
        }
    }

    /// The statistic of ascending samples; none without any.
    #[must_use]
    pub fn of_sorted(self, sorted: &[f64], rule: PercentileRule) -> Option<f64> {
        if sorted.is_empty() {
            return None;
        }
        Some(match self {
            Self::Mean => sorted.iter().sum::<f64>() / sorted.len() as f64,
            Self::Percentile(percent) => rule.of_sorted(sorted, percent / 100.0),
        })
    }
}

/// Which metric and statistic a figure's name stands for: `median_ttft_ms` and `ttft_p50` alike.
#[must_use]
pub fn figure_of(tool: &str, name: &str) -> Option<(&'static Variant, Statistic)> {
    of_tool(tool).iter().find_map(|variant| {
        let statistic = name
            .strip_suffix(variant.key)
            .and_then(|start| start.strip_suffix('_'))
            .or_else(|| name.strip_prefix(variant.key).and_then(|end| end.strip_prefix(['_', '.'])))?;
        Some((variant, Statistic::by_name(statistic)?))
    })
}

/// One metric and statistic as the tool that recorded the real run defines it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VariantRow {
    /// The tool.
    pub tool: String,
    /// Its name of the metric.
    pub name: String,
    /// The formula over arrival a, first token t0, last token c and n tokens.
    pub formula: String,
    /// The metric of this project that comes closest.
    pub ours: Metric,
    /// `mean`, `p50`, `p90` or `p99`.
    pub stat: String,
    /// The figure in the tool's own file, ms; none where it has none.
    pub published_ms: Option<f64>,
    /// The first real run's, computed anew, ms; none where it cannot be.
    pub real_ms: Option<f64>,
    /// The simulated run's, ms; none where it cannot be.
    pub sim_ms: Option<f64>,
    /// `100 (sim - real) / real` against the run's own figure, or else the published one.
    pub error_pct: Option<f64>,
}

/// The statistics that [`rows`] shows.
const SHOWN: [(&str, Statistic); 4] = [
    ("mean", Statistic::Mean),
    ("p50", Statistic::Percentile(50.0)),
    ("p90", Statistic::Percentile(90.0)),
    ("p99", Statistic::Percentile(99.0)),
];

/// What the tool that recorded `real` would say of both runs; nothing where no known tool did.
///
/// Each run's own finished requests count, as in the tool; percentiles are as the tool shows them, however few the
/// samples.
#[must_use]
pub fn rows(real: &Run, sim: &Run) -> Vec<VariantRow> {
    let Some(source) = &real.info.source else { return Vec::new() };
    let published: HashMap<_, _> = source
        .published
        .iter()
        .filter_map(|(name, &ms)| {
            let (variant, statistic) = figure_of(&source.tool, name)?;
            let shown = SHOWN.into_iter().find(|(_, shown)| *shown == statistic)?;
            Some(((variant.name, shown.0), ms))
        })
        .collect();
    let rule = PercentileRule::of_tool(&source.tool);
    let mut rows = Vec::new();
    for variant in of_tool(&source.tool) {
        let samples = [real, sim].map(|run| variant.definition.sorted_ns(run).unwrap_or_default());
        for (stat, statistic) in SHOWN {
            let [real_ms, sim_ms] =
                [0, 1].map(|run: usize| statistic.of_sorted(&samples[run], rule).map(|ns| ns / 1e6));
            let published_ms = published.get(&(variant.name, stat)).copied();
            if published_ms.is_none() && real_ms.is_none() && sim_ms.is_none() {
                continue;
            }
            rows.push(VariantRow {
                tool: source.tool.clone(),
                name: variant.name.into(),
                formula: variant.definition.formula().into(),
                ours: variant.ours,
                stat: stat.into(),
                published_ms,
                real_ms,
                sim_ms,
                error_pct: real_ms.or(published_ms).zip(sim_ms).and_then(|(real, sim)| error_pct(real, sim)),
            });
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{request, run};

    #[test]
    fn each_definition_by_hand() {
        // Arrives at 10, tokens at 40, 50 and 80.
        let run = run(vec![request(7, 10, &[40, 50, 80])]).with_tokens();
        for (definition, expected) in [
            (Definition::FirstToken, vec![30.0]),
            (Definition::EndToEnd, vec![70.0]),
            (Definition::EndToEndPerToken, vec![70.0 / 3.0]),
            (Definition::MeanGap, vec![20.0]),
            (Definition::DecodePerToken, vec![40.0 / 3.0]),
            (Definition::Gaps, vec![10.0, 30.0]),
            (Definition::GapsAndZeros, vec![0.0, 10.0, 30.0]),
        ] {
            assert_eq!(definition.sorted_ns(&run).unwrap(), expected, "{definition:?}");
        }
    }

    #[test]
    fn real_token_times_are_never_made_up() {
        let mut run = run(vec![request(0, 0, &[10, 30, 45])]).clone();
        assert!(Definition::GapsAndZeros.sorted_ns(&run).is_err());
        run.info.kind = RunKind::Simulated;
        // 35 ns in two gaps at whole nanoseconds.
        assert_eq!(Definition::GapsAndZeros.sorted_ns(&run).unwrap(), [0.0, 17.0, 18.0]);
        assert!(Definition::Gaps.sorted_ns(&run).is_err());
    }

    #[test]
    fn percentiles_by_either_rule() {
        let samples = [1.0, 2.0, 3.0, 4.0];
        let median = |rule| Statistic::Percentile(50.0).of_sorted(&samples, rule);
        assert_eq!(median(PercentileRule::of_tool("vllm-bench")), Some(2.5));
        assert_eq!(median(PercentileRule::of_tool("guidellm")), Some(2.0));
        assert_eq!(Statistic::Percentile(99.0).of_sorted(&samples, PercentileRule::Reached), Some(4.0));
        assert_eq!(Statistic::Mean.of_sorted(&[], PercentileRule::Linear), None);
    }

    #[test]
    fn figures_are_known_by_either_order_of_their_names() {
        let of = |tool, name| figure_of(tool, name).map(|(variant, statistic)| (variant.name, statistic));
        assert_eq!(of("vllm-bench", "median_ttft_ms"), Some(("TTFT", Statistic::Percentile(50.0))));
        assert_eq!(of("vllm-bench", "p99.9_itl_ms"), Some(("ITL", Statistic::Percentile(99.9))));
        assert_eq!(of("seed", "token_latency_p90"), Some(("token_latency", Statistic::Percentile(90.0))));
        assert_eq!(of("vllm-bench", "std_ttft_ms"), None);
        assert_eq!(of("vllm-bench", "p101_ttft_ms"), None);
        assert_eq!(of("vllm-bench", "duration"), None);
    }
}

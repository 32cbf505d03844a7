//! What is printed of a search and kept in its folder.

use plumbline_simulator::search::{
    Bracket, BracketOptions, Economics, Found, Latencies, Limit, Point, Probe, Row, Scenario, pareto_front,
};
use serde::Serialize;

use crate::output::{Table, Text};

/// What every search was asked.
#[derive(Serialize)]
pub struct Asked<'a> {
    limits: &'a [Limit],
    bracket: &'a BracketOptions,
    workload_rate_per_s: f64,
    workload_digest: &'a str,
    seed: u64,
}

impl<'a> Asked<'a> {
    pub fn new(scenario: &Scenario<'a>) -> Self {
        Self {
            limits: scenario.limits,
            bracket: scenario.bracket,
            workload_rate_per_s: scenario.load.rate_per_s(),
            workload_digest: scenario.load.digest(),
            seed: scenario.seed,
        }
    }

    fn limits(&self) -> String {
        self.limits.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    }
}

/// The highest rate of one deployment.
#[derive(Serialize)]
pub struct RateReport<'a> {
    #[serde(flatten)]
    asked: Asked<'a>,
    status: Found,
    reason: Option<String>,
    /// The highest rate that meets the limits.
    rate_per_s: Option<f64>,
    /// The rate within the tolerance above that does not.
    failing_rate_per_s: Option<f64>,
    output_tokens_per_s: Option<f64>,
    probes: &'a [Probe],
    #[serde(skip)]
    ends: Option<(&'a Probe, &'a Probe)>,
}

impl<'a> RateReport<'a> {
    pub fn new(scenario: &Scenario<'a>, found: &'a Bracket<Probe>) -> Self {
        let ends = found.ends();
        let (status, reason) = match ends {
            Ok(_) => (Found::Bracketed, None),
            Err(why) => (Found::NotBracketed, Some(found.in_words(why))),
        };
        let ends = ends.ok();
        Self {
            asked: Asked::new(scenario),
            status,
            reason,
            rate_per_s: ends.map(|(low, _)| low.rate_per_s),
            failing_rate_per_s: ends.map(|(_, high)| high.rate_per_s),
            output_tokens_per_s: ends.and_then(|(low, _)| low.output_tokens_per_s),
            probes: &found.probes,
            ends,
        }
    }

    pub fn text(&self) -> String {
        let mut text = Text::default();
        text.line(format_args!("limits: {}", self.asked.limits()));
        if let Some(reason) = &self.reason {
            text.line(format_args!("not bracketed: {reason}"));
            text.line("");
            text.line(probes_table(self.probes).to_string().trim_end());
        }
        if let Some((low, high)) = self.ends {
            text.line(format_args!(
                "highest rate: {:.4} requests/s, {} output tokens/s ({} rates tried)",
                low.rate_per_s,
                low.output_tokens_per_s.map_or_else(|| "n/a".into(), |rate| format!("{rate:.1}")),
                self.probes.len()
            ));
            text.line(format_args!("at {:.4} requests/s: {}", high.rate_per_s, high.reasons.join("; ")));
            text.line("");
            text.line(ends_table(low, high).to_string().trim_end());
        }
        text.finish()
    }
}

fn ms(value: Option<f64>) -> String {
    value.map_or_else(|| "n/a".to_owned(), |ms| format!("{ms:.3}"))
}

/// Both ends side by side.
fn ends_table(low: &Probe, high: &Probe) -> Table {
    let mut table = Table::new(&["ms", ">meets: p50", ">p90", ">p99", ">fails: p50", ">p90", ">p99"]);
    for (name, found) in &low.latencies {
        let stats = |latencies: &Latencies| [latencies.p50_ms, latencies.p90_ms, latencies.p99_ms].map(ms);
        let other = high.latencies.get(name).map_or_else(|| [None; 3].map(ms), stats);
        table.row([name.clone()].into_iter().chain(stats(found)).chain(other));
    }
    table
}

/// Every rate that was tried.
fn probes_table(probes: &[Probe]) -> Table {
    let mut table = Table::new(&[">requests/s", "meets", "why not"]);
    for probe in probes {
        let meets = if probe.meets { "yes" } else { "no" };
        table.row([format!("{:.6}", probe.rate_per_s), meets.to_owned(), probe.reasons.join("; ")]);
    }
    table
}

/// The deployments of a grid: the cheapest token first, then those without a rate in the grid's order.
#[derive(Serialize)]
pub struct GridReport<'a> {
    #[serde(flatten)]
    asked: Asked<'a>,
    /// Places in `deployments`, in order of cost per hour.
    pareto_front: Vec<usize>,
    deployments: Vec<Row>,
}

/// Cost per hour and rate.
type Place = (f64, f64);

/// A line of `pareto.csv`.
#[derive(Serialize)]
pub struct ParetoRow<'a> {
    rate_per_s: f64,
    cost_per_hour: f64,
    cost_per_million_output_tokens: f64,
    output_tokens_per_s: f64,
    bundle: &'a str,
    engine: &'a str,
    gpu: &'a str,
    scheduler: &'a str,
    max_num_batched_tokens: u32,
    max_num_seqs: u32,
    tensor_parallel_size: u32,
    pipeline_parallel_size: u32,
    replicas: u32,
    router: &'a str,
    num_gpus: u32,
}

impl<'a> GridReport<'a> {
    pub fn new(scenario: &Scenario<'a>, mut rows: Vec<Row>) -> Self {
        let cost = |row: &Row| {
            row.economics.map_or(f64::INFINITY, |economics| economics.cost_per_million_output_tokens)
        };
        // Stable: equals stay in the grid's order.
        rows.sort_by(|a, b| (a.status as u8).cmp(&(b.status as u8)).then(cost(a).total_cmp(&cost(b))));
        let bracketed: Vec<Economics> = rows.iter().map_while(|row| row.economics).collect();
        Self { asked: Asked::new(scenario), pareto_front: pareto_front(&bracketed), deployments: rows }
    }

    /// Those that have a rate, the cheapest token first.
    fn bracketed(&self) -> impl Iterator<Item = (&Point, Economics)> {
        self.deployments.iter().map_while(|row| Some((&row.point, row.economics?)))
    }

    pub fn has_a_rate(&self) -> bool {
        self.bracketed().next().is_some()
    }

    /// Cost per hour and rate of all that have a rate, and of the front.
    pub fn places(&self) -> (Vec<Place>, Vec<Place>) {
        let all: Vec<_> =
            self.bracketed().map(|(_, found)| (found.cost_per_hour, found.rate_per_s)).collect();
        let front = self.pareto_front.iter().map(|&place| all[place]).collect();
        (all, front)
    }

    pub fn pareto_rows(&self) -> impl Iterator<Item = ParetoRow<'_>> {
        let all: Vec<_> = self.bracketed().collect();
        let row = move |&place: &usize| {
            let (point, found) = all[place];
            ParetoRow {
                rate_per_s: found.rate_per_s,
                cost_per_hour: found.cost_per_hour,
                cost_per_million_output_tokens: found.cost_per_million_output_tokens,
                output_tokens_per_s: found.output_tokens_per_s,
                bundle: &point.bundle,
                engine: &point.engine,
                gpu: &point.gpu,
                scheduler: &point.scheduler,
                max_num_batched_tokens: point.max_num_batched_tokens,
                max_num_seqs: point.max_num_seqs,
                tensor_parallel_size: point.tensor_parallel_size,
                pipeline_parallel_size: point.pipeline_parallel_size,
                replicas: point.replicas,
                router: &point.router,
                num_gpus: point.num_gpus,
            }
        };
        self.pareto_front.iter().map(row)
    }

    pub fn text(&self) -> String {
        let mut text = Text::default();
        text.line(format_args!("limits: {}", self.asked.limits()));
        let num_bracketed = self.bracketed().count();
        text.line(format_args!(
            "{} deployments, {num_bracketed} with a highest rate; * are beaten by no other in rate and cost per hour",
            self.deployments.len()
        ));
        text.line("");
        text.line(self.table().to_string().trim_end());
        for (reason, points) in by_reason(&self.deployments[num_bracketed..]) {
            text.line(format_args!("\nwithout a highest rate: {reason}"));
            for point in points {
                text.line(format_args!("  {}", in_words(point)));
            }
        }
        text.finish()
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&[
            "",
            ">cost/M tokens",
            ">cost/h",
            ">requests/s",
            ">tokens/s",
            "gpu",
            "scheduler",
            ">batched",
            ">seqs",
            ">tp",
            ">pp",
            ">replicas",
            "router",
        ]);
        for (place, (point, found)) in self.bracketed().enumerate() {
            let mark = if self.pareto_front.contains(&place) { "*" } else { "" };
            table.row([
                mark.to_owned(),
                format!("{:.4}", found.cost_per_million_output_tokens),
                format!("{:.2}", found.cost_per_hour),
                format!("{:.3}", found.rate_per_s),
                format!("{:.0}", found.output_tokens_per_s),
                point.gpu.clone(),
                point.scheduler.clone(),
                point.max_num_batched_tokens.to_string(),
                point.max_num_seqs.to_string(),
                point.tensor_parallel_size.to_string(),
                point.pipeline_parallel_size.to_string(),
                point.replicas.to_string(),
                point.router.clone(),
            ]);
        }
        table
    }
}

/// The reasons in order of their first deployment, each with all of its deployments.
fn by_reason(rows: &[Row]) -> Vec<(&str, Vec<&Point>)> {
    let mut all: Vec<(&str, Vec<&Point>)> = Vec::new();
    for row in rows {
        let reason = row.reason.as_deref().unwrap_or_default();
        match all.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, points)) => points.push(&row.point),
            None => all.push((reason, vec![&row.point])),
        }
    }
    all
}

/// A deployment in a line.
pub fn in_words(point: &Point) -> String {
    format!(
        "{} {}, {}, max_num_batched_tokens {}, max_num_seqs {}, tp {}, pp {}, {} x {}",
        point.gpu,
        point.engine,
        point.scheduler,
        point.max_num_batched_tokens,
        point.max_num_seqs,
        point.tensor_parallel_size,
        point.pipeline_parallel_size,
        point.replicas,
        point.router
    )
}

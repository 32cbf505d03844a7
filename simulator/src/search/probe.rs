//! What an engine does at one rate, and whether that is good enough.

use std::{cell::RefCell, collections::BTreeMap};

use serde::{Deserialize, Serialize};

use super::{
    Backlog, Bracket, BracketOptions, Judged, Limit, Load, NotBracketed, SearchError,
    backlog::BacklogRecorder,
    limits::{Latency, Standing},
};
use crate::{
    cluster::{Cluster, Engines, Group, Role, RouterKind, Routing},
    output::{DistributionSummary, Summaries},
    residual::Residuals,
    scheduler::SchedulerKind,
    simulate::{SimulateOptions, scheduler_of},
    step_time::StepTimeModel,
    times::{Coverage, OperatorTimes, ProvenanceTimes},
};

/// What every probe of a search shares.
#[derive(Clone, Copy, Debug)]
pub struct Scenario<'a> {
    /// The requests.
    pub load: &'a Load,
    /// What is good enough; at least one.
    pub limits: &'a [Limit],
    /// Where to look.
    pub bracket: &'a BracketOptions,
    /// How requests reach replicas.
    pub router: RouterKind,
    /// Seed of everything drawn.
    pub seed: u64,
    /// Whether steps scatter.
    pub residuals: Residuals,
}

/// What is told of a latency, ms.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "percentiles by their names")]
pub struct Latencies {
    /// Samples.
    pub n: u64,
    pub mean_ms: Option<f64>,
    pub p50_ms: Option<f64>,
    pub p90_ms: Option<f64>,
    pub p95_ms: Option<f64>,
    pub p99_ms: Option<f64>,
}

impl From<DistributionSummary> for Latencies {
    fn from(summary: DistributionSummary) -> Self {
        let ms = |ns: Option<f64>| ns.map(|ns| ns / 1e6);
        Self {
            n: summary.n,
            mean_ms: ms(summary.mean),
            p50_ms: ms(summary.p50),
            p90_ms: ms(summary.p90),
            p95_ms: ms(summary.p95),
            p99_ms: ms(summary.p99),
        }
    }
}

/// A simulation at one rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// The rate asked for, requests per second.
    pub rate_per_s: f64,
    /// Whether every limit is met, no request was rejected and the backlog does not grow.
    pub meets: bool,
    /// What speaks against it; empty when it meets the limits.
    pub reasons: Vec<String>,
    /// Whether no lower rate does better.
    pub is_hopeless: bool,
    /// Requests that got all their tokens.
    pub num_finished: u64,
    /// Requests that could never be served.
    pub num_rejected: u64,
    /// How often a sequence lost its blocks.
    pub num_preemptions: u64,
    /// Gaps between arrivals per second from the first to the last, as drawn; none when they came at once.
    pub arrivals_per_s: Option<f64>,
    /// The same times the mean output of a request: what the engine puts out as long as its backlog does not grow.
    pub output_tokens_per_s: Option<f64>,
    /// Latencies by name.
    pub latencies: BTreeMap<String, Latencies>,
    /// Requests that arriving ones found.
    pub backlog: Backlog,
    /// Shares of the predicted GPU time, by provenance.
    pub coverage: Coverage,
}

impl Judged for Probe {
    fn rate_per_s(&self) -> f64 {
        self.rate_per_s
    }
    fn meets(&self) -> bool {
        self.meets
    }
    fn is_hopeless(&self) -> bool {
        self.is_hopeless
    }
}

/// Simulates one deployment at any rate; what it has predicted is kept from one rate to the next.
pub struct Prober<'a, T: OperatorTimes> {
    step_time: RefCell<StepTimeModel<T>>,
    scheduler: SchedulerKind,
    num_replicas: u32,
    scenario: &'a Scenario<'a>,
}

impl<'a, T: OperatorTimes> Prober<'a, T> {
    /// Of engines that serve whole requests.
    ///
    /// # Errors
    /// When the engine cannot be simulated as deployed.
    pub fn new(engines: Engines<T>, scenario: &'a Scenario<'a>) -> Result<Self, SearchError> {
        let Engines { model, deployment, profile, times, num_replicas, .. } = engines;
        let scheduler = scheduler_of(&profile)?;
        let step_time = StepTimeModel::new(&model, times, &profile, &deployment)
            .map_err(crate::simulate::SimulateError::from)?;
        Ok(Self { step_time: RefCell::new(step_time), scheduler, num_replicas, scenario })
    }

    /// Simulates the load at a rate.
    ///
    /// # Errors
    /// When it cannot be simulated.
    pub fn probe(&self, rate_per_s: f64) -> Result<Probe, SearchError> {
        let Scenario { load, limits, router, seed, residuals, .. } = *self.scenario;
        let options = SimulateOptions { seed, residuals, ..SimulateOptions::default() };
        let group = Group {
            step_time: &self.step_time,
            scheduler: self.scheduler,
            num_replicas: self.num_replicas,
            role: Role::Whole,
        };
        let routing = Routing { router, kv_transfer: None };
        let mut source = load.at(rate_per_s, seed)?;
        let mut recorder = BacklogRecorder::new();
        let reports = Cluster::new(&[group], routing, &options)?.run(&mut source, &mut recorder)?;
        let mut provenance = ProvenanceTimes::default();
        for report in &reports {
            provenance += report.busy.provenance;
        }
        let num_preemptions = reports.iter().map(|report| report.counts.preemptions).sum();
        let BacklogRecorder { reporter, stays, num_output_tokens, num_rejected } = recorder;
        let (summaries, rejections) = reporter.finish()?;
        let num_finished = stays.len() as u64;
        let (first, last) = (stays.iter().map(|stay| stay.0).min(), stays.iter().map(|stay| stay.0).max());
        let span_s = last.zip(first).map_or(0.0, |(last, first)| last.saturating_since(first).0 as f64 / 1e9);
        let arrivals_per_s = (span_s > 0.0).then(|| (num_finished - 1) as f64 / span_s);
        let output_tokens_per_s =
            arrivals_per_s.map(|rate| rate * num_output_tokens as f64 / num_finished as f64);
        let backlog = Backlog::of(stays);
        let rejected = rejections
            .first()
            .map(|(id, why)| format!("{num_rejected} requests are rejected, the first of them {id}: {why}"));
        let (reasons, is_hopeless) = judge(limits, &summaries, &backlog, rejected);
        Ok(Probe {
            rate_per_s,
            meets: reasons.is_empty(),
            reasons,
            is_hopeless,
            num_finished,
            num_rejected,
            num_preemptions,
            arrivals_per_s,
            output_tokens_per_s,
            latencies: Latency::ALL.map(|l| (l.name().to_owned(), l.of(&summaries).into())).into(),
            backlog,
            coverage: provenance.shares(),
        })
    }
}

/// What speaks against a rate, and whether that is none of the rate's doing: what is rejected is so at any rate, too
/// few samples do not become more, and who finds no other is served as fast as can be.
fn judge(
    limits: &[Limit],
    summaries: &Summaries,
    backlog: &Backlog,
    rejected: Option<String>,
) -> (Vec<String>, bool) {
    let mut is_hopeless = rejected.is_some() || backlog.max == 0;
    let mut reasons: Vec<String> = rejected.into_iter().collect();
    if backlog.is_growing() {
        let [second, _, fourth] = backlog.quarter_means;
        reasons.push(format!(
            "the backlog grows: arriving requests find {second:.1} others in the second quarter of the run, \
             {fourth:.1} in the last"
        ));
    }
    for limit in limits {
        match limit.judge(summaries) {
            Standing::Met => {}
            Standing::Broken(why) => reasons.push(why),
            Standing::Unsupported(why) => {
                is_hopeless = true;
                reasons.push(why);
            }
        }
    }
    let is_hopeless = is_hopeless && !reasons.is_empty();
    (reasons, is_hopeless)
}

impl Bracket<Probe> {
    /// Why there is no highest rate: the rate at the end, and what speaks against it.
    #[must_use]
    pub fn in_words(&self, why: NotBracketed) -> String {
        let rates = || self.probes.iter().map(|probe| probe.rate_per_s);
        let tried = format!("{} tried", self.probes.len());
        match why {
            NotBracketed::AllMeet => {
                let highest = rates().fold(0.0, f64::max);
                format!("{why}: {highest:.6} requests/s ({tried})")
            }
            NotBracketed::NoneMeets => {
                let lowest = self.probes.iter().min_by(|a, b| a.rate_per_s.total_cmp(&b.rate_per_s));
                let reasons = lowest.map(|probe| probe.reasons.join("; ")).unwrap_or_default();
                let rate = rates().fold(f64::INFINITY, f64::min);
                format!("{why}: {rate:.6} requests/s ({tried}): {reasons}")
            }
        }
    }
}

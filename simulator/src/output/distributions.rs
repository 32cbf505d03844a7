//! Distributions of a simulation's times and batches, exact at any size.

use std::{collections::BTreeMap, io};

use plumbline_schema::Nanos;
use serde::Serialize;

use crate::{metrics::ExactQuantiles, recorder::Outcome};

/// Times of requests, gaps between tokens, and batches.
///
/// Those of requests follow Vidur's metrics (microsoft/vidur, `vidur/metrics/constants.py` and `metrics_store.py`);
/// `docs/metrics.md` names each one's counterpart.
#[derive(Debug)]
pub struct Distributions {
    ttft: ExactQuantiles,
    itl: ExactQuantiles,
    tpot: ExactQuantiles,
    e2e: ExactQuantiles,
    scheduling_delay: ExactQuantiles,
    execution: ExactQuantiles,
    preemption: ExactQuantiles,
    in_service: ExactQuantiles,
    prefill: ExactQuantiles,
    per_token: PerToken,
    num_preemptions: ExactQuantiles,
    batch_time: ExactQuantiles,
    batch_size: ExactQuantiles,
    batch_tokens: ExactQuantiles,
}

/// Times of a request over its number of output tokens, or of prompt tokens.
#[derive(Debug)]
struct PerToken {
    e2e: ExactQuantiles,
    execution: ExactQuantiles,
    in_service: ExactQuantiles,
    /// Over prompt tokens.
    prefill: ExactQuantiles,
    decode: ExactQuantiles,
}

/// Memory of a distribution over requests. There are many of them, and few requests to a step: it holds 65,536 requests
/// before any file.
const REQUEST_BYTES: usize = 1 << 20;

/// Memory of a distribution over batches, most of which are as the one before.
const BATCH_BYTES: usize = 2 << 20;

impl Default for Distributions {
    fn default() -> Self {
        let of_requests = || ExactQuantiles::new(REQUEST_BYTES);
        Self {
            ttft: of_requests(),
            itl: ExactQuantiles::default(),
            tpot: of_requests(),
            e2e: of_requests(),
            scheduling_delay: of_requests(),
            execution: of_requests(),
            preemption: of_requests(),
            in_service: of_requests(),
            prefill: of_requests(),
            per_token: PerToken {
                e2e: of_requests(),
                execution: of_requests(),
                in_service: of_requests(),
                prefill: of_requests(),
                decode: of_requests(),
            },
            num_preemptions: of_requests(),
            batch_time: ExactQuantiles::default(),
            batch_size: ExactQuantiles::new(BATCH_BYTES),
            batch_tokens: ExactQuantiles::new(BATCH_BYTES),
        }
    }
}

/// A mean over tokens is kept in picoseconds, since it is no whole number of nanoseconds.
const PER_TOKEN_UNITS_PER_NS: f64 = 1e3;

/// A time over a number of tokens, in the unit it is kept in.
fn per_token(ns: f64, num_tokens: u32) -> u64 {
    Nanos::from_f64(ns / f64::from(num_tokens) * PER_TOKEN_UNITS_PER_NS).0
}

/// The percentiles that are told of every distribution.
pub const PERCENTILES: [f64; 5] = [50.0, 90.0, 95.0, 99.0, 99.9];

/// What is told of one distribution, in its unit: ns, or a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct DistributionSummary {
    /// Samples.
    pub n: u64,
    /// Arithmetic mean.
    pub mean: Option<f64>,
    /// Least.
    pub min: Option<f64>,
    /// Median.
    pub p50: Option<f64>,
    /// 90th percentile.
    pub p90: Option<f64>,
    /// 95th percentile.
    pub p95: Option<f64>,
    /// 99th percentile.
    pub p99: Option<f64>,
    /// 99.9th percentile.
    pub p999: Option<f64>,
    /// Greatest.
    pub max: Option<f64>,
}

/// Every distribution by name.
pub type Summaries = BTreeMap<&'static str, DistributionSummary>;

impl Distributions {
    /// Adds `count` gaps between tokens.
    #[inline]
    pub(super) fn gaps(&mut self, gap: Nanos, count: u32) -> io::Result<()> {
        self.itl.push(gap.0, count)
    }

    /// Adds the batches of `count` steps.
    #[inline]
    pub(super) fn batches(&mut self, num_seqs: u32, num_tokens: u32, count: u32) -> io::Result<()> {
        self.batch_size.push(num_seqs.into(), count)?;
        self.batch_tokens.push(num_tokens.into(), count)
    }

    /// Adds a step's duration.
    #[inline]
    pub(super) fn batch_time(&mut self, duration: Nanos) -> io::Result<()> {
        self.batch_time.push(duration.0, 1)
    }

    /// Adds a request that left; of a rejected one there is nothing to add.
    pub(super) fn request(&mut self, outcome: &Outcome) -> io::Result<()> {
        let (Some(ttft), Some(e2e)) = (outcome.ttft(), outcome.e2e()) else { return Ok(()) };
        self.ttft.push(ttft.0, 1)?;
        self.e2e.push(e2e.0, 1)?;
        if let Some(tpot_ns) = outcome.tpot_ns() {
            self.tpot.push(per_token(tpot_ns, 1), 1)?;
        }
        self.execution.push(outcome.executed.0, 1)?;
        let Some(first_scheduled) = outcome.first_scheduled else { return Ok(()) };
        let delay = first_scheduled.saturating_since(outcome.request.arrival_time_ns);
        self.scheduling_delay.push(delay.0, 1)?;
        let since = e2e.saturating_since(delay);
        self.preemption.push(since.saturating_since(outcome.executed).0, 1)?;
        self.num_preemptions.push(outcome.num_preemptions.into(), 1)?;
        self.in_service.push(since.0, 1)?;
        let prefill = ttft.saturating_since(delay);
        self.prefill.push(prefill.0, 1)?;
        let own = &mut self.per_token;
        let (prompt, output) = (outcome.request.num_prefill_tokens, outcome.num_tokens);
        own.e2e.push(per_token(e2e.0 as f64, output), 1)?;
        own.execution.push(per_token(outcome.executed.0 as f64, output), 1)?;
        own.in_service.push(per_token(since.0 as f64, output), 1)?;
        own.prefill.push(per_token(prefill.0 as f64, prompt), 1)?;
        own.decode.push(per_token(e2e.saturating_since(ttft).0 as f64, output), 1)
    }

    /// Tells what was collected.
    ///
    /// # Errors
    /// When samples that were put into a temporary file cannot be read back.
    pub fn finish(self) -> io::Result<Summaries> {
        let per_token = self.per_token;
        [
            ("ttft_ns", self.ttft, 1.0),
            ("itl_ns", self.itl, 1.0),
            ("tpot_ns", self.tpot, PER_TOKEN_UNITS_PER_NS),
            ("e2e_ns", self.e2e, 1.0),
            ("scheduling_delay_ns", self.scheduling_delay, 1.0),
            ("execution_ns", self.execution, 1.0),
            ("preemption_ns", self.preemption, 1.0),
            ("in_service_ns", self.in_service, 1.0),
            ("prefill_ns", self.prefill, 1.0),
            ("e2e_per_output_token_ns", per_token.e2e, PER_TOKEN_UNITS_PER_NS),
            ("execution_per_output_token_ns", per_token.execution, PER_TOKEN_UNITS_PER_NS),
            ("in_service_per_output_token_ns", per_token.in_service, PER_TOKEN_UNITS_PER_NS),
            ("prefill_per_prompt_token_ns", per_token.prefill, PER_TOKEN_UNITS_PER_NS),
            ("decode_per_output_token_ns", per_token.decode, PER_TOKEN_UNITS_PER_NS),
            ("num_preemptions", self.num_preemptions, 1.0),
            ("step_duration_ns", self.batch_time, 1.0),
            ("batch_size", self.batch_size, 1.0),
            ("batch_num_tokens", self.batch_tokens, 1.0),
        ]
        .into_iter()
        .map(|(name, samples, units)| Ok((name, summary(samples, units)?)))
        .collect()
    }
}

fn summary(samples: ExactQuantiles, units: f64) -> io::Result<DistributionSummary> {
    let found = samples.finish(&PERCENTILES)?;
    let scaled = |value: Option<f64>| value.map(|value| value / units);
    let at = |p| scaled(found.percentile_ns(p));
    Ok(DistributionSummary {
        n: found.count(),
        mean: scaled(found.mean_ns()),
        min: scaled(found.min_ns().map(|value| value as f64)),
        p50: at(50.0),
        p90: at(90.0),
        p95: at(95.0),
        p99: at(99.0),
        p999: at(99.9),
        max: scaled(found.max_ns().map(|value| value as f64)),
    })
}

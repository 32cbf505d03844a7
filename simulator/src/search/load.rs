//! A workload at any rate.

use std::{path::Path, sync::Arc};

use plumbline_bundles::bundle::sha256_hex;
use plumbline_schema::{InputError, Nanos, Workload, WorkloadRequest};
use thiserror::Error;

use crate::arrival::{
    Arrival, ArrivalError, CountDistribution, Lengths, RateFrom, RequestSource, WorkloadSpec,
};

/// Requests whose arrivals can be made to come faster or slower; nothing else of them changes.
#[derive(Clone, Debug)]
pub struct Load {
    requests: Requests,
    rate_per_s: f64,
    digest: String,
}

#[derive(Clone, Debug)]
enum Requests {
    Workload(Arc<Workload>),
    Spec(Box<WorkloadSpec>),
}

/// A workload without a rate that could be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("expected a workload whose requests come at a rate, found {found}")]
pub struct NoRate {
    /// What it is.
    pub found: &'static str,
}

/// Why there is no load.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Nothing to change.
    #[error(transparent)]
    NoRate(#[from] NoRate),
    /// The specification cannot be used.
    #[error(transparent)]
    Arrival(#[from] ArrivalError),
    /// A file of the specification cannot be read.
    #[error(transparent)]
    Input(#[from] InputError),
}

impl Load {
    /// The requests of a workload; its rate is that from the first arrival to the last.
    ///
    /// # Errors
    /// When all arrive at once.
    pub fn of_workload(workload: Workload) -> Result<Self, NoRate> {
        let rate_per_s = workload.summary().mean_rate_per_s;
        let rate_per_s = rate_per_s.ok_or(NoRate { found: "requests that all arrive at one time" })?;
        let digest = sha256_hex(workload.canonical_text().as_bytes());
        Ok(Self { requests: Requests::Workload(Arc::new(workload)), rate_per_s, digest })
    }

    /// Requests by rules; the rate is the mean of its process, of sessions that of their first turns.
    ///
    /// # Errors
    /// When its process has no rate, or what it names cannot be read.
    pub fn of_spec(spec: WorkloadSpec) -> Result<Self, LoadError> {
        let rate_per_s = mean_rate(&spec)?;
        // Told by content, wherever its files lie.
        let mut text = serde_json::to_string(&spec).unwrap_or_else(|error| unreachable!("{error}"));
        let arrivals = if let Arrival::Trace { path, .. } = &spec.arrival { Some(path) } else { None };
        let lengths = if let Lengths::Trace { path, .. } = &spec.lengths { Some(path) } else { None };
        for path in arrivals.into_iter().chain(lengths) {
            text.push_str(&file_digest(path)?);
        }
        let digest = sha256_hex(text.as_bytes());
        Ok(Self { requests: Requests::Spec(Box::new(spec)), rate_per_s, digest })
    }

    /// Its own rate, requests per second.
    #[must_use]
    pub fn rate_per_s(&self) -> f64 {
        self.rate_per_s
    }

    /// SHA-256 of everything that says which requests they are, hex.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The requests at another rate: the times of a workload or trace are scaled, of a process its rate is.
    ///
    /// # Errors
    /// When the rate is beyond what a specification may ask for, or a trace cannot be read.
    pub fn at(&self, rate_per_s: f64, seed: u64) -> Result<Box<dyn RequestSource + Send>, ArrivalError> {
        let factor = rate_per_s / self.rate_per_s;
        match &self.requests {
            Requests::Workload(workload) => {
                Ok(Box::new(Scaled { workload: Arc::clone(workload), factor, next: 0 }))
            }
            Requests::Spec(spec) => {
                WorkloadSpec { arrival: faster(&spec.arrival, factor), ..(**spec).clone() }.source(seed)
            }
        }
    }
}

fn file_digest(path: &Path) -> Result<String, InputError> {
    Ok(sha256_hex(&std::fs::read(path).map_err(|error| InputError::io(path, error))?))
}

/// A workload whose requests arrive `factor` times as fast.
struct Scaled {
    workload: Arc<Workload>,
    factor: f64,
    next: usize,
}

impl RequestSource for Scaled {
    fn next_arrival(&mut self) -> Option<Nanos> {
        let requests = &self.workload.requests;
        let first = requests.first()?.arrival_time_ns;
        let since = requests.get(self.next)?.arrival_time_ns.saturating_since(first);
        Some(Nanos::from_f64(since.0 as f64 / self.factor))
    }

    fn take(&mut self) -> Option<WorkloadRequest> {
        let arrival_time_ns = self.next_arrival()?;
        let request = self.workload.requests.get(self.next)?;
        self.next += 1;
        Some(WorkloadRequest { arrival_time_ns, ..request.clone() })
    }

    fn remaining(&self) -> Option<u64> {
        Some((self.workload.requests.len() - self.next) as u64)
    }
}

fn mean_rate(spec: &WorkloadSpec) -> Result<f64, LoadError> {
    let rate = match &spec.arrival {
        Arrival::Static {} => return Err(NoRate { found: "requests that all arrive at one time" }.into()),
        Arrival::ClosedLoop { .. } => return Err(NoRate { found: "users of a closed loop" }.into()),
        Arrival::Fixed { interval_s } => interval_s.recip(),
        Arrival::Poisson { rate_per_s } | Arrival::Gamma { rate_per_s, .. } => *rate_per_s,
        Arrival::Diurnal { mean_rate_per_s, .. } => *mean_rate_per_s,
        Arrival::Burst { on_rate_per_s, off_rate_per_s, mean_on_s, mean_off_s } => {
            (on_rate_per_s * mean_on_s + off_rate_per_s * mean_off_s) / (mean_on_s + mean_off_s)
        }
        Arrival::RateTable { rates, period_s } => {
            let end = period_s.or(spec.duration_s);
            let end = end.ok_or(NoRate { found: "a table of rates with neither period_s nor duration_s" })?;
            let mean = mean_of_table(rates, end);
            if mean <= 0.0 {
                return Err(NoRate { found: "a table of rates that are 0 up to duration_s" }.into());
            }
            mean
        }
        arrival @ Arrival::Trace { .. } => {
            let one = || CountDistribution::Fixed { value: 1 };
            let lengths = Lengths::Distributions { prefill: one(), decode: one() };
            let alone = WorkloadSpec { num_requests: None, ..WorkloadSpec::new(1, arrival.clone(), lengths) };
            let rate = alone.generate(0)?.summary().mean_rate_per_s;
            rate.ok_or(NoRate { found: "requests that all arrive at one time" })?
        }
    };
    Ok(rate)
}

fn mean_of_table(rates: &[RateFrom], end_s: f64) -> f64 {
    let ends = rates.iter().skip(1).map(|rate| rate.from_s).chain([end_s]);
    let parts = rates.iter().zip(ends).map(|(rate, until)| {
        let (from, until) = (rate.from_s.min(end_s), until.min(end_s));
        rate.rate_per_s * (until - from)
    });
    parts.sum::<f64>() / end_s
}

/// The same process with all its rates `factor` times as high; periods and phases keep their length.
fn faster(arrival: &Arrival, factor: f64) -> Arrival {
    let mut arrival = arrival.clone();
    match &mut arrival {
        Arrival::Static {} | Arrival::ClosedLoop { .. } => {}
        Arrival::Fixed { interval_s } => *interval_s /= factor,
        Arrival::Poisson { rate_per_s } | Arrival::Gamma { rate_per_s, .. } => *rate_per_s *= factor,
        Arrival::Diurnal { mean_rate_per_s, .. } => *mean_rate_per_s *= factor,
        Arrival::RateTable { rates, .. } => rates.iter_mut().for_each(|rate| rate.rate_per_s *= factor),
        Arrival::Burst { on_rate_per_s, off_rate_per_s, .. } => {
            *on_rate_per_s *= factor;
            *off_rate_per_s *= factor;
        }
        Arrival::Trace { rate_factor, .. } => *rate_factor *= factor,
    }
    arrival
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arrival::Sessions;

    fn arrivals(load: &Load, rate: f64) -> Vec<u64> {
        let mut source = load.at(rate, 5).unwrap();
        std::iter::from_fn(|| source.take()).map(|request| request.arrival_time_ns.0).collect()
    }

    fn spec(num_requests: u64, arrival: &str) -> WorkloadSpec {
        let text = format!(
            r#"{{"num_requests": {num_requests}, "arrival": {arrival}, "lengths": {{"from": "distributions",
            "prefill": {{"distribution": "fixed", "value": 8}}, "decode": {{"distribution": "fixed", "value": 2}}}}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_workload_is_stretched_from_its_first_arrival() {
        let times = [7_000_000_000, 8_000_000_000, 8_000_000_000, 10_000_000_000];
        let request = |(id, at): (u64, u64)| WorkloadRequest::new(id, Nanos(at), 5, 6);
        let load = Load::of_workload(Workload { requests: (0..).zip(times).map(request).collect() }).unwrap();
        assert!((load.rate_per_s() - 1.0).abs() < 1e-12);
        assert_eq!(arrivals(&load, 1.0), [0, 1_000_000_000, 1_000_000_000, 3_000_000_000]);
        assert_eq!(arrivals(&load, 4.0), [0, 250_000_000, 250_000_000, 750_000_000]);
        let at_once = Workload { requests: vec![request((0, 3)), request((1, 3))] };
        assert!(Load::of_workload(at_once).unwrap_err().to_string().ends_with("all arrive at one time"));
    }

    #[test]
    fn every_process_comes_at_the_rate_asked_for() {
        for arrival in [
            r#"{"process": "fixed", "interval_s": 0.5}"#,
            r#"{"process": "poisson", "rate_per_s": 3}"#,
            r#"{"process": "gamma", "rate_per_s": 3, "cv": 2}"#,
            r#"{"process": "diurnal", "mean_rate_per_s": 3, "amplitude": 0.8, "period_s": 2}"#,
            r#"{"process": "rate_table", "rates": [{"from_s": 0, "rate_per_s": 5}, {"from_s": 1, "rate_per_s": 1}],
                "period_s": 4}"#,
            r#"{"process": "burst", "on_rate_per_s": 9, "off_rate_per_s": 1, "mean_on_s": 0.1, "mean_off_s": 0.2}"#,
        ] {
            let load = Load::of_spec(spec(20_000, arrival)).unwrap();
            for rate in [load.rate_per_s(), 17.0] {
                let arrivals = arrivals(&load, rate);
                let found = arrivals.len() as f64 / (arrivals[arrivals.len() - 1] as f64 / 1e9);
                assert!((found / rate - 1.0).abs() < 0.06, "{arrival}: {found} at {rate}");
            }
        }
    }

    #[test]
    fn a_trace_comes_as_fast_as_asked_for_and_its_content_is_in_the_digest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.csv");
        let head = "arrived_at,num_prefill_tokens,num_decode_tokens";
        std::fs::write(&path, format!("{head}\n0.0,9,2\n1.0,8,3\n4.0,7,4\n")).unwrap();
        let arrival = format!(
            r#"{{"process": "trace", "path": {:?}, "format": "vidur", "rate_factor": 2}}"#,
            path.to_str().unwrap()
        );
        let load = Load::of_spec(spec(3, &arrival)).unwrap();
        assert!((load.rate_per_s() - 1.0).abs() < 1e-12);
        assert_eq!(arrivals(&load, 4.0), [0, 125_000_000, 500_000_000]);
        std::fs::write(&path, format!("{head}\n0.0,9,2\n1.0,8,3\n4.0,7,5\n")).unwrap();
        assert_ne!(Load::of_spec(spec(3, &arrival)).unwrap().digest(), load.digest());
    }

    #[test]
    fn what_has_no_rate_is_refused() {
        let table = r#"{"process": "rate_table", "rates": [{"from_s": 0, "rate_per_s": 5}, {"from_s": 3, "rate_per_s": 1}]}"#;
        for (arrival, says) in [
            (r#"{"process": "static"}"#, "all arrive at one time"),
            (r#"{"process": "closed_loop", "users": 3}"#, "users of a closed loop"),
            (table, "neither period_s nor duration_s"),
        ] {
            let error = Load::of_spec(spec(9, arrival)).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let until_4 = WorkloadSpec { duration_s: Some(4.0), ..spec(9, table) };
        assert!((Load::of_spec(until_4).unwrap().rate_per_s() - 4.0).abs() < 1e-12);
        let until_2 = WorkloadSpec { duration_s: Some(2.0), ..spec(9, table) };
        assert!((Load::of_spec(until_2).unwrap().rate_per_s() - 5.0).abs() < 1e-12);
    }

    #[test]
    fn sessions_that_wait_for_answers_are_taken() {
        let sessions: Sessions = serde_json::from_str(
            r#"{"turns": {"distribution": "fixed", "value": 2}, "think_time": {"distribution": "fixed", "value_s": 1}}"#,
        )
        .unwrap();
        let spec = spec(4, r#"{"process": "poisson", "rate_per_s": 3}"#);
        let load = Load::of_spec(WorkloadSpec { sessions: Some(sessions), ..spec }).unwrap();
        assert!(load.at(6.0, 0).unwrap().heeds_completions());
    }
}

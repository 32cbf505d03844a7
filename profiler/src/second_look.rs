//! A few points again, once all are measured: by the GPU's own records of its kernels, and under a load that lasts.

use plumbline_bundles::{CrossCheck, Sample, evidence::Sustained};

use crate::{
    device::{ActivityTimes, CrossCheckOutcome, Device, Point, StoppingRule},
    error::ProfileError,
};

/// Points that are cross-checked, spread over the operators and sizes.
const NUM_CROSS_CHECKS: usize = 26;
/// Compute-bound points that are measured under a load that lasts, and how long it lasts, ns.
const NUM_SUSTAINED: usize = 8;
const LOAD_NS: u64 = 250_000_000;
/// A launch under a lasting load takes at least about this long, ns: shorter ones draw less power.
const MIN_SUSTAINED_NS: f64 = 100_000.0;

pub(crate) fn point_of(sample: &Sample) -> Point {
    Point { operator: sample.operator, shape: sample.shape, batch: sample.batch.clone() }
}

/// At most `count` samples, evenly spaced.
fn spread<'a>(samples: &[&'a Sample], count: usize) -> Vec<&'a Sample> {
    let taken = count.min(samples.len());
    (0..taken).map(|i| samples[(2 * i + 1) * samples.len() / (2 * taken)]).collect()
}

/// Compares samples with the records of their kernels. `gap_ns` is the time between two kernels, `pause_ns_of` the rest
/// that a point's samples were taken after.
///
/// What cannot be recorded is said in a note; a device that keeps no records is asked once.
pub(crate) fn cross_checks(
    device: &mut dyn Device,
    samples: &[&Sample],
    gap_ns: f64,
    pause_ns_of: impl Fn(&Point) -> u64,
    notes: &mut Vec<String>,
) -> Vec<CrossCheck> {
    // Ordered by operator, then by time: an even spread has short and long launches of each.
    let mut ordered = samples.to_vec();
    ordered.sort_by(|a, b| a.operator.cmp(&b.operator).then(a.stats.p50_ns.total_cmp(&b.stats.p50_ns)));
    let mut checks = Vec::new();
    for sample in spread(&ordered, NUM_CROSS_CHECKS) {
        let point = point_of(sample);
        match device.cross_check(&point, sample.cache, pause_ns_of(&point)) {
            Ok(CrossCheckOutcome::Times(times)) => checks.push(compare(sample, &times, gap_ns)),
            Ok(CrossCheckOutcome::Unavailable { reason }) => {
                notes.push(format!("no cross-check by the GPU's own records: {reason}"));
                break;
            }
            Err(error) => notes.push(format!("cross-check: {error}")),
        }
    }
    let num_off = checks.iter().filter(|check| !check.agrees).count();
    if num_off > 0 {
        notes.push(format!(
            "{num_off} of {} cross-checked points differ from the GPU's own records by more than 2 % and 0.5 us",
            checks.len()
        ));
    }
    checks
}

fn compare(sample: &Sample, times: &ActivityTimes, gap_ns: f64) -> CrossCheck {
    CrossCheck::new(
        (sample.operator, &sample.shape, sample.cache),
        sample.stats.p50_ns,
        times.duration.p50_ns,
        times.period.map(|period| period.p50_ns),
        times.event.map(|event| event.p50_ns),
        gap_ns,
    )
}

/// Measures samples of launches that draw much power again under a load that lasts.
///
/// # Errors
/// When one cannot be measured again.
pub(crate) fn sustained(
    device: &mut dyn Device,
    heavy: &[&Sample],
    rule: StoppingRule,
) -> Result<Vec<Sustained>, ProfileError> {
    let mut long: Vec<&Sample> =
        heavy.iter().copied().filter(|s| s.stats.p50_ns >= MIN_SUSTAINED_NS).collect();
    long.sort_by(|a, b| a.stats.p50_ns.total_cmp(&b.stats.p50_ns));
    let rule = StoppingRule { warm_up_ns: LOAD_NS, pause_ns: 0, ..rule };
    spread(&long, NUM_SUSTAINED)
        .into_iter()
        .map(|sample| {
            let measurement = device.measure(&point_of(sample), sample.cache, &rule)?;
            Ok(Sustained {
                operator: sample.operator,
                shape: sample.shape.values(),
                burst_p50_ns: sample.stats.p50_ns,
                sustained_p50_ns: measurement.stats.p50_ns,
                sm_clock_mhz: measurement.after.sm_clock_mhz,
                power_w: measurement.after.power_w,
            })
        })
        .collect()
}

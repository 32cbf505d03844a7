//! Times that cannot be true, or that their neighbours contradict.

use std::collections::BTreeMap;

use plumbline_schema::{Operator, roofline::floor_ns};

use super::{
    Finding, Rule, Severity, Subject, attention,
    lines::{self, TOLERANCE},
    table::{Table, us},
};
use crate::samples::Sample;

/// Rates may exceed the copy that measured the bandwidth by this ratio: a copy writes as much as it reads, and turning
/// the bus around costs what a launch that mostly reads does not pay.
const BANDWIDTH_MARGIN: f64 = 0.05;

/// Rates may exceed the matrix product that measured the ceiling by this ratio: that was one shape, at the clocks that
/// the power cap allowed at that time.
const MATMUL_MARGIN: f64 = 0.10;

/// Half of a launch gap where host costs are not known, ns.
const DEFAULT_TOLERANCE_NS: f64 = 500.0;

/// Differences below half the gap between two launches say nothing: how far a launch's tail overlaps the next one's
/// head depends on the grid.
pub(super) fn tolerance_ns(subject: &Subject) -> f64 {
    subject.host.as_ref().map_or(DEFAULT_TOLERANCE_NS, |host| host.kernel_gap_ns.p50_ns / 2.0)
}

pub(super) fn check(subject: &Subject, table: &Table, findings: &mut Vec<Finding>) {
    below_floor(subject, table, findings);
    above_ceilings(subject, table, findings);
    repeats(table, findings);
    let tolerance_ns = tolerance_ns(subject);
    let lines = lines::lines(table);
    let mut doubtful = Vec::new();
    for spike in lines.iter().flat_map(|line| line.spikes(tolerance_ns)) {
        let row = spike.point.row;
        // A decode batch lies on two lines.
        if !doubtful.contains(&row) {
            doubtful.push(row);
            findings.push(spike_finding(table, row, spike.expected_ns));
        }
    }
    if lines::has_one_axis(table.operator) {
        for (from, to, num) in lines.iter().flat_map(|line| line.drops(tolerance_ns, &doubtful)) {
            findings.push(drop_finding(table, from.row, to.row, num));
        }
    } else {
        for drop in attention::drops(table, tolerance_ns, &doubtful) {
            findings.push(drop_finding(table, drop.row, drop.fastest, drop.num));
        }
    }
}

fn below_floor(subject: &Subject, table: &Table, findings: &mut Vec<Finding>) {
    let gpu = &subject.bundle.manifest.gpu;
    for (row, sample) in table.samples.iter().enumerate() {
        let floor = floor_ns(&sample.shape, gpu);
        if sample.stats.min_ns < floor {
            let expected = format!("min_ns of at least the physical floor, {}", us(floor));
            let hint = "no GPU of this data sheet is that fast: measure the point again, and ask which launch was timed";
            findings.push(table.point(
                row,
                Rule::BelowFloor,
                Severity::Error,
                expected,
                us(sample.stats.min_ns),
                hint,
            ));
        }
    }
}

/// Rates of medians against the ceilings that the same run measured.
fn above_ceilings(subject: &Subject, table: &Table, findings: &mut Vec<Finding>) {
    let manifest = &subject.bundle.manifest;
    let Some(evidence) = &manifest.evidence else { return };
    let uses_tensor_cores = table.operator.is_gemm() || table.operator == Operator::Attention;
    for (row, sample) in table.samples.iter().enumerate() {
        let per_s = |amount: f64| amount / (sample.stats.p50_ns * 1e-9);
        // One L2 cache of the operands may already have been there.
        let beyond_l2 = sample.shape.bytes().0.saturating_sub(manifest.gpu.l2_bytes.0);
        let bandwidth = evidence.copy_bandwidth_bytes_per_s.map(|ceiling| {
            ("GB/s", 1e9, "the copy bandwidth", ceiling, BANDWIDTH_MARGIN, per_s(beyond_l2 as f64))
        });
        let flops = per_s(sample.shape.flops().0 as f64);
        let compute = evidence.matmul_flops_per_s.filter(|_| uses_tensor_cores).map(|ceiling| {
            ("TFLOP/s", 1e12, "the rate of the matrix product", ceiling, MATMUL_MARGIN, flops)
        });
        for (unit, scale, what, ceiling, margin, rate) in [bandwidth, compute].into_iter().flatten() {
            if rate > ceiling * (1.0 + margin) {
                let expected = format!(
                    "at most {:.0} {unit}, {what} that this run measured, and {:.0} %",
                    ceiling / scale,
                    100.0 * margin
                );
                let found = format!("{:.0} {unit} at a median of {}", rate / scale, us(sample.stats.p50_ns));
                let hint = "measured on another machine than the ceiling, or the launch did less than its shape says";
                findings.push(table.point(row, Rule::AboveCeiling, Severity::Warning, expected, found, hint));
            }
        }
    }
}

/// The same shape and state, measured more than once, with medians further apart than the tolerance.
fn repeats(table: &Table, findings: &mut Vec<Finding>) {
    let mut groups: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for (row, sample) in table.samples.iter().enumerate() {
        let batch = sample.batch.as_ref().map(|b| (b.format_prefill_chunks(), b.format_decode_contexts()));
        groups.entry((sample.cache, sample.shape, batch)).or_default().push(row);
    }
    let time = |row: usize| table.samples[row].stats.p50_ns;
    for mut rows in groups.into_values().filter(|rows| rows.len() > 1) {
        rows.sort_by(|&a, &b| time(a).total_cmp(&time(b)));
        let (fast, slow) = (rows[0], rows[rows.len() - 1]);
        if time(slow) > time(fast) * (1.0 + TOLERANCE) {
            let expected = format!("{} measurements within {:.0} %", rows.len(), 100.0 * TOLERANCE);
            let found = format!("{} here and {} in line {}", us(time(slow)), us(time(fast)), fast + 2);
            let hint = "compare clocks and kernels of the two, and measure the point again";
            findings.push(table.point(slow, Rule::RepeatsDisagree, Severity::Warning, expected, found, hint));
        }
    }
}

fn spike_finding(table: &Table, row: usize, expected_ns: f64) -> Finding {
    let sample = &table.samples[row];
    let time = sample.stats.p50_ns;
    let expected = format!("about {}, as its neighbours say", us(expected_ns));
    let found =
        format!("{} ({:+.0} %){}", us(time), 100.0 * (time / expected_ns - 1.0), circumstances(sample));
    let hint = "measure the point again; if it stays, another kernel ran: see the column `kernel`";
    table.point(row, Rule::Spike, Severity::Warning, expected, found, hint)
}

fn drop_finding(table: &Table, row: usize, fastest: usize, num: usize) -> Finding {
    let (slow, fast) = (&table.samples[row], &table.samples[fastest]);
    let more = if num > 1 { format!(", and {} more", num - 1) } else { String::new() };
    let expected = format!("no launch with more work to be faster by over {:.0} %", 100.0 * TOLERANCE);
    let found = format!(
        "{}{}, but {}{} for {} in line {}{more}",
        us(slow.stats.p50_ns),
        circumstances(slow),
        us(fast.stats.p50_ns),
        circumstances(fast),
        table.describe(fast),
        fastest + 2
    );
    let hint = "measure both again; if it stays, a slower kernel was chosen for the smaller launch";
    table.point(row, Rule::NonMonotone, Severity::Warning, expected, found, hint)
}

/// What a reader of the finding asks first: clock and flags.
fn circumstances(sample: &Sample) -> String {
    let clock = sample.sm_clock_mhz.map(|mhz| format!("{mhz} MHz"));
    let flags = (!sample.flags.is_empty()).then(|| sample.flags.clone());
    let parts: Vec<_> = [clock, flags].into_iter().flatten().collect();
    if parts.is_empty() { String::new() } else { format!(" [{}]", parts.join(", ")) }
}

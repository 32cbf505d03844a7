//! Numbers that a measurement scatters and a copy or an invention does not.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Finding, Rule, Severity, Subject,
    lines::has_one_axis,
    table::{Table, share, us},
};
use crate::samples::Sample;

/// Share of points without any scatter that a coarse clock explains.
const MAX_STILL_SHARE: f64 = 0.05;

/// Share of points without any scatter above which nothing was measured.
const MADE_UP_SHARE: f64 = 0.5;

/// Rows with the same statistics: two may be a coincidence of a coarse clock, more are copies.
const MAX_COINCIDENCES: usize = 2;

/// Fewest points that a statement about all of them takes.
const MIN_POINTS: usize = 8;

pub(super) fn check_table(table: &Table, findings: &mut Vec<Finding>) {
    without_scatter(table, findings);
    same_statistics(table, findings);
    same_time(table, findings);
}

fn is_still(sample: &Sample) -> bool {
    sample.stats.n > 1 && sample.stats.std_ns <= 0.0
}

fn without_scatter(table: &Table, findings: &mut Vec<Finding>) {
    let repeated = table.samples.iter().filter(|sample| sample.stats.n > 1).count();
    let still: Vec<_> = table.samples.iter().enumerate().filter(|(_, sample)| is_still(sample)).collect();
    let Some((row, _)) = still.first() else { return };
    let part = still.len() as f64 / repeated as f64;
    let severity = if part > MADE_UP_SHARE && repeated >= MIN_POINTS {
        Severity::Error
    } else if part > MAX_STILL_SHARE {
        Severity::Warning
    } else {
        Severity::Info
    };
    let expected = "std_ns above 0 where a launch was timed more than once";
    let found = format!("0 at {} points, first in line {}", share(still.len(), repeated), row + 2);
    let hint = "state one sample where only one time is known; measured times scatter";
    findings.push(table.whole(Rule::ZeroSpread, severity, expected, found, hint));
}

fn same_statistics(table: &Table, findings: &mut Vec<Finding>) {
    let mut groups: BTreeMap<[u64; 5], Vec<usize>> = BTreeMap::new();
    // Rows without scatter, or of one time, are alike for another reason.
    for (row, sample) in table.samples.iter().enumerate().filter(|(_, s)| s.stats.n > 1 && !is_still(s)) {
        let stats = &sample.stats;
        let bits = [stats.min_ns, stats.p50_ns, stats.mean_ns, stats.max_ns, stats.std_ns].map(f64::to_bits);
        groups.entry(bits).or_default().push(row);
    }
    for rows in groups.values().filter(|rows| rows.len() > 1) {
        let severity = if rows.len() > MAX_COINCIDENCES { Severity::Error } else { Severity::Warning };
        let lines: Vec<_> = rows.iter().skip(1).take(5).map(|row| (row + 2).to_string()).collect();
        let found = format!("the very same in {} rows: also line {}", rows.len(), lines.join(", "));
        let expected = "statistics of its own for each measured point";
        let hint = "rows were copied: measure these points";
        findings.push(table.point(rows[0], Rule::RepeatedStatistics, severity, expected, found, hint));
    }
}

/// Over sizes that differ by far, one median throughout was not measured.
fn same_time(table: &Table, findings: &mut Vec<Finding>) {
    let times: BTreeSet<u64> = table.samples.iter().map(|sample| sample.stats.p50_ns.to_bits()).collect();
    let sizes: BTreeSet<_> = table.samples.iter().map(|sample| sample.shape.values()).collect();
    if times.len() == 1 && sizes.len() >= MIN_POINTS {
        let found = format!("{} in all {} rows", us(table.samples[0].stats.p50_ns), table.samples.len());
        let hint = "the column was filled in: measure the operator";
        let expected = "a median that differs between shapes";
        findings.push(table.whole(Rule::ConstantTimes, Severity::Error, expected, found, hint));
    } else if has_one_axis(table.operator) {
        same_time_in_layouts(table, findings);
    }
}

fn same_time_in_layouts(table: &Table, findings: &mut Vec<Finding>) {
    let mut groups: BTreeMap<_, (BTreeSet<u64>, BTreeSet<u64>)> = BTreeMap::new();
    for sample in &table.samples {
        let (times, sizes) = groups.entry((sample.cache, table.layout(sample))).or_default();
        times.insert(sample.stats.p50_ns.to_bits());
        sizes.insert(sample.shape.values()[0]);
    }
    for ((_, layout), (times, sizes)) in groups {
        if times.len() == 1 && sizes.len() >= MIN_POINTS {
            let time = times.first().map_or(0.0, |bits| f64::from_bits(*bits));
            let found = format!("{} at {} sizes", us(time), sizes.len());
            let hint = "the column was filled in: measure the layout";
            let expected = "a median that differs between sizes";
            let finding = table.whole(Rule::ConstantTimes, Severity::Error, expected, found, hint);
            findings.push(finding.on(table.describe_layout(&layout)));
        }
    }
}

/// Power and clock over all samples.
pub(super) fn check_readings(subject: &Subject, findings: &mut Vec<Finding>) {
    let samples: Vec<&Sample> = subject.tables.iter().flat_map(|table| &table.samples).collect();
    let powers: Vec<u64> = samples.iter().filter_map(|s| s.power_w).map(f64::to_bits).collect();
    if powers.len() >= MIN_POINTS && powers.iter().all(|power| *power == powers[0]) {
        let found = format!("{} W at all {} points", f64::from_bits(powers[0]), powers.len());
        let hint = "the reading was taken once or filled in; read it around each point";
        let expected = "power that follows the load";
        findings.push(Finding::new(Rule::ConstantReading, Severity::Warning, expected, found, hint));
    }
    let clocks: Vec<u32> = samples.iter().filter_map(|s| s.sm_clock_mhz).collect();
    if clocks.len() >= MIN_POINTS && clocks.iter().all(|clock| *clock == clocks[0]) {
        let is_throttled = samples.iter().any(|s| s.has_flag("throttled") || s.has_flag("clock_shifted"));
        // Clocks that are locked, or never held down, do not vary.
        let severity = if is_throttled { Severity::Warning } else { Severity::Info };
        let found = format!("{} MHz at all {} points", clocks[0], clocks.len());
        let hint = if is_throttled {
            "points are flagged as held down, and yet ran at the clock of all others: the reading was filled in"
        } else {
            "fine where clocks are locked"
        };
        let expected = "SM clocks that follow load and power";
        findings.push(Finding::new(Rule::ConstantReading, severity, expected, found, hint));
    }
}

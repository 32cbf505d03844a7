//! Whether the readings, the kernels and the data sheet are those of one and the same GPU.

use std::collections::BTreeSet;

use plumbline_schema::GpuSpec;

use super::{
    Finding, Rule, Severity, Subject,
    table::{Table, share, us},
};
use crate::{
    bundle::HOST,
    evidence::{DeviceIdentity, Evidence, GpuState},
    manifest::MANIFEST,
};

/// A clock may exceed the highest one of the data sheet by this: NVIDIA's clocks go in steps of 15 MHz.
const CLOCK_STEP_MHZ: u32 = 15;

/// Power is regulated to its limit, not clipped at it: readings exceed it by this ratio at most.
const POWER_MARGIN: f64 = 0.15;

/// A driver reports less memory than the data sheet, for ECC and its own use; by no more than this ratio.
const MEMORY_MARGIN: f64 = 0.10;

pub(super) fn check(subject: &Subject, findings: &mut Vec<Finding>) {
    let manifest = &subject.bundle.manifest;
    missing(subject, findings);
    data_sheet(&manifest.gpu, findings);
    if let Some(device) = &manifest.device {
        device_is_gpu(device, &manifest.gpu, findings);
    }
    let states: Vec<&GpuState> = manifest
        .evidence
        .iter()
        .flat_map(|e| std::iter::once(&e.before).chain(&e.during).chain(std::iter::once(&e.after)))
        .collect();
    if let Some(evidence) = &manifest.evidence {
        one_run(&states, findings);
        cross_checks(evidence, findings);
    }
    impossible_states(&states, &manifest.gpu, findings);
    memory_clocks(subject, &states, findings);
    for table in &subject.tables {
        impossible_readings(table, &manifest.gpu, findings);
        foreign_kernels(table, &manifest.gpu, findings);
    }
    if !manifest.incomplete.is_empty() {
        let num = manifest.incomplete.len();
        let found = format!("{num} that failed or were left out; the first: {}", manifest.incomplete[0]);
        let hint = "profile again; `plumb bundle inspect` lists all";
        let finding =
            Finding::new(Rule::Incomplete, Severity::Warning, "every planned point measured", found, hint);
        findings.push(finding.at(MANIFEST));
    }
}

fn missing(subject: &Subject, findings: &mut Vec<Finding>) {
    let manifest = &subject.bundle.manifest;
    let evidence = manifest.evidence.as_ref();
    let has_readings =
        |e: &Evidence| e.during.iter().any(|s| s.sm_clock_mhz.is_some() || s.power_w.is_some());
    let profile = "profile the GPU with this version";
    let ceilings =
        evidence.is_some_and(|e| e.copy_bandwidth_bytes_per_s.is_none() || e.matmul_flops_per_s.is_none());
    let nvml = "profile where NVML (libnvidia-ml) is found";
    let has_no_readings = evidence.is_some_and(|e| !has_readings(e));
    let lacks = [
        (
            subject.tables.is_empty(),
            Rule::NoSamples,
            "samples",
            "profile the GPU: predictions cannot be traced",
        ),
        (subject.predictors.is_none(), Rule::NoPredictors, "predictors", "`plumb train` fits them"),
        (manifest.device.is_none(), Rule::MissingEvidence, "the device", profile),
        (evidence.is_none(), Rule::MissingEvidence, "evidence", profile),
        (has_no_readings, Rule::MissingEvidence, "clock and power readings while measuring", nvml),
        (ceilings, Rule::MissingCeilings, "measured ceilings: copy bandwidth and matrix product", profile),
        (subject.host.is_none(), Rule::MissingHostCosts, HOST, profile),
    ];
    for (_, rule, what, hint) in lacks.into_iter().filter(|(lacks, ..)| *lacks) {
        findings.push(Finding::new(rule, Severity::Warning, what, "none", hint).at(MANIFEST));
    }
    if manifest.device.as_ref().is_some_and(|d| d.driver_version.is_none()) {
        let hint = "times change with drivers; profile where NVML is found";
        let finding = Finding::new(Rule::MissingEvidence, Severity::Info, "a driver version", "none", hint);
        findings.push(finding.at(MANIFEST));
    }
}

/// Every floor and roofline rests on the data sheet, so a changed one moves the judge.
fn data_sheet(gpu: &GpuSpec, findings: &mut Vec<Finding>) {
    if GpuSpec::by_name(&gpu.name).is_some_and(|shipped| shipped != *gpu) {
        let expected = format!("the data sheet that plumb ships as `{}`", gpu.name);
        let hint = "name another GPU where it is one, or put the numbers back";
        let finding =
            Finding::new(Rule::AlteredDataSheet, Severity::Warning, expected, "other numbers", hint);
        findings.push(finding.at(MANIFEST));
    }
}

fn device_is_gpu(device: &DeviceIdentity, gpu: &GpuSpec, findings: &mut Vec<Finding>) {
    let mut differs = |severity: Severity, expected: String, found: String| {
        let hint = "the samples were borrowed, or the data sheet is another GPU's: profile this device anew";
        findings.push(Finding::new(Rule::DeviceMismatch, severity, expected, found, hint).at(MANIFEST));
    };
    match GpuSpec::by_device_name(&device.device_name) {
        Some(spec) if spec.name != gpu.name => differs(
            Severity::Error,
            format!("gpu `{}`, as device `{}` is one", spec.name, device.device_name),
            format!("`{}`", gpu.name),
        ),
        None if GpuSpec::by_name(&gpu.name).is_some() => differs(
            Severity::Warning,
            format!("a device that is known as `{}`", gpu.name),
            format!("`{}`", device.device_name),
        ),
        _ => {}
    }
    for (what, expected, found) in [
        ("compute capability", gpu.compute_capability, device.compute_capability),
        ("multiprocessors", gpu.num_sms, device.num_sms),
    ] {
        if expected != found {
            differs(Severity::Error, format!("{what} {expected}, as gpu `{}`", gpu.name), found.to_string());
        }
    }
    if device.l2_bytes != gpu.l2_bytes.0 {
        let found = format!("{} bytes", device.l2_bytes);
        differs(Severity::Warning, format!("an L2 cache of {} bytes", gpu.l2_bytes.0), found);
    }
    let memory = device.memory_bytes as f64 / gpu.hbm_bytes.0.max(1) as f64;
    if (memory - 1.0).abs() > MEMORY_MARGIN {
        let found = format!("{} bytes", device.memory_bytes);
        differs(Severity::Warning, format!("about {} bytes of memory", gpu.hbm_bytes.0), found);
    }
    if device.mig == Some(true) {
        differs(Severity::Warning, "a whole GPU".into(), "MIG is on: a slice of one".into());
    }
}

/// Time and energy of one run only grow.
fn one_run(states: &[&GpuState], findings: &mut Vec<Finding>) {
    let energy: Vec<f64> = states.iter().filter_map(|state| state.energy_j).collect();
    let times: Vec<u64> = states.iter().map(|state| state.at_ms).collect();
    for (what, is_sorted) in [("at_ms", times.is_sorted()), ("energy_j", energy.is_sorted())] {
        if !is_sorted {
            let hint =
                "readings of several runs were put together: keep those of the run that measured the samples";
            let expected = format!("{what} that never falls from reading to reading");
            let finding = Finding::new(Rule::MixedReadings, Severity::Warning, expected, "it falls", hint);
            findings.push(finding.at(MANIFEST));
        }
    }
}

/// Points that were timed by two clocks: one finding for all that disagree.
fn cross_checks(evidence: &Evidence, findings: &mut Vec<Finding>) {
    let disagree: Vec<_> = evidence.cross_checks.iter().filter(|check| !check.agrees).collect();
    let Some(first) = disagree.first() else { return };
    let records = first.activity_period_p50_ns.unwrap_or(first.activity_duration_p50_ns + first.gap_ns);
    let found = format!(
        "{} points disagree; the first, {} {:?}: {} by events, {} by records",
        share(disagree.len(), evidence.cross_checks.len()),
        first.operator,
        first.shape,
        us(first.event_p50_ns),
        us(records)
    );
    let expected = "times by events as the GPU's own records tell them";
    let hint = "what is timed is not one launch after another: profile anew on an idle GPU";
    // A record of some 20 launches has a few that something else disturbed.
    let is_rare = disagree.len() * 10 <= evidence.cross_checks.len();
    let severity = if is_rare { Severity::Info } else { Severity::Warning };
    findings.push(Finding::new(Rule::CrossCheck, severity, expected, found, hint).at(MANIFEST));
}

fn impossible_states(states: &[&GpuState], gpu: &GpuSpec, findings: &mut Vec<Finding>) {
    let num = states.iter().filter(|state| is_impossible(state.sm_clock_mhz, state.power_w, gpu)).count();
    if num > 0 {
        findings.push(impossible(gpu, share(num, states.len()) + " readings").at(MANIFEST));
    }
}

fn impossible_readings(table: &Table, gpu: &GpuSpec, findings: &mut Vec<Finding>) {
    let is_hit = |s: &&crate::Sample| is_impossible(s.sm_clock_mhz, s.power_w, gpu);
    let num = table.samples.iter().filter(is_hit).count();
    if let Some(first) = table.samples.iter().find(is_hit) {
        let clock = first.sm_clock_mhz.map_or("unknown".into(), |mhz| format!("{mhz} MHz"));
        let power = first.power_w.map_or("unknown".into(), |w| format!("{w} W"));
        let found = format!("{} points; the first at {clock} and {power}", share(num, table.samples.len()));
        findings.push(impossible(gpu, found).of(table.operator).at(&table.file));
    }
}

fn is_impossible(clock_mhz: Option<u32>, power_w: Option<f64>, gpu: &GpuSpec) -> bool {
    clock_mhz.is_some_and(|mhz| mhz > gpu.max_clock_mhz.saturating_add(CLOCK_STEP_MHZ))
        || power_w.is_some_and(|w| w > f64::from(gpu.power_limit_w) * (1.0 + POWER_MARGIN))
}

fn impossible(gpu: &GpuSpec, found: String) -> Finding {
    let expected = format!(
        "SM clocks up to {} MHz and a power up to {} W and {:.0} %, as `{}` has",
        gpu.max_clock_mhz,
        gpu.power_limit_w,
        100.0 * POWER_MARGIN,
        gpu.name
    );
    let hint = "measured on another GPU than the manifest says: profile this one anew";
    Finding::new(Rule::ImpossibleReading, Severity::Error, expected, found, hint)
}

/// Under load a GPU's memory runs at one clock.
fn memory_clocks(subject: &Subject, states: &[&GpuState], findings: &mut Vec<Finding>) {
    let samples = subject.tables.iter().flat_map(|table| &table.samples);
    let measured: BTreeSet<u32> = samples.filter_map(|sample| sample.memory_clock_mhz).collect();
    let seen: BTreeSet<u32> = states.iter().filter_map(|state| state.memory_clock_mhz).collect();
    let list = |set: &BTreeSet<u32>| {
        let all: Vec<_> = set.iter().take(5).map(|mhz| format!("{mhz} MHz")).collect();
        all.join(", ")
    };
    let hint = "samples of two GPUs, or of a GPU in another power state, were put together: profile anew";
    let mut mixed = |expected: String, found: String| {
        findings.push(Finding::new(Rule::MixedReadings, Severity::Warning, expected, found, hint));
    };
    if measured.len() > 1 {
        mixed("one memory clock in all samples".into(), list(&measured));
    }
    if !measured.is_empty() && !seen.is_empty() && measured.is_disjoint(&seen) {
        mixed(format!("the memory clock of the evidence, {}", list(&seen)), list(&measured));
    }
}

/// A kernel made for a later architecture does not run on an earlier one.
fn foreign_kernels(table: &Table, gpu: &GpuSpec, findings: &mut Vec<Finding>) {
    let is_foreign = |kernel: &str| architecture(kernel).is_some_and(|sm| sm > gpu.compute_capability);
    let num = table.samples.iter().filter(|sample| is_foreign(&sample.kernel)).count();
    if let Some(first) = table.samples.iter().find(|sample| is_foreign(&sample.kernel)) {
        let expected = format!("kernels that run on compute capability {}", gpu.compute_capability);
        let found =
            format!("{} points with later ones, as `{}`", share(num, table.samples.len()), first.kernel);
        let hint = "measured on another GPU than the manifest says: profile this one anew";
        findings.push(table.whole(Rule::ForeignKernel, Severity::Error, expected, found, hint));
    }
}

/// The number behind `sm` in a kernel's name: `attention_prefill_sm90` gives 90.
fn architecture(kernel: &str) -> Option<u32> {
    let words = kernel.split(|c: char| !c.is_ascii_alphanumeric());
    words.filter_map(|word| word.strip_prefix("sm")).find_map(|digits| digits.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernels_name_tells_its_architecture() {
        assert_eq!(architecture("attention_prefill_sm90 tiles=2"), Some(90));
        assert_eq!(architecture("small_sm x smem sm"), None);
    }
}

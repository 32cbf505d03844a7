//! What two machines, and the states they were in, have in common and not: what a change of times may come from.

use serde::Serialize;

use super::{Side, statistics::median};
use crate::{
    bundle::{Bundle, HOST},
    error::BundleError,
    host::HostCosts,
    manifest::Manifest,
};

/// Numbers that differ by no more than this ratio are not listed.
const NOTABLE: f64 = 0.01;

/// One thing known of a machine.
#[derive(Clone, Debug, PartialEq)]
enum Fact {
    Text(String),
    Number(f64),
}

/// What a bundle says about its machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Machine {
    /// By name, in the order to show them; what is not known is not there.
    facts: Vec<(String, Fact)>,
}

/// A thing that differs between two machines.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// What: its unit is in the name.
    pub fact: String,
    /// In A; `None` when not known.
    pub a: Option<String>,
    /// In B; `None` when not known.
    pub b: Option<String>,
    /// B / A of numbers.
    pub ratio: Option<f64>,
}

impl Machine {
    /// Reads what a bundle says: device, libraries, power and temperature while measuring, ceilings, host costs.
    ///
    /// # Errors
    /// When host costs are listed and cannot be read.
    pub fn of(bundle: &Bundle) -> Result<Self, BundleError> {
        let mut machine = Self::default();
        machine.add_software(&bundle.manifest);
        machine.add_evidence(&bundle.manifest);
        if bundle.manifest.files.contains_key(HOST) {
            machine.add_host(&bundle.host()?);
        }
        Ok(machine)
    }

    fn text(&mut self, name: &str, value: &(impl ToString + ?Sized)) {
        self.facts.push((name.to_owned(), Fact::Text(value.to_string())));
    }

    fn number(&mut self, name: impl Into<String>, value: Option<f64>) {
        if let Some(value) = value.filter(|v| v.is_finite()) {
            self.facts.push((name.into(), Fact::Number(value)));
        }
    }

    fn add_software(&mut self, manifest: &Manifest) {
        self.text("gpu", &manifest.gpu.name);
        self.text("plumbline_version", &manifest.plumbline_version);
        let Some(device) = &manifest.device else { return };
        self.text("device_name", &device.device_name);
        self.text("num_sms", &device.num_sms);
        self.text("l2_bytes", &device.l2_bytes);
        self.text("memory_bytes", &device.memory_bytes);
        let switch = |on: Option<bool>| on.map(|on| if on { "on" } else { "off" });
        for (name, value) in [
            ("driver_version", device.driver_version.as_deref()),
            ("ecc", switch(device.ecc)),
            ("mig", switch(device.mig)),
        ] {
            if let Some(value) = value {
                self.text(name, value);
            }
        }
        self.text("cuda_driver_version", &device.cuda_driver_version);
        self.text("nvrtc_version", &device.nvrtc_version);
        self.text("cublaslt_version", &device.cublaslt_version);
        self.text("kernel_hash", &device.kernel_hash);
    }

    fn add_evidence(&mut self, manifest: &Manifest) {
        let Some(evidence) = &manifest.evidence else { return };
        let middle = |values: Vec<f64>| (!values.is_empty()).then(|| median(&values));
        let states = &evidence.during;
        self.number("median_power_w", middle(states.iter().filter_map(|s| s.power_w).collect()));
        let temperatures = states.iter().filter_map(|s| s.temperature_c).map(f64::from).collect();
        self.number("median_temperature_c", middle(temperatures));
        let num_throttled = states.iter().filter(|s| !s.throttle_reasons.is_empty()).count();
        let share = (!states.is_empty()).then(|| num_throttled as f64 / states.len() as f64);
        self.number("throttled_share", share);
        self.number("copy_bandwidth_bytes_per_s", evidence.copy_bandwidth_bytes_per_s);
        self.number("matmul_flops_per_s", evidence.matmul_flops_per_s);
    }

    fn add_host(&mut self, host: &HostCosts) {
        self.text("cpu_model", &host.cpu_model);
        self.text("num_cores", &host.num_cores);
        if let Some(governor) = &host.cpu.governor {
            self.text("cpu_governor", governor);
        }
        self.number("load_before", host.cpu.load_before);
        self.number("load_after", host.cpu.load_after);
        self.number("single_thread_score", Some(host.single_thread_score));
        self.number("single_thread_score_max_over_min", host.score.map(|score| score.max / score.min));
        self.number("kernel_launch_ns", Some(host.kernel_launch_ns.p50_ns));
        self.number("kernel_gap_ns", Some(host.kernel_gap_ns.p50_ns));
        for graph in &host.graph_launch {
            let name = format!("graph_launch_{}_nodes_ns", graph.num_nodes);
            self.number(name, Some(graph.launch_ns.p50_ns));
        }
        self.number("synchronize_ns", Some(host.synchronize_ns.p50_ns));
        self.number("event_record_ns", host.events.map(|events| events.record_ns.p50_ns));
        self.number("event_query_ns", host.events.map(|events| events.query_ns.p50_ns));
        self.number("event_synchronize_ns", host.events.map(|events| events.synchronize_ns.p50_ns));
        for cost in &host.after_idle {
            let after = format!("after_{}_ms_idle", cost.idle_ns / 1_000_000);
            self.number(format!("launch_and_wait_{after}_ns"), Some(cost.launch_and_wait_ns.p50_ns));
            self.number(format!("compute_{after}_ns"), Some(cost.compute_ns.p50_ns));
        }
    }

    fn fact(&self, name: &str) -> Option<&Fact> {
        self.facts.iter().find(|(known, _)| known == name).map(|(_, fact)| fact)
    }
}

/// What differs: texts that are not the same or that only one side has, and numbers of both more than 1 % apart. Nothing
/// when one side is a statistics file, which knows no machine.
#[must_use]
pub fn differences(a: &Side, b: &Side) -> Vec<Difference> {
    let (Some(a), Some(b)) = (&a.machine, &b.machine) else {
        return Vec::new();
    };
    let mut names: Vec<&str> = a.facts.iter().map(|(name, _)| name.as_str()).collect();
    names.extend(b.facts.iter().map(|(name, _)| name.as_str()).filter(|name| a.fact(name).is_none()));
    names.into_iter().filter_map(|name| difference(name, a.fact(name), b.fact(name))).collect()
}

fn difference(name: &str, a: Option<&Fact>, b: Option<&Fact>) -> Option<Difference> {
    if let (Some(Fact::Number(a)), Some(Fact::Number(b))) = (a, b) {
        return number_difference(name, *a, *b);
    }
    let text = |fact: Option<&Fact>| match fact {
        Some(Fact::Text(text)) => Some(text.clone()),
        _ => None,
    };
    let (a, b) = (text(a), text(b));
    (a != b).then(|| Difference { fact: name.into(), a, b, ratio: None })
}

/// Two numbers, if they are more than 1 % apart.
#[must_use]
pub fn number_difference(name: &str, a: f64, b: f64) -> Option<Difference> {
    let is_notable = (b - a).abs() > NOTABLE * a.abs().max(b.abs());
    is_notable.then(|| Difference {
        fact: name.into(),
        a: Some(number_text(a)),
        b: Some(number_text(b)),
        ratio: (a > 0.0).then(|| b / a),
    })
}

/// Four digits tell what is more than 1 % apart.
fn number_text(number: f64) -> String {
    if number != 0.0 && !(1e-3..1e6).contains(&number.abs()) {
        return format!("{number:.3e}");
    }
    let num_decimals = if number.abs() >= 1000.0 { 0 } else { 3 };
    format!("{number:.num_decimals$}")
}

/// What the differences may explain, in words.
#[must_use]
pub fn attributions(a: &Side, b: &Side, differences: &[Difference]) -> Vec<String> {
    let mut notes = Vec::new();
    for (side, label) in [(a, "A"), (b, "B")] {
        if side.machine.is_none() {
            notes.push(format!("{label} is a statistics file: its machine is not known"));
        }
    }
    let among = |names: &[&'static str]| {
        let is_known = |d: &&Difference| d.a.is_some() && d.b.is_some();
        let found = differences.iter().filter(is_known).map(|d| d.fact.as_str());
        found.filter(|fact| names.contains(fact)).collect::<Vec<_>>().join(", ")
    };
    let hardware = among(&["gpu", "device_name", "num_sms", "l2_bytes", "memory_bytes", "ecc", "mig"]);
    if !hardware.is_empty() {
        notes.push(format!("not the same kind of GPU, or not set up alike: {hardware}"));
    }
    if !among(&["kernel_hash"]).is_empty() {
        notes.push(
            "kernel sources or compile options differ: changed times need not be the hardware's".into(),
        );
    }
    let software = among(&["driver_version", "cuda_driver_version", "nvrtc_version", "cublaslt_version"]);
    if !software.is_empty() {
        notes.push(format!("driver or libraries differ: {software}"));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::tests::full;

    fn of_host(host: &HostCosts) -> Side {
        let mut machine = Machine::default();
        machine.add_host(host);
        Side { name: String::new(), points: Vec::new(), machine: Some(machine) }
    }

    #[test]
    fn a_busy_host_with_other_costs_is_told() {
        let calm = full();
        let mut busy = full();
        busy.cpu.governor = Some("powersave".into());
        busy.cpu.load_after = Some(3.0);
        if let Some(score) = &mut busy.score {
            score.max *= 1.5;
        }
        if let Some(events) = &mut busy.events {
            events.query_ns.p50_ns *= 2.0;
        }
        busy.after_idle[0].compute_ns.p50_ns *= 2.0;
        let found = differences(&of_host(&calm), &of_host(&busy));
        let found: Vec<_> = found.iter().map(|d| (d.fact.as_str(), d.ratio)).collect();
        let expected = [
            ("cpu_governor", None),
            ("single_thread_score_max_over_min", Some(1.5)),
            ("event_query_ns", Some(2.0)),
            ("compute_after_1_ms_idle_ns", Some(2.0)),
        ];
        assert_eq!(found, expected, "the load of one side alone cannot be compared");
    }

    #[test]
    fn numbers_are_told_apart_beyond_one_percent() {
        assert_eq!(number_difference("x", 100.0, 100.9), None);
        assert_eq!(number_difference("x", 0.0, 0.0), None);
        let slower = number_difference("sm_clock_mhz", 1980.0, 1755.0).unwrap();
        assert_eq!((slower.a.as_deref(), slower.b.as_deref()), (Some("1980"), Some("1755")));
        assert!((slower.ratio.unwrap() - 0.886_363_636).abs() < 1e-6);
        assert_eq!(number_difference("x", 0.0, 0.5).unwrap().ratio, None);
        assert_eq!(number_text(3.021e12), "3.021e12");
    }
}

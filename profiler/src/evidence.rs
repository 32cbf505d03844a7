//! Evidence from NVML: what state the GPU was in while it was measured.
//!
//! Nothing here can fail a profile: where NVML is missing or silent, a field is `None` or a note says so.

use std::{
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use nvml_wrapper::{
    Device, Nvml,
    bitmasks::device::ThrottleReasons,
    enum_wrappers::device::{Clock, ComputeMode, TemperatureSensor},
    error::NvmlError,
};
use plumbline_bundles::GpuState;

/// Readings kept of a profile; beyond that, every other one is dropped and the interval doubles.
const MAX_READINGS: usize = 512;

/// Time between the first readings of a profile.
const FIRST_INTERVAL: Duration = Duration::from_secs(1);

/// Throttle reasons that hold clocks down, and NVML's names for them.
///
/// Left out: idling and the user's own clock settings, which are not the machine failing to keep its clocks.
const REDUCING_REASONS: [(ThrottleReasons, &str); 7] = [
    (ThrottleReasons::SW_POWER_CAP, "sw_power_cap"),
    (ThrottleReasons::HW_SLOWDOWN, "hw_slowdown"),
    (ThrottleReasons::SYNC_BOOST, "sync_boost"),
    (ThrottleReasons::SW_THERMAL_SLOWDOWN, "sw_thermal_slowdown"),
    (ThrottleReasons::HW_THERMAL_SLOWDOWN, "hw_thermal_slowdown"),
    (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "hw_power_brake_slowdown"),
    (ThrottleReasons::DISPLAY_CLOCK_SETTING, "display_clock_setting"),
];

/// One GPU as NVML sees it. Cloning is cheap, and clones may be used from other threads.
#[derive(Clone, Debug)]
pub struct NvmlMonitor {
    nvml: Arc<Nvml>,
    bus_id: String,
    started: Instant,
}

/// What NVML knows of a device that CUDA does not tell; `None` where it did not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NvmlIdentity {
    /// Driver version.
    pub driver_version: Option<String>,
    /// Whether ECC is on.
    pub ecc: Option<bool>,
    /// Whether MIG is on.
    pub mig: Option<bool>,
    /// Compute mode where it is not the default one, as `exclusive_process`.
    pub compute_mode: Option<String>,
}

impl NvmlMonitor {
    /// Opens a device by PCI bus id (`0000:3b:00.0`), UUID (`GPU-...`) or NVML index (`0`).
    ///
    /// CUDA's device numbers may differ from NVML's: give a bus id or UUID where there is one. Readings count
    /// their time from here.
    ///
    /// # Errors
    /// In words, for the notes of the evidence: NVML cannot be loaded, or knows no such device.
    pub fn open(device: &str) -> Result<Self, String> {
        let nvml = Nvml::init().map_err(|e| format!("NVML cannot be used: {e}"))?;
        let found = if device.starts_with("GPU-") || device.starts_with("MIG-") {
            nvml.device_by_uuid(device)
        } else if let Ok(index) = device.parse() {
            nvml.device_by_index(index)
        } else {
            nvml.device_by_pci_bus_id(device)
        };
        let bus_id = found
            .and_then(|device| device.pci_info())
            .map_err(|e| format!("NVML does not find device `{device}`: {e}"))?
            .bus_id;
        Ok(Self { nvml: Arc::new(nvml), bus_id, started: Instant::now() })
    }

    /// What NVML knows of the device and its driver.
    #[must_use]
    pub fn identity(&self) -> NvmlIdentity {
        let device = self.device().ok();
        NvmlIdentity {
            driver_version: self.nvml.sys_driver_version().ok(),
            ecc: device.as_ref().and_then(|d| d.is_ecc_enabled().ok()).map(|ecc| ecc.currently_enabled),
            mig: device.as_ref().and_then(|d| d.mig_mode().ok()).map(|mig| mig.current != 0),
            compute_mode: device.as_ref().and_then(|d| d.compute_mode().ok()).and_then(name_of_mode),
        }
    }

    /// What cannot be read of the device, in words: the evidence lacks it.
    #[must_use]
    pub fn unreadable(&self) -> Vec<String> {
        let device = match self.device() {
            Ok(device) => device,
            Err(error) => return vec![format!("NVML does not answer for the device: {error}")],
        };
        let errors = [
            ("SM clock", device.clock_info(Clock::SM).err()),
            ("memory clock", device.clock_info(Clock::Memory).err()),
            ("temperature", device.temperature(TemperatureSensor::Gpu).err()),
            ("power", device.power_usage().err()),
            ("energy", device.total_energy_consumption().err()),
            ("throttle reasons", device.current_throttle_reasons().err()),
        ];
        let texts = errors.into_iter().filter_map(|(what, error)| Some((what, error?)));
        texts.map(|(what, error)| format!("NVML does not tell the {what}: {error}")).collect()
    }

    /// Reads the state at this moment.
    #[must_use]
    pub fn state(&self) -> GpuState {
        let at_ms = self.started.elapsed().as_millis() as u64;
        let Ok(device) = self.device() else {
            return GpuState { at_ms, ..GpuState::default() };
        };
        GpuState {
            at_ms,
            sm_clock_mhz: device.clock_info(Clock::SM).ok(),
            memory_clock_mhz: device.clock_info(Clock::Memory).ok(),
            temperature_c: device.temperature(TemperatureSensor::Gpu).ok(),
            power_w: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1e3),
            energy_j: device.total_energy_consumption().ok().map(|millijoules| millijoules as f64 / 1e3),
            throttle_reasons: device.current_throttle_reasons().map(reduces_clocks).unwrap_or_default(),
        }
    }

    /// Reads what a sample keeps of the state, without temperature and energy: each reading takes time.
    #[must_use]
    pub fn sample_state(&self) -> GpuState {
        let Ok(device) = self.device() else { return GpuState::default() };
        GpuState {
            sm_clock_mhz: device.clock_info(Clock::SM).ok(),
            memory_clock_mhz: device.clock_info(Clock::Memory).ok(),
            power_w: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1e3),
            throttle_reasons: device.current_throttle_reasons().map(reduces_clocks).unwrap_or_default(),
            ..GpuState::default()
        }
    }

    fn device(&self) -> Result<Device<'_>, NvmlError> {
        self.nvml.device_by_pci_bus_id(self.bus_id.as_str())
    }
}

/// The name of a compute mode that restricts who may use the GPU.
fn name_of_mode(mode: ComputeMode) -> Option<String> {
    match mode {
        ComputeMode::Default => None,
        ComputeMode::ExclusiveThread => Some("exclusive_thread".into()),
        ComputeMode::Prohibited => Some("prohibited".into()),
        ComputeMode::ExclusiveProcess => Some("exclusive_process".into()),
    }
}

/// Names of the reasons that hold clocks down.
fn reduces_clocks(reasons: ThrottleReasons) -> Vec<String> {
    let named = REDUCING_REASONS.iter().filter(|(reason, _)| reasons.contains(*reason));
    named.map(|(_, name)| (*name).to_owned()).collect()
}

/// Readings at a steady pace, as many as fit [`MAX_READINGS`].
#[derive(Clone, Debug)]
pub(crate) struct Readings {
    states: Vec<GpuState>,
    interval: Duration,
    last: Option<Instant>,
}

impl Default for Readings {
    fn default() -> Self {
        Self { states: Vec::new(), interval: FIRST_INTERVAL, last: None }
    }
}

impl Readings {
    /// Takes a reading when the interval has passed since the last one.
    pub(crate) fn take_when_due(&mut self, now: Instant, read: impl FnOnce() -> GpuState) {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < self.interval) {
            return;
        }
        self.last = Some(now);
        self.push(read());
    }

    fn push(&mut self, state: GpuState) {
        if self.states.len() == MAX_READINGS {
            let mut index = 0;
            self.states.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.interval *= 2;
        }
        self.states.push(state);
    }

    pub(crate) fn into_vec(self) -> Vec<GpuState> {
        self.states
    }
}

/// A thread that reads a device's state while something else measures.
#[derive(Debug)]
pub(crate) struct StateSampler {
    stop: mpsc::Sender<()>,
    thread: thread::JoinHandle<Readings>,
}

impl StateSampler {
    /// Starts reading; times count from `origin`.
    pub(crate) fn start(monitor: NvmlMonitor, origin: Instant) -> Self {
        let (stop, stopped) = mpsc::channel();
        let thread = thread::spawn(move || {
            let mut readings = Readings::default();
            // Ends on the message, and when the sender is dropped without one.
            while stopped.recv_timeout(readings.interval) == Err(RecvTimeoutError::Timeout) {
                let at_ms = origin.elapsed().as_millis() as u64;
                readings.push(GpuState { at_ms, ..monitor.state() });
            }
            readings
        });
        Self { stop, thread }
    }

    /// Stops and returns what was read; `None` when the thread failed.
    pub(crate) fn finish(self) -> Option<Vec<GpuState>> {
        drop(self.stop);
        self.thread.join().ok().map(Readings::into_vec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_reasons_that_hold_clocks_down_count() {
        let idle = ThrottleReasons::GPU_IDLE | ThrottleReasons::APPLICATIONS_CLOCKS_SETTING;
        assert!(reduces_clocks(idle).is_empty());
        let hot = idle | ThrottleReasons::SW_POWER_CAP | ThrottleReasons::HW_THERMAL_SLOWDOWN;
        assert_eq!(reduces_clocks(hot), ["sw_power_cap", "hw_thermal_slowdown"]);
    }

    #[test]
    fn a_device_that_nvml_does_not_know_is_an_error_in_words() {
        let error = NvmlMonitor::open("no-such-device").unwrap_err();
        assert!(error.starts_with("NVML"), "{error}");
    }

    #[test]
    fn readings_stay_few_and_cover_the_whole_run() {
        let start = Instant::now();
        let mut readings = Readings::default();
        for second in 0..5000u64 {
            let state = || GpuState { at_ms: second * 1000, ..GpuState::default() };
            readings.take_when_due(start + Duration::from_secs(second), state);
        }
        let kept = readings.into_vec();
        assert!(kept.len() <= MAX_READINGS && kept.len() > MAX_READINGS / 4, "{}", kept.len());
        assert_eq!(kept[0].at_ms, 0);
        assert!(kept.last().unwrap().at_ms > 4_900_000);
        assert!(kept.is_sorted_by_key(|state| state.at_ms));
    }
}

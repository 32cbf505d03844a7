//! [`CudaDevice`]: a GPU behind the [`Device`] seam.

use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, DriverError, result, sys};
use plumbline_bundles::{CacheState, DeviceIdentity, GpuState, HostCosts, TimeStats};
use plumbline_schema::{Bytes, GpuSpec};

use super::{
    activity::{self, RecordedWay},
    attention::Chip,
    ceilings, check,
    compile::{kernel_hash, nvrtc_version},
    driver::{CudaError, CudaResult},
    gemm::CublasLt,
    host, libraries,
    operands::Gpu,
    timing::{self, Times},
};
use crate::{
    device::{Ceilings, CheckReport, CrossCheckOutcome, Device, Measurement, Point, StoppingRule},
    error::ProfileError,
    evidence::{NvmlIdentity, NvmlMonitor},
    quality::is_held_down,
};

/// The lowest compute capability, times ten, whose instructions the kernels use.
const MIN_COMPUTE_CAPABILITY: u32 = 80;
/// Longest wait for clocks to come back before a measurement, and between looks at them.
const MAX_SETTLE: Duration = Duration::from_millis(250);
const SETTLE_STEP: Duration = Duration::from_millis(1);

/// A GPU driven through CUDA.
pub struct CudaDevice {
    gpu: Gpu,
    identity: DeviceIdentity,
    spec: GpuSpec,
    monitor: Result<NvmlMonitor, String>,
    notes: Vec<String>,
    num_checks: u64,
    opened: Instant,
    spent: Spent,
}

/// Where the time of measurements goes, for the log.
#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    /// Operands, and the search for the best algorithm.
    preparing: Duration,
    /// Waiting for clocks to recover.
    settling: Duration,
    /// Reading clocks and power.
    reading: Duration,
    /// Launches.
    timing: Duration,
}

/// Time from one call to the next.
struct Laps(Instant);

impl Laps {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn next(&mut self) -> Duration {
        let lap = self.0.elapsed();
        self.0 += lap;
        lap
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        tracing::debug!(spent = ?self.spent, "time of measurements");
    }
}

impl CudaDevice {
    /// Opens a GPU by its number and takes the memory to measure with.
    ///
    /// # Errors
    /// [`ProfileError::NoDevice`] when a library, a driver or the GPU is missing, or the GPU is too old.
    pub fn open(ordinal: usize) -> Result<Self, ProfileError> {
        Self::open_as(ordinal, u32::MAX)
    }

    /// As [`Self::open`], with the code of an older compute capability (times ten) where the GPU's is higher: how the
    /// path of an 8.0 GPU is run and checked on a newer one.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_as(ordinal: usize, max_compute_capability: u32) -> Result<Self, ProfileError> {
        libraries::require_all()?;
        let context = CudaContext::new(ordinal).map_err(|error| cannot_open(ordinal, error))?;
        let mut identity = identify(&context)?;
        let monitor = bus_id(&context)
            .map_err(|error| format!("the driver does not tell the bus id: {:?}", error.0))
            .and_then(|bus_id| NvmlMonitor::open(&bus_id));
        let mut notes = Vec::new();
        if let Ok(monitor) = &monitor {
            let NvmlIdentity { driver_version, ecc, mig, compute_mode } = monitor.identity();
            (identity.driver_version, identity.ecc, identity.mig) = (driver_version, ecc, mig);
            notes.extend(compute_mode.map(|mode| format!("the GPU's compute mode is {mode}")));
            notes.extend(monitor.unreadable());
        }
        if let Err(reason) = &monitor {
            notes.push(format!("no clocks, power or throttle reasons are known: {reason}"));
        }
        if identity.compute_capability < MIN_COMPUTE_CAPABILITY {
            return Err(ProfileError::NoDevice {
                reason: format!(
                    "the kernels need compute capability 8.0, {} has {:.1}",
                    identity.device_name,
                    f64::from(identity.compute_capability) / 10.0
                ),
            });
        }
        let spec = match GpuSpec::by_device_name(&identity.device_name) {
            Some(spec) if spec.num_sms == identity.num_sms => spec,
            known => {
                if let Some(spec) = known {
                    notes.push(format!(
                        "{} has {} multiprocessors, {} are there (MIG on: {:?}): what was measured is this part of the \
                         GPU, while NVML's clocks and power are the whole one's",
                        spec.name, spec.num_sms, identity.num_sms, identity.mig
                    ));
                }
                spec_from_driver(&context, &identity).map_err(|error| no_device("its data", error))?
            }
        };
        let compute_capability = identity.compute_capability.min(max_compute_capability);
        let chip = Chip { num_sms: identity.num_sms, compute_capability };
        let gpu = Gpu::new(&context, chip, identity.l2_bytes).map_err(|error| match error {
            CudaError::Compile(error) => error,
            other => ProfileError::NoDevice { reason: other.to_string() },
        })?;
        Ok(Self {
            gpu,
            identity,
            spec,
            monitor,
            notes,
            num_checks: 0,
            opened: Instant::now(),
            spent: Spent::default(),
        })
    }

    /// GPUs that the driver shows, 0 when there is none.
    ///
    /// # Errors
    /// [`ProfileError::NoDevice`] when a library is missing or the driver does not start.
    pub fn count() -> Result<usize, ProfileError> {
        libraries::require_all()?;
        let count = CudaContext::device_count().map_err(|error| no_device("counting GPUs", error))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// As [`Device::cross_check`], launched in a given way.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn cross_check_by(
        &mut self,
        point: &Point,
        cache: CacheState,
        way: RecordedWay,
        pause_ns: u64,
    ) -> Result<CrossCheckOutcome, ProfileError> {
        self.bind()?;
        match activity::cross_check(&mut self.gpu, point, cache, way, pause_ns) {
            Ok(times) => Ok(CrossCheckOutcome::Times(times)),
            Err(error) if self.is_broken() => Err(ProfileError::Operator {
                operator: point.operator,
                shape: point.shape,
                reason: format!("while its kernels were recorded: {error}"),
                fatal: true,
            }),
            Err(error) => Ok(CrossCheckOutcome::Unavailable { reason: error.to_string() }),
        }
    }

    /// Runs device work on this thread, and names the point if it fails.
    fn at_point<T>(
        &mut self,
        point: &Point,
        work: impl FnOnce(&mut Gpu) -> CudaResult<T>,
    ) -> Result<T, ProfileError> {
        self.bind()?;
        work(&mut self.gpu).map_err(|error| match error {
            CudaError::Compile(error) => error,
            other => ProfileError::Operator {
                operator: point.operator,
                shape: point.shape,
                reason: other.to_string(),
                fatal: self.is_broken(),
            },
        })
    }

    fn elsewhere<T>(
        &mut self,
        call: &str,
        work: impl FnOnce(&mut Gpu) -> CudaResult<T>,
    ) -> Result<T, ProfileError> {
        self.bind()?;
        work(&mut self.gpu).map_err(|error| match error {
            CudaError::Compile(error) => error,
            other => ProfileError::Device { call: call.to_owned(), reason: other.to_string() },
        })
    }

    fn bind(&self) -> Result<(), ProfileError> {
        self.gpu.context.bind_to_thread().map_err(|error| ProfileError::Device {
            call: "cuCtxSetCurrent".to_owned(),
            reason: format!("{:?}", error.0),
        })
    }

    /// Whether an error has stuck to the context, as after an illegal access: then every later call fails.
    fn is_broken(&self) -> bool {
        result::ctx::synchronize().is_err() || self.gpu.stream.synchronize().is_err()
    }
}

impl Device for CudaDevice {
    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    fn spec(&self) -> &GpuSpec {
        &self.spec
    }

    fn state(&mut self) -> GpuState {
        self.monitor.as_ref().map(NvmlMonitor::state).unwrap_or_default()
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }

    fn elapsed(&self) -> Duration {
        self.opened.elapsed()
    }

    fn monitor(&self) -> Option<NvmlMonitor> {
        self.monitor.as_ref().ok().cloned()
    }

    fn check(&mut self, point: &Point) -> Result<CheckReport, ProfileError> {
        self.num_checks += 1;
        let seed = self.num_checks;
        self.at_point(point, |gpu| check::check(gpu, point, seed))
    }

    fn measure(
        &mut self,
        point: &Point,
        cache: CacheState,
        rule: &StoppingRule,
    ) -> Result<Measurement, ProfileError> {
        let monitor = self.monitor();
        let max_clock_mhz = self.spec.max_clock_mhz;
        let mut spent = self.spent;
        let measurement = self.at_point(point, |gpu| {
            let mut laps = Laps::start();
            let prepared = gpu.prepare(point, cache)?;
            spent.preparing += laps.next();
            settle(monitor.as_ref(), max_clock_mhz);
            spent.settling += laps.next();
            let mut states = Vec::with_capacity(2);
            let mut reading = Duration::ZERO;
            let look = || {
                let began = Instant::now();
                states.push(monitor.as_ref().map(NvmlMonitor::sample_state).unwrap_or_default());
                reading += began.elapsed();
            };
            let Times { times_ns, stop } = timing::time_watched(gpu, &prepared.sets, rule, look)?;
            spent.reading += reading;
            spent.timing += laps.next().saturating_sub(reading);
            let stats = TimeStats::from_times(&times_ns)
                .ok_or_else(|| CudaError::Unsupported("no finite times were measured".to_owned()))?;
            let after = states.pop().unwrap_or_default();
            let before = states.pop().unwrap_or_default();
            Ok(Measurement { stats, times_ns, before, after, kernel: prepared.kernel, stop })
        });
        self.spent = spent;
        measurement
    }

    fn cross_check(
        &mut self,
        point: &Point,
        cache: CacheState,
        pause_ns: u64,
    ) -> Result<CrossCheckOutcome, ProfileError> {
        let in_graph = self.cross_check_by(point, cache, RecordedWay::Graph, pause_ns)?;
        if let CrossCheckOutcome::Unavailable { .. } = in_graph {
            // Some versions of the library do not see into graphs.
            let in_stream = self.cross_check_by(point, cache, RecordedWay::Stream, pause_ns)?;
            if let CrossCheckOutcome::Times(_) = in_stream {
                return Ok(in_stream);
            }
        }
        Ok(in_graph)
    }

    fn ceilings(&mut self) -> Result<Ceilings, ProfileError> {
        self.elsewhere("ceilings", ceilings::ceilings)
    }

    fn host_costs(&mut self) -> Result<HostCosts, ProfileError> {
        self.elsewhere("host costs", host::host_costs)
    }
}

/// Lets the GPU recover from what ran before, the search for the best algorithm included: clocks held down are then the
/// launch's own doing.
fn settle(monitor: Option<&NvmlMonitor>, max_clock_mhz: u32) {
    let Some(monitor) = monitor else { return };
    let began = Instant::now();
    while began.elapsed() < MAX_SETTLE && is_held_down(&monitor.sample_state(), max_clock_mhz) {
        std::thread::sleep(SETTLE_STEP);
    }
}

/// Says in words what keeps a GPU from being opened.
fn cannot_open(ordinal: usize, error: DriverError) -> ProfileError {
    use sys::CUresult as Code;
    let hint = match error.0 {
        Code::CUDA_ERROR_DEVICE_UNAVAILABLE => {
            "another process holds it (exclusive compute mode), or its use is prohibited; wait for that process, or ask \
             the machine's owner for the default compute mode"
        }
        Code::CUDA_ERROR_INVALID_DEVICE => {
            "there is no GPU of that number (nor, with MIG on, an instance to use)"
        }
        Code::CUDA_ERROR_OUT_OF_MEMORY => "other processes have taken its memory",
        _ => "see the driver's log",
    };
    ProfileError::NoDevice { reason: format!("opening GPU {ordinal} failed: {:?}: {hint}", error.0) }
}

fn no_device(what: &str, error: DriverError) -> ProfileError {
    ProfileError::NoDevice { reason: format!("{what} failed: {:?}", error.0) }
}

/// The GPU's place, as NVML takes it: the two number GPUs differently.
fn bus_id(context: &CudaContext) -> Result<String, DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let domain = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?;
    let bus = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?;
    let device = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?;
    Ok(format!("{domain:08x}:{bus:02x}:{device:02x}.0"))
}

fn identify(context: &CudaContext) -> Result<DeviceIdentity, ProfileError> {
    let attribute = |attribute| -> Result<u64, ProfileError> {
        let value = context.attribute(attribute).map_err(|error| no_device("cuDeviceGetAttribute", error))?;
        Ok(value.max(0) as u64)
    };
    let name = context.name().map_err(|error| no_device("cuDeviceGetName", error))?;
    let memory_bytes = context.total_mem().map_err(|error| no_device("cuDeviceTotalMem", error))?;
    let (major, minor) =
        context.compute_capability().map_err(|error| no_device("cuDeviceGetAttribute", error))?;
    let mut cuda_driver_version = 0;
    // SAFETY: the version is written to a valid place.
    unsafe { sys::cuDriverGetVersion(&raw mut cuda_driver_version) }
        .result()
        .map_err(|error| no_device("cuDriverGetVersion", error))?;
    Ok(DeviceIdentity {
        device_name: name,
        compute_capability: (10 * major + minor).max(0) as u32,
        num_sms: attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        l2_bytes: attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        memory_bytes: memory_bytes as u64,
        driver_version: None,
        cuda_driver_version,
        nvrtc_version: nvrtc_version()?,
        cublaslt_version: CublasLt::version(),
        ecc: None,
        mig: None,
        kernel_hash: kernel_hash(),
    })
}

/// A data sheet made of what the driver says, for a GPU that none is shipped for.
///
/// Dense bf16 rates a multiprocessor and clock are those of its architecture: 2,048 FLOP on 8.0, 1,024 on other
/// 8.x and on 12.x, 4,096 on 9.0, 8,192 on 10.x (NVIDIA's architecture white papers). fp32: 128 on 8.0, else 256.
fn spec_from_driver(context: &CudaContext, identity: &DeviceIdentity) -> Result<GpuSpec, DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let clock_mhz = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?.max(0) as u32 / 1000;
    let memory_khz = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
    let bus_bits = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
    let (bf16_flops, fp32_flops) = match identity.compute_capability {
        80 => (2048.0, 128.0),
        90..=99 => (4096.0, 256.0),
        100..=119 => (8192.0, 256.0),
        _ => (1024.0, 256.0),
    };
    let sm_clocks_per_s = f64::from(identity.num_sms) * f64::from(clock_mhz) * 1e6;
    Ok(GpuSpec {
        name: identity.device_name.to_lowercase().replace(' ', "-"),
        compute_capability: identity.compute_capability,
        num_sms: identity.num_sms,
        bf16_flops_per_s: bf16_flops * sm_clocks_per_s,
        fp32_flops_per_s: fp32_flops * sm_clocks_per_s,
        // Two transfers a clock.
        hbm_bandwidth_bytes_per_s: 2.0 * f64::from(memory_khz) * 1e3 * f64::from(bus_bits) / 8.0,
        hbm_bytes: Bytes(identity.memory_bytes),
        l2_bytes: Bytes(identity.l2_bytes),
        boost_clock_mhz: clock_mhz,
        max_clock_mhz: clock_mhz,
        power_limit_w: 0,
    })
}

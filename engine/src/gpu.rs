//! The GPU as the engine uses it: its stream, the operators' kernels, cuBLASLt.

use std::{rc::Rc, sync::Arc};

use cudarc::driver::{CudaContext, result, sys};
use plumbline_profiler::cuda::{
    attention::Chip,
    driver::{CudaError, CudaResult, DeviceMemory, Named, Stream},
    gemm::CublasLt,
    kernels::Kernels,
    require_libraries,
};

use crate::error::EngineError;

/// The lowest compute capability, times ten, whose instructions the kernels use.
const MIN_COMPUTE_CAPABILITY: u32 = 80;

/// One GPU.
pub struct Gpu {
    pub context: Arc<CudaContext>,
    /// Shared, as recording holds it while the operators use the rest.
    pub stream: Rc<Stream>,
    pub kernels: Kernels,
    pub library: Rc<CublasLt>,
    pub chip: Chip,
    /// Its name as the driver tells it.
    pub name: String,
}

impl Gpu {
    /// Opens a GPU by its number.
    ///
    /// # Errors
    /// [`EngineError::NoDevice`] when a library, a driver or the GPU is missing, or the GPU is too old.
    pub fn open(ordinal: usize) -> Result<Self, EngineError> {
        require_libraries()?;
        let no_device =
            |error: CudaError| EngineError::NoDevice(format!("GPU {ordinal} cannot be used: {error}"));
        let context = CudaContext::new(ordinal).named("opening it").map_err(no_device)?;
        let number =
            |attribute| context.attribute(attribute).named("cuDeviceGetAttribute").map(i32::unsigned_abs);
        let chip = || -> CudaResult<Chip> {
            use sys::CUdevice_attribute as Attribute;
            let major = number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            let num_sms = number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
            Ok(Chip { num_sms, compute_capability: 10 * major + minor })
        };
        let chip = chip().map_err(no_device)?;
        let name = context.name().named("cuDeviceGetName").map_err(no_device)?;
        if chip.compute_capability < MIN_COMPUTE_CAPABILITY {
            return Err(EngineError::NoDevice(format!(
                "the kernels need compute capability 8.0, {name} has {:.1}",
                f64::from(chip.compute_capability) / 10.0
            )));
        }
        Ok(Self {
            stream: Rc::new(Stream::new(&context).map_err(no_device)?),
            kernels: Kernels::new(&context, chip.compute_capability).map_err(no_device)?,
            library: CublasLt::new().map_err(no_device)?,
            context,
            chip,
            name,
        })
    }

    /// Free and all memory of the GPU that was opened last, bytes.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory_bytes() -> CudaResult<(u64, u64)> {
        let (free, total) = result::mem_get_info().named("cuMemGetInfo")?;
        Ok((free as u64, total as u64))
    }

    /// Takes memory and sets it to 0.
    ///
    /// # Errors
    /// [`EngineError::OutOfMemory`] where it is not there.
    pub fn zeroed(
        &self,
        what: &'static str,
        num_bytes: u64,
        advice: &'static str,
    ) -> Result<DeviceMemory, EngineError> {
        let memory =
            DeviceMemory::new(&self.context, num_bytes).map_err(|error| match Self::memory_bytes() {
                Ok((free, _)) if free < num_bytes + num_bytes / 16 => {
                    EngineError::OutOfMemory { what, needed_bytes: num_bytes, available_bytes: free, advice }
                }
                _ => EngineError::Device(error),
            })?;
        self.stream.fill_bytes(memory.address(), 0, num_bytes as usize)?;
        Ok(memory)
    }
}

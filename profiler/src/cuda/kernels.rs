//! Compiled kernels, each made when first asked for.

use std::{ffi::CString, sync::Arc};

use cudarc::driver::{CudaContext, result, sys};

use super::{
    compile::{KernelSource, compile_to_run_on},
    driver::{CudaError, CudaResult, Named},
};

/// Loaded kernels of one device.
pub struct Kernels {
    context: Arc<CudaContext>,
    architecture: u32,
    gpu: u32,
    /// Few, and asked for at every launch: looking through them takes no memory.
    loaded: Vec<Kernel>,
}

struct Kernel {
    name: &'static str,
    definitions: Vec<String>,
    module: sys::CUmodule,
    function: sys::CUfunction,
}

impl Kernels {
    /// Kernels for a compute capability (times ten), which is the GPU's or an older one.
    ///
    /// # Errors
    /// When the driver does not tell the GPU's own.
    pub fn new(context: &Arc<CudaContext>, architecture: u32) -> CudaResult<Self> {
        let (major, minor) = context.compute_capability().named("cuDeviceGetAttribute")?;
        let gpu = (10 * major + minor).max(0) as u32;
        Ok(Self { context: context.clone(), architecture, gpu, loaded: Vec::new() })
    }

    /// The kernel with these macro definitions, allowed `shared_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// When there is none of that name, or it does not compile or load.
    pub fn get(
        &mut self,
        name: &'static str,
        definitions: &[&str],
        shared_bytes: u32,
    ) -> CudaResult<sys::CUfunction> {
        let is_it = |kernel: &&Kernel| kernel.name == name && kernel.definitions == definitions;
        if let Some(kernel) = self.loaded.iter().find(is_it) {
            return Ok(kernel.function);
        }
        let source = KernelSource::by_name(name)
            .ok_or_else(|| CudaError::Unsupported(format!("there is no kernel `{name}`")))?;
        let image = compile_to_run_on(source, definitions, self.architecture, self.gpu)?.image;
        let entry = CString::new(name)
            .map_err(|error| CudaError::Call { call: "cuModuleGetFunction", reason: error.to_string() })?;
        // SAFETY: the image comes from the compiler and outlives the call; the module lives in the map.
        let kernel = unsafe {
            let module = result::module::load_data(image.as_ptr().cast()).named("cuModuleLoadData")?;
            let function = result::module::get_function(module, entry).named("cuModuleGetFunction")?;
            if shared_bytes > 48 << 10 {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                result::function::set_function_attribute(function, attribute, shared_bytes.cast_signed())
                    .named("cuFuncSetAttribute")?;
            }
            let definitions = definitions.iter().map(ToString::to_string).collect();
            Kernel { name, definitions, module, function }
        };
        let function = kernel.function;
        self.loaded.push(kernel);
        Ok(function)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        for kernel in &self.loaded {
            // SAFETY: the module was loaded by this value, and nothing runs any more.
            let _ = unsafe { result::module::unload(kernel.module) };
        }
    }
}

//! Compiled kernels, each made when first asked for.

use std::{collections::HashMap, ffi::CString, sync::Arc};

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
    loaded: HashMap<(&'static str, String), Kernel>,
}

struct Kernel {
    module: sys::CUmodule,
    function: sys::CUfunction,
}

impl Kernels {
    /// Kernels for a compute capability (times ten), which is the GPU's or an older one.
    pub fn new(context: &Arc<CudaContext>, architecture: u32) -> CudaResult<Self> {
        let (major, minor) = context.compute_capability().named("cuDeviceGetAttribute")?;
        let gpu = (10 * major + minor).max(0) as u32;
        Ok(Self { context: context.clone(), architecture, gpu, loaded: HashMap::new() })
    }

    /// The kernel with these macro definitions, allowed `shared_bytes` of dynamic shared memory.
    pub fn get(
        &mut self,
        name: &'static str,
        definitions: &[&str],
        shared_bytes: u32,
    ) -> CudaResult<sys::CUfunction> {
        let key = (name, definitions.join(" "));
        if let Some(kernel) = self.loaded.get(&key) {
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
            Kernel { module, function }
        };
        let function = kernel.function;
        self.loaded.insert(key, kernel);
        Ok(function)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        for kernel in self.loaded.values() {
            // SAFETY: the module was loaded by this value, and nothing runs any more.
            let _ = unsafe { result::module::unload(kernel.module) };
        }
    }
}

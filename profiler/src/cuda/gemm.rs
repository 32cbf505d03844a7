//! Matrix products by cuBLASLt: `[m, k] x [n, k]^T -> [m, n]`, bf16 with fp32 accumulation.

use std::{ffi::c_void, ptr::null_mut, rc::Rc};

use cudarc::cublaslt::{result, sys};

use super::driver::{CudaError, CudaResult, Stream};

/// cuBLASLt's workspace; NVIDIA recommends 32 MiB for Hopper.
pub const WORKSPACE_BYTES: u64 = 64 << 20;
/// Algorithms that the heuristic is asked for.
const MAX_ALGORITHMS: i32 = 8;
/// `CUBLAS_OP_T`.
const TRANSPOSE: u32 = 1;

fn named<T>(call: &'static str, outcome: Result<T, result::CublasError>) -> CudaResult<T> {
    outcome.map_err(|error| CudaError::Call { call, reason: error.to_string() })
}

/// The library's handle.
pub struct CublasLt {
    handle: sys::cublasLtHandle_t,
}

impl CublasLt {
    /// Opens the library.
    ///
    /// # Errors
    /// The library's.
    pub fn new() -> CudaResult<Rc<Self>> {
        Ok(Rc::new(Self { handle: named("cublasLtCreate", result::create_handle())? }))
    }

    /// The library's version number.
    #[must_use]
    pub fn version() -> u64 {
        // SAFETY: the call has no preconditions.
        unsafe { sys::cublasLtGetVersion() as u64 }
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: the handle was created by this value.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// Descriptors of a product and the algorithms that can compute it, best guess first.
///
/// The library's matrices are column-major, where a row-major matrix is its transpose: it is asked for
/// `out^T [n, m] = (weight^T [k, n])^T x (x^T [k, m])`.
pub struct GemmPlan {
    library: Rc<CublasLt>,
    product: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithms: Vec<sys::cublasLtMatmulHeuristicResult_t>,
}

impl GemmPlan {
    /// Describes the product of `[m, k]` and `[n, k]`, and asks which algorithms there are.
    ///
    /// # Errors
    /// The library's, or when it has no algorithm.
    pub fn new(library: &Rc<CublasLt>, m: u32, n: u32, k: u32) -> CudaResult<Self> {
        let mut plan = Self {
            library: library.clone(),
            product: null_mut(),
            weight: null_mut(),
            x: null_mut(),
            out: null_mut(),
            algorithms: Vec::new(),
        };
        let fp32 = sys::cudaDataType_t::CUDA_R_32F;
        plan.product = named(
            "cublasLtMatmulDescCreate",
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, fp32),
        )?;
        // SAFETY: the descriptor lives, and the value is of the attribute's type.
        named("cublasLtMatmulDescSetAttribute", unsafe {
            result::set_matmul_desc_attribute(
                plan.product,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                std::ptr::from_ref(&TRANSPOSE).cast(),
                size_of_val(&TRANSPOSE),
            )
        })?;
        let layout = |rows: u32, columns: u32| {
            let bf16 = sys::cudaDataType_t::CUDA_R_16BF;
            named(
                "cublasLtMatrixLayoutCreate",
                result::create_matrix_layout(bf16, rows.into(), columns.into(), rows.into()),
            )
        };
        plan.weight = layout(k, n)?;
        plan.x = layout(k, m)?;
        plan.out = layout(n, m)?;
        plan.algorithms = plan.ask_heuristic()?;
        Ok(plan)
    }

    fn ask_heuristic(&self) -> CudaResult<Vec<sys::cublasLtMatmulHeuristicResult_t>> {
        let preference = named("cublasLtMatmulPreferenceCreate", result::create_matmul_pref())?;
        let workspace_bytes = WORKSPACE_BYTES as usize;
        // SAFETY: the preference lives, and the value is of the attribute's type.
        let set = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                std::ptr::from_ref(&workspace_bytes).cast(),
                size_of_val(&workspace_bytes),
            )
        };
        let mut found = Vec::with_capacity(MAX_ALGORITHMS as usize);
        let mut count = 0;
        // SAFETY: all descriptors live; the library writes `count` results into room for as many as asked.
        let asked = unsafe {
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.library.handle,
                self.product,
                self.weight,
                self.x,
                self.out,
                self.out,
                preference,
                MAX_ALGORITHMS,
                found.as_mut_ptr(),
                &raw mut count,
            );
            if status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
                found.set_len(count.clamp(0, MAX_ALGORITHMS) as usize);
            }
            let _ = result::destroy_matmul_pref(preference);
            status.result()
        };
        named("cublasLtMatmulPreferenceSetAttribute", set)?;
        named("cublasLtMatmulAlgoGetHeuristic", asked)?;
        found.retain(|choice| choice.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        if found.is_empty() {
            return Err(CudaError::Unsupported("cuBLASLt has no algorithm for this product".to_owned()));
        }
        Ok(found)
    }

    /// How many algorithms there are to choose from, at least one.
    #[must_use]
    pub fn num_algorithms(&self) -> usize {
        self.algorithms.len()
    }

    /// The library's algorithm and its configuration, in numbers of the library's own.
    #[must_use]
    pub fn describe(&self, algorithm: usize) -> String {
        use sys::cublasLtMatmulAlgoConfigAttributes_t as Attribute;
        let read = |attribute: Attribute, size: usize| {
            let (mut value, mut written) = (0u32, 0usize);
            // SAFETY: the attribute is at most as large as the value.
            let status = unsafe {
                sys::cublasLtMatmulAlgoConfigGetAttribute(
                    &raw const self.algorithms[algorithm].algo,
                    attribute,
                    (&raw mut value).cast(),
                    size,
                    &raw mut written,
                )
            };
            match status {
                sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS => value.to_string(),
                _ => "?".to_owned(),
            }
        };
        format!(
            "cublaslt algo={} tile={} stages={} splitk={} swizzle={} custom={} inner={} cluster={}",
            read(Attribute::CUBLASLT_ALGO_CONFIG_ID, 4),
            read(Attribute::CUBLASLT_ALGO_CONFIG_TILE_ID, 4),
            read(Attribute::CUBLASLT_ALGO_CONFIG_STAGES_ID, 4),
            read(Attribute::CUBLASLT_ALGO_CONFIG_SPLITK_NUM, 4),
            read(Attribute::CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING, 4),
            read(Attribute::CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, 4),
            read(Attribute::CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID, 2),
            read(Attribute::CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, 2),
        )
    }
}

impl Drop for GemmPlan {
    fn drop(&mut self) {
        // SAFETY: each descriptor was created by this value or is null, as construction failed before it.
        unsafe {
            for layout in [self.weight, self.x, self.out] {
                if !layout.is_null() {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
            if !self.product.is_null() {
                let _ = result::destroy_matmul_desc(self.product);
            }
        }
    }
}

/// A product with its operands.
pub struct GemmLaunch {
    /// The product.
    pub plan: Rc<GemmPlan>,
    /// Index among the plan's algorithms.
    pub algorithm: usize,
    /// `[m, k]`.
    pub x: u64,
    /// `[n, k]`.
    pub weight: u64,
    /// `[m, n]`.
    pub out: u64,
    /// [`WORKSPACE_BYTES`] that no other launch uses at the same time.
    pub workspace: u64,
}

impl GemmLaunch {
    /// Puts the launch on a stream.
    ///
    /// # Errors
    /// The library's.
    pub fn enqueue(&self, stream: &Stream) -> CudaResult<()> {
        let (alpha, beta) = (1.0f32, 0.0f32);
        let pointer = |address: u64| address as *mut c_void;
        let plan = &self.plan;
        // SAFETY: the descriptors live with the plan; the operands are as large as the layouts say.
        named("cublasLtMatmul", unsafe {
            result::matmul(
                plan.library.handle,
                plan.product,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                pointer(self.weight),
                plan.weight,
                pointer(self.x),
                plan.x,
                pointer(self.out),
                plan.out,
                pointer(self.out),
                plan.out,
                &raw const plan.algorithms[self.algorithm].algo,
                pointer(self.workspace),
                WORKSPACE_BYTES as usize,
                stream.raw().cast(),
            )
        })
    }
}

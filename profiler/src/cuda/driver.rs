//! What of the CUDA driver is used, with errors as values and resources that free themselves.
//!
//! Every call's error is that of the driver, named by the call. Addresses are those of device memory.
#![expect(clippy::missing_errors_doc, reason = "each call fails as the driver's does")]

use std::{ffi::c_void, ptr::null_mut, sync::Arc};

use cudarc::driver::{CudaContext, DriverError, result, sys};
use thiserror::Error;

use crate::error::ProfileError;

/// A failed call or an operator that cannot run.
#[derive(Debug, Error)]
pub enum CudaError {
    /// The driver or a library refused.
    #[error("{call}: {reason}")]
    Call {
        /// The call.
        call: &'static str,
        /// What it answered.
        reason: String,
    },
    /// The device's memory does not hold the operands.
    #[error("needs {needed} bytes of device memory for {what}, {available} are there")]
    OutOfMemory {
        /// What it is for.
        what: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        available: u64,
    },
    /// The kernels do not cover the shape.
    #[error("{0}")]
    Unsupported(String),
    /// A kernel does not compile.
    #[error(transparent)]
    Compile(#[from] ProfileError),
}

/// Result of device work.
pub type CudaResult<T> = Result<T, CudaError>;

/// Names the call that a driver error came from.
pub trait Named<T> {
    /// Turns the error into a [`CudaError`] that says what was called.
    fn named(self, call: &'static str) -> CudaResult<T>;
}

impl<T> Named<T> for Result<T, DriverError> {
    fn named(self, call: &'static str) -> CudaResult<T> {
        self.map_err(|error| CudaError::Call { call, reason: format!("{:?}", error.0) })
    }
}

/// A stream and the context it lives in.
pub struct Stream {
    context: Arc<CudaContext>,
    raw: sys::CUstream,
}

impl Stream {
    /// A stream of its own, which waits for no other.
    pub fn new(context: &Arc<CudaContext>) -> CudaResult<Self> {
        context.bind_to_thread().named("cuCtxSetCurrent")?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking).named("cuStreamCreate")?;
        Ok(Self { context: context.clone(), raw })
    }

    /// The driver's handle.
    #[must_use]
    pub fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Waits for all that was put on it.
    pub fn synchronize(&self) -> CudaResult<()> {
        // SAFETY: the stream lives as long as self.
        unsafe { result::stream::synchronize(self.raw) }.named("cuStreamSynchronize")
    }

    /// Sets bytes to a value.
    pub fn fill_bytes(&self, address: u64, value: u8, num_bytes: usize) -> CudaResult<()> {
        // SAFETY: callers pass memory they own.
        unsafe { result::memset_d8_async(address, value, num_bytes, self.raw) }.named("cuMemsetD8Async")
    }

    /// Copies a slice to the device and waits.
    ///
    /// On this stream, as a copy elsewhere may still be under way when its call returns, and a kernel here would not
    /// wait for it.
    pub fn upload<T: Copy>(&self, address: u64, values: &[T]) -> CudaResult<()> {
        if values.is_empty() {
            return Ok(());
        }
        // SAFETY: callers pass memory that holds the slice; the slice outlives the wait.
        unsafe { result::memcpy_htod_async(address, values, self.raw) }.named("cuMemcpyHtoDAsync")?;
        self.synchronize()
    }

    /// Copies from page-locked memory to the device, without waiting: the part must stay as it is until the copy is
    /// done.
    pub fn copy_to_device(&self, address: u64, from: &[u8]) -> CudaResult<()> {
        // SAFETY: callers pass memory that holds the bytes, and keep them.
        unsafe { result::memcpy_htod_async(address, from, self.raw) }.named("cuMemcpyHtoDAsync")
    }

    /// Copies the first `width` bytes of rows that are `pitch` bytes apart, to the same places on the device; as
    /// [`Self::copy_to_device`] otherwise.
    ///
    /// # Panics
    /// When the rows do not lie in the slice.
    pub fn copy_rows_to_device(
        &self,
        address: u64,
        rows: &[u8],
        pitch: usize,
        width: usize,
        num_rows: usize,
    ) -> CudaResult<()> {
        if width == 0 || num_rows == 0 {
            return Ok(());
        }
        assert!(width <= pitch && pitch * num_rows <= rows.len(), "the rows lie in the slice");
        let copy = sys::CUDA_MEMCPY2D {
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: rows.as_ptr().cast(),
            srcPitch: pitch,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstDevice: address,
            dstPitch: pitch,
            WidthInBytes: width,
            Height: num_rows,
            srcXInBytes: 0,
            srcY: 0,
            srcDevice: 0,
            srcArray: null_mut(),
            dstXInBytes: 0,
            dstY: 0,
            dstHost: null_mut(),
            dstArray: null_mut(),
        };
        // SAFETY: the rows lie in the slice, and callers pass memory that holds them, and keep both.
        unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, self.raw) }.result().named("cuMemcpy2DAsync")
    }

    /// Copies from the device to page-locked memory, without waiting: it holds the values when the stream has come so
    /// far.
    pub fn copy_to_host(&self, to: &mut [u8], address: u64) -> CudaResult<()> {
        // SAFETY: callers pass memory that they own, and read it after a wait.
        unsafe { result::memcpy_dtoh_async(to, address, self.raw) }.named("cuMemcpyDtoHAsync")
    }

    /// Copies within the device.
    pub fn copy_on_device(&self, to: u64, from: u64, num_bytes: usize) -> CudaResult<()> {
        // SAFETY: callers pass memory they own.
        unsafe { result::memcpy_dtod_async(to, from, num_bytes, self.raw) }.named("cuMemcpyDtoDAsync")
    }

    /// Records what `enqueue` puts on the stream into a graph that can be replayed.
    pub fn capture(&self, enqueue: impl FnOnce() -> CudaResult<()>) -> CudaResult<Graph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is idle or holds work that capture does not touch.
        unsafe { result::stream::begin_capture(self.raw, mode) }.named("cuStreamBeginCapture")?;
        let enqueued = enqueue();
        // SAFETY: capture was begun above; it must end even when enqueueing failed.
        let ended = unsafe { result::stream::end_capture(self.raw) }.named("cuStreamEndCapture");
        enqueued?;
        let graph = ended?;
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph was just captured.
        match unsafe { result::graph::instantiate(graph, flags) }.named("cuGraphInstantiate") {
            Ok(exec) => Ok(Graph { template: graph, exec, _context: self.context.clone() }),
            Err(error) => {
                // SAFETY: nothing else refers to the graph.
                let _ = unsafe { result::graph::destroy(graph) };
                Err(error)
            }
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: the stream was created by this value; an error on the way out has no one to go to.
        let _ = unsafe { result::stream::destroy(self.raw) };
    }
}

/// A recorded sequence of launches.
pub struct Graph {
    template: sys::CUgraph,
    exec: sys::CUgraphExec,
    _context: Arc<CudaContext>,
}

impl Graph {
    /// Brings the graph to the device before its first launch.
    pub fn upload(&self, stream: &Stream) -> CudaResult<()> {
        // SAFETY: graph and stream live.
        unsafe { result::graph::upload(self.exec, stream.raw) }.named("cuGraphUpload")
    }

    /// Replays what was recorded.
    pub fn launch(&self, stream: &Stream) -> CudaResult<()> {
        // SAFETY: graph and stream live.
        unsafe { result::graph::launch(self.exec, stream.raw) }.named("cuGraphLaunch")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: both handles were created by Stream::capture and are used by no one else.
        unsafe {
            let _ = result::graph::exec_destroy(self.exec);
            let _ = result::graph::destroy(self.template);
        }
    }
}

/// A point on a stream whose time can be read.
pub struct Event {
    raw: sys::CUevent,
    _context: Arc<CudaContext>,
}

impl Event {
    /// An event that records times.
    pub fn new(context: &Arc<CudaContext>) -> CudaResult<Self> {
        let raw = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).named("cuEventCreate")?;
        Ok(Self { raw, _context: context.clone() })
    }

    /// Records the point that the stream has come to.
    pub fn record(&self, stream: &Stream) -> CudaResult<()> {
        // SAFETY: event and stream live.
        unsafe { result::event::record(self.raw, stream.raw) }.named("cuEventRecord")
    }

    /// Whether the work recorded before it is done.
    pub fn has_happened(&self) -> CudaResult<bool> {
        // SAFETY: the event lives.
        match unsafe { result::event::query(self.raw) } {
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => other.named("cuEventQuery").map(|()| true),
        }
    }

    /// Waits until the work recorded before it is done.
    pub fn synchronize(&self) -> CudaResult<()> {
        // SAFETY: the event lives.
        unsafe { result::event::synchronize(self.raw) }.named("cuEventSynchronize")
    }

    /// Nanoseconds from this event to a later one; both must have happened.
    pub fn elapsed_ns(&self, later: &Self) -> CudaResult<f64> {
        type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
        let mut milliseconds = 0.0f32;
        // The bindings of CUDA 13 know only the call's second version, which drivers before 12.8 lack.
        // SAFETY: every driver exports this symbol with this signature; the events live.
        let code = unsafe {
            let elapsed = sys::culib().get::<Elapsed>(b"cuEventElapsedTime\0");
            elapsed.map(|call| call(&raw mut milliseconds, self.raw, later.raw))
        };
        let code =
            code.map_err(|error| CudaError::Call { call: "cuEventElapsedTime", reason: error.to_string() })?;
        code.result().named("cuEventElapsedTime")?;
        Ok(f64::from(milliseconds) * 1e6)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event was created by this value.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}

/// Device memory of its own.
pub struct DeviceMemory {
    address: u64,
    num_bytes: u64,
    _context: Arc<CudaContext>,
}

impl DeviceMemory {
    /// Takes memory, of which nothing is known.
    pub fn new(context: &Arc<CudaContext>, num_bytes: u64) -> CudaResult<Self> {
        // SAFETY: the memory is not read before it is written.
        let address = unsafe { result::malloc_sync(num_bytes.max(1) as usize) }.named("cuMemAlloc")?;
        Ok(Self { address, num_bytes, _context: context.clone() })
    }

    /// Where it begins.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How much it is.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        self.num_bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: the memory was allocated by this value.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Page-locked host memory: copies to and from it need no staging, and go on while the host does.
pub struct PinnedMemory {
    address: *mut u8,
    num_bytes: usize,
    _context: Arc<CudaContext>,
}

impl PinnedMemory {
    /// Takes memory, all zeros.
    pub fn new(context: &Arc<CudaContext>, num_bytes: usize) -> CudaResult<Self> {
        let num_bytes = num_bytes.max(1);
        // SAFETY: the memory is written before it is read.
        let address = unsafe { result::malloc_host(num_bytes, 0) }.named("cuMemHostAlloc")?.cast::<u8>();
        // SAFETY: the call returned as many bytes.
        unsafe { address.write_bytes(0, num_bytes) };
        Ok(Self { address, num_bytes, _context: context.clone() })
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the memory is this value's and was written when it was taken.
        unsafe { std::slice::from_raw_parts(self.address, self.num_bytes) }
    }

    /// Its bytes, to change.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.num_bytes) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // SAFETY: the memory was taken by this value.
        let _ = unsafe { result::free_host(self.address.cast()) };
    }
}

/// Copies from the device into a slice and waits.
pub fn download<T: Copy>(values: &mut [T], address: u64) -> CudaResult<()> {
    // SAFETY: callers pass memory that holds as many values, of a type without invalid bit patterns.
    unsafe { result::memcpy_dtoh_sync(values, address) }.named("cuMemcpyDtoH")
}

/// A kernel's arguments: tensor maps, then slots of eight bytes, of which a 32-bit argument uses the low half.
#[derive(Clone, Debug, Default)]
pub struct Args {
    maps: Vec<sys::CUtensorMap>,
    slots: Vec<u64>,
}

impl Args {
    /// Adds a number or an address.
    #[must_use]
    pub fn u64(mut self, value: u64) -> Self {
        self.slots.push(value);
        self
    }

    /// Adds a tensor map; all of them come before the numbers.
    #[must_use]
    pub fn map(mut self, map: sys::CUtensorMap) -> Self {
        self.maps.push(map);
        self
    }

    /// Adds a number.
    #[must_use]
    pub fn u32(self, value: u32) -> Self {
        self.u64(u64::from(value))
    }

    /// Adds a number.
    #[must_use]
    pub fn f32(self, value: f32) -> Self {
        self.u32(value.to_bits())
    }
}

/// Most arguments of a kernel.
const MAX_ARGS: usize = 24;

/// Describes a bf16 tensor, innermost dimension first, that the copy engine fetches boxes of, swizzled by 128 bytes.
///
/// `strides` are the bytes between neighbours in each dimension but the innermost.
pub fn tensor_map<const RANK: usize>(
    address: u64,
    dimensions: [u64; RANK],
    strides: &[u64],
    box_size: [u32; RANK],
) -> CudaResult<sys::CUtensorMap> {
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let steps = [1u32; RANK];
    // SAFETY: the arrays have as many entries as the call reads: the rank, one fewer for the strides.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            RANK as u32,
            address as *mut c_void,
            dimensions.as_ptr(),
            strides.as_ptr(),
            box_size.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .named("cuTensorMapEncodeTiled")?;
    Ok(map)
}

/// A kernel ready to launch.
#[derive(Clone, Debug)]
pub struct KernelLaunch {
    /// The kernel.
    pub function: sys::CUfunction,
    /// Blocks in x and y.
    pub grid: (u32, u32),
    /// Threads of a block.
    pub num_threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// What the kernel is called with.
    pub args: Args,
}

impl KernelLaunch {
    /// Puts the launch on a stream.
    pub fn enqueue(&self, stream: &Stream) -> CudaResult<()> {
        let mut pointers: [*mut c_void; MAX_ARGS] = [null_mut(); MAX_ARGS];
        let maps = self.args.maps.iter().map(|map| std::ptr::from_ref(map).cast::<c_void>());
        let slots = self.args.slots.iter().map(|slot| std::ptr::from_ref(slot).cast::<c_void>());
        let num_args = self.args.maps.len() + self.args.slots.len();
        debug_assert!(num_args <= MAX_ARGS, "{num_args} arguments");
        for (pointer, value) in pointers.iter_mut().zip(maps.chain(slots)) {
            *pointer = value.cast_mut();
        }
        // SAFETY: the arguments match the kernel's parameters, which each builder in `launch` sees to.
        unsafe {
            result::launch_kernel(
                self.function,
                (self.grid.0, self.grid.1, 1),
                (self.num_threads, 1, 1),
                self.shared_bytes,
                stream.raw,
                &mut pointers[..num_args],
            )
        }
        .named("cuLaunchKernel")
    }
}

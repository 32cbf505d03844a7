//! Small transfers between host and device.

use std::{ffi::c_void, slice, time::Instant};

use cudarc::driver::result;
use plumbline_bundles::host::{CopyCost, CopyTimes, InputCopyCost};

use super::{
    super::{
        driver::{CudaResult, Named, Stream},
        operands::Gpu,
    },
    REPEATS, WARM_UP, repeat, stats,
};

/// Sizes of copies both ways.
const COPY_SIZES: [u64; 3] = [64, 4 << 10, 64 << 10];

/// Sizes of a step's inputs: token ids, positions, slots and block tables of one sequence up to many.
const INPUT_SIZES: [u64; 6] = [64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10];

/// The largest of either.
const MAX_BYTES: u64 = 64 << 10;

/// Page-locked memory of the host.
struct Pinned(*mut c_void);

impl Pinned {
    fn new(num_bytes: usize) -> CudaResult<Self> {
        // SAFETY: the memory is freed once, on drop.
        Ok(Self(unsafe { result::malloc_host(num_bytes, 0) }.named("cuMemHostAlloc")?))
    }

    /// # Safety
    /// The length is at most what was allocated, and no other slice of it is in use.
    #[expect(clippy::mut_from_ref, reason = "the memory is reached through a raw pointer; callers see to it")]
    unsafe fn bytes(&self, len: usize) -> &mut [u8] {
        // SAFETY: as this function's own.
        unsafe { slice::from_raw_parts_mut(self.0.cast(), len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, and no copy is in flight.
        let _ = unsafe { result::free_host(self.0) };
    }
}

/// Copies both ways until done, and copies of a step's inputs with the call apart.
pub fn copies(gpu: &mut Gpu) -> CudaResult<(Vec<CopyCost>, Vec<InputCopyCost>)> {
    let device = gpu.pool.scratch(MAX_BYTES)?;
    let pinned = Pinned::new(MAX_BYTES as usize)?;
    // SAFETY: the allocation has that many bytes, and this is the only slice of it.
    let pinned = unsafe { pinned.bytes(MAX_BYTES as usize) };
    pinned.fill(1);
    let pageable = vec![1u8; MAX_BYTES as usize];
    let stream = &gpu.stream;
    let both_ways = COPY_SIZES
        .into_iter()
        .map(|num_bytes| both_ways(stream, device, &mut pinned[..num_bytes as usize]))
        .collect::<CudaResult<_>>()?;
    let inputs = INPUT_SIZES
        .into_iter()
        .map(|num_bytes| {
            Ok(InputCopyCost {
                num_bytes,
                pinned: to_device(stream, device, &pinned[..num_bytes as usize])?,
                pageable: to_device(stream, device, &pageable[..num_bytes as usize])?,
            })
        })
        .collect::<CudaResult<_>>()?;
    Ok((both_ways, inputs))
}

/// Copies there and back, each until done.
fn both_ways(stream: &Stream, device: u64, bytes: &mut [u8]) -> CudaResult<CopyCost> {
    let to_device_ns = repeat(
        REPEATS,
        || Ok(()),
        || {
            // SAFETY: both sides hold the bytes, and the stream is waited for.
            unsafe { result::memcpy_htod_async(device, bytes, stream.raw()) }.named("cuMemcpyHtoDAsync")?;
            stream.synchronize()
        },
    )?;
    let to_host_ns = repeat(
        REPEATS,
        || Ok(()),
        || {
            // SAFETY: as above.
            unsafe { result::memcpy_dtoh_async(bytes, device, stream.raw()) }.named("cuMemcpyDtoHAsync")?;
            stream.synchronize()
        },
    )?;
    Ok(CopyCost { num_bytes: bytes.len() as u64, to_device_ns, to_host_ns })
}

/// Copies to the device, the call and the whole timed apart.
fn to_device(stream: &Stream, device: u64, bytes: &[u8]) -> CudaResult<CopyTimes> {
    let (mut calls, mut wholes) = (Vec::with_capacity(REPEATS), Vec::with_capacity(REPEATS));
    for i in 0..REPEATS + WARM_UP {
        let began = Instant::now();
        // SAFETY: both sides hold the bytes, and the stream is waited for.
        unsafe { result::memcpy_htod_async(device, bytes, stream.raw()) }.named("cuMemcpyHtoDAsync")?;
        let call = began.elapsed();
        stream.synchronize()?;
        let whole = began.elapsed();
        if i >= WARM_UP {
            calls.push(call.as_nanos() as f64);
            wholes.push(whole.as_nanos() as f64);
        }
    }
    Ok(CopyTimes { call_ns: stats(&calls)?, done_ns: stats(&wholes)? })
}

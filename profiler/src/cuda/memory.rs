//! One large allocation, out of which each point carves its operands.
//!
//! Filling gigabytes anew for every point would take longer than measuring it, so the part that
//! launches only read is filled with random numbers once.

use std::{ops::Range, sync::Arc};

use cudarc::driver::CudaContext;

use super::{
    driver::{CudaError, CudaResult, DeviceMemory, Stream},
    gemm::WORKSPACE_BYTES,
};

/// Most that the pool takes.
const MAX_POOL_BYTES: u64 = 40 << 30;
/// Share of the free memory that the pool takes at most.
const MAX_SHARE_OF_FREE: f64 = 0.75;
const UPLOAD_BYTES: u64 = 64 << 20;
const COUNTER_BYTES: u64 = 4 << 20;
const ALIGNMENT: u64 = 256;
/// Memory is mapped in pages of 2 MiB: buffers in different ones lie in different places of the chip's memory.
pub const PLACE_BYTES: u64 = 2 << 20;

/// A part of the pool that fills from its start.
struct Region {
    what: &'static str,
    range: Range<u64>,
    next: u64,
}

impl Region {
    fn new(what: &'static str, start: u64, num_bytes: u64) -> Self {
        Self { what, range: start..start + num_bytes, next: start }
    }

    /// Goes on at the next page, if there is one.
    fn next_place(&mut self) {
        self.next = self.next.next_multiple_of(PLACE_BYTES).min(self.range.end);
    }

    fn take(&mut self, num_bytes: u64) -> CudaResult<u64> {
        let available = self.range.end - self.next;
        let needed = num_bytes.next_multiple_of(ALIGNMENT);
        if needed > available {
            return Err(CudaError::OutOfMemory { what: self.what, needed, available });
        }
        let address = self.next;
        self.next += needed;
        Ok(address)
    }
}

/// The device's memory as the operators use it.
pub struct Pool {
    memory: DeviceMemory,
    inputs: Region,
    scratch: Region,
    uploads: Region,
    counters: Region,
    workspace: u64,
}

impl Pool {
    /// Takes memory; the inputs must then be filled.
    pub fn new(context: &Arc<CudaContext>, free_bytes: u64) -> CudaResult<Self> {
        let budget = ((free_bytes as f64 * MAX_SHARE_OF_FREE) as u64).min(MAX_POOL_BYTES);
        let fixed = UPLOAD_BYTES + COUNTER_BYTES + WORKSPACE_BYTES;
        let total = budget / ALIGNMENT * ALIGNMENT;
        if total < 2 * fixed {
            return Err(CudaError::OutOfMemory { what: "operands", needed: 2 * fixed, available: total });
        }
        let memory = DeviceMemory::new(context, total)?;
        let scratch_bytes = ((total - fixed) / 3).min(8 << 30) / ALIGNMENT * ALIGNMENT;
        let workspace = memory.address();
        let uploads = Region::new("tables", workspace + WORKSPACE_BYTES, UPLOAD_BYTES);
        let counters = Region::new("counters", uploads.range.end, COUNTER_BYTES);
        let scratch = Region::new("outputs", counters.range.end, scratch_bytes);
        let inputs = Region::new("inputs", scratch.range.end, total - fixed - scratch_bytes);
        Ok(Self { memory, inputs, scratch, uploads, counters, workspace })
    }

    /// Gives everything back, for the next point.
    pub fn reset(&mut self) {
        for region in [&mut self.inputs, &mut self.scratch, &mut self.uploads, &mut self.counters] {
            region.next = region.range.start;
        }
    }

    /// Lets the buffers taken next lie in other pages than those taken before.
    pub fn next_place(&mut self) {
        self.inputs.next_place();
        self.scratch.next_place();
    }

    /// Memory holding random numbers in [-1, 1); only to be read.
    pub fn input(&mut self, num_bytes: u64) -> CudaResult<u64> {
        self.inputs.take(num_bytes)
    }

    /// Memory holding anything, to be written.
    pub fn scratch(&mut self, num_bytes: u64) -> CudaResult<u64> {
        self.scratch.take(num_bytes)
    }

    /// Memory holding the values.
    pub fn table<T: Copy>(&mut self, values: &[T], stream: &Stream) -> CudaResult<u64> {
        let address = self.uploads.take(size_of_val(values) as u64)?;
        stream.upload(address, values)?;
        Ok(address)
    }

    /// Memory holding zeros, which a launch leaves zero.
    pub fn counters(&mut self, num_counters: u64, stream: &Stream) -> CudaResult<u64> {
        let address = self.counters.take(4 * num_counters)?;
        if num_counters > 0 {
            stream.fill_bytes(address, 0, 4 * num_counters as usize)?;
        }
        Ok(address)
    }

    /// cuBLASLt's workspace, of [`WORKSPACE_BYTES`].
    pub fn workspace(&self) -> u64 {
        self.workspace
    }

    /// Bytes of inputs that can still be taken.
    pub fn inputs_left(&self) -> u64 {
        self.inputs.range.end - self.inputs.next
    }

    /// Bytes of outputs that can still be taken.
    pub fn scratch_left(&self) -> u64 {
        self.scratch.range.end - self.scratch.next
    }

    /// Where the inputs and outputs lie, to be filled once.
    pub fn filled_range(&self) -> Range<u64> {
        self.scratch.range.start..self.inputs.range.end
    }

    /// Bytes taken from the device.
    pub fn num_bytes(&self) -> u64 {
        self.memory.num_bytes()
    }
}

//! CUPTI's activity records: when each kernel began and ended by the GPU's own clock.
//!
//! The library is looked for when it is first asked for, and every failure is a value: a machine without it, or one
//! where another tool records already, is profiled all the same. Records come in buffers that the library fills and
//! hands back, on a thread of its own, to functions that it is told once.

use std::{
    alloc::{Layout, alloc, dealloc},
    collections::BTreeSet,
    ffi::{CStr, c_char, c_void},
    mem::offset_of,
    path::{Path, PathBuf},
    ptr::{null, null_mut},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use cudarc::cupti::sys;
use libloading::Library;

use super::driver::{CudaError, CudaResult};

/// A result code as a number: a newer library may return one that the bindings' enum lacks.
type Code = u32;
type Subscriber = *mut c_void;
type Context = *mut c_void;

const SUCCESS: Code = sys::CUptiResult::CUPTI_SUCCESS as Code;
const MAX_LIMIT_REACHED: Code = sys::CUptiResult::CUPTI_ERROR_MAX_LIMIT_REACHED as Code;
const INSUFFICIENT_PRIVILEGES: Code = sys::CUptiResult::CUPTI_ERROR_INSUFFICIENT_PRIVILEGES as Code;
const VIRTUAL_PRIVILEGES: Code =
    sys::CUptiResult::CUPTI_ERROR_VIRTUALIZED_DEVICE_INSUFFICIENT_PRIVILEGES as Code;
const MULTIPLE_SUBSCRIBERS: Code = sys::CUptiResult::CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED as Code;

/// Both kinds hold kernels; the second is asked for, as the first makes kernels wait for one another.
const KERNEL: u32 = sys::CUpti_ActivityKind::CUPTI_ACTIVITY_KIND_KERNEL as u32;
const CONCURRENT_KERNEL: u32 = sys::CUpti_ActivityKind::CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL as u32;

/// Hands back the buffers whose records are complete.
const FLUSH_COMPLETE: u32 = 0;
/// Hands back all buffers.
const FLUSH_FORCED: u32 = 1;
/// Longest wait for records of kernels that have ended.
const MAX_WAIT: Duration = Duration::from_millis(200);
const BUFFER_BYTES: usize = 8 << 20;
/// Records are structures of 8-byte alignment.
const BUFFER_LAYOUT: Layout = match Layout::from_size_align(BUFFER_BYTES, 8) {
    Ok(layout) => layout,
    Err(_) => panic!("8 is a power of two"),
};

/// How a kernel's record begins, in CUDA 12 (`CUpti_ActivityKernel8`, `9`) and 13 (`10` to `13`) alike: what came
/// later was added behind.
#[repr(C)]
#[derive(Clone, Copy)]
struct KernelPrefix {
    kind: u32,
    cache_config: u8,
    shared_memory_config: u8,
    registers_per_thread: u16,
    partitioned_cache: [u32; 2],
    start_ns: u64,
    end_ns: u64,
    completed_ns: u64,
    device_id: u32,
    context_id: u32,
    stream_id: u32,
    grid: [i32; 3],
    block: [i32; 3],
    shared_memory: [i32; 2],
    local_memory: [u32; 2],
    correlation_id: u32,
    grid_id: i64,
    name: *const c_char,
}

macro_rules! assert_layout {
    ($($record:ident),*) => { $(
        assert!(offset_of!(sys::$record, kind) == offset_of!(KernelPrefix, kind));
        assert!(offset_of!(sys::$record, start) == offset_of!(KernelPrefix, start_ns));
        assert!(offset_of!(sys::$record, end) == offset_of!(KernelPrefix, end_ns));
        assert!(offset_of!(sys::$record, correlationId) == offset_of!(KernelPrefix, correlation_id));
        assert!(offset_of!(sys::$record, name) == offset_of!(KernelPrefix, name));
        assert!(size_of::<sys::$record>() >= size_of::<KernelPrefix>());
    )* };
}
const _: () = {
    assert_layout!(CUpti_ActivityKernel8, CUpti_ActivityKernel9, CUpti_ActivityKernel10);
};

/// Whether kernels' records begin as [`KernelPrefix`] does: the library counts 18 to 28 in CUDA 12, and from 13 on
/// its version is CUDA's.
fn check_version(version: u32) -> Result<(), String> {
    match version {
        18..100 | 130_000..140_000 => Ok(()),
        _ => Err(format!(
            "expected CUPTI of CUDA 12 or 13 (version 18 to 99 or 130000 to 139999), found version {version}"
        )),
    }
}

/// The library's functions that are used.
struct Functions {
    get_version: unsafe extern "C" fn(*mut u32) -> Code,
    get_result_string: unsafe extern "C" fn(Code, *mut *const c_char) -> Code,
    subscribe: unsafe extern "C" fn(*mut Subscriber, Callback, *mut c_void) -> Code,
    unsubscribe: unsafe extern "C" fn(Subscriber) -> Code,
    register_callbacks: unsafe extern "C" fn(BufferRequested, BufferCompleted) -> Code,
    enable: unsafe extern "C" fn(u32) -> Code,
    disable: unsafe extern "C" fn(u32) -> Code,
    flush_all: unsafe extern "C" fn(u32) -> Code,
    get_next_record: unsafe extern "C" fn(*mut u8, usize, *mut *mut u8) -> Code,
    get_num_dropped: unsafe extern "C" fn(Context, u32, *mut usize) -> Code,
}

type Callback = unsafe extern "C" fn(*mut c_void, u32, u32, *const c_void);
type BufferRequested = unsafe extern "C" fn(*mut *mut u8, *mut usize, *mut usize);
type BufferCompleted = unsafe extern "C" fn(Context, u32, *mut u8, usize, usize);

struct Cupti {
    functions: Functions,
    version: u32,
    /// Stays loaded: records may come at any time.
    _library: Library,
}

impl Cupti {
    /// The library, loaded on the first call.
    fn get() -> CudaResult<&'static Self> {
        static CUPTI: OnceLock<Result<Cupti, String>> = OnceLock::new();
        let loaded = CUPTI.get_or_init(Self::load).as_ref();
        loaded.map_err(|reason| CudaError::Unsupported(reason.clone()))
    }

    fn load() -> Result<Self, String> {
        let library = open_library()?;
        let functions = Functions {
            get_version: symbol(&library, "cuptiGetVersion")?,
            get_result_string: symbol(&library, "cuptiGetResultString")?,
            subscribe: symbol(&library, "cuptiSubscribe")?,
            unsubscribe: symbol(&library, "cuptiUnsubscribe")?,
            register_callbacks: symbol(&library, "cuptiActivityRegisterCallbacks")?,
            enable: symbol(&library, "cuptiActivityEnable")?,
            disable: symbol(&library, "cuptiActivityDisable")?,
            flush_all: symbol(&library, "cuptiActivityFlushAll")?,
            get_next_record: symbol(&library, "cuptiActivityGetNextRecord")?,
            get_num_dropped: symbol(&library, "cuptiActivityGetNumDroppedRecords")?,
        };
        let mut version = 0;
        // SAFETY: the version is written to a valid place.
        let code = unsafe { (functions.get_version)(&raw mut version) };
        if code != SUCCESS {
            return Err(format!("cuptiGetVersion: code {code}"));
        }
        check_version(version)?;
        tracing::debug!(version, "CUPTI loaded");
        Ok(Self { functions, version, _library: library })
    }

    fn check(&self, call: &'static str, code: Code) -> CudaResult<()> {
        let hint = match code {
            SUCCESS => return Ok(()),
            INSUFFICIENT_PRIVILEGES | VIRTUAL_PRIVILEGES => {
                "; the driver lets only administrators record (NVreg_RestrictProfilingToAdminUsers)"
            }
            MAX_LIMIT_REACHED | MULTIPLE_SUBSCRIBERS => "; another profiler is attached to this process",
            _ => "",
        };
        let mut text = null();
        // SAFETY: a pointer to a text of the library's own is written to a valid place.
        let found = unsafe { (self.functions.get_result_string)(code, &raw mut text) };
        let name = if found == SUCCESS && !text.is_null() {
            // SAFETY: the library's texts end with a zero and are never freed.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        } else {
            "a code without a name".to_owned()
        };
        Err(CudaError::Call {
            call,
            reason: format!("{name} ({code}){hint}, CUPTI version {}", self.version),
        })
    }
}

fn symbol<F: Copy>(library: &Library, name: &str) -> Result<F, String> {
    // SAFETY: the types in `Functions` are those of the functions in every version of the library.
    let found = unsafe { library.get::<F>(name.as_bytes()) };
    found.map(|function| *function).map_err(|error| format!("the CUPTI library has no {name}: {error}"))
}

/// Opens the library by name, or beside the CUDA libraries that are loaded already.
fn open_library() -> Result<Library, String> {
    // SAFETY: loading the driver runs its initialisers only, which have no preconditions.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err("the NVIDIA driver's libcuda.so.1 cannot be loaded".to_owned());
    }
    let mut driver_version = 0;
    // SAFETY: the version is written to a valid place.
    let code = unsafe { cudarc::driver::sys::cuDriverGetVersion(&raw mut driver_version) };
    // The library of CUDA 13 does not work on a driver of 12; one of 12 works on later drivers.
    let is_old = code != cudarc::driver::sys::CUresult::CUDA_SUCCESS || driver_version < 13_000;
    let names: &[&str] = if is_old { &["libcupti.so.12"] } else { &["libcupti.so.13", "libcupti.so.12"] };
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let folders = folders_near(&maps);
    for name in names {
        let beside = folders.iter().map(|folder| folder.join(name));
        for path in std::iter::once(PathBuf::from(name)).chain(beside) {
            // SAFETY: NVIDIA's library by name; its initialisers have no preconditions.
            if let Ok(library) = unsafe { Library::new(&path) } {
                tracing::debug!(path = %path.display(), "CUPTI found");
                return Ok(library);
            }
        }
    }
    Err(format!(
        "{} cannot be loaded; add the folder that holds it (in a CUDA toolkit extras/CUPTI/lib64) to \
         LD_LIBRARY_PATH",
        names.join(" or ")
    ))
}

/// Folders where CUPTI lies beside the CUDA libraries in a process's memory map: the same one, a toolkit's extras,
/// and its package's folder among those of Python.
fn folders_near(maps: &str) -> BTreeSet<PathBuf> {
    let is_cuda = |path: &&Path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("libnvrtc.so") || name.starts_with("libcublasLt.so")
    };
    let paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    paths
        .filter(is_cuda)
        .filter_map(Path::parent)
        .flat_map(|folder| {
            let near = ["", "../extras/CUPTI/lib64", "../../../extras/CUPTI/lib64", "../../cuda_cupti/lib"];
            near.map(|near| folder.join(near))
        })
        .collect()
}

/// One kernel's run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelRecord {
    /// When it began, ns of the GPU's clock as the library relates it to the host's; 0 when not known.
    pub start_ns: u64,
    /// When it ended.
    pub end_ns: u64,
    pub name: Arc<str>,
}

/// What the library has handed back.
struct Collector {
    is_collecting: bool,
    records: Vec<KernelRecord>,
    names: Vec<Arc<str>>,
    /// What went wrong in a call from the library, which cannot be told.
    failure: Option<String>,
}

static COLLECTOR: Mutex<Collector> =
    Mutex::new(Collector { is_collecting: false, records: Vec::new(), names: Vec::new(), failure: None });

fn collector() -> MutexGuard<'static, Collector> {
    // What a panicking thread left behind is whole: every step on it is a single push or assignment.
    COLLECTOR.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Collector {
    /// What has come since the last call.
    fn take(&mut self) -> CudaResult<Vec<KernelRecord>> {
        let records = std::mem::take(&mut self.records);
        match self.failure.take() {
            None => Ok(records),
            Some(failure) => Err(CudaError::Unsupported(failure)),
        }
    }

    /// Reads the records of a buffer.
    ///
    /// # Safety
    /// The library has filled `num_bytes` bytes of the buffer.
    unsafe fn read(&mut self, cupti: &Cupti, buffer: *mut u8, num_bytes: usize) {
        let mut record = null_mut();
        loop {
            // SAFETY: the buffer is as the library filled it; `record` is null or what the call before gave.
            let code = unsafe { (cupti.functions.get_next_record)(buffer, num_bytes, &raw mut record) };
            if code == MAX_LIMIT_REACHED || record.is_null() {
                return;
            }
            if let Err(error) = cupti.check("cuptiActivityGetNextRecord", code) {
                self.failure = Some(error.to_string());
                return;
            }
            // SAFETY: every record begins with its kind.
            if matches!(unsafe { record.cast::<u32>().read_unaligned() }, KERNEL | CONCURRENT_KERNEL) {
                // SAFETY: a kernel's record begins so in the versions that `check_version` lets pass.
                let kernel = unsafe { record.cast::<KernelPrefix>().read_unaligned() };
                // SAFETY: the library's name is null or ends with a zero, and lives as long as the kernel's module.
                let name = unsafe { self.name(kernel.name) };
                self.records.push(KernelRecord { start_ns: kernel.start_ns, end_ns: kernel.end_ns, name });
            }
        }
    }

    /// A name's one copy.
    ///
    /// # Safety
    /// The text is null or ends with a zero.
    unsafe fn name(&mut self, text: *const c_char) -> Arc<str> {
        let text = if text.is_null() {
            "?".into()
        } else {
            // SAFETY: as this function's own.
            unsafe { CStr::from_ptr(text) }.to_string_lossy()
        };
        if let Some(known) = self.names.iter().find(|known| ***known == *text) {
            return known.clone();
        }
        let name: Arc<str> = text.into();
        self.names.push(name.clone());
        name
    }
}

/// The library asks for a subscriber's function; as no call is subscribed to, this one is never called.
unsafe extern "C" fn no_callback(_: *mut c_void, _: u32, _: u32, _: *const c_void) {}

unsafe extern "C" fn buffer_requested(
    buffer: *mut *mut u8,
    num_bytes: *mut usize,
    max_num_records: *mut usize,
) {
    // SAFETY: the library passes valid places; the layout is not of size 0. A null pointer tells it that there is no
    // memory, and 0 records that there is no limit on them.
    unsafe {
        *buffer = alloc(BUFFER_LAYOUT);
        *num_bytes = if (*buffer).is_null() { 0 } else { BUFFER_BYTES };
        *max_num_records = 0;
    }
}

unsafe extern "C" fn buffer_completed(_: Context, _: u32, buffer: *mut u8, _: usize, num_bytes: usize) {
    if buffer.is_null() {
        return;
    }
    let mut collector = collector();
    if let (true, Ok(cupti)) = (collector.is_collecting && num_bytes > 0, Cupti::get()) {
        // SAFETY: the library hands back what it filled.
        unsafe { collector.read(cupti, buffer, num_bytes) };
    }
    // SAFETY: every buffer comes from `buffer_requested`, once.
    unsafe { dealloc(buffer, BUFFER_LAYOUT) };
}

/// Recording of kernels, on from [`Recording::start`] until it is dropped. One at a time.
pub struct Recording {
    cupti: &'static Cupti,
    subscriber: Subscriber,
    is_enabled: bool,
}

impl Recording {
    /// Turns recording on in this process.
    ///
    /// # Errors
    /// When the library is missing or of an unknown version, the driver refuses, or another tool records already.
    pub fn start() -> CudaResult<Self> {
        let cupti = Cupti::get()?;
        let mut subscriber = null_mut();
        // Two tools cannot record at a time; who does not subscribe first would find out from broken records.
        // SAFETY: the subscriber is written to a valid place; the function has the signature that is asked for.
        let code = unsafe { (cupti.functions.subscribe)(&raw mut subscriber, no_callback, null_mut()) };
        cupti.check("cuptiSubscribe", code)?;
        let mut recording = Self { cupti, subscriber, is_enabled: false };
        // SAFETY: the functions have the signatures that are asked for and live as long as the process.
        let code = unsafe { (cupti.functions.register_callbacks)(buffer_requested, buffer_completed) };
        cupti.check("cuptiActivityRegisterCallbacks", code)?;
        // SAFETY: any number may be asked for; the library refuses one that it does not know.
        let code = unsafe { (cupti.functions.enable)(CONCURRENT_KERNEL) };
        cupti.check("cuptiActivityEnable", code)?;
        recording.is_enabled = true;
        Ok(recording)
    }

    /// Forgets what was recorded until now; what was launched must have ended.
    pub fn discard(&self) -> CudaResult<()> {
        collector().is_collecting = false;
        self.flush(FLUSH_FORCED)?;
        let mut collector = collector();
        collector.records.clear();
        collector.failure = None;
        // Buffers handed back from now on hold what is launched from now on.
        collector.is_collecting = true;
        drop(collector);
        self.num_dropped().map(|_| ())
    }

    /// What was recorded since the last call or [`Recording::discard`], in the order in which kernels began; what was
    /// launched must have ended. Waits a little when fewer kernels than launches are there.
    pub fn take(&self, num_launches: usize) -> CudaResult<Vec<KernelRecord>> {
        let began = Instant::now();
        let mut records = Vec::new();
        loop {
            // A buffer is held back until all of its records are complete, so the last may come later than the others.
            self.flush(FLUSH_COMPLETE)?;
            let mut new = collector().take()?;
            let is_quiet = new.is_empty();
            records.append(&mut new);
            if is_quiet && records.len() >= num_launches {
                break;
            }
            if began.elapsed() > MAX_WAIT {
                self.flush(FLUSH_FORCED)?;
                records.append(&mut collector().take()?);
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let num_dropped = self.num_dropped()?;
        if num_dropped > 0 {
            return Err(CudaError::Unsupported(format!("CUPTI dropped {num_dropped} records")));
        }
        // The end decides between kernels that begin together.
        records.sort_by_key(|record| (record.start_ns, record.end_ns));
        Ok(records)
    }

    /// Makes the library hand back its buffers.
    fn flush(&self, flag: u32) -> CudaResult<()> {
        // SAFETY: the collector is not locked here, as the call ends in `buffer_completed`.
        let code = unsafe { (self.cupti.functions.flush_all)(flag) };
        self.cupti.check("cuptiActivityFlushAll", code)
    }

    /// Records that found no room since the last call.
    fn num_dropped(&self) -> CudaResult<usize> {
        let mut dropped = 0;
        // SAFETY: no context and stream 0 stand for all; the number is written to a valid place.
        let code = unsafe { (self.cupti.functions.get_num_dropped)(null_mut(), 0, &raw mut dropped) };
        self.cupti.check("cuptiActivityGetNumDroppedRecords", code)?;
        Ok(dropped)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        collector().is_collecting = false;
        // SAFETY: what was turned on by `start` is turned off; an error on the way out has no one to go to. The library
        // stays initialised: taking it down by cuptiFinalize crashes versions of it once graphs have run.
        unsafe {
            if self.is_enabled {
                let _ = (self.cupti.functions.disable)(CONCURRENT_KERNEL);
                let _ = (self.cupti.functions.flush_all)(FLUSH_FORCED);
            }
            let _ = (self.cupti.functions.unsubscribe)(self.subscriber);
        }
        let mut collector = collector();
        collector.records = Vec::new();
        collector.failure = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_cuda_12_and_13_are_read_and_others_refused() {
        for version in [18, 24, 28, 130_001, 130_101, 130_401] {
            assert!(check_version(version).is_ok(), "{version}");
        }
        for version in [0, 17, 100, 129_999, 140_000] {
            let reason = check_version(version).unwrap_err();
            assert!(reason.contains(&format!("found version {version}")), "{reason}");
        }
    }

    #[test]
    fn cupti_is_looked_for_beside_libraries_that_are_loaded() {
        let maps = "7f00-7f01 r--p 00000000 08:01 12  /usr/lib/libc.so.6\n\
                    7f02-7f03 r-xp 00000000 08:01 13  /opt/cuda 13/lib64/libnvrtc.so.13.0.88\n\
                    7f04-7f05 rw-p 00000000 00:00 0\n\
                    7f06-7f07 r-xp 00000000 08:01 14  /py/nvidia/cublas/lib/libcublasLt.so.12\n";
        let folders = folders_near(maps);
        assert_eq!(folders.len(), 8, "{folders:?}");
        for expected in ["/opt/cuda 13/lib64/", "/opt/cuda 13/lib64/../extras/CUPTI/lib64"] {
            assert!(folders.contains(Path::new(expected)), "{folders:?}");
        }
        assert!(folders.contains(Path::new("/py/nvidia/cublas/lib/../../cuda_cupti/lib")));
    }

    #[test]
    fn names_are_kept_once() {
        let mut collector =
            Collector { is_collecting: true, records: Vec::new(), names: Vec::new(), failure: None };
        // SAFETY: the texts end with a zero, or are null.
        let names = unsafe { [c"rope", c"gemm", c"rope"].map(|text| collector.name(text.as_ptr())).to_vec() };
        assert!(Arc::ptr_eq(&names[0], &names[2]) && !Arc::ptr_eq(&names[0], &names[1]));
        // SAFETY: as above.
        assert_eq!(&*unsafe { collector.name(null()) }, "?");
        assert_eq!(collector.names.len(), 3);
    }
}

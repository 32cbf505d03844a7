//! The kernels' sources and their run-time compilation.

use std::{
    ffi::{CStr, CString},
    fmt::Write,
};

use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};

use crate::error::ProfileError;

/// A kernel's source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelSource {
    /// Entry point, and the file's name without `.cu`.
    pub name: &'static str,
    /// Text of `kernels/<name>.cu`.
    pub text: &'static str,
    /// The sets of macro definitions it is compiled with.
    pub variants: &'static [&'static [&'static str]],
    /// The one compute capability, times ten, whose own instructions it uses; `None` when it runs from 8.0 on.
    pub only_for: Option<u32>,
}

const COMMON: &str = include_str!("../../kernels/common.cuh");
const OPTIONS: [&str; 1] = ["--std=c++17"];
const PLAIN: &[&[&str]] = &[&[]];
const BY_HEAD_DIM: &[&[&str]] = &[&["HEAD_DIM=64"], &["HEAD_DIM=128"]];

macro_rules! source {
    ($name:literal, $variants:expr) => {
        source!($name, $variants, None)
    };
    ($name:literal, $variants:expr, $only_for:expr) => {
        KernelSource {
            name: $name,
            text: include_str!(concat!("../../kernels/", $name, ".cu")),
            variants: $variants,
            only_for: $only_for,
        }
    };
}

impl KernelSource {
    /// Every kernel.
    pub const ALL: [Self; 13] = [
        source!("fill", PLAIN),
        source!("arguments", &[&["NUM_ARGS=1"], &["NUM_ARGS=4"], &["NUM_ARGS=8"], &["NUM_ARGS=16"]]),
        source!("embedding", PLAIN),
        source!("rms_norm", &[&["VECTORS=1"], &["VECTORS=2"], &["VECTORS=4"]]),
        source!("qk_norm", BY_HEAD_DIM),
        source!("rope", BY_HEAD_DIM),
        source!("kv_cache_write", PLAIN),
        source!(
            "attention_prefill",
            &[
                &["HEAD_DIM=64", "WARP_TILES=1"],
                &["HEAD_DIM=64", "WARP_TILES=2"],
                &["HEAD_DIM=128", "WARP_TILES=1"],
                &["HEAD_DIM=128", "WARP_TILES=2"],
            ]
        ),
        source!("attention_prefill_sm90", BY_HEAD_DIM, Some(90)),
        source!("attention_decode", BY_HEAD_DIM),
        source!("silu_mul", PLAIN),
        source!("sample", PLAIN),
        source!("sample_random", PLAIN),
    ];

    /// A kernel by name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<&'static Self> {
        Self::ALL.iter().find(|source| source.name == name)
    }
}

/// SHA-256 over every source, its variants and the options, hex.
#[must_use]
pub fn kernel_hash() -> String {
    let mut parts = vec![COMMON.to_owned()];
    parts.extend(OPTIONS.map(str::to_owned));
    for source in &KernelSource::ALL {
        parts.extend([source.name.to_owned(), source.text.to_owned()]);
        parts.extend(source.variants.iter().map(|definitions| definitions.join(" ")));
    }
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// Compute capabilities, times ten, that NVRTC compiles for.
///
/// # Errors
/// When NVRTC does not say.
pub fn supported_architectures() -> Result<Vec<u32>, ProfileError> {
    let failed = |error: result::NvrtcError| ProfileError::Device {
        call: "nvrtcGetSupportedArchs".to_owned(),
        reason: format!("{error:?}"),
    };
    let mut count = 0;
    // SAFETY: the count is written to a valid place, and the list has that many.
    unsafe {
        sys::nvrtcGetNumSupportedArchs(&raw mut count).result().map_err(failed)?;
        let mut list = vec![0i32; count.max(0) as usize];
        sys::nvrtcGetSupportedArchs(list.as_mut_ptr()).result().map_err(failed)?;
        Ok(list.into_iter().map(|arch| arch as u32).collect())
    }
}

/// NVRTC's version, as `13.0`.
pub(super) fn nvrtc_version() -> Result<String, ProfileError> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both numbers are written to valid places.
    unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }
        .result()
        .map_err(|e| ProfileError::Device { call: "nvrtcVersion".to_owned(), reason: format!("{e:?}") })?;
    Ok(format!("{major}.{minor}"))
}

/// A compiled kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// What the driver loads: machine code, or PTX.
    pub image: Vec<u8>,
    /// What the compiler had to say, empty when nothing.
    pub log: String,
}

/// Compiles a kernel for a compute capability (times ten), into an image that the driver loads.
///
/// A GPU that NVRTC does not know yet gets PTX of the newest architecture it knows below it.
///
/// # Errors
/// The compiler's log.
pub fn compile(
    source: &KernelSource,
    definitions: &[&str],
    architecture: u32,
) -> Result<Compiled, ProfileError> {
    compile_to_run_on(source, definitions, architecture, architecture)
}

/// As [`compile`], to run on a GPU whose compute capability may be another: that gets PTX, which its driver compiles.
///
/// # Errors
/// The compiler's log.
pub fn compile_to_run_on(
    source: &KernelSource,
    definitions: &[&str],
    architecture: u32,
    gpu: u32,
) -> Result<Compiled, ProfileError> {
    let known = supported_architectures()?;
    let (is_known, target) = match known.iter().filter(|&&arch| arch <= architecture).max() {
        Some(&best) => (best == architecture, best),
        None => (true, architecture),
    };
    let is_native = is_known && architecture == gpu;
    let kind = if is_native { "sm" } else { "compute" };
    // Instructions of one architecture alone have a target of their own.
    let suffix = if source.only_for.is_some() { "a" } else { "" };
    let mut options = vec![format!("--gpu-architecture={kind}_{target}{suffix}")];
    options.extend(OPTIONS.iter().map(|&option| option.to_owned()));
    options.extend(definitions.iter().map(|definition| format!("--define-macro={definition}")));
    let file = format!("{}.cu", source.name);
    let text = format!("{COMMON}\n#line 1 \"{file}\"\n{}", source.text);
    run_compiler(&text, &file, &options, is_native).map_err(|log| ProfileError::Compile {
        kernel: file,
        options: options.join(" "),
        log,
    })
}

fn run_compiler(text: &str, file: &str, options: &[String], is_native: bool) -> Result<Compiled, String> {
    let say = |call: &'static str| move |error: result::NvrtcError| format!("{call}: {error:?}");
    let text = CString::new(text).map_err(|error| error.to_string())?;
    let file = CString::new(file).map_err(|error| error.to_string())?;
    let program = result::create_program(&text, Some(&file)).map_err(say("nvrtcCreateProgram"))?;
    // SAFETY: the program was just created and is destroyed once, below.
    let image = unsafe {
        match result::compile_program(program, options) {
            Err(error) => Err(compiler_log(program).unwrap_or_else(|| format!("{error:?}"))),
            Ok(()) if is_native => cubin(program).map_err(say("nvrtcGetCUBIN")),
            Ok(()) => result::get_ptx(program)
                .map(|ptx| ptx.into_iter().map(|c| c as u8).collect())
                .map_err(say("nvrtcGetPTX")),
        }
    };
    // SAFETY: as above.
    let log = unsafe { compiler_log(program) }.unwrap_or_default();
    // SAFETY: as above.
    let _ = unsafe { result::destroy_program(program) };
    Ok(Compiled { image: image?, log })
}

/// # Safety
/// The program has been compiled and not been destroyed.
unsafe fn cubin(program: sys::nvrtcProgram) -> Result<Vec<u8>, result::NvrtcError> {
    let mut size = 0;
    // SAFETY: the image is as large as NVRTC says.
    unsafe {
        sys::nvrtcGetCUBINSize(program, &raw mut size).result()?;
        let mut image = vec![0u8; size];
        sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result()?;
        Ok(image)
    }
}

/// # Safety
/// The program has not been destroyed.
unsafe fn compiler_log(program: sys::nvrtcProgram) -> Option<String> {
    // SAFETY: as this function's own.
    let log = unsafe { result::get_program_log(program) }.ok()?;
    let bytes: Vec<u8> = log.into_iter().map(|c| c as u8).collect();
    Some(CStr::from_bytes_until_nul(&bytes).ok()?.to_string_lossy().into_owned())
}

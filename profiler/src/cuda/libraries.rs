//! Which CUDA libraries can be loaded, asked before cudarc needs them: it panics on a missing one.

use std::path::{Path, PathBuf};

use crate::error::ProfileError;

/// Whether NVRTC can be loaded.
#[must_use]
pub fn nvrtc_is_present() -> bool {
    // SAFETY: loading NVIDIA's library runs its initialisers only, which have no preconditions.
    unsafe { cudarc::nvrtc::sys::is_culib_present() }
}

/// Checks that the driver, NVRTC and cuBLASLt can be loaded.
///
/// # Errors
/// [`ProfileError::NoDevice`] names the first that cannot, and what to do.
pub fn require_all() -> Result<(), ProfileError> {
    // SAFETY: as above; the libraries are closed again, so that nothing stays loaded on failure.
    let (driver, cublaslt) =
        unsafe { (cudarc::driver::sys::is_culib_present(), cudarc::cublaslt::sys::is_culib_present()) };
    let no_device = |reason: &str| Err(ProfileError::NoDevice { reason: reason.to_owned() });
    if !driver {
        return no_device("the NVIDIA driver's libcuda.so.1 cannot be loaded");
    }
    let hint = "add the folder of CUDA 12 or 13's libraries to LD_LIBRARY_PATH";
    if !nvrtc_is_present() {
        return no_device(&format!("libnvrtc.so.13 or .12 cannot be loaded; {hint}"));
    }
    if !cublaslt {
        return no_device(&format!("libcublasLt.so.13 or .12 cannot be loaded; {hint}"));
    }
    Ok(())
}

/// Loads NVRTC from `dir` or below it, so that later uses find it without a loader path.
///
/// Returns the library's path, or `None` when there is none that loads.
#[must_use]
pub fn load_nvrtc_from(dir: &Path) -> Option<PathBuf> {
    let mut files = Vec::new();
    collect_shared_objects(dir, 6, &mut files);
    files.sort();
    let load = |path: &PathBuf| {
        // SAFETY: the files are NVIDIA's libraries by name; their initialisers have no preconditions.
        let library = unsafe { libloading::Library::new(path) };
        // A library that is loaded already answers when its name is asked for again.
        library.map(std::mem::forget).is_ok()
    };
    let named = |prefix: &'static str| {
        files.iter().filter(move |path| {
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix))
        })
    };
    named("libnvrtc-builtins.so").for_each(|path| {
        load(path);
    });
    named("libnvrtc.so").find(|path| load(path)).cloned()
}

fn collect_shared_objects(dir: &Path, depth: u32, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            if depth > 0 {
                collect_shared_objects(&path, depth - 1, files);
            }
        } else if path.to_string_lossy().contains(".so") {
            files.push(path);
        }
    }
}

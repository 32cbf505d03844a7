//! Where the shipped data lies: bundles, engine profiles, real runs and the default suite.

use std::path::{Path, PathBuf};

use crate::{exit::Exit, failure::Failure};

/// Environment variable that names the data folder.
pub const VARIABLE: &str = "PLUMB_DATA";

/// Where the data lies in a checkout.
const IN_CHECKOUT: &str = "bundles/data";

/// Finds the shipped data: `$PLUMB_DATA`, else the first `bundles/data` above the executable, else above the
/// current folder.
///
/// # Errors
/// When the variable names no folder, or nothing is found.
pub fn folder() -> Result<PathBuf, Failure> {
    if let Some(named) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
        let named = PathBuf::from(named);
        if named.is_dir() {
            return Ok(named);
        }
        let text = format!("{VARIABLE}: expected a folder with the shipped data, found {}", named.display());
        return Err(Failure::message(Exit::BadInput, text));
    }
    let executable = std::env::current_exe().ok().and_then(|path| path.canonicalize().ok());
    let current = std::env::current_dir().ok();
    [executable, current].into_iter().flatten().find_map(|start| above(&start)).ok_or_else(|| {
        Failure::message(
            Exit::BadInput,
            format!("no folder {IN_CHECKOUT} above the executable or the current folder"),
        )
        .with_hint(format!("run plumb inside its checkout, or set {VARIABLE} to its {IN_CHECKOUT}"))
    })
}

/// The first `bundles/data` in `start` or a folder above it.
fn above(start: &Path) -> Option<PathBuf> {
    start.ancestors().map(|folder| folder.join(IN_CHECKOUT)).find(|folder| folder.is_dir())
}

/// Whether an engine profile is asked for by its JSON file and not by its name in a bundle.
#[must_use]
pub fn is_file(name_or_path: &str) -> bool {
    let is_json = Path::new(name_or_path).extension().is_some_and(|extension| extension == "json");
    is_json || name_or_path.contains(['/', '\\'])
}

/// A bundle by path, or by the name of a shipped one.
///
/// # Errors
/// When it is neither.
pub fn bundle(name_or_path: &str) -> Result<PathBuf, Failure> {
    let path = PathBuf::from(name_or_path);
    if path.exists() || name_or_path.contains(['/', '\\']) {
        return Ok(path);
    }
    match folder().map(|data| data.join(name_or_path)) {
        Ok(shipped) if shipped.is_dir() => Ok(shipped),
        _ => Err(Failure::message(
            Exit::BadInput,
            format!(
                "{name_or_path}: expected a bundle folder or the name of a shipped bundle, found neither"
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_data_folder_above_wins() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("a/b/c");
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::create_dir_all(root.path().join("bundles/data")).unwrap();
        std::fs::create_dir_all(root.path().join("a/b/bundles/data")).unwrap();
        assert_eq!(above(&deep), Some(root.path().join("a/b/bundles/data")));
        assert_eq!(above(root.path()), Some(root.path().join("bundles/data")));
    }
}

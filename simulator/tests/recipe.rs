//! `docs/adding-a-scheduler.md` names every source that knows of schedulers, and only files that exist.

use std::{
    fs,
    path::{Path, PathBuf},
};

const RECIPE: &str = "docs/adding-a-scheduler.md";

/// Folders whose sources may know of schedulers.
const SOURCES: [&str; 8] = [
    "schema/src",
    "bundles/src",
    "profiler/src",
    "trainer/src",
    "simulator/src",
    "engine/src",
    "validator/src",
    "src",
];

/// Where the policies are: a new one touches none of the others.
const POLICIES: &str = "simulator/src/scheduler/";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn page() -> String {
    fs::read_to_string(root().join(RECIPE)).unwrap()
}

/// Rust files below a folder.
fn sources_below(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let below = |path: PathBuf| if path.is_dir() { sources_below(&path) } else { vec![path] };
    paths.flat_map(below).filter(|path| path.extension().is_some_and(|ext| ext == "rs")).collect()
}

/// Whether a source, without its tests, builds a scheduler or names one.
fn knows_of_schedulers(text: &str) -> bool {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    ["SchedulerKind::", ": SchedulerKind", "\"vllm-v1\""].iter().any(|word| code.contains(word))
}

#[test]
fn the_recipe_names_every_source_that_knows_of_schedulers() {
    let (root, page) = (root(), page());
    let mut known = Vec::new();
    for path in SOURCES.iter().flat_map(|folder| sources_below(&root.join(folder))) {
        let file = path.strip_prefix(&root).unwrap().display().to_string();
        let is_test = path.file_name().is_some_and(|name| name == "tests.rs");
        let is_policy = file.starts_with(POLICIES) && file != format!("{POLICIES}mod.rs");
        if !is_test && !is_policy && knows_of_schedulers(&fs::read_to_string(&path).unwrap()) {
            known.push(file);
        }
    }
    assert!(known.contains(&"simulator/src/scheduler/mod.rs".to_owned()), "{known:?}");
    known.retain(|file| !page.contains(&format!("`{file}`")));
    assert!(known.is_empty(), "{RECIPE} lacks {known:?}");
}

#[test]
fn files_that_the_recipe_names_exist() {
    let page = page();
    let is_path = |text: &&str| {
        text.contains('/') && Path::new(text).extension().is_some() && !text.contains([' ', '\n'])
    };
    let files: Vec<&str> = page.split('`').filter(is_path).filter(|file| !file.contains("NAME")).collect();
    assert!(files.len() > 10, "{files:?}");
    for file in files {
        assert!(root().join(file).is_file(), "{RECIPE} names `{file}`, which is not there");
    }
}

#[test]
fn the_toy_is_short() {
    let toy = fs::read_to_string(root().join("simulator/examples/toy_scheduler.rs")).unwrap();
    assert!(toy.contains("impl Scheduler for"));
    let num_lines = toy.lines().filter(|line| !line.trim().is_empty()).count();
    assert!(num_lines < 115, "{num_lines} lines are no toy");
}

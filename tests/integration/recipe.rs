//! `docs/adding-an-operator.md` shows the sources as they are and names every one that knows its operator.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The page, and the operator that it walks through, as sources write it.
const RECIPE: &str = "docs/adding-an-operator.md";
const NAMES: [&str; 2] = ["SiluMul", "silu_mul"];

/// Folders whose sources a new operator may have to touch.
const SOURCES: [&str; 8] = [
    "schema/src",
    "bundles/src",
    "profiler/src",
    "profiler/kernels",
    "trainer/src",
    "simulator/src",
    "engine/src",
    "src",
];

/// Lines of code said to be in a file; all lines without the white space around them.
#[derive(Debug, PartialEq, Eq)]
struct Excerpt {
    file: String,
    /// Pieces that may lie apart in the file, in its order.
    pieces: Vec<Vec<String>>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{RECIPE} names `{file}`: {error}"))
}

/// The fenced blocks that follow a line that is a file's name in back quotes and a colon.
fn excerpts(page: &str) -> Vec<Excerpt> {
    let mut all = Vec::new();
    let mut named = None;
    let mut lines = page.lines().map(str::trim);
    while let Some(line) = lines.next() {
        if line.starts_with("```") {
            let block: Vec<&str> = lines.by_ref().take_while(|line| !line.starts_with("```")).collect();
            if let Some(file) = named.take() {
                let pieces = block.split(|line| line.is_empty()).filter(|piece| !piece.is_empty());
                let pieces = pieces.map(|piece| piece.iter().map(|&line| line.to_owned()).collect());
                all.push(Excerpt { file, pieces: pieces.collect() });
            }
        } else if !line.is_empty() {
            named = line.strip_prefix('`').and_then(|rest| rest.strip_suffix("`:")).map(str::to_owned);
        }
    }
    all
}

/// Says which piece is not in the text, in its order and line by line.
fn missing(excerpt: &Excerpt, text: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let mut from = 0;
    for piece in &excerpt.pieces {
        match lines[from..].windows(piece.len()).position(|window| window == piece.as_slice()) {
            Some(at) => from += at + piece.len(),
            None => return Some(piece.join("\n")),
        }
    }
    None
}

/// Files below a folder.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder of the workspace");
    let paths = entries.map(|entry| entry.expect("an entry of a folder").path());
    paths.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

#[test]
fn the_recipe_shows_the_sources_as_they_are() {
    let excerpts = excerpts(&read(RECIPE));
    assert!(excerpts.len() > 10, "{excerpts:?}");
    for excerpt in &excerpts {
        assert!(!excerpt.pieces.is_empty(), "an empty excerpt of {}", excerpt.file);
        if let Some(piece) = missing(excerpt, &read(&excerpt.file)) {
            panic!(
                "{RECIPE}: expected these lines in {} (or after the piece before them), found none; bring the page up to \
                 date:\n{piece}",
                excerpt.file
            );
        }
    }
}

#[test]
fn the_recipe_names_every_source_that_knows_its_operator() {
    let page = read(RECIPE);
    let mut unnamed = Vec::new();
    for path in SOURCES.iter().flat_map(|folder| files_below(&root().join(folder))) {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let file = path.strip_prefix(root()).expect("below the root").display().to_string();
        if NAMES.iter().any(|name| text.contains(name)) && !page.contains(&format!("`{file}`")) {
            unnamed.push(file);
        }
    }
    assert!(unnamed.is_empty(), "{RECIPE} lacks {unnamed:?}");
}

#[test]
fn files_that_the_recipe_names_exist() {
    let page = read(RECIPE);
    let code = page.split('`').skip(1).step_by(2);
    let is_path =
        |text: &&str| text.contains('/') && Path::new(text).extension().is_some() && !text.contains(' ');
    let files: Vec<&str> = code.filter(is_path).collect();
    assert!(files.len() > 20, "{files:?}");
    for file in files {
        read(file);
    }
}

#[test]
fn an_excerpt_that_differs_is_found() {
    let page = "Text of `a.rs`:\n\n```sh\nnot an excerpt\n```\n\n  `a.rs`:\n\n  ```rust\n  let a = 1;\n\n  let b = 2;\n  ```\n";
    let found = excerpts(page);
    let piece = |line: &str| vec![line.to_owned()];
    assert_eq!(
        found,
        [Excerpt { file: "a.rs".into(), pieces: vec![piece("let a = 1;"), piece("let b = 2;")] }]
    );
    assert_eq!(missing(&found[0], "{\n    let a = 1;\n    more();\n    let b = 2;\n}\n"), None);
    for other in ["let a = 1;\nlet b = 3;", "let b = 2;\nlet a = 1;", "let a = 1; // one\nlet b = 2;", ""] {
        assert!(missing(&found[0], other).is_some(), "{other}");
    }
}

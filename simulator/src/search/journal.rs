//! What is done of a sweep, the moment it is done: an interrupted one goes on where it was.
//!
//! A JSON document a line: the key of everything that decides a result, and the result. What has the same key is not
//! done again, whichever sweep it was done for. A line is written whole or is the last one, and torn: it is cut off.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    sync::Mutex,
};

use plumbline_schema::{InputError, Location};
use serde::{Deserialize, Serialize};

use super::{Bracket, Probe};

/// What every line begins with, so that a torn one is told from another program's file.
const LINE_START: &str = r#"{"key":""#;

#[derive(Serialize)]
struct Line<'a> {
    key: &'a str,
    result: &'a Bracket<Probe>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OwnedLine {
    key: String,
    result: Bracket<Probe>,
}

/// Results by key, in a file.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    out: Mutex<File>,
    done: HashMap<String, Bracket<Probe>>,
}

impl Journal {
    /// Opens a journal, or begins one.
    ///
    /// # Errors
    /// When the file cannot be read or written, or a line that is not the last is no result.
    pub fn open(path: &Path) -> Result<Self, InputError> {
        let io = |error| InputError::io(path, error);
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            Err(error) => return Err(io(error)),
        };
        let (done, whole) = read(path, &text)?;
        let out = OpenOptions::new().append(true).create(true).open(path).map_err(io)?;
        out.set_len(whole as u64).map_err(io)?;
        Ok(Self { path: path.to_path_buf(), out: Mutex::new(out), done })
    }

    /// The result of a key, where it was there when the journal was opened.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Bracket<Probe>> {
        self.done.get(key)
    }

    /// Adds a result.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add(&self, key: &str, result: &Bracket<Probe>) -> Result<(), InputError> {
        let io = |error| InputError::io(&self.path, error);
        let mut line = serde_json::to_vec(&Line { key, result }).map_err(|error| io(error.into()))?;
        line.push(b'\n');
        // A line is one write; what another thread left when it panicked is whole.
        let mut out = self.out.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        out.write_all(&line).map_err(io)
    }
}

/// The results, and how many bytes they take; a torn last line is beyond.
fn read(path: &Path, text: &str) -> Result<(HashMap<String, Bracket<Probe>>, usize), InputError> {
    let (mut done, mut whole) = (HashMap::new(), 0);
    for (line, number) in text.split_inclusive('\n').zip(1..) {
        let is_ours = line.starts_with(LINE_START) || LINE_START.starts_with(line);
        let is_torn = !line.ends_with('\n') && is_ours;
        match serde_json::from_str::<OwnedLine>(line) {
            Ok(OwnedLine { key, result }) if !is_torn && is_consistent(&result) => done.insert(key, result),
            _ if is_torn => break,
            _ => {
                let expected = "a result of `plumb search`; name another file or remove it";
                return Err(InputError::invalid(path, Location::Line(number), expected, "something else"));
            }
        };
        whole += line.len();
    }
    Ok((done, whole))
}

/// Whether both ends are among the probes and are what they are said to be.
fn is_consistent(result: &Bracket<Probe>) -> bool {
    let is = |end: Option<usize>, meets| {
        end.is_none_or(|place| result.probes.get(place).is_some_and(|probe| probe.meets == meets))
    };
    !result.probes.is_empty() && is(result.low, true) && is(result.high, false)
}

//! The journal of a run: every result the moment it is there, so that a killed run can go on where it was.
//!
//! One JSON document a line. The first is the [`Header`]; a run goes on only under the same plan, device and software.
//! A line is written whole or is the last one: a torn last line is dropped. Before a point is measured, it is noted as
//! begun; what was begun and has no result was in flight when the run died.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use plumbline_bundles::{DeviceIdentity, HostCosts, Sample};
use plumbline_schema::{InputError, Location};
use serde::{Deserialize, Serialize};

use crate::{device::Ceilings, error::ProfileError};

/// A point that was begun this often without a result is not begun again: it may be what kills the run.
pub const MAX_BEGINNINGS: u32 = 2;

/// What a run must share with the journal that it continues.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Version of the journal's format.
    pub journal_version: u32,
    /// When measuring began, RFC 3339 in UTC.
    pub created: String,
    /// SHA-256 of the plan, hex.
    pub plan_sha256: String,
    /// The device, its driver and its kernels.
    pub device: DeviceIdentity,
}

/// The journal's format that this build writes.
pub const JOURNAL_VERSION: u32 = 1;

/// One result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// Ceilings were measured.
    Ceilings(Ceilings),
    /// Host costs were measured.
    Host(Box<HostCosts>),
    /// A check of the plan passed.
    Checked {
        /// Index among the plan's checks.
        check: usize,
    },
    /// A point is about to be measured.
    Begun {
        /// Index among the plan's points.
        point: usize,
    },
    /// A point was measured.
    Measured {
        /// Index among the plan's points.
        point: usize,
        /// Measuring time of all runs so far, ms.
        elapsed_ms: u64,
        /// The result.
        sample: Box<Sample>,
    },
    /// A point cannot be measured.
    Failed {
        /// Index among the plan's points.
        point: usize,
        /// Why.
        reason: String,
    },
}

/// A journal that is being written.
#[derive(Debug)]
pub struct Journal<W = File> {
    path: PathBuf,
    out: W,
}

/// Where the journal of a bundle lies: beside it.
#[must_use]
pub fn path_of(bundle: &Path) -> PathBuf {
    let mut name = bundle.file_name().unwrap_or_default().to_os_string();
    name.push(".journal");
    bundle.with_file_name(name)
}

impl Journal {
    /// Starts a journal.
    ///
    /// # Errors
    /// When there is one already (the error says what to do), or it cannot be written.
    pub fn create(path: &Path, header: &Header) -> Result<Self, ProfileError> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(|e| InputError::io(folder, e))?;
        }
        let out = OpenOptions::new().append(true).create_new(true).open(path).map_err(|error| {
            if error.kind() == ErrorKind::AlreadyExists {
                let expected = "no journal of an unfinished run; go on with it by `--resume`, or delete it";
                return InputError::invalid(path, Location::File, expected, "a journal");
            }
            InputError::io(path, error)
        })?;
        let mut journal = Self { path: path.into(), out };
        journal.write_line(header)?;
        Ok(journal)
    }

    /// Reads a journal and goes on writing it; a torn last line is cut off. Returns when it was begun and what it holds.
    ///
    /// # Errors
    /// When there is none, it is of another plan, device or software, or a line cannot be read.
    pub fn resume(path: &Path, header: &Header) -> Result<(Self, String, Vec<Entry>), ProfileError> {
        let bytes = std::fs::read(path).map_err(|error| {
            if error.kind() == ErrorKind::NotFound {
                let expected = "the journal of an unfinished run; start one without `--resume`";
                return InputError::invalid(path, Location::File, expected, "nothing");
            }
            InputError::io(path, error)
        })?;
        let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |end| end + 1);
        let mut lines = bytes[..whole].split(|&b| b == b'\n').filter(|line| !line.is_empty()).zip(1u64..);
        let parse_error = |line, what: &str, error: serde_json::Error| {
            InputError::invalid(path, Location::Line(line), what, error.to_string())
        };
        let Some((first, line)) = lines.next() else {
            let expected =
                "a journal's first line; a run that ended so early left nothing: delete the journal";
            return Err(InputError::invalid(path, Location::File, expected, "none").into());
        };
        let found: Header =
            serde_json::from_slice(first).map_err(|e| parse_error(line, "the head of a journal", e))?;
        check_same_run(path, header, &found)?;
        let entries = lines
            .map(|(text, line)| {
                serde_json::from_slice(text).map_err(|e| parse_error(line, "a journal entry", e))
            })
            .collect::<Result<Vec<Entry>, InputError>>()?;
        let out = OpenOptions::new().append(true).open(path).map_err(|e| InputError::io(path, e))?;
        out.set_len(whole as u64).map_err(|e| InputError::io(path, e))?;
        Ok((Self { path: path.into(), out }, found.created, entries))
    }

    /// Deletes the journal of a run whose results are kept elsewhere now.
    pub fn discard(self) {
        drop(self.out);
        // What is left would only be in the way of the next run, which says so.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl<W: Write> Journal<W> {
    /// Appends a result, so that it outlives the process.
    ///
    /// # Errors
    /// When it cannot be written, as on a full disk.
    pub fn append(&mut self, entry: &Entry) -> Result<(), ProfileError> {
        self.write_line(entry)
    }

    fn write_line(&mut self, value: &impl Serialize) -> Result<(), ProfileError> {
        let mut line = serde_json::to_vec(value)
            .map_err(|e| InputError::json(&self.path, "an entry that JSON can hold", &e))?;
        line.push(b'\n');
        // In one call, so that a killed process leaves a whole line or none.
        let written = self.out.write_all(&line).and_then(|()| self.out.flush());
        written.map_err(|source| ProfileError::Journal { path: self.path.clone(), source })
    }
}

fn check_same_run(path: &Path, expected: &Header, found: &Header) -> Result<(), InputError> {
    let differs = |what: &str, expected: &str, found: &str| {
        let hint = "measure anew without `--resume` (delete the journal first)";
        let expected = format!("{what} `{expected}`, as this run has; {hint}");
        Err(InputError::invalid(path, Location::Line(1), expected, format!("`{found}`")))
    };
    let (a, b) = (&expected.device, &found.device);
    let unknown = || "unknown".to_owned();
    let pairs = [
        ("format", expected.journal_version.to_string(), found.journal_version.to_string()),
        ("plan", expected.plan_sha256.clone(), found.plan_sha256.clone()),
        ("device", a.device_name.clone(), b.device_name.clone()),
        ("kernels", a.kernel_hash.clone(), b.kernel_hash.clone()),
        (
            "driver",
            a.driver_version.clone().unwrap_or_else(unknown),
            b.driver_version.clone().unwrap_or_else(unknown),
        ),
        ("device state", format!("{a:?}"), format!("{b:?}")),
    ];
    pairs.iter().find(|(_, e, f)| e != f).map_or(Ok(()), |(what, e, f)| differs(what, e, f))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, FakeDevice};

    fn header() -> Header {
        Header {
            journal_version: JOURNAL_VERSION,
            created: "2026-01-01T00:00:00Z".into(),
            plan_sha256: "ab".into(),
            device: FakeDevice::new(0).identity().clone(),
        }
    }

    fn failed(point: usize) -> Entry {
        Entry::Failed { point, reason: "out of memory".into() }
    }

    #[test]
    fn a_torn_last_line_is_dropped_and_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = path_of(&folder.path().join("bundle"));
        let mut journal = Journal::create(&path, &header()).unwrap();
        journal.append(&Entry::Begun { point: 1 }).unwrap();
        journal.append(&failed(1)).unwrap();
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        for cut in [1, 5, 20] {
            std::fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            let (mut journal, _, entries) = Journal::resume(&path, &header()).unwrap();
            assert_eq!(entries, [Entry::Begun { point: 1 }], "cut {cut}");
            journal.append(&failed(1)).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
    }

    #[test]
    fn another_plan_or_device_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.journal");
        Journal::create(&path, &header()).unwrap();
        let again = Journal::create(&path, &header()).unwrap_err().to_string();
        assert!(again.contains("--resume"), "{again}");
        let mut other = header();
        other.device.driver_version = Some("999".into());
        let text = Journal::resume(&path, &other).unwrap_err().to_string();
        assert!(text.contains("driver `999`") && text.contains("unknown"), "{text}");
        let text = Journal::resume(&path, &Header { plan_sha256: "cd".into(), ..header() }).unwrap_err();
        assert!(text.to_string().contains("plan `cd`"), "{text}");
        let none = Journal::resume(&folder.path().join("y"), &header()).unwrap_err().to_string();
        assert!(none.contains("without `--resume`"), "{none}");
        std::fs::write(&path, "{\"journal_v").unwrap();
        let torn = Journal::resume(&path, &header()).unwrap_err().to_string();
        assert!(torn.contains("delete the journal"), "{torn}");
    }

    #[test]
    fn a_full_disk_is_an_error_that_names_the_journal() {
        /// A disk with room for some bytes.
        struct Disk(usize);
        impl Write for Disk {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                let taken = bytes.len().min(self.0);
                self.0 -= taken;
                if taken == 0 { Err(ErrorKind::StorageFull.into()) } else { Ok(taken) }
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut journal = Journal { path: "b.journal".into(), out: Disk(80) };
        journal.append(&failed(1)).unwrap();
        let error = journal.append(&failed(2)).unwrap_err();
        assert!(matches!(error, ProfileError::Journal { .. }), "{error}");
        assert!(error.to_string().contains("b.journal"), "{error}");
    }
}

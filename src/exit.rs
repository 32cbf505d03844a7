//! Exit codes, the same for every verb.

use std::process::ExitCode;

/// How `plumb` ends; the numbers are part of its interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done as asked.
    Fine = 0,
    /// Something that should not happen: a bug, a full disk, a failing driver call.
    Unexpected = 1,
    /// A wrong command line, or an input file that cannot be used.
    BadInput = 2,
    /// Everything ran, and a result lies outside its tolerance.
    OutsideTolerance = 3,
    /// No GPU that can be used.
    NoDevice = 4,
    /// Some of the work could not be done; what was done is kept.
    Incomplete = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

//! A failed command: its exit code, one `error:` line and, where there is something to do, one `hint:` line.

use std::{fmt::Write as _, io};

use plumbline_bundles::BundleError;
use plumbline_profiler::ProfileError;
use plumbline_schema::InputError;
use plumbline_simulator::SimulateError;
use plumbline_trainer::{TrainError, report::ReportError as TrainReportError};
use plumbline_validator::{ReportError, calibrate::CalibrateError};

use crate::exit::Exit;

/// Longest `error:` line, in characters; a hostile file may hold a megabyte where a number belongs.
const MAX_LINE_CHARS: usize = 1_000;

/// Why a command ends without its result.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What went wrong, with its causes.
    pub error: anyhow::Error,
    /// What the user can do about it.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into(), hint: None }
    }

    /// A failure said in words.
    pub fn message(exit: Exit, text: impl Into<String>) -> Self {
        Self::new(exit, anyhow::Error::msg(text.into()))
    }

    /// Adds what the user can do.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The lines for stderr, each ending in a newline.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = self.error.to_string();
        for cause in self.error.chain().skip(1).map(ToString::to_string) {
            // Errors that already end in their source's text would say it twice.
            if !text.ends_with(&cause) {
                text.push_str(": ");
                text.push_str(&cause);
            }
        }
        let mut lines = format!("error: {}\n", one_line(&text));
        if let Some(hint) = &self.hint {
            let _ = writeln!(lines, "hint: {}", one_line(hint));
        }
        lines
    }
}

/// Folds line breaks into spaces, escapes other control characters and cuts at [`MAX_LINE_CHARS`].
fn one_line(text: &str) -> String {
    let folded = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut line = String::new();
    for (i, c) in folded.chars().enumerate() {
        if i == MAX_LINE_CHARS {
            line.push_str("...");
            break;
        }
        if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

/// Whether an I/O error is about what the user named, and not about the machine.
fn is_users(kind: io::ErrorKind) -> bool {
    use io::ErrorKind as K;
    matches!(
        kind,
        K::NotFound
            | K::PermissionDenied
            | K::NotADirectory
            | K::IsADirectory
            | K::AlreadyExists
            | K::ReadOnlyFilesystem
            | K::InvalidFilename
            | K::InvalidInput
            | K::InvalidData
            | K::UnexpectedEof
            | K::Other
    )
}

impl From<InputError> for Failure {
    fn from(error: InputError) -> Self {
        let exit = match &error {
            InputError::Io { source, .. } if !is_users(source.kind()) => Exit::Unexpected,
            _ => Exit::BadInput,
        };
        Self::new(exit, error)
    }
}

impl From<BundleError> for Failure {
    fn from(error: BundleError) -> Self {
        match error {
            BundleError::Input(error) => error.into(),
            error => Self::new(Exit::BadInput, error),
        }
    }
}

impl From<SimulateError> for Failure {
    fn from(error: SimulateError) -> Self {
        let exit = match error {
            SimulateError::Stalled(_) => Exit::Unexpected,
            _ => Exit::BadInput,
        };
        Self::new(exit, error)
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        Self::new(Exit::BadInput, error)
    }
}

impl From<TrainReportError> for Failure {
    fn from(error: TrainReportError) -> Self {
        match error {
            TrainReportError::Io(error) => error.into(),
            error @ TrainReportError::Figure { .. } => Self::new(Exit::Unexpected, error),
        }
    }
}

impl From<CalibrateError> for Failure {
    fn from(error: CalibrateError) -> Self {
        Self::new(Exit::BadInput, error)
    }
}

impl From<ReportError> for Failure {
    fn from(error: ReportError) -> Self {
        match error {
            ReportError::Io(error) => error.into(),
            error @ ReportError::NotAReport { .. } => Self::new(Exit::BadInput, error),
            error @ ReportError::Figure { .. } => Self::new(Exit::Unexpected, error),
        }
    }
}

impl From<ProfileError> for Failure {
    fn from(error: ProfileError) -> Self {
        match error {
            ProfileError::Input(error) => error.into(),
            ProfileError::Bundle(error) => error.into(),
            error @ ProfileError::NoDevice { .. } => Self::new(Exit::NoDevice, error).with_hint(
                "install an NVIDIA driver and the CUDA 12 or 13 libraries NVRTC and cuBLASLt (LD_LIBRARY_PATH), \
                 or try `--device fake`",
            ),
            error @ ProfileError::Journal { .. } => Self::new(Exit::Incomplete, error),
            error => Self::new(Exit::Unexpected, error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_folded_into_one_line_and_said_once() {
        let cause = io::Error::other("disk on fire");
        let error = anyhow::Error::new(InputError::io("a/b.csv", cause)).context("reading the run");
        let text = Failure::new(Exit::BadInput, error).with_hint("use\nwater").render();
        assert_eq!(text, "error: reading the run: a/b.csv: disk on fire\nhint: use water\n");
    }

    #[test]
    fn hostile_text_stays_one_short_line() {
        let text = format!("found `\u{1b}[31m{}`\n\nsecond", "x".repeat(5_000));
        let rendered = Failure::message(Exit::BadInput, text).render();
        assert_eq!(rendered.lines().count(), 1);
        assert!(rendered.contains(r"\u{1b}") && !rendered.contains('\u{1b}'));
        assert!(rendered.len() < 1_100 && rendered.ends_with("...\n"));
    }
}

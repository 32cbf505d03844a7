//! What a verb prints: one JSON document or text on stdout, progress on stderr.

mod progress;
mod table;
mod text;

use std::io::{self, Write};

use serde::Serialize;

pub use progress::Bar;
pub use table::Table;
pub use text::Text;

use crate::{exit::Exit, failure::Failure};

/// A 0..1 ratio as a percentage with two decimals.
#[must_use]
pub fn percent(ratio: f64) -> String {
    format!("{:.2} %", 100.0 * ratio)
}

/// As [`percent`], with its sign.
#[must_use]
pub fn signed_percent(ratio: f64) -> String {
    format!("{:+.2} %", 100.0 * ratio)
}

/// Nanoseconds as the milliseconds that people read.
#[must_use]
pub fn ns_to_ms(ns: f64) -> f64 {
    ns / 1e6
}

/// How this run of the command prints.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// One JSON document in place of text.
    pub json: bool,
    /// Neither progress nor notes.
    pub quiet: bool,
}

impl Output {
    /// Prints `value` as JSON, or the text that `human` makes.
    ///
    /// # Errors
    /// When stdout cannot be written; a reader that closed its end is not an error.
    pub fn print<T: Serialize>(self, value: &T, human: impl FnOnce() -> String) -> Result<(), Failure> {
        let mut text = if self.json {
            serde_json::to_string_pretty(value).map_err(|e| Failure::new(Exit::Unexpected, e))?
        } else {
            human()
        };
        if !text.ends_with('\n') {
            text.push('\n');
        }
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Failure::new(Exit::Unexpected, anyhow::Error::new(error).context("writing to stdout")))
            }
            _ => Ok(()),
        }
    }

    /// Says on stderr what was written where, unless asked to be quiet.
    pub fn note(self, text: impl AsRef<str>) {
        if !self.quiet {
            // A closed stderr must not end the command.
            let _ = writeln!(io::stderr(), "{}", text.as_ref());
        }
    }

    /// A progress bar of `total` steps; hidden when quiet or when stderr is no terminal.
    #[must_use]
    pub fn bar(self, total: u64) -> Bar {
        Bar::new(total, self.quiet)
    }
}

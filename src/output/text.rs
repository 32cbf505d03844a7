//! Text built line by line.

use std::fmt;

/// Lines for stdout.
#[derive(Clone, Debug, Default)]
pub struct Text(String);

impl Text {
    /// Adds a line.
    pub fn line(&mut self, line: impl fmt::Display) {
        use fmt::Write;
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "{line}");
    }

    /// The lines, each ending in a newline.
    #[must_use]
    pub fn finish(self) -> String {
        self.0
    }
}

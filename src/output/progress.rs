//! Progress on stderr, on a terminal only.

use std::{io::IsTerminal, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A progress bar with the time left.
#[derive(Debug)]
pub struct Bar {
    inner: ProgressBar,
}

impl Bar {
    /// A bar of `total` steps; hidden when `quiet` or when stderr is no terminal.
    #[must_use]
    pub fn new(total: u64, quiet: bool) -> Self {
        if quiet || !std::io::stderr().is_terminal() {
            return Self { inner: ProgressBar::hidden() };
        }
        let inner = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        let bars = if std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty()) {
            "{bar:32} {pos}/{len} {msg} ({eta} left)"
        } else {
            "{bar:32.cyan} {pos}/{len} {msg} ({eta} left)"
        };
        if let Ok(style) = ProgressStyle::with_template(bars) {
            inner.set_style(style.progress_chars("=> "));
        }
        inner.enable_steady_tick(Duration::from_millis(200));
        Self { inner }
    }

    /// Moves to `done` of `total` and says what is being done.
    pub fn set(&self, done: u64, total: u64, what: &str) {
        self.inner.set_length(total);
        self.inner.set_position(done);
        if self.inner.message() != what {
            self.inner.set_message(what.to_owned());
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.inner.finish_and_clear();
    }
}

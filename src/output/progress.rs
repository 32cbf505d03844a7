//! Progress on stderr, on a terminal only.

use std::{io::IsTerminal, time::Duration};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

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
        set_template(&inner, "({eta} left)");
        inner.enable_steady_tick(Duration::from_millis(200));
        Self { inner }
    }

    /// Moves to `done` of `total` and says what is being done; the time left follows from the pace so far.
    pub fn set(&self, done: u64, total: u64, what: &str) {
        self.inner.set_length(total);
        self.inner.set_position(done);
        if self.inner.message() != what {
            self.inner.set_message(what.to_owned());
        }
    }

    /// As [`Self::set`], with the time left as the work itself estimates it.
    pub fn set_with_time_left(&self, done: u64, total: u64, what: &str, left: Option<Duration>) {
        let text = left.map_or_else(String::new, |left| format!(", {} left", HumanDuration(left)));
        set_template(&self.inner, "");
        self.set(done, total, &format!("{what}{text}"));
    }
}

fn set_template(bar: &ProgressBar, end: &str) {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let shape = if no_color { "{bar:32}" } else { "{bar:32.cyan}" };
    // A template that does not parse would leave the default one.
    if let Ok(style) = ProgressStyle::with_template(&format!("{shape} {{pos}}/{{len}} {{msg}} {end}")) {
        bar.set_style(style.progress_chars("=> "));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.inner.finish_and_clear();
    }
}

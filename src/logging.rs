//! Logs on stderr, filtered by `PLUMB_LOG`.

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// Environment variable with the log filter, in `tracing`'s syntax (`info`, `plumbline_profiler=debug`).
const VARIABLE: &str = "PLUMB_LOG";

/// Starts logging: warnings, or errors only when `quiet`, unless `PLUMB_LOG` says otherwise.
pub fn start(quiet: bool) {
    let level = if quiet { LevelFilter::ERROR } else { LevelFilter::WARN };
    let filter =
        EnvFilter::builder().with_default_directive(level.into()).with_env_var(VARIABLE).from_env_lossy();
    let color =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(color)
        .with_target(false)
        .without_time()
        .init();
}

//! The `plumb` command: reads arguments, calls the crates, prints what they return.
//!
//! Start with [`commands`] (one file a verb), [`output`] (what is printed) and [`failure`] (how it ends otherwise).

mod commands;
mod data;
mod engines;
mod exit;
mod failure;
mod logging;
mod output;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;

fn main() -> ExitCode {
    let cli = commands::Cli::parse();
    logging::start(cli.quiet);
    match cli.run() {
        Ok(exit) => exit.into(),
        Err(failure) => {
            // A closed stderr leaves only the exit code to tell.
            let _ = io::stderr().write_all(failure.render().as_bytes());
            failure.exit.into()
        }
    }
}

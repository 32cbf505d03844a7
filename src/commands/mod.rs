//! The verbs, one file each.

mod advice;
mod bundle;
mod bundle_diff;
mod bundle_efficiency;
mod bundle_export;
mod bundle_import;
mod bundle_judge;
mod bundle_lint;
mod calibrate;
mod check;
mod check_bundle;
mod compare;
mod explain;
mod generate;
mod host;
mod import_run;
mod profile;
mod real;
mod search;
mod simulate;
mod strict;
mod train;
mod train_transfer;
mod validate;
mod workload;
mod workload_generate;
mod workload_import;

use clap::{Parser, Subcommand};

use crate::{exit::Exit, failure::Failure, output::Output};

/// Tell how far an LLM-serving simulator stands from the truth, why, and pull it there
///
/// Results go to stdout, progress and logs to stderr. Times in JSON and CSV carry their unit in the name.
/// Exit codes: 0 fine, 1 unexpected, 2 usage or bad input, 3 outside tolerance, 4 no usable device, 5 incomplete.
#[derive(Debug, Parser)]
#[command(name = "plumb", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// Print one JSON document in place of text
    #[arg(long, global = true, display_order = 900)]
    json: bool,

    /// Show neither progress nor notes, only errors
    #[arg(long, short, global = true, display_order = 901)]
    pub quiet: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Validate(validate::Args),
    Check(check::Args),
    Profile(profile::Args),
    Train(train::Args),
    Bundle(bundle::Args),
    Workload(workload::Args),
    Simulate(simulate::Args),
    Real(Box<real::Args>),
    Generate(Box<generate::Args>),
    Search(Box<search::Args>),
    ImportRun(Box<import_run::Args>),
    Compare(compare::Args),
    Calibrate(calibrate::Args),
    Explain(explain::Args),
    Host(host::Args),
}

impl Cli {
    /// Runs the verb.
    ///
    /// # Errors
    /// Why there is no result, with the exit code.
    pub fn run(&self) -> Result<Exit, Failure> {
        let output = Output { json: self.json, quiet: self.quiet };
        match &self.command {
            Command::Validate(args) => validate::run(args, output),
            Command::Check(args) => check::run(args, output),
            Command::Profile(args) => profile::run(args, output),
            Command::Train(args) => train::run(args, output),
            Command::Bundle(args) => bundle::run(args, output),
            Command::Workload(args) => workload::run(args, output),
            Command::Simulate(args) => simulate::run(args, output),
            Command::Real(args) => real::run(args, output),
            Command::Generate(args) => generate::run(args, output),
            Command::Search(args) => search::run(args, output),
            Command::ImportRun(args) => import_run::run(args, output),
            Command::Compare(args) => compare::run(args, output),
            Command::Calibrate(args) => calibrate::run(args, output),
            Command::Explain(args) => explain::run(args, output),
            Command::Host(args) => host::run(args, output),
        }
    }
}

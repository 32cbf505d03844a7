//! The command as a user calls it, and its readers under mutated input.

mod bad_input;
mod help;
mod mutation;
mod support;

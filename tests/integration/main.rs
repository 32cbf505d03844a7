//! The command as a user calls it, and its readers under mutated input.

mod bad_input;
mod fixture;
mod help;
mod mutation;
mod pipeline;
mod shipped;
mod support;

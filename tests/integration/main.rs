//! The command as a user calls it, and its readers under mutated input.

mod bad_input;
mod bundle_diff;
mod check;
mod clusters;
mod efficiency;
mod faults;
mod fixture;
mod help;
mod host;
mod import;
mod left_out;
mod lint;
mod mutation;
mod parallel;
mod pipeline;
mod real;
mod recipe;
mod repeatability;
mod resume;
mod search;
mod shipped;
mod support;
mod training;
mod transferring;
mod workloads;

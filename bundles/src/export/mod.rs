//! Predicted times as other tools' profiling tables.

pub mod vidur;

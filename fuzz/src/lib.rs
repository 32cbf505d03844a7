//! What fuzz targets and tests share: engines to simulate, bytes as simulations, and the laws they must keep.
//!
//! The simulator's tests take these files in as a module, so they know one another by `super`.

pub mod case;
pub mod engine;
pub mod inputs;
pub mod laws;
pub mod watch;

//! What a simulation reports while it runs: exact distributions, and the rows of a run's files.
//!
//! Both take a simulation of any length in the same memory. The rows' formats are the schema's.

mod held;
mod quantiles;
mod spill;

pub use plumbline_schema::rows::{RequestRows, Row, RowFile, Rows, StepRows, TokenRows};

pub use quantiles::{DEFAULT_MAX_BYTES, Distribution, ExactQuantiles};

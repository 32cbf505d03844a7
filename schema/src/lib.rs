//! The vocabulary of Plumbline: what every other crate means by its words.
//!
//! Start with [`operator`] (the operators, their shapes, FLOPs and bytes), [`forward`] (the forward pass,
//! written once) and [`run`] (the files of a real or simulated run). Everything read from disk fails with
//! [`InputError`]: file, line or key, what was expected, what was found.

pub mod batch;
pub mod deployment;
pub mod environment;
pub mod error;
pub mod files;
pub mod forward;
pub mod gpu;
pub mod host;
pub mod memory;
pub mod model;
pub mod operator;
pub mod roofline;
pub mod rows;
pub mod run;
pub mod source;
pub mod units;
pub mod workload;

pub use batch::{AttentionLoad, BatchShape, PrefillChunk, StepBatch};
pub use deployment::{CudagraphMode, Deployment, EngineMode};
pub use environment::{BF16_NAME, Environment};
pub use error::{InputError, Location};
pub use forward::{OperatorCall, forward_pass};
pub use gpu::GpuSpec;
pub use host::{HostFactorBasis, HostFactorUsed, HostInfo};
pub use memory::{CapacityCheck, MemoryError, MemoryOptions, MemoryPlan};
pub use model::{ModelConfig, ModelSpec};
pub use operator::{Heads, Operator, OperatorShape};
pub use rows::{RequestRows, RowFile, Rows, StepRows, TokenRows};
pub use run::{
    HostScore, RequestMetrics, RequestStatus, Run, RunConduct, RunInfo, RunKind, StepMetrics, StepPhases,
    StepRequests, TokenMetrics, WarmUp,
};
pub use source::{ArrivalBasis, RunSource};
pub use units::{Bytes, Flops, Nanos};
pub use workload::{
    ContentRun, ContentStream, LengthSummary, PromptContent, Workload, WorkloadRequest, WorkloadSummary,
};

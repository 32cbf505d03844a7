//! Discrete-event LLM serving on predicted operator times.
//!
//! Start with [`mod@simulate`] (one simulated run), [`mod@step_time`] (how long a step takes) and [`scheduler`]
//! (which tokens a step computes). The seams are [`OperatorTimes`] (where operator times come from),
//! [`scheduler::Scheduler`] (another engine's policy) and [`serve::Executor`] (model a step, or run it).
//! [`mod@replay`] asks whether a scheduler forms the batches that a real engine formed.

pub mod arrival;
pub mod cluster;
pub mod executor;
pub mod kv_blocks;
pub mod kv_cache;
pub mod metrics;
pub mod output;
pub mod prefix;
pub mod radix_cache;
pub mod recorder;
pub mod replay;
pub mod replica;
pub mod residual;
pub mod scheduler;
pub mod search;
pub mod sequence;
pub mod serve;
pub mod simulate;
pub mod step_time;
pub mod times;

pub use arrival::{RequestSource, WorkloadSource};
pub use executor::{LendModel, SimulatedExecutor};
pub use recorder::{Outcome, Recorder, RunRecorder};
pub use replay::{ReplayError, ReplayReport, StepDifference, StepPart, replay, replay_folder};
pub use replica::{Arrival, Replica};
pub use residual::Residuals;
pub use scheduler::{Rejection, Scheduler, SchedulerError, SchedulerKind};
pub use serve::{Executor, serve};
pub use simulate::{SimulateError, SimulateOptions, Simulation, SimulationCounts, simulate, simulate_with};
pub use step_time::{
    GpuParts, StepTime, StepTimeError, StepTimeModel, dispatch,
    timer::StepTimer,
    usage::{OperatorUsage, Usage},
};
pub use times::{BundleTimes, Coverage, OperatorTimes, ProvenanceTimes, RooflineTimes};

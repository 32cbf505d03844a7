//! `samples/<operator>.csv`: a row per measured point.

use plumbline_schema::{Operator, OperatorShape, StepBatch};
use serde::{Deserialize, Serialize};

use crate::stats::TimeStats;

/// Whether a launch finds its large operands in the L2 cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheState {
    /// Operands rotate among buffers that exceed the L2 cache, as a model's layers do.
    Cold,
    /// The same buffers each time.
    Hot,
}

/// One measured point.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Which operator.
    pub operator: Operator,
    /// Shape of the launch.
    pub shape: OperatorShape,
    /// The very sequences of an attention launch; `None` for other operators.
    pub batch: Option<StepBatch>,
    /// Cold or hot.
    pub cache: CacheState,
    /// GPU time of one launch, launched back to back from a graph, gap included.
    pub stats: TimeStats,
    /// SM clock around the measurement, MHz; `None` when not known.
    pub sm_clock_mhz: Option<u32>,
    /// Memory clock around the measurement, MHz; `None` when not known.
    pub memory_clock_mhz: Option<u32>,
    /// Board power around the measurement, W; `None` when not known.
    pub power_w: Option<f64>,
    /// Throttle reasons joined by `|`; empty when none.
    pub throttle: String,
    /// What ran: kernel and configuration, or the library's algorithm.
    pub kernel: String,
    /// Marks joined by `|`: `throttled`, `noisy`, `time_limit`; empty when none.
    pub flags: String,
}

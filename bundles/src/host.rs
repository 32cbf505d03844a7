//! `host.json`: what it costs this host to drive its GPU.

use serde::{Deserialize, Serialize};

use crate::{
    error::{CheckError, check_positive},
    stats::TimeStats,
};

/// Cost of launching a CUDA graph of a given size.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GraphLaunchCost {
    /// Kernel nodes of the graph.
    pub num_nodes: u32,
    /// Host time of the launch call.
    pub launch_ns: TimeStats,
}

/// Cost of copying a small buffer and waiting for it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CopyCost {
    /// Size of the copy.
    pub num_bytes: u64,
    /// Host to device, until done.
    pub to_device_ns: TimeStats,
    /// Device to host, until done.
    pub to_host_ns: TimeStats,
}

/// Costs of the host's side of a step, measured with the GPU's queue kept empty or full as named.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostCosts {
    /// CPU model as the system names it.
    pub cpu_model: String,
    /// Logical cores.
    pub num_cores: u32,
    /// Single-thread score: million iterations a second of a fixed integer and pointer-chasing loop.
    pub single_thread_score: f64,
    /// Host time of one kernel launch call, queue not full.
    pub kernel_launch_ns: TimeStats,
    /// GPU time from one small kernel's end to the next one's end when both were queued: the floor of any kernel.
    pub kernel_gap_ns: TimeStats,
    /// Host time of one graph launch, by size.
    pub graph_launch: Vec<GraphLaunchCost>,
    /// Host time of synchronising with an idle stream.
    pub synchronize_ns: TimeStats,
    /// Small copies.
    pub copies: Vec<CopyCost>,
}

impl HostCosts {
    /// Checks that every number can be a measured time.
    ///
    /// # Errors
    /// Names the key.
    pub fn check(&self) -> Result<(), CheckError> {
        check_positive("single_thread_score", self.single_thread_score)?;
        let named = [
            ("kernel_launch_ns", &self.kernel_launch_ns),
            ("kernel_gap_ns", &self.kernel_gap_ns),
            ("synchronize_ns", &self.synchronize_ns),
        ];
        for (key, stats) in named {
            stats.check().map_err(|e| e.under(key))?;
        }
        for (i, cost) in self.graph_launch.iter().enumerate() {
            cost.launch_ns.check().map_err(|e| e.under(&format!("graph_launch[{i}].launch_ns")))?;
        }
        for (i, cost) in self.copies.iter().enumerate() {
            cost.to_device_ns.check().map_err(|e| e.under(&format!("copies[{i}].to_device_ns")))?;
            cost.to_host_ns.check().map_err(|e| e.under(&format!("copies[{i}].to_host_ns")))?;
        }
        Ok(())
    }
}

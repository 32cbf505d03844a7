//! What a run has found so far, be it in this process or in one that was killed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use plumbline_bundles::{HostCosts, Sample};

use crate::{
    device::Ceilings,
    journal::{Entry, MAX_BEGINNINGS},
    plan::Plan,
};

/// Results by their place in the plan.
#[derive(Clone, Debug, Default)]
pub(crate) struct Results {
    pub ceilings: Option<Ceilings>,
    pub host: Option<HostCosts>,
    /// Checks that passed.
    pub checked: BTreeSet<usize>,
    pub samples: BTreeMap<usize, Sample>,
    /// Points that cannot be measured, and why.
    pub failed: BTreeMap<usize, String>,
    /// Measuring time of earlier runs.
    pub earlier: Duration,
}

impl Results {
    /// Collects what a journal holds.
    ///
    /// Points that failed are tried again, as memory may be free now; one that was begun too often without any
    /// result is not, as it may be what killed the runs.
    pub(crate) fn new(plan: &Plan, entries: Vec<Entry>) -> Self {
        let mut results = Self::default();
        let mut begun: HashMap<usize, u32> = HashMap::new();
        for entry in entries {
            match entry {
                Entry::Ceilings(ceilings) => results.ceilings = Some(ceilings),
                Entry::Host(host) => results.host = Some(*host),
                Entry::Checked { check } => {
                    results.checked.insert(check);
                }
                Entry::Begun { point } => *begun.entry(point).or_default() += 1,
                Entry::Measured { point, elapsed_ms, sample } => {
                    begun.remove(&point);
                    results.earlier = results.earlier.max(Duration::from_millis(elapsed_ms));
                    if point < plan.points.len() {
                        results.samples.insert(point, *sample);
                    }
                }
                Entry::Failed { point, .. } => {
                    begun.remove(&point);
                }
            }
        }
        for (point, count) in begun {
            if count >= MAX_BEGINNINGS
                && let Some(planned) = plan.points.get(point)
            {
                let reason = format!(
                    "{} at {:?}: the run ended {count} times while it was measured",
                    planned.point.operator, planned.point.shape
                );
                results.failed.insert(point, reason);
            }
        }
        results
    }

    /// Points of the plan without a result, in the plan's order.
    pub(crate) fn open_points(&self, plan: &Plan) -> Vec<usize> {
        let is_open = |point: &usize| !(self.samples.contains_key(point) || self.failed.contains_key(point));
        (0..plan.points.len()).filter(is_open).collect()
    }
}

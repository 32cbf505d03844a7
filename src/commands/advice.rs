//! The trainer as the profiler's advisor: neither crate knows of the other.

use plumbline_bundles::{CurveError, Sample};
use plumbline_profiler::{Advisor, Point};
use plumbline_schema::GpuSpec;
use plumbline_trainer::advise::{Advice, AdviceOptions};

/// Answers with predictors trained on what was measured so far.
#[derive(Debug)]
pub struct TrainedAdvisor {
    /// The GPU that is measured.
    gpu: GpuSpec,
    /// What it was trained on last, as both questions are asked of the same samples.
    last: Option<(Vec<Sample>, Advice)>,
}

impl TrainedAdvisor {
    /// An advisor for a GPU.
    pub fn new(gpu: GpuSpec) -> Self {
        Self { gpu, last: None }
    }

    fn advice(&mut self, samples: &[Sample]) -> &Advice {
        let last = self.last.take().filter(|(known, _)| known == samples);
        let train = || (samples.to_vec(), Advice::new(samples, &self.gpu, &AdviceOptions::default()));
        &self.last.insert(last.unwrap_or_else(train)).1
    }
}

impl Advisor for TrainedAdvisor {
    fn unsureness(&mut self, samples: &[Sample], candidates: &[Point]) -> Vec<f64> {
        let shapes: Vec<_> = candidates.iter().map(|point| (point.operator, point.shape)).collect();
        self.advice(samples).unsureness(&shapes)
    }

    fn held_out_error(&mut self, samples: &[Sample], held_out: &[Sample]) -> Option<CurveError> {
        self.advice(samples).held_out_error(held_out)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use plumbline_bundles::CacheState;
    use plumbline_profiler::{Device, Envelope, FakeDevice, Plan, PlannedPoint, StoppingRule};
    use plumbline_schema::ModelSpec;

    use super::*;

    #[test]
    fn the_trainer_answers_for_points() {
        let models = vec![ModelSpec::load("qwen3-0.6b").unwrap()];
        let plan = Plan::new(&models, &Envelope::default()).unwrap();
        let mut device = FakeDevice::new(3);
        let own = plan.points.iter().filter(|p| p.cache == CacheState::in_model(p.point.operator));
        // Every third point of each operator is measured.
        let mut counts = BTreeMap::new();
        let mut rank = |planned: &PlannedPoint| {
            let count = counts.entry(planned.point.operator).or_insert(0usize);
            *count += 1;
            *count
        };
        let (known, open): (Vec<_>, Vec<_>) = own.partition(|planned| rank(planned).is_multiple_of(3));
        let mut measure = |point: &Point, cache| {
            let measurement = device.measure(point, cache, &StoppingRule::default()).unwrap();
            measurement.into_sample(point, cache)
        };
        let samples: Vec<Sample> = known.iter().map(|p| measure(&p.point, p.cache)).collect();
        let held_out: Vec<Sample> = open.iter().step_by(5).map(|p| measure(&p.point, p.cache)).collect();
        let candidates: Vec<Point> = open.iter().map(|p| p.point.clone()).collect();
        let mut advisor = TrainedAdvisor::new(FakeDevice::gpu_spec());
        let unsureness = advisor.unsureness(&samples, &candidates);
        assert_eq!(unsureness.len(), candidates.len());
        assert!(unsureness.iter().all(|u| u.is_finite() && *u > 0.0), "{unsureness:?}");
        let error = advisor.held_out_error(&samples, &held_out).unwrap();
        assert!(error.p50 > 0.0 && error.p50 < 0.05 && error.p50 <= error.p90, "{error:?}");
        assert_eq!(error.num_points, held_out.len());
        assert!(advisor.unsureness(&[], &candidates).iter().all(|u| u.is_infinite()));
        assert!(advisor.held_out_error(&[], &held_out).is_none());
    }
}

//! What is in a bundle, in numbers: the data behind `plumb bundle inspect`.

use std::collections::{BTreeMap, BTreeSet};

use plumbline_schema::Operator;
use serde::Serialize;

use crate::{
    bundle::{Bundle, HOST, predictor_name},
    error::BundleError,
    host::HostCosts,
    predictor::HeldOutError,
    samples::{CacheState, Sample},
};

/// A bundle in numbers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// SHA-256 of the manifest, hex.
    pub digest: String,
    /// Version of the format, `major.minor`.
    pub format_version: String,
    /// Plumbline version that measured it.
    pub plumbline_version: String,
    /// When measuring began, RFC 3339.
    pub created: String,
    /// Plumbline's name of the GPU.
    pub gpu: String,
    /// The device as the driver names it; `None` for imported tables.
    pub device_name: Option<String>,
    /// Driver version; `None` when not known.
    pub driver_version: Option<String>,
    /// Models whose shapes were planned.
    pub models: Vec<String>,
    /// Points planned but not measured, in words.
    pub incomplete: Vec<String>,
    /// Notes of the evidence.
    pub notes: Vec<String>,
    /// Operators with samples or a predictor, in the order of the forward pass.
    pub operators: Vec<OperatorSummary>,
    /// Names of the engine profiles.
    pub engines: Vec<String>,
    /// Host costs; `None` when not measured.
    pub host: Option<HostCosts>,
}

/// One operator of a bundle in numbers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OperatorSummary {
    /// The operator.
    pub operator: Operator,
    /// Different shapes (for attention: different sets of sequences).
    pub num_points: usize,
    /// Rows measured cold.
    pub num_cold: usize,
    /// Rows measured hot.
    pub num_hot: usize,
    /// Rows with any flag.
    pub num_flagged: usize,
    /// Rows measured while clocks were held down.
    pub num_throttled: usize,
    /// Error of the predictor on held-out shapes; `None` when there is no predictor.
    pub error: Option<HeldOutError>,
    /// Least and largest value of each shape column; empty without samples.
    pub domain: BTreeMap<&'static str, (u64, u64)>,
}

impl Bundle {
    /// Summarises the bundle; reads and checks samples and host costs on the way.
    ///
    /// # Errors
    /// Those of reading the parts.
    pub fn inspect(&self) -> Result<Inspection, BundleError> {
        let manifest = &self.manifest;
        let device = manifest.device.as_ref();
        let mut operators = Vec::new();
        for operator in Operator::ALL {
            let has_samples = self.samples_file(operator).is_some();
            let samples = if has_samples { self.operator_samples(operator)? } else { Vec::new() };
            let has_predictor = manifest.files.contains_key(&predictor_name(operator));
            let error = if has_predictor { Some(self.predictor(operator)?.error) } else { None };
            if has_samples || has_predictor {
                operators.push(summarise(operator, &samples, error));
            }
        }
        Ok(Inspection {
            digest: self.digest().to_owned(),
            format_version: manifest.format_version.to_string(),
            plumbline_version: manifest.plumbline_version.clone(),
            created: manifest.created.clone(),
            gpu: manifest.gpu.name.clone(),
            device_name: device.map(|d| d.device_name.clone()),
            driver_version: device.and_then(|d| d.driver_version.clone()),
            models: manifest.models.clone(),
            incomplete: manifest.incomplete.clone(),
            notes: manifest.evidence.as_ref().map(|e| e.notes.clone()).unwrap_or_default(),
            operators,
            engines: self.engine_names().into_iter().map(str::to_owned).collect(),
            host: if manifest.files.contains_key(HOST) { Some(self.host()?) } else { None },
        })
    }
}

fn summarise(operator: Operator, samples: &[Sample], error: Option<HeldOutError>) -> OperatorSummary {
    let mut domain = BTreeMap::new();
    for sample in samples {
        for (&column, value) in operator.shape_columns().iter().zip(sample.shape.values()) {
            let (low, high) = domain.entry(column).or_insert((value, value));
            (*low, *high) = ((*low).min(value), (*high).max(value));
        }
    }
    let text = |s: &Sample| s.batch.as_ref().map(|b| (b.format_prefill_chunks(), b.format_decode_contexts()));
    let points: BTreeSet<_> = samples.iter().map(|s| (s.shape, text(s))).collect();
    let count = |test: &dyn Fn(&Sample) -> bool| samples.iter().filter(|s| test(s)).count();
    OperatorSummary {
        operator,
        num_points: points.len(),
        num_cold: count(&|s| s.cache == CacheState::Cold),
        num_hot: count(&|s| s.cache == CacheState::Hot),
        num_flagged: count(&|s| !s.flags.is_empty()),
        num_throttled: count(&|s| s.has_flag("throttled")),
        error,
        domain,
    }
}

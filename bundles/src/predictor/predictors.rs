//! The predictors of one GPU, asked for times.

use std::sync::{Arc, OnceLock};

use plumbline_schema::{GpuSpec, Operator, OperatorShape, operator::MAX_SHAPE_COLUMNS, roofline::floor_ns};

use super::{
    OperatorPredictor, OutOfDomain, PredictError, Prediction, Provenance, domain::Place, flat::FlatForest,
};
use crate::{
    evidence::SustainedSlowdown,
    features::{Row, batch_columns, shape_values},
};

/// Why predictors cannot be used together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PredictorsError {
    /// Two predictors of one operator.
    #[error("two predictors for operator `{operator}`")]
    Duplicate {
        /// The operator.
        operator: Operator,
    },
    /// A predictor that [`OperatorPredictor::check`] refuses.
    #[error("predictor for operator `{operator}`: {reason}")]
    Invalid {
        /// The operator.
        operator: Operator,
        /// What is wrong with it.
        reason: String,
    },
}

/// The predictors of one GPU.
#[derive(Clone, Debug)]
pub struct Predictors {
    gpu: GpuSpec,
    sustained: SustainedSlowdown,
    /// At the operator's place in [`Operator::ALL`].
    by_operator: Vec<Option<OperatorPredictor>>,
    /// The same place, made when first asked; `None` where a forest stays as it is. Matrix products share one.
    forests: Vec<OnceLock<Option<Arc<FlatForest>>>>,
}

impl Predictors {
    /// Checks and collects the predictors of `gpu`.
    ///
    /// # Errors
    /// When one is invalid or an operator has two.
    pub fn new(gpu: GpuSpec, predictors: Vec<OperatorPredictor>) -> Result<Self, PredictorsError> {
        let mut has_predictor = [false; Operator::ALL.len()];
        for predictor in &predictors {
            let operator = predictor.operator;
            predictor.check().map_err(|reason| PredictorsError::Invalid { operator, reason })?;
            if std::mem::replace(&mut has_predictor[operator as usize], true) {
                return Err(PredictorsError::Duplicate { operator });
            }
        }
        Ok(Self::of_checked(gpu, predictors))
    }

    /// Collects predictors of which each has passed [`OperatorPredictor::check`] and is the only one of its operator.
    pub(crate) fn of_checked(gpu: GpuSpec, predictors: Vec<OperatorPredictor>) -> Self {
        let mut by_operator: Vec<Option<OperatorPredictor>> = Operator::ALL.iter().map(|_| None).collect();
        for predictor in predictors {
            let place = predictor.operator as usize;
            by_operator[place] = Some(predictor);
        }
        let forests = by_operator.iter().map(|_| OnceLock::new()).collect();
        Self { gpu, sustained: SustainedSlowdown::default(), by_operator, forests }
    }

    /// The predictors of another GPU by its data sheet, as [`OperatorPredictor::carried_to`] says; every prediction is
    /// tagged [`Provenance::Transferred`].
    #[must_use]
    pub fn transferred_to(mut self, gpu: GpuSpec) -> Self {
        for predictor in self.by_operator.iter_mut().flatten() {
            *predictor = predictor.carried_to(&self.gpu, &gpu);
        }
        // Of the other GPU's nothing is known.
        Self { gpu, sustained: SustainedSlowdown::default(), ..self }
    }

    /// Tells what a lasting load takes on the GPU sampled; see [`Self::predict_in_step`].
    #[must_use]
    pub fn with_sustained(mut self, sustained: SustainedSlowdown) -> Self {
        self.sustained = sustained;
        self
    }

    /// Predicts the GPU time of one launch within an engine's steps.
    ///
    /// As [`Self::predict`], which answers for a launch in a burst, but for launches bound by arithmetic: in an engine they
    /// follow one another for as long as a step lasts, and the board's power limit lowers the clocks within a millisecond.
    /// Nothing is known of that on a GPU which times were [transferred to](Self::transferred_to).
    ///
    /// # Errors
    /// As [`Self::predict`].
    pub fn predict_in_step(
        &self,
        operator: Operator,
        shape: &OperatorShape,
        out_of_domain: OutOfDomain,
    ) -> Result<Prediction, PredictError> {
        let prediction = self.predict(operator, shape, out_of_domain)?;
        Ok(prediction.slowed(self.sustained.factor(operator, shape, &self.gpu)))
    }

    /// What a lasting load takes on this GPU.
    pub(super) fn sustained(&self) -> SustainedSlowdown {
        self.sustained
    }

    /// The GPU whose times are predicted.
    #[must_use]
    pub fn gpu(&self) -> &GpuSpec {
        &self.gpu
    }

    /// The operators that can be predicted, in the order of the forward pass.
    pub fn operators(&self) -> impl Iterator<Item = Operator> {
        self.by_operator.iter().flatten().map(|predictor| predictor.operator)
    }

    /// The predictor of an operator.
    #[must_use]
    pub fn get(&self, operator: Operator) -> Option<&OperatorPredictor> {
        self.by_operator[operator as usize].as_ref()
    }

    /// Predicts the GPU time of one launch.
    ///
    /// A shape that was measured gets its median time; every other one the model's.
    ///
    /// # Errors
    /// When the operator has no predictor, the shape is not one of its shapes or is empty, or (with
    /// [`OutOfDomain::Refuse`]) lies outside what was measured.
    pub fn predict(
        &self,
        operator: Operator,
        shape: &OperatorShape,
        out_of_domain: OutOfDomain,
    ) -> Result<Prediction, PredictError> {
        let predictor = self.get(operator).ok_or_else(|| self.missing(operator))?;
        let values = checked_values(operator, shape)?;
        let values = values.as_slice();
        let place = predictor.domain.place(operator, values);
        let floor_ns = floor_ns(shape, &self.gpu);
        let is_transferred = predictor.transferred_from.is_some();
        if let (Place::Measured(i), false) = (place, is_transferred) {
            let domain = &predictor.domain;
            return Ok(Prediction {
                time_ns: domain.time_ns[i].max(floor_ns),
                low_ns: domain.low_ns[i],
                high_ns: domain.high_ns[i],
                provenance: Provenance::Measured,
            });
        }
        if place == Place::Outside && out_of_domain == OutOfDomain::Refuse {
            return Err(predictor.domain.outside(operator, values));
        }
        let forest = |row: &[f32]| match self.flat_forest(operator) {
            Some(flat) => flat.predict(row),
            None => predictor.forest.predict(row),
        };
        let time_ns = predictor.predict_by(shape, &self.gpu, floor_ns, forest);
        let interval = predictor.interval_at(place);
        Ok(Prediction::within(time_ns, interval, floor_ns))
    }

    /// An operator's forest as it is walked.
    fn flat_forest(&self, operator: Operator) -> Option<&Arc<FlatForest>> {
        let make = || {
            let forest = &self.get(operator)?.forest;
            let before = self.by_operator[..operator as usize].iter().flatten();
            let mut products = before.filter(|other| operator.is_gemm() && other.operator.is_gemm());
            match products.find(|other| other.forest == *forest) {
                Some(other) => self.flat_forest(other.operator).cloned(),
                None => FlatForest::new(forest).map(Arc::new),
            }
        };
        self.forests[operator as usize].get_or_init(make).as_ref()
    }

    fn missing(&self, operator: Operator) -> PredictError {
        let names: Vec<_> = self.operators().map(Operator::name).collect();
        let available = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        let hint = if operator.is_collective() {
            "collectives need samples of several GPUs; use one GPU per replica".to_owned()
        } else {
            format!("profile `{operator}` on this GPU and train the bundle again")
        };
        PredictError::MissingOperator { operator, available, hint }
    }
}

/// The shape's numbers, if the shape is one of the operator's, not empty, and its work can be counted.
pub(super) fn checked_values(
    operator: Operator,
    shape: &OperatorShape,
) -> Result<Row<u64, MAX_SHAPE_COLUMNS>, PredictError> {
    let wrong = |expected: &str| PredictError::WrongShape {
        operator,
        expected: expected.to_owned(),
        found: format!("{shape:?}"),
    };
    let row = shape_values(operator, shape)
        .ok_or_else(|| wrong(&format!("a shape with {}", operator.shape_columns().join(", "))))?;
    let is_whole = match *shape {
        OperatorShape::Attention { load, .. } => {
            let is_consistent = |seqs: u32, tokens: u64| (seqs == 0) == (tokens == 0);
            load.num_tokens() > 0
                && is_consistent(load.num_prefill_seqs, load.num_prefill_tokens.into())
                && is_consistent(load.num_prefill_seqs, load.prefill_pairs)
                && is_consistent(load.num_prefill_seqs, load.prefill_kv_tokens)
                && is_consistent(load.num_decode_seqs, load.decode_kv_tokens)
                && is_consistent(load.num_decode_seqs, load.max_decode_kv_tokens.into())
                && row.as_slice()[..batch_columns(operator).start].iter().all(|&value| value > 0)
        }
        _ => row.as_slice().iter().all(|&value| value > 0),
    };
    if !is_whole {
        return Err(wrong("a launch with work to do"));
    }
    // FLOPs and bytes are counted in u64; 2^10 exceeds every constant factor in their formulas.
    let work: f64 = match *shape {
        OperatorShape::Attention { heads, load } => {
            let tokens =
                load.prefill_kv_tokens as f64 + f64::from(load.num_tokens()) + load.decode_kv_tokens as f64;
            let q_heads = f64::from(heads.num_q_heads.max(heads.num_kv_heads));
            q_heads * f64::from(heads.head_dim) * (load.prefill_pairs as f64 + tokens)
        }
        _ => row.as_slice().iter().map(|&value| value as f64).product(),
    };
    if work >= (1u64 << 53) as f64 {
        return Err(wrong("at most 2^53 elements of work"));
    }
    Ok(row)
}

//! Attention of chunks, alone or beside decodes, as a simulator asks for it: a step with chunks hardly ever comes twice.

use std::borrow::Cow;

use plumbline_schema::{AttentionLoad, Heads, Operator, OperatorShape};

use super::{
    OutOfDomain, Prediction, Predictors, decodes::is_countable, domain::Place, flat::FlatForest,
    predictors::checked_values,
};
use crate::features::{HEADS_FEATURES, Launches, joined, part_norm};

const ATTENTION: Operator = Operator::Attention;

/// Predicts chunks of one layout of heads; an answer is that of [`Predictors::predict_in_step`], bit for bit.
#[derive(Debug)]
pub(super) struct Chunks {
    heads: Heads,
    /// Features are of the GPU that was measured, parts of the baseline of the one that is asked about; `None` where the
    /// two are one.
    measured: Launches<'static>,
    asked: Option<Launches<'static>>,
    /// The fixed cost of a launch on the GPU that was measured.
    measured_overhead_ns: f64,
    overhead_ns: f64,
    coefficients: Vec<f64>,
    /// Without the nodes that ask for the heads.
    forest: FlatForest,
    /// Where a load is whose numbers all lie between the smallest and the largest measured.
    inside: Place,
    /// The number at [`KEY`] of each load that was measured, sorted: their answers are not the forest's.
    measured_keys: Vec<u64>,
}

/// Which number of a load tells whether it can be one that was measured: its pairs.
const KEY: usize = 6;

impl Chunks {
    /// `None` where the predictors themselves are to be asked.
    pub(super) fn new(predictors: &Predictors, heads: Heads) -> Option<Self> {
        let predictor = predictors.get(ATTENTION).filter(|_| is_countable(heads))?;
        let from = predictor.transferred_from.as_ref();
        let launches = |gpu| Launches::new(heads, Cow::Owned(Clone::clone(gpu)));
        let (measured, asked) = match from {
            Some(from) => (launches(&from.gpu), Some(launches(predictors.gpu()))),
            None => (launches(predictors.gpu()), None),
        };
        let measured_overhead_ns = predictor.measured_overhead_ns();
        let row = measured.launch(AttentionLoad::default()).features(measured_overhead_ns);
        let of_heads = HEADS_FEATURES.map(|feature| (feature as u16, row[feature]));
        let forest = predictor.forest.without(&of_heads.collect::<Vec<_>>());
        let own = [heads.num_q_heads, heads.num_kv_heads, heads.head_dim].map(u64::from);
        let rows = predictor.domain.shapes.chunks_exact(predictor.domain.columns.len());
        let rows = rows.filter(|values| from.is_none() && values.starts_with(&own));
        let mut measured_keys: Vec<u64> = rows.map(|values| values[KEY]).collect();
        measured_keys.sort_unstable();
        Some(Self {
            heads,
            measured,
            asked,
            measured_overhead_ns,
            overhead_ns: predictor.overhead_ns,
            coefficients: predictor.parts.iter().map(|part| part.coefficient).collect(),
            forest: FlatForest::new(&forest)?,
            inside: predictor.domain.place_inside(ATTENTION, &own),
            measured_keys,
        })
    }

    /// `None` for what must be asked of the predictors, refusals among them.
    pub(super) fn predict(
        &self,
        predictors: &Predictors,
        load: AttentionLoad,
        out_of_domain: OutOfDomain,
    ) -> Option<Prediction> {
        let predictor = predictors.get(ATTENTION)?;
        let shape = OperatorShape::Attention { heads: self.heads, load };
        let values = checked_values(ATTENTION, &shape).ok()?;
        let values = values.as_slice();
        if self.measured_keys.binary_search(&values[KEY]).is_ok() {
            return None;
        }
        let place = if predictor.domain.has_in_box(values) { self.inside } else { Place::Outside };
        if place == Place::Outside && out_of_domain == OutOfDomain::Refuse {
            return None;
        }
        let launch = self.measured.launch(load);
        let ln_ratio = self.forest.predict(&launch.features(self.measured_overhead_ns));
        let launch = self.asked.as_ref().map_or(launch, |asked| asked.launch(load));
        let weighted =
            self.coefficients.iter().zip(launch.parts_ns()).map(|(coefficient, ns)| coefficient * ns);
        let baseline_ns = self.overhead_ns + joined(weighted, part_norm(ATTENTION));
        let ratio = predictor.ratio(predictor.faded(ln_ratio, values));
        let floor_ns = launch.sides().floor_ns();
        let time_ns = (baseline_ns * ratio).max(floor_ns);
        let factor = predictors.sustained().factor(ATTENTION, &shape, predictors.gpu());
        Some(Prediction::within(time_ns, predictor.interval_at(place), floor_ns).slowed(factor))
    }
}

//! Attention of decodes alone, as a simulator asks for it step after step: no load comes twice, but the next one is near.

use std::borrow::Cow;

use plumbline_schema::{AttentionLoad, Heads, Operator, OperatorShape};

use super::{
    OperatorPredictor, OutOfDomain, Prediction, Predictors, Provenance, RatioRange,
    boxed::{Arguments, BoxedForest, Region},
    domain::Place,
};
use crate::features::{
    DECODE_FEATURES, DECODE_PARTS, Decode, Launches, batch_columns, feature_names, features, joined,
    part_norm, shape_values,
};

const ATTENTION: Operator = Operator::Attention;

/// Predicts decodes of one layout of heads; an answer is that of [`Predictors::predict_in_step`], bit for bit.
#[derive(Debug)]
pub(super) struct Decodes {
    heads: Heads,
    /// Features are of the GPU that was measured, parts of the baseline of the one that is asked about.
    measured: Launches<'static>,
    asked: Launches<'static>,
    is_transferred: bool,
    /// The fixed costs of a launch on the two.
    measured_overhead_ns: f64,
    overhead_ns: f64,
    /// Coefficients of [`DECODE_PARTS`].
    coefficients: [f64; DECODE_PARTS.len()],
    forest: BoxedForest,
    domain: LayoutDomain,
    /// Last used first.
    regions: Vec<(Region, Known)>,
    last: Option<Run>,
    /// Whether any load after the first of that run was asked for.
    is_continued: bool,
}

/// A load, how it is cut, and the numbers of its features.
#[derive(Clone, Copy, Debug)]
struct Asked {
    load: AttentionLoad,
    cuts: Cuts,
    arguments: Arguments,
}

/// Regions that are remembered: batches grow along a few of them, and come back to them.
const MAX_REGIONS: usize = 8;

/// What is known of all loads of a region.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// `ln(time / baseline)` by the forest.
    ln_ratio: f64,
    /// `time / baseline`, where it is the same all over the region.
    ratio: Option<f64>,
    is_outside: bool,
    interval: (Provenance, RatioRange),
}

/// Most steps of a run: far more than contexts usually grow until something changes.
const MAX_STEPS: f64 = 256.0;

/// A load and those that follow it while every context grows by a token a step, all in one region and cut alike.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: AttentionLoad,
    /// Loads after the first.
    num_steps: u32,
    cuts: Cuts,
    known: Known,
}

/// How the two GPUs cut a load.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cuts {
    measured: Decode,
    asked: Decode,
}

impl Run {
    /// Steps from the first load to another, where every context has grown by as many.
    #[inline]
    fn steps_to(&self, load: AttentionLoad) -> Option<u32> {
        let steps = load.max_decode_kv_tokens.checked_sub(self.first.max_decode_kv_tokens)?;
        let grown = u64::from(steps) * u64::from(load.num_decode_seqs);
        let is_on_the_way = load.num_decode_seqs == self.first.num_decode_seqs
            && load.decode_kv_tokens == self.first.decode_kv_tokens.wrapping_add(grown);
        is_on_the_way.then_some(steps)
    }
}

/// A load whose contexts have grown by some tokens each.
fn grown(load: AttentionLoad, steps: u32) -> AttentionLoad {
    AttentionLoad {
        decode_kv_tokens: load.decode_kv_tokens + u64::from(steps) * u64::from(load.num_decode_seqs),
        max_decode_kv_tokens: load.max_decode_kv_tokens.saturating_add(steps),
        ..load
    }
}

impl Decodes {
    /// `None` where decodes cannot be told apart by regions.
    pub(super) fn new(predictors: &Predictors, heads: Heads) -> Option<Self> {
        let predictor = predictors.get(ATTENTION)?;
        let domain = LayoutDomain::new(predictors, predictor, heads)?;
        let from = predictor.transferred_from.as_ref();
        let gpu = from.map_or(predictors.gpu(), |from| &from.gpu);
        let mut one = AttentionLoad::default();
        one.add_decode(0);
        let measured_overhead_ns = predictor.measured_overhead_ns();
        let row = features(&OperatorShape::Attention { heads, load: one }, gpu, measured_overhead_ns);
        Some(Self {
            heads,
            measured: Launches::new(heads, Cow::Owned(gpu.clone())),
            asked: Launches::new(heads, Cow::Owned(predictors.gpu().clone())),
            is_transferred: from.is_some(),
            measured_overhead_ns,
            overhead_ns: predictor.overhead_ns,
            coefficients: DECODE_PARTS.map(|place| predictor.parts[place].coefficient),
            forest: BoxedForest::new(&predictor.forest, row.as_slice())?,
            domain,
            regions: Vec::new(),
            last: None,
            is_continued: false,
        })
    }

    /// `None` for what must be asked of the predictors, refusals among them.
    #[inline]
    pub(super) fn predict(
        &mut self,
        predictors: &Predictors,
        load: AttentionLoad,
        out_of_domain: OutOfDomain,
    ) -> Option<Prediction> {
        let is_on_the_way = |run: &Run| run.steps_to(load).is_some_and(|steps| steps <= run.num_steps);
        if self.last.as_ref().is_some_and(is_on_the_way) {
            self.is_continued = true;
        } else {
            self.find(predictors, load)?;
        }
        self.answer(predictors, load, out_of_domain)
    }

    /// The last load's answer, or that of one on the way from it.
    #[inline]
    fn answer(
        &self,
        predictors: &Predictors,
        load: AttentionLoad,
        out_of_domain: OutOfDomain,
    ) -> Option<Prediction> {
        let Run { cuts, known, .. } = self.last.as_ref()?;
        if known.is_outside && out_of_domain == OutOfDomain::Refuse {
            return None;
        }
        let ratio = match known.ratio {
            Some(ratio) => ratio,
            None => self.faded_ratio(predictors.get(ATTENTION)?, load, known.ln_ratio)?,
        };
        let sides = self.asked.sides(load);
        let parts_ns = self.asked.parts_ns(load, &cuts.asked, sides);
        // The parts that are 0 change no sum.
        let weighted = self.coefficients.iter().zip(parts_ns).map(|(coefficient, ns)| coefficient * ns);
        let baseline_ns = self.overhead_ns + joined(weighted, part_norm(ATTENTION));
        let floor_ns = sides.floor_ns();
        Some(Prediction::within((baseline_ns * ratio).max(floor_ns), known.interval, floor_ns))
    }

    /// Time over baseline of a load that may lie beyond all that was measured.
    fn faded_ratio(&self, predictor: &OperatorPredictor, load: AttentionLoad, ln_ratio: f64) -> Option<f64> {
        let values = shape_values(ATTENTION, &OperatorShape::Attention { heads: self.heads, load })?;
        Some(predictor.ratio(predictor.faded(ln_ratio, values.as_slice())))
    }

    /// Looks for a load's region, or finds out about it, which takes several times as long.
    fn find(&mut self, predictors: &Predictors, load: AttentionLoad) -> Option<()> {
        let asked = self.ask(load)?;
        let region = self.regions.iter().position(|(region, _)| region.contains(&asked.arguments));
        let region = if let Some(region) = region {
            region
        } else {
            let known = self.discover(predictors.get(ATTENTION)?, &asked)?;
            self.regions.truncate(MAX_REGIONS - 1);
            self.regions.push(known);
            self.regions.len() - 1
        };
        self.follow(&asked, region);
        Some(())
    }

    /// Makes a load the last one. Where loads have followed one another of late, looks how far the next ones are like it;
    /// those of several replicas in turn do not.
    fn follow(&mut self, asked: &Asked, region: usize) {
        self.regions.swap(0, region);
        let ((region, known), cuts, load) = (&self.regions[0], asked.cuts, asked.load);
        let follows = self.last.as_ref().is_some_and(|run| run.steps_to(load) == Some(run.num_steps + 1));
        let mut num_steps = 0;
        if std::mem::take(&mut self.is_continued) || follows {
            let steps = |launches: &Launches<'_>, cut| launches.steps_of_cut(load, cut);
            let of_cuts = steps(&self.measured, &cuts.measured).min(steps(&self.asked, &cuts.asked));
            // Keys, their mean and the longest, which grow evenly, by their places among the arguments.
            let by = [(1, f64::from(load.num_decode_seqs)), (2, 1.0), (3, 1.0)];
            let room = by.map(|(place, by)| (region.at_most[place] - asked.arguments[place]) / by);
            num_steps = room.into_iter().fold(of_cuts, f64::min).clamp(0.0, MAX_STEPS) as u32;
        }
        // All that changes on the way, be it a number or a cut, goes one way: what is the same at both ends is the same
        // between them. Numbers are rounded on the way, but by less than the margin of regions.
        while num_steps > 0 {
            let end = self.ask(grown(load, num_steps)).filter(|end| end.cuts == cuts);
            let reach = end.map_or(0.5, |end| region.reach(&asked.arguments, &end.arguments));
            if end.is_some_and(|end| region.contains(&end.arguments)) {
                break;
            }
            num_steps = (num_steps - 1).min((reach * f64::from(num_steps)) as u32);
        }
        self.last = Some(Run { first: load, num_steps, cuts, known: *known });
    }

    /// `None` for loads that are empty or so large that their work could not be counted.
    fn ask(&self, load: AttentionLoad) -> Option<Asked> {
        let AttentionLoad { num_decode_seqs, decode_kv_tokens, max_decode_kv_tokens, .. } = load;
        let numbers = [num_decode_seqs.into(), decode_kv_tokens, max_decode_kv_tokens.into()];
        if !numbers.iter().zip(MAX_NUMBERS).all(|(number, max)| (1..=max).contains(number)) {
            return None;
        }
        let measured = self.measured.cut(load);
        let asked = if self.is_transferred { self.asked.cut(load) } else { measured };
        let sides = self.measured.sides(load);
        let arguments = self.measured.arguments(load, &measured, sides, self.measured_overhead_ns);
        Some(Asked { load, cuts: Cuts { measured, asked }, arguments })
    }

    fn discover(&self, predictor: &OperatorPredictor, asked: &Asked) -> Option<(Region, Known)> {
        let (ln_ratio, mut region) = self.forest.predict(&asked.arguments)?;
        let (place, is_between) = self.domain.narrow(&asked.arguments, &mut region);
        let ratio = self.faded_ratio(predictor, asked.load, ln_ratio)?;
        let known = Known {
            ln_ratio,
            ratio: is_between.then_some(ratio),
            is_outside: place == Place::Outside,
            interval: predictor.interval_at(place),
        };
        region.contains(&asked.arguments).then_some((region, known))
    }
}

/// What was measured, as decodes of one layout see it.
#[derive(Debug)]
struct LayoutDomain {
    /// Where a load is whose numbers all lie between the smallest and the largest measured.
    inside: Place,
    /// Whether loads without chunks lie there.
    has_decodes: bool,
    /// Place among the arguments, smallest and largest measured of each of [`NUMBERS`].
    ranges: [(usize, f64, f64); NUMBERS.len()],
    /// Keys of the decodes that were measured, sorted: their answers are not the forest's.
    measured_keys: Vec<f64>,
    /// Place of arithmetic over memory time, and up to what ratio a lasting load takes nothing.
    most_unslowed: (usize, f64),
}

/// Numbers of a load of decodes: their columns of the shape, and features.
const NUMBERS: [(usize, &str); 3] =
    [(7, "ln_decode_seqs"), (8, "ln_decode_kv_tokens"), (9, "ln_max_decode_kv_tokens")];
/// Numbers up to here, with as many elements of a query as [`MAX_WIDTH`], are never too much work to be counted.
const MAX_NUMBERS: [u64; NUMBERS.len()] = [1 << 20, 1 << 32, 1 << 31];
const MAX_WIDTH: u64 = 1 << 20;

/// Whether there are heads, and no more than work can be counted for.
pub(super) fn is_countable(heads: Heads) -> bool {
    let has_heads = heads.num_q_heads > 0 && heads.num_kv_heads > 0 && heads.head_dim > 0;
    has_heads && heads.q_width().max(heads.kv_width()) <= MAX_WIDTH
}

/// Place of a feature's number among the arguments.
fn place_of(name: &str) -> usize {
    let is_named = |&feature: &usize| feature_names(ATTENTION)[feature] == name;
    DECODE_FEATURES.iter().position(is_named).expect("a feature of decodes")
}

impl LayoutDomain {
    /// `None` where answers do not follow from regions alone.
    fn new(predictors: &Predictors, predictor: &OperatorPredictor, heads: Heads) -> Option<Self> {
        let (domain, gpu) = (&predictor.domain, predictors.gpu());
        let own = [heads.num_q_heads, heads.num_kv_heads, heads.head_dim].map(u64::from);
        let factor = predictors.sustained().attention;
        let is_transferred = predictor.transferred_from.is_some();
        let is_slowed = (factor - 1.0).abs() > 0.0;
        if !is_countable(heads) || (is_slowed && is_transferred) {
            return None;
        }
        let batch = batch_columns(ATTENTION);
        let is_of_decodes =
            |values: &&[u64]| values[batch.start..NUMBERS[0].0].iter().all(|&value| value == 0);
        let rows = domain.shapes.chunks_exact(domain.columns.len());
        let rows = rows.filter(|values| !is_transferred && values.starts_with(&own));
        let mut measured_keys: Vec<f64> =
            rows.filter(is_of_decodes).map(|values| values[NUMBERS[1].0] as f64).collect();
        measured_keys.sort_by(f64::total_cmp);
        // The margin is far above any rounding.
        let headroom = f64::from(gpu.max_clock_mhz) / f64::from(gpu.boost_clock_mhz);
        let most = if is_slowed { (1.0 - 1e-9) / headroom } else { f64::INFINITY };
        Some(Self {
            inside: domain.place_inside(ATTENTION, &own),
            has_decodes: is_of_decodes(&domain.min.as_slice()),
            ranges: NUMBERS
                .map(|(column, name)| (place_of(name), domain.min[column] as f64, domain.max[column] as f64)),
            measured_keys,
            most_unslowed: (place_of("ln_compute_over_memory"), most),
        })
    }

    /// Narrows a region around a load so that all of it lies at the same place, which is returned with whether all
    /// numbers are between measured ones. A load that may have been measured is in no region.
    fn narrow(&self, arguments: &Arguments, region: &mut Region) -> (Place, bool) {
        let mut is_between = self.has_decodes;
        for ((place, least, most), max) in self.ranges.into_iter().zip(MAX_NUMBERS) {
            region.narrow(place, 0.5, max as f64);
            // Numbers are whole.
            let (below_least, most) = (least - 0.5, most + 0.5);
            if arguments[place] < below_least {
                region.narrow(place, f64::NEG_INFINITY, below_least);
            } else if arguments[place] > most {
                region.narrow(place, most, f64::INFINITY);
            } else {
                region.narrow(place, below_least, most);
                continue;
            }
            is_between = false;
        }
        let (keys, ..) = self.ranges[1];
        let next = self.measured_keys.partition_point(|&measured| measured < arguments[keys]);
        let below = next.checked_sub(1).map_or(f64::NEG_INFINITY, |i| self.measured_keys[i]);
        let above = self.measured_keys.get(next).map_or(f64::INFINITY, |&measured| measured - 0.5);
        region.narrow(keys, below, above);
        let (place, most) = self.most_unslowed;
        region.narrow(place, f64::NEG_INFINITY, most);
        (if is_between { self.inside } else { Place::Outside }, is_between)
    }
}

#[cfg(test)]
mod tests;

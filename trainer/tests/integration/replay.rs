//! A profile that was already measured, measured again in another order: what would it have known at which time?

use std::collections::BTreeSet;

use plumbline_bundles::{Bundle, CurveError, CurvePoint, Sample};
use plumbline_profiler::{Device, Envelope, FakeDevice, Plan, Point, StoppingRule, choose};
use plumbline_schema::{GpuSpec, ModelSpec, Operator, roofline::roofline_ns};
use plumbline_trainer::{
    advise::{Advice, AdviceOptions},
    dataset,
};
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;

/// One point in so many of each operator is held out.
const HELD_OUT_ONE_IN: usize = 6;
/// But at least so many, as far as there are.
const MIN_HELD_OUT: usize = 6;

/// How the next points are picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// In the order of the plan.
    InOrder,
    /// At random.
    Random,
    /// At random, operators taking turns: as evenly as errors are counted, but blind to shapes.
    Turns,
    /// As the advisor and the choice do; the first round knows nothing.
    Advised,
    /// As that, but taking every point as equally unsure: spread alone.
    Spread,
}

impl Strategy {
    pub const fn name(self) -> &'static str {
        match self {
            Self::InOrder => "in order",
            Self::Random => "random",
            Self::Turns => "random, operators in turn",
            Self::Spread => "spread",
            Self::Advised => "advised",
        }
    }
}

/// Samples to pick from, in the order of a plan.
pub struct Pool {
    pub gpu: GpuSpec,
    pub samples: Vec<Sample>,
}

impl Pool {
    /// What the shipped bundle of the H100 was measured at, in the state that predictors are trained on.
    pub fn h100() -> Self {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../bundles/data/h100-sxm5-80gb");
        let bundle = Bundle::open(root.as_ref()).expect("a shipped bundle");
        let plan: Plan = bundle.read_payload_json("plan.json", "a plan").expect("a shipped plan");
        let samples = bundle.samples().expect("shipped samples");
        let sets = dataset::collect(&samples).expect("sound samples");
        let is_used = |sample: &&Sample| {
            sets.iter().any(|set| set.operator == sample.operator && set.cache == sample.cache)
        };
        let used: Vec<&Sample> = samples.iter().filter(is_used).collect();
        let measured = plan.points.iter().filter_map(|planned| {
            let Point { operator, shape, batch } = &planned.point;
            let is_it = |s: &&&Sample| {
                s.operator == *operator && s.shape == *shape && s.cache == planned.cache && s.batch == *batch
            };
            used.iter().find(is_it).map(|sample| (*sample).clone())
        });
        Self { gpu: bundle.manifest.gpu.clone(), samples: unique(measured.collect()) }
    }

    /// The shipped models' points on the fake device, whose law is known.
    pub fn fake(seed: u64) -> Self {
        let models: Vec<ModelSpec> = ModelSpec::shipped_names()
            .into_iter()
            .map(|name| ModelSpec::load(name).expect("a shipped model"))
            .collect();
        let plan = Plan::new(&models, &Envelope::default()).expect("whole models");
        Self::of_plan(&plan, seed)
    }

    /// A plan's points on the fake device.
    pub fn of_plan(plan: &Plan, seed: u64) -> Self {
        let mut device = FakeDevice::new(seed);
        let in_model = plan
            .points
            .iter()
            .filter(|p| p.cache == plumbline_bundles::CacheState::in_model(p.point.operator));
        let samples = in_model
            .map(|planned| {
                let rule = StoppingRule::default();
                let measurement =
                    device.measure(&planned.point, planned.cache, &rule).expect("a device without faults");
                measurement.into_sample(&planned.point, planned.cache)
            })
            .collect();
        Self { gpu: FakeDevice::gpu_spec(), samples: unique(samples) }
    }

    /// About what a profile takes for a point, s: those bound by the tensor cores wait for the clocks to recover.
    pub fn cost_s(&self, sample: &Sample) -> f64 {
        let is_matrix_work = sample.operator.is_gemm() || sample.operator == Operator::Attention;
        let memory_ns = sample.shape.bytes().0 as f64 / self.gpu.hbm_bandwidth_bytes_per_s * 1e9;
        if is_matrix_work && roofline_ns(&sample.shape, &self.gpu) > memory_ns { 0.1 } else { 0.03 }
    }

    /// What everything takes, s.
    pub fn total_s(&self) -> f64 {
        self.samples.iter().map(|sample| self.cost_s(sample)).sum()
    }
}

/// Samples without those whose shape came before: a shape is one row of training.
fn unique(samples: Vec<Sample>) -> Vec<Sample> {
    let mut seen = BTreeSet::new();
    samples.into_iter().filter(|sample| seen.insert((sample.operator, sample.shape.values()))).collect()
}

/// A pool in the middle of being measured.
struct Replay<'a> {
    pool: &'a Pool,
    /// What the blind strategies follow.
    order: Vec<usize>,
    known: Vec<usize>,
    is_open: Vec<bool>,
    elapsed_s: f64,
}

impl Replay<'_> {
    fn take(&mut self, i: usize) {
        self.is_open[i] = false;
        self.known.push(i);
        self.elapsed_s += self.pool.cost_s(&self.pool.samples[i]);
    }

    fn samples(&self) -> Vec<Sample> {
        self.known.iter().map(|&i| self.pool.samples[i].clone()).collect()
    }

    fn follow_order(&mut self, until_s: f64) {
        for i in self.order.clone() {
            if self.is_open[i] && self.elapsed_s + self.pool.cost_s(&self.pool.samples[i]) <= until_s {
                self.take(i);
            }
        }
    }

    fn ask(&mut self, until_s: f64, is_blind: bool, options: &AdviceOptions) {
        let open: Vec<usize> = (0..self.is_open.len()).filter(|&i| self.is_open[i]).collect();
        let sample = |&i: &usize| &self.pool.samples[i];
        let points: Vec<Point> = open
            .iter()
            .map(sample)
            .map(|s| Point { operator: s.operator, shape: s.shape, batch: s.batch.clone() })
            .collect();
        let shapes: Vec<_> = points.iter().map(|point| (point.operator, point.shape)).collect();
        let unsure = if is_blind {
            vec![1.0; shapes.len()]
        } else {
            Advice::new(&self.samples(), &self.pool.gpu, options).unsureness(&shapes)
        };
        let costs: Vec<f64> = open.iter().map(sample).map(|s| self.pool.cost_s(s) * 1e9).collect();
        for i in choose(&unsure, &points, &costs, (until_s - self.elapsed_s) * 1e9) {
            self.take(open[i]);
        }
    }
}

/// What was known at a time.
#[derive(Clone, Debug)]
pub struct Look {
    pub point: CurvePoint,
    /// Of each operator that could be judged: points measured, and mean absolute relative error at held-out ones.
    pub operators: Vec<(Operator, usize, f64)>,
}

/// The curve of a strategy: the error when each of `looks` (shares of the time of the whole pool, ascending) is spent.
///
/// What is held out is drawn by the seed and never measured.
pub fn replay(pool: &Pool, strategy: Strategy, seed: u64, looks: &[f64]) -> Vec<Look> {
    let options = AdviceOptions { seed, ..AdviceOptions::default() };
    let shuffled = shuffled(pool.samples.len(), seed);
    let held_out = held_out(pool, &shuffled);
    let judged: Vec<Sample> = held_out.iter().map(|&i| pool.samples[i].clone()).collect();
    let order = match strategy {
        Strategy::InOrder => (0..pool.samples.len()).collect(),
        Strategy::Turns => {
            let open: Vec<usize> = shuffled.iter().copied().filter(|i| !held_out.contains(i)).collect();
            in_turn(pool, &open)
        }
        _ => shuffled,
    };
    let is_open = (0..pool.samples.len()).map(|i| !held_out.contains(&i)).collect();
    let mut run = Replay { pool, order, known: Vec::new(), is_open, elapsed_s: 0.0 };
    let mut curve = Vec::new();
    for look in looks {
        let until_s = look * pool.total_s();
        match strategy {
            Strategy::Advised | Strategy::Spread => run.ask(until_s, strategy == Strategy::Spread, &options),
            _ => run.follow_order(until_s),
        }
        let advice = Advice::new(&run.samples(), &pool.gpu, &options);
        if let Some(error) = advice.held_out_error(&judged) {
            let point = CurvePoint { elapsed_s: run.elapsed_s, num_samples: run.known.len(), error };
            let operators = advice.held_out_errors(&judged).into_iter().map(|(operator, errors)| {
                let mean = errors.iter().sum::<f64>() / errors.len() as f64;
                (operator, of_operator(pool, &run.known, operator).len(), mean)
            });
            curve.push(Look { point, operators: operators.collect() });
        }
    }
    curve
}

fn shuffled(n: usize, seed: u64) -> Vec<usize> {
    let mut rng = Pcg64::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
    }
    order
}

fn of_operator(pool: &Pool, order: &[usize], operator: Operator) -> Vec<usize> {
    order.iter().copied().filter(|&i| pool.samples[i].operator == operator).collect()
}

fn held_out(pool: &Pool, order: &[usize]) -> BTreeSet<usize> {
    let of = |operator| {
        let own = of_operator(pool, order, operator);
        let count = (own.len() / HELD_OUT_ONE_IN).max(MIN_HELD_OUT).min(own.len());
        own[..count].to_vec()
    };
    Operator::ALL.into_iter().flat_map(of).collect()
}

fn in_turn(pool: &Pool, order: &[usize]) -> Vec<usize> {
    let mut ranked: Vec<(usize, usize)> = Operator::ALL
        .into_iter()
        .flat_map(|operator| of_operator(pool, order, operator).into_iter().enumerate().collect::<Vec<_>>())
        .collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, i)| i).collect()
}

/// The mean of curves of different seeds, look by look.
pub fn mean(curves: &[Vec<Look>]) -> Vec<CurvePoint> {
    let looks = curves.iter().map(Vec::len).min().unwrap_or(0);
    let of = |look: usize| {
        let mean = |of: &dyn Fn(&CurvePoint) -> f64| {
            curves.iter().map(|curve| of(&curve[look].point)).sum::<f64>() / curves.len() as f64
        };
        CurvePoint {
            elapsed_s: mean(&|point| point.elapsed_s),
            num_samples: mean(&|point| point.num_samples as f64).round() as usize,
            error: CurveError {
                p50: mean(&|point| point.error.p50),
                p90: mean(&|point| point.error.p90),
                worst_operator_p50: mean(&|point| point.error.worst_operator_p50),
                num_points: curves[0][look].point.error.num_points,
            },
        }
    };
    (0..looks).map(of).collect()
}

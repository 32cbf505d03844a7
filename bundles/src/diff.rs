//! Two profiles compared: has a machine drifted, or is it noise?
//!
//! Points are paired by operator, shape, sequences and cache state; what is compared is the logarithm of their ratio
//! B / A, so that swapping A and B gives the mirror image. Read [`Verdict`] first, then [`statistics`] for the interval
//! and the test, [`points`] for the statistics file.

pub mod clusters;
pub mod machine;
pub mod points;
pub mod statistics;

use std::path::Path;

use plumbline_schema::Operator;
use rand_pcg::Pcg64;
use serde::Serialize;

pub use self::{
    clusters::{Grouping, MIN_CLUSTERS},
    machine::{Difference, Machine},
    points::{PointKey, PointStats, read_stats, write_stats},
};
use crate::{bundle::Bundle, error::BundleError, samples::CacheState};

/// A median ratio from `1 / SAME_RATIO` to `SAME_RATIO` is no change worth a name.
pub const SAME_RATIO: f64 = 1.02;

/// Largest corrected p-value of a drift.
pub const ALPHA: f64 = 0.05;

/// How many of the points that moved most are listed.
const NUM_MOVED: usize = 10;

/// A share of points within 5 % below which an operator with the same median still gets a remark.
const MOST: f64 = 0.9;

/// What became of one operator from A to B.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The interval of the median ratio lies inside 2 % of 1.
    Same,
    /// Drift: the median ratio is below `1 / 1.02`, its interval excludes 1, and the corrected p-value is below 5 %.
    Faster,
    /// Drift the other way.
    Slower,
    /// Cannot tell: too few points, or an interval too wide.
    Noisy,
    /// No point in common.
    Missing,
}

impl Verdict {
    /// The name in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Faster => "faster",
            Self::Slower => "slower",
            Self::Noisy => "noisy",
            Self::Missing => "missing",
        }
    }

    /// Whether this is drift.
    #[must_use]
    pub const fn is_drift(self) -> bool {
        matches!(self, Self::Faster | Self::Slower)
    }
}

/// What became of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Overall {
    /// Every operator of either side is the same.
    Same,
    /// At least one operator drifted.
    Drift,
    /// None drifted as far as can be told, and of at least one it cannot be told.
    Unclear,
}

/// One side of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Side {
    /// The path, for people.
    pub name: String,
    /// Points, each once, in the order of their keys.
    pub points: Vec<PointStats>,
    /// The machine; `None` for a statistics file.
    pub machine: Option<Machine>,
}

impl Side {
    /// Opens a bundle folder, or a statistics file when the name ends in `.csv` or `.csv.zst`.
    ///
    /// # Errors
    /// Those of opening a bundle and reading its samples and host costs, or of [`read_stats`].
    pub fn open(path: &Path) -> Result<Self, BundleError> {
        let name = path.display().to_string();
        if is_stats_file(path) {
            return Ok(Self { name, points: read_stats(path)?, machine: None });
        }
        let bundle = Bundle::open(path)?;
        let points = points::from_samples(&bundle.samples()?);
        Ok(Self { name, points, machine: Some(Machine::of(&bundle)?) })
    }
}

/// Whether a name is one of a statistics file and not of a bundle folder.
#[must_use]
pub fn is_stats_file(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    [".csv", ".csv.zst"].iter().any(|ending| name.ends_with(ending))
}

/// The common points of one operator in numbers. Ratios are B / A.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Median ratio of the points' median times.
    pub ratio: f64,
    /// Lower end of its 95 % interval.
    pub ratio_low: f64,
    /// Upper end.
    pub ratio_high: f64,
    /// Share (0..=1) of points with a ratio from `1 / 1.02` to `1.02`.
    pub share_within_2_pct: f64,
    /// The same for 5 %.
    pub share_within_5_pct: f64,
    /// The same for 10 %.
    pub share_within_10_pct: f64,
    /// What counts as one observation in interval and test.
    pub clustered_by: Grouping,
    /// Observations.
    pub num_clusters: usize,
    /// p-value of the signed-rank test on the clusters' medians.
    pub p_value: f64,
    /// The same, corrected for testing every operator (Holm).
    pub p_value_corrected: f64,
    /// How far points scatter between the two profiles: robust standard deviation of the ratios' logarithms.
    pub between_run_sigma: f64,
    /// How far they would scatter by what was seen within each profile: median over points of the expected standard
    /// deviation. Placement in memory, clocks and the choice of algorithm come on top of it between profiles.
    pub within_run_sigma: f64,
    /// Median ratio of the SM clocks; `None` when not known.
    pub sm_clock_ratio: Option<f64>,
    /// Points that ran another kernel or library algorithm.
    pub num_kernel_changed: usize,
}

/// One operator compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OperatorDiff {
    /// The operator.
    pub operator: Operator,
    /// What became of it.
    pub verdict: Verdict,
    /// Why it cannot be told, or what the verdict hides; `None` when there is nothing to say.
    pub remark: Option<String>,
    /// Points of both sides.
    pub num_common: usize,
    /// Points of A alone.
    pub num_only_a: usize,
    /// Points of B alone.
    pub num_only_b: usize,
    /// The common points; `None` when there are none.
    pub comparison: Option<Comparison>,
}

/// A point that moved.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MovedPoint {
    /// The operator.
    pub operator: Operator,
    /// The shape, as `m=1 n=4096 k=1024`; zeros are left out.
    pub shape: String,
    /// Cold or hot.
    pub cache: CacheState,
    /// Median time in A, ns.
    pub p50_a_ns: f64,
    /// Median time in B, ns.
    pub p50_b_ns: f64,
    /// B / A.
    pub ratio: f64,
    /// SM clock in A, MHz; `None` when not known.
    pub sm_clock_a_mhz: Option<u32>,
    /// SM clock in B, MHz; `None` when not known.
    pub sm_clock_b_mhz: Option<u32>,
    /// What ran in A and in B, where both are known and differ.
    pub kernels: Option<[String; 2]>,
}

/// Two profiles compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BundleDiff {
    /// Path of A.
    pub a: String,
    /// Path of B.
    pub b: String,
    /// What became of the machine.
    pub verdict: Overall,
    /// Operators of either side, in the order of the forward pass.
    pub operators: Vec<OperatorDiff>,
    /// What differs between the machines and their states.
    pub differences: Vec<Difference>,
    /// What the times may have changed by, in words.
    pub notes: Vec<String>,
    /// The points that moved most, the farthest first.
    pub moved: Vec<MovedPoint>,
}

/// A point of both sides.
#[derive(Clone, Copy)]
struct Pair<'a> {
    a: &'a PointStats,
    b: &'a PointStats,
}

impl Pair<'_> {
    /// Logarithm of B / A; swapping the sides flips its sign exactly.
    fn log_ratio(&self) -> f64 {
        self.b.p50_ns.ln() - self.a.p50_ns.ln()
    }

    fn sm_clocks(&self) -> Option<(f64, f64)> {
        let known = |mhz: Option<u32>| mhz.filter(|mhz| *mhz > 0).map(f64::from);
        known(self.a.sm_clock_mhz).zip(known(self.b.sm_clock_mhz))
    }

    fn is_kernel_changed(&self) -> bool {
        let (a, b) = (&self.a.kernel, &self.b.kernel);
        !a.is_empty() && !b.is_empty() && a != b
    }
}

impl BundleDiff {
    /// Compares A with B; `seed` draws the resamples of the intervals.
    #[must_use]
    pub fn between(a: &Side, b: &Side, seed: u64) -> Self {
        let pairs = pair(a, b);
        let mut operators: Vec<_> =
            Operator::ALL.into_iter().filter_map(|o| compare_operator(o, a, b, &pairs, seed)).collect();
        judge_all(&mut operators);
        let verdict = overall(&operators);
        let mut differences = machine::differences(a, b);
        differences.splice(0..0, clock_difference(&pairs));
        let mut notes = machine::attributions(a, b, &differences);
        notes.extend(notes_on_points(&pairs));
        if verdict == Overall::Drift && notes.is_empty() {
            notes.push("times changed, and nothing that is recorded of the machines explains it".into());
        }
        let (a, b) = (a.name.clone(), b.name.clone());
        Self { a, b, verdict, operators, differences, notes, moved: moved(pairs) }
    }

    /// The operator's comparison; `None` when neither side has it.
    #[must_use]
    pub fn operator(&self, operator: Operator) -> Option<&OperatorDiff> {
        self.operators.iter().find(|o| o.operator == operator)
    }
}

/// The points of both sides, in the order of their keys.
fn pair<'a>(a: &'a Side, b: &'a Side) -> Vec<Pair<'a>> {
    let find = |key: &PointKey| b.points.binary_search_by(|p| p.key.cmp(key)).ok().map(|i| &b.points[i]);
    a.points.iter().filter_map(|a| find(&a.key).map(|b| Pair { a, b })).collect()
}

fn compare_operator(
    operator: Operator,
    a: &Side,
    b: &Side,
    pairs: &[Pair],
    seed: u64,
) -> Option<OperatorDiff> {
    let count = |side: &Side| side.points.iter().filter(|p| p.key.operator == operator).count();
    let (num_a, num_b) = (count(a), count(b));
    let pairs: Vec<_> = pairs.iter().copied().filter(|p| p.a.key.operator == operator).collect();
    (num_a + num_b > 0).then(|| OperatorDiff {
        operator,
        verdict: Verdict::Missing,
        remark: None,
        num_common: pairs.len(),
        num_only_a: num_a - pairs.len(),
        num_only_b: num_b - pairs.len(),
        comparison: (!pairs.is_empty()).then(|| compare(operator, &pairs, seed)),
    })
}

fn compare(operator: Operator, pairs: &[Pair], seed: u64) -> Comparison {
    let logs: Vec<_> = pairs.iter().map(Pair::log_ratio).collect();
    let keys: Vec<_> = pairs.iter().map(|p| &p.a.key).collect();
    let (clustered_by, clusters, num_clusters) = clusters::group(&keys);
    // Each operator has its own stream, so that one more leaves the others' intervals alone.
    let mut rng = Pcg64::new(seed.into(), operator as u128);
    let (low, high) = statistics::bootstrap_median(&logs, &clusters, &mut rng);
    let mut members = vec![Vec::new(); num_clusters];
    for (&log, &cluster) in logs.iter().zip(&clusters) {
        members[cluster].push(log);
    }
    let cluster_medians: Vec<_> = members.iter().map(|logs| statistics::median(logs)).collect();
    let p_value = statistics::signed_rank_p(&cluster_medians);
    let share_within = |ratio: f64| {
        let is_within = |log: &&f64| log.abs() <= ratio.ln();
        logs.iter().filter(is_within).count() as f64 / logs.len() as f64
    };
    let expected: Vec<_> = pairs.iter().map(|p| p.a.relative_error().hypot(p.b.relative_error())).collect();
    let clocks: Vec<_> = pairs.iter().filter_map(Pair::sm_clocks).map(|(a, b)| b / a).collect();
    Comparison {
        ratio: statistics::median(&logs).exp(),
        ratio_low: low.exp(),
        ratio_high: high.exp(),
        share_within_2_pct: share_within(1.02),
        share_within_5_pct: share_within(1.05),
        share_within_10_pct: share_within(1.10),
        clustered_by,
        num_clusters,
        p_value,
        p_value_corrected: p_value,
        between_run_sigma: statistics::robust_sigma(&logs),
        within_run_sigma: statistics::median(&expected),
        sm_clock_ratio: (!clocks.is_empty()).then(|| statistics::median(&clocks)),
        num_kernel_changed: pairs.iter().filter(|p| p.is_kernel_changed()).count(),
    }
}

/// Corrects the p-values over the operators that can be judged, and judges each.
fn judge_all(operators: &mut [OperatorDiff]) {
    let mut judged: Vec<_> = operators
        .iter_mut()
        .filter_map(|o| o.comparison.as_mut())
        .filter(|c| c.num_clusters >= MIN_CLUSTERS)
        .collect();
    let corrected = statistics::holm(&judged.iter().map(|c| c.p_value).collect::<Vec<_>>());
    for (comparison, p) in judged.iter_mut().zip(corrected) {
        comparison.p_value_corrected = p;
    }
    for operator in operators {
        (operator.verdict, operator.remark) = match &operator.comparison {
            Some(comparison) => judge(comparison),
            None => (Verdict::Missing, Some("no point in common".into())),
        };
    }
}

fn judge(c: &Comparison) -> (Verdict, Option<String>) {
    let percent = |ratio: f64| format!("{:+.1} %", 100.0 * (ratio - 1.0));
    let same = 1.0 / SAME_RATIO..=SAME_RATIO;
    if c.num_clusters < MIN_CLUSTERS {
        let text = format!("{} different shapes in common, {MIN_CLUSTERS} needed", c.num_clusters);
        return (Verdict::Noisy, Some(text));
    }
    if same.contains(&c.ratio_low) && same.contains(&c.ratio_high) {
        let share = 100.0 * (1.0 - c.share_within_5_pct);
        let remark = format!("{share:.0} % of the points moved by more than 5 %, the median did not");
        return (Verdict::Same, (c.share_within_5_pct < MOST).then_some(remark));
    }
    let interval = format!("{} to {}", percent(c.ratio_low), percent(c.ratio_high));
    let excludes_one = c.ratio_low > 1.0 || c.ratio_high < 1.0;
    if same.contains(&c.ratio) || !excludes_one {
        return (Verdict::Noisy, Some(format!("the interval, {interval}, allows both drift and none")));
    }
    if c.p_value_corrected >= ALPHA {
        let text = format!("{interval}, but too few groups of points agree (p = {:.2})", c.p_value_corrected);
        return (Verdict::Noisy, Some(text));
    }
    (if c.ratio > 1.0 { Verdict::Slower } else { Verdict::Faster }, None)
}

fn overall(operators: &[OperatorDiff]) -> Overall {
    if operators.iter().any(|o| o.verdict.is_drift()) {
        Overall::Drift
    } else if !operators.is_empty() && operators.iter().all(|o| o.verdict == Verdict::Same) {
        Overall::Same
    } else {
        Overall::Unclear
    }
}

/// Median SM clock of the common points, if it differs.
fn clock_difference(pairs: &[Pair]) -> Option<Difference> {
    let (a, b): (Vec<_>, Vec<_>) = pairs.iter().filter_map(Pair::sm_clocks).unzip();
    let (a, b) = (statistics::median(&a), statistics::median(&b));
    machine::number_difference("median_sm_clock_mhz", a, b)
}

/// What the common points themselves say about why times changed.
fn notes_on_points(pairs: &[Pair]) -> Vec<String> {
    let mut notes = Vec::new();
    let clocks: Vec<_> = pairs.iter().filter_map(Pair::sm_clocks).collect();
    let changes = clocks.iter().map(|(a, b)| b / a - 1.0);
    let moved: Vec<_> = changes.filter(|change| change.abs() > 0.01).collect();
    if !moved.is_empty() {
        let change = 100.0 * statistics::median(&moved);
        notes.push(format!(
            "SM clocks of {} of {} common points differ by more than 1 % (median {change:+.1} %): what computes takes \
             longer at a lower clock",
            moved.len(),
            clocks.len()
        ));
    }
    let num_changed = pairs.iter().filter(|p| p.is_kernel_changed()).count();
    if num_changed > 0 {
        let num_pairs = pairs.len();
        notes.push(format!(
            "{num_changed} of {num_pairs} common points ran another kernel or library algorithm"
        ));
    }
    notes
}

fn moved(mut pairs: Vec<Pair>) -> Vec<MovedPoint> {
    // Stable: points that moved as far stay in the order of their keys, whichever side is A.
    pairs.sort_by(|x, y| y.log_ratio().abs().total_cmp(&x.log_ratio().abs()));
    pairs.retain(|pair| pair.log_ratio() != 0.0);
    pairs.truncate(NUM_MOVED);
    pairs.iter().map(moved_point).collect()
}

fn moved_point(pair: &Pair) -> MovedPoint {
    let key = &pair.a.key;
    let columns = key.operator.shape_columns().iter().zip(key.shape.values());
    let shape: Vec<_> = columns.filter(|(_, v)| *v != 0).map(|(name, v)| format!("{name}={v}")).collect();
    MovedPoint {
        operator: key.operator,
        shape: shape.join(" "),
        cache: key.cache,
        p50_a_ns: pair.a.p50_ns,
        p50_b_ns: pair.b.p50_ns,
        ratio: pair.log_ratio().exp(),
        sm_clock_a_mhz: pair.a.sm_clock_mhz,
        sm_clock_b_mhz: pair.b.sm_clock_mhz,
        kernels: pair.is_kernel_changed().then(|| [pair.a.kernel.clone(), pair.b.kernel.clone()]),
    }
}

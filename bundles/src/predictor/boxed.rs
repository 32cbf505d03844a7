//! A forest over the numbers whose logarithms it was fitted on, which tells how far its answer holds.

use super::flat::FlatForest;
use crate::{
    features::{DECODE_FEATURES, SCALES, Scale},
    forest::{Forest, Node, Tree},
};

/// Numbers that launches of decodes alone differ in.
const WIDTH: usize = DECODE_FEATURES.len();
/// The numbers themselves, as [`Launches::arguments`](crate::features::Launches::arguments) orders them.
pub(super) type Arguments = [f64; WIDTH];

/// Most leaves and nodes of the trees that are left, 2 MB in all; a file may say anything.
const MAX_LEAVES: usize = 1 << 14;
const MAX_NODES: usize = 2 * MAX_LEAVES;

/// What a forest answers for decodes of the same heads: its trees without the nodes that all of these pass on the same
/// side, and with thresholds of the numbers rather than of their logarithms.
#[derive(Debug)]
pub(super) struct BoxedForest {
    flat: FlatForest,
    /// The leaf at each place of `flat`, as its place in `bounds`; anything at inner nodes.
    leaves: Vec<u16>,
    bounds: Vec<Ranks>,
    limits: Limits,
}

/// [`Bounds`] as their places in [`Limits`], which take half of the room: those of a leaf lie in a cache line, and the
/// processor compares twice as many at once.
type Ranks = [i16; 2 * HALF];
/// All that each of [`Bounds`] may be, sorted.
type Limits = [Vec<f32>; 2 * HALF];

/// Where a leaf answers: what each number must be above, and what its negative must not be below.
///
/// One half after the other, so that the bounds of several leaves are the largest of each; halves are as long as suits
/// the processor.
type Bounds = [f32; 2 * HALF];
const HALF: usize = WIDTH.next_multiple_of(8);

/// Numbers for which a forest surely gives the same answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Region {
    /// What each number is above.
    pub(super) above: Arguments,
    /// What each number is at most.
    pub(super) at_most: Arguments,
}

impl Region {
    #[inline]
    pub(super) fn contains(&self, arguments: &Arguments) -> bool {
        let bounds = self.above.iter().zip(&self.at_most);
        // Counted, so that there is no branch for each number.
        let held =
            |(x, (above, at_most)): (&f64, (&f64, &f64))| u64::from(above < x) + u64::from(x <= at_most);
        arguments.iter().zip(bounds).map(held).sum::<u64>() == 2 * WIDTH as u64
    }

    /// How far the way from one load's numbers to another's leads through the region, 0..=1: as if each changed evenly.
    pub(super) fn reach(&self, from: &Arguments, to: &Arguments) -> f64 {
        let bounds = self.above.iter().zip(&self.at_most);
        let reaches = from.iter().zip(to).zip(bounds).map(|((&from, &to), (&above, &at_most))| {
            if to > at_most {
                (at_most - from) / (to - from)
            } else if to <= above {
                (from - above) / (from - to)
            } else {
                1.0
            }
        });
        reaches.fold(1.0, f64::min)
    }

    /// Narrows the range of a number.
    pub(super) fn narrow(&mut self, place: usize, above: f64, at_most: f64) {
        self.above[place] = self.above[place].max(above);
        self.at_most[place] = self.at_most[place].min(at_most);
    }
}

impl BoxedForest {
    /// `row` holds the features of any launch of decodes of the heads. `None` where too much is left of the forest.
    pub(super) fn new(forest: &Forest, row: &[f32]) -> Option<Self> {
        let limits = [(); 2 * HALF].map(|()| vec![f32::NEG_INFINITY]);
        let mut pruned = Pruned { trees: Vec::new(), leaves: Vec::new(), bounds: Vec::new(), limits };
        for tree in &forest.trees {
            pruned.push(tree, row)?;
        }
        let Pruned { trees, leaves, bounds, mut limits } = pruned;
        for limits in &mut limits {
            limits.sort_unstable_by(f32::total_cmp);
            limits.dedup();
        }
        let rank = |i: usize, bound: f32| {
            let rank = limits[i].partition_point(|limit| *limit < bound);
            i16::try_from(rank).expect("no more limits than inner nodes, fewer than MAX_LEAVES")
        };
        let bounds = bounds.iter().map(|bounds| std::array::from_fn(|i| rank(i, bounds[i]))).collect();
        let flat = FlatForest::new(&Forest { num_features: WIDTH, trees })?;
        Some(Self { flat, leaves, bounds, limits })
    }

    /// The forest's answer, bit for bit, and where it is the same; `None` where numbers lie so near to a threshold that
    /// only their logarithms tell.
    pub(super) fn predict(&self, arguments: &Arguments) -> Option<(f64, Region)> {
        let mut all: Ranks = [0; 2 * HALF];
        let value =
            self.flat.predict_noting(&arguments.map(|x| x as f32), |leaves| self.narrow(&mut all, leaves));
        let limit = |i: usize| f64::from(self.limits[i][all[i] as usize]);
        let region =
            Region { above: std::array::from_fn(limit), at_most: std::array::from_fn(|i| -limit(HALF + i)) };
        region.contains(arguments).then_some((value, region))
    }
}

impl BoxedForest {
    /// Narrows bounds by those of leaves.
    ///
    /// Where it is inlined, compilers see that some of the ranks are never asked for, and leave the vectors that all of them
    /// fill.
    #[inline(never)]
    fn narrow(&self, all: &mut Ranks, leaves: &[u32]) {
        for &leaf in leaves {
            let bounds = &self.bounds[usize::from(self.leaves[leaf as usize])];
            for (all, &rank) in all.iter_mut().zip(bounds) {
                *all = (*all).max(rank);
            }
        }
    }
}

/// Trees as they are pruned, one after another.
struct Pruned {
    trees: Vec<Tree>,
    leaves: Vec<u16>,
    bounds: Vec<Bounds>,
    limits: Limits,
}

impl Pruned {
    fn push(&mut self, tree: &Tree, row: &[f32]) -> Option<()> {
        let start = self.leaves.len();
        let mut nodes = vec![Node::default()];
        // From what node of the tree a new one is made, and where it answers.
        let mut open = vec![(0usize, 0usize, [f32::NEG_INFINITY; 2 * HALF])];
        while let Some((new, old, bounds)) = open.pop() {
            let mut node = &tree.nodes[old];
            let varying = loop {
                if node.left == 0 {
                    break None;
                }
                let feature = usize::from(node.feature);
                if let Some(place) = DECODE_FEATURES.iter().position(|&other| other == feature) {
                    break Some(place);
                }
                let go_right = row[feature] > node.threshold;
                node = &tree.nodes[node.left as usize + usize::from(go_right)];
            };
            let Some(place) = varying else {
                nodes[new] = Node { threshold: node.threshold, left: 0, feature: 0 };
                self.leaves.resize(start + nodes.len(), 0);
                self.leaves[start + new] = self.bounds.len() as u16;
                self.bounds.push(bounds);
                continue;
            };
            let (low, high) = limits(SCALES[usize::from(node.feature)], node.threshold);
            self.limits[place].push(high);
            self.limits[HALF + place].push(-low);
            let (mut left, mut right) = (bounds, bounds);
            right[place] = right[place].max(high);
            left[HALF + place] = left[HALF + place].max(-low);
            let child = nodes.len();
            nodes.extend([Node::default(); 2]);
            nodes[new] = Node { threshold: low, left: child as u32, feature: place as u16 };
            let old = node.left as usize;
            open.extend([(child + 1, old + 1, right), (child, old, left)]);
            if self.bounds.len() + open.len() > MAX_LEAVES || start + nodes.len() > MAX_NODES {
                return None;
            }
        }
        self.leaves.resize(start + nodes.len(), 0);
        self.trees.push(Tree { nodes });
        Some(())
    }
}

/// Share of a number that is far above any rounding on the way to its logarithm, which is 710 at most, and back.
const MARGIN: f64 = 1e-11;

/// What a number is at most when its feature surely is at most the threshold, and what it is above when its feature surely
/// is above.
///
/// Between the two are the numbers whose logarithm may be rounded to either side, and [`MARGIN`] around them.
fn limits(scale: Scale, threshold: f32) -> (f32, f32) {
    let (last, next) = (f64::from(threshold), f64::from(threshold.next_up()));
    let inverse: fn(f64) -> f64 = match scale {
        Scale::Plain => return (threshold, threshold.next_up()),
        Scale::Ln => f64::exp,
        Scale::Ln1p => f64::exp_m1,
    };
    let (low, high) = (inverse(last), inverse(next));
    // Numbers below 1e-30 have its logarithm; and no number is above the largest.
    let low = if scale == Scale::Ln && low < 2e-30 { f64::NEG_INFINITY } else { low.min(f64::MAX) };
    let (low, high) = (low - MARGIN * low.abs(), high + MARGIN * high.abs());
    let (low_bits, high_bits) = (low as f32, high as f32);
    (
        if f64::from(low_bits) > low { low_bits.next_down() } else { low_bits },
        if f64::from(high_bits) < high { high_bits.next_up() } else { high_bits },
    )
}

#[cfg(test)]
mod tests {
    use plumbline_schema::{AttentionLoad, GpuSpec, Heads, OperatorShape};
    use proptest::prelude::*;

    use super::*;
    use crate::features::{Launches, features};

    fn scale() -> impl Strategy<Value = Scale> {
        prop::sample::select(vec![Scale::Ln, Scale::Ln1p, Scale::Plain])
    }

    proptest! {
        /// Whatever the threshold, and however near to it a number lies.
        #[test]
        fn limits_are_on_the_threshold_s_two_sides(
            scale in scale(),
            threshold in prop_oneof![-80.0..80.0f32, -1e-3..1e-3f32, Just(0.0), Just(-0.0), any::<f32>()],
            steps in -4..=4i64,
            far in 0.0..1e6f64,
        ) {
            prop_assume!(threshold.is_finite());
            let (low, high) = limits(scale, threshold);
            prop_assert!(low <= high);
            let inverse = match scale {
                Scale::Ln => f64::from(threshold).exp(),
                Scale::Ln1p => f64::from(threshold).exp_m1(),
                Scale::Plain => threshold.into(),
            };
            for base in [f64::from(low), f64::from(high), inverse, far] {
                let x = (0..steps.abs()).fold(base, |x, _| if steps < 0 { x.next_down() } else { x.next_up() });
                if x >= 0.0 && x.is_finite() {
                    let is_above = scale.of(x) > threshold;
                    prop_assert!(x > f64::from(low) || !is_above, "{} {}: {}", low, high, x);
                    prop_assert!(x <= f64::from(high) || is_above, "{} {}: {}", low, high, x);
                }
            }
        }
    }

    const OVERHEAD_NS: f64 = 1500.0;
    const HEADS: Heads = Heads { num_q_heads: 32, num_kv_heads: 8, head_dim: 128 };

    fn load() -> impl Strategy<Value = AttentionLoad> {
        let few = prop::collection::vec(prop_oneof![0..60u32, 0..5000u32], 1..6);
        let alike = (0..3000u32, 1..300usize).prop_map(|(context, len)| vec![context; len]);
        prop_oneof![few, alike].prop_map(|contexts| {
            let mut load = AttentionLoad::default();
            for context in contexts {
                load.add_decode(context);
            }
            load
        })
    }

    fn row(gpu: &GpuSpec, load: AttentionLoad) -> Vec<f32> {
        features(&OperatorShape::Attention { heads: HEADS, load }, gpu, OVERHEAD_NS).as_slice().to_vec()
    }

    proptest! {
        /// Trees whose thresholds are features of the very loads that are asked, or next to them.
        #[test]
        fn answers_are_those_of_the_forest_all_over_their_region(
            loads in prop::collection::vec(load(), 2..30),
            trees in prop::collection::vec(prop::collection::vec((0..32u16, any::<prop::sample::Index>(), -1..=1i8), 1..12), 1..20),
        ) {
            let gpu = GpuSpec::by_name("h100-sxm5-80gb").unwrap();
            let rows: Vec<_> = loads.iter().map(|&load| row(&gpu, load)).collect();
            let grow = |steps: Vec<(u16, prop::sample::Index, i8)>| {
                let mut nodes = vec![Node::default()];
                for (i, (feature, which, step)) in steps.into_iter().enumerate() {
                    let x = which.get(&rows)[usize::from(feature)];
                    let threshold = [x.next_down(), x, x.next_up()][(step + 1) as usize];
                    let leaf = |value: usize| Node { threshold: value as f32 * 0.1, left: 0, feature: u16::MAX };
                    let left = nodes.len();
                    nodes.extend([leaf(left), leaf(left + 1)]);
                    nodes[i] = Node { threshold, left: left as u32, feature };
                }
                Tree { nodes }
            };
            let forest = Forest { num_features: 32, trees: trees.into_iter().map(grow).collect() };
            prop_assert_eq!(forest.check(), Ok(()));
            let boxed = BoxedForest::new(&forest, &rows[0]).unwrap();
            let launches = Launches::new(HEADS, std::borrow::Cow::Borrowed(&gpu));
            let arguments = |load| {
                launches.arguments(load, &launches.cut(load), launches.sides(load), OVERHEAD_NS)
            };
            for &load in &loads {
                let Some((value, region)) = boxed.predict(&arguments(load)) else { continue };
                prop_assert!(region.contains(&arguments(load)));
                for (&other, row) in loads.iter().zip(&rows).filter(|(other, _)| region.contains(&arguments(**other))) {
                    prop_assert_eq!(value.to_bits(), forest.predict(row).to_bits(), "{:?} {:?}", load, other);
                }
            }
        }
    }

    #[test]
    fn a_forest_of_paths_that_meet_again_is_left_as_it_is() {
        // Each node's children are both the next pair, so that there are 2^40 paths.
        let pair = |left: u32| [Node { threshold: 1.0, left, feature: 9 }; 2];
        let mut nodes = vec![pair(1)[0]];
        (0..40).for_each(|i| nodes.extend(pair(3 + 2 * i)));
        nodes.extend([Node::default(); 2]);
        let forest = Forest { num_features: 32, trees: vec![Tree { nodes }] };
        assert_eq!(forest.check(), Ok(()));
        assert!(BoxedForest::new(&forest, &[0.0; 32]).is_none());
    }
}

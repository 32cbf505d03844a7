//! A forest as predictions walk it: small nodes, all in one array, and a walk without branches.

use crate::forest::{Forest, Tree};

/// Answers as [`Forest::predict`], bit for bit, in less than half of its time.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct FlatForest {
    nodes: Vec<FlatNode>,
    groups: Vec<Group>,
    num_trees: usize,
}

/// Half a node of [`Forest`]: eight lie in a cache line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FlatNode {
    /// Inner node: [`key`] of the threshold. Leaf: the bits of its value.
    threshold: u32,
    /// Left child, right child being the next, above a byte that names the feature. A leaf is its own left child, with
    /// a feature that no threshold is below.
    link: u32,
}

/// Trees that are walked together.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    /// Of the trees, and of any tree beyond the last.
    roots: [u32; TOGETHER],
    num_trees: usize,
    /// Steps to the deepest leaf.
    depth: u32,
}

/// A step waits for its node, so walks take turns. Eight fit in the registers; twice as many are quicker only where a
/// forest is far too large for the first-level cache, as that of matrix products is, whose answers are asked once.
const TOGETHER: usize = 8;
/// Leaves' feature; rows have 0 there, which is above nothing.
const NO_FEATURE: u16 = 63;
const MAX_NODES: usize = 1 << 24;
/// Trees that [`Forest::predict`] sums up at a time: another order would round to other bits.
const SUMMED: usize = 8;

impl FlatForest {
    /// `None` where the forest, which [`Forest::check`] must have passed, has more nodes or features than a link names.
    pub(super) fn new(forest: &Forest) -> Option<Self> {
        let num_nodes: usize = forest.trees.iter().map(|tree| tree.nodes.len()).sum();
        if num_nodes > MAX_NODES || forest.num_features > usize::from(NO_FEATURE) {
            return None;
        }
        let mut flat =
            Self { nodes: Vec::with_capacity(num_nodes), groups: Vec::new(), num_trees: forest.trees.len() };
        for trees in forest.trees.chunks(TOGETHER) {
            let mut group = Group { roots: [0; TOGETHER], num_trees: trees.len(), depth: 0 };
            for (root, tree) in group.roots.iter_mut().zip(trees) {
                *root = flat.nodes.len() as u32;
                group.depth = group.depth.max(depth(tree));
                flat.push(tree);
            }
            flat.groups.push(group);
        }
        Some(flat)
    }

    fn push(&mut self, tree: &Tree) {
        let start = self.nodes.len();
        self.nodes.extend(tree.nodes.iter().enumerate().map(|(i, node)| {
            let is_leaf = node.left == 0;
            let left = start + if is_leaf { i } else { node.left as usize };
            let feature = if is_leaf { NO_FEATURE } else { node.feature };
            let threshold = if is_leaf { node.threshold.to_bits() } else { key(node.threshold) };
            FlatNode { threshold, link: (left as u32) << 8 | u32::from(feature) }
        }));
    }

    /// The mean of the trees' values for a row of the forest's features.
    pub(super) fn predict(&self, x: &[f32]) -> f64 {
        self.predict_noting(x, |_| ())
    }

    /// [`Self::predict`]; `note` is told all trees' leaves, some at a time, by their places among the nodes of all trees.
    #[inline]
    pub(super) fn predict_noting(&self, x: &[f32], mut note: impl FnMut(&[u32])) -> f64 {
        let mut row = [0; NO_FEATURE as usize + 1];
        row.iter_mut().zip(x).for_each(|(key_of_x, &x)| *key_of_x = key(x));
        // As `Iterator::sum` starts.
        let (mut sum, mut rest) = (-0.0, -0.0);
        for group in &self.groups {
            let mut places = group.roots;
            for _ in 0..group.depth {
                for place in &mut places {
                    let node = self.nodes[*place as usize];
                    let go_right = row[(node.link as u16 & NO_FEATURE) as usize] > node.threshold;
                    *place = (node.link >> 8) + u32::from(go_right);
                }
            }
            let values = places.map(|place| f64::from(f32::from_bits(self.nodes[place as usize].threshold)));
            note(&places[..group.num_trees]);
            for values in values[..group.num_trees].chunks(SUMMED) {
                let part = values.iter().sum::<f64>();
                if values.len() == SUMMED { sum += part } else { rest = part }
            }
        }
        (sum + rest) / self.num_trees as f64
    }
}

/// Steps from the root to the deepest leaf; children lie behind their parent.
fn depth(tree: &Tree) -> u32 {
    let mut depths = vec![0; tree.nodes.len()];
    for (i, node) in tree.nodes.iter().enumerate().filter(|(_, node)| node.left != 0) {
        let (left, below) = (node.left as usize, depths[i] + 1);
        depths[left..left + 2].fill(below);
    }
    depths.into_iter().max().unwrap_or(0)
}

/// A whole number that is larger where the number is: comparing those takes fewer instructions. 0 for what is no number,
/// which is above no threshold either.
fn key(x: f32) -> u32 {
    // Adding 0 makes one of the two zeros.
    let bits = (x + 0.0).to_bits();
    match bits >> 31 {
        _ if x.is_nan() => 0,
        0 => bits | 1 << 31,
        _ => !bits,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::forest::Node;

    /// Numbers of which many are alike, so that rows hit thresholds.
    fn number() -> impl Strategy<Value = f32> {
        let few = [0.0, -0.0, 1.0, -1.0, 0.5, f32::MIN_POSITIVE, f32::MAX, f32::MIN, 1e-40, -1e-40];
        prop_oneof![prop::sample::select(few.to_vec()), -3.0..3.0f32]
    }

    /// Any row's number, thresholds' and what is not finite.
    fn asked() -> impl Strategy<Value = f32> {
        prop_oneof![8 => number(), 1 => prop::sample::select(vec![f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY])]
    }

    /// A tree grown from its root: each number splits the oldest leaf or leaves it.
    fn tree(num_features: u16) -> impl Strategy<Value = Tree> {
        let step = (any::<bool>(), 0..num_features, number());
        (prop::collection::vec(step, 0..60), number()).prop_map(|(steps, value)| {
            let mut nodes = vec![Node { threshold: value, ..Node::default() }];
            for (i, (splits, feature, threshold)) in steps.into_iter().enumerate() {
                if i < nodes.len() && (splits || i == 0) {
                    let left = nodes.len() as u32;
                    let leaf = |threshold| Node { threshold, left: 0, feature: u16::MAX };
                    nodes.extend([leaf(threshold * 0.3), leaf(threshold * 0.7)]);
                    nodes[i] = Node { threshold, left, feature };
                }
            }
            Tree { nodes }
        })
    }

    proptest! {
        #[test]
        fn a_flat_forest_answers_the_same_bits(
            trees in prop::collection::vec(tree(7), 1..50),
            rows in prop::collection::vec(prop::collection::vec(asked(), 7), 1..20),
        ) {
            let forest = Forest { num_features: 7, trees };
            prop_assert_eq!(forest.check(), Ok(()));
            let flat = FlatForest::new(&forest).unwrap();
            for row in rows {
                prop_assert_eq!(flat.predict(&row).to_bits(), forest.predict(&row).to_bits(), "{:?}", row);
            }
        }

        #[test]
        fn keys_are_in_the_order_of_their_numbers(x in asked(), threshold in number()) {
            prop_assert_eq!(key(x) > key(threshold), x > threshold);
        }
    }

    #[test]
    fn a_forest_with_more_features_than_a_link_names_stays_as_it_is() {
        let forest =
            |num_features| Forest { num_features, trees: vec![Tree { nodes: vec![Node::default()] }] };
        assert!(FlatForest::new(&forest(63)).is_some());
        assert!(FlatForest::new(&forest(64)).is_none());
    }
}

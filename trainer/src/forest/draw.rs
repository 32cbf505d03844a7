//! Random choices: which rows a tree sees and which features a node tries.

use rand::Rng;
use rand_pcg::Pcg64;

/// A number below `bound`, at most 2^32; by multiplication, whose bias of `bound / 2^64` does not matter here.
fn below(number: u64, bound: usize) -> usize {
    ((u128::from(number) * bound as u128) >> 64) as usize
}

/// The generator of a tree's bootstrap; it depends on the seed and the tree's index alone.
fn of_tree(seed: u64, tree: usize) -> Pcg64 {
    // The generator's second argument picks one of its distinct sequences.
    Pcg64::new(u128::from(seed) | ((tree as u128) << 64), tree as u128)
}

/// Draws rows with replacement, counting how often each was drawn, and returns the seed of the tree's root.
pub(super) fn bootstrap(seed: u64, tree: usize, num_draws: usize, drawn: &mut [u32]) -> NodeSeed {
    let mut rng = of_tree(seed, tree);
    let root = NodeSeed(rng.next_u64());
    drawn.fill(0);
    for _ in 0..num_draws {
        drawn[below(rng.next_u64(), drawn.len())] += 1;
    }
    root
}

/// The seed of a tree's root when all rows are used.
pub(super) fn without_bootstrap(seed: u64, tree: usize) -> NodeSeed {
    NodeSeed(of_tree(seed, tree).next_u64())
}

/// Seed of a node's choice of features.
///
/// It follows from the way from the root, so nodes may be grown in any order.
#[derive(Clone, Copy, Debug)]
pub(super) struct NodeSeed(u64);

/// `SplitMix64`'s output function, Steele, Lea and Flood (2014), "Fast splittable pseudorandom number generators".
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `SplitMix64`'s step: 2^64 divided by the golden ratio, made odd.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

impl NodeSeed {
    /// Seeds of the left and the right child.
    pub(super) fn children(self) -> (Self, Self) {
        (Self(mix(self.0.wrapping_add(STEP))), Self(mix(self.0.wrapping_add(STEP.wrapping_mul(2)))))
    }

    /// Moves the `i`th of the features to try to place `i`: one of those from there on, each as likely.
    pub(super) fn choose(self, i: usize, features: &mut [u16]) -> u16 {
        let rest = features.len() - i;
        if rest > 1 {
            // Behind the two steps of the children.
            let number = mix(self.0.wrapping_add(STEP.wrapping_mul(3 + i as u64)));
            features.swap(i, i + below(number, rest));
        }
        features[i]
    }
}

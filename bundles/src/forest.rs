//! A regression forest's shape and prediction; fitting it is the trainer's.

use serde::{Deserialize, Serialize};

/// One regression tree as flat arrays; node 0 is the root.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tree {
    /// Feature compared at each node; ignored at leaves.
    pub feature: Vec<u16>,
    /// Inner node: go left when `x[feature] <= threshold`. Leaf: the value.
    pub threshold: Vec<f32>,
    /// Left child of an inner node, right child being the next one; 0 at leaves.
    pub left: Vec<u32>,
}

/// A regression forest: the mean of its trees.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Forest {
    /// Number of features a row has.
    pub num_features: usize,
    /// The trees, at least one.
    pub trees: Vec<Tree>,
}

impl Tree {
    /// The value of the leaf that `x` falls into.
    #[must_use]
    pub fn predict(&self, x: &[f32]) -> f32 {
        let mut node = 0usize;
        loop {
            let left = self.left[node] as usize;
            if left == 0 {
                return self.threshold[node];
            }
            let go_right = x[self.feature[node] as usize] > self.threshold[node];
            node = left + usize::from(go_right);
        }
    }
}

impl Forest {
    /// The mean of the trees' values for a row of `num_features`.
    ///
    /// # Panics
    /// When the row is shorter than `num_features`; [`Self::check`] guards everything else.
    #[must_use]
    pub fn predict(&self, x: &[f32]) -> f64 {
        let sum: f64 = self.trees.iter().map(|tree| f64::from(tree.predict(x))).sum();
        sum / self.trees.len() as f64
    }

    /// Checks that every prediction ends inside the arrays; call it on anything read from a file.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self) -> Result<(), String> {
        if self.trees.is_empty() {
            return Err("a forest without trees".into());
        }
        for (t, tree) in self.trees.iter().enumerate() {
            let n = tree.left.len();
            if n == 0 || tree.feature.len() != n || tree.threshold.len() != n {
                return Err(format!(
                    "tree {t} with arrays of {n}, {} and {}",
                    tree.feature.len(),
                    tree.threshold.len()
                ));
            }
            for node in 0..n {
                let left = tree.left[node] as usize;
                // Children lie behind their parent, so a walk always ends.
                if left != 0 && (left <= node || left + 1 >= n) {
                    return Err(format!("tree {t}, node {node} with child {left} of {n}"));
                }
                if left != 0 && usize::from(tree.feature[node]) >= self.num_features {
                    return Err(format!("tree {t}, node {node} with feature {}", tree.feature[node]));
                }
                if !tree.threshold[node].is_finite() {
                    return Err(format!("tree {t}, node {node} with a value that is not finite"));
                }
            }
        }
        Ok(())
    }
}

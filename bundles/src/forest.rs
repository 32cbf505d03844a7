//! A regression forest's shape and prediction; fitting it is the trainer's.

use serde::{Deserialize, Serialize};

/// A node of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Node {
    /// Inner node: go left when `x[feature] <= threshold`. Leaf: the value.
    pub threshold: f32,
    /// Left child of an inner node, right child being the next one; 0 at leaves.
    pub left: u32,
    /// Feature compared; ignored at leaves.
    pub feature: u16,
}

/// One regression tree; node 0 is the root.
///
/// Nodes lie together in memory, since a prediction looks at all of a node or at nothing of it; in files a tree
/// is three arrays, [`TreeColumns`], which are a third as long.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "TreeColumns", into = "TreeColumns")]
pub struct Tree {
    /// The nodes.
    pub nodes: Vec<Node>,
}

/// A tree as files hold it; the fields are those of [`Node`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TreeColumns {
    feature: Vec<u16>,
    threshold: Vec<f32>,
    left: Vec<u32>,
}

impl TryFrom<TreeColumns> for Tree {
    type Error = String;

    fn try_from(columns: TreeColumns) -> Result<Self, String> {
        let TreeColumns { feature, threshold, left } = columns;
        if feature.len() != threshold.len() || left.len() != threshold.len() {
            let (f, t, l) = (feature.len(), threshold.len(), left.len());
            return Err(format!("expected arrays of one length, found {f}, {t} and {l}"));
        }
        let rows = feature.into_iter().zip(threshold).zip(left);
        Ok(Self {
            nodes: rows.map(|((feature, threshold), left)| Node { threshold, left, feature }).collect(),
        })
    }
}

impl From<Tree> for TreeColumns {
    fn from(tree: Tree) -> Self {
        Self {
            feature: tree.nodes.iter().map(|node| node.feature).collect(),
            threshold: tree.nodes.iter().map(|node| node.threshold).collect(),
            left: tree.nodes.iter().map(|node| node.left).collect(),
        }
    }
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
    /// See [`Forest::without`].
    fn without(&self, known: &[(u16, f32)]) -> Self {
        // Where a walk that comes to a node is asked next.
        let asked_next = |mut place: usize| {
            loop {
                let node = &self.nodes[place];
                let value = known.iter().find(|(feature, _)| *feature == node.feature);
                match value {
                    Some((_, x)) if node.left != 0 => {
                        place = node.left as usize + usize::from(*x > node.threshold);
                    }
                    _ => break *node,
                }
            }
        };
        // Children lie behind their parent, so one pass finds all that are left, and their order stays.
        let mut is_left = vec![false; self.nodes.len()];
        is_left[0] = true;
        let mut nodes = Vec::new();
        let mut places = Vec::with_capacity(self.nodes.len());
        for place in 0..self.nodes.len() {
            places.push(nodes.len() as u32);
            if is_left[place] {
                let node = asked_next(place);
                nodes.push(node);
                if node.left != 0 {
                    is_left[node.left as usize..][..2].fill(true);
                }
            }
        }
        for node in &mut nodes {
            node.left = places[node.left as usize];
        }
        Self { nodes }
    }

    /// The value of the leaf that `x` falls into.
    #[must_use]
    pub fn predict(&self, x: &[f32]) -> f32 {
        let mut node = &self.nodes[0];
        while node.left != 0 {
            let go_right = x[usize::from(node.feature)] > node.threshold;
            node = &self.nodes[node.left as usize + usize::from(go_right)];
        }
        node.threshold
    }

    /// Answers some rows of `records`, of `width` features each; `answer` is told the place in `rows` and the value.
    ///
    /// Rows are walked a few at once, which is faster than one after another.
    pub fn predict_each(
        &self,
        records: &[f32],
        width: usize,
        rows: &[u32],
        mut answer: impl FnMut(usize, f32),
    ) {
        const ROWS: usize = 4;
        let nodes = self.nodes.as_slice();
        for (group, rows) in rows.chunks(ROWS).enumerate() {
            let mut starts = [0; ROWS];
            starts.iter_mut().zip(rows).for_each(|(start, &row)| *start = row as usize * width);
            let mut places = [0usize; ROWS];
            let mut is_done = false;
            while !is_done {
                is_done = true;
                for (place, start) in places.iter_mut().zip(starts) {
                    let node = &nodes[*place];
                    // A leaf's feature is any number that its file says.
                    let value = records.get(start + usize::from(node.feature)).copied().unwrap_or(0.0);
                    let child = node.left as usize + usize::from(value > node.threshold);
                    *place = if node.left == 0 { *place } else { child };
                    is_done &= node.left == 0;
                }
            }
            for (i, &place) in places[..rows.len()].iter().enumerate() {
                answer(ROWS * group + i, nodes[place].threshold);
            }
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
        assert!(x.len() >= self.num_features, "{} features of {}", x.len(), self.num_features);
        let groups = self.trees.chunks_exact(TOGETHER);
        let rest: f64 = groups.remainder().iter().map(|tree| f64::from(tree.predict(x))).sum();
        let sum: f64 = groups.map(|trees| walk_together(trees, x)).sum();
        (sum + rest) / self.trees.len() as f64
    }

    /// The forest as rows see it that have these values of some features: without the nodes that compare them. It
    /// answers such rows as this one does; this one must have passed [`Self::check`].
    pub(crate) fn without(&self, known: &[(u16, f32)]) -> Self {
        let trees = self.trees.iter().map(|tree| tree.without(known)).collect();
        Self { num_features: self.num_features, trees }
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
            let n = tree.nodes.len();
            if n == 0 {
                return Err(format!("tree {t} without nodes"));
            }
            for (i, node) in tree.nodes.iter().enumerate() {
                let left = node.left as usize;
                // Children lie behind their parent, so a walk always ends.
                if left != 0 && (left <= i || left + 1 >= n) {
                    return Err(format!("tree {t}, node {i} with child {left} of {n}"));
                }
                if left != 0 && usize::from(node.feature) >= self.num_features {
                    return Err(format!("tree {t}, node {i} with feature {}", node.feature));
                }
                if !node.threshold.is_finite() {
                    return Err(format!("tree {t}, node {i} with a value that is not finite"));
                }
            }
        }
        Ok(())
    }
}

/// Trees walked at once.
const TOGETHER: usize = 8;

/// Sum of the values of [`TOGETHER`] trees.
///
/// A walk waits for each node before it knows the next; walks that take turns wait together.
fn walk_together(trees: &[Tree], x: &[f32]) -> f64 {
    let mut places = [0usize; TOGETHER];
    loop {
        let mut is_done = true;
        for (place, tree) in places.iter_mut().zip(trees) {
            let node = &tree.nodes[*place];
            // A leaf's feature is any number that its file says.
            let value = x.get(usize::from(node.feature)).copied().unwrap_or(0.0);
            let child = node.left as usize + usize::from(value > node.threshold);
            *place = if node.left == 0 { *place } else { child };
            is_done &= node.left == 0;
        }
        if is_done {
            break;
        }
    }
    places.iter().zip(trees).map(|(&place, tree)| f64::from(tree.nodes[place].threshold)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Forest, String> {
        let forest: Forest = serde_json::from_str(text).map_err(|e| e.to_string())?;
        forest.check()?;
        Ok(forest)
    }

    #[test]
    fn a_file_is_read_as_it_says() {
        // x[1] <= 2.5 gives 10; otherwise x[0] <= 0 gives 20, else 30.
        let text = r#"{"num_features":2,"trees":[
            {"feature":[1,0,0,0,0],"threshold":[2.5,10.0,0.0,20.0,30.0],"left":[1,0,3,0,0]},
            {"feature":[0],"threshold":[4.0],"left":[0]}]}"#;
        let forest = read(text).unwrap();
        for (x, tree) in [([0.0, 2.5], 10.0), ([0.0, 2.6], 20.0), ([0.1, 2.6], 30.0)] {
            assert!((forest.predict(&x) - f64::midpoint(tree, 4.0)).abs() < 1e-12);
        }
        assert_eq!(read(&serde_json::to_string(&forest).unwrap()).unwrap(), forest);
    }

    #[test]
    fn what_is_known_of_rows_is_asked_no_more() {
        // x[1] <= 2.5: x[0] <= 0 gives 1, else 2; otherwise x[1] <= 4 gives 2, else 5.
        let text = r#"{"num_features":2,"trees":[
            {"feature":[1,0,1,0,0,0],"threshold":[2.5,0.0,4.0,1.0,2.0,5.0],"left":[1,3,4,0,0,0]},
            {"feature":[0],"threshold":[4.0],"left":[0]}]}"#;
        let forest = read(text).unwrap();
        for (feature, known, lens) in [(1, 2.0, [3, 1]), (1, 3.0, [1, 1]), (0, 1.0, [5, 1]), (7, 0.0, [6, 1])]
        {
            let less = forest.without(&[(feature, known)]);
            less.check().unwrap();
            assert_eq!(less.trees.iter().map(|tree| tree.nodes.len()).collect::<Vec<_>>(), lens);
            for other in [-1.0, 0.5, 2.7, 4.5] {
                let mut x = [other; 2];
                if let Some(x) = x.get_mut(usize::from(feature)) {
                    *x = known;
                }
                assert_eq!(less.predict(&x).to_bits(), forest.predict(&x).to_bits(), "{x:?}");
            }
        }
    }

    #[test]
    fn many_trees_are_the_mean_of_each() {
        let mut trees = Vec::new();
        for i in 0..21u16 {
            let inner = |feature, left| Node { threshold: f32::from(i) - 10.0, left, feature };
            let leaf = |value: u16| Node { threshold: f32::from(value), ..Node::default() };
            // A short and a long way to a leaf.
            trees.push(Tree { nodes: vec![inner(i % 3, 1), leaf(i), inner(2, 3), leaf(3 * i), leaf(7 * i)] });
        }
        let forest = Forest { num_features: 3, trees };
        forest.check().unwrap();
        for x in [[-20.0, 0.5, 20.0], [5.0, -3.0, 1.0], [9.5, 9.5, -9.5]] {
            let sum: f64 = forest.trees.iter().map(|tree| f64::from(tree.predict(&x))).sum();
            assert!((forest.predict(&x) - sum / 21.0).abs() < 1e-12);
        }
    }

    #[test]
    fn a_tree_that_leads_astray_is_refused() {
        let tree = |feature: &str, threshold: &str, left: &str| {
            read(&format!(
                r#"{{"num_features":1,"trees":[{{"feature":{feature},"threshold":{threshold},"left":{left}}}]}}"#
            ))
            .unwrap_err()
        };
        assert!(tree("[0]", "[1.0,2.0]", "[0]").contains("arrays of one length, found 1, 2 and 1"));
        assert_eq!(tree("[]", "[]", "[]"), "tree 0 without nodes");
        assert_eq!(tree("[0,0,0]", "[1,1,1]", "[2,0,0]"), "tree 0, node 0 with child 2 of 3");
        assert_eq!(tree("[0,0,0]", "[1,1,1]", "[1,1,0]"), "tree 0, node 1 with child 1 of 3");
        assert_eq!(tree("[1,0,0]", "[1,1,1]", "[1,0,0]"), "tree 0, node 0 with feature 1");
        assert!(
            tree("[0]", "[1e39]", "[0]").contains("not finite")
                || tree("[0]", "[1e39]", "[0]").contains("range")
        );
        assert_eq!(read(r#"{"num_features":1,"trees":[]}"#).unwrap_err(), "a forest without trees");
    }
}

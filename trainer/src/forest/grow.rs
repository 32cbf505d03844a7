//! Growing one regression tree.
//!
//! Every feature's rows are sorted once per forest. A node is a range of positions, the same in each feature's
//! order; a split partitions that range stably in every order, so children stay sorted and a level of the tree
//! costs `features x rows`.

use plumbline_bundles::{Tree, forest::Node};
use rand::Rng;
use rand_pcg::Pcg64;

use super::params::RandomForestRegressorValidParams;

/// The rows as columns of f32, each with the rows' order by it.
pub(super) struct Columns {
    values: Vec<Vec<f32>>,
    orders: Vec<Vec<u32>>,
    targets: Vec<f64>,
}

impl Columns {
    /// Sorts every column; ties keep the order of rows.
    pub(super) fn new(values: Vec<Vec<f32>>, targets: Vec<f64>) -> Self {
        let order_of = |column: &Vec<f32>| {
            let mut order: Vec<u32> = (0..column.len() as u32).collect();
            order.sort_by(|&a, &b| column[a as usize].total_cmp(&column[b as usize]));
            order
        };
        Self { orders: values.iter().map(order_of).collect(), values, targets }
    }

    pub(super) fn num_rows(&self) -> usize {
        self.targets.len()
    }

    pub(super) fn num_features(&self) -> usize {
        self.values.len()
    }

    /// One row, for predicting it.
    pub(super) fn row(&self, row: usize) -> Vec<f32> {
        self.values.iter().map(|column| column[row]).collect()
    }
}

/// A tree and how often it drew each row.
pub(super) struct Grown {
    pub(super) tree: Tree,
    pub(super) draws: Vec<u32>,
}

/// A node yet to be split or made a leaf: the positions `start..end` of every order.
struct Pending {
    node: usize,
    start: usize,
    end: usize,
    depth: usize,
}

struct Split {
    feature: usize,
    /// Positions before it in the feature's order go left.
    at: usize,
    threshold: f32,
    /// Larger is better.
    score: f64,
}

/// Sum and count of targets, draws counted.
#[derive(Clone, Copy, Default)]
struct Sum {
    sum: f64,
    count: f64,
}

/// Grows the tree of an index; what it draws depends on the seed and the index alone.
pub(super) fn grow(columns: &Columns, params: &RandomForestRegressorValidParams, tree_index: usize) -> Grown {
    // The generator's second argument picks one of its distinct sequences.
    let mut rng = Pcg64::new(u128::from(params.seed) | ((tree_index as u128) << 64), tree_index as u128);
    let draws = draw(columns.num_rows(), params.bootstrap, &mut rng);
    let mut grower = Grower::new(columns, params, draws, rng);
    grower.run();
    Grown { tree: grower.tree, draws: grower.draws }
}

fn draw(num_rows: usize, bootstrap: bool, rng: &mut Pcg64) -> Vec<u32> {
    if !bootstrap {
        return vec![1; num_rows];
    }
    let mut draws = vec![0; num_rows];
    for _ in 0..num_rows {
        draws[below(rng, num_rows)] += 1;
    }
    draws
}

/// A number below `bound`, at most 2^32; by multiplication, whose bias of `bound / 2^64` does not matter here.
fn below(rng: &mut Pcg64, bound: usize) -> usize {
    ((u128::from(rng.next_u64()) * bound as u128) >> 64) as usize
}

struct Grower<'a> {
    columns: &'a Columns,
    params: &'a RandomForestRegressorValidParams,
    rng: Pcg64,
    draws: Vec<u32>,
    orders: Vec<Vec<u32>>,
    /// Features in the order they are tried at the present node.
    candidates: Vec<usize>,
    goes_left: Vec<bool>,
    buffer: Vec<u32>,
    tree: Tree,
}

impl<'a> Grower<'a> {
    fn new(
        columns: &'a Columns,
        params: &'a RandomForestRegressorValidParams,
        draws: Vec<u32>,
        rng: Pcg64,
    ) -> Self {
        let drawn = |order: &Vec<u32>| order.iter().copied().filter(|&row| draws[row as usize] > 0).collect();
        Self {
            orders: columns.orders.iter().map(drawn).collect(),
            candidates: (0..columns.num_features()).collect(),
            goes_left: vec![false; columns.num_rows()],
            buffer: Vec::with_capacity(columns.num_rows()),
            tree: Tree::default(),
            columns,
            params,
            rng,
            draws,
        }
    }

    fn run(&mut self) {
        let root = self.add_node();
        let mut pending = vec![Pending { node: root, start: 0, end: self.orders[0].len(), depth: 0 }];
        while let Some(part) = pending.pop() {
            let total = self.sum(part.start, part.end);
            let split = if part.depth < self.params.max_depth { self.best_split(&part, total) } else { None };
            let Some(split) = split else {
                self.tree.nodes[part.node].threshold = (total.sum / total.count) as f32;
                continue;
            };
            self.partition(&part, &split);
            let (left, right) = (self.add_node(), self.add_node());
            let feature = split.feature as u16;
            self.tree.nodes[part.node] = Node { threshold: split.threshold, left: left as u32, feature };
            let depth = part.depth + 1;
            pending.push(Pending { node: right, start: split.at, end: part.end, depth });
            pending.push(Pending { node: left, start: part.start, end: split.at, depth });
        }
    }

    fn add_node(&mut self) -> usize {
        self.tree.nodes.push(Node::default());
        self.tree.nodes.len() - 1
    }

    fn sum(&self, start: usize, end: usize) -> Sum {
        let mut total = Sum::default();
        self.orders[0][start..end].iter().for_each(|&row| self.add(&mut total, row));
        total
    }

    fn add(&self, sum: &mut Sum, row: u32) {
        let draws = f64::from(self.draws[row as usize]);
        sum.sum += draws * self.columns.targets[row as usize];
        sum.count += draws;
    }

    /// The best split over randomly chosen features; `None` when no split helps.
    fn best_split(&mut self, part: &Pending, total: Sum) -> Option<Split> {
        let num_features = self.candidates.len();
        let mut wanted = self.params.max_features.unwrap_or(num_features.div_ceil(3));
        let mut best: Option<Split> = None;
        for i in 0..num_features {
            if wanted == 0 {
                break;
            }
            let chosen = i + below(&mut self.rng, num_features - i);
            self.candidates.swap(i, chosen);
            let feature = self.candidates[i];
            let order = &self.orders[feature][part.start..part.end];
            let values = &self.columns.values[feature];
            if values[order[0] as usize].total_cmp(&values[order[order.len() - 1] as usize]).is_eq() {
                continue;
            }
            wanted -= 1;
            if let Some(split) = self.best_split_of(feature, part, total)
                && best.as_ref().is_none_or(|best| split.score > best.score)
            {
                best = Some(split);
            }
        }
        best
    }

    /// The split of one feature that leaves the least squared error.
    ///
    /// That error is `sum of y^2 - (left sum)^2 / left count - (right sum)^2 / right count`; the first term is
    /// the same for all splits, so the other two are maximised.
    fn best_split_of(&self, feature: usize, part: &Pending, total: Sum) -> Option<Split> {
        let values = &self.columns.values[feature];
        let order = &self.orders[feature];
        let min_count = self.params.min_samples_leaf as f64;
        let unsplit = total.sum * total.sum / total.count;
        // Less than rounding could fake is no gain.
        let mut best_score = unsplit + 1e-12 * unsplit.abs().max(f64::MIN_POSITIVE);
        let mut best = None;
        let mut left = Sum::default();
        for at in part.start + 1..part.end {
            self.add(&mut left, order[at - 1]);
            let (below, above) = (values[order[at - 1] as usize], values[order[at] as usize]);
            let right = Sum { sum: total.sum - left.sum, count: total.count - left.count };
            if below >= above || left.count < min_count || right.count < min_count {
                continue;
            }
            let score = left.sum * left.sum / left.count + right.sum * right.sum / right.count;
            if score > best_score {
                best_score = score;
                // Halfway, computed so that it cannot overflow; rounding must not move it up to `above`.
                let middle = below / 2.0 + above / 2.0;
                let threshold = if middle >= below && middle < above { middle } else { below };
                best = Some(Split { feature, at, threshold, score });
            }
        }
        best
    }

    /// Moves the rows of the left child to the front in every order, keeping both sides sorted.
    fn partition(&mut self, part: &Pending, split: &Split) {
        for (position, &row) in self.orders[split.feature][part.start..part.end].iter().enumerate() {
            self.goes_left[row as usize] = part.start + position < split.at;
        }
        for order in &mut self.orders {
            let order = &mut order[part.start..part.end];
            self.buffer.clear();
            self.buffer.extend(order.iter().copied().filter(|&row| !self.goes_left[row as usize]));
            let mut kept = 0;
            for i in 0..order.len() {
                let row = order[i];
                if self.goes_left[row as usize] {
                    order[kept] = row;
                    kept += 1;
                }
            }
            order[kept..].copy_from_slice(&self.buffer);
        }
    }
}

//! Growing one regression tree.
//!
//! A node is a range of the tree's cells, which a split parts in two. How it finds the split depends on what it
//! holds: [`Bins`] where values are few, sorted [`Lists`] otherwise, neither where there are but two cells. All
//! three find the same.

use std::ops::Range;

use plumbline_bundles::{Tree, forest::Node};

use super::{
    bins::Bins,
    draw::{NodeSeed, bootstrap, without_bootstrap},
    lists::{Entry, Lists, scan},
    params::RandomForestRegressorValidParams,
    split::{Best, Content, Measure},
    table::Table,
    threshold::Thresholds,
};

/// A grown tree.
pub(super) struct Grown {
    pub(super) tree: Tree,
    /// Each feature's share of the decrease in squared error; all 0 without splits.
    pub(super) importances: Vec<f64>,
}

/// Limits of growing, features counted.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub(super) max_depth: u32,
    pub(super) min_split: f64,
    pub(super) min_leaf: f64,
    pub(super) max_features: usize,
}

/// Where a node's cells are found.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// In [`Grower::members`], with sums of this index.
    Bins(u32),
    /// In the lists of this side.
    Lists(u32),
}

/// A node that is a leaf as yet and may be split.
#[derive(Clone, Copy)]
struct Pending<C> {
    node: u32,
    depth: u32,
    seed: NodeSeed,
    total: C,
    /// Its places in the members or in every list.
    start: u32,
    end: u32,
    place: Place,
    /// A feature whose list holds its cells even where lists were not dealt out.
    listed_by: u16,
    /// The features that differed in its parent.
    features: Features,
}

/// A split whose threshold is yet to be chosen between two values.
#[derive(Clone, Copy)]
struct Cut {
    node: u32,
    below: f32,
    above: f32,
}

/// A range of [`Grower::differing`].
type Features = (u32, u32);

impl<C> Pending<C> {
    fn places(&self) -> Range<usize> {
        self.start as usize..self.end as usize
    }

    fn num_cells(&self) -> usize {
        (self.end - self.start) as usize
    }
}

/// Grows tree after tree; its buffers are used again.
pub(super) struct Grower<'a, C, E> {
    table: &'a Table,
    seed: u64,
    num_draws: Option<usize>,
    limits: Limits,
    /// How often each row was drawn, in the order of [`Table::rows`].
    drawn: Vec<u32>,
    cells: Vec<C>,
    /// Cells of the nodes that have bins.
    members: Vec<u32>,
    spare: Vec<u32>,
    bins: Bins<C>,
    lists: Lists<E>,
    pending: Vec<Pending<C>>,
    differing: Vec<u16>,
    candidates: Vec<u16>,
    thresholds: Thresholds,
    cuts: Vec<Cut>,
    nodes: Vec<Node>,
    gains: Vec<f64>,
}

impl<'a, C: Content, E: Entry> Grower<'a, C, E> {
    pub(super) fn new(table: &'a Table, params: &RandomForestRegressorValidParams) -> Self {
        let num_features = table.features.len();
        Self {
            table,
            seed: params.seed(),
            num_draws: params.num_draws(table.rows.len()),
            limits: params.limits(table),
            drawn: vec![1; table.rows.len()],
            cells: Vec::new(),
            members: Vec::new(),
            spare: Vec::new(),
            bins: Bins::new(&table.features),
            lists: Lists::default(),
            pending: Vec::new(),
            differing: Vec::new(),
            candidates: Vec::new(),
            thresholds: Thresholds::new(),
            cuts: Vec::new(),
            nodes: Vec::new(),
            gains: vec![0.0; num_features],
        }
    }

    /// How often the last tree drew each row, in the order of [`Table::rows`].
    pub(super) fn drawn(&self) -> &[u32] {
        &self.drawn
    }

    /// Grows the tree of an index, which depends on the parameters, the data and the index alone.
    pub(super) fn grow(&mut self, tree: usize) -> Grown {
        let seed = match self.num_draws {
            Some(draws) => bootstrap(self.seed, tree, draws, &mut self.drawn),
            None => without_bootstrap(self.seed, tree),
        };
        self.fill_cells();
        self.gains.fill(0.0);
        self.nodes.clear();
        self.differing.clear();
        self.differing.extend(0..self.gains.len() as u16);
        let root = self.root(seed);
        self.settle(root);
        while let Some(node) = self.pending.pop() {
            self.differing.truncate(node.features.1 as usize);
            self.split(node);
        }
        // Last of all, in a loop of its own: a split need not wait for them.
        for cut in self.cuts.drain(..) {
            self.nodes[cut.node as usize].threshold = self.thresholds.between(cut.below, cut.above);
        }
        let sum: f64 = self.gains.iter().sum();
        let share = |gain: &f64| if sum > 0.0 { gain / sum } else { 0.0 };
        let importances = self.gains.iter().map(share).collect();
        Grown { tree: Tree { nodes: self.nodes.as_slice().to_vec() }, importances }
    }

    /// The bins, for tests to say when they are used.
    #[cfg(test)]
    pub(super) fn bins(&mut self) -> &mut Bins<C> {
        &mut self.bins
    }

    fn fill_cells(&mut self) {
        self.cells.clear();
        self.cells.resize(self.table.num_cells, C::default());
        for (row, &times) in self.table.rows.iter().zip(&self.drawn) {
            self.cells[row.cell as usize].add(C::new(row.content, times));
        }
        self.members.resize(self.table.num_cells, 0);
        let mut num_members = 0;
        for (cell, content) in (0..).zip(&self.cells) {
            self.members[num_members] = cell;
            num_members += usize::from(content.weight() > 0.0);
        }
        self.members.truncate(num_members);
    }

    fn root(&mut self, seed: NodeSeed) -> Pending<C> {
        let mut total = C::default();
        self.members.iter().for_each(|&cell| total.add(self.cells[cell as usize]));
        self.lists.resize(self.members.len(), self.gains.len());
        let place = if self.bins.pay_off(self.members.len()) {
            Place::Bins(self.bins.root(&self.members, &self.cells, &self.table.features))
        } else {
            for (index, feature) in (0..).zip(&self.table.features) {
                self.lists.fill(index, feature, &self.cells);
            }
            Place::Lists(0)
        };
        let leaf = self.leaf(total);
        self.nodes.push(leaf);
        let (end, features) = (self.members.len() as u32, (0, self.differing.len() as u32));
        Pending { node: 0, depth: 0, seed, total, start: 0, end, place, listed_by: 0, features }
    }

    fn leaf(&self, total: C) -> Node {
        let value = self.table.scale.mean(total.target(), total.weight());
        Node { threshold: value as f32, left: 0, feature: 0 }
    }

    fn may_split(&self, node: &Pending<C>) -> bool {
        node.num_cells() > 1
            && node.depth < self.limits.max_depth
            && node.total.count() >= self.limits.min_split.max(2.0 * self.limits.min_leaf)
    }

    /// Whether it has to be kept for later.
    fn is_large(&self, node: &Pending<C>) -> bool {
        node.num_cells() > 2 && self.may_split(node)
    }

    /// Keeps a large node for later and finishes a small one.
    fn settle(&mut self, node: Pending<C>) {
        if self.is_large(&node) {
            self.pending.push(node);
        } else if self.may_split(&node) {
            self.split_pair(&node);
        }
    }

    /// Writes a split into the tree, where both children are leaves as yet; returns the first of them.
    fn make_split(&mut self, node: u32, total: C, best: &Best<C>, (gain, above): (f64, u32)) -> u32 {
        self.gains[usize::from(best.feature)] += gain;
        let values = &self.table.features[usize::from(best.feature)].values;
        self.cuts.push(Cut { node, below: values[best.below as usize], above: values[above as usize] });
        let left = self.nodes.len() as u32;
        self.nodes[node as usize] = Node { threshold: 0.0, left, feature: best.feature };
        let leaves = [self.leaf(best.left), self.leaf(total.minus(best.left))];
        self.nodes.extend_from_slice(&leaves);
        left
    }

    /// Takes the features that may differ in a node as candidates.
    fn choose_from(&mut self, features: Features) -> usize {
        self.candidates.clear();
        self.candidates.extend_from_slice(&self.differing[features.0 as usize..features.1 as usize]);
        self.candidates.len()
    }

    /// Finishes a node of two cells: any feature that tells them apart parts them alike.
    fn split_pair(&mut self, node: &Pending<C>) {
        let (a, b) = match node.place {
            Place::Bins(_) => {
                let start = node.start as usize;
                (self.members[start] as usize, self.members[start + 1] as usize)
            }
            Place::Lists(side) => {
                let list = self.lists.list(side, node.listed_by, node.places());
                (list[0].cell(), list[1].cell())
            }
        };
        for i in 0..self.choose_from(node.features) {
            let feature = node.seed.choose(i, &mut self.candidates);
            let codes = &self.table.features[usize::from(feature)].codes;
            let (of_a, of_b) = (codes[a], codes[b]);
            if of_a == of_b {
                continue;
            }
            let (left, below, above) = if of_a < of_b { (a, of_a, of_b) } else { (b, of_b, of_a) };
            let measure = Measure::new(node.total, self.limits.min_leaf);
            let best = measure.split(feature, below, 1, self.cells[left]);
            if let Some(gain) = measure.gain(&best)
                && measure.is_allowed(&best.left)
            {
                self.make_split(node.node, node.total, &best, (gain, above));
            }
            return;
        }
    }

    fn split(&mut self, mut node: Pending<C>) {
        self.find_differing(&mut node);
        let measure = Measure::new(node.total, self.limits.min_leaf);
        let best = self.best_split(&node, measure);
        let Some(gain) = measure.gain(&best) else {
            if let Place::Bins(index) = node.place {
                self.bins.release(index);
            }
            return;
        };
        let (num_left, above) = self.part(&node, &best);
        let first = self.make_split(node.node, node.total, &best, (gain, above));
        let middle = node.start + num_left as u32;
        let (left_seed, right_seed) = node.seed.children();
        let child = Pending { depth: node.depth + 1, listed_by: best.feature, ..node };
        let mut left = Pending { node: first, seed: left_seed, total: best.left, end: middle, ..child };
        let total = node.total.minus(best.left);
        let mut right = Pending { node: first + 1, seed: right_seed, total, start: middle, ..child };
        match node.place {
            Place::Bins(index) => self.deal_bins(index, &mut left, &mut right),
            Place::Lists(side) => {
                if self.is_large(&left) || self.is_large(&right) {
                    let features = &self.differing[node.features.0 as usize..node.features.1 as usize];
                    let all = &self.table.features;
                    let side = self.lists.deal_out(side, node.places(), num_left, features, &best, all);
                    (left.place, right.place) = (Place::Lists(side), Place::Lists(side));
                }
            }
        }
        self.settle(right);
        self.settle(left);
    }

    /// Points the node's features at those of its parent's that still differ within it.
    fn find_differing(&mut self, node: &mut Pending<C>) {
        let (start, end) = (node.features.0 as usize, node.features.1 as usize);
        let new = self.differing.len();
        for i in start..end {
            let feature = self.differing[i];
            let differs = match node.place {
                Place::Bins(index) => self.bins.differs(index, feature),
                Place::Lists(side) => {
                    let list = self.lists.list(side, feature, node.places());
                    list[0].code() != list[list.len() - 1].code()
                }
            };
            if differs {
                self.differing.push(feature);
            }
        }
        if self.differing.len() - new == end - start {
            self.differing.truncate(new);
        } else {
            node.features = (new as u32, self.differing.len() as u32);
        }
    }

    fn best_split(&mut self, node: &Pending<C>, measure: Measure) -> Best<C> {
        let mut best = Best::none();
        let num_candidates = self.choose_from(node.features);
        for i in 0..self.limits.max_features.min(num_candidates) {
            let feature = node.seed.choose(i, &mut self.candidates);
            match node.place {
                Place::Bins(index) => self.bins.scan(index, feature, measure, &mut best),
                Place::Lists(side) => {
                    let list = self.lists.list(side, feature, node.places());
                    let has_repeats =
                        self.table.features[usize::from(feature)].values.len() < self.table.num_cells;
                    scan(feature, list, has_repeats, &self.cells, measure, &mut best);
                }
            }
        }
        best
    }

    /// Moves the left cells of members to the front; returns how many cells go left and the lowest code that goes
    /// right.
    fn part(&mut self, node: &Pending<C>, best: &Best<C>) -> (usize, u32) {
        match node.place {
            Place::Bins(index) => {
                let codes = &self.table.features[usize::from(best.feature)].codes;
                let members = &mut self.members[node.places()];
                let num_left = part(members, &mut self.spare, |&cell| codes[cell as usize] <= best.below);
                (num_left, self.bins.above(index, best.feature, best.below))
            }
            Place::Lists(side) => {
                let list = self.lists.list(side, best.feature, node.places());
                let num_left = best.num_left as usize;
                (num_left, list[num_left].code())
            }
        }
    }

    /// Gives the children of a node with sums theirs, or lists to those for which sums do not pay off.
    fn deal_bins(&mut self, index: u32, left: &mut Pending<C>, right: &mut Pending<C>) {
        let (small, large) = if left.num_cells() < right.num_cells() { (left, right) } else { (right, left) };
        let differing = &self.differing[small.features.0 as usize..small.features.1 as usize];
        let keeps_bins = |node: &Pending<C>| {
            self.is_large(node) && self.bins.pay_off_for(index, differing, node.num_cells())
        };
        let (small_has_bins, large_has_bins) = (keeps_bins(small), keeps_bins(large));
        let mut wants_lists = Vec::with_capacity(2);
        if large_has_bins {
            let members = &self.members[small.places()];
            let features = (differing, self.table.features.as_slice());
            let sums = self.bins.take_from(index, members, &self.cells, features, small_has_bins);
            match sums {
                Some(sums) => small.place = Place::Bins(sums),
                None => wants_lists.push(small),
            }
        } else {
            wants_lists.extend([small, large]);
        }
        for child in wants_lists {
            if self.is_large(child) {
                for &feature in &self.differing[child.features.0 as usize..child.features.1 as usize] {
                    let range = self.bins.range(index, feature);
                    let codes = &self.table.features[usize::from(feature)].codes;
                    self.lists.sort(feature, child.places(), &self.members[child.places()], codes, range);
                }
                child.place = Place::Lists(0);
            }
        }
        if !large_has_bins {
            self.bins.release(index);
        }
    }
}

/// Moves what goes left to the front, keeping orders; returns how much that is.
fn part(members: &mut [u32], spare: &mut Vec<u32>, goes_left: impl Fn(&u32) -> bool) -> usize {
    spare.resize(members.len().max(spare.len()), 0);
    let spare = &mut spare[..members.len()];
    let (mut left, mut right) = (0, 0);
    for i in 0..members.len() {
        let member = members[i];
        let is_left = goes_left(&member);
        members[left] = member;
        spare[right] = member;
        left += usize::from(is_left);
        right += usize::from(!is_left);
    }
    members[left..].copy_from_slice(&spare[..right]);
    left
}

//! Nodes as sums over each feature's values.
//!
//! Where many cells share few values, a node's sums by value are all that a split needs. Of two children only the
//! smaller one's cells are added up: the other's sums are what is left of the parent's, exactly, since sums are
//! whole numbers.

use super::{
    split::{Best, Content, Measure},
    table::Feature,
};

/// The sums of one node.
#[derive(Default)]
struct ByValue<C> {
    /// Of all features' values, one feature after another.
    sums: Vec<C>,
    /// Lowest and highest code in use, by feature; kept for features that differ.
    ranges: Vec<(u32, u32)>,
}

/// The sums of all nodes that have any at present.
pub(super) struct Bins<C> {
    /// Where each feature's bins start.
    offsets: Vec<usize>,
    num_values: usize,
    entries_per_bin: usize,
    nodes: Vec<ByValue<C>>,
    free: Vec<u32>,
}

/// A node with as many entries in its lists as this times its bins has its sums by value.
const ENTRIES_PER_BIN: usize = 4;

impl<C: Content> Bins<C> {
    pub(super) fn new(features: &[Feature]) -> Self {
        let mut num_values = 0;
        let mut offset = |feature: &Feature| {
            num_values += feature.values.len();
            num_values - feature.values.len()
        };
        let offsets = features.iter().map(&mut offset).collect();
        Self { offsets, num_values, entries_per_bin: ENTRIES_PER_BIN, nodes: Vec::new(), free: Vec::new() }
    }

    /// Sets how many entries make a bin worth its while.
    #[cfg(test)]
    pub(super) fn set_entries_per_bin(&mut self, entries_per_bin: usize) {
        self.entries_per_bin = entries_per_bin;
    }

    /// Whether a tree of so many cells starts with bins.
    pub(super) fn pay_off(&self, num_cells: usize) -> bool {
        num_cells * self.offsets.len() >= self.entries_per_bin * self.num_values
    }

    /// Whether they are worth their while for a child with so many cells of the node that has these.
    pub(super) fn pay_off_for(&self, index: u32, features: &[u16], num_cells: usize) -> bool {
        let width = |&feature: &u16| {
            let (low, high) = self.range(index, feature);
            (high - low) as usize + 1
        };
        num_cells * features.len() >= self.entries_per_bin * features.iter().map(width).sum::<usize>()
    }

    fn take(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            let (num_values, num_features) = (self.num_values, self.offsets.len());
            let sums = vec![C::default(); num_values];
            self.nodes.push(ByValue { sums, ranges: vec![(0, 0); num_features] });
            self.nodes.len() as u32 - 1
        })
    }

    /// Gives the sums of a node back.
    pub(super) fn release(&mut self, index: u32) {
        self.free.push(index);
    }

    /// The sums of a tree's root.
    pub(super) fn root(&mut self, members: &[u32], cells: &[C], features: &[Feature]) -> u32 {
        let index = self.take();
        let node = &mut self.nodes[index as usize];
        node.sums.fill(C::default());
        for ((&offset, feature), range) in self.offsets.iter().zip(features).zip(&mut node.ranges) {
            *range = (0, feature.values.len() as u32 - 1);
            let bins = &mut node.sums[offset..offset + feature.values.len()];
            for &cell in members {
                bins[feature.codes[cell as usize] as usize].add(cells[cell as usize]);
            }
        }
        index
    }

    /// Lowest and highest code of a feature in a node.
    pub(super) fn range(&self, index: u32, feature: u16) -> (u32, u32) {
        self.nodes[index as usize].ranges[usize::from(feature)]
    }

    /// Narrows a feature's range to bins that are not empty; whether it still has two.
    pub(super) fn differs(&mut self, index: u32, feature: u16) -> bool {
        let ByValue { sums, ranges } = &mut self.nodes[index as usize];
        let bins = &sums[self.offsets[usize::from(feature)]..];
        let (low, high) = &mut ranges[usize::from(feature)];
        while low < high && bins[*low as usize].weight() <= 0.0 {
            *low += 1;
        }
        while low < high && bins[*high as usize].weight() <= 0.0 {
            *high -= 1;
        }
        low < high
    }

    /// Improves `best` by the splits of a node on one feature.
    pub(super) fn scan(&self, index: u32, feature: u16, measure: Measure, best: &mut Best<C>) {
        let (low, high) = self.range(index, feature);
        let offset = self.offsets[usize::from(feature)];
        let mut left = C::default();
        // An empty bin changes nothing, and what is equal is not better.
        for (bin, below) in
            self.nodes[index as usize].sums[offset + low as usize..offset + high as usize].iter().zip(low..)
        {
            left.add(*bin);
            if measure.is_better(&left, best) && measure.is_allowed(&left) {
                *best = measure.split(feature, below, 0, left);
            }
        }
    }

    /// The next code above that is in use.
    pub(super) fn above(&self, index: u32, feature: u16, below: u32) -> u32 {
        let bins = &self.nodes[index as usize].sums[self.offsets[usize::from(feature)]..];
        let (_, high) = self.range(index, feature);
        (below + 1..high).find(|&code| bins[code as usize].weight() > 0.0).unwrap_or(high)
    }

    /// Leaves to a node what it keeps when a child with these cells is taken from it, `side` saying which; returns
    /// the child's sums when they are wanted.
    pub(super) fn take_from(
        &mut self,
        index: u32,
        members: &[u32],
        cells: &[C],
        (differing, features): (&[u16], &[Feature]),
        wants_sums: bool,
    ) -> Option<u32> {
        let child = wants_sums.then(|| self.take());
        let mut child_node = child.map(|child| std::mem::take(&mut self.nodes[child as usize]));
        let ByValue { sums, ranges } = &mut self.nodes[index as usize];
        for &feature in differing {
            let range = ranges[usize::from(feature)];
            let offset = self.offsets[usize::from(feature)];
            let used = offset + range.0 as usize..=offset + range.1 as usize;
            let codes = &features[usize::from(feature)].codes;
            let place = |cell: u32| (codes[cell as usize] - range.0) as usize;
            let bins = &mut sums[used.clone()];
            if let Some(child) = &mut child_node {
                child.ranges[usize::from(feature)] = range;
                let child = &mut child.sums[used];
                child.fill(C::default());
                for &cell in members {
                    child[place(cell)].add(cells[cell as usize]);
                }
                bins.iter_mut().zip(child).for_each(|(bin, child)| bin.subtract(*child));
            } else {
                for &cell in members {
                    bins[place(cell)].subtract(cells[cell as usize]);
                }
            }
        }
        if let (Some(child), Some(node)) = (child, child_node) {
            self.nodes[child as usize] = node;
        }
        child
    }
}

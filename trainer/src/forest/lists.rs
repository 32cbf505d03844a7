//! Nodes as sorted lists.
//!
//! Every feature has a list of the tree's cells, and a node is the same range of places in each, sorted within
//! it by that feature. A split deals the range out in every list and keeps both sides sorted. Lists are dealt from
//! one buffer into another and back.

use std::ops::Range;

use super::{
    split::{Best, Content, Measure},
    table::Feature,
};

/// A cell's place in a feature's order: the code of its value in the upper half of the bits, its index in the lower.
pub(super) trait Entry: Copy + Default + Send {
    fn new(code: u32, cell: u32) -> Self;
    fn code(self) -> u32;
    fn cell(self) -> usize;
}

impl Entry for u64 {
    fn new(code: u32, cell: u32) -> Self {
        Self::from(code) << 32 | Self::from(cell)
    }

    #[inline]
    fn code(self) -> u32 {
        (self >> 32) as u32
    }

    #[inline]
    fn cell(self) -> usize {
        self as u32 as usize
    }
}

/// For up to 2^16 cells: half as many bytes to move about.
impl Entry for u32 {
    fn new(code: u32, cell: u32) -> Self {
        code << 16 | cell
    }

    #[inline]
    fn code(self) -> u32 {
        self >> 16
    }

    #[inline]
    fn cell(self) -> usize {
        usize::from(self as u16)
    }
}

/// Two buffers of a list per feature, one after another.
#[derive(Default)]
pub(super) struct Lists<E> {
    buffers: [Vec<E>; 2],
    length: usize,
    counts: Vec<u32>,
}

impl<E: Entry> Lists<E> {
    /// Makes room for the lists of so many features; whatever they hold is written before it is read.
    pub(super) fn resize(&mut self, length: usize, num_features: usize) {
        self.length = length;
        for buffer in &mut self.buffers {
            buffer.resize((length * num_features).max(buffer.len()), E::default());
        }
    }

    fn places(&self, feature: u16, node: Range<usize>) -> Range<usize> {
        let offset = usize::from(feature) * self.length;
        offset + node.start..offset + node.end
    }

    /// A node's cells, sorted by a feature.
    pub(super) fn list(&self, side: u32, feature: u16, node: Range<usize>) -> &[E] {
        &self.buffers[side as usize][self.places(feature, node)]
    }

    /// Fills in the whole list of a feature from the order of all cells, of which those with weight are taken.
    pub(super) fn fill<C: Content>(&mut self, index: u16, feature: &Feature, cells: &[C]) {
        let places = self.places(index, 0..self.length);
        let list = &mut self.buffers[0][places];
        let mut length = 0;
        for &cell in &feature.order {
            if length == list.len() {
                break;
            }
            // Written over by the next when it has no weight: a branch could not be foretold.
            list[length] = E::new(feature.codes[cell as usize], cell);
            length += usize::from(cells[cell as usize].weight() > 0.0);
        }
    }

    /// Sorts a node's cells by a feature whose codes lie in `low..=high`, into buffer 0.
    pub(super) fn sort(
        &mut self,
        feature: u16,
        node: Range<usize>,
        cells: &[u32],
        codes: &[u32],
        (low, high): (u32, u32),
    ) {
        let places = self.places(feature, node);
        self.counts.clear();
        self.counts.resize((high - low) as usize + 2, 0);
        for &cell in cells {
            self.counts[(codes[cell as usize] - low) as usize + 1] += 1;
        }
        for i in 1..self.counts.len() {
            self.counts[i] += self.counts[i - 1];
        }
        let list = &mut self.buffers[0][places];
        for &cell in cells {
            let code = codes[cell as usize];
            let place = &mut self.counts[(code - low) as usize];
            list[*place as usize] = E::new(code, cell);
            *place += 1;
        }
    }

    /// Deals a node's lists of these features out to its children; returns the side where they are then.
    pub(super) fn deal_out<C>(
        &mut self,
        side: u32,
        node: Range<usize>,
        num_left: usize,
        features: &[u16],
        best: &Best<C>,
        all: &[Feature],
    ) -> u32 {
        if features.len() == 1 {
            return side;
        }
        let codes = &all[usize::from(best.feature)].codes;
        for &feature in features {
            let places = self.places(feature, node.clone());
            let [first, second] = &mut self.buffers;
            let (from, to) = if side == 0 { (first, second) } else { (second, first) };
            if feature == best.feature {
                to[places.clone()].copy_from_slice(&from[places]);
            } else {
                deal(&from[places.clone()], &mut to[places], codes, best.below, num_left);
            }
        }
        1 - side
    }
}

/// Copies entries of cells whose code is at most `cut` to the front of `to` and the others behind them, each side
/// in the order it had.
fn deal<E: Entry>(from: &[E], to: &mut [E], codes: &[u32], cut: u32, num_left: usize) {
    let mut left = 0;
    for (i, &entry) in from.iter().enumerate() {
        let goes_left = codes[entry.cell()] <= cut;
        let place = if goes_left { left } else { num_left + i - left };
        left += usize::from(goes_left);
        to[place] = entry;
    }
}

/// Improves `best` by the splits of a node on one feature, by which `list` is sorted.
pub(super) fn scan<C: Content, E: Entry>(
    feature: u16,
    list: &[E],
    has_repeats: bool,
    cells: &[C],
    measure: Measure,
    best: &mut Best<C>,
) {
    if has_repeats {
        scan_with::<C, E, true>(feature, list, cells, measure, best);
    } else {
        scan_with::<C, E, false>(feature, list, cells, measure, best);
    }
}

fn scan_with<C: Content, E: Entry, const HAS_REPEATS: bool>(
    feature: u16,
    list: &[E],
    cells: &[C],
    measure: Measure,
    best: &mut Best<C>,
) {
    let mut left = C::default();
    for (pair, num_left) in list.windows(2).zip(1..) {
        left.add(cells[pair[0].cell()]);
        // One branch that is seldom taken instead of two of which the second could not be foretold.
        let is_place = !HAS_REPEATS || pair[0].code() != pair[1].code();
        if measure.is_better(&left, best) & is_place && measure.is_allowed(&left) {
            *best = measure.split(feature, pair[0].code(), num_left, left);
        }
    }
}

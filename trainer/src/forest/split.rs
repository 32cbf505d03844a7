//! What nodes hold and how splits are told apart.

use std::fmt::Debug;

/// What a cell, a node or a side of a split holds: whole numbers below 2^53, so that sums are the same in any order.
pub(super) trait Content: Copy + Debug + Default + Send {
    /// Of a row drawn so many times.
    fn new(row: Weighted, times: u32) -> Self;
    /// Summed target, each times its weight.
    fn target(&self) -> f64;
    /// Summed weight.
    fn weight(&self) -> f64;
    /// Samples, repeated draws counted.
    fn count(&self) -> f64;
    fn add(&mut self, other: Self);
    fn subtract(&mut self, other: Self);

    fn minus(mut self, other: Self) -> Self {
        self.subtract(other);
        self
    }
}

/// A weight and a target times it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Weighted {
    pub(super) target: f64,
    pub(super) weight: f64,
}

/// Content whose samples are counted besides their weight.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counted {
    sums: Weighted,
    count: f64,
}

impl Content for Weighted {
    fn new(row: Self, times: u32) -> Self {
        Self { target: row.target * f64::from(times), weight: row.weight * f64::from(times) }
    }

    #[inline]
    fn target(&self) -> f64 {
        self.target
    }

    #[inline]
    fn weight(&self) -> f64 {
        self.weight
    }

    #[inline]
    fn count(&self) -> f64 {
        self.weight
    }

    #[inline]
    fn add(&mut self, other: Self) {
        self.target += other.target;
        self.weight += other.weight;
    }

    #[inline]
    fn subtract(&mut self, other: Self) {
        self.target -= other.target;
        self.weight -= other.weight;
    }
}

impl Content for Counted {
    fn new(row: Weighted, times: u32) -> Self {
        Self { sums: Weighted::new(row, times), count: f64::from(times) }
    }

    fn target(&self) -> f64 {
        self.sums.target
    }

    fn weight(&self) -> f64 {
        self.sums.weight
    }

    fn count(&self) -> f64 {
        self.count
    }

    fn add(&mut self, other: Self) {
        self.sums.add(other.sums);
        self.count += other.count;
    }

    fn subtract(&mut self, other: Self) {
        self.sums.subtract(other.sums);
        self.count -= other.count;
    }
}

/// The best split so far.
///
/// With `t` and `w` the summed target and weight of a side, the squared error falls by
/// `(t_left w_right - t_right w_left)^2 / (w_left w_right (w_left + w_right))`. The sum of weights is the same for
/// all splits of a node, and the rest is kept as a fraction: comparing products spares a division for each place.
/// Both are the same to the last bit when left and right are exchanged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Best<C> {
    numerator: f64,
    denominator: f64,
    pub(super) feature: u16,
    /// Code of the highest value that goes left.
    pub(super) below: u32,
    /// Entries that go left, where a list was scanned.
    pub(super) num_left: u32,
    /// What goes left; nothing while there is no split.
    pub(super) left: C,
}

/// What splits of one node are measured by.
#[derive(Clone, Copy)]
pub(super) struct Measure {
    target: f64,
    weight: f64,
    count: f64,
    min_count: f64,
}

impl Measure {
    pub(super) fn new<C: Content>(total: C, min_count: f64) -> Self {
        Self { target: total.target(), weight: total.weight(), count: total.count(), min_count }
    }

    /// Whether both sides have enough samples.
    #[inline]
    pub(super) fn is_allowed<C: Content>(&self, left: &C) -> bool {
        left.count() >= self.min_count && self.count - left.count() >= self.min_count
    }

    /// Whether a split with this on its left is better than the best, limits aside.
    #[inline]
    pub(super) fn is_better<C: Content>(&self, left: &C, best: &Best<C>) -> bool {
        let (numerator, denominator) = self.score(left);
        numerator * best.denominator > best.numerator * denominator
    }

    #[inline]
    fn score<C: Content>(&self, left: &C) -> (f64, f64) {
        let difference = self.difference(left);
        (difference * difference, left.weight() * (self.weight - left.weight()))
    }

    /// A split of the node.
    pub(super) fn split<C: Content>(&self, feature: u16, below: u32, num_left: u32, left: C) -> Best<C> {
        let (numerator, denominator) = self.score(&left);
        Best { numerator, denominator, feature, below, num_left, left }
    }

    #[inline]
    fn difference<C: Content>(&self, left: &C) -> f64 {
        left.target() * (self.weight - left.weight()) - (self.target - left.target()) * left.weight()
    }

    /// By how much the squared error falls with a split; `None` when by no more than rounding could fake.
    pub(super) fn gain<C: Content>(&self, best: &Best<C>) -> Option<f64> {
        let noise = (self.target * self.weight * 2.0f64.powi(-50)).abs();
        let is_gain = best.left.weight() > 0.0 && self.difference(&best.left).abs() > noise;
        is_gain.then(|| best.numerator / best.denominator / self.weight)
    }
}

impl<C: Content> Best<C> {
    pub(super) fn none() -> Self {
        Self { numerator: 0.0, denominator: 1.0, feature: 0, below: 0, num_left: 0, left: C::default() }
    }
}

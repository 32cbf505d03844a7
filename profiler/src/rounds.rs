//! Which points come next, and what they cost: blocks in the plan's order, and rounds under a time budget that go where
//! the predictor is least sure.

use std::{collections::HashSet, time::Duration};

/// Points between two looks at the clock of the budget's rounds.
const BLOCK: usize = 48;
/// Share of a time budget spent in the plan's own order, before anything is known to be unsure about.
const FIRST_SHARE: f64 = 0.3;
/// Share of it spent between two looks at where the predictor is unsure.
const ROUND_SHARE: f64 = 0.12;
/// Looks at the error while a whole plan is measured.
const NUM_LOOKS: usize = 8;

/// What points of a kind were seen to cost.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    total: Duration,
    count: u32,
}

impl Mean {
    fn add(&mut self, time: Duration) {
        self.total += time;
        self.count += 1;
    }

    /// The mean with one observation of `prior` added.
    fn or(self, prior: Duration) -> Duration {
        (self.total + prior) / (self.count + 1)
    }
}

/// Measuring time of a point, learned on the way. Launches that draw much power are measured after rests and cost more.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Costs {
    light: Mean,
    heavy: Mean,
}

impl Costs {
    pub(crate) fn add(&mut self, is_heavy: bool, time: Duration) {
        if is_heavy { self.heavy.add(time) } else { self.light.add(time) }
    }

    pub(crate) fn of(&self, is_heavy: bool) -> Duration {
        if is_heavy {
            self.heavy.or(Duration::from_millis(100))
        } else {
            self.light.or(Duration::from_millis(30))
        }
    }
}

/// Points of a plan that are still to be measured, in the plan's order.
#[derive(Debug)]
pub(crate) struct Todo {
    points: Vec<usize>,
    num_in_all: usize,
}

impl Todo {
    pub(crate) fn new(points: Vec<usize>) -> Self {
        Self { num_in_all: points.len(), points }
    }

    pub(crate) fn points(&self) -> &[usize] {
        &self.points
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    /// Removes and returns the points in front.
    pub(crate) fn next_block(&mut self) -> Vec<usize> {
        let rest = self.points.split_off(BLOCK.min(self.points.len()));
        std::mem::replace(&mut self.points, rest)
    }

    /// Puts the chosen points in front, in the order given.
    pub(crate) fn prefer(&mut self, chosen: &[usize]) {
        let is_chosen: HashSet<usize> = chosen.iter().copied().collect();
        let rest = self.points.iter().copied().filter(|point| !is_chosen.contains(point));
        self.points = chosen.iter().copied().chain(rest).collect();
    }
}

/// When to look at the error and at where the predictor is unsure.
#[derive(Debug)]
pub(crate) struct Looks {
    budget: Option<Duration>,
    next_elapsed: Duration,
    next_done: usize,
}

impl Looks {
    pub(crate) fn new(budget: Option<Duration>, todo: &Todo) -> Self {
        let next_elapsed = budget.unwrap_or_default().mul_f64(FIRST_SHARE);
        Self { budget, next_elapsed, next_done: todo.num_in_all.div_ceil(NUM_LOOKS) }
    }

    /// Whether it is time for a look; counts from there to the next.
    pub(crate) fn is_due(&mut self, elapsed: Duration, todo: &Todo) -> bool {
        match self.budget {
            Some(budget) if elapsed >= self.next_elapsed => {
                self.next_elapsed = elapsed + budget.mul_f64(ROUND_SHARE);
                true
            }
            Some(_) => false,
            None => {
                let done = todo.num_in_all - todo.points.len();
                let is_due = done >= self.next_done;
                if is_due {
                    self.next_done = done + todo.num_in_all.div_ceil(NUM_LOOKS);
                }
                is_due
            }
        }
    }

    /// Time that the points chosen at a look may take together.
    pub(crate) fn round(&self) -> Option<Duration> {
        self.budget.map(|budget| budget.mul_f64(ROUND_SHARE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preferred_points_come_first_and_none_is_lost() {
        let mut todo = Todo::new((0..200).collect());
        assert_eq!(todo.next_block(), (0..BLOCK).collect::<Vec<_>>());
        todo.prefer(&[150, 120]);
        assert_eq!(todo.points()[..3], [150, 120, BLOCK]);
        let mut rest: Vec<usize> = Vec::new();
        while !todo.is_empty() {
            rest.extend(todo.next_block());
        }
        rest.sort_unstable();
        assert_eq!(rest, (BLOCK..200).collect::<Vec<_>>());
    }

    #[test]
    fn costs_are_learned() {
        let mut costs = Costs::default();
        assert!(costs.of(true) > costs.of(false));
        for _ in 0..99 {
            costs.add(true, Duration::from_millis(50));
        }
        assert!(costs.of(true) < Duration::from_millis(51));
    }

    #[test]
    fn looks_come_at_shares_of_the_budget_or_of_the_plan() {
        let todo = Todo::new((0..80).collect());
        let mut looks = Looks::new(Some(Duration::from_secs(100)), &todo);
        assert!(!looks.is_due(Duration::from_secs(29), &todo));
        assert!(looks.is_due(Duration::from_secs(31), &todo));
        assert!(!looks.is_due(Duration::from_secs(42), &todo));
        assert!(looks.is_due(Duration::from_secs(43), &todo));
        let mut looks = Looks::new(None, &todo);
        assert!(!looks.is_due(Duration::from_secs(9999), &todo));
        let later = Todo { points: (10..80).collect(), num_in_all: 80 };
        assert!(looks.is_due(Duration::ZERO, &later) && !looks.is_due(Duration::ZERO, &later));
    }
}

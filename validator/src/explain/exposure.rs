//! How much of each step a request waits through, on average.

/// From when to when, ns.
pub(super) type Interval = (f64, f64);

/// Of each step, the share that lies in an interval, summed over the intervals and divided by their number; and the mean
/// length of what no step covers, ns.
///
/// `steps` are in order and do not overlap. With the parts of a step's time it gives the mean time that requests spend on
/// each: parts fill a step evenly.
pub(super) fn exposure(steps: &[Interval], intervals: &[Interval]) -> (Vec<f64>, f64) {
    // Whole steps by where they begin and end, so that a request costs two searches however long it runs.
    let mut whole = vec![0.0; steps.len() + 1];
    let mut partial = vec![0.0; steps.len()];
    let mut total_ns = 0.0;
    for &(from, to) in intervals {
        total_ns += to - from;
        let first = steps.partition_point(|step| step.1 <= from);
        let end = steps.partition_point(|step| step.0 < to);
        if first >= end {
            continue;
        }
        whole[first] += 1.0;
        whole[end] -= 1.0;
        // Of the ends of the interval, what lies outside of it does not count.
        let missing =
            |step: Interval, outside: f64| outside.max(0.0) / (step.1 - step.0).max(f64::MIN_POSITIVE);
        partial[first] -= missing(steps[first], from - steps[first].0);
        partial[end - 1] -= missing(steps[end - 1], steps[end - 1].1 - to);
    }
    let n = intervals.len().max(1) as f64;
    let mut running = 0.0;
    let mut covered_ns = 0.0;
    let shares = steps
        .iter()
        .zip(whole.iter().zip(&partial))
        .map(|(step, (whole, partial))| {
            running += whole;
            let share = running + partial;
            covered_ns += share * (step.1 - step.0);
            share / n
        })
        .collect();
    (shares, (total_ns - covered_ns) / n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_hold_their_share_of_each_step_and_the_rest_is_between() {
        let steps = [(10.0, 20.0), (25.0, 35.0), (35.0, 45.0)];
        let (shares, between) = exposure(&steps, &[(15.0, 30.0)]);
        assert_eq!((shares, between), (vec![0.5, 0.5, 0.0], 5.0));
        let (shares, between) = exposure(&steps, &[(0.0, 50.0), (27.0, 29.0)]);
        for (share, expected) in shares.iter().zip([0.5, 0.6, 0.5]) {
            assert!((share - expected).abs() < 1e-12, "{shares:?}");
        }
        assert!((between - (50.0 - 30.0) / 2.0).abs() < 1e-12);
        assert_eq!(exposure(&steps, &[(20.0, 25.0)]), (vec![0.0; 3], 5.0));
        assert_eq!(exposure(&[], &[(1.0, 3.0)]), (vec![], 2.0));
    }
}

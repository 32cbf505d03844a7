//! Which points of an operator hang together, so that they count as one observation.

use std::collections::BTreeMap;

use plumbline_schema::{Operator, OperatorShape};
use serde::Serialize;

use super::points::PointKey;

/// Fewest clusters that say anything: with ten, an operator whose every cluster moved the same way has `p = 2 / 2^10`,
/// which is still below 5 % after the correction for all 15 operators.
pub const MIN_CLUSTERS: usize = 10;

/// How points were put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Grouping {
    /// Points of one layout: the numbers of a shape that the model decides (`n` and `k`, heads, hidden size).
    Layout,
    /// Points of one layout whose loads (rows, tokens, sequences, keys) have the same power of two: where a profile has
    /// few layouts.
    LayoutAndLoad,
    /// Cold and hot of one shape: where that leaves too few as well.
    Shape,
}

/// The coarsest grouping with at least [`MIN_CLUSTERS`] clusters (else by shape), and the cluster of each point, from
/// 0 in the order of the keys.
#[must_use]
pub fn group(keys: &[&PointKey]) -> (Grouping, Vec<usize>, usize) {
    let by = |grouping| {
        let mut numbers = BTreeMap::new();
        let clusters = keys.iter().map(|key| {
            let next = numbers.len();
            *numbers.entry(cluster_key(key, grouping)).or_insert(next)
        });
        let clusters: Vec<_> = clusters.collect();
        (grouping, clusters, numbers.len())
    };
    for grouping in [Grouping::Layout, Grouping::LayoutAndLoad] {
        let found = by(grouping);
        if found.2 >= MIN_CLUSTERS {
            return found;
        }
    }
    by(Grouping::Shape)
}

fn cluster_key(key: &PointKey, grouping: Grouping) -> (Vec<u64>, Option<&str>) {
    let values = key.shape.values();
    // The first number is the load, but for attention, whose heads come first.
    let layout = if key.operator == Operator::Attention { &values[..3] } else { &values[1..] };
    match grouping {
        Grouping::Layout => (layout.to_vec(), None),
        Grouping::LayoutAndLoad => {
            let load = match key.shape {
                OperatorShape::Attention { load, .. } => {
                    let keys = load.prefill_kv_tokens.saturating_add(load.decode_kv_tokens);
                    keys.saturating_add(load.num_prefill_tokens.into())
                }
                _ => values[0],
            };
            let mut parts = layout.to_vec();
            parts.push(load.checked_ilog2().unwrap_or(0).into());
            (parts, None)
        }
        Grouping::Shape => (values, key.sequences.as_deref()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::CacheState;

    fn gemm(m: u32, n: u32, cache: CacheState) -> PointKey {
        let shape = OperatorShape::Gemm { m, n, k: 64 };
        PointKey { operator: Operator::OProj, shape, sequences: None, cache }
    }

    fn grouped(keys: &[PointKey]) -> (Grouping, Vec<usize>, usize) {
        group(&keys.iter().collect::<Vec<_>>())
    }

    #[test]
    fn the_coarsest_grouping_with_enough_clusters_is_taken() {
        use CacheState::{Cold, Hot};
        let layouts: Vec<_> = (1..=10).flat_map(|n| [1, 2, 3].map(|m| gemm(m, n, Cold))).collect();
        let (grouping, clusters, num_clusters) = grouped(&layouts);
        assert_eq!((grouping, num_clusters), (Grouping::Layout, 10));
        assert_eq!(clusters[..4], [0, 0, 0, 1]);

        // Loads 1, 2 to 3, 4 to 7, ... 512 to 1023.
        let loads: Vec<_> = (1..1024).map(|m| gemm(m, 8, Cold)).collect();
        let (grouping, clusters, num_clusters) = grouped(&loads);
        assert_eq!((grouping, num_clusters), (Grouping::LayoutAndLoad, 10));
        assert_eq!(clusters[..8], [0, 1, 1, 2, 2, 2, 2, 3]);

        let few: Vec<_> = (4..7).flat_map(|m| [Cold, Hot].map(|cache| gemm(m, 8, cache))).collect();
        assert_eq!(grouped(&few), (Grouping::Shape, vec![0, 0, 1, 1, 2, 2], 3));
    }
}

//! Does the profiler measure the same twice? Two independent profiles of one H100, kept as statistics files.

use std::path::Path;

use plumbline_bundles::{
    BundleDiff,
    diff::{Comparison, Side},
};
use plumbline_schema::Operator;

/// Least share of an operator's points whose two times are within 5 % of each other.
const SHARE_WITHIN_5_PCT: [(Operator, f64); 13] = [
    (Operator::Embedding, 0.95),
    (Operator::RmsNorm, 0.95),
    (Operator::QkvProj, 0.95),
    (Operator::QkNorm, 0.95),
    (Operator::Rope, 0.95),
    (Operator::KvCacheWrite, 0.95),
    (Operator::Attention, 0.95),
    (Operator::OProj, 0.95),
    (Operator::GateUpProj, 0.95),
    (Operator::SiluMul, 0.95),
    (Operator::DownProj, 0.95),
    (Operator::LmHead, 0.95),
    (Operator::Sample, 0.95),
];

fn side(name: &str) -> Side {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/repeatability").join(name);
    Side::open(&path).expect("a statistics file, as `plumb bundle stats` writes it")
}

#[test]
#[ignore = "needs the repeatability files"]
fn two_profiles_of_one_h100_agree() {
    let diff = BundleDiff::between(&side("h100-a.csv.zst"), &side("h100-b.csv.zst"), 0);
    let mut misses = Vec::new();
    for (operator, least_share) in SHARE_WITHIN_5_PCT {
        let compared = diff.operator(operator).and_then(|o| o.comparison.as_ref());
        let Some(Comparison { ratio, share_within_5_pct: share, .. }) = compared else {
            misses.push(format!("{operator}: no point in common"));
            continue;
        };
        println!("{operator:<15} median ratio {ratio:.4}, {share:.4} of the points within 5 %");
        if !(1.0 / 1.02..=1.02).contains(ratio) {
            misses.push(format!("{operator}: median ratio {ratio:.4}, expected within 2 % of 1"));
        }
        if *share < least_share {
            misses.push(format!("{operator}: {share:.4} of the points within 5 %, expected {least_share}"));
        }
    }
    assert!(misses.is_empty(), "{}", misses.join("\n"));
}

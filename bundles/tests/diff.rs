//! Two profiles compared: drift is told from noise, and noise from sameness.

use std::{fs, path::Path};

use plumbline_bundles::{
    BundleDiff, CacheState, Sample, TimeStats,
    diff::{Grouping, Overall, Side, Verdict, is_stats_file, points, read_stats, write_stats},
};
use plumbline_schema::{Heads, Operator, OperatorShape, StepBatch};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

fn normal(rng: &mut Pcg64) -> f64 {
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

fn sample(operator: Operator, shape: OperatorShape, batch: Option<StepBatch>, time_ns: f64) -> Sample {
    let stats = TimeStats::from_times(&[time_ns * 0.999, time_ns, time_ns * 1.001]).unwrap();
    Sample {
        batch,
        cache: CacheState::Cold,
        sm_clock_mhz: Some(1980),
        kernel: "kernel".into(),
        ..Sample::bare(operator, shape, stats)
    }
}

/// Samples of three operators: twelve layouts of a GEMM, one layout of attention, six rows of an embedding.
fn samples() -> Vec<Sample> {
    let mut samples = Vec::new();
    for n in 1..=12 {
        for m in [1, 16, 256, 4096] {
            let shape = OperatorShape::Gemm { m, n: 512 * n, k: 2048 };
            samples.push(sample(Operator::OProj, shape, None, 2000.0 + f64::from(m * n)));
        }
    }
    for context in (0..14).map(|power| 1u32 << power) {
        for num_seqs in [1, 4] {
            let contexts = vec![context.to_string(); num_seqs].join(";");
            let batch = StepBatch::parse("", &contexts).unwrap();
            let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
            let shape = OperatorShape::Attention { heads, load: batch.shape().attention };
            samples.push(sample(Operator::Attention, shape, Some(batch), 3000.0 + f64::from(context)));
        }
    }
    for num_tokens in 1..=6 {
        let shape = OperatorShape::Embedding { num_tokens, hidden_size: 1024 };
        samples.push(sample(Operator::Embedding, shape, None, 1500.0));
    }
    samples
}

/// A side whose times are those of [`samples`] with log-normal noise, and with `factor` for what `test` picks.
fn side(seed: u64, sigma: f64, factor: f64, test: impl Fn(&Sample) -> bool) -> Side {
    let mut rng = Pcg64::seed_from_u64(seed);
    let mut samples = samples();
    for sample in &mut samples {
        let factor = if test(sample) { factor } else { 1.0 };
        sample.stats.p50_ns *= factor * (sigma * normal(&mut rng)).exp();
    }
    Side { name: seed.to_string(), points: points::from_samples(&samples), machine: None }
}

fn plain(seed: u64, sigma: f64) -> Side {
    side(seed, sigma, 1.0, |_| false)
}

fn verdict(diff: &BundleDiff, operator: Operator) -> Verdict {
    diff.operator(operator).unwrap().verdict
}

#[test]
fn the_same_machine_measured_twice_is_the_same() {
    let mut num_same = 0;
    for seed in 0..20 {
        let diff = BundleDiff::between(&plain(seed, 0.01), &plain(seed + 100, 0.01), 0);
        assert_ne!(diff.verdict, Overall::Drift, "seed {seed}: {diff:?}");
        num_same += usize::from(verdict(&diff, Operator::OProj) == Verdict::Same);
        let gemm = diff.operator(Operator::OProj).unwrap().comparison.as_ref().unwrap();
        assert_eq!((gemm.clustered_by, gemm.num_clusters), (Grouping::Layout, 12));
        // Two times 1 %, added as independent.
        assert!((0.007..0.022).contains(&gemm.between_run_sigma), "{gemm:?}");
        assert!((gemm.within_run_sigma - 0.001 * 1.2533 * (2.0f64 / 3.0).sqrt()).abs() < 2e-5, "{gemm:?}");
    }
    assert!(num_same >= 19, "{num_same} of 20");
}

#[test]
fn a_slower_operator_is_named_and_no_other() {
    for seed in 0..10 {
        let slow = side(seed, 0.01, 1.05, |s| s.operator == Operator::OProj);
        let diff = BundleDiff::between(&plain(seed + 100, 0.01), &slow, 0);
        assert_eq!(diff.verdict, Overall::Drift);
        assert_eq!(verdict(&diff, Operator::OProj), Verdict::Slower, "seed {seed}");
        let drifted = diff.operators.iter().filter(|o| o.verdict.is_drift()).count();
        assert_eq!(drifted, 1, "{diff:?}");
        let gemm = diff.operator(Operator::OProj).unwrap().comparison.as_ref().unwrap();
        assert!(gemm.ratio_low < 1.05 * 1.01 && gemm.ratio_high > 1.05 / 1.01, "{gemm:?}");
        let back = BundleDiff::between(&slow, &plain(seed + 100, 0.01), 0);
        assert_eq!(verdict(&back, Operator::OProj), Verdict::Faster);
    }
}

#[test]
fn loud_noise_is_not_called_drift() {
    let mut num_noisy = 0;
    for seed in 0..20 {
        let diff = BundleDiff::between(&plain(seed, 0.2), &plain(seed + 100, 0.2), 0);
        assert_ne!(verdict(&diff, Operator::OProj), Verdict::Same);
        num_noisy += usize::from(verdict(&diff, Operator::OProj) == Verdict::Noisy);
        assert!(diff.operator(Operator::OProj).unwrap().comparison.as_ref().unwrap().between_run_sigma > 0.1);
    }
    assert!(num_noisy >= 19, "{num_noisy} of 20");
}

#[test]
fn one_layout_that_moved_is_no_drift_of_its_operator() {
    // A layout whose placement was unlucky: four of 48 points, 20 % slower.
    let unlucky =
        side(1, 0.003, 1.2, |s| s.operator == Operator::OProj && s.shape.values()[1..] == [512, 2048]);
    let diff = BundleDiff::between(&plain(2, 0.003), &unlucky, 0);
    assert_eq!(verdict(&diff, Operator::OProj), Verdict::Same);
    assert!(
        diff.moved[..4].iter().all(|p| p.shape.ends_with("n=512 k=2048") && p.ratio > 1.1),
        "{:?}",
        diff.moved
    );
    let comparison = diff.operator(Operator::OProj).unwrap().comparison.as_ref().unwrap();
    assert!((comparison.share_within_5_pct - 44.0 / 48.0).abs() < 1e-12);
}

#[test]
fn too_few_points_and_none_in_common_are_said() {
    let a = plain(1, 0.001);
    let mut b = plain(2, 0.001);
    b.points.retain(|p| p.key.operator != Operator::Attention);
    let diff = BundleDiff::between(&a, &b, 0);
    let embedding = diff.operator(Operator::Embedding).unwrap();
    assert_eq!((embedding.verdict, embedding.num_common), (Verdict::Noisy, 6));
    assert_eq!(embedding.remark.as_deref(), Some("6 different shapes in common, 10 needed"));
    let attention = diff.operator(Operator::Attention).unwrap();
    assert_eq!((attention.verdict, attention.num_only_a, attention.num_only_b), (Verdict::Missing, 28, 0));
    assert_eq!(attention.comparison, None);
    assert_eq!(diff.operator(Operator::Rope), None);
    assert_eq!(diff.verdict, Overall::Unclear);
}

#[test]
fn attention_points_are_paired_by_their_sequences() {
    // Two batches of one shape: 8 keys and 8 more in two decodes, told apart by nothing but the sequences.
    let contexts = [("7;7;1", 5000.0), ("7;5;3", 9000.0)];
    let points = |order: [usize; 2]| {
        let samples = order.map(|i| {
            let (text, time_ns) = contexts[i];
            let batch = StepBatch::parse("", text).unwrap();
            let heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };
            let shape = OperatorShape::Attention { heads, load: batch.shape().attention };
            sample(Operator::Attention, shape, Some(batch), time_ns)
        });
        assert_eq!(samples[0].shape, samples[1].shape);
        Side { name: String::new(), points: points::from_samples(&samples), machine: None }
    };
    let diff = BundleDiff::between(&points([0, 1]), &points([1, 0]), 0);
    assert_eq!(diff.operators[0].num_common, 2);
    assert!(diff.moved.is_empty());
}

#[test]
fn clocks_and_kernels_are_named_as_causes() {
    let a = plain(1, 0.001);
    let mut b = side(2, 0.001, 1.1, |s| s.operator == Operator::OProj);
    for point in b.points.iter_mut().filter(|p| p.key.operator == Operator::OProj) {
        point.sm_clock_mhz = Some(1782);
        point.kernel = "another".into();
    }
    let diff = BundleDiff::between(&a, &b, 0);
    let gemm = diff.operator(Operator::OProj).unwrap().comparison.as_ref().unwrap();
    assert!((gemm.sm_clock_ratio.unwrap() - 0.9).abs() < 1e-9);
    assert_eq!(gemm.num_kernel_changed, 48);
    let notes = diff.notes.join("\n");
    assert!(notes.contains("SM clocks of 48 of 82 common points differ"), "{notes}");
    assert!(notes.contains("48 of 82 common points ran another kernel"), "{notes}");
    assert_eq!(diff.moved[0].kernels, Some(["kernel".to_owned(), "another".to_owned()]));
}

#[test]
fn a_profile_against_itself_has_ratio_one_exactly() {
    let a = plain(3, 0.3);
    let diff = BundleDiff::between(&a, &a, 0);
    for operator in &diff.operators {
        let comparison = operator.comparison.as_ref().unwrap();
        for ratio in [comparison.ratio, comparison.ratio_low, comparison.ratio_high] {
            assert!(ratio.to_bits() == 1.0f64.to_bits(), "{operator:?}");
        }
        assert!((comparison.p_value - 1.0).abs() < 1e-15 && comparison.between_run_sigma == 0.0);
        let expected = if operator.num_common < 10 { Verdict::Noisy } else { Verdict::Same };
        assert_eq!(operator.verdict, expected);
    }
    assert!(diff.moved.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn swapping_the_sides_gives_the_mirror_image(seed in 0u64..1000, sigma in 0.0..0.1f64, factor in 0.8..1.25f64) {
        let a = plain(seed, sigma);
        let b = side(seed + 5000, sigma, factor, |s| s.operator == Operator::Attention);
        let there = BundleDiff::between(&a, &b, seed);
        let back = BundleDiff::between(&b, &a, seed);
        prop_assert_eq!(there.verdict, back.verdict);
        for (x, y) in there.operators.iter().zip(&back.operators) {
            let mirrored = match y.verdict {
                Verdict::Faster => Verdict::Slower,
                Verdict::Slower => Verdict::Faster,
                other => other,
            };
            prop_assert_eq!(x.verdict, mirrored);
            let (x, y) = (x.comparison.as_ref().unwrap(), y.comparison.as_ref().unwrap());
            for (x, y) in [(x.ratio, y.ratio), (x.ratio_low, y.ratio_high), (x.ratio_high, y.ratio_low)] {
                prop_assert!((x * y - 1.0).abs() < 1e-9, "{} {}", x, y);
            }
            prop_assert!((x.p_value - y.p_value).abs() < 1e-12);
            prop_assert_eq!(x.share_within_5_pct.to_bits(), y.share_within_5_pct.to_bits());
        }
        let shapes = |diff: &BundleDiff| diff.moved.iter().map(|p| p.shape.clone()).collect::<Vec<_>>();
        prop_assert_eq!(shapes(&there), shapes(&back));
        prop_assert_eq!(&BundleDiff::between(&a, &b, seed), &there);
    }
}

#[test]
fn a_statistics_file_reads_back_as_the_points_themselves() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["h100-a.csv", "h100-a.csv.zst"] {
        let path = folder.path().join(name);
        write_stats(&path, &samples()).unwrap();
        assert!(is_stats_file(&path));
        assert_eq!(read_stats(&path).unwrap(), points::from_samples(&samples()));
        assert_eq!(Side::open(&path).unwrap().points.len(), 82);
    }
    assert!(!is_stats_file(Path::new("bundle")) && !is_stats_file(Path::new("a.csv/bundle")));
    let size = |name: &str| fs::metadata(folder.path().join(name)).unwrap().len();
    assert!(2 * size("h100-a.csv.zst") < size("h100-a.csv"));
}

#[test]
fn a_bad_statistics_file_is_refused_with_its_place() {
    const HEADER: &str = "operator,shape,sequences,cache,p50_ns,n,std_ns,sm_clock_mhz,kernel\n";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.csv");
    let good = "rope,1 16 8 128,,cold,1500.5,10,1.5,1980,rope\n";
    let read = |text: &str| {
        fs::write(&path, text).unwrap();
        read_stats(&path).map_err(|e| e.to_string().replace(path.to_str().unwrap(), "x.csv"))
    };
    assert_eq!(read(&format!("{HEADER}{good}")).unwrap().len(), 1);
    // The kernel and clocks need not be known.
    let bare =
        "operator,shape,sequences,cache,p50_ns,n,std_ns,sm_clock_mhz\nrope,1 16 8 128,,hot,1500,1,0,\n";
    assert_eq!(read(bare).unwrap()[0].sm_clock_mhz, None);
    for (row, expected) in [
        ("warp,1,,cold,1,1,0,,", "line 2, column `operator`: expected an operator's name, found `warp`"),
        (
            "rope,1 16,,cold,1,1,0,,",
            "line 2, column `shape`: expected numbers for num_tokens num_q_heads num_kv_heads head_dim, found `1 16`",
        ),
        ("rope,1 16 8 128,,tepid,1,1,0,,", "line 2, column `cache`: expected `cold` or `hot`, found `tepid`"),
        ("rope,1 16 8 128,0,cold,1,1,0,,", "line 2, column `sequences`: expected nothing, found `0`"),
        ("rope,1 16 8 128,,cold,0,1,0,,", "line 2, column `p50_ns`: expected a finite time above 0, found 0"),
        (
            "rope,1 16 8 128,,cold,NaN,1,0,,",
            "line 2, column `p50_ns`: expected a finite time above 0, found NaN",
        ),
        ("rope,1 16 8 128,,cold,1,0,0,,", "line 2, column `n`: expected at least 1, found 0"),
        (
            "rope,1 16 8 128,,cold,1,1,-1,,",
            "line 2, column `std_ns`: expected a finite time from 0, found -1",
        ),
        ("rope,1 16 8 128,,cold,x,1,0,,", "line 2, column `p50_ns`: expected a number, found `x`"),
        (
            "attention,1 1 64 0 0 0 0 1 1 1,,cold,1,1,0,,",
            "line 2, column `sequences`: expected 16 lower-case hex digits, found ``",
        ),
    ] {
        assert_eq!(read(&format!("{HEADER}{row}\n")).unwrap_err(), format!("x.csv, {expected}"));
    }
    let twice = read(&format!("{HEADER}{good}{good}")).unwrap_err();
    assert_eq!(twice, "x.csv, line 3: expected each point once, found one from a line above");
    assert_eq!(read(HEADER).unwrap_err(), "x.csv: expected at least one row, found none");
}

//! The bundle format on disk: what is written reads back, and what was tampered with is refused.

mod common;

use std::{fs, path::Path};

use common::{engine, host, manifest, sample, samples, write_bundle};
use plumbline_bundles::{Bundle, BundleError, BundleWriter, FormatVersion, Sample, bundle, samples as csv};
use plumbline_schema::{HostInfo, InputError, Operator, OperatorShape, StepBatch};
use proptest::prelude::*;

#[test]
fn a_bundle_round_trips() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("b");
    let written = write_bundle(&path);
    let read = Bundle::open(&path).unwrap();
    assert_eq!(read.digest(), written.digest());
    assert_eq!(read.manifest, written.manifest);
    assert_eq!(read.samples().unwrap(), samples());
    assert_eq!(read.host().unwrap(), host());
    assert_eq!(read.engine("made-up").unwrap(), engine("made-up"));
    let report = read.verify().unwrap();
    assert!(report.is_sound(), "{:?}", report.problems);
    assert_eq!((report.num_files, report.num_samples, report.num_engines), (4, 3, 1));
    assert_eq!(report.stray_files, Vec::<String>::new());
    // Nothing but the bundle is left beside it.
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn the_same_content_has_the_same_digest() {
    let folder = tempfile::tempdir().unwrap();
    let a = write_bundle(&folder.path().join("a"));
    let b = write_bundle(&folder.path().join("b"));
    assert_eq!(a.digest(), b.digest());
    assert_eq!(a.digest(), bundle::sha256_hex(&fs::read(a.root.join("manifest.json")).unwrap()));
}

#[test]
fn inspect_counts_points_and_domains() {
    let folder = tempfile::tempdir().unwrap();
    let inspection = write_bundle(&folder.path().join("b")).inspect().unwrap();
    let rope = &inspection.operators[0];
    assert_eq!((rope.operator, rope.num_points, rope.num_cold, rope.num_hot), (Operator::Rope, 2, 2, 0));
    assert_eq!(rope.domain["num_tokens"], (1, 64));
    assert_eq!(inspection.engines, ["made-up"]);
    assert_eq!(inspection.host, Some(host()));
    serde_json::to_string(&inspection).unwrap();
}

#[test]
fn update_adds_and_replaces() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("b");
    let mut written = write_bundle(&path);
    let before = written.digest().to_owned();
    let second = bundle::to_json("x", &engine("second")).unwrap();
    written.update(vec![(bundle::engine_name("second"), second)]).unwrap();
    let read = Bundle::open(&path).unwrap();
    assert_eq!(read.engine_names(), ["made-up", "second"]);
    assert_eq!(read.digest(), written.digest());
    assert_ne!(read.digest(), before);
    let missing = read.engine("third").unwrap_err().to_string();
    assert!(missing.ends_with("no engine profile `third`: it has made-up, second"), "{missing}");
}

#[test]
fn samples_may_be_compressed() {
    let folder = tempfile::tempdir().unwrap();
    let plain = csv::to_csv(Operator::Rope, &samples()[..2]);
    let name = "samples/rope.csv.zst";
    let mut writer = BundleWriter::new(&folder.path().join("b")).unwrap();
    writer.add(name, &zstd::encode_all(&plain[..], 3).unwrap()).unwrap();
    let mut bundle = writer.finish(manifest()).unwrap();
    assert_eq!(bundle.samples().unwrap(), samples()[..2]);
    assert!(bundle.verify().unwrap().is_sound());
    // 100 MB of zeros pack into a few kilobytes.
    let bomb = zstd::encode_all(&vec![0u8; 100 << 20][..], 3).unwrap();
    bundle.update(vec![(name.into(), bomb)]).unwrap();
    let error = bundle.samples().unwrap_err().to_string();
    assert!(error.ends_with("expected at most 67108864 bytes unpacked, found more"), "{error}");
    bundle.update(vec![(name.into(), plain.clone())]).unwrap();
    let error = bundle.samples().unwrap_err().to_string();
    assert!(error.ends_with("expected zstd-compressed text, found other bytes"), "{error}");
    bundle.update(vec![("samples/rope.csv".into(), plain)]).unwrap();
    let problems = bundle.verify().unwrap().problems;
    assert!(problems[0].contains("expected the samples of rope once"), "{problems:?}");
}

/// The manifest is written last: a crash before it leaves the old bundle, or an error that says what to do.
#[test]
fn a_half_done_update_is_readable_or_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("b");
    let written = write_bundle(&path);
    fs::write(path.join("engines/added.json"), "{}").unwrap();
    let read = Bundle::open(&path).unwrap();
    assert_eq!(read.engine_names(), ["made-up"]);
    assert_eq!(read.verify().unwrap().stray_files, ["engines/added.json"]);
    fs::write(path.join("engines/made-up.json"), "{}").unwrap();
    let error = written.engine("made-up").unwrap_err();
    assert!(matches!(error, BundleError::Mismatch { what: "length", .. }), "{error}");
    assert!(error.to_string().contains("`plumb calibrate` makes it anew"), "{error}");
}

#[test]
fn a_writer_refuses_what_exists_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("b");
    write_bundle(&path);
    assert!(matches!(BundleWriter::new(&path), Err(BundleError::Input(InputError::Invalid { .. }))));
    let mut unfinished = BundleWriter::new(&folder.path().join("c")).unwrap();
    unfinished.add_json(bundle::HOST, &host()).unwrap();
    drop(unfinished);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    for name in ["../x", "/x", "a/../b", "manifest.json", ""] {
        let mut writer = BundleWriter::new(&folder.path().join("d")).unwrap();
        assert!(writer.add(name, b"").is_err(), "{name}");
    }
}

#[test]
fn every_truncated_manifest_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("b");
    write_bundle(&path);
    let file = path.join("manifest.json");
    let whole = fs::read(&file).unwrap();
    // The last byte is the final newline, without which the document is still whole.
    for end in 0..whole.len() - 1 {
        fs::write(&file, &whole[..end]).unwrap();
        let error = Bundle::open(&path).unwrap_err();
        assert!(matches!(error, BundleError::Input(InputError::Invalid { .. })), "{end}: {error}");
    }
}

#[test]
fn every_truncated_samples_file_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("b");
    let written = write_bundle(&path);
    let file = path.join("samples/attention.csv");
    let whole = fs::read(&file).unwrap();
    for end in 0..whole.len() {
        fs::write(&file, &whole[..end]).unwrap();
        let error = written.samples().unwrap_err();
        assert!(matches!(error, BundleError::Mismatch { what: "length", .. }), "{end}: {error}");
        // And were the manifest made to fit: no panic, and never a row that was not there.
        if let Ok(rows) = csv::from_csv(Operator::Attention, &whole[..end], &file) {
            assert_eq!(rows[0].stats, samples()[2].stats);
        }
    }
}

#[test]
fn every_flipped_byte_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("b");
    let written = write_bundle(&path);
    for name in ["samples/rope.csv", "host.json", "engines/made-up.json"] {
        let file = path.join(name);
        let whole = fs::read(&file).unwrap();
        for at in (0..whole.len()).step_by(7) {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            fs::write(&file, &flipped).unwrap();
            let error = written.read_file(name).unwrap_err();
            assert!(matches!(error, BundleError::Mismatch { what: "sha256", .. }), "{error}");
            if name.ends_with("csv") {
                let _ = csv::from_csv(Operator::Rope, &flipped, &file);
            }
        }
        assert!(!written.verify().unwrap().is_sound());
        fs::write(&file, &whole).unwrap();
    }
    assert!(written.verify().unwrap().is_sound());
    fs::remove_file(path.join("host.json")).unwrap();
    let error = written.host().unwrap_err().to_string();
    assert!(error.ends_with("no host.json, which its manifest lists: `plumb profile` makes it"), "{error}");
}

/// Replaces text in a bundle's manifest and opens it.
fn open_with(path: &Path, from: &str, to: &str) -> Result<Bundle, BundleError> {
    let file = path.join("manifest.json");
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(from), "{from}");
    fs::write(&file, text.replacen(from, to, 1)).unwrap();
    let result = Bundle::open(path);
    fs::write(&file, text).unwrap();
    result
}

#[test]
fn other_versions_say_which_side_to_upgrade_whatever_else_they_hold() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("b");
    write_bundle(&path);
    let FormatVersion { major, minor } = FormatVersion::CURRENT;
    let text_of = |major: u32, minor: u32| format!("\"major\": {major},\n    \"minor\": {minor}");
    let (version, current) = (text_of(major, minor), format!("{major}.{minor}"));
    for (major, minor, action) in [
        (major - 1, 9, "make the bundle anew"),
        (major, minor + 1, "upgrade plumb"),
        (major + 1, 0, "upgrade plumb"),
    ] {
        let error = open_with(&path, &version, &text_of(major, minor)).unwrap_err();
        assert!(matches!(error, BundleError::Version { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.ends_with(&format!("expected bundle format {current}, found {major}.{minor}: {action}")),
            "{text}"
        );
    }
    for minor in 0..minor {
        open_with(&path, &version, &text_of(major, minor)).expect("an older minor version");
    }
    let newer = format!("{}\n  }},\n  \"news\": {{\n    \"x\": 1", text_of(major, minor + 6));
    let error = open_with(&path, &version, &newer).unwrap_err();
    assert!(matches!(error, BundleError::Version { .. }), "{error}");
    let error = open_with(&path, "\"models\"", "\"news\": 1, \"models\"").unwrap_err().to_string();
    assert!(error.contains("unknown field `news`"), "{error}");
}

#[test]
fn hostile_manifests_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("b");
    write_bundle(&path);
    for name in ["../secret", "/etc/passwd", "samples/../../x", "samples\\\\x", "samples//x", ""] {
        let error = open_with(&path, "\"host.json\"", &format!("\"{name}\"")).unwrap_err().to_string();
        assert!(error.contains("key `files`: expected relative paths"), "{error}");
    }
    let error = open_with(&path, "\"num_sms\": 132", "\"num_sms\": 0").unwrap_err().to_string();
    assert!(error.contains("key `gpu.num_sms`"), "{error}");
    let huge = open_with(&path, "\"num_bytes\": ", "\"num_bytes\": 9999999999999").unwrap();
    let problems = huge.verify().unwrap().problems;
    assert!(problems[0].contains("num_bytes`: expected at most 67108864"), "{problems:?}");
}

#[test]
fn verify_finds_a_sample_under_the_physical_floor() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = BundleWriter::new(&folder.path().join("b")).unwrap();
    // 2 * 8192^3 FLOP cannot take 1 us.
    let shape = OperatorShape::Gemm { m: 8192, n: 8192, k: 8192 };
    writer.add_samples(&[sample(Operator::OProj, shape, None, 1000.0)]).unwrap();
    let report = writer.finish(manifest()).unwrap().verify().unwrap();
    assert_eq!(report.problems.len(), 1);
    assert!(report.problems[0].contains("o_proj.csv, line 2, column `min_ns`"), "{:?}", report.problems);
}

#[test]
fn bad_cells_name_line_and_column() {
    let good = String::from_utf8(csv::to_csv(Operator::Rope, &samples()[..2])).unwrap();
    let error_of = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        let text = good.replacen(from, to, 1);
        csv::from_csv(Operator::Rope, text.as_bytes(), Path::new("rope.csv")).unwrap_err().to_string()
    };
    let cases = [
        ("cache,", "cash,", "rope.csv, line 1: expected a column `cache`"),
        ("64,16,8,128,cold", "0,16,8,128,cold", "rope.csv, line 3, column `num_tokens`: expected 1 to"),
        ("64,16,8,128,cold", "-4,16,8,128,cold", "line 3, column `num_tokens`: expected a whole number"),
        ("64,16,8,128,cold", "64,16,8,9999999999999,cold", "line 3, column `head_dim`: expected 1 to"),
        ("64,16,8,128,cold", "4194304,4194304,4194304,128,cold", "expected a shape that a GPU can hold"),
        ("64,16,8,128,cold", "64,16,8,128,warm", "column `cache`: expected `cold` or `hot`, found `warm`"),
        ("cold,3,1500.25", "cold,0,1500.25", "line 2, column `num_samples`: expected at least 1, found 0"),
        ("cold,3,1500.25", "cold,3,NaN", "line 2, column `min_ns`: expected a finite time above 0"),
        ("cold,3,1500.25", "cold,3,1e9", "line 2, column `p50_ns`: expected at least min_ns"),
        ("1980,,312.5", "fast,,312.5", "column `sm_clock_mhz`: expected a clock in MHz, or nothing"),
        ("1980,,312.5", "1980,,inf", "column `power_w`: expected a finite power from 0, found inf"),
    ];
    for (from, to, expected) in cases {
        let error = error_of(from, to);
        assert!(error.contains(expected), "{error}");
    }
    let attention = String::from_utf8(csv::to_csv(Operator::Attention, &samples()[2..])).unwrap();
    let text = attention.replace("32:0", "33:0");
    let error = csv::from_csv(Operator::Attention, text.as_bytes(), Path::new("a.csv")).unwrap_err();
    assert!(error.to_string().contains("column `prefill_chunks_tokens_context`"), "{error}");
}

#[test]
fn bad_engine_profiles_name_the_key() {
    let mut profile = engine("made-up");
    profile.fitted_on.host = Some(HostInfo::of_score(87.5));
    let good = serde_json::to_string_pretty(&profile).unwrap();
    let error_of = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        let text = good.replacen(from, to, 1);
        plumbline_bundles::EngineProfile::parse(&text, Path::new("e.json")).unwrap_err().to_string()
    };
    let cases = [
        ("\"name\": \"made-up\"", "\"name\": \"../x\"", "key `name`"),
        ("\"launch_ns\": 0.0", "\"launch_ns\": -1.0", "key `dispatch.eager.launch_ns`"),
        (
            "\"prefill_gemm\": 1.0",
            "\"prefill_gemm\": 5.5",
            "key `operator_scales.prefill_gemm`: expected a factor from 0.2 to 5",
        ),
        ("1.1\n", "0.95\n", "key `dispatch.eager.residual_quantiles[2]`: expected at least 1"),
        ("0.9,", "0.0,", "key `dispatch.eager.residual_quantiles[0]`: expected a finite number above 0"),
        ("\"host_factor\": 1.0", "\"host_factor\": 0.0", "key `host_factor`"),
        ("\"admit_ns\": 0.0", "\"admit_ns\": 1e999", "out of range"),
        ("\"scheduler\"", "\"schedular\"", "unknown field `schedular`"),
        (
            "87.5",
            "0.0",
            "key `fitted_on.host.single_thread_score`: expected a finite number above 0, found 0",
        ),
    ];
    for (from, to, expected) in cases {
        let error = error_of(from, to);
        assert!(error.contains(expected), "{error}");
    }
    let path = Path::new("e.json");
    for end in 0..good.len() {
        assert!(plumbline_bundles::EngineProfile::parse(&good[..end], path).is_err(), "{end}");
    }
}

#[test]
fn a_profile_of_an_unknown_host_is_written_as_before_hosts_were_recorded() {
    let unknown = engine("made-up");
    let text = serde_json::to_string(&unknown).unwrap();
    assert!(!text.contains("\"host\""), "{text}");
    let parse = |text: &str| plumbline_bundles::EngineProfile::parse(text, Path::new("e.json")).unwrap();
    assert_eq!(parse(&text), unknown);
    let mut known = unknown;
    known.fitted_on.host = Some(HostInfo { cpu_model: Some("a CPU".into()), single_thread_score: 87.5 });
    assert_eq!(parse(&serde_json::to_string(&known).unwrap()), known);
}

/// Any sample that the format can hold.
fn any_sample() -> impl Strategy<Value = Sample> {
    let batch =
        (prop::collection::vec((1u32..9000, 0u32..40000), 0..5), prop::collection::vec(0u32..40000, 1..40));
    let times = prop::collection::vec(1e-3f64..1e12, 1..6);
    let clocks = (any::<Option<u32>>(), any::<Option<u32>>(), prop::option::of(0f64..1e4));
    let texts = ("\\PC{0,9}", "[a-z,\"\n |]{0,9}", "[a-z|]{0,9}");
    (0..15usize, 1u64..4000, batch, times, any::<bool>(), clocks, texts).prop_map(
        |(operator, value, (chunks, contexts), times, is_hot, clocks, texts)| {
            let operator = Operator::ALL[operator];
            let mut batch = None;
            let shape = if operator == Operator::Attention {
                let text: Vec<_> = chunks.iter().map(|(n, c)| format!("{n}:{c}")).collect();
                let mut of = StepBatch::parse(&text.join(";"), "").unwrap();
                of.decode_contexts = contexts;
                let load = of.shape().attention;
                batch = Some(of);
                OperatorShape::Attention { heads: common::HEADS, load }
            } else {
                let values: Vec<_> =
                    operator.shape_columns().iter().zip(1..).map(|(_, i)| i * value).collect();
                OperatorShape::from_values(operator, &values).unwrap()
            };
            let cache = [plumbline_bundles::CacheState::Cold, plumbline_bundles::CacheState::Hot]
                [usize::from(is_hot)];
            Sample {
                stats: plumbline_bundles::TimeStats::from_times(&times).unwrap(),
                cache,
                sm_clock_mhz: clocks.0,
                memory_clock_mhz: clocks.1,
                power_w: clocks.2,
                kernel: texts.0,
                throttle: texts.1,
                flags: texts.2,
                ..sample(operator, shape, batch, 1.0)
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn samples_round_trip(sample in any_sample()) {
        let bytes = csv::to_csv(sample.operator, [&sample]);
        let read = csv::from_csv(sample.operator, &bytes, Path::new("x.csv")).unwrap();
        prop_assert_eq!(read, vec![sample]);
    }

    #[test]
    fn any_bytes_parse_or_fail_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for operator in [Operator::Rope, Operator::Attention] {
            let mut file = csv::to_csv(operator, []);
            file.extend(&bytes);
            let _ = csv::from_csv(operator, &file, Path::new("x.csv"));
        }
    }
}

//! The whole run on a device with a known law: from a plan to a bundle that verifies.

use std::{collections::HashSet, fs, path::Path, time::Duration};

use plumbline_bundles::{Bundle, CacheState, CurveError, CurvePoint, Sample};
use plumbline_profiler::{
    Advisor, Envelope, FakeDevice, Plan, Point, ProfileError, ProfileOptions, ProfileOutcome, Progress,
    Stage, StoppingRule, fake::Fault, profile,
};
use plumbline_schema::{ModelSpec, Operator, OperatorShape};

/// A small plan, so that each test is quick.
fn options(out: &Path) -> ProfileOptions {
    let envelope = Envelope {
        max_num_tokens: 300,
        max_num_seqs: 16,
        max_model_len: 2048,
        max_kv_tokens: 20_000,
        tensor_parallel_sizes: vec![1],
    };
    ProfileOptions {
        envelope,
        created: "2026-01-01T00:00:00Z".into(),
        rule: StoppingRule { max_samples: 20, ..StoppingRule::default() },
        ..ProfileOptions::new(vec![ModelSpec::load("qwen3-0.6b").unwrap()], out.into())
    }
}

/// Profiles a device into a bundle inside `folder`.
fn run(folder: &Path, mut device: FakeDevice) -> Result<ProfileOutcome, ProfileError> {
    profile(&mut device, &options(&folder.join("bundle")), None, &mut |_| {})
}

fn measured(outcome: &ProfileOutcome) -> HashSet<Operator> {
    outcome.bundle.samples().unwrap().iter().map(|sample| sample.operator).collect()
}

#[test]
fn a_profile_becomes_a_bundle_that_verifies() {
    let folder = tempfile::tempdir().unwrap();
    let outcome = run(folder.path(), FakeDevice::new(1)).unwrap();
    assert!(outcome.is_complete(), "{:?}", outcome.bundle.manifest.incomplete);
    assert_eq!((outcome.num_throttled, outcome.num_below_floor), (0, 0));
    assert_eq!(outcome.num_measured, outcome.num_planned);
    let bundle = Bundle::open(&folder.path().join("bundle")).unwrap();
    let report = bundle.verify().unwrap();
    assert!(report.is_sound(), "{:?}", report.problems);
    assert_eq!(report.num_samples, outcome.num_planned);
    assert!(report.stray_files.is_empty());

    let plan: Plan = bundle.read_payload_json("plan.json", "a plan").unwrap();
    let device = FakeDevice::new(1);
    for sample in bundle.samples().unwrap() {
        let point = Point { operator: sample.operator, shape: sample.shape, batch: sample.batch.clone() };
        assert!(plan.points.iter().any(|p| p.point == point && p.cache == sample.cache));
        if sample.cache == CacheState::Cold {
            let error = sample.stats.p50_ns / device.true_time_ns(&point) - 1.0;
            assert!(error.abs() < 0.03, "{point:?}: {error}");
        }
    }
    assert_eq!(bundle.host().unwrap().cpu_model, "fake");
    let evidence = bundle.manifest.evidence.as_ref().unwrap();
    assert!(evidence.copy_bandwidth_bytes_per_s.unwrap() > 0.0);
    assert!(!evidence.during.is_empty());
    assert_eq!(bundle.manifest.device.as_ref().unwrap().device_name, "fake");
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let folders: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let bundles: Vec<_> = folders
        .iter()
        .zip([7, 7, 8])
        .map(|(folder, seed)| run(folder.path(), FakeDevice::new(seed)).unwrap().bundle)
        .collect();
    for name in bundles[0].payload_names("") {
        let bytes = |i: usize| fs::read(bundles[i].root.join(name)).unwrap();
        assert_eq!(bytes(0), bytes(1), "{name}");
        if name.starts_with("samples/") {
            assert_ne!(bytes(0), bytes(2), "{name}");
        }
    }
}

#[test]
fn a_failing_operator_is_recorded_and_the_others_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let fault = Fault::Fails { operator: Operator::Rope, from: 100, fatal: false };
    let outcome = run(folder.path(), FakeDevice::new(1).with_fault(fault)).unwrap();
    let incomplete = &outcome.bundle.manifest.incomplete;
    assert_eq!(incomplete.len(), outcome.num_planned - outcome.num_measured);
    assert!(!incomplete.is_empty());
    for text in incomplete {
        assert!(text.starts_with("rope at Rope { num_tokens: ") && text.ends_with("launch failed"), "{text}");
    }
    assert!(incomplete.iter().any(|text| text.contains("num_tokens: 300,")), "{incomplete:?}");
    assert_eq!(measured(&outcome).len(), 13);
    assert!(outcome.bundle.verify().unwrap().is_sound());
    let ropes = outcome.bundle.operator_samples(Operator::Rope).unwrap();
    assert!(ropes.iter().all(|s| s.shape.values()[0] < 100));
}

#[test]
fn an_operator_whose_results_are_wrong_is_not_timed() {
    let folder = tempfile::tempdir().unwrap();
    let fault = Fault::Wrong { operator: Operator::Attention };
    let outcome = run(folder.path(), FakeDevice::new(1).with_fault(fault)).unwrap();
    assert!(!outcome.is_complete());
    let incomplete = &outcome.bundle.manifest.incomplete;
    assert_eq!(incomplete.len(), 1);
    let count = outcome.num_planned - outcome.num_measured;
    let expected = format!("attention: {count} points not measured: attention at Attention {{ heads: ");
    assert!(incomplete[0].starts_with(&expected), "{incomplete:?}");
    assert!(incomplete[0].contains("is wrong: relative error 5.000e-1"), "{incomplete:?}");
    let operators = measured(&outcome);
    assert_eq!((operators.len(), operators.contains(&Operator::Attention)), (12, false));
}

#[test]
fn a_lost_device_ends_the_run_and_keeps_what_was_measured() {
    let folder = tempfile::tempdir().unwrap();
    let fault = Fault::Fails { operator: Operator::DownProj, from: 200, fatal: true };
    let outcome = run(folder.path(), FakeDevice::new(1).with_fault(fault)).unwrap();
    assert!(outcome.num_measured > 0 && !outcome.is_complete());
    let left = outcome.num_planned - outcome.num_measured;
    let text = outcome.bundle.manifest.incomplete.join("\n");
    assert!(text.starts_with(&format!("{left} points not measured (")), "{text}");
    assert!(text.ends_with("down_proj at Gemm { m: 300, n: 1024, k: 3072 }: launch failed"), "{text}");
    assert_eq!(measured(&outcome).len(), 13, "operators advance in step");
    assert!(outcome.bundle.verify().unwrap().is_sound());
}

#[test]
fn points_that_do_not_fit_are_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let fault = Fault::OutOfMemory { num_bytes: 200 << 20 };
    let outcome = run(folder.path(), FakeDevice::new(1).with_fault(fault)).unwrap();
    let incomplete = &outcome.bundle.manifest.incomplete;
    // Only the LM head's weights are that large.
    assert!(!incomplete.is_empty());
    assert!(incomplete.iter().all(|t| t.starts_with("lm_head at Gemm") && t.ends_with("out of memory")));
    assert!(!measured(&outcome).contains(&Operator::LmHead));
}

#[test]
fn throttled_and_impossible_points_are_flagged() {
    let folder = tempfile::tempdir().unwrap();
    let device = FakeDevice::new(1)
        .with_fault(Fault::Throttled { operator: Operator::QkvProj, attempts: u32::MAX })
        .with_fault(Fault::BelowFloor { operator: Operator::GateUpProj });
    let outcome = run(folder.path(), device).unwrap();
    assert!(outcome.is_complete());
    for sample in outcome.bundle.samples().unwrap() {
        let is_throttled = sample.operator == Operator::QkvProj;
        assert_eq!(sample.has_flag("throttled"), is_throttled);
        assert_eq!(sample.throttle == "sw_power_cap", is_throttled);
        assert_eq!(sample.has_flag("below_floor"), sample.operator == Operator::GateUpProj);
    }
    assert!(outcome.num_throttled > 0 && outcome.num_below_floor > 0);
    let notes = &outcome.bundle.manifest.evidence.as_ref().unwrap().notes;
    assert!(notes.iter().any(|n| n.ends_with("points have clocks held down in every attempt")));
    // What cannot be true does not verify.
    let report = outcome.bundle.verify().unwrap();
    assert_eq!(report.problems.len(), outcome.num_below_floor);
}

#[test]
fn a_device_that_measures_nothing_is_an_error_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let device = Operator::ALL.into_iter().fold(FakeDevice::new(1), |device, operator| {
        device.with_fault(Fault::Fails { operator, from: 0, fatal: true })
    });
    let error = run(folder.path(), device).unwrap_err();
    assert!(matches!(error, ProfileError::Operator { fatal: true, .. }), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn doubtful_points_are_measured_again_and_then_marked() {
    let folder = tempfile::tempdir().unwrap();
    let device = FakeDevice::new(1)
        .with_noise(0.0)
        .with_fault(Fault::ClockShifted { operator: Operator::Rope, attempts: 1 })
        .with_fault(Fault::Bimodal { operator: Operator::OProj, attempts: 2 })
        .with_fault(Fault::Bimodal { operator: Operator::SiluMul, attempts: u32::MAX });
    let outcome = run(folder.path(), device).unwrap();
    let mut num_again = 0;
    for sample in outcome.bundle.samples().unwrap() {
        let (attempts, flag) = match sample.operator {
            Operator::Rope => (2, ""),
            Operator::OProj => (3, ""),
            Operator::SiluMul => (3, "bimodal"),
            _ => (1, ""),
        };
        assert_eq!(sample.num_attempts, attempts, "{sample:?}");
        // Two groups are noise as well.
        let doubts = sample.flags.split('|').filter(|flag| *flag != "noisy");
        assert!(doubts.eq(flag.split('|')), "{sample:?}");
        num_again += usize::from(attempts > 1);
    }
    assert_eq!(outcome.num_measured_again, num_again);
    assert!(outcome.num_bimodal > 0 && outcome.num_clock_shifted == 0);
    let notes = outcome.bundle.manifest.evidence.unwrap().notes;
    assert!(
        notes
            .iter()
            .any(|n| n
                == &format!("{num_again} points were measured again, as the first attempt was doubtful"))
    );
}

#[test]
fn a_run_that_is_cut_short_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let whole = run(folder.path(), FakeDevice::new(3)).unwrap();
    let cut = folder.path().join("cut");
    let stops = FakeDevice::new(3).with_fault(Fault::Stops { after: 100 });
    let first = profile(&mut stops.clone(), &options(&cut), None, &mut |_| {}).unwrap();
    assert!(!first.is_complete() && first.num_measured == 100);
    let again = profile(&mut stops.clone(), &options(&cut), None, &mut |_| {}).unwrap_err().to_string();
    assert!(again.contains("nothing exists yet"), "{again}");

    let resume = ProfileOptions { resume: true, ..options(&cut) };
    let mut num_points = 0;
    let mut count = |p: Progress| num_points += usize::from(p.stage == Stage::Points);
    let second = profile(&mut FakeDevice::new(3), &resume, None, &mut count).unwrap();
    assert_eq!(num_points, second.num_planned - 100, "only what was not measured is measured");
    assert!(second.is_complete() && second.wall > first.wall);
    assert_eq!(second.bundle.samples().unwrap(), whole.bundle.samples().unwrap());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "no journal is left");
    let nothing_left = profile(&mut FakeDevice::new(3), &resume, None, &mut |_| {}).unwrap_err().to_string();
    assert!(nothing_left.contains("without `--resume`"), "{nothing_left}");
}

#[test]
fn a_point_that_kills_every_run_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let resume = ProfileOptions { resume: true, ..options(&folder.path().join("bundle")) };
    let stops = FakeDevice::new(3).with_fault(Fault::Stops { after: 10 });
    profile(&mut stops.clone(), &options(&folder.path().join("bundle")), None, &mut |_| {}).unwrap();
    // As a killed process leaves it: begun twice, and no result.
    let journal = folder.path().join("bundle.journal");
    let text = fs::read_to_string(&journal).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let begun = lines.iter().rposition(|line| line.contains("begun")).unwrap();
    let kept = [&lines[..=begun], &lines[begun..=begun]].concat().join("\n") + "\n{\"meas";
    fs::write(&journal, kept).unwrap();
    let outcome = profile(&mut FakeDevice::new(3), &resume, None, &mut |_| {}).unwrap();
    let incomplete = &outcome.bundle.manifest.incomplete;
    assert_eq!(incomplete.len(), 1, "{incomplete:?}");
    assert!(incomplete[0].ends_with("the run ended 2 times while it was measured"), "{incomplete:?}");
    assert_eq!(outcome.num_measured, outcome.num_planned - 1);
}

#[test]
fn a_journal_of_another_device_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let resume = ProfileOptions { resume: true, ..options(&folder.path().join("bundle")) };
    let stops = FakeDevice::new(3).with_fault(Fault::Stops { after: 10 });
    profile(&mut stops.clone(), &options(&folder.path().join("bundle")), None, &mut |_| {}).unwrap();
    let other = ProfileOptions { models: vec![ModelSpec::load("llama3-8b").unwrap()], ..resume };
    let error = profile(&mut FakeDevice::new(3), &other, None, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("expected plan `") && error.contains("delete the journal"), "{error}");
}

#[test]
fn what_the_device_says_of_itself_is_in_the_evidence() {
    let folder = tempfile::tempdir().unwrap();
    let device = FakeDevice::new(1).with_note("NVML does not tell the power: no permission");
    let outcome = run(folder.path(), device).unwrap();
    let notes = outcome.bundle.manifest.evidence.unwrap().notes;
    assert!(notes.iter().any(|note| note.ends_with("no permission")), "{notes:?}");
}

/// Unsure of whatever it has seen least of; judges nothing.
struct Unsure;

impl Advisor for Unsure {
    fn unsureness(&mut self, samples: &[Sample], candidates: &[Point]) -> Vec<f64> {
        let seen = |point: &Point| samples.iter().filter(|s| s.operator == point.operator).count();
        candidates.iter().map(|point| 1.0 / (1.0 + seen(point) as f64)).collect()
    }

    fn held_out_error(&mut self, samples: &[Sample], held_out: &[Sample]) -> Option<CurveError> {
        let p50 = 1.0 / samples.len().max(1) as f64;
        let num_points = held_out.len();
        (num_points > 0).then_some(CurveError { p50, p90: p50, worst_operator_p50: p50, num_points })
    }
}

#[test]
fn a_budget_is_kept_and_more_of_it_measures_more() {
    let folder = tempfile::tempdir().unwrap();
    let with_budget = |name: &str, seconds: u64| {
        let budget = Some(Duration::from_secs(seconds));
        let options = ProfileOptions { budget, grid: true, ..options(&folder.path().join(name)) };
        profile(&mut FakeDevice::new(1), &options, Some(&mut Unsure), &mut |_| {}).unwrap()
    };
    let (short, long) = (with_budget("short", 5), with_budget("long", 15));
    for (outcome, seconds) in [(&short, 5), (&long, 15)] {
        assert!(outcome.is_complete(), "a budget leaves points out, it does not fail");
        assert_eq!(outcome.num_left_out, outcome.num_planned - outcome.num_measured);
        let budget = Duration::from_secs(seconds);
        assert!(
            outcome.wall >= budget && outcome.wall < budget + Duration::from_secs(1),
            "{:?}",
            outcome.wall
        );
        assert_eq!(measured(outcome).len(), 13);
        assert!(outcome.curve.len() > 3 && outcome.curve.is_sorted_by(|a, b| a.elapsed_s < b.elapsed_s));
        let curve: Vec<CurvePoint> = outcome.bundle.read_payload_json("curve.json", "a curve").unwrap();
        assert_eq!(curve, outcome.curve);
    }
    assert!(long.num_measured > 2 * short.num_measured);
    let none = ProfileOptions { budget: Some(Duration::ZERO), ..options(&folder.path().join("none")) };
    let outcome = profile(&mut FakeDevice::new(1), &none, None, &mut |_| {}).unwrap();
    assert_eq!((outcome.num_measured, outcome.is_complete()), (0, false));
}

#[test]
fn nothing_is_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("bundle")).unwrap();
    fs::write(folder.path().join("bundle/precious"), "x").unwrap();
    let error = run(folder.path(), FakeDevice::new(1)).unwrap_err();
    assert!(error.to_string().contains("expected a path where nothing exists yet"), "{error}");
    assert_eq!(fs::read(folder.path().join("bundle/precious")).unwrap(), b"x");
    let bad = ProfileOptions { models: vec![], ..options(&folder.path().join("other")) };
    let error = profile(&mut FakeDevice::new(1), &bad, None, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("key `models`: expected at least one"), "{error}");
}

#[test]
fn progress_only_moves_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut seen: Vec<Progress> = Vec::new();
    let options = options(&folder.path().join("bundle"));
    let outcome = profile(&mut FakeDevice::new(1), &options, None, &mut |p| seen.push(p)).unwrap();
    let stages: Vec<_> = seen.iter().map(|p| p.stage as u8).collect();
    assert!(stages.is_sorted());
    let points: Vec<_> = seen.iter().filter(|p| p.stage == Stage::Points).collect();
    assert_eq!(points.len(), outcome.num_planned);
    assert!(points.iter().enumerate().all(|(i, p)| p.num_done == i && p.num_total == points.len()));
    let left: Vec<_> = points.iter().map(|p| p.time_left.unwrap()).collect();
    assert!(left[0] > left[left.len() / 2] && left[left.len() / 2] > left[left.len() - 1]);
    assert!(seen.iter().all(|p| p.elapsed <= outcome.wall));
}

#[test]
fn launches_that_draw_much_power_are_sampled_less_often() {
    let folder = tempfile::tempdir().unwrap();
    let outcome = run(folder.path(), FakeDevice::new(1)).unwrap();
    let samples = outcome.bundle.operator_samples(Operator::GateUpProj).unwrap();
    let num_samples = |m: u32| {
        let found = samples.iter().find(|s| matches!(s.shape, OperatorShape::Gemm { m: of, .. } if of == m));
        found.unwrap().stats.n
    };
    // One token is bound by the weights' bytes; 300 are as much arithmetic as bytes.
    assert!(num_samples(1) >= 10 && num_samples(300) < 10, "{} and {}", num_samples(1), num_samples(300));
}

#[test]
fn cold_and_hot_follow_the_law() {
    let folder = tempfile::tempdir().unwrap();
    let outcome = run(folder.path(), FakeDevice::new(1)).unwrap();
    let samples = outcome.bundle.operator_samples(Operator::SiluMul).unwrap();
    let at = |cache| {
        let found = samples.iter().find(|s| {
            s.cache == cache
                && matches!(s.shape, OperatorShape::SiluMul { num_tokens: 256, intermediate_size: 3072 })
        });
        found.unwrap().stats.p50_ns
    };
    assert!(at(CacheState::Hot) < at(CacheState::Cold));
}

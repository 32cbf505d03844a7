use plumbline_schema::{GpuSpec, Operator, OperatorShape, roofline::roofline_ns};

use super::*;
use crate::{
    features::{feature_names, part_names},
    forest::{Forest, Node, Tree},
};

fn gpu() -> GpuSpec {
    GpuSpec::by_name("h100-sxm5-80gb").unwrap()
}

fn shape(num_tokens: u32, hidden_size: u32) -> OperatorShape {
    OperatorShape::RmsNorm { num_tokens, hidden_size }
}

/// A predictor of `2000 ns + roofline`, measured at 1, 64 and 1024 tokens of width 1024, and 64 of 4096.
fn norm() -> OperatorPredictor {
    let operator = Operator::RmsNorm;
    let part = |&name: &&str| BaselinePart {
        name: name.to_owned(),
        coefficient: if name == "roofline" { 1.0 } else { 0.0 },
    };
    let rows = [(64, 4096), (1024, 1024), (1, 1024), (64, 1024)];
    let row = |(tokens, width): (u64, u64)| (vec![tokens, width], 5000.0, 4900.0, 5200.0);
    let range = RatioRange { low: 0.9, high: 1.2 };
    OperatorPredictor {
        operator,
        features: feature_names(operator).iter().map(|&name| name.to_owned()).collect(),
        overhead_ns: 2000.0,
        parts: part_names(operator).iter().map(part).collect(),
        forest: Forest {
            num_features: feature_names(operator).len(),
            trees: vec![Tree { nodes: vec![Node::default()] }],
        },
        domain: Domain::from_rows(operator, rows.map(row).into()),
        error: HeldOutError::default(),
        interval: Interval {
            coverage: 0.9,
            interpolated: range,
            extrapolated: RatioRange { low: 0.5, high: 2.0 },
            unseen_layout: None,
        },
        samples_digest: String::new(),
        seed: 0,
        hyper_parameters: HyperParameters {
            num_trees: 1,
            max_depth: 0,
            min_samples_leaf: 1,
            max_features: 1,
            pooled: false,
            interpolates_residuals: false,
            forest_share: 1.0,
            has_steps: true,
        },
        transferred_from: None,
    }
}

fn predictors(predictor: OperatorPredictor) -> Predictors {
    Predictors::new(gpu(), vec![predictor]).unwrap()
}

#[test]
fn a_time_carries_where_it_comes_from() {
    let predictors = predictors(norm());
    let predict = |shape| predictors.predict(Operator::RmsNorm, &shape, OutOfDomain::Extrapolate).unwrap();

    let measured = predict(shape(64, 1024));
    assert_eq!(
        (measured.low_ns, measured.time_ns, measured.high_ns, measured.provenance),
        (4900.0, 5000.0, 5200.0, Provenance::Measured)
    );

    // 200 tokens of width 1024: 2000 ns and 2 * 1024 * 801 bytes at 3.35 TB/s, 489.7 ns.
    let between = predict(shape(200, 1024));
    assert!((between.time_ns - 2489.7).abs() < 0.1, "{between:?}");
    assert!((between.high_ns / between.time_ns - 1.2).abs() < 1e-12);
    assert_eq!(between.provenance, Provenance::Interpolated);

    for outside in [shape(2000, 1024), shape(64, 2048)] {
        let prediction = predict(outside);
        assert!((prediction.time_ns - 2000.0 - roofline_ns(&outside, &gpu())).abs() < 1e-6);
        assert!((prediction.low_ns / prediction.time_ns - 0.5).abs() < 1e-12);
        assert_eq!(prediction.provenance, Provenance::Extrapolated);
    }
}

#[test]
fn refusing_says_what_was_measured() {
    let predictors = predictors(norm());
    let refuse =
        |operator, shape| predictors.predict(operator, &shape, OutOfDomain::Refuse).unwrap_err().to_string();
    assert_eq!(
        refuse(Operator::RmsNorm, shape(2000, 1024)),
        "operator `rms_norm`: num_tokens = 2000 is outside the measured 1..=1024"
    );
    assert_eq!(
        refuse(Operator::RmsNorm, shape(64, 2048)),
        "operator `rms_norm`: hidden_size = 2048 was not measured; \
         measured: hidden_size = 1024; hidden_size = 4096"
    );
    assert_eq!(
        refuse(Operator::AllReduce, OperatorShape::Collective { message_bytes: 2, num_ranks: 2 }),
        "no predictor for operator `all_reduce`; available: rms_norm; \
         collectives need samples of several GPUs; use one GPU per replica"
    );
    let empty = refuse(Operator::RmsNorm, shape(0, 1024));
    assert!(empty.starts_with("operator `rms_norm`: expected a launch with work to do"), "{empty}");
    let none = Predictors::new(gpu(), Vec::new()).unwrap();
    let error = none.predict(Operator::RmsNorm, &shape(1, 1), OutOfDomain::Refuse).unwrap_err();
    assert!(error.to_string().contains("available: none"), "{error}");
}

/// Nine widths, each measured from 1 to 1024 tokens, but the narrowest and 5120 from 1 to 64 only.
fn grid() -> Predictors {
    let widths = [512, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 16384];
    let row = |tokens: u64, width: u64| (vec![tokens, width], 5000.0, 4900.0, 5200.0);
    let most = |width: u64| if width == 512 || width == 5120 { 64 } else { 1024 };
    let rows = widths.iter().flat_map(|&width| [row(1, width), row(most(width), width)]).collect();
    let mut predictor = norm();
    predictor.domain = Domain::from_rows(Operator::RmsNorm, rows);
    predictor.interval.unseen_layout = Some(RatioRange { low: 0.8, high: 1.4 });
    predictors(predictor)
}

#[test]
fn a_layout_that_others_surround_is_interpolated() {
    let grid = grid();
    let predict = |tokens, width| {
        grid.predict(Operator::RmsNorm, &shape(tokens, width), OutOfDomain::Refuse).map(|prediction| {
            assert_eq!(prediction.provenance, Provenance::Interpolated);
            (prediction.high_ns / prediction.time_ns * 10.0).round() / 10.0
        })
    };
    // Its own layout, and one between others, with the interval of layouts held out.
    assert_eq!(predict(200, 4096), Ok(1.2));
    assert_eq!(predict(200, 2560), Ok(1.4));
    // Beyond its own layout's tokens, where its neighbours have been.
    assert_eq!(predict(200, 5120), Ok(1.4));
    // 12289 is more than twice 6144, yet 16384 is near; 9000 at 1025 tokens is beyond all.
    assert_eq!(predict(200, 12_289), Ok(1.4));
    let refused = |tokens, width| predict(tokens, width).unwrap_err().to_string();
    assert!(refused(1025, 9000).contains("num_tokens = 1025 is outside the measured 1..=1024"));
    assert!(refused(200, 500).contains("hidden_size = 500 is outside the measured 512..=16384"));
}

#[test]
fn layouts_surround_one_that_lies_among_enough_of_them() {
    let surround = |measured: &[[u64; 3]], wanted: [u64; 3]| {
        layouts_surround(Operator::Rope, measured.iter().map(<[u64; 3]>::as_slice), &wanted)
    };
    let mut measured = Vec::new();
    for q_heads in [8, 16, 32, 64] {
        measured.extend([[q_heads, 4, 128], [q_heads, 16, 128]]);
    }
    assert!(surround(&measured, [24, 8, 128]));
    assert!(!surround(&measured[..7], [24, 8, 128]), "seven are too few");
    assert!(!surround(&measured, [24, 2, 128]), "outside");
    assert!(!surround(&measured, [24, 8, 64]), "another head_dim");
    // With a single layout of the other size of heads its box holds 96, but no kernel of that size was measured.
    measured.push([24, 8, 64]);
    assert!(surround(&measured, [24, 8, 64]));
    assert!(!surround(&measured, [24, 8, 96]));
    assert!(!surround(&measured, [8, 8, 64]), "the only one with this head_dim has three times the heads");
}

#[test]
fn an_error_names_the_nearest_layouts_only() {
    let mut predictor = norm();
    let row = |width: u64| (vec![64, width], 5000.0, 4900.0, 5200.0);
    predictor.domain =
        Domain::from_rows(Operator::RmsNorm, (1..=20).map(|i| row(1000 * i)).chain([row(90_000)]).collect());
    let error = predictors(predictor)
        .predict(Operator::RmsNorm, &shape(64, 41_000), OutOfDomain::Refuse)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("hidden_size = 41000 was not measured; measured: hidden_size = 14000;"),
        "{error}"
    );
    assert!(error.ends_with("hidden_size = 90000; 13 more, farther away"), "{error}");
}

#[test]
fn residuals_are_interpolated_over_the_logarithm_within_a_layout() {
    let mut predictor = norm();
    // In the domain's order: width 1024 at 1, 64 and 1024 tokens, then width 4096 at 64.
    predictor.domain.residual = vec![0.0, 0.6, 0.2, -1.0];
    let correction = |tokens: u32, width: u32| {
        let shape = shape(tokens, width);
        (predictor.predict(&shape, &gpu()) / predictor.baseline_ns(&shape, &gpu())).ln()
    };
    assert!((correction(8, 1024) - 0.3).abs() < 1e-6, "halfway from 1 to 64");
    assert!((correction(256, 1024) - 0.4).abs() < 1e-6, "halfway from 64 to 1024");
    // Beyond the layout what its edge has fades to the forest's 0, and beyond all layouts once more.
    let fade = |ln: f64| 1.0 + ln / 0.6;
    let expected = 0.2 / fade((5000.0f64 / 1024.0).ln()) / fade((5001.0f64 / 1025.0).ln());
    assert!((correction(5000, 1024) - expected).abs() < 1e-6, "{}", correction(5000, 1024));
    let expected = -1.0 / fade(8.0f64.ln());
    assert!((correction(8, 4096) - expected).abs() < 1e-6, "one point is all its layout has");
    assert!(correction(8, 2048).abs() < 1e-6, "nothing is known of this layout");
}

#[test]
fn a_transferred_time_scales_its_roofline_and_keeps_its_overhead() {
    let mut slow = gpu();
    slow.hbm_bandwidth_bytes_per_s /= 4.0;
    slow.fp32_flops_per_s /= 4.0;
    let transferred = predictors(norm()).transferred_to(slow);
    // A shape that was measured, but on the other GPU.
    let prediction = transferred.predict(Operator::RmsNorm, &shape(64, 1024), OutOfDomain::Refuse).unwrap();
    let expected = 2000.0 + 4.0 * roofline_ns(&shape(64, 1024), &gpu());
    assert!((prediction.time_ns - expected).abs() < 1e-6, "{prediction:?}");
    assert_eq!(prediction.provenance, Provenance::Transferred);
}

#[test]
fn a_predictor_that_could_mislead_is_refused() {
    let spoil = |change: fn(&mut OperatorPredictor)| {
        let mut predictor = norm();
        change(&mut predictor);
        Predictors::new(gpu(), vec![predictor]).unwrap_err().to_string()
    };
    assert!(spoil(|p| p.features.swap(0, 1)).contains("train again with this version"));
    assert!(spoil(|p| p.parts[0].name = "magic".into()).contains("baseline parts"));
    assert!(spoil(|p| p.parts[0].coefficient = f64::NAN).contains("coefficient NaN"));
    assert!(spoil(|p| p.overhead_ns = 0.0).contains("overhead_ns = 0"));
    assert!(spoil(|p| p.forest.num_features = 3).contains("a forest of 3 features"));
    assert!(spoil(|p| p.forest.trees.clear()).contains("without trees"));
    assert!(spoil(|p| p.domain.time_ns[1] = 0.0).contains("measured shape 1"));
    assert!(spoil(|p| p.domain.shapes.swap(0, 2)).contains("out of order"));
    assert!(spoil(|p| p.domain.shapes.truncate(5)).contains("5 shape numbers"));
    assert!(spoil(|p| p.domain.max[0] = 10).contains("outside the stated domain"));
    assert!(spoil(|p| p.domain.columns[1] = "width".into()).contains("domain of"));
    assert!(spoil(|p| p.domain.residual = vec![0.0]).contains("1 residuals for 4 shapes"));
    assert!(spoil(|p| p.interval.interpolated.low = 1.1).contains("expected one around 1"));
    let twice = Predictors::new(gpu(), vec![norm(), norm()]).unwrap_err();
    assert_eq!(twice.to_string(), "two predictors for operator `rms_norm`");
}

#[test]
fn a_file_of_format_1_1_is_read_as_it_was_meant() {
    let mut value = serde_json::to_value(norm()).unwrap();
    let hyper_parameters = value["hyper_parameters"].as_object_mut().unwrap();
    assert!(
        hyper_parameters.remove("forest_share").is_some() && hyper_parameters.remove("has_steps").is_some()
    );
    for way in ["shuffled", "blocked"] {
        assert!(value["error"][way].as_object_mut().unwrap().remove("p99").is_some());
    }
    assert_eq!(serde_json::from_value::<OperatorPredictor>(value).unwrap(), norm());
}

#[test]
fn a_file_with_an_unknown_key_is_refused() {
    let mut value = serde_json::to_value(norm()).unwrap();
    let read: OperatorPredictor = serde_json::from_value(value.clone()).unwrap();
    assert_eq!(read, norm());
    let bytes = norm().to_json().unwrap();
    assert_eq!(serde_json::from_slice::<OperatorPredictor>(&bytes).unwrap(), norm());
    assert_eq!(bytes.iter().position(|&byte| byte == b'\n'), Some(bytes.len() - 1));
    value["scale"] = 2.into();
    assert!(serde_json::from_value::<OperatorPredictor>(value).is_err());
}

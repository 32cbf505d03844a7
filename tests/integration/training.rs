//! `plumb train`: what it prints, its report and its search.

use std::fs;

use serde_json::Value;

use crate::{
    fixture::fixture,
    support::{arg, ended, plumb, stdout_of},
};

/// Widest line that does not wrap on a usual terminal.
const MAX_WIDTH: usize = 110;

#[test]
fn the_search_feeds_the_training_and_says_what_it_tried() {
    let folder = tempfile::tempdir().expect("folder");
    let bundle = folder.path().join("bundle");
    fixture().copy_bundle(&bundle);
    let printed = stdout_of(["train", arg(&bundle), "--model-selection", "--json"]);
    let value: Value = serde_json::from_str(&printed).expect("JSON");
    let selection = &value["selection"];
    let trials = selection["trials"].as_array().expect("trials");
    assert_eq!(trials.len(), 9);
    let chosen = &trials[selection["chosen"].as_u64().expect("chosen") as usize];
    assert_eq!(chosen["is_tied"], true);
    for operator in value["report"]["operators"].as_array().expect("operators") {
        for name in ["num_trees", "max_depth", "min_samples_leaf"] {
            assert_eq!(operator["hyper_parameters"][name], chosen[name], "{operator}");
        }
    }
    assert!(fixture().training.get("selection").is_none(), "not searched when not asked to");
}

#[test]
fn the_table_fits_a_terminal_and_the_report_lies_where_asked() {
    let folder = tempfile::tempdir().expect("folder");
    let (bundle, report) = (folder.path().join("bundle"), folder.path().join("report"));
    fixture().copy_bundle(&bundle);
    let printed = stdout_of(["train", arg(&bundle), "--report", arg(&report)]);
    let widest = printed.lines().map(|line| line.chars().count()).max();
    assert!(widest.is_some_and(|width| width <= MAX_WIDTH), "{printed}");
    let num_operators = fixture().training["report"]["operators"].as_array().expect("operators").len();
    for way in [" shuffled ", " blocked ", " (roofline) "] {
        assert_eq!(printed.matches(way).count(), num_operators, "{way}: {printed}");
    }
    for name in ["report.html", "report.md", "held_out.csv", "figs/attention-shuffled-parity.svg"] {
        assert!(fs::metadata(report.join(name)).expect(name).len() > 1_000, "{name}");
    }
}

#[test]
fn a_report_that_cannot_be_written_is_the_users_error() {
    let folder = tempfile::tempdir().expect("folder");
    let (bundle, file) = (folder.path().join("bundle"), folder.path().join("file"));
    fixture().copy_bundle(&bundle);
    fs::write(&file, "").expect("file");
    let mut command = plumb(["train", arg(&bundle), "--report", arg(&file.join("report"))]);
    let (code, _, stderr) = ended(&command.output().expect("plumb starts"));
    assert!(code == 2 && stderr.contains("file"), "{code}: {stderr}");
}

//! The help texts, frozen.

use crate::support::stdout_of;

/// Checks the help of one verb against its snapshot.
fn check(verb: &[&str]) {
    let mut args = verb.to_vec();
    args.push("--help");
    let name = if verb.is_empty() { "plumb".to_owned() } else { verb.join("_") };
    insta::assert_snapshot!(name, stdout_of(args));
}

#[test]
fn help_texts_are_as_reviewed() {
    check(&[]);
    for verb in [
        "validate",
        "check",
        "profile",
        "train",
        "bundle",
        "workload",
        "simulate",
        "real",
        "generate",
        "search",
        "import-run",
        "compare",
        "calibrate",
        "explain",
        "host",
    ] {
        check(&[verb]);
    }
    for verb in [
        ["bundle", "inspect"],
        ["bundle", "verify"],
        ["bundle", "lint"],
        ["bundle", "diff"],
        ["bundle", "stats"],
        ["bundle", "efficiency"],
        ["bundle", "import"],
        ["bundle", "export"],
        ["workload", "generate"],
        ["workload", "import"],
        ["workload", "inspect"],
    ] {
        check(&verb);
    }
}

#[test]
fn every_verb_of_the_help_has_help_of_its_own() {
    let help = stdout_of(["--help"]);
    let verbs: Vec<_> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| line.starts_with("  "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|verb| *verb != "help")
        .collect();
    assert!(verbs.len() > 1, "{help}");
    for verb in verbs {
        let help = stdout_of([verb, "--help"]);
        assert!(help.contains("Usage: plumb") && help.contains("--json"), "{verb}: {help}");
    }
}

//! Killed profiles: what was measured is kept, what was not is measured by `--resume`, and nothing half is left.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use plumbline_bundles::Bundle;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    fixture::fixture,
    support::{arg, ended, plumb, stdout_of, write},
};

/// How often a run is started anew when it was over before it could be killed.
const MAX_TRIES: u32 = 10;

fn args<'a>(out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["profile", "--device", "fake", "--model", "qwen3-0.6b", "--out", arg(out)];
    args.extend(more);
    args
}

fn start(out: &Path, more: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_plumb"));
    command.args(args(out, more)).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("plumb starts")
}

fn journal_of(out: &Path) -> PathBuf {
    out.with_extension("journal")
}

fn num_lines(path: &Path) -> usize {
    // A torn last line counts as none.
    fs::read_to_string(path).map_or(0, |text| text.matches('\n').count())
}

/// Starts a run and kills it once its journal has so many lines; `false` when it was over before.
fn was_killed_at(out: &Path, more: &[&str], at_lines: usize) -> bool {
    let mut child = start(out, more);
    while num_lines(&journal_of(out)) < at_lines {
        if child.try_wait().expect("a child").is_some() {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    child.kill().expect("a kill");
    // The status of a run that was killed has no code.
    child.wait().expect("an end").code().is_none()
}

/// A folder with the journal of a run that was killed after `at_lines` lines.
fn killed_at(at_lines: usize) -> (TempDir, PathBuf) {
    for _ in 0..MAX_TRIES {
        let folder = tempfile::tempdir().expect("folder");
        let out = folder.path().join("bundle");
        if was_killed_at(&out, &[], at_lines) {
            return (folder, out);
        }
    }
    panic!("{MAX_TRIES} runs were over before line {at_lines}");
}

/// Runs to exit code 2 and returns the error, which must be there and alone.
fn refused(args: &[&str]) -> String {
    let (code, stdout, stderr) = ended(&plumb(args).output().expect("plumb starts"));
    assert_eq!((code, stdout.as_str()), (2, ""), "{args:?}: {stderr}");
    assert!(stderr.starts_with("error: "), "{stderr}");
    stderr
}

/// Names in a folder, hidden ones too.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("folder");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_killed_run_goes_on_and_measures_what_an_uninterrupted_one_does() {
    let (folder, out) = killed_at(300);
    assert!(!out.exists(), "no bundle before everything is measured");
    let num_kept = num_lines(&journal_of(&out));
    assert!(num_kept >= 300);

    // A second run does not write over what the first one measured, and says how to go on.
    let error = refused(&args(&out, &[]));
    assert!(error.contains("bundle.journal") && error.contains("`--resume`"), "{error}");
    assert!(error.contains("delete it"), "{error}");
    assert_eq!(num_lines(&journal_of(&out)), num_kept);

    // Killed once more, later: what the first run measured is not measured again.
    let _ = was_killed_at(&out, &["--resume"], num_kept + 300);
    if !out.exists() {
        let report: Value =
            serde_json::from_str(&stdout_of(args(&out, &["--resume", "--json"]))).expect("JSON");
        assert_eq!(report["num_measured"], report["num_planned"]);
        assert_eq!(report["incomplete"], Value::Array(Vec::new()));
    }
    let bundle = Bundle::open(&out).expect("a bundle");
    let whole = Bundle::open(&fixture().bundle()).expect("a bundle");
    let files: Vec<_> = whole.payload_names("samples/").collect();
    assert!(files.len() > 10, "{files:?}");
    assert_eq!(bundle.payload_names("samples/").collect::<Vec<_>>(), files);
    for name in files {
        let bytes = |bundle: &Bundle| fs::read(bundle.root.join(name)).expect("samples");
        assert_eq!(bytes(&bundle), bytes(&whole), "{name}");
    }
    let notes = bundle.manifest.evidence.expect("evidence").notes;
    assert!(notes.iter().any(|note| note.starts_with("measured in more than one run")), "{notes:?}");
    assert_eq!(names(folder.path()), ["bundle"], "neither a journal nor anything half is left");
}

#[test]
fn a_run_of_other_models_does_not_go_on_with_a_journal() {
    let (_folder, out) = killed_at(20);
    let num_kept = num_lines(&journal_of(&out));
    let other = ["profile", "--device", "fake", "--model", "llama3-8b", "--out", arg(&out), "--resume"];
    let error = refused(&other);
    assert!(error.contains("plan") && error.contains("delete the journal"), "{error}");
    assert_eq!(num_lines(&journal_of(&out)), num_kept);
    assert!(!out.exists());
}

#[test]
fn without_a_journal_there_is_nothing_to_go_on_with() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("bundle");
    let error = refused(&args(&out, &["--resume"]));
    assert!(error.contains("bundle.journal") && error.contains("without `--resume`"), "{error}");
    assert_eq!(names(folder.path()), Vec::<String>::new());
}

#[test]
fn a_kill_at_the_very_start_leaves_no_half_bundle() {
    for after_ms in [0, 1, 2, 4, 8, 16, 32] {
        let folder = tempfile::tempdir().expect("folder");
        let out = folder.path().join("bundle");
        let mut child = start(&out, &[]);
        thread::sleep(Duration::from_millis(after_ms));
        child.kill().expect("a kill");
        child.wait().expect("an end");
        if out.exists() {
            // Only by a machine that profiles within milliseconds.
            assert!(Bundle::open(&out).expect("a bundle").verify().expect("a report").is_sound());
            continue;
        }
        // What to do next depends on whether there is a journal, and the command says which.
        let journal = journal_of(&out);
        let budget = ["--budget", "1s"];
        if journal.exists() && num_lines(&journal) == 0 {
            let error = refused(&args(&out, &["--resume"]));
            assert!(error.contains("delete"), "{error}");
            fs::remove_file(&journal).expect("deleted");
        }
        let more: Vec<_> = journal.exists().then_some("--resume").into_iter().chain(budget).collect();
        stdout_of(args(&out, &more));
        assert!(out.join("manifest.json").is_file() && !journal.exists());
    }
}

#[test]
fn a_place_that_cannot_be_written_is_told_before_anything_is_measured() {
    let folder = tempfile::tempdir().expect("folder");
    let file = write(&folder.path().join("file"), "in the way");
    let read_only = folder.path().join("read-only");
    fs::create_dir(&read_only).expect("folder");
    fs::set_permissions(&read_only, fs::Permissions::from_mode(0o555)).expect("permissions");
    // Nobody makes folders in /proc. Permissions do not hold back root.
    let mut parents = vec![file.clone(), PathBuf::from("/proc/no-such-folder")];
    if fs::write(read_only.join("probe"), "").is_err() {
        parents.push(read_only);
    }
    for parent in parents {
        let out = parent.join("bundle");
        let error = refused(&args(&out, &[]));
        assert!(error.contains(arg(&out)), "{error}");
        assert!(!journal_of(&out).exists());
    }
    assert_eq!(fs::read_to_string(&file).expect("kept"), "in the way");
}

//! `--strict`: a simulation that is not known to be of the same thing is refused, and what differs is named.

use std::path::Path;

use serde_json::Value;

use crate::support::{WORKLOAD, arg, ended, plumb, stdout_of, write};

fn simulate(folder: &Path, name: &str, model: &str, more: &[&str]) -> String {
    let workload = write(&folder.join("workload.csv"), WORKLOAD);
    let out = folder.join(name);
    let mut args = vec!["simulate", "--bundle", "h100-sxm5-80gb", "--engine", "vllm-0.24-graph", "--quiet"];
    args.extend(["--model", model, "--workload", arg(&workload), "--out", arg(&out)]);
    args.extend(more);
    stdout_of(args);
    arg(&out).to_owned()
}

/// The exit code and stderr of a strict comparison, and whether a report was written.
fn compare(folder: &Path, real: &str, sim: &str) -> (i32, String, bool) {
    let out = folder.join("report");
    let args = ["compare", real, "--sim", sim, "--strict", "--out", arg(&out)];
    let (code, _, stderr) = ended(&plumb(args).output().expect("plumb starts"));
    let is_written = out.exists();
    let _ = std::fs::remove_dir_all(out);
    (code, stderr, is_written)
}

#[test]
fn a_comparison_of_different_things_is_refused_and_names_them() {
    let folder = tempfile::tempdir().expect("folder");
    let folder = folder.path();
    let real = simulate(folder, "real", "qwen3-0.6b", &["--set", "num_gpu_blocks=4000"]);
    assert_eq!(
        compare(folder, &real, &real),
        (0, format!("report in {}\n", folder.join("report").display()), true)
    );

    let halved = simulate(folder, "halved", "qwen3-0.6b", &["--set", "num_gpu_blocks=2000"]);
    let (code, stderr, is_written) = compare(folder, &real, &halved);
    assert_eq!((code, is_written), (2, false), "{stderr}");
    assert!(stderr.contains("num_gpu_blocks: real 4000, simulated 2000 (MISMATCH)"), "{stderr}");
    assert!(
        stderr.starts_with("error: --strict: expected every setting to match, found 1 that do not"),
        "{stderr}"
    );

    let swapped = simulate(folder, "swapped", "llama3-8b", &["--set", "num_gpu_blocks=4000"]);
    let (code, stderr, _) = compare(folder, &real, &swapped);
    assert_eq!(code, 2);
    assert!(stderr.contains("model: real qwen3-0.6b (28 layers"), "{stderr}");
}

#[test]
fn a_suite_with_a_setting_that_nobody_recorded_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("report");
    let args = ["validate", "--simulations", "1", "--case", "sarathi-a100/requests-4-7", "--out", arg(&out)];
    let (code, _, stderr) = ended(&plumb(args.iter().chain(&["--strict"])).output().expect("plumb starts"));
    assert_eq!((code, out.exists()), (2, false), "{stderr}");
    // How the weights were stored is not recorded of these runs.
    assert!(stderr.contains("dtype: real does not say, simulated bfloat16 (unknown)"), "{stderr}");
    let result: Value =
        serde_json::from_str(&stdout_of(args.iter().chain(&["--json"]))).expect("one JSON document");
    let settings = result["cases"][0]["settings"].as_array().expect("settings");
    let dtype = settings.iter().find(|setting| setting["setting"] == "dtype").expect("dtype");
    assert_eq!((dtype["real"].is_null(), dtype["verdict"].as_str()), (true, Some("unknown")));
}

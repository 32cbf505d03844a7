//! The native engine as a user calls it where there is no GPU, or where what is asked for cannot be.

use std::fs;

use crate::support::{arg, ended, plumb, write};

fn run(args: &[&str]) -> (i32, String, String) {
    ended(&plumb(args).output().expect("plumb starts"))
}

fn workload(folder: &std::path::Path) -> String {
    let path = folder.join("workload.csv");
    let text = "request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens\n0,0,16,4\n";
    write(&path, text);
    arg(&path).to_owned()
}

#[test]
fn a_model_without_weights_is_refused_with_what_to_say() {
    let folder = tempfile::tempdir().expect("folder");
    let (workload, out) = (workload(folder.path()), folder.path().join("out"));
    let args = ["real", "--backend", "native", "--model", "qwen3-0.6b", "--workload", &workload];
    let (code, stdout, stderr) = run(&[&args[..], &["--out", arg(&out)]].concat());
    assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
    assert!(
        stderr.contains("expected a folder with weights") && stderr.contains("--weights random"),
        "{stderr}"
    );
    assert!(!out.exists());
}

/// Everything that can be told without a GPU is told before one is looked for.
#[test]
fn what_cannot_be_is_refused_before_a_gpu_is_looked_for() {
    let folder = tempfile::tempdir().expect("folder");
    let (workload, out) = (workload(folder.path()), folder.path().join("out"));
    let refused = |more: &[&str], expected: &str| {
        let mut args = vec!["real", "--backend", "native", "--model", "qwen3-0.6b", "--weights", "random"];
        args.extend(["--workload", &workload, "--out", arg(&out)]);
        args.extend(more);
        let (code, _, stderr) = run(&args);
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains(expected), "{stderr}");
        assert!(!out.exists());
    };
    refused(&["--temperature=-1"], "--temperature: expected a number of at least 0");
    refused(&["--top-p", "0"], "--top-p: expected a number above 0");
    refused(&["--scheduler", "nobody"], "nobody");
    refused(&["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization");
    refused(&["--set", "block_size=32"], "block_size = 16");
    refused(&["--set", "tensor_parallel_size=2"], "tensor_parallel_size = 1");
    refused(&["--set", "max_model_len=1000000"], "max_model_len of at most 40960");
    refused(&["--workload", &workload], "two of them would write");
    refused(&["--workload", arg(&folder.path().join("gone.csv"))], "gone.csv");
}

/// On a machine with a GPU this runs; elsewhere it ends as the table of exit codes says.
#[test]
fn without_a_gpu_a_run_ends_with_exit_code_4_and_leaves_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let (workload, out) = (workload(folder.path()), folder.path().join("out"));
    let args = ["real", "--backend", "native", "--model", "qwen3-0.6b", "--weights", "random", "--workload"];
    let (code, _, stderr) = run(&[&args[..], &[&workload, "--out", arg(&out)]].concat());
    if code == 0 {
        assert!(out.join("run.json").exists());
        return;
    }
    assert_eq!(code, 4, "{stderr}");
    assert!(!out.exists());
}

#[test]
fn a_text_needs_a_tokenizer() {
    let folder = tempfile::tempdir().expect("folder");
    fs::write(folder.path().join("tokenizer.json"), "{}").expect("file");
    let args = ["generate", "--model", "qwen3-0.6b", "--weights", "random", "--prompt", "a"];
    for (tokenizer, expected) in
        [(folder.path().join("gone"), "gone"), (folder.path().to_path_buf(), "tokenizer.json")]
    {
        let (code, _, stderr) = run(&[&args[..], &["--tokenizer", arg(&tokenizer)]].concat());
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains(expected), "{stderr}");
    }
}

//! Running `plumb` and making its input files.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use assert_cmd::Command;

/// A `plumb` command line, free of the caller's environment.
pub fn plumb<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(args: I) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_plumb"));
    command.env_remove("PLUMB_DATA").env_remove("PLUMB_LOG").env("NO_COLOR", "1").args(args);
    command
}

/// Exit code, stdout and stderr of a command.
pub fn ended(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("plumb prints UTF-8");
    (output.status.code().expect("plumb exits by itself"), text(&output.stdout), text(&output.stderr))
}

/// Runs to success and returns stdout.
pub fn stdout_of<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(args: I) -> String {
    let (code, stdout, stderr) = ended(&plumb(args).output().expect("plumb starts"));
    assert_eq!(code, 0, "{stderr}");
    stdout
}

/// Writes a file, making its folder.
pub fn write(path: &Path, bytes: impl AsRef<[u8]>) -> PathBuf {
    fs::create_dir_all(path.parent().expect("a file has a folder")).expect("folder");
    // A new file each time: some file systems wait for the disk where one is cut and written again.
    let _ = fs::remove_file(path);
    fs::write(path, bytes).expect("file");
    path.to_path_buf()
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// A small good workload.
pub const WORKLOAD: &str = "request_id,arrival_time_ns,num_prefill_tokens,num_decode_tokens\n\
    0,0,100,8\n1,2000000,700,3\n2,2000000,9,1\n3,50000000,33,12\n";

/// A small good deployment.
pub const DEPLOYMENT: &str = r#"{"mode": "graph", "model": "qwen3-0.6b", "max_num_batched_tokens": 512,
"max_num_seqs": 16, "max_model_len": 4096, "num_gpu_blocks": 1000, "block_size": 16,
"cudagraph_sizes": [1, 2, 4, 8, 16, 32, 64]}"#;

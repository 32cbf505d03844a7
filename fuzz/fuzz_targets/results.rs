#![no_main]
//! Bytes as a result file of another tool: an error that names the file, or a run that reads back.

use std::path::Path;

use plumbline_schema::Run;
use plumbline_validator::{ImportOptions, ResultFormat, import_run};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let [format, content @ ..] = bytes else { return };
    let format = ResultFormat::ALL[usize::from(*format) % ResultFormat::ALL.len()];
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("result");
    std::fs::write(&path, content).expect("a temporary file");
    read(&path, format, &folder.path().join("run"));
});

fn read(path: &Path, format: ResultFormat, out: &Path) {
    match import_run(path, format, &ImportOptions::default()) {
        Ok(imported) => {
            imported.run.write(out).expect("a temporary folder");
            Run::read(out).expect("what was written is read");
        }
        Err(error) => assert!(error.to_string().contains("result"), "an error that does not say where: {error}"),
    }
}

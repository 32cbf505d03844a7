//! Every kernel compiles for every architecture that the compiler knows, with no GPU present.

use std::path::{Path, PathBuf};

use plumbline_profiler::cuda::{
    KernelSource, compile, load_nvrtc_from, nvrtc_is_present, supported_architectures,
};

/// Ampere, Hopper and the two Blackwells, as far as the compiler knows them.
const ARCHITECTURES: [u32; 4] = [80, 90, 100, 120];

/// Finds NVRTC in `PLUMB_NVRTC_DIR`, in the workspace's `.nvrtc` or on the loader's path.
fn find_nvrtc() -> Option<String> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.nvrtc");
    let places = std::env::var_os("PLUMB_NVRTC_DIR").map(PathBuf::from).into_iter().chain([workspace]);
    let loaded = places.into_iter().find_map(|dir| load_nvrtc_from(&dir));
    let from_loader = || nvrtc_is_present().then(|| "the loader's path".to_owned());
    loaded.map(|path| path.display().to_string()).or_else(from_loader)
}

#[test]
fn every_kernel_compiles_for_every_known_architecture() {
    let Some(place) = find_nvrtc() else {
        println!(
            "SKIPPED: no kernel was compiled, as there is no libnvrtc. Get it with \
             `pip install --no-deps --target .nvrtc nvidia-cuda-nvrtc` in the workspace folder, or name its folder in PLUMB_NVRTC_DIR."
        );
        return;
    };
    println!("NVRTC from {place}");
    let known = supported_architectures().unwrap();
    let mut num_compiled = 0;
    for architecture in ARCHITECTURES.into_iter().filter(|architecture| known.contains(architecture)) {
        let runs_there = |source: &&KernelSource| source.only_for.is_none_or(|only| only == architecture);
        for source in KernelSource::ALL.iter().filter(runs_there) {
            for definitions in source.variants {
                let compiled = compile(source, definitions, architecture)
                    .unwrap_or_else(|error| panic!("sm_{architecture}: {error}"));
                assert_eq!(&compiled.image[..4], b"\x7fELF", "{} for sm_{architecture}", source.name);
                // Such as products that the compiler does not overlap.
                let log = compiled.log;
                assert!(!log.contains("Performance Loss"), "{} for sm_{architecture}: {log}", source.name);
                num_compiled += 1;
            }
        }
    }
    assert!(num_compiled >= 2 * KernelSource::ALL.len(), "{num_compiled} for {known:?}");

    // A GPU newer than the compiler gets PTX, which its driver compiles.
    let embedding = KernelSource::by_name("embedding").unwrap();
    let newer = known.iter().max().unwrap() + 10;
    let ptx = String::from_utf8(compile(embedding, &[], newer).unwrap().image).unwrap();
    assert!(ptx.contains(".entry embedding"), "{ptx}");

    // The compiler's log reaches the reader.
    let broken = KernelSource {
        name: "broken",
        text: "extern \"C\" __global__ void broken() { nonsense(); }",
        variants: &[&[]],
        only_for: None,
    };
    let error = compile(&broken, &["A=1"], 90).unwrap_err().to_string();
    assert!(error.contains("broken.cu") && error.contains("nonsense") && error.contains("A=1"), "{error}");
}

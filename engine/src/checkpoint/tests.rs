use std::fs;

use safetensors::tensor::TensorView;
use tempfile::TempDir;

use super::*;

fn write(folder: &Path, file: &str, tensors: &[(&str, Dtype, &[usize], &[u8])]) {
    let views: Vec<_> = tensors
        .iter()
        .map(|&(name, dtype, shape, bytes)| {
            (name.to_owned(), TensorView::new(dtype, shape.to_vec(), bytes).unwrap())
        })
        .collect();
    fs::write(folder.join(file), safetensors::serialize(views, None).unwrap()).unwrap();
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn shards_are_one_checkpoint() {
    let folder = folder();
    let (one, two) = (1.5f32, -2.25f32);
    let a = [bf16::from_f32(one).to_le_bytes(), bf16::from_f32(two).to_le_bytes()].concat();
    let b = [f16::from_f32(one).to_le_bytes(), f16::from_f32(two).to_le_bytes()].concat();
    write(folder.path(), "model-1.safetensors", &[("a", Dtype::BF16, &[2], &a)]);
    write(folder.path(), "model-2.safetensors", &[("b", Dtype::F16, &[1, 2], &b)]);
    let index = r#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}"#;
    fs::write(folder.path().join(INDEX), index).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.bf16("a", &[2]).unwrap().bytes(), a);
    assert_eq!(checkpoint.bf16("b", &[1, 2]).unwrap().bytes(), a, "these numbers fit both types");
    assert!(checkpoint.contains("a") && !checkpoint.contains("c"));
}

#[test]
fn a_wrong_tensor_is_named() {
    let folder = folder();
    write(folder.path(), SINGLE, &[("a", Dtype::BF16, &[2], &[0; 4]), ("c", Dtype::F32, &[1], &[0; 4])]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let of = |name: &str, shape: &[u64]| checkpoint.bf16(name, shape).unwrap_err().to_string();
    let shape = of("a", &[4]);
    assert!(shape.contains("`a`: expected shape [4], found [2]") && shape.contains(SINGLE), "{shape}");
    assert!(of("b", &[2]).contains("`b`: expected a tensor of this name, found none"));
    assert!(of("c", &[1]).contains("BF16 or F16, found F32"));
}

/// Cut anywhere, a file is refused when it is opened, not when it is read.
#[test]
fn a_cut_or_changed_file_is_refused() {
    let folder = folder();
    let path = folder.path().join(SINGLE);
    write(folder.path(), SINGLE, &[("a", Dtype::BF16, &[64], &[1; 128])]);
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(SINGLE), "{length}: {error}");
    }
    // Random bytes for each byte of the header: an error or another valid file, never a panic.
    for place in 0..whole.len() - 128 {
        let mut bytes = whole.clone();
        bytes[place] ^= 0x55;
        fs::write(&path, &bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(folder.path()) {
            let _ = checkpoint.bf16("a", &[64]);
        }
    }
}

#[test]
fn an_index_names_files_of_its_folder() {
    let folder = folder();
    fs::write(folder.path().join(INDEX), r#"{"weight_map":{"a":"../model.safetensors"}}"#).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("weight_map") && error.contains("../model"), "{error}");
    fs::write(folder.path().join(INDEX), r#"{"weight_map":{"a":"gone.safetensors"}}"#).unwrap();
    assert!(Checkpoint::open(folder.path()).unwrap_err().to_string().contains("gone.safetensors"));
}

#[test]
fn a_tensor_of_two_shards_is_refused() {
    let folder = folder();
    for file in ["x.safetensors", "y.safetensors"] {
        write(folder.path(), file, &[("a", Dtype::BF16, &[1], &[0; 2])]);
    }
    fs::write(folder.path().join(INDEX), r#"{"weight_map":{"a":"x.safetensors","b":"y.safetensors"}}"#)
        .unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("x.safetensors") && error.contains("y.safetensors"), "{error}");
}

//! A model's weights in safetensors files, mapped into memory.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use memmap2::Mmap;
use plumbline_schema::{InputError, Location, files::read_json};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::error::EngineError;

/// The file of an unsharded checkpoint, and the list of a sharded one, as transformers writes them.
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The tensors of a checkpoint by name.
///
/// The files are mapped, so nothing is read before it is used. Who shortens a file while it is mapped ends the process,
/// as with every mapped file; one that was cut before is refused when it is opened.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    shards: Vec<Shard>,
    tensors: HashMap<String, Entry>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens the checkpoint in a folder: `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// Names the file that is missing, cut off or no safetensors file.
    pub fn open(folder: &Path) -> Result<Self, EngineError> {
        let index = folder.join(INDEX);
        let names: BTreeSet<String> = if index.exists() {
            let index_of: Index = read_json(&index, "a weight_map of tensors to files")?;
            index_of.weight_map.into_values().collect()
        } else {
            BTreeSet::from([SINGLE.to_owned()])
        };
        let mut checkpoint =
            Self { folder: folder.to_path_buf(), shards: Vec::new(), tensors: HashMap::new() };
        for name in names {
            if Path::new(&name).components().count() != 1 {
                let expected = "names of files in this folder";
                return Err(
                    InputError::invalid(index, Location::Key("weight_map".into()), expected, name).into()
                );
            }
            checkpoint.map(folder.join(name))?;
        }
        Ok(checkpoint)
    }

    fn map(&mut self, path: PathBuf) -> Result<(), InputError> {
        let file = File::open(&path).map_err(|source| InputError::io(&path, source))?;
        // SAFETY: the map is only read; that the file stays as it is, is told above.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| InputError::io(&path, source))?;
        let bad =
            |found: String| InputError::invalid(&path, Location::File, "a whole safetensors file", found);
        let (header_bytes, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| bad(format!("{} bytes that are none ({error})", map.len())))?;
        let first = 8 + header_bytes;
        for (name, info) in metadata.tensors() {
            let bytes = first + info.data_offsets.0..first + info.data_offsets.1;
            let shard = self.shards.len();
            let entry = Entry { shard, dtype: info.dtype, shape: info.shape.clone(), bytes };
            if let Some(other) = self.tensors.insert(name.clone(), entry) {
                let other = self.shards.get(other.shard).map_or(path.as_path(), |shard| &shard.path);
                return Err(bad(format!("tensor `{name}`, which {} has, too", other.display())));
            }
        }
        self.shards.push(Shard { path, map });
        Ok(())
    }

    /// Whether there is a tensor of this name.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor's values as bf16, little-endian, row by row; fp16 ones are rounded.
    ///
    /// # Errors
    /// When there is none of this name, shape, or of either type.
    pub fn bf16(&self, name: &str, shape: &[u64]) -> Result<Values<'_>, EngineError> {
        let refuse = |path: &Path, expected: String, found: String| EngineError::Tensor {
            path: path.to_path_buf(),
            name: name.to_owned(),
            expected,
            found,
        };
        let Some(entry) = self.tensors.get(name) else {
            return Err(refuse(&self.folder, "a tensor of this name".to_owned(), "none".to_owned()));
        };
        let shard = &self.shards[entry.shard];
        let found: Vec<u64> = entry.shape.iter().map(|&size| size as u64).collect();
        if found != shape {
            return Err(refuse(&shard.path, format!("shape {shape:?}"), format!("{found:?}")));
        }
        let bytes = &shard.map[entry.bytes.clone()];
        match entry.dtype {
            Dtype::BF16 => Ok(Values::Mapped(bytes)),
            Dtype::F16 => Ok(Values::Converted(f16_to_bf16(bytes))),
            other => Err(refuse(&shard.path, "values of type BF16 or F16".to_owned(), format!("{other:?}"))),
        }
    }
}

/// A tensor's bytes.
#[derive(Debug)]
pub enum Values<'a> {
    /// As they lie in the file.
    Mapped(&'a [u8]),
    /// Of another type in the file.
    Converted(Vec<u8>),
}

impl Values<'_> {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(bytes) => bytes,
            Self::Converted(bytes) => bytes,
        }
    }
}

fn f16_to_bf16(bytes: &[u8]) -> Vec<u8> {
    let pairs = bytes.chunks_exact(2);
    pairs
        .flat_map(|pair| bf16::from_f32(f16::from_le_bytes([pair[0], pair[1]]).to_f32()).to_le_bytes())
        .collect()
}

#[cfg(test)]
mod tests;

//! Samples that no longer fit into memory, in an unnamed temporary file.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    path::Path,
};

use super::held::Held;

/// Equal samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sample {
    pub(super) value_ns: u64,
    /// At least 1.
    pub(super) count: u32,
}

/// Read and written in pieces of this size.
const CHUNK_BYTES: usize = 64 << 10;

/// More than a sample takes (13 bytes), so that it can be written and read as whole words.
const PADDING_BYTES: usize = 16;

/// What is kept of eight bytes by how many of them belong to a number.
const MASKS: [u64; 9] = {
    let mut masks = [u64::MAX; 9];
    let mut num_bytes = 0;
    while num_bytes < 8 {
        masks[num_bytes] = (1 << (8 * num_bytes)) - 1;
        num_bytes += 1;
    }
    masks
};

/// Samples in a file without a name, gone with the process; in no order. After an error its end is not known.
///
/// A sample is one byte with the lengths of value (low half) and count (high half, 0 for a count of 1), then both
/// little-endian without their high zero bytes: 5 bytes for a single latency of 17 ms to 4 s.
#[derive(Debug)]
pub(super) struct Spill {
    file: File,
    chunk: Vec<u8>,
}

impl Spill {
    /// An empty file in `folder`.
    pub(super) fn create(folder: &Path) -> io::Result<Self> {
        Ok(Self { file: tempfile::tempfile_in(folder)?, chunk: Vec::new() })
    }

    /// Writes samples behind those there are.
    pub(super) fn append(&mut self, samples: &Held) -> io::Result<()> {
        self.chunk.clear();
        self.chunk.reserve_exact(CHUNK_BYTES + 2 * PADDING_BYTES);
        let mut written = Ok(());
        samples.for_each(|sample| {
            if self.chunk.len() > CHUNK_BYTES {
                if written.is_ok() {
                    written = self.file.write_all(&self.chunk);
                }
                self.chunk.clear();
            }
            encode(sample, &mut self.chunk);
        });
        written.and_then(|()| self.file.write_all(&self.chunk))
    }

    /// Writes the samples of `other` behind those there are.
    pub(super) fn append_all_of(&mut self, mut other: Self) -> io::Result<()> {
        other.file.rewind()?;
        io::copy(&mut other.file, &mut self.file)?;
        Ok(())
    }

    /// Shows every sample to `visit`; nothing can be appended afterwards.
    pub(super) fn for_each(&mut self, mut visit: impl FnMut(Sample)) -> io::Result<()> {
        self.file.rewind()?;
        self.chunk.resize(CHUNK_BYTES + PADDING_BYTES, 0);
        let mut num_kept = 0;
        loop {
            let num_read = match self.file.read(&mut self.chunk[num_kept..CHUNK_BYTES]) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                read => read?,
            };
            let filled = num_kept + num_read;
            let decoded = decode_all(&self.chunk, filled, &mut visit)?;
            num_kept = filled - decoded;
            if num_read == 0 {
                return if num_kept == 0 { Ok(()) } else { Err(damaged()) };
            }
            self.chunk.copy_within(decoded..filled, 0);
        }
    }
}

/// The file is not what was written to it.
pub(super) fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "expected the samples that were written, found others")
}

fn encode(sample: Sample, out: &mut Vec<u8>) {
    let num_value_bytes = 8 - sample.value_ns.leading_zeros() / 8;
    let num_count_bytes = if sample.count == 1 { 0 } else { 4 - sample.count.leading_zeros() / 8 };
    out.push((num_value_bytes | num_count_bytes << 4) as u8);
    // All bytes and then fewer: a length known to the compiler is copied without a call.
    for (bytes, num_bytes) in [
        (sample.value_ns.to_le_bytes(), num_value_bytes),
        (u64::from(sample.count).to_le_bytes(), num_count_bytes),
    ] {
        let end = out.len() + num_bytes as usize;
        out.extend_from_slice(&bytes);
        out.truncate(end);
    }
}

/// Decodes the samples that lie whole within the first `filled` bytes and returns their length in bytes.
///
/// `chunk` goes on for at least [`PADDING_BYTES`] behind `filled`.
fn decode_all(chunk: &[u8], filled: usize, visit: &mut impl FnMut(Sample)) -> io::Result<usize> {
    let mut at = 0;
    while at < filled {
        let bytes = chunk[at..].first_chunk::<PADDING_BYTES>().ok_or_else(damaged)?;
        let (num_value_bytes, num_count_bytes) = (usize::from(bytes[0] & 15), usize::from(bytes[0] >> 4));
        if num_value_bytes > 8 || num_count_bytes > 4 {
            return Err(damaged());
        }
        let end = at + 1 + num_value_bytes + num_count_bytes;
        if end > filled {
            break;
        }
        let numbers = u128::from_le_bytes(*bytes) >> 8;
        let value_ns = numbers as u64 & MASKS[num_value_bytes];
        let count = (numbers >> (8 * num_value_bytes)) as u64 & MASKS[num_count_bytes];
        visit(Sample { value_ns, count: if num_count_bytes == 0 { 1 } else { count as u32 } });
        at = end;
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(spill: &mut Spill) -> io::Result<Vec<Sample>> {
        let mut samples = Vec::new();
        spill.for_each(|sample| samples.push(sample))?;
        Ok(samples)
    }

    /// Every length of value and count.
    fn samples(num: u64) -> Vec<Sample> {
        (0..num)
            .map(|i| Sample {
                value_ns: u64::MAX.checked_shr((i % 67) as u32).unwrap_or(0),
                count: (u32::MAX >> (i % 32)).max(1),
            })
            .collect()
    }

    #[test]
    fn samples_come_back_over_many_chunks() {
        let folder = tempfile::tempdir().unwrap();
        let mut spill = Spill::create(folder.path()).unwrap();
        let written = samples(20_000);
        for part in written.chunks(3_000) {
            spill.append(&Held::of(part)).unwrap();
        }
        assert!(spill.file.metadata().unwrap().len() > 2 * CHUNK_BYTES as u64);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the file has no name");
        assert_eq!(read_all(&mut spill).unwrap(), written);
        assert_eq!(read_all(&mut spill).unwrap(), written, "again");
        let mut whole = Spill::create(folder.path()).unwrap();
        let few = Held::of(&written[..5]);
        whole.append(&few).unwrap();
        whole.append_all_of(spill).unwrap();
        whole.append(&few).unwrap();
        let expected = [&written[..5], &written, &written[..5]].concat();
        assert_eq!(read_all(&mut whole).unwrap(), expected);
    }

    #[test]
    fn a_common_latency_takes_five_bytes() {
        let mut spill = Spill::create(&std::env::temp_dir()).unwrap();
        spill.append(&Held::of(&[Sample { value_ns: 25_000_000, count: 1 }])).unwrap();
        assert_eq!(spill.file.metadata().unwrap().len(), 5);
    }

    #[test]
    fn a_damaged_file_is_an_error() {
        for bytes in [&[0x01][..], &[0x09, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[0x50, 0, 0, 0, 0, 0], &[0x11, 7]] {
            let mut spill = Spill::create(&std::env::temp_dir()).unwrap();
            spill.file.write_all(bytes).unwrap();
            assert_eq!(read_all(&mut spill).unwrap_err().kind(), io::ErrorKind::InvalidData, "{bytes:?}");
        }
    }
}

//! A bundle on disk: opening it, reading its parts, adding to it.
//!
//! Nothing is believed before it is checked: the version first, then the manifest, then length and digest of
//! every payload before it is parsed.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
};

use plumbline_schema::{
    InputError, Location, Operator,
    files::{MAX_DOCUMENT_BYTES, read_text, write_atomically, write_json},
};
use serde::{Deserialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use crate::{
    engine_profile::EngineProfile,
    error::BundleError,
    evidence::SustainedSlowdown,
    host::HostCosts,
    manifest::{FileEntry, FormatVersion, MANIFEST, Manifest, is_safe_name},
    parallel,
    predictor::{OperatorPredictor, PredictorFile, Predictors, SharedPredictor},
    samples::{self, Sample},
};

/// A bundle folder whose manifest has been read and checked.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// The folder.
    pub root: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    digest: String,
}

/// Just the version, whatever else a manifest of another version holds.
#[derive(Deserialize)]
struct VersionProbe {
    format_version: FormatVersion,
}

impl Bundle {
    /// Opens a bundle folder: reads the manifest, its version first.
    ///
    /// # Errors
    /// `Missing` when there is no manifest, `Version`, or `Input` with line or key.
    pub fn open(path: &Path) -> Result<Self, BundleError> {
        let manifest_path = path.join(MANIFEST);
        if !manifest_path.is_file() {
            return Err(BundleError::Missing {
                path: path.into(),
                what: MANIFEST.into(),
                hint: "not a bundle; `plumb profile` makes one".into(),
            });
        }
        let text = read_text(&manifest_path)?;
        let bad = |e| InputError::json(&manifest_path, "a bundle manifest", &e);
        let VersionProbe { format_version: found } = serde_json::from_str(&text).map_err(bad)?;
        if let Some(action) = found.check_readable_by(FormatVersion::CURRENT) {
            let supported = FormatVersion::CURRENT;
            return Err(BundleError::Version { path: manifest_path, found, supported, action });
        }
        let manifest: Manifest = serde_json::from_str(&text).map_err(bad)?;
        manifest.check().map_err(|e| e.at(&manifest_path))?;
        Ok(Self { root: path.into(), manifest, digest: sha256_hex(text.as_bytes()) })
    }

    /// SHA-256 of `manifest.json`, hex; as that holds every file's digest, it stands for the whole bundle.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// SHA-256 over the digests of the predictors, hex: what an engine profile was fitted on.
    ///
    /// Unlike [`Self::digest`] it stays when a profile is added to the bundle.
    #[must_use]
    pub fn predictors_digest(&self) -> String {
        let predictors = self.manifest.files.iter().filter(|(name, _)| name.starts_with("predictors/"));
        let lines: Vec<_> = predictors.map(|(name, entry)| format!("{name} {}\n", entry.sha256)).collect();
        sha256_hex(lines.concat().as_bytes())
    }

    /// Reads a payload, after its length and digest have been checked.
    ///
    /// # Errors
    /// `Missing`, `Mismatch`, or `Input` for one over 64 MiB.
    pub fn read_file(&self, name: &str) -> Result<Vec<u8>, BundleError> {
        let path = self.root.join(name);
        let missing = |what: String| {
            let hint = format!("`{}` makes it", command_for(name));
            BundleError::Missing { path: self.root.clone(), what, hint }
        };
        let entry =
            self.manifest.files.get(name).ok_or_else(|| missing(format!("{name} in its manifest")))?;
        if entry.num_bytes > MAX_DOCUMENT_BYTES {
            let location = Location::Key(format!("files.{name}.num_bytes"));
            let expected = format!("at most {MAX_DOCUMENT_BYTES}");
            let found = entry.num_bytes.to_string();
            return Err(BundleError::invalid(self.root.join(MANIFEST), location, expected, found));
        }
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(missing(format!("{name}, which its manifest lists")));
            }
            Err(e) => return Err(InputError::io(path, e).into()),
        };
        let mut bytes = Vec::with_capacity(entry.num_bytes as usize);
        file.take(entry.num_bytes + 1).read_to_end(&mut bytes).map_err(|e| InputError::io(&path, e))?;
        check_entry(&path, name, entry, &bytes)?;
        Ok(bytes)
    }

    /// Names of the payloads whose path starts with `prefix`, in order.
    pub fn payload_names(&self, prefix: &str) -> impl Iterator<Item = &str> {
        self.manifest.files.keys().map(String::as_str).filter(move |name| name.starts_with(prefix))
    }

    /// Reads a JSON payload; `expected` names what it should be.
    ///
    /// # Errors
    /// Those of [`Self::read_file`], and `Input` with the line.
    pub fn read_payload_json<T: DeserializeOwned>(
        &self,
        name: &str,
        expected: &str,
    ) -> Result<T, BundleError> {
        let bytes = self.read_file(name)?;
        let path = self.root.join(name);
        Ok(serde_json::from_slice(&bytes).map_err(|e| InputError::json(&path, expected, &e))?)
    }

    /// Reads every sample, operators in the order of the forward pass, rows in the order of their file.
    ///
    /// # Errors
    /// `Missing` when there is none; those of [`Self::read_file`]; `Input` with line and column.
    pub fn samples(&self) -> Result<Vec<Sample>, BundleError> {
        let mut all = Vec::new();
        for operator in Operator::ALL {
            if self.samples_file(operator).is_some() {
                all.extend(self.operator_samples(operator)?);
            }
        }
        if all.is_empty() {
            return Err(BundleError::Missing {
                path: self.root.clone(),
                what: "samples".into(),
                hint: "`plumb profile` measures them".into(),
            });
        }
        Ok(all)
    }

    /// Reads the samples of one operator.
    ///
    /// # Errors
    /// As [`Self::samples`].
    pub fn operator_samples(&self, operator: Operator) -> Result<Vec<Sample>, BundleError> {
        let name = self.samples_file(operator).unwrap_or_else(|| samples_name(operator));
        let path = self.root.join(&name);
        let mut bytes = self.read_file(&name)?;
        if path.extension().is_some_and(|e| e == "zst") {
            bytes = decompress(&bytes, &path)?;
        }
        Ok(samples::from_csv(operator, &bytes, &path)?)
    }

    /// The payload that holds an operator's samples, plain or compressed; `None` when there is none.
    #[must_use]
    pub fn samples_file(&self, operator: Operator) -> Option<String> {
        let plain = samples_name(operator);
        let compressed = format!("{plain}.zst");
        [plain, compressed].into_iter().find(|name| self.manifest.files.contains_key(name))
    }

    /// Reads what it costs the host to drive the GPU.
    ///
    /// # Errors
    /// Those of [`Self::read_file`], and `Input` with line or key.
    pub fn host(&self) -> Result<HostCosts, BundleError> {
        let host: HostCosts = self.read_payload_json(HOST, "host costs")?;
        host.check().map_err(|e| e.at(self.root.join(HOST)))?;
        Ok(host)
    }

    /// Names of the bundle's engine profiles.
    #[must_use]
    pub fn engine_names(&self) -> Vec<&str> {
        let names = self.payload_names("engines/").filter_map(|name| name.strip_prefix("engines/"));
        names.filter_map(|name| name.strip_suffix(".json")).collect()
    }

    /// Reads an engine profile by name.
    ///
    /// # Errors
    /// `Missing`, which lists the names present; those of [`Self::read_file`]; `Input` with line or key.
    pub fn engine(&self, name: &str) -> Result<EngineProfile, BundleError> {
        let present = self.engine_names();
        if !present.contains(&name) {
            let hint = if present.is_empty() {
                "it has none; `plumb calibrate` fits one".into()
            } else {
                format!("it has {}", present.join(", "))
            };
            let what = format!("engine profile `{name}`");
            return Err(BundleError::Missing { path: self.root.clone(), what, hint });
        }
        let file = engine_name(name);
        let path = self.root.join(&file);
        let bytes = self.read_file(&file)?;
        let text = String::from_utf8(bytes)
            .map_err(|_| InputError::invalid(&path, Location::File, "UTF-8 text", "other bytes"))?;
        Ok(EngineProfile::parse(&text, &path)?)
    }

    /// Operators that have a predictor, in the order of the forward pass.
    pub fn predicted_operators(&self) -> impl Iterator<Item = Operator> {
        Operator::ALL.into_iter().filter(|&o| self.manifest.files.contains_key(&predictor_name(o)))
    }

    /// Reads the predictor of one operator.
    ///
    /// # Errors
    /// Those of [`Self::read_file`], and `Input` with the line, or what the predictor's own check found.
    pub fn predictor(&self, operator: Operator) -> Result<OperatorPredictor, BundleError> {
        match self.predictor_file(operator)? {
            PredictorFile::Whole(predictor) => Ok(*predictor),
            PredictorFile::Shared(shared) => match self.predictor_file(shared.same_as)? {
                PredictorFile::Whole(whole) => Ok(shared.join(&whole)),
                PredictorFile::Shared(_) => Err(self.not_whole(&shared)),
            },
        }
    }

    /// Reads a predictor's file as it stands.
    fn predictor_file(&self, operator: Operator) -> Result<PredictorFile, BundleError> {
        let name = predictor_name(operator);
        let path = self.root.join(&name);
        let file = PredictorFile::parse(&self.read_file(&name)?, &path)?;
        if file.operator() != operator {
            let location = Location::Key("operator".into());
            let expected = format!("`{operator}`, as the file is named");
            return Err(BundleError::invalid(path, location, expected, format!("`{}`", file.operator())));
        }
        Ok(file)
    }

    fn not_whole(&self, shared: &SharedPredictor) -> BundleError {
        let path = self.root.join(predictor_name(shared.operator));
        let found = format!("`{}`, whose file is not whole", shared.same_as);
        BundleError::invalid(path, Location::Key("same_as".into()), "an operator with a predictor", found)
    }

    /// Reads every predictor.
    ///
    /// # Errors
    /// `Missing` when there is none; those of [`Self::predictor`].
    pub fn predictors(&self) -> Result<Predictors, BundleError> {
        let operators: Vec<_> = self.predicted_operators().collect();
        let files = parallel::map(&operators, |&operator| self.predictor_file(operator));
        let files = files.into_iter().collect::<Result<Vec<_>, _>>()?;
        let joined = |file: &PredictorFile| {
            let PredictorFile::Shared(shared) = file else { return Ok(None) };
            let whole = files.iter().find_map(|file| match file {
                PredictorFile::Whole(whole) if whole.operator == shared.same_as => Some(whole),
                _ => None,
            });
            whole.map(|whole| Some(shared.join(whole))).ok_or_else(|| self.not_whole(shared))
        };
        let joined = files.iter().map(joined).collect::<Result<Vec<_>, BundleError>>()?;
        let whole = |file| match file {
            PredictorFile::Whole(whole) => Some(*whole),
            PredictorFile::Shared(_) => None,
        };
        let predictors: Vec<_> = files
            .into_iter()
            .zip(joined)
            .filter_map(|(file, joined)| joined.or_else(|| whole(file)))
            .collect();
        if predictors.is_empty() {
            return Err(BundleError::Missing {
                path: self.root.clone(),
                what: "predictors".into(),
                hint: "`plumb train` fits them".into(),
            });
        }
        let gpu = &self.manifest.gpu;
        let sustained = self.manifest.evidence.as_ref().map_or(&[][..], |evidence| &evidence.sustained);
        // Each was checked as it was read, and its file is named after its operator.
        Ok(Predictors::of_checked(gpu.clone(), predictors)
            .with_sustained(SustainedSlowdown::of(sustained, gpu)))
    }

    /// Adds or replaces payloads, each atomically, and the manifest last.
    ///
    /// A crash on the way leaves the old manifest: payloads that were added are not part of the bundle yet, and
    /// reading one that was replaced fails with the command that makes it anew.
    ///
    /// # Errors
    /// `Input` for an unsafe name or any I/O error.
    pub fn update(&mut self, changes: Vec<(String, Vec<u8>)>) -> Result<(), BundleError> {
        let mut manifest = self.manifest.clone();
        // What is written now may be what older readers do not know.
        manifest.format_version = FormatVersion::CURRENT;
        for (name, bytes) in changes {
            let entry = write_payload(&self.root, &name, &bytes)?;
            manifest.files.insert(name, entry);
        }
        self.digest = write_manifest(&self.root, &manifest)?;
        self.manifest = manifest;
        Ok(())
    }
}

/// The payload of host costs.
pub const HOST: &str = "host.json";

/// The payload of the error-versus-time curve, a list of [`CurvePoint`](crate::CurvePoint); absent where no advisor was
/// asked.
pub const CURVE: &str = "curve.json";

/// The payload of an operator's samples.
#[must_use]
pub fn samples_name(operator: Operator) -> String {
    format!("samples/{operator}.csv")
}

/// The payload of an engine profile.
#[must_use]
pub fn engine_name(name: &str) -> String {
    format!("engines/{name}.json")
}

/// The payload of an operator's predictor.
#[must_use]
pub fn predictor_name(operator: Operator) -> String {
    format!("predictors/{operator}.json")
}

/// SHA-256 as lower-case hex.
#[must_use]
pub fn sha256_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(64);
    for byte in Sha256::digest(bytes) {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
    }
    text
}

/// The command that makes a payload.
fn command_for(name: &str) -> &'static str {
    if name.starts_with("predictors/") {
        "plumb train"
    } else if name.starts_with("engines/") {
        "plumb calibrate"
    } else {
        "plumb profile"
    }
}

fn check_entry(path: &Path, name: &str, entry: &FileEntry, bytes: &[u8]) -> Result<(), BundleError> {
    let mismatch = |what, expected: String, found: String| {
        let hint = format!("it was changed or half updated; `{}` makes it anew", command_for(name));
        Err(BundleError::Mismatch { path: path.into(), what, expected, found, hint })
    };
    if bytes.len() as u64 > entry.num_bytes {
        return mismatch("length", entry.num_bytes.to_string(), "more".into());
    }
    if (bytes.len() as u64) < entry.num_bytes {
        return mismatch("length", entry.num_bytes.to_string(), bytes.len().to_string());
    }
    let found = sha256_hex(bytes);
    if found != entry.sha256 {
        return mismatch("sha256", entry.sha256.clone(), found);
    }
    Ok(())
}

/// Decompresses zstd, refusing what unpacks to more than a document may hold.
fn decompress(bytes: &[u8], path: &Path) -> Result<Vec<u8>, InputError> {
    let mut unpacked = Vec::new();
    let bad = |_| InputError::invalid(path, Location::File, "zstd-compressed text", "other bytes");
    let decoder = zstd::Decoder::new(bytes).map_err(bad)?;
    decoder.take(MAX_DOCUMENT_BYTES + 1).read_to_end(&mut unpacked).map_err(bad)?;
    if unpacked.len() as u64 > MAX_DOCUMENT_BYTES {
        let expected = format!("at most {MAX_DOCUMENT_BYTES} bytes unpacked");
        return Err(InputError::invalid(path, Location::File, expected, "more"));
    }
    Ok(unpacked)
}

fn write_payload(root: &Path, name: &str, bytes: &[u8]) -> Result<FileEntry, BundleError> {
    if !is_safe_name(name) {
        let expected = "a relative path with `/`, without `..`";
        return Err(BundleError::invalid(root, Location::File, expected, format!("`{name}`")));
    }
    if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
        let expected = format!("at most {MAX_DOCUMENT_BYTES} bytes");
        return Err(BundleError::invalid(root.join(name), Location::File, expected, bytes.len().to_string()));
    }
    write_atomically(&root.join(name), |out| out.write_all(bytes))?;
    Ok(FileEntry { num_bytes: bytes.len() as u64, sha256: sha256_hex(bytes) })
}

/// Writes the manifest and returns its digest.
fn write_manifest(root: &Path, manifest: &Manifest) -> Result<String, BundleError> {
    let path = root.join(MANIFEST);
    manifest.check().map_err(|e| e.at(&path))?;
    write_json(&path, manifest)?;
    Ok(sha256_hex(read_text(&path)?.as_bytes()))
}

/// Builds a bundle in a hidden folder beside its place, and moves it there when complete.
#[derive(Debug)]
pub struct BundleWriter {
    target: PathBuf,
    folder: tempfile::TempDir,
    files: BTreeMap<String, FileEntry>,
}

impl BundleWriter {
    /// Starts a bundle that will stand at `target`, which must not exist yet (or be an empty folder).
    ///
    /// # Errors
    /// `Input` when something is there, or the folder above cannot be written.
    pub fn new(target: &Path) -> Result<Self, BundleError> {
        let wrap = |source| InputError::io(target, source);
        if target.exists() && !is_empty_folder(target) {
            let expected = "a path where nothing exists yet";
            return Err(BundleError::invalid(target, Location::File, expected, "a file or folder"));
        }
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        std::fs::create_dir_all(&parent).map_err(wrap)?;
        let folder = tempfile::Builder::new().prefix(".plumb-").tempdir_in(parent).map_err(wrap)?;
        Ok(Self { target: target.into(), folder, files: BTreeMap::new() })
    }

    /// Adds a payload, or replaces it.
    ///
    /// # Errors
    /// `Input` for an unsafe name or any I/O error.
    pub fn add(&mut self, name: &str, bytes: &[u8]) -> Result<(), BundleError> {
        let entry = write_payload(self.folder.path(), name, bytes)?;
        self.files.insert(name.to_owned(), entry);
        Ok(())
    }

    /// Adds a payload as indented JSON.
    ///
    /// # Errors
    /// As [`Self::add`], or a value that JSON cannot hold.
    pub fn add_json<T: serde::Serialize>(&mut self, name: &str, value: &T) -> Result<(), BundleError> {
        self.add(name, &to_json(name, value)?)
    }

    /// Adds the samples, a file per operator, rows in the order given.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn add_samples(&mut self, samples: &[Sample]) -> Result<(), BundleError> {
        for operator in Operator::ALL {
            let mut rows = samples.iter().filter(|s| s.operator == operator).peekable();
            if rows.peek().is_some() {
                self.add(&samples_name(operator), &samples::to_csv(operator, rows))?;
            }
        }
        Ok(())
    }

    /// Writes the manifest, whose `files` are filled in here, and moves the bundle to its place.
    ///
    /// # Errors
    /// `Input` for a manifest that does not pass its check, or any I/O error; nothing is left behind then.
    pub fn finish(self, mut manifest: Manifest) -> Result<Bundle, BundleError> {
        manifest.files = self.files;
        write_manifest(self.folder.path(), &manifest)?;
        let wrap = |source| InputError::io(&self.target, source);
        set_public(self.folder.path()).map_err(wrap)?;
        if self.target.exists() {
            // Empty, or this fails.
            std::fs::remove_dir(&self.target).map_err(wrap)?;
        }
        std::fs::rename(self.folder.path(), &self.target).map_err(wrap)?;
        Bundle::open(&self.target)
    }
}

/// A value as indented JSON with a final newline, as every JSON file of a bundle is written.
///
/// # Errors
/// `Input` when JSON cannot hold the value.
pub fn to_json<T: serde::Serialize>(name: &str, value: &T) -> Result<Vec<u8>, BundleError> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|e| InputError::json(Path::new(name), "a value that JSON can hold", &e))?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn is_empty_folder(path: &Path) -> bool {
    std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

/// A temporary folder is private to its owner; a bundle is to be read like any other folder.
#[cfg(unix)]
fn set_public(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn set_public(_folder: &Path) -> std::io::Result<()> {
    Ok(())
}

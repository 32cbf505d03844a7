//! Verifying a bundle: every digest, every file's content, every physical floor, and nothing unlisted.

use std::path::Path;

use plumbline_schema::{InputError, Location, Operator, roofline::floor_ns};
use serde::Serialize;

use crate::{
    bundle::{Bundle, HOST},
    error::BundleError,
    manifest::MANIFEST,
    samples::Sample,
};

/// What [`Bundle::verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Files that the manifest lists.
    pub num_files: usize,
    /// Their length in all.
    pub num_bytes: u64,
    /// Rows of samples.
    pub num_samples: usize,
    /// Predictors.
    pub num_predictors: usize,
    /// Engine profiles.
    pub num_engines: usize,
    /// Points that were planned but not measured.
    pub num_incomplete: usize,
    /// Files in the folder that the manifest does not list; harmless, but no part of the bundle.
    pub stray_files: Vec<String>,
    /// What is wrong, each with its file and place; empty when the bundle is sound.
    pub problems: Vec<String>,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }
}

impl Bundle {
    /// Checks everything that can be checked without a GPU; goes on after a problem and lists them all.
    ///
    /// # Errors
    /// `Input` when the folder itself cannot be listed.
    pub fn verify(&self) -> Result<VerifyReport, BundleError> {
        let mut report = VerifyReport {
            num_files: self.manifest.files.len(),
            num_bytes: self.manifest.files.values().map(|f| f.num_bytes).fold(0, u64::saturating_add),
            num_predictors: self.predicted_operators().count(),
            num_engines: self.engine_names().len(),
            num_incomplete: self.manifest.incomplete.len(),
            ..VerifyReport::default()
        };
        for name in self.manifest.files.keys() {
            if let Err(error) = self.verify_file(name, &mut report) {
                report.problems.push(error.to_string());
            }
        }
        self.list_stray_files(&self.root, "", &mut report.stray_files)?;
        report.stray_files.sort();
        Ok(report)
    }

    fn verify_file(&self, name: &str, report: &mut VerifyReport) -> Result<(), BundleError> {
        let operator_of = |folder: &str, extension: &str| {
            let stem = name.strip_prefix(folder)?.strip_suffix(extension)?;
            Operator::ALL.into_iter().find(|operator| operator.name() == stem)
        };
        if let Some(operator) =
            operator_of("samples/", ".csv").or_else(|| operator_of("samples/", ".csv.zst"))
        {
            if self.samples_file(operator).is_some_and(|file| file != name) {
                let location = Location::Key("files".into());
                let expected = format!("the samples of {operator} once");
                let found = format!("`{name}` too");
                return Err(BundleError::invalid(self.root.join(MANIFEST), location, expected, found));
            }
            let samples = self.operator_samples(operator)?;
            report.num_samples += samples.len();
            report.problems.extend(self.below_floor(operator, &samples));
        } else if let Some(operator) = operator_of("predictors/", ".json") {
            self.predictor(operator)?;
        } else if let Some(engine) = name.strip_prefix("engines/").and_then(|n| n.strip_suffix(".json")) {
            let profile = self.engine(engine)?;
            if profile.name != engine {
                let found = format!("`{}`", profile.name);
                let location = Location::Key("name".into());
                let expected = format!("`{engine}`, as the file is named");
                return Err(BundleError::invalid(self.root.join(name), location, expected, found));
            }
        } else if name == HOST {
            self.host()?;
        } else {
            self.read_file(name)?;
            let known_folder = ["samples/", "predictors/", "engines/"].iter().find(|f| name.starts_with(**f));
            if let Some(folder) = known_folder {
                let location = Location::Key("files".into());
                let expected = format!("files of {folder} named after an operator or engine");
                return Err(BundleError::invalid(self.root.join(MANIFEST), location, expected, name));
            }
        }
        Ok(())
    }

    /// Samples that beat what the GPU's data sheet allows, in words.
    fn below_floor(&self, operator: Operator, samples: &[Sample]) -> Vec<String> {
        let path = self.root.join(self.samples_file(operator).unwrap_or_default());
        let describe = |(i, sample): (usize, &Sample)| {
            let floor = floor_ns(&sample.shape, &self.manifest.gpu);
            (sample.stats.min_ns < floor).then(|| {
                format!(
                    "{}, line {}, column `min_ns`: expected at least the physical floor {floor:.1}, found {}",
                    path.display(),
                    i + 2,
                    sample.stats.min_ns
                )
            })
        };
        samples.iter().enumerate().filter_map(describe).collect()
    }

    fn list_stray_files(
        &self,
        folder: &Path,
        prefix: &str,
        stray: &mut Vec<String>,
    ) -> Result<(), BundleError> {
        let wrap = |source| InputError::io(folder, source);
        for entry in std::fs::read_dir(folder).map_err(wrap)? {
            let entry = entry.map_err(wrap)?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            // Symbolic links are not followed: they end in no loop and lead nowhere else.
            if entry.file_type().map_err(wrap)?.is_dir() {
                self.list_stray_files(&entry.path(), &format!("{name}/"), stray)?;
            } else if name != MANIFEST && !self.manifest.files.contains_key(&name) {
                stray.push(name);
            }
        }
        Ok(())
    }
}

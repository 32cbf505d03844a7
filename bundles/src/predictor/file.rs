//! The files that hold predictors: `predictors/<operator>.json`.
//!
//! Operators that were trained as one, as all matrix products are, differ in their errors alone. The first has a whole
//! file, the others name it.

use std::path::Path;

use plumbline_schema::{InputError, Location, Operator};
use serde::{Deserialize, Serialize};

use super::{HeldOutError, OperatorPredictor};
use crate::{bundle::predictor_name, error::BundleError};

/// An operator whose predictor is another's but for the name and the errors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedPredictor {
    /// Which operator.
    pub operator: Operator,
    /// The operator that it was trained with, whose file is whole.
    pub same_as: Operator,
    /// Errors on this operator's own held-out shapes.
    pub error: HeldOutError,
}

impl SharedPredictor {
    /// The predictor that this stands for.
    #[must_use]
    pub fn join(&self, whole: &OperatorPredictor) -> OperatorPredictor {
        OperatorPredictor { operator: self.operator, error: self.error, ..whole.clone() }
    }
}

/// What a predictor's file holds.
#[derive(Clone, Debug, PartialEq)]
pub enum PredictorFile {
    /// Everything.
    Whole(Box<OperatorPredictor>),
    /// What differs from another.
    Shared(SharedPredictor),
}

impl PredictorFile {
    /// Parses and checks a file; `path` is what errors name.
    ///
    /// # Errors
    /// `Invalid` with the line, or what the predictor's own check found.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, InputError> {
        // A whole file fails here at its second key, before anything long is read.
        if let Ok(shared) = serde_json::from_slice::<SharedPredictor>(bytes) {
            if !(shared.operator.is_gemm() && shared.same_as.is_gemm() && shared.operator != shared.same_as) {
                let location = Location::Key("same_as".into());
                let found = format!("`{}` for `{}`", shared.same_as, shared.operator);
                return Err(InputError::invalid(path, location, "another matrix product", found));
            }
            return Ok(Self::Shared(shared));
        }
        let whole: OperatorPredictor =
            serde_json::from_slice(bytes).map_err(|e| InputError::json(path, "a predictor", &e))?;
        let unsound = |reason| InputError::invalid(path, Location::File, "a sound predictor", reason);
        whole.check().map_err(unsound)?;
        Ok(Self::Whole(Box::new(whole)))
    }

    /// Which operator's file it is.
    #[must_use]
    pub fn operator(&self) -> Operator {
        match self {
            Self::Whole(predictor) => predictor.operator,
            Self::Shared(shared) => shared.operator,
        }
    }
}

/// Names and bytes of the files of predictors, in their order.
///
/// # Errors
/// When JSON cannot hold one.
pub fn payloads(predictors: &[OperatorPredictor]) -> Result<Vec<(String, Vec<u8>)>, BundleError> {
    let mut files = Vec::with_capacity(predictors.len());
    for (i, predictor) in predictors.iter().enumerate() {
        let name = predictor_name(predictor.operator);
        let is_same = |other: &&OperatorPredictor| {
            let OperatorPredictor { operator, error, .. } = predictor;
            operator.is_gemm()
                && other.operator.is_gemm()
                && other.samples_digest == predictor.samples_digest
                && OperatorPredictor { operator: *operator, error: *error, ..(**other).clone() } == *predictor
        };
        let bytes = match predictors[..i].iter().find(is_same) {
            None => predictor.to_json()?,
            Some(other) => {
                let shared = SharedPredictor {
                    operator: predictor.operator,
                    same_as: other.operator,
                    error: predictor.error,
                };
                let mut bytes = serde_json::to_vec(&shared)
                    .map_err(|e| InputError::json(Path::new(&name), "a value that JSON can hold", &e))?;
                bytes.push(b'\n');
                bytes
            }
        };
        files.push((name, bytes));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_file_names_another_matrix_product() {
        let parse = |text: &str| PredictorFile::parse(text.as_bytes(), Path::new("o_proj.json"));
        let file = |operator: &str, same_as: &str| {
            let zero = r#"{"n":1,"mean":0.1,"p50":0.1,"p90":0.1,"p99":0.1,"max":0.1,"bias":0.0}"#;
            format!(
                r#"{{"operator":"{operator}","same_as":"{same_as}","error":{{"shuffled":{zero},"blocked":{zero}}}}}"#
            )
        };
        let Ok(PredictorFile::Shared(shared)) = parse(&file("o_proj", "qkv_proj")) else {
            panic!("a shared file");
        };
        assert_eq!((shared.operator, shared.same_as), (Operator::OProj, Operator::QkvProj));
        assert!((shared.error.blocked.p99 - 0.1).abs() < 1e-12);
        for (operator, same_as) in [("o_proj", "o_proj"), ("o_proj", "rope"), ("rope", "qkv_proj")] {
            let error = parse(&file(operator, same_as)).unwrap_err().to_string();
            assert!(error.contains("another matrix product"), "{error}");
        }
        assert!(parse("{}").unwrap_err().to_string().contains("a predictor"));
    }
}

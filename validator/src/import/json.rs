//! JSON as Python writes it, read with the key in every error.

use std::{fmt, path::Path};

use plumbline_schema::{InputError, Location, files::read_text_up_to};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

/// Largest result file read: a hundred thousand requests with all their gaps are a few hundred MB.
const MAX_RESULT_BYTES: u64 = 1 << 30;

/// The text of a result file in which `NaN`, `Infinity` and `-Infinity`, which Python writes and JSON lacks, are strings.
pub(super) fn read(path: &Path) -> Result<String, InputError> {
    read_text_up_to(path, MAX_RESULT_BYTES).map(quote_python_numbers)
}

fn quote_python_numbers(text: String) -> String {
    let is_word =
        |rest: &str| ["NaN", "Infinity", "-Infinity"].into_iter().find(|word| rest.starts_with(word));
    let (mut in_string, mut escaped) = (false, false);
    let mut quoted = String::new();
    let mut copied = 0;
    for (i, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'N' | b'I' | b'-' if !in_string && i >= copied => {
                if let Some(word) = is_word(&text[i..]) {
                    quoted.push_str(&text[copied..i]);
                    quoted.push('"');
                    quoted.push_str(word);
                    quoted.push('"');
                    copied = i + word.len();
                }
            }
            _ => {}
        }
    }
    if copied == 0 {
        return text;
    }
    quoted.push_str(&text[copied..]);
    quoted
}

/// Reads one document; `line` is where it begins, in files that hold one a line.
pub(super) fn parse<T: DeserializeOwned>(
    path: &Path,
    line: Option<u64>,
    text: &str,
    expected: &str,
) -> Result<T, InputError> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let parsed = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let key = error.path().to_string();
        let error = error.into_inner();
        if error.is_syntax() || error.is_eof() || key == "." {
            return match line {
                Some(line) => invalid_at(path, Location::Line(line), expected, &error),
                None => InputError::json(path, expected, &error),
            };
        }
        let place = match line {
            Some(line) => Location::Cell { line, column: key },
            None => Location::Key(key),
        };
        invalid_at(path, place, expected, &error)
    })?;
    reader.end().map_err(|error| match line {
        Some(line) => invalid_at(path, Location::Line(line), expected, &error),
        None => InputError::json(path, expected, &error),
    })?;
    Ok(parsed)
}

/// The error's text without its own line and column, which in a file of one line say little.
fn invalid_at(path: &Path, place: Location, expected: &str, error: &serde_json::Error) -> InputError {
    let text = error.to_string();
    let found = text.rfind(" at line ").map_or(text.as_str(), |at| &text[..at]);
    InputError::invalid(path, place, expected, found)
}

/// A number, or anything else, which is passed over unread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Number(pub Option<f64>);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberVisitor)
    }
}

struct NumberVisitor;

impl<'de> Visitor<'de> for NumberVisitor {
    type Value = Number;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_f64<E>(self, value: f64) -> Result<Number, E> {
        Ok(Number(Some(value)))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Number, E> {
        Ok(Number(Some(value as f64)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Number, E> {
        Ok(Number(Some(value as f64)))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Number, E> {
        Ok(Number(None))
    }

    fn visit_str<E>(self, _: &str) -> Result<Number, E> {
        Ok(Number(None))
    }

    fn visit_unit<E>(self) -> Result<Number, E> {
        Ok(Number(None))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Number, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Number(None))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Number, A::Error> {
        while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Number(None))
    }
}

/// The documents of a file that holds one a line, each with its line; empty lines aside.
pub(super) fn lines(text: &str) -> impl Iterator<Item = (u64, &str)> {
    (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_numbers_become_strings_and_strings_stay() {
        let text = r#"{"rate": Infinity, "a": [NaN, -Infinity, -1], "s": "NaN \" Infinity", "t": "\\"}"#;
        let expected =
            r#"{"rate": "Infinity", "a": ["NaN", "-Infinity", -1], "s": "NaN \" Infinity", "t": "\\"}"#;
        assert_eq!(quote_python_numbers(text.to_owned()), expected);
        assert_eq!(quote_python_numbers("{\"ä\": 1}".to_owned()), "{\"ä\": 1}");
    }

    #[test]
    fn an_error_names_the_key() {
        let path = Path::new("r.json");
        let error = |line, text| parse::<Vec<Vec<f64>>>(path, line, text, "gaps").unwrap_err().to_string();
        let found = "expected gaps, found invalid type: string \"NaN\", expected f64";
        assert_eq!(error(None, r#"[[1.0], [2, "NaN"]]"#), format!("r.json, key `[1][1]`: {found}"));
        assert_eq!(error(Some(3), r#"[["NaN"]]"#), format!("r.json, line 3, column `[0][0]`: {found}"));
        assert!(error(None, "[[1.0]").starts_with("r.json, line 1: expected gaps, found EOF"));
    }
}

//! The samples of one operator, and how findings name a row of them.

use plumbline_schema::Operator;

use super::{Finding, Rule, Severity};
use crate::{
    features::batch_columns,
    samples::{CacheState, Sample},
};

/// Longest text of a batch's sequences in a finding, in characters.
const MAX_SEQUENCES_CHARS: usize = 48;

/// The samples of one operator.
pub(super) struct Table {
    pub(super) operator: Operator,
    /// The payload they stand in.
    pub(super) file: String,
    pub(super) samples: Vec<Sample>,
}

impl Table {
    /// The numbers of a shape that the model decides.
    pub(super) fn layout(&self, sample: &Sample) -> Vec<u64> {
        let mut values = sample.shape.values();
        values.drain(batch_columns(self.operator));
        values
    }

    /// A layout as `column = value`, joined by commas.
    pub(super) fn describe_layout(&self, layout: &[u64]) -> String {
        let batch = batch_columns(self.operator);
        let columns = self.operator.shape_columns().iter().enumerate().filter(|(c, _)| !batch.contains(c));
        let named = columns.zip(layout).map(|((_, name), value)| format!("{name} = {value}"));
        named.collect::<Vec<_>>().join(", ")
    }

    /// A point as `column = value`, with its sequences where it has some, and its cache state.
    pub(super) fn describe(&self, sample: &Sample) -> String {
        let mut text = if let Some(batch) = &sample.batch {
            let short = |name: &str, list: String| {
                let cut: String = list.chars().take(MAX_SEQUENCES_CHARS).collect();
                let dots = if cut.len() < list.len() { "..." } else { "" };
                if list.is_empty() { String::new() } else { format!(", {name} {cut}{dots}") }
            };
            self.describe_layout(&self.layout(sample))
                + &short("prefills", batch.format_prefill_chunks())
                + &short("decodes", batch.format_decode_contexts())
        } else {
            let columns = self.operator.shape_columns().iter().zip(sample.shape.values());
            columns.map(|(name, value)| format!("{name} = {value}")).collect::<Vec<_>>().join(", ")
        };
        text.push_str(match sample.cache {
            CacheState::Cold => ", cold",
            CacheState::Hot => ", hot",
        });
        text
    }

    /// A finding about a row.
    pub(super) fn point(
        &self,
        row: usize,
        rule: Rule,
        severity: Severity,
        expected: impl Into<String>,
        found: impl Into<String>,
        hint: impl Into<String>,
    ) -> Finding {
        let finding = Finding::new(rule, severity, expected, found, hint)
            .of(self.operator)
            .at(&self.file)
            .on(self.describe(&self.samples[row]));
        // Rows follow the header.
        Finding { line: Some(row + 2), ..finding }
    }

    /// A finding about the operator.
    pub(super) fn whole(
        &self,
        rule: Rule,
        severity: Severity,
        expected: impl Into<String>,
        found: impl Into<String>,
        hint: impl Into<String>,
    ) -> Finding {
        Finding::new(rule, severity, expected, found, hint).of(self.operator).at(&self.file)
    }
}

/// `part` of `whole` as a percentage in words.
pub(super) fn share(part: usize, whole: usize) -> String {
    format!("{part} of {whole} ({:.1} %)", 100.0 * part as f64 / whole.max(1) as f64)
}

/// Nanoseconds as microseconds that people read.
pub(super) fn us(ns: f64) -> String {
    format!("{:.2} us", ns / 1e3)
}

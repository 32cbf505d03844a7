//! From rows of tables to samples: units judged, cells judged, policies applied, all of it counted.

use std::collections::{BTreeMap, BTreeSet};

use plumbline_schema::{GpuSpec, Operator, OperatorShape, StepBatch, roofline::floor_ns};

use super::{
    BadCell, Clean, Dialect, ImportError,
    cells::{CellFault, RESOLUTION_NS, SHORTEST_KERNEL_NS, SourceTime, UnitCheck, ceiling_ns, median_ns},
    mlp::other_precision,
    tables::{Row, Table, time_column},
};
use crate::{samples::Sample, stats::TimeStats};

/// A sample to be made of a row: its shape, and the columns that its time is the sum of.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    pub operator: Operator,
    pub shape: OperatorShape,
    pub batch: Option<StepBatch>,
    /// The tool's operators whose times add up to ours.
    pub sources: &'static [&'static str],
    /// Whether it is of a batch of decodes.
    pub is_decode: bool,
}

impl Draft {
    pub fn new(operator: Operator, shape: OperatorShape, sources: &'static [&'static str]) -> Self {
        Self { operator, shape, batch: None, sources, is_decode: false }
    }
}

/// A sample with where it came from.
#[derive(Clone, Debug)]
pub(super) struct Collected {
    pub sample: Sample,
    /// Width that rounding leaves its time: a microsecond for each column summed.
    pub resolution_ns: f64,
    /// Index of the table.
    pub table: usize,
    /// Line in it.
    pub line: u64,
    /// The column of its (first) median.
    pub column: String,
    /// Whether it is of a batch of decodes.
    pub is_decode: bool,
}

/// What has been made of the tables so far.
#[derive(Debug)]
pub(super) struct Collector<'a> {
    pub gpu: &'a GpuSpec,
    pub dialect: Dialect,
    pub clean: &'a BTreeSet<Clean>,
    pub samples: Vec<Collected>,
    pub faults: Vec<BadCell>,
    pub cleaned: BTreeMap<(Clean, String), usize>,
    left_out: BTreeMap<(String, String), usize>,
    pub notes: BTreeSet<String>,
}

impl<'a> Collector<'a> {
    pub fn new(gpu: &'a GpuSpec, dialect: Dialect, clean: &'a BTreeSet<Clean>) -> Self {
        Self {
            gpu,
            dialect,
            clean,
            samples: Vec::new(),
            faults: Vec::new(),
            cleaned: BTreeMap::new(),
            left_out: BTreeMap::new(),
            notes: BTreeSet::new(),
        }
    }

    /// Says that rows of `what` are not used.
    pub fn leave_out(&mut self, what: impl Into<String>, num_rows: usize, reason: impl Into<String>) {
        if num_rows > 0 {
            *self.left_out.entry((what.into(), reason.into())).or_default() += num_rows;
        }
    }

    /// What was left out, with why and in how many rows.
    pub fn left_out(&self) -> impl Iterator<Item = (&str, &str, usize)> {
        self.left_out.iter().map(|((what, reason), num)| (what.as_str(), reason.as_str(), *num))
    }

    /// Says the median of a column that no operator here stands for.
    pub fn leave_out_column(&mut self, table: &Table, source: &str, reason: &str) {
        if !table.times(source) {
            return;
        }
        let mut times: Vec<f64> = table.rows().map(|row| median_ns(&row, source).unwrap_or(0.0)).collect();
        times.sort_by(f64::total_cmp);
        let median_us = times[times.len() / 2] / 1e3;
        self.leave_out(source, times.len(), format!("{reason}; median over its table {median_us} us"));
    }

    /// Says which of these operators have no columns in a table.
    pub fn leave_out_missing(&mut self, table: &Table, sources: &[&str]) {
        for &source in sources.iter().filter(|source| !table.times(source)) {
            self.leave_out(source, table.num_rows(), "no such column in its table");
        }
    }

    /// Whether a row is of 16-bit floats, as samples are; says so of one that is not.
    pub fn takes_precision_of(&mut self, row: &Row) -> bool {
        let is_taken = !other_precision(row);
        self.leave_out("rows of another precision", usize::from(!is_taken), "samples are of 16-bit models");
        is_taken
    }

    /// Makes samples of one table's drafts.
    ///
    /// # Errors
    /// When a column is of another unit. Bad cells are kept in `faults`, so that all are known before the first is told.
    pub fn take_table(
        &mut self,
        index: usize,
        table: &Table,
        drafts: Vec<(Row, Draft)>,
    ) -> Result<(), ImportError> {
        self.check_units(table, &drafts)?;
        for (row, draft) in drafts {
            match self.read(&row, &draft) {
                Ok(sample) => {
                    let column = time_column(draft.sources[0], "median");
                    let resolution_ns = RESOLUTION_NS * draft.sources.len() as f64;
                    let (line, is_decode) = (row.line, draft.is_decode);
                    let collected =
                        Collected { sample, resolution_ns, table: index, line, column, is_decode };
                    self.samples.push(collected);
                }
                Err(fault) => self.refuse(&row, fault),
            }
        }
        Ok(())
    }

    /// Drops what a policy covers and keeps the rest for the error.
    pub fn refuse(&mut self, row: &Row, fault: CellFault) {
        let CellFault { column, expected, found, policy } = fault;
        if self.clean.contains(&policy) {
            *self.cleaned.entry((policy, column)).or_default() += 1;
        } else {
            let (path, line) = (row.path().to_path_buf(), row.line);
            self.faults.push(BadCell { path, line, column, expected, found, policy });
        }
    }

    fn check_units(&self, table: &Table, drafts: &[(Row, Draft)]) -> Result<(), ImportError> {
        let mut checks: BTreeMap<&str, UnitCheck> = BTreeMap::new();
        for (row, draft) in drafts {
            for source in draft.sources {
                if let Some(time_ns) = median_ns(row, source) {
                    let check = checks.entry(source).or_default();
                    check.add(time_ns, draft.operator, &draft.shape, self.gpu);
                }
            }
        }
        for (source, check) in checks {
            if let Some((num_cells, ratio)) = check.verdict() {
                let (path, column) = (table.path.clone(), time_column(source, "median"));
                return Err(ImportError::Unit { path, column, num_cells, ratio });
            }
        }
        Ok(())
    }

    fn read(&self, row: &Row, draft: &Draft) -> Result<Sample, CellFault> {
        let mut times = draft.sources.iter().map(|source| SourceTime::read(row, source));
        // A draft has at least one source.
        let first = times.next().unwrap_or_else(|| SourceTime::read(row, ""))?;
        let time = times.try_fold(first, |sum, time| time.map(|time| sum.plus(time)))?;
        let floor = floor_ns(&draft.shape, self.gpu);
        let stats = lifted(time.stats(), floor);
        self.check_physics(draft, stats.p50_ns, "median")?;
        self.check_physics(draft, stats.min_ns, "min")?;
        Ok(Sample {
            batch: draft.batch.clone(),
            kernel: format!("{} {}", self.dialect.name(), draft.sources.join(" + ")),
            // Its state is that of a model's own launch: Vidur launches an operator once in each pass over a layer's whole
            // sequence, so that weights were last read a layer ago and activations were just written.
            ..Sample::bare(draft.operator, draft.shape, stats)
        })
    }

    fn check_physics(&self, draft: &Draft, time_ns: f64, statistic: &str) -> Result<(), CellFault> {
        let floor = floor_ns(&draft.shape, self.gpu).max(SHORTEST_KERNEL_NS);
        let ceiling = ceiling_ns(draft.operator, &draft.shape, self.gpu);
        let ms = |ns: f64| ns / super::cells::NS_PER_MS;
        let (expected, policy) = if time_ns < floor {
            (format!("at least the physical floor {} ms", ms(floor)), Clean::DropBelowFloor)
        } else if time_ns > ceiling {
            (format!("at most {} ms, far above what the data sheet says", ms(ceiling)), Clean::DropInvalid)
        } else {
            return Ok(());
        };
        let column = time_column(&draft.sources.join(" + "), statistic);
        Err(CellFault { column, expected, found: ms(time_ns).to_string(), policy })
    }
}

/// Statistics of which a time at the floor is not below it: from ms to ns it may lose its last bits.
fn lifted(stats: TimeStats, floor: f64) -> TimeStats {
    const ROUNDING: f64 = 1e-9;
    let lift = |ns: f64| if ns < floor && ns >= floor * (1.0 - ROUNDING) { floor } else { ns };
    TimeStats {
        min_ns: lift(stats.min_ns),
        p50_ns: lift(stats.p50_ns),
        mean_ns: lift(stats.mean_ns),
        p95_ns: lift(stats.p95_ns),
        max_ns: lift(stats.max_ns),
        ..stats
    }
}

/// Whether the work of a shape can be counted: FLOPs and bytes of it stay far below 2^63.
pub(super) fn is_countable(shape: &OperatorShape) -> bool {
    // As samples' files are judged: products of all numbers up to 2^53 leave room for the constant factors.
    let limit = (1u64 << 53) as f64;
    let work = match *shape {
        OperatorShape::Attention { heads, load } => {
            let tokens = load.prefill_kv_tokens as f64 + load.decode_kv_tokens as f64;
            let pairs = load.prefill_pairs as f64 + tokens + f64::from(load.num_tokens());
            f64::from(heads.num_q_heads.max(heads.num_kv_heads)) * f64::from(heads.head_dim) * pairs
        }
        _ => shape.values().iter().map(|&value| value as f64).product(),
    };
    work < limit
}

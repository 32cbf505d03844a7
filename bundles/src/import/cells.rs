//! From the cells of one operator's time to statistics in ns, and what is wrong with cells that cannot be true.

use plumbline_schema::{GpuSpec, Operator, OperatorShape, roofline::roofline_ns};

use super::{
    Clean,
    tables::{Row, quoted, time_column},
};
use crate::stats::TimeStats;

/// Nanoseconds of the tables' unit, the millisecond.
pub const NS_PER_MS: f64 = 1e6;

/// Tables are rounded to a microsecond, so that each time is known to half of this.
pub const RESOLUTION_NS: f64 = 1_000.0;

/// No kernel is shorter, launched and finished: half of what tables can tell from nothing.
pub const SHORTEST_KERNEL_NS: f64 = 500.0;

/// Standard deviations of a normal distribution's mean to its 95th percentile.
const Z_P95: f64 = 1.645;

/// What a launch may take besides its roofline time before times are called absurd, ns: a launch of several kernels.
const LAUNCH_NS: f64 = 20_000.0;

/// Largest sane ratio of a time to roofline plus [`LAUNCH_NS`]; the real tables stay below 5.
const MAX_RATIO: f64 = 100.0;

/// The same where the data sheet says little: links are slower than memory, and `FlashInfer` appends a chunk to the KV cache
/// on few SMs (100 times the roofline of an A800).
const MAX_LOOSE_RATIO: f64 = 400.0;

/// Least sane ratio of a time to the larger of roofline and a microsecond. Data in the L2 cache beats the roofline,
/// by the bandwidth of the cache over that of memory: a factor of about three.
const MIN_RATIO: f64 = 0.15;

/// A cell that cannot be true: its statistic, what was expected, what was found.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct CellFault {
    pub column: String,
    pub expected: String,
    pub found: String,
    pub policy: Clean,
}

/// Statistics of one time of a table, ns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct SourceTime {
    min_ns: f64,
    max_ns: f64,
    mean_ns: f64,
    median_ns: f64,
    std_ns: f64,
    count: u32,
}

impl SourceTime {
    /// Reads the cells of `source`; every one must hold a time.
    pub fn read(row: &Row, source: &str) -> Result<Self, CellFault> {
        let cell = |statistic: &str, may_be_zero: bool| {
            let column = time_column(source, statistic);
            let text = row.text(&column).unwrap_or_default();
            let fault = |expected: &str, policy| CellFault {
                column: column.clone(),
                expected: expected.to_owned(),
                found: quoted(text),
                policy,
            };
            if is_missing(text) {
                return Err(fault("a time in ms", Clean::DropMissing));
            }
            let ms: f64 = text.parse().map_err(|_| fault("a time in ms", Clean::DropInvalid))?;
            let ns = ms * NS_PER_MS;
            if ns.is_finite() && (ns > 0.0 || (may_be_zero && ns == 0.0)) {
                Ok(ns)
            } else {
                let expected =
                    if may_be_zero { "a finite time in ms from 0" } else { "a finite time in ms above 0" };
                Err(fault(expected, Clean::DropInvalid))
            }
        };
        // The median first: it is what a predictor learns, so its fault is the one to name.
        let time = Self {
            median_ns: cell("median", false)?,
            min_ns: cell("min", false)?,
            max_ns: cell("max", false)?,
            mean_ns: cell("mean", false)?,
            std_ns: cell("std", true)?,
            count: Self::count(row, source),
        };
        time.check_order(source)?;
        Ok(time)
    }

    /// Repeats behind the statistics; 1 where the table does not say.
    fn count(row: &Row, source: &str) -> u32 {
        let count = row.text(&time_column(source, "count")).and_then(|text| text.parse::<f64>().ok());
        count.filter(|c| *c >= 1.0 && *c <= f64::from(u32::MAX)).map_or(1, |c| c as u32)
    }

    fn check_order(&self, source: &str) -> Result<(), CellFault> {
        // A mean of equal times may differ from them in the last bits.
        const ROUNDING: f64 = 1e-9;
        let (least, most) = (self.min_ns * (1.0 - ROUNDING), self.max_ns * (1.0 + ROUNDING));
        for (statistic, ns) in [("median", self.median_ns), ("mean", self.mean_ns)] {
            if !(least..=most).contains(&ns) {
                let ms = |ns: f64| ns / NS_PER_MS;
                return Err(CellFault {
                    column: time_column(source, statistic),
                    expected: format!("a time from min = {} to max = {}", ms(self.min_ns), ms(self.max_ns)),
                    found: ms(ns).to_string(),
                    policy: Clean::DropInvalid,
                });
            }
        }
        Ok(())
    }

    /// Two launches one after the other: times add up, and so do the squares of their deviations, taken as independent.
    pub fn plus(self, other: Self) -> Self {
        Self {
            min_ns: self.min_ns + other.min_ns,
            max_ns: self.max_ns + other.max_ns,
            mean_ns: self.mean_ns + other.mean_ns,
            median_ns: self.median_ns + other.median_ns,
            std_ns: self.std_ns.hypot(other.std_ns),
            count: self.count.min(other.count),
        }
    }

    /// As a sample's statistics.
    ///
    /// The tables have no 95th percentile. Its stand-in is that of a normal distribution of their mean and deviation,
    /// kept between median and maximum.
    pub fn stats(&self) -> TimeStats {
        let (min_ns, p50_ns) = (self.min_ns.min(self.median_ns), self.median_ns);
        let max_ns = self.max_ns.max(p50_ns);
        TimeStats {
            n: self.count,
            min_ns,
            p50_ns,
            mean_ns: self.mean_ns.clamp(min_ns, max_ns),
            p95_ns: (self.mean_ns + Z_P95 * self.std_ns).clamp(p50_ns, max_ns),
            max_ns,
            std_ns: self.std_ns,
        }
    }
}

/// Whether a cell holds nothing, in one of the ways that tables say so.
pub(super) fn is_missing(text: &str) -> bool {
    ["", "nan", "na", "n/a", "none", "null"].contains(&text.to_ascii_lowercase().as_str())
}

/// A median in ns, if the cell holds a time.
pub(super) fn median_ns(row: &Row, source: &str) -> Option<f64> {
    let ms: f64 = row.text(&time_column(source, "median"))?.parse().ok()?;
    let ns = ms * NS_PER_MS;
    (ns.is_finite() && ns > 0.0).then_some(ns)
}

/// Largest time that an operator may take, ns; beyond it the time is of something else.
pub(super) fn ceiling_ns(operator: Operator, shape: &OperatorShape, gpu: &GpuSpec) -> f64 {
    let is_loose = operator.is_collective() || operator == Operator::KvCacheWrite;
    let ratio = if is_loose { MAX_LOOSE_RATIO } else { MAX_RATIO };
    ratio * (roofline_ns(shape, gpu) + LAUNCH_NS)
}

/// How the times of a column stand to what their operator can take.
#[derive(Debug, Default)]
pub(super) struct UnitCheck {
    num: usize,
    num_low: usize,
    num_high: usize,
    ratios: Vec<f64>,
}

impl UnitCheck {
    /// Adds a median.
    pub fn add(&mut self, time_ns: f64, operator: Operator, shape: &OperatorShape, gpu: &GpuSpec) {
        let roofline = roofline_ns(shape, gpu).max(RESOLUTION_NS);
        self.num += 1;
        self.num_low += usize::from(time_ns < MIN_RATIO * roofline);
        self.num_high += usize::from(time_ns > ceiling_ns(operator, shape, gpu));
        self.ratios.push(time_ns / roofline);
    }

    /// The median ratio of a column of at least four times of which nine in ten are too low or too high to be true.
    ///
    /// A few such times are bad cells; nearly all of them are another unit.
    pub fn verdict(mut self) -> Option<(usize, f64)> {
        let nearly_all = |num: usize| 10 * num >= 9 * self.num;
        if self.num < 4 || !(nearly_all(self.num_low) || nearly_all(self.num_high)) {
            return None;
        }
        self.ratios.sort_by(f64::total_cmp);
        Some((self.num, self.ratios[self.num / 2]))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::import::tables::Table;

    fn time(cells: &str) -> Result<SourceTime, CellFault> {
        let header = ["min", "max", "mean", "median", "std"].map(|s| time_column("emb", s)).join(",");
        let table = Table::parse(format!("{header}\n{cells}\n").as_bytes(), Path::new("mlp.csv")).unwrap();
        SourceTime::read(&table.rows().next().unwrap(), "emb")
    }

    #[test]
    fn milliseconds_become_statistics_in_order() {
        let stats = time("0.010,0.014,0.012,0.0115,0.001").unwrap().stats();
        stats.check().unwrap();
        assert_eq!((stats.n, stats.min_ns, stats.p50_ns), (1, 10_000.0, 11_500.0));
        // 12 us + 1.645 x 1 us, below the longest.
        assert!((stats.p95_ns - 13_645.0).abs() < 1e-9, "{stats:?}");
        let twice = time("0.010,0.014,0.012,0.0115,0.001").unwrap();
        let both = twice.plus(twice).stats();
        assert_eq!((both.p50_ns, both.max_ns), (23_000.0, 28_000.0));
        assert!((both.std_ns - 1_000.0 * 2f64.sqrt()).abs() < 1e-9);
        // Sums of equal times may differ in the last bits.
        time("0.055,0.055,0.05500000000000001,0.055,6.9e-18").unwrap().stats().check().unwrap();
    }

    #[test]
    fn each_fault_names_its_policy() {
        use Clean::{DropInvalid, DropMissing};
        for (cells, statistic, policy) in [
            (",,,,", "median", DropMissing),
            ("1,1,1,NaN,0", "median", DropMissing),
            ("1,1,null,1,0", "mean", DropMissing),
            ("1,1,1,soon,0", "median", DropInvalid),
            ("1,1,1,0.0,0", "median", DropInvalid),
            ("1,1,1,-1,0", "median", DropInvalid),
            ("1,inf,1,1,0", "max", DropInvalid),
            ("0,1,1,1,0", "min", DropInvalid),
            ("1,1,1,1,-1", "std", DropInvalid),
            ("1,2,1.5,3,0", "median", DropInvalid),
            ("2,1,1.5,1.5,0", "median", DropInvalid),
            ("1,2,9,1,0", "mean", DropInvalid),
        ] {
            let fault = time(cells).unwrap_err();
            assert_eq!((fault.column, fault.policy), (time_column("emb", statistic), policy), "{cells}");
        }
    }

    #[test]
    fn a_column_of_another_unit_is_told_from_bad_cells() {
        let gpu = GpuSpec::by_name("a100-sxm4-80gb").unwrap();
        let gemm = |m| OperatorShape::Gemm { m, n: 4096, k: 4096 };
        let verdict = |factor: f64, num_bad: usize| {
            let mut check = UnitCheck::default();
            for i in 0..20 {
                let shape = gemm(1 << (i % 12));
                // What a GPU reaches: 1.4 times its roofline, and 5 us of launch.
                let time_ns = 1.4 * roofline_ns(&shape, &gpu) + 5_000.0;
                let factor = if i < num_bad { factor } else { 1.0 };
                check.add(time_ns * factor, Operator::OProj, &shape, &gpu);
            }
            check.verdict().is_some()
        };
        assert!(!verdict(1.0, 20));
        assert!(verdict(1e3, 20) && verdict(1e-3, 20) && verdict(1e6, 20));
        assert!(!verdict(1e3, 15) && !verdict(1e-3, 15));
    }
}
